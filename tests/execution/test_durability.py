"""In what order things reach the disk, from the system calls of a conversion as strace sees them.

A kill cannot show this: what the kernel has, it keeps. It matters when the machine itself goes down.
"""

import os
import re
import shutil
import struct
import subprocess
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path

import pytest
from jobs import NOTHING_CACHED
from torture import BATCH, CHECKSUM_SIZE, RANKS, RECORD

from reshard.formats.target_names import JOURNAL
from reshard.synthetic import SMALL_V3, write_checkpoint

PROGRAM = (
    "import reshard.execution.writer; reshard.execution.writer.FLUSH_SECONDS = 0.001\n"
    "from reshard.cli.process import entry; entry()"
)
CALLS = "openat,write,pwrite64,pwritev,pwritev2,fsync,fdatasync,rename,renameat,renameat2,unlink,unlinkat"
LINE = re.compile(r"(\d+) +(?:<\.\.\. (?P<resumed>\w+) resumed>)?(?P<text>.*)")
CALL = re.compile(r"(?P<name>\w+)\((?P<arguments>.*)\) = (?P<result>-?\d+)")
MANIFEST = "reshard.json"


@dataclass(frozen=True, slots=True)
class Call:
    """A system call: the lines of the trace where it begins and ends, and what it was."""

    begin: int
    end: int
    name: str
    arguments: str
    result: int

    @property
    def path(self) -> str:
        """Of the descriptor that is its first argument, or the first path in quotes."""
        found = re.match(r"\d+<([^>]*)>", self.arguments) or re.search(r'"([^"]*)"', self.arguments)
        return found[1] if found else ""


@dataclass(frozen=True, slots=True)
class Trace:
    """A whole conversion."""

    calls: list[Call]
    target: Path
    journal: bytes
    """All that was ever written to it."""

    def of(self, names: str, path: Path) -> list[Call]:
        """The calls of these names on a path."""
        return [call for call in self.calls if call.name in names.split() and call.path == str(path)]

    def writes(self, path: Path) -> list[Call]:
        return self.of("write pwrite64 pwritev pwritev2", path)

    def syncs(self, path: Path) -> list[Call]:
        return self.of("fsync fdatasync", path)

    @property
    def renames(self) -> list[Call]:
        return [call for call in self.calls if call.name.startswith("rename") and str(self.target) in call.arguments]

    def partials(self) -> list[Path]:
        return [Path(call.path) for call in self.renames]


@pytest.fixture(scope="module", params=[("1", "yes"), ("4", "no")], ids=["cached", "past the cache"])
def trace(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Trace:
    if not shutil.which("strace"):
        pytest.skip("strace is not installed")
    folder = tmp_path_factory.mktemp("trace").resolve()
    write_checkpoint(folder / "source", SMALL_V3, 2)
    target, kept = folder / "target", folder / "kept"
    target.mkdir()
    # The journal is removed at the end; by a second name it stays.
    (target / JOURNAL).touch()
    os.link(target / JOURNAL, kept)
    jobs, cache = request.param
    program = NOTHING_CACHED + PROGRAM if cache == "no" else PROGRAM
    command = ["strace", "-f", "-y", "-s", "0", "-o", str(folder / "trace"), "-e", f"trace={CALLS}", sys.executable]
    command += ["-c", program, "convert", str(folder / "source"), str(target), "--mp", str(RANKS)]
    done = subprocess.run([*command, "--jobs", jobs, "--cache", cache], check=False, capture_output=True, text=True)
    if "ptrace" in done.stderr and done.returncode:
        pytest.skip("strace may not trace here")
    assert done.returncode == 0, done.stderr
    return Trace(list(calls_of((folder / "trace").read_text())), target, kept.read_bytes())


def calls_of(text: str) -> Iterator[Call]:
    """In the order in which they end. A call in which another thread had its turn stands in the trace in two parts."""
    open_calls: dict[str, tuple[int, str]] = {}
    for number, line in enumerate(text.splitlines()):
        found = LINE.fullmatch(line)
        assert found, line
        thread, begin, whole = found[1], number, found["text"]
        if found["resumed"]:
            begin, first = open_calls.pop(thread)
            whole = first + whole
        if whole.endswith("<unfinished ...>"):
            open_calls[thread] = (begin, whole.removesuffix("<unfinished ...>"))
        elif call := CALL.match(re.sub(r"\) += ", ") = ", whole)):
            yield Call(begin, number, call["name"], call["arguments"], int(call["result"]))


def test_a_batch_of_the_journal_comes_behind_the_bytes_that_it_speaks_of(trace: Trace) -> None:
    journal = trace.target / JOURNAL
    written = {path.name: list(map(extent, trace.writes(path))) for path in trace.partials()}
    batches, records = batches_of(trace), 0
    for write, batch in batches:
        for offset, file, size, _ in batch:
            path = trace.target / f"model{file}-mp{RANKS}.safetensors.partial"
            data = [call for begin, end, call in written[path.name] if begin < offset + size and end > offset]
            assert sum(call.result for call in data) == size
            behind = max(call.end for call in data)
            assert any(behind < sync.begin and sync.end < write.begin for sync in trace.syncs(path)), (offset, path)
            records += 1
    # Batches while the data were still coming: else there was no order to be seen.
    assert len(batches) >= 2
    assert records >= 200
    assert all(write.result > 0 for write in trace.writes(journal))


def test_every_write_to_the_journal_is_made_durable_before_the_next_step(trace: Trace) -> None:
    journal = trace.target / JOURNAL
    steps = [*trace.writes(journal), trace.renames[0]]
    for write, following in pairwise(steps):
        assert any(write.end < sync.begin and sync.end < following.begin for sync in trace.syncs(journal))


def test_the_names_of_the_files_are_durable_before_the_first_batch(trace: Trace) -> None:
    """Else the journal could speak of a file that is not there."""
    ranks = [path for path in trace.partials() if ".safetensors" in path.name]
    made = [call.end for call in trace.calls if call.name == "openat" and any(str(p) in call.arguments for p in ranks)]
    first = batches_of(trace)[0][0]
    assert len(made) == RANKS
    assert any(max(made) < sync.begin and sync.end < first.begin for sync in trace.syncs(trace.target))


def test_nothing_is_renamed_before_all_is_durable(trace: Trace) -> None:
    """The rank files, the side files, the run configuration, the manifest, and a journal that holds everything."""
    first, partials = trace.renames[0], trace.partials()
    assert len(partials) == RANKS + 4
    for path in partials:
        behind = max(call.end for call in trace.writes(path))
        assert any(behind < sync.begin and sync.end < first.begin for sync in trace.syncs(path)), path
    assert sum(size for _, batch in batches_of(trace) for _, _, size, _ in batch) == data_size(trace.target)
    assert max(call.end for call in trace.writes(trace.target / JOURNAL)) < first.begin


def test_the_manifest_is_renamed_last_and_the_names_are_durable_before_the_journal_goes(trace: Trace) -> None:
    assert trace.partials()[-1].name == f"{MANIFEST}.partial"
    (removal,) = trace.of("unlink unlinkat", trace.target / JOURNAL)
    before, last, syncs = *trace.renames[-2:], trace.syncs(trace.target)
    assert any(before.end < sync.begin and sync.end < last.begin for sync in syncs)
    assert any(last.end < sync.begin and sync.end < removal.begin for sync in syncs)
    later = [call for call in trace.calls if call.begin > removal.end and str(trace.target) in call.path]
    assert [call.name for call in later if call.name != "openat"] == ["fsync"]


def extent(call: Call) -> tuple[int, int, Call]:
    """Where the bytes of a pwrite begin and end in the file."""
    found = re.search(r"\], 1, (\d+)(?:, \S+.*)?$", call.arguments)
    assert found, call.arguments
    return int(found[1]), int(found[1]) + call.result, call


def batches_of(trace: Trace) -> list[tuple[Call, list[tuple[int, int, int, bytes]]]]:
    """Each batch of the journal: the call that wrote it, and its records as offset, file, size, checksum."""
    writes, place, found = trace.writes(trace.target / JOURNAL), 0, []
    assert sum(call.result for call in writes) == len(trace.journal)
    for number, call in enumerate(writes):
        text = trace.journal[place : place + call.result]
        place += call.result
        if number:
            (count,) = BATCH.unpack_from(text)
            assert len(text) == BATCH.size + count * RECORD.size + CHECKSUM_SIZE
            found.append((call, list(RECORD.iter_unpack(text[BATCH.size : -CHECKSUM_SIZE]))))
    return found


def data_size(target: Path) -> int:
    """Of all rank files, without their headers."""
    files = [path.read_bytes() for path in target.glob("*.safetensors")]
    return sum(len(content) - 8 - struct.unpack_from("<Q", content)[0] for content in files)
