"""The forms in which weights lie packed: the names of their parts, and what dtypes and shapes tell of them."""

from collections.abc import Callable, Mapping
from math import ceil, prod
from typing import Any, NamedTuple

from reshard.sources.quantization_config import list_tables
from reshard.types import Packed, Tensor

Parts = Mapping[str, Tensor]
"""The tensors of one weight, by the last word of their names."""

WORD_BITS = 32

LONGEST_ROW = 1 << 20
"""In bytes, of the codes of a row or column: more than any model has, so that a few fit the memory for reading."""

FLOATS = ("BF16", "F16", "F32")


class WrongForm(Exception):
    """A part that does not fit the others: the last word of its name, and what was expected of it."""

    def __init__(self, word: str, expected: str) -> None:
        super().__init__(word, expected)
        self.word, self.expected = word, expected


Build = Callable[[Parts, str, int], Packed]
"""Makes a weight of its parts, its plain name and the number of its file."""

Read = Callable[[Parts, Mapping[str, Any], int | None], Build]
"""Takes the parts of a weight, the table of the config and the length of a row, if a tensor tells it. Returns what
makes a weight of parts of the same dtypes and shapes. Raises WrongForm.
"""


class Form(NamedTuple):
    """A form in which weights lie packed."""

    title: str
    """For people."""
    words: tuple[str, ...]
    """Last words of the names of parts, that of the codes first."""
    needed: tuple[str, ...]
    """Those that no weight lacks."""
    dtypes: Mapping[str, tuple[str, ...]]
    """The dtypes of the parts that tell this form from others of the same words."""
    read: Read
    separator: str = "."
    """What stands before these words."""
    is_module: bool = True
    """Whether the plain name has `.weight` behind the name of the module."""
    tells: Callable[[Parts], bool] = lambda _: True
    """Whether it is this form, where words and dtypes do not tell."""

    def is_of(self, parts: Parts) -> bool:
        """Whether the parts that are there are those of this form."""
        if self.words[0] not in parts:
            return False
        has_dtypes = all(parts[word].dtype in dtypes for word, dtypes in self.dtypes.items() if word in parts)
        return has_dtypes and self.tells(parts)


def require_part(parts: Parts, word: str, shape: tuple[int, ...], dtypes: tuple[str, ...]) -> None:
    """Raises WrongForm if a part has another shape or dtype."""
    if word in parts and (parts[word].shape != shape or parts[word].dtype not in dtypes):
        raise WrongForm(word, f"{' or '.join(dtypes)} {list(shape)}, for the codes {list(find_codes(parts).shape)}")


def find_codes(parts: Parts) -> Tensor:
    """Finds the codes among the parts of a weight."""
    return next(parts[word] for word in ("weight_packed", "qweight", "blocks", "weight") if word in parts)


def require_matrix(parts: Parts, word: str) -> tuple[int, int]:
    """The rows and columns of the codes. Raises WrongForm if they are no matrix, or too wide."""
    shape = parts[word].shape
    if len(shape) != 2:
        raise WrongForm(word, "a matrix")
    if parts[word].size > LONGEST_ROW * max(1, shape[0]):
        raise WrongForm(word, f"at most {LONGEST_ROW:,} bytes in a row")
    return shape[0], shape[1]


def build_form(
    packing: str,
    shape: tuple[int, ...],
    bits: int,
    group: int,
    words: tuple[str, str, str, str, str],
    changes: Mapping[str, tuple[str, tuple[int, ...]]] | None = None,
) -> Build:
    """Returns what makes a weight of its parts: `words` are those of codes, scales, zeros, factor and order; `changes`
    has, by word, another dtype and shape that the bytes of a part are seen as.
    """
    size = 2 * prod(shape)

    def see(tensor: Tensor, word: str) -> Tensor:
        if not changes or word not in changes:
            return tensor
        name, _, _, file, offset, length = tensor
        return Tensor(name, *changes[word], file, offset, length)

    def bind(parts: Parts, name: str, file: int) -> Packed:
        codes, scales = (see(parts[word], word) for word in words[:2])
        result = Tensor(name, "BF16", shape, file, 0, size)
        zeros, factor, order = (parts.get(word) if word else None for word in words[2:])
        return Packed(packing, codes, scales, zeros, factor, order, bits, group, result)

    return bind


def read_integers(parts: Parts, table: Mapping[str, Any], length: int | None) -> Build:
    """Reads pack-quantized integers of compressed-tensors: 4 or 8 bits, little end first, along rows."""
    rows, words = require_matrix(parts, "weight_packed")
    scales = parts["weight_scale"]
    told = list_told_weights(table)
    bits = next((bits for bits in (4, 8) if length is not None and ceil(length * bits / WORD_BITS) == words), None)
    if bits is None:
        bits = next((one["num_bits"] for one in told if one.get("num_bits") in (4, 8)), None)
        if bits is None or length is not None:
            told_by = (
                "weight_shape says" if length is not None else "weight_shape or the config would say: neither does"
            )
            raise WrongForm("weight_packed", f"codes of 4 or 8 bits, as long as {told_by}")
    columns = words * WORD_BITS // bits if length is None else length
    if told and bits not in [one.get("num_bits") for one in told]:
        raise WrongForm("weight_packed", f"codes of {told[0].get('num_bits')} bits, as the config says")
    groups = 1 if scales.shape in ((), (1,)) else scales.shape[-1]
    group = find_group(columns, groups, [one.get("group_size") for one in told])
    if group is None:
        raise WrongForm("weight_scale", f"a scale for each group of columns of {columns:,}")
    if scales.shape not in ((), (1,)):
        require_part(parts, "weight_scale", (rows, groups), FLOATS)
    require_part(parts, "weight_zero_point", (ceil(rows * bits / WORD_BITS), groups), ("I32",))
    require_part(parts, "weight_g_idx", (columns,), ("I32", "I64"))
    changed = {"weight_scale": (scales.dtype, (1, 1))} if scales.shape in ((), (1,)) else None
    names = ("weight_packed", "weight_scale", "weight_zero_point", "", "weight_g_idx")
    return build_form("integers", (rows, columns), bits, group, names, changed)


def list_told_weights(table: Mapping[str, Any]) -> list[Mapping[str, Any]]:
    """Lists what the groups of a config of compressed-tensors tell of weights."""
    found = [group.get("weights") for group in list_tables(table.get("config_groups"))]
    return [one for one in found if isinstance(one, Mapping)]


def find_group(columns: int, groups: int, told: list[Any]) -> int | None:
    """Finds how many columns share a scale: as the config tells, else equal groups; None if nothing fits."""
    sizes = [group for group in told if type(group) is int and group > 0]
    for group in sizes:
        if ceil(columns / group) == groups:
            return group
    if groups == 1 and (not sizes or len(sizes) < len(told)):
        return columns
    if sizes:
        return None
    return columns // groups if groups and columns % groups == 0 else None


def read_rows_of_fp4(parts: Parts, *_: Any) -> Build:
    """Reads FP4 in rows, two codes in a byte: NVFP4 of ModelOpt and of compressed-tensors, and MXFP4."""
    word = "weight_packed" if "weight_packed" in parts else "weight"
    rows, half = require_matrix(parts, word)
    columns = 2 * half
    if parts["weight_scale"].dtype == "U8":
        require_part(parts, "weight_scale", (rows, ceil(columns / 32)), ("U8",))
        changes = {word: ("I8", (rows, half)), "weight_scale": ("F8_E8M0", (rows, ceil(columns / 32)))}
        return build_form("mxfp4", (rows, columns), 4, 32, (word, "weight_scale", "", "", ""), changes)
    require_part(parts, "weight_scale", (rows, ceil(columns / 16)), ("F8_E4M3",))
    factor = "weight_scale_2" if "weight_scale_2" in parts else "weight_global_scale"
    if parts[factor].shape not in ((), (1,)) or parts[factor].dtype != "F32":
        raise WrongForm(factor, "F32 [], one for the whole weight")
    packing = "nvfp4" if factor == "weight_scale_2" else "nvfp4-divided"
    return build_form(packing, (rows, columns), 4, 16, (word, "weight_scale", "", factor, ""))


def has_blocks(parts: Parts) -> bool:
    """Whether FP8 has block scales, which recipes tell of."""
    shape = parts["weight_scale"].shape
    return len(shape) == 2 and shape[1] > 1


def read_fp8(parts: Parts, *_: Any) -> Build:
    """Reads FP8 with one scale, or with one for each row."""
    rows, columns = require_matrix(parts, "weight")
    scales = parts["weight_scale"]
    if scales.shape not in ((), (1,), (1, 1), (rows,), (rows, 1)):
        raise WrongForm("weight_scale", f"one scale, or [{rows}, 1], for the codes {[rows, columns]}")
    if scales.dtype not in ("F32", "BF16"):
        raise WrongForm("weight_scale", "F32 or BF16")
    changes = {"weight_scale": (scales.dtype, (prod(scales.shape), 1))}
    return build_form("fp8", (rows, columns), 8, columns, ("weight", "weight_scale", "", "", ""), changes)


def read_experts(parts: Parts, *_: Any) -> Build:
    """Reads MXFP4 of gpt-oss: experts in one tensor, each transposed."""
    shape = parts["blocks"].shape
    if len(shape) != 4 or shape[-1] != 16:
        raise WrongForm("blocks", "[experts, rows, groups, 16]")
    experts, rows, groups = shape[:-1]
    if groups * 16 > LONGEST_ROW:
        raise WrongForm("blocks", f"at most {LONGEST_ROW:,} bytes in a row")
    require_part(parts, "scales", (experts, rows, groups), ("U8",))
    return build_form("mxfp4-experts", (experts, groups * 32, rows), 4, 32, ("blocks", "scales", "", "", ""))


def read_qweight(parts: Parts, table: Mapping[str, Any], *_: Any) -> Build:
    """Reads AWQ or GPTQ, which have the same names: words hold 8 codes of a row of them, or of a column."""
    lines, words = require_matrix(parts, "qweight")
    scales, method = parts["scales"], table.get("quant_method")
    if len(scales.shape) != 2:
        raise WrongForm("scales", "[groups, out features]")
    groups, outs = scales.shape
    names = ("qweight", "scales", "qzeros", "", "g_idx")
    if outs == 8 * words:
        if method not in (None, "awq") or table.get("version", "gemm") not in ("gemm", "GEMM", None):
            raise WrongForm("qweight", f"the version gemm of AWQ, not {table.get('version', method)}")
        require_bits(table, 4)
        require_part(parts, "scales", (groups, outs), ("F16", "BF16"))
        require_part(parts, "qzeros", (groups, words), ("I32",))
        return build_form("awq", (outs, lines), 4, require_group(lines, groups, table), names)
    zeros = parts["qzeros"]
    bits = next((b for b in (4, 8) if zeros.shape == (groups, ceil(outs * b / WORD_BITS))), 0)
    if outs != words or not bits:
        raise WrongForm("qweight", f"codes of 4 or 8 bits, for the scales {[groups, outs]}")
    if method != "gptq":
        told = f"quant_method is {method}" if method else "no quantization_config or quantize_config.json is there"
        raise WrongForm(
            "qzeros", f"GPTQ, by its config: {told}, and zero points may be stored as they are, or less one"
        )
    require_bits(table, bits)
    columns = lines * WORD_BITS // bits
    require_part(parts, "scales", (groups, outs), ("F16", "BF16", "F32"))
    require_part(parts, "qzeros", zeros.shape, ("I32",))
    require_part(parts, "g_idx", (columns,), ("I32", "I64"))
    told = table.get("checkpoint_format", table.get("format"))  # GPTQModel writes both, or the second
    packing = "gptq-v2" if told == "gptq_v2" else "gptq"
    return build_form(packing, (outs, columns), bits, require_group(columns, groups, table), names)


def require_bits(table: Mapping[str, Any], bits: int) -> None:
    """Raises WrongForm if the config tells of other bits, and for all weights alike."""
    told = table.get("bits", table.get("w_bit", bits))
    if told != bits and not any(table.get(key) for key in ("dynamic", "extra_config")):
        raise WrongForm("qweight", f"codes of {told} bits, as the config says; these have {bits}")


def require_group(columns: int, groups: int, table: Mapping[str, Any]) -> int:
    """Finds how many columns share a scale. Raises WrongForm."""
    told = [table[key] for key in ("group_size", "q_group_size") if key in table]
    is_mixed = any(table.get(key) for key in ("dynamic", "extra_config"))
    group = find_group(columns, groups, [] if is_mixed else told)
    if group is None:
        raise WrongForm("scales", f"a scale for each group of the {columns:,} columns, as the config says")
    return group


FORMS: tuple[Form, ...] = (
    Form(
        "pack-quantized integers of compressed-tensors",
        ("weight_packed", "weight_scale", "weight_zero_point", "weight_g_idx", "weight_shape"),
        ("weight_packed", "weight_scale"),
        {"weight_packed": ("I32",)},
        read_integers,
    ),
    Form(
        "NVFP4 of compressed-tensors",
        ("weight_packed", "weight_scale", "weight_global_scale"),
        ("weight_packed", "weight_scale", "weight_global_scale"),
        {"weight_packed": ("U8",), "weight_scale": ("F8_E4M3",)},
        read_rows_of_fp4,
    ),
    Form(
        "MXFP4",
        ("weight_packed", "weight_scale"),
        ("weight_packed", "weight_scale"),
        {"weight_packed": ("U8",), "weight_scale": ("U8",)},
        read_rows_of_fp4,
    ),
    Form(
        "NVFP4 of ModelOpt",
        ("weight", "weight_scale", "weight_scale_2"),
        ("weight", "weight_scale", "weight_scale_2"),
        {"weight": ("U8",), "weight_scale": ("F8_E4M3",)},
        read_rows_of_fp4,
        tells=lambda parts: not parts.keys().isdisjoint(("weight_scale", "weight_scale_2")),
    ),
    Form(
        "MXFP4",
        ("weight", "weight_scale"),
        ("weight", "weight_scale"),
        {"weight": ("U8",), "weight_scale": ("U8",)},
        read_rows_of_fp4,
        tells=lambda parts: "weight_scale" in parts,
    ),
    Form(
        "FP8",
        ("weight", "weight_scale"),
        ("weight", "weight_scale"),
        {"weight": ("F8_E4M3",)},
        read_fp8,
        tells=lambda parts: "weight_scale" in parts and not has_blocks(parts),
    ),
    Form(
        "AWQ or GPTQ",
        ("qweight", "scales", "qzeros", "g_idx"),
        ("qweight", "scales", "qzeros"),
        {"qweight": ("I32",)},
        read_qweight,
    ),
    Form(
        "MXFP4 of gpt-oss",
        ("blocks", "scales"),
        ("blocks", "scales"),
        {"blocks": ("U8",)},
        read_experts,
        separator="_",
        is_module=False,
    ),
)
"""The forms. The first that the parts fit counts."""
