"""Targets that a conversion has written into a bucket: verified by reading, and by the ETags that it has recorded."""

from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from s3_server import S3State, Stored, make_etag, serve_s3, set_s3_environment

import reshard
from reshard.synthetic import SMALL_V3, write_checkpoint
from reshard.verification.report import Report

pytest.importorskip("obstore", reason="the package obstore is not installed")
TINY = {**SMALL_V3, "num_hidden_layers": 2, "vocab_size": 512, "n_routed_experts": 4, "num_experts_per_tok": 2}
TARGET = "s3://models/some/ranks"
RANK = "some/ranks/model1-mp2.safetensors"


@pytest.fixture(scope="module")
def source(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("made") / "source"
    write_checkpoint(folder, TINY, 3)
    return folder


@pytest.fixture
def bucket(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[S3State]:
    with serve_s3(least_part=1) as state:
        set_s3_environment(monkeypatch, state, tmp_path)
        yield state


def verify(*places: Any, **options: Any) -> Report:
    report = reshard.verify(*places, **options)
    assert isinstance(report, Report)
    return report


@pytest.mark.parametrize("options", [{"mp": 2}, {"to": "dcp", "ranks": 3}, {"to": "hf", "cast": "bf16"}])
def test_what_was_written_is_proven_and_unchanged(source: Path, bucket: S3State, options: dict[str, Any]) -> None:
    reshard.convert(source, TARGET, **options)
    assert verify(TARGET).is_proven
    assert verify(TARGET, source).is_proven
    report = verify(TARGET, checksums_only=True)
    assert (report.problems, report.verdict) == ((), "unchanged")
    assert bucket.objects["some/ranks/reshard-store.json"]


def test_ranks_of_several_runs_are_all_recorded(source: Path, bucket: S3State) -> None:
    for rank in (1, 0):
        reshard.convert(source, TARGET, mp=2, ranks=[rank])
        assert verify(TARGET, checksums_only=True).verdict == "unchanged"
        assert verify(TARGET, checksums_only=True, ranks=[rank]).files == 1
    assert verify(TARGET, checksums_only=True).files == 2
    assert RANK in bucket.objects


def change(content: bytes) -> bytes:
    return content[:-1000] + bytes([content[-1000] ^ 1]) + content[-999:]


@pytest.mark.parametrize(
    ("damage", "read", "listed"),
    [
        (change, "wrong-checksum", "other-upload"),
        (lambda content: content[:-1], "wrong-size", "wrong-size"),
        (lambda _: None, "missing-file", "missing-file"),
        (lambda content: content, "", "other-upload"),  # the same bytes, in one part now
    ],
)
def test_damage_is_found_and_mended_by_the_hint(
    source: Path, bucket: S3State, damage: Callable[[bytes], bytes | None], read: str, listed: str
) -> None:
    reshard.convert(source, TARGET, mp=2)
    content = damage(bucket.objects[RANK].content)
    if content is None:
        del bucket.objects[RANK]
    else:
        bucket.objects[RANK] = Stored(content, make_etag(content))
    report, by_etags = verify(TARGET), verify(TARGET, checksums_only=True)
    assert [problem.kind for problem in report.problems] == ([read] if read else [])
    assert [problem.kind for problem in by_etags.problems] == [listed]
    reshard.convert(source, TARGET, mp=2, restart=True, yes=True)
    assert verify(TARGET).is_proven
    assert verify(TARGET, checksums_only=True).verdict == "unchanged"
