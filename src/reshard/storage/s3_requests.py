"""Requests to a bucket of S3 that obstore does not make: those of uploads in parts. They are tried again here."""

import re
from collections.abc import Callable, Mapping
from hashlib import sha256
from typing import NamedTuple, TypeVar
from xml.etree import ElementTree as ET

from reshard.errors import refuse
from reshard.storage.access_hints import suggest_rights
from reshard.storage.range_requests import BUSY, PASSING, REDIRECTS, Denied, read_wait
from reshard.storage.remote_store import Failed, Patience
from reshard.storage.resources import wait_unless_stopped
from reshard.storage.s3_signing import S3Access, sign_request
from reshard.storage.target_store import NoSuchUploadError
from reshard.storage.web_client import Answer, WebClient

CODE = re.compile(rb"<Code>([A-Za-z0-9.]{1,60})</Code>")
"""Of an error. Its other words are not shown: they are a stranger's."""

PASSING_CODES = (
    "ConditionalRequestConflict",
    "InternalError",
    "OperationAborted",
    "RequestTimeout",
    "ServiceUnavailable",
    "SlowDown",
)
"""Errors that may be gone a little later, whatever their status."""

DAMAGED_CODES = ("BadDigest", "IncompleteBody", "XAmzContentSHA256Mismatch")
"""What has arrived is not what was sent."""

DENIED_CODES = ("ExpiredToken", "InvalidAccessKeyId", "InvalidToken", "TokenRefreshRequired")

REGION_CODES = ("AuthorizationHeaderMalformed", "PermanentRedirect", "TemporaryRedirect")

REASONS = {
    "ExpiredToken": "the session of the keys has ended (ExpiredToken)",
    "RequestTimeTooSkewed": "the clock of this machine is wrong (RequestTimeTooSkewed)",
}
"""By code: what may be less plain than the code."""

LONGEST_ANSWER = 16 << 20
"""In bytes: a thousand parts are listed in less than one million."""


class S3Answer(NamedTuple):
    """The answer to a request that was done."""

    headers: Mapping[str, str]
    """By name in small letters."""
    content: bytes

    def parse(self) -> ET.Element:
        """Parses its XML; the names are without a namespace then. Raises Failed."""
        try:
            root = ET.fromstring(self.content.strip())  # noqa: S314 - it is short, and expat bounds what entities become
        except ET.ParseError:
            raise Failed("its answer is no XML", is_misanswered=True) from None
        for element in root.iter():
            element.tag = element.tag.rpartition("}")[2]
        return root


Read = TypeVar("Read")


class S3Bucket:
    """A bucket that is asked by signed requests, from any number of threads."""

    def __init__(self, access: S3Access, address: str) -> None:
        """`address` is that of the bucket in messages."""
        self._access, self._address = access, address
        self._client = WebClient()

    def request(
        self,
        method: str,
        key: str,
        query: Mapping[str, str],
        body: bytes | memoryview,
        read: Callable[[S3Answer], Read],
        silent_seconds: float | None = None,
    ) -> Read:
        """Asks until it is done, and returns what is read of the answer. Raises NoSuchUploadError, Stopped, and Refused
        if it is not to be done. `read` may raise Failed.
        """
        subject = f"{self._address}/{key}"
        payload, patience = sha256(body).hexdigest(), Patience(subject, is_write=True)
        while True:
            wait_unless_stopped()
            signed = sign_request(self._access, method, key, query, payload)
            try:
                with self._client.request(method, signed.url, signed.headers, body, silent_seconds) as answer:
                    content = answer.read(LONGEST_ANSWER)
                return read(require_success(answer, content))
            except Failed as failed:
                patience.wait(failed)
            except FileNotFoundError:
                raise refuse("no-target", subject, "no such bucket", "a bucket", "make it first") from None
            except Denied as denied:
                remedy = suggest_rights("s3", str(denied))
                raise refuse("no-access", subject, str(denied), "a bucket that we may write to", remedy) from None
            except NotDoneError as error:
                remedy = "run the same command again; if it ends so again, convert into a folder, and upload that"
                raise refuse(
                    "cannot-write", subject, str(error), "a store that takes uploads in parts", remedy
                ) from None


class NotDoneError(Exception):
    """A store does not do what it is asked for, and will not do it later."""


def require_success(answer: Answer, content: bytes) -> S3Answer:
    """Returns an answer with its body. Raises Failed, Denied, FileNotFoundError for no bucket, NoSuchUploadError, and
    NotDoneError.
    """
    # What takes long begins with 200, and says at its end how it went.
    if answer.status in (200, 204) and b"<Error>" not in content:
        return S3Answer(answer.headers, content)
    found = CODE.search(content)
    raise explain_s3_error(answer.status, found[1].decode() if found else "", read_wait(answer.headers))


def explain_s3_error(status: int, code: str, wait: float | None) -> Exception:
    """The exception for an answer that is no success: its status, its code, and how long it says to wait."""
    reason = REASONS.get(code) or f"the store answers {status}" + (f" {code}" if code else "")
    if code in REGION_CODES or status in REDIRECTS:
        return Denied("the bucket lies in another region: AWS_REGION names it")
    if status in (401, 403) or code in DENIED_CODES:
        return Denied(reason)
    if code == "NoSuchBucket":
        return FileNotFoundError(reason)
    if status == 404 or code == "NoSuchUpload":
        return NoSuchUploadError(reason)
    if status in PASSING or code in PASSING_CODES:
        return Failed(BUSY.get(status, reason), wait)
    if code in DAMAGED_CODES:
        return Failed(f"what it received is not what was sent ({code})", is_misanswered=True)
    return NotDoneError(reason)


def find_field(element: ET.Element, name: str) -> str:
    """Finds a field of an answer. Raises Failed without it."""
    if text := element.findtext(name):
        return text
    raise Failed(f"its answer has no {name}", is_misanswered=True)
