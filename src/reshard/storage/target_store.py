"""A folder in a store as its writer sees it: whole objects, and large ones that are uploaded in parts."""

from collections.abc import Iterable, Mapping, Sequence
from typing import NamedTuple, Protocol

from reshard.paths import Entry


class UploadLimits(NamedTuple):
    """What a store allows of an upload in parts."""

    least_part: int
    """In bytes; the last part may be smaller."""
    most_part: int
    """In bytes."""
    most_parts: int
    """Of one object."""
    largest: int
    """In bytes, of an object."""


class UploadedPart(NamedTuple):
    """A part that a store has."""

    etag: str
    size: int
    """In bytes."""


class TargetStore(Protocol):
    """A folder in a store that is written to. Every method raises Refused if the store does not do it in the end,
    Stopped as soon as the thread is to end; what may pass is tried again inside.
    """

    @property
    def address(self) -> str:
        """For people and messages; without anything secret."""

    def locate(self, name: str) -> str:
        """The address of an object, for messages."""

    @property
    def keeps_parts(self) -> bool:
        """Whether each part is durable once it is put, can be listed after a crash, and may be put in any order. If
        not, an object is uploaded as a stream: a part waits until those before it are put, and only a whole object is
        durable.
        """

    @property
    def limits(self) -> UploadLimits:
        """What the store allows."""

    def list_entries(self) -> Mapping[str, Entry]:
        """Lists the objects in the folder and the folders in it, by name, as they are now."""

    def get(self, name: str) -> bytes | None:
        """All of a small object as it is now; None if there is none."""

    def put(self, name: str, content: bytes) -> str:
        """Writes a small object whole, in the place of one of that name. Returns its ETag."""

    def put_new(self, name: str, content: bytes) -> bool:
        """Writes a small object whole unless there is one of that name. Returns whether it was written."""

    def remove(self, names: Iterable[str]) -> None:
        """Removes objects; those that are not there too."""

    def begin_upload(self, name: str) -> str:
        """Begins the upload of an object, which appears when it is completed. Returns the upload's name, empty where
        the store keeps no parts.
        """

    def put_part(self, name: str, upload: str, number: int, data: memoryview) -> str:
        """Uploads a part, numbered from 1 on. Returns its ETag; empty where the store keeps no parts. Raises
        NoSuchUploadError.
        """

    def list_parts(self, name: str, upload: str) -> Mapping[int, UploadedPart] | None:
        """Lists the parts of an upload by number; None if there is no such upload (any more)."""

    def complete_upload(self, name: str, upload: str, etags: Sequence[str]) -> str:
        """Makes an object of all its parts, by their ETags in order. Returns its ETag. Raises NoSuchUploadError."""

    def abort_upload(self, name: str, upload: str) -> None:
        """Throws an upload away; one that is not there too."""


class NoSuchUploadError(Exception):
    """An upload is not there any more: another run has completed or aborted it."""
