"""Counts the bytes of a checkpoint by dtype, of all its files and of each; and its boxes."""

from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from reshard.formats.huggingface import FolderHeaders
from reshard.types import Checkpoint, Tensor

StoredBoxes = Mapping[int, Sequence[tuple[Tensor, tuple[int, ...]]]]
"""The parts of tensors that lie in boxes, as `Checkpoint.boxes` has them."""


@dataclass(frozen=True, slots=True)
class FileContent:
    """The tensors of a file."""

    name: str
    dtypes: Mapping[str, int]
    """By dtype: their bytes."""


def count_dtypes(stored: FolderHeaders) -> Mapping[str, tuple[int, int]]:
    """Counts tensors and bytes of each dtype, the one with most bytes first."""
    tensors, sizes = Counter[str](), Counter[str]()
    for tensor in stored.tensors:
        tensors[tensor.dtype] += 1
        sizes[tensor.dtype] += tensor.size
    return {dtype: (tensors[dtype], size) for dtype, size in sizes.most_common()}


def count_boxes(checkpoint: Checkpoint) -> int:
    """Counts the parts in which the tensors of a distributed checkpoint are stored; 0 of another checkpoint."""
    if checkpoint.boxes is None:
        return 0
    return len(checkpoint.tensors) - len(checkpoint.boxes) + sum(map(len, checkpoint.boxes.values()))


def list_file_contents(stored: FolderHeaders, boxes: StoredBoxes | None) -> tuple[FileContent, ...]:
    """Lists the files with the bytes of each dtype in them. Of a tensor in boxes each file has its own part."""
    sizes = [Counter[str]() for _ in stored.files]
    for tensor in stored.tensors:
        parts = [part for part, _ in (boxes or {}).get(tensor.file, ())]
        for part in parts or [tensor]:
            sizes[part.file][part.dtype] += part.size
    # Not the counters: `asdict` cannot copy them.
    return tuple(FileContent(file.name, dict(found)) for file, found in zip(stored.files, sizes, strict=True))
