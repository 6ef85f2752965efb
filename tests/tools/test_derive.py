"""Recipes that are derived from transformers' plans: they cut as the packaged ones do, or are refused with a reason."""

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from derive_recipe import Kept, derive_recipe, find_style, translate_style, write_recipe
from derive_recipe import main as derive
from jobs import Job, convert_checkpoint
from safetensors.torch import load_file, save_file
from small_models import HEAVY, MODELS, from_config, write_model

from reshard.cli.main import main
from reshard.errors import Refused
from reshard.recipes.recipe import parse_recipe

PACKAGED = [name for name in MODELS if name != "gpt-oss" and not name.startswith("qwen35")]
"""Of Qwen3.5 a recipe is derived for the text alone: the vision tower has no part in the plan."""


def rank_files(source: Path, target: Path, ranks: int, recipe: str | None = None) -> dict[str, bytes]:
    convert_checkpoint(Job(source, ranks, recipe), target)
    return {path.name: path.read_bytes() for path in target.iterdir() if path.name != "reshard.json"}


def derived(source: Path) -> str:
    """Under the name of the packaged one, which the rank files hold."""
    text = derive_recipe(source)
    assert '-derived"' in text
    return text.replace('-derived"', '"', 1)


@pytest.mark.parametrize("name", PACKAGED)
def test_a_derived_recipe_gives_the_files_of_the_packaged_one(name: str, tmp_path: Path) -> None:
    source, recipe = tmp_path / "source", tmp_path / "derived.toml"
    write_model(source, name)
    # Files name their recipe, and Mistral has that of Llama.
    recipe.write_text(derived(source).replace('"mistral"', '"llama"'))
    for ranks in (1, 2, 4):
        found = rank_files(source, tmp_path / f"derived-{ranks}", ranks, str(recipe))
        assert len(found) > ranks
        assert found == rank_files(source, tmp_path / f"packaged-{ranks}", ranks)


def test_a_derived_recipe_can_pad_the_vocabulary(tmp_path: Path) -> None:
    write_model(tmp_path / "source", "qwen2", vocab_size=95)
    (tmp_path / "derived.toml").write_text(derived(tmp_path / "source"))
    convert_checkpoint(Job(tmp_path / "source", 4, str(tmp_path / "derived.toml"), pad=True), tmp_path / "derived")
    convert_checkpoint(Job(tmp_path / "source", 4, pad=True), tmp_path / "packaged")
    for path in (tmp_path / "packaged").glob("*.safetensors"):
        assert path.read_bytes() == (tmp_path / "derived" / path.name).read_bytes()


def test_only_tables_of_the_vocabulary_are_padded_with_it(tmp_path: Path) -> None:
    """Here the inner width of the layers is the same number."""
    write_model(tmp_path, "llama", vocab_size=96, intermediate_size=96)
    recipe = parse_recipe(derive_recipe(tmp_path), "derived")
    assert {rule.left for rule in recipe.rules if rule.shape} == {"model.embed_tokens.weight", "lm_head.weight"}


OTHERS: dict[str, dict[str, Any]] = {
    "GlmMoeDsaConfig": {
        "num_key_value_heads": 8, "q_lora_rank": 16, "kv_lora_rank": 16, "qk_nope_head_dim": 8, "qk_rope_head_dim": 8,
        "v_head_dim": 8, "n_group": 1, "topk_group": 1, "num_experts_per_tok": 2, "first_k_dense_replace": 1,
        "moe_intermediate_size": 20, "n_routed_experts": 4, "index_n_heads": 4, "index_head_dim": 16,
    },
    "GPTNeoXConfig": {},
    "Gemma3TextConfig": {},
    "OlmoeConfig": {"num_experts": 4},
    "Phi3Config": {"num_key_value_heads": 4},
    "Qwen3NextConfig": {
        "num_experts": 4, "num_hidden_layers": 4, "linear_num_key_heads": 2, "linear_num_value_heads": 4,
    },
}  # fmt: skip
"""Models that have no packaged recipe for tensor parallelism."""


@pytest.mark.parametrize("word", OTHERS)
def test_other_models_that_have_a_plan_can_be_cut_and_led_back(word: str, tmp_path: Path) -> None:
    config = getattr(transformers, word)(**{**HEAVY, "hidden_size": 64, "head_dim": 8, **OTHERS[word]})
    model: Any = from_config(config, dtype=torch.float32)
    model.save_pretrained(tmp_path / "source")
    (tmp_path / "derived.toml").write_text(derived(tmp_path / "source"))
    recipe = str(tmp_path / "derived.toml")
    convert_checkpoint(Job(tmp_path / "source", 2, recipe), tmp_path / "ranks")
    convert_checkpoint(Job(tmp_path / "ranks", 1, recipe, to="hf"), tmp_path / "back")
    wanted = (tmp_path / "source" / "model.safetensors").read_bytes()
    assert (tmp_path / "back" / "model.safetensors").read_bytes() == wanted
    whole, part = len(wanted), (tmp_path / "ranks" / "model-rank0-of-2.safetensors").stat().st_size
    assert part < 0.75 * whole  # most of it is cut, not held by both
    with pytest.raises(Refused) as refused:
        convert_checkpoint(Job(tmp_path / "source", 16, recipe), tmp_path / "too-many")
    assert any(problem.subject.startswith("num_attention_heads (") for problem in refused.value.problems)


def test_a_plan_for_experts_alone_cuts_experts_alone(tmp_path: Path) -> None:
    """As it is for gpt-oss, of which the packaged recipe cuts the heads too."""
    write_model(tmp_path / "source", "gpt-oss")
    recipe = parse_recipe(derive_recipe(tmp_path / "source"), "derived")
    splits = {rule.left.removeprefix("model.layers.{i}."): rule.split.text for rule in recipe.rules}
    assert splits["mlp.experts.gate_up_proj"] == splits["mlp.experts.down_proj_bias"] == "rows"
    assert splits["model.embed_tokens.weight"] == splits["lm_head.weight"] == "rows"
    assert splits["self_attn.q_proj.weight"] == splits["self_attn.sinks"] == "replicate"
    assert recipe.ranks_divide == ()


def quantize(folder: Path) -> None:
    """Makes the linear layers FP8, with scales of BF16 as those of Qwen3-FP8 are."""
    for path in folder.glob("*.safetensors"):
        tensors = load_file(path)
        for name in [name for name in tensors if "_proj.weight" in name]:
            tensors[name] = tensors[name].to(torch.float8_e4m3fn)
            shape = [-(-size // 128) for size in tensors[name].shape]
            tensors[f"{name}_scale_inv"] = torch.rand(shape).to(torch.bfloat16)
        save_file(tensors, path, {"format": "pt"})
    (folder / "model.safetensors.index.json").unlink()
    config = json.loads((folder / "config.json").read_text())
    quantization = {"quant_method": "fp8", "weight_block_size": [128, 128], "modules_to_not_convert": ["lm_head"]}
    (folder / "config.json").write_text(json.dumps({**config, "quantization_config": quantization}))


@pytest.mark.parametrize("name", ["qwen3", "qwen3-moe"])
def test_block_scales_go_with_their_weights(name: str, tmp_path: Path) -> None:
    source = tmp_path / "source"
    write_model(source, name, hidden_size=256, head_dim=32, intermediate_size=512)
    quantize(source)
    (tmp_path / "derived.toml").write_text(derived(source))
    found = rank_files(source, tmp_path / "derived", 4, str(tmp_path / "derived.toml"))
    assert found == rank_files(source, tmp_path / "packaged", 4)
    tensors = load_file(tmp_path / "packaged" / "model-rank3-of-4.safetensors")
    assert tensors["model.layers.1.self_attn.k_proj.weight_scale_inv"].shape == (1, 2)
    assert tensors["model.layers.1.mlp.gate_proj.weight_scale_inv"].shape == (1, 2)
    convert_checkpoint(Job(tmp_path / "packaged", 1, to="hf"), tmp_path / "back")
    for path in source.glob("*.safetensors"):
        assert path.read_bytes() == (tmp_path / "back" / path.name).read_bytes()


def test_the_tool_prints_a_recipe_that_check_accepts(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    write_model(tmp_path / "source", "mixtral")
    assert derive([str(tmp_path / "source")]) == 0
    printed = capsys.readouterr().out
    assert printed == derive_recipe(tmp_path / "source")
    assert derive([str(tmp_path / "source"), "-o", str(tmp_path / "mine.toml")]) == 0
    assert (tmp_path / "mine.toml").read_text() == printed
    assert capsys.readouterr().out == ""
    assert main(["recipes", "check", str(tmp_path / "mine.toml"), str(tmp_path / "source")]) == 0
    assert "each under one rule" in capsys.readouterr().out
    # A file that is there is not written over.
    assert derive([str(tmp_path / "source"), "-o", str(tmp_path / "mine.toml")]) == 2
    assert "mine.toml" in capsys.readouterr().err
    assert (tmp_path / "mine.toml").read_text() == printed
    assert parse_recipe(printed, "derived").name == "mixtral-derived"


# --- what cannot be derived ---


def test_rank_files_and_single_files_are_no_checkpoints_to_derive_from(tmp_path: Path) -> None:
    write_model(tmp_path / "source", "llama")
    convert_checkpoint(Job(tmp_path / "source", 2), tmp_path / "ranks")
    (tmp_path / "own.toml").write_text(derive_recipe(tmp_path / "source"))
    convert_checkpoint(Job(tmp_path / "source", 2, str(tmp_path / "own.toml")), tmp_path / "own ranks")
    one_file = next((tmp_path / "source").glob("*.safetensors"))
    for path, kind in (
        (tmp_path / "ranks", "rank-files"),
        (tmp_path / "own ranks", "rank-files"),
        (one_file, "no-source"),
    ):
        with pytest.raises(Refused) as refused:
            derive_recipe(path)
        assert [problem.kind for problem in refused.value.problems] == [kind]


def change_config(folder: Path, **changes: Any) -> None:
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps({**config, **changes}))


@pytest.mark.parametrize(
    "changes",
    [
        {"model_type": "lantern"},
        {"model_type": "bert"},
        {"hidden_size": -3},
        {"num_hidden_layers": "many"},
        {"num_hidden_layers": 10**9},
        {"text_config": {"num_hidden_layers": 10**9}},
    ],
)
def test_a_model_that_transformers_cannot_make_is_refused(changes: dict[str, Any], tmp_path: Path) -> None:
    write_model(tmp_path, "llama")
    change_config(tmp_path, architectures=None, **changes)
    with pytest.raises(Refused) as refused:
        derive_recipe(tmp_path)
    assert [problem.kind for problem in refused.value.problems] in (["unknown-model"], ["no-plan"], ["contradiction"])


def test_a_tensor_without_a_parameter_is_refused_by_name(tmp_path: Path) -> None:
    write_model(tmp_path, "llama", num_hidden_layers=2)
    tensors = {"model.layers.1.mlp.extra.weight": torch.zeros(2), "more": torch.zeros(2)}
    (tmp_path / "model.safetensors.index.json").unlink()
    for path in tmp_path.glob("*.safetensors"):
        tensors |= load_file(path)
        path.unlink()
    save_file(tensors, tmp_path / "model.safetensors", {"format": "pt"})
    with pytest.raises(Refused) as refused:
        derive_recipe(tmp_path)
    assert {(problem.kind, problem.subject) for problem in refused.value.problems} == {
        ("no-parameter", "model.layers.1.mlp.extra.weight"),
        ("no-parameter", "more"),
    }


def test_no_code_of_the_folder_is_run(tmp_path: Path) -> None:
    write_model(tmp_path, "llama")
    change_config(tmp_path, model_type="own", auto_map={"AutoConfig": "own.Own", "AutoModelForCausalLM": "own.Model"})
    (tmp_path / "own.py").write_text("raise SystemExit(7)\n")
    with pytest.raises(Refused, match="unknown model"):
        derive_recipe(tmp_path)


def test_a_checkpoint_without_a_config_is_refused(tmp_path: Path) -> None:
    write_model(tmp_path, "llama")
    (tmp_path / "config.json").unlink()
    with pytest.raises(Refused, match="no config"):
        derive_recipe(tmp_path)


def test_without_transformers_it_says_what_to_install_and_all_else_works(tmp_path: Path) -> None:
    write_model(tmp_path / "source", "llama")
    blocked = "import sys; sys.modules['torch'] = sys.modules['transformers'] = None\n"
    command = blocked + "from reshard.cli.process import entry; entry()"
    tool = (
        blocked
        + f"import runpy; runpy.run_path({sys.modules[derive_recipe.__module__].__file__!r}, run_name='__main__')"
    )

    def run(start: str, *arguments: str) -> subprocess.CompletedProcess[str]:
        return subprocess.run([sys.executable, "-c", start, *arguments], capture_output=True, text=True, check=False)

    derived = run(tool, str(tmp_path / "source"))
    assert derived.returncode == 2
    assert "no torch" in derived.stderr
    assert "pip install 'reshard[transformers]'" in derived.stderr
    assert run(command, "recipes", "check", "llama", str(tmp_path / "source")).returncode == 0


def test_more_kinds_of_layers_than_letters_are_refused() -> None:
    kept = [Kept(f"layers.#.own{number}.weight", [(str(number),)], "rows") for number in range(40)]
    with pytest.raises(Refused, match="41 kinds of layers"):
        write_recipe(kept, "one of a kind", {})
    assert "placeholders.z" not in write_recipe(kept[:20], "one of a kind", {})


# --- verbs ---


@pytest.mark.parametrize(
    ("verb", "shape", "whole", "wanted"),
    [
        ("colwise", (8, 4), (8, 4), "rows"),
        ("colwise", (8,), (8,), "rows"),
        ("colwise_gather_output", (8, 4), (8, 4), "rows"),
        ("colwise_rep", (8, 4), (8, 4), "rows"),
        ("rowwise", (8, 4), (8, 4), "columns"),
        ("rowwise", (8,), (8,), "replicate"),
        ("rowwise_rep", (8, 4), (8, 4), "columns"),
        ("embedding_rowwise", (8, 4), (8, 4), "rows"),
        ("embedding_colwise", (8, 4), (8, 4), "columns"),
        ("", (8, 4), (8, 4), "replicate"),
        ("replicated_with_grad_allreduce", (8,), (8,), "replicate"),
        ("mla_kv_a_proj", (8, 4), (8, 4), "replicate"),
        # A gate and what it lets through: one tensor or two, alone or of all experts.
        ("packed_colwise", (8, 4), (8, 4), "packed rows"),
        ("packed_colwise", (4, 4), (8, 4), "rows"),
        ("packed_colwise", (4, 4), (3, 8, 4), "rows"),
        ("packed_colwise", (8, 4), (3, 8, 4), "packed rows"),
        ("packed_colwise", (3, 8, 4), (3, 8, 4), ""),
        ("packed_rowwise", (8, 4), (8, 4), ""),
        ("rowwise", (4, 8), (3, 4, 8), "columns"),
        ("rowwise", (3, 4, 8), (3, 4, 8), ""),
        ("grouped_gemm", (4, 8), (3, 4, 8), "by"),
        ("grouped_gemm", (3, 4, 8), (3, 4, 8), "rows"),
        ("grouped_gemm", (3, 8), (3, 8), "rows"),
        ("grouped_gemm", (3, 4, 2, 16), (3, 4, 64), "rows"),
        # Query, key and value in one parameter, of which this is one: rows of the whole are not rows of the part.
        ("colwise", (8, 4), (24, 4), ""),
        ("colwise", (4, 4), (8, 4), ""),
        ("a verb of tomorrow", (8, 4), (8, 4), ""),
    ],
)
def test_what_a_verb_makes_of_a_tensor(verb: str, shape: tuple[int, ...], whole: tuple[int, ...], wanted: str) -> None:
    assert translate_style(verb, shape, whole) == wanted


@pytest.mark.parametrize(
    ("parameter", "wanted"),
    [
        ("model.layers.10.mlp.up_proj.weight", "colwise"),
        ("model.layers.10.mlp.up_proj.bias", "colwise"),
        ("model.layers.10.mlp.experts.up_proj", "grouped_gemm"),
        ("model.layers.10.mlp.up_proj.inner.weight", ""),
        ("layers.10.mlp.up_proj.weight", ""),
        ("lm_head.weight", "colwise_rep"),
        ("lm_headXweight", ""),
    ],
)
def test_a_plan_names_a_parameter_or_its_module(parameter: str, wanted: str) -> None:
    plan = {
        "model.layers.*.mlp.up_proj": "colwise",
        "model.layers.*.mlp.experts.up_proj": "grouped_gemm",
        "lm_head": "colwise_rep",
    }
    assert find_style(parameter, plan) == wanted
