"""Joined tensors: any stretch of them against numpy's concatenation, and replicas that differ."""

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from numpy.typing import NDArray

from reshard.errors import Refused
from reshard.execution.joins import PartReader, read_join
from reshard.types import Join, Tensor

Bytes = NDArray[np.uint8]
Made = tuple[Join, list[bytes], bytes]
"""A join, the bytes of each file, and those of the tensor."""


def tensor_of(file: int, offset: int, array: Bytes) -> Tensor:
    return Tensor("x", "U8", array.shape, file, offset, array.size)


@st.composite
def joins(draw: st.DrawFn) -> Made:
    """Parts side by side in each row, or one behind the other; some padding behind the last; replicas elsewhere."""
    count, copies = draw(st.integers(1, 4)), draw(st.integers(1, 3))
    rows, width = draw(st.integers(1, 6)), draw(st.integers(1, 9))
    by_columns = draw(st.booleans())
    generator = np.random.default_rng(draw(st.integers(0, 2**32)))
    arrays = [generator.integers(0, 256, (rows, width), np.uint8) for _ in range(count)]
    together = np.concatenate(arrays, axis=1 if by_columns else 0)
    length = together.shape[1 if by_columns else 0]
    kept = draw(st.integers(1, length))
    whole = together[:, :kept] if by_columns else together[:kept]
    files: list[bytes] = []
    parts = []
    for array in arrays:
        part = []
        for _ in range(copies):
            before = generator.bytes(draw(st.integers(0, 5)))
            part.append(tensor_of(len(files), len(before), array))
            files.append(before + array.tobytes())
        parts.append(tuple(part))
    result = Tensor("x", "U8", whole.shape, len(files), 0, whole.size)
    return Join(rows if by_columns else 1, tuple(parts), result), files, whole.tobytes()


def reader(files: list[bytes], most: int) -> PartReader:
    """Reads into one buffer, as a worker does; nothing beyond the tensor, and never more than `most`."""
    buffer = bytearray(most)

    def read(tensor: Tensor, offset: int, size: int) -> memoryview:
        assert 0 < size <= most
        assert offset + size <= tensor.size
        start = tensor.offset + offset
        buffer[:size] = files[tensor.file][start : start + size]
        return memoryview(buffer)[:size]

    return PartReader(read, [f"file {number}" for number in range(len(files))], (), most)


@given(joins(), st.data())
@settings(max_examples=400)
def test_any_stretch_is_that_of_the_parts_together(made: Made, data: st.DataObject) -> None:
    join, files, whole = made
    offset = data.draw(st.integers(0, len(whole) - 1))
    size = data.draw(st.integers(1, len(whole) - offset))
    most = data.draw(st.integers(1, 40))
    out = bytearray(size)
    read_join(join, offset, memoryview(out), reader(files, most))
    assert bytes(out) == whole[offset : offset + size]


@given(joins(), st.data())
@settings(max_examples=200)
def test_a_byte_that_differs_between_replicas_is_seen(made: Made, data: st.DataObject) -> None:
    join, files, whole = made
    number = data.draw(st.integers(0, len(join.parts) - 1))
    part = join.parts[number]
    if len(part) == 1:
        return
    copy = data.draw(st.integers(0, len(part) - 1))
    place = data.draw(st.integers(0, part[copy].size - 1))
    spoiled = bytearray(files[part[copy].file])
    spoiled[part[copy].offset + place] ^= 1 << data.draw(st.integers(0, 7))
    files[part[copy].file] = bytes(spoiled)
    width = part[copy].size // join.rows
    behind = number * width + place % width if join.rows > 1 else number * part[copy].size + place
    if behind >= join.result.size // join.rows:
        return  # padding, which is not read
    with pytest.raises(Refused, match=r"other bytes in file \d+ than in file"):
        read_join(join, 0, memoryview(bytearray(len(whole))), reader(files, 40))
