"""reshard.repair: whatever was damaged, the target is again, byte for byte, what one conversion had written."""

import json
import os
import shlex
import shutil
import subprocess
import sys
from hashlib import sha256
from pathlib import Path
from typing import Any

import pytest
from downloads import flip
from jobs import Job, convert_checkpoint
from small_models import write_model
from targets import CONFIG, RANKS, leave_unfinished, make_source_and_target, rank_file, stamps
from torture import contents

import reshard
from reshard.cli.main import main
from reshard.errors import Refused
from reshard.execution.execute import execute_plan
from reshard.formats.manifest import compute_manifest_checksum
from reshard.formats.target_names import JOURNAL, MANIFEST
from reshard.synthetic import write_checkpoint
from reshard.types import Subset

STAGING = ".reshard-repair"
JOBS = {
    "ranks": {"mp": RANKS},
    "cast": {"mp": 2, "cast": "bf16"},
    "padded": {"mp": 2, "pad": True},
    "whole": {"mp": 1, "to": "hf", "max_file_size": 2_000_000},
    "whole cast": {"mp": 1, "to": "hf", "cast": "bf16"},
    "subset": {"mp": 2, "subset": Subset(layers=(0,))},
    "only": {"mp": 2, "subset": Subset(only=("*.layers.1.*",))},
    "part": {"mp": RANKS, "ranks": [1, 3]},
}
"""By name: conversions whose options the manifest must tell."""


@pytest.fixture(scope="module")
def source(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_source_and_target(tmp_path_factory.mktemp("repair"))


@pytest.fixture(scope="module")
def good(source: Path) -> Path:
    return source.with_name("whole")


@pytest.fixture
def target(good: Path, tmp_path: Path) -> Path:
    """A copy to be damaged."""
    return shutil.copytree(good, tmp_path / "my target")


def kinds(refused: pytest.ExceptionInfo[Refused]) -> set[str]:
    return {problem.kind for problem in refused.value.problems}


def damage_all(target: Path) -> set[str]:
    """One flipped byte, one missing file, one that is cut short, and two side files. Returns their names."""
    flip(rank_file(target, 0), -100)
    rank_file(target, 1).unlink()
    with rank_file(target, 2).open("r+b") as file:
        file.truncate(1000)
    (target / "run_config.json").write_text("{}", encoding="utf-8")
    (target / "tokenizer.json").unlink()
    return {*(rank_file(target, rank).name for rank in (0, 1, 2)), "run_config.json", "tokenizer.json"}


# --- what is mended ---


def test_every_damage_is_mended_and_nothing_else_is_touched(source: Path, good: Path, target: Path) -> None:
    before, damaged = stamps(target), damage_all(target)
    report = reshard.repair(target, source)
    assert set(report.damaged) == set(report.repaired) == damaged
    assert report.size == sum((good / name).stat().st_size for name in damaged)
    assert report.is_proven
    after = stamps(target)
    assert {name for name in before if after[name] != before[name]} == damaged
    assert report.kept == (".run_config.json.before-repair",)
    assert (target / report.kept[0]).read_text(encoding="utf-8") == "{}"
    (target / report.kept[0]).unlink()
    assert contents(target) == contents(good)
    assert reshard.verify(target, source).is_proven


@pytest.mark.parametrize("place", [3, 100, 5000, -1], ids=["length", "header", "data", "last"])
def test_one_flipped_byte_has_one_file_written_again(place: int, source: Path, good: Path, target: Path) -> None:
    flip(rank_file(target, 3), place)
    assert reshard.repair(target, source).repaired == (rank_file(target, 3).name,)
    assert contents(target) == contents(good)


@pytest.mark.parametrize("name", JOBS)
def test_the_options_that_it_was_made_with_are_used(name: str, source: Path, tmp_path: Path) -> None:
    job = Job(source, **JOBS[name])  # type: ignore[arg-type]
    convert_checkpoint(job, tmp_path / "target")
    wanted = contents(tmp_path / "target")
    files = sorted((tmp_path / "target").glob("*.safetensors"))
    sides = [path for path in (tmp_path / "target").glob("*.json") if not path.name.startswith("reshard")]
    flip(files[0], -100)
    files[-1].unlink()
    for path in sides:
        flip(path, 0)
    report = reshard.repair(tmp_path / "target", source)
    assert report.is_proven, report
    assert len(report.repaired) == len({files[0], files[-1]}) + len(sides)
    assert len(report.kept) == len(sides)
    for kept in report.kept:
        (tmp_path / "target" / kept).unlink()
    assert contents(tmp_path / "target") == wanted


def test_what_was_restored_from_rank_files_is_repaired_from_them(good: Path, source: Path, tmp_path: Path) -> None:
    convert_checkpoint(Job(good, 1, to="hf"), tmp_path / "whole")
    wanted = contents(tmp_path / "whole")
    flip(tmp_path / "whole" / "config.json", 5)
    flip(min((tmp_path / "whole").glob("*.safetensors")), -100)
    report = reshard.repair(tmp_path / "whole", good)
    assert len(report.repaired) == 2
    (tmp_path / "whole" / report.kept[0]).unlink()
    assert contents(tmp_path / "whole") == wanted
    assert {name: wanted[name] for name in contents(source)} == contents(source)


def test_parts_that_were_brought_together_are_repaired_before_they_are_joined(
    source: Path, good: Path, tmp_path: Path
) -> None:
    target = tmp_path / "target"
    for ranks in ([0, 1], [2, 3]):
        convert_checkpoint(Job(source, RANKS, ranks=ranks), tmp_path / f"part{ranks[0]}")
        subprocess.run(["cp", "-r", f"{tmp_path / f'part{ranks[0]}'}/.", target], check=True)
    flip(rank_file(target, 0), -100)
    rank_file(target, 3).unlink()
    report = reshard.repair(target, source)
    assert set(report.repaired) == {rank_file(target, 0).name, rank_file(target, 3).name}
    assert [problem.kind for problem in report.problems] == ["not-joined"]
    convert_checkpoint(Job(source, RANKS), target)
    assert contents(target) == contents(good)


def test_the_ranks_of_one_node_are_repaired_where_they_lie(source: Path, good: Path, target: Path) -> None:
    for rank in (0, 1):
        rank_file(target, rank).unlink()
    flip(rank_file(target, 3), -100)
    assert reshard.repair(target, source, ranks=[2, 3]).repaired == (rank_file(target, 3).name,)
    assert not rank_file(target, 0).exists()
    assert rank_file(target, 3).read_bytes() == rank_file(good, 3).read_bytes()


# --- what is left alone ---


@pytest.mark.parametrize("words", [[], ["--source", "nowhere"], ["--dry-run"]])
def test_a_target_as_it_was_written_is_left_alone(
    words: list[str], target: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    before, folder = stamps(target), target.stat().st_mtime_ns
    assert main(["repair", str(target), *words]) == 0
    assert "nothing to repair" in capsys.readouterr().out
    assert (stamps(target), target.stat().st_mtime_ns) == (before, folder)


def test_a_dry_run_names_the_damage_and_the_command_and_writes_nothing(
    source: Path, target: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    damaged = damage_all(target)
    before, folder = stamps(target), target.stat().st_mtime_ns
    assert main(["repair", str(target), "--source", str(source), "--dry-run"]) == 1
    told = capsys.readouterr().out
    assert all(name in told for name in damaged)
    assert f"next:\n  reshard repair '{target}' --source {source}  # writes 5 files, " in told
    assert (stamps(target), target.stat().st_mtime_ns) == (before, folder)
    report = reshard.repair(target, dry_run=True)
    assert (set(report.damaged), report.repaired, report.is_proven) == (damaged, (), False)


def test_files_of_other_people_are_left_alone_and_told(source: Path, target: Path) -> None:
    (target / "notes.txt").write_text("mine", encoding="utf-8")
    (target / "other.safetensors").write_text("mine", encoding="utf-8")
    flip(rank_file(target, 1), -100)
    report = reshard.repair(target, source)
    assert report.repaired == (rank_file(target, 1).name,)
    assert [(problem.kind, problem.subject) for problem in report.problems] == [("extra-file", "other.safetensors")]
    assert (target / "notes.txt").read_text(encoding="utf-8") == "mine"


def test_what_somebody_made_of_a_side_file_is_kept_each_time(source: Path, target: Path) -> None:
    for number, name in enumerate((".run_config.json.before-repair", ".run_config.json.before-repair-2")):
        (target / "run_config.json").write_text(f"mine {number}", encoding="utf-8")
        assert name in str(reshard.repair(target, source))
    for number, name in enumerate((".run_config.json.before-repair", ".run_config.json.before-repair-2")):
        assert (target / name).read_text(encoding="utf-8") == f"mine {number}"
    assert reshard.verify(target, source).is_proven


def test_of_two_tokenizers_of_parts_none_is_replaced(source: Path, tmp_path: Path) -> None:
    tokenizer, target = tmp_path / "tokenizer", tmp_path / "target"
    tokenizer.mkdir()
    for name in ("tokenizer.json", "tokenizer_config.json"):
        shutil.copy(source / name, tokenizer)
    with (tokenizer / "tokenizer.json").open("a", encoding="utf-8") as file:
        file.write(" ")
    reshard.convert(source, tmp_path / "part", RANKS, ranks=[0, 1])
    reshard.convert(source, target, RANKS, ranks=[2, 3], tokenizer_path=tokenizer)
    subprocess.run(["cp", "-rn", f"{tmp_path / 'part'}/.", target], check=True)
    before = stamps(target)
    report = reshard.repair(target, source)
    assert (report.damaged, report.repaired, report.is_proven) == ((), (), False)
    assert ("wrong-checksum", "tokenizer.json") in {(problem.kind, problem.subject) for problem in report.problems}
    assert stamps(target) == before


def test_what_a_repair_left_that_was_killed_at_its_end_is_removed(target: Path) -> None:
    (target / STAGING).mkdir()
    (target / STAGING / MANIFEST).write_text("{}", encoding="utf-8")
    assert reshard.repair(target).is_proven
    assert not (target / STAGING).exists()
    assert not (target / JOURNAL).exists()


def test_a_file_that_nobody_else_may_read_stays_so(source: Path, target: Path) -> None:
    flip(rank_file(target, 1), -100)
    rank_file(target, 1).chmod(0o600)
    assert reshard.repair(target, source).is_proven
    assert rank_file(target, 1).stat().st_mode & 0o777 == 0o600


def test_files_of_a_repair_that_ended_while_it_read_back_make_room(
    source: Path, good: Path, target: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """They are counted as room for the new ones; so they must be gone before these are written."""
    (target / STAGING).mkdir()
    for rank in (1, 2):
        shutil.copy(rank_file(good, rank), target / STAGING)
    flip(rank_file(target, 1), -100)
    seen = []

    def look(plan: Any, staging: Path, *rest: Any) -> Any:
        seen.append([*staging.iterdir()])
        return execute_plan(plan, staging, *rest)

    monkeypatch.setattr("reshard.target.repair.execute_plan", look)
    assert reshard.repair(target, source).is_proven
    assert seen == [[]]
    assert contents(target) == contents(good)


def test_names_in_a_hostile_manifest_reach_no_terminal(target: Path) -> None:
    manifest = json.loads((target / MANIFEST).read_text(encoding="utf-8"))
    del manifest["xxh3_128"]
    manifest["side_files"].append({"name": "\x1b[31mred\n", "size": 3, "xxh3_128": "0" * 32})
    manifest["xxh3_128"] = compute_manifest_checksum(manifest)
    (target / MANIFEST).write_text(json.dumps(manifest), encoding="utf-8")
    report = reshard.repair(target, dry_run=True)
    assert report.damaged == ("\x1b[31mred\n",)
    assert all(line.isprintable() for line in str(report).split("\n"))
    assert "\nred" not in str(report)


# --- what is refused ---


def test_what_lies_in_the_way_is_refused_before_anything_is_written(source: Path, target: Path) -> None:
    """A folder with the name of a file; a file, or files of other people, where new ones are written."""
    flip(rank_file(target, 0), -100)
    damaged = contents(target)
    rank_file(target, 1).rename(target / "away")
    rank_file(target, 1).mkdir()
    with pytest.raises(Refused, match="move it out of the folder") as refused:
        reshard.repair(target, source)
    assert [problem.subject for problem in refused.value.problems] == [str(rank_file(target, 1))]
    assert not (target / STAGING).exists()
    rank_file(target, 1).rmdir()
    (target / "away").rename(rank_file(target, 1))
    (target / STAGING).touch()
    with pytest.raises(Refused, match="move it out of the folder"):
        reshard.repair(target, source)
    (target / STAGING).unlink()
    (target / STAGING).mkdir()
    (target / STAGING / "notes.txt").touch()
    with pytest.raises(Refused, match="move them elsewhere"):
        reshard.repair(target, source)
    (target / STAGING / "notes.txt").unlink()
    (target / STAGING).rmdir()
    assert contents(target) == damaged


def test_another_source_is_refused_before_anything_is_written(source: Path, target: Path, tmp_path: Path) -> None:
    write_checkpoint(tmp_path / "bytes", CONFIG, 2, seed=1)
    write_checkpoint(tmp_path / "files", CONFIG, 3)
    write_checkpoint(tmp_path / "layers", {**CONFIG, "num_hidden_layers": 3}, 2)
    flip(rank_file(target, 1), -100)
    before = stamps(target)
    for name in ("bytes", "files", "layers"):
        with pytest.raises(Refused) as refused:
            reshard.repair(target, tmp_path / name)
        assert kinds(refused) == {"another-source"}, name
        assert stamps(target) == before
    assert reshard.repair(target, source).is_proven


def test_a_source_that_has_changed_since_mends_only_what_it_still_can(
    source: Path, good: Path, target: Path, tmp_path: Path
) -> None:
    """One byte, which no sample of the manifest has: it shows when the new file is read back."""
    changed = shutil.copytree(source, tmp_path / "changed")
    first = min(changed.glob("*.safetensors"))
    flip(first, first.stat().st_size // 4)
    os.utime(first, ns=(0, 0))
    for rank in range(RANKS):
        flip(rank_file(target, rank), 500)
    (target / "tokenizer.json").unlink()
    before = contents(target)
    report = reshard.repair(target, changed)
    left = set(report.damaged) - set(report.repaired)
    assert left
    assert "tokenizer.json" in report.repaired
    assert {problem.kind for problem in report.problems} == {"source-changed", "wrong-checksum"}
    now, wanted = contents(target), contents(good)
    assert {name: now[name] for name in left} == {name: before[name] for name in left}
    assert {name: now[name] for name in report.repaired} == {name: wanted[name] for name in report.repaired}
    assert not (target / STAGING).exists()
    assert reshard.repair(target, source).is_proven
    assert contents(target) == contents(good)


def test_a_config_from_another_folder_is_taken_from_the_target(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Without the number of key heads nobody can tell what the ranks share."""
    source, config, target = (tmp_path / name for name in ("source", "config", "target"))
    write_model(source, "llama")
    config.mkdir()
    for path in source.glob("*.json"):
        if "index" not in path.name:
            path.rename(config / path.name)
    reshard.convert(source, target, 2, config=config)
    before = contents(target)
    damaged = target / "model-rank1-of-2.safetensors"
    flip(damaged, -100)
    assert main(["verify", str(target), "--source", str(source)]) == 1
    assert paste(capsys.readouterr().out, capsys) == [0]
    assert contents(target) == before

    (target / "tokenizer.json").unlink()
    flip(damaged, -100)
    with pytest.raises(Refused, match="config FOLDER"):
        reshard.repair(target, source)
    assert reshard.repair(target, source, config=config).is_proven
    assert contents(target) == before


def test_a_side_file_that_came_from_another_folder_wants_that_folder(source: Path, tmp_path: Path) -> None:
    bare = shutil.copytree(source, tmp_path / "bare")
    config = tmp_path / "config"
    config.mkdir()
    (bare / "config.json").rename(config / "config.json")
    (bare / "tokenizer.json").rename(config / "tokenizer.json")
    target = tmp_path / "target"
    reshard.convert(bare, target, to="hf", config=config)
    (target / "tokenizer.json").unlink()
    problems = {problem.kind: problem for problem in reshard.repair(target, bare).problems}
    assert problems["source-changed"].remedy.startswith("name the folder that it came from with --config; or ")
    assert reshard.repair(target, bare, config=config).is_proven


def test_a_side_file_that_the_source_has_otherwise_remains_a_problem(
    source: Path, good: Path, target: Path, tmp_path: Path
) -> None:
    changed = shutil.copytree(source, tmp_path / "changed")
    (changed / "tokenizer.json").write_text("{}", encoding="utf-8")
    (target / "tokenizer.json").unlink()
    flip(rank_file(target, 2), -100)
    report = reshard.repair(target, changed)
    assert report.repaired == (rank_file(target, 2).name,)
    assert {problem.kind for problem in report.problems} == {"source-changed", "missing-file"}
    shutil.copy(good / "tokenizer.json", target)  # what the hint says
    assert reshard.repair(target).is_proven


def test_without_a_source_the_command_that_has_one_is_named(target: Path, capsys: pytest.CaptureFixture[str]) -> None:
    flip(rank_file(target, 0), -100)
    assert main(["repair", str(target)]) == 2
    told = capsys.readouterr().err
    assert rank_file(target, 0).name in told
    assert "hint:     the same command with --source SOURCE\n" in told
    with pytest.raises(Refused, match="source"):
        reshard.repair(target)


@pytest.mark.parametrize("is_there", [False, True], ids=["missing", "damaged"])
def test_without_a_sound_manifest_nothing_is_repaired(is_there: bool, source: Path, target: Path) -> None:  # noqa: FBT001
    if is_there:
        flip(target / MANIFEST, -100)
    else:
        (target / MANIFEST).unlink()
    flip(rank_file(target, 0), -100)
    before = stamps(target)
    with pytest.raises(Refused) as refused:
        reshard.repair(target, source)
    assert kinds(refused) == {"wrong-manifest" if is_there else "no-manifest"}
    assert "convert into another folder" in refused.value.problems[0].remedy
    assert stamps(target) == before


# --- interruptions ---

KILLED = """
import os, pathlib, sys
import reshard.execution.execute, reshard.storage.local, reshard.target.repair, reshard.execution.staging
from reshard.cli.process import entry

left = {left}
def dying(function):
    def call(*arguments, **options):
        global left
        left -= 1
        if left < 0:
            os._exit(9)
        return function(*arguments, **options)
    return call

pathlib.Path.rename = dying(pathlib.Path.rename)
for name in ("open_journal", "open_targets", "make_durable"):
    setattr(reshard.execution.execute, name, dying(getattr(reshard.execution.execute, name)))
reshard.target.repair.prove_staged_files = dying(reshard.target.repair.prove_staged_files)
reshard.execution.staging.remove_files = dying(reshard.execution.staging.remove_files)
entry()
"""
"""The command, which dies at one of its steps like a process that is killed."""


def test_a_second_repair_ends_what_a_killed_one_began(source: Path, good: Path, tmp_path: Path) -> None:
    """Killed at every step: a file with its final name is always the damaged one or the good one."""
    wanted, ends = contents(good), set()
    for left in range(20):
        target = shutil.copytree(good, tmp_path / str(left))
        damaged = {rank_file(target, rank).name for rank in (0, 2)}
        for name in damaged:
            flip(target / name, -100)
        before = contents(target)
        words = [sys.executable, "-c", KILLED.format(left=left), "repair", str(target), "--source", str(source)]
        ended = subprocess.run(words, check=False, capture_output=True, text=True, timeout=60).returncode
        assert ended in (0, 9)
        found = {name: sha256((target / name).read_bytes()).hexdigest() for name in wanted if (target / name).exists()}
        assert found.keys() == wanted.keys()
        assert all(found[name] in {before[name], wanted[name]} for name in found)
        ends.add(ended)
        if left % 2:  # and other damage, so that what was begun is not what is to be done
            flip(rank_file(target, 3), -100)
        assert reshard.repair(target, source).is_proven
        assert contents(target) == wanted
        assert not (target / STAGING).exists()
        if not ended:
            break
    assert ends == {0, 9}


def test_an_interrupted_conversion_of_other_ranks_is_left_to_go_on(source: Path, good: Path, tmp_path: Path) -> None:
    target = tmp_path / "target"
    convert_checkpoint(Job(source, RANKS, ranks=[0, 1]), target)
    leave_unfinished(Job(source, RANKS), target)
    journal = (target / JOURNAL).read_bytes()
    flip(rank_file(target, 1), -100)
    assert reshard.repair(target, source).repaired == (rank_file(target, 1).name,)
    assert (target / JOURNAL).read_bytes() == journal
    result = convert_checkpoint(Job(source, RANKS), target)
    assert result.done is not None
    assert result.done.resumed > 0
    assert contents(target) == contents(good)


# --- what verify prints ---


def paste(told: str, capsys: pytest.CaptureFixture[str]) -> list[int]:
    """Runs the commands that were printed, as a shell would take them; returns their exit codes."""
    lines = [line for line in told.splitlines() if line.startswith("  reshard ")]
    codes = [main(shlex.split(line, comments=True)[1:]) for line in lines]
    capsys.readouterr()
    return codes


def test_the_command_that_verify_prints_makes_it_succeed(
    source: Path, good: Path, target: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    damage_all(target)
    verify = ["verify", str(target), "--source", str(source)]
    assert main(verify) == 1
    told = capsys.readouterr().out
    assert f"or, for all ranks:\n  reshard repair '{target}' --source {source}  # writes 5 files, " in told
    assert paste(told, capsys)[-1] == 0
    assert main(verify) == 0
    assert main(["verify", str(target)]) == 0
    (target / ".run_config.json.before-repair").unlink()
    assert contents(target) == contents(good)


def test_without_a_source_the_command_has_a_place_for_it(
    source: Path, target: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    flip(rank_file(target, 0), -100)
    assert main(["verify", str(target), "--json"]) == 1
    (command,) = json.loads(capsys.readouterr().out)["next"]
    assert command == f"reshard repair '{target}' --source SOURCE"
    assert main(shlex.split(command.replace("SOURCE", shlex.quote(str(source))))[1:]) == 0
    assert main(["verify", str(target)]) == 0


def test_of_ranks_that_lie_elsewhere_the_ranks_that_are_here_are_verified_or_repaired_first(
    source: Path, target: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    for rank in (0, 1):
        rank_file(target, rank).unlink()
    assert main(["inspect", str(target)]) == 0
    said = capsys.readouterr().out
    assert "\nnote: a part of a target: ranks 2-3 of 4, by reshard.json\n" in said
    assert "missing" not in said
    words = f"'{target}'", f"'{target}' --source {source}"
    for given in ([], ["--source", str(source)]):
        assert main(["verify", str(target), *given]) == 1
        told = capsys.readouterr().out
        for_these, here, for_all, everything = told.splitlines()[-4:]
        assert for_these == "next, for the ranks that are here:"
        assert here == f"  reshard verify {words[given != []]} --ranks 2-3"
        assert for_all.startswith("or, for all ranks")
        assert everything.startswith(f"  reshard repair '{target}' --source ")
        assert "# writes 2 files, " in everything
        assert main(shlex.split(here)[1:]) == 0
    flip(rank_file(target, 3), -100)
    for given in ([], ["--source", str(source)]):
        capsys.readouterr()
        assert main(["verify", str(target), *given]) == 1
        told = capsys.readouterr().out
        for_these, here, _, everything = told.splitlines()[-4:]
        assert for_these.startswith("next, for the ranks that are here")
        assert here.startswith(f"  reshard repair '{target}' --source ")
        assert " --ranks 2-3  # writes 1 file, " in here
        assert "# writes 3 files, " in everything
        assert "verify" not in told.partition("model3")[2].partition("\n")[2]
    assert main(shlex.split(here, comments=True)[1:]) == 0
    assert capsys.readouterr().err.count("reshard ") == 1  # of three steps, the first names the command
    assert not rank_file(target, 0).exists()
    assert main(["verify", str(target), "--ranks", "2-3"]) == 0


def test_a_good_target_and_a_wrong_source_get_no_command(
    target: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    write_checkpoint(tmp_path / "other", CONFIG, 2, seed=1)
    assert main(["verify", str(target)]) == 0
    assert "next" not in capsys.readouterr().out
    assert main(["verify", str(target), "--source", str(tmp_path / "other")]) == 1
    assert "reshard repair" not in capsys.readouterr().out


def leave_begun_repair(target: Path) -> Path:
    """What a killed repair leaves: its journal, a file that is not whole. Returns the folder."""
    (target / STAGING).mkdir()
    for name in (JOURNAL, f"{rank_file(target, 1).name}.partial"):
        (target / STAGING / name).write_bytes(b"x" * 5000)
    return target / STAGING


def test_a_begun_repair_is_told_and_what_it_has_left_is_removed_when_nothing_is_damaged(
    source: Path, target: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    staging = leave_begun_repair(target)
    for words in (["inspect", str(target)], ["convert", str(source), str(target), "--mp", "4"]):
        assert main(words) == 0
        assert "note: a repair began here and has not ended (.reshard-repair, " in capsys.readouterr().out
    assert main(["repair", str(target), "--dry-run"]) == 0
    assert "note: a repair began here" in capsys.readouterr().out
    assert [note.kind for note in reshard.repair(target, ranks=[2]).notes] == ["begun-repair"]
    (staging / "notes.txt").write_text("mine", encoding="utf-8")
    assert len(list(staging.iterdir())) == 3
    assert reshard.repair(target).notes  # of the other file
    assert [path.name for path in staging.iterdir()] == ["notes.txt"]
    (staging / "notes.txt").unlink()
    assert not reshard.repair(target).notes
    assert not (target / JOURNAL).exists()


def test_a_restart_removes_a_begun_repair(source: Path, good: Path, target: Path) -> None:
    staging = leave_begun_repair(target)
    reshard.convert(source, target, mp=RANKS, restart=True, yes=True)
    staging.rmdir()  # it is empty
    assert contents(target) == contents(good)
