"""Finds a tensor's bytes within what `torch.save` wrote: a zip of a small pickle and the bytes, stored as they are."""

import os
from collections.abc import Mapping
from dataclasses import dataclass
from math import prod
from struct import Struct
from typing import Any, NamedTuple, Protocol

from reshard.formats.inert_pickle import read_pickle
from reshard.formats.pickle_machine import Global, Inert, Persistent
from reshard.formats.safetensors import BITS
from reshard.formats.torch_dtypes import STORAGE_DTYPES, TORCH_DTYPES, UNREAD_DTYPES, UNTYPED_STORAGE

HEAD = TAIL = 1024
"""In bytes: so much of both ends of an archive is read first. torch's own need 700 of each."""

READ_AHEAD = 4096
"""In bytes: a read at the end of an archive takes the beginning of the next along."""

MOST_DIRECTORY = 1 << 16
"""In bytes. torch's own have 600."""

MOST_PICKLE = 1 << 16
"""In bytes. torch's own have 200."""

REBUILD, REBUILD_UNTYPED = "torch._utils._rebuild_tensor_v2", "torch._utils._rebuild_tensor_v3"

ALLOWED = frozenset(
    {REBUILD, REBUILD_UNTYPED, UNTYPED_STORAGE, "collections.OrderedDict", *STORAGE_DTYPES, *TORCH_DTYPES}
).union(UNREAD_DTYPES)
"""The classes and functions that the pickle of a tensor names."""


class ArchiveFault(ValueError):
    """An archive that is not what `torch.save` writes for a tensor."""


class SavedTensor(NamedTuple):
    """A tensor as the pickle of its archive describes it."""

    dtype: str
    """As safetensors spells it."""
    shape: tuple[int, ...]
    """In elements."""
    stride: tuple[int, ...]
    """In elements, one number a dimension."""
    begin: int
    """Of its first element, in elements from the beginning of its storage."""
    storage: str
    """The name of the entry with the bytes, within the folder `data`."""


class ArchiveReader(Protocol):
    """Reads small parts of a file with archives."""

    def read(self, offset: int, size: int) -> bytes:
        """The bytes at an offset; fewer at the end of the file. Raises OSError, Refused."""


class FileWindow:
    """Reads small parts of an open file of this machine, each with some bytes behind it, which the next may need."""

    __slots__ = ("begin", "data", "descriptor")

    def __init__(self, descriptor: int) -> None:
        self.descriptor = descriptor
        self.begin = 0
        self.data = b""

    def read(self, offset: int, size: int) -> bytes:
        """The bytes at an offset; fewer at the end of the file. Raises OSError."""
        at = offset - self.begin
        if at < 0 or at + size > len(self.data):
            self.begin, self.data, at = offset, os.pread(self.descriptor, max(size, READ_AHEAD), offset), 0
        return self.data[at : at + size]


@dataclass(frozen=True, slots=True)
class Archive:
    """The archive of one tensor in a file, with both of its ends."""

    window: ArchiveReader
    offset: int
    """Of its first byte, in bytes from the start of the file."""
    size: int
    """In bytes."""
    head: bytes
    tail: bytes

    def read(self, at: int, size: int) -> bytes:
        """Bytes of the archive. Raises ArchiveFault if they are not within it, OSError."""
        if at < 0 or size < 0 or at + size > self.size:
            raise ArchiveFault("a part of it lies behind its end")
        if at + size <= len(self.head):
            return self.head[at : at + size]
        behind = at - (self.size - len(self.tail))
        if behind >= 0:
            return self.tail[behind : behind + size]
        return self.window.read(self.offset + at, size)


def find_tensor_bytes(
    window: ArchiveReader, offset: int, size: int, pickles: dict[bytes, SavedTensor]
) -> tuple[SavedTensor, int]:
    """The tensor of an archive in a file, and the byte of the file where its first element is.

    `pickles` keeps what was read: most parts of a checkpoint have the pickle of another. Raises ArchiveFault, Refused,
    OSError.
    """
    head = window.read(offset, min(size, HEAD))
    tail_size = min(size, TAIL)
    archive = Archive(window, offset, size, head, window.read(offset + size - tail_size, tail_size))
    entries = read_directory(archive)
    folder = find_folder_name(entries)
    text = read_entry(archive, entries, folder + b"data.pkl", MOST_PICKLE)
    saved = pickles.get(text)
    if saved is None:
        saved = pickles[text] = parse_tensor_pickle(text)
    order = folder + b"byteorder"
    if order in entries and read_entry(archive, entries, order, 16) != b"little":
        raise ArchiveFault("its byte order is not little-endian")
    item = BITS[saved.dtype] // 8
    begin, stored = find_zip_entry(archive, entries, folder + b"data/" + saved.storage.encode())
    if is_contiguous(saved) and (saved.begin + prod(saved.shape)) * item > stored:
        raise ArchiveFault(f"its storage has {stored:,} bytes, too few for its shape")
    return saved, offset + begin + saved.begin * item


# The zip.

END, END_64, LOCATOR = Struct("<4s4H2LH"), Struct("<4sQ2H2L4Q"), Struct("<4sLQL")

CENTRAL, LOCAL = Struct("<4s6H3L5H2L"), Struct("<4s5H3L2H")

ENTRY_START, DIRECTORY_START, DESCRIPTOR_START = b"PK\3\4", b"PK\1\2", b"PK\7\10"

FULL_16, FULL_32 = 0xFFFF, 0xFFFFFFFF
"""In the place of a number that stands in a longer field elsewhere."""

ENCRYPTED, DESCRIBED_BEHIND = 1, 8
"""Flags: the content is encrypted; checksum and sizes stand behind it, as torch writes them."""

STORED = 0


ZipEntry = tuple[int, int, int, int]
"""An entry of an archive, by its directory: place of its own header, from the start of the archive; size, in bytes;
checksum; flags."""


def read_directory(archive: Archive) -> Mapping[bytes, ZipEntry]:
    """The entries of an archive, by their names. Raises ArchiveFault."""
    if archive.size < END.size:
        raise ArchiveFault("it is too short for a zip")
    end = archive.size - END.size
    signature, _, _, _, count, size, begin, comment = END.unpack(archive.read(end, END.size))
    if signature != b"PK\5\6" or comment:
        raise ArchiveFault("it does not end as a zip does")
    if count == FULL_16 or FULL_32 in (size, begin):
        count, size, begin = read_long_end(archive, end)
    if size > MOST_DIRECTORY:
        raise ArchiveFault(f"its directory has {size:,} bytes")
    entries = parse_directory(archive.read(begin, size))
    if len(entries) != count:
        raise ArchiveFault(f"its directory has {len(entries)} entries, not {count}: one is missing, or stands twice")
    return entries


def read_long_end(archive: Archive, end: int) -> tuple[int, int, int]:
    """The number of entries, and size and place of the directory, of an archive over 4 GiB. Raises ArchiveFault."""
    locator = archive.read(end - LOCATOR.size, LOCATOR.size)
    signature, _, begin, _ = LOCATOR.unpack(locator)
    if signature != b"PK\6\7":
        raise ArchiveFault("the long form of its end is missing")
    signature, *_, count, size, begin = END_64.unpack(archive.read(begin, END_64.size))
    if signature != b"PK\6\6":
        raise ArchiveFault("the long form of its end is missing")
    return count, size, begin


def parse_directory(text: bytes) -> dict[bytes, ZipEntry]:
    """The entries of a directory, by their names. Raises ArchiveFault."""
    at, length = 0, len(text)
    entries = {}
    while at < length:
        if length - at < CENTRAL.size:
            raise ArchiveFault("its directory is cut off")
        (signature, _, _, flags, method, _, _, checksum, packed, size, name_size, extra_size, comment_size, _, _, _,
         begin) = CENTRAL.unpack_from(text, at)  # fmt: skip
        name_at = at + CENTRAL.size
        extra_at = name_at + name_size
        at = extra_at + extra_size + comment_size
        if signature != DIRECTORY_START or at > length:
            raise ArchiveFault("its directory is damaged")
        if method != STORED or flags & ENCRYPTED:
            raise ArchiveFault("an entry of the zip is compressed or encrypted")
        if FULL_32 in (packed, size, begin):
            packed, size, begin = widen_numbers(text[extra_at : extra_at + extra_size], (size, packed, begin))
        if packed != size:
            raise ArchiveFault("an entry of the zip has two sizes")
        entries[text[name_at:extra_at]] = begin, size, checksum, flags
    return entries


def widen_numbers(extra: bytes, numbers: tuple[int, int, int]) -> tuple[int, int, int]:
    """Packed size, size and place of an entry over 4 GiB, which stand in the extra field. Raises ArchiveFault."""
    at = 0
    while at + 4 <= len(extra):
        kind, size = int.from_bytes(extra[at : at + 2], "little"), int.from_bytes(extra[at + 2 : at + 4], "little")
        if kind == 1:
            field = extra[at + 4 : at + 4 + size]
            words = iter([int.from_bytes(field[place : place + 8], "little") for place in range(0, len(field), 8)])
            wide = [next(words, None) if number == FULL_32 else number for number in numbers]
            if None not in wide:
                return wide[1] or 0, wide[0] or 0, wide[2] or 0
        at += 4 + size
    raise ArchiveFault("an entry of the zip lacks its long numbers")


def find_folder_name(entries: Mapping[bytes, ZipEntry]) -> bytes:
    """The folder of all entries within the archive, with its slash. Raises ArchiveFault."""
    folders = [name.removesuffix(b"data.pkl") for name in entries if name.endswith(b"/data.pkl")]
    if len(folders) != 1:
        raise ArchiveFault("it is not what torch.save writes: it has no data.pkl")
    return folders[0]


def find_zip_entry(archive: Archive, entries: Mapping[bytes, ZipEntry], name: bytes) -> tuple[int, int]:
    """Place of an entry's content in the archive, and its size, in bytes. Raises ArchiveFault."""
    entry = entries.get(name)
    if entry is None:
        raise ArchiveFault("an entry of the zip is missing: a tensor has data.pkl and data/0")
    place, size, checksum, flags = entry
    signature, *_, name_size, extra_size = LOCAL.unpack(archive.read(place, LOCAL.size))
    named = archive.read(place + LOCAL.size, name_size)
    if signature != ENTRY_START or named != name:
        raise ArchiveFault("an entry of the zip is not where its directory says")
    begin = place + LOCAL.size + name_size + extra_size
    # Else a wrong length in the header would lead to other bytes than the tensor's.
    end = archive.read(begin + size, len(ENTRY_START) + 4)
    if flags & DESCRIBED_BEHIND:
        is_end = end == DESCRIPTOR_START + checksum.to_bytes(4, "little")
    else:
        is_end = end.startswith((ENTRY_START, DIRECTORY_START))
    if not is_end:
        raise ArchiveFault("an entry of the zip does not end where its directory says")
    return begin, size


def read_entry(archive: Archive, entries: Mapping[bytes, ZipEntry], name: bytes, most: int) -> bytes:
    """The content of a small entry. Raises ArchiveFault."""
    begin, size = find_zip_entry(archive, entries, name)
    if size > most:
        raise ArchiveFault(f"an entry of the zip has {size:,} bytes, at most {most:,} were expected")
    return archive.read(begin, size)


# The pickle.


def parse_tensor_pickle(text: bytes) -> SavedTensor:
    """The tensor that a `data.pkl` describes. Raises ArchiveFault, Refused."""
    value = read_pickle(text, ALLOWED, "data.pkl")
    if type(value) is not Inert or type(value.arguments) is not tuple or value.state is not None:
        raise ArchiveFault("it holds another thing than a tensor")
    match value.name, value.arguments:
        case (str(name), (Persistent() as said, begin, shape, stride, _, _)) if name == REBUILD:
            dtype, storage = read_storage(said.key)
        case (str(name), (Persistent() as said, begin, shape, stride, _, _, Global() as named)) if (
            name == REBUILD_UNTYPED
        ):
            dtype, storage = TORCH_DTYPES.get(named.name, named.name), read_storage(said.key)[1]
        case _:
            raise ArchiveFault("it holds another thing than a plain tensor")
    if dtype not in BITS:
        raise ArchiveFault(f"its dtype is {dtype}")
    if not (is_size_tuple((begin,)) and is_size_tuple(shape) and is_size_tuple(stride) and len(shape) == len(stride)):
        raise ArchiveFault("its shape is not a list of sizes with a stride for each")
    return SavedTensor(dtype, shape, stride, begin, storage)


def read_storage(key: Any) -> tuple[str, str]:
    """The dtype of a storage, and the name of its entry. Raises ArchiveFault."""
    match key:
        case ("storage", Global() as kind, str(name), str(_), int(_)) if name.isdecimal() and len(name) < 20:
            return STORAGE_DTYPES.get(kind.name, kind.name), name
    raise ArchiveFault("its bytes are named in another way than by torch.save")


def is_size_tuple(values: Any) -> bool:
    """Whether a value is a tuple of whole numbers that a size or a stride can be."""
    return type(values) is tuple and all(type(value) is int and 0 <= value < 1 << 63 for value in values)


def is_contiguous(saved: SavedTensor) -> bool:
    """Whether a tensor lies row by row, without a gap. A dimension of one element may have any stride."""
    if 0 in saved.shape:
        return True
    step = 1
    for size, stride in zip(reversed(saved.shape), reversed(saved.stride), strict=True):
        if size != 1 and stride != step:
            return False
        step *= size
    return True
