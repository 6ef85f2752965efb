"""Checks the constants of rank files: tensors that the recipe makes of nothing, each of one value."""

from collections.abc import Collection, Iterable, Iterator, Mapping, Sequence
from typing import NamedTuple

import numpy as np

from reshard.errors import Problem
from reshard.numbered_names import split_name
from reshard.paths import AnyPath
from reshard.recipe_types import Constant, Recipe
from reshard.recipes.patterns import PLACEHOLDER, fill_pattern, make_pattern
from reshard.storage.opened import open_regular_file
from reshard.types import Tensor
from reshard.verification.expected import WeightUnit
from reshard.verification.expected_ranks import SourceRow
from reshard.verification.reference_casts import round_to_bf16, widen_bf16
from reshard.verification.target_folder import CONVERT_AGAIN_HINT, TargetHeader


class TakenConstant(NamedTuple):
    """A tensor of a rank file that has the name of a constant."""

    file: TargetHeader
    tensor: Tensor

    @property
    def subject(self) -> str:
        """Its name in problems."""
        return f"{self.file.file.name}: {self.tensor.name}"


def take_constants(
    files: Sequence[TargetHeader], recipe: Recipe
) -> tuple[dict[str, list[TakenConstant]], Sequence[TargetHeader]]:
    """Takes what has the name of a constant out of the headers. Returns it by name, and the rest."""
    if not recipe.constants:
        return {}, files
    patterns = [make_pattern(0, constant.right, "", is_scale=False) for constant in recipe.constants]
    taken: dict[str, list[TakenConstant]] = {}
    rest = []
    for file in files:
        others = []
        for tensor in file.tensors:
            key, numbers = split_name(tensor.name)
            if any(pattern.fits(key, numbers) and pattern.accepts(numbers, {}, {}) for pattern in patterns):
                taken.setdefault(tensor.name, []).append(TakenConstant(file, tensor))
            else:
                others.append(tensor)
        rest.append(file._replace(tensors=others))
    return taken, rest


def list_expected_constants(
    rows: Iterable[SourceRow], recipe: Recipe, units: Iterable[WeightUnit], *, has_optional: bool
) -> dict[str, Constant]:
    """Lists the constants that each rank file should have, by name: one for each member of their placeholders that the
    source has. Rows that are left out do not count, nor those that are left out unless asked for, if they were not; nor
    constants of block scales that none of the `units` of the target has.
    """
    scaled = {unit.place.scaling for unit in units if unit.scale}
    letters = {letter for constant in recipe.constants for letter in PLACEHOLDER.findall(constant.right)}
    places: dict[int, list[tuple[int, str]]] = {}
    members: set[tuple[tuple[str, int], ...]] = {()}
    for pattern, numbers in rows if letters else ():
        rule = recipe.rules[pattern.rule] if pattern else None
        if pattern is None or rule is None or rule.relation == "drop" or (rule.optional and not has_optional):
            continue
        if pattern.rule not in places:
            places[pattern.rule] = find_places(pattern.slots, letters, recipe)
        members.add(tuple((letter, int(numbers[place])) for place, letter in places[pattern.rule]))
    return {
        fill_pattern(constant.right, filling): constant
        for constant in recipe.constants
        if not constant.scale or recipe.scales[constant.scale] in scaled
        for filling in map(dict, sorted(members))
        if filling.keys() >= set(PLACEHOLDER.findall(constant.right))
    }


def find_places(slots: Sequence[str], letters: Collection[str], recipe: Recipe) -> list[tuple[int, str]]:
    """The numbers in a name that number members of the placeholders `letters`, or members of members of them: an expert
    layer is a layer.
    """
    found: dict[str, int] = {}
    for place, slot in enumerate(slots):
        placeholder = recipe.placeholders.get(slot)
        while placeholder:
            if placeholder.name in letters:
                found.setdefault(placeholder.name, place)
            placeholder = recipe.placeholders.get(placeholder.within or placeholder.some_of)
    return [(place, letter) for letter, place in found.items()]


def check_filled_constants(
    target: AnyPath,
    taken: Mapping[str, Sequence[TakenConstant]],
    expected: Mapping[str, Constant],
    looked_at: Collection[int],
    recipe: Recipe,
) -> Iterator[Problem]:
    """Reports constants that are missing, too many, or other than the recipe says."""
    for name in expected:
        ranks = sorted(one.file.number for one in taken.get(name, ()))
        wanted = f"in ranks {sorted(looked_at)}"
        if looked_at and not ranks:
            yield Problem("missing-tensor", name, "in none of these rank files", wanted, CONVERT_AGAIN_HINT)
        elif ranks != sorted(looked_at):
            yield Problem("wrong-ranks", name, f"in ranks {ranks}", wanted, CONVERT_AGAIN_HINT)
    for name, several in taken.items():
        for one in several:
            if name not in expected:
                found, wanted = "a constant of what the source does not have", "only what comes from the source"
                yield Problem("extra-tensor", one.subject, found, wanted, CONVERT_AGAIN_HINT)
            else:
                yield from check_filled_constant(target, one, expected[name], recipe)


def check_filled_constant(target: AnyPath, one: TakenConstant, constant: Constant, recipe: Recipe) -> Iterator[Problem]:
    """Reports a constant of another dtype, shape or value."""
    tensor = one.tensor
    if (tensor.dtype, tensor.shape) != (constant.dtype, constant.shape):
        found, expected = f"{tensor.dtype} {list(tensor.shape)}", f"{constant.dtype} {list(constant.shape)}"
        yield Problem("wrong-shape", one.subject, found, expected, CONVERT_AGAIN_HINT)
        return
    with open_regular_file(target / one.file.file.name) as file:
        file.seek(tensor.offset)
        data = np.frombuffer(file.read(tensor.size), CODES[constant.dtype])
    wrong = data[data != compute_constant_bits(constant)]
    if len(wrong) or data.nbytes != tensor.size:
        found = f"the value {decode_constant(wrong[0], constant.dtype)}" if len(wrong) else "the file ends before"
        expected = f"{constant.value}, a constant of the recipe {recipe.name}"
        yield Problem("differs", one.subject, found, expected, CONVERT_AGAIN_HINT)


CODES = {"F32": "<u4", "F16": "<u2", "BF16": "<u2"}
"""How the bits of a value are compared."""


def compute_constant_bits(constant: Constant) -> int:
    """The bits of the value of a constant."""
    if constant.dtype == "F16":
        return int(np.float16(constant.value).view(np.uint16))
    value = np.array([constant.value], np.float32)
    return int(round_to_bf16(value)[0]) if constant.dtype == "BF16" else int(value.view(np.uint32)[0])


def decode_constant(bits: int, dtype: str) -> float:
    """The value of some bits."""
    if dtype == "BF16":
        return float(widen_bf16(np.array([bits], np.uint16))[0])
    size, code = (np.uint16, np.float16) if dtype == "F16" else (np.uint32, np.float32)
    return float(np.array([bits], size).view(code)[0])
