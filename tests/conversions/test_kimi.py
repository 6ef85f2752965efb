"""The Kimi families, with their experts in BF16 and packed: every target, and there and back, against an oracle."""

import json
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import oracle
import pytest
import torch
from packed_models import (
    PACKED_FAMILIES,
    PackedModel,
    drop_quantization,
    make_packed_model,
    write_full_packed,
    write_packed_model,
    write_plain_model,
)
from safetensors.torch import load_file
from torch import Tensor
from transformers import DeepseekV3Config, Kimi_K25Config, Kimi_K25ForConditionalGeneration
from transformers.models.kimi_k25.configuration_kimi_k25 import Kimi_K25VisionConfig
from transformers.models.kimi_linear import KimiLinearConfig, KimiLinearForCausalLM

import reshard
from reshard.errors import Refused
from reshard.target.run_config import explain_no_run_config

PREFIX = "language_model."
from_pretrained: Any = Kimi_K25ForConditionalGeneration.from_pretrained
Write = Callable[[str], Path]


@pytest.fixture(scope="module")
def models() -> dict[str, PackedModel]:
    return {name: make_packed_model(name) for name in PACKED_FAMILIES}


@pytest.fixture(scope="module")
def source(models: dict[str, PackedModel], tmp_path_factory: pytest.TempPathFactory) -> Write:
    """The small checkpoint of a family in BF16, written once."""
    root = tmp_path_factory.mktemp("plain")
    for name, model in models.items():
        write_plain_model(root / name, model)
    return lambda name: root / name


def read_tensors(folder: Path) -> dict[str, Tensor]:
    return {name: tensor for path in folder.glob("*.safetensors") for name, tensor in load_file(path).items()}


def require_same(found: dict[str, Tensor], wanted: dict[str, Tensor]) -> None:
    assert found.keys() == wanted.keys()
    for name, tensor in wanted.items():
        assert found[name].dtype == tensor.dtype, name
        assert torch.equal(found[name], tensor), name


# --- whole files and slices have everything, the vision tower too ---


@pytest.mark.parametrize("name", PACKED_FAMILIES)
@pytest.mark.parametrize(("files", "index"), [(1, True), (3, False)])
def test_whole_files_have_every_tensor(
    name: str, files: int, *, index: bool, models: dict[str, PackedModel], tmp_path: Path
) -> None:
    write_plain_model(tmp_path / "source", models[name], files=files, index=index)
    reshard.convert(tmp_path / "source", tmp_path / "target", to="hf")
    require_same(read_tensors(tmp_path / "target"), dict(models[name].plain))
    assert reshard.verify(tmp_path / "target", source=tmp_path / "source").is_proven
    config = json.loads((tmp_path / "target" / "config.json").read_text())
    assert config == drop_quantization(models[name].config)


@pytest.mark.parametrize("name", PACKED_FAMILIES)
def test_slices_lead_back_to_every_tensor(
    name: str, source: Write, models: dict[str, PackedModel], tmp_path: Path
) -> None:
    reshard.convert(source(name), tmp_path / "slices", to="dcp", ranks=3)
    reshard.convert(tmp_path / "slices", tmp_path / "target", to="hf")
    require_same(read_tensors(tmp_path / "target"), dict(models[name].plain))


@pytest.mark.parametrize("name", ["kimi-k2.5", "kimi-k3"])
def test_a_text_model_alone_is_accepted(name: str, tmp_path: Path) -> None:
    model = make_packed_model(name, vision=False)
    write_plain_model(tmp_path / "source", model)
    reshard.convert(tmp_path / "source", tmp_path / "target", to="hf")
    require_same(read_tensors(tmp_path / "target"), dict(model.plain))


def test_what_k3_has_in_f32_stays_so(models: dict[str, PackedModel], tmp_path: Path) -> None:
    """With all else in F32 too, which a cast makes BF16."""
    model = models["kimi-k3"]
    wide = PackedModel(model.config, {}, {name: tensor.float() for name, tensor in model.plain.items()})
    write_plain_model(tmp_path / "source", wide)
    reshard.convert(tmp_path / "source", tmp_path / "target", to="hf", cast="bf16")
    require_same(read_tensors(tmp_path / "target"), dict(model.plain))


# --- rank files of the text models, for DeepSeek's inference code ---


def make_shares(model: PackedModel, ranks: int) -> Iterator[dict[str, Tensor]]:
    """What each rank has, by the independent converter of DeepSeek-V3: of K2.5 the text model without its prefix."""
    names = [name for name in model.plain if not name.startswith(("vision_tower.", "mm_projector."))]
    tensors = {name.removeprefix(PREFIX): model.plain[name] for name in names}
    return (dict(oracle.rank_tensors(tensors, ranks, rank, 128)) for rank in range(ranks))


@pytest.mark.parametrize("name", ["kimi-k2-thinking", "kimi-k2.5"])
@pytest.mark.parametrize("ranks", [1, 2, 4])
def test_rank_files_are_those_of_the_oracle_and_lead_back(
    name: str, ranks: int, source: Write, models: dict[str, PackedModel], tmp_path: Path
) -> None:
    reshard.convert(source(name), tmp_path / "ranks", mp=ranks)
    for rank, share in enumerate(make_shares(models[name], ranks)):
        require_same(load_file(tmp_path / "ranks" / f"model{rank}-mp{ranks}.safetensors"), share)
    assert reshard.verify(tmp_path / "ranks", source=source(name)).is_proven
    reshard.convert(tmp_path / "ranks", tmp_path / "back", to="hf")
    text = {key: tensor for key, tensor in models[name].plain.items() if not key.startswith(("vision", "mm_"))}
    require_same(read_tensors(tmp_path / "back"), text)


@pytest.mark.parametrize("name", ["kimi-k2-thinking", "kimi-k2.5"])
def test_deepseeks_code_gets_no_configuration_that_it_cannot_keep(name: str, source: Write, tmp_path: Path) -> None:
    said = "".join(explain_no_run_config(reshard.plan(source(name), mp=2)))
    assert "rms_norm_eps is 1e-05; the inference code has 1e-06" in said
    reshard.convert(source(name), tmp_path / "ranks", mp=2)
    assert not (tmp_path / "ranks" / "run_config.json").exists()


def test_a_model_with_the_right_epsilon_gets_one(models: dict[str, PackedModel], tmp_path: Path) -> None:
    """The same as DeepSeek-V3's recipe makes of the text config."""
    text = {**models["kimi-k2.5"].config["text_config"], "rms_norm_eps": 1e-06}
    found = {}
    for name, config in (("kimi-k2.5", {"model_type": "kimi_k25", "text_config": text}), ("kimi-k2-thinking", text)):
        write_plain_model(tmp_path / name, PackedModel(config, {}, models[name].plain))
        reshard.convert(tmp_path / name, tmp_path / f"{name}-ranks", mp=2)
        found[name] = json.loads((tmp_path / f"{name}-ranks" / "run_config.json").read_text())
    assert found["kimi-k2.5"] == found["kimi-k2-thinking"]
    assert found["kimi-k2.5"]["rope_factor"] == 64
    assert found["kimi-k2.5"]["n_heads"] == 4


def test_k3_has_no_rank_files(source: Write, tmp_path: Path) -> None:
    for ranks in (1, 2):
        with pytest.raises(Refused, match="no engine is known that reads rank files of Kimi-K3"):
            reshard.convert(source("kimi-k3"), tmp_path / "target", mp=ranks)
    assert not (tmp_path / "target").exists()


# --- experts as they are published: packed ---


@pytest.mark.parametrize("name", PACKED_FAMILIES)
@pytest.mark.parametrize(("files", "index"), [(1, True), (3, True), (2, False)])
def test_packed_experts_become_the_weights_of_plain_arithmetic(
    name: str, files: int, *, index: bool, models: dict[str, PackedModel], tmp_path: Path
) -> None:
    """With scales in other files than the codes. All else is the same, and the config says nothing of quantization."""
    write_packed_model(tmp_path / "source", models[name], files=files, index=index)
    reshard.convert(tmp_path / "source", tmp_path / "target", to="hf", cast="bf16")
    require_same(read_tensors(tmp_path / "target"), dict(models[name].plain))
    assert reshard.verify(tmp_path / "target", source=tmp_path / "source").is_proven
    config = json.loads((tmp_path / "target" / "config.json").read_text())
    assert config == drop_quantization(models[name].config)


@pytest.mark.parametrize("name", ["kimi-k2-thinking", "kimi-k2.5"])
def test_packed_experts_become_rank_files(name: str, models: dict[str, PackedModel], tmp_path: Path) -> None:
    write_packed_model(tmp_path / "source", models[name])
    reshard.convert(tmp_path / "source", tmp_path / "ranks", mp=4, cast="bf16")
    for rank, share in enumerate(make_shares(models[name], 4)):
        require_same(load_file(tmp_path / "ranks" / f"model{rank}-mp4.safetensors"), share)
    assert reshard.verify(tmp_path / "ranks", source=tmp_path / "source").is_proven


def test_layers_without_packed_weights_are_copied_and_proven(models: dict[str, PackedModel], tmp_path: Path) -> None:
    write_packed_model(tmp_path / "source", models["kimi-k2.5"])
    reshard.convert(tmp_path / "source", tmp_path / "target", to="hf", cast="bf16", layers=[0, 1], renumber=True)
    assert read_tensors(tmp_path / "target")
    assert reshard.verify(tmp_path / "target", source=tmp_path / "source").is_proven


@pytest.mark.parametrize("name", PACKED_FAMILIES)
def test_packed_experts_become_slices(name: str, models: dict[str, PackedModel], tmp_path: Path) -> None:
    write_packed_model(tmp_path / "source", models[name])
    reshard.convert(tmp_path / "source", tmp_path / "slices", to="dcp", ranks=2, cast="bf16")
    reshard.convert(tmp_path / "slices", tmp_path / "target", to="hf")
    require_same(read_tensors(tmp_path / "target"), dict(models[name].plain))


@pytest.mark.parametrize("name", ["kimi-k2.5", "kimi-k3"])
@pytest.mark.parametrize("part", ["weight_scale", "weight_packed"])
def test_a_missing_part_of_a_packed_weight_is_named(
    name: str, part: str, models: dict[str, PackedModel], tmp_path: Path
) -> None:
    model = models[name]
    (first, *_) = [key for key in model.stored if ".experts.10." in key and key.endswith(part)]
    stored = {key: tensor for key, tensor in model.stored.items() if key != first}
    write_packed_model(tmp_path / "source", PackedModel(model.config, stored, model.plain))
    with pytest.raises(Refused) as refused:
        reshard.plan(tmp_path / "source", to="hf", cast="bf16")
    assert first.rpartition(".")[0] in str(refused.value)


# --- full-size checkpoints ---


@pytest.mark.parametrize(
    ("name", "recipe", "counts"),
    [
        ("kimi-k2-thinking", "deepseek-v3", (61, 1, 60, 384)),
        ("kimi-k2.5", "kimi-k25", (61, 1, 60, 384)),
        ("kimi-k3", "kimi-k3", (93, 69, 24, 1, 92, 896, 27)),
    ],
)
def test_a_full_checkpoint_fits_its_recipe(name: str, recipe: str, counts: tuple[int, ...], tmp_path: Path) -> None:
    write_full_packed(tmp_path, name, plain=True)
    content = reshard.inspect(tmp_path)
    assert content.recipe == recipe
    assert tuple(content.counts.values()) == counts


# --- transformers' own modules ---


def test_transformers_loads_whole_files_of_k25(models: dict[str, PackedModel], tmp_path: Path) -> None:
    """No tensor is missing or left over in its model, vision tower and projector included."""
    text, vision = (dict(PACKED_FAMILIES["kimi-k2.5"].small[key]) for key in ("text_config", "vision_config"))
    del text["architectures"], text["quantization_config"]
    config = Kimi_K25Config(
        text_config=DeepseekV3Config(**{**text, "model_type": "deepseek_v3", "pad_token_id": 0}),
        vision_config=Kimi_K25VisionConfig(
            patch_size=vision["patch_size"],
            pos_emb_height=vision["init_pos_emb_height"],
            pos_emb_width=vision["init_pos_emb_width"],
            num_attention_heads=vision["vt_num_attention_heads"],
            num_hidden_layers=vision["vt_num_hidden_layers"],
            hidden_size=vision["vt_hidden_size"],
            intermediate_size=vision["vt_intermediate_size"],
        ),
        projection_hidden_size=vision["mm_hidden_size"],
        tie_word_embeddings=False,
    )
    plain = models["kimi-k2.5"].plain
    write_plain_model(tmp_path / "source", PackedModel(config.to_dict(), {}, plain))
    reshard.convert(tmp_path / "source", tmp_path / "target", to="hf")
    model, info = from_pretrained(tmp_path / "target", dtype=torch.bfloat16, output_loading_info=True)
    assert {key: found for key, found in info.items() if found} == {}
    loaded = model.state_dict()
    expert = "language_model.model.layers.10.mlp.experts.11"
    stack = loaded["model.language_model.layers.10.mlp.experts.gate_up_proj"]
    assert torch.equal(stack[11], torch.cat([plain[f"{expert}.gate_proj.weight"], plain[f"{expert}.up_proj.weight"]]))
    for found, name in (
        ("lm_head.weight", "language_model.lm_head.weight"),
        ("model.vision_tower.layers.10.mlp.fc1.weight", "vision_tower.encoder.blocks.10.mlp.fc0.weight"),
        ("model.mm_projector.out_proj.bias", "mm_projector.proj.2.bias"),
    ):
        assert torch.equal(loaded[found], plain[name])


def test_k3_has_the_names_and_shapes_of_kimi_linear_in_transformers() -> None:
    """transformers 5.24 has the model that K3 was made from: what K3 shares with it has the same names there."""
    keys = PACKED_FAMILIES["kimi-k3"].small["text_config"]
    left_out = ("architectures", "quantization_config", "hidden_act", "routed_expert_hidden_size")
    config = KimiLinearConfig(**{key: value for key, value in keys.items() if key not in left_out}, pad_token_id=0)
    with torch.device("meta"):
        model = KimiLinearForCausalLM(config)
    small = PACKED_FAMILIES["kimi-k3"].entries(PACKED_FAMILIES["kimi-k3"].small)
    ours = {name.removeprefix(PREFIX): shape for name, _, shape in small if name.startswith(PREFIX)}
    theirs = {}
    for name, parameter in model.state_dict().items():
        theirs[name.replace(".forget_gate.", ".")] = tuple(parameter.shape)
    attention = {name for name in ours if ".self_attn." in name and "conv1d" not in name and "A_log" not in name}
    gates = {name for name in attention if ".g_proj." in name}
    for name in attention - gates:
        assert theirs[name] == ours[name], name
    assert {name for name in theirs if name.endswith(".q_a_proj.weight")} == {
        name for name in ours if name.endswith(".q_a_proj.weight")
    }
    for name in (
        "model.embed_tokens.weight",
        "model.norm.weight",
        "lm_head.weight",
        "model.layers.0.mlp.up_proj.weight",
    ):
        assert theirs[name] == ours[name], name
    for name, moe in ((name, name.replace(".block_sparse_moe.", ".mlp.")) for name in ours):
        if ".shared_experts." in name or ".block_sparse_moe.gate." in name:
            assert theirs[moe] == ours[name], name


# --- subsets: the lists of layers in the config count from 1 ---


@pytest.mark.parametrize(
    ("layers", "kda", "full"), [((0, 1, 2, 3), [1, 2, 3], [4]), ((0, 2, 7, 10, 11), [1, 2], [3, 4, 5])]
)
def test_layers_of_k3_keep_their_kind(
    layers: tuple[int, ...], kda: list[int], full: list[int], source: Write, tmp_path: Path
) -> None:
    reshard.convert(source("kimi-k3"), tmp_path / "target", to="hf", layers=layers, renumber=layers[-1] >= len(layers))
    config = json.loads((tmp_path / "target" / "config.json").read_text())["text_config"]
    assert config["linear_attn_config"]["kda_layers"] == kda
    assert config["linear_attn_config"]["full_attn_layers"] == full
    assert reshard.inspect(tmp_path / "target").counts["full attention layers"] == len(full)


def test_k3_needs_as_many_experts_as_a_token_is_routed_to(source: Write, tmp_path: Path) -> None:
    with pytest.raises(Refused, match=r"at least 4, as text_config\.num_experts_per_token of config\.json says"):
        reshard.plan(source("kimi-k3"), to="hf", experts=range(3))
    reshard.convert(source("kimi-k3"), tmp_path / "target", to="hf", experts=range(4))
    assert reshard.inspect(tmp_path / "target").counts["experts"] == 4


# --- refusals ---


def refuse(folder: Path, model: PackedModel, **changes: Any) -> list[str]:
    """The problems of a checkpoint: without tensors with a word of `without` in their names, or with another config."""
    without, text = changes.pop("without", ()), changes
    plain = {name: tensor for name, tensor in model.plain.items() if not any(word in name for word in without)}
    config = {**model.config, "text_config": {**model.config["text_config"], **text}}
    write_plain_model(folder, PackedModel(config, {}, plain))
    with pytest.raises(Refused) as refused:
        reshard.plan(folder, to="hf")
    return [f"{problem.subject}: {problem.found}; {problem.expected}" for problem in refused.value.problems]


@pytest.mark.parametrize("name", ["kimi-k2.5", "kimi-k3"])
@pytest.mark.parametrize("word", ["experts.10.", "layers.10.input_layernorm.", "layers.10.", "norm.weight", "lm_head."])
def test_what_is_missing_is_named(name: str, word: str, models: dict[str, PackedModel], tmp_path: Path) -> None:
    without = (f"model.{word}",) if word == "norm.weight" else (word,)
    problems = refuse(tmp_path / "source", models[name], without=without)
    expected = {"experts.10.": "experts: ", "layers.10.": "layers: "}.get(word, word)
    assert any(expected in problem for problem in problems), problems


def test_a_missing_expert_weight_of_k3_is_named(models: dict[str, PackedModel], tmp_path: Path) -> None:
    gone = "language_model.model.layers.11.block_sparse_moe.experts.10.w2.weight"
    (problem,) = refuse(tmp_path / "source", models["kimi-k3"], without=(gone,))
    assert gone in problem


def test_a_layer_of_the_other_kind_is_named(models: dict[str, PackedModel], tmp_path: Path) -> None:
    """As if the lists counted from 0."""
    linear = dict(models["kimi-k3"].config["text_config"]["linear_attn_config"])
    linear |= {"full_attn_layers": [3, 7, 10, 11], "kda_layers": [1, 2, 4, 5, 6, 8, 9, 12]}
    problems = refuse(tmp_path / "source", models["kimi-k3"], linear_attn_config=linear)
    (found,) = [problem for problem in problems if problem.startswith("full attention layers")]
    assert "3, 7, 10-11 by the names" in found
    assert "2, 6, 9-10, as text_config.linear_attn_config.full_attn_layers" in found
    assert "which counts from 1" in found


def test_a_missing_vision_block_of_k3_is_named(models: dict[str, PackedModel], tmp_path: Path) -> None:
    problems = refuse(tmp_path / "source", models["kimi-k3"], without=("blocks.10.",))
    assert any("vision blocks" in problem for problem in problems), problems
