"""How far an unfinished conversion is, and the command that goes on."""

import json
import re
from pathlib import Path

import pytest
from jobs import Job, convert_checkpoint
from targets import leave_unfinished
from torture import durable_bytes

import reshard
import reshard.execution.execute
from reshard.cli.main import main
from reshard.formats.target_names import JOURNAL
from reshard.synthetic import SMALL_V3, write_checkpoint
from reshard.types import Subset


@pytest.fixture(scope="module")
def source(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("unfinished") / "source"
    write_checkpoint(folder, SMALL_V3, 4)
    return folder


@pytest.mark.parametrize(
    ("more", "options"),
    [
        ({"pad": True, "ranks": [0, 1, 3]}, "--mp 4 --pad --ranks 0-1,3"),
        ({"cast": "bf16", "keep_mtp": True}, "--mp 4 --cast bf16 --mtp keep"),
        ({"subset": Subset(layers=(0, 1, 3), renumber=True)}, "--mp 4 --layers 0-1,3 --renumber"),
    ],
)
def test_the_command_is_the_one_that_began_it(
    more: dict[str, object],
    options: str,
    source: Path,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    target = tmp_path / "target"
    leave_unfinished(Job(source, 4, **more), target)  # type: ignore[arg-type]
    capsys.readouterr()
    assert main(["inspect", str(target), "--json"]) == 0
    document = json.loads(capsys.readouterr().out)
    said = document["unfinished"]
    assert (document["status"], document["path"], document["files"]) == ("unfinished", str(target), 0)
    assert said["command"] == f"reshard convert SOURCE {target} {options}"
    assert said["durable"] == durable_bytes(target / JOURNAL)
    assert said["size"] == sum(path.stat().st_size for path in target.glob("*.safetensors.partial"))
    assert said["files"] == said["whole_files"] == len([*target.glob("*.safetensors.partial")])
    # And it goes on.
    assert main(said["command"].replace("SOURCE", str(source)).split()[1:]) == 0
    assert f"resumed: {said['durable']:,} bytes" in capsys.readouterr().out


def test_the_library_has_the_same_facts(source: Path, tmp_path: Path) -> None:
    leave_unfinished(Job(source, 4, pad=True), tmp_path / "target")
    content = reshard.inspect(tmp_path / "target")
    assert content.unfinished is not None
    assert (content.tensors, content.recipe) == (0, "deepseek-v3")
    assert content.unfinished.durable == durable_bytes(tmp_path / "target" / JOURNAL)
    assert content.unfinished.command == f"reshard convert SOURCE {tmp_path / 'target'} --mp 4 --pad"
    assert str(content) == str(content.unfinished)
    with pytest.raises(reshard.Refused, match="an unfinished conversion"):
        reshard.inspect(tmp_path / "target", tensors="*")  # there is none to list


def test_a_finished_part_and_the_unfinished_rest_are_both_shown(
    source: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    target = tmp_path / "target"
    convert_checkpoint(Job(source, 4, ranks=[0, 1]), target)
    leave_unfinished(Job(source, 4, ranks=[2, 3]), target)
    content = reshard.inspect(target)
    assert (content.files, content.recipe, content.remark) == (2, "deepseek-v3", "")
    assert content.size < sum(path.stat().st_size for path in target.glob("*.safetensors")) < content.size * 1.01
    assert content.unfinished is not None
    assert (content.unfinished.ranks, content.unfinished.files) == ("2-3", 2)
    capsys.readouterr()
    assert main(["convert", str(source), str(target), "--mp", "4", "--dry-run"]) == 0
    said = capsys.readouterr().out
    assert "\nnote: finished there, not written again: ranks 0-1\n" in said
    assert re.search(r"\nnote: an unfinished run there has \S+ MiB of \S+ MiB on the disk, \d of 2 files whole; ", said)
    assert main(["inspect", str(target)]) == 0
    said = capsys.readouterr().out
    assert said.startswith(f"{target}: deepseek-inference layout, recipe deepseek-v3, cut for 4 ranks\n2 files, ")
    assert "\nnote: a part of a target: ranks 0-1 of 4, by reshard.json\n" in said
    assert f"\n{target}: an unfinished conversion of ranks 2-3 by the recipe deepseek-v3\non the disk: " in said
    assert said.endswith(f"\n  {content.unfinished.command}\n")
    # The command goes on, and then nothing is unfinished.
    assert main(content.unfinished.command.replace("SOURCE", str(source)).split()[1:]) == 0
    content = reshard.inspect(target)
    assert (content.files, content.unfinished, content.notes) == (4, None, ())


def test_a_journal_that_is_left_over_is_nothing_unfinished(source: Path, tmp_path: Path) -> None:
    """As a crash leaves it that comes after the last file has its name, and before the journal is removed."""
    target = tmp_path / "target"
    leave_unfinished(Job(source, 4), target)
    journal = (target / JOURNAL).read_bytes()
    convert_checkpoint(Job(source, 4), target)
    (target / JOURNAL).write_bytes(journal)
    assert reshard.inspect(target).unfinished is None


def test_a_damaged_journal_does_not_hide_a_finished_part(source: Path, tmp_path: Path) -> None:
    target = tmp_path / "target"
    convert_checkpoint(Job(source, 4, ranks=[0, 1]), target)
    leave_unfinished(Job(source, 4, ranks=[2, 3]), target)
    line, end, batch = (target / JOURNAL).read_bytes().partition(b"\n")
    (target / JOURNAL).write_bytes(line + end + bytes(len(batch)) + batch)
    content = reshard.inspect(target)
    assert (content.files, content.unfinished) == (2, None)
    assert "damaged-journal" in [note.kind for note in content.notes]
    (target / "reshard.json").rename(tmp_path / "aside")
    with pytest.raises(reshard.Refused, match="damaged"):
        reshard.inspect(target)


def test_a_file_with_a_gap_is_not_whole(source: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """The journal loses its only batch: nothing is durable."""
    target = tmp_path / "target"
    leave_unfinished(Job(source, 4), target)
    journal = target / JOURNAL
    journal.write_bytes(journal.read_bytes().partition(b"\n")[0] + b"\n")
    capsys.readouterr()
    assert main(["inspect", str(target)]) == 0
    assert "on the disk: 0 bytes of 38.53 MiB (0.0%), 0 of 4 files whole\n" in capsys.readouterr().out


@pytest.mark.parametrize("line", [b"", b"{}\n", b"[1]\n", b'{"files": 1}\n', b"\xff\n"])
def test_a_journal_that_says_nothing_is_refused_as_before(
    line: bytes, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / JOURNAL).write_bytes(line)
    assert main(["inspect", str(tmp_path)]) == 2
    assert "an unfinished conversion" in capsys.readouterr().err
