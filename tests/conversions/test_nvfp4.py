"""Packed MXFP4 in packed NVFP4: each value is the same, bit for bit, by torch in the order of compressed-tensors."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from jobs import Job
from mxfp4_models import (
    CONFIG,
    PARENTS,
    TABLE,
    Tensors,
    list_modules,
    make_mxfp4_tensors,
    read_model,
    require_same_values,
    write_model,
)
from packed_llamas import write_packed
from refusals import TINY
from targets import leave_unfinished

import reshard
import reshard.execution.reader
from reshard.errors import Refused
from reshard.synthetic import write_checkpoint

GATE, UP, DOWN = (f"model.layers.1.mlp.{name}_proj" for name in ("gate", "up", "down"))

LOWEST = [0, 1, 2, 60, 100, 110, 127, 200, 236, 237]
"""Of 18 scales that follow one another, as E8M0 codes: 0 is 2^-127, and 254 the largest number."""


def convert(tensors: Tensors, folder: Path, files: int = 1, **options: Any) -> Tensors:
    """Writes a source, converts it and verifies the target."""
    source = write_model(folder / "source", tensors, files)
    reshard.convert(source, folder / "target", to="hf", cast="nvfp4", **options)
    report = reshard.verify(folder / "target", source)
    assert not report.problems, str(report)
    assert report.compared == report.size
    return read_model(folder / "target")


@pytest.mark.parametrize("low", LOWEST)
def test_every_scale_that_fits_gives_the_same_values(tmp_path: Path, low: int) -> None:
    tensors = make_mxfp4_tensors(low, low + 17)
    target = convert(tensors, tmp_path)
    require_same_values(tensors, target)
    powers = {float(factor) for name, factor in target.items() if name.endswith("global_scale")}
    assert powers == {2.0 ** min(126, 127 + 8 - low - 17)}
    assert {scale.float().max().item() for name, scale in target.items() if name.endswith("weight_scale")} <= {
        2.0**8,
        2.0**-1,
        2.0**-2,
    }


def test_the_inverse_of_a_factor_is_normal(tmp_path: Path) -> None:
    """In F32, which engines need: of scales near the smallest, the largest becomes less than 2^8."""
    tensors = make_mxfp4_tensors(0, 3)
    target = convert(tensors, tmp_path)
    require_same_values(tensors, target)
    assert {float(factor) for name, factor in target.items() if name.endswith("global_scale")} == {2.0**126}


@pytest.mark.parametrize(("files", "options"), [(3, {}), (2, {"max_file_size": 9000, "jobs": 1}), (1, {"jobs": 3})])
def test_one_file_and_many(tmp_path: Path, files: int, options: dict[str, Any]) -> None:
    tensors = make_mxfp4_tensors()
    require_same_values(tensors, convert(tensors, tmp_path, files, **options))
    assert len([*(tmp_path / "target").glob("*.safetensors")]) > (5 if options.get("max_file_size") else 0)


def test_reads_of_a_few_rows_at_a_time(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    tensors = make_mxfp4_tensors()
    tensors[f"{UP}.weight_scale"][50] = 0  # beyond the others: codes are read too
    tensors[f"{UP}.weight_packed"][50] = 0x08
    monkeypatch.setattr(reshard.execution.reader, "SCALES_SIZE", 10)
    require_same_values(tensors, convert(tensors, tmp_path))


def test_weights_beside_each_other_share_a_factor(tmp_path: Path) -> None:
    """vLLM fuses q, k and v, and gate and up, and takes one factor for all of them."""
    tensors = make_mxfp4_tensors()
    for place, parent in enumerate(PARENTS):
        for number, module in enumerate(list_modules(parent)):
            tensors[f"{module}.weight_scale"].clamp_(max=115 + place + number)
    target = convert(tensors, tmp_path)
    require_same_values(tensors, target)
    for place, parent in enumerate(PARENTS):
        found = {float(target[f"{module}.weight_global_scale"]) for module in list_modules(parent)}
        largest = 115 + place + len(list_modules(parent)) - 1
        assert found == {2.0 ** (8 - (largest - 127))}


def set_lowest(tensors: Tensors) -> None:
    tensors[f"{GATE}.weight_scale"][3, 1] = 109


def test_a_span_of_18_is_refused_by_name(tmp_path: Path) -> None:
    tensors = make_mxfp4_tensors(110, 127)
    set_lowest(tensors)
    source = write_model(tmp_path / "source", tensors)
    for allow in (False, True):  # nothing is rounded
        with pytest.raises(Refused) as refused:
            reshard.convert(source, tmp_path / "target", to="hf", cast="nvfp4", allow_inexact=allow)
        (problem,) = refused.value.problems
        assert (problem.kind, problem.subject) == ("inexact-cast", f"{GATE}.weight_scale")
        assert "scales from 2^-18 to 2^0" in problem.found
        assert "bf16" in problem.remedy
        assert not [*(tmp_path / "target").glob("*.safetensors")]


def test_a_span_of_18_beside_each_other_is_refused_with_both_names(tmp_path: Path) -> None:
    tensors = make_mxfp4_tensors(110, 126)
    for module in list_modules(PARENTS[3]):
        tensors[f"{module}.weight_scale"].clamp_(max=120)
    set_lowest(tensors)
    tensors[f"{DOWN}.weight_scale"][-1, -1] = 127
    source = write_model(tmp_path / "source", tensors)
    with pytest.raises(Refused, match=f"{GATE}.weight_scale") as refused:
        reshard.convert(source, tmp_path / "target", to="hf", cast="nvfp4")
    assert f"that of {DOWN}.weight_scale" in refused.value.problems[0].found
    tensors[f"{DOWN}.weight_scale"][-1, -1] = 126
    write_model(tmp_path / "other" / "source", tensors)
    require_same_values(tensors, convert(tensors, tmp_path / "next"))


@pytest.mark.parametrize("scale", [0, 109, 128, 254])
def test_a_group_of_zeros_may_have_any_scale(tmp_path: Path, scale: int) -> None:
    tensors = make_mxfp4_tensors(110, 127)
    for row, codes in enumerate((0x00, 0x88, 0x80)):
        tensors[f"{GATE}.weight_scale"][row, 1:] = scale
        tensors[f"{GATE}.weight_packed"][row, 16:] = codes
    target = convert(tensors, tmp_path)
    require_same_values(tensors, target)
    found = target[f"{GATE}.weight_scale"][:3, 2:].float()
    assert set(found.flatten().tolist()) == {2.0**-9 if scale < 110 else 2.0**8}


@pytest.mark.parametrize("at", [(2, 0), (2, 15), (2, 16), (103, 35)])
def test_one_number_in_a_group_counts(tmp_path: Path, at: tuple[int, int]) -> None:
    tensors = make_mxfp4_tensors(110, 127)
    tensors[f"{GATE}.weight_scale"][at[0], at[1] // 16] = 109
    group = tensors[f"{GATE}.weight_packed"][at[0], at[1] // 16 * 16 :][:16]
    group[:] = 0x88
    tensors[f"{GATE}.weight_packed"][at] = 0x18
    source = write_model(tmp_path / "source", tensors)
    with pytest.raises(Refused, match=f"{GATE}.weight_scale"):
        reshard.convert(source, tmp_path / "target", to="hf", cast="nvfp4")


def test_weights_of_zeros(tmp_path: Path) -> None:
    tensors = make_mxfp4_tensors()
    for module in list_modules(PARENTS[2]):
        tensors[f"{module}.weight_packed"][:] = 0x80
        tensors[f"{module}.weight_scale"][:, 0] = 0
    tensors[f"{GATE}.weight_packed"][:] = 0
    target = convert(tensors, tmp_path)
    require_same_values(tensors, target)
    assert float(target[f"{GATE}.weight_global_scale"]) == float(target[f"{UP}.weight_global_scale"])


@pytest.mark.parametrize("codes", [0x00, 0x12])
def test_a_scale_of_nan_is_refused(tmp_path: Path, codes: int) -> None:
    tensors = make_mxfp4_tensors()
    tensors[f"{GATE}.weight_scale"][3, 1] = 255
    tensors[f"{GATE}.weight_packed"][3, 16:32] = codes
    source = write_model(tmp_path / "source", tensors)
    with pytest.raises(Refused) as refused:
        reshard.convert(source, tmp_path / "target", to="hf", cast="nvfp4")
    (problem,) = refused.value.problems
    assert (problem.kind, problem.subject) == ("not-finite", f"{GATE}.weight_scale")


def test_the_config_is_that_of_weight_only_nvfp4(tmp_path: Path) -> None:
    """By these keys vLLM chooses CompressedTensorsW4A16Fp4: no activations, groups of 16, one factor."""
    convert(make_mxfp4_tensors(), tmp_path)
    config = json.loads((tmp_path / "target" / "config.json").read_text())
    table = config.pop("quantization_config")
    assert config == CONFIG
    group = table["config_groups"]["group_0"]
    old = TABLE["config_groups"]["group_0"]
    assert table == {**TABLE, "format": "nvfp4-pack-quantized", "config_groups": {"group_0": group}}
    weights = {"group_size": 16, "scale_dtype": "torch.float8_e4m3fn", "strategy": "tensor_group"}
    assert group == {**old, "format": "nvfp4-pack-quantized", "weights": {**old["weights"], **weights}}
    assert not (tmp_path / "target" / "recipe.yaml").exists()


def test_a_config_of_activations_and_of_a_cache_tells_of_them_no_more(tmp_path: Path) -> None:
    """vLLM takes weight-only NVFP4 only where there are no activations; another group stays as it is."""
    old = TABLE["config_groups"]["group_0"]
    other = {"targets": ["re:.*none.*"], "weights": {"num_bits": 8, "type": "float", "group_size": 32}}
    groups = {"group_0": {**old, "input_activations": old["weights"]}, "group_1": other}
    table = change_table(
        config_groups=groups, kv_cache_scheme={"num_bits": 8, "type": "float"}, format="mixed-precision"
    )
    tensors = make_mxfp4_tensors()
    source = write_model(tmp_path / "source", {**tensors, f"{PARENTS[0]}.k_scale": torch.ones(1)}, table=table)
    reshard.convert(source, tmp_path / "target", to="hf", cast="nvfp4")
    assert not reshard.verify(tmp_path / "target", source).problems
    require_same_values(tensors, read_model(tmp_path / "target"))
    found = json.loads((tmp_path / "target" / "config.json").read_text())["quantization_config"]
    assert found["kv_cache_scheme"] is None
    assert found["format"] == "mixed-precision"
    assert found["config_groups"]["group_0"]["format"] == "nvfp4-pack-quantized"
    assert found["config_groups"]["group_0"]["input_activations"] is None
    assert found["config_groups"]["group_1"] == other


def change_table(**changes: Any) -> dict[str, Any]:
    return {**TABLE, **changes}


@pytest.mark.parametrize(
    "table",
    [
        None,
        change_table(quant_method="quark"),
        change_table(config_groups={"group_0": {"targets": ["Linear"], "weights": {"num_bits": 4, "type": "int"}}}),
    ],
)
def test_a_config_that_does_not_tell_of_mxfp4_is_refused(tmp_path: Path, table: dict[str, Any] | None) -> None:
    source = write_model(tmp_path / "source", make_mxfp4_tensors(), table=table)
    with pytest.raises(Refused, match=r"quantization_config of config\.json"):
        reshard.convert(source, tmp_path / "target", to="hf", cast="nvfp4")
    assert not (tmp_path / "target").exists()


def test_both_lead_to_the_same_bf16(tmp_path: Path) -> None:
    convert(make_mxfp4_tensors(), tmp_path)
    for name in ("source", "target"):
        reshard.convert(tmp_path / name, tmp_path / f"{name}-bf16", to="hf", cast="bf16")
    one, other = (tmp_path / f"{name}-bf16" / "model.safetensors" for name in ("source", "target"))
    assert one.read_bytes() == other.read_bytes()


def test_an_interrupted_run_goes_on(tmp_path: Path) -> None:
    tensors = make_mxfp4_tensors()
    source = write_model(tmp_path / "source", tensors, 3)
    leave_unfinished(Job(source, 1, to="hf", cast="nvfp4", max_file_size=30_000), tmp_path / "target")
    found = reshard.convert(source, tmp_path / "target", to="hf", cast="nvfp4", max_file_size=30_000)
    assert found.done
    assert found.done.resumed
    require_same_values(tensors, read_model(tmp_path / "target"))


def test_shares_are_joined_to_the_same_files(tmp_path: Path) -> None:
    tensors = make_mxfp4_tensors()
    options: dict[str, Any] = {"to": "hf", "cast": "nvfp4", "max_file_size": 20_000}
    source = write_model(tmp_path / "source", tensors, 3)
    for number in range(3):
        reshard.convert(source, tmp_path / "target", share=f"{number}/3", **options)
        report = reshard.verify(tmp_path / "target" / f".share-{number}-of-3", source)
        assert not report.problems, str(report)
    reshard.convert(source, tmp_path / "target", **options)
    require_same_values(tensors, read_model(tmp_path / "target"))
    assert not reshard.verify(tmp_path / "target", source).problems


def test_some_layers_and_some_tensors(tmp_path: Path) -> None:
    tensors = make_mxfp4_tensors()
    source = write_model(tmp_path / "source", tensors)
    reshard.convert(source, tmp_path / "one", to="hf", cast="nvfp4", layers=[0, 2], renumber=True)
    reshard.convert(source, tmp_path / "whole", to="hf", cast="nvfp4")
    one, whole = read_model(tmp_path / "one"), read_model(tmp_path / "whole")
    for name, tensor in one.items():
        other = whole[name.replace("layers.1.", "layers.2.")]
        assert torch.equal(tensor.view(torch.uint8), other.view(torch.uint8)), name
    reshard.convert(source, tmp_path / "some", to="hf", cast="nvfp4", only=["*.1.mlp.*"])
    assert len(read_model(tmp_path / "some")) == 9
    assert not reshard.verify(tmp_path / "one", source).problems


def test_a_damaged_target_is_repaired(tmp_path: Path) -> None:
    convert(make_mxfp4_tensors(), tmp_path)
    path = tmp_path / "target" / "model.safetensors"
    good = path.read_bytes()
    path.write_bytes(good[:-5000] + bytes(5000))
    reshard.repair(tmp_path / "target", tmp_path / "source")
    assert path.read_bytes() == good


@pytest.mark.parametrize(
    ("kind", "reason"),
    [
        ("int4", "weights of packed integers"),
        ("int8", "weights of packed integers"),
        ("awq", "weights of AWQ"),
        ("gptq", "weights of GPTQ"),
        ("gptq-v2", "weights of GPTQ"),
        ("fp8", "weights of FP8"),
        ("fp8-rows", "weights of FP8"),
        ("nvfp4", "it is NVFP4 already"),
        ("nvfp4-divided", "it is NVFP4 already"),
    ],
)
def test_other_packings_are_refused(tmp_path: Path, kind: str, reason: str) -> None:
    write_packed(tmp_path, kind)
    with pytest.raises(Refused) as refused:
        reshard.convert(tmp_path / "packed", tmp_path / "target", to="hf", cast="nvfp4")
    (problem,) = refused.value.problems
    assert problem.kind == "wrong-option"
    assert reason in str(refused.value)
    assert 'cast="bf16"' in str(refused.value)
    assert not (tmp_path / "target").exists()


def test_fp8_with_block_scales_is_refused(tmp_path: Path) -> None:
    write_checkpoint(tmp_path / "source", TINY, 1)
    with pytest.raises(Refused, match=r'(?s)cast="bf16".*weights of FP8.*4 bits of its 8'):
        reshard.convert(tmp_path / "source", tmp_path / "target", to="hf", cast="nvfp4")
    assert not (tmp_path / "target").exists()


def test_weights_that_do_not_lie_packed_are_refused(tmp_path: Path) -> None:
    write_packed(tmp_path, "int4")
    with pytest.raises(Refused, match="a checkpoint without such weights"):
        reshard.convert(tmp_path / "plain", tmp_path / "target", to="hf", cast="nvfp4")


@pytest.mark.parametrize(
    ("run", "layout"),
    [(reshard.plan, {"mp": 2}), (reshard.plan, {"to": "dcp", "mp": 2}), (reshard.load, {"mp": 1, "rank": 0})],
)
def test_only_whole_files_have_it(tmp_path: Path, run: Callable[..., object], layout: dict[str, Any]) -> None:
    source = write_model(tmp_path / "source", make_mxfp4_tensors())
    with pytest.raises(Refused, match="engines read NVFP4 from whole files"):
        run(source, cast="nvfp4", **layout)
