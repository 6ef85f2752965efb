"""Prints mean, standard deviation and largest magnitude of every weight matrix, in constant memory.

    pip install 'reshard[torch]'
    python examples/summarize_layers.py Qwen3-0.6B/ --only '*.mlp.*'

A checkpoint of any layout and size: rank files, a training checkpoint, an address such as hf://Qwen/Qwen3-0.6B. At most
4 MiB of a tensor are read at a time. FP8 and packed weights are to be converted first: `--cast bf16 --to hf`.
"""

import argparse
import math
from fnmatch import fnmatchcase
from typing import Any

import reshard

MOST_BYTES = 4 << 20


def summarize(tensor: Any) -> tuple[float, float, float]:
    """Mean, standard deviation and largest magnitude of all elements, read some rows at a time."""
    rows = max(1, MOST_BYTES * tensor.shape[0] // tensor.nbytes)
    count, total, squares, largest = 0, 0.0, 0.0, 0.0
    for start in range(0, tensor.shape[0], rows):
        values = tensor[start : start + rows].double()
        count += values.numel()
        total += float(values.sum())
        squares += float(values.square().sum())
        largest = max(largest, float(values.abs().max()))
    mean = total / count
    return mean, math.sqrt(max(squares / count - mean * mean, 0.0)), largest


def main() -> None:
    parser = argparse.ArgumentParser(description="Statistics of weight matrices, in constant memory.")
    parser.add_argument("source", help="the checkpoint, a folder or an address")
    parser.add_argument("--only", default="*", metavar="PATTERN", help="tensors of these names; default: all")
    options = parser.parse_args()
    try:
        opened = reshard.open(options.source, framework="torch")
    except reshard.Refused as refused:
        parser.exit(2, f"{refused}\n")
    print(f"{'mean':>12} {'deviation':>12} {'largest':>12}  name")
    with opened as tensors:
        for name, tensor in tensors.items():
            if len(tensor.shape) < 2 or not tensor.nbytes or not fnmatchcase(name, options.only):
                continue
            if tensor.dtype not in ("BF16", "F16", "F32", "F64"):
                raise SystemExit(f"{name!r} has {tensor.dtype}: convert with --cast bf16 --to hf first")
            mean, deviation, largest = summarize(tensor)
            print(f"{mean:12.5g} {deviation:12.5g} {largest:12.5g}  {name!r}")


if __name__ == "__main__":
    main()
