"""Targets in NVFP4 against sources in MXFP4: every byte is proven, by the values that the three tensors give."""

import json
import shutil
from collections.abc import Callable, Iterator
from fractions import Fraction
from functools import partial
from pathlib import Path

import numpy as np
import pytest
import torch
from mxfp4_models import PARENTS, Tensors, list_modules, make_mxfp4_tensors, read_model, write_model
from safetensors.torch import save_file
from share_runs import verify_here, verify_in_shares

import reshard

UP = "model.layers.2.mlp.up_proj"

ZEROS = "model.layers.0.self_attn.o_proj"
"""Has a group of zeros, whose scale lies beyond the others."""

ENDS = ("weight_packed", "weight_scale", "weight_global_scale")

FILE = "model.safetensors"


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    """A source and its target."""
    folder = tmp_path_factory.mktemp("nvfp4")
    tensors = make_mxfp4_tensors()
    tensors[f"{ZEROS}.weight_packed"][5, 16:32] = 0x80
    tensors[f"{ZEROS}.weight_scale"][5, 1] = 3
    source = write_model(folder / "source", tensors, 2)
    reshard.convert(source, folder / "target", to="hf", cast="nvfp4")
    yield folder
    shutil.rmtree(folder)


@pytest.fixture
def target(made: Path, tmp_path: Path) -> Path:
    shutil.copytree(made / "target", tmp_path / "target")
    (tmp_path / "target" / "reshard.json").unlink()  # else its checksums would tell
    return tmp_path / "target"


def find_problems(target: Path, made: Path) -> list[tuple[str, str]]:
    report = reshard.verify(target, made / "source")
    return [(problem.kind, problem.subject.removeprefix(f"{FILE}: ")) for problem in report.problems]


def test_a_sound_target_is_proven(made: Path, target: Path) -> None:
    report = reshard.verify(target, made / "source")
    assert not report.problems
    assert report.compared == report.size
    modules = sum(len(list_modules(parent)) for parent in PARENTS)
    assert report.casts == {"nvfp4": 2 * modules}


@pytest.mark.parametrize("name", [UP, ZEROS])
@pytest.mark.parametrize("end", ENDS)
def test_a_changed_bit_is_seen(made: Path, target: Path, name: str, end: str) -> None:
    path = target / FILE
    content = path.read_bytes()
    length = int.from_bytes(content[:8], "little")
    begin, stop = json.loads(content[8 : 8 + length])[f"{name}.{end}"]["data_offsets"]
    places = sorted({begin, begin + 1, (begin + stop) // 2, stop - 1})
    if (name, end) == (ZEROS, "weight_scale"):
        places.append(begin + 5 * 5 + 2)  # of zeros, which have one right scale all the same
    for place in places:
        for bit in range(8) if (name, end) == (UP, ENDS[2]) else (0, 3, 7):
            changed = bytearray(content)
            changed[8 + length + place] ^= 1 << bit
            path.write_bytes(changed)
            found = find_problems(target, made)
            assert found, (place - begin, bit)
            assert {kind for kind, _ in found} == {"differs"}
            assert all(subject.startswith(f"{name}.weight_") for _, subject in found)
    path.write_bytes(content)
    assert not find_problems(target, made)


def rewrite(target: Path, change: Callable[[Tensors], object]) -> None:
    tensors = read_model(target)
    change(tensors)
    save_file({name: tensor.contiguous() for name, tensor in tensors.items()}, target / FILE, {"format": "pt"})


def multiply(power: float) -> Callable[[Tensors], object]:
    """Changes the scales and the factor together: the values stay."""

    def change(tensors: Tensors) -> None:
        for end in ENDS[1:]:
            name = f"{UP}.{end}"
            tensors[name] = (tensors[name].float() * power).to(tensors[name].dtype)

    return change


def test_other_scales_of_the_same_values_are_right(tmp_path: Path) -> None:
    """Of a source that uses 9 powers of two."""
    source = write_model(tmp_path / "source", make_mxfp4_tensors(115, 123))
    reshard.convert(source, tmp_path / "made", to="hf", cast="nvfp4")
    for power, is_right in ((0.5, True), (2.0**-9, True), (2.0**-10, False), (1.5, False)):
        shutil.copytree(tmp_path / "made", tmp_path / "changed")
        (tmp_path / "changed" / "reshard.json").unlink()
        rewrite(tmp_path / "changed", multiply(power))
        assert bool(reshard.verify(tmp_path / "changed", source).problems) != is_right
        shutil.rmtree(tmp_path / "changed")


def set_factor(name: str, factor: float, tensors: Tensors) -> None:
    tensors[name].fill_(factor)


def test_a_factor_that_is_no_power_of_two_is_wrong(tmp_path: Path) -> None:
    """Also where scales are right for a factor of 1."""
    for low in (110, 118):
        source = write_model(tmp_path / f"source-{low}", make_mxfp4_tensors(low, low + 17))
        target = tmp_path / f"target-{low}"
        reshard.convert(source, target, to="hf", cast="nvfp4")
        (target / "reshard.json").unlink()
        name = f"{UP}.weight_global_scale"
        for factor in (0.0, -1.0, float("inf"), float("nan"), 2.0**-140, 1.5, 384.0):
            rewrite(target, partial(set_factor, name, factor))
            problems = reshard.verify(target, source).problems
            assert ("differs", f"{FILE}: {name}") in [(one.kind, one.subject) for one in problems]


@pytest.mark.parametrize(("scale", "code"), [(109, 0x00), (109, 0x7F), (109, 0x80), (128, 0xFF), (255, 0x01)])
def test_a_scale_that_no_code_fits_is_wrong_whatever_the_target_has(
    made: Path, tmp_path: Path, scale: int, code: int
) -> None:
    """The source changes behind the conversion; the tile is not the first. NaN is wrong of zeros too."""
    tensors = make_mxfp4_tensors()
    tensors[f"{UP}.weight_scale"][-1, -1] = scale
    if scale == 255:
        tensors[f"{UP}.weight_packed"][-1, 32:] = 0
    source = write_model(tmp_path / "source", tensors)
    shutil.copytree(made / "target", tmp_path / "target")
    (tmp_path / "target" / "reshard.json").unlink()
    rewrite(tmp_path / "target", lambda found: found[f"{UP}.weight_scale"].view(torch.uint8)[-1, -1:].fill_(code))
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("reshard.verification.chunks.TILE_SIZE", 1024)
        problems = reshard.verify(tmp_path / "target", source).problems
    assert f"{FILE}: {UP}.weight_global_scale" in [problem.subject for problem in problems]


@pytest.mark.parametrize("end", ENDS)
def test_a_missing_tensor_is_seen(made: Path, target: Path, end: str) -> None:
    rewrite(target, lambda tensors: tensors.pop(f"{UP}.{end}"))
    assert find_problems(target, made) == [("missing-tensor", f"{UP}.{end}")]


def test_a_weight_that_is_missing_is_seen(made: Path, target: Path) -> None:
    rewrite(target, lambda tensors: [tensors.pop(f"{UP}.{end}") for end in ENDS])
    assert ("missing-tensor", f"{UP}.weight") in find_problems(target, made)


@pytest.mark.parametrize(
    ("end", "change"),
    [
        ("weight_packed", lambda tensor: tensor.view(torch.int8)),
        ("weight_packed", lambda tensor: tensor.reshape(-1, 18)),
        ("weight_scale", lambda tensor: tensor.view(torch.uint8)),
        ("weight_scale", lambda tensor: tensor[:, :3]),
        ("weight_global_scale", lambda tensor: tensor.bfloat16()),
        ("weight_global_scale", lambda tensor: tensor.reshape(())),
        ("weight_global_scale", lambda tensor: tensor.repeat(2)),
    ],
)
def test_a_wrong_dtype_or_shape_is_seen(
    made: Path, target: Path, end: str, change: Callable[[torch.Tensor], torch.Tensor]
) -> None:
    rewrite(target, lambda tensors: tensors.update({f"{UP}.{end}": change(tensors[f"{UP}.{end}"])}))
    assert ("wrong-shape", f"{UP}.{end}") in find_problems(target, made)


def test_a_tensor_too_many_is_seen(made: Path, target: Path) -> None:
    rewrite(target, lambda tensors: tensors.update({f"{UP}.weight": torch.zeros(104, 72, dtype=torch.bfloat16)}))
    assert find_problems(target, made)


@pytest.mark.parametrize("change", ["format", "group_size", "strategy", "kv_cache_scheme", "ignore"])
def test_a_wrong_config_is_seen(made: Path, target: Path, change: str) -> None:
    config = json.loads((target / "config.json").read_text())
    table = config["quantization_config"]
    place = table["config_groups"]["group_0"]["weights"] if change in ("group_size", "strategy") else table
    place[change] = "group"
    (target / "config.json").write_text(json.dumps(config))
    assert reshard.verify(target, made / "source").problems


def test_a_sample_has_both_ends(made: Path, target: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for size in ("TILE_SIZE", "SAMPLE_BAND_SIZE"):
        monkeypatch.setattr(f"reshard.verification.chunks.{size}", 256)
    assert not reshard.verify(target, made / "source", sample=Fraction(1, 50)).problems
    for place in (0, -1):
        rewrite(target, partial(flip, place))
        (problem,) = reshard.verify(target, made / "source", sample=Fraction(1, 50)).problems
        assert problem.subject.endswith(f"{UP}.weight_scale")
        rewrite(target, partial(flip, place))


def flip(place: int, tensors: Tensors) -> None:
    scales = tensors[f"{UP}.weight_scale"].view(torch.uint8).numpy().reshape(-1)
    scales[place] = np.bitwise_xor(scales[place], 8)


def test_several_processes_find_the_same(made: Path, target: Path) -> None:
    assert not verify_in_shares(target, made / "source", count=3).problems
    rewrite(target, partial(flip, 7))
    found, wanted = verify_in_shares(target, made / "source", count=3), verify_here(target, made / "source")
    assert found == wanted
    assert found.problems
