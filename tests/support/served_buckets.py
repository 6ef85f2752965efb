"""Folders that are served as `s3://models/inner` to this process, with its keys and short waits."""

from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any

import pytest
from store_servers import ServedFolder, serve_bucket

from reshard.storage import remote_store

BUCKET = "s3://models/inner"

ServeFolder = Callable[..., ServedFolder]
"""Serves a folder from now on, with options of `serve_bucket`."""


@contextmanager
def serve_buckets(folder: Path) -> Iterator[ServeFolder]:
    """A context that gives a function, which serves a folder as BUCKET until the context ends. `folder` is empty."""
    with ExitStack() as stack, pytest.MonkeyPatch.context() as patch:
        for name in ("AWS_PROFILE", "AWS_SESSION_TOKEN", "AWS_ENDPOINT_URL_S3", "http_proxy"):
            patch.delenv(name, raising=False)
        patch.setenv("AWS_CONFIG_FILE", str(folder / "config"))
        patch.setenv("AWS_SHARED_CREDENTIALS_FILE", str(folder / "credentials"))
        patch.setenv("AWS_ACCESS_KEY_ID", "anyone")
        patch.setenv("AWS_SECRET_ACCESS_KEY", "anysecret")
        for name in ("no_proxy", "NO_PROXY"):
            patch.setenv(name, "127.0.0.1,localhost")
        for name, seconds in (("OPENING_PATIENCE", 2.0), ("PATIENCE", 5.0), ("FIRST_WAIT", 0.01)):
            patch.setattr(remote_store, name, seconds)

        def serve(served_folder: Path, **options: Any) -> ServedFolder:
            served = stack.enter_context(serve_bucket(served_folder, **options))
            patch.setenv("AWS_ENDPOINT_URL", served.endpoint)
            return served

        yield serve
