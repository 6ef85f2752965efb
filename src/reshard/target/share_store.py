"""The target of a share in a store: its tensor files are those of the whole target, all else is in the share's folder.

Nothing can be renamed in a store. So the tensor files have their final names from the beginning, and only journal,
notes, record and manifest lie in `.share-1-of-4`. Whoever writes the share sees one folder with both; what lies in the
target beside that is not seen.
"""

from collections.abc import Collection, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass

from reshard.formats.share_names import name_share_folder
from reshard.paths import Entry, RemotePath, Store
from reshard.storage.remote_store import find_folders_of
from reshard.storage.target_store import TargetStore, UploadedPart, UploadLimits
from reshard.target.places import StoredFolder
from reshard.types import Share


@dataclass(frozen=True, slots=True)
class ShareNames:
    """The names of a share's files, and where they lie in its target."""

    folder: str
    tensors: frozenset[str]
    """Names of tensor files: they are the same in the target."""

    def find(self, name: str) -> str:
        """The name in the target of a file of the share."""
        return name if name in self.tensors else f"{self.folder}/{name}"

    def keep(self, entries: Mapping[str, Entry]) -> dict[str, Entry]:
        """Keeps those of a target's objects that are of the share, by their names there."""
        kept = {name: entry for name, entry in entries.items() if name in self.tensors}
        for name, entry in entries.items():
            inner = name.removeprefix(f"{self.folder}/")
            if inner != name and inner not in self.tensors:
                kept[inner] = entry._replace(name=inner)
        return kept


@dataclass(frozen=True, slots=True)
class ShareStore:
    """The store of a share: a TargetStore whose names are those of the share."""

    whole: TargetStore
    names: ShareNames

    @property
    def address(self) -> str:
        """The folder of the share."""
        return f"{self.whole.address}/{self.names.folder}"

    @property
    def keeps_parts(self) -> bool:
        """See `TargetStore`."""
        return self.whole.keeps_parts

    @property
    def limits(self) -> UploadLimits:
        """See `TargetStore`."""
        return self.whole.limits

    def locate(self, name: str) -> str:
        """See `TargetStore`."""
        return self.whole.locate(self.names.find(name))

    def list_entries(self) -> Mapping[str, Entry]:
        """See `TargetStore`."""
        return self.names.keep(self.whole.list_entries())

    def get(self, name: str) -> bytes | None:
        """See `TargetStore`."""
        return self.whole.get(self.names.find(name))

    def put(self, name: str, content: bytes) -> str:
        """See `TargetStore`."""
        return self.whole.put(self.names.find(name), content)

    def put_new(self, name: str, content: bytes) -> bool:
        """See `TargetStore`."""
        return self.whole.put_new(self.names.find(name), content)

    def remove(self, names: Iterable[str]) -> None:
        """See `TargetStore`."""
        self.whole.remove([self.names.find(name) for name in names])

    def begin_upload(self, name: str) -> str:
        """See `TargetStore`."""
        return self.whole.begin_upload(self.names.find(name))

    def put_part(self, name: str, upload: str, number: int, data: memoryview) -> str:
        """See `TargetStore`."""
        return self.whole.put_part(self.names.find(name), upload, number, data)

    def list_parts(self, name: str, upload: str) -> Mapping[int, UploadedPart] | None:
        """See `TargetStore`."""
        return self.whole.list_parts(self.names.find(name), upload)

    def complete_upload(self, name: str, upload: str, etags: Sequence[str]) -> str:
        """See `TargetStore`."""
        return self.whole.complete_upload(self.names.find(name), upload, etags)

    def abort_upload(self, name: str, upload: str) -> None:
        """See `TargetStore`."""
        self.whole.abort_upload(self.names.find(name), upload)


class ShareListing:
    """What a target lists, as the store of its share has it; read through paths, which are those of the target."""

    def __init__(self, whole: Store, names: ShareNames) -> None:
        self._whole = whole
        self.address = f"{whole.address}/{names.folder}"
        self.entries: Mapping[str, Entry] = names.keep(whole.entries)
        self.folders = frozenset({"", *find_folders_of(self.entries)})

    # What is read comes from a path, and so has its name in the target.

    def read_into(self, entry: Entry, offset: int, buffer: memoryview) -> None:
        """See `Store`."""
        self._whole.read_into(entry, offset, buffer)

    def read_head(self, entry: Entry, size: int) -> bytes:
        """See `Store`."""
        return self._whole.read_head(entry, size)

    def get_head(self, entry: Entry) -> bytes:
        """See `Store`."""
        return self._whole.get_head(entry)


@dataclass(frozen=True, slots=True, kw_only=True)
class SharePath(RemotePath):
    """The folder of a share. The paths in it lead into the target, so a message names what a person finds."""

    whole: RemotePath
    names: ShareNames

    def __str__(self) -> str:
        return self.store.address

    def __truediv__(self, name: str) -> RemotePath:
        return self.whole / self.names.find(name)

    def iterdir(self) -> Iterator[RemotePath]:
        """The files and folders in it."""
        firsts = {name.partition("/")[0] for name in self.store.entries}
        return (self / name for name in sorted(firsts))


def open_share_view(place: StoredFolder, share: Share, tensor_names: Collection[str]) -> StoredFolder:
    """Opens the place that a share writes to; `tensor_names` are those of its tensor files."""
    names = ShareNames(name_share_folder(share), frozenset(tensor_names))
    folder = SharePath(ShareListing(place.folder.store, names), whole=place.folder, names=names)
    return StoredFolder(folder, ShareStore(place.store, names))
