"""Whole objects in a folder of a bucket, by obstore: listed, read, written and removed."""

from collections.abc import Callable, Coroutine, Iterable, Mapping
from typing import Any, TypeVar

from reshard.errors import Refused, refuse
from reshard.paths import Entry
from reshard.storage.access_hints import suggest_rights
from reshard.storage.buckets import list_bucket, quote_etag, run_in_store
from reshard.storage.range_requests import Denied
from reshard.storage.remote_store import THREADS_OF_STORE, Failed, Patience, has_plain_parts
from reshard.storage.resources import map_in_threads

Done = TypeVar("Done")


class WholeObjects:
    """A folder of a bucket. Every method raises Refused if the store does not do it in the end, and Stopped."""

    def __init__(self, address: str, bucket: Any, prefix: str) -> None:
        """`bucket` is a client of obstore. `prefix` ends with a slash, or is empty for all of the bucket."""
        self.address = address
        self._bucket, self._prefix = bucket, prefix

    def locate(self, name: str) -> str:
        """The address of an object. See `TargetStore`."""
        return f"{self.address}/{name}"

    def list_entries(self) -> Mapping[str, Entry]:
        """Lists the objects. See `TargetStore`."""
        found = self._ask("", lambda _: list_bucket(self._bucket, self._prefix, self.address))
        return {entry.name: entry for entry in found or () if has_plain_parts(entry.name)}

    def get(self, name: str) -> bytes | None:
        """All of a small object. See `TargetStore`."""
        return self._ask(name, lambda _: get_object(self._bucket, self._prefix + name))

    def put(self, name: str, content: bytes) -> str:
        """Writes a small object. See `TargetStore`."""
        etag = self._ask(name, lambda _: put_object(self._bucket, self._prefix + name, content))
        if etag is None:
            raise refuse_missing_bucket(self.address)
        return etag

    def put_new(self, name: str, content: bytes) -> bool:
        """Writes a small object that is not there. See `TargetStore`."""
        is_written = self._ask(
            name, lambda is_again: put_new_object(self._bucket, self._prefix + name, content, is_again)
        )
        if is_written is None:
            raise refuse_missing_bucket(self.address)
        return is_written

    def remove(self, names: Iterable[str]) -> None:
        """Removes objects. See `TargetStore`."""
        chosen = list(names)
        if chosen:
            map_in_threads(self._remove, chosen, THREADS_OF_STORE)

    def _remove(self, name: str) -> None:
        self._ask(name, lambda _: delete_object(self._bucket, self._prefix + name))

    def _ask(self, name: str, ask: Callable[[bool], Coroutine[Any, Any, Done]]) -> Done | None:
        """Asks until an answer comes; None if it is that there is no such thing. `ask` is told whether it was asked
        before.
        """
        subject = self.locate(name) if name else self.address
        patience, is_again = Patience(subject, is_write=True), False
        while True:
            try:
                return run_in_store(ask(is_again))
            except FileNotFoundError:
                return None
            except Denied as denied:
                remedy = suggest_rights(self.address.partition(":")[0], str(denied))
                raise refuse("no-access", subject, str(denied), "a bucket that we may write to", remedy) from None
            except Failed as failed:
                patience.wait(failed)
            is_again = True


def refuse_missing_bucket(address: str) -> Refused:
    """The refusal of a target in a bucket that is not there."""
    return refuse("no-target", address, "no such bucket", "a bucket", "make it first, or correct its name")


async def get_object(bucket: Any, key: str) -> bytes:
    """All of an object. Raises Failed if it is cut off."""
    import obstore  # noqa: PLC0415 - only who asks a bucket needs it

    answer = await obstore.get_async(bucket, key)
    content = bytes(await answer.bytes_async())
    if len(content) != answer.meta["size"]:
        raise Failed("its answer was cut off")
    return content


async def put_object(bucket: Any, key: str, content: bytes) -> str:
    """Writes an object in one request, and returns its ETag."""
    import obstore  # noqa: PLC0415

    return quote_etag((await obstore.put_async(bucket, key, content, use_multipart=False))["e_tag"])


async def put_new_object(bucket: Any, key: str, content: bytes, is_again: bool) -> bool:  # noqa: FBT001
    """Writes an object unless there is one. Returns whether it was written: if an answer was lost, by us before."""
    import obstore  # noqa: PLC0415

    try:
        await obstore.put_async(bucket, key, content, mode="create")
    except (obstore.exceptions.AlreadyExistsError, obstore.exceptions.PreconditionError):
        return is_again and await get_object(bucket, key) == content
    return True


async def delete_object(bucket: Any, key: str) -> None:
    """Removes an object. Raises FileNotFoundError, in some stores."""
    import obstore  # noqa: PLC0415

    await obstore.delete_async(bucket, key)
