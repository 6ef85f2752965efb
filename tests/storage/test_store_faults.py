"""Servers that truncate, delay, break off and lie; sources that are replaced in the middle; addresses with secrets."""

import contextlib
import os
import signal
import socket
import struct
import subprocess
import sys
import threading
import time
from collections import deque
from collections.abc import Iterator
from email.utils import formatdate
from pathlib import Path
from typing import Any

import pytest
from store_servers import (
    NAME,
    BucketHandler,
    CdnHandler,
    Handler,
    HubHandler,
    ServedFolder,
    WebHandler,
    require_same_files,
    run_servers,
    serve_hub,
    serve_web,
)

import reshard
from reshard import Refused
from reshard.cli.main import main
from reshard.paths import RemotePath
from reshard.storage import hub, remote_store, web_client
from reshard.storage.addresses import open_address
from reshard.storage.remote_store import Failed, Patience
from reshard.storage.resources import map_in_threads, run_in_threads, wait_unless_stopped
from reshard.synthetic import SMALL_V3, write_checkpoint

TINY = {**SMALL_V3, "num_hidden_layers": 2, "vocab_size": 512, "n_routed_experts": 4, "num_experts_per_tok": 2}
KEY, SECRET = "AKIAEXAMPLE", "sesame-SECRET"
BROKEN_AFTER = 300_000
"""In bytes: less than a window, which so never comes at once."""


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("made")
    write_checkpoint(folder / "source", TINY, 3)
    reshard.convert(folder / "source", folder / "ranks", mp=2)
    return folder


@pytest.fixture(autouse=True)
def environment(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """Waits are short, and nothing of this machine's own settings counts."""
    for name in ("HF_TOKEN", "HUGGING_FACE_HUB_TOKEN", "HF_TOKEN_PATH", "HF_HUB_OFFLINE", "http_proxy", "AWS_PROFILE"):
        monkeypatch.delenv(name, raising=False)
    for name in ("AWS_SESSION_TOKEN", "AWS_ENDPOINT_URL_S3", "https_proxy", "HTTPS_PROXY", "HTTP_PROXY"):
        monkeypatch.delenv(name, raising=False)
    for name in ("HF_HOME", "AWS_CONFIG_FILE", "AWS_SHARED_CREDENTIALS_FILE"):
        monkeypatch.setenv(name, str(tmp_path / name))
    monkeypatch.setenv("AWS_ACCESS_KEY_ID", KEY)
    monkeypatch.setenv("AWS_SECRET_ACCESS_KEY", SECRET)
    for name in ("no_proxy", "NO_PROXY"):
        monkeypatch.setenv(name, "127.0.0.1,localhost")
    monkeypatch.setattr(remote_store, "FIRST_WAIT", 0.01)
    monkeypatch.setattr(remote_store, "PATIENCE", 20.0)
    monkeypatch.setattr(remote_store, "OPENING_PATIENCE", 2.0)


class Adverse(Handler):
    """Sends bodies in a way of its own."""

    way = ""

    def send_bytes(self, path: Path, begin: int, end: int) -> None:
        data = path.read_bytes()[begin:end]
        if self.way == "slow":
            for start in range(0, len(data), 50_000):
                time.sleep(0.01)
                self.wfile.write(data[start : start + 50_000])
            return
        self.wfile.write(data[:BROKEN_AFTER])
        if len(data) <= BROKEN_AFTER:
            return
        self.wfile.flush()
        if self.way == "reset":
            time.sleep(0.02)  # so that what was sent arrives before
            self.connection.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
        if self.way == "stall":
            time.sleep(1)
        self.close_connection = True


@contextlib.contextmanager
def serve(kind: str, folder: Path, monkeypatch: pytest.MonkeyPatch, way: type[Handler]) -> Iterator[tuple[Any, str]]:
    """A context with a folder behind an address of a kind, whose bodies come in a way."""
    served = ServedFolder(folder)
    handlers = {"hf": (HubHandler, CdnHandler), "s3": (BucketHandler,), "http": (WebHandler,)}[kind]
    bent = [type("Bent", (way, handler), {}) if handler is not HubHandler else handler for handler in handlers]
    with run_servers(served, *bent) as ports:
        served.endpoint, served.cdn = f"http://127.0.0.1:{ports[0]}", f"http://localhost:{ports[-1]}"
        monkeypatch.setenv("HF_ENDPOINT", served.endpoint)
        monkeypatch.setenv("AWS_ENDPOINT_URL", served.endpoint)
        yield served, {"hf": f"hf://{NAME}", "s3": "s3://models/inner", "http": served.endpoint}[kind]


@pytest.fixture(params=["hf", "s3", "http"])
def kind(request: pytest.FixtureRequest) -> str:
    if request.param == "s3":
        pytest.importorskip("obstore")
    return str(request.param)


@pytest.mark.parametrize("way", ["slow", "reset", "stall", "cut"])
def test_what_comes_slowly_or_breaks_off_is_read_to_its_end(
    kind: str, way: str, made: Path, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    """Though no answer at all has a whole window: what has come of each is kept."""
    monkeypatch.setattr(web_client, "SILENT_SECONDS", 0.4)
    if kind == "s3" and way == "stall":
        pytest.skip("the time that obstore waits is set when it is imported")
    with serve(kind, made / "source", monkeypatch, type("Way", (Adverse,), {"way": way})) as (served, address):
        reshard.convert(address, tmp_path / "ranks", mp=2)
        assert served.requests
    require_same_files(made / "ranks", tmp_path / "ranks")


# --- replaced in the middle ---


def flip_last_bytes(folder: Path) -> None:
    for path in folder.glob("*.safetensors"):
        content = bytearray(path.read_bytes())
        content[-1] ^= 1
        path.with_suffix(".new").write_bytes(content)
        path.with_suffix(".new").replace(path)


class Replacing(Handler):
    """Replaces all files once it has answered so often. The time of change is told, and an ETag if it is to be."""

    replaced_after = 8
    has_etag = True

    def send_file(self, path: Path, _etag: str) -> None:
        served = self.served
        with served.lock:
            if served.faults["replaced"] == 0 and served.count(self.kind, 206) >= self.replaced_after:
                served.faults["replaced"] = 1
                flip_last_bytes(served.folder)
        super().send_file(path, f'"{served.hash_file(path)[:32]}"')

    def send_header(self, keyword: str, value: str) -> None:
        if keyword == "ETag" and not self.has_etag:
            return
        if keyword == "Last-Modified":
            value = formatdate(1.8e9 + self.served.faults["replaced"], usegmt=True)
        super().send_header(keyword, value)


@pytest.mark.parametrize("has_etag", [True, False])
def test_a_source_that_is_replaced_while_it_is_converted_is_refused(
    kind: str, *, has_etag: bool, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    """By the ETag of its bytes; on a web server without them by the time."""
    if not has_etag and kind != "http":
        pytest.skip("these always have one")
    write_checkpoint(tmp_path / "source", TINY, 3)
    way = type("Way", (Replacing,), {"has_etag": has_etag})
    with serve(kind, tmp_path / "source", monkeypatch, way) as (served, address):
        with pytest.raises(Refused, match="source changed") as caught:
            reshard.convert(address, tmp_path / "ranks", mp=2, jobs=1)
        assert served.faults["replaced"] == 1
    assert "begin again with the files as they are now" in str(caught.value)


def test_a_branch_that_moves_on_changes_nothing(made: Path, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    class Moving(HubHandler):
        def route(self, path: str) -> None:
            if path.endswith("/revision/main") and self.served.count("hub"):
                return self.answer_json({"id": NAME, "sha": "0" * 40})
            return super().route(path)

    served = ServedFolder(made / "source")
    with run_servers(served, Moving, CdnHandler) as (hub_port, cdn):
        served.endpoint, served.cdn = f"http://127.0.0.1:{hub_port}", f"http://localhost:{cdn}"
        monkeypatch.setenv("HF_ENDPOINT", served.endpoint)
        monkeypatch.setattr(hub, "SAFE_PART", 0.0)  # every read asks the hub
        monkeypatch.setattr(hub, "SHORTEST_USE", 0.0)
        reshard.convert(f"hf://{NAME}", tmp_path / "ranks", mp=2)
        assert served.count("hub", 302) > 6
        with pytest.raises(Refused, match="000000"):
            reshard.inspect(f"hf://{NAME}")
    require_same_files(made / "ranks", tmp_path / "ranks")


def test_another_sha_at_the_same_commit_is_refused(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    write_checkpoint(tmp_path / "source", TINY, 3)
    monkeypatch.setattr(hub, "SAFE_PART", 0.0)
    monkeypatch.setattr(hub, "SHORTEST_USE", 0.0)
    with serve("hf", tmp_path / "source", monkeypatch, Replacing) as (served, address):
        with pytest.raises(Refused, match="another version by now"):
            reshard.convert(address, tmp_path / "ranks", mp=2, jobs=1)
        assert served.faults["replaced"] == 1


# --- answers that are none ---


class Coded(Handler):
    def send_header(self, keyword: str, value: str) -> None:
        if keyword == "ETag":
            super().send_header("Content-Encoding", "gzip")
        super().send_header(keyword, value)


def test_bytes_that_are_coded_are_refused(made: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with (
        serve("http", made / "source", monkeypatch, Coded) as (_, address),
        pytest.raises(Refused, match="it sent the bytes coded by gzip"),
    ):
        reshard.inspect(address)


@pytest.mark.parametrize("to", ["http://[1", "https://x:abc/"])
def test_a_server_that_leads_to_no_address_is_refused(made: Path, to: str, monkeypatch: pytest.MonkeyPatch) -> None:
    class Leading(WebHandler):
        def route(self, _: str) -> None:
            self.answer(302, Location=to)

    with (
        serve("http", made / "source", monkeypatch, Leading) as (_, address),
        pytest.raises(Refused, match="it leads to what is no address"),
    ):
        reshard.inspect(address)


@pytest.mark.parametrize("address", ["https://[bad/", "https://host:abc/x", f"http://me:{SECRET}/@h:80/x?key={SECRET}"])
def test_what_is_no_address_is_refused(address: str) -> None:
    with pytest.raises(Refused, match="no address") as caught:
        reshard.inspect(address)
    assert SECRET not in str(caught.value)


def test_a_listed_size_below_nothing_is_refused(made: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with serve_hub(made / "source") as served:
        monkeypatch.setenv("HF_ENDPOINT", served.endpoint)
        monkeypatch.setattr(
            HubHandler,
            "list_tree",
            lambda self, _: self.answer_json([{"type": "file", "path": "config.json", "size": -9}]),
        )
        with pytest.raises(Refused, match="an answer that is not the hub's"):
            reshard.inspect(f"hf://{NAME}")


# --- addresses and secrets ---


def test_names_in_any_script_are_asked_for(made: Path, tmp_path: Path) -> None:
    (tmp_path / "模型 #1").mkdir()
    for path in (made / "source").glob("*.*"):
        (tmp_path / "模型 #1" / path.name).write_bytes(path.read_bytes())
    with serve_web(tmp_path) as served:
        assert reshard.inspect(f"{served.endpoint}/模型 %231?key=a b").files == 3
        assert all(one.path.endswith("?key=a%20b") for one in served.requests)


def test_a_query_comes_through_as_it_is(made: Path) -> None:
    """A path would make one slash of two."""
    with serve_web(made / "source") as served:
        assert reshard.inspect(f"{served.endpoint}/?key=a//b/./c").files == 3
        assert all(one.path.endswith("?key=a//b/./c") for one in served.requests)


@pytest.mark.parametrize("mode", ["log", "json"])
def test_a_log_shows_no_secret(made: Path, tmp_path: Path, mode: str, capsys: pytest.CaptureFixture[str]) -> None:
    with serve_web(made / "source") as served:
        address = f"http://me:{SECRET}@{served.endpoint[7:]}/?key={SECRET}"
        assert main(["convert", address, str(tmp_path / "ranks"), "--mp", "2", "--progress", mode]) == 0
        assert main(["verify", address]) == 2
        assert main(["convert", str(made / "source"), str(tmp_path / "x"), "--mp", "2", f"--config={address}"]) == 0
        assert main(["convert", str(made / "source"), address, "--mp", "2"]) == 2
        assert main(["inspect", address.replace("/?", "/nothing?")]) == 2
        assert all(one.authorization.startswith("Basic ") for one in served.requests)
    output = capsys.readouterr()
    assert f"convert http://{served.endpoint[7:]}/" in output.err.replace('", "', " ").replace("'", "")
    assert SECRET not in output.out + output.err
    assert not [path for path in (tmp_path / "ranks").iterdir() if SECRET.encode() in path.read_bytes()]


def test_a_token_that_is_none_is_not_printed(made: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with serve_hub(made / "source") as served:
        monkeypatch.setenv("HF_ENDPOINT", served.endpoint)
        monkeypatch.setenv("HF_TOKEN", f"{SECRET}\nhf_more…")
        with pytest.raises(Refused, match="characters that no token has") as caught:
            reshard.inspect(f"hf://{NAME}")
        assert SECRET not in str(caught.value)
        assert not served.requests


def test_keys_go_on_to_the_same_server_only(made: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    class Leading(WebHandler):
        to = ""

        def route(self, path: str) -> None:
            if path.startswith("/old/"):
                return self.answer(302, Location=f"{self.to}/new/{path[5:]}")
            return super().route(path.removeprefix("/new"))

    with serve_web(made / "source") as other:
        other.folder = made
        for to in ("", other.endpoint):
            with serve("http", made / "source", monkeypatch, type("Way", (Leading,), {"to": to})) as (served, address):
                if to:
                    (made / "new").symlink_to("source")
                reshard.inspect(address.replace("//", "//me:word@") + "/old")
                assert all(one.authorization for one in served.requests)
                assert served.count("web", 206) == (0 if to else 7)
        (made / "new").unlink()
        assert other.count("web", 206) == 7
        assert not any(one.authorization for one in other.requests)


def test_a_proxy_gets_its_own_password(made: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    found: list[str | None] = []

    class Proxy(WebHandler):
        def route(self, path: str) -> None:
            found.append(self.headers.get("Proxy-Authorization"))
            super().route(path.removeprefix("http://127.0.0.1:9"))

    with serve("http", made / "source", monkeypatch, Proxy) as (served, address):
        monkeypatch.setenv("http_proxy", address.replace("//", "//me:word@"))
        for name in ("no_proxy", "NO_PROXY"):
            monkeypatch.delenv(name)
        assert reshard.inspect("http://127.0.0.1:9/").files == 3  # of the same name as the proxy
        assert all(one.path.startswith("http://127.0.0.1:9/") for one in served.requests)
    assert set(found) == {"Basic bWU6d29yZA=="}


def test_a_folder_that_denies_all_says_so(made: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    class Denying(WebHandler):
        def route(self, _: str) -> None:
            self.answer(403)

    with (
        serve("http", made / "source", monkeypatch, Denying) as (_, address),
        pytest.raises(Refused, match="the server answers 403"),
    ):
        reshard.inspect(address)


# --- waits and connections ---


def test_waits_that_were_told_do_not_use_up_patience(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(remote_store, "PATIENCE", 0.3)
    patience = Patience("x")
    for _ in range(2):
        patience.wait(Failed("its quota is used up", wait=0.3))
    busy = Failed("the server is busy")
    patience.wait(busy)
    with pytest.raises(Refused, match="the server is busy"):
        deque(map(patience.wait, [busy] * 100), 0)


def test_one_line_tells_what_happens_to_many_files(monkeypatch: pytest.MonkeyPatch, made: Path) -> None:
    lines: list[str] = []
    monkeypatch.setattr(remote_store, "LISTENERS", [lines.append])
    monkeypatch.setattr(remote_store, "TOLD_WAITS", {})
    with serve_hub(made / "source") as served:
        monkeypatch.setenv("HF_ENDPOINT", served.endpoint)
        path = open_address(f"hf://{NAME}")
        assert isinstance(path, RemotePath)
        files = [one for one in path.iterdir() if one.suffix == ".safetensors"]
        for file in files:
            path.store.read_into(file.entry, 0, memoryview(bytearray(9)))
        for file in files:
            served.faults["ended"] = 1
            path.store.read_into(file.entry, 0, memoryview(bytearray(9)))
    assert [line.split(": ")[-1] for line in lines] == ["the server answers 403; asks the hub for new addresses"]


def test_connections_that_went_silent_are_not_tried_one_after_the_other(
    made: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(web_client, "SILENT_SECONDS", 0.4)
    with serve_web(made / "source", delay=0.1) as served:
        client, url = web_client.WebClient(), f"{served.endpoint}/config.json"

        def read(_: int) -> None:
            with client.request("GET", url) as answer:
                answer.read()

        map_in_threads(read, range(12), 12)
        served.delay = 1.0
        started = time.monotonic()
        with pytest.raises(Failed, match="nothing came"):
            read(0)
        assert time.monotonic() - started < 0.9


FORKS = """
import os, sys
from reshard.errors import Refused
from reshard.storage.addresses import open_address
file = open_address(sys.argv[1]) / "model-00001-of-00003.safetensors"
expected, buffer = open(sys.argv[2], "rb").read(), bytearray(file.entry.size)
file.store.read_into(file.entry, 0, memoryview(buffer))
child = os.fork()
if not child and sys.argv[1].startswith("s3:"):
    try:
        file.store.read_into(file.entry, 0, memoryview(buffer))
    except Refused as refused:
        assert "this process was forked" in str(refused)
        os._exit(0)
for _ in range(4):
    buffer[:] = bytes(len(buffer))
    file.store.read_into(file.entry, 0, memoryview(buffer))
    assert buffer == expected
assert not child or os.waitpid(child, 0)[1] == 0
"""


def test_a_process_that_was_forked_has_connections_of_its_own(
    kind: str, made: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Two processes that take from one connection would get each other's bytes. obstore has none after a fork."""
    path = made / "source" / "model-00001-of-00003.safetensors"
    with serve(kind, made / "source", monkeypatch, type("Plain", (Handler,), {})) as (_, address):
        subprocess.run([sys.executable, "-c", FORKS, address, str(path)], check=True, timeout=20)


def test_an_end_reaches_threads_that_a_worker_has_started() -> None:
    started = threading.Event()

    def sleep(_: int) -> None:
        started.set()
        wait_unless_stopped(20)

    def work(item: int) -> None:
        if item:
            started.wait(5)
            raise ValueError("the reason")
        map_in_threads(sleep, range(2), 2)

    began = time.monotonic()
    with pytest.raises(ValueError, match="the reason"):
        run_in_threads(range(2), lambda: work, 2)
    assert time.monotonic() - began < 2


@pytest.mark.parametrize("way", ["proxy", "names"])
def test_an_interrupt_is_heard_while_a_connection_is_made(way: str) -> None:
    """A proxy that says nothing, and a name server that does not."""
    code = "import socket, time; from reshard.cli.process import entry\n"
    if way == "names":
        code += "socket.getaddrinfo = lambda *_, **__: time.sleep(60)\n"
    with socket.socket() as silent:
        silent.bind(("127.0.0.1", 0))
        silent.listen()
        proxy = {"https_proxy": f"http://127.0.0.1:{silent.getsockname()[1]}"} if way == "proxy" else {}
        command = [sys.executable, "-c", f"{code}entry()", "inspect", "https://models.invalid/"]
        env = {**{name: value for name, value in os.environ.items() if name.lower() != "no_proxy"}, **proxy}
        with subprocess.Popen(command, stderr=subprocess.PIPE, env=env) as process:
            time.sleep(2)
            began = time.monotonic()
            process.send_signal(signal.SIGINT)
            said = process.communicate(timeout=25)[1]
            assert process.returncode == 130, said
            assert time.monotonic() - began < 2
