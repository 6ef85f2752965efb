"""The command lines of all of DeepSeek's scripts: V3's, V4's and V4.1's."""

import json
import shutil
from collections.abc import Callable
from pathlib import Path

import oracle_families
import pytest
import torch
from conversions import require_equal
from families import write_small
from safetensors.torch import load_file, save_file
from small_models import write_model

import reshard
from reshard.cli.main import main
from reshard.errors import Refused
from reshard.formats.target_names import JOURNAL

TOKENIZER = ("tokenizer.json", "tokenizer_config.json")

Source = Callable[[str], Path]


@pytest.fixture(scope="module")
def sources(tmp_path_factory: pytest.TempPathFactory) -> Source:
    """A small checkpoint of a family, with its tokenizer."""
    root = tmp_path_factory.mktemp("sources")

    def of(name: str) -> Path:
        if not (root / name).exists():
            write_small(root / name, name, files=2)
            write_tokenizer(root / name, "of the source")
        return root / name

    return of


def write_tokenizer(folder: Path, text: str, names: tuple[str, ...] = TOKENIZER) -> Path:
    folder.mkdir(exist_ok=True)
    for name in names:
        (folder / name).write_text(json.dumps({"text": text, "name": name}))
    return folder


def run_script(source: Path, target: Path, *options: str) -> int:
    return main(["deepseek", "--hf-ckpt-path", str(source), "--save-path", str(target), *options])


@pytest.mark.parametrize(
    ("name", "options", "expert_dtype"),
    [
        pytest.param(
            "deepseek-v4-flash",
            ["--n-experts", "12", "--model-parallel", "2", "--expert-dtype", "fp4"],
            "fp4",
            id="V4, fp4",
        ),
        pytest.param(
            "deepseek-v4-flash",
            ["--n-experts=12", "--model-parallel=2", "--expert-dtype=fp8"],
            "fp8",
            id="V4, fp8",
        ),
        pytest.param("deepseek-v4.1-flash", ["--model-parallel", "2"], "fp4", id="V4.1"),
        pytest.param("deepseek-v4.1-flash", ["--model-parallel=2", "--expert-dtype", "fp8"], "fp8", id="V4.1, fp8"),
    ],
)
def test_the_ranks_are_those_of_the_script(
    name: str, options: list[str], expert_dtype: str, sources: Source, tmp_path: Path
) -> None:
    assert run_script(sources(name), tmp_path / "found", *options) == 0
    convert = oracle_families.convert_v41 if "4.1" in name else oracle_families.convert_v4
    convert(sources(name), tmp_path / "wanted", 2, expert_dtype=expert_dtype)
    require_equal(tmp_path / "wanted", tmp_path / "found")
    assert main(["verify", str(tmp_path / "found"), "--source", str(sources(name))]) == 0


def test_experts_as_they_are_stored_are_the_same_job_as_no_option(sources: Source, tmp_path: Path) -> None:
    source = sources("deepseek-v4-flash")
    assert reshard.convert(source, tmp_path / "out", mp=2, expert_dtype="fp4").done
    assert reshard.convert(source, tmp_path / "out", mp=2).done is None
    plan = reshard.plan(source, mp=2, expert_dtype="fp4")
    assert str(plan) == str(reshard.plan(source, mp=2))


@pytest.mark.parametrize("dtype", ["fp4", "fp8"])
def test_experts_that_are_never_fp4_have_no_such_option(
    dtype: str, sources: Source, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    options = ["--n-experts", "16", "--model-parallel", "2", "--expert-dtype", dtype]
    assert run_script(sources("deepseek-v3"), tmp_path / "out", *options) == 2
    text = capsys.readouterr().err
    assert "--expert-dtype: wrong option" in text
    assert "leave it out" in text
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("name", ["deepseek-v3", "deepseek-v4.1-flash"])
def test_the_number_of_experts_is_that_of_the_layers(
    name: str, sources: Source, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Of V4.1 8 is the number of the draft's."""
    assert run_script(sources(name), tmp_path / "out", "--n-experts", "8", "--model-parallel", "2") == 2
    assert "16, by the names of the tensors" in capsys.readouterr().err
    assert run_script(sources(name), tmp_path / "out", "--n-experts", "16", "--model-parallel", "2") == 0


def test_what_refusals_advise_are_options_of_the_command(
    sources: Source, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Experts whose scales are too far apart for FP8; and a journal that nobody can read."""
    source, scale = tmp_path / "source", "layers.3.ffn.experts.5.w2.scale"
    shutil.copytree(sources("deepseek-v4-flash"), source)
    index = json.loads((source / "model.safetensors.index.json").read_text())["weight_map"]
    tensors = load_file(source / index[scale])
    tensors[scale].view(torch.uint8).fill_(110)[0, 0] = 125
    save_file(tensors, source / index[scale])
    options = ["--model-parallel", "2", "--expert-dtype"]
    assert run_script(source, tmp_path / "out", *options, "fp8") == 2
    assert "--allow-inexact" in capsys.readouterr().err
    assert run_script(source, tmp_path / "rounded", *options, "fp8", "--allow-inexact") == 0
    assert "rounded: " in capsys.readouterr().out
    (tmp_path / "begun").mkdir()
    (tmp_path / "begun" / JOURNAL).write_text("no journal\n")
    assert run_script(source, tmp_path / "begun", *options, "fp4") == 2
    assert "--restart" in capsys.readouterr().err
    assert run_script(source, tmp_path / "begun", *options, "fp4", "--restart") == 0
    assert main(["verify", str(tmp_path / "begun"), "--source", str(source)]) == 0


# --- the tokenizer of another folder ---


def read_tokenizer(folder: Path) -> dict[str, str]:
    return {path.name: json.loads(path.read_text())["text"] for path in sorted(folder.glob("*token*"))}


@pytest.mark.parametrize(
    ("name", "extra"),
    [("deepseek-v3", ("tokenizer_extra.json",)), ("deepseek-v4-flash", ()), ("deepseek-v4.1-flash", ())],
)
def test_the_tokenizer_of_another_folder_takes_the_place_of_the_source_s(
    name: str, extra: tuple[str, ...], sources: Source, tmp_path: Path
) -> None:
    """As files: those that the script of the family copies, and no other."""
    other = write_tokenizer(tmp_path / "other", "of the other", (*TOKENIZER, "tokenizer_extra.json", "vocab.json"))
    options = ["--model-parallel", "2", "--tokenizer-path", str(other)]
    assert run_script(sources(name), tmp_path / "out", *options) == 0
    assert read_tokenizer(tmp_path / "out") == dict.fromkeys((*TOKENIZER, *extra), "of the other")
    assert not (tmp_path / "out" / "vocab.json").exists()
    assert main(["verify", str(tmp_path / "out")]) == 0
    assert main(["verify", str(tmp_path / "out"), "--source", str(sources(name))]) == 0


def test_a_source_without_a_tokenizer_gets_one(sources: Source, tmp_path: Path) -> None:
    """The use that the script's help tells of."""
    source = tmp_path / "source"
    source.mkdir()
    for path in sources("deepseek-v4.1-flash").iterdir():
        if path.name not in TOKENIZER:
            (source / path.name).symlink_to(path)
    other = write_tokenizer(tmp_path / "other", "of the other")
    options = ["--model-parallel", "2", "--tokenizer-path", str(other)]
    assert run_script(source, tmp_path / "out", *options) == 0
    assert read_tokenizer(tmp_path / "out") == dict.fromkeys(TOKENIZER, "of the other")
    for name in TOKENIZER:
        (tmp_path / "out" / name).unlink()
    assert main(["verify", str(tmp_path / "out")]) == 1
    assert run_script(source, tmp_path / "out", *options) == 0
    assert read_tokenizer(tmp_path / "out") == dict.fromkeys(TOKENIZER, "of the other")
    assert main(["verify", str(tmp_path / "out")]) == 0


def test_a_finished_target_does_not_pass_for_one_with_another_tokenizer(
    sources: Source, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    source = sources("deepseek-v4.1-flash")
    other = write_tokenizer(tmp_path / "other", "of the other")
    options = ["--model-parallel", "2", "--tokenizer-path", str(other)]
    assert run_script(source, tmp_path / "out", *options) == 0
    before = {path.name: path.read_bytes() for path in (tmp_path / "out").iterdir()}
    assert run_script(source, tmp_path / "out", *options) == 0
    assert "converted already" in capsys.readouterr().out
    assert run_script(source, tmp_path / "out", "--model-parallel", "2") == 2
    text = capsys.readouterr().err
    assert "tokenizer.json: source changed" in text
    assert "--tokenizer-path" in text
    assert {path.name: path.read_bytes() for path in (tmp_path / "out").iterdir()} == before


@pytest.mark.parametrize(
    ("names", "missing"),
    [
        ((), {"tokenizer.json", "tokenizer_config.json"}),
        (("tokenizer_config.json",), {"tokenizer.json"}),
    ],
)
def test_a_folder_without_a_tokenizer_is_refused_before_anything_is_written(
    names: tuple[str, ...], missing: set[str], sources: Source, tmp_path: Path
) -> None:
    other = write_tokenizer(tmp_path / "other", "of the other", names)
    with pytest.raises(Refused) as refused:
        reshard.convert(sources("deepseek-v4.1-flash"), tmp_path / "out", mp=2, tokenizer_path=other)
    assert {Path(problem.subject).name for problem in refused.value.problems} == missing
    assert {problem.kind for problem in refused.value.problems} == {"missing-file"}
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("name", ["deepseek-v3", "deepseek-v4.1-flash"])
def test_a_tokenizer_without_its_config_is_taken_as_the_script_does_and_said(
    name: str, sources: Source, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """It is not completed from the source, whose tokenizer is another one."""
    other = write_tokenizer(tmp_path / "other", "of the other", TOKENIZER[:1])
    options = ["--model-parallel", "2", "--tokenizer-path", str(other)]
    assert run_script(sources(name), tmp_path / "out", *options) == 0
    assert read_tokenizer(tmp_path / "out") == {"tokenizer.json": "of the other"}
    assert f"note: without tokenizer_config.json: not in {other}\n" in capsys.readouterr().out


def test_a_pattern_for_tokenizers_wants_the_files_of_the_source(
    sources: Source, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    source = write_tokenizer(tmp_path / "source", "of the source", (*TOKENIZER, "special_tokens_map.json"))
    for path in sources("deepseek-v3").iterdir():
        if path.name not in TOKENIZER:
            (source / path.name).symlink_to(path)
    other = write_tokenizer(tmp_path / "other", "of the other")
    options = ["--model-parallel", "2", "--tokenizer-path", str(other)]
    assert run_script(source, tmp_path / "out", *options) == 0
    assert "note: without special_tokens_map.json: not in " in capsys.readouterr().out
    write_tokenizer(other, "of the other", ("special_tokens_map.json",))
    assert run_script(source, tmp_path / "whole", *options) == 0
    assert "note: without" not in capsys.readouterr().out


def test_hints_name_options_of_this_command(
    sources: Source, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert run_script(sources("deepseek-v3"), tmp_path / "out", "--model-parallel", "3") == 2
    text = capsys.readouterr().err
    assert "--model-parallel with one of 1, 2" in text
    assert "--mp" not in text
    assert run_script(sources("deepseek-v3"), tmp_path / "out", "--model-parallel", "5000") == 2
    assert "\n--model-parallel: wrong ranks\n" in capsys.readouterr().err
    (tmp_path / "unknown").mkdir()
    (tmp_path / "unknown" / "config.json").write_text('{"model_type": "other"}')
    save_file({"weight": torch.zeros(4)}, tmp_path / "unknown" / "model.safetensors")
    assert run_script(tmp_path / "unknown", tmp_path / "out", "--model-parallel", "2") == 2
    assert "pass it with --recipe FILE (of reshard convert)" in capsys.readouterr().err


def test_a_model_without_experts_has_no_number_of_them(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    write_model(tmp_path / "llama", "llama")
    assert run_script(tmp_path / "llama", tmp_path / "out", "--model-parallel", "2", "--n-experts", "8") == 2
    text = capsys.readouterr().err
    assert "has no experts" in text
    assert "hint:     leave it out; is this a DeepSeek model?" in text


@pytest.mark.parametrize(("path", "kind"), [("nowhere", "cannot-read"), ("file", "wrong-option")])
def test_a_path_that_is_no_folder_is_refused(path: str, kind: str, sources: Source, tmp_path: Path) -> None:
    (tmp_path / "file").write_text("{}")
    with pytest.raises(Refused) as refused:
        reshard.convert(sources("deepseek-v4.1-flash"), tmp_path / "out", mp=2, tokenizer_path=tmp_path / path)
    assert [problem.kind for problem in refused.value.problems] == [kind]
    assert not (tmp_path / "out").exists()


def test_an_unknown_option_of_the_script_is_told_the_nearest(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        main(["deepseek", "--hf-ckpt-path", "a", "--save-path", "b", "--model-parallel", "2", "--tokenizer", "c"])
    assert "did you mean --tokenizer-path?" in capsys.readouterr().err
