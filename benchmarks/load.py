"""A rank into memory: from the Hugging Face files, from a converted file, and by reading everything and slicing.

    python benchmarks/load.py FOLDER

Makes a checkpoint like DeepSeek-V3, narrower and with fewer layers, below FOLDER, and converts one of its 16 ranks
(2 GB free are needed). The ways take turns, each in a process of its own that has imported what it needs; first with
all files in the page cache, then with none. Each way ends when it has touched every page of its tensors, for a memory
map has read nothing before. What is read is counted by the kernel: by system calls (`rchar`) and from the disk
(`read_bytes`). `memory` is what the process has grown by at most: memory of its own, and pages of mapped files. Results
are compared bit by bit before anything is timed. Needs torch and safetensors.
"""

import argparse
import json
import os
import shutil
import subprocess
import sys
from pathlib import Path
from statistics import median

import reshard
from reshard.synthetic import DEEPSEEK_V3, write_checkpoint

CONFIG = {
    **DEEPSEEK_V3,
    "first_k_dense_replace": 1,
    "hidden_size": 1792,
    "intermediate_size": 6144,
    "kv_lora_rank": 128,
    "moe_intermediate_size": 512,
    "num_attention_heads": 32,
    "num_hidden_layers": 3,
    "num_nextn_predict_layers": 0,
    "q_lora_rank": 384,
    "vocab_size": 16160,
}
"""A quarter as wide, with as many experts: a rank has about as much of the whole as in the real model."""
RANKS, RANK = 16, 3
ROOT = Path(__file__).parents[1]
MEASURED = f"""
import hashlib, json, sys, time
from pathlib import Path
source, converted, way, check = sys.argv[1:]
import torch, reshard, reshard.loading, oracle
from safetensors.torch import load_file

def ours(): return reshard.load(source, mp={RANKS}, rank={RANK})
def mapped(): return load_file(converted)
def read(): return load_file(converted, backend="pread")
def everything():
    tensors = oracle.load_tensors(Path(source), ())
    return dict(oracle.rank_tensors(tensors, {RANKS}, {RANK}, 128))

def content(name): return name.encode() + tensors[name].flatten().view(torch.uint8).numpy().tobytes()
def grown(): return {{word: int(text.split(word + ":")[1].split()[0]) << 10 for word in ("RssAnon", "RssFile", "VmHWM")
                     for text in [Path("/proc/self/status").read_text()]}}
def counted(): return {{word: int(Path("/proc/self/io").read_text().split(word + ":")[1].split()[0])
                       for word in ("rchar", "read_bytes")}}
Path("/proc/self/clear_refs").write_text("5")
before, memory, started = counted(), grown(), time.perf_counter()
tensors = globals()[way]()
for tensor in tensors.values():
    tensor.flatten().view(torch.uint8)[::4096].max()
seconds, after, now = time.perf_counter() - started, counted(), grown()
print(json.dumps({{"seconds": seconds, "memory": now["VmHWM"] - memory["RssAnon"] - memory["RssFile"],
    "rchar": after["rchar"] - before["rchar"], "read_bytes": after["read_bytes"] - before["read_bytes"],
    "size": sum(tensor.nbytes for tensor in tensors.values()),
    "hash": check and hashlib.sha256(b"".join(content(name) for name in sorted(tensors))).hexdigest()}}))
"""
WAYS = {
    "ours": "`reshard.load`, from the Hugging Face files",
    "mapped": "`safetensors.torch.load_file` of the converted file",
    "read": 'the same with `backend="pread"`',
    "everything": "`load_file` of every Hugging Face file, then slicing",
}


def main() -> None:
    parser = argparse.ArgumentParser(description="A rank into memory.")
    parser.add_argument("folder", type=Path)
    parser.add_argument("--turns", type=int, default=5)
    options = parser.parse_args()
    source, target = options.folder / "source", options.folder / "ranks"
    if not source.exists():
        write_checkpoint(source, CONFIG, 4)
    shutil.rmtree(target, ignore_errors=True)
    reshard.convert(source, target, RANKS, ranks=[RANK])
    converted = target / f"model{RANK}-mp{RANKS}.safetensors"
    files = [*source.glob("*.safetensors"), converted]
    os.sync()
    hashes = {run(source, converted, way, check="check")["hash"] for way in WAYS}
    if len(hashes) != 1:
        sys.exit("not the same tensors")
    total = sum(path.stat().st_size for path in files) - converted.stat().st_size
    print(f"source {total / 1e6:,.0f} MB, the rank {converted.stat().st_size / 1e6:,.0f} MB, {options.turns} turns")
    print("| files | way | seconds, median (least to most) | read by calls, MB | read from disk, MB | memory, MB |")
    print("|---|---|---|---:|---:|---:|")
    for cold in (False, True):
        runs: dict[str, list[dict[str, float]]] = {way: [] for way in WAYS}
        for _ in range(options.turns):
            for way, found in runs.items():
                place(files, cold=cold)
                found.append(run(source, converted, way))
        for way, found in runs.items():
            print(line("cold" if cold else "warm", way, found), flush=True)


def run(source: Path, converted: Path, way: str, check: str = "") -> dict[str, float]:
    """One way in a process of its own: seconds and bytes."""
    paths = os.pathsep.join([str(ROOT / "src"), str(ROOT / "tests" / "support")])
    command = [sys.executable, "-c", MEASURED, str(source), str(converted), way, check]
    done = subprocess.run(command, check=True, capture_output=True, env=os.environ | {"PYTHONPATH": paths})
    return dict(json.loads(done.stdout))


def place(files: list[Path], *, cold: bool) -> None:
    """Puts files into the page cache, or out of it."""
    for path in files:
        with path.open("rb", buffering=0) as opened:
            if cold:
                os.posix_fadvise(opened.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)
            else:
                while opened.read(4 << 20):
                    pass


def line(state: str, way: str, runs: list[dict[str, float]]) -> str:
    seconds = [run["seconds"] for run in runs]
    spread = f"{median(seconds):.2f} ({min(seconds):.2f} to {max(seconds):.2f})"
    numbers = [f"{median(run[word] for run in runs) / 1e6:,.0f}" for word in ("rchar", "read_bytes", "memory")]
    return f"| {state} | {WAYS[way]} | {spread} | {' | '.join(numbers)} |"


if __name__ == "__main__":
    main()
