"""Kills conversions into a real store at random moments, and looks whether anything was lost: part of `make remote`.

SeaweedFS holds source and target. Each conversion is killed by SIGKILL and started again until one start gets through,
in both levels: by parts, and by streams. Until then no object of the target may be another than it should be; then all
must be there, and nothing else. Between completion and manifest some kills are aimed at.
"""

import argparse
import json
import os
import random
import signal
import subprocess
import sys
import tempfile
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from hashlib import sha256
from pathlib import Path
from typing import IO, Any

from seaweedfs import BUCKET, list_keys, serving

from reshard.formats.target_names import PROGRESS, STORE_RECORD
from reshard.synthetic import SMALL_V3, write_checkpoint
from reshard.text import format_table

RANKS = 4
LARGE: dict[str, Any] = {**SMALL_V3, "num_hidden_layers": 16}
"""A DeepSeek-V3 of 138 MB."""
LEVELS = ("parts", "stream")
MOST_KILLS = 6
"""Of one conversion."""
AT_THE_END = 3
"""Every so many conversions, all kills are aimed at its last steps, from the first completed object on."""
PROGRAM = """
import os
from reshard.cli.process import entry
from reshard.execution import store_target
from reshard.storage import streamed_uploads, s3_uploads, target_buckets, whole_objects

def telling(function):
    def tell(*arguments, **options):
        done = function(*arguments, **options)
        os.write({pipe}, b".")
        return done
    return tell

METHODS = ("begin_upload", "put_part", "complete_upload", "abort_upload", "put", "put_new", "_remove")
for kind in (whole_objects.WholeObjects, s3_uploads.PartedTarget, streamed_uploads.StreamedTarget):
    for name in METHODS:
        if name in vars(kind):
            setattr(kind, name, telling(vars(kind)[name]))
if {level!r} == "stream":
    target_buckets.find_s3_access = lambda name: None
store_target.FLUSH_SECONDS = 0.05
store_target.PART_SIZE = 5 << 20
entry()
"""
"""The command, with small parts and many notes. It tells of every step that a store has acknowledged."""


@dataclass(slots=True)
class Tally:
    """What was done to the conversions of a level, and what came of it."""

    conversions: int = 0
    kills: int = 0
    with_objects: int = 0
    """Kills that left whole objects without a manifest."""
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


class Bucket:
    """The bucket of the server, by obstore alone."""

    def __init__(self, environment: Mapping[str, str]) -> None:
        from obstore.store import S3Store  # noqa: PLC0415 - an extra

        keys = {name: environment[f"AWS_{name.upper()}"] for name in ("access_key_id", "secret_access_key", "region")}
        options: Any = {**keys, "endpoint": environment["AWS_ENDPOINT_URL"], "client_options": {"allow_http": True}}
        self.client: Any = S3Store(BUCKET, **options)

    def read_all(self, folder: str) -> dict[str, str]:
        """The SHA-256 of each object in a folder, by name."""
        import obstore  # noqa: PLC0415

        listed = obstore.list(self.client, f"{folder}/").collect()
        paths = [found["path"] for found in listed]
        return {path.removeprefix(f"{folder}/"): self.hash(path) for path in paths}

    def hash(self, path: str) -> str:
        import obstore  # noqa: PLC0415

        return sha256(obstore.get(self.client, path).bytes()).hexdigest()

    def upload(self, folder: Path, name: str) -> None:
        import obstore  # noqa: PLC0415

        for path in folder.iterdir():
            obstore.put(self.client, f"{name}/{path.name}", path.read_bytes())


@contextmanager
def running(level: str, source: str, target: str, environment: Mapping[str, str]) -> Iterator[Run]:
    reading, writing = os.pipe()
    command = [sys.executable, "-c", PROGRAM.format(pipe=writing, level=level), "convert", source, target]
    command += ["--mp", str(RANKS), "--json"]
    with tempfile.TemporaryFile() as output, tempfile.TemporaryFile() as errors:
        process = subprocess.Popen(command, stdout=output, stderr=errors, pass_fds=[writing], env=environment)
        os.close(writing)
        try:
            yield Run(process, reading, output, errors)
        finally:
            process.kill()
            process.wait()
            os.close(reading)


def count_steps(level: str, source: str, target: str, environment: Mapping[str, str]) -> int:
    """Converts undisturbed; returns in how many steps."""
    with running(level, source, target, environment) as run:
        steps = 0
        while found := os.read(run.told, 1 << 16):
            steps += len(found)
        if run.process.wait():
            run.errors.seek(0)
            raise SystemExit(f"an undisturbed run failed:\n{run.errors.read().decode()}")
    return steps


class Torture:
    """Conversions of one source into one bucket."""

    def __init__(self, folder: Path, environment: Mapping[str, str], seed: int) -> None:
        self.environment, self.dice, self.bucket = environment, random.Random(seed), Bucket(environment)
        write_checkpoint(folder / "source", LARGE, 4)
        local = [sys.executable, "-m", "reshard", "convert", str(folder / "source"), str(folder / "wanted")]
        subprocess.run([*local, "--mp", str(RANKS), "--quiet"], check=True, env=environment)
        self.wanted = {path.name: sha256(path.read_bytes()).hexdigest() for path in (folder / "wanted").iterdir()}
        self.bucket.upload(folder / "source", "source")
        self.source = f"s3://{BUCKET}/source"
        self.steps = {level: count_steps(level, self.source, f"s3://{BUCKET}/{level}", environment) for level in LEVELS}
        self.tallies = {level: Tally() for level in LEVELS}
        for level in LEVELS:
            self.look_at_end(level, level)

    def torment(self, level: str, name: str, kills: int, *, at_the_end: bool) -> None:
        """One conversion, killed so often, one run after the other, until one gets through."""
        tally, left = self.tallies[level], self.steps[level]
        tally.conversions += 1
        for _ in range(kills):
            first = max(left - 2 * RANKS - 6, 1) if at_the_end else 1
            steps = self.dice.randint(first, max(first, left - 1))
            if not self.run(level, name, steps):
                break
            left -= steps  # the next run has about so many left
            if left < 2:
                break
        self.run(level, name, sys.maxsize)
        self.look_at_end(level, name)

    def run(self, level: str, name: str, steps: int) -> bool:
        """Runs the conversion, and kills it behind some step; whether it was still there."""
        tally = self.tallies[level]
        with running(level, self.source, f"s3://{BUCKET}/{name}", self.environment) as run:
            if run.wait_for_steps(steps):
                run.process.send_signal(signal.SIGKILL)
            if (code := run.process.wait()) != -signal.SIGKILL:
                for file in (run.output, run.errors):
                    file.seek(0)
                if code:
                    tally.wrong.append(f"{name} cannot be gone on with:\n{run.errors.read().decode()}")
                elif done := json.loads(run.output.read())["done"]:
                    tally.resumed += done["resumed"]
                return False
        tally.kills += 1
        found = self.bucket.read_all(name)
        whole = {key: value for key, value in found.items() if key in self.wanted}
        tally.with_objects += bool(whole) and "reshard.json" not in whole
        tally.wrong += [f"{name}/{key}" for key, value in whole.items() if value != self.wanted[key]]
        if "reshard.json" in whole and whole != self.wanted:
            tally.wrong.append(f"{name} has a manifest, and lacks {sorted(self.wanted.keys() - whole.keys())}")
        return True

    def look_at_end(self, level: str, name: str) -> None:
        found = self.bucket.read_all(name)
        found.pop(STORE_RECORD, None)
        if found != self.wanted:
            self.tallies[level].wrong.append(f"{name} holds {sorted(found.items() ^ self.wanted.items())}")
        if left := [key for key in found if key.startswith(PROGRESS)]:
            self.tallies[level].wrong.append(f"{name} still has {left}")


def torture(folder: Path, kills: int, seed: int) -> dict[str, Tally]:
    """So many kills in each level. Stops at the first thing that is wrong."""
    with serving(folder / "server") as (endpoint, _):
        work = Torture(folder, list_keys(endpoint), seed)
        for level in LEVELS:
            tally = work.tallies[level]
            while tally.kills < kills and not tally.wrong:
                name = f"{level}-{tally.conversions}"
                most = min(MOST_KILLS, kills - tally.kills)
                work.torment(level, name, most, at_the_end=tally.conversions % AT_THE_END == 0)
                print(f"\r{level}: {tally.kills:5} kills", end="", file=sys.stderr, flush=True)
        return work.tallies


def main() -> int:
    parser = argparse.ArgumentParser(description="Kills conversions into a store and looks what is lost.")
    parser.add_argument("--kills", type=int, default=50, help="in each level; default: %(default)s")
    parser.add_argument("--seed", type=int, default=0, help="of the moments; default: %(default)s")
    options = parser.parse_args()
    with tempfile.TemporaryDirectory(prefix="reshard-torture-") as folder:
        tallies = torture(Path(folder), options.kills, options.seed)
    heads = ("level", "conversions", "kills", "with whole objects", "resumed bytes", "wrong")
    rows = [
        (level, *(f"{n:,}" for n in (t.conversions, t.kills, t.with_objects, t.resumed, len(t.wrong))))
        for level, t in tallies.items()
    ]
    print("\n" + format_table(heads, rows))
    if wrong := [text for tally in tallies.values() for text in tally.wrong]:
        print("\n".join(wrong), f"\nseed {options.seed}", file=sys.stderr)
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main())
