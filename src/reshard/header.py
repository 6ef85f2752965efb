"""The safetensors header: bytes <-> tensors. Opens no file.

A file is eight bytes of little-endian length, that many bytes of JSON, and the data. The format and its limits are
those of the `safetensors` package 0.8; what it leaves open and we refuse is written down in docs/format.md.
"""

import json
from collections.abc import Iterable
from json.encoder import encode_basestring
from math import prod
from typing import Any, NoReturn

from reshard.errors import Problem, Refused, refuse
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
MAX_HEADER_SIZE = 100_000_000
MAX_DIMENSIONS = 64
MAX_INTEGER = 2**63 - 1
AGAIN = "download or copy the file again"


def header_length(first_bytes: bytes, file_size: int, name: str) -> int:
    """The length of the JSON text, in bytes, from the first eight bytes of the file `name`. Raises Refused."""
    if len(first_bytes) < LENGTH_SIZE:
        raise refuse("truncated-file", name, f"{file_size} bytes", f"at least {LENGTH_SIZE} bytes", AGAIN)
    length = int.from_bytes(first_bytes, "little")
    if length > MAX_HEADER_SIZE:
        expected = f"at most {MAX_HEADER_SIZE:,} bytes"
        raise refuse("header-too-long", name, f"a header length of {length:,} bytes", expected, "is it safetensors?")
    if LENGTH_SIZE + length > file_size:
        found = f"a header of {length:,} bytes in a file of {file_size:,} bytes"
        raise refuse("truncated-file", name, found, "the whole header", AGAIN)
    return length


def parse_header(text: bytes, file: int, file_size: int, name: str) -> list[Tensor]:
    """The tensors of the header `text` in the order of their data. Raises Refused with every fault found.

    `file` is the index that the tensors will carry; their offsets count from the start of the file. The tensors must
    cover the data exactly: no overlap, no gap, nothing behind the last.
    """
    header = parse_json(text, name)
    if not isinstance(header, dict):
        raise refuse("header-not-json", name, f"a JSON {type(header).__name__}", "a JSON object", AGAIN)
    problems: list[Problem] = []
    metadata = header.pop("__metadata__", {})
    if not (isinstance(metadata, dict) and all(isinstance(value, str) for value in metadata.values())):
        problems.append(Problem("wrong-metadata", f"{name}: __metadata__", "another thing", "an object of strings"))
    start = LENGTH_SIZE + len(text)
    tensors = []
    for key, entry in header.items():
        fault = entry_fault(key, entry)
        if fault:
            problems.append(Problem(fault[0], f"{name}: {key}", fault[1], fault[2], AGAIN))
            continue
        begin, end = entry["data_offsets"]
        tensors.append(Tensor(key, entry["dtype"], tuple(entry["shape"]), file, start + begin, end - begin))
    if not problems:
        tensors.sort(key=place)
        problems.extend(placing_problems(tensors, start, file_size, name))
    if problems:
        raise Refused(problems)
    return tensors


def parse_json(text: bytes, name: str) -> Any:
    """`json.loads`, strict: no duplicate key, no float, no NaN, nothing but UTF-8. Raises Refused, naming `name`."""
    try:
        return json.loads(
            text.decode(), object_pairs_hook=unique_keys, parse_float=refuse_number, parse_constant=refuse_number
        )
    except (ValueError, RecursionError) as error:
        raise refuse("header-not-json", name, f"{type(error).__name__}: {error}", "a JSON header", AGAIN) from None


def unique_keys(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    found = dict(pairs)
    if len(found) != len(pairs):
        keys = [key for key, _ in pairs]
        twice = next(key for key in keys if keys.count(key) > 1)
        raise ValueError(f"the key {twice!r} stands twice")
    return found


def refuse_number(number: str) -> NoReturn:
    raise ValueError(f"{number[:40]} is not a whole number")


def entry_fault(key: str, entry: Any) -> tuple[str, str, str] | None:
    """What is wrong with one entry as (kind, found, expected), or None."""
    try:
        dtype, shape, (begin, end) = entry["dtype"], entry["shape"], entry["data_offsets"]
        bits = BITS[dtype]
        if not (len(entry) == 3 and type(begin) is type(end) is int and 0 <= begin <= end <= MAX_INTEGER):
            return "wrong-offsets", f"data_offsets {short(entry['data_offsets'])}", "two whole numbers, begin <= end"
        if not (type(shape) is list and len(shape) <= MAX_DIMENSIONS and all(map(is_size, shape))):
            return "wrong-shape", f"shape {short(shape)}", f"at most {MAX_DIMENSIONS} whole numbers, none negative"
        if prod(shape) * bits != (end - begin) * 8:
            found = f"{(end - begin) * 8:,} bits of data for {dtype} {short(shape)}"
            return "wrong-offsets", found, f"{prod(shape) * bits:,} bits"
        key.encode()
    except UnicodeEncodeError:
        return "wrong-name", "a lone surrogate in the name", "a name that UTF-8 can write"
    except KeyError:
        if isinstance(entry, dict) and "dtype" in entry:
            return "unknown-dtype", f"dtype {short(entry['dtype'])}", "one of " + ", ".join(BITS)
        return "wrong-entry", short(entry), "dtype, shape and data_offsets"
    except (TypeError, ValueError):
        return "wrong-entry", short(entry), "dtype, shape and data_offsets"
    return None


def is_size(value: Any) -> bool:
    return type(value) is int and 0 <= value <= MAX_INTEGER


def short(value: Any) -> str:
    text = json.dumps(value)
    return text if len(text) <= 80 else text[:77] + "..."


def place(tensor: Tensor) -> tuple[int, int]:
    return tensor.offset, tensor.size


def placing_problems(tensors: Iterable[Tensor], start: int, file_size: int, name: str) -> Iterable[Problem]:
    """Overlaps, gaps and a wrong end, for tensors in the order of their data."""
    end = start
    for tensor in tensors:
        if tensor.offset != end:
            kind = "overlap" if tensor.offset < end else "gap"
            found = f"its data begins at byte {tensor.offset:,}"
            yield Problem(kind, f"{name}: {tensor.name}", found, f"byte {end:,}, where the one before ends", AGAIN)
        end = tensor.offset + tensor.size
    if end > file_size:
        yield Problem("truncated-file", name, f"{file_size:,} bytes", f"{end:,} bytes, as its header says", AGAIN)
    if end < file_size:
        yield Problem("wrong-size", name, f"{file_size:,} bytes", f"{end:,} bytes, as its header says", AGAIN)


def header_bytes(entries: Iterable[str]) -> bytes:
    """The header of a file, byte for byte as `safetensors.serialize_file` writes it without metadata.

    `entries` are the texts of `entry_text` in the order of `order_key`. Padded with spaces to a multiple of eight.
    """
    text = ("{" + ",".join(entries) + "}").encode()
    text += b" " * (-len(text) % 8)
    return len(text).to_bytes(LENGTH_SIZE, "little") + text


def entry_text(name: str, dtype: str, shape: Iterable[int]) -> str:
    """The start of an entry, up to its two offsets: complete it with `BEGIN,END]}`."""
    return f'{encode_basestring(name)}:{{"dtype":"{dtype}","shape":[{",".join(map(str, shape))}],"data_offsets":['


def order_key(name: str, dtype: str) -> tuple[int, str]:
    """Sorts the tensors of a file as safetensors does: dtype descending, then the name by its code points."""
    return -DTYPE_RANK[dtype], name
