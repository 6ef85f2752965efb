"""Weights that lie packed, as quantizers write them, in BF16: against torch in the dtypes of each library."""

import json
import shutil
from collections.abc import Callable, Iterator
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from packed_llamas import CONFIG, KINDS, LAYERS, pack_integers, write_packed
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from transformers import GptOssConfig, GptOssForCausalLM
from transformers.integrations.mxfp4 import convert_moe_packed_tensors

import reshard
import reshard.casts.shapes
import reshard.casts.unpacking
import reshard.execution.execute
from reshard.cli.main import main
from reshard.errors import Refused
from reshard.execution.windows import make_windows
from reshard.inspection.recipe_fit import check_fit
from reshard.recipes.recipe import load_recipe
from reshard.sources.checkpoints import read_checkpoint
from reshard.verification.report import Report

TRANSPOSED = ["awq", "gptq", "gptq-v2"]

Model = Callable[..., Path]


@pytest.fixture
def model(tmp_path: Path) -> Iterator[Model]:
    """A packed model, and the same in BF16 beside it."""

    def make(kind: str, files: int = 3) -> Path:
        write_packed(tmp_path / kind, kind, files=files)
        return tmp_path / kind

    yield make
    shutil.rmtree(tmp_path)


def read_all(folder: Path) -> dict[str, torch.Tensor]:
    found: dict[str, torch.Tensor] = {}
    for path in folder.glob("*.safetensors"):
        with safe_open(path, "pt") as opened:
            found |= {name: opened.get_tensor(name) for name in opened.keys()}  # noqa: SIM118 - it is no mapping
    return found


def require_same_numbers(found: dict[str, torch.Tensor], wanted: dict[str, torch.Tensor]) -> None:
    assert found.keys() == wanted.keys()
    for name, tensor in wanted.items():
        assert found[name].dtype == tensor.dtype, name
        assert torch.equal(found[name].view(torch.int16), tensor.view(torch.int16)), name


def require_proven(report: Report) -> None:
    assert not report.problems
    assert report.compared


def require_same_files(one: Path, other: Path) -> None:
    names = sorted(path.name for path in other.glob("*.safetensors"))
    assert names
    assert sorted(path.name for path in one.glob("*.safetensors")) == names
    for name in names:
        assert (one / name).read_bytes() == (other / name).read_bytes(), name


@pytest.mark.parametrize("kind", KINDS)
def test_a_recipe_of_plain_names_fits_every_packing(model: Model, kind: str) -> None:
    root, recipe = model(kind), load_recipe("llama")
    plain = check_fit(read_checkpoint(root / "plain"), recipe)
    assert plain.packed == 0
    assert check_fit(read_checkpoint(root / "packed"), recipe) == replace(plain, packed=7 * LAYERS)
    without = replace(recipe, rules=tuple(rule for rule in recipe.rules if "up_proj" not in rule.left))
    with pytest.raises(Refused) as refused:
        check_fit(read_checkpoint(root / "packed"), without)
    assert {problem.kind for problem in refused.value.problems} == {"no-rule"}
    assert refused.value.problems[0].subject == "model.layers.0.mlp.up_proj.weight"


@pytest.mark.parametrize("files", [3, 1])
@pytest.mark.parametrize("kind", KINDS)
def test_every_packing_becomes_what_its_library_makes_of_it(
    model: Model, tmp_path: Path, kind: str, files: int
) -> None:
    root, target = model(kind, files), tmp_path / "target"
    reshard.convert(root / "packed", target, to="hf", cast="bf16")
    require_same_numbers(read_all(target), load_file(root / "plain" / "model.safetensors"))
    config = json.loads((target / "config.json").read_text())
    assert config == CONFIG
    assert not (target / "quantize_config.json").exists()  # a loader would look for scales
    require_proven(reshard.verify(target, root / "packed"))


@pytest.mark.parametrize("kind", ["int4-zeros", "awq", "nvfp4", "fp8-rows"])
@pytest.mark.parametrize(
    "layout", [{"mp": 2}, {"mp": 4, "pad": True}, {"to": "dcp", "mp": 3}, {"mp": 2, "for_engine": "vllm"}], ids=str
)
def test_every_layout_is_that_of_the_same_model_in_bf16(
    model: Model, tmp_path: Path, kind: str, layout: dict[str, Any]
) -> None:
    root = model(kind)
    reshard.convert(root / "packed", tmp_path / "one", cast="bf16", **layout)
    reshard.convert(root / "plain", tmp_path / "other", **layout)
    require_same_files(tmp_path / "one", tmp_path / "other")
    require_proven(reshard.verify(tmp_path / "one", root / "packed"))


@pytest.mark.parametrize("kind", KINDS)
def test_a_changed_byte_of_a_target_is_found(model: Model, tmp_path: Path, kind: str) -> None:
    root, target = model(kind), tmp_path / "target"
    reshard.convert(root / "packed", target, to="hf", cast="bf16")
    with (target / "model.safetensors").open("r+b") as opened:
        opened.seek(-300, 2)
        byte = opened.read(1)[0]
        opened.seek(-1, 1)
        opened.write(bytes([byte ^ 1]))
    problems = reshard.verify(target, root / "packed").problems
    assert [problem.kind for problem in problems] == ["differs"], problems


@pytest.mark.parametrize("kind", ["gptq", "mxfp4"])
def test_some_layers_are_taken_and_renumbered(model: Model, tmp_path: Path, kind: str) -> None:
    chosen: dict[str, Any] = {"layers": [*range(4), 10], "renumber": True, "to": "hf"}
    root = model(kind)
    reshard.convert(root / "packed", tmp_path / "one", cast="bf16", **chosen)
    reshard.convert(root / "plain", tmp_path / "other", **chosen)
    require_same_numbers(read_all(tmp_path / "one"), read_all(tmp_path / "other"))


@pytest.mark.parametrize("kind", TRANSPOSED)
def test_a_weight_of_several_strips_is_the_same(
    model: Model, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, kind: str
) -> None:
    monkeypatch.setattr(reshard.casts.shapes, "STRIP_SIZE", 1 << 12)
    root = model(kind)
    reshard.convert(root / "packed", tmp_path / "target", to="hf", cast="bf16")
    require_same_numbers(read_all(tmp_path / "target"), load_file(root / "plain" / "model.safetensors"))


@pytest.fixture(scope="module")
def gpt_oss(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A small gpt-oss in MXFP4, and what transformers makes of it."""
    root = tmp_path_factory.mktemp("gpt-oss")
    config = GptOssConfig(
        hidden_size=96,
        intermediate_size=64,
        num_hidden_layers=3,
        num_local_experts=6,
        num_attention_heads=4,
        num_key_value_heads=2,
        head_dim=24,
        vocab_size=64,
    )
    with torch.device("meta"):
        shapes = {name: tensor.shape for name, tensor in GptOssForCausalLM(config).state_dict().items()}
    torch.manual_seed(4)
    stored: dict[str, torch.Tensor] = {}
    plain: dict[str, torch.Tensor] = {}
    for name, shape in shapes.items():
        if name.endswith(("experts.gate_up_proj", "experts.down_proj")):
            blocks = torch.randint(256, (shape[0], shape[2], shape[1] // 32, 16), dtype=torch.uint8)
            scales = torch.randint(100, 140, blocks.shape[:-1], dtype=torch.uint8)
            stored |= {f"{name}_blocks": blocks, f"{name}_scales": scales}
            plain[name] = convert_moe_packed_tensors(blocks, scales, dtype=torch.bfloat16).contiguous()
        else:
            stored[name] = plain[name] = torch.randn(shape).to(torch.bfloat16)
    table = {"quant_method": "mxfp4", "modules_to_not_convert": ["model.layers.*.self_attn", "lm_head"]}
    told = {**config.to_dict(), "architectures": ["GptOssForCausalLM"], "torch_dtype": "bfloat16"}
    for folder, tensors, also in (("packed", stored, {"quantization_config": table}), ("plain", plain, {})):
        (root / folder).mkdir()
        save_file(tensors, root / folder / "model.safetensors")
        (root / folder / "config.json").write_text(json.dumps({**told, **also}))
    return root


@pytest.mark.parametrize("size", [None, 96 * 32 // 2])
@pytest.mark.parametrize("layout", [{"to": "hf"}, {"mp": 2}, {"to": "dcp", "mp": 3}], ids=str)
def test_gpt_oss_is_what_transformers_makes_of_it(
    gpt_oss: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, layout: dict[str, Any], size: int | None
) -> None:
    if size:
        monkeypatch.setattr(reshard.casts.shapes, "STRIP_SIZE", size)
    reshard.convert(gpt_oss / "packed", tmp_path / "one", cast="bf16", **layout)
    reshard.convert(gpt_oss / "plain", tmp_path / "other", **layout)
    require_same_files(tmp_path / "one", tmp_path / "other")
    require_proven(reshard.verify(tmp_path / "one", gpt_oss / "packed"))


Tensors = dict[str, torch.Tensor]

DOWN = "model.layers.2.mlp.down_proj"


def drop(word: str) -> Callable[[Tensors], object]:
    return lambda tensors: tensors.pop(f"{DOWN}.{word}")


def cut(word: str) -> Callable[[Tensors], object]:
    def change(tensors: Tensors) -> None:
        tensors[f"{DOWN}.{word}"] = tensors[f"{DOWN}.{word}"][:-1].contiguous()

    return change


def retype(word: str, dtype: torch.dtype) -> Callable[[Tensors], object]:
    def change(tensors: Tensors) -> None:
        tensors[f"{DOWN}.{word}"] = tensors[f"{DOWN}.{word}"].to(dtype)

    return change


def lengthen(tensors: Tensors) -> None:
    tensors["model.layers.0.mlp.down_proj.weight_shape"] = torch.tensor([128, 9999])  # the first of its kind is read


def add_plain(tensors: Tensors) -> None:
    tensors[f"{DOWN}.weight"] = torch.zeros(128, 320, dtype=torch.bfloat16)


@pytest.mark.parametrize(
    ("kind", "change", "subject", "found"),
    [
        ("int4", drop("weight_scale"), f"{DOWN}.weight_scale", "not in the checkpoint"),
        ("int4", cut("weight_scale"), f"{DOWN}.weight_scale", "BF16 [127, 10]"),
        ("int4-zeros", cut("weight_zero_point"), f"{DOWN}.weight_zero_point", "I32 [15, 5]"),
        ("int4-zeros", cut("weight_g_idx"), f"{DOWN}.weight_g_idx", "I32 [319]"),
        ("int4", lengthen, "down_proj.weight_packed", "I32 [128, 40]"),
        ("int4", add_plain, f"{DOWN}.weight", "plain, and packed"),
        ("awq", drop("qzeros"), f"{DOWN}.qzeros", "not in the checkpoint"),
        ("awq", cut("qweight"), f"{DOWN}.weight", "shape [128, 319]"),
        ("awq", drop("qweight"), f"{DOWN}.qweight", "not in the checkpoint"),
        ("gptq", cut("scales"), f"{DOWN}.qweight", "I32 [40, 128]"),
        ("gptq", cut("g_idx"), f"{DOWN}.g_idx", "I32 [319]"),
        ("gptq", retype("scales", torch.float64), f"{DOWN}.scales", "F64 [5, 128]"),
        ("nvfp4", drop("weight_scale_2"), f"{DOWN}.weight_scale_2", "not in the checkpoint"),
        ("nvfp4-divided", cut("weight_scale"), f"{DOWN}.weight_scale", "F8_E4M3 [127, 20]"),
        ("mxfp4", cut("weight_scale"), f"{DOWN}.weight_scale", "U8 [127, 10]"),
        ("fp8-rows", cut("weight_scale"), f"{DOWN}.weight_scale", "F32 [127, 1]"),
        ("fp8", drop("weight_scale"), f"{DOWN}.weight_scale", "not in the checkpoint"),
        ("int4-zeros", drop("weight_zero_point"), f"{DOWN}.weight_zero_point", "not in the checkpoint"),
        ("int4-zeros", drop("weight_g_idx"), f"{DOWN}.weight_g_idx", "not in the checkpoint"),
        ("gptq", drop("g_idx"), f"{DOWN}.g_idx", "not in the checkpoint"),
    ],
)
def test_parts_that_do_not_fit_are_refused_by_name(
    model: Model, tmp_path: Path, kind: str, change: Callable[[Tensors], object], subject: str, found: str
) -> None:
    source = model(kind, 1) / "packed"
    tensors = load_file(source / "model.safetensors")
    change(tensors)
    save_file(tensors, source / "model.safetensors")
    with pytest.raises(Refused) as refused:
        reshard.convert(source, tmp_path / "target", to="hf", cast="bf16")
    assert any(subject in one.subject + one.found and found in one.found for one in refused.value.problems), str(
        refused.value
    )
    assert not (tmp_path / "target").exists()


@pytest.mark.parametrize(
    ("kind", "table", "expected"),
    [
        ("awq", {"quant_method": "awq", "bits": 4, "group_size": 64, "version": "gemv"}, "version gemm"),
        ("gptq", {"quant_method": "gptq", "bits": 3, "group_size": 64}, "3 bits"),
        (
            "int4",
            {"quant_method": "compressed-tensors", "config_groups": {"a": {"weights": {"num_bits": 8}}}},
            "8 bits",
        ),
    ],
)
def test_a_config_that_tells_of_another_packing_is_refused(
    model: Model, tmp_path: Path, kind: str, table: dict[str, Any], expected: str
) -> None:
    source = model(kind) / "packed"
    (source / "config.json").write_text(json.dumps({**CONFIG, "quantization_config": table}))
    with pytest.raises(Refused, match=expected):
        reshard.convert(source, tmp_path / "target", to="hf", cast="bf16")


def tell(source: Path, table: object, name: str = "config.json") -> None:
    """Tells of a quantization in the config, or in a file of its own."""
    (source / "quantize_config.json").unlink(missing_ok=True)
    (source / "config.json").write_text(json.dumps(CONFIG))
    if table:
        told = {**CONFIG, "quantization_config": table} if name == "config.json" else table
        (source / name).write_text(json.dumps(told))


@pytest.mark.parametrize(
    ("kind", "name", "table"),
    [
        ("gptq-v2", "config.json", {"quant_method": "gptq", "bits": 8, "group_size": 64, "format": "gptq_v2"}),
        ("gptq-v2", "quantize_config.json", {"bits": 8, "group_size": 64, "checkpoint_format": "gptq_v2"}),
        ("gptq", "quantize_config.json", {"bits": 4, "group_size": 64, "desc_act": True}),
        ("gptq", "config.json", {"quant_method": "gptq", "bits": 8, "dynamic": {"+:.*proj.*": {"bits": 4}}}),
        ("awq", "quant_config.json", {"w_bit": 4, "q_group_size": 64, "zero_point": True, "version": "GEMM"}),
    ],
)
def test_the_format_is_told_in_several_ways(
    model: Model, tmp_path: Path, kind: str, name: str, table: dict[str, Any]
) -> None:
    root, target = model(kind), tmp_path / "target"
    tell(root / "packed", table, name)
    reshard.convert(root / "packed", target, to="hf", cast="bf16")
    require_same_numbers(read_all(target), load_file(root / "plain" / "model.safetensors"))
    assert not (target / name).exists() or name == "config.json"
    require_proven(reshard.verify(target, root / "packed"))


@pytest.mark.parametrize(
    ("kind", "table", "expected"),
    [
        ("gptq", {"quant_method": "auto-round", "bits": 4, "packing_format": "auto_round:auto_gptq"}, "auto-round"),
        ("gptq", None, "no quantization_config"),
        ("gptq", {"quant_method": "gptq", "bits": 4, "group_size": 32}, "as the config says"),
        ("awq", {"quant_method": "awq", "bits": 4, "group_size": 32}, "as the config says"),
        ("awq", {"quant_method": "awq", "bits": 8, "group_size": 64}, "8 bits"),
        ("awq", {"quant_method": "gptq", "bits": 4, "group_size": 64}, "not gptq"),
    ],
)
def test_a_format_that_is_not_told_or_told_otherwise_is_refused(
    model: Model, tmp_path: Path, kind: str, table: dict[str, Any] | None, expected: str
) -> None:
    source = model(kind) / "packed"
    tell(source, table)
    with pytest.raises(Refused, match=expected):
        reshard.convert(source, tmp_path / "target", to="hf", cast="bf16")


@pytest.mark.parametrize(
    ("kind", "word", "table"),
    [
        ("gptq", "g_idx", KINDS["gptq"].config),
        ("int8-zeros", "weight_zero_point", KINDS["int8-zeros"].config),
    ],
)
def test_a_part_that_the_config_tells_of_and_no_weight_has_is_refused(
    model: Model, tmp_path: Path, kind: str, word: str, table: Any
) -> None:
    source = model(kind, 1) / "packed"
    tell(source, table)
    tensors = load_file(source / "model.safetensors")
    save_file(
        {name: tensor for name, tensor in tensors.items() if not name.endswith(word)}, source / "model.safetensors"
    )
    with pytest.raises(Refused, match=f"{word}: missing tensor"):
        reshard.convert(source, tmp_path / "target", to="hf", cast="bf16")


def test_a_part_of_a_model_without_packed_weights_is_copied(model: Model, tmp_path: Path) -> None:
    root = model("awq")
    reshard.convert(root / "packed", tmp_path / "target", to="hf", cast="bf16", only="*layernorm*")
    assert len(read_all(tmp_path / "target")) == 22


def test_rows_of_other_lengths_in_parts_of_the_same_shapes(model: Model, tmp_path: Path) -> None:
    """8 bits of 160 columns take as many words as 4 bits of 320."""
    root = model("int4", 1)
    source, tensors = root / "packed", load_file(root / "packed" / "model.safetensors")
    plain = load_file(root / "plain" / "model.safetensors")
    for name in [name for name in plain if "proj" in name]:
        rows, columns = plain[name].shape
        for end in ("packed", "scale", "shape"):
            del tensors[f"{name}_{end}"]
        parts, plain[name] = pack_integers((rows, columns), 4 if "down" in name else 8, 0)
        tensors |= {name.removesuffix(".weight") + end: part for end, part in parts.items()}
    save_file(tensors, source / "model.safetensors")
    groups = {str(bits): {"weights": {"num_bits": bits, "group_size": None}} for bits in (4, 8)}
    tell(source, {"quant_method": "compressed-tensors", "format": "pack-quantized", "config_groups": groups})
    reshard.convert(source, tmp_path / "target", to="hf", cast="bf16")
    require_same_numbers(read_all(tmp_path / "target"), plain)
    require_proven(reshard.verify(tmp_path / "target", source))


@pytest.mark.parametrize("kind", ["int4", "awq"])
def test_numbers_of_ranks_are_found_without_dequantizing(
    model: Model, tmp_path: Path, kind: str, capsys: pytest.CaptureFixture[str]
) -> None:
    source = model(kind) / "packed"
    assert main(["plan", str(source), "--cast", "bf16"]) == 0
    assert "ranks" in capsys.readouterr().out
    with pytest.raises(Refused, match="one of 1, 2, 4"):
        reshard.convert(source, tmp_path / "target", mp=3, cast="bf16")


@pytest.mark.parametrize("kind", ["awq", "int4", "fp8-rows"])
def test_a_packed_model_is_loaded(model: Model, kind: str) -> None:
    root = model(kind)
    state = reshard.load(root / "packed", mp=1, rank=0, cast="bf16", framework="torch")
    require_same_numbers(dict(state), load_file(root / "plain" / "model.safetensors"))


@pytest.mark.parametrize("kind", ["awq", "gptq"])
def test_strips_are_made_once_for_several_files(
    model: Model, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, kind: str
) -> None:
    made: list[object] = []
    make_strip = reshard.casts.unpacking.make_strip

    def make(packed: Any, expert: int, start: int, *others: Any) -> Any:
        made.append((packed.codes.name, expert, start))
        return make_strip(packed, expert, start, *others)

    monkeypatch.setattr(reshard.casts.unpacking, "make_strip", make)
    monkeypatch.setattr(reshard.casts.shapes, "STRIP_SIZE", 1 << 12)
    monkeypatch.setattr(reshard.execution.execute, "WINDOW_SIZE", 1 << 13)
    monkeypatch.setattr(reshard.execution.execute, "make_windows", partial(make_windows, size=1 << 13))
    root = model(kind)
    reshard.convert(root / "packed", tmp_path / "target", mp=4, cast="bf16", jobs=1)
    assert len(made) == len(set(made)) > 77 * 2


def test_what_an_earlier_version_left_packed_is_still_proven(gpt_oss: Path, tmp_path: Path) -> None:
    """Such a target has BF16 for F32 only, and says the same cast."""
    target = tmp_path / "target"
    reshard.convert(gpt_oss / "packed", target, to="hf")
    manifest = json.loads((target / "reshard.json").read_text())
    manifest["layout"]["cast"], manifest["casts"] = "bf16", {"round": 1}
    (target / "reshard.json").write_text(json.dumps(manifest))
    require_proven(reshard.verify(target, gpt_oss / "packed"))


@pytest.mark.parametrize("kind", ["int4", "awq", "nvfp4", "fp8"])
def test_without_a_cast_the_refusal_names_it(model: Model, tmp_path: Path, kind: str) -> None:
    source = model(kind) / "packed"
    with pytest.raises(Refused, match='add cast="bf16"'):
        reshard.convert(source, tmp_path / "target", to="hf")


def test_bitsandbytes_is_refused_by_name(model: Model, tmp_path: Path) -> None:
    source = model("int4", 1) / "packed"
    tensors = load_file(source.parent / "plain" / "model.safetensors")
    codes = tensors.pop(f"{DOWN}.weight")
    tensors[f"{DOWN}.weight"] = torch.zeros(codes.numel() // 2, 1, dtype=torch.uint8)
    tensors |= {f"{DOWN}.weight.{word}": torch.zeros(16) for word in ("absmax", "quant_map")}
    save_file(tensors, source / "model.safetensors")
    table = {"quant_method": "bitsandbytes", "load_in_4bit": True}
    (source / "config.json").write_text(json.dumps({**CONFIG, "quantization_config": table}))
    with pytest.raises(Refused, match="bitsandbytes"):
        reshard.convert(source, tmp_path / "target", to="hf", cast="bf16")
