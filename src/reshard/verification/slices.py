"""The slices of a target of `--to dcp`: which each rank should have, computed anew; and whole tensors made of them.

A whole tensor has a number that no file has. It is traced to the source like any tensor of whole files; then what it
should hold is dealt out to its slices, byte by byte, and these are compared.
"""

from collections.abc import Iterator, Mapping, Sequence
from math import prod
from typing import Any, NamedTuple

from reshard.errors import Problem, Refused
from reshard.formats.dcp_safetensors import parse_sharding
from reshard.formats.huggingface import read_header_text
from reshard.formats.json_input import shorten_json
from reshard.formats.safetensors import BITS, parse_header
from reshard.paths import AnyPath
from reshard.storage.remote_store import fetch_heads
from reshard.text import format_list
from reshard.types import Tensor
from reshard.verification.chunks import TargetPart
from reshard.verification.expected import TargetTensor
from reshard.verification.target_folder import CONVERT_AGAIN_HINT, MISSING_FILE_HINT, TargetFolder, TargetHeader

ALL_SLICES = "shard-*-model-00001-of-00001.safetensors"
"""In the place of a file name: all files of slices."""


class Slice(NamedTuple):
    """A slice of a tensor as a file of the target has it."""

    rank: int
    tensor: Tensor
    begin: int
    """Of its first byte, in bytes of the whole tensor."""


Slices = Mapping[str, Sequence[Slice]]
"""By the name of a tensor: its slices, in order."""


class SlicedTarget(NamedTuple):
    """The files of a target of slices, and the whole tensors that they hold."""

    files: Sequence[TargetHeader]
    whole: Sequence[TargetHeader]
    """One that there is not, of whole tensors, which begin at byte 0; none with problems."""
    slices: Slices
    problems: Sequence[Problem]


def read_sliced_target(target: AnyPath, folder: TargetFolder) -> SlicedTarget:
    """Reads the headers of all files of slices, and puts their tensors together."""
    fetch_heads(target, folder.names.values())
    files: list[TargetHeader] = []
    problems: list[Problem] = []
    found: dict[str, dict[int, tuple[Tensor, Any]]] = {}
    for rank, name in sorted(folder.names.items()):
        if not (target / name).exists():
            problems.append(
                Problem("missing-file", name, "no such file", f"one of {folder.ranks} files", MISSING_FILE_HINT)
            )
            continue
        try:
            file, text = read_header_text(target / name)
            tensors = parse_header(text, rank, file.size, name)
        except Refused as refused:
            problems.extend(refused.problems)
            continue
        places, faults = parse_sharding(text, name)
        problems.extend(faults)
        files.append(TargetHeader(rank, file, tensors, {}))
        for tensor in tensors:
            found.setdefault(tensor.name, {})[rank] = tensor, places.pop(tensor.name, None)
    if not problems:
        problems += check_swapped_slices(found, folder)
    if not problems:
        problems += [problem for name, held in found.items() for problem in check_slices(name, held, folder)]
    if problems:
        return SlicedTarget(files, (), {}, problems)
    slices = {name: list_slices_of_tensor(held) for name, held in found.items()}
    tensors = [join_slices(held, folder.ranks) for held in slices.values()]
    return SlicedTarget(files, [TargetHeader(folder.ranks, files[0].file, tensors, {})], slices, ())


def check_swapped_slices(
    found: Mapping[str, Mapping[int, tuple[Tensor, Any]]], folder: TargetFolder
) -> Iterator[Problem]:
    """Reports files under the name of another: all places in them are those of another rank."""
    places: dict[int, set[int]] = {}
    for held in found.values():
        total = sum(next(iter(tensor.shape), 0) for tensor, _ in held.values())
        for rank, (tensor, said) in held.items():
            if len(held) > 1 and tensor.shape:
                offsets = said.get("saved_offsets") if isinstance(said, dict) else None
                first = offsets[0] if isinstance(offsets, list) and offsets else None
                owner = first // -(-total // folder.ranks) if isinstance(first, int) and total else rank
                places.setdefault(rank, set()).add(owner)
    for rank, owners in sorted(places.items()):
        if len(owners) == 1 and owners != {rank} and min(owners) in folder.names:
            other = folder.names[min(owners)]
            remedy = "give the files their names back"
            yield Problem("swapped-file", folder.names[rank], f"the slices of {other}", "its own", remedy)


def check_slices(name: str, held: Mapping[int, tuple[Tensor, Any]], folder: TargetFolder) -> Iterator[Problem]:
    """Reports the slices of a tensor that are not those of `torch.chunk`: as many rows for each rank as the first one
    has, or what is left of them. `held` has the slice of each rank, and what the metadata say of its place.
    """
    first = next(iter(held.values()))[0]
    lengths = {rank: next(iter(tensor.shape), 1) for rank, (tensor, _) in held.items()}
    total = sum(lengths.values())
    most = -(-total // folder.ranks) if first.shape and BITS[first.dtype] >= 8 else total
    wanted = dict.fromkeys(range(total // most), most) if most else {0: 0}
    wanted |= {total // most: total % most} if most and total % most else {}
    for rank in sorted(wanted.keys() | held.keys()):
        subject = f"{folder.names[rank]}: {name}"
        if rank not in held or rank not in wanted:
            there = format_list(f"rank {one} {length:,}" for one, length in lengths.items())
            found = "no rows" if rank not in held else f"{lengths[rank]:,} rows"
            expected = f"{wanted.get(rank, 0):,} of {total:,} rows; there are {there}"
            yield Problem("wrong-shape", subject, found, expected, CONVERT_AGAIN_HINT)
            continue
        tensor, said = held[rank]
        place = [rank * most, *[0] * (len(tensor.shape) - 1)] if tensor.shape else []
        shape = (wanted[rank], *first.shape[1:]) if tensor.shape else ()
        if (tensor.dtype, tensor.shape, said) != (first.dtype, shape, {"saved_offsets": place}):
            found = f"{tensor.dtype} {list(tensor.shape)}, {shorten_json(said)}"
            expected = f'{first.dtype} {list(shape)}, {{"saved_offsets": {place}}}'
            yield Problem("wrong-shape", subject, found, expected, CONVERT_AGAIN_HINT)


def list_slices_of_tensor(held: Mapping[int, tuple[Tensor, Any]]) -> list[Slice]:
    """Lists the slices of a tensor, one behind the other."""
    slices: list[Slice] = []
    begin = 0
    for rank, (tensor, _) in sorted(held.items()):
        slices.append(Slice(rank, tensor, begin))
        begin += tensor.size
    return slices


def join_slices(slices: Sequence[Slice], number: int) -> Tensor:
    """Joins the slices of a tensor to the whole one, in a file of a number that there is not."""
    first, size = slices[0].tensor, sum(one.tensor.size for one in slices)
    rows = sum(prod(one.tensor.shape[:1]) for one in slices)
    shape = (rows, *first.shape[1:]) if first.shape else ()
    return first._replace(shape=shape, file=number, offset=0, size=size)


def split_part(part: TargetPart, slices: Slices) -> Iterator[TargetPart]:
    """Splits what a whole tensor should hold into what each of its slices should hold. Slices begin with a row."""
    width = len(part.columns)
    for rank, tensor, begin in slices[part.tensor.name]:
        first, last = max(begin, part.skip), min(begin + tensor.size, part.skip + len(part.rows) * width)
        if first < last:
            rows = part.rows[(first - part.skip) // width : (last - part.skip) // width]
            yield part._replace(rank=rank, tensor=tensor, rows=rows, skip=first - begin)


def find_stored_tensor(seen: TargetTensor, slices: Slices) -> TargetTensor:
    """Finds a tensor that lies in a file: of a whole tensor its first slice."""
    first = slices.get(seen.tensor.name)
    return TargetTensor(first[0].rank, first[0].tensor) if first else seen
