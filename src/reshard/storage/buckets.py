"""Folders of buckets (`s3://`, `gs://`, `az://`), by the package obstore, which knows their keys and signatures."""

import os
import re
from collections.abc import Coroutine, Mapping
from contextlib import suppress
from datetime import timedelta
from typing import Any, TypeVar

from reshard.errors import refuse
from reshard.paths import Entry, RemotePath
from reshard.storage.access_hints import KEYS_OF, NO_KEYS, find_endpoint, suggest_keys, suggest_server
from reshard.storage.aws_profile import ENDPOINTS, read_aws_profile
from reshard.storage.background_loop import run_unless_stopped
from reshard.storage.counting import RECEIVED
from reshard.storage.range_requests import PASSING, Denied
from reshard.storage.remote_store import (
    Failed,
    ListedStore,
    has_plain_parts,
    refuse_changed_entry,
    try_again,
)
from reshard.storage.web_addresses import split_address

CHUNK_SIZE = 128 << 10
"""In bytes: so much is taken from a body at a time. What has come of it is lost if the connection breaks."""

CLIENT: Any = {
    "allow_http": True,  # where the endpoint says so
    "connect_timeout": timedelta(seconds=10),
    "read_timeout": timedelta(seconds=30),
    "timeout": timedelta(minutes=10),
    "user_agent": "reshard",
}

NO_RETRIES: Any = {"max_retries": 0, "retry_timeout": timedelta(seconds=1)}
"""What fails is tried again here, and waits are told."""

HOST = re.compile(r"[A-Za-z0-9.-]+(?::\d{1,5})?/?")
"""A server without the scheme of its address."""

LONGEST_REASON = 160
"""In characters: an error of a store may have a page of XML."""

STATUS = re.compile(r"status code: (\d{3})")

NOISE = re.compile(
    r"(?:Generic \w+ error: )?(?:Error performing list request: )?(?:Error performing \w+ \S+ in \S+ - )?"
)
"""So an error of obstore begins. Its address and time make a line of each, where one is enough."""

CAUSE = re.compile(r'(?:message|error): "([^"]+)"')

CODE = re.compile(r"<Code>([A-Za-z0-9.]{1,60})</Code>")
"""Of an error of a store. Its other words are not shown: they are a stranger's."""

ODD_KEY = "object with invalid path"
"""In the error of obstore for a key with an empty part, or with `..`, which it names."""

OTHER_RANGE = ("NotPartial", "UnexpectedRange")

VALUES = (
    "AWS_ACCESS_KEY_ID",
    "AWS_SECRET_ACCESS_KEY",
    "AWS_SESSION_TOKEN",
    "AWS_TOKEN",
    *(name for name, _ in ENDPOINTS),
)
"""Variables whose value obstore does not look at before it panics."""

EXPLAINED: tuple[tuple[tuple[str, ...], type[Exception], str], ...] = (
    (("169.254.169.254", "metadata.google"), Denied, NO_KEYS),
    (("ExpiredToken",), Denied, "the session of the keys has ended (ExpiredToken)"),
    (("NoSuchBucket", "ContainerNotFound"), FileNotFoundError, "no such bucket"),
    (
        ("PermanentRedirect", "AuthorizationHeaderMalformed", "status code: 301"),
        Denied,
        "the bucket lies in another region: AWS_REGION names it",
    ),
    (("InvalidMessage(",), Failed, "the server does not speak TLS: is it http:// in the place of https://?"),
    (("InvalidCertificate(",), Failed, "its certificate is not trusted; SSL_CERT_FILE names those to trust"),
)
"""Words in the errors of stores, and what they mean."""

Given = TypeVar("Given")


class BucketStore(ListedStore):
    """A folder of a bucket."""

    def __init__(self, scheme: str, address: str, bucket: Any, prefix: str, entries: list[Entry]) -> None:
        super().__init__(address, entries)
        self._scheme, self._bucket, self._prefix = scheme, bucket, prefix
        self._process = os.getpid()

    def fetch(self, entry: Entry, offset: int, buffer: memoryview) -> int:
        """Asks for a range of this version. See `ListedStore`."""
        subject = f"{self.address}/{entry.name}"
        if os.getpid() != self._process:  # obstore would wait for threads that only the other process has
            found, expected = (
                "this process was forked from the one that has opened it",
                "a process that opens it itself",
            )
            remedy = "start processes by spawn (of a DataLoader: multiprocessing_context='spawn')"
            raise refuse("cannot-read", self.address, found, expected, remedy)
        try:
            return run_in_store(self._receive(entry, offset, buffer))
        except FileNotFoundError as gone:
            raise refuse_changed_entry(self, entry, str(gone)) from None
        except Denied as denied:
            remedy = suggest_keys(self._scheme, str(denied))
            raise refuse("no-access", subject, str(denied), "a file that we may read", remedy) from None

    async def _receive(self, entry: Entry, offset: int, buffer: memoryview) -> int:
        import obstore  # noqa: PLC0415 - only who reads a bucket needs it

        pinned = {"if_match": entry.version} if entry.version else {}
        options: Any = {"range": (offset, offset + len(buffer)), **pinned}
        answer = await obstore.get_async(self._bucket, self._prefix + entry.name, options=options)
        if answer.meta["size"] != entry.size or quote_etag(answer.meta["e_tag"]) != entry.version:
            raise FileNotFoundError("another version by now")
        if answer.range[0] != offset:
            raise Failed(f"it sent bytes from {answer.range[0]} on in the place of {offset}", is_misanswered=True)
        done = 0
        try:
            async for chunk in answer.stream(min_chunk_size=CHUNK_SIZE):
                taken = memoryview(chunk)[: len(buffer) - done]
                buffer[done : done + len(taken)] = taken
                done += len(taken)
                RECEIVED.add(len(taken))
        except obstore.exceptions.BaseError:
            if not done:
                raise
        return done


def run_in_store(work: Coroutine[Any, Any, Given]) -> Given:
    """Runs what asks a store. Raises Failed, Denied, FileNotFoundError for what is not there or of another version."""
    import obstore  # noqa: PLC0415

    problems = obstore.exceptions
    try:
        return run_unless_stopped(work)
    except FileNotFoundError as error:
        raise FileNotFoundError(shorten_reason(error)) from None
    except problems.PreconditionError:
        raise FileNotFoundError("another version by now") from None
    except (problems.PermissionDeniedError, problems.UnauthenticatedError) as error:
        raise explain_store_error(str(error), Denied) from None
    except (problems.BaseError, OSError, ValueError) as error:
        raise explain_store_error(str(error)) from None
    except Exception as error:
        if type(error).__name__ != "RustPanic":
            raise
        raise Denied("its package obstore has failed: a key or an address in the environment is none") from None


def explain_store_error(text: str, otherwise: type[Exception] = Failed) -> Exception:
    """The exception for an error of obstore, by its text: Denied, FileNotFoundError, Failed."""
    for words, kind, reason in EXPLAINED:
        if any(word in text for word in words):
            return kind(reason)
    if any(word in text for word in OTHER_RANGE):
        return Failed("it sent the whole file, or another range of it, for a range", is_misanswered=True)
    status, code = STATUS.search(text), CODE.search(text)
    answer = f"the server answers {status[1] if status else ''}" + (f" {code[1]}" if code else "")
    if status and status[1] in ("401", "403"):
        return Denied(answer)
    if status:
        return Failed(answer, is_misanswered=int(status[1]) not in (*PASSING, 409))
    return otherwise(shorten_reason(text))


def shorten_reason(error: Exception | str) -> str:
    """The reason of a store's error in one line, without what is secret in an address: its query, its password."""
    told, _, source = str(error).partition("Debug source:")
    causes = [cause for cause in CAUSE.findall(source)[-1:] if cause not in told]
    text = ": ".join([NOISE.sub("", told.strip(), count=1), *causes])
    text = re.sub(r"//[^/@\s]*@", "//", re.sub(r"\?[^\s\"')]+", "?...", text))
    text = " ".join(text.split())
    return text if len(text) <= LONGEST_REASON else text[:LONGEST_REASON] + "..."


def open_bucket(scheme: str, rest: str) -> RemotePath:
    """Opens a folder of a bucket, or a safetensors file in one, and lists the folder. Raises Refused."""
    name, _, inner = rest.strip("/").partition("/")
    address = f"{scheme}://{name}" + (f"/{inner}" if inner else "")
    if not name or not has_plain_parts(inner or name):
        raise refuse("no-source", address, "no name of a folder", f"{scheme}://BUCKET/FOLDER", "is the address right?")
    file = ""
    if inner.endswith(".safetensors"):
        inner, _, file = inner.rpartition("/")
    prefix, bucket = f"{inner}/" if inner else "", make_bucket(scheme, name, address)
    try:
        entries = try_again(address, lambda: run_in_store(list_bucket(bucket, prefix, address)), suggest_server(scheme))
    except FileNotFoundError:
        raise refuse("no-source", address, "no such bucket", "a bucket", "is its name right?") from None
    except Denied as denied:
        remedy = suggest_keys(scheme, str(denied))
        raise refuse("no-access", address, str(denied), "a bucket that we may read", remedy) from None
    if not entries:
        remedy = "is the address right?" + (f" it is asked at {server}" if (server := find_endpoint(scheme)) else "")
        raise refuse("no-source", address, "nothing lies there", "a folder of a bucket", remedy)
    folder = f"{scheme}://{name}" + (f"/{inner}" if inner else "")
    return RemotePath(BucketStore(scheme, folder, bucket, prefix, entries), file)


def make_bucket(scheme: str, name: str, address: str, retries: Any = NO_RETRIES) -> Any:
    """Makes the client of a bucket, with keys and endpoint of the environment. Raises Refused."""
    try:
        import obstore.store  # noqa: PLC0415
    except ImportError:
        found, expected = "the package obstore is not installed", "reshard with its extra `remote`"
        raise refuse("missing-package", address, found, expected, "pip install 'reshard[remote]'") from None
    profile = read_aws_profile() if scheme == "s3" else {}
    require_plain_values({name: os.environ.get(name, "") for name in VALUES} | profile)
    # Not all servers that speak S3 remove many objects at once; and there are never many of ours.
    options: Any = {"disable_bulk_delete": True, **profile} if scheme == "s3" else {}
    try:
        return obstore.store.from_url(f"{scheme}://{name}", client_options=CLIENT, retry_config=retries, **options)
    except (obstore.exceptions.BaseError, ValueError) as error:
        remedy = f"are the keys right? {KEYS_OF[scheme]}"
        raise refuse("no-access", address, shorten_reason(error), "a bucket", remedy) from None


def require_plain_values(values: Mapping[str, str]) -> None:
    """Raises Refused for a key with characters that none has, and for an endpoint that is no address."""
    for name, value in values.items():
        is_right = value.isascii() and value.isprintable()
        if value and "endpoint" in name.lower():
            require_endpoint(name, value)
        if not is_right:  # the value may be secret
            found, expected = "characters that it cannot have", "as the store's own programs take it"
            raise refuse("no-access", name, found, expected, "copy it anew")


def require_endpoint(name: str, value: str) -> None:
    """Raises Refused for an endpoint that is no address of a server, or whose `http://` is lacking."""
    with suppress(ValueError):
        if split_address(value).scheme in ("http", "https"):
            return
    remedy = "copy it anew"
    if HOST.fullmatch(value):  # any other may have a password
        remedy = f"write {name}=https://{value}, or http://{value} where the server speaks no TLS"
    raise refuse("no-access", name, "no address of a server", "https://HOST:PORT or http://HOST:PORT", remedy)


async def list_bucket(bucket: Any, prefix: str, address: str) -> list[Entry]:
    """Lists the files of a folder of a bucket, and of the folders in it. Raises Refused for a key that obstore lists
    nothing beside.
    """
    import obstore  # noqa: PLC0415

    try:
        found = await obstore.list(bucket, prefix or None).collect_async()
    except obstore.exceptions.BaseError as error:
        if ODD_KEY not in str(error):
            raise
        expected, remedy = "keys without empty parts, `.` and `..`", "move that object elsewhere; or another folder"
        raise refuse("wrong-name", address, shorten_reason(error), expected, remedy) from None
    return [make_bucket_entry(item, prefix) for item in found if item["path"].startswith(prefix)]


def quote_etag(etag: str | None) -> str:
    """An ETag in quotes: Azure leaves them out where it lists files. Empty without one."""
    return f'"{etag.strip(chr(34))}"' if etag else ""


def make_bucket_entry(item: Mapping[str, Any], prefix: str) -> Entry:
    """Makes an entry of a listed object."""
    return Entry(item["path"].removeprefix(prefix), item["size"], quote_etag(item["e_tag"]))
