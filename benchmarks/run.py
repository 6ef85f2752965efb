"""All measurements in one table: `python benchmarks/run.py FOLDER [--reference CONVERT_PY] [--only WORD]`.

Makes its checkpoints below FOLDER (about 40 GB free are needed), runs each pair of commands in turn (A B A B ...), and
prints for each case the ratio of the times: median, and least to most. A ratio above 1 means that reshard is faster.
Ours is timed as a whole process. `cp -r` leaves its data in the page cache, reshard waits for the disk: the first ratio
leaves our last wait out, the second (durable) adds a `sync` to cp.
"""

import argparse
import json
import os
import shutil
import statistics
import subprocess
import sys
import time
from collections.abc import Iterator, Sequence
from compileall import compile_dir
from dataclasses import dataclass
from pathlib import Path

import reshard
from reshard.synthetic import DEEPSEEK_V2_LITE, DEEPSEEK_V3, write_checkpoint, write_tensors

SHAPE = {"first_k_dense_replace": 1, "n_routed_experts": 16, "vocab_size": 16160, "num_nextn_predict_layers": 0}
DENSE = {"num_hidden_layers": 12, "first_k_dense_replace": 12, "vocab_size": 10240, "hidden_size": 4096,
         "intermediate_size": 16384, "n_routed_experts": None, "num_attention_heads": 64}  # fmt: skip
TINY = {"num_hidden_layers": 130, "first_k_dense_replace": 0, "vocab_size": 256, "hidden_size": 16,
        "intermediate_size": 16, "moe_intermediate_size": 16, "n_routed_experts": 256, "num_attention_heads": 16,
        "q_lora_rank": None, "kv_lora_rank": 16, "qk_nope_head_dim": 4, "qk_rope_head_dim": 4,
        "v_head_dim": 4}  # fmt: skip


@dataclass(frozen=True)
class Run:
    """One process: its whole time, and of that the last wait for the disk, in seconds."""

    seconds: float
    sync_seconds: float = 0.0


@dataclass(frozen=True)
class Case:
    """A checkpoint, how it is converted, and what it is compared with. For 0 ranks it stays whole and is cast."""

    name: str
    source: str
    ranks: int
    options: tuple[str, ...] = ()
    cold: bool = False
    pairs: int = 3


CASES = (
    Case("V3-shaped, warm, 2 jobs", "v3", 16, ("--jobs", "2", "--cache", "yes")),
    Case("V3-shaped, warm, 1 job", "v3", 16, ("--jobs", "1", "--cache", "yes")),
    Case("V3-shaped, warm, 4 jobs", "v3", 16, ("--jobs", "4", "--cache", "yes")),
    Case("V3-shaped, warm, mp 1", "v3", 1, ("--jobs", "2", "--cache", "yes")),
    Case("V3-shaped, warm, mp 4", "v3", 4, ("--jobs", "2", "--cache", "yes")),
    Case("V3-shaped, cold", "v3", 16, cold=True),
    Case("V3-shaped, larger than a third of memory", "large", 16, cold=True),
    Case("BF16 dense, half of it columns", "dense", 16, ("--jobs", "2", "--cache", "yes")),
    Case("100,000 tiny tensors", "tiny", 16, ("--jobs", "2", "--cache", "yes")),
    Case("FP8 to BF16, whole files, 2 jobs", "v3", 0, ("--jobs", "2", "--cache", "yes")),
)


SAFETENSORS = ("0.7.0", "0.8.0")
"""The releases that the script is run with."""


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("folder", type=Path)
    parser.add_argument("--reference", type=Path, help="DeepSeek's own convert.py, to race against")
    parser.add_argument("--only", default="", help="cases whose name holds this word")
    options = parser.parse_args()
    folder: Path = options.folder
    folder.mkdir(parents=True, exist_ok=True)
    print(machine())
    for case in CASES:
        if options.only in case.name:
            print(compare_with_cp(folder, case), flush=True)
    if options.reference and options.only in "script":
        for version in SAFETENSORS:
            print(compare_with_script(folder, options.reference, version), flush=True)
    if options.only in "verify":
        for line in verification(folder):
            print(line, flush=True)
    if options.only in "memory":
        for line in memory(folder):
            print(line, flush=True)
    if options.only in "largest tensor":
        for line in largest(folder):
            print(line, flush=True)
    if options.only in "checksums":
        print(checksums(folder), flush=True)


def machine() -> str:
    cpus, memory_gib = os.cpu_count(), os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE") / 2**30
    return f"{cpus} processors, {memory_gib:.0f} GiB, Linux {os.uname().release}, Python {sys.version.split()[0]}"


def make(folder: Path, name: str) -> Path:
    """The checkpoint of that name, made if it is not there yet."""
    path = folder / name
    if not path.exists():
        config, files = {
            "v3": ({**DEEPSEEK_V3, **SHAPE, "num_hidden_layers": 3}, 2),
            "large": ({**DEEPSEEK_V3, **SHAPE, "num_hidden_layers": 9}, 6),
            "dense": ({**DEEPSEEK_V2_LITE, **DENSE}, 2),
            "tiny": ({**DEEPSEEK_V2_LITE, **TINY}, 4),
            "1 GB": ({**DEEPSEEK_V3, **SHAPE, "num_hidden_layers": 1, "first_k_dense_replace": 0}, 1),
            "4 GB": ({**DEEPSEEK_V3, **SHAPE, "num_hidden_layers": 5}, 3),
            "16 GB": ({**DEEPSEEK_V3, **SHAPE, "num_hidden_layers": 17}, 8),
        }[name]
        write_checkpoint(path, config, files)
    return path


def ours(source: Path, target: Path, ranks: int, *options: str) -> Run:
    what = ("--mp", str(ranks)) if ranks else ("--to", "hf", "--cast", "bf16")
    command = [sys.executable, "-m", "reshard", "convert", str(source), str(target), *what]
    compile_dir(Path(reshard.__file__).parent, quiet=1)  # as it is once it is installed
    started = time.perf_counter()
    done = subprocess.run([*command, *options, "--json"], check=True, capture_output=True)
    seconds = time.perf_counter() - started
    return Run(seconds, json.loads(done.stdout)["done"]["sync_seconds"])


def timed(*commands: Sequence[str]) -> Run:
    """Several commands one after the other; the time of the second and later counts as the wait for the disk."""
    times = []
    for command in commands:
        started = time.perf_counter()
        subprocess.run(command, check=True, capture_output=True)
        times.append(time.perf_counter() - started)
    return Run(sum(times), sum(times[1:]))


def fresh(path: Path) -> Path:
    """A target that is not there, on a machine that has nothing left to write."""
    shutil.rmtree(path, ignore_errors=True)
    os.sync()
    return path


def warm(path: Path, *, cold: bool) -> None:
    """Reads every file once, so that all runs find it in the page cache; or puts it out of there."""
    for file in sorted(path.iterdir()):
        with file.open("rb", buffering=0) as opened:
            if cold:
                os.posix_fadvise(opened.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)
            else:
                while opened.read(16 << 20):
                    pass


def compare_with_cp(folder: Path, case: Case) -> str:
    """Of the same output bytes: what reshard writes is what `cp -r` copies."""
    source, model = make(folder, case.source), fresh(folder / "model")
    ours(source, model, case.ranks)
    size = sum(file.stat().st_size for file in model.iterdir())
    pairs = []
    for _ in range(case.pairs):
        warm(model, cold=case.cold)
        copied = timed(["cp", "-r", str(model), str(fresh(folder / "copied"))], ["sync"])
        fresh(folder / "copied")
        warm(source, cold=case.cold)
        converted = ours(source, fresh(folder / "converted"), case.ranks, *case.options)
        fresh(folder / "converted")
        pairs.append((copied, converted))
    fresh(model)
    plain = [(a.seconds - a.sync_seconds) / (b.seconds - b.sync_seconds) for a, b in pairs]
    durable = [a.seconds / b.seconds for a, b in pairs]
    best = min(b.seconds - b.sync_seconds for _, b in pairs)
    rates = f"{size / 1e9:6.2f} GB  {size / best / 1e9:5.2f} GB/s at best"
    return f"{case.name:42} {rates}  cp/ours {spread(plain)}  durable {spread(durable)}"


def compare_with_script(folder: Path, script: Path, version: str) -> str:
    """The script runs with that release of safetensors, which is put into a folder of its own."""
    package = folder / f"safetensors-{version}"
    if not package.exists():
        install = [sys.executable, "-m", "pip", "install", "--quiet", "--no-deps", "--target", str(package)]
        subprocess.run([*install, f"safetensors=={version}"], check=True)
    source = make(folder, "v3")
    arguments = ["--hf-ckpt-path", str(source), "--n-experts", "16", "--model-parallel", "16", "--save-path"]
    program = ["env", f"PYTHONPATH={package}", sys.executable, str(script)]
    pairs = []
    for _ in range(3):
        warm(source, cold=False)
        theirs = timed([*program, *arguments, str(fresh(folder / "theirs"))], ["sync"])
        fresh(folder / "theirs")
        warm(source, cold=False)
        converted = ours(source, fresh(folder / "converted"), 16, "--cache", "yes")
        fresh(folder / "converted")
        pairs.append((theirs, converted))
    plain = [(a.seconds - a.sync_seconds) / (b.seconds - b.sync_seconds) for a, b in pairs]
    durable = [a.seconds / b.seconds for a, b in pairs]
    name = f"script/ours, safetensors {version}"
    return f"{name:42} {spread(plain)}  durable {spread(durable)}"


def verification(folder: Path) -> Iterator[str]:
    """Verifying against plain reading of the same files by `cat`, in turn, all of them in the page cache."""
    source, target = make(folder, "1 GB"), fresh(folder / "converted")
    ours(source, target, 16)
    verify = [sys.executable, "-m", "reshard", "verify", str(target)]
    for name, folders, options in (
        ("verify --source", (source, target), ("--source", str(source))),
        ("verify --source --sample 1%", (source, target), ("--source", str(source), "--sample", "1%")),
        ("verify", (target,), ()),
    ):
        files = [str(file) for path in folders for file in sorted(path.iterdir())]
        size = sum(Path(file).stat().st_size for file in files)
        pairs = []
        for _ in range(5):
            for path in folders:
                warm(path, cold=False)
            pairs.append((timed(["sh", "-c", 'cat "$@" > /dev/null', "cat", *files]), timed([*verify, *options])))
        best = min(b.seconds for _, b in pairs)
        ratios = spread([a.seconds / b.seconds for a, b in pairs])
        memory_used = anonymous([*verify, *options]) / 2**20
        rates = f"{size / 1e9:6.2f} GB  {size / best / 1e9:5.2f} GB/s at best"
        yield f"{name:42} {rates}  cat/ours {ratios}  memory {memory_used:.1f} MiB"
    fresh(target)


def spread(values: Sequence[float]) -> str:
    return f"{statistics.median(values):5.2f} ({min(values):.2f} to {max(values):.2f})"


def memory(folder: Path) -> Iterator[str]:
    """The most anonymous memory of a conversion, beyond that of an interpreter that has imported numpy."""
    base = anonymous([sys.executable, "-c", "import numpy, time; time.sleep(0.5)"])
    yield f"anonymous memory of Python with numpy: {base / 2**20:.1f} MiB"
    for name in ("1 GB", "4 GB", "16 GB"):
        source = make(folder, name)
        size = sum(file.stat().st_size for file in source.iterdir())
        for ranks in (1, 16):
            target = fresh(folder / "converted")
            command = [sys.executable, "-m", "reshard", "convert", str(source), str(target), "--mp", str(ranks)]
            started = time.perf_counter()
            peak = anonymous(command)
            seconds = time.perf_counter() - started
            rate = size / seconds / 1e9
            beyond = (peak - base) / 2**20
            yield f"{size / 1e9:5.1f} GB, mp {ranks:2}: {beyond:5.1f} MiB more, {seconds:6.1f} s, {rate:.2f} GB/s"
        fresh(target)


def largest(folder: Path) -> Iterator[str]:
    """A tensor of 98 GB, as DeepSeek-V4.1 has one, of holes; its four rank files are written one after another."""
    source = folder / "largest"
    if not source.exists():
        rows = 384_006_168
        tensors = [("table.weight", "F8_E4M3", (rows, 256)), ("table.scale", "F8_E8M0", (rows, 8))]
        write_tensors(source, tensors, {}, 1, sparse=True)
    recipe = folder / "largest.toml"
    recipe.write_text(
        'name = "largest"\nabout = "a table"\nleft = "one"\nright = "other"\nfiles = "{rank}-{ranks}.safetensors"\n'
        'scales.r = { left = "scale", right = "scale", block = [1, 32] }\n'
        'rules = [["same", "table.{r}", "table.{r}", "padded rows"]]\n',
        encoding="utf-8",
    )
    base = anonymous([sys.executable, "-c", "import numpy, time; time.sleep(0.5)"])
    for rank in range(4):
        target = fresh(folder / "converted")
        command = [sys.executable, "-m", "reshard", "convert", str(source), str(target), "--mp", "4"]
        started = time.perf_counter()
        peak = anonymous([*command, "--recipe", str(recipe), "--ranks", str(rank)])
        seconds = time.perf_counter() - started
        size = sum(file.stat().st_size for file in target.iterdir())
        yield f"rank {rank} of 98.3 GB: {size / 1e9:.1f} GB, {(peak - base) / 2**20:.1f} MiB more, {seconds:.1f} s"
    fresh(folder / "converted")


def anonymous(command: Sequence[str]) -> int:
    """The most memory that a process has had, in bytes, files apart, looked at every two milliseconds."""
    process = subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    most = 0
    while process.poll() is None:
        try:
            status = Path(f"/proc/{process.pid}/status").read_text(encoding="ascii")
            most = max(most, int(status.split("RssAnon:")[1].split()[0]) << 10)
        except (OSError, IndexError):
            break
        time.sleep(0.002)
    if process.wait():
        raise SystemExit(f"{command} failed")
    return most


WITHOUT_CHECKSUMS = """
import sys, reshard.execution.writer
reshard.execution.writer.xxh3_128_digest = lambda data: bytes(16)
from reshard.cli.main import main
sys.exit(main(sys.argv[1:]))
"""


def checksums(folder: Path) -> str:
    """The same job with and without its checksums: processor time and whole time."""
    source = make(folder, "v3")
    ratios: dict[str, list[float]] = {"processor": [], "wall": []}
    for _ in range(4):
        times = []
        for start in (["-m", "reshard"], ["-c", WITHOUT_CHECKSUMS]):
            warm(source, cold=False)
            arguments = ["convert", str(source), str(fresh(folder / "converted")), "--mp", "16", "--cache", "yes"]
            before, started = os.times(), time.perf_counter()
            subprocess.run([sys.executable, *start, *arguments], check=True, capture_output=True)
            after = os.times()
            cpu = after.children_user + after.children_system - before.children_user - before.children_system
            times.append((cpu, time.perf_counter() - started))
        ratios["processor"].append(times[0][0] / times[1][0])
        ratios["wall"].append(times[0][1] / times[1][1])
    fresh(folder / "converted")
    return f"{'with/without checksums':42} processor {spread(ratios['processor'])}  wall {spread(ratios['wall'])}"


if __name__ == "__main__":
    main()
