"""Checkpoints of a real family whose folder holds more than the index says: what is taken, refused, noted, verified."""

import json
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from numpy.typing import NDArray
from refusals import TINY
from safetensors.numpy import load_file, save_file

import reshard
from reshard.cli.main import main
from reshard.errors import Problem, Refused
from reshard.synthetic import write_checkpoint

INDEX = "model.safetensors.index.json"
ONE, TWO = "model-00001-of-00002.safetensors", "model-00002-of-00002.safetensors"
CONFIG = {
    "model_type": "llama", "architectures": ["LlamaForCausalLM"], "hidden_size": 8, "intermediate_size": 8,
    "num_hidden_layers": 2, "num_attention_heads": 4, "num_key_value_heads": 2, "head_dim": 2, "vocab_size": 8,
    "tie_word_embeddings": False, "attention_bias": False, "mlp_bias": False,
}  # fmt: skip
HEAD, STALE = "lm_head.weight", "model.layers.0.mlp.stale"
Tensors = dict[str, NDArray[Any]]


def make_llama() -> Tensors:
    """All tensors of a model of two layers."""
    random = np.random.default_rng(3)
    shapes: dict[str, tuple[int, ...]] = {"model.embed_tokens.weight": (8, 8), "model.norm.weight": (8,), HEAD: (8, 8)}
    for layer in range(2):
        for name in ("q_proj", "o_proj"):
            shapes[f"model.layers.{layer}.self_attn.{name}.weight"] = (8, 8)
        for name in ("k_proj", "v_proj"):
            shapes[f"model.layers.{layer}.self_attn.{name}.weight"] = (4, 8)
        for name in ("gate_proj", "up_proj", "down_proj"):
            shapes[f"model.layers.{layer}.mlp.{name}.weight"] = (8, 8)
        for name in ("input_layernorm", "post_attention_layernorm"):
            shapes[f"model.layers.{layer}.{name}.weight"] = (8,)
    return {name: random.random(shape, np.float32) for name, shape in shapes.items()}


LLAMA = make_llama()
FIRST = [*LLAMA][:10]


def write_llama(folder: Path, *, without: tuple[str, ...] = (), **config: object) -> Path:
    """Two files; `without` are tensors that the index does not name."""
    folder.mkdir()
    save_file({name: LLAMA[name] for name in FIRST}, folder / ONE)
    save_file({name: tensor for name, tensor in LLAMA.items() if name not in FIRST}, folder / TWO)
    weight_map = {name: ONE if name in FIRST else TWO for name in LLAMA if name not in without}
    (folder / INDEX).write_text(json.dumps({"weight_map": weight_map}))
    (folder / "config.json").write_text(json.dumps({**CONFIG, **config}))
    return folder


def add(folder: Path, file: str, tensors: Mapping[str, NDArray[Any]]) -> None:
    save_file({**load_file(folder / file), **tensors}, folder / file)


def read_all(folder: Path) -> Tensors:
    return {
        name: tensor for path in sorted(folder.glob("[!.]*.safetensors")) for name, tensor in load_file(path).items()
    }


def is_equal(found: Mapping[str, NDArray[Any]], wanted: Mapping[str, NDArray[Any]]) -> bool:
    return found.keys() == wanted.keys() and all(np.array_equal(found[name], wanted[name]) for name in wanted)


def list_problems(source: Path, **options: Any) -> list[Problem]:
    with pytest.raises(Refused) as caught:
        reshard.plan(source, mp=2, **options)
    return list(caught.value.problems)


def test_an_output_head_that_only_the_index_lacks_is_not_lost_in_silence(tmp_path: Path) -> None:
    """With tied embeddings the head may be missing: nothing else would tell."""
    source = write_llama(tmp_path / "s", without=(HEAD,), tie_word_embeddings=True)
    (problem,) = list_problems(source)
    assert (problem.kind, problem.subject) == ("not-in-index", HEAD)
    assert f"in {ONE}, but not in {INDEX}" in problem.found
    assert "ignore_extra_files=True leaves the tensor out" in problem.remedy
    made = reshard.convert(source, tmp_path / "o", to="hf", ignore_extra_files=True)
    assert [note.kind for note in made.plan.notes] == ["not-in-index"]
    assert is_equal(read_all(tmp_path / "o"), {name: LLAMA[name] for name in LLAMA if name != HEAD})


@pytest.mark.parametrize("ignore_extra_files", [True, False])
def test_a_tensor_that_the_model_needs_is_reported_as_lacking_in_the_index(
    tmp_path: Path, *, ignore_extra_files: bool
) -> None:
    source = write_llama(tmp_path / "s", without=("model.norm.weight", HEAD))
    problems = list_problems(source, ignore_extra_files=ignore_extra_files)
    assert {(problem.kind, problem.subject) for problem in problems} == {
        ("not-in-index", "model.norm.weight"), ("not-in-index", HEAD),
    }  # fmt: skip
    assert all(problem.remedy.startswith(f'add "{problem.subject}": "') for problem in problems)


def test_a_whole_layer_that_the_index_lacks_is_named_and_may_be_left_out(tmp_path: Path) -> None:
    """An index may have been cut to fewer layers, with the config."""
    layer = tuple(name for name in LLAMA if name.startswith("model.layers.1."))
    source = write_llama(tmp_path / "s", without=layer, num_hidden_layers=1)
    assert {problem.subject for problem in list_problems(source)} == set(layer)
    reshard.convert(source, tmp_path / "o", to="hf", ignore_extra_files=True)
    assert is_equal(read_all(tmp_path / "o"), {name: LLAMA[name] for name in LLAMA if name not in layer})


def test_names_that_the_recipe_drops_or_does_not_know_are_left_aside(tmp_path: Path) -> None:
    source = write_llama(tmp_path / "s")
    add(source, ONE, {STALE: np.ones(3), "model.layers.1.self_attn.rotary_emb.inv_freq": np.ones(3)})
    made = reshard.convert(source, tmp_path / "o", to="hf")
    assert is_equal(read_all(tmp_path / "o"), LLAMA)
    (note,) = made.plan.notes
    assert (note.kind, "2 tensors" in note.text, STALE in note.text) == ("not-in-index", True, True)
    assert str(made).count("note: ") == 1
    assert [note.kind for note in reshard.inspect(source).notes] == ["not-in-index"]


def test_superseded_copies_change_nothing_in_any_reader(tmp_path: Path) -> None:
    source, clean = write_llama(tmp_path / "s"), write_llama(tmp_path / "clean")
    add(source, TWO, {FIRST[0]: np.full_like(LLAMA[FIRST[0]], 7), STALE: np.ones(3)})
    reshard.convert(source, tmp_path / "o", mp=2)
    reshard.convert(clean, tmp_path / "right", mp=2)
    for name in ("model-rank0-of-2.safetensors", "model-rank1-of-2.safetensors"):
        assert (tmp_path / "o" / name).read_bytes() == (tmp_path / "right" / name).read_bytes()
    assert reshard.verify(tmp_path / "o", source).is_proven
    assert is_equal(
        reshard.load(source, mp=2, rank=1, framework="numpy"),
        load_file(tmp_path / "right/model-rank1-of-2.safetensors"),
    )
    with reshard.open(source, framework="numpy") as tensors:
        assert is_equal({name: tensors[name][...] for name in tensors}, LLAMA)
    report = reshard.diff(source, clean)
    assert (report.is_same, {note.kind for note in report.notes}) == (True, {"shadowed", "not-in-index"})
    assert all(note.text.startswith("A: ") for note in report.notes)
    reshard.convert(tmp_path / "o", tmp_path / "back", to="hf")
    assert is_equal(read_all(tmp_path / "back"), LLAMA)
    assert reshard.verify(tmp_path / "back", tmp_path / "o").is_proven


def test_an_unknown_tensor_is_reported_with_its_file_and_the_flag_that_helps(tmp_path: Path) -> None:
    source = write_llama(tmp_path / "s")
    (source / INDEX).unlink()
    save_file({"layers.0.attention.wq.weight": np.ones(3)}, source / "consolidated.safetensors")
    (problem,) = list_problems(source)
    assert (problem.kind, problem.found) == ("no-rule", "in consolidated.safetensors; no rule knows it")
    assert "ignore_extra_files=True leaves it out" in problem.remedy
    reshard.convert(source, tmp_path / "o", mp=2, ignore_extra_files=True)
    assert reshard.verify(tmp_path / "o", source, ignore_extra_files=True).is_proven
    assert reshard.diff(source, tmp_path / "o", ignore_extra_files=True).is_same
    with reshard.open(source, framework="numpy", ignore_extra_files=True) as tensors:
        assert set(tensors) == set(LLAMA)
    add(source, TWO, {STALE: np.ones(3)})
    (problem,) = list_problems(source, ignore_extra_files=True)
    assert (problem.subject, problem.found) == (STALE, f"in {TWO}; no rule knows it")
    assert "ignore_extra_files" not in problem.remedy


def test_model_safetensors_is_taken_by_every_reader(tmp_path: Path) -> None:
    source = tmp_path / "s"
    source.mkdir()
    save_file(LLAMA, source / "model.safetensors")
    save_file({"tok_embeddings.weight": np.ones(3)}, source / "consolidated.safetensors")
    (source / "config.json").write_text(json.dumps(CONFIG))
    made = reshard.convert(source, tmp_path / "o", mp=2)
    assert [note.kind for note in made.plan.notes] == ["left-aside"]
    assert reshard.verify(tmp_path / "o", source).is_proven
    assert reshard.diff(source, tmp_path / "o").is_same
    assert "consolidated.safetensors" in str(reshard.inspect(source))
    with reshard.open(source, framework="numpy") as tensors:
        assert set(tensors) == set(LLAMA)


def test_a_draft_layer_in_a_file_left_aside_is_not_lost_in_silence(tmp_path: Path) -> None:
    """`model.safetensors` is the checkpoint, but `mtp.safetensors` has what the recipe keeps in whole files."""
    torch = pytest.importorskip("safetensors.torch")
    source, whole = tmp_path / "s", tmp_path / "s" / "model.safetensors"
    write_checkpoint(source, TINY, 1, index=False)
    next(source.glob("*.safetensors")).rename(whole)
    tensors = torch.load_file(whole)
    last = f"model.layers.{TINY['num_hidden_layers']}."
    drafts = {name: tensors[name] for name in tensors if name.startswith(last)}
    torch.save_file({name: tensors[name] for name in tensors.keys() - drafts.keys()}, whole)
    torch.save_file(drafts, source / "mtp.safetensors")

    with pytest.raises(Refused) as caught:
        reshard.plan(source, to="hf")
    assert {(problem.kind, problem.subject) for problem in caught.value.problems} == {
        ("left-aside", name) for name in drafts
    }
    assert reshard.plan(source, 2).notes[0].kind == "left-aside"  # ranks have no drafts anyway
    notes = reshard.plan(source, to="hf", ignore_extra_files=True).notes
    assert [note.kind for note in notes] == ["left-aside", "no-mtp"]
    assert "is a file missing? or did transformers save it" in notes[1].text

    whole.rename(source / "main.safetensors")  # as the hint says
    reshard.convert(source, tmp_path / "o", to="hf")
    made = torch.load_file(next((tmp_path / "o").glob("*.safetensors")))
    assert made.keys() == tensors.keys()
    assert all(made[name].view(-1).tolist() == tensors[name].view(-1).tolist() for name in list(drafts)[::9])


def test_hidden_files_are_nobodys_in_targets_and_rank_files(tmp_path: Path) -> None:
    source, target, back = write_llama(tmp_path / "s"), tmp_path / "o", tmp_path / "back"
    for folder in (target, back):
        folder.mkdir()
        for name in (".DS_Store", "._model.safetensors", "._model-rank0-of-2.safetensors"):
            (folder / name).write_bytes(b"\0\5\x16\7")
    reshard.convert(source, target, mp=2)
    assert reshard.verify(target).is_proven
    assert reshard.verify(target, source).is_proven
    assert reshard.convert(source, target, mp=2).done is None
    assert reshard.inspect(target).ranks == 2
    reshard.convert(target, back, to="hf")
    assert is_equal(read_all(back), LLAMA)
    assert reshard.verify(back).is_proven
    assert reshard.verify(back, target).is_proven
    assert reshard.verify(back, source).is_proven
    assert sorted(path.name for path in back.glob(".*")) == [
        ".DS_Store", "._model-rank0-of-2.safetensors", "._model.safetensors",
    ]  # fmt: skip


def test_what_lies_beside_rank_files_is_left_aside_by_the_flag_and_told(tmp_path: Path) -> None:
    ranks, back = tmp_path / "o", tmp_path / "back"
    reshard.convert(write_llama(tmp_path / "s"), ranks, mp=2)
    save_file({"x": np.ones(3)}, ranks / "adapter.safetensors")
    made = reshard.convert(ranks, back, to="hf", ignore_extra_files=True)
    assert [(note.kind, "adapter.safetensors" in note.text) for note in made.plan.notes] == [("left-aside", True)]
    assert [note.kind for note in reshard.inspect(ranks).notes] == ["left-aside"]
    with pytest.raises(Refused, match="extra file"):
        reshard.verify(back, ranks)
    assert reshard.verify(back, ranks, ignore_extra_files=True).is_proven


def test_a_restored_checkpoint_with_something_too_much_is_not_proven(tmp_path: Path) -> None:
    """In a source it would be left aside; here a restoration did not write it."""
    ranks, back = tmp_path / "o", tmp_path / "back"
    source = write_llama(tmp_path / "s")
    reshard.convert(source, ranks, mp=2)
    reshard.convert(ranks, back, to="hf", max_file_size=10**6)
    assert [path.name for path in back.glob("*.safetensors")] == ["model.safetensors"]
    assert reshard.verify(back, ranks).is_proven
    save_file({"x": np.ones(3)}, back / "adapter.safetensors")
    with pytest.raises(Refused, match=r"adapter\.safetensors: extra file"):
        reshard.verify(back, ranks)
    (back / "adapter.safetensors").unlink()
    (back / INDEX).write_text(json.dumps({"weight_map": dict.fromkeys(LLAMA, "model.safetensors")}))
    add(back, "model.safetensors", {STALE: np.ones(3)})
    with pytest.raises(Refused, match=f"extra tensor\n.*\n.*{STALE}"):
        reshard.verify(back, ranks)


def test_the_hint_for_a_module_that_no_rule_knows_leaves_it_out(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    Path("source").mkdir()
    Path("source/config.json").write_text(json.dumps(CONFIG))
    more = {name: np.zeros(2, np.float32) for name in ("value_head.weight", "value_head.bias")}
    save_file({**make_llama(), **more}, "source/model.safetensors")
    with pytest.raises(Refused) as refused:
        reshard.plan("source", 2)
    (hint,) = {problem.remedy for problem in refused.value.problems}
    found = re.fullmatch(
        r"to leave it out: reshard (recipes show \S+) > my.toml; add .* my.toml (\[.*\],) and .*", hint
    )
    assert found
    assert main(found[1].split()) == 0
    text = capsys.readouterr().out
    Path("my.toml").write_text(text.replace('\n["same"', f'\n{found[2]}\n["same"', 1))
    assert "value_head.{*} (not used)" in str(reshard.plan("source", 2, recipe="my.toml"))
