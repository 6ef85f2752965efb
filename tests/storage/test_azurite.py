"""Sources in Azurite, the emulator of Azure's store, if it and the package `obstore` are there (`make remote`)."""

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from real_stores import run_azurite
from store_servers import require_same_files

import reshard
from reshard import Refused
from reshard.storage import remote_store
from reshard.synthetic import SMALL_V3, write_checkpoint

ADDRESS = "az://models/some/where"
obstore = pytest.importorskip("obstore", reason="the package obstore is not installed")


@pytest.fixture(scope="module")
def endpoint(tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    """The address of an emulator with an empty container `models`."""
    with run_azurite(tmp_path_factory.mktemp("azurite")) as address:
        yield address


@pytest.fixture(autouse=True)
def _emulator(endpoint: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("AZURE_STORAGE_USE_EMULATOR", "true")
    monkeypatch.setenv("AZURITE_BLOB_STORAGE_URL", endpoint)
    for name in ("no_proxy", "NO_PROXY"):
        monkeypatch.setenv(name, "127.0.0.1,localhost")
    monkeypatch.setattr(remote_store, "OPENING_PATIENCE", 5.0)


def upload(folder: Path, prefix: str) -> None:
    bucket: Any = obstore.store.from_url("az://models", client_options={"allow_http": True})
    for path in folder.iterdir():
        obstore.put(bucket, f"{prefix}/{path.name}", path.read_bytes())


def test_a_conversion_gives_the_same_files(tmp_path: Path) -> None:
    write_checkpoint(tmp_path / "source", SMALL_V3, 3)
    upload(tmp_path / "source", "some/where")
    reshard.convert(tmp_path / "source", tmp_path / "here", mp=2)
    reshard.convert(ADDRESS, tmp_path / "there", mp=2)
    require_same_files(tmp_path / "here", tmp_path / "there")


def test_a_file_that_is_replaced_is_refused(tmp_path: Path) -> None:
    write_checkpoint(tmp_path / "one", SMALL_V3, 1)
    upload(tmp_path / "one", "one")
    with reshard.open("az://models/one", framework="numpy") as tensors:
        assert tensors["model.embed_tokens.weight"][:1].size
        upload(tmp_path / "one", "one")
        with pytest.raises(Refused, match="source changed"):
            tensors["model.embed_tokens.weight"][:1]


@pytest.mark.parametrize(("address", "words"), [("az://others/x", "no such bucket"), ("az://models/x", "nothing lies")])
def test_what_is_not_there_is_refused(address: str, words: str) -> None:
    with pytest.raises(Refused, match=words):
        reshard.inspect(address)
