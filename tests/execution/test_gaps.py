"""What the table of `mutations.py` showed to be without a test: of the journal, samples, sizes, halves, a proof."""

import errno
import json
import os
import resource
import shutil
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from jobs import Job, convert_checkpoint, plan_conversion
from safetensors.torch import load_file, save_file
from torture import BATCH, RANKS, RECORD, contents
from xxhash import xxh3_64_digest

import reshard.execution.execute
from reshard.errors import Refused
from reshard.execution.execute import find_incomplete_file
from reshard.execution.records import parse_records
from reshard.formats.target_names import JOURNAL
from reshard.planning.copies import Copies, WrongPlan
from reshard.planning.file_layout import lay_out_files
from reshard.storage.local import CACHED, write_range
from reshard.synthetic import SMALL_V3, write_checkpoint
from reshard.verification.checksums import audit_target

Record = tuple[int, int, int, bytes]
"""Offset, number of the file, size, checksum."""


class Crash(BaseException):
    """The end of the program, without a word."""


@pytest.fixture(scope="module")
def source(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("gaps") / "source"
    write_checkpoint(folder, SMALL_V3, 2)
    return folder


@pytest.fixture(scope="module")
def wanted(source: Path) -> dict[str, str]:
    convert_checkpoint(Job(source, RANKS), source.with_name("wanted"))
    return contents(source.with_name("wanted"))


@pytest.fixture
def begun(source: Path, tmp_path: Path) -> Path:
    """A target in which everything is durable and nothing has its final name."""

    def crash(*_: object) -> None:
        raise Crash

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(reshard.execution.execute, "rename_to_final", crash)
        with pytest.raises(Crash):
            convert_checkpoint(Job(source, RANKS), tmp_path / "target")
    return tmp_path / "target"


def records_of(target: Path) -> list[Record]:
    content = (target / JOURNAL).read_bytes()
    place, found = content.index(b"\n") + 1, []
    while place < len(content):
        (count,) = BATCH.unpack_from(content, place)
        place += BATCH.size
        found += list(RECORD.iter_unpack(content[place : place + count * RECORD.size]))
        place += count * RECORD.size + 8
    return found


def rewrite_journal(target: Path, *batches: Sequence[Record]) -> int:
    """The journal with other batches; returns where the first of them begins."""
    line = (target / JOURNAL).read_bytes().split(b"\n")[0] + b"\n"
    content = line
    for batch in batches:
        text = BATCH.pack(len(batch)) + b"".join(RECORD.pack(*record) for record in batch)
        content += text + xxh3_64_digest(text)
    (target / JOURNAL).write_bytes(content)
    return len(line)


def refused_kinds(source: Path, target: Path) -> set[str]:
    with pytest.raises(Refused) as error:
        convert_checkpoint(Job(source, RANKS), target)
    return {problem.kind for problem in error.value.problems}


def partial(target: Path, rank: int) -> Path:
    return target / f"model{rank}-mp{RANKS}.safetensors.partial"


# --- the journal ---


def test_what_the_journal_has_not_is_written_and_nothing_else_is(
    begun: Path, source: Path, wanted: dict[str, str]
) -> None:
    """It has all of rank 0 and nothing of the others, whose ranges lie at the same offsets."""
    kept = [record for record in records_of(begun) if record[1] == 0]
    rewrite_journal(begun, kept)
    for rank in range(1, RANKS):
        partial(begun, rank).write_bytes(bytes(partial(begun, rank).stat().st_size))
    done = convert_checkpoint(Job(source, RANKS), begun).done
    assert done is not None
    assert done.resumed == sum(size for _, _, size, _ in kept) > 0
    assert contents(begun) == wanted


def test_a_record_that_is_not_there_is_missed_wherever_it_is(begun: Path, source: Path) -> None:
    plan, records = plan_conversion(Job(source, RANKS)), sorted(records_of(begun), key=lambda record: record[1::-1])
    packed = [RECORD.pack(*record) for record in records]
    assert find_incomplete_file(plan, parse_records(b"".join(packed))) is None
    for number, (_, file, _, _) in enumerate(records):
        without = parse_records(b"".join(packed[:number] + packed[number + 1 :]))
        assert find_incomplete_file(plan, without) == plan.files[file].name


@pytest.mark.parametrize("rest", [None, 0, -1])
def test_a_partial_file_that_is_gone_is_not_taken_for_written(rest: int | None, begun: Path, source: Path) -> None:
    """Something of rank 0 is still to be written; of rank 1 the journal has everything, but not all of it is there."""
    rewrite_journal(begun, [record for record in records_of(begun) if record[1] != 0])
    if rest is None:
        partial(begun, 1).unlink()
    else:
        os.truncate(partial(begun, 1), partial(begun, 1).stat().st_size + rest if rest else 0)
    assert refused_kinds(source, begun) == {"damaged-journal"}
    assert not list(begun.glob("*.safetensors"))


def test_a_flipped_bit_anywhere_in_a_batch_is_refused(begun: Path, source: Path) -> None:
    """In the checksum of a range too: it would get into the manifest."""
    records = records_of(begun)
    start = rewrite_journal(begun, records[:2], records[2:])
    content = (begun / JOURNAL).read_bytes()
    for place in range(BATCH.size, BATCH.size + 2 * RECORD.size + 8, 4):
        spoiled = bytearray(content)
        spoiled[start + place] ^= 1
        (begun / JOURNAL).write_bytes(spoiled)
        assert refused_kinds(source, begun) == {"damaged-journal"}, place


# --- what is taken for finished ---


@pytest.mark.parametrize("share", [0, 0.5, 1])
def test_a_model_that_differs_at_one_place_of_the_samples_is_another(
    share: float, source: Path, wanted: dict[str, str], tmp_path: Path
) -> None:
    """At the beginning, the middle or the end of the data of one file."""
    twin, target = shutil.copytree(source, tmp_path / "twin"), source.with_name("wanted")
    path = sorted(twin.glob("*.safetensors"))[1]
    with path.open("r+b") as file:
        begin = 8 + int.from_bytes(file.read(8), "little")
        end = path.stat().st_size
        place = min(begin + int(share * (end - begin)) + 100, end - 1)
        file.seek(place)
        byte = file.read(1)[0]
        file.seek(place)
        file.write(bytes([byte ^ 1]))
    assert refused_kinds(twin, target) == {"target-not-empty"}
    assert contents(target) == wanted


def test_a_finished_file_of_another_size_is_not_taken_for_finished(source: Path, tmp_path: Path) -> None:
    target = tmp_path / "target"
    convert_checkpoint(Job(source, RANKS), target)
    os.truncate(target / "model2-mp4.safetensors", 1000)
    with pytest.raises(Refused, match=r"model2-mp4\.safetensors") as error:
        convert_checkpoint(Job(source, RANKS), target)
    assert {problem.kind for problem in error.value.problems} == {"wrong-size"}


@pytest.mark.parametrize("key", ["reshard", "ranks", "counts", "source_samples", "origin", "files", "side_files"])
def test_a_manifest_with_another_value_in_it_is_refused(key: str, wanted: dict[str, str], source: Path) -> None:
    """A plausible one: else a digit that flips in a checksum would speak against a file that is right."""
    path = source.with_name("wanted") / "reshard.json"
    before = path.read_text()
    manifest = json.loads(before)
    manifest[key] = changed(manifest[key])
    path.write_text(json.dumps(manifest))
    try:
        with pytest.raises(Refused) as error:
            audit_target(path.parent)
        assert {problem.kind for problem in error.value.problems} == {"wrong-manifest"}
        assert refused_kinds(source, path.parent) == {"wrong-manifest"}
    finally:
        path.write_text(before)
    assert contents(path.parent) == wanted


def changed(value: Any) -> Any:
    """With another number or letter somewhere, of the same type."""
    if isinstance(value, dict):
        key = next(reversed(value))
        return {**value, key: changed(value[key])}
    if isinstance(value, list):
        return [*value[:-1], changed(value[-1])]
    return value[:-1] + ("0" if value[-1:] != "0" else "1") if isinstance(value, str) else value + 1


# --- the plan ---


@pytest.mark.parametrize("index", [0, 7, -1])
def test_a_plan_that_does_not_tile_is_not_given_out(index: int, source: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """No checkpoint leads to one: a copy is moved by a byte in the target, of which the other proof knows nothing."""

    def wrong(*arguments: Any) -> Any:
        files, copies = lay_out_files(*arguments)
        columns = {name: getattr(copies, name).copy() for name in Copies.__slots__}
        columns["target_offset"][index] += 1
        return files, Copies(**columns)

    monkeypatch.setattr("reshard.planning.planner.lay_out_files", wrong)
    with pytest.raises(WrongPlan):
        plan_conversion(Job(source, RANKS))


HALVES = """
name  = "halves"
about = "a gate and what it lets through, one behind the other"
left  = "left"
right = "right"
files = "model{rank}-mp{ranks}.safetensors"
rules = [
["same", "both", "both", "packed rows"],
]
"""


@pytest.mark.parametrize("ranks", [1, 2, 4])
def test_each_half_is_cut_by_itself(ranks: int, tmp_path: Path) -> None:
    both = torch.arange(16 * 3, dtype=torch.int32).reshape(16, 3)
    (tmp_path / "source").mkdir()
    save_file({"both": both}, tmp_path / "source" / "model.safetensors")
    (tmp_path / "halves.toml").write_text(HALVES)
    convert_checkpoint(Job(tmp_path / "source", ranks, str(tmp_path / "halves.toml")), tmp_path / "target")
    for rank in range(ranks):
        found = load_file(tmp_path / "target" / f"model{rank}-mp{ranks}.safetensors")["both"]
        assert torch.equal(found, torch.cat([half.chunk(ranks)[rank] for half in both.chunk(2)]))


PLAIN = """
name  = "plain"
about = "every tensor as it is"
left  = "left"
right = "right"
files = "model{rank}-mp{ranks}.safetensors"
rules = [
["same", "a", "a", "replicate"],
["same", "b", "b", "replicate"],
["same", "y", "y", "replicate"],
["same", "z", "z", "replicate"],
]
"""


def test_neighbours_from_two_files_are_read_from_their_own(tmp_path: Path) -> None:
    """In the target b comes behind a; in its file it begins where in the other one a ends."""
    tensors = {name: torch.full((8,), number, dtype=torch.int32) for number, name in enumerate("abyz")}
    (tmp_path / "source").mkdir()
    for number, names in enumerate(("az", "yb"), 1):
        entries = {
            name: {"dtype": "I32", "shape": [8], "data_offsets": [32 * place, 32 * place + 32]}
            for place, name in enumerate(names)
        }
        header = json.dumps(entries).encode()
        data = b"".join(tensors[name].numpy().tobytes() for name in names)
        path = tmp_path / "source" / f"model-0000{number}-of-00002.safetensors"
        path.write_bytes(len(header).to_bytes(8, "little") + header + data)
    (tmp_path / "plain.toml").write_text(PLAIN)
    convert_checkpoint(Job(tmp_path / "source", 1, str(tmp_path / "plain.toml")), tmp_path / "target")
    found = load_file(tmp_path / "target" / "model0-mp1.safetensors")
    assert all(torch.equal(found[name], tensors[name]) for name in "abyz")


# --- single writes ---


@contextmanager
def largest_file(size: int) -> Iterator[None]:
    """A write that would go beyond it is cut short; one that begins there fails."""
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (size, before[1]))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)


def test_a_write_that_the_system_cuts_short_is_not_taken_for_whole(tmp_path: Path) -> None:
    data = np.arange(3 << 20, dtype=np.uint32).tobytes()[: 3 << 20]
    with (tmp_path / "file").open("wb") as file:
        with largest_file(2 << 20), pytest.raises(OSError, match="File too large") as error:
            write_range(file.fileno(), memoryview(data), 0, CACHED)
        assert error.value.errno == errno.EFBIG
    assert (tmp_path / "file").read_bytes() == data[: 2 << 20]
