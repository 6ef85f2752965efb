"""The safetensors header: bytes <-> tensors. Opens no file.

A file is eight bytes of little-endian length, that many bytes of JSON, and the data. The format and its limits are
those of the `safetensors` package 0.8; what it leaves open and we refuse is written down in docs/format.md.
"""

import json
import re
from collections.abc import Iterable, Sequence
from itertools import accumulate
from json.encoder import encode_basestring
from math import prod
from operator import itemgetter
from typing import Annotated, Any, Literal, NoReturn

import msgspec

from reshard.errors import MOST_PROBLEMS, Problem, refuse, require_none
from reshard.formats.json_input import (
    MAX_HEADER_SIZE,
    MAX_INTEGER,
    is_size,
    is_text,
    refuse_duplicate_keys,
    shorten_json,
)
from reshard.types import Tensor

BITS = {
    "BOOL": 8,
    "F4": 4,
    "F6_E2M3": 6,
    "F6_E3M2": 6,
    "U8": 8,
    "I8": 8,
    "F8_E5M2": 8,
    "F8_E4M3": 8,
    "F8_E8M0": 8,
    "F8_E4M3FNUZ": 8,
    "F8_E5M2FNUZ": 8,
    "I16": 16,
    "U16": 16,
    "F16": 16,
    "BF16": 16,
    "I32": 32,
    "U32": 32,
    "F32": 32,
    "C64": 64,
    "F64": 64,
    "I64": 64,
    "U64": 64,
}
"""Bits of one element. The order is that of the `Dtype` enum of safetensors 0.8, and decides the order in a file."""

DTYPE_RANK = {dtype: rank for rank, dtype in enumerate(BITS)}

LENGTH_SIZE = 8

MAX_DIMENSIONS = 64

DOWNLOAD_FILE_AGAIN = "download or copy the file again"

Size = Annotated[int, msgspec.Meta(ge=0, le=MAX_INTEGER)]

Shape = Annotated[tuple[Size, ...], msgspec.Meta(max_length=MAX_DIMENSIONS)]


class HeaderEntry(msgspec.Struct, forbid_unknown_fields=True, gc=False):
    """An entry of a header that is right, or it does not parse."""

    dtype: Literal[tuple(BITS)]  # type: ignore[valid-type]
    shape: Shape
    data_offsets: tuple[Size, Size]


ENTRIES = msgspec.json.Decoder(dict[str, HeaderEntry])

LEADING_METADATA = re.compile(rb'\{"__metadata__":\{"[^"\\]*":"[^"\\]*"\}(?:,(?=")|(?=\}))')
"""Metadata of one key where safetensors writes it: first. It is not of the form of an entry."""


def read_header_length(first_bytes: bytes, file_size: int, name: str) -> int:
    """The length of the JSON text, in bytes, from the first eight bytes of the file `name`. Raises Refused."""
    if len(first_bytes) < LENGTH_SIZE:
        raise refuse(
            "truncated-file",
            name,
            f"{file_size} bytes in the file",
            f"at least {LENGTH_SIZE} bytes",
            DOWNLOAD_FILE_AGAIN,
        )
    length = int.from_bytes(first_bytes, "little")
    if length > MAX_HEADER_SIZE:
        expected = f"at most {MAX_HEADER_SIZE:,} bytes"
        raise refuse("header-too-long", name, f"a header length of {length:,} bytes", expected, "is it safetensors?")
    if LENGTH_SIZE + length > file_size:
        found = f"a header of {length:,} bytes in a file of {file_size:,} bytes"
        raise refuse("truncated-file", name, found, "the whole header", DOWNLOAD_FILE_AGAIN)
    return length


def parse_header(text: bytes, file: int, file_size: int, name: str) -> list[Tensor]:
    """The tensors of the header `text` in the order of their data. Raises Refused with every fault found.

    `file` is the index that the tensors will carry; their offsets count from the start of the file. The tensors must
    cover the data exactly: no overlap, no gap, nothing behind the last.
    """
    start = LENGTH_SIZE + len(text)
    tensors = parse_sound_header(text, file)
    if tensors is None:
        tensors = parse_doubtful_header(text, file, name)
    tensors.sort(key=OFFSET_AND_SIZE)
    if not is_tiled(tensors, start, file_size):
        require_none(check_offsets(tensors, start, file_size, name))
    return tensors


def parse_sound_header(text: bytes, file: int) -> list[Tensor] | None:
    """The tensors of a header in which every entry is right; None if one is not, or if that cannot be told so fast."""
    metadata = LEADING_METADATA.match(text)
    start = LENGTH_SIZE + len(text)
    text = b"{" + text[metadata.end() :] if metadata else text
    try:
        entries = ENTRIES.decode(text)
    except (ValueError, RecursionError):  # msgspec's own errors are ValueErrors too
        return None
    # An entry has five strings: its name, its three keys and its dtype. More quotes: some key stood twice.
    if b"\\" in text or text.count(b'"') != 10 * len(entries) or "__metadata__" in entries:
        return None
    kinds: dict[tuple[str, tuple[int, ...]], tuple[str, tuple[int, ...], int]] = {}
    tensors = []
    new = tuple.__new__  # a third faster than Tensor(...)
    for key, entry in entries.items():
        begin, end = entry.data_offsets
        kind = kinds.get((entry.dtype, entry.shape))
        if kind is None:
            kind = kinds[entry.dtype, entry.shape] = entry.dtype, entry.shape, compute_size(entry.dtype, entry.shape)
        dtype, shape, size = kind
        if end - begin != size:
            return None
        tensors.append(new(Tensor, (key, dtype, shape, file, start + begin, size)))
    return tensors


def compute_size(dtype: str, shape: tuple[int, ...]) -> int:
    """In bytes; -1 if that is no whole number, or too large to be read."""
    # A product that overflows on the way to its zero is an overflow to safetensors too.
    bits = prod(shape) * BITS[dtype]
    return -1 if bits % 8 or prod(filter(None, shape)) > MAX_INTEGER else bits // 8


def parse_doubtful_header(text: bytes, file: int, name: str) -> list[Tensor]:
    """The tensors of a header, each entry looked at by itself. Raises Refused with every fault found."""
    header = parse_object(text, name)
    problems: list[Problem] = []
    metadata = header.pop("__metadata__", {})
    if not (isinstance(metadata, dict) and all(map(is_text, [*metadata, *metadata.values()]))):
        problems.append(Problem("wrong-metadata", f"{name}: __metadata__", "another thing", "an object of strings"))
    start = LENGTH_SIZE + len(text)
    tensors = []
    for key, entry in header.items():
        if fault := find_entry_fault(key, entry):
            problems.append(Problem(fault[0], f"{name}: {key}", fault[1], fault[2], DOWNLOAD_FILE_AGAIN))
            if len(problems) >= MOST_PROBLEMS:
                break
            continue
        begin, end = entry["data_offsets"]
        tensors.append(Tensor(key, entry["dtype"], tuple(entry["shape"]), file, start + begin, end - begin))
    require_none(problems)
    return tensors


def parse_object(text: bytes, name: str) -> dict[str, Any]:
    """The JSON object of a header: no duplicate key, no float, no NaN, nothing but UTF-8. Raises Refused for `name`."""
    try:
        header = json.loads(
            text.decode(),
            parse_float=refuse_number,
            parse_constant=refuse_number,
            object_pairs_hook=refuse_duplicate_keys,
        )
    except (ValueError, RecursionError) as error:
        raise refuse(
            "header-not-json", name, f"{type(error).__name__}: {error}", "a JSON header", DOWNLOAD_FILE_AGAIN
        ) from None
    if not isinstance(header, dict):
        raise refuse("header-not-json", name, f"a JSON {type(header).__name__}", "a JSON object", DOWNLOAD_FILE_AGAIN)
    return header


def refuse_number(number: str) -> NoReturn:
    raise ValueError(f"{number[:40]} is not a whole number")


def find_entry_fault(key: str, entry: Any) -> tuple[str, str, str] | None:
    """Finds the fault of one entry, as (kind, found, expected); None if there is none."""
    if not (isinstance(entry, dict) and entry.keys() == {"dtype", "shape", "data_offsets"}):
        return "wrong-entry", shorten_json(entry), "dtype, shape and data_offsets, and nothing else"
    dtype, shape, offsets = entry["dtype"], entry["shape"], entry["data_offsets"]
    if not isinstance(dtype, str) or (type(offsets) is list and len(offsets) != 2):
        return "wrong-entry", shorten_json(entry), "a dtype, a list of sizes and two offsets"
    if not is_text(key):
        return "wrong-name", "a lone surrogate in the name", "a name that UTF-8 can write"
    if dtype not in BITS:
        return "unknown-dtype", f"dtype {shorten_json(dtype)}", "one of " + ", ".join(BITS)
    if type(offsets) is not list or not all(map(is_size, offsets)) or offsets[0] > offsets[1]:
        return "wrong-offsets", f"data_offsets {shorten_json(offsets)}", "two whole numbers, begin <= end"
    if type(shape) is not list or len(shape) > MAX_DIMENSIONS or not all(map(is_size, shape)):
        return "wrong-shape", f"shape {shorten_json(shape)}", f"at most {MAX_DIMENSIONS} whole numbers, none negative"
    # A product that overflows on the way to its zero is an overflow to safetensors too.
    if prod(filter(None, shape)) > MAX_INTEGER:
        return "wrong-shape", f"shape {shorten_json(shape)}", f"at most {MAX_INTEGER:,} elements"
    bits, found = prod(shape) * BITS[dtype], (offsets[1] - offsets[0]) * 8
    if bits != found:
        return "wrong-offsets", f"{found:,} bits of data for {dtype} {shorten_json(shape)}", f"{bits:,} bits"
    return None


OFFSET_AND_SIZE = itemgetter(Tensor._fields.index("offset"), Tensor._fields.index("size"))


def is_tiled(tensors: Sequence[Tensor], start: int, file_size: int) -> bool:
    """Whether tensors in the order of their data fill a file from `start` to its end."""
    ends = list(accumulate((tensor.size for tensor in tensors), initial=start))
    return ends[:-1] == [tensor.offset for tensor in tensors] and ends[-1] == file_size


def check_offsets(tensors: Iterable[Tensor], start: int, file_size: int, name: str) -> Iterable[Problem]:
    """Overlaps, gaps and a wrong end, for tensors in the order of their data."""
    end = start
    for tensor in tensors:
        if tensor.offset != end:
            kind = "overlap" if tensor.offset < end else "gap"
            found = f"its data begins at byte {tensor.offset:,}"
            yield Problem(
                kind, f"{name}: {tensor.name}", found, f"byte {end:,}, where the one before ends", DOWNLOAD_FILE_AGAIN
            )
        end = tensor.offset + tensor.size
    if end > file_size:
        found = f"{file_size:,} bytes: {end - file_size:,} are missing at its end"
        yield Problem("truncated-file", name, found, f"{end:,} bytes, as its header says", DOWNLOAD_FILE_AGAIN)
    if end < file_size:
        yield Problem(
            "wrong-size", name, f"{file_size:,} bytes", f"{end:,} bytes, as its header says", DOWNLOAD_FILE_AGAIN
        )


def format_header(entries: Iterable[str]) -> bytes:
    """The header of a file, byte for byte as `safetensors.serialize_file` writes it without metadata.

    `entries` are the texts of `format_entry` in the order of `make_order_key`. Padded with spaces to a multiple
    of eight.
    """
    text = ("{" + ",".join(entries) + "}").encode()
    text += b" " * (-len(text) % 8)
    return len(text).to_bytes(LENGTH_SIZE, "little") + text


def format_entry(name: str, dtype: str, shape: Iterable[int]) -> str:
    """The start of an entry, up to its two offsets: complete it with `BEGIN,END]}`."""
    return encode_basestring(name) + format_entry_end(dtype, shape)


def format_entry_end(dtype: str, shape: Iterable[int]) -> str:
    """Formats the part of an entry between its name and its two offsets."""
    return f':{{"dtype":"{dtype}","shape":[{",".join(map(str, shape))}],"data_offsets":['


def make_order_key(name: str, dtype: str) -> tuple[int, str]:
    """Sorts the tensors of a file as safetensors does: dtype descending, then the name by its code points."""
    return -DTYPE_RANK[dtype], name
