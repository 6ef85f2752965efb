"""The memory cap, held by the kernel: conversions under a limit on private memory, and in a control group."""

import filecmp
import os
import resource
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
from cached_pages import drop_files
from jobs import Job, convert_checkpoint
from torture import BATCH, RECORD, durable_bytes
from xxhash import xxh3_64_digest

from reshard.formats.target_names import JOURNAL
from reshard.synthetic import SMALL_V3, write_checkpoint, write_tensors

INTERPRETER = """
import numpy, msgspec, xxhash
print(next(line.split()[1] for line in open("/proc/self/status") if line.startswith("VmData:")))
"""
"""In KiB: private memory as RLIMIT_DATA counts it, whether it was touched or not."""
CAP = 48 << 20
LARGEST = ("engram.embed.weight", "F8_E4M3", (384_006_168, 256))
"""As in DeepSeek-V4.1: 98.3 GB."""
SCALE = ("engram.embed.scale", "F8_E8M0", (384_006_168, 8))
RECIPE = """
name  = "largest"
about = "one tensor of 98 GB and its scales"
left  = "one"
right = "other"
files = "{rank}-of-{ranks}.safetensors"
scales.r = { left = "scale", right = "scale", block = [1, 32] }
rules = [["same", "engram.embed.{r}", "engram.embed.{r}", "padded rows"]]
"""


def command(source: Path, target: Path, *options: str) -> list[str]:
    return [sys.executable, "-m", "reshard", "convert", str(source), str(target), *options, "--max-memory", str(CAP)]


@pytest.fixture(scope="module")
def largest(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("largest") / "source"
    write_tensors(folder, [LARGEST, SCALE], {}, 1, sparse=True)
    (folder.parent / "largest.toml").write_text(RECIPE, encoding="utf-8")
    return folder


@pytest.fixture(scope="module")
def plenty(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """300 MB of data, rows and columns: six times the cap."""
    folder = tmp_path_factory.mktemp("plenty") / "source"
    tensors = [(f"layers.{i}.{kind}.weight", "BF16", (4096, 2560)) for i in range(7) for kind in ("tall", "wide")]
    write_tensors(folder, tensors, {}, 2)
    (folder.parent / "plenty.toml").write_text(
        'name = "plenty"\nabout = "much"\nleft = "one"\nright = "other"\nfiles = "{rank}-of-{ranks}.safetensors"\n'
        'placeholders.i = { counts = "layers" }\nrules = [\n'
        '["same", "layers.{i}.tall.weight", "layers.{i}.tall.weight", "rows"],\n'
        '["same", "layers.{i}.wide.weight", "layers.{i}.wide.weight", "columns"],\n]\n',
        encoding="utf-8",
    )
    return folder


def private_limit() -> Callable[[], None]:
    """Limits what the child may have of private memory, by RLIMIT_DATA, to the cap beside what it starts with.

    Stacks count in full, though little of each is used: eight MiB for each of six threads.
    """
    one_thread = {**os.environ, "OPENBLAS_NUM_THREADS": "1"}
    asked = subprocess.run([sys.executable, "-c", INTERPRETER], check=True, capture_output=True, env=one_thread)
    limit = (int(asked.stdout) << 10) + CAP + 6 * (8 << 20) + (4 << 20)

    def limited() -> None:
        resource.setrlimit(resource.RLIMIT_DATA, (limit, limit))
        os.environ["OPENBLAS_NUM_THREADS"] = "1"

    return limited


def run(arguments: list[str], limited: Callable[[], None]) -> "subprocess.CompletedProcess[str]":
    return subprocess.run(arguments, check=False, capture_output=True, text=True, preexec_fn=limited)


def test_the_limit_is_one() -> None:
    """A program that takes more is stopped: else the tests below would show nothing."""
    done = run([sys.executable, "-c", "import numpy; numpy.ones(1 << 29, numpy.uint8)"], private_limit())
    assert "MemoryError" in done.stderr or "Unable to allocate" in done.stderr


@pytest.mark.parametrize("cache", ["yes", "no"])
def test_a_conversion_of_many_times_the_cap_stays_below_it(plenty: Path, tmp_path: Path, cache: str) -> None:
    recipe = plenty.parent / "plenty.toml"
    options = ("--mp", "4", "--jobs", "4", "--recipe", str(recipe), "--cache", cache)
    drop_files(plenty)
    done = run(command(plenty, tmp_path / "target", *options), private_limit())
    assert done.returncode == 0, done.stderr
    assert ("read cached" in done.stdout) == (cache == "yes")


LONG_BATCH = 300_000
"""About so many groups does DeepSeek-V3 have, for 16 ranks."""

STOP_EARLY = """
import os, reshard.execution.writer
reshard.execution.writer.FLUSH_SECONDS = 0.01
append = reshard.execution.writer.append_records
def append_and_end(*arguments):
    append(*arguments)
    os._exit(9)
reshard.execution.writer.append_records = append_and_end
from reshard.cli.process import entry; entry()
"""


def test_an_interrupted_conversion_goes_on_below_it(plenty: Path, tmp_path: Path) -> None:
    target, limited = tmp_path / "target", private_limit()
    options = command(plenty, target, "--mp", "4", "--jobs", "4", "--recipe", str(plenty.parent / "plenty.toml"))[3:]
    assert run([sys.executable, "-c", STOP_EARLY, *options], limited).returncode == 9
    assert durable_bytes(target / JOURNAL) > 0
    done = run([sys.executable, "-m", "reshard", *options], limited)
    assert done.returncode == 0, done.stderr
    assert "resumed: " in done.stdout


def test_a_journal_as_long_as_that_of_a_large_model_is_read_below_it(plenty: Path, tmp_path: Path) -> None:
    """Here most of its records are of bytes that the job does not have, which is found at the end."""
    target, limited = tmp_path / "target", private_limit()
    options = command(plenty, target, "--mp", "4", "--jobs", "1", "--recipe", str(plenty.parent / "plenty.toml"))[3:]
    assert run([sys.executable, "-c", STOP_EARLY, *options], limited).returncode == 9
    batch = BATCH.pack(LONG_BATCH) + b"".join(
        RECORD.pack((1 << 40) + 4096 * place, place % 4, 4096, bytes(16)) for place in range(LONG_BATCH)
    )
    with (target / JOURNAL).open("ab") as journal:
        journal.write(batch + xxh3_64_digest(batch))
    done = run([sys.executable, "-m", "reshard", *options], limited)
    assert done.returncode == 2, done.stderr
    assert f"{JOURNAL}: damaged journal\n" in done.stderr
    assert "every byte of it once" in done.stderr


def test_a_tensor_of_98_gigabytes_stays_below_it(largest: Path, tmp_path: Path) -> None:
    """A rank of 512: its file has 198 MB; the plan is that of all."""
    recipe = largest.parent / "largest.toml"
    options = ("--mp", "512", "--ranks", "511", "--recipe", str(recipe))
    done = run(command(largest, tmp_path / "target", *options), private_limit())
    assert done.returncode == 0, done.stderr
    (file,) = (tmp_path / "target").glob("*.safetensors")
    rows = -(-LARGEST[2][0] // 512)
    assert file.stat().st_size > rows * (256 + 8)


@pytest.fixture(scope="module")
def wide_ranks(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Two rank files of a matrix of three rows of 64 MB, cut by columns, and of what both hold."""
    folder = tmp_path_factory.mktemp("wide")
    write_tensors(
        folder / "source", [("wide.weight", "BF16", (3, 32 << 20)), ("same.weight", "BF16", (24 << 20,))], {}, 1
    )
    (folder / "wide.toml").write_text(
        'name = "wide"\nabout = "long rows"\nleft = "one"\nright = "other"\nfiles = "{rank}-of-{ranks}.safetensors"\n'
        'rules = [\n["same", "wide.weight", "wide.weight", "columns"],\n'
        '["same", "same.weight", "same.weight", "replicate"],\n]\n',
        encoding="utf-8",
    )
    convert_checkpoint(Job(folder / "source", 2, str(folder / "wide.toml")), folder / "ranks")
    return folder


@pytest.mark.parametrize("options", [("--to", "hf"), ("--mp", "4")])
@pytest.mark.parametrize("cache", ["yes", "no"])
def test_putting_wide_rows_together_stays_below_it(
    wide_ranks: Path, tmp_path: Path, options: tuple[str, ...], cache: str
) -> None:
    more = ("--recipe", str(wide_ranks / "wide.toml"), "--cache", cache)
    drop_files(wide_ranks / "ranks")
    done = run(command(wide_ranks / "ranks", tmp_path / "target", *options, *more), private_limit())
    assert done.returncode == 0, done.stderr
    assert ("read cached" in done.stdout) == (cache == "yes")
    if options[0] == "--to":
        (wanted,), (found,) = (
            (folder.glob("*.safetensors")) for folder in (wide_ranks / "source", tmp_path / "target")
        )
        assert wanted.name == found.name
        assert filecmp.cmp(wanted, found, shallow=False)


# --- control groups ---


@pytest.fixture
def group(tmp_path: Path) -> Iterator[Path]:
    """A control group of ours, of either version."""
    for root in (Path("/sys/fs/cgroup/memory"), Path("/sys/fs/cgroup")):
        folder = root / f"reshard-test-{os.getpid()}-{tmp_path.name}"
        limits = ("memory.limit_in_bytes", "memory.max")
        try:
            folder.mkdir()
        except OSError:
            continue
        for name in limits:
            if (folder / name).exists():
                yield folder / name
                folder.rmdir()
                return
        folder.rmdir()
    pytest.skip("no control group with a limit on memory can be made here")


def test_a_control_group_with_little_memory_is_enough(plenty: Path, tmp_path: Path, group: Path) -> None:
    """Its limit counts the page cache too, which the kernel takes back: 300 MB go through 128 MiB."""
    group.write_text(str(128 << 20), encoding="ascii")

    def join() -> None:
        (group.parent / "cgroup.procs").write_text(str(os.getpid()), encoding="ascii")

    recipe = plenty.parent / "plenty.toml"
    done = run(command(plenty, tmp_path / "target", "--mp", "2", "--recipe", str(recipe)), join)
    assert done.returncode == 0, done.stderr
    # Less than three times as much memory as data, by the limit of the group: past the cache, of its own accord.
    assert "written" in done.stdout
    assert "written cached" not in done.stdout


def test_a_large_file_beside_the_tensors_stays_below_it(tmp_path: Path) -> None:
    """Copied, compared with the manifest, verified and written again: at no time is it in memory as a whole."""
    write_checkpoint(tmp_path / "source", SMALL_V3, 1)
    with (tmp_path / "source" / "film.mkv").open("wb") as file:
        file.truncate(4 * CAP)
    target, limited = tmp_path / "target", private_limit()
    convert = command(tmp_path / "source", target, "--to", "hf")
    first, verified = run(convert, limited), run([sys.executable, "-m", "reshard", "verify", str(target)], limited)
    (target / "film.mkv").unlink()
    again = run(convert, limited)
    assert [done.returncode for done in (first, verified, again)] == [0, 0, 0], first.stderr + again.stderr
    assert "written again: film.mkv" in again.stdout
    assert (target / "film.mkv").stat().st_size == 4 * CAP
