"""Reads boxed checkpoints in tests, and compares every box with the whole tensor."""

from pathlib import Path

import pytest
import torch

from reshard.errors import Refused
from reshard.formats.boxed_folder import read_boxed
from reshard.formats.boxes import BoxedCheckpoint
from reshard.storage.opened import open_regular_file


def read(folder: Path) -> BoxedCheckpoint:
    boxed = read_boxed(folder)
    assert boxed is not None
    return boxed


def compare_boxes(boxed: BoxedCheckpoint, whole: dict[str, torch.Tensor], prefix: str = "") -> None:
    """Every box against the tensor that torch had, byte for byte; together they have each element once."""
    assert boxed.boxes.keys() == {prefix + name for name in whole}
    for name, boxes in boxed.boxes.items():
        tensor = whole[name.removeprefix(prefix)]
        count = torch.zeros(tensor.shape, dtype=torch.int)
        for part, offsets in boxes:
            place = tuple(slice(begin, begin + size) for begin, size in zip(offsets, part.shape, strict=True))
            with open_regular_file(boxed.folder / boxed.files[part.file].name) as file:
                file.seek(part.offset)
                found = torch.frombuffer(bytearray(file.read(part.size)) or bytearray(1), dtype=torch.uint8)
            wanted = tensor[place].contiguous().reshape(-1).view(torch.uint8)
            assert part.name == name
            assert found[: part.size].equal(wanted), (name, offsets)
            count[place] += 1
        assert count.eq(1).all(), name
        if boxed.shapes:
            assert boxed.shapes[name] == tensor.shape


def refused(folder: Path) -> list[tuple[str, str, str]]:
    with pytest.raises(Refused) as caught:
        read_boxed(folder)
    return [(problem.kind, problem.subject, f"{problem.found}; {problem.expected}; {problem.remedy}")
            for problem in caught.value.problems]  # fmt: skip


def copy_folder(source: Path, target: Path) -> Path:
    for path in source.iterdir():
        (target / path.name).write_bytes(path.read_bytes())
    return target
