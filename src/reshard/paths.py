"""Paths of what is read: on this machine, or in a store such as the hub. A store is listed once, when it is opened."""

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple, Protocol


class Entry(NamedTuple):
    """A file of a store, as it was listed. Everything that is read later is of this version."""

    name: str
    """Within the store; it may have slashes."""
    size: int
    """In bytes."""
    version: str
    """An ETag, or on the hub a hash of the content."""


class Store(Protocol):
    """A folder that is not on this machine: a commit on the hub, a bucket or a part of one, a folder of a server."""

    @property
    def address(self) -> str:
        """For people and messages; without anything secret."""

    @property
    def entries(self) -> Mapping[str, Entry]:
        """Its files, by name."""

    @property
    def folders(self) -> frozenset[str]:
        """The names of its folders; the empty name for itself."""

    def read_into(self, entry: Entry, offset: int, buffer: memoryview) -> None:
        """Fills a buffer with the bytes of a file from a byte offset on. Raises Refused if they cannot be had, or are
        of another version.
        """

    def read_head(self, entry: Entry, size: int) -> bytes:
        """The first bytes of a file, so many or more, or all of a smaller one; kept, so that they are read once. Raises
        Refused.
        """

    def get_head(self, entry: Entry) -> bytes:
        """As many first bytes as are kept; none if none were read."""


@dataclass(frozen=True, slots=True)
class RemotePath:
    """A file or folder in a store, with those methods of `pathlib.Path` that its readers need. Only `read_bytes` asks
    the store: all else is known since it was listed.
    """

    store: Store
    inner: str = ""
    """Within the store; empty for the store itself."""

    def __str__(self) -> str:
        return "/".join(filter(None, (self.store.address, self.inner)))

    def __truediv__(self, name: str) -> "RemotePath":
        return RemotePath(self.store, "/".join(filter(None, (self.inner, name))))

    def __lt__(self, other: "RemotePath") -> bool:
        return str(self) < str(other)

    @property
    def name(self) -> str:
        """The last part; of a store itself, that of its address."""
        return str(self).rpartition("/")[2]

    @property
    def suffix(self) -> str:
        """The ending of the name from its last dot on."""
        dot = self.name.rfind(".")
        return self.name[dot:] if 0 < dot < len(self.name) - 1 else ""

    @property
    def parent(self) -> "RemotePath":
        """The folder that holds it; the store itself is its own."""
        return RemotePath(self.store, self.inner.rpartition("/")[0])

    @property
    def entry(self) -> Entry:
        """The file that it names. Raises FileNotFoundError, or IsADirectoryError."""
        if self.is_dir():
            raise IsADirectoryError(21, "Is a directory", str(self))
        if self.inner not in self.store.entries:
            raise FileNotFoundError(2, "No such file", str(self))
        return self.store.entries[self.inner]

    def is_file(self) -> bool:
        """Whether it is a file of the store."""
        return self.inner in self.store.entries

    def is_dir(self) -> bool:
        """Whether it is the store, or a folder of it."""
        return self.inner in self.store.folders

    def exists(self) -> bool:
        """Whether it is a file or a folder."""
        return self.is_file() or self.is_dir()

    def is_symlink(self) -> bool:
        """Whether it is a link: stores have none."""
        return False

    def iterdir(self) -> Iterator["RemotePath"]:
        """The files and folders in it. Raises FileNotFoundError if it is no folder."""
        if not self.is_dir():
            raise FileNotFoundError(2, "No such folder", str(self))
        prefix = f"{self.inner}/" if self.inner else ""
        for name in sorted({*self.store.entries, *self.store.folders}):
            rest = name.removeprefix(prefix)
            if name.startswith(prefix) and rest and "/" not in rest:
                yield RemotePath(self.store, name)

    def relative_to(self, other: "AnyPath") -> str:
        """The path from a folder above it on."""
        return str(self).removeprefix(f"{other}/")

    def absolute(self) -> "RemotePath":
        """Itself: an address does not depend on the folder that we are in."""
        return self

    def read_bytes(self) -> bytes:
        """All of a file. Raises OSError if there is none, Refused if it cannot be read."""
        return self.store.read_head(self.entry, self.entry.size)


AnyPath = Path | RemotePath
"""A path on this machine, or in a store."""


def is_same_folder(one: AnyPath, other: AnyPath) -> bool:
    """Whether two paths lead to one folder."""
    if isinstance(one, Path) and isinstance(other, Path):
        return one.resolve() == other.resolve()
    return str(one) == str(other)
