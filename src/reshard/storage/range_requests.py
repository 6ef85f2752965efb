"""Ranges of files by HTTP: what a server answers, and what that means."""

import re
from base64 import b64encode
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from email.utils import parsedate_to_datetime
from time import time
from typing import NamedTuple
from urllib.parse import SplitResult, unquote, urljoin, urlsplit

from reshard.errors import refuse
from reshard.storage.remote_store import Failed
from reshard.storage.web_addresses import split_address
from reshard.storage.web_client import Answer, WebClient

PASSING = (408, 425, 429, 500, 502, 503, 504, 509, 520, 521, 522, 523, 524)
"""Answers that may be others a little later."""

REDIRECTS = (301, 302, 303, 307, 308)

MOST_REDIRECTS = 5

RANGE = re.compile(r"bytes (\d{1,19})-(\d{1,19})/(\d{1,19}|\*)")

RATE_LIMIT = re.compile(r'(?:^|[;,\s"])r=0;t=(\d{1,9})')
"""In the header `RateLimit`: nothing remains, and in so many seconds it begins anew."""

CODINGS = ("gzip", "x-gzip", "deflate", "compress", "br", "zstd")
"""What a body must not be coded by: none of them is asked for."""

BUSY = {429: "its quota of requests is used up (429)", 503: "the server is busy (503)"}


class Denied(Exception):
    """The server does not let us read at this address: 401, 403, or another address by now."""


class ReadRange(NamedTuple):
    """What has come of a range."""

    received: int
    """In bytes."""
    etag: str
    """Of the file; empty if the server tells none."""
    size: int
    """Of the whole file, in bytes; -1 if the server does not tell."""


@contextmanager
def request_range(
    client: WebClient, url: str, offset: int, size: int, headers: Mapping[str, str] | None = None
) -> Iterator[Answer]:
    """A context with the answer to a request for `size` bytes from a byte offset on. Raises Failed."""
    wanted = {"range": f"bytes={offset}-{offset + size - 1}", "accept-encoding": "identity", **(headers or {})}
    with client.request("GET", url, wanted) as answer:
        yield answer


def receive_range(answer: Answer, offset: int, buffer: memoryview) -> ReadRange:
    """Takes the bytes of a range from an answer into a buffer: as many as have come. A whole file in the place of a
    range is taken only if it is the range. Raises Failed, Denied, and FileNotFoundError.
    """
    etag, coding = answer.headers.get("etag", ""), answer.headers.get("content-encoding", "").lower()
    if answer.status in (200, 206) and coding in CODINGS:
        raise Failed(f"it sent the bytes coded by {coding}", is_misanswered=True)
    if answer.status == 206:
        found = RANGE.fullmatch(answer.headers.get("content-range", ""))
        if not found or int(found[1]) != offset or not offset <= int(found[2]) < offset + len(buffer):
            told = answer.headers.get("content-range", "no range")
            raise Failed(f"it sent {told} for bytes {offset}-{offset + len(buffer) - 1}", is_misanswered=True)
        count = answer.read_into(buffer[: int(found[2]) + 1 - offset])
        return ReadRange(count, etag, -1 if found[3] == "*" else int(found[3]))
    if answer.status == 200:
        length = answer.headers.get("content-length", "")
        if offset or not length.isdecimal() or int(length) > len(buffer):
            raise Failed("it sent the whole file (200) for a range of it (206)", is_misanswered=True)
        return ReadRange(answer.read_into(buffer[: int(length)]), etag, int(length))
    raise explain_status(answer)


def explain_status(answer: Answer) -> Exception:
    """The exception for an answer that is no success: FileNotFoundError, Denied or Failed. Its short body is read, so
    that the connection is used again.
    """
    if answer.headers.get("content-length", "").isdecimal() and int(answer.headers["content-length"]) < 64 << 10:
        answer.read()
    status = answer.status
    if status in (404, 410, 412, 416):
        return FileNotFoundError(status, f"the server answers {status}")
    if status in (401, 403, *REDIRECTS):  # who follows redirects does so before
        return Denied(answer.headers.get("x-error-code") or f"the server answers {status}")
    wait = read_wait(answer.headers)
    return Failed(BUSY.get(status, f"the server answers {status}"), wait, is_misanswered=status not in PASSING)


def read_wait(headers: Mapping[str, str]) -> float | None:
    """The time to wait that a server tells, in seconds; None if it tells none."""
    after = headers.get("retry-after", "").strip()
    if after.isdecimal():
        return float(after[:9])
    if after:
        try:
            return max(0.0, parsedate_to_datetime(after).timestamp() - time())
        except (ValueError, OverflowError):
            return None
    found = RATE_LIMIT.search(headers.get("ratelimit", ""))
    return float(found[1]) + 1 if found else None


def find_redirect(answer: Answer, url: str) -> str | None:
    """The address that an answer leads to; None if it is no redirect. Raises Refused for one from a protected address
    to one that is not.
    """
    to = answer.headers.get("location")
    if answer.status not in REDIRECTS or not to:
        return None
    answer.read()
    found = join_addresses(url, to)
    before, after = urlsplit(url), urlsplit(found)
    if after.scheme not in ("http", "https") or (before.scheme, after.scheme) == ("https", "http"):
        host = f"{before.scheme}://{before.hostname}"
        raise refuse("wrong-answer", host, f"it leads to an address of {after.scheme}:", "an address of https:")
    return found


def join_addresses(url: str, to: str) -> str:
    """The address that a server leads to. Raises Failed if it is none."""
    try:
        found = urljoin(url, to)
        split_address(found)
    except ValueError:
        raise Failed("it leads to what is no address", is_misanswered=True) from None
    return found


def is_same_server(one: str, other: str) -> bool:
    """Whether two addresses are of the same server, so that what is secret may be sent to both."""
    first, second = urlsplit(one), urlsplit(other)
    return (first.scheme, first.hostname, first.port) == (second.scheme, second.hostname, second.port)


def make_basic_header(place: SplitResult) -> dict[str, str]:
    """The header with the name and the password of an address, if it has them."""
    if not place.username:
        return {}
    pair = f"{unquote(place.username)}:{unquote(place.password or '')}"
    return {"authorization": f"Basic {b64encode(pair.encode()).decode()}"}
