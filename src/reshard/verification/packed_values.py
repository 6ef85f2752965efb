"""The BF16 values of weights that lie packed, by plain numpy arithmetic. Shares no code with `casts`.

Written from the libraries of the formats, which compute in the dtype of their scales: compressed-tensors
(`compressors/pack_quantized`, `nvfp4`, `mxfp4`, `quantization/lifecycle/forward_helpers.py`), ModelOpt
(`qtensor/nvfp4_tensor.py`), transformers (`integrations/mxfp4.py`), AutoAWQ (`utils/packing_utils.py`), GPTQModel
(`nn_modules/qlinear/torch.py`; the zero points of its first format: `utils/model.py`).
"""

from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

from reshard.types import Packed
from reshard.verification.reference_casts import (
    FP4_CODE_VALUES,
    Bf16Bits,
    Float32Rows,
    TileBytes,
    compute_fp8_values,
    decode_block_scales,
    round_to_bf16,
)

UNSIGNED_ZERO = np.array(FP4_CODE_VALUES, np.float32)
"""The values of FP4 codes. Of code 8, minus zero, ModelOpt makes plus zero."""

SIGNED_ZERO = np.where(np.arange(16) == 8, np.float32(-0.0), UNSIGNED_ZERO)
"""The same, as compressed-tensors and transformers have them."""

FP4_VALUES = {"nvfp4": UNSIGNED_ZERO, "nvfp4-divided": SIGNED_ZERO, "mxfp4": SIGNED_ZERO, "mxfp4-experts": SIGNED_ZERO}

AWQ_PLACES = (0, 4, 1, 5, 2, 6, 3, 7)
"""Where each of eight codes in a row lies in a word of AWQ, in codes from its low end."""

WORD_BITS = 32
"""Of the words in which integers are packed."""

EXPERT_GROUP = 32
"""Of the experts of `mxfp4-experts`: rows of the result that share a scale."""


class PackedBytes(NamedTuple):
    """What is stored of a box of a packed weight: rows of bytes of each tensor, as they lie there."""

    codes: TileBytes
    scales: TileBytes
    zeros: TileBytes | None
    factor: TileBytes | None
    order: NDArray[Any] | None
    """The group of every column of the weight; None if they lie in order."""


def decode_packed_rows(packed: Packed, rows: range, columns: range, stored: PackedBytes) -> Bf16Bits:
    """The BF16 bit patterns [rows, columns] of a box of the result of a packed weight. The first dimensions of the
    result count as rows; `stored` begins with the word, byte or group that has the first row and column.
    """
    codes = unpack_codes(packed, stored.codes)[: len(rows), : len(columns)]
    scales = decode_stored_scales(stored.scales, packed.scales.dtype)
    if packed.packing == "mxfp4-experts":
        scales = np.repeat(scales.T, EXPERT_GROUP, axis=0)[: len(rows)]
    else:
        scales = scales.T if packed.packing in ("awq", "gptq", "gptq-v2") else scales
        groups = find_groups(packed, columns, stored.order)
        scales = multiply_by_factor(packed, scales, stored.factor)[:, groups]
    if packed.packing in FP4_VALUES:
        values = np.take(FP4_VALUES[packed.packing], codes)
    elif packed.packing == "fp8":
        values = np.take(compute_fp8_values(), codes)
    else:
        zeros = unpack_zeros(packed, stored.zeros, rows) if stored.zeros is not None else None
        values = codes.astype(np.float32) - (1 << (packed.bits - 1) if zeros is None else zeros[:, groups])
    with np.errstate(all="ignore"):
        products = values * scales
        if packed.scales.dtype == "F16":  # the library computes in it
            products = products.astype(np.float16).astype(np.float32)
    return round_to_bf16(products)


def find_groups(packed: Packed, columns: range, order: NDArray[Any] | None) -> NDArray[Any]:
    """The group of each column of a box: without an order counted from the group of its first column."""
    if order is not None:
        return order[columns.start : columns.stop]
    return np.arange(columns.start, columns.stop) // packed.group - columns.start // packed.group


def multiply_by_factor(packed: Packed, scales: Float32Rows, factor: TileBytes | None) -> Float32Rows:
    """Multiplies scales by the factor of the whole weight, or divides them, in float32; without one, they stay."""
    if factor is None:
        return scales
    value = np.ascontiguousarray(factor).view(np.float32).reshape(())
    with np.errstate(all="ignore"):
        return scales / value if packed.packing == "nvfp4-divided" else scales * value


def decode_stored_scales(raw: TileBytes, dtype: str) -> Float32Rows:
    """Scales as float32, from rows of their bytes. U8 is F8_E8M0, which some libraries do not call so."""
    whole = np.ascontiguousarray(raw)
    if dtype == "F16":
        return whole.view(np.float16).astype(np.float32)
    if dtype == "F8_E4M3":
        return np.take(compute_fp8_values(), whole)
    return decode_block_scales(whole, dtype)


def unpack_codes(packed: Packed, raw: TileBytes) -> NDArray[np.uint8]:
    """The codes of a box, at least [rows, columns] of the result, from the bytes as they lie."""
    if packed.packing == "awq":  # words [columns, rows / 8]
        return unpack_awq_words(raw).T
    if packed.packing in ("gptq", "gptq-v2"):  # words [columns * bits / 32, rows]
        return unpack_fields(view_as_words(raw).T, packed.bits)
    codes = unpack_fields(raw, packed.bits)
    return codes.T if packed.packing == "mxfp4-experts" else codes


def unpack_zeros(packed: Packed, raw: TileBytes, rows: range) -> NDArray[Any]:
    """The zero points [rows, groups] of a box."""
    if packed.packing == "integers":  # words [rows * bits / 32, groups]
        first = rows.start % (WORD_BITS // packed.bits)
        return unpack_fields(view_as_words(raw).T, packed.bits).T[first : first + len(rows)]
    if packed.packing == "awq":  # words [groups, rows / 8]
        return unpack_awq_words(raw).T[: len(rows)]
    words = view_as_words(raw)  # [groups, rows * bits / 32]
    if packed.packing == "gptq":
        # The first format stores one less, word by word: GPTQModel adds it to whole words too, with their carries.
        words = words + np.uint32(sum(1 << place for place in range(0, WORD_BITS, packed.bits)))
    return unpack_fields(words, packed.bits).T[: len(rows)]


def view_as_words(raw: TileBytes) -> NDArray[np.uint32]:
    """Rows of bytes as rows of words of 32 bits."""
    return np.ascontiguousarray(raw).view("<u4")


def unpack_fields(words: NDArray[Any], bits: int) -> NDArray[np.uint8]:
    """The fields of `bits` bits in words or bytes, from the low end of each on, one behind the other along a row."""
    # In the dtype of the words: another would take more memory, and time.
    shifts = np.arange(0, words.dtype.itemsize * 8, bits).astype(words.dtype)
    fields = words[..., None] >> shifts & np.array((1 << bits) - 1, words.dtype)
    found: NDArray[np.uint8] = fields.astype(np.uint8).reshape(words.shape[0], -1)
    return found


def unpack_awq_words(raw: TileBytes) -> NDArray[np.uint8]:
    """The codes of four bits in rows of words of AWQ, in their own order."""
    fields = unpack_fields(view_as_words(raw), 4)
    return fields.reshape(len(raw), -1, len(AWQ_PLACES))[:, :, AWQ_PLACES].reshape(len(raw), -1)
