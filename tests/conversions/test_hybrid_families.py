"""Qwen3-Next, Qwen3.5 and MiniMax-M2 in the forms that transformers does not write: FP8, MTP layers, stacked experts as
published. Cut as a plain converter cuts them, cast as torch casts them, and led back.
"""

import json
import re
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from hybrid_families import HYBRIDS, change_text, qwen35, write_small_hybrid
from jobs import Job, convert_checkpoint
from oracle_casts import cast_to_bf16, dequantize
from plain_shares import rewrite, share, tensors_of
from safetensors.torch import load_file, save_file
from torch import Tensor

import reshard
from reshard.errors import Refused
from reshard.synthetic import write_tensors

Source = Callable[[str], Path]
FP8 = ["qwen3-next-fp8", "qwen3.5-27b-fp8", "qwen3.5-35b-a3b-fp8", "minimax-m2.7"]
BF16 = ["qwen3-next", "qwen3.5-4b", "qwen3.5-35b-a3b", "qwen3.6-35b-a3b"]


@pytest.fixture(scope="module")
def source(tmp_path_factory: pytest.TempPathFactory) -> Source:
    root = tmp_path_factory.mktemp("sources")

    def of(name: str) -> Path:
        if not (root / name).exists():
            write_small_hybrid(root / name, name)
        return root / name

    return of


def read_config(folder: Path) -> dict[str, Any]:
    config: dict[str, Any] = json.loads((folder / "config.json").read_text())
    return config


def split_stacks(tensors: dict[str, Tensor]) -> dict[str, Tensor]:
    """The same tensors with one for each expert."""
    found: dict[str, Tensor] = {}
    for name, tensor in tensors.items():
        root, dot, word = name.partition(".experts.")
        for expert, part in enumerate(tensor if dot and word in ("gate_up_proj", "down_proj") else ()):
            halves = (
                {"down_proj": part}
                if word == "down_proj"
                else dict(zip(("gate_proj", "up_proj"), part.chunk(2), strict=True))
            )
            found |= {f"{root}.experts.{expert}.{key}.weight": half for key, half in halves.items()}
        if not dot or word not in ("gate_up_proj", "down_proj"):
            found[name] = tensor
    return found


def require_same(found: dict[str, Tensor], wanted: dict[str, Tensor]) -> None:
    assert found.keys() == wanted.keys()
    for name, tensor in wanted.items():
        assert found[name].dtype == tensor.dtype, name
        assert found[name].shape == tensor.shape, name
        assert torch.equal(found[name].contiguous().view(torch.uint8), tensor.contiguous().view(torch.uint8)), name


# --- rank files ---


@pytest.mark.parametrize(
    ("name", "ranks"), [("qwen3-next-fp8", 1), *((name, 2) for name in FP8), *((name, 4) for name in (*FP8, *BF16))]
)
def test_rank_files_are_those_of_a_plain_converter(name: str, ranks: int, source: Source, tmp_path: Path) -> None:
    keeps = ranks == 2 and name != "minimax-m2.7"
    convert_checkpoint(Job(source(name), ranks, keep_mtp=keeps), tmp_path / "ranks")
    whole, config = split_stacks(tensors_of(source(name))), read_config(source(name))
    kept = {key: tensor for key, tensor in whole.items() if keeps or not key.startswith("mtp.")}
    for rank in range(ranks):
        shares = {key: share(key, tensor, config, rank, ranks) for key, tensor in kept.items()}
        found = load_file(tmp_path / "ranks" / f"model-rank{rank}-of-{ranks}.safetensors")
        require_same(found, {key: part for key, part in shares.items() if part is not None})
    assert reshard.verify(tmp_path / "ranks", source(name)).is_proven


@pytest.mark.parametrize("name", [*FP8, "qwen3-next", "qwen3.5-4b"])
def test_rank_files_lead_back_to_the_files(name: str, source: Source, tmp_path: Path) -> None:
    convert_checkpoint(Job(source(name), 4, keep_mtp=name != "minimax-m2.7"), tmp_path / "ranks")
    convert_checkpoint(Job(tmp_path / "ranks", 2, keep_mtp=name != "minimax-m2.7"), tmp_path / "fewer")
    convert_checkpoint(Job(tmp_path / "fewer", 1, to="hf"), tmp_path / "back")
    names = [*(path.name for path in source(name).glob("*.safetensors")), "config.json", "model.safetensors.index.json"]
    assert len(names) == 5
    for one in names:
        assert (tmp_path / "back" / one).read_bytes() == (source(name) / one).read_bytes(), one


@pytest.mark.parametrize(("files", "index"), [(1, "index"), (1, ""), (7, "")])
@pytest.mark.parametrize("name", ["qwen3-next-fp8", "qwen3.6-35b-a3b", "minimax-m2.7"])
def test_how_the_source_lies_in_its_files_changes_nothing(
    name: str, files: int, index: str, source: Source, tmp_path: Path
) -> None:
    write_small_hybrid(tmp_path / "source", name, files=files, index=bool(index))
    for folder, made in ((source(name), "wanted"), (tmp_path / "source", "found")):
        convert_checkpoint(Job(folder, 2), tmp_path / made)
    for path in (tmp_path / "wanted").glob("*.safetensors"):
        assert (tmp_path / "found" / path.name).read_bytes() == path.read_bytes()


def test_files_with_the_names_of_the_published_qwen35_are_read_by_their_index(source: Source, tmp_path: Path) -> None:
    """`model.safetensors-00001-of-00003.safetensors`."""
    shutil.copytree(source("qwen3.5-27b"), tmp_path / "source")
    index = tmp_path / "source" / "model.safetensors.index.json"
    for path in (tmp_path / "source").glob("model-*.safetensors"):
        path.rename(path.with_name(path.name.replace("model-", "model.safetensors-")))
    index.write_text(index.read_text().replace('"model-', '"model.safetensors-'))
    reshard.convert(tmp_path / "source", tmp_path / "whole", to="hf", max_file_size=1_000_000)
    require_same(tensors_of(tmp_path / "whole"), tensors_of(source("qwen3.5-27b")))
    next((tmp_path / "source").glob("*-00002-of-00003.safetensors")).unlink()
    with pytest.raises(Refused, match=r"model\.safetensors-00002-of-00003\.safetensors"):
        reshard.convert(tmp_path / "source", tmp_path / "other", to="hf")


# --- whole files: casts, subsets, slices ---


@pytest.mark.parametrize("name", FP8)
def test_fp8_becomes_bf16_and_is_read_again(name: str, source: Source, tmp_path: Path) -> None:
    reshard.convert(source(name), tmp_path / "bf16", to="hf", cast="bf16")
    found = tensors_of(tmp_path / "bf16")
    require_same(found, cast_to_bf16(source(name)))
    assert {str(tensor.dtype) for tensor in found.values()} <= {"torch.bfloat16", "torch.float32"}
    assert "quantization_config" not in read_config(tmp_path / "bf16")
    assert reshard.verify(tmp_path / "bf16", source(name)).is_proven
    convert_checkpoint(Job(tmp_path / "bf16", 2), tmp_path / "ranks")
    convert_checkpoint(Job(source(name), 2, cast="bf16"), tmp_path / "wanted")
    for path in (tmp_path / "wanted").glob("*.safetensors"):
        assert (tmp_path / "ranks" / path.name).read_bytes() == path.read_bytes()


def every_part(config: dict[str, Any]) -> list[dict[str, Any]]:
    return [config, *(value for key, value in config.items() if key in ("text_config", "vision_config"))]


@pytest.mark.parametrize("name", ["qwen3.5-27b", "minimax-m2.7"])
def test_what_is_published_in_f32_stays(name: str, source: Source, tmp_path: Path) -> None:
    whole = {
        key: tensor.float() if tensor.dtype == torch.bfloat16 else tensor
        for key, tensor in tensors_of(source(name)).items()
    }
    (tmp_path / "source").mkdir()
    config = read_config(source(name))
    for part in every_part(config):
        part["dtype"] = "float32"
    (tmp_path / "source" / "config.json").write_text(json.dumps(config))
    rewrite(tmp_path / "source", whole)
    reshard.convert(tmp_path / "source", tmp_path / "bf16", to="hf", cast="bf16")
    assert {told.get("dtype") for told in every_part(read_config(tmp_path / "bf16"))} <= {"bfloat16", None}
    assert reshard.verify(tmp_path / "bf16", tmp_path / "source").is_proven
    kept = {key for key, tensor in tensors_of(tmp_path / "bf16").items() if tensor.dtype == torch.float32}
    wanted = {key for key, tensor in tensors_of(source(name)).items() if tensor.dtype == torch.float32}
    assert kept == {key for key in wanted if not key.endswith("_scale_inv")} > set()


@pytest.mark.parametrize("name", BF16)
def test_bf16_becomes_fp8_of_the_published_form(name: str, source: Source, tmp_path: Path) -> None:
    """Of stacked experts too: a tensor for each, and a scale for each block. What has none is named by the config."""
    reshard.convert(source(name), tmp_path / "fp8", to="hf", cast="fp8")
    whole, found = split_stacks(tensors_of(source(name))), tensors_of(tmp_path / "fp8")
    scales = {key for key in found if key.endswith("_scale_inv")}
    assert found.keys() - scales == whole.keys()
    form = {**HYBRIDS[name].small, "quantization_config": {}}
    if "published" in form:
        form["published"] = {**form["published"], "stacked": False, "stacked_draft": False}
    quantized = {**form, "quantization_config": {"quant_method": "fp8"}}
    assert found.keys() == {key for key, _, _ in HYBRIDS[name].tensors(quantized)}
    for key in scales:
        weight = key.removesuffix("_scale_inv")
        error = (dequantize(found[weight], found[key], 128).float() - whole[weight].float()).abs().max()
        assert error <= whole[weight].float().abs().max() / 16, key
    told = read_config(tmp_path / "fp8")["quantization_config"]["modules_to_not_convert"]
    matrices = {
        key.removesuffix(".weight") for key in whole if whole[key].dim() == 2 and f"{key}_scale_inv" not in scales
    }
    assert matrices <= {*told}
    assert any(module.endswith(("in_proj_ba", "in_proj_b")) for module in told)
    assert reshard.verify(tmp_path / "fp8", source(name)).is_proven
    convert_checkpoint(Job(tmp_path / "fp8", 2), tmp_path / "ranks")


@pytest.mark.parametrize("name", ["qwen3.5-35b-a3b", "qwen3.6-35b-a3b"])
def test_experts_as_published_are_read_one_by_one(name: str, source: Source, tmp_path: Path) -> None:
    """Those of the MTP layer lie apart in Qwen3.5, and are stacked in Qwen3.6."""
    found = reshard.convert(source(name), tmp_path / "whole", to="hf")
    assert "under the hub's names" in str(found)
    require_same(tensors_of(tmp_path / "whole"), split_stacks(tensors_of(source(name))))
    assert reshard.verify(tmp_path / "whole", source(name)).is_proven
    assert reshard.diff(source(name), tmp_path / "whole").is_same
    reshard.convert(tmp_path / "whole", tmp_path / "stacked", for_engine="transformers", keep_mtp=True)
    if name == "qwen3.6-35b-a3b":
        require_same(tensors_of(tmp_path / "stacked"), tensors_of(source(name)))
        assert reshard.verify(source(name), tmp_path / "whole").is_proven


@pytest.mark.parametrize("name", ["qwen3-next-fp8", "qwen3.6-35b-a3b", "minimax-m2.7"])
def test_a_subset_is_a_model_of_its_own(name: str, source: Source, tmp_path: Path) -> None:
    changed = {"num_hidden_layers": 8, "num_experts": 4, "num_local_experts": 4}
    config = HYBRIDS[name].small
    text = config.get("text_config", config)
    changed = {key: value for key, value in changed.items() if key in text}
    changed |= {key: text[key][:8] for key in ("layer_types", "attn_type_list") if key in text}
    reshard.convert(source(name), tmp_path / "some", to="hf", layers=range(8), experts=range(4))
    wanted = {key for key, _, _ in HYBRIDS[name].tensors(change_text(config, changed))}
    whole, found = split_stacks(tensors_of(source(name))), tensors_of(tmp_path / "some")
    assert found.keys() == split_stacks(dict.fromkeys(wanted, torch.zeros(4, 2, 1))).keys()
    routers = ("mlp.gate.weight", "block_sparse_moe.gate.weight", "e_score_correction_bias")
    require_same(found, {key: whole[key][:4] if key.endswith(routers) else whole[key] for key in found})
    told = read_config(tmp_path / "some")
    assert {key: told.get("text_config", told)[key] for key in changed} == changed
    assert reshard.verify(tmp_path / "some", source(name)).is_proven
    convert_checkpoint(Job(tmp_path / "some", 2), tmp_path / "ranks")


def test_the_modules_of_a_draft_keep_their_names_where_layers_get_others(source: Source, tmp_path: Path) -> None:
    """`mtp.layers.0` is no layer 0 of the model."""
    reshard.convert(source("qwen3-next-fp8"), tmp_path / "some", to="hf", layers=range(4, 8), renumber=True)
    told = read_config(tmp_path / "some")["quantization_config"]["modules_to_not_convert"]
    whole = read_config(source("qwen3-next-fp8"))["quantization_config"]["modules_to_not_convert"]
    draft = [module for module in whole if module.startswith("mtp")]
    layers = [module for module in whole if module.startswith(tuple(f"model.layers.{number}." for number in range(4)))]
    assert told == ["lm_head", *layers, *draft]


def test_a_subset_whose_layers_the_config_could_not_tell_is_refused(source: Source, tmp_path: Path) -> None:
    """Every fourth layer has full attention, by a number; where the config has a list, any choice can be told."""
    options: dict[str, Any] = {"to": "hf", "layers": [3, 4], "renumber": True}
    with pytest.raises(Refused, match=r"(?s)full attention layers .*full_attention_interval of config\.json"):
        reshard.convert(source("qwen3-next"), tmp_path / "next", **options)
    reshard.convert(source("qwen3.5-4b"), tmp_path / "some", **options)
    assert read_config(tmp_path / "some")["text_config"]["layer_types"] == ["full_attention", "linear_attention"]
    convert_checkpoint(Job(tmp_path / "some", 2), tmp_path / "ranks")


@pytest.mark.parametrize("name", ["qwen3-next-fp8", "qwen3.5-4b", "minimax-m2.7"])
def test_slices_are_those_of_all_tensors(name: str, source: Source, tmp_path: Path) -> None:
    reshard.convert(source(name), tmp_path / "slices", to="dcp", mp=2)
    report = reshard.verify(tmp_path / "slices", source(name))
    assert report.is_proven
    reshard.convert(tmp_path / "slices", tmp_path / "back", to="hf")
    require_same(tensors_of(tmp_path / "back"), tensors_of(source(name)))


# --- what is refused ---


def change_tensors(folder: Path, out: Path, change: Callable[[dict[str, Tensor]], object], **changes: Any) -> Path:
    """The same checkpoint with other tensors, in one file, and other keys of its text."""
    tensors = tensors_of(folder)
    change(tensors)
    out.mkdir()
    save_file(tensors, out / "model.safetensors", {"format": "pt"})
    (out / "config.json").write_text(json.dumps(change_text(read_config(folder), changes)))
    return out


LOST = {
    "model.layers.10.linear_attn.conv1d.weight": "qwen3-next",
    "model.layers.2.mlp.experts.11.up_proj.weight": "qwen3-next",
    "model.visual.blocks.10.norm2.bias": "qwen3.5-4b",
    "model.visual.merger.norm.bias": "qwen3.5-4b",
    "lm_head.weight": "qwen3.5-27b",
    "model.layers.10.block_sparse_moe.e_score_correction_bias": "minimax-m2.7",
    "model.language_model.layers.10.mlp.experts.down_proj": "qwen3.6-35b-a3b",
}


@pytest.mark.parametrize("lost", LOST)
def test_a_lost_tensor_is_named(lost: str, source: Source, tmp_path: Path) -> None:
    folder = change_tensors(source(LOST[lost]), tmp_path / "source", lambda tensors: tensors.pop(lost))
    with pytest.raises(Refused, match=f"{re.escape(lost)}: missing"):
        reshard.convert(folder, tmp_path / "target", to="hf")


def test_a_weight_without_its_scale_is_named(source: Source, tmp_path: Path) -> None:
    weight = "model.layers.3.self_attn.q_proj.weight"
    change = lambda tensors: tensors.pop(f"{weight}_scale_inv")  # noqa: E731
    folder = change_tensors(source("qwen3-next-fp8"), tmp_path / "source", change)
    with pytest.raises(Refused, match=rf"{re.escape(weight)}: .*scale"):
        reshard.convert(folder, tmp_path / "target", to="hf")


@pytest.mark.parametrize("lost", ["mtp.fc.weight", "mtp.layers.0.mlp.experts.11.up_proj.weight"])
def test_a_part_of_a_draft_is_refused_only_where_it_is_kept(lost: str, source: Source, tmp_path: Path) -> None:
    folder = change_tensors(source("qwen3-next"), tmp_path / "source", lambda tensors: tensors.pop(lost))
    said = str(reshard.plan(folder, mp=2))
    assert "MTP layers (they only draft tokens" in said
    assert "mtp.fc.weight" not in said
    convert_checkpoint(Job(folder, 2), tmp_path / "ranks")
    with pytest.raises(Refused, match=f"{lost}: missing"):
        convert_checkpoint(Job(folder, 2, keep_mtp=True), tmp_path / "kept")


def test_a_model_may_be_without_its_draft_which_is_said(source: Source, tmp_path: Path) -> None:
    def leave_out(tensors: dict[str, Tensor]) -> None:
        for name in [name for name in tensors if name.startswith("mtp.")]:
            del tensors[name]

    folder = change_tensors(source("qwen3.5-4b"), tmp_path / "source", leave_out)
    found = reshard.convert(folder, tmp_path / "ranks", mp=2)
    assert "no MTP layers here, though config.json has text_config.mtp_num_hidden_layers" in str(found)
    assert reshard.verify(tmp_path / "ranks", folder).is_proven
    beside = change_tensors(source("qwen3.5-4b"), tmp_path / "beside", lambda tensors: [
        tensors.pop(name) for name in [*tensors] if name.startswith("mtp.layers.")])  # fmt: skip
    with pytest.raises(Refused, match=r"(?s)mtp\.fc\.weight: .*none, for the rule is 'if \{m\}'"):
        reshard.convert(beside, tmp_path / "other", to="hf")


@pytest.mark.parametrize(
    ("name", "changes", "said"),
    [
        ("qwen3-next", {"full_attention_interval": 3}, "2, 5, 8, 11, as full_attention_interval"),
        ("qwen3.5-4b", {"layer_types": ["full_attention"] * 12}, r"0-11, as text_config\.layer_types"),
        ("minimax-m2.7", {"attn_type_list": [1, 0] + [1] * 9}, "0, 2-10, as attn_type_list"),
        ("qwen3.6-35b-a3b", {"num_experts": 16}, "16"),
    ],
)
def test_another_kind_of_layer_than_the_config_says_is_refused(
    name: str, changes: dict[str, Any], said: str, source: Source, tmp_path: Path
) -> None:
    folder = change_tensors(source(name), tmp_path / "source", lambda _: None, **changes)
    with pytest.raises(Refused) as refused:
        reshard.convert(folder, tmp_path / "target", to="hf")
    assert re.search(said, str(refused.value)), refused.value


def test_a_layer_with_neither_attention_and_one_with_both_are_refused(source: Source, tmp_path: Path) -> None:
    def lose(tensors: dict[str, Tensor]) -> None:
        for name in [name for name in tensors if ".layers.2.linear_attn." in name]:
            del tensors[name]

    def double(tensors: dict[str, Tensor]) -> None:
        for name in [name for name in tensors if ".layers.3.self_attn." in name]:
            tensors[name.replace("layers.3.", "layers.2.")] = tensors[name].clone()

    for change, said in ((lose, "2 are neither"), (double, "2 among the linear attention layers too")):
        folder = change_tensors(source("qwen3-next"), tmp_path / change.__name__, change)
        with pytest.raises(Refused, match=said):
            reshard.convert(folder, tmp_path / "target", to="hf")


def test_a_model_without_eyes_is_taken_if_its_config_says_so(tmp_path: Path) -> None:
    config = dict(HYBRIDS["qwen3.5-4b"].small)
    kept = [tensor for tensor in qwen35(config) if not tensor[0].startswith("model.visual.")]
    write_tensors(tmp_path / "blind", kept, {key: value for key, value in config.items() if key != "vision_config"}, 2)
    assert reshard.convert(tmp_path / "blind", tmp_path / "ranks", mp=2)
    write_tensors(tmp_path / "other", kept, config, 2)
    with pytest.raises(Refused, match=r"(?s)vision blocks: .*set vision_config\.depth"):
        reshard.convert(tmp_path / "other", tmp_path / "target", to="hf")


@pytest.mark.parametrize("name", ["qwen3-next-fp8", "qwen3.5-27b", "qwen3.6-35b-a3b", "minimax-m2.7"])
def test_without_a_config_the_names_tell_the_recipe(name: str, source: Source, tmp_path: Path) -> None:
    shutil.copytree(source(name), tmp_path / "source", ignore=shutil.ignore_patterns("config.json"))
    wanted = reshard.plan(source(name), to="hf").recipe.name
    assert reshard.plan(tmp_path / "source", to="hf").recipe.name == wanted


@pytest.mark.parametrize(
    ("name", "heads"), [("qwen3-next", "linear_num_key_heads"), ("minimax-m2.7", "num_key_value_heads")]
)
def test_ranks_that_would_cut_a_key_head_are_refused(name: str, heads: str, tmp_path: Path) -> None:
    experts = {"qwen3-next": "num_experts", "minimax-m2.7": "num_local_experts"}[name]
    changes: dict[str, Any] = {"num_attention_heads": 8, heads: 4, experts: 16}
    write_small_hybrid(tmp_path / "source", name, **changes)
    with pytest.raises(Refused) as refused:
        reshard.plan(tmp_path / "source", mp=8)
    assert [problem.subject for problem in refused.value.problems] == [f"{heads} (4)"]


def test_stacked_experts_of_which_some_lie_apart_are_refused(source: Source, tmp_path: Path) -> None:
    def mix(tensors: dict[str, Tensor]) -> None:
        whole = {name: tensor for name, tensor in tensors.items() if ".layers.3.mlp.experts." in name}
        for name in whole:
            del tensors[name]
        tensors |= {name: tensor.clone() for name, tensor in split_stacks(whole).items()}

    folder = change_tensors(source("qwen3.6-35b-a3b"), tmp_path / "source", mix)
    with pytest.raises(Refused, match="one of the two ways in all layers"):
        reshard.convert(folder, tmp_path / "target", to="hf")
