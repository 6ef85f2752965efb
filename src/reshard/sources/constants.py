"""Checks what rank files hold and no original file has: constants of the recipe, and zeros beside what rank 0 has."""

import struct
from collections.abc import Iterator, Mapping
from typing import BinaryIO

from reshard.errors import Problem, refuse
from reshard.formats.huggingface import FolderHeaders
from reshard.recipe_types import Constant, Recipe
from reshard.recipes.patterns import find_scale_placeholder, list_constant_names, list_present_constants
from reshard.sources.held_shards import CollectedShards
from reshard.storage.opened import open_regular_file
from reshard.text import format_list
from reshard.types import Tensor

LACKING = "is a rank file missing, or were they made for another version of the engine?"

EXCHANGED = "were files exchanged, or is one damaged? reshard verify against the whole checkpoint tells which"

LARGEST_READ = 1 << 20
"""Of bytes that should be zeros."""

LOST = "in the original layout there is no place for it; a recipe of your own may name it (docs/recipes.md)"


def check_stored_constants(
    stored: FolderHeaders, collected: CollectedShards, recipe: Recipe, members: Mapping[str, set[int]]
) -> Iterator[Problem]:
    """Reports constants that are not in every rank file, that have another dtype or shape than the recipe says, or that
    belong to layers that the model has not. `members` are the numbers that fill each placeholder.
    """
    holders: dict[str, set[int]] = {}
    for one in collected.constants:
        holders.setdefault(one.tensor.name, set()).add(one.tensor.file)
    scaled = {find_scale_placeholder(one.rule, recipe) for one in collected.held.values() if one.is_scale}
    present = list_present_constants(recipe, scaled)
    wanted = {name: constant for constant in present for name in list_constant_names(constant, members)}
    for name, constant in wanted.items():
        if lacking := [file.name for place, file in enumerate(stored.files) if place not in holders.get(name, set())]:
            expected = f"{describe_constant(constant)} in every rank file, a constant of {recipe.name}"
            yield Problem("missing-tensor", name, f"not in {format_list(lacking)}", expected, LACKING)
    for one in collected.constants:
        subject = f"{stored.files[one.tensor.file].name}: {one.tensor.name}"
        constant, kind = recipe.constants[one.constant], f"{one.tensor.dtype} {list(one.tensor.shape)}"
        if one.tensor.name not in wanted:
            yield Problem("contradiction", subject, "a constant of what the model has not", "none", LACKING)
        elif (one.tensor.dtype, one.tensor.shape) != (constant.dtype, constant.shape):
            which = "dtype" if one.tensor.dtype != constant.dtype else "shape"
            expected = f"{describe_constant(constant)}, a constant of {recipe.name}"
            yield Problem(f"wrong-{which}", subject, kind, expected, LACKING)


def describe_constant(constant: Constant) -> str:
    """`F32 [] of 1`."""
    return f"{constant.dtype} {list(constant.shape)} of {constant.value:.9g}"


def check_values(stored: FolderHeaders, collected: CollectedShards, recipe: Recipe) -> Iterator[Problem]:
    """Reports constants of another value than the recipe says, and bytes other than zeros where only rank 0 has a
    tensor: left aside, they would be lost. Reads their bytes. Raises Refused if a file cannot be read.
    """
    firsts = [one.by_rank for one in collected.held.values() if one.rule.split.is_first]
    for place, file in enumerate(stored.files):
        constants = [one for one in collected.constants if one.tensor.file == place]
        zeros = [by_rank[place] for by_rank in firsts if place in by_rank] if place else []
        try:
            with open_regular_file(stored.folder / file.name) as opened:
                for one in constants:
                    opened.seek(one.tensor.offset)
                    content = opened.read(one.tensor.size)
                    if problem := compare_value(content, one.tensor, recipe.constants[one.constant], file.name):
                        yield problem
                for tensor in zeros:
                    yield from check_zeros(opened, tensor, file.name)
        except OSError as error:
            expected = "to read its constants, or zeros"
            raise refuse("cannot-read", file.name, error.strerror or str(error), expected) from None


def check_zeros(opened: BinaryIO, tensor: Tensor, file: str) -> Iterator[Problem]:
    """Reports the first byte of a tensor that is not zero."""
    opened.seek(tensor.offset)
    for begin in range(0, tensor.size, LARGEST_READ):
        content = opened.read(min(LARGEST_READ, tensor.size - begin))
        if content.strip(b"\0"):
            place = begin + len(content) - len(content.lstrip(b"\0"))
            expected = "zeros: only rank 0 has this tensor"
            yield Problem("wrong-value", f"{file}: {tensor.name}", f"byte {place:,} is not zero", expected, EXCHANGED)
            return


def compare_value(content: bytes, tensor: Tensor, constant: Constant, file: str) -> Problem | None:
    """Compares the bytes of a constant with the recipe's value; None if they are equal."""
    value = encode_value(constant.value, constant.dtype)
    if content == value * (len(content) // len(value)):
        return None
    found = next(decode_value(part, constant.dtype) for part in cut_values(content, len(value)) if part != value)
    expected = f"{constant.value:.9g}, as the recipe says: another value would be lost"
    return Problem("wrong-value", f"{file}: {tensor.name}", f"{found:.9g}", expected, LOST)


def cut_values(content: bytes, size: int) -> Iterator[bytes]:
    """Cuts the bytes of a tensor into those of its values."""
    return (content[begin : begin + size] for begin in range(0, len(content), size))


def encode_value(value: float, dtype: str) -> bytes:
    """Encodes a value as a tensor of a dtype holds it, rounded to the nearest, ties to even. Without numpy: a look at
    a checkpoint does not load it.
    """
    if dtype == "F16":
        return struct.pack("<e", value)
    whole = struct.pack("<f", value)
    if dtype == "F32":
        return whole
    bits = int.from_bytes(whole, "little")
    return ((bits + 0x7FFF + (bits >> 16 & 1)) >> 16).to_bytes(2, "little")


def decode_value(content: bytes, dtype: str) -> float:
    """Decodes the bytes of a value."""
    whole = b"\0\0" + content if dtype == "BF16" else content
    found: float = struct.unpack("<e" if dtype == "F16" else "<f", whole)[0]
    return found
