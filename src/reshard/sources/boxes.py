"""Assembles tensors from the boxes of a distributed checkpoint, and proves that these fill each tensor exactly once."""

import re
from collections.abc import Iterable, Iterator, Sequence
from math import prod

from reshard.errors import Problem, require_none
from reshard.formats.boxes import Box, BoxedCheckpoint
from reshard.formats.safetensors import BITS
from reshard.sources.box_cuts import BoxCut, BoxFlaw, BoxLayout, Lengths, lay_out_boxes
from reshard.sources.rank_files import order_by_numbers
from reshard.text import format_list
from reshard.types import COMPARE, FIRST, Checkpoint, File, Join, Tensor

OTHER_SAVE = "is a file missing, or of another save? copy the whole folder again"

FIRST_NUMBER = re.compile(r"(\D*)(\d+)(.*)", re.DOTALL)
"""`shard-00002-model-...`, `__2_0.distcp`: the number of the rank that wrote a file."""

MOST_RANK_FILES = 100_000
"""Of file names with larger numbers none is missing plainly: a hostile name may have any number."""


def assemble_boxes(boxed: BoxedCheckpoint, *, replicas: str = COMPARE) -> Checkpoint:
    """Assembles the checkpoint of whole tensors, in the order of their names and numbers.

    Boxes that are stored several times must be equal; with `replicas` "first", the first is taken. Raises Refused with
    every tensor whose boxes do not fill it exactly once, or differ in dtype.
    """
    layouts: dict[object, BoxLayout] = {}
    tensors: dict[str, Tensor] = {}
    joins: list[Join] = []
    stored: dict[int, Sequence[Box]] = {}
    problems: list[Problem] = []
    missing = format_list(list_missing_files(file.name for file in boxed.files))
    again = f"{missing} is missing: copy the whole folder again" if missing else OTHER_SAVE
    for name in sorted(boxed.boxes, key=order_by_numbers):
        boxes, shape = boxed.boxes[name], boxed.shapes.get(name)
        key = shape, tuple([(box.offsets, box.part.shape) for box in boxes])
        if not boxes:
            expected = "its boxes" if shape is None else f"boxes that fill {list(shape)}"
            problems.append(Problem("missing-box", name, "no part of it in any file", expected, again))
            continue
        layout = layouts.get(key)
        if layout is None:  # of thousands of tensors, few lie differently
            layout = layouts[key] = lay_out_boxes(*key)
        if found := [*check_boxes(name, boxes, layout, boxed.files, again)]:
            problems.extend(found)
            continue
        tensors[name] = assemble_tensor_of_boxes(name, boxes, layout, len(boxed.files), joins, replicas)
        if tensors[name].file >= len(boxed.files):
            stored[tensors[name].file] = boxes
    require_none(problems)
    return Checkpoint(boxed.folder, boxed.files, tensors, boxed.config, tuple(joins), boxes=stored, notes=boxed.notes)


def assemble_tensor_of_boxes(
    name: str, boxes: Sequence[Box], layout: BoxLayout, files: int, joins: list[Join], replicas: str
) -> Tensor:
    """Assembles one tensor. Appends a join for each cut; joins are numbered behind the files, the whole one last."""
    first = boxes[0].part
    if layout.root is None:  # an empty tensor
        return first._replace(name=name, shape=layout.shape, size=0)
    parts = [
        tuple(boxes[number].part for number in (some[:1] if replicas == FIRST else some)) for some in layout.copies
    ]

    def join_parts(rows: int, shape: Lengths, several: tuple[tuple[Tensor, ...], ...]) -> Tensor:
        whole = Tensor(name, first.dtype, shape, files + len(joins), 0, prod(shape) * BITS[first.dtype] // 8)
        joins.append(Join(rows, several, whole))
        return whole

    def assemble_piece(piece: BoxCut | int) -> tuple[Tensor, ...]:
        if isinstance(piece, int):
            return parts[piece]
        several = tuple(map(assemble_piece, piece.pieces))
        return (join_parts(prod(piece.shape[: piece.dimension]), piece.shape, several),)

    found = assemble_piece(layout.root)
    return found[0]._replace(name=name) if len(found) == 1 else join_parts(1, layout.shape, (found,))


def check_boxes(
    name: str, boxes: Sequence[Box], layout: BoxLayout, files: Sequence[File], again: str
) -> Iterator[Problem]:
    """Reports why boxes do not make up a tensor: places, dtypes, sizes. `again` is the hint for what lacks."""
    dtypes = {box.part.dtype for box in boxes}
    if len(dtypes) > 1:
        found = " and ".join(sorted(dtypes))
        yield Problem("wrong-dtype", name, found, "one dtype in all files", "is a file of another save?")
        return
    for fault in layout.faults:
        yield explain_fault(name, fault, boxes, layout.shape, files, again)
    bits = BITS[boxes[0].part.dtype]
    for box in boxes:
        size = prod(box.part.shape) * bits
        if box.part.size * 8 != size:
            found = f"{box.part.size:,} bytes in {files[box.part.file].name}"
            yield Problem("wrong-shape", name, found, f"{size // 8:,} bytes for {list(box.part.shape)}", OTHER_SAVE)
        if len(layout.copies) > 1 and bits < 8 and (box.offsets[-1] * bits % 8 or box.part.shape[-1] * bits % 8):
            where = format_place(box.offsets, box.part.shape)
            yield Problem("box-layout", name, f"a box at {where} of {boxes[0].part.dtype}", "boxes of whole bytes")


def explain_fault(
    name: str, fault: BoxFlaw, boxes: Sequence[Box], shape: Lengths, files: Sequence[File], again: str
) -> Problem:
    """Explains one fault of the places of boxes."""
    where, whole = format_place(*fault.place), list(shape)
    if fault.kind == "hole":
        lacking = f"{fault.lacking:,} elements of {where}" if fault.lacking else where
        found = f"no box has {lacking}; its boxes are in {name_box_files(boxes, files)}"
        return Problem("missing-box", name, found, f"boxes that fill {whole}", again)
    named = name_box_files([boxes[number] for number in fault.boxes], files)
    if fault.kind == "overlap":
        found = f"two different boxes have {where}, in {named}"
        return Problem("overlap", name, found, f"boxes that fill {whole} once", "are files of two saves in the folder?")
    if fault.kind == "uncut":
        found = f"{len(fault.boxes)} boxes that no few straight cuts divide, in {where} of {whole}"
        remedy = "load the checkpoint with what wrote it, and save it whole"
        return Problem("box-layout", name, found, "boxes like those of a mesh of ranks", remedy)
    offsets, lengths = fault.place
    found = f"a box {list(lengths)} at {list(offsets)}, in {named}"
    return Problem("wrong-shape", name, found, f"boxes within {whole}", OTHER_SAVE)


def name_box_files(boxes: Iterable[Box], files: Sequence[File]) -> str:
    """Names the files of boxes, the first few of them."""
    return format_list(dict.fromkeys(files[box.part.file].name for box in boxes), 3) or "no file"


def format_place(offsets: Lengths, shape: Lengths) -> str:
    """Formats a part of a tensor as Python would slice it: `[0:4, 6:12]`."""
    return f"[{', '.join(f'{begin}:{begin + length}' for begin, length in zip(offsets, shape, strict=True))}]"


def list_missing_files(names: Iterable[str]) -> Iterator[str]:
    """Lists the files that a gap in the numbers of ranks shows to be missing: `shard-00002-...` between 1 and 3."""
    groups: dict[str, dict[int, re.Match[str]]] = {}
    for name in names:
        if found := FIRST_NUMBER.fullmatch(name):
            groups.setdefault(found[1], {}).setdefault(int(found[2]), found)
    for before, group in groups.items():
        last = max(group)
        if last < MOST_RANK_FILES:
            is_padded = any(text[2].startswith("0") and len(text[2]) > 1 for text in group.values())
            width = len(group[last][2]) if is_padded else 1
            for number in range(min(1, *group), last):
                if number not in group:
                    yield f"{before}{number:0{width}}{group[last][3]}"
