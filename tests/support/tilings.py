"""Tensors cut at random into boxes, which lie in files; and files with the boxes of whole checkpoints."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import pairwise, product
from math import prod
from pathlib import Path
from random import Random
from typing import Any

import numpy as np
from hypothesis import strategies as st
from numpy.typing import NDArray
from safetensors import safe_open
from safetensors.torch import load_file, save_file

from reshard.formats.boxes import Box, BoxedCheckpoint
from reshard.formats.huggingface import read_config, read_headers
from reshard.types import File, Tensor

WIDTHS = {"U8": 1, "BF16": 2, "F32": 4, "I64": 8}

Elements = NDArray[np.void]
Bounds = tuple[tuple[int, int], ...]
"""Of a box: in each dimension the first element, and that behind the last."""


@dataclass
class Tiled:
    """Boxed tensors, their whole contents, and the bytes of the files."""

    boxed: BoxedCheckpoint
    wholes: Mapping[str, Elements]
    files: list[bytes]


def cut_at_random(random: Random, bounds: Bounds, depth: int) -> list[Bounds]:
    """Straight cuts, and again in each piece."""
    long = [number for number, (low, high) in enumerate(bounds) if high - low > 1]
    if not long or not depth or random.random() < 0.2:
        return [bounds]
    where = random.choice(long)
    low, high = bounds[where]
    inner = sorted(random.sample(range(low + 1, high), random.randint(1, min(3, high - low - 1))))
    edges = [low, *inner, high]
    return [
        box
        for span in pairwise(edges)
        for box in cut_at_random(random, (*bounds[:where], span, *bounds[where + 1 :]), depth - 1)
    ]


def put_into_files(random: Random, pieces: Sequence[tuple[str, str, Bounds, bytes]], files: int) -> Tiled:
    """Writes boxes into files in any order, with other bytes between them."""
    contents = [bytearray() for _ in range(files)]
    boxes: dict[str, list[Box]] = {}
    for name, dtype, bounds, data in random.sample(pieces, len(pieces)):
        file = random.randrange(files)
        contents[file] += random.randbytes(random.randint(0, 5))
        shape = tuple(high - low for low, high in bounds)
        part = Tensor(name, dtype, shape, file, len(contents[file]), len(data))
        boxes.setdefault(name, []).append(Box(part, tuple(low for low, _ in bounds)))
        contents[file] += data
    kept = {name: sorted(some, key=lambda box: box.part.file) for name, some in boxes.items()}
    about = tuple(File(f"part-{number}", len(content), 0, "", 0) for number, content in enumerate(contents))
    return Tiled(BoxedCheckpoint(Path("nowhere"), about, kept, {}, None), {}, [bytes(one) for one in contents])


def slices_of(bounds: Bounds) -> tuple[slice, ...]:
    return tuple(slice(low, high) for low, high in bounds)


def tile(random: Random, shapes: Mapping[str, tuple[int, ...]], replicas: int = 1, depth: int = 3) -> Tiled:
    """Tensors of random bytes in random boxes, each stored up to so often; and empty boxes."""
    wholes, pieces = {}, []
    for name, shape in shapes.items():
        dtype = random.choice([*WIDTHS])
        data = random.randbytes(prod(shape) * WIDTHS[dtype])
        wholes[name] = np.frombuffer(data, f"V{WIDTHS[dtype]}").reshape(shape)
        for bounds in cut_at_random(random, tuple((0, side) for side in shape), depth):
            piece = name, dtype, bounds, wholes[name][slices_of(bounds)].tobytes()
            pieces += [piece] * random.randint(1, replicas)
        if shape and random.random() < 0.3:
            end = shape[0]
            pieces.append((name, dtype, ((end, end), *((0, side) for side in shape[1:])), b""))
    tiled = put_into_files(random, pieces, random.randint(1, 5))
    given = {name: shape for name, shape in shapes.items() if random.random() < 0.5}
    about = tiled.boxed
    boxed = BoxedCheckpoint(about.folder, about.files, about.boxes, given, None)
    return Tiled(boxed, wholes, tiled.files)


@st.composite
def tilings(draw: st.DrawFn, replicas: int = 3) -> Tiled:
    """One tensor, or a few."""
    shapes = draw(st.lists(st.lists(st.integers(1, 7), max_size=4).map(tuple), min_size=1, max_size=3))
    random = Random(draw(st.integers(0, 2**32)))
    return tile(random, {f"layers.{number}.w": shape for number, shape in enumerate(shapes)}, replicas)


# --- checkpoints that are cut like those of a mesh of ranks ---


def cut_evenly(length: int, parts: int) -> list[tuple[int, int]]:
    """As torch cuts a dimension: the last parts may be shorter, or empty."""
    step = -(-length // parts)
    return [(min(number * step, length), min((number + 1) * step, length)) for number in range(parts)]


def list_mesh_boxes(shape: Sequence[int], mesh: tuple[int, int]) -> list[Bounds]:
    """The box of each of the ranks of a mesh: the first dimension cut by its rows, the last by its columns."""
    whole = [(0, side) for side in shape]
    boxes = []
    for row, column in product(range(mesh[0]), range(mesh[1])):
        bounds = whole.copy()
        if len(shape) > 1:
            bounds[-1] = cut_evenly(shape[-1], mesh[1])[column]
        if shape:
            bounds[0] = cut_evenly(shape[0], mesh[0])[row]
        boxes.append(tuple(bounds))
    return boxes


def write_boxed(source: Path, target: Path, mesh: tuple[int, int]) -> BoxedCheckpoint:
    """Writes the tensors of a checkpoint as a mesh of ranks would, one safetensors file a rank; with its config."""
    target.mkdir()
    (target / "config.json").write_bytes((source / "config.json").read_bytes())
    wholes: dict[str, Any] = {}
    for path in sorted(source.glob("*.safetensors")):
        wholes |= load_file(path)
    places: list[dict[str, tuple[int, ...]]] = []
    ranks = mesh[0] * mesh[1]
    for rank in range(ranks):
        bounds = {name: list_mesh_boxes(tensor.shape, mesh)[rank] for name, tensor in wholes.items()}
        parts = {name: wholes[name][slices_of(box)].contiguous().clone() for name, box in bounds.items()}
        save_file(parts, target / f"shard-{rank + 1:05}.safetensors")
        places.append({name: tuple(low for low, _ in box) for name, box in bounds.items()})
    return read_boxes(target, places)


def read_boxes(folder: Path, places: Sequence[Mapping[str, tuple[int, ...]]]) -> BoxedCheckpoint:
    """The boxes of files whose tensors lie at the `places` of each file."""
    stored = read_headers(folder, [f"shard-{number + 1:05}.safetensors" for number in range(len(places))])
    boxes: dict[str, list[Box]] = {}
    for tensor in stored.tensors:
        boxes.setdefault(tensor.name, []).append(Box(tensor, places[tensor.file][tensor.name]))
    return BoxedCheckpoint(folder, stored.files, boxes, {}, read_config(folder))


def read_wholes(folder: Path) -> dict[str, Any]:
    """The tensors of all safetensors files of a folder, by torch."""
    found: dict[str, Any] = {}
    for path in sorted(folder.glob("*.safetensors")):
        with safe_open(path, "pt") as file:
            found |= {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118 - it is no mapping
    return found
