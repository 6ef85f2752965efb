"""Sources in buckets, by obstore: byte for byte what a folder gives, or refused."""

import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
from store_servers import ServedFolder, measure_interrupt, require_same_files, serve_bucket

import reshard
from reshard import Refused
from reshard.storage import remote_store
from reshard.storage.buckets import shorten_reason
from reshard.synthetic import SMALL_V3, write_checkpoint

TINY = {**SMALL_V3, "num_hidden_layers": 2, "vocab_size": 512, "n_routed_experts": 4, "num_experts_per_tok": 2}
ADDRESS = "s3://models/inner"
KEY, SECRET = "AKIAEXAMPLE", "wJalrSECRET"


def test_a_plain_install_says_what_lacks(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "obstore", None)
    monkeypatch.setitem(sys.modules, "obstore.store", None)
    with pytest.raises(Refused, match=r"missing package\n.*pip install 'reshard\[remote\]'"):
        reshard.inspect(ADDRESS)


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("made")
    write_checkpoint(folder / "source", TINY, 3)
    reshard.convert(folder / "source", folder / "ranks", mp=2)
    return folder


@pytest.fixture(autouse=True)
def environment(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """Waits are short, and nothing of this machine's own settings counts."""
    for name in ("AWS_PROFILE", "AWS_SESSION_TOKEN", "AWS_ENDPOINT_URL_S3", "http_proxy"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("AWS_CONFIG_FILE", str(tmp_path / "config"))
    monkeypatch.setenv("AWS_SHARED_CREDENTIALS_FILE", str(tmp_path / "credentials"))
    monkeypatch.setenv("AWS_ACCESS_KEY_ID", KEY)
    monkeypatch.setenv("AWS_SECRET_ACCESS_KEY", SECRET)
    monkeypatch.setattr(remote_store, "FIRST_WAIT", 0.01)
    monkeypatch.setattr(remote_store, "PATIENCE", 20.0)
    for name in ("no_proxy", "NO_PROXY"):
        monkeypatch.setenv(name, "127.0.0.1,localhost")
    monkeypatch.setattr(remote_store, "OPENING_PATIENCE", 2.0)


@pytest.fixture
def served(made: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[ServedFolder]:
    pytest.importorskip("obstore")
    with serve_bucket(made / "source", token=KEY, page=2) as bucket:
        monkeypatch.setenv("AWS_ENDPOINT_URL", bucket.endpoint)
        yield bucket


@pytest.mark.parametrize("fault", ["", "busy", "cut"])
def test_a_conversion_from_a_bucket_gives_the_same_files(
    made: Path, served: ServedFolder, tmp_path: Path, fault: str
) -> None:
    served.faults[fault] = 3 if fault else 0
    reshard.convert(ADDRESS, tmp_path / "ranks", mp=2)
    require_same_files(made / "ranks", tmp_path / "ranks")


def test_a_plan_of_a_bucket_reads_headers_once(served: ServedFolder) -> None:
    plan = reshard.plan(f"{ADDRESS}/", mp=2)
    assert str(plan.path) == ADDRESS
    asked = [one.path for one in served.requests if one.range]
    assert len(asked) == len(set(asked)) == 3 + 2  # the weights, config and index
    assert served.sent["s3"] < 1.6 * sum(file.header_size for file in plan.source.files) + 100_000


def test_one_file_of_a_bucket_is_read(served: ServedFolder) -> None:
    assert reshard.inspect(f"{ADDRESS}/model-00001-of-00003.safetensors").files == 1
    assert served.requests


def test_a_profile_gives_keys_and_endpoint(
    served: ServedFolder, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name in ("AWS_ACCESS_KEY_ID", "AWS_SECRET_ACCESS_KEY", "AWS_ENDPOINT_URL"):
        monkeypatch.delenv(name)
    monkeypatch.setenv("AWS_PROFILE", "lab")
    (tmp_path / "config").write_text(f"[profile lab]\nendpoint_url = {served.endpoint}\nregion = eu-west-1\n")
    (tmp_path / "credentials").write_text(f"[lab]\naws_access_key_id = {KEY}\naws_secret_access_key = {SECRET}\n")
    assert reshard.inspect(ADDRESS).files == 3
    assert all("/eu-west-1/s3/" in one.authorization for one in served.requests)


@pytest.mark.parametrize("answered", [0, 8])
def test_an_interrupt_is_heard_while_a_bucket_is_silent(served: ServedFolder, tmp_path: Path, answered: int) -> None:
    assert measure_interrupt(served, "s3", answered, [ADDRESS, str(tmp_path / "ranks")]) < 2


@pytest.mark.parametrize(
    ("address", "key", "kind", "words"),
    [
        ("s3://others/model", KEY, "no-source", "no such bucket"),
        ("s3://models/nope", KEY, "no-source", "nothing lies there"),
        (ADDRESS, "AKIAOTHER", "no-access", "are the keys right.* AWS_ACCESS_KEY_ID"),
    ],
)
@pytest.mark.usefixtures("served")
def test_what_cannot_be_read_is_refused(
    address: str, key: str, kind: str, words: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("AWS_ACCESS_KEY_ID", key)
    with pytest.raises(Refused, match=words) as caught:
        reshard.inspect(address)
    assert [problem.kind for problem in caught.value.problems] == [kind]
    assert SECRET not in str(caught.value)


def test_a_file_that_is_replaced_in_a_bucket_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("obstore")
    write_checkpoint(tmp_path / "source", TINY, 1)
    with serve_bucket(tmp_path / "source") as changing:
        monkeypatch.setenv("AWS_ENDPOINT_URL", changing.endpoint)
        with reshard.open(ADDRESS, framework="numpy") as tensors:
            path = next((tmp_path / "source").glob("*.safetensors"))
            content = bytearray(path.read_bytes())
            content[-1] ^= 1
            path.write_bytes(content)
            with pytest.raises(Refused, match="source changed"):
                tensors["model.embed_tokens.weight"][:1]


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("AWS_SESSION_TOKEN", f"{SECRET}\nmore…"),
        ("AWS_SECRET_ACCESS_KEY", f"{SECRET}\n"),
        ("AWS_ENDPOINT_URL", "http://[b"),
    ],
)
@pytest.mark.usefixtures("served")
def test_a_value_that_is_none_is_refused(name: str, value: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """obstore panics at some of these."""
    monkeypatch.setenv(name, value)
    with pytest.raises(Refused, match=name) as caught:
        reshard.inspect(ADDRESS)
    assert SECRET not in str(caught.value)


@pytest.mark.parametrize("fault", ["whole", "other-range"])
def test_a_bucket_that_ignores_ranges_is_refused_soon(served: ServedFolder, fault: str) -> None:
    served.faults[fault] = 10**6
    with pytest.raises(Refused, match="wrong answer") as caught:
        reshard.inspect(ADDRESS)
    assert "it sent the whole file, or another range of it" in str(caught.value)
    assert sum(bool(one.range) for one in served.requests) == 3


@pytest.mark.usefixtures("served")
def test_an_endpoint_that_does_not_answer_is_named_without_its_password(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(remote_store, "OPENING_PATIENCE", 0.2)
    monkeypatch.setenv("AWS_ENDPOINT_URL", f"http://me:{SECRET}@127.0.0.1:9")
    with pytest.raises(Refused, match=r"error sending request: Connection refused, \d+ times") as caught:
        reshard.inspect(ADDRESS)
    assert SECRET not in str(caught.value)
    assert SECRET not in shorten_reason(f"GET http://me:{SECRET}@host/x?sig={SECRET} failed")


@pytest.mark.parametrize("address", ["s3://models//inner", "s3://models/../inner"])
@pytest.mark.usefixtures("served")
def test_a_folder_that_no_store_can_have_is_refused(address: str) -> None:
    with pytest.raises(Refused, match="no name of a folder"):
        reshard.inspect(address)
