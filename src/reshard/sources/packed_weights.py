"""Weights that lie packed, as quantizers write them -> a checkpoint of plain names, of BF16 that is to be computed.

A format is told by the ends of names, by dtypes and by shapes; the config has the last word where these do not tell.
Formats and their names: docs/casts.md. Opens a file only where its header does not tell the length of a row.
"""

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import replace
from itertools import islice
from typing import Any, NamedTuple

from reshard.errors import MOST_PROBLEMS, Problem, Refused, refuse
from reshard.sources.nvfp4_config import describe_as_nvfp4
from reshard.sources.packed_forms import FORMS, Build, Form, Parts, WrongForm
from reshard.sources.problem_order import sort_problems
from reshard.sources.quantization_config import drop_promise, read_promise
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
    promise = read_promise(stored.config)
    reader = FormReader(stored, promise.table if promise else {})
    packed: list[Packed] = []
    problems = [*check_codes_there(parts, modules)]
    for name, module in modules.items():
        found = reader.read(name, module, len(packed))
        if isinstance(found, Problem):
            problems.append(found)
        else:
            packed.append(found)
    if problems:
        raise Refused(sort_problems(islice(problems, MOST_PROBLEMS)))
    return Unpacked(stored, replace_packed(stored, packed, cast), cast)


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


def check_codes_there(parts: Mapping[str, Mapping[str, Tensor]], modules: Mapping[str, Module]) -> Iterator[Problem]:
    """Reports scales and other parts without codes, in a checkpoint where others have them."""
    forms = {module.form.words[0]: module.form for module in modules.values()}
    for start, own in parts.items():
        for codes, form in forms.items():
            others = [word for word in form.words[1:] if word in own]
            if form.separator == start[-1] and codes not in own and others and start[:-1] not in modules:
                expected = f"beside {own[others[0]].name}, of {form.title}"
                yield Problem("missing-tensor", f"{start}{codes}", LACKING, expected, "is a file missing?")
                break


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
        self._known: dict[Any, Build | WrongForm] = {}

    def read(self, name: str, module: Module, place: int) -> Packed | Problem:
        """Reads one weight, the one of number `place`; a problem if its parts do not fit."""
        form, parts, key = module
        if lacking := [word for word in form.needed if word not in parts]:
            subject = f"{name}{form.separator}{lacking[0]}"
            expected = f"beside {parts[form.words[0]].name}, of {form.title}"
            return Problem("missing-tensor", subject, LACKING, expected, "is a file missing?")
        if key not in self._known:
            try:
                length = self._read_length(parts)
                self._known[key] = form.read(parts, self._table, length)
            except WrongForm as wrong:
                self._known[key] = wrong
        known = self._known[key]
        if not isinstance(known, WrongForm):
            return known(parts, name + (WEIGHT if form.is_module else ""), PACKED + place)
        tensor = parts[known.word]
        found = f"{tensor.dtype} {list(tensor.shape)}"
        return Problem("wrong-scale", tensor.name, found, known.expected, "is a part of another checkpoint?")

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
    kinds = list(dict.fromkeys(one.packing for one in packed))
    weights = format_count(len(packed), "weights")
    if cast != NVFP4:
        yield Note(UNPACKED, f"{weights} that lie packed ({format_list(kinds)}) are read as BF16")
    others = [name for name in aside if not name.endswith(".weight_shape")]
    if others:
        text = f"left aside: {format_count(len(others), 'scales')} of activations or caches, such as {others[0]}"
        yield Note("left-aside", f"{text}: {'the target is of weights only' if cast == NVFP4 else 'BF16 has none'}")
