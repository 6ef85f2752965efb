"""All measurements in one table: `python benchmarks/run.py FOLDER [--reference CONVERT_PY] [--only WORD]`.

Makes its checkpoints below FOLDER (about 40 GB free are needed). Every time is that of a whole process as a person
waits for it. The commands of a case run in turn, forwards and backwards (A B C, C B A, ...). Each column has their time
divided by ours, as median (least to most): above 1, reshard is faster; then the median of their own seconds. Ours reads
the source; the others copy what it writes, so they read as many bytes as they write. `cp -r` alone leaves its bytes in
memory; the sync behind it waits for its files only. The loop is `limits.py copy`. The last column is the rate of our
whole command as a share of what the disk itself wrote from memory in the same round: as many bytes, at most 3 GiB.
"""

import argparse
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

from limits import DISCARD_SECONDS

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
class Case:
    """A checkpoint, how it is converted, and what it is compared with. For 0 ranks it stays whole and is cast."""

    name: str
    source: str
    ranks: int
    options: tuple[str, ...] = ()
    state: str = "warm"
    """Of the source in the page cache: `warm`, `cold` or `half`."""
    pairs: int = 5


CASES = (
    Case("warm, mp 4", "v3", 4),
    Case("warm, mp 16", "v3", 16),
    Case("warm, mp 1", "v3", 1),
    Case("cold, mp 4", "v3", 4, state="cold"),
    Case("cold, mp 16", "v3", 16, state="cold"),
    Case("half in the cache, mp 16", "v3", 16, state="half"),
    Case("larger than a third of the RAM, source warm, mp 16", "large", 16, pairs=3),
    Case("larger than a third of the RAM, cold, mp 16", "large", 16, state="cold", pairs=3),
    Case("fused for vLLM, warm, tp 4", "v3", 4, ("--for", "vllm")),
    Case("BF16 dense, half of it columns, mp 16", "dense", 16, pairs=3),
    Case("100,000 tiny tensors, mp 16", "tiny", 16),
    Case("FP8 to BF16, whole files", "v3", 0, ("--cast", "bf16")),
    Case("whole files again, of 1 GB each", "v3", 0, ("--max-file-size", "1GB")),
)


LARGEST_DISK_FILE = 3 << 30
"""In bytes: at most so much is written to measure the disk itself."""

LIMITS = Path(__file__).with_name("limits.py")

IN_MEMORY = Path("/dev/shm/reshard-benchmark")  # noqa: S108 - a file system in memory is what is measured

LIMITS_SHOWN = ("cp + sync", "cp", "loop")

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
    compile_dir(Path(reshard.__file__).parent, quiet=1)  # as it is once it is installed
    print(
        " | ".join(
            (f"{'case':48}", "source", "output", "ours", *(f"{name} / ours" for name in LIMITS_SHOWN), "of the disk")
        )
    )
    for case in CASES:
        if options.only in case.name:
            print(compare_with_cp(folder, case), flush=True)
    if options.reference and options.only in "script":
        for version in SAFETENSORS:
            print(compare_with_script(folder, options.reference, version), flush=True)
    if options.only in "verify":
        for line in verification(folder):
            print(line, flush=True)
    if options.only in "tmpfs":
        for line in jobs_in_memory(folder):
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


def ours(source: Path, target: Path, ranks: int, *options: str) -> list[str]:
    """The command of a conversion."""
    what = ("--mp", str(ranks)) if ranks else ("--to", "hf")
    return [sys.executable, "-m", "reshard", "convert", str(source), str(target), *what, *options, "--quiet"]


def timed(*commands: Sequence[str]) -> float:
    """The seconds that several commands take, one after the other."""
    started = time.perf_counter()
    for command in commands:
        subprocess.run(command, check=True, capture_output=True)
    return time.perf_counter() - started


def sync_files(folder: Path) -> list[str]:
    """A command that waits until a folder and its files are on the disk, and not for those of others."""
    return ["sh", "-c", 'exec sync "$1"/* "$1"', "sh", str(folder)]


def measure_folder(folder: Path) -> int:
    return sum(file.stat().st_size for file in folder.iterdir())


def fresh(path: Path) -> Path:
    """A target that is not there, on a machine that has nothing left to write or to discard."""
    shutil.rmtree(path, ignore_errors=True)
    os.sync()
    time.sleep(DISCARD_SECONDS)
    return path


def prepare(path: Path, state: str) -> None:
    """Reads every file, so that all runs find it in the page cache; or drops it: all, or every second 32 MiB."""
    for file in sorted(path.iterdir()):
        with file.open("rb", buffering=0) as opened:
            if state == "warm":
                while opened.read(16 << 20):
                    pass
            else:
                os.posix_fadvise(opened.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)
            if state == "half":
                os.posix_fadvise(opened.fileno(), 0, 0, os.POSIX_FADV_RANDOM)
                for offset in range(0, file.stat().st_size, 64 << 20):
                    os.pread(opened.fileno(), 32 << 20, offset)


def compare_with_cp(folder: Path, case: Case) -> str:
    """What reshard writes is what `cp -r` copies."""
    source, model, copied = make(folder, case.source), fresh(folder / "model"), folder / "copied"
    timed(ours(source, model, case.ranks, *case.options))
    size = measure_folder(model)
    copy = ["cp", "-r", str(model), str(copied)]
    loop = [sys.executable, str(LIMITS), "copy", str(model), str(copied)]
    commands: dict[str, tuple[Path, list[list[str]]]] = {
        "cp + sync": (model, [copy, sync_files(copied)]),
        "ours": (source, [ours(source, copied, case.ranks, *case.options)]),
        "cp": (model, [copy]),
        "loop": (model, [loop]),
    }
    times: dict[str, list[float]] = {name: [] for name in commands}
    shares = []
    for turn in range(case.pairs):
        for name in list(commands)[:: 1 if turn % 2 else -1]:
            read, run = commands[name]
            fresh(copied)
            prepare(read, case.state)
            times[name].append(timed(*run))
        fresh(copied)
        write = [sys.executable, str(LIMITS), "write", str(folder), str(min(size, LARGEST_DISK_FILE))]
        disk = float(subprocess.check_output(write))
        shares.append(size / times["ours"][-1] / disk)
    fresh(model)
    found = [compare(times[name], times["ours"]) for name in LIMITS_SHOWN]
    sizes = [f"{size / 1e9:6.2f} GB" for size in (measure_folder(source), size)]
    mine = f"{statistics.median(times['ours']):6.2f} s"
    return " | ".join((f"{case.name:48}", *sizes, mine, *found, spread(shares)))


def compare_with_script(folder: Path, script: Path, version: str) -> str:
    """The script runs with that release of safetensors, which is put into a folder of its own."""
    package = folder / f"safetensors-{version}"
    if not package.exists():
        install = [sys.executable, "-m", "pip", "install", "--quiet", "--no-deps", "--target", str(package)]
        subprocess.run([*install, f"safetensors=={version}"], check=True)
    source, size = make(folder, "v3"), 0
    arguments = ["--hf-ckpt-path", str(source), "--n-experts", "16", "--model-parallel", "16", "--save-path"]
    program = ["env", f"PYTHONPATH={package}", sys.executable, str(script)]
    times: dict[str, list[float]] = {"theirs": [], "ours": []}
    for turn in range(5):
        runs = {
            "theirs": [[*program, *arguments, str(folder / "theirs")], sync_files(folder / "theirs")],
            "ours": [ours(source, folder / "converted", 16)],
        }
        for name in list(runs)[:: 1 if turn % 2 else -1]:
            prepare(source, "warm")
            times[name].append(timed(*runs[name]))
            if name == "ours":
                size = measure_folder(folder / "converted")
            fresh(folder / "theirs")
            fresh(folder / "converted")
    sizes = [f"{size / 1e9:6.2f} GB" for size in (measure_folder(source), size)]
    mine = f"{statistics.median(times['ours']):6.2f} s"
    found = compare(times["theirs"], times["ours"])
    return " | ".join((f"{f'script + sync, safetensors {version}':48}", *sizes, mine, found))


def verification(folder: Path) -> Iterator[str]:
    """Verifying and comparing against plain reading of the same files by one `cat`, in turn."""
    source, target, copy = make(folder, "v3"), fresh(folder / "converted"), fresh(folder / "copied")
    timed(ours(source, target, 4), ["cp", "-r", str(source), str(copy)], ["sync"])
    program = [sys.executable, "-m", "reshard"]
    for name, folders, command in (
        ("verify", (target,), ("verify", str(target))),
        ("verify --source", (source, target), ("verify", str(target), "--source", str(source))),
        ("diff of a copy", (source, copy), ("diff", str(source), str(copy))),
    ):
        files = [str(file) for path in folders for file in sorted(path.iterdir())]
        size = sum(Path(file).stat().st_size for file in files)
        runs = {"cat": ["sh", "-c", 'cat "$@" > /dev/null', "cat", *files], "ours": [*program, *command]}
        for state in ("warm", "cold"):
            times: dict[str, list[float]] = {"cat": [], "ours": []}
            for turn in range(5):
                for run in list(runs)[:: 1 if turn % 2 else -1]:
                    for path in folders:
                        prepare(path, state)
                    times[run].append(timed(runs[run]))
            mine = f"{size / 1e9:6.2f} GB  {statistics.median(times['ours']):5.2f} s"
            yield f"{f'{name}, {state}':42} {mine}  cat/ours {compare(times['cat'], times['ours'])}"
    fresh(target)
    fresh(copy)


def jobs_in_memory(folder: Path) -> Iterator[str]:
    """Conversions from tmpfs to tmpfs, by jobs, against `cp -r` there: no disk is in the way."""
    source = IN_MEMORY / "v3"
    shutil.copytree(make(folder, "v3"), source)
    target, times = IN_MEMORY / "target", dict[str, list[float]]()
    for turn in range(5):
        runs = {"cp": ["cp", "-r", str(source), str(target)]}
        for count in (1, 2, 4, 8, 16):
            runs[f"{count} jobs"] = ours(source, target, 4, "--jobs", str(count), "--max-memory", "2GiB")
        for name in list(runs)[:: 1 if turn % 2 else -1]:
            times.setdefault(name, []).append(timed(runs[name]))
            shutil.rmtree(target)
    shutil.rmtree(IN_MEMORY)
    for name, values in times.items():
        ratios = spread([a / b for a, b in zip(times["cp"], values, strict=True)])
        yield f"{f'tmpfs, {name}':42} {statistics.median(values):5.2f} s  cp/this {ratios}"


def spread(values: Sequence[float]) -> str:
    return f"{statistics.median(values):5.2f} ({min(values):.2f} to {max(values):.2f})"


def compare(theirs: Sequence[float], ours: Sequence[float]) -> str:
    """Their times divided by ours, and the median of theirs."""
    return f"{spread([a / b for a, b in zip(theirs, ours, strict=True)])}, {statistics.median(theirs):6.2f} s"


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
class NoChecksum:
    update = staticmethod(lambda data: None)
    digest = staticmethod(lambda: bytes(16))
reshard.execution.writer.xxh3_128 = NoChecksum
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
            prepare(source, "warm")
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
