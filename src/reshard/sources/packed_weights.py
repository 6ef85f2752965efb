"""Weights that lie packed, as quantizers write them -> a checkpoint of plain names, of BF16 that is to be computed.

A format is told by the ends of names, by dtypes and by shapes; the config has the last word where these do not tell.
Formats and their names: docs/casts.md. Opens a file only where its header does not tell the length of a row.
"""

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import replace
from itertools import islice
from typing import Any, NamedTuple

from reshard.errors import MOST_PROBLEMS, Problem, Refused, refuse
from reshard.formats.json_input import read_object
from reshard.recipe_types import Recipe
from reshard.sources.nvfp4_config import describe_as_nvfp4
from reshard.sources.packed_forms import FORMS, Build, Form, Parts, WrongForm, list_told_weights
from reshard.sources.problem_order import sort_problems
from reshard.sources.quantization_config import PROMISE_KEY, drop_promise, read_promise
from reshard.storage.opened import open_regular_file
from reshard.text import format_count, format_list
from reshard.types import NVFP4, PACKED, Checkpoint, Note, Packed, Tensor

LEFT_ASIDE = (
    *("weight_shape", "input_scale", "input_global_scale", "input_zero_point", "output_scale", "output_zero_point"),
    *("k_scale", "v_scale", "q_scale", "k_zero_point", "v_zero_point"),
)
"""Last words of names beside packed weights that a model of BF16 does not have: scales of activations, and lengths."""

WEIGHT = ".weight"

UNPACKED = "dequantized"
"""The kind of the note that tells of weights that are read as BF16."""

TAKING = ("bf16", NVFP4)
"""Values of `--cast` that read packed weights under plain names."""


class Unpacked(NamedTuple):
    """A checkpoint with packed weights, under both names."""

    stored: Checkpoint
    """As it lies in the files."""
    checkpoint: Checkpoint
    """Under plain names; its config tells of the quantization that the target has, if any."""
    cast: str
    """The value of `--cast` that it is read for."""


def unpack_checkpoint(stored: Checkpoint, cast: str) -> Unpacked | None:
    """Finds the packed weights of a checkpoint, and reads it under plain names; None if it has none, or if no `cast`
    wants them.

    Raises Refused if a part of a weight is missing, or if parts do not fit each other.
    """
    parts = collect_parts(stored.tensors) if cast in TAKING else {}
    modules = find_forms(parts)
    if not modules:
        return None
    if any(module.form.words[0] == "qweight" for module in modules.values()):
        stored = add_promise_beside(stored)
    promise = read_promise(stored.config)
    reader = FormReader(stored, promise.table if promise else {})
    packed: list[Packed] = []
    problems = [*check_all_there(parts, modules, promise.table if promise else {})]
    for name, module in modules.items():
        found = reader.read(name, module, len(packed))
        if isinstance(found, Problem):
            problems.append(found)
        else:
            packed.append(found)
    if problems:
        raise Refused(sort_problems(islice(problems, MOST_PROBLEMS)))
    return Unpacked(stored, replace_packed(stored, packed, cast), cast)


def add_promise_beside(stored: Checkpoint) -> Checkpoint:
    """Adds to a config that tells of no quantization what a file of the quantizer beside it tells."""
    if read_promise(stored.config):
        return stored
    for name, method in FILES_BESIDE.items():
        table = read_object((stored.beside or stored.folder) / name)
        if table is not None:
            return replace(stored, config={**(stored.config or {}), PROMISE_KEY: {"quant_method": method, **table}})
    return stored


FILES_BESIDE = {"quantize_config.json": "gptq", "quant_config.json": "awq"}
"""File of AutoGPTQ or AutoAWQ -> the method that it tells of."""


class Module(NamedTuple):
    """A packed weight: a model has 250,000 of them, of a few kinds."""

    form: Form
    parts: Parts
    kind: Any
    """The words, dtypes and shapes of the parts."""


def collect_modules(tensors: Mapping[str, Tensor]) -> dict[str, Module]:
    """Collects the parts of each packed weight, by the name of its module."""
    return find_forms(collect_parts(tensors))


def collect_parts(tensors: Mapping[str, Tensor]) -> dict[str, dict[str, Tensor]]:
    """Collects tensors by what stands before the last words of their names, and by these words, if parts have such."""
    parts: dict[str, dict[str, Tensor]] = {}
    for name, tensor in tensors.items():
        for separator in ".", "_":
            module, _, word = name.rpartition(separator)
            if word in PART_WORDS[separator]:
                parts.setdefault(module + separator, {})[word] = tensor
    return parts


def find_forms(parts: Mapping[str, dict[str, Tensor]]) -> dict[str, Module]:
    """Finds the modules whose weights lie packed, and the form of each."""
    known: dict[Any, Form | None] = {}
    found: dict[str, Module] = {}
    for start, own in parts.items():
        kind = start[-1], *((word, one.dtype, one.shape) for word, one in own.items())
        if kind not in known:
            known[kind] = next((form for form in FORMS if form.separator == start[-1] and form.is_of(own)), None)
        if form := known[kind]:
            found[start[:-1]] = Module(form, own, kind)
    return found


def check_all_there(
    parts: Mapping[str, Mapping[str, Tensor]], modules: Mapping[str, Module], table: Mapping[str, Any]
) -> Iterator[Problem]:
    """Reports parts without codes, and FP8 without a scale, in a checkpoint where others have them; and weights that
    lack a part that others of their form have, or that the config tells of: without it, they would be other numbers.
    """
    forms = {module.form.words[0]: module.form for module in modules.values()}
    for start, own in parts.items():
        if start[:-1] in modules:
            continue
        for codes, form in forms.items():
            others = [word for word in form.words[1:] if word in own]
            if form.separator == start[-1] and codes not in own and others and "weight" not in own:
                yield make_missing_part(f"{start}{codes}", own[others[0]], form)
                break
        if "weight" in forms and set(own) == {"weight"} and own["weight"].dtype == "F8_E4M3":
            yield make_missing_part(f"{start}weight_scale", own["weight"], forms["weight"])
    for form in forms.values():
        mine = {name: module.parts for name, module in modules.items() if module.form == form}
        for word in find_wanted_parts(form, list(mine.values()), table):
            for name, own in mine.items():
                if word not in own:
                    yield make_missing_part(f"{name}{form.separator}{word}", own[form.words[0]], form)


def make_missing_part(name: str, beside: Tensor, form: Form) -> Problem:
    """Makes the problem of a part that lacks."""
    expected = f"beside {beside.name}, of {form.title}"
    return Problem("missing-tensor", name, LACKING, expected, "is a file missing?")


def find_wanted_parts(form: Form, weights: Sequence[Parts], table: Mapping[str, Any]) -> Iterator[str]:
    """Finds the parts that no weight of a form may lack: those that one of them has, unless the groups of the config
    differ; and those that the config tells of.
    """
    told = list_told_weights(table)
    for word, key in VALUE_PARTS.items():
        is_held = any(word in own for own in weights)
        are_alike = len({str(one.get(key)) for one in told}) <= 1 and not table.get("dynamic")
        is_told = bool(told) and all(one.get(key) is False for one in told) if key == "symmetric" else False
        is_told = is_told or (key == "desc_act" and table.get(key) is True)
        if word in form.words and ((is_held and are_alike) or is_told):
            yield word


VALUE_PARTS = {"weight_zero_point": "symmetric", "weight_g_idx": "actorder", "g_idx": "desc_act"}
"""Parts that some checkpoints have and others not -> the key of a config that tells."""

LACKING = "not in the checkpoint"

PART_WORDS = {
    separator: {word for form in FORMS if form.separator == separator for word in form.words}
    for separator in (".", "_")
}
"""The last words of the names of parts, by what stands before them."""


class FormReader:
    """Reads how weights lie packed. Most are alike: what was found for one holds for all of its dtypes and shapes."""

    def __init__(self, stored: Checkpoint, table: Mapping[str, Any]) -> None:
        self._stored = stored
        self._table = table
        bits = {one.get("num_bits") for one in list_told_weights(table)}
        self._are_mixed = len(bits) != 1  # then parts of the same shapes may have rows of other lengths
        self._known: dict[Any, Build | WrongForm] = {}

    def read(self, name: str, module: Module, place: int) -> Packed | Problem:
        """Reads one weight, the one of number `place`; a problem if its parts do not fit."""
        form, parts, key = module
        if lacking := [word for word in form.needed if word not in parts]:
            return make_missing_part(f"{name}{form.separator}{lacking[0]}", parts[form.words[0]], form)
        length = self._read_length(parts) if self._are_mixed or key not in self._known else None
        key = (key, length) if self._are_mixed else key
        if key not in self._known:
            try:
                self._known[key] = form.read(parts, self._table, length)
            except WrongForm as wrong:
                self._known[key] = wrong
        known = self._known[key]
        if not isinstance(known, WrongForm):
            return known(parts, name + (WEIGHT if form.is_module else ""), PACKED + place)
        tensor = parts[known.word]
        found = f"{tensor.dtype} {list(tensor.shape)}"
        remedy = "is a part, or the config, of another checkpoint? else convert what it was quantized from"
        return Problem("wrong-scale", tensor.name, found, known.expected, remedy)

    def _read_length(self, parts: Parts) -> int | None:
        """Reads the length of a row, in elements, where a tensor has it; None where none has."""
        shape = parts.get("weight_shape")
        if shape is None or shape.dtype not in ("I32", "I64") or shape.shape != (2,):
            return None
        if shape.file >= len(self._stored.files):
            return None
        path = self._stored.folder / self._stored.files[shape.file].name
        try:
            with open_regular_file(path) as opened:
                opened.seek(shape.offset)
                content = opened.read(shape.size)
        except OSError as error:
            raise refuse("cannot-read", path.name, error.strerror or str(error), f"to read {shape.name}") from None
        return int.from_bytes(content[shape.size // 2 :], "little")


def replace_packed(stored: Checkpoint, packed: Sequence[Packed], cast: str) -> Checkpoint:
    """Replaces the parts of packed weights by the weights, each in the place of its codes."""
    results = {one.codes.name: one.result for one in packed}
    used = {part.name for one in packed for part in one.list_inputs()}
    tensors: dict[str, Tensor] = {}
    aside: list[str] = []
    twice: list[Problem] = []
    for name, tensor in stored.tensors.items():
        found = results.get(name)
        if found is None and name in used:
            continue
        if found is None and name.rpartition(".")[2] in LEFT_ASIDE:
            aside.append(name)
            continue
        found = found or tensor
        if found.name in tensors or (found.name != name and found.name in stored.tensors and found.name not in used):
            remedy = "do two checkpoints lie in one folder?"
            twice.append(Problem("tensor-twice", found.name, f"plain, and packed as {name}", "one of them", remedy))
        tensors[found.name] = found
    if twice:
        raise Refused(twice)
    notes = (*stored.notes, *note_unpacked(packed, aside, cast))
    is_nvfp4 = cast == NVFP4 and any(one.packing == "mxfp4" for one in packed)
    config = describe_as_nvfp4(stored.config) if is_nvfp4 else drop_promise(stored.config)
    return replace(stored, tensors=tensors, packed=tuple(packed), config=config, notes=notes)


def note_unpacked(packed: Sequence[Packed], aside: Sequence[str], cast: str) -> Iterator[Note]:
    """Notes what packed weights are read as, and which tensors a target does not have."""
    kinds = dict.fromkeys(f"INT{one.bits}" if one.packing == "integers" else one.packing for one in packed)
    weights = format_count(len(packed), "weights")
    if cast != NVFP4:
        yield Note(UNPACKED, f"{weights} that lie packed ({format_list(kinds)}) are read as BF16")
    others = [name for name in aside if not name.endswith(".weight_shape")]
    if others:
        text = f"left aside: {format_count(len(others), 'scales')} of activations or caches, such as {others[0]}"
        yield Note("left-aside", f"{text}: {'the target is of weights only' if cast == NVFP4 else 'BF16 has none'}")


def require_plain_names(recipe: Recipe, cast: str) -> None:
    """Raises Refused if a recipe that was asked for has rows for parts of packed weights, which a cast reads as one."""
    part = next((rule.left for rule in recipe.rules if rule.left.endswith(".weight_scale") and not rule.only), "")
    if part:
        found = f"{cast}, by the recipe {recipe.name}, which has rows for parts of packed weights: {part}"
        remedy = "leave out --recipe: the recipe of the same model in BF16 is taken; or leave out --cast"
        raise refuse("wrong-option", "--cast", found, "a recipe with the plain names of weights", remedy)
