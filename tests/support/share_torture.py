"""Kills shares of conversions, and their joins, at random moments, and looks whether anything was lost: part of
`make cluster`.

Shares run at the same time, some of them twice, with joins among them. Each process may be killed by SIGKILL behind a
random step. Then all shares are made, and joins are killed too, two at once. A process that is not killed must end well
or be refused for a reason that it may have. At the end the target must be that of a conversion at once, with nothing
else in it; until then no file may have its final name and be another.
"""

import argparse
import json
import os
import random
import signal
import subprocess
import sys
import tempfile
from collections import Counter
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from dataclasses import dataclass, field
from hashlib import sha256
from pathlib import Path
from shutil import rmtree
from typing import Any

from reshard.formats.share_names import list_share_folders
from reshard.formats.target_names import MANIFEST
from reshard.synthetic import SMALL_V3, write_checkpoint

RANKS = 4
LARGE: dict[str, Any] = {**SMALL_V3, "num_hidden_layers": 16}
"""A DeepSeek-V3 of 138 MB, so that writing takes most of the time of a run."""
COUNTS = (2, 3, 4, 6)
"""Of shares. With six, two have nothing to do."""
AT_ONCE = 4
STEPS_OF_SHARE, STEPS_OF_JOIN = 160, 30
"""About as many as they have."""
JITTER = {STEPS_OF_SHARE: 0.02, STEPS_OF_JOIN: 0.001}
"""In seconds: so long at most after a step comes the kill. A join takes some milliseconds."""
KILLS_OF_SHARES, KILLS_OF_JOINS = 5, 5
"""At most so many for each conversion."""
PROGRAM = """
import os, pathlib
import reshard.execution.execute, reshard.execution.writer
from reshard.cli.process import entry

def telling(function):
    def tell(*arguments, **options):
        done = function(*arguments, **options)
        os.write({pipe}, b".")
        return done
    return tell

reshard.execution.writer.FLUSH_SECONDS = 0.02
reshard.execution.writer.Ledger.add = telling(reshard.execution.writer.Ledger.add)
for name in ("open_journal", "open_targets", "write_side_files", "make_durable", "write_durable"):
    setattr(reshard.execution.execute, name, telling(getattr(reshard.execution.execute, name)))
for name in ("mkdir", "rename", "rmdir", "unlink"):
    setattr(pathlib.Path, name, telling(getattr(pathlib.Path, name)))
entry()
"""
"""The command, with a journal as busy as that of a long run; it tells of every step."""
MAY_BE_REFUSED = {"target-changed", "target-in-use", "unfinished-share"}
"""Kinds of problems that a process may meet: another one has ended just now, or is at work, or a join is too early."""


@dataclass(frozen=True, slots=True)
class Run:
    """A process, and when it is killed: so many steps after its start, and seconds later."""

    share: str
    """Such as `1/4`; empty for the join."""
    steps: int = sys.maxsize
    jitter: float = 0.0


@dataclass(frozen=True, slots=True)
class Ended:
    """How a process ended."""

    code: int
    kinds: frozenset[str] = frozenset()
    """Of the problems that it was refused for."""
    resumed: int = 0
    text: str = ""

    @property
    def is_killed(self) -> bool:
        return self.code == -signal.SIGKILL

    @property
    def is_right(self) -> bool:
        return self.code in (0, -signal.SIGKILL) or (
            self.code == 2 and bool(self.kinds) and self.kinds <= MAY_BE_REFUSED
        )


@dataclass(slots=True)
class Tally:
    """What was done, and what came of it."""

    conversions: int = 0
    shares_killed: int = 0
    joins_killed: int = 0
    joins_interrupted: int = 0
    """Kills that left a target with files both in it and in shares."""
    refused: "Counter[str]" = field(default_factory=Counter)
    resumed: int = 0
    """In bytes: what the next runs did not do again."""
    wrong: list[str] = field(default_factory=list)


class Conversion:
    """The conversion of a source by shares."""

    def __init__(self, source: Path, target: Path, wanted: dict[str, str], tally: Tally) -> None:
        self.source, self.target, self.wanted, self.tally = source, target, wanted, tally

    def run_all(self, runs: Sequence[Run]) -> list[Ended]:
        """Runs processes at once, and looks at what they leave."""
        with ThreadPoolExecutor(len(runs)) as pool:
            ended = [*pool.map(self.run, runs)]
        tally = self.tally
        for run, end in zip(runs, ended, strict=True):
            tally.shares_killed += end.is_killed and bool(run.share)
            tally.joins_killed += end.is_killed and not run.share
            tally.refused.update(end.kinds)
            tally.resumed += end.resumed
            if not end.is_right:
                tally.wrong.append(f"{run}: exit code {end.code}\n{end.text}")
        self.look()
        return ended

    def run(self, run: Run) -> Ended:
        reading, writing = os.pipe()
        command = [sys.executable, "-c", PROGRAM.format(pipe=writing), "convert", str(self.source), str(self.target)]
        command += ["--mp", str(RANKS), "--json", *(["--share", run.share] if run.share else [])]
        with tempfile.TemporaryFile() as output, tempfile.TemporaryFile() as errors:
            process = subprocess.Popen(command, stdout=output, stderr=errors, pass_fds=[writing])
            os.close(writing)
            try:
                wait_for_steps(reading, run.steps)
                with suppress(subprocess.TimeoutExpired):
                    process.wait(run.jitter if run.steps < sys.maxsize else None)
            finally:
                process.kill()
                process.wait()
                os.close(reading)
            for file in (output, errors):
                file.seek(0)
            return describe_end(process.returncode, output.read().decode(), errors.read().decode())

    def look(self) -> None:
        """No file has a final name and is another, nor is there a manifest of files that are not there."""
        found = hash_files(self.target, self.wanted)
        self.tally.wrong += [f"{self.target / name} is wrong" for name in found if found[name] != self.wanted[name]]
        if MANIFEST in found and found != self.wanted:
            self.tally.wrong.append(f"{self.target} has a manifest, and lacks {self.wanted.keys() - found.keys()}")
        is_begun = any(name.endswith(".safetensors") for name in found)
        self.tally.joins_interrupted += is_begun and any(self.target.glob(".share-*"))

    def look_at_end(self) -> None:
        found = {str(path.relative_to(self.target)) for path in self.target.rglob("*")}
        if found != self.wanted.keys():
            self.tally.wrong.append(f"{self.target}: {found ^ self.wanted.keys()} lacks or is left")


def wait_for_steps(reading: int, steps: int) -> None:
    """Until a process has done so many, or has ended."""
    while steps > 0 and (found := os.read(reading, min(steps, 1 << 16))):
        steps -= len(found)


def describe_end(code: int, output: str, errors: str) -> Ended:
    if code not in (0, 2) or not output:
        return Ended(code, text=errors)
    report = json.loads(output)
    kinds = frozenset(problem["kind"] for problem in report.get("problems", ()))
    return Ended(code, kinds, (report.get("done") or {}).get("resumed", 0), output + errors)


def hash_files(folder: Path, names: "Sequence[str] | dict[str, str]") -> dict[str, str]:
    """The SHA-256 of each of these files that is there. One that is moved away meanwhile is not."""
    found = {}
    for name in names:
        with suppress(FileNotFoundError):
            found[name] = sha256((folder / name).read_bytes()).hexdigest()
    return found


class Torture:
    """Conversions of one source, each by another number of shares."""

    def __init__(self, folder: Path, dice: random.Random) -> None:
        self.folder, self.dice, self.tally = folder, dice, Tally()
        self.source = folder / "source"
        write_checkpoint(self.source, LARGE, 4)
        command = [sys.executable, "-m", "reshard", "convert", str(self.source), str(folder / "wanted")]
        subprocess.run([*command, "--mp", str(RANKS), "--quiet"], check=True)
        names = [path.name for path in (folder / "wanted").iterdir()]
        self.wanted = hash_files(folder / "wanted", names)

    def torment(self) -> None:
        """One conversion."""
        tally, count = self.tally, self.dice.choice(COUNTS)
        target = self.folder / f"target-{tally.conversions}-of-{count}"
        tally.conversions += 1
        conversion = Conversion(self.source, target, self.wanted, tally)
        left = {f"{number}/{count}" for number in range(count)}
        self.kill_shares(conversion, left)
        self.kill_joins(conversion, count)
        # Once more, by processes that nobody disturbs; a share of a finished conversion has nothing to do.
        for run in (Run(""), Run(""), Run(f"{count - 1}/{count}")):
            if any(end.code for end in conversion.run_all([run])):
                tally.wrong.append(f"{target}: {run} was refused, with nobody else at work")
        conversion.look_at_end()
        if not tally.wrong:
            rmtree(target)

    def kill_shares(self, conversion: Conversion, left: set[str]) -> None:
        """Until each share is done, which is at last left in peace."""
        before, shares = self.tally.shares_killed, sorted(left)
        while left:
            is_enough = self.tally.shares_killed - before >= KILLS_OF_SHARES
            runs = [
                Run(share, *self.choose_moment(STEPS_OF_SHARE, 0.0 if is_enough else 0.8))
                for share in self.choose(left)
            ]
            # One of them twice, also one that is done; and a join, which comes too early. Where there are no shares it
            # would be a conversion like any other.
            runs += [Run(self.dice.choice(shares))] * self.dice.randint(0, 1)
            if list_share_folders(conversion.target):
                runs += [Run("", *self.choose_moment(STEPS_OF_JOIN, 0.5))] * self.dice.randint(0, 1)
            ended = conversion.run_all(runs)
            left -= {run.share for run, end in zip(runs, ended, strict=True) if end.code == 0}
            if self.tally.wrong:
                return

    def kill_joins(self, conversion: Conversion, count: int) -> None:
        """One or two joins at once, also with a share among them, until one gets through."""
        for _ in range(KILLS_OF_JOINS):
            runs = [Run("", *self.choose_moment(STEPS_OF_JOIN, 0.9)) for _ in range(self.dice.randint(1, 2))]
            if self.dice.random() < 0.3:
                runs.append(Run(f"{self.dice.randrange(count)}/{count}"))
            ended = conversion.run_all(runs)
            if self.tally.wrong or any(end.code == 0 for run, end in zip(runs, ended, strict=True) if not run.share):
                return

    def choose(self, left: set[str]) -> list[str]:
        return self.dice.sample(sorted(left), self.dice.randint(1, min(AT_ONCE, len(left))))

    def choose_moment(self, steps: int, probability: float) -> tuple[int, float]:
        if self.dice.random() >= probability:
            return sys.maxsize, 0.0
        return self.dice.randint(1, steps), self.dice.uniform(0, JITTER[steps])

    def show(self) -> str:
        tally = self.tally
        refused = ", ".join(f"{kind} {number}" for kind, number in sorted(tally.refused.items()))
        return (
            f"{tally.conversions} conversions, {tally.shares_killed} shares and {tally.joins_killed} joins killed, "
            f"{tally.joins_interrupted} looks at half a join; refused: {refused or 'none'}; "
            f"{tally.resumed:,} bytes resumed; {len(tally.wrong)} wrong"
        )


def main() -> int:
    parser = argparse.ArgumentParser(description="Kills shares of conversions and looks what is lost.")
    parser.add_argument("--kills", type=int, default=50, help="of shares and joins together; default: %(default)s")
    parser.add_argument("--seed", type=int, default=0, help="of the moments; default: %(default)s")
    parser.add_argument("--folder", type=Path, help="where to work, on the disk to be tried; default: a temporary one")
    options = parser.parse_args()
    folder = Path(tempfile.mkdtemp(prefix="reshard-torture-", dir=options.folder))
    torture = Torture(folder, random.Random(options.seed))
    tally = torture.tally
    while tally.shares_killed + tally.joins_killed < options.kills and not tally.wrong:
        torture.torment()
        print(f"\r{torture.show()}", end="", file=sys.stderr, flush=True)
    print(f"\n{torture.show()}")
    if tally.wrong:
        print("\n".join(tally.wrong), f"\nseed {options.seed}; see {folder}", file=sys.stderr)
        return 1
    rmtree(folder)
    return 0


if __name__ == "__main__":
    sys.exit(main())
