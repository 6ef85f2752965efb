"""The generator against published figures, and what it writes against the safetensors package."""

import json
import subprocess
import sys
from collections import Counter
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors import safe_open
from tokenizers import Tokenizer

from reshard.errors import Refused
from reshard.synthetic import DEEPSEEK_V2_LITE, DEEPSEEK_V3, SMALL_V3, compute_data_size, list_tensors, write_checkpoint

FILES = 4
V3_FILES = 163
V3_DATA_SIZE = 688_574_839_360
MIXER = np.uint64(0x9E37_79B9_7F4A_7C15)
"""An odd number: two runs of 16 bytes are reduced to 8 that differ if only one half does, and else almost always."""
INDEX = "model.safetensors.index.json"
TINY = {**SMALL_V3, "n_routed_experts": 4, "num_hidden_layers": 2, "vocab_size": 128}


@pytest.fixture(scope="module")
def small(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("generated") / "small"
    write_checkpoint(folder, SMALL_V3, FILES)
    return folder


def shapes(config: Mapping[str, Any]) -> dict[str, tuple[str, tuple[int, ...]]]:
    return {name: (dtype, shape) for name, dtype, shape in list_tensors(config)}


def file_bytes(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in folder.iterdir()}


def weight_map(folder: Path) -> dict[str, str]:
    found: dict[str, str] = json.loads((folder / INDEX).read_bytes())["weight_map"]
    return found


def read_tensors(folder: Path) -> dict[str, torch.Tensor]:
    found = {}
    for path in folder.glob("*.safetensors"):
        with safe_open(path, framework="pt") as file:
            found.update({name: file.get_tensor(name) for name in file.keys()})  # noqa: SIM118 - not a mapping
    return found


def file_data_size(path: Path) -> int:
    """What lies behind the header, by the first eight bytes alone."""
    with path.open("rb") as file:
        return path.stat().st_size - 8 - int.from_bytes(file.read(8), "little")


def test_the_full_v3_has_the_published_tensors() -> None:
    tensors = list_tensors(DEEPSEEK_V3)
    assert len({name for name, _, _ in tensors}) == len(tensors) == 91_991
    assert sum(map(compute_data_size, tensors)) == V3_DATA_SIZE
    assert Counter(dtype for _, dtype, _ in tensors) == {"F8_E4M3": 45_808, "F32": 45_867, "BF16": 316}


def test_v2_lite_has_the_published_tensors() -> None:
    tensors = list_tensors(DEEPSEEK_V2_LITE)
    assert len({name for name, _, _ in tensors}) == len(tensors) == 5_291
    assert sum(map(compute_data_size, tensors)) == 31_412_968_448
    assert {dtype for _, dtype, _ in tensors} == {"BF16"}


@pytest.mark.parametrize(
    ("name", "dtype", "shape"),
    [
        ("lm_head.weight", "BF16", (129_280, 7168)),
        ("model.layers.0.mlp.down_proj.weight", "F8_E4M3", (7168, 18_432)),
        ("model.layers.0.mlp.down_proj.weight_scale_inv", "F32", (56, 144)),
        ("model.layers.3.mlp.gate.weight", "BF16", (256, 7168)),
        ("model.layers.3.mlp.gate.e_score_correction_bias", "F32", (256,)),
        ("model.layers.60.mlp.experts.255.up_proj.weight", "F8_E4M3", (2048, 7168)),
        ("model.layers.60.self_attn.q_b_proj.weight_scale_inv", "F32", (192, 12)),
        ("model.layers.60.self_attn.kv_a_proj_with_mqa.weight", "F8_E4M3", (576, 7168)),
        ("model.layers.60.self_attn.kv_a_proj_with_mqa.weight_scale_inv", "F32", (5, 56)),
        ("model.layers.61.eh_proj.weight", "BF16", (7168, 14_336)),
        ("model.layers.61.shared_head.head.weight", "BF16", (129_280, 7168)),
        ("model.layers.61.mlp.shared_experts.down_proj.weight_scale_inv", "F32", (56, 16)),
    ],
)
def test_v3_shapes(name: str, dtype: str, shape: tuple[int, ...]) -> None:
    assert shapes(DEEPSEEK_V3)[name] == (dtype, shape)


@pytest.mark.parametrize(
    ("name", "shape"),
    [
        ("model.layers.0.self_attn.q_proj.weight", (3072, 2048)),
        ("model.layers.0.mlp.gate_proj.weight", (10_944, 2048)),
        ("model.layers.26.mlp.shared_experts.down_proj.weight", (2048, 2816)),
    ],
)
def test_v2_lite_shapes(name: str, shape: tuple[int, ...]) -> None:
    assert shapes(DEEPSEEK_V2_LITE)[name] == ("BF16", shape)


def test_the_small_model_has_what_the_demo_shows() -> None:
    found = shapes(SMALL_V3)
    assert 20e6 < sum(map(compute_data_size, list_tensors(SMALL_V3))) < 60e6
    assert found["model.layers.0.self_attn.kv_a_proj_with_mqa.weight"][1][0] % 128 != 0
    for name in ("layers.0.mlp.gate_proj", "layers.1.mlp.shared_experts.up_proj", "layers.0.self_attn.q_b_proj"):
        assert found[f"model.{name}.weight"][1][0] % (4 * 128) == 0
    assert found["model.layers.0.self_attn.o_proj.weight"][1][1] % (4 * 128) == 0


def test_every_file_opens_and_holds_the_listed_tensors(small: Path) -> None:
    dtypes = {torch.float8_e4m3fn: "F8_E4M3", torch.bfloat16: "BF16", torch.float32: "F32"}
    found = {name: (dtypes[tensor.dtype], tuple(tensor.shape)) for name, tensor in read_tensors(small).items()}
    assert found == shapes(SMALL_V3)


def test_the_index_agrees_with_the_files(small: Path) -> None:
    names = {f"model-{number:05}-of-{FILES:05}.safetensors" for number in range(1, FILES + 1)}
    assert {path.name for path in small.glob("*.safetensors")} == names
    index = json.loads((small / INDEX).read_bytes())
    assert index["metadata"] == {"total_size": sum(map(compute_data_size, list_tensors(SMALL_V3)))}
    found = {}
    for name in names:
        with safe_open(small / name, framework="pt") as file:
            assert file.metadata() == {"format": "pt"}
            found.update(dict.fromkeys(file.keys(), name))
    assert index["weight_map"] == found


def test_every_cut_parts_a_scale_from_its_weight(small: Path) -> None:
    files = weight_map(small)
    scales = [name for name in files if name.endswith("_scale_inv")]
    assert sum(files[scale] != files[scale.removesuffix("_scale_inv")] for scale in scales) == FILES - 1


def test_the_files_are_about_equal(tmp_path: Path) -> None:
    write_checkpoint(tmp_path, DEEPSEEK_V2_LITE, 4, sparse=True)
    sizes = [path.stat().st_size for path in tmp_path.glob("*.safetensors")]
    assert max(sizes) < 1.01 * min(sizes)


def test_the_side_files_are_there(small: Path) -> None:
    assert json.loads((small / "config.json").read_bytes()) == SMALL_V3
    assert Tokenizer.from_file(str(small / "tokenizer.json")).encode("ab").tokens == ["ab"]
    assert json.loads((small / "tokenizer_config.json").read_bytes())["bos_token"]


def test_without_an_index_nothing_else_is_missing(tmp_path: Path) -> None:
    write_checkpoint(tmp_path / "with", TINY, 2)
    write_checkpoint(tmp_path / "without", TINY, 2, index=False)
    expected = file_bytes(tmp_path / "with")
    del expected[INDEX]
    assert file_bytes(tmp_path / "without") == expected


def test_the_data_are_ordinary_numbers(tmp_path: Path) -> None:
    write_checkpoint(tmp_path, TINY, 1)
    for name, tensor in read_tensors(tmp_path).items():
        values = tensor.float()
        assert torch.isfinite(values).all(), name
        if tensor.dtype != torch.float8_e4m3fn:
            assert (values.abs() < 0.01).all(), name
            assert (values != 0).all(), name
        if name.endswith("_scale_inv"):
            assert (values > 0.0004).all(), name


def test_no_sixteen_bytes_stand_twice(small: Path) -> None:
    pieces = []
    for tensor in read_tensors(small).values():
        data = tensor.view(torch.uint8).flatten().numpy()
        halves = data[: data.size // 16 * 16].view(np.uint64).reshape(-1, 2)
        pieces.append(halves[:, 0] * MIXER ^ halves[:, 1])
    found = np.sort(np.concatenate(pieces))
    assert (found[1:] != found[:-1]).all()


def test_equal_seeds_give_equal_bytes(tmp_path: Path) -> None:
    for name, seed in (("one", 1), ("again", 1), ("two", 2)):
        write_checkpoint(tmp_path / name, TINY, 2, seed=seed)
    assert file_bytes(tmp_path / "one") == file_bytes(tmp_path / "again")
    one, two = read_tensors(tmp_path / "one"), read_tensors(tmp_path / "two")
    assert not any(torch.equal(one[name].view(torch.uint8), two[name].view(torch.uint8)) for name in one)


def test_the_data_do_not_depend_on_the_files(tmp_path: Path) -> None:
    for files in (1, 7):
        write_checkpoint(tmp_path / str(files), TINY, files)
    one, seven = read_tensors(tmp_path / "1"), read_tensors(tmp_path / "7")
    assert one.keys() == seven.keys()
    assert all(torch.equal(one[name].view(torch.uint8), seven[name].view(torch.uint8)) for name in one)


def test_the_full_v3_is_written_as_holes(tmp_path: Path) -> None:
    write_checkpoint(tmp_path, DEEPSEEK_V3, V3_FILES, sparse=True)
    files = sorted(tmp_path.glob("*.safetensors"))
    assert len(files) == V3_FILES
    assert sum(map(file_data_size, files)) == V3_DATA_SIZE
    assert sum(path.stat().st_blocks * 512 for path in tmp_path.iterdir()) < 50e6
    with safe_open(tmp_path / weight_map(tmp_path)["lm_head.weight"], framework="pt") as file:
        assert not file.get_slice("lm_head.weight")[:10].any()


def test_a_folder_with_files_is_refused(tmp_path: Path) -> None:
    (tmp_path / "kept").write_bytes(b"kept")
    with pytest.raises(Refused, match="a folder that holds files"):
        write_checkpoint(tmp_path, TINY, 1)
    with pytest.raises(Refused, match="a file"):
        write_checkpoint(tmp_path / "kept", TINY, 1)
    assert file_bytes(tmp_path) == {"kept": b"kept"}


@pytest.mark.parametrize("files", [-1, 0, 10_000])
def test_an_impossible_number_of_files_is_refused(tmp_path: Path, files: int) -> None:
    with pytest.raises(Refused, match="wrong number of files"):
        write_checkpoint(tmp_path / "new", TINY, files)
    assert not (tmp_path / "new").exists()


@pytest.mark.parametrize("config", [TINY, {**TINY, "quantization_config": None}])
def test_as_many_files_as_can_be(tmp_path: Path, config: Mapping[str, Any]) -> None:
    cuts = sum(name.endswith("_scale_inv") for name in shapes(config)) or len(shapes(config)) - 1
    write_checkpoint(tmp_path, config, cuts + 1, sparse=True)
    assert len(set(weight_map(tmp_path).values())) == cuts + 1
    assert read_tensors(tmp_path).keys() == shapes(config).keys()


def test_the_import_stays_light() -> None:
    code = "import sys, reshard.synthetic; sys.exit('numpy' in sys.modules)"
    subprocess.run([sys.executable, "-c", code], check=True)
