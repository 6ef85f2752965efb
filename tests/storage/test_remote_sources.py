"""Sources in stores: byte for byte what a folder gives, whatever the server does; or refused."""

import json
import re
import subprocess
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from families import write_full
from store_servers import (
    NAME,
    HubHandler,
    ServedFolder,
    WebHandler,
    measure_interrupt,
    require_same_files,
    serve_hub,
    serve_web,
)

import reshard
from reshard import Refused
from reshard.cli.main import main
from reshard.execution import writer
from reshard.formats.remote_names import require_path
from reshard.paths import RemotePath
from reshard.storage import hub, remote_store, web_client
from reshard.synthetic import SMALL_V3, write_checkpoint

TINY = {**SMALL_V3, "num_hidden_layers": 2, "vocab_size": 512, "n_routed_experts": 4, "num_experts_per_tok": 2}
ADDRESS = f"hf://{NAME}"
SECRET = "hf_abcdefSECRET"  # noqa: S105 - a made up one


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """With a checkpoint and what a conversion of its folder gives."""
    folder = tmp_path_factory.mktemp("made")
    write_checkpoint(folder / "source", TINY, 3)
    (folder / "source" / "original").mkdir()
    (folder / "source" / "original" / "params.json").write_text("{}")
    reshard.convert(folder / "source", folder / "ranks", mp=2)
    return folder


@pytest.fixture(autouse=True)
def environment(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """Waits are short, and nothing of this machine's own settings counts."""
    for name in ("HF_TOKEN", "HUGGING_FACE_HUB_TOKEN", "HF_TOKEN_PATH", "HF_ENDPOINT", "HF_HUB_OFFLINE", "http_proxy"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("HF_HOME", str(tmp_path / "hub"))
    monkeypatch.setattr(remote_store, "FIRST_WAIT", 0.01)
    monkeypatch.setattr(remote_store, "PATIENCE", 20.0)
    for name in ("no_proxy", "NO_PROXY"):
        monkeypatch.setenv(name, "127.0.0.1,localhost")
    monkeypatch.setattr(remote_store, "OPENING_PATIENCE", 20.0)


@pytest.fixture
def served(made: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[ServedFolder]:
    with serve_hub(made / "source") as hub_of_test:
        monkeypatch.setenv("HF_ENDPOINT", hub_of_test.endpoint)
        yield hub_of_test


@pytest.fixture
def told(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    lines: list[str] = []
    monkeypatch.setattr(remote_store, "LISTENERS", [lines.append])
    monkeypatch.setattr(remote_store, "TOLD_WAITS", {})
    return lines


def kinds_of(refused: Refused) -> set[str]:
    return {problem.kind for problem in refused.problems}


# --- what is asked ---


@pytest.mark.usefixtures("served")
def test_a_conversion_from_the_hub_gives_the_same_files(made: Path, tmp_path: Path) -> None:
    reshard.convert(ADDRESS, tmp_path / "ranks", mp=2)
    require_same_files(made / "ranks", tmp_path / "ranks")


def test_each_large_file_is_asked_of_the_hub_once(served: ServedFolder, tmp_path: Path) -> None:
    reshard.convert(ADDRESS, tmp_path / "ranks", mp=2)
    asked = [one.path for one in served.requests if one.server == "hub" and one.status == 302]
    assert len(asked) == len(set(asked)) == 3
    assert served.count("cdn") > 3


def test_a_plan_reads_headers_and_nothing_twice(served: ServedFolder) -> None:
    plan = reshard.plan(ADDRESS, mp=2)
    assert plan.path.name.startswith(f"model@{served.commit}")
    headers = sum(file.header_size for file in plan.source.files)
    assert headers <= served.sent["cdn"] < 1.5 * headers
    assert served.count("hub") == 2 + 2 * 2 + 3  # the commit, its files; config and index, twice each; the weights
    assert served.count("cdn") == 3
    asked = [(one.path, one.range) for one in served.requests]
    assert len(asked) == len(set(asked))


def test_a_plan_of_671_billion_parameters_is_cheap(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    write_full(tmp_path / "v3", "deepseek-v3")
    with serve_hub(tmp_path / "v3", delay=0.02) as large:
        monkeypatch.setenv("HF_ENDPOINT", large.endpoint)
        assert len(reshard.plan(ADDRESS, mp=16).files) == 16
        assert large.count("hub") <= 170
        assert large.count("cdn") == 163
        assert sum(large.sent.values()) <= 25_000_000
        assert 8 <= large.busiest <= 24  # some that are answered, and not yet counted off


def test_files_are_listed_in_pages(made: Path, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    with serve_hub(made / "source", page=2) as paged:
        monkeypatch.setenv("HF_ENDPOINT", paged.endpoint)
        reshard.convert(ADDRESS, tmp_path / "ranks", mp=2)
    require_same_files(made / "ranks", tmp_path / "ranks")


def test_ranks_are_read_alone(served: ServedFolder, tmp_path: Path) -> None:
    reshard.convert(ADDRESS, tmp_path / "both", mp=2)
    both = served.sent["cdn"]
    served.forget()
    reshard.convert(ADDRESS, tmp_path / "one", mp=2, ranks=[0])
    assert served.sent["cdn"] < 0.7 * both


@pytest.mark.parametrize("revision", ["main", "COMMIT"])
def test_a_revision_is_pinned_to_its_commit(served: ServedFolder, revision: str) -> None:
    content = reshard.inspect(f"{ADDRESS}@{revision.replace('COMMIT', served.commit)}")
    assert content.path == f"{ADDRESS}@{served.commit}"


# --- what all commands do ---


@pytest.mark.usefixtures("served")
def test_all_that_reads_a_source_reads_one_on_the_hub(made: Path) -> None:
    there = reshard.inspect(ADDRESS)
    assert there.tensors == reshard.inspect(made / "source").tensors
    assert reshard.verify(made / "ranks", ADDRESS).is_proven
    assert reshard.diff(ADDRESS, made / "source").is_same
    one = reshard.load(ADDRESS, mp=2, rank=1, framework="numpy")
    other = reshard.load(made / "source", mp=2, rank=1, framework="numpy")
    assert one.keys() == other.keys()
    assert all(np.array_equal(one[name], other[name]) for name in one)
    with reshard.open(ADDRESS, framework="numpy") as tensors, reshard.open(made / "source", framework="numpy") as here:
        name = "model.embed_tokens.weight"
        assert np.array_equal(tensors[name][3:5], here[name][3:5])
    assert reshard.inspect(f"{ADDRESS}/model-00001-of-00003.safetensors").files == 1


def test_rank_files_on_the_hub_are_a_source(made: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    reshard.convert(made / "ranks", tmp_path / "four", mp=4)
    with serve_hub(made / "ranks") as ranks:
        monkeypatch.setenv("HF_ENDPOINT", ranks.endpoint)
        reshard.convert(ADDRESS, tmp_path / "there", mp=4)
    require_same_files(tmp_path / "four", tmp_path / "there")


def test_the_command_names_the_commit_in_what_comes_next(
    served: ServedFolder, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["convert", ADDRESS, str(tmp_path / "ranks"), "--mp", "2"]) == 0
    said = capsys.readouterr().out
    assert f"reshard verify {tmp_path / 'ranks'} --source {ADDRESS}@{served.commit}\n" in said
    assert main(["verify", str(tmp_path / "ranks"), "--source", f"{ADDRESS}@{served.commit}"]) == 0
    assert main(["plan", ADDRESS]) == 0
    assert f"reshard convert {ADDRESS} TARGET --mp" in capsys.readouterr().out
    assert main(["plan", ADDRESS, "--mp", "2", "--target", str(tmp_path / "new")]) == 0


@pytest.mark.parametrize(
    "words",
    ["inspect AT", "plan AT", "plan AT --mp 2 --target NEW", "convert AT NEW --mp 2", "verify RANKS --source AT",
     "diff AT AT", "repair RANKS --source AT", "recipes check deepseek-v3 AT"],
)  # fmt: skip
@pytest.mark.usefixtures("served")
def test_every_command_prints_json(made: Path, tmp_path: Path, words: str, capsys: pytest.CaptureFixture[str]) -> None:
    places = {"AT": ADDRESS, "NEW": str(tmp_path / "new"), "RANKS": str(made / "ranks")}
    assert main([*(places.get(word, word) for word in words.split()), "--json"]) == 0
    assert json.loads(capsys.readouterr().out)


# --- faults of servers ---

PASSING = ["quota", "quota-after", "busy", "cdn-busy", "ended", "cut", "other-range", "whole"]


@pytest.mark.parametrize("fault", PASSING)
def test_a_fault_that_passes_changes_nothing(
    made: Path, served: ServedFolder, tmp_path: Path, fault: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(remote_store, "MOST_MISANSWERED", 4)
    plan = reshard.plan(ADDRESS, mp=2)
    served.faults[fault] = 1 if fault == "ended" else 2
    reshard.convert(ADDRESS, tmp_path / "ranks", mp=2)
    require_same_files(made / "ranks", tmp_path / "ranks")
    assert served.faults[fault] < 0
    assert plan.size


@pytest.mark.parametrize(("fault", "wait"), [("quota", 2), ("quota-after", 1)])
def test_a_quota_is_waited_for_as_long_as_told(served: ServedFolder, told: list[str], fault: str, wait: int) -> None:
    served.faults[fault] = 1
    started = time.monotonic()
    reshard.inspect(ADDRESS)
    assert time.monotonic() - started >= wait
    assert [line for line in told if re.search(rf"quota of requests is used up \(429\); waits {wait} s", line)]


@pytest.mark.parametrize(
    ("fault", "kind", "words"),
    [
        ("busy", "cannot-read", r"the server is busy \(503\), \d+ times in"),
        ("whole", "wrong-answer", r"sent the whole file \(200\) for a range of it \(206\)"),
        ("other-range", "wrong-answer", "it sent bytes 1-"),
        ("ended", "no-access", "the server answers 403"),
        ("cut-off", "cannot-read", "its answer ends at once"),
        ("gated", "no-access", "a gated model"),
    ],
)
def test_a_fault_that_lasts_is_refused(
    served: ServedFolder, tmp_path: Path, fault: str, kind: str, words: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    seconds = 20.0 if kind == "wrong-answer" else 0.2
    monkeypatch.setattr(remote_store, "PATIENCE", seconds)
    monkeypatch.setattr(remote_store, "OPENING_PATIENCE", seconds)
    served.faults[fault] = 10**6
    with pytest.raises(Refused, match=words) as caught:
        reshard.convert(ADDRESS, tmp_path / "ranks", mp=2)
    assert kinds_of(caught.value) == {kind}
    assert not (tmp_path / "ranks").exists()


def test_a_wait_that_is_too_long_is_refused(served: ServedFolder, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(remote_store, "MOST_TOLD", 1.5)
    served.faults["quota-after"] = 10
    with pytest.raises(Refused, match="the server says to wait 1 s more"):
        reshard.inspect(ADDRESS)


def test_a_conversion_goes_on_where_it_ended(
    made: Path, served: ServedFolder, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(writer, "FLUSH_SECONDS", 0.01)
    served.delay, served.ended_after = 0.05, 16
    with pytest.raises(Refused, match="the server answers 403"):
        reshard.convert(ADDRESS, tmp_path / "ranks", mp=2, jobs=1)
    first = served.sent["cdn"]
    assert (tmp_path / "ranks" / "reshard.journal").exists()
    served.forget()
    served.ended_after = None
    conversion = reshard.convert(ADDRESS, tmp_path / "ranks", mp=2)
    assert conversion.done is not None
    assert conversion.done.resumed > 0
    require_same_files(made / "ranks", tmp_path / "ranks")
    assert first > 1 << 20


def test_a_server_that_tells_no_time_to_wait_is_not_pressed(
    served: ServedFolder, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(remote_store, "MOST_TOLD", 1.0)
    served.faults["quota-zero"] = 10**6
    with pytest.raises(Refused, match="its quota of requests is used up"):
        reshard.inspect(ADDRESS)
    assert served.count("hub") < 12


def test_addresses_are_renewed_before_they_end(made: Path, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr(hub, "SHORTEST_USE", 0.0)
    with serve_hub(made / "source", expires=0.5, delay=0.05) as short:
        monkeypatch.setenv("HF_ENDPOINT", short.endpoint)
        reshard.convert(ADDRESS, tmp_path / "ranks", mp=2, jobs=1)
        assert short.count("hub", 302) > 3
    require_same_files(made / "ranks", tmp_path / "ranks")


def test_a_source_that_is_replaced_in_the_middle_is_refused(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    write_checkpoint(tmp_path / "source", TINY, 3)
    monkeypatch.setattr(hub, "SAFE_PART", 0.0)  # every read asks the hub
    monkeypatch.setattr(hub, "SHORTEST_USE", 0.0)
    with serve_hub(tmp_path / "source") as changing:
        monkeypatch.setenv("HF_ENDPOINT", changing.endpoint)
        with reshard.open(ADDRESS, framework="numpy") as tensors:
            name = "model.embed_tokens.weight"
            assert tensors[name][:1].size
            for path in (tmp_path / "source").glob("*.safetensors"):
                content = bytearray(path.read_bytes())
                content[-1] ^= 1
                path.write_bytes(content)
            with pytest.raises(Refused, match="source changed"):
                tensors["lm_head.weight"][:1]


# --- who may read ---


def test_a_private_repository_needs_its_token(
    made: Path, monkeypatch: pytest.MonkeyPatch, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    with serve_hub(made / "source", token=SECRET) as private:
        monkeypatch.setenv("HF_ENDPOINT", private.endpoint)
        assert main(["plan", ADDRESS, "--mp", "2"]) == 2
        said = capsys.readouterr().err
        assert f"{ADDRESS}: no access\n" in said
        assert "there is no token" in said
        assert "set HF_TOKEN" in said
        monkeypatch.setenv("HF_TOKEN", "hf_another")
        assert main(["plan", ADDRESS, "--mp", "2"]) == 2
        assert "hf_another" not in capsys.readouterr().err
        monkeypatch.delenv("HF_TOKEN")
        (tmp_path / "hub").mkdir()
        (tmp_path / "hub" / "token").write_text(f"{SECRET}\n")
        private.forget()
        assert main(["convert", ADDRESS, str(tmp_path / "ranks"), "--mp", "2"]) == 0
        printed = capsys.readouterr()
        assert SECRET not in printed.out + printed.err
        assert {one.authorization for one in private.requests if one.server == "hub"} == {f"Bearer {SECRET}"}
        assert {one.authorization for one in private.requests if one.server == "cdn"} == {""}
    require_same_files(made / "ranks", tmp_path / "ranks")
    assert not any(SECRET.encode() in path.read_bytes() for path in (tmp_path / "ranks").iterdir())


@pytest.mark.parametrize(
    ("address", "kind", "words"),
    [
        (f"{ADDRESS}@nope", "no-source", "no such revision"),
        ("hf://org/other", "no-access", "no such repository, or a private one"),
        ("hf://org", "no-source", "no name of a model"),
        ("hf://datasets/org/model", "no-source", "no name of a model"),
        (f"{ADDRESS}/nope", "no-source", "No such file"),
        (f"{ADDRESS}/original", "empty-source", "no file that ends in .safetensors"),
    ],
)
def test_what_is_not_there_is_refused(served: ServedFolder, address: str, kind: str, words: str) -> None:
    with pytest.raises(Refused, match=words) as caught:
        reshard.plan(address, mp=2)
    assert kinds_of(caught.value) == {kind}
    assert served.endpoint


@pytest.mark.parametrize(
    ("names", "kind"),
    [
        (["pytorch_model.bin", "config.json"], "other-format"),
        ([".metadata", "__0_0.distcp"], "damaged-pickle"),
        (["adapter_model.bin", "adapter_config.json"], "adapter"),
        (["unet/diffusion.safetensors", "model_index.json"], "other-format"),
        (["README.md"], "empty-source"),
        (["model-00001-of-00002.safetensors"], "missing-file"),
    ],
)
def test_what_is_no_checkpoint_is_called_by_its_name(
    tmp_path: Path, names: list[str], kind: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name in names:
        path = tmp_path / "folder" / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(b"{}" if name.endswith(".json") else b"\x80\x02 no header")
    with serve_hub(tmp_path / "folder") as other:
        monkeypatch.setenv("HF_ENDPOINT", other.endpoint)
        with pytest.raises(Refused) as caught:
            reshard.plan(ADDRESS, mp=2)
        assert kind in kinds_of(caught.value)


def test_names_that_lead_out_of_a_folder_are_not_there(served: ServedFolder, monkeypatch: pytest.MonkeyPatch) -> None:
    listed = HubHandler.answer_json
    bad = [{"type": "file", "path": name, "size": 1, "oid": "0"} for name in ("../x", "a/../b", "..", "a//b", "a\\b")]
    monkeypatch.setattr(
        HubHandler, "answer_json", lambda self, value, **more: listed(self, add_listed(value, bad), **more)
    )
    path = require_path(ADDRESS)
    assert isinstance(path, RemotePath)
    assert not [name for name in path.store.entries if ".." in name or "\\" in name or "//" in name]
    assert served.count("hub") == 2


def add_listed(value: Any, more: list[Any]) -> Any:
    return [*value, *more] if isinstance(value, list) else value


def test_offline_is_offline(served: ServedFolder, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    with pytest.raises(Refused, match="HF_HUB_OFFLINE"):
        reshard.inspect(ADDRESS)
    assert not served.requests


# --- interrupts ---


@pytest.mark.parametrize("answered", [0, 6])
def test_an_interrupt_is_heard_while_a_server_is_silent(served: ServedFolder, tmp_path: Path, answered: int) -> None:
    """In headers, and in what is copied."""
    seconds = measure_interrupt(served, "cdn", answered, [ADDRESS, str(tmp_path / "ranks")])
    assert seconds < 2


def test_an_interrupt_is_heard_while_we_wait(served: ServedFolder, tmp_path: Path) -> None:
    served.faults["quota-long"] = 10**6
    assert measure_interrupt(served, "hub", 0, [ADDRESS, str(tmp_path / "ranks")]) < 2


# --- web servers ---


@pytest.fixture
def web(made: Path) -> Iterator[ServedFolder]:
    with serve_web(made / "source") as server:
        yield server


def test_a_conversion_from_a_web_server_gives_the_same_files(made: Path, web: ServedFolder, tmp_path: Path) -> None:
    reshard.convert(f"{web.endpoint}/", tmp_path / "ranks", mp=2)
    require_same_files(made / "ranks", tmp_path / "ranks")


def test_headers_are_read_once_from_a_web_server(web: ServedFolder) -> None:
    reshard.plan(web.endpoint, mp=2)
    found = [one.path for one in web.requests if one.status == 206]
    assert len(found) == len(set(found))


def test_one_file_of_a_web_server_is_read(web: ServedFolder) -> None:
    content = reshard.inspect(f"{web.endpoint}/model-00001-of-00003.safetensors?key={SECRET}")
    assert content.files == 1
    assert SECRET not in str(content)
    assert all(one.path.endswith(f"?key={SECRET}") for one in web.requests)


def test_a_folder_without_a_checkpoint_is_refused(web: ServedFolder) -> None:
    with pytest.raises(Refused, match=r"neither model.safetensors.index.json nor model.safetensors"):
        reshard.inspect(f"{web.endpoint}/original")


def test_a_file_that_is_replaced_on_a_web_server_is_refused(tmp_path: Path) -> None:
    write_checkpoint(tmp_path / "source", TINY, 1)
    with serve_web(tmp_path / "source") as changing, reshard.open(changing.endpoint, framework="numpy") as tensors:
        path = next((tmp_path / "source").glob("*.safetensors"))
        content = bytearray(path.read_bytes())
        content[-1] ^= 1
        path.write_bytes(content)
        with pytest.raises(Refused, match=r"source changed[^$]*the server answers 412"):
            tensors["model.embed_tokens.weight"][:1]


@pytest.fixture(scope="module")
def certificate(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("tls") / "server.pem"
    words = ["openssl", "req", "-x509", "-newkey", "rsa:2048", "-nodes", "-days", "2", "-subj", "/CN=test"]
    words += ["-addext", "subjectAltName=IP:127.0.0.1", "-keyout", str(path), "-out", str(path.with_name("c.pem"))]
    subprocess.run(words, check=True, capture_output=True)
    path.write_text(path.read_text() + path.with_name("c.pem").read_text())
    return path


def test_a_conversion_over_tls_gives_the_same_files(
    made: Path, certificate: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("SSL_CERT_FILE", str(certificate.with_name("c.pem")))
    with serve_web(made / "source", certificate=certificate) as web:
        assert web.endpoint.startswith("https:")
        reshard.convert(web.endpoint, tmp_path / "ranks", mp=2)
    require_same_files(made / "ranks", tmp_path / "ranks")


def test_a_certificate_that_nobody_vouches_for_is_refused(made: Path, certificate: Path) -> None:
    with (
        serve_web(made / "source", certificate=certificate) as web,
        pytest.raises(Refused, match="self-signed certificate"),
    ):
        reshard.inspect(web.endpoint)


@pytest.mark.parametrize(
    ("to", "words"),
    [("http://127.0.0.1:9/", "leads to an address of http:"), ("file:///etc/passwd", "leads to what is no address")],
)
def test_a_protected_address_leads_to_no_open_one_and_to_no_file(
    to: str, words: str, made: Path, certificate: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("SSL_CERT_FILE", str(certificate.with_name("c.pem")))
    monkeypatch.setattr(WebHandler, "route", lambda self, _: self.answer(302, Location=to))
    with (
        serve_web(made / "source", certificate=certificate) as web,
        pytest.raises(Refused, match=words),
    ):
        reshard.inspect(web.endpoint)


def test_a_proxy_of_the_environment_is_used(made: Path, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    with serve_web(made / "source") as proxy:  # it takes the path of whatever address it is asked for
        monkeypatch.setenv("http_proxy", proxy.endpoint)
        reshard.convert("http://models.invalid/", tmp_path / "ranks", mp=2)
        assert all(one.path.startswith("http://models.invalid/") for one in proxy.requests)
    require_same_files(made / "ranks", tmp_path / "ranks")


def test_a_proxy_that_does_not_speak_http_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("http_proxy", "socks5://me:secret@127.0.0.1:9")
    with pytest.raises(Refused, match=r"socks5://127.0.0.1:9: cannot read") as caught:
        reshard.inspect("http://models.invalid/")
    assert "secret" not in str(caught.value)


def test_a_server_that_cannot_be_reached_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(remote_store, "PATIENCE", 0.2)
    monkeypatch.setattr(remote_store, "OPENING_PATIENCE", 0.2)
    monkeypatch.setenv("HF_ENDPOINT", "http://127.0.0.1:9")
    with pytest.raises(Refused, match=r"http://127.0.0.1:9: Connection refused, \d+ times"):
        reshard.inspect(ADDRESS)


def test_a_connection_that_was_closed_meanwhile_is_no_fault(
    served: ServedFolder, told: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(web_client, "MOST_IDLE", 0)
    reshard.plan(ADDRESS, mp=2)
    assert not told
    assert served.requests
