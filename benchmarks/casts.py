"""The kernels of casts against torch's way with whole tensors: how many times as fast, on one thread and on two.

    python benchmarks/casts.py

Takes turns, torch then a kernel, on one matrix of the size of a DeepSeek-V3 expert, in memory. Torch has one thread and
makes new tensors, as the official scripts do. A kernel is called for one band of rows after the other, as the engine
does, and writes where it is told. On one thread the seconds are the thread's own, on two the clock's. Rates are the
best of all turns, and the bars are for the best of both; the ratios of the turns show the spread, which others who use
the machine's caches make wide. Results are compared bit by bit before anything is timed. Needs torch; numba is measured
where it is installed. The exit code is 1 if a bar is missed.
"""

import argparse
import sys
import time
from collections.abc import Callable, Iterable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from statistics import median
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from reshard.casts import kernels as casts
from reshard.casts.code_tables import decode_scales
from reshard.casts.kernels import Recode, compile_recode

ROWS, COLUMNS = 2048, 7168
BAND = 256
"""Rows that a kernel is given at once."""
FP4 = torch.tensor([0, 0.5, 1, 1.5, 2, 3, 4, 6, 0, -0.5, -1, -1.5, -2, -3, -4, -6])
Array = NDArray[Any]


@dataclass(frozen=True)
class Case:
    """One cast: torch's way, the kernel for the rows of one band, and what both make."""

    name: str
    torch_way: Callable[[], Array]
    kernel: Callable[[slice, Recode], object]
    out: Array
    bar: int = 0
    looks_up: bool = True


def main() -> None:
    parser = argparse.ArgumentParser(description="The kernels of casts against torch.")
    parser.add_argument("--pairs", type=int, default=7)
    pairs = parser.parse_args().pairs
    torch.set_num_threads(1)
    runs: dict[str, Recode] = {"numpy": casts.recode}
    if (compiled := compile_recode()) is not None:
        runs["numba"] = compiled
    print(
        f"{ROWS} x {COLUMNS} values, GB/s of output, {pairs} pairs, torch {torch.__version__}, numpy {np.__version__}"
    )
    print("| cast | by | torch | 1 thread | times torch | bar | median of pairs (least to most) | 2 threads |")
    print("|---|---|---|---|---|---|---|---|")
    cases = [*dequantizing(), *from_fp4(), quantizing()]
    results = [
        measure(case, by, run, pairs) for case in cases for by, run in runs.items() if by == "numpy" or case.looks_up
    ]
    sys.exit(not all(results))


def measure(case: Case, by: str, run: Recode, pairs: int) -> bool:
    """Prints one line of the table; whether the bar is met by the best of both."""
    require_same(case, run)
    theirs, ours = [], []
    for _ in range(pairs):
        theirs.append(seconds(case.torch_way, time.thread_time))
        ours.append(seconds(lambda: whole(case, run), time.thread_time))
    with ThreadPoolExecutor(2) as pool:
        both = [seconds(lambda: whole(case, run, pool.map), time.perf_counter) for _ in range(pairs)]
    ratios = [a / b for a, b in zip(theirs, ours, strict=True)]
    size, times = case.out.nbytes / 1e9, min(theirs) / min(ours)
    print(
        f"| {case.name} | {by} | {size / min(theirs):.3f} | {size / min(ours):.2f} | {times:.1f} | {case.bar or ''} "
        f"| {median(ratios):.1f} ({min(ratios):.1f} to {max(ratios):.1f}) | {size / min(both):.2f} |",
        flush=True,
    )
    return times >= case.bar


def bands() -> list[slice]:
    return [slice(row, row + BAND) for row in range(0, ROWS, BAND)]


def whole(case: Case, run: Recode, each: Callable[..., Iterable[object]] = map) -> None:
    for _ in each(lambda rows: case.kernel(rows, run), bands()):
        pass


def require_same(case: Case, run: Recode) -> None:
    case.out[:] = 0
    whole(case, run)
    if not np.array_equal(case.out, case.torch_way()):
        sys.exit(f"{case.name}: not what torch makes")


def seconds(call: Callable[[], object], clock: Callable[[], float]) -> float:
    started = clock()
    call()
    return clock() - started


def touched(rows: slice, block: int) -> slice:
    return slice(rows.start // block, -(-rows.stop // block))


def dequantizing() -> list[Case]:
    random = np.random.default_rng(1)
    codes = random.integers(0, 127, (ROWS, COLUMNS), np.uint8) | random.integers(0, 2, (ROWS, COLUMNS), np.uint8) << 7
    out = np.empty((ROWS, COLUMNS), np.uint16)

    def case(name: str, block: tuple[int, int], scales: NDArray[np.float32], bar: int) -> Case:
        weight, factors = torch.from_numpy(codes).view(torch.float8_e4m3fn), torch.from_numpy(scales)

        def torch_way() -> Array:
            values = weight.unflatten(0, (-1, block[0])).unflatten(-1, (-1, block[1])).float()
            result = (values * factors[:, None, :, None]).flatten(2, 3).flatten(0, 1).bfloat16()
            return result.view(torch.int16).numpy().view(np.uint16)

        def kernel(rows: slice, run: Recode) -> None:
            casts.dequantize(codes[rows], scales[touched(rows, block[0])], block, (0, 0), out[rows], run)

        return Case(f"FP8 to BF16, {name} {block[0]} x {block[1]}", torch_way, kernel, out, bar)

    floats = random.random((ROWS // 128, COLUMNS // 128), np.float32) / 1000
    powers = decode_scales(random.integers(110, 125, floats.shape, np.uint8), "F8_E8M0")
    fine = decode_scales(random.integers(110, 125, (ROWS, COLUMNS // 32), np.uint8), "F8_E8M0")
    return [case("F32", (128, 128), floats, 6), case("E8M0", (128, 128), powers, 6), case("E8M0", (1, 32), fine, 0)]


def from_fp4() -> list[Case]:
    random = np.random.default_rng(2)
    packed = random.integers(0, 256, (ROWS, COLUMNS // 2), np.uint8)
    groups = random.integers(112, 124, (ROWS, COLUMNS // 32), np.uint8)
    out = np.empty((ROWS, COLUMNS), np.uint8)

    def case(block: int) -> Case:
        scales = casts.compute_fp8_scales(groups, (block, block))

        def torch_way() -> Array:
            halves, factors = torch.from_numpy(packed), torch.from_numpy(groups).view(torch.float8_e8m0fnu).float()
            values = torch.stack([FP4[(halves & 15).long()], FP4[(halves >> 4).long()]], dim=-1).flatten(1)
            factors = factors.unflatten(0, (-1, block)).unflatten(-1, (-1, block // 32))
            ratios = factors / (factors.amax(dim=(1, 3), keepdim=True) / 64)
            ratios = ratios.flatten(2, 3).flatten(0, 1).repeat_interleave(32, dim=1)
            return (values * ratios).to(torch.float8_e4m3fn).view(torch.uint8).numpy()

        def kernel(rows: slice, run: Recode) -> None:
            some = scales[touched(rows, block)]
            casts.cast_fp4_to_fp8(packed[rows], groups[rows], some, (block, block), (0, 0), out[rows], run)

        return Case(f"FP4 to FP8, {block} x {block}", torch_way, kernel, out, 15)

    return [case(128), case(32)]


def quantizing() -> Case:
    random, block = torch.Generator().manual_seed(3), (128, 128)
    weight = (torch.randn(ROWS, COLUMNS, generator=random) * 0.02).bfloat16()
    values, out = weight.view(torch.int16).numpy().view(np.uint16), np.empty((ROWS, COLUMNS), np.uint8)

    def torch_way() -> Array:
        blocks = weight.unflatten(0, (-1, 128)).unflatten(-1, (-1, 128)).float()
        scales = blocks.abs().amax(dim=(1, 3), keepdim=True) / 448
        codes = (blocks / scales).clamp(-448, 448).to(torch.float8_e4m3fn)
        return codes.flatten(2, 3).flatten(0, 1).view(torch.uint8).numpy()

    def kernel(rows: slice, _: Recode) -> None:
        largest = np.zeros((BAND // 128, COLUMNS // 128), np.uint16)
        casts.raise_to_magnitudes(values[rows], block, (0, 0), largest)
        casts.quantize(values[rows], casts.compute_scales(largest), block, (0, 0), out[rows])

    return Case("BF16 to FP8, 128 x 128, with its scales", torch_way, kernel, out, looks_up=False)


if __name__ == "__main__":
    main()
