"""The skeletons give the published counts and sizes of the real models, and they see what a wrong file has wrong."""

import json
import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import skeletons
import torch
from safetensors.torch import save_file
from skeletons import BF16, E8M0, F8, F32, FP4, I32, Args, Parameters
from skeletons_v4 import v4_0731_parameters, v4_parameters, v4_vision_parameters, v41_parameters

Skeleton = Callable[[Args, int, int], Parameters]

V3: dict[str, Any] = {
    "vocab_size": 129280,
    "dim": 7168,
    "inter_dim": 18432,
    "moe_inter_dim": 2048,
    "n_layers": 61,
    "n_dense_layers": 3,
    "n_heads": 128,
    "n_routed_experts": 256,
    "n_shared_experts": 1,
    "q_lora_rank": 1536,
    "kv_lora_rank": 512,
    "qk_nope_head_dim": 128,
    "qk_rope_head_dim": 64,
    "v_head_dim": 128,
    "dtype": "fp8",
}
V32 = V3 | {"index_n_heads": 64, "index_head_dim": 128}
KIMI_K2 = V3 | {"n_routed_experts": 384, "n_heads": 64, "n_dense_layers": 1, "vocab_size": 163840}
V2_LITE = V3 | {
    "vocab_size": 102400,
    "dim": 2048,
    "inter_dim": 10944,
    "moe_inter_dim": 1408,
    "n_layers": 27,
    "n_dense_layers": 1,
    "n_heads": 16,
    "n_routed_experts": 64,
    "n_shared_experts": 2,
    "q_lora_rank": 0,
    "dtype": "bf16",
}
FLASH: dict[str, Any] = {
    "vocab_size": 129280,
    "dim": 4096,
    "moe_inter_dim": 2048,
    "n_layers": 43,
    "n_hash_layers": 3,
    "n_mtp_layers": 1,
    "n_heads": 64,
    "n_routed_experts": 256,
    "n_activated_experts": 6,
    "q_lora_rank": 1024,
    "head_dim": 512,
    "o_groups": 8,
    "o_lora_rank": 1024,
    "compress_ratios": [0, 0, *[4, 128] * 20, 4, 0],
    "index_n_heads": 64,
    "index_head_dim": 128,
    "hc_mult": 4,
    "expert_dtype": "fp4",
}
FLASH_0731 = FLASH | {
    "n_mtp_layers": 3,
    "compress_ratios": [0, 0, *[4, 128] * 20, 4, 0, 0, 0],
    "dspark_markov_rank": 256,
    "dspark_target_layer_ids": [40, 41, 42],
}
PRO = FLASH | {
    "dim": 7168,
    "moe_inter_dim": 3072,
    "n_layers": 61,
    "n_heads": 128,
    "n_routed_experts": 384,
    "q_lora_rank": 1536,
    "o_groups": 16,
    "compress_ratios": [128, 128, *[4, 128] * 29, 4, 0],
}
VISION = {
    "vision_n_layers": 32,
    "vision_dim": 1024,
    "vision_inter_dim": 2816,
    "vision_patch_size": 14,
    "vision_downsample_ratio": 3,
}
V41 = (
    FLASH_0731
    | VISION
    | {
        "dim": 5120,
        "moe_inter_dim": 2304,
        "n_layers": 40,
        "n_routed_experts": 384,
        "dspark_n_routed_experts": 128,
        "q_lora_rank": 1280,
        "index_n_heads": 32,
        "compress_ratios": [0, 0, *[2] * 18, *[1] * 20, 0, 0, 0],
        "kv_source_layers": [2, 8, 14, 20],
        "index_source_layers": [2, 8, 14, 20, 24, 28, 32, 36],
        "engram_layer_ids": [1, 14],
        "engram_num_embeddings": [384006168, 384016682],
        "engram_head_dim": 256,
        "engram_n_heads": 8,
        "engram_max_ngram_size": 4,
    }
)
DTYPE_NAMES = {FP4: "F4", F8: "F8_E4M3", E8M0: "F8_E8M0", BF16: "BF16", F32: "F32", torch.int64: "I64"}


def stored(parameters: Parameters) -> Parameters:
    """Return the dtypes that files have where the models of the V4 line widen: norms, head, compressor, tid2eid."""
    wide = ("norm.weight", "norm1.weight", "norm2.weight", "head.weight", "markov_w2.weight", "proj.weight")
    compressor = ("wkv.weight", "wgate.weight")
    result = dict(parameters)
    for name, (shape, dtype) in parameters.items():
        if dtype == F32 and name.endswith(wide + compressor):
            result[name] = (shape, BF16)
        if dtype == I32:
            result[name] = (shape, torch.int64)
    return result


def data_bytes(parameters: Parameters) -> int:
    return sum(math.prod(shape) * dtype.itemsize for shape, dtype in parameters.values())


def file_bytes(parameters: Parameters) -> int:
    """Return the size of the file that `save_file` writes of these, with its header."""
    order = list(DTYPE_NAMES)
    header: dict[str, object] = {}
    end = 0
    for name in sorted(parameters, key=lambda name: (-order.index(parameters[name][1]), name)):
        shape, dtype = parameters[name]
        begin, end = end, end + math.prod(shape) * dtype.itemsize
        logical = [*shape[:-1], shape[-1] * 2] if dtype == FP4 else list(shape)
        header[name] = {"dtype": DTYPE_NAMES[dtype], "shape": logical, "data_offsets": [begin, end]}
    return 8 + -(-len(json.dumps(header, separators=(",", ":"))) // 8) * 8 + end


@pytest.mark.parametrize(
    ("ranks", "count", "size"),
    [
        (1, 90_427, 673_150_611_808),
        (2, 45_883, 337_144_622_688),
        (4, 23_611, 169_141_628_128),
        (8, 12_475, 85_140_130_848),
        (16, 6_907, 43_139_382_208),
    ],
)
def test_skeleton_of_v3_is_as_large_as_the_real_one(ranks: int, count: int, size: int) -> None:
    for rank in {0, ranks - 1}:
        parameters = skeletons.v3_parameters(V3, ranks, rank)
        assert (len(parameters), data_bytes(parameters)) == (count, size)


@pytest.mark.parametrize(("ranks", "size"), [(1, 31_412_968_448), (4, 7_906_319_360), (16, 2_029_657_088)])
def test_skeleton_of_v2_lite_is_as_large_as_the_real_one(ranks: int, size: int) -> None:
    assert data_bytes(skeletons.v3_parameters(V2_LITE, ranks, 0)) == size


@pytest.mark.parametrize(("ranks", "size"), [(8, 129_745_749_728), (16, 65_500_928_288)])
def test_skeleton_of_kimi_k2_is_as_large_as_the_real_one(ranks: int, size: int) -> None:
    assert data_bytes(skeletons.v3_parameters(KIMI_K2, ranks, ranks - 1)) == size


@pytest.mark.parametrize(("ranks", "count", "size"), [(8, 12_902, 86_021_900_672), (16, 7_334, 44_021_152_032)])
def test_skeleton_of_v32_is_as_large_as_the_real_one(ranks: int, count: int, size: int) -> None:
    parameters = skeletons.v32_parameters(V32, ranks, 0)
    narrow = {name for name in parameters if name.endswith((".weights_proj.weight", "head.weight"))}
    parameters |= {name: (parameters[name][0], BF16) for name in narrow}
    assert (len(parameters), data_bytes(parameters)) == (count, size)


@pytest.mark.parametrize(
    ("ranks", "expert_dtype", "count", "size"),
    [
        (1, "fp4", 69_143, 161_085_790_792),
        (2, "fp4", 35_351, 81_684_107_080),
        (4, "fp4", 18_455, 41_983_265_224),
        (8, "fp4", 10_007, 22_132_844_296),
        (4, None, 18_455, 75_206_478_280),
        (8, None, 10_007, 38_744_450_824),
    ],
)
def test_skeleton_of_v4_flash_is_as_large_as_the_real_one(
    ranks: int, expert_dtype: str | None, count: int, size: int
) -> None:
    parameters = stored(v4_parameters(FLASH | {"expert_dtype": expert_dtype}, ranks, ranks - 1))
    assert (len(parameters), data_bytes(parameters)) == (count, size)


@pytest.mark.parametrize(("ranks", "count", "size"), [(8, 20_062, 115_064_105_016), (16, 11_134, 61_221_163_352)])
def test_skeleton_of_v4_pro_is_as_large_as_the_real_one(ranks: int, count: int, size: int) -> None:
    parameters = stored(v4_parameters(PRO, ranks, 0))
    assert (len(parameters), data_bytes(parameters)) == (count, size)


def test_skeleton_of_0731_is_as_large_as_the_real_one() -> None:
    parameters = stored(v4_0731_parameters(FLASH_0731, 4, 0))
    assert (len(parameters), data_bytes(parameters)) == (19_279, 43_884_972_280)


def test_skeleton_of_v41_is_as_large_as_published_files() -> None:
    """The published conversion keeps the tables in files of their own, whose sizes include 456 bytes of header."""
    parameters = stored(v41_parameters(V41, 4, 0))
    tables = {name: parameters.pop(name) for name in list(parameters) if ".engram.embed." in name}
    assert data_bytes(tables) == 50_689_508_688 - 456
    assert (len(parameters), file_bytes(parameters)) == (25_190, 79_983_574_400)


@pytest.mark.parametrize(
    ("skeleton", "args", "count"),
    [
        (v4_parameters, FLASH, 69_187),
        (v4_0731_parameters, FLASH_0731, 72_317),
        (v4_vision_parameters, FLASH_0731 | VISION, 72_633),
        (v4_parameters, PRO, 145_116),
        (v41_parameters, V41, 96_085),
    ],
)
def test_a_source_has_as_many_tensors_as_the_real_one(skeleton: Skeleton, args: Args, count: int) -> None:
    """The source has what one rank has, and the scale of `wo_a` in each block, drafter blocks too."""
    assert len(skeleton(args, 1, 0)) + args["n_layers"] + args["n_mtp_layers"] == count


# --- the checks themselves ---

SMALL: Parameters = {"a.weight": ((2, 4), F8), "a.scale": ((1, 1), F32), "b.weight": ((3,), F32)}


def write(folder: Path, **changes: torch.Tensor) -> Path:
    """Write the tensors of SMALL with some in place of others; an empty one is left out."""
    tensors = {name: torch.zeros(shape, dtype=dtype) for name, (shape, dtype) in SMALL.items()}
    tensors |= {name.replace("_", "."): tensor for name, tensor in changes.items()}
    save_file({name: tensor for name, tensor in tensors.items() if tensor.numel()}, folder / "file.safetensors")
    return folder / "file.safetensors"


def test_a_right_file_has_no_differences_and_loads(tmp_path: Path) -> None:
    path = write(tmp_path, b_weight=torch.tensor([1, 2, 3], dtype=torch.bfloat16))
    assert skeletons.differences(SMALL, path) == []
    module = skeletons.load(SMALL, path, strict=True)
    assert module.get_parameter("b.weight").tolist() == [1, 2, 3]
    assert module.get_parameter("b.weight").dtype == F32


@pytest.mark.parametrize(
    ("name", "tensor", "line"),
    [
        ("a_scale", torch.empty(0), "missing a.scale"),
        ("c_weight", torch.zeros(2), "unexpected c.weight"),
        ("b_weight", torch.zeros(4), "b.weight is (4,), the model has (3,)"),
    ],
)
def test_a_wrong_file_is_seen_by_us_and_by_the_loader(
    name: str, tensor: torch.Tensor, line: str, tmp_path: Path
) -> None:
    path = write(tmp_path, **{name: tensor})
    assert skeletons.differences(SMALL, path) == [line]
    with pytest.raises(RuntimeError, match="loading state_dict"):
        skeletons.load(SMALL, path, strict=True)


def test_a_dtype_that_no_official_file_has_is_seen(tmp_path: Path) -> None:
    path = write(tmp_path, a_weight=torch.zeros(2, 4, dtype=torch.bfloat16))
    assert skeletons.differences(SMALL, path) == ["a.weight is torch.bfloat16, the model has torch.float8_e4m3fn"]


def test_the_loader_of_v4_does_not_see_a_missing_tensor(tmp_path: Path) -> None:
    """This is why `differences` exists."""
    path = write(tmp_path, a_scale=torch.empty(0))
    skeletons.load(SMALL, path, strict=False)
    assert skeletons.differences(SMALL, path) == ["missing a.scale"]
