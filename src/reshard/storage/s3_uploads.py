"""Uploads in parts to S3: each part is durable once it is put, and a run after a crash can list them."""

from collections.abc import Mapping, Sequence
from typing import Any
from xml.sax.saxutils import escape

from reshard.errors import refuse
from reshard.storage.buckets import quote_etag
from reshard.storage.remote_store import Failed
from reshard.storage.s3_requests import S3Answer, S3Bucket, find_field
from reshard.storage.s3_signing import S3Access
from reshard.storage.target_store import NoSuchUploadError, UploadedPart, UploadLimits
from reshard.storage.whole_objects import WholeObjects

S3_LIMITS = UploadLimits(least_part=5 << 20, most_part=5 << 30, most_parts=10_000, largest=10_000 * (5 << 30))
"""As Amazon documents them."""

LISTED_AT_ONCE = "1000"
"""Parts: as many as a store lists at a time at most."""

COMPLETE_SECONDS = 600.0
"""So long a store may take to make an object of its parts, without a byte."""


class PartedTarget(WholeObjects):
    """A folder of a bucket of S3 that is written to in parts. See `TargetStore`."""

    keeps_parts = True
    limits = S3_LIMITS

    def __init__(self, address: str, bucket: Any, prefix: str, access: S3Access) -> None:
        super().__init__(address, bucket, prefix)
        self._uploads = S3Bucket(access, address.removesuffix(f"/{prefix.rstrip('/')}") if prefix else address)

    def begin_upload(self, name: str) -> str:
        """Begins an upload. See `TargetStore`."""
        try:
            return self._uploads.request("POST", self._prefix + name, {"uploads": ""}, b"", read_upload)
        except NoSuchUploadError as error:
            expected, remedy = "a store that takes uploads in parts", "convert into a folder, and upload that"
            raise refuse("cannot-write", f"{self.address}/{name}", str(error), expected, remedy) from None

    def put_part(self, name: str, upload: str, number: int, data: memoryview) -> str:
        """Uploads a part. See `TargetStore`."""
        query = {"partNumber": str(number), "uploadId": upload}
        return self._uploads.request("PUT", self._prefix + name, query, data, read_etag)

    def list_parts(self, name: str, upload: str) -> Mapping[int, UploadedPart] | None:
        """Lists parts. See `TargetStore`."""
        found: dict[int, UploadedPart] = {}
        query, is_more = {"uploadId": upload, "max-parts": LISTED_AT_ONCE}, True
        while is_more:
            try:
                listed, is_more = self._uploads.request("GET", self._prefix + name, query, b"", read_parts)
            except NoSuchUploadError:
                return None
            is_more &= not listed.keys() <= found.keys()  # the same again, and again, from a server that cannot count
            found |= listed
            query["part-number-marker"] = str(max(found, default=0))
        return found

    def complete_upload(self, name: str, upload: str, etags: Sequence[str]) -> str:
        """Makes an object of its parts. See `TargetStore`."""
        parts = "".join(
            f"<Part><PartNumber>{number}</PartNumber><ETag>{escape(etag)}</ETag></Part>"
            for number, etag in enumerate(etags, 1)
        )
        body = f"<CompleteMultipartUpload>{parts}</CompleteMultipartUpload>".encode()
        key, query = self._prefix + name, {"uploadId": upload}
        return self._uploads.request("POST", key, query, body, read_completed, COMPLETE_SECONDS)

    def abort_upload(self, name: str, upload: str) -> None:
        """Throws an upload away. See `TargetStore`."""
        try:
            self._uploads.request("DELETE", self._prefix + name, {"uploadId": upload}, b"", lambda _: None)
        except NoSuchUploadError:
            return


def read_upload(answer: S3Answer) -> str:
    """The name of an upload that was begun. Raises Failed."""
    return find_field(answer.parse(), "UploadId")


def read_etag(answer: S3Answer) -> str:
    """The ETag of a part. Raises Failed."""
    if etag := answer.headers.get("etag"):
        return quote_etag(etag)
    raise Failed("its answer has no ETag", is_misanswered=True)


def read_completed(answer: S3Answer) -> str:
    """The ETag of a whole object. Raises Failed."""
    return quote_etag(find_field(answer.parse(), "ETag"))


def read_parts(answer: S3Answer) -> tuple[dict[int, UploadedPart], bool]:
    """The parts in an answer by number, and whether there are more. Raises Failed."""
    root, found = answer.parse(), dict[int, UploadedPart]()
    for part in root.iterfind("Part"):
        number, size = find_field(part, "PartNumber"), find_field(part, "Size")
        if not (number.isdecimal() and size.isdecimal()):
            raise Failed("its answer has a number that is none", is_misanswered=True)
        found[int(number)] = UploadedPart(quote_etag(find_field(part, "ETag")), int(size))
    return found, root.findtext("IsTruncated") == "true"
