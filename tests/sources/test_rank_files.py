"""Rank files as a source: they become the checkpoint that they came from, or are refused."""

import json
import shutil
from pathlib import Path

import pytest
import torch
import transformers
from families import FAMILIES, write_small
from jobs import Job, convert_checkpoint
from safetensors.torch import load_file, save_file

from reshard.errors import Refused
from reshard.inspection.contents import inspect_path
from reshard.synthetic import write_tensors

RANKS = 4


@pytest.fixture(scope="module")
def four(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The rank files of a small DeepSeek-V3, its MTP layer included."""
    folder = tmp_path_factory.mktemp("gather")
    write_small(folder / "source", "deepseek-v3")
    convert_checkpoint(Job(folder / "source", RANKS, keep_mtp=True), folder / "ranks")
    return folder / "ranks"


@pytest.fixture
def copied(four: Path, tmp_path: Path) -> Path:
    """To be damaged. Without the manifest, which could tell."""
    shutil.copytree(four, tmp_path / "ranks")
    (tmp_path / "ranks" / "reshard.json").unlink()
    return tmp_path / "ranks"


def require_the_source_again(source: Path, ranks: Path, target: Path) -> None:
    convert_checkpoint(Job(ranks, 1, to="hf"), target)
    names = [path.name for path in source.iterdir() if path.suffix in (".safetensors", ".json")]
    assert len(names) > 2
    assert [name for name in names if (source / name).read_bytes() != (target / name).read_bytes()] == []


def refused_kinds(ranks: Path, target: Path) -> set[str]:
    with pytest.raises(Refused) as error:
        convert_checkpoint(Job(ranks, 1, "deepseek-v3", to="hf"), target)
    assert not list(target.glob("*.safetensors"))
    return {problem.kind for problem in error.value.problems}


@pytest.mark.parametrize(("name", "ranks"), [("deepseek-v3", 4), ("deepseek-v3.2", 8), ("glm-5.1", 2)])
def test_rank_files_become_the_checkpoint_again(name: str, ranks: int, tmp_path: Path) -> None:
    write_small(tmp_path / "source", name)
    convert_checkpoint(Job(tmp_path / "source", ranks, keep_mtp=True), tmp_path / "ranks")
    require_the_source_again(tmp_path / "source", tmp_path / "ranks", tmp_path / "target")


def test_a_scale_that_ranks_share_comes_back_once(tmp_path: Path) -> None:
    """A shared expert of two blocks for 8 ranks."""
    config = {**FAMILIES["deepseek-v3"].small, "moe_intermediate_size": 256}
    write_tensors(tmp_path / "source", FAMILIES["deepseek-v3"].tensors(config), config, 3)
    convert_checkpoint(Job(tmp_path / "source", 8, keep_mtp=True), tmp_path / "ranks")
    require_the_source_again(tmp_path / "source", tmp_path / "ranks", tmp_path / "target")


def test_padding_is_taken_off_again(tmp_path: Path) -> None:
    """Tables of n-grams are filled up, so that all ranks have as many rows."""
    write_small(tmp_path / "source", "deepseek-v4.1-flash")
    convert_checkpoint(Job(tmp_path / "source", 4), tmp_path / "ranks")
    convert_checkpoint(Job(tmp_path / "ranks", 1, to="hf"), tmp_path / "target")
    before, after = (tables_of(tmp_path / name) for name in ("source", "target"))
    assert any(len(table) % 4 for table in before.values())
    assert before.keys() == after.keys()
    assert all(torch.equal(before[name], after[name]) for name in before)


def tables_of(folder: Path) -> dict[str, torch.Tensor]:
    found = {name: tensor for path in folder.glob("*.safetensors") for name, tensor in load_file(path).items()}
    return {name: tensor for name, tensor in found.items() if ".engram.embed." in name}


def test_a_replica_that_differs_is_refused(copied: Path, tmp_path: Path) -> None:
    path = copied / "model1-mp4.safetensors"
    content = bytearray(path.read_bytes())
    start = 8 + int.from_bytes(content[:8], "little")
    begin = offsets_of(bytes(content), b"norm.weight")[0]
    content[start + begin + 3] ^= 16
    path.write_bytes(content)
    assert refused_kinds(copied, tmp_path / "target") == {"replicas-differ"}


def test_parts_of_another_dtype_are_refused(copied: Path, tmp_path: Path) -> None:
    path = copied / "model1-mp4.safetensors"
    content = path.read_bytes()
    entry = content.index(b'"embed.weight":{"dtype":"BF16"')
    place = content.index(b'"BF16"', entry)
    path.write_bytes(content[:place] + b'"F16" ' + content[place + 6 :])
    assert refused_kinds(copied, tmp_path / "target") == {"wrong-shape"}


def offsets_of(content: bytes, name: bytes) -> tuple[int, int]:
    """Where the data of a tensor begin and end, from the header as text."""
    entry = content.index(b'"' + name + b'":{')
    begin = content.index(b"[", content.index(b"data_offsets", entry)) + 1
    first, second = content[begin : content.index(b"]", begin)].split(b",")
    return int(first), int(second)


# --- rank files of a recipe of one's own ---

OWN = """
name = "own"
about = "a test"
left = "one"
right = "other"
files = "m-{rank}-of-{ranks}.safetensors"
carry = ["config.json"]
placeholders.i = { counts = "layers" }
rules = [["same", "l.{i}.w", "l.{i}.w", "%s"]]
"""


def own_ranks(folder: Path, split: str, parts: list[torch.Tensor]) -> Path:
    """One part a rank; returns the recipe."""
    folder.mkdir()
    for rank, part in enumerate(parts):
        save_file({"l.0.w": part}, folder / f"m-{rank}-of-{len(parts)}.safetensors")
    (folder.parent / "own.toml").write_text(OWN % split)
    return folder.parent / "own.toml"


def refused(ranks: Path, recipe: Path | None, target: Path) -> list[tuple[str, str]]:
    with pytest.raises(Refused) as error:
        convert_checkpoint(Job(ranks, 1, str(recipe) if recipe else None, to="hf"), target)
    return [(problem.kind, problem.subject) for problem in error.value.problems]


def test_halves_of_an_odd_number_of_rows_are_refused(tmp_path: Path) -> None:
    """They would be cut in the middle of a value."""
    parts = [torch.arange(3.0).reshape(3, 1), torch.arange(100.0, 103).reshape(3, 1)]
    recipe = own_ranks(tmp_path / "ranks", "packed rows", parts)
    assert set(refused(tmp_path / "ranks", recipe, tmp_path / "target")) == {("wrong-shape", "l.0.w")}


def test_heads_that_the_ranks_cannot_have_are_refused(tmp_path: Path) -> None:
    recipe = own_ranks(tmp_path / "ranks", "rows of heads", [torch.ones(1, 2) * rank for rank in range(8)])
    (tmp_path / "ranks" / "config.json").write_text('{"heads": 3}')
    assert refused(tmp_path / "ranks", recipe, tmp_path / "target") == [("not-divisible", "l.0.w")]


def test_packed_values_of_half_a_byte_are_refused(tmp_path: Path) -> None:
    recipe = own_ranks(tmp_path / "ranks", "replicate", [])
    text = recipe.read_text().replace("l.{i}.w", "l.{i}.{p}")
    scales = 'scales.p = { left = "scale", right = "scale", block = [1, 32], packed = true, fp8_block = 32 }\nrules'
    recipe.write_text(text.replace("rules", scales))
    tensors = [("l.0.weight", "F4", (2, 5)), ("l.0.scale", "F8_E8M0", (2, 1))]
    write_tensors(tmp_path / "made", tensors, {}, 1, sparse=True)
    (found,) = (tmp_path / "made").glob("*.safetensors")
    found.rename(tmp_path / "ranks" / "m-0-of-1.safetensors")
    assert ("wrong-shape", "l.0.weight") in refused(tmp_path / "ranks", recipe, tmp_path / "target")


def test_rank_files_of_a_recipe_that_is_not_packaged_are_known_by_their_manifest(tmp_path: Path) -> None:
    recipe = own_ranks(tmp_path / "source", "rows", [])
    save_file({"l.0.w": torch.arange(8.0).reshape(4, 2)}, tmp_path / "source" / "one.safetensors")
    convert_checkpoint(Job(tmp_path / "source", 2, str(recipe)), tmp_path / "ranks")
    assert refused(tmp_path / "ranks", None, tmp_path / "target") == [("no-recipe", str(tmp_path / "ranks"))]
    assert "made by the recipe own" in inspect_path(tmp_path / "ranks").remark
    convert_checkpoint(Job(tmp_path / "ranks", 1, str(recipe), to="hf"), tmp_path / "target")
    assert torch.equal(load_file(tmp_path / "target" / "one.safetensors")["l.0.w"], torch.arange(8.0).reshape(4, 2))


def test_an_index_of_the_rank_files_is_not_that_of_the_model(copied: Path, tmp_path: Path) -> None:
    names = [name for path in copied.glob("*.safetensors") for name in load_file(path)]
    weight_map = dict.fromkeys(names, "model1-mp4.safetensors")
    (copied / "model.safetensors.index.json").write_text(json.dumps({"weight_map": weight_map}))
    convert_checkpoint(Job(copied, 1, to="hf"), tmp_path / "target")
    assert [path.name for path in (tmp_path / "target").glob("*.safetensors")] == ["model.safetensors"]


def test_rank_files_under_each_others_names_are_refused_by_their_headers(tmp_path: Path) -> None:
    """Without a manifest and without experts nothing else would tell."""
    config = transformers.LlamaConfig(
        vocab_size=32, hidden_size=16, intermediate_size=16, num_hidden_layers=1, num_attention_heads=4
    )
    transformers.LlamaForCausalLM(config).save_pretrained(tmp_path / "source")
    ranks = tmp_path / "ranks"
    convert_checkpoint(Job(tmp_path / "source", RANKS), ranks)
    (ranks / "reshard.json").unlink()
    first, second = (ranks / f"model-rank{rank}-of-4.safetensors" for rank in (1, 2))
    first.rename(ranks / "aside")
    second.rename(first)
    (ranks / "aside").rename(second)
    assert refused(ranks, None, tmp_path / "target") == [("wrong-ranks", first.name), ("wrong-ranks", second.name)]


def test_a_damaged_manifest_beside_whole_files_says_nothing(copied: Path, tmp_path: Path) -> None:
    convert_checkpoint(Job(copied, 1, to="hf"), tmp_path / "whole")
    (tmp_path / "whole" / "reshard.json").write_text('{"recipe": {"name": "own"}, "layout": {}}')
    convert_checkpoint(Job(tmp_path / "whole", RANKS, "deepseek-v3", keep_mtp=True), tmp_path / "again")
    for path in copied.glob("*.safetensors"):
        assert (tmp_path / "again" / path.name).read_bytes() == path.read_bytes()
