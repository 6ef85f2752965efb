"""A small S3 server of our own that is written to: it checks signatures and payloads, and has faults.

It keeps one bucket, `models`, in memory, and knows nothing of the package.
"""

import hashlib
import hmac
import re
import ssl
import threading
import time
from collections import Counter
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from datetime import UTC, datetime
from http.server import BaseHTTPRequestHandler
from pathlib import Path
from typing import Any, NamedTuple
from urllib.parse import parse_qsl, quote, unquote, urlsplit
from xml.etree import ElementTree as ET
from xml.sax.saxutils import escape

import pytest
from store_servers import Server

BUCKET = "models"
KEY, SECRET = "AKIAEXAMPLE", "wJalrSECRETsecret"

SIGNATURE = re.compile(
    r"AWS4-HMAC-SHA256 Credential=([^/]+)/(\d{8})/([\w-]+)/s3/aws4_request, ?"
    r"SignedHeaders=([\w;-]+), ?Signature=(\w{64})"
)

FAULTS = {
    "busy": "503 SlowDown, with the server's Retry-After",
    "busy-early": "the same before the body is read; the connection is closed then",
    "broken": "the connection is closed in the middle of the body that comes",
    "flipped": "a bit of the body that comes is another one",
    "lost": "it is done, and the connection is closed without an answer",
    "cut": "the answer ends in its middle",
    "delayed": "it takes a second",
    "silent": "no answer comes",
    "denied": "403 AccessDenied",
    "expired": "400 ExpiredToken",
    "no-upload": "404 NoSuchUpload",
    "no-bucket": "404 NoSuchBucket",
    "not-implemented": "501 NotImplemented",
    "error-in-200": "200, and in its body InternalError",
    "no-xml": "200 with a page",
}


class Stored(NamedTuple):
    content: bytes
    etag: str
    """With quotes."""


class S3Request(NamedTuple):
    operation: str
    key: str
    status: int
    """0 if the connection was closed in its place."""
    size: int
    """Of the body, in bytes."""


@dataclass
class Upload:
    key: str
    parts: dict[int, Stored] = field(default_factory=dict)


@dataclass
class S3State:
    """What the server has, what was asked of it, and the faults that are to come."""

    key: str = KEY
    secret: str = SECRET
    token: str = ""
    """Of a session, if it is not empty."""
    least_part: int = 5 << 20
    """In bytes."""
    page: int = 1000
    """So many objects or parts are listed at a time."""
    retry_after: str = ""
    is_virtual: bool = False
    """Whether the address of the bucket has no path."""
    certificate: Path | None = None
    endpoint: str = ""
    objects: dict[str, Stored] = field(default_factory=dict)
    uploads: dict[str, Upload] = field(default_factory=dict)
    requests: list[S3Request] = field(default_factory=list)
    faults: Counter[tuple[str, str]] = field(default_factory=Counter)
    """How many of the next requests of an operation are to fail, by operation and fault."""
    lock: threading.RLock = field(default_factory=threading.RLock)
    ended: threading.Event = field(default_factory=threading.Event)

    def fails(self, operation: str, fault: str) -> bool:
        assert fault in FAULTS
        with self.lock:
            self.faults[operation, fault] -= 1
            return self.faults[operation, fault] >= 0

    def count(self, operation: str, status: int | None = None) -> int:
        return sum(one.operation == operation and status in (None, one.status) for one in self.requests)

    def read_folder(self, prefix: str) -> dict[str, bytes]:
        """What lies in a folder, by name."""
        return {key[len(prefix) :]: one.content for key, one in self.objects.items() if key.startswith(prefix)}


def make_etag(content: bytes) -> str:
    return f'"{hashlib.md5(content, usedforsecurity=False).hexdigest()}"'


class Refusal(Exception):
    """An answer that is no success."""

    def __init__(self, status: int, code: str) -> None:
        super().__init__(status, code)
        self.status, self.code = status, code


class S3Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    disable_nagle_algorithm = True
    state: S3State

    def log_message(self, *_: Any) -> None:
        pass

    def handle_request(self) -> None:
        place = urlsplit(self.path)
        self.query = dict(parse_qsl(place.query, keep_blank_values=True))
        path = unquote(place.path).lstrip("/")
        self.bucket, _, self.name = (BUCKET, "", path) if self.state.is_virtual else path.partition("/")
        self.operation = self.find_operation()
        self.body = b""
        try:
            self.serve()
        except (BrokenPipeError, ConnectionResetError, ssl.SSLError):
            self.close_connection = True

    do_GET = do_HEAD = do_PUT = do_POST = do_DELETE = handle_request  # noqa: N815 - names of the standard library

    def find_operation(self) -> str:
        if "uploadId" in self.query:
            return {"PUT": "put_part", "GET": "list_parts", "POST": "complete", "DELETE": "abort"}[self.command]
        if "uploads" in self.query:
            return "begin" if self.command == "POST" else "list_uploads"
        if not self.name:
            return "list"
        return self.command.lower()

    def serve(self) -> None:
        fails = self.state.fails
        if fails(self.operation, "busy-early"):
            self.close_connection = True
            return self.refuse(503, "SlowDown")
        if fails(self.operation, "silent"):
            return self.hang_up(60)
        if not self.receive():
            return self.hang_up()
        if fails(self.operation, "delayed"):
            self.state.ended.wait(1)
        try:
            self.check_faults()
            self.check_signature()
            self.check_bucket()
            with self.state.lock:
                answer = getattr(self, self.operation)()
        except Refusal as refusal:
            return self.refuse(refusal.status, refusal.code)
        if fails(self.operation, "lost"):
            return self.hang_up()
        return self.answer(*answer)

    def receive(self) -> bool:
        """Takes the body. Returns whether it has come whole."""
        size = int(self.headers.get("Content-Length", 0))
        if self.state.fails(self.operation, "broken"):
            self.rfile.read(size // 2)
            return False
        self.body = self.rfile.read(size)
        if self.state.fails(self.operation, "flipped"):
            self.body = bytes([self.body[0] ^ 1]) + self.body[1:]
        return len(self.body) == size

    def hang_up(self, seconds: float = 0) -> None:
        self.state.ended.wait(seconds)
        self.note(0)
        self.close_connection = True

    def check_faults(self) -> None:
        for fault, status, code in (
            ("busy", 503, "SlowDown"),
            ("denied", 403, "AccessDenied"),
            ("expired", 400, "ExpiredToken"),
            ("no-upload", 404, "NoSuchUpload"),
            ("no-bucket", 404, "NoSuchBucket"),
            ("not-implemented", 501, "NotImplemented"),
            ("error-in-200", 200, "InternalError"),
        ):
            if self.state.fails(self.operation, fault):
                raise Refusal(status, code)
        if self.state.fails(self.operation, "no-xml"):
            raise Refusal(200, "")

    def check_bucket(self) -> None:
        if self.bucket != BUCKET:
            raise Refusal(404, "NoSuchBucket")

    def check_signature(self) -> None:
        """As Amazon documents it. Raises Refusal."""
        state, headers = self.state, self.headers
        found = SIGNATURE.fullmatch(headers.get("Authorization", ""))
        if not found:
            raise Refusal(403, "AccessDenied")
        key, day, region, names, signature = found.groups()
        if key != state.key:
            raise Refusal(403, "InvalidAccessKeyId")
        stamp, payload = headers["x-amz-date"], headers["x-amz-content-sha256"]
        asked_at = datetime.strptime(stamp, "%Y%m%dT%H%M%SZ").replace(tzinfo=UTC)
        if abs(asked_at.timestamp() - time.time()) > 900 or stamp[:8] != day:
            raise Refusal(403, "RequestTimeTooSkewed")
        if not {"host", "x-amz-date", "x-amz-content-sha256"} <= {*names.split(";")}:
            raise Refusal(403, "AccessDenied")
        if state.token and (headers.get("x-amz-security-token") != state.token or "security-token" not in names):
            raise Refusal(403, "InvalidToken")
        place = urlsplit(self.path)
        pairs = sorted((quote(a, ""), quote(b, "")) for a, b in parse_qsl(place.query, keep_blank_values=True))
        lines = "".join(f"{name}:{' '.join(headers[name].split())}\n" for name in names.split(";"))
        asked = "&".join(f"{a}={b}" for a, b in pairs)
        canonical = "\n".join([self.command, quote(unquote(place.path)), asked, lines, names, payload])
        scope, digest = f"{day}/{region}/s3/aws4_request", hashlib.sha256(canonical.encode()).hexdigest()
        secret = ("AWS4" + state.secret).encode()
        for word in (day, region, "s3", "aws4_request", f"AWS4-HMAC-SHA256\n{stamp}\n{scope}\n{digest}"):
            secret = hmac.new(secret, word.encode(), hashlib.sha256).digest()
        if secret.hex() != signature:
            raise Refusal(403, "SignatureDoesNotMatch")
        if payload not in ("UNSIGNED-PAYLOAD", hashlib.sha256(self.body).hexdigest()):
            raise Refusal(400, "XAmzContentSHA256Mismatch")

    # --- answers ---

    def note(self, status: int) -> None:
        with self.state.lock:
            self.state.requests.append(S3Request(self.operation, self.name, status, len(self.body)))

    def answer(self, status: int, body: bytes = b"", headers: Mapping[str, str] | None = None) -> None:
        self.note(status)
        self.send_response(status)
        for name, value in {"Content-Length": str(len(body)), **(headers or {})}.items():
            self.send_header(name, value)
        if self.close_connection:
            self.send_header("Connection", "close")
        self.end_headers()
        if self.command == "HEAD":
            return
        if self.state.fails(self.operation, "cut"):
            self.close_connection = True
            body = body[: len(body) // 2]
        self.wfile.write(body)

    def refuse(self, status: int, code: str) -> None:
        headers = {"Retry-After": self.state.retry_after} if status == 503 and self.state.retry_after else {}
        told = f"The key was {self.headers.get('Authorization')}, and it did not fit."  # as some servers tell
        body = f"<Error><Code>{code}</Code><Message>{escape(told)}</Message></Error>" if code else "<p>Sign in!"
        self.answer(status, b"" if self.command == "HEAD" else body.encode(), headers)

    # --- objects ---

    def find_object(self) -> Stored:
        if self.name not in self.state.objects:
            raise Refusal(404, "NoSuchKey")
        return self.state.objects[self.name]

    def get(self) -> tuple[int, bytes, dict[str, str]]:
        found = self.find_object()
        if self.headers.get("If-Match", found.etag) != found.etag:
            raise Refusal(412, "PreconditionFailed")
        told = {"ETag": found.etag, "Last-Modified": "Mon, 30 Nov 2026 00:00:00 GMT"}
        asked = re.fullmatch(r"bytes=(\d+)-(\d+)", self.headers.get("Range", ""))
        if not asked:
            return 200, found.content, told
        begin, size = int(asked[1]), len(found.content)
        if begin >= size:
            raise Refusal(416, "InvalidRange")
        end = min(int(asked[2]) + 1, size)
        return 206, found.content[begin:end], told | {"Content-Range": f"bytes {begin}-{end - 1}/{size}"}

    head = get

    def put(self) -> tuple[int, bytes, dict[str, str]]:
        if self.headers.get("If-None-Match") == "*" and self.name in self.state.objects:
            raise Refusal(412, "PreconditionFailed")
        self.state.objects[self.name] = Stored(self.body, make_etag(self.body))
        return 200, b"", {"ETag": make_etag(self.body)}

    def delete(self) -> tuple[int]:
        self.state.objects.pop(self.name, None)
        return (204,)

    def list(self) -> tuple[int, bytes]:
        keys = sorted(key for key in self.state.objects if key.startswith(self.query.get("prefix", "")))
        start = int(self.query.get("continuation-token", "0"))
        stop = start + self.state.page
        text = f"<Name>{BUCKET}</Name><IsTruncated>{str(stop < len(keys)).lower()}</IsTruncated>"
        text += f"<NextContinuationToken>{stop}</NextContinuationToken>" if stop < len(keys) else ""
        for key in keys[start:stop]:
            found = self.state.objects[key]
            text += (
                f"<Contents><Key>{escape(key)}</Key><Size>{len(found.content)}</Size><ETag>{escape(found.etag)}</ETag>"
            )
            text += (
                "<LastModified>2026-11-30T00:00:00.000Z</LastModified><StorageClass>STANDARD</StorageClass></Contents>"
            )
        return 200, f"<ListBucketResult>{text}</ListBucketResult>".encode()

    # --- uploads ---

    def find_upload(self) -> Upload:
        found = self.state.uploads.get(self.query["uploadId"])
        if not found or found.key != self.name:
            raise Refusal(404, "NoSuchUpload")
        return found

    def begin(self) -> tuple[int, bytes]:
        upload = hashlib.sha256(f"{self.name} {time.monotonic_ns()}".encode()).hexdigest()[:20] + "+/="
        self.state.uploads[upload] = Upload(self.name)
        told = f"<Key>{escape(self.name)}</Key><UploadId>{upload}</UploadId>"
        space = 'xmlns="http://s3.amazonaws.com/doc/2006-03-01/"'
        return 200, f"<InitiateMultipartUploadResult {space}>{told}</InitiateMultipartUploadResult>".encode()

    def put_part(self) -> tuple[int, bytes, dict[str, str]]:
        stored = Stored(self.body, make_etag(self.body))
        self.find_upload().parts[int(self.query["partNumber"])] = stored
        return 200, b"", {"ETag": stored.etag}

    def list_parts(self) -> tuple[int, bytes]:
        after = int(self.query.get("part-number-marker", "0"))
        parts = sorted((number, one) for number, one in self.find_upload().parts.items() if number > after)
        most = min(self.state.page, int(self.query.get("max-parts", "1000")))
        text = f"<IsTruncated>{str(len(parts) > most).lower()}</IsTruncated>"
        for number, one in parts[:most]:
            text += f"<Part><PartNumber>{number}</PartNumber><ETag>{escape(one.etag, {chr(34): '&quot;'})}</ETag>"
            text += f"<Size>{len(one.content)}</Size></Part>"
        return 200, f"<ListPartsResult>{text}</ListPartsResult>".encode()

    def complete(self) -> tuple[int, bytes]:
        parts, root = self.find_upload().parts, ET.fromstring(self.body)  # noqa: S314 - from the tests themselves
        asked = [(int(one.findtext("{*}PartNumber", "0")), one.findtext("{*}ETag")) for one in root.iterfind("{*}Part")]
        if [number for number, _ in asked] != sorted({number for number, _ in asked}) or not asked:
            raise Refusal(400, "InvalidPartOrder")
        if any(number not in parts or parts[number].etag != etag for number, etag in asked):
            raise Refusal(400, "InvalidPart")
        contents = [parts[number].content for number, _ in asked]
        if any(len(content) < self.state.least_part for content in contents[:-1]):
            raise Refusal(400, "EntityTooSmall")
        digests = b"".join(hashlib.md5(content, usedforsecurity=False).digest() for content in contents)
        etag = f'{make_etag(digests)[:-1]}-{len(contents)}"'
        self.state.objects[self.name] = Stored(b"".join(contents), etag)
        del self.state.uploads[self.query["uploadId"]]
        told = f"<Key>{escape(self.name)}</Key><ETag>{escape(etag)}</ETag>"
        return 200, f"<CompleteMultipartUploadResult>{told}</CompleteMultipartUploadResult>".encode()

    def abort(self) -> tuple[int]:
        self.find_upload()
        del self.state.uploads[self.query["uploadId"]]
        return (204,)

    def list_uploads(self) -> tuple[int, bytes]:
        text = "".join(f"<Upload><Key>{escape(one.key)}</Key></Upload>" for one in self.state.uploads.values())
        return 200, f"<ListMultipartUploadsResult>{text}</ListMultipartUploadsResult>".encode()


@contextmanager
def serve_s3(**options: Any) -> Iterator[S3State]:
    """A context in which a server runs, with an empty bucket."""
    state = S3State(**options)
    server = Server(("127.0.0.1", 0), type("Bound", (S3Handler,), {"state": state}))
    if state.certificate:
        context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
        context.load_cert_chain(state.certificate)
        server.socket = context.wrap_socket(server.socket, server_side=True)
    threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.05}, daemon=True).start()
    state.endpoint = f"{'https' if state.certificate else 'http'}://127.0.0.1:{server.server_address[1]}"
    try:
        yield state
    finally:
        state.ended.set()
        server.shutdown()
        server.server_close()


HIDDEN = ("AWS_PROFILE", "AWS_SESSION_TOKEN", "AWS_ENDPOINT_URL_S3", "AWS_REGION", "AWS_DEFAULT_REGION", "http_proxy")


def set_s3_environment(monkeypatch: pytest.MonkeyPatch, state: S3State, folder: Path) -> None:
    """Leads to a server, and hides what else this machine has."""
    for name in HIDDEN:
        monkeypatch.delenv(name, raising=False)
    for name in ("no_proxy", "NO_PROXY"):
        monkeypatch.setenv(name, "127.0.0.1,localhost")
    monkeypatch.setenv("AWS_ACCESS_KEY_ID", state.key)
    monkeypatch.setenv("AWS_SECRET_ACCESS_KEY", state.secret)
    monkeypatch.setenv("AWS_ENDPOINT_URL", state.endpoint)
    monkeypatch.setenv("AWS_CONFIG_FILE", str(folder / "config"))
    monkeypatch.setenv("AWS_SHARED_CREDENTIALS_FILE", str(folder / "credentials"))
    if state.token:
        monkeypatch.setenv("AWS_SESSION_TOKEN", state.token)
