"""The loops of packed integers for numba to compile: one pass over the codes, in vector instructions of the processor.

Each is compiled at its first use. They are also correct without numba, but slow.
"""

from collections.abc import Callable
from functools import cache
from typing import Any

import numpy as np
from numpy.typing import NDArray

WordsOf32 = NDArray[np.uint32]

Loop = Callable[..., None]
"""Called with codes, zeros, scales, groups, edges and out: see `build_loop`."""

CompileLoop = Callable[[Any], Any]

SIGN, SIZE, UPPER = np.uint32(0x80000000), np.uint32(0x7FFFFFFF), np.uint32(0xFFFF0000)

INFINITE = np.uint32(0x7F800000)

ONE, FOUR, SIXTEEN, NIBBLE = np.uint32(1), np.uint32(4), np.uint32(16), np.uint32(15)

BRAIN_MIDDLE = np.uint32(0x7FFF)
"""Just below the middle of two BF16 numbers, in what float32 has more."""

HALF_BITS, HALF_MIDDLE, HALF_MASK = np.uint32(13), np.uint32(0xFFF), np.uint32(0xFFFFE000)
"""What float32 has more than float16."""

ABOVE_HALVES = np.uint32(0x47800000)
"""2^16 in float32: the first power of two that float16 has not."""


@cache
def compile_loop(bits: int, half: int, *, is_ordered: bool) -> Loop | None:
    """The loop for codes of so many bits, compiled at its first call; None without numba. The rest is as of
    `build_loop`.
    """
    try:
        import numba  # noqa: PLC0415 - only when a cast is really run
    except ImportError:
        return None
    return build_loop(bits, half, numba.njit(nogil=True), is_ordered=is_ordered)


def build_loop(bits: int, half: int, compile_part: CompileLoop, *, is_ordered: bool) -> Loop:
    """A loop over the rows of a box; `half` is as of `choose_half`.

    It takes codes [rows, bytes], zeros and scales [rows, k] in float32, groups, edges and `out`. If the columns of a
    group are `is_ordered`, they are the bytes between two `edges`, and `groups` has one for each two; else `groups` has
    one for each column. `out` is contiguous: BF16 [rows, bytes], or pairs of them as uint32.
    """
    rounding = compile_part((round_product, round_product_in_half, round_any_product)[half])
    line = compile_part((build_pairs if bits == 4 else build_singles)(rounding))
    mixed_line = compile_part((build_mixed_pairs if bits == 4 else build_mixed_singles)(rounding))

    def multiply_ordered(codes: Any, zeros: Any, scales: Any, groups: Any, edges: Any, out: Any) -> None:
        for row in range(out.shape[0]):
            for place in range(len(groups)):
                first, last, group = edges[place], edges[place + 1], groups[place]
                line(codes[row, first:last], zeros[row, group], scales[row, group], out[row, first:last])

    def multiply_mixed(codes: Any, zeros: Any, scales: Any, groups: Any, edges: Any, out: Any) -> None:  # noqa: ARG001
        for row in range(out.shape[0]):
            mixed_line(codes[row], zeros[row], scales[row], groups, out[row])

    compiled: Loop = compile_part(multiply_ordered if is_ordered else multiply_mixed)
    return compiled


def round_product(product: Any) -> Any:
    """Rounds a float32, no NaN, to BF16: its pattern is the upper half of the result, the lower half is left over."""
    bits = np.float32(product).view(np.uint32)
    return bits + (BRAIN_MIDDLE + ((bits >> SIXTEEN) & ONE))


def round_product_in_half(product: Any) -> Any:
    """Rounds a float32 to float16, of which it is not beyond the range, and that to BF16.

    Of its subnormal numbers it is one already: a product of an integer and a float16 is a multiple of their step.
    """
    bits = np.float32(product).view(np.uint32)
    bits = (bits + (HALF_MIDDLE + ((bits >> HALF_BITS) & ONE))) & HALF_MASK
    return bits + (BRAIN_MIDDLE + ((bits >> SIXTEEN) & ONE))


def round_any_product(product: Any) -> Any:
    """Rounds a float32, no NaN, to float16, and that to BF16: infinite from 65520 on."""
    bits = np.float32(product).view(np.uint32)
    size = bits & SIZE
    raised = (size + (HALF_MIDDLE + ((size >> HALF_BITS) & ONE))) & HALF_MASK
    raised = INFINITE if raised >= ABOVE_HALVES else raised
    return (raised + (BRAIN_MIDDLE + ((raised >> SIXTEEN) & ONE))) | (bits & SIGN)


def build_pairs(rounding: Any) -> Any:
    def multiply_pairs(codes: Any, zero: Any, scale: Any, out: Any) -> None:
        for place in range(len(codes)):
            code = np.uint32(codes[place])
            low = rounding((np.float32(np.int32(code & NIBBLE)) - zero) * scale) >> SIXTEEN
            out[place] = low | (rounding((np.float32(np.int32(code >> FOUR)) - zero) * scale) & UPPER)

    return multiply_pairs


def build_singles(rounding: Any) -> Any:
    def multiply_singles(codes: Any, zero: Any, scale: Any, out: Any) -> None:
        for place in range(len(codes)):
            out[place] = rounding((np.float32(np.int32(codes[place])) - zero) * scale) >> SIXTEEN

    return multiply_singles


def build_mixed_pairs(rounding: Any) -> Any:
    def multiply_mixed_pairs(codes: Any, zeros: Any, scales: Any, groups: Any, out: Any) -> None:
        for place in range(len(codes)):
            code, even, odd = np.uint32(codes[place]), groups[2 * place], groups[2 * place + 1]
            low = rounding((np.float32(np.int32(code & NIBBLE)) - zeros[even]) * scales[even]) >> SIXTEEN
            out[place] = low | (rounding((np.float32(np.int32(code >> FOUR)) - zeros[odd]) * scales[odd]) & UPPER)

    return multiply_mixed_pairs


def build_mixed_singles(rounding: Any) -> Any:
    def multiply_mixed_singles(codes: Any, zeros: Any, scales: Any, groups: Any, out: Any) -> None:
        for place in range(len(codes)):
            group = groups[place]
            out[place] = rounding((np.float32(np.int32(codes[place])) - zeros[group]) * scales[group]) >> SIXTEEN

    return multiply_mixed_singles
