"""Verifications whose bytes are compared in shares: the report is that of one process, whatever is wrong."""

import json
import os
import pickle
import shutil
import subprocess
import sys
from collections.abc import Callable
from fractions import Fraction
from functools import partial
from pathlib import Path
from random import Random
from typing import Any

import pytest
from share_runs import run_in_processes, verify_here, verify_in_shares

import reshard
from reshard.errors import Refused
from reshard.synthetic import SMALL_V3, write_checkpoint
from reshard.target.verified_shares import VerifyJob, compare_job_share
from reshard.types import Share

CONFIG = {
    **SMALL_V3,
    "num_hidden_layers": 3,
    "num_nextn_predict_layers": 0,
    "q_lora_rank": 256,
    "n_routed_experts": 4,
    "vocab_size": 4096,
}
COUNTS = (1, 2, 5)
LAYOUTS: dict[str, dict[str, Any]] = {
    "ranks": {"mp": 2},
    "dequantized": {"mp": 2, "cast": "bf16"},
    "whole": {"to": "hf", "cast": "bf16", "max_file_size": 6_000_000},
    "slices": {"mp": 2, "to": "dcp"},
    "fused": {"mp": 2, "for_engine": "vllm"},
}


@pytest.fixture(scope="session")
def source(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("shared") / "source"
    write_checkpoint(folder, CONFIG, 3)
    return folder


@pytest.fixture(scope="session")
def made(source: Path) -> Callable[[str], Path]:
    """Makes each layout once."""

    def make(layout: str) -> Path:
        target = source.parent / layout
        if not target.exists():
            reshard.convert(source, target, **LAYOUTS[layout])
        return target

    return make


def flip(path: Path, place: int) -> None:
    content = bytearray(path.read_bytes())
    content[place] ^= 64
    path.write_bytes(content)


def tensor_files(target: Path) -> list[Path]:
    return sorted(target.glob("*.safetensors"))


def flip_in_each_file(target: Path, random: Random) -> None:
    for path in tensor_files(target):
        size = path.stat().st_size
        for place in random.sample(range(size // 3, size), 4):
            flip(path, place)


def damage_header(target: Path, _: Random) -> None:
    flip(tensor_files(target)[-1], 40)


def remove_file(target: Path, random: Random) -> None:
    flip_in_each_file(target, random)
    tensor_files(target)[0].unlink()


def add_file(target: Path, random: Random) -> None:
    flip_in_each_file(target, random)
    shutil.copy(tensor_files(target)[0], target / "model9-mp16.safetensors")


def spoil_index(target: Path, _: Random) -> None:
    index = target / "model.safetensors.index.json"
    if index.exists():
        read = json.loads(index.read_text(encoding="utf-8"))
        read["weight_map"]["nothing"] = read["weight_map"].pop(min(read["weight_map"]))
        index.write_text(json.dumps(read), encoding="utf-8")
    else:
        cut_file(target, _)


def cut_file(target: Path, _: Random) -> None:
    path = tensor_files(target)[-1]
    path.write_bytes(path.read_bytes()[:-100])


def spoil_manifest(target: Path, _: Random) -> None:
    """The checksum of the last range of each file."""
    manifest = json.loads((target / "reshard.json").read_text(encoding="utf-8"))
    for entry in manifest["files"]:
        words = entry["ranges"].split()
        words[-1] = "0" * 32
        entry["ranges"] = " ".join(words)
    (target / "reshard.json").write_text(json.dumps(manifest), encoding="utf-8")


def change_sides(target: Path, _: Random) -> None:
    (target / "config.json").write_text("{}", encoding="utf-8")
    for path in target.glob("tokenizer*"):
        path.unlink()


def swap_files(target: Path, _: Random) -> None:
    one, other = tensor_files(target)[:2]
    one.rename(target / "between")
    other.rename(one)
    (target / "between").rename(other)


DAMAGES = [
    *(flip_in_each_file, damage_header, remove_file, add_file, spoil_index, cut_file),
    *(spoil_manifest, change_sides, swap_files),
]


def note(steps: list[tuple[int, int]], done: int, total: int) -> None:
    steps.append((done, total))


def look(verify: Callable[[], Any]) -> Any:
    """The report and its text; or the refusal and its problems."""
    try:
        report = verify()
    except Refused as refused:
        return refused.problems
    return report, str(report), report.is_proven, report.verdict


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("sample", [None, Fraction(1, 20)])
def test_a_sound_target_is_proven_by_any_number_of_shares(
    made: Callable[[str], Path], source: Path, layout: str, sample: Fraction | None
) -> None:
    target = made(layout)
    for other in (source, None):
        whole = verify_here(target, other, sample=sample)
        assert (whole.problems, whole.is_sampled) == ((), sample is not None)
        assert whole.compared
        for count in COUNTS:
            assert verify_in_shares(target, other, count, sample=sample) == whole


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("damage", DAMAGES)
def test_a_damaged_target_has_the_same_report(
    made: Callable[[str], Path], source: Path, layout: str, damage: Callable[[Path, Random], None], tmp_path: Path
) -> None:
    target = shutil.copytree(made(layout), tmp_path / "target")
    damage(target, Random(layout))
    found = []
    for other in (source, None):
        whole = look(lambda other=other: verify_here(target, other))  # type: ignore[misc]
        found.append(whole)
        for count in COUNTS:
            assert look(lambda other=other, count=count: verify_in_shares(target, other, count)) == whole  # type: ignore[misc]
    assert any(isinstance(one[0], reshard.Problem) or one[0].problems for one in found)


def test_of_some_ranks_only_these_are_compared(made: Callable[[str], Path], source: Path, tmp_path: Path) -> None:
    target = shutil.copytree(made("ranks"), tmp_path / "target")
    tensor_files(target)[0].unlink()
    for other in (source, None):
        whole = verify_here(target, other, ranks=(1,))
        assert whole.is_proven
        assert verify_in_shares(target, other, 3, ranks=(1,)) == whole


def test_whole_files_made_of_rank_files_are_compared_with_them(made: Callable[[str], Path], tmp_path: Path) -> None:
    reshard.convert(made("ranks"), tmp_path / "back", to="hf")
    flip_in_each_file(tmp_path / "back", Random(3))
    whole = verify_here(tmp_path / "back", made("ranks"))
    assert len(whole.problems) >= 3
    for count in COUNTS:
        assert verify_in_shares(tmp_path / "back", made("ranks"), count) == whole


def test_processes_of_their_own_find_the_same(made: Callable[[str], Path], source: Path, tmp_path: Path) -> None:
    target = shutil.copytree(made("dequantized"), tmp_path / "target")
    flip_in_each_file(target, Random(7))
    for other in (source, None):
        whole = verify_here(target, other)
        assert whole.problems
        assert verify_in_shares(target, other, 3, run=run_in_processes) == whole


def test_each_byte_is_compared_by_one_share(made: Callable[[str], Path], source: Path) -> None:
    """What the shares tell of their work is, added up, the work of all."""
    target = made("ranks")
    size = sum(path.stat().st_size for path in tensor_files(target))
    for other in (source, None):
        job = VerifyJob(str(target), str(other or ""), "", None, None, None, ignore_extra_files=False)
        told: list[list[tuple[int, int]]] = [[], [], []]
        found = [compare_job_share(job, Share(number, 3), partial(note, steps)) for number, steps in enumerate(told)]
        compared = [one.size if other else one[1] for one in found]
        assert all(steps[-1][0] == steps[-1][1] == mine for steps, mine in zip(told, compared, strict=True))
        assert min(compared) > size / 5
        headers = sum(8 + int.from_bytes(path.read_bytes()[:8], "little") for path in tensor_files(target))
        assert sum(compared) == size - (headers if other else 0)


@pytest.mark.parametrize("with_source", [True, False])
def test_other_files_on_another_machine_are_refused(
    made: Callable[[str], Path],
    source: Path,
    tmp_path: Path,
    with_source: bool,  # noqa: FBT001
) -> None:
    """The same names and sizes, of another conversion."""
    write_checkpoint(tmp_path / "source", {**CONFIG, "num_hidden_layers": 2}, 3)
    reshard.convert(tmp_path / "source", tmp_path / "target", mp=2)

    def run_there(call: Callable[..., Any], tasks: Any) -> list[Any]:
        elsewhere = tmp_path / "target", tmp_path / "source" if with_source else ""
        job = tasks[0]["job"]._replace(target=str(elsewhere[0]), source=str(elsewhere[1]))
        return [call(**{**task, "job": job}) for task in tasks]

    with pytest.raises(Refused) as refused:
        verify_in_shares(made("ranks"), source if with_source else None, 2, run=run_there)
    assert refused.value.problems[0].kind == "another-job"


@pytest.mark.parametrize("with_source", [True, False])
def test_a_copy_on_another_machine_is_refused(
    made: Callable[[str], Path],
    source: Path,
    tmp_path: Path,
    with_source: bool,  # noqa: FBT001
) -> None:
    """With the same bytes and times: whether all of them are the same, nobody has read."""
    shutil.copytree(made("ranks"), tmp_path / "target")

    def run_there(call: Callable[..., Any], tasks: Any) -> list[Any]:
        return [call(**{**task, "job": task["job"]._replace(target=str(tmp_path / "target"))}) for task in tasks]

    with pytest.raises(Refused) as refused:
        verify_in_shares(made("ranks"), source if with_source else None, 2, run=run_there)
    assert refused.value.problems[0].kind == "another-job"


@pytest.mark.parametrize("with_source", [True, False])
def test_another_disk_under_the_same_path_is_refused(
    made: Callable[[str], Path],
    source: Path,
    tmp_path: Path,
    with_source: bool,  # noqa: FBT001
) -> None:
    """Here the driver's target is damaged, and a sound copy is mounted over it for the shares."""
    target, sound = shutil.copytree(made("ranks"), tmp_path / "target"), shutil.copytree(made("ranks"), tmp_path / "s")
    for path in tensor_files(target):
        times = path.stat()
        flip(path, -1)
        os.utime(path, ns=(times.st_atime_ns, times.st_mtime_ns))
    alone = ["unshare", "--mount", "sh", "-c", 'mount --bind "$0" "$1" && shift && exec "$@"', str(sound), str(target)]
    if subprocess.run([*alone, "true"], check=False, capture_output=True).returncode:
        pytest.skip("no folder can be mounted here")
    code = "import pickle, sys; call, task = pickle.loads(sys.stdin.buffer.read()); call(**task)"

    def run_there(call: Callable[..., Any], tasks: Any) -> list[Any]:
        sent = pickle.dumps((call, tasks[0]))
        done = subprocess.run([*alone, sys.executable, "-c", code], input=sent, check=False, capture_output=True)
        assert done.returncode
        assert b"another job" in done.stderr
        raise reshard.Refused(())

    with pytest.raises(Refused):
        verify_in_shares(target, source if with_source else None, 2, run=run_there)


@pytest.mark.parametrize("with_source", [True, False])
def test_shares_that_lack_are_refused(made: Callable[[str], Path], source: Path, *, with_source: bool) -> None:
    def run_some(call: Callable[..., Any], tasks: Any) -> list[Any]:
        return [call(**task) for task in tasks[1:]]

    with pytest.raises(Refused, match="bytes compared"):
        verify_in_shares(made("ranks"), source if with_source else None, 2, run=run_some)


def test_a_file_that_changes_between_two_shares_is_refused(
    made: Callable[[str], Path], source: Path, tmp_path: Path
) -> None:
    target = shutil.copytree(made("ranks"), tmp_path / "target")

    def run_slowly(call: Callable[..., Any], tasks: Any) -> list[Any]:
        first = call(**tasks[0])
        path = tensor_files(target)[0]
        path.write_bytes(path.read_bytes())
        return [first, *(call(**task) for task in tasks[1:])]

    with pytest.raises(Refused) as refused:
        verify_in_shares(target, source, 2, run=run_slowly)
    assert refused.value.problems[0].kind == "file-changed"
