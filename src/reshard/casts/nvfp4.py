"""MXFP4 as NVFP4, exactly: the codes stay as they are, and their scales get another form. Opens no file itself.

    MXFP4   code * 2^e               e of 32 columns, F8_E8M0
    NVFP4   code * scale / factor    scale of 16 columns, F8_E4M3; factor F32, of the whole weight

The scale is 2^(e + n) and the factor 2^n, so that both products are equal. F8_E4M3 has 18 powers of two, from 2^-9 to
2^8. `n` makes the largest scale 2^8. Groups of zeros may have any scale: one that does not fit becomes the nearest.

Engines fuse weights beside each other, such as q, k and v, and then take the factor of one of them for all (vLLM does).
So the weights of one parent share `n`.
"""

from collections.abc import Iterator, Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray

from reshard.casts.code_tables import NAN_SCALE
from reshard.casts.tensor_boxes import CastInputs, ElementBox
from reshard.casts.unpacking import read_rows
from reshard.errors import refuse
from reshard.types import Cast, Packed

SCALE, FACTOR = "nvfp4-scale", "nvfp4-factor"
"""Operations of casts: the scales of a weight, and its factor."""

SMALLEST, LARGEST = -9, 8
"""Exponents of the powers of two of F8_E4M3."""

SMALLEST_NORMAL = -6
"""The exponent of the smallest F8_E4M3 that is normal."""

MOST_POWER = 126
"""The largest exponent of a factor: engines take its inverse, which is then normal in F32 too."""

ZERO_EXPONENT = 127
"""The F8_E8M0 code of 1."""

GROUP_BYTES = 16
"""Of codes: 32 columns share a scale of MXFP4."""

MAGNITUDES = 0x77
"""The bits of two codes but for their signs."""


def compute_nvfp4_scales(cast: Cast, box: ElementBox, out: NDArray[Any], inputs: CastInputs) -> None:
    """Computes a box of the scales of a weight, as F8_E4M3 codes uint8 [rows, groups of 16 columns]. Raises Refused."""
    scales = take_packed(cast).scales
    codes = tabulate_scales(find_power(cast, inputs))
    height, step = scales.shape[0], max(1, inputs.most_scales // scales.shape[1])
    for top in range(box.top, box.bottom, step):
        bottom = min(top + step, box.bottom)
        rows = codes[read_rows(inputs.scale, scales, height, top, bottom)]
        out[top - box.top : bottom - box.top] = np.repeat(rows, 2, axis=1)[:, box.left : box.right]


def compute_nvfp4_factor(cast: Cast, out: NDArray[Any], inputs: CastInputs) -> None:
    """Computes the factor of a weight, as bytes [1, 4] of an F32. Raises Refused."""
    out.view(np.float32)[:] = np.ldexp(np.float32(1), find_power(cast, inputs))


def take_packed(cast: Cast) -> Packed:
    """How the weight of a cast lies packed."""
    if cast.packed is None:
        raise ValueError(f"{cast.result.name} does not lie packed")
    return cast.packed


def tabulate_scales(power: int) -> NDArray[np.uint8]:
    """The F8_E4M3 code of each F8_E8M0 code [256] times 2^power; the nearest power of two where there is none."""
    exponents = np.clip(np.arange(256) - ZERO_EXPONENT + power, SMALLEST, LARGEST)
    subnormal = 1 << np.clip(exponents - SMALLEST, 0, 2)
    return np.where(exponents < SMALLEST_NORMAL, subnormal, exponents - SMALLEST_NORMAL + 1 << 3).astype(np.uint8)


def find_power(cast: Cast, inputs: CastInputs) -> int:
    """Finds the exponent of the factor of a weight, and of those beside it: read once for a job. Raises Refused."""
    key = cast.beside[0].result.file
    if key not in inputs.powers:  # two threads may both read: they find the same
        inputs.powers[key] = compute_power(cast.beside, inputs)
    return inputs.powers[key]


def compute_power(weights: Sequence[Packed], inputs: CastInputs) -> int:
    """Computes the exponent of a factor that suits some weights. Raises Refused if there is none.

    Codes are read only where the scales alone do not fit: then groups of zeros do not count.
    """
    counts = [count_scales(packed, inputs) for packed in weights]
    for packed, found in zip(weights, counts, strict=True):
        if found[NAN_SCALE]:
            said = f"{found[NAN_SCALE]:,} scales that are NaN"
            raise refuse("not-finite", packed.scales.name, said, "powers of two", "mend the checkpoint")
    if measure_span(counts) > LARGEST - SMALLEST:
        counts = [count_scales_of_numbers(packed, inputs) for packed in weights]
    if measure_span(counts) > LARGEST - SMALLEST:
        raise refuse_span(weights, counts)
    used = np.flatnonzero(sum(counts))
    return min(LARGEST - int(used.max(initial=0)) + ZERO_EXPONENT, MOST_POWER) if len(used) else 0


def measure_span(counts: Sequence[NDArray[np.int64]]) -> int:
    """How many powers of two lie between the smallest and the largest scale that is used."""
    used = np.flatnonzero(sum(counts))
    return int(used[-1] - used[0]) if len(used) else 0


def count_scales(packed: Packed, inputs: CastInputs) -> NDArray[np.int64]:
    """Counts how often a weight has each F8_E8M0 code [256]."""
    found = np.zeros(256, np.int64)
    for top, bottom in split_rows_of_codes(packed, inputs):
        scales = read_rows(inputs.scale, packed.scales, packed.scales.shape[0], top, bottom)
        found += np.bincount(scales.reshape(-1), minlength=256)
    return found


def count_scales_of_numbers(packed: Packed, inputs: CastInputs) -> NDArray[np.int64]:
    """Counts how often a weight has each F8_E8M0 code [256], but for groups of zeros and minus zeros."""
    found = np.zeros(256, np.int64)
    for top, bottom in split_rows_of_codes(packed, inputs):
        scales = read_rows(inputs.scale, packed.scales, packed.scales.shape[0], top, bottom)
        codes = read_rows(inputs.weight, packed.codes, packed.codes.shape[0], top, bottom)
        together = np.bitwise_or.reduceat(codes, np.arange(0, codes.shape[1], GROUP_BYTES), axis=1)
        found += np.bincount(scales[together & MAGNITUDES != 0], minlength=256)
    return found


def split_rows_of_codes(packed: Packed, inputs: CastInputs) -> Iterator[tuple[int, int]]:
    """Splits the rows of a weight into ranges whose codes and scales are each read at once."""
    rows, width = packed.codes.shape
    if packed.codes.size:
        step = max(1, min(inputs.most // width, inputs.most_scales // packed.scales.shape[1]))
        yield from ((top, min(top + step, rows)) for top in range(0, rows, step))


def refuse_span(weights: Sequence[Packed], counts: Sequence[NDArray[np.int64]]) -> Exception:
    """The refusal of weights whose scales lie too far apart, which names the largest and the smallest."""
    used = [np.flatnonzero(found) for found in counts]
    ends = [(int(codes[0]), int(codes[-1]), packed) for codes, packed in zip(used, weights, strict=True) if len(codes)]
    low, high = min(ends, key=lambda end: end[0]), max(ends, key=lambda end: end[1])
    other = "" if low is high else f", that of {high[2].scales.name}"
    found = f"scales from 2^{low[0] - ZERO_EXPONENT} to 2^{high[1] - ZERO_EXPONENT}{other}"
    expected = f"at most {LARGEST - SMALLEST} powers of two between them: F8_E4M3 has no more"
    return refuse("inexact-cast", low[2].scales.name, found, expected, "--cast bf16 takes any")
