"""The command: what each sub-command says as text and as JSON, its exit codes, its progress, and what it imports."""

import errno
import json
import os
import pty
import re
import shlex
import shutil
import subprocess
import sys
import tomllib
from argparse import ArgumentTypeError
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from jobs import Job, convert_checkpoint
from safetensors import safe_open
from safetensors.numpy import save_file
from targets import leave_unfinished

from reshard import __version__
from reshard.cli.main import main
from reshard.cli.values import parse_size
from reshard.recipes.recipe import FAMILIES_FOLDER
from reshard.synthetic import SMALL_V3, write_checkpoint

TINY: Mapping[str, Any] = {
    **SMALL_V3,
    "hidden_size": 128,
    "intermediate_size": 512,
    "kv_lora_rank": 128,
    "moe_intermediate_size": 128,
    "n_routed_experts": 8,
    "num_hidden_layers": 3,
    "q_lora_rank": 96,
    "qk_nope_head_dim": 64,
    "v_head_dim": 64,
    "vocab_size": 128,
}
"""3 MB: one dense layer, two expert layers and an MTP layer. 1, 2, 4 and 8 ranks suit it."""

TENSORS, DROPPED = 239, 76
MANIFEST = "reshard.json"
SIDE_FILES = ["tokenizer.json", "tokenizer_config.json"]
UNSAFE = re.compile(r"[^\n\x20-\x7e\xa0-\u2027\u2030-\u2065\u2070-\ud7ff\ue000-\ufffd\U00010000-\U0010ffff]")
"""Control characters, marks that turn the direction of the text, and surrogates: all but the line break."""


@pytest.fixture(scope="session")
def source(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("command") / "source"
    write_checkpoint(folder, TINY, 3)
    return folder


@pytest.fixture(scope="session")
def ranks(source: Path) -> Path:
    """The rank files of the source for 8 ranks."""
    target = source.parent / "ranks"
    assert main(["convert", str(source), str(target), "--mp", "8"]) == 0
    return target


@pytest.fixture(scope="session")
def demo(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, str]:
    """The folder of a demo, whose name tries to recolour the terminal, and what was printed."""
    folder = tmp_path_factory.mktemp("demo") / "de\x1b[31mmo"
    done = run("demo", folder)
    assert (done.returncode, done.stderr) == (0, "")
    return folder, done.stdout


Say = Callable[..., str]


@pytest.fixture
def say(capsys: pytest.CaptureFixture[str]) -> Say:
    """Runs a command in this process; gives what it prints if the exit code is the one given."""

    def run_here(*arguments: object, code: int = 0) -> str:
        capsys.readouterr()
        assert main([str(argument) for argument in arguments]) == code
        out, err = capsys.readouterr()
        return out if code < 2 else err

    return run_here


def run(*arguments: object, options: Sequence[str] = ()) -> subprocess.CompletedProcess[str]:
    """Runs a command in a process of its own, with options for the interpreter."""
    command = [sys.executable, *options, "-m", "reshard", *map(str, arguments)]
    return subprocess.run(command, check=False, capture_output=True, text=True, timeout=120)


def rank_files(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in folder.glob("*.safetensors")}


def flip_bit(path: Path, offset: int) -> None:
    with path.open("r+b") as file:
        file.seek(offset)
        (byte,) = file.read(1)
        file.seek(offset)
        file.write(bytes([byte ^ 0x10]))


def data_size(folder: Path) -> int:
    """Of all safetensors files of a folder, without their headers."""
    contents = rank_files(folder).values()
    return sum(len(content) - 8 - int.from_bytes(content[:8], "little") for content in contents)


def offset_of(path: Path, tensor: str) -> int:
    """Where the data of a tensor begin, by the header."""
    content = path.read_bytes()
    length = int.from_bytes(content[:8], "little")
    begin: int = json.loads(content[8 : 8 + length])[tensor]["data_offsets"][0]
    return 8 + length + begin


# convert


def test_convert_says_what_it_wrote_what_it_dropped_and_what_comes_next(source: Path, tmp_path: Path, say: Say) -> None:
    text = say("convert", source, tmp_path / "out", "--mp", "2")
    size = sum(map(len, rank_files(tmp_path / "out").values()))
    assert f"{tmp_path / 'out'}: 2 rank files, {size:,} bytes (2.18 MiB) in " in text
    assert f"dropped: {DROPPED} tensors, 909,224 bytes: MTP layers" in text
    assert f"next:\n  reshard verify {tmp_path / 'out'} --source {source}" in text


def test_convert_writes_the_rank_files_the_side_files_and_a_manifest(ranks: Path) -> None:
    files = [f"model{rank}-mp8.safetensors" for rank in range(8)]
    assert sorted(path.name for path in ranks.iterdir()) == sorted([*files, *SIDE_FILES, "run_config.json", MANIFEST])


def test_convert_as_json_agrees_with_the_manifest_and_the_files(source: Path, tmp_path: Path, say: Say) -> None:
    said = json.loads(say("convert", source, tmp_path / "out", "--mp", "2", "--json"))
    manifest = json.loads((tmp_path / "out" / MANIFEST).read_bytes())
    assert said["status"] == "converted"
    assert said["seconds"] > 0
    for key in ("reshard", "recipe", "ranks", "counts", "source", "coverage"):
        assert said[key] == manifest[key], key
    assert {file["name"]: file["size"] for file in said["files"]} == {
        name: len(content) for name, content in rank_files(tmp_path / "out").items()
    }
    assert sum(share["tensors"] for share in said["coverage"]) == TENSORS


def test_a_second_run_leaves_a_finished_target_alone(source: Path, tmp_path: Path, say: Say) -> None:
    say("convert", source, tmp_path / "out", "--mp", "2")
    before = {path.name: (path.stat().st_mtime_ns, path.stat().st_ino) for path in (tmp_path / "out").iterdir()}
    assert "converted already" in say("convert", source, tmp_path / "out", "--mp", "2")
    assert {path.name: (path.stat().st_mtime_ns, path.stat().st_ino) for path in (tmp_path / "out").iterdir()} == before


@pytest.mark.parametrize("words", ["0-3,7", "7,0-3", " 0 , 1-2,3-3,7,7 "])
def test_only_the_files_of_some_ranks_are_written_as_in_a_full_run(
    words: str, source: Path, ranks: Path, tmp_path: Path, say: Say
) -> None:
    text = say("convert", source, tmp_path / "out", "--mp", "8", "--ranks", words)
    full = rank_files(ranks)
    assert rank_files(tmp_path / "out") == {
        name: full[name] for name in (f"model{rank}-mp8.safetensors" for rank in (0, 1, 2, 3, 7))
    }
    assert "5 rank files" in text


@pytest.mark.parametrize("words", ["", "-1", "3-1", "1-", "a", "0;1", "0x1", "1.5", "1234567", "\x1b[31m"])
def test_ranks_that_are_no_ranks_are_refused(
    words: str, source: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(SystemExit) as caught:
        main(["convert", str(source), str(tmp_path / "out"), "--mp", "8", f"--ranks={words}"])
    assert caught.value.code == 2
    text = capsys.readouterr().err
    assert f"{words!r} is not like 0-3,7" in text
    assert not UNSAFE.search(text)
    assert not (tmp_path / "out").exists()


def test_an_own_recipe_gives_the_files_of_the_packaged_one(source: Path, ranks: Path, tmp_path: Path, say: Say) -> None:
    shutil.copy(FAMILIES_FOLDER / "deepseek-v3.toml", tmp_path / "mine.toml")
    say("convert", source, tmp_path / "out", "--mp", "8", "--recipe", tmp_path / "mine.toml")
    assert rank_files(tmp_path / "out") == rank_files(ranks)


def test_links_as_in_the_hub_cache_give_the_same_files(source: Path, ranks: Path, tmp_path: Path, say: Say) -> None:
    (tmp_path / "snapshot").mkdir()
    for path in source.iterdir():
        (tmp_path / "snapshot" / path.name).symlink_to(path)
    say("convert", tmp_path / "snapshot", tmp_path / "out", "--mp", "8")
    assert rank_files(tmp_path / "out") == rank_files(ranks)
    assert not any(path.is_symlink() for path in (tmp_path / "out").iterdir())


def test_the_options_of_the_script_give_the_same_files(source: Path, ranks: Path, tmp_path: Path, say: Say) -> None:
    options = ["--hf-ckpt-path", source, "--n-experts", "8", "--model-parallel", "8"]
    text = say("deepseek", "--save-path", tmp_path / "out", *options)
    assert "8 rank files" in text
    assert {path.name: path.read_bytes() for path in (tmp_path / "out").iterdir()} == {
        path.name: path.read_bytes() for path in ranks.iterdir()
    }
    said = json.loads(say("deepseek", "--save-path", tmp_path / "again", *options, "--json"))
    assert (said["status"], said["ranks"]) == ("converted", 8)


@pytest.mark.parametrize("missing", ["--hf-ckpt-path", "--save-path", "--model-parallel"])
def test_the_paths_and_the_ranks_of_the_script_are_required(missing: str, capsys: pytest.CaptureFixture[str]) -> None:
    options = {"--hf-ckpt-path": "a", "--save-path": "b", "--n-experts": "8", "--model-parallel": "8"}
    del options[missing]
    with pytest.raises(SystemExit) as caught:
        main(["deepseek", *(word for pair in options.items() for word in pair)])
    assert caught.value.code == 2
    assert missing in capsys.readouterr().err


def next_of(text: str) -> list[str] | None:
    """The arguments of the command that a conversion names as the next one, as a shell takes them apart."""
    _, found, line = text.partition("\nnext:\n  reshard ")
    return shlex.split(line.splitlines()[0]) if found else None


@pytest.mark.parametrize(
    ("name", "options"),
    [
        pytest.param("source", [], id="plain"),
        pytest.param("a source; of $HOME's", [], id="a path that a shell would take apart"),
        pytest.param("source", ["--ranks", "1"], id="some ranks"),
        pytest.param("with a stray file", ["--ignore-extra-files"], id="a file left out"),
        pytest.param("single", [], id="a single file beside another"),
        pytest.param("source", ["--recipe", "mine.toml"], id="an own recipe"),
    ],
)
def test_the_command_that_convert_names_next_can_be_run(
    name: str, options: list[str], source: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, say: Say
) -> None:
    monkeypatch.chdir(tmp_path)
    Path("mine.toml").write_text(
        (FAMILIES_FOLDER / "deepseek-v3.toml").read_text().replace('"head.weight"', '"out.weight"')
    )
    shutil.copytree(source, name)
    path = Path(name)
    if name == "single":
        shutil.rmtree(name)
        write_checkpoint(path, TINY, 1, index=False)
        path = path / "model-00001-of-00001.safetensors"
    if name in ("single", "with a stray file"):
        Path(name, "stray.safetensors").write_bytes(b"\2\0\0\0\0\0\0\0{}")
    following = next_of(say("convert", path, "out", "--mp", "2", *options))
    assert following is None or main(following) == 0


def test_a_single_file_is_converted_with_the_side_files_beside_it(ranks: Path, tmp_path: Path, say: Say) -> None:
    write_checkpoint(tmp_path / "one", TINY, 1, index=False)
    (tmp_path / "one" / "model-00001-of-00001.safetensors").rename(tmp_path / "one" / "model.safetensors")
    say("convert", tmp_path / "one" / "model.safetensors", tmp_path / "out", "--mp", "8")
    assert rank_files(tmp_path / "out") == rank_files(ranks)
    assert {path.name for path in (tmp_path / "out").iterdir()} == {path.name for path in ranks.iterdir()}


# plan


def numbers(line: str) -> list[int]:
    """The tensors and the bytes of a row."""
    return [int(number.replace(",", "")) for number in re.findall(r"(?<![\w.{])\d[\d,]*(?![\w.])", line)][:2]


def test_plan_adds_up_to_what_convert_writes_and_to_the_source(source: Path, ranks: Path, say: Say) -> None:
    text = say("plan", source, "--mp", "8")
    lines = text.splitlines()
    assert lines[0] == f"{source} -> 8 ranks by the recipe deepseek-v3"
    assert lines[1] == "3 layers, 1 dense layer, 2 expert layers, 8 experts, 1 MTP layer"
    written = {name: len(content) for name, content in rank_files(ranks).items()}
    planned = {line.split()[0]: numbers(line)[1] for line in lines if line.startswith("model")}
    assert planned == written
    totals = [numbers(line) for line in lines if line.startswith("total")]
    assert totals[0][1] == sum(written.values())
    assert totals[1] == [TENSORS, data_size(source)]
    parts = [numbers(line) for line in lines if re.match("used once|replicated to|shared by|empty|dropped", line)]
    assert [sum(column) for column in zip(*parts, strict=True)] == totals[1]


def test_plan_tells_what_is_dropped_and_why(source: Path, say: Say) -> None:
    text = say("plan", source, "--mp", "8")
    assert re.search(rf"^dropped +{DROPPED} +909,224", text, re.MULTILINE)
    line = rf"^  MTP layers \(DeepSeek's inference code has no multi-token prediction\) +{DROPPED} +909,224$"
    assert re.search(line, text, re.MULTILINE)
    assert "shared by several ranks" in text


def test_plan_as_json_is_what_convert_does(source: Path, ranks: Path, say: Say) -> None:
    said = json.loads(say("plan", source, "--mp", "8", "--json"))
    assert {file["name"]: file["size"] for file in said["files"]} == {
        name: len(content) for name, content in rank_files(ranks).items()
    }
    assert said["ranks"] == 8
    assert said["recipe"]["name"] == "deepseek-v3"
    assert said["counts"] == {"layers": 3, "dense layers": 1, "expert layers": 2, "experts": 8, "MTP layers": 1}


def test_plan_shows_the_files_of_some_ranks(source: Path, say: Say) -> None:
    text = say("plan", source, "--mp", "8", "--ranks", "3,5")
    assert re.findall(r"^model\S+", text, re.MULTILINE) == ["model3-mp8.safetensors", "model5-mp8.safetensors"]


@pytest.mark.parametrize("json_option", [[], ["--json"]])
def test_a_dry_run_is_the_plan_and_writes_nothing(
    json_option: list[str], source: Path, tmp_path: Path, say: Say
) -> None:
    planned = say("plan", source, "--mp", "4", *json_option)
    dry = say("convert", source, tmp_path / "out", "--mp", "4", "--dry-run", *json_option)
    if json_option:
        said = json.loads(dry)
        assert said.pop("estimate")["folder"] == str(tmp_path)
        assert said == json.loads(planned)
    else:
        # The free space and the rough time come on top.
        lines = dry.splitlines()
        assert [line for line in lines if line in planned.splitlines()] == planned.splitlines()
        assert len(lines) == len(planned.splitlines()) + 2
    assert list(tmp_path.iterdir()) == []


# inspect


def test_inspect_shows_a_checkpoint(source: Path, say: Say) -> None:
    text = say("inspect", source)
    assert text.splitlines()[:3] == [
        f"{source}: huggingface layout, recipe deepseek-v3",
        f"3 files, {TENSORS} tensors, {data_size(source):,} bytes (2.92 MiB)",
        "3 layers, 1 dense layer, 2 expert layers, 8 experts, 1 MTP layer",
    ]
    assert [line.split()[0] for line in text.splitlines()[4:]] == ["dtype", "F8_E4M3", "BF16", "F32"]


def test_inspect_as_json_counts_every_tensor(source: Path, say: Say) -> None:
    said = json.loads(say("inspect", source, "--json"))
    assert (said["layout"], said["recipe"], said["ranks"], said["files"]) == ("huggingface", "deepseek-v3", 0, 3)
    assert said["counts"]["experts"] == 8
    assert said["tensors"] == TENSORS == sum(tensors for tensors, _ in said["dtypes"].values())
    assert said["size"] == sum(size for _, size in said["dtypes"].values())


def test_inspect_shows_the_names_of_what_no_recipe_knows(tmp_path: Path, say: Say) -> None:
    named = {f"layers.{number}.wide.weight": np.zeros((2, number + 1), np.float32) for number in range(5)}
    save_file({"top.weight": np.zeros(3, np.float16), **named}, tmp_path / "model.safetensors")
    said = say("inspect", tmp_path)
    assert "layers.#.wide.weight              5  F32 [2, 1], F32 [2, 2], F32 [2, 3] and 2 more\n" in said
    assert json.loads(say("inspect", tmp_path, "--json"))["names"] == {
        "layers.#.wide.weight": [5, "F32 [2, 1], F32 [2, 2], F32 [2, 3] and 2 more"],
        "top.weight": [1, "F16 [3]"],
    }


def test_inspect_shows_rank_files(ranks: Path, say: Say) -> None:
    assert say("inspect", ranks).startswith(
        f"{ranks}: deepseek-inference layout, recipe deepseek-v3, cut for 8 ranks\n8 files, "
    )
    said = json.loads(say("inspect", ranks, "--json"))
    assert (said["layout"], said["ranks"], said["files"]) == ("deepseek-inference", 8, 8)
    found = 0
    for path in ranks.glob("*.safetensors"):
        with safe_open(path, framework="numpy") as file:
            found += len(file.keys())
    assert said["tensors"] == found


def test_inspect_shows_a_single_file(source: Path, ranks: Path, tmp_path: Path, say: Say) -> None:
    path = tmp_path / "any.safetensors"
    shutil.copy(source / "model-00002-of-00003.safetensors", path)
    said = json.loads(say("inspect", path, "--json"))
    with safe_open(path, framework="numpy") as file:
        assert (said["files"], said["tensors"], said["layout"]) == (1, len(file.keys()), "")
    assert said["remark"].startswith(
        "layers: gap\n  hint:     is a file missing from the checkpoint?\n  found:    layers 1-2\n"
    )
    said = json.loads(say("inspect", ranks / "model3-mp8.safetensors", "--json"))
    assert (said["files"], said["ranks"], said["layout"]) == (1, 8, "deepseek-inference")


def test_inspect_says_in_one_line_which_tensor_no_recipe_knows(source: Path, tmp_path: Path, say: Say) -> None:
    folder = shutil.copytree(source, tmp_path / "source")
    save_file({"model.value_head.weight": np.ones(3, np.float32)}, folder / "model-00004-of-00004.safetensors")
    for path in sorted(folder.glob("model-0000[1-3]-*")):
        path.rename(folder / path.name.replace("of-00003", "of-00004"))
    (folder / "model.safetensors.index.json").unlink()
    head = say("inspect", folder).split("\n\n")[0].split("\n")
    assert head[2].startswith("no recipe fits: model.value_head.weight: ")
    assert "no rule knows it; expected: a rule of deepseek-v3" in head[2]
    assert json.loads(say("inspect", source, "--json"))["reason"] == ""


def test_inspect_shows_one_of_several_files_where_it_lies(source: Path, say: Say) -> None:
    assert "\n1 file, " in say("inspect", source / "model-00002-of-00003.safetensors")


def test_inspect_takes_a_recipe_of_ones_own(source: Path, ranks: Path, tmp_path: Path, say: Say) -> None:
    text = (FAMILIES_FOLDER / "deepseek-v3.toml").read_text(encoding="utf-8")
    (tmp_path / "mine.toml").write_text(text.replace("deepseek-v3", "mine-of-all", 1), encoding="utf-8")
    assert "huggingface layout, recipe mine-of-all\n" in say("inspect", source, "--recipe", tmp_path / "mine.toml")
    assert "recipe mine-of-all, cut for 8 ranks\n" in say("inspect", ranks, "--recipe", tmp_path / "mine.toml")


def test_inspect_tells_how_a_target_was_made(source: Path, ranks: Path, tmp_path: Path, say: Say) -> None:
    say("convert", source, tmp_path / "out", "--mp", "2", "--cast", "bf16")
    assert "\nmade with --cast bf16, by reshard.json\n" in say("inspect", tmp_path / "out")
    assert json.loads(say("inspect", tmp_path / "out", "--json"))["made"] == {"--cast": "bf16"}
    assert "made with" not in say("inspect", ranks)


# verify


@pytest.mark.parametrize("words", [["verify"], ["verify", "--source", "source"]])
def test_an_unfinished_conversion_is_called_so(
    words: list[str], source: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, say: Say
) -> None:
    monkeypatch.chdir(source.parent)
    leave_unfinished(Job(source, 2), tmp_path / "out")
    text = say(words[0], tmp_path / "out", *words[1:], code=2)
    assert "found:    an unfinished conversion" in text
    assert "run the same convert again" in text


@pytest.mark.parametrize("options", [[], ["--source", "source"]])
def test_verify_says_that_the_folder_is_not_there(
    options: list[str], source: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, say: Say
) -> None:
    monkeypatch.chdir(source.parent)
    assert "found:    no such folder" in say("verify", tmp_path / "nowhere", *options, code=2)


@pytest.mark.parametrize("options", [[], ["--source", "source"]])
def test_the_way_out_of_a_damaged_file_is_one(
    options: list[str], source: Path, ranks: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, say: Say
) -> None:
    monkeypatch.chdir(source.parent)
    out = shutil.copytree(ranks, tmp_path / "out")
    flip_bit(out / "model3-mp8.safetensors", offset_of(out / "model3-mp8.safetensors", "norm.weight"))
    told = say("verify", out, *options, code=1)
    assert "reshard repair writes it again" in told
    (out / "model3-mp8.safetensors").rename(tmp_path / "aside")
    told = say("verify", out, *options, code=1)
    assert "--ranks 0-2,4-7; else copy it there, or reshard repair writes it again\n" in told
    say("convert", source, out, "--mp", "8")
    assert rank_files(out) == rank_files(ranks)


def test_verify_says_that_the_source_is_another(source: Path, ranks: Path, tmp_path: Path, say: Say) -> None:
    """Only where there are problems, and only if its files are others."""
    note = "reshard.json says that this was made from another checkpoint than the --source"
    write_checkpoint(tmp_path / "other", {**TINY, "vocab_size": 256}, 3)
    lines = say("verify", ranks, "--source", tmp_path / "other", code=1).splitlines()
    assert re.fullmatch(rf"{ranks}: \d+ problems", lines[0])
    assert lines[1] == note
    assert json.loads(say("verify", ranks, "--source", tmp_path / "other", "--json", code=1))["note"] == note
    out = shutil.copytree(ranks, tmp_path / "out")
    (out / "model1-mp8.safetensors").unlink()
    assert note not in say("verify", out, "--source", source, code=1)
    write_checkpoint(tmp_path / "dealt anew", TINY, 2)
    assert note not in say("verify", ranks, "--source", tmp_path / "dealt anew")


def test_verify_asks_for_the_recipe_that_the_target_was_made_with(source: Path, tmp_path: Path, say: Say) -> None:
    text = (FAMILIES_FOLDER / "deepseek-v3.toml").read_text(encoding="utf-8")
    (tmp_path / "own.toml").write_text(text.replace('"deepseek-v3"', '"own"', 1))
    say("convert", source, tmp_path / "target", "--mp", "8", "--recipe", tmp_path / "own.toml")
    text = say("verify", tmp_path / "target", "--source", source, code=2)
    assert "made by the recipe own" in text
    say("verify", tmp_path / "target", "--source", source, "--recipe", tmp_path / "own.toml")


def test_inspect_says_that_it_is_a_subset(source: Path, tmp_path: Path, say: Say) -> None:
    say("convert", source, tmp_path / "few", "--to", "hf", "--only", "model.norm.*")
    assert "a subset: only model.norm.*" in say("inspect", tmp_path / "few")
    assert json.loads(say("inspect", tmp_path / "few", "--json"))["subset"].startswith("only model.norm.*")
    assert json.loads(say("inspect", source, "--json"))["subset"] == ""


def test_verify_says_that_rank_files_are_others(ranks: Path, tmp_path: Path, say: Say) -> None:
    write_checkpoint(tmp_path / "other", {**TINY, "vocab_size": 256}, 3)
    say("convert", tmp_path / "other", tmp_path / "other ranks", "--mp", "8")
    say("convert", ranks, tmp_path / "back", "--to", "hf")
    text = say("verify", tmp_path / "back", "--source", tmp_path / "other ranks", code=1)
    assert "made from another checkpoint than the --source" in text


@pytest.mark.parametrize(
    "name", ["model-00002-of-00003.safetensors", "model.safetensors.index.json", "config.json", "tokenizer.json"]
)
def test_a_git_lfs_pointer_is_called_so(name: str, source: Path, tmp_path: Path, say: Say) -> None:
    shutil.copytree(source, tmp_path / "clone")
    (tmp_path / "clone" / name).write_text(
        "version https://git-lfs.github.com/spec/v1\noid sha256:4d7a\nsize 123456\n", encoding="ascii"
    )
    text = say("convert", tmp_path / "clone", tmp_path / "target", "--mp", "8", code=2)
    assert not (tmp_path / "target").exists()
    assert f"{name}: lfs pointer\n  hint:     git lfs pull, in the folder that was cloned\n" in text
    assert "\n  found:    a git-lfs pointer\n" in text


def test_verify_proves_a_good_target(source: Path, ranks: Path, say: Say) -> None:
    lines = say("verify", ranks, "--source", source).splitlines()
    assert lines[0] == f"{ranks}: proven against {source}"
    assert re.fullmatch(r"8 of 8 rank files, [\d,]+ tensors, [\d,]+ bytes, all equal", lines[1])
    said = json.loads(say("verify", ranks, "--source", source, "--json"))
    assert (said["status"], said["files"], said["problems"]) == ("proven", 8, [])
    assert f"{said['tensors']:,} tensors, {said['size']:,} bytes" in lines[1]


def test_verify_proves_a_good_target_by_its_manifest_alone(ranks: Path, say: Say) -> None:
    assert "8 of 8 rank files, " in say("verify", ranks)
    assert json.loads(say("verify", ranks, "--json"))["status"] == "proven"


@pytest.mark.parametrize("options", [["--source", "source"], []])
def test_verify_by_a_sample_says_how_much_it_compared_and_not_that_all_is_equal(
    options: list[str], ranks: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, say: Say
) -> None:
    monkeypatch.chdir(ranks.parent)
    said = json.loads(say("verify", ranks, *options, "--sample", "0.5%", "--json"))
    assert (said["status"], said["is_sampled"], said["problems"]) == ("sampled", True, [])
    assert 0 < said["compared"] <= said["size"]
    text = say("verify", ranks, *options, "--sample", "0.5%")
    assert text.startswith(f"{ranks}: sampled against ")
    assert f"sampled: {said['compared']:,} of {said['size']:,} bytes, no difference" in text
    whole = say("verify", ranks, *options, "--sample", "100%")
    assert "sampled: " in whole
    assert "proven" not in text + whole
    assert "all equal" not in text + whole
    shutil.copytree(ranks, tmp_path / "out")
    flip_bit(tmp_path / "out" / "model3-mp8.safetensors", 10)
    text = say("verify", tmp_path / "out", *options, "--sample", "0.5%", code=1)
    assert "model3-mp8" in text
    assert re.search(r"^sampled: [\d,]+ of [\d,]+ bytes$", text, re.MULTILINE)
    assert (
        json.loads(say("verify", tmp_path / "out", *options, "--sample", "1%", "--json", code=1))["status"] == "differs"
    )


@pytest.mark.parametrize(
    ("text", "word"),
    [
        *((text, "is out of range: more than 0%, at most 100%") for text in ("0%", "0.0%", "100.1%", "101%", "200%")),
        *((text, "is not like 1% or 0.5%") for text in ("1", "0.01", "-1%", "1%%", "%", "1e-3%", ".5%", "\u0661%")),
    ],
)
def test_a_sample_that_is_no_share_is_refused(
    text: str, word: str, ranks: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(SystemExit) as raised:
        main(["verify", str(ranks), f"--sample={text}"])
    assert raised.value.code == 2
    assert word in capsys.readouterr().err


@pytest.mark.parametrize("options", [["--source", "source"], []])
@pytest.mark.parametrize(
    ("rank", "tensor"),
    [
        (0, "embed.weight"),
        (7, "layers.0.attn.wo.weight"),
        (3, "layers.1.ffn.shared_experts.w2.scale"),
        (5, "layers.2.ffn.experts.5.w1.weight"),
        (2, "norm.weight"),
    ],
)
def test_verify_names_the_file_and_the_tensor_of_a_flipped_bit(
    rank: int,
    tensor: str,
    options: list[str],
    ranks: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    say: Say,
) -> None:
    monkeypatch.chdir(ranks.parent)
    shutil.copytree(ranks, tmp_path / "out")
    name = f"model{rank}-mp8.safetensors"
    flip_bit(tmp_path / "out" / name, offset_of(tmp_path / "out" / name, tensor))
    text = say("verify", tmp_path / "out", *options, code=1)
    assert text.startswith(f"{tmp_path / 'out'}: 1 problem\n{name}")
    assert tensor in text
    said = json.loads(say("verify", tmp_path / "out", *options, "--json", code=1))
    assert said["status"] == "differs"
    assert [problem["subject"].split(":")[0] for problem in said["problems"]] == [name]


def test_verify_names_every_file_that_is_wrong(source: Path, ranks: Path, tmp_path: Path, say: Say) -> None:
    shutil.copytree(ranks, tmp_path / "out")
    (tmp_path / "out" / "model1-mp8.safetensors").unlink()
    os.truncate(tmp_path / "out" / "model4-mp8.safetensors", 100)
    flip_bit(tmp_path / "out" / "model6-mp8.safetensors", (ranks / "model6-mp8.safetensors").stat().st_size - 1)
    for options in (["--source", source], []):
        text = say("verify", tmp_path / "out", *options, code=1)
        assert set(re.findall(r"model\d-mp8", text)) == {"model1-mp8", "model4-mp8", "model6-mp8"}


@pytest.mark.parametrize(
    ("options", "word"),
    [
        pytest.param(["--source", "source"], "no file such as model0-mpN.safetensors", id="against the source"),
        pytest.param([], "no reshard.json", id="by the manifest"),
    ],
)
def test_verify_refuses_a_folder_without_rank_files(
    options: list[str], word: str, source: Path, monkeypatch: pytest.MonkeyPatch, say: Say
) -> None:
    monkeypatch.chdir(source.parent)
    assert word in say("verify", source, *options, code=2)


def test_verify_takes_a_link_to_nothing_for_no_rank_file(source: Path, ranks: Path, tmp_path: Path, say: Say) -> None:
    shutil.copytree(ranks, tmp_path / "out")
    (tmp_path / "out" / "other.safetensors").symlink_to("nowhere")
    say("verify", tmp_path / "out", "--source", source)


def test_verify_does_not_believe_a_file_name_that_claims_many_ranks(source: Path, tmp_path: Path, say: Say) -> None:
    (tmp_path / "model0-mp99999.safetensors").write_bytes(b"\2\0\0\0\0\0\0\0{}")
    assert "model0-mp99999" in say("verify", tmp_path, "--source", source, code=2)


def cut_last_dimension(header: dict[str, Any], name: str) -> None:
    """Makes a tensor a line, as long as its data."""
    header[name]["shape"] = [header[name]["shape"][0] * header[name]["shape"][1]]


def quarter_elements(header: dict[str, Any], name: str) -> None:
    """Takes each BF16 element of a tensor for four elements of four bits."""
    header[name]["dtype"] = "F4"
    header[name]["shape"][-1] *= 4


def change_header(path: Path, change: Callable[[dict[str, Any], str], None], name: str) -> None:
    content = path.read_bytes()
    start = 8 + int.from_bytes(content[:8], "little")
    header = json.loads(content[8:start])
    change(header, name)
    path.write_bytes(header_with(json.dumps(header)) + content[start:])


@pytest.fixture
def plain(tmp_path: Path) -> Path:
    """A checkpoint in one file without block scales."""
    folder = tmp_path / "plain"
    write_checkpoint(folder, {**TINY, "quantization_config": None}, 1)
    return folder


@pytest.mark.parametrize(
    "name", ["model.layers.0.self_attn.kv_b_proj.weight", "model.layers.0.self_attn.o_proj.weight"]
)
def test_verify_proves_elements_smaller_than_a_byte(name: str, plain: Path, tmp_path: Path, say: Say) -> None:
    change_header(plain / "model-00001-of-00001.safetensors", quarter_elements, name)
    recipe = tmp_path / "any-shape.toml"
    text = (FAMILIES_FOLDER / "deepseek-v3.toml").read_text(encoding="utf-8")
    recipe.write_text(re.sub(r'"\[[^"]*\]"(,|\])', r'""\1', text), encoding="utf-8")
    say("convert", plain, tmp_path / "out", "--mp", "4", "--recipe", recipe)
    assert "all equal" in say("verify", tmp_path / "out", "--source", plain, "--recipe", recipe)


def test_verify_says_that_the_source_has_another_shape(plain: Path, tmp_path: Path, say: Say) -> None:
    say("convert", plain, tmp_path / "out", "--mp", "4")
    output = "model.layers.0.self_attn.o_proj.weight"
    change_header(plain / "model-00001-of-00001.safetensors", cut_last_dimension, output)
    assert main(["verify", str(tmp_path / "out"), "--source", str(plain)]) in (1, 2)


@pytest.mark.parametrize(
    "change",
    [
        pytest.param({"files": 5}, id="a number of files"),
        pytest.param({"files": [{"name": 1, "size": 2}]}, id="a file with a number as its name"),
        pytest.param({"files": []}, id="no files"),
        pytest.param({"side_files": 5}, id="a number of side files"),
        pytest.param({"side_files": [{}]}, id="a side file without a name"),
    ],
)
def test_a_damaged_manifest_is_refused_or_named(
    change: dict[str, Any], source: Path, ranks: Path, tmp_path: Path, say: Say
) -> None:
    shutil.copytree(ranks, tmp_path / "out")
    manifest = json.loads((ranks / MANIFEST).read_bytes())
    (tmp_path / "out" / MANIFEST).write_text(json.dumps(manifest | change))
    assert MANIFEST in say("verify", tmp_path / "out", code=2)
    assert main(["convert", str(source), str(tmp_path / "out"), "--mp", "8"]) in (0, 2)
    assert rank_files(tmp_path / "out") == rank_files(ranks)


# recipes


@pytest.mark.parametrize("words", [["recipes"], ["recipes", "list"]])
def test_recipes_lists_the_packaged_ones(words: list[str], say: Say) -> None:
    """Each with what it was checked against, in a line of its own."""
    lines = say(*words).splitlines()
    names = sorted(path.stem for path in FAMILIES_FOLDER.glob("*.toml"))
    assert [line.split()[0] for line in lines[::2]] == names
    assert all(re.search("DeepSeek|tensor-parallel|whole files|--for ", line) for line in lines[::2])
    assert all(re.match(r" +checked against: \w", line) for line in lines[1::2])
    said = json.loads(say(*words, "--json"))
    assert [recipe["name"] for recipe in said] == names
    assert [recipe["checked"] for recipe in said] == [line.split(": ", 1)[1] for line in lines[1::2]]


@pytest.mark.parametrize("words", ["recipes --json list", "recipes list --json", "recipes --json"])
def test_json_may_stand_before_the_action(words: str, say: Say) -> None:
    assert len(json.loads(say(*words.split()))) == len(list(FAMILIES_FOLDER.glob("*.toml")))


def test_recipes_show_prints_the_file(say: Say) -> None:
    text = say("recipes", "show", "deepseek-v3")
    assert text == (FAMILIES_FOLDER / "deepseek-v3.toml").read_text(encoding="utf-8")
    said = json.loads(say("recipes", "show", "deepseek-v3", "--json"))
    assert (said["name"], said["scales"]["p"]["block"]) == ("deepseek-v3", [128, 128])
    rows = tomllib.loads(text)["rules"]
    assert [rule["left"] for rule in said["rules"]][: len(rows)] == [row[1] for row in rows]
    like = [row[1] for row in rows if "{i}" in row[1] or "{s}" in row[1]]
    assert [rule["left"] for rule in said["rules"]][len(rows) :] == [re.sub(r"\{[is]\}", "{m}", left) for left in like]


def test_recipes_check_holds_a_recipe_against_a_checkpoint(source: Path, tmp_path: Path, say: Say) -> None:
    shutil.copy(FAMILIES_FOLDER / "deepseek-v3.toml", tmp_path / "mine.toml")
    for recipe in ("deepseek-v3", tmp_path / "mine.toml"):
        text = say("recipes", "check", recipe, source)
        assert text.startswith(f"{recipe} fits {source}: {TENSORS} tensors, each under one rule\n")
        assert re.search(r"^experts +8$", text, re.MULTILINE)
    said = json.loads(say("recipes", "check", "deepseek-v3", source, "--json"))
    assert (said["status"], said["tensors"], said["counts"]["layers"]) == ("fits", TENSORS, 3)


def test_recipes_check_lists_the_keys_that_the_config_does_not_have(source: Path, tmp_path: Path, say: Say) -> None:
    text = (FAMILIES_FOLDER / "deepseek-v3.toml").read_text(encoding="utf-8")
    for old, new in (
        (r'size = "n_routed_experts"', 'size = "routed_experts"'),
        (r"\[vocab_size, hidden_size\]", "[vocab_size, dmodel]"),
        (r'"scoring_func or', '"score or'),
        (r"^ranks_divide .*$", 'ranks_divide = ["n_heads"]'),
        (r"^dim  .*$", 'dim = "dmodel"'),
    ):
        text, times = re.subn(old, new, text, flags=re.MULTILINE)
        assert times
    mine = tmp_path / "mine.toml"
    mine.write_text(text, encoding="utf-8")
    note = say("recipes", "check", mine, source).splitlines()[-1]
    first = "not in config.json: n_heads (ranks_divide), routed_experts (placeholders: e), dmodel (run: dim, shape of "
    assert note.startswith(first)
    unknown = json.loads(say("recipes", "check", mine, source, "--json"))["not_in_config"]
    assert unknown["n_heads"] == ["ranks_divide"]
    assert {"run: dim", "shape of model.embed_tokens.weight", "shape of lm_head.weight"} <= {*unknown["dmodel"]}
    # What has another choice is not missed; and without a config nothing is.
    assert not {"score", "hidden_size"} & unknown.keys()
    shutil.copytree(source, tmp_path / "bare", ignore=shutil.ignore_patterns("config.json"))
    assert "not in" not in say("recipes", "check", mine, tmp_path / "bare")


@pytest.mark.parametrize(
    ("words", "word"),
    [
        (["show", "deepseek-v44"], "did you mean deepseek-v"),
        (["check", "deepseek-v2", "source"], "source: quantized\n"),
    ],
)
def test_recipes_refuses_what_it_cannot_do(
    words: list[str], word: str, source: Path, monkeypatch: pytest.MonkeyPatch, say: Say
) -> None:
    monkeypatch.chdir(source.parent)
    assert word in say("recipes", *words, code=2)


# demo


def test_the_demo_makes_plans_converts_and_verifies(demo: tuple[Path, str], say: Say) -> None:
    folder, text = demo
    steps = ["1. Make", "huggingface layout", "2. Plan", "3. Convert", "4 rank files", "4. Verify", "all equal"]
    places = [text.index(step) for step in steps]
    assert places == sorted(places)
    assert sorted(path.name for path in folder.iterdir()) == ["ranks", "source"]
    assert len(rank_files(folder / "ranks")) == 4
    say("verify", folder / "ranks", "--source", folder / "source")


def test_the_demo_leaves_nothing_behind_without_a_folder(tmp_path: Path) -> None:
    command = [sys.executable, "-m", "reshard", "demo", "--json"]
    environment = {**os.environ, "TMPDIR": str(tmp_path)}
    done = subprocess.run(command, check=True, capture_output=True, text=True, env=environment, timeout=120)
    said = json.loads(done.stdout)
    assert (said["status"], said["files"], said["problems"]) == ("proven", 4, [])
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("name", ["notes.txt", "source", ".hidden"])
def test_the_demo_refuses_a_folder_that_holds_anything(name: str, tmp_path: Path, say: Say) -> None:
    """A folder of that name too, though it be empty."""
    if name == "source":
        (tmp_path / name).mkdir()
    else:
        (tmp_path / name).write_bytes(b"mine")
    text = say("demo", tmp_path, code=2)
    assert f"{tmp_path}: not empty\n  hint:     name another folder\n  found:    a folder that holds files\n" in text
    assert [path.name for path in tmp_path.iterdir()] == [name]
    assert list((tmp_path / "source").glob("*")) == []


def test_the_demo_runs_in_an_empty_folder(tmp_path: Path, say: Say) -> None:
    say("demo", tmp_path)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["ranks", "source"]


def test_the_demo_refuses_a_folder_that_it_has_used(demo: tuple[Path, str], say: Say) -> None:
    assert "a folder that holds files" in say("demo", demo[0], code=2)


# Imports, help and version.


@pytest.mark.parametrize("words", [[], ["convert"], ["plan"], ["verify"], ["demo"]])
def test_help_loads_neither_numpy_nor_rich(words: list[str]) -> None:
    done = run(*words, "--help", options=["-X", "importtime"])
    assert done.returncode == 0
    assert done.stdout.startswith("usage: reshard")
    loaded = {line.rsplit("|", 1)[-1].strip().split(".")[0] for line in done.stderr.splitlines()}
    assert "argparse" in loaded
    assert loaded.isdisjoint({"numpy", "rich", "torch", "safetensors", "xxhash"})


@pytest.mark.parametrize(
    "words", [["recipes", "list"], ["recipes", "check", "deepseek-v3", "SOURCE"], ["inspect", "SOURCE"]]
)
def test_what_only_looks_loads_no_numpy(words: list[str], source: Path) -> None:
    words = [str(source) if word == "SOURCE" else word for word in words]
    done = run(*words, options=["-X", "importtime"])
    assert done.returncode == 0
    loaded = {line.rsplit("|", 1)[-1].strip().split(".")[0] for line in done.stderr.splitlines()}
    assert "json" in loaded
    assert loaded.isdisjoint({"numpy", "rich", "torch", "safetensors"})


def test_help_names_every_command() -> None:
    text = run("--help").stdout
    for name in ("convert", "plan", "inspect", "verify", "recipes", "demo", "deepseek"):
        assert re.search(rf"^ +{name} ", text, re.MULTILINE)


@pytest.mark.parametrize("option", ["--version", "-V"])
def test_the_version_is_the_package_s(option: str) -> None:
    assert run(option).stdout == f"reshard {__version__}\n"


@pytest.mark.parametrize(
    "words",
    [
        ["converts"],
        ["convert", "a", "b", "--mp", "two"],
        ["convert", "a", "b", "--mp", "2", "--jobs", "0"],
        ["convert", "a", "b", "--mp", "2", "--max-memory", "much"],
        ["convert", "a", "b", "--mp", "2", "--cache", "maybe"],
        ["plan"],
        ["recipes", "remove"],
        ["recipes", "show"],
        ["recipes", "check", "deepseek-v3"],
    ],
)
def test_options_that_do_not_parse_are_refused_in_a_line(words: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as caught:
        main(words)
    assert caught.value.code == 2
    assert re.fullmatch(r"reshard[a-z ]*: .*\b[Ss]ee reshard[a-z ]* --help\n", capsys.readouterr().err)


@pytest.mark.parametrize(
    ("words", "said"),
    [
        ("convert a b --mp 2 --dry", "convert: unrecognized arguments: --dry; did you mean --dry-run? See"),
        ("convert a b --tp-size 2", "convert: unrecognized arguments: --tp-size 2; did you mean --mp? See"),
        ("plan a --mp 2 --reciepe=x", "plan: unrecognized arguments: --reciepe=x; did you mean --recipe? See"),
        ("verify a b", "verify: unrecognized arguments: b; did you mean --source b? See"),
        ("repair a b", "repair: unrecognized arguments: b; did you mean --source b? See"),
        ("plan a b", "plan: unrecognized arguments: b; did you mean --target b? See"),
        ("convert a b 4", "convert: unrecognized arguments: 4; did you mean --mp 4? See"),
        ("convert a b c", "convert: unrecognized arguments: c; see"),
        (
            "convert a --mp 2 --target x",
            (
                "convert: unrecognized arguments: --target x; TARGET stands without an option: "
                "reshard convert SOURCE TARGET --mp N [options]; see"
            ),
        ),
        (
            "convert --tp-size 2 a x --out x",
            (
                "convert: unrecognized arguments: --tp-size 2 --out x; did you mean --mp?; "
                "TARGET stands without an option: reshard convert SOURCE TARGET --mp N [options]; see"
            ),
        ),
        ("convert a b --mp 2 --dtype bf16", "convert: unrecognized arguments: --dtype bf16; did you mean --cast? See"),
        ("convert a b --mp 2 --restrt", "convert: unrecognized arguments: --restrt; did you mean --restart? See"),
        ("convert a b --mp 2 --start", "convert: unrecognized arguments: --start; see"),
        ("convert a b --mp 2 --cast fp16", "convert: --cast: 'fp16' is not bf16, fp8, fp8-ue8m0 or nvfp4; see"),
        ("inspect a --zzz", "inspect: unrecognized arguments: --zzz; see"),
        (
            "--json inspect a",
            "inspect: unrecognized arguments: --json; put it behind the command: reshard inspect --json; see",
        ),
        ("convert a b --mp x", "convert: --mp/--tp: 'x' is not a number; see"),
        ("convert a", "convert: the following arguments are required: TARGET; see"),
        ("inspect --tensors a", "inspect: the following arguments are required: PATH (before --tensors); see"),
        ("convert a b --to hff", "convert: --to: 'hff' is unknown; did you mean hf? See"),
        ("plan a --to gguf", "plan: --to: 'gguf' is not ranks, hf or dcp; see"),
        (
            "recipes deepseek-v3",
            "recipes: 'deepseek-v3' is not list, show or check; for a recipe: reshard recipes show 'deepseek-v3'; see",
        ),
        ("recipes chek a b", "recipes: 'chek' is unknown; did you mean check? See"),
        ("recipes show a b", "recipes show: unrecognized arguments: b; see"),
        ("recipes list a", "recipes list: unrecognized arguments: a; see"),
    ],
)
def test_what_is_not_known_is_refused_in_a_line_with_the_nearest_name(
    words: str, said: str, capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(SystemExit) as caught:
        main(words.split())
    assert caught.value.code == 2
    assert capsys.readouterr() == ("", f"reshard {said} reshard {said.partition(':')[0]} --help\n")


@pytest.mark.parametrize(
    ("word", "said"),
    [
        ("DIFF", "'DIFF' is unknown; did you mean diff? See reshard --help"),
        ("help", "'help' is no command; type reshard --help, or reshard COMMAND --help; see reshard --help"),
        ("version", "'version' is no command; type reshard --version; see reshard --help"),
        ("list", "'list' is no command; type reshard recipes list; see reshard --help"),
        ("-v", "unrecognized arguments: -v; did you mean -V? See reshard --help"),
        ("convrt", "'convrt' is unknown; did you mean convert? See reshard --help"),
        ("--verison", "unrecognized arguments: --verison; did you mean --version? See reshard --help"),
        ("--json", "unrecognized arguments: --json; see reshard --help"),
    ],
)
def test_a_command_that_is_not_known_is_refused_with_the_nearest_one(
    word: str, said: str, capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(SystemExit):
        main([word])
    assert capsys.readouterr() == ("", f"reshard: {said}\n")


@pytest.mark.parametrize(
    ("text", "size"),
    [
        ("1000", 1000), ("1k", 1024), ("2 KiB", 2048), ("1.5kB", 1500), ("0.5m", 1 << 19), ("256MiB", 256 << 20),
        ("1.5GB", 1_500_000_000), ("4g", 4 << 30), ("1TiB", 1 << 40), ("2tb", 2 * 10**12), ("1T", 1 << 40),
    ],
)  # fmt: skip
def test_a_size_has_any_of_the_usual_units(text: str, size: int) -> None:
    assert parse_size(text) == size


@pytest.mark.parametrize("text", ["1PiB", "much", "1.", ".5GB", "-1", "1 G i B", "1e3", ""])
def test_what_is_no_size_is_refused_with_the_units(text: str) -> None:
    with pytest.raises(ArgumentTypeError, match=r"KiB, MiB, GiB, TiB \(or K, M, G, T\), kB, MB, GB, TB"):
        parse_size(text)


def test_fewer_jobs_than_were_asked_for_are_explained(source: Path, tmp_path: Path, say: Say) -> None:
    text = say("convert", source, tmp_path / "out", "--mp", "2", "--jobs", "5000")
    assert re.search(r"^\d+ of 5,000 jobs \(--max-memory or the system allows no more\), read ", text, re.MULTILINE)
    assert "\n1 job, read " in say("convert", source, tmp_path / "one", "--mp", "2", "--jobs", "1")


def test_a_conversion_without_a_number_of_ranks_is_refused(
    source: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["convert", str(source), str(tmp_path / "target")]) == 2
    assert "--mp: wrong option" in capsys.readouterr().err


# Progress.


@contextmanager
def terminal() -> Iterator[tuple[int, int]]:
    """Both ends of a pseudo-terminal: ours, and the one for the command."""
    ours, theirs = pty.openpty()
    try:
        yield ours, theirs
    finally:
        os.close(ours)


def read_terminal(descriptor: int) -> str:
    """What is written to a terminal until nobody holds its other end."""
    pieces: list[bytes] = []
    while True:
        try:
            piece = os.read(descriptor, 4096)
        except OSError as error:
            if error.errno != errno.EIO:
                raise
            piece = b""
        if not piece:
            return b"".join(pieces).decode()
        pieces.append(piece)


@pytest.mark.parametrize("command", ["convert", "verify"])
def test_a_terminal_shows_a_bar(command: str, source: Path, ranks: Path, tmp_path: Path) -> None:
    words = [str(ranks), "--source", str(source)] if command == "verify" else [str(source), str(tmp_path / "out")]
    words += ["--mp", "2"] if command == "convert" else []
    environment = {**os.environ, "TERM": "xterm-256color", "COLUMNS": "120"}
    with terminal() as (ours, theirs):
        process = subprocess.Popen(
            [sys.executable, "-m", "reshard", command, *words],
            stdin=subprocess.DEVNULL, stdout=subprocess.PIPE, stderr=theirs, env=environment,
        )  # fmt: skip
        os.close(theirs)
        shown = read_terminal(ours)
        out, _ = process.communicate(timeout=120)
    assert process.returncode == 0
    assert command in shown
    assert "\x1b[" in shown
    assert "\u2501" in shown
    assert re.search(r"done, \d\.\d\d MiB in \d:\d\d:\d\d", shown)
    assert b"\x1b" not in out


@pytest.mark.parametrize("words", [["plan", "--mp", "8", "--json"], ["inspect"]])
def test_a_reader_that_goes_away_is_no_error(words: list[str], source: Path) -> None:
    reading, writing = os.pipe()
    os.close(reading)
    command = [sys.executable, "-m", "reshard", *words, str(source)]
    done = subprocess.run(command, check=False, stdout=writing, stderr=subprocess.PIPE, text=True, timeout=120)
    os.close(writing)
    assert "Traceback" not in done.stderr
    assert "BrokenPipe" not in done.stderr


# Names of strangers.

EVIL = "ev\x1b[31m\x1b]0;il\x07\x9b\u202e\r"


def evil_file(content: bytes) -> Callable[[Path], list[str]]:
    def prepare(folder: Path) -> list[str]:
        (folder / f"{EVIL}.safetensors").write_bytes(content)
        return ["plan", str(folder), "--mp", "2"]

    return prepare


def header_with(entry: str) -> bytes:
    text = entry.encode()
    return len(text).to_bytes(8, "little") + text


def evil_index(folder: Path) -> list[str]:
    (folder / "model.safetensors.index.json").write_text(json.dumps({"weight_map": {EVIL: f"{EVIL}.safetensors"}}))
    return ["plan", str(folder), "--mp", "2"]


def evil_recipe(key: str) -> Callable[[Path], list[str]]:
    """A recipe that has such a word in the place of another."""

    def prepare(folder: Path) -> list[str]:
        text = (FAMILIES_FOLDER / "deepseek-v3.toml").read_text(encoding="utf-8")
        assert f'"{key}"' in text
        (folder / "r.toml").write_text(text.replace(f'"{key}"', json.dumps(EVIL)), encoding="utf-8")
        return ["recipes", "check", str(folder / "r.toml"), str(folder / "source")]

    return prepare


NAME = json.dumps(EVIL)


@pytest.mark.parametrize(
    ("prepare", "code"),
    [
        pytest.param(evil_file(b"short"), 2, id="the name of a truncated file"),
        pytest.param(evil_file(header_with(f'{{{NAME}:{{"dtype":{NAME}}}}}')), 2, id="a faulty entry"),
        pytest.param(evil_file(header_with(f"{{{NAME}:1,{NAME}:2}}")), 2, id="a name twice"),
        pytest.param(
            evil_file(header_with(f'{{{NAME}:{{"dtype":"U8","shape":[0],"data_offsets":[0,0]}}}}')), 2,
            id="a tensor that no rule knows",
        ),
        pytest.param(evil_index, 2, id="the index"),
        pytest.param(lambda folder: ["plan", str(folder / EVIL), "--mp", "2"], 2, id="a source that is not there"),
        pytest.param(lambda folder: ["inspect", str(folder / EVIL)], 2, id="a path that is not there"),
        pytest.param(lambda folder: ["verify", str(folder / EVIL)], 2, id="a target that is not there"),
        pytest.param(lambda _: ["recipes", "show", EVIL], 2, id="an unknown recipe"),
        pytest.param(
            lambda folder: ["convert", str(folder / "source"), str(folder / EVIL), "--mp", "2"], 0, id="a target"
        ),
        pytest.param(evil_recipe("layers"), 0, id="what a recipe counts"),
        pytest.param(evil_recipe("drop"), 2, id="a faulty recipe"),
        pytest.param(
            lambda folder: [
                "recipes", "check", "deepseek-v3", str((folder / EVIL).symlink_to(folder / "source") or folder / EVIL)
            ], 0, id="the path of a checkpoint that fits",
        ),
    ],
)  # fmt: skip
def test_no_name_of_a_stranger_reaches_the_terminal_raw(
    prepare: Callable[[Path], list[str]], code: int, source: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "source").symlink_to(source)
    words = prepare(tmp_path)
    for json_option in ([], ["--json"]) if code else ([],):
        assert main([*words, *json_option]) == code
        out, err = capsys.readouterr()
        assert "\\x1b" in err + out
        assert not UNSAFE.search(out + err)


def test_the_demo_escapes_the_name_of_its_folder(demo: tuple[Path, str]) -> None:
    assert "de\\x1b[31mmo" in demo[1]
    assert not UNSAFE.search(demo[1])


# Interruption.


@pytest.mark.parametrize(
    ("words", "way_on"),
    [
        (["convert", "SOURCE", "TARGET", "--mp", "2"], "; nothing was written; run the same command again"),
        (["convert", "SOURCE", "TARGET", "--mp", "2", "--dry-run"], ""),
        (["plan", "SOURCE", "--mp", "2"], ""),
        (["verify", "SOURCE"], ""),
        (["inspect", "SOURCE"], ""),
    ],
)
def test_only_a_conversion_says_what_to_do_after_an_interrupt(
    words: list[str], way_on: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, say: Say
) -> None:
    """The source is a folder in which the first look is interrupted."""

    def interrupted(*_: object, **__: object) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(Path, "is_dir", interrupted)
    text = say(*({"SOURCE": tmp_path, "TARGET": tmp_path / "out"}.get(word, word) for word in words), code=130)
    assert text == f"reshard: interrupted{way_on}\n"


@pytest.mark.parametrize("after", [0, 1, 2, 3])
def test_what_an_interrupt_leaves_is_finished_by_the_same_command(
    after: int, source: Path, ranks: Path, tmp_path: Path, say: Say
) -> None:
    @contextmanager
    def interrupting(_total: int) -> Iterator[Callable[[int], None]]:
        calls = 0

        def advance(_size: int) -> None:
            nonlocal calls
            calls += 1
            if calls > after:
                raise KeyboardInterrupt

        yield advance

    with pytest.raises(KeyboardInterrupt):
        convert_checkpoint(Job(source, 8), tmp_path / "out", progress=interrupting)
    assert rank_files(tmp_path / "out") == {}
    say("convert", source, tmp_path / "out", "--mp", "8")
    assert {path.name: path.read_bytes() for path in (tmp_path / "out").iterdir()} == {
        path.name: path.read_bytes() for path in ranks.iterdir()
    }
