"""The kernels of casts against torch's way with whole tensors: how many times as fast, on one thread and on two.

    python benchmarks/casts.py

Takes turns, torch then a kernel, on one matrix of the size of a DeepSeek-V3 expert, in memory. Torch has one thread and
makes new tensors, as the official scripts do. A kernel is called for one band of rows after the other, as the engine
does, and writes where it is told. On one thread the seconds are the thread's own, on two the clock's. Rates are the
best of all turns, and the bars are for the best of both; the ratios of the turns show the spread, which others who use
the machine's caches make wide. Results are compared bit by bit before anything is timed. Needs torch; numba is measured
where it is installed. The exit code is 1 if a bar is missed.

Packed weights are measured against the functions of compressed-tensors and transformers where these are installed, else
against the same steps in torch; against the steps of AutoAWQ, GPTQModel and ModelOpt always. The kernels bring words of
AutoAWQ and GPTQ into rows as part of what is timed. There is no bar for integers: numpy alone is no faster than torch
with those of 4 bits.
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
from reshard.casts import packed_kernels as packed
from reshard.casts import packed_layouts as layouts
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
    cases = [*dequantizing(), *from_fp4(), quantizing(), *integers(), *words(), *floats_of_4_bits()]
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


def patterns(values: torch.Tensor) -> Array:
    return values.bfloat16().contiguous().view(torch.int16).numpy().view(np.uint16)


def multiply_of(run: Recode) -> packed.Multiply:
    return packed.multiply_codes if run is casts.recode else packed.multiply_compiled


def unpack(values: torch.Tensor, bits: int) -> torch.Tensor:
    """The codes of words along the last dimension, lowest first."""
    return ((values[..., None] >> torch.arange(0, 32, bits)) & ((1 << bits) - 1)).flatten(-2)


def integers() -> list[Case]:
    """compressed-tensors, pack-quantized, groups of 128."""
    random, out = np.random.default_rng(4), np.empty((ROWS, COLUMNS), np.uint16)
    groups = (np.arange(COLUMNS) // 128).astype(np.int32)

    def case(bits: int, dtype: torch.dtype, *, has_zeros: bool = False) -> Case:
        words = random.integers(-(1 << 31), 1 << 31, (ROWS, COLUMNS * bits // 32)).astype(np.int32)
        scales = (torch.rand(ROWS, COLUMNS // 128) / 100 + 0.001).to(dtype)
        zeros = random.integers(0, 1 << bits, tuple(scales.shape), np.uint8)
        shifted = torch.from_numpy(zeros.astype(np.int16) - (1 << (bits - 1))).to(torch.int8) if has_zeros else None
        bytes_of, halves = words.view(np.uint8), scales.view(torch.int16).numpy().view(np.uint16)
        name = {torch.bfloat16: "BF16", torch.float16: "F16"}[dtype]

        def own_way() -> torch.Tensor:
            codes = (unpack(torch.from_numpy(words), bits) - (1 << (bits - 1))).to(torch.int8).to(dtype)
            values = codes.unflatten(1, (-1, 128))
            return ((values if shifted is None else values - shifted.to(dtype)[..., None]) * scales[..., None]).flatten(
                1
            )

        way = choose_way(lambda: library_way(words, bits, scales, shifted), own_way)

        def kernel(rows: slice, run: Recode) -> None:
            some = zeros[rows] if has_zeros else None
            packed.dequantize_integers(
                bytes_of[rows], bits, halves[rows], name, some, groups, out[rows], multiply_of(run)
            )

        zero_points = " with zero points" if has_zeros else ""
        return Case(f"integers of {bits} bits, {name}{zero_points}", lambda: patterns(way()), kernel, out)

    bf16, f16 = torch.bfloat16, torch.float16
    return [
        case(4, bf16),
        case(4, f16),
        case(4, bf16, has_zeros=True),
        case(8, bf16),
    ]


def choose_way(library: Callable[[], Callable[[], torch.Tensor]], own: Callable[[], torch.Tensor]) -> Callable[[], Any]:
    try:
        return library()
    except ImportError as error:
        print(f"{error}: measured against the same steps in torch", file=sys.stderr)
        return own


def library_way(
    words: Array, bits: int, scales: torch.Tensor, zeros: torch.Tensor | None
) -> Callable[[], torch.Tensor]:
    from compressed_tensors.compressors.pack_quantized.helpers import unpack_from_int32  # noqa: PLC0415 - if it is installed
    from compressed_tensors.quantization import QuantizationArgs  # noqa: PLC0415 - if it is installed
    from compressed_tensors.quantization.lifecycle.forward import dequantize  # noqa: PLC0415 - if it is installed

    args = QuantizationArgs(num_bits=bits, symmetric=zeros is None, strategy="group", group_size=128)
    shape = torch.Size([ROWS, COLUMNS])

    def unpack_and_dequantize() -> torch.Tensor:
        codes = unpack_from_int32(torch.from_numpy(words), bits, shape)
        return dequantize(codes, scales, zeros, args)  # type: ignore[no-any-return]

    return unpack_and_dequantize


def words() -> list[Case]:
    """AutoAWQ and GPTQ, 4 bits, F16, groups of 128; of GPTQ also in the order of activations."""
    random, out = np.random.default_rng(5), np.empty((ROWS, COLUMNS), np.uint16)
    scales = (torch.rand(COLUMNS // 128, ROWS) / 100 + 0.001).half()
    halves = scales.view(torch.int16).numpy().view(np.uint16)
    zeros = random.integers(-(1 << 31), 1 << 31, (COLUMNS // 128, ROWS // 8)).astype(np.int32)
    awq = random.integers(-(1 << 31), 1 << 31, (COLUMNS, ROWS // 8)).astype(np.int32)
    gptq = random.integers(-(1 << 31), 1 << 31, (COLUMNS // 8, ROWS)).astype(np.int32)
    groups = (np.arange(COLUMNS) // 128).astype(np.int32)
    eights = torch.tensor([0, 4, 1, 5, 2, 6, 3, 7])

    def spread_and_multiply(rows: slice, order: Array, some: Array, run: Recode, *, is_awq: bool) -> None:
        codes = np.empty((rows.stop - rows.start, COLUMNS // 2), np.uint8)
        if is_awq:
            layouts.spread_awq(awq[:, rows.start // 8 : rows.stop // 8], codes)
        else:
            layouts.spread_gptq(gptq[:, rows], codes)
        packed.dequantize_integers(codes, 4, halves[:, rows].T, "F16", some, order, out[rows], multiply_of(run))

    def awq_way() -> Array:
        values, shifts = (
            unpack(torch.from_numpy(each), 4).to(torch.int8).unflatten(1, (-1, 8))[:, :, eights].flatten(1)
            for each in (awq, zeros)
        )
        whole = (values - shifts.repeat_interleave(128, 0)) * scales.repeat_interleave(128, 0)
        return patterns(whole.T)

    def awq_kernel(rows: slice, run: Recode) -> None:
        some = layouts.spread_zeros_awq(zeros[:, rows.start // 8 : rows.stop // 8])
        spread_and_multiply(rows, groups, some, run, is_awq=True)

    def gptq_case(name: str, order: Array) -> Case:
        index = torch.from_numpy(order).long()

        def torch_way() -> Array:
            shifts = torch.arange(0, 32, 4)
            stored = unpack(torch.from_numpy(zeros) + 0x11111111, 4).to(torch.int8)
            values = ((torch.from_numpy(gptq)[:, None, :] >> shifts[:, None]).to(torch.int8) & 15).flatten(0, 1)
            return patterns((scales[index] * (values - stored[index])).T)

        def kernel(rows: slice, run: Recode) -> None:
            some = layouts.spread_zeros_gptq(zeros[:, rows.start // 8 : rows.stop // 8], 4, is_v2=False)
            spread_and_multiply(rows, order, some, run, is_awq=False)

        return Case(name, torch_way, kernel, out)

    return [
        Case("AutoAWQ, 4 bits, F16", awq_way, awq_kernel, out),
        gptq_case("GPTQ, 4 bits, F16", groups),
        gptq_case("GPTQ, 4 bits, F16, in the order of activations", random.permutation(groups)),
    ]


def floats_of_4_bits() -> list[Case]:
    """NVFP4 of ModelOpt and of compressed-tensors, and the experts of gpt-oss."""
    random, out = np.random.default_rng(6), np.empty((ROWS, COLUMNS), np.uint16)
    pairs = random.integers(0, 256, (ROWS, COLUMNS // 2), np.uint8)
    fine, coarse = (random.integers(100, 126, (ROWS, COLUMNS // each), np.uint8) for each in (16, 32))
    turned = np.empty((COLUMNS, ROWS), np.uint16)
    signed = torch.cat([FP4[:8], -FP4[:8]])

    def look_up(table: torch.Tensor) -> torch.Tensor:
        nibbles = torch.from_numpy(pairs)
        return table[torch.stack([nibbles & 15, nibbles >> 4], dim=-1).flatten(1).long()]

    def modelopt_way() -> Array:
        blocks = torch.from_numpy(fine).view(torch.float8_e4m3fn).float() * torch.tensor(0.01)
        return patterns((look_up(FP4).unflatten(1, (-1, 16)) * blocks[..., None]).flatten(1))

    def own_divided_way() -> torch.Tensor:
        blocks = torch.from_numpy(fine).view(torch.float8_e4m3fn).bfloat16() / torch.tensor([100.0])
        values = look_up(signed).bfloat16().float()
        return (values.unflatten(1, (-1, 16)) * blocks[..., None]).flatten(1)

    def own_experts_way() -> torch.Tensor:
        values = look_up(signed.bfloat16()).unflatten(1, (-1, 32))
        return torch.ldexp(values, torch.from_numpy(coarse).int()[..., None] - 127).flatten(1).T.bfloat16()

    divided_way = choose_way(lambda: divided_library_way(pairs, fine), own_divided_way)
    experts_way = choose_way(lambda: experts_library_way(pairs, coarse), own_experts_way)

    def kernel(rows: slice, run: Recode) -> None:
        packed.dequantize_nvfp4(pairs[rows], fine[rows], 0.01, (0, 0), out[rows], run, divides=False)

    def divided_kernel(rows: slice, run: Recode) -> None:
        packed.dequantize_nvfp4(pairs[rows], fine[rows], 100.0, (0, 0), out[rows], run, divides=True)

    def experts_kernel(rows: slice, run: Recode) -> None:
        packed.dequantize_experts(pairs[rows], coarse[rows], turned[:, rows], run)

    return [
        Case("NVFP4 of ModelOpt", modelopt_way, kernel, out, 5),
        Case("NVFP4 of compressed-tensors", lambda: patterns(divided_way()), divided_kernel, out, 5),
        Case("experts of gpt-oss", lambda: patterns(experts_way()), experts_kernel, turned, 5),
    ]


def divided_library_way(pairs: Array, scales: Array) -> Callable[[], torch.Tensor]:
    from compressed_tensors.compressors import NVFP4PackedCompressor  # noqa: PLC0415 - if it is installed
    from compressed_tensors.quantization import QuantizationArgs, QuantizationScheme  # noqa: PLC0415 - if it is installed

    args = QuantizationArgs(num_bits=4, type="float", strategy="tensor_group", group_size=16)
    scheme = QuantizationScheme(targets=["Linear"], weights=args)
    state = {
        "weight_packed": torch.from_numpy(pairs),
        "weight_scale": torch.from_numpy(scales).view(torch.float8_e4m3fn),
        "weight_global_scale": torch.tensor([100.0]),
    }
    return lambda: NVFP4PackedCompressor.decompress(state, scheme)["weight"]


def experts_library_way(pairs: Array, scales: Array) -> Callable[[], torch.Tensor]:
    from transformers.integrations.mxfp4 import convert_moe_packed_tensors  # noqa: PLC0415 - if it is installed

    blocks, exponents = torch.from_numpy(pairs).view(1, ROWS, -1, 16), torch.from_numpy(scales)[None]
    return lambda: convert_moe_packed_tensors(blocks, exponents)[0]


if __name__ == "__main__":
    main()
