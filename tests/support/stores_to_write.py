"""A store that is written to, in a folder of this machine: with the rules of S3, and faults where a test wants them."""

import os
import shutil
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import suppress
from dataclasses import replace
from hashlib import md5
from pathlib import Path
from threading import Condition, Lock

from jobs import Job, plan_conversion

from reshard.errors import refuse
from reshard.execution.execute import Settings
from reshard.execution.store_target import execute_plan_to_store
from reshard.execution.times import RunResult
from reshard.paths import Entry
from reshard.storage.counting import WorkCounter
from reshard.storage.resources import wait_unless_stopped
from reshard.storage.target_store import NoSuchUploadError, TargetStore, UploadedPart, UploadLimits
from reshard.target.preflight import describe_others, look_at_target
from reshard.target.state import TargetState
from reshard.types import Progress

SMALL_LIMITS = UploadLimits(1 << 10, 64 << 20, 10_000, 1 << 40)

Fault = Callable[[str, str], None]
"""Is told of each call before it is done: the method and the object. It may raise, or end the process."""


def die_at(number: int) -> Fault:
    """Ends the process before the call of a number, from 0 on."""
    left = number

    def count(_method: str, _name: str) -> None:
        nonlocal left
        if not left:
            os._exit(9)
        left -= 1

    return count


class FolderStore:
    """A store in `root`: objects in `objects`, uploads in `uploads`. Several may write to one root at a time."""

    def __init__(
        self,
        root: Path,
        *,
        keeps_parts: bool,
        limits: UploadLimits = SMALL_LIMITS,
        fault: Fault | None = None,
        is_keyed: bool = False,
    ) -> None:
        """With `is_keyed`, ETags are no MD5s of the bytes, and each upload of the same bytes has another."""
        self.root = root
        self.keeps_parts = keeps_parts
        self.limits = limits
        self.fault = fault
        self.is_keyed = is_keyed
        self.calls: list[tuple[str, str]] = []
        self._lock = Lock()
        self._turn = Condition()
        self._streams: dict[str, list[bytes]] = {}
        for name in ("objects", "uploads", "etags", "temporary"):
            (root / name).mkdir(parents=True, exist_ok=True)

    @property
    def address(self) -> str:
        return f"s3://{self.root.name}"

    def locate(self, name: str) -> str:
        return f"{self.address}/{name}"

    def list_entries(self) -> Mapping[str, Entry]:
        self._begin("list_entries", "")
        found = {}
        for path in sorted((self.root / "objects").rglob("*")):
            name = str(path.relative_to(self.root / "objects"))
            content = read_if_there(path) if path.is_file() else None
            if content is not None:
                found[name] = Entry(name, len(content), f'"{self._read_etag(name)}"')
        return found

    def get(self, name: str) -> bytes | None:
        self._begin("get", name)
        return read_if_there(self.root / "objects" / name)

    def put(self, name: str, content: bytes) -> str:
        self._begin("put", name)
        return self._write(name, content, self._sign(content))

    def put_new(self, name: str, content: bytes) -> bool:
        self._begin("put_new", name)
        new = self._write_temporary(content)
        try:
            os.link(new, self._prepare(name))
        except FileExistsError:
            return False
        finally:
            new.unlink()
        return True

    def remove(self, names: Iterable[str]) -> None:
        for name in names:
            self._begin("remove", name)
            (self.root / "objects" / name).unlink(missing_ok=True)
            (self.root / "etags" / name).unlink(missing_ok=True)

    def begin_upload(self, name: str) -> str:
        self._begin("begin_upload", name)
        if not self.keeps_parts:
            with self._turn:
                self._streams[name] = []
            return ""
        upload = os.urandom(8).hex()
        (self.root / "uploads" / upload).mkdir()
        return upload

    def put_part(self, name: str, upload: str, number: int, data: memoryview) -> str:
        self._begin("put_part", name)
        if not self.keeps_parts:
            self._append(name, number, bytes(data))
            return ""
        etag, new = self._sign(bytes(data)), self._write_temporary(bytes(data))
        try:
            for old in self._find_parts(upload).get(number, ()):
                old.unlink(missing_ok=True)
            new.rename(self.root / "uploads" / upload / f"{number}-{etag}")
        except FileNotFoundError:
            raise NoSuchUploadError from None
        return etag

    def list_parts(self, name: str, upload: str) -> Mapping[int, UploadedPart] | None:
        self._begin("list_parts", name)
        try:
            found = self._find_parts(upload)
            return {
                number: UploadedPart(path.name.partition("-")[2], path.stat().st_size)
                for number, (path, *_) in found.items()
            }
        except FileNotFoundError:
            return None

    def complete_upload(self, name: str, upload: str, etags: Sequence[str]) -> str:
        self._begin("complete_upload", name)
        if not self.keeps_parts:
            content = b"".join(self._streams.pop(name))
            return self._write(name, content, self._sign(content))
        folder = self.root / "uploads" / upload
        try:
            parts = [(folder / f"{number}-{etag}").read_bytes() for number, etag in enumerate(etags, 1)]
            assert len(self._find_parts(upload)) == len(etags)
        except FileNotFoundError:
            if not folder.is_dir():
                raise NoSuchUploadError from None
            raise refuse("wrong-answer", name, "InvalidPart", "parts that are there") from None
        assert all(self.limits.least_part <= len(part) for part in parts[:-1])
        assert all(len(part) <= self.limits.most_part for part in parts)
        digest = md5(b"".join(md5(part).digest() for part in parts)).hexdigest()  # noqa: S324
        etag = f"{os.urandom(16).hex() if self.is_keyed else digest}-{len(parts)}"
        self._write(name, b"".join(parts), etag)
        self._throw_away(upload)
        return etag

    def abort_upload(self, name: str, upload: str) -> None:
        self._begin("abort_upload", name)
        with self._turn:
            self._streams.pop(name, None)
        if upload:
            with suppress(FileNotFoundError):
                self._throw_away(upload)

    @property
    def objects(self) -> dict[str, bytes]:
        """All objects, by name."""
        return dict(read_objects(self.root / "objects"))

    @property
    def open_uploads(self) -> int:
        """The number of uploads that are neither completed nor thrown away."""
        return len([*(self.root / "uploads").iterdir()]) + len(self._streams)

    def _begin(self, method: str, name: str) -> None:
        wait_unless_stopped()
        with self._lock:
            self.calls.append((method, name))
            if self.fault:
                self.fault(method, name)

    def _append(self, name: str, number: int, data: bytes) -> None:
        with self._turn:
            while len(self._streams[name]) != number - 1:
                self._turn.wait(0.01)
                wait_unless_stopped()
            self._streams[name].append(data)
            self._turn.notify_all()

    def _find_parts(self, upload: str) -> dict[int, list[Path]]:
        found: dict[int, list[Path]] = {}
        for path in sorted((self.root / "uploads" / upload).iterdir()):
            found.setdefault(int(path.name.partition("-")[0]), []).append(path)
        return found

    def _throw_away(self, upload: str) -> None:
        """At once, as stores do: another thread may end the process."""
        away = self.root / "temporary" / upload
        (self.root / "uploads" / upload).rename(away)
        shutil.rmtree(away)

    def _sign(self, content: bytes) -> str:
        return os.urandom(16).hex() if self.is_keyed else md5(content).hexdigest()  # noqa: S324

    def _read_etag(self, name: str) -> str:
        return (read_if_there(self.root / "etags" / name) or b"").decode()

    def _write(self, name: str, content: bytes, etag: str) -> str:
        path = self.root / "etags" / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(etag)
        self._write_temporary(content).rename(self._prepare(name))
        return etag

    def _write_temporary(self, content: bytes) -> Path:
        path = self.root / "temporary" / os.urandom(8).hex()
        path.write_bytes(content)
        return path

    def _prepare(self, name: str) -> Path:
        path = self.root / "objects" / name
        path.parent.mkdir(parents=True, exist_ok=True)
        return path


def read_if_there(path: Path) -> bytes | None:
    try:
        return path.read_bytes()
    except FileNotFoundError:
        return None


def read_objects(folder: Path) -> Iterator[tuple[str, bytes]]:
    for path in sorted(folder.rglob("*")):
        if path.is_file():
            yield str(path.relative_to(folder)), path.read_bytes()


def convert_to_store(
    job: Job, store: TargetStore, folder: Path, settings: Settings | None = None, progress: Progress | None = None
) -> RunResult:
    """Converts into a store what a conversion into `folder`, which is not there, would write."""
    return write_to_store(look_at_target(plan_conversion(job), folder), store, settings, progress)


def write_to_store(
    state: TargetState,
    store: TargetStore,
    settings: Settings | None = None,
    progress: Progress | None = None,
    require_same: Callable[[], None] = lambda: None,
) -> RunResult:
    """Writes what a look at a target says is to be written. `require_same` looks whether another run has changed it."""
    counter = WorkCounter(progress, state.size, writes=True)
    others = replace(describe_others(state), require_same=require_same)
    return execute_plan_to_store(state.plan, store, others, counter, settings or Settings())
