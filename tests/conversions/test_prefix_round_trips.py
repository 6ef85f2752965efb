"""Checkpoints whose names have a prefix, through rank files and back: the original files, byte for byte.

What rank files hold is compared with those of the same model under clean names, and with its tensors, by safetensors.
"""

import json
import shutil
from pathlib import Path

import pytest
import torch
from families import write_small
from prefixed import INDEX, QWEN3, WAYS, add_prefix, leave_out_body, make_tensors, write_model_as, write_tensors_as
from safetensors.torch import load_file, save_file
from torch import Tensor

import reshard
from reshard.cli.main import main
from reshard.errors import Refused
from reshard.formats.manifest import compute_manifest_checksum

TAKEN_OFF = "all 21 names: `module.` in front was taken off"


def contents(folder: Path) -> dict[str, bytes]:
    """Of all files but the manifest."""
    return {path.name: path.read_bytes() for path in folder.iterdir() if path.name != "reshard.json"}


def tensors_of(folder: Path) -> dict[str, Tensor]:
    return {name: tensor for path in folder.glob("*.safetensors") for name, tensor in load_file(path).items()}


def require_tensors(found: dict[str, Tensor], wanted: dict[str, Tensor]) -> None:
    assert found.keys() == wanted.keys()
    assert all(torch.equal(found[name], wanted[name]) for name in wanted)


def require_proven(target: Path, source: Path | None = None) -> None:
    report = reshard.verify(target, source)
    assert report.is_proven, report


def change_manifest(folder: Path, **origin: object) -> None:
    """Writes other values into the origin of a manifest, with the right checksum."""
    manifest = json.loads((folder / "reshard.json").read_text())
    del manifest["xxh3_128"]
    manifest["origin"] |= origin
    manifest["origin"] = {key: value for key, value in manifest["origin"].items() if value is not None}
    checked = {**manifest, "xxh3_128": compute_manifest_checksum(manifest)}
    (folder / "reshard.json").write_text(json.dumps(checked))


@pytest.fixture
def source(tmp_path: Path) -> Path:
    """A Llama whose names begin with `module.`."""
    write_model_as(tmp_path / "source", add_prefix("module."))
    return tmp_path / "source"


@pytest.fixture
def ranks(source: Path, tmp_path: Path) -> Path:
    """The rank files of it."""
    reshard.convert(source, tmp_path / "ranks", mp=2)
    return tmp_path / "ranks"


@pytest.mark.parametrize("way", WAYS)
def test_there_and_back(way: str, tmp_path: Path) -> None:
    source, clean, ranks, back = (tmp_path / name for name in ("source", "clean", "ranks", "back"))
    write_model_as(source, WAYS[way][0])
    tensors = write_model_as(clean, lambda name: name)
    reshard.convert(source, ranks, mp=2)
    reshard.convert(clean, tmp_path / "clean-ranks", mp=2)
    assert contents(ranks) == contents(tmp_path / "clean-ranks")
    require_proven(ranks)
    require_proven(ranks, source)
    require_proven(ranks, clean)
    reshard.convert(ranks, back, to="hf")
    assert contents(back) == contents(source)
    require_proven(back)
    require_proven(back, ranks)
    require_proven(back, source)
    reshard.convert(source, tmp_path / "whole", to="hf")
    require_tensors(tensors_of(tmp_path / "whole"), tensors)
    require_proven(tmp_path / "whole", source)


def test_there_and_back_through_other_ranks(ranks: Path, source: Path, tmp_path: Path) -> None:
    reshard.convert(ranks, tmp_path / "other", mp=1)
    reshard.convert(tmp_path / "other", tmp_path / "back", to="hf")
    assert contents(tmp_path / "back") == contents(source)
    require_proven(tmp_path / "other", source)


def test_an_embedding_model_in_one_file(tmp_path: Path) -> None:
    source, ranks, back = (tmp_path / name for name in ("source", "ranks", "back"))
    write_model_as(source, leave_out_body, {**QWEN3, "tie_word_embeddings": True}, files=1)
    reshard.convert(source, ranks, mp=2)
    reshard.convert(ranks, back, to="hf")
    assert contents(back) == contents(source)
    require_proven(back, source)


def test_what_comes_back_is_told(ranks: Path) -> None:
    (note,) = reshard.plan(ranks, to="hf").notes
    assert note.kind == "renamed"
    assert "all 21 names: `module.` in front was taken off" in note.text
    (note,) = reshard.plan(ranks, to="hf", max_file_size=10_000).notes
    assert note.kind == "renamed"
    assert "do not come back (`module.` in front was taken off" in note.text
    assert not reshard.plan(ranks, mp=1).notes


def test_files_that_do_not_come_back_whole_have_clean_names(ranks: Path, source: Path, tmp_path: Path) -> None:
    tensors = make_tensors()
    reshard.convert(ranks, tmp_path / "sized", to="hf", max_file_size=2_000)
    require_tensors(tensors_of(tmp_path / "sized"), tensors)
    require_proven(tmp_path / "sized", ranks)
    require_proven(tmp_path / "sized", source)
    change_manifest(ranks, headers={})
    reshard.convert(ranks, tmp_path / "headless", to="hf")
    require_tensors(tensors_of(tmp_path / "headless"), tensors)


def test_dropped_tensors_leave_clean_names_in_all_files(tmp_path: Path) -> None:
    source, clean, ranks, back = (tmp_path / name for name in ("source", "clean", "ranks", "back"))
    tensors = make_tensors()
    frequencies = {f"model.layers.{layer}.self_attn.rotary_emb.inv_freq": torch.ones(1) for layer in (0, 1)}
    together = {**frequencies, **tensors}  # dropped ones are in the first file only
    write_tensors_as(source, {"module." + name: tensor for name, tensor in together.items()})
    write_tensors_as(clean, together)
    reshard.convert(source, ranks, mp=2)
    assert "do not come back" in reshard.plan(ranks, to="hf").notes[0].text
    reshard.convert(ranks, back, to="hf")
    require_tensors(tensors_of(back), tensors)
    assert json.loads((back / INDEX).read_text())["weight_map"].keys() == tensors.keys()
    assert sorted(path.name for path in back.iterdir()) == sorted([*contents(source), "reshard.json"])
    require_proven(back, ranks)


def test_casts_leave_clean_names(tmp_path: Path) -> None:
    source, ranks, back = (tmp_path / name for name in ("source", "ranks", "back"))
    write_small(source, "deepseek-v3", index=False)
    names = set(tensors_of(source))
    for path in source.glob("*.safetensors"):
        save_file({"_orig_mod." + name: tensor for name, tensor in load_file(path).items()}, path)
    reshard.convert(source, ranks, mp=2, keep_mtp=True)
    reshard.convert(ranks, back, to="hf")
    assert contents(back) == contents(source)
    cast = tmp_path / "cast"
    reshard.convert(ranks, cast, to="hf", cast="bf16")
    assert set(tensors_of(cast)) == {name for name in names if not name.endswith("_scale_inv")}
    require_proven(cast, source)


def test_resuming_and_running_again(source: Path, ranks: Path, tmp_path: Path) -> None:
    assert reshard.convert(source, ranks, mp=2).done is None
    target = tmp_path / "parts"
    reshard.convert(source, target, mp=2, ranks=[0])
    reshard.convert(source, target, mp=2, ranks=[1])
    assert contents(target) == contents(ranks)
    reshard.convert(ranks, tmp_path / "back", to="hf")
    assert reshard.convert(ranks, tmp_path / "back", to="hf").done is None


def test_a_manifest_without_the_record_is_read(ranks: Path, tmp_path: Path) -> None:
    manifest = json.loads((ranks / "reshard.json").read_text())
    assert manifest["origin"]["renamed"] == [{"old": "module."}]
    change_manifest(ranks, renamed=None)
    reshard.convert(ranks, tmp_path / "back", to="hf")
    require_tensors(tensors_of(tmp_path / "back"), make_tensors())


def test_no_record_where_nothing_was_renamed(tmp_path: Path) -> None:
    write_model_as(tmp_path / "clean", lambda name: name)
    reshard.convert(tmp_path / "clean", tmp_path / "ranks", mp=2)
    assert "renamed" not in json.loads((tmp_path / "ranks" / "reshard.json").read_text())["origin"]


@pytest.mark.parametrize(
    "renamed",
    [
        "module.",
        [{"old": "module.", "new": 3}],
        [{"old": "m" * 2_000}],
        [{"old": "", "new": "x" * 100}],
        [{"old": "module."}] * 17,
        [{"old": "a", "further": 1}],
        [{"old": "module."}, {"old": "model.layers.0."}, {"old": "model.layers.1."}],
        [],
    ],
)
def test_a_record_that_is_not_ours_gives_clean_names(renamed: object, ranks: Path, tmp_path: Path) -> None:
    change_manifest(ranks, renamed=renamed)
    reshard.convert(ranks, tmp_path / "back", to="hf")
    require_tensors(tensors_of(tmp_path / "back"), make_tensors())


def test_a_subset_has_clean_names(source: Path, tmp_path: Path) -> None:
    reshard.convert(source, tmp_path / "ranks", mp=2, layers=[0])
    reshard.convert(tmp_path / "ranks", tmp_path / "back", to="hf")
    wanted = {name: tensor for name, tensor in make_tensors().items() if ".layers.1." not in name}
    require_tensors(tensors_of(tmp_path / "back"), wanted)
    require_proven(tmp_path / "ranks", source)
    reshard.convert(source, tmp_path / "chosen", to="hf", only=["model.layers.1.*"])
    assert set(tensors_of(tmp_path / "chosen")) == {name for name in make_tensors() if ".layers.1." in name}


def test_a_changed_byte_is_found_under_either_name(source: Path, ranks: Path, tmp_path: Path) -> None:
    back = tmp_path / "back"
    reshard.convert(ranks, back, to="hf")
    path = back / "model-00002-of-00002.safetensors"
    content = bytearray(path.read_bytes())
    content[-1] ^= 1
    path.write_bytes(content)
    for source_of in (source, ranks):
        problems = reshard.verify(back, source_of).problems
        assert {problem.kind for problem in problems} == {"differs"}


def test_verify_of_a_damaged_or_empty_target_of_such_a_source(source: Path, ranks: Path, tmp_path: Path) -> None:
    back = tmp_path / "back"
    reshard.convert(ranks, back, to="hf")
    path = back / "model-00002-of-00002.safetensors"
    path.write_bytes(path.read_bytes()[:-1])
    assert "truncated-file" in {problem.kind for problem in reshard.verify(back, source).problems}
    shutil.rmtree(back)
    back.mkdir()
    with pytest.raises(Refused) as caught:
        reshard.verify(back, source)
    assert caught.value.problems[0].kind == "empty-target"


def test_diff_takes_the_names_of_the_other_side(
    source: Path, ranks: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    write_model_as(tmp_path / "clean", lambda name: name)
    for other in (ranks, tmp_path / "clean"):
        for sides in ((source, other), (other, source)):
            report = reshard.diff(*sides)
            assert report.is_same
            assert report.same == 21
            assert [note.text for note in report.notes] == [f"{'AB'[sides[1] is source]}: {TAKEN_OFF}"]
    assert main(["diff", str(source), str(ranks)]) == 0
    assert f"note: A: {TAKEN_OFF}" in capsys.readouterr().out.splitlines()
    assert main(["diff", str(source), str(ranks), "--json", "--only", "model.layers.0.*"]) == 0
    found = json.loads(capsys.readouterr().out)
    assert found["notes"] == [{"kind": "renamed", "text": f"A: {TAKEN_OFF}"}]
    assert found["same"] == 9


def test_diff_keeps_names_that_fit_on_neither_side(source: Path, tmp_path: Path) -> None:
    tensors = {name: tensor for name, tensor in make_tensors().items() if "norm" not in name}
    write_tensors_as(tmp_path / "other", {**tensors, "extra": torch.zeros(1)})
    report = reshard.diff(source, tmp_path / "other")
    assert [note.kind for note in report.notes] == ["prefix"]
    assert (len(report.only_a), len(report.only_b)) == (21, len(tensors) + 1)
