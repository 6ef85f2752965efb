"""Opens a checkpoint of any layout as a mapping of names to lazy tensors, which read only what is sliced of them.

Rank files appear as the checkpoint that they were made from. Nothing is cast.
"""

from collections.abc import Iterator, Mapping
from contextlib import ExitStack, contextmanager, suppress
from dataclasses import dataclass
from functools import partial
from math import prod
from pathlib import Path
from threading import Lock, local
from types import EllipsisType
from typing import Any, Self
from weakref import finalize

import numpy as np

from reshard.errors import Refused, refuse, require_none
from reshard.execution.joins import PartReader, count_join_levels, read_join
from reshard.execution.windows import WINDOW_SIZE
from reshard.formats.huggingface import read_file
from reshard.formats.remote_names import read_location, require_path
from reshard.loading.arrays import FlatBytes, check_array_dtypes, get_array_shape, require_framework, view_as_array
from reshard.sources.checkpoints import read_checkpoint
from reshard.sources.rank_names import holds_rank_files
from reshard.sources.source import read_source
from reshard.sources.stacked_experts import read_under_hub_names
from reshard.storage.local import CACHED, PAGE, allocate_aligned
from reshard.storage.opened import open_file, read_range
from reshard.storage.unchanged import require_unchanged, require_unwritten
from reshard.text import escape, format_count
from reshard.types import FIRST, Checkpoint, Tensor


def open_tensors(
    path: str | Path,
    recipe: str | None = None,
    *,
    framework: str = "torch",
    ignore_extra_files: bool = False,
    replicas: str = FIRST,
    config: str | Path | None = None,
) -> "Tensors":
    """Opens the tensors of a safetensors file, of a Hugging Face checkpoint or of rank files, without reading them.

    Rank files appear as the checkpoint that they were made from, with its names and whole tensors; and so do folders
    with the stacked experts of transformers 5. Opening reads little more than headers. Nothing is cast: packed FP4 and
    FP8 stay as they are.

        with reshard.open("DeepSeek-V3-mp16") as tensors:
            rows = tensors["model.layers.0.self_attn.o_proj.weight"][:128]

    Args:
        path: A safetensors file, or a folder.
        recipe: Name or file of the recipe of rank files; by default the one of their manifest, or that fits them.
        framework: `torch` or `numpy`. Dtypes that numpy lacks become unsigned integers of the same width.
        ignore_extra_files: Ignore safetensors files that do not belong to the checkpoint.
        replicas: Of rank files: `"first"` reads the first replica of a shard; `"compare"` reads every replica and
            requires that all are equal.
        config: The folder of `config.json`, if none lies beside the tensors. It is needed only where names and shapes
            leave open what a file holds.

    Raises:
        Refused: The files cannot be read, or are not a checkpoint. Reading a tensor raises it if its files have changed
            since they were opened.

    """
    require_framework(framework)
    place, beside = require_path(path), read_location(config)
    if place.is_file():
        if beside:
            raise refuse("wrong-option", "--config", f"{beside}, for a single file", "a folder", "leave it out")
        return Tensors(read_file(place), framework)
    if holds_rank_files(place, recipe):
        found = read_source(
            place, recipe, ignore_extra_files=ignore_extra_files, replicas=replicas, config_folder=beside
        )
        return Tensors(found.checkpoint, framework)
    checkpoint = read_checkpoint(place, ignore_extra_files=ignore_extra_files, replicas=replicas, config_folder=beside)
    with suppress(Refused):  # what cannot be taken apart without doubt is there as it lies
        checkpoint = read_under_hub_names(checkpoint)
    return Tensors(checkpoint, framework)


class Tensors(Mapping[str, "LazyTensor"]):
    """Lazy tensors by name. Keeps its files open until `close`, or until the end of a `with` block.

    Several threads may read at once, and any of them may close.
    """

    def __init__(self, checkpoint: Checkpoint, framework: str) -> None:
        self.framework = framework
        self._checkpoint = checkpoint
        self._paths = [checkpoint.folder / file.name for file in checkpoint.files]
        self._lock = Lock()
        self._closed = False
        self._readers = 0
        self._buffers = local()
        self._names = [file.name for file in checkpoint.files]
        self._levels = count_join_levels(checkpoint.joins, len(checkpoint.files))
        stack = ExitStack()
        self._close_files = finalize(self, stack.close)
        self._close_files.atexit = False  # a thread may still read then
        try:
            self._sources = [open_file(stack, path, CACHED) for path in self._paths]
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

    def __repr__(self) -> str:
        size = sum(tensor.size for tensor in self._checkpoint.tensors.values())
        return escape(f"{self._checkpoint.folder}: {format_count(len(self), 'tensors')}, {size:,} bytes, not read yet")

    def __len__(self) -> int:
        return len(self._checkpoint.tensors)

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def close(self) -> None:
        """Closes the files; nothing can be read afterwards. Reads of other threads still run to their end."""
        with self._lock:
            self._closed = True
            self._close_if_unread()

    def read(self, tensor: Tensor, offset: int, size: int) -> FlatBytes:
        """Reads `size` bytes of a tensor from byte `offset` of it on. Raises Refused if its files were written to."""
        out = np.empty(size, np.uint8)
        with self._reading():
            self._read_into(out.data, tensor, offset)
        return out

    @contextmanager
    def _reading(self) -> Iterator[None]:
        """A context in which the files stay open. Once they are closed, their descriptors may be other files'."""
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
            read_join(self._checkpoint.joins[place], tensor.offset + offset, out, self._reader())

    def _read_part(self, part: Tensor, offset: int, size: int, buffer: memoryview) -> memoryview:
        """Reads bytes of a tensor or shard of one file, into a part of the buffer."""
        path, source = self._paths[part.file], self._sources[part.file]
        found = read_range(source, part.offset + offset, size, buffer)
        require_unwritten(path, self._checkpoint.files[part.file], source)
        return found

    def _reader(self) -> PartReader:
        """A reader of parts, through the buffers of this thread. They are kept: allocating takes as long as a read."""
        if not hasattr(self._buffers, "own"):
            sizes = [WINDOW_SIZE + 2 * PAGE, *[WINDOW_SIZE] * self._levels]
            self._buffers.own = [allocate_aligned(size) for size in sizes]
        window, *levels = self._buffers.own
        read = partial(self._read_part, buffer=window)
        return PartReader(read, self._names, self._checkpoint.joins, WINDOW_SIZE, levels)


@dataclass(frozen=True, slots=True)
class LazyTensor:
    """A tensor that is not read yet. `tensor[...]` reads all of it, `tensor[2:5]` only those rows."""

    tensor: Tensor
    opened: Tensors

    @property
    def dtype(self) -> str:
        """As the format spells it, such as `BF16`."""
        return self.tensor.dtype

    @property
    def shape(self) -> tuple[int, ...]:
        """In elements of the array that a slice gives: two F4 values are one element."""
        return get_array_shape(self.tensor)

    @property
    def nbytes(self) -> int:
        """Size of the whole tensor, in bytes."""
        return self.tensor.size

    def __repr__(self) -> str:
        return escape(f"{self.tensor.name}: {self.dtype} {list(self.shape)}, not read yet")

    def __len__(self) -> int:
        if not self.shape:
            raise TypeError("a tensor without dimensions has no length")
        return self.shape[0]

    def __getitem__(self, key: Any) -> Any:
        """Reads the array that numpy or torch would give for the same key, in memory of its own.

        For leading integers and the first slice only their part is read. Later dimensions are read whole; so is the
        whole tensor for a key of any other kind. Raises Refused if the framework lacks the dtype or the file changed.
        """
        require_none(check_array_dtypes([self.tensor], self.opened.framework))
        taken = find_element_range(self.shape, key)
        width = self.tensor.size // max(1, prod(self.shape))
        data = self.opened.read(self.tensor, taken.first * width, prod(taken.shape) * width)
        found = view_as_array(data, self.dtype, taken.shape, self.opened.framework)
        if isinstance(taken.rest, tuple) and not taken.rest:  # == would compare each number of an array
            return found
        part = found[taken.rest]
        return part.copy() if self.opened.framework == "numpy" else part.clone()


@dataclass(frozen=True, slots=True)
class ElementRange:
    """A contiguous range of elements that is read for a key, and the rest of the key."""

    first: int
    """Index of the first element in the flattened tensor."""
    shape: tuple[int, ...]
    """Shape of the elements that are read."""
    rest: Any
    """The key to apply to them; () if nothing is left to apply."""


def find_element_range(shape: tuple[int, ...], key: Any) -> ElementRange:
    """The range of elements to read for a key. Raises IndexError for an index that is out of range."""
    items = key if isinstance(key, tuple) else (key,)
    if not all(type(item) is int or isinstance(item, np.integer | slice | EllipsisType) for item in items):
        return ElementRange(0, shape, key)
    items, first = expand_ellipsis(items, len(shape)), 0
    for place, item in enumerate(items):
        inner = prod(shape[place + 1 :])
        if not isinstance(item, slice):
            first += normalize_index(int(item), shape[place]) * inner
            continue
        taken = range(*item.indices(shape[place]))
        low, high = (min(taken[0], taken[-1]), max(taken[0], taken[-1]) + 1) if taken else (0, 0)
        rest = (slice(None, None, item.step), *items[place + 1 :])
        is_all = item.step in (None, 1) and all(one == slice(None) for one in rest[1:])
        return ElementRange(first + low * inner, (high - low, *shape[place + 1 :]), () if is_all else rest)
    return ElementRange(first, shape[len(items) :], ())


def expand_ellipsis(items: tuple[Any, ...], dimensions: int) -> tuple[Any, ...]:
    """Replaces an ellipsis in a key by the full slices that it stands for."""
    places = [place for place, item in enumerate(items) if item is Ellipsis]
    count = len(items) - len(places)
    if count > dimensions or len(places) > 1:
        raise IndexError(f"{len(items)} indices for {dimensions} dimensions")
    if not places:
        return items
    return (*items[: places[0]], *[slice(None)] * (dimensions - count), *items[places[0] + 1 :])


def normalize_index(index: int, length: int) -> int:
    """An index counted from the front. Raises IndexError if it is out of range."""
    if not -length <= index < length:
        raise IndexError(f"index {index} is out of range for {length}")
    return index % length
