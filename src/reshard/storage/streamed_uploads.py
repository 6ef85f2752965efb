"""Uploads as streams, by obstore, to any bucket: an object appears once it is whole; nothing of it is kept before."""

import asyncio
from collections.abc import AsyncIterator, Awaitable, Coroutine, Sequence
from contextlib import suppress
from datetime import timedelta
from threading import Condition
from typing import Any, TypeVar

from reshard.errors import refuse
from reshard.storage.access_hints import suggest_rights
from reshard.storage.background_loop import start_loop
from reshard.storage.buckets import make_bucket, quote_etag, run_in_store
from reshard.storage.range_requests import Denied
from reshard.storage.remote_store import Failed
from reshard.storage.resources import WAKE_SECONDS, wait_unless_stopped
from reshard.storage.target_store import UploadedPart, UploadLimits
from reshard.storage.whole_objects import WholeObjects

PIECES = 4
"""A part is uploaded in so many pieces, all of which are equally long but for the last of an object."""

LEAST_PIECE = 5 << 20
"""In bytes: what S3 allows."""

AT_ONCE = 2
"""So many pieces of an object are under way at a time. With one that waits, one that is joined and one that is handed
over, that is five: about two parts.
"""

RETRIES: Any = {
    "max_retries": 10,
    "retry_timeout": timedelta(minutes=3),
    "backoff": {"init_backoff": timedelta(seconds=0.5), "max_backoff": timedelta(seconds=20), "base": 2},
}
"""A piece is tried again by obstore: the others before it would be lost with it."""

ABORT_SECONDS = 1.0
"""So long it may take to throw an upload away. What is left of it then has to be removed by a rule of the bucket."""

STREAM_LIMITS = {
    "s3": UploadLimits(16 << 20, 4 << 30, 10_000 // PIECES, 10_000 * (5 << 30)),
    "gs": UploadLimits(16 << 20, 4 << 30, 10_000 // PIECES, 5 << 40),
    "az": UploadLimits(16 << 20, 4 << 30, 50_000 // PIECES, 50_000 * (4000 << 20)),
}
"""By scheme: what these stores document, with parts of which each has so many pieces."""


class AbortedError(Exception):
    """Ends a stream that is thrown away."""


Pieces = asyncio.Queue[bytes | AbortedError | None]
"""What is to be uploaded next, its end, or that it is thrown away."""

Done = TypeVar("Done")


class Stream:
    """An object that is being uploaded."""

    def __init__(self) -> None:
        self.turn = Condition()
        self.following = 1
        """The number of the part whose turn it is."""
        self.pieces: Pieces = asyncio.Queue(1)
        self.piece_size = 0
        """In bytes; 0 before the first part."""
        self.upload: asyncio.Task[str] | None = None

    def require_upload(self) -> asyncio.Task[str]:
        """The upload, once it has begun."""
        if not self.upload:
            raise ValueError("an object has at least one part")
        return self.upload


class StreamedTarget(WholeObjects):
    """A folder of a bucket that is written to by streams. See `TargetStore`."""

    keeps_parts = False

    def __init__(self, address: str, bucket: Any, prefix: str, streaming: Any) -> None:
        """`streaming` is a client of the same bucket that tries again by itself."""
        super().__init__(address, bucket, prefix)
        self._scheme = address.partition(":")[0]
        self._streaming = streaming
        self._streams: dict[str, Stream] = {}
        self._is_patient = True
        self.limits = STREAM_LIMITS[self._scheme]

    def begin_upload(self, name: str) -> str:
        """Begins a stream. See `TargetStore`."""
        self._streams[name] = Stream()
        return ""

    def put_part(self, name: str, upload: str, number: int, data: memoryview) -> str:  # noqa: ARG002
        """Uploads a part when its turn comes. See `TargetStore`."""
        stream = self._streams[name]
        with stream.turn:
            while stream.following != number:
                wait_unless_stopped()
                stream.turn.wait(WAKE_SECONDS)
        if not stream.upload:
            stream.piece_size = max(LEAST_PIECE, -(-len(data) // PIECES))
            self._run(name, self._start(name, stream))
        for begin in range(0, len(data), stream.piece_size):
            # A copy: the caller fills its buffer again while this is under way.
            self._run(name, feed(stream, bytes(data[begin : begin + stream.piece_size])))
        with stream.turn:
            stream.following = number + 1
            stream.turn.notify_all()
        return ""

    def list_parts(self, name: str, upload: str) -> dict[int, UploadedPart] | None:  # noqa: ARG002
        """Lists no parts: none are kept. See `TargetStore`."""
        return None

    def complete_upload(self, name: str, upload: str, etags: Sequence[str]) -> str:  # noqa: ARG002
        """Ends a stream: its object appears. See `TargetStore`."""
        stream = self._streams[name]
        self._run(name, feed(stream, None))
        etag = self._run(name, finish(stream))
        del self._streams[name]
        return etag

    def abort_upload(self, name: str, upload: str) -> None:  # noqa: ARG002
        """Throws a stream away. See `TargetStore`."""
        stream = self._streams.pop(name, None)
        if stream and stream.upload:
            ended = asyncio.run_coroutine_threadsafe(throw_away(stream), start_loop())
            try:
                ended.result(ABORT_SECONDS if self._is_patient else 0)
            except TimeoutError:
                self._is_patient = False  # with many objects: a job that is interrupted ends soon

    async def _start(self, name: str, stream: Stream) -> None:
        """Starts the upload of an object, in the background."""
        import obstore  # noqa: PLC0415 - only who asks a bucket needs it

        options: Any = {"chunk_size": stream.piece_size, "max_concurrency": AT_ONCE, "use_multipart": True}
        work = obstore.put_async(self._streaming, self._prefix + name, take_pieces(stream.pieces), **options)
        stream.upload = asyncio.ensure_future(read_put_etag(work))

    def _run(self, name: str, work: Coroutine[Any, Any, Done]) -> Done:
        """Runs what concerns a stream. Raises Stopped, and Refused: a stream that has failed cannot go on."""
        subject = f"{self.address}/{name}"
        try:
            return run_in_store(work)
        except FileNotFoundError as gone:
            found = str(gone)
        except Failed as failed:
            found = failed.reason
        except Denied as denied:
            remedy = suggest_rights(self._scheme, str(denied))
            raise refuse("no-access", subject, str(denied), "a bucket that we may write to", remedy) from None
        remedy = "run the same command again: objects that are whole stay, this one is uploaded anew"
        raise refuse("cannot-write", subject, found, "an upload to its end", remedy)


def make_streaming_bucket(scheme: str, name: str, address: str) -> Any:
    """Makes the client of a bucket that streams are written by. Raises Refused."""
    return make_bucket(scheme, name, address, RETRIES)


async def take_pieces(pieces: Pieces) -> AsyncIterator[bytes]:
    """The pieces of a stream. Raises AbortedError if it is thrown away: obstore throws the upload away then."""
    while (piece := await pieces.get()) is not None:
        if isinstance(piece, AbortedError):
            raise piece
        yield piece


async def read_put_etag(work: Awaitable[Any]) -> str:
    """The ETag of an object, once it is whole."""
    return quote_etag((await work)["e_tag"])


async def feed(stream: Stream, piece: bytes | AbortedError | None) -> None:
    """Hands a piece over as soon as there is room, or the end. Raises what has ended the upload."""
    upload = stream.require_upload()
    putting = asyncio.ensure_future(stream.pieces.put(piece))
    await asyncio.wait((putting, upload), return_when=asyncio.FIRST_COMPLETED)
    if not putting.done():
        putting.cancel()
        upload.result()


async def finish(stream: Stream) -> str:
    """The ETag of an object whose end was handed over. Raises what has ended the upload."""
    return await asyncio.shield(stream.require_upload())


async def throw_away(stream: Stream) -> None:
    """Waits until an upload has ended, well or not."""
    while not stream.pieces.empty():
        stream.pieces.get_nowait()
    with suppress(Exception):
        await feed(stream, AbortedError())
        await finish(stream)
