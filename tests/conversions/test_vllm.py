"""Rank files for vLLM's `sharded_state`: what vLLM's own models want, as an independent converter makes them."""

import json
import re
from pathlib import Path
from typing import Any

import pytest
import torch
from headers_by_recipe import make_headers
from jobs import Job, convert_checkpoint
from safetensors.torch import load_file, save_file
from small_models import write_model
from torch import Tensor
from vllm_models import CASES, DEEPSEEK, MXFP4, SCALE, SCALE_DTYPES, write_case
from vllm_oracle import LIST, make_rank_tensors, write_rank_files

from reshard import api, load
from reshard.errors import Refused
from reshard.formats.manifest import Origin
from reshard.planning.planner import make_plan
from reshard.planning.rank_choices import list_rank_choices
from reshard.recipes.recipe import load_recipe
from reshard.sources.match import match
from reshard.sources.source import Source
from reshard.types import Layout

WANTED: dict[str, Any] = json.loads(LIST.read_text())
OF_FP8 = re.compile(rf"{SCALE}$|\.attn\.[a-z]+_scale$")
RANKS: tuple[int, ...] = tuple(WANTED["ranks"])


@pytest.fixture(scope="module", params=CASES)
def model(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> tuple[str, Path]:
    folder = tmp_path_factory.mktemp("vllm") / request.param
    write_case(folder, request.param)
    return request.param, folder


def tensors_of(folder: Path) -> dict[str, Tensor]:
    return {name: tensor for path in sorted(folder.glob("*.safetensors")) for name, tensor in load_file(path).items()}


def describe(tensors: dict[str, Tensor]) -> dict[str, str]:
    """Dtype and shape of each, as the list has them."""
    names = {
        "torch.bfloat16": "BF16",
        "torch.float32": "F32",
        "torch.float8_e4m3fn": "F8_E4M3",
        "torch.uint8": "U8",
    }
    return {name: f"{names[str(tensor.dtype)]} {list(tensor.shape)}" for name, tensor in tensors.items()}


def list_wanted(case: str, ranks: int) -> dict[str, str]:
    """What vLLM wants, but for scales that are BF16 in the checkpoint: vLLM widens them as it loads them."""
    wanted = {name: shapes[RANKS.index(ranks)] for name, shapes in WANTED["models"][case].items()}
    if SCALE_DTYPES.get(case) is torch.bfloat16:
        return {name: shape.replace("F32", "BF16") if SCALE in name else shape for name, shape in wanted.items()}
    return wanted


def require_wanted(found: dict[str, str], case: str, ranks: int) -> None:
    """What vLLM wants; of experts in MXFP4 as much or less of one dimension: it keeps the zeros behind them."""
    wanted = list_wanted(case, ranks)
    assert found.keys() == wanted.keys()
    for name, text in found.items():
        if case == MXFP4 and ".routed_experts." in name:
            assert fits(text, wanted[name]), name
        else:
            assert text == wanted[name], name


def fits(found: str, wanted: str) -> bool:
    """Whether a tensor of one dtype and shape fits into the beginning of another."""
    (dtype, shape), (other, room) = (read_shape(text) for text in (found, wanted))
    return dtype == other and len(shape) == len(room) and all(a <= b for a, b in zip(shape, room, strict=True))


def read_shape(text: str) -> tuple[str, list[int]]:
    dtype, _, shape = text.partition(" ")
    return dtype, json.loads(shape)


def name_recipe(source: Path) -> str:
    model: str = json.loads((source / "config.json").read_text())["model_type"]
    return f"vllm-{model.replace('_', '-').replace('mistral', 'llama')}"


def data_of(path: Path) -> bytes:
    """What a file holds behind its header."""
    content = path.read_bytes()
    return content[8 + int.from_bytes(content[:8], "little") :]


def test_the_list_is_of_every_case_and_names_its_version() -> None:
    assert set(WANTED["models"]) == set(CASES)
    assert WANTED["vllm"] == "0.32.0"
    assert len({WANTED["models"][case]["model.norm.weight"][0] for case in CASES}) == 3


@pytest.mark.parametrize("ranks", RANKS)
def test_the_oracle_makes_what_vllm_wants(model: tuple[str, Path], ranks: int) -> None:
    case, source = model
    for rank in range(ranks):
        require_wanted(describe(make_rank_tensors(source, rank, ranks)), case, ranks)


@pytest.mark.parametrize("ranks", RANKS)
def test_rank_files_are_those_of_the_oracle_and_lead_back(model: tuple[str, Path], ranks: int, tmp_path: Path) -> None:
    case, source = model
    convert_checkpoint(Job(source, ranks, recipe=name_recipe(source)), tmp_path / "target")
    write_rank_files(source, tmp_path / "wanted", ranks)
    names = [f"model-rank-{rank}-part-0.safetensors" for rank in range(ranks)]
    assert sorted(path.name for path in (tmp_path / "target").glob("*.safetensors")) == names
    for name in names:
        found, wanted = tmp_path / "target" / name, tmp_path / "wanted" / name
        require_wanted(describe(load_file(found)), case, ranks)
        assert data_of(found) == data_of(wanted)
    report = api.verify(tmp_path / "target", source)
    assert report.problems == ()
    convert_checkpoint(Job(tmp_path / "target", 1, to="hf"), tmp_path / "back")
    layers = DEEPSEEK.get(case, {}).get("num_hidden_layers")  # the layer behind the last is the MTP layer
    whole = {name: tensor for name, tensor in tensors_of(source).items() if f"layers.{layers}." not in name}
    back = tensors_of(tmp_path / "back")
    assert set(back) == set(whole)
    assert all(back[name].dtype == whole[name].dtype for name in whole)
    assert all(back[name].view(torch.uint8).equal(whole[name].view(torch.uint8)) for name in whole)


@pytest.mark.parametrize("case", ["qwen3-moe-fp8", "deepseek-v3-fp8"])
def test_casts_to_bf16_and_back_to_fp8_are_what_vllm_wants(case: str, tmp_path: Path) -> None:
    """With FP8 go constants, and a config that names the router: without it vLLM's Qwen3-MoE has that in FP8."""
    write_case(tmp_path / "source", case)
    recipe = name_recipe(tmp_path / "source")
    convert_checkpoint(Job(tmp_path / "source", 2, recipe=recipe, cast="bf16"), tmp_path / "plain")
    assert api.verify(tmp_path / "plain", tmp_path / "source").problems == ()
    plain = load_file(tmp_path / "plain" / "model-rank-1-part-0.safetensors")
    wanted = {name: shape for name, shape in list_wanted(case, 2).items() if not OF_FP8.search(name)}
    assert describe(plain) == {name: shape.replace("F8_E4M3", "BF16") for name, shape in wanted.items()}
    assert "quantization_config" not in json.loads((tmp_path / "plain" / "config.json").read_text())

    convert_checkpoint(Job(tmp_path / "plain", 1, to="hf"), tmp_path / "whole")
    convert_checkpoint(Job(tmp_path / "whole", 4, recipe=recipe, cast="fp8"), tmp_path / "again")
    assert api.verify(tmp_path / "again", tmp_path / "whole").problems == ()
    for rank in range(4):
        found = describe(load_file(tmp_path / "again" / f"model-rank-{rank}-part-0.safetensors"))
        assert found == list_wanted(case, 4)
    exempt = json.loads((tmp_path / "again" / "config.json").read_text())["quantization_config"][
        "modules_to_not_convert"
    ]
    routers = [name.removesuffix(".weight") for name in tensors_of(tmp_path / "whole") if name.endswith("gate.weight")]
    assert set(exempt) == {"lm_head", "model.embed_tokens", *routers}
    convert_checkpoint(Job(tmp_path / "again", 2, recipe=recipe), tmp_path / "others")
    assert describe(load_file(tmp_path / "others" / "model-rank-0-part-0.safetensors")) == list_wanted(case, 2)


def test_constants_of_fp8_are_there_exactly_with_block_scales(tmp_path: Path) -> None:
    """`k_scale` and its like: one that lacks would stop vLLM, and so would one too many."""
    for case, is_added, kind in (("qwen3-fp8", False, "missing-tensor"), ("qwen3", True, "contradiction")):
        source, ranks = tmp_path / case, tmp_path / f"{case}-ranks"
        write_case(source, case)
        convert_checkpoint(Job(source, 1, recipe="vllm-qwen3"), ranks)
        path = ranks / "model-rank-0-part-0.safetensors"
        tensors = load_file(path)
        scale = "model.layers.1.self_attn.attn.k_scale"
        changed = {key: tensor for key, tensor in tensors.items() if key != scale}
        if is_added:
            changed[scale] = torch.tensor(-1.0, dtype=torch.bfloat16)
        (ranks / "reshard.json").unlink()
        save_file(changed, path, {"format": "pt", "rank": "0", "ranks": "1", "recipe": "vllm-qwen3"})
        (problem,) = api.verify(ranks, source).problems
        assert problem.kind == ("extra-tensor" if is_added else "missing-tensor")
        assert scale in problem.subject
        with pytest.raises(Refused) as caught:
            convert_checkpoint(Job(ranks, 1, to="hf"), tmp_path / "back")
        first, last = caught.value.problems
        assert (first.kind, scale in first.subject, last.kind) == (kind, True, "rank-files")


def test_parts_that_are_not_whole_blocks_are_refused(tmp_path: Path) -> None:
    """vLLM would refine or widen such blocks, as its kernels have it: another layout on each machine."""
    write_case(tmp_path / "source", "qwen3-moe-fp8")
    with pytest.raises(Refused) as caught:
        convert_checkpoint(Job(tmp_path / "source", 8, recipe="vllm-qwen3-moe"), tmp_path / "target")
    problems = [problem for problem in caught.value.problems if problem.kind == "straddles-blocks"]
    assert any("mlp.experts.*.gate_proj.weight" in problem.subject for problem in problems)
    assert all(problem.remedy == "--mp with one of 1, 2, 4" for problem in problems)


def test_gpt_oss_in_floating_point_is_refused_for_vllm(tmp_path: Path) -> None:
    """vLLM turns these experts, which rows and columns cannot say."""
    write_model(tmp_path / "source", "gpt-oss", hidden_size=64, intermediate_size=96, dtype="bfloat16")
    with pytest.raises(Refused) as caught:
        api.plan(tmp_path / "source", mp=2, for_engine="vllm")
    (problem,) = caught.value.problems
    assert (problem.kind, problem.found) == ("wrong-dtype", "experts in BF16")
    assert problem.subject == "model.layers.0.mlp.experts.gate_up_proj and 5 more"
    assert problem.expected.startswith("MXFP4, as blocks and scales")
    assert problem.remedy == "give vllm the checkpoint itself, which its own loader reads"


@pytest.mark.parametrize("option", [{"for_engine": "vllm"}, {"recipe": "vllm-gpt-oss"}, {}])
def test_a_config_of_mxfp4_beside_gpt_oss_in_floating_point_is_mended_first(
    option: dict[str, Any], tmp_path: Path
) -> None:
    """No loader takes these, vLLM's neither."""
    write_model(tmp_path / "source", "gpt-oss", hidden_size=64, intermediate_size=96, dtype="bfloat16")
    exempt = ["model.layers.*.self_attn", "model.layers.*.mlp.router", "model.embed_tokens", "lm_head"]
    change_config(tmp_path / "source", quantization_config={"modules_to_not_convert": exempt, "quant_method": "mxfp4"})
    with pytest.raises(Refused) as caught:
        api.plan(tmp_path / "source", mp=2, **option)
    (problem,) = caught.value.problems
    assert (problem.kind, problem.subject) == ("contradiction", "quantization_config of config.json")


@pytest.mark.parametrize("value", ["lacking", None])
@pytest.mark.parametrize("option", [{"for_engine": "vllm"}, {}])
def test_packed_experts_beside_a_config_of_plain_ones_are_refused(
    option: dict[str, Any], value: str | None, tmp_path: Path
) -> None:
    """vLLM and transformers would build a model of plain experts."""
    write_case(tmp_path / "source", MXFP4)
    change_config(tmp_path / "source", quantization_config=value)
    with pytest.raises(Refused) as caught:
        api.plan(tmp_path / "source", mp=2, **option)
    (problem,) = caught.value.problems
    assert (problem.kind, problem.subject, problem.found) == ("contradiction", "config.json", "no quantization_config")
    (tmp_path / "source" / "config.json").rename(tmp_path / "config.json")  # without any the tensors tell
    assert len(api.plan(tmp_path / "source", to="hf", recipe="gpt-oss", max_file_size=10**9).files) == 1


def change_config(folder: Path, **changes: Any) -> None:
    """Changes keys of a config, or removes those that are `lacking`."""
    path = folder / "config.json"
    config = {**json.loads(path.read_text()), **changes}
    path.write_text(json.dumps({key: value for key, value in config.items() if value != "lacking"}))


FIRST_EXPERTS = "model.layers.0.mlp.experts.routed_experts"


@pytest.mark.parametrize("kernels", WANTED["kernels"])
@pytest.mark.parametrize("ranks", RANKS)
def test_packed_experts_fit_the_parameters_of_all_kernels_as_in_vllm(kernels: str, ranks: int, tmp_path: Path) -> None:
    """B12X wants equal parts, whatever the blocks: at 2 and 4 ranks vLLM cannot load the checkpoint itself."""
    write_case(tmp_path / "source", MXFP4)
    wanted = {name: texts[RANKS.index(ranks)] for name, texts in WANTED["kernels"][kernels].items()}
    found = [describe(make_rank_tensors(tmp_path / "source", rank, ranks)) for rank in range(ranks)]
    assert len(wanted) == 6
    assert wanted.keys() <= found[0].keys()
    are_all = all(fits(tensors[name], wanted[name]) for tensors in found for name in wanted)
    assert are_all == (kernels != "B12X_MXFP4_BF16" or ranks == 1)
    hidden, room = (read_shape(texts[f"{FIRST_EXPERTS}.w13_weight"])[1][-1] for texts in (found[0], wanted))
    assert (hidden < room) == (kernels in ("MARLIN", "FLASHINFER_TRTLLM_MXFP4_BF16"))


@pytest.mark.parametrize(("first", "second"), [(1, 4), (2, 4), (4, 2)])
def test_packed_experts_go_from_one_number_of_ranks_to_another(first: int, second: int, tmp_path: Path) -> None:
    write_case(tmp_path / "source", MXFP4)
    convert_checkpoint(Job(tmp_path / "source", first, recipe="vllm-gpt-oss"), tmp_path / "target")
    convert_checkpoint(Job(tmp_path / "target", second), tmp_path / "others")
    write_rank_files(tmp_path / "source", tmp_path / "wanted", second)
    for rank in range(second):
        name = f"model-rank-{rank}-part-0.safetensors"
        assert data_of(tmp_path / "others" / name) == data_of(tmp_path / "wanted" / name)
    assert api.verify(tmp_path / "others", tmp_path / "source").problems == ()
    loaded = load(tmp_path / "target", mp=second, rank=second - 1, recipe="vllm-gpt-oss")
    assert all(
        loaded[name].equal(tensor) for name, tensor in load_file(tmp_path / "wanted" / name_last(second)).items()
    )


def name_last(ranks: int) -> str:
    return f"model-rank-{ranks - 1}-part-0.safetensors"


def test_a_bias_that_a_second_rank_would_add_again_is_seen(tmp_path: Path) -> None:
    write_case(tmp_path / "source", MXFP4)
    convert_checkpoint(Job(tmp_path / "source", 2, recipe="vllm-gpt-oss"), tmp_path / "target")
    first, last = (load_file(tmp_path / "target" / f"model-rank-{rank}-part-0.safetensors") for rank in range(2))
    name = "model.layers.1.mlp.experts.routed_experts.w2_bias"
    assert first[name].any()
    assert not last[name].any()
    save_file({**last, name: first[name]}, tmp_path / "target" / name_last(2))
    (problem,) = api.verify(tmp_path / "target", tmp_path / "source").problems
    assert (problem.kind, problem.subject) == ("differs", f"{name_last(2)}: {name}")


@pytest.mark.parametrize(("ranks", "words"), [(3, "num_key_value_heads"), (8, "gate_up_proj_blocks")])
def test_ranks_that_blocks_and_heads_of_gpt_oss_do_not_suit_are_refused(ranks: int, words: str, tmp_path: Path) -> None:
    """At 8 ranks the last would have none of seven blocks; vLLM's model has no head in several ranks."""
    write_case(tmp_path / "source", MXFP4)
    with pytest.raises(Refused) as caught:
        api.plan(tmp_path / "source", mp=ranks, for_engine="vllm")
    problems = caught.value.problems
    assert any(words in problem.subject for problem in problems)
    assert {problem.remedy for problem in problems} == {"--mp with one of 1, 2, 4"}


GPT_OSS_20B: dict[str, Any] = {
    "model_type": "gpt_oss",
    "hidden_size": 2880,
    "intermediate_size": 2880,
    "num_attention_heads": 64,
    "num_key_value_heads": 8,
    "head_dim": 64,
    "vocab_size": 201_088,
    "num_local_experts": 32,
    "num_hidden_layers": 1,
    "quantization_config": {"quant_method": "mxfp4"},
}
"""As published, with one layer: 90 blocks of 32 inner channels."""

WIDTHS = {1: [2880], 2: [1440, 1440], 4: [736, 736, 736, 672], 8: [*[384] * 7, 192]}
"""By the number of ranks: the inner channels of each rank."""


def test_the_published_gpt_oss_goes_to_eight_ranks() -> None:
    recipe = load_recipe("vllm-gpt-oss")
    checkpoint = make_headers(recipe, GPT_OSS_20B)
    source = Source(checkpoint.folder, checkpoint, recipe, match(checkpoint, recipe), Origin())
    assert [choice.ranks for choice in list_rank_choices(source, Layout(0))] == list(WIDTHS)
    for ranks, widths in WIDTHS.items():
        plan = make_plan(source, Layout(ranks))
        for rank, width in enumerate(widths):
            shapes = {tensor.name.rpartition(".")[2]: tensor.shape for tensor in plan.tensors(rank)}
            assert shapes["w13_weight"] == (32, 2 * width, 1440)
            assert shapes["w13_weight_scale"] == (32, 2 * width, 90)
            assert shapes["w2_weight"] == (32, 2880, width // 2)
            assert shapes["w2_weight_scale"] == (32, 2880, width // 32)
            assert (shapes["w13_bias"], shapes["w2_bias"]) == ((32, 2 * width), (32, 2880))


def test_a_stored_head_of_a_tied_model_is_left_out(tmp_path: Path) -> None:
    """Qwen3-0.6B has one. vLLM knows no second table, and would end with a KeyError."""
    write_case(tmp_path / "source", "qwen3-tied")
    tensors = tensors_of(tmp_path / "source")
    head = {"lm_head.weight": tensors["model.embed_tokens.weight"].clone()}
    write_case(tmp_path / "plain", "qwen3-tied")
    add_tensors(tmp_path / "source", head)
    for name in ("source", "plain"):
        convert_checkpoint(Job(tmp_path / name, 2, recipe="vllm-qwen3"), tmp_path / f"{name}-target")
    for rank in range(2):
        file = f"model-rank-{rank}-part-0.safetensors"
        assert data_of(tmp_path / "source-target" / file) == data_of(tmp_path / "plain-target" / file)
    assert api.verify(tmp_path / "source-target", tmp_path / "source").problems == ()


def test_rank_files_of_vllm_that_no_recipe_fits_are_called_so(tmp_path: Path) -> None:
    """Another version of vLLM may have other names; and there are models that no recipe for it lists."""
    write_case(tmp_path / "source", "llama")
    write_rank_files(tmp_path / "source", tmp_path / "ranks", 2)
    path = tmp_path / "ranks" / "model-rank-1-part-0.safetensors"
    tensors = load_file(path)
    save_file({**tensors, "model.new.scale": tensors["model.norm.weight"].clone()}, path)
    with pytest.raises(Refused) as caught:
        convert_checkpoint(Job(tmp_path / "ranks", 1, to="hf"), tmp_path / "back")
    first, last = caught.value.problems
    assert (first.kind, last.kind) == ("no-rule", "rank-files")
    assert "vLLM" in last.expected
    config = tmp_path / "ranks" / "config.json"
    config.write_text(json.dumps({**json.loads(config.read_text()), "model_type": "new", "architectures": ["New"]}))
    with pytest.raises(Refused) as caught:
        convert_checkpoint(Job(tmp_path / "ranks", 1, to="hf"), tmp_path / "back")
    (problem,) = caught.value.problems
    assert (problem.kind, problem.found) == ("no-recipe", "for vllm, a model of new")
    assert "name the checkpoint" in problem.remedy


def add_tensors(folder: Path, tensors: dict[str, Tensor]) -> None:
    """Adds a file with tensors, and its names to the index."""
    save_file(tensors, folder / "model-more.safetensors", {"format": "pt"})
    path = folder / "model.safetensors.index.json"
    index = json.loads(path.read_text())
    index["weight_map"] |= dict.fromkeys(tensors, "model-more.safetensors")
    path.write_text(json.dumps(index))
