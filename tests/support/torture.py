"""Kills conversions at random moments, hundreds of times, and looks whether anything was lost. Run it: `make torture`.

Every conversion is killed by SIGKILL and started again until one start gets through. Then each of its files must be
that of a conversion that nobody disturbed; until then no file may have a final name and be another.
"""

import argparse
import json
import os
import random
import signal
import struct
import subprocess
import sys
import tempfile
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from hashlib import sha256
from itertools import cycle
from pathlib import Path
from typing import IO, Any

from reshard.formats.target_names import JOURNAL
from reshard.synthetic import SMALL_V3, write_checkpoint
from reshard.text import format_table

RANKS = 4
FILES = 4
LARGE: dict[str, Any] = {**SMALL_V3, "num_hidden_layers": 16}
"""A DeepSeek-V3 of 138 MB, so that writing takes most of the time of a run."""
PROGRAM = """
import os, pathlib
import reshard.execution.execute, reshard.execution.writer
from reshard.cli.process import entry

def telling(function):
    def tell(*arguments, **options):
        os.write({pipe}, b".")
        return function(*arguments, **options)
    return tell

reshard.execution.writer.FLUSH_SECONDS = 0.02
reshard.execution.writer.Ledger.add = telling(reshard.execution.writer.Ledger.add)
for name in ("open_journal", "open_targets", "write_side_files", "make_durable", "write_durable", "rename_to_final"):
    setattr(reshard.execution.execute, name, telling(getattr(reshard.execution.execute, name)))
pathlib.Path.rename = telling(pathlib.Path.rename)
entry()
"""
"""The command, with a journal as busy as that of a long run; it tells of every window, and of each other step."""
JITTER = 0.02
"""In seconds: so long at most after a step comes the kill."""
MOST_KILLS = 6
"""Of one conversion."""
BATCH, RECORD = struct.Struct("<I"), struct.Struct("<QII16s")
CHECKSUM_SIZE = 8


@dataclass(frozen=True, slots=True)
class Mode:
    """How to work."""

    jobs: int
    cache: str


Moment = tuple[int, float]
"""The step of a run behind which it is killed, and so many seconds later."""
NEVER = (sys.maxsize, 0.0)
MODES = [Mode(jobs, cache) for cache in ("yes", "no", "auto") for jobs in (1, 2, 4)]


@dataclass(slots=True)
class Tally:
    """What was done to the conversions of a mode, and what came of it."""

    conversions: int = 0
    kills: int = 0
    with_records: int = 0
    """Kills that left a journal with records."""
    resumed: int = 0
    """In bytes: what the next runs did not do again."""
    wrong: list[str] = field(default_factory=list)


@dataclass(frozen=True, slots=True)
class Run:
    """A conversion that is running."""

    process: "subprocess.Popen[bytes]"
    told: int
    """A descriptor: a byte for each step."""
    output: IO[bytes]
    errors: IO[bytes]

    def wait_for_steps(self, steps: int) -> bool:
        """Until it has done so many; False if it ends before."""
        while steps > 0 and (found := os.read(self.told, min(steps, 1 << 16))):
            steps -= len(found)
        return steps <= 0


@contextmanager
def running(source: Path, target: Path, mode: Mode) -> Iterator[Run]:
    reading, writing = os.pipe()
    command = [sys.executable, "-c", PROGRAM.format(pipe=writing), "convert", str(source), str(target)]
    command += ["--mp", str(RANKS), "--jobs", str(mode.jobs), "--cache", mode.cache, "--json"]
    with tempfile.TemporaryFile() as output, tempfile.TemporaryFile() as errors:
        process = subprocess.Popen(command, stdout=output, stderr=errors, pass_fds=[writing])
        os.close(writing)
        try:
            yield Run(process, reading, output, errors)
        finally:
            process.kill()
            process.wait()
            os.close(reading)


def undisturbed(source: Path, target: Path, mode: Mode) -> int:
    """Converts; returns in how many steps."""
    with running(source, target, mode) as run:
        steps = 0
        while found := os.read(run.told, 1 << 16):
            steps += len(found)
        if run.process.wait():
            run.errors.seek(0)
            raise SystemExit(f"an undisturbed run failed:\n{run.errors.read().decode()}")
    return steps


def moments(dice: random.Random, steps: int, number: int) -> list[Moment]:
    """Random ones, of a conversion of so many steps."""
    return [(dice.randint(1, steps), dice.uniform(0, JITTER)) for _ in range(number)]


def torment(
    source: Path, target: Path, wanted: dict[str, str], mode: Mode, kills: Sequence[Moment], tally: Tally
) -> None:
    """One conversion, killed at those moments, one run after the other, until one gets through."""
    tally.conversions += 1
    for steps, jitter in (*kills, NEVER):
        durable = durable_bytes(target / JOURNAL)
        with running(source, target, mode) as run:
            if run.wait_for_steps(steps) and is_alive(run, jitter):
                run.process.send_signal(signal.SIGKILL)
            if run.process.wait() == -signal.SIGKILL:
                tally.kills += 1
                tally.with_records += durable_bytes(target / JOURNAL) > 0
                tally.wrong += wrong_names(target, wanted)
                continue
            tally_end(run, durable, tally)
        break
    if (found := contents(target)) != wanted:
        tally.wrong.append(f"{target} holds {sorted(found.items() ^ wanted.items())}")


def is_alive(run: Run, seconds: float) -> bool:
    """Whether it is still there after so long."""
    with suppress(subprocess.TimeoutExpired):
        run.process.wait(seconds)
    return run.process.poll() is None


def tally_end(run: Run, durable: int, tally: Tally) -> None:
    """A run that ended by itself went on with all that was durable when it began."""
    for file in (run.output, run.errors):
        file.seek(0)
    if run.process.returncode:
        tally.wrong.append(f"it cannot be gone on with:\n{run.errors.read().decode()}")
    elif done := json.loads(run.output.read())["done"]:
        tally.resumed += done["resumed"]
        if done["resumed"] != durable:
            tally.wrong.append(f"{done['resumed']:,} bytes resumed of {durable:,}")


def durable_bytes(journal: Path) -> int:
    """What the whole batches of a journal speak of, in bytes."""
    content = journal.read_bytes() if journal.exists() else b""
    place, total = content.find(b"\n") + 1, 0
    while 0 < place <= len(content) - BATCH.size:
        (count,) = BATCH.unpack_from(content, place)
        end = place + BATCH.size + count * RECORD.size
        if end + CHECKSUM_SIZE <= len(content):
            total += sum(size for _, _, size, _ in RECORD.iter_unpack(content[place + BATCH.size : end]))
        place = end + CHECKSUM_SIZE
    return total


def contents(folder: Path) -> dict[str, str]:
    """The SHA-256 of every file, by name."""
    return {path.name: sha256(path.read_bytes()).hexdigest() for path in folder.iterdir()}


def wrong_names(target: Path, wanted: dict[str, str]) -> list[str]:
    """Files with a final name that are not what they should be."""
    found = [target / name for name in wanted if (target / name).exists()]
    return [str(path) for path in found if sha256(path.read_bytes()).hexdigest() != wanted[path.name]]


def torture(folder: Path, kills: int, dice: random.Random) -> dict[Mode, Tally]:
    """At least so many kills, spread over all modes. Stops at the first wrong file, and leaves it."""
    source = folder / "source"
    write_checkpoint(source, LARGE, FILES)
    steps = {mode: undisturbed(source, folder / f"wanted-{mode.jobs}-{mode.cache}", mode) for mode in MODES}
    results = [contents(folder / f"wanted-{mode.jobs}-{mode.cache}") for mode in MODES]
    wanted, tallies = results[0], {mode: Tally() for mode in MODES}
    if any(result != wanted for result in results):
        raise SystemExit("undisturbed runs differ from each other")
    remove_all(folder, "wanted-*")
    for number, mode in enumerate(cycle(MODES)):
        tally, total = tallies[mode], sum(tally.kills for tally in tallies.values())
        if total >= kills:
            return tallies
        killed_at = moments(dice, steps[mode], min(MOST_KILLS, kills - total))
        torment(source, folder / f"target-{number}", wanted, mode, killed_at, tally)
        print(f"\r{total:5} kills", end="", file=sys.stderr, flush=True)
        if tally.wrong:
            return tallies
        remove_all(folder, f"target-{number}")
    raise AssertionError


def remove_all(folder: Path, pattern: str) -> None:
    for path in folder.glob(pattern):
        for file in path.iterdir():
            file.unlink()
        path.rmdir()


def tally_rows(tallies: dict[Mode, Tally]) -> list[tuple[str, ...]]:
    columns = [
        (
            mode.cache,
            str(mode.jobs),
            tally.conversions,
            tally.kills,
            tally.with_records,
            tally.resumed,
            len(tally.wrong),
        )
        for mode, tally in tallies.items()
    ]
    total = ("total", "", *(sum(int(row[place]) for row in columns) for place in range(2, 7)))
    return [tuple(cell if isinstance(cell, str) else f"{cell:,}" for cell in row) for row in [*columns, total]]


def main() -> int:
    parser = argparse.ArgumentParser(description="Kills conversions at random moments and looks what is lost.")
    parser.add_argument("--kills", type=int, default=200)
    parser.add_argument("--seed", type=int, default=0, help="of the moments; default: %(default)s")
    parser.add_argument("--folder", type=Path, help="where to work, on the disk to be tried; default: a temporary one")
    options = parser.parse_args()
    folder = Path(tempfile.mkdtemp(prefix="reshard-torture-", dir=options.folder))
    tallies = torture(folder, options.kills, random.Random(options.seed))
    heads = ("cache", "jobs", "conversions", "kills", "with records", "resumed bytes", "wrong")
    print("\n" + format_table(heads, tally_rows(tallies)))
    if wrong := [text for tally in tallies.values() for text in tally.wrong]:
        print("\n".join(wrong), f"\nseed {options.seed}; see {folder}", file=sys.stderr)
        return 1
    remove_all(folder, "source")
    folder.rmdir()
    return 0


if __name__ == "__main__":
    sys.exit(main())
