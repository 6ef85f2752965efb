"""Lazy tensors: a checkpoint of any layout as a mapping of names to tensors that are read only where they are sliced.

Rank files look like the checkpoint that they came from. Casts nothing and writes nothing.
"""

from collections.abc import Iterator, Mapping
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from functools import partial
from math import prod
from pathlib import Path
from threading import Lock, local
from types import EllipsisType
from typing import Any, Self
from weakref import finalize

import numpy as np

from reshard.errors import refuse, require_none
from reshard.execution.reader import produce_join
from reshard.execution.windows import WINDOW_SIZE
from reshard.formats.folder import read_checkpoint
from reshard.formats.huggingface import read_file
from reshard.loading.arrays import Bytes, array_problems, array_shape, as_array, require_framework
from reshard.sources.rank_names import holds_rank_files
from reshard.sources.source import read_source
from reshard.storage.local import (
    CACHED,
    PAGE,
    aligned_buffer,
    open_source,
    read_window,
)
from reshard.storage.unchanged import require_unchanged, require_unwritten
from reshard.types import FIRST, Checkpoint, Tensor


def open_tensors(
    path: str | Path,
    recipe: str | None = None,
    *,
    framework: str = "torch",
    ignore_extra_files: bool = False,
    replicas: str = FIRST,
) -> "Tensors":
    """The tensors of a safetensors file, of a folder of them, or of the rank files in a folder, as if these were whole.

    Rank files are read by the recipe that their manifest names, or that fits them, or that is given; their tensors have
    the names of its left side. Of what several ranks hold, the first is read, or all are, and must be equal, if
    `replicas` is "compare". Opening reads little more than headers. Raises Refused.
    """
    require_framework(framework)
    path = Path(path)
    if path.is_file():
        return Tensors(read_file(path), framework)
    if holds_rank_files(path, recipe):
        found = read_source(path, recipe, ignore_extra_files=ignore_extra_files, replicas=replicas)
        return Tensors(found.checkpoint, framework)
    return Tensors(read_checkpoint(path, ignore_extra_files=ignore_extra_files), framework)


class Tensors(Mapping[str, "LazyTensor"]):
    """Lazy tensors by name. Holds its files open until it is closed, and is a context that closes it.

    Several threads may read, and any may close.
    """

    def __init__(self, checkpoint: Checkpoint, framework: str) -> None:
        self.framework = framework
        self._checkpoint = checkpoint
        self._paths = [checkpoint.folder / file.name for file in checkpoint.files]
        self._lock = Lock()
        self._closed = False
        self._readers = 0
        self._buffers = local()
        stack = ExitStack()
        self._close_files = finalize(self, stack.close)
        self._close_files.atexit = False  # a thread may still read then
        try:
            self._sources = [open_source(stack, path, CACHED) for path in self._paths]
            require_unchanged(checkpoint.folder, checkpoint.files, self._sources)
        except BaseException as error:
            self.close()
            if isinstance(error, OSError):
                found = error.strerror or str(error)
                raise refuse("cannot-read", str(error.filename), found, "to read the source") from None
            raise

    def __getitem__(self, name: str) -> "LazyTensor":
        return LazyTensor(self._checkpoint.tensors[name], self)

    def __iter__(self) -> Iterator[str]:
        return iter(self._checkpoint.tensors)

    def __len__(self) -> int:
        return len(self._checkpoint.tensors)

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def close(self) -> None:
        """After this, nothing can be read any more. What is being read by another thread is still read to its end."""
        with self._lock:
            self._closed = True
            self._close_if_unread()

    def read(self, tensor: Tensor, offset: int, size: int) -> Bytes:
        """So many bytes of a tensor, from a byte of it on. Raises Refused if its files have been written to."""
        out = np.empty(size, np.uint8)
        with self._reading():
            self._read_into(out.data, tensor, offset)
        return out

    @contextmanager
    def _reading(self) -> Iterator[None]:
        """A context in which the files stay open: once closed, their numbers may be those of others."""
        with self._lock:
            if self._closed:
                raise ValueError("these tensors are closed")
            self._readers += 1
        try:
            yield
        finally:
            with self._lock:
                self._readers -= 1
                self._close_if_unread()

    def _close_if_unread(self) -> None:
        if self._closed and not self._readers:
            self._close_files()

    def _read_into(self, out: memoryview, tensor: Tensor, offset: int) -> None:
        place = tensor.file - len(self._sources)
        if place < 0:
            self._read_part(tensor, offset, len(out), out)
        elif out:
            read = partial(self._read_part, buffer=self._buffer())
            produce_join(self._checkpoint.joins[place], offset, out, read, WINDOW_SIZE)

    def _read_part(self, part: Tensor, offset: int, size: int, buffer: memoryview) -> memoryview:
        """Bytes of what lies in one file, in a part of the buffer."""
        path, source = self._paths[part.file], self._sources[part.file]
        found = read_window(source, part.offset + offset, size, buffer, CACHED, path.name)
        require_unwritten(path, self._checkpoint.files[part.file], source)
        return found

    def _buffer(self) -> memoryview:
        """What the parts of a tensor are read into: one for each thread, for making one takes as long as a read."""
        if not hasattr(self._buffers, "own"):
            self._buffers.own = aligned_buffer(WINDOW_SIZE + 2 * PAGE)
        found: memoryview = self._buffers.own
        return found


@dataclass(frozen=True, slots=True)
class LazyTensor:
    """A tensor of which nothing has been read. `tensor[...]` reads it whole, a slice what the slice takes."""

    tensor: Tensor
    opened: Tensors

    @property
    def dtype(self) -> str:
        """As the format spells it, such as `BF16`."""
        return self.tensor.dtype

    @property
    def shape(self) -> tuple[int, ...]:
        """In elements of the array that a slice gives: of F4, two values are one."""
        return array_shape(self.tensor)

    @property
    def nbytes(self) -> int:
        """Of the whole tensor."""
        return self.tensor.size

    def __len__(self) -> int:
        if not self.shape:
            raise TypeError("a tensor without dimensions has no length")
        return self.shape[0]

    def __getitem__(self, key: Any) -> Any:
        """An array as numpy or torch would give for the same key, in memory of its own.

        Of whole numbers and slices in the first dimensions only what they take is read: up to and with the first slice.
        What comes behind them is read whole, and so is everything for keys of another kind.
        """
        require_none(array_problems([self.tensor], self.opened.framework))
        stretch = stretch_of(self.shape, key)
        width = self.tensor.size // max(1, prod(self.shape))
        data = self.opened.read(self.tensor, stretch.first * width, prod(stretch.shape) * width)
        found = as_array(data, self.dtype, stretch.shape, self.opened.framework)
        if isinstance(stretch.rest, tuple) and not stretch.rest:  # == would compare each number of an array
            return found
        part = found[stretch.rest]
        return part.copy() if self.opened.framework == "numpy" else part.clone()


@dataclass(frozen=True, slots=True)
class Stretch:
    """What is read for a key, and how the key goes on from there."""

    first: int
    """The first element."""
    shape: tuple[int, ...]
    """Of what is read from there on, which lies in one piece."""
    rest: Any
    """A key for what is read; () if it is just what was asked for."""


def stretch_of(shape: tuple[int, ...], key: Any) -> Stretch:
    """The stretch of a tensor that a key takes. Raises IndexError for a number that is outside."""
    items = key if isinstance(key, tuple) else (key,)
    if not all(type(item) is int or isinstance(item, np.integer | slice | EllipsisType) for item in items):
        return Stretch(0, shape, key)
    items, first = spelt_out(items, len(shape)), 0
    for place, item in enumerate(items):
        inner = prod(shape[place + 1 :])
        if not isinstance(item, slice):
            first += checked(int(item), shape[place]) * inner
            continue
        taken = range(*item.indices(shape[place]))
        low, high = (min(taken[0], taken[-1]), max(taken[0], taken[-1]) + 1) if taken else (0, 0)
        rest = (slice(None, None, item.step), *items[place + 1 :])
        is_all = item.step in (None, 1) and all(one == slice(None) for one in rest[1:])
        return Stretch(first + low * inner, (high - low, *shape[place + 1 :]), () if is_all else rest)
    return Stretch(first, shape[len(items) :], ())


def spelt_out(items: tuple[Any, ...], dimensions: int) -> tuple[Any, ...]:
    """The same key with as many whole slices in the place of an ellipsis as it stands for."""
    places = [place for place, item in enumerate(items) if item is Ellipsis]
    count = len(items) - len(places)
    if count > dimensions or len(places) > 1:
        raise IndexError(f"{len(items)} indices for {dimensions} dimensions")
    if not places:
        return items
    return (*items[: places[0]], *[slice(None)] * (dimensions - count), *items[places[0] + 1 :])


def checked(index: int, length: int) -> int:
    """A whole number counted from the front."""
    if not -length <= index < length:
        raise IndexError(f"index {index} is out of range for {length}")
    return index % length
