"""Rank files against their manifest alone: every damage is seen, and named with its file, its range and its tensors."""

import json
import os
import re
import shutil
from fractions import Fraction
from pathlib import Path
from random import Random

import pytest
from jobs import Job, convert_checkpoint
from safetensors import safe_open

from reshard.errors import Problem, Refused
from reshard.formats.manifest import read_manifest
from reshard.synthetic import SMALL_V3, write_checkpoint
from reshard.verification.checksums import audit_target

RANKS = 2
CONFIG = {**SMALL_V3, "num_hidden_layers": 3, "n_routed_experts": 4, "vocab_size": 30_000}
"""17 MB: large enough for several ranges of a tensor."""


@pytest.fixture(scope="session")
def good(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("audit")
    write_checkpoint(folder / "source", CONFIG, 2)
    convert_checkpoint(Job(folder / "source", RANKS), folder / "good")
    return folder / "good"


@pytest.fixture
def target(good: Path, tmp_path: Path) -> Path:
    """A copy to be damaged."""
    return shutil.copytree(good, tmp_path / "target")


@pytest.fixture(params=["through the cache", "past the cache"])
def way(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    if request.param == "past the cache":
        monkeypatch.setattr("reshard.storage.page_cache.measure_available_memory", lambda: 0)


def rank_file(target: Path, rank: int) -> Path:
    return target / f"model{rank}-mp{RANKS}.safetensors"


def flip(path: Path, place: int) -> None:
    with path.open("r+b") as file:
        file.seek(place)
        byte = file.read(1)[0]
        file.seek(place)
        file.write(bytes([byte ^ 16]))


def tensor_at(path: Path, place: int) -> str:
    """The name of the tensor that a byte of a file belongs to, or `header`."""
    content = path.read_bytes()
    start = 8 + int.from_bytes(content[:8], "little")
    if place < start:
        return "header"
    header = json.loads(content[8:start])
    (name,) = (
        name for name, entry in header.items() if entry["data_offsets"][0] <= place - start < entry["data_offsets"][1]
    )
    return str(name)


def facts(problems: tuple[Problem, ...]) -> list[tuple[str, str]]:
    return [(problem.kind, problem.subject) for problem in problems]


@pytest.mark.usefixtures("way")
def test_good_files_are_compared_whole(good: Path) -> None:
    told: list[int] = []
    report = audit_target(good, lambda done, _: told.append(done))
    sizes = [path.stat().st_size for path in good.glob("*.safetensors")]
    tensors = 0
    for rank in range(RANKS):
        with safe_open(rank_file(good, rank), "numpy") as file:
            tensors += len(file.keys())
    assert (report.problems, report.is_sampled) == ((), False)
    assert report.size == report.compared == told[-1] == sum(sizes)
    assert (report.ranks, report.files, report.tensors) == (RANKS, RANKS, tensors)


@pytest.mark.usefixtures("way")
def test_a_flipped_bit_is_named_with_file_range_and_tensor(good: Path, target: Path) -> None:
    random = Random(0)
    for _ in range(25):
        path = rank_file(target, random.randrange(RANKS))
        place = random.choice([random.randrange(path.stat().st_size), path.stat().st_size - 1])
        name = tensor_at(good / path.name, place)
        flip(path, place)
        (problem,) = audit_target(target).problems
        flip(path, place)
        found = re.fullmatch(r"(.+): bytes ([\d,]+) to ([\d,]+): (.+)", problem.subject)
        assert problem.kind == "wrong-checksum"
        assert found
        assert found[1] == path.name
        assert int(found[2].replace(",", "")) <= place < int(found[3].replace(",", ""))
        assert name in found[4] or "more" in found[4]
    assert audit_target(target).problems == ()


def test_stretches_that_lie_apart_are_named_apart_and_in_order(target: Path) -> None:
    path = rank_file(target, 1)
    size = path.stat().st_size
    for place in (size - 1, size // 2, 20):
        flip(path, place)
    reports = {audit_target(target).problems for _ in range(3)}
    assert len(reports) == 1
    (problems,) = reports
    begins = [int(re.findall(r"bytes ([\d,]+) to", problem.subject)[0].replace(",", "")) for problem in problems]
    assert begins == sorted(begins)
    assert len(begins) == 3


def test_swapped_truncated_missing_and_extra_files_are_named(target: Path) -> None:
    names = [rank_file(target, rank).name for rank in range(RANKS)]
    os.truncate(target / names[0], 5000)
    (target / names[1]).unlink()
    (target / "model7-mp8.safetensors").write_bytes(b"")
    (target / "tokenizer.json").unlink()
    assert facts(audit_target(target).problems) == [
        ("missing-file", names[1]),
        ("wrong-size", names[0]),
        ("extra-file", "model7-mp8.safetensors"),
        ("missing-file", "tokenizer.json"),
    ]


@pytest.mark.parametrize("sample", [None, Fraction(1, 1000)])
def test_swapped_files_of_one_size_are_named(sample: Fraction | None, tmp_path: Path) -> None:
    write_checkpoint(tmp_path / "source", SMALL_V3, 1)
    convert_checkpoint(Job(tmp_path / "source", 4), tmp_path / "out")
    paths = [tmp_path / "out" / f"model{rank}-mp4.safetensors" for rank in (0, 1)]
    assert paths[0].stat().st_size == paths[1].stat().st_size
    paths[0].rename(tmp_path / "kept")
    paths[1].rename(paths[0])
    (tmp_path / "kept").rename(paths[1])
    assert facts(audit_target(tmp_path / "out", sample=sample).problems) == [
        ("swapped-file", paths[0].name),
        ("swapped-file", paths[1].name),
    ]


def test_swapped_files_of_other_sizes_are_named(tmp_path: Path) -> None:
    """Five digits make the header of one longer."""
    write_checkpoint(tmp_path / "source", {**SMALL_V3, "n_routed_experts": 16}, 1)
    convert_checkpoint(Job(tmp_path / "source", 4), tmp_path / "out")
    paths = [tmp_path / "out" / f"model{rank}-mp4.safetensors" for rank in (0, 3)]
    assert paths[0].stat().st_size != paths[1].stat().st_size
    paths[0].rename(tmp_path / "kept")
    paths[1].rename(paths[0])
    (tmp_path / "kept").rename(paths[1])
    problems = audit_target(tmp_path / "out").problems
    assert [(problem.kind, problem.subject, problem.found) for problem in problems] == [
        ("swapped-file", paths[0].name, f"the header of {paths[1].name}"),
        ("swapped-file", paths[1].name, f"the header of {paths[0].name}"),
    ]


def test_a_file_that_ends_early_meanwhile_is_refused(target: Path) -> None:
    path = rank_file(target, 1)
    with pytest.raises(Refused, match=path.name):
        audit_target(target, lambda *_: os.truncate(path, 10))


# --- samples ---


def test_a_sample_tells_what_it_compared_and_is_the_same_every_time(good: Path) -> None:
    told: list[tuple[int, int]] = []
    shares = ("1/1000", "1/1000", "1/2", "1")
    reports = [audit_target(good, lambda *call: told.append(call), Fraction(share)) for share in shares]
    assert [done for done, total in told if done == total] == [report.size for report in reports]
    assert all(report.problems == () and report.is_sampled for report in reports)
    assert reports[0] == reports[1]
    assert 0 < reports[0].compared < reports[2].compared < reports[3].compared == reports[3].size
    headers = sum(int(path.read_bytes()[:8][::-1].hex(), 16) + 8 for path in good.glob("*.safetensors"))
    assert reports[0].compared > headers


def test_a_sample_sees_the_ranges_that_it_says_it_compared(good: Path, target: Path) -> None:
    """A bit of every range is flipped, one range at a time as the manifest has them."""
    wanted = audit_target(good, sample=Fraction(1, 3))
    seen = flipped = 0
    for entry in read_manifest(target)["files"]:
        offset, sizes = 0, list(map(int, entry["ranges"].split()[::2]))
        for size in sizes:
            flip(target / entry["name"], offset + size // 2)
            if audit_target(target, sample=Fraction(1, 3)).problems:
                seen += size
            flip(target / entry["name"], offset + size // 2)
            offset, flipped = offset + size, flipped + 1
    assert flipped > 10
    assert seen == wanted.compared < wanted.size


@pytest.mark.parametrize("rank", range(RANKS))
def test_the_smallest_sample_sees_the_header_and_the_last_byte(rank: int, target: Path) -> None:
    path = rank_file(target, rank)
    for place in (0, 100, path.stat().st_size - 1):
        flip(path, place)
        (problem,) = audit_target(target, sample=Fraction(1, 10**8)).problems
        flip(path, place)
        assert problem.subject.startswith(f"{path.name}: ")


def test_a_sample_looks_at_sizes_and_small_files_in_full(target: Path) -> None:
    os.truncate(rank_file(target, 0), rank_file(target, 0).stat().st_size - 1)
    flip(target / "tokenizer.json", 0)
    (target / "model7-mp8.safetensors").write_bytes(b"")
    assert [kind for kind, _ in facts(audit_target(target, sample=Fraction(1, 10**8)).problems)] == [
        "wrong-size",
        "extra-file",
        "wrong-checksum",
    ]
