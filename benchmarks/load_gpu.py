"""A rank onto a GPU: from the Hugging Face files, the same by way of the processor's memory, and from a converted file.

    python benchmarks/load_gpu.py FOLDER

Makes the V3-shaped checkpoint of `run.py` below FOLDER and converts rank 0 of 1 and of 16 ranks (10 GB free are
needed). The ways take turns, each in a process of its own; timed is what comes after the imports and the start of CUDA,
with all files in the page cache. Results are compared bit by bit before anything is timed. Needs torch with CUDA.
"""

import argparse
import subprocess
import sys
from pathlib import Path
from statistics import median

from run import make

import reshard

WAYS = ("reshard", "reshard, then to the GPU", "load_file")
MEASURED = """
import sys, time
import torch, reshard, reshard.loading
from safetensors.torch import load_file

source, converted, mp, way = sys.argv[1:]
ways = {
    "reshard": lambda: reshard.load(source, mp=int(mp), rank=0, device="cuda"),
    "reshard, then to the GPU": lambda: {
        name: tensor.cuda() for name, tensor in reshard.load(source, mp=int(mp), rank=0).items()
    },
    "load_file": lambda: load_file(converted, device="cuda"),
}
torch.zeros(1, device="cuda")
if way == "same":
    found, wanted = ways["reshard"](), ways["load_file"]()
    assert found.keys() == wanted.keys()
    for name, tensor in found.items():
        bits, right = (one.reshape(-1).view(torch.uint8) for one in (tensor, wanted[name]))
        assert tensor.dtype == wanted[name].dtype and torch.equal(bits, right), name
    print(sum(tensor.nbytes for tensor in found.values()))
else:
    torch.cuda.synchronize()
    began = time.perf_counter()
    found = ways[way]()
    torch.cuda.synchronize()
    print(time.perf_counter() - began)
"""


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", type=Path)
    parser.add_argument("--turns", type=int, default=5)
    options = parser.parse_args()
    source = make(options.folder, "v3")
    for ranks in (1, 16):
        target = options.folder / f"ranks-{ranks}"
        reshard.convert(source, target, ranks, ranks=[0])
        paths = [str(source), str(target / f"model0-mp{ranks}.safetensors"), str(ranks)]
        size = measured(*paths, "same")
        turns = [[measured(*paths, way) for way in WAYS] for _ in range(options.turns)]
        for way, seconds in zip(WAYS, zip(*turns, strict=True), strict=True):
            spread = f"{median(seconds):.3f} s ({min(seconds):.3f} to {max(seconds):.3f})"
            print(f"{ranks:>2} ranks, {size / 1e6:,.0f} MB  {way:<26}{spread}", flush=True)


def measured(*words: str) -> float:
    done = subprocess.run([sys.executable, "-c", MEASURED, *words], check=True, capture_output=True, text=True)
    return float(done.stdout)


if __name__ == "__main__":
    main()
