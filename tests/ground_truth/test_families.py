"""The lists of `families` against published figures, and what is written of them against the safetensors package."""

import json
import re
from collections import Counter
from collections.abc import Iterable, Mapping
from functools import lru_cache
from itertools import accumulate
from math import prod
from pathlib import Path
from typing import Any

import pytest
import torch
from families import FAMILIES, Family, write_full, write_small
from safetensors import safe_open

from reshard.errors import Refused
from reshard.formats.safetensors import format_entry, format_header, make_order_key
from reshard.sources.checkpoints import read_checkpoint
from reshard.synthetic import TensorEntry, compute_data_size, write_tensors

DTYPES = {
    torch.bfloat16: "BF16",
    torch.float32: "F32",
    torch.float8_e4m3fn: "F8_E4M3",
    torch.float8_e8m0fnu: "F8_E8M0",
    torch.int8: "I8",
    torch.int64: "I64",
}
EXPERT = re.compile(r"\.experts\.(\d+)\.")
V3_CUTS = dict.fromkeys(("embed_tokens", "lm_head", "q_b_proj", "kv_b_proj", "gate_proj", "up_proj"), 0)
V3_CUTS |= {"o_proj": 1, "down_proj": 1}
V4_CUTS = dict.fromkeys(("embed", "head", "wq_b", "wo_a", "attn_sink", "weights_proj", "markov_w1", "markov_w2"), 0)
V4_CUTS |= {"wo_b": 1}
RANKS = {
    "deepseek-v3": 8,
    "deepseek-v3.2-exp": 8,
    "deepseek-v3.2": 8,
    "kimi-k2": 8,
    "glm-5.1": 8,
    "glm-5.1-fp8": 8,
    "glm-5.2": 8,
    "glm-5.2-fp8": 8,
    "deepseek-v4-flash": 4,
    "deepseek-v4-flash-0731": 8,
    "deepseek-v4-flash-vision": 8,
    "deepseek-v4-pro": 16,
    "deepseek-v4-pro-0813": 16,
    "deepseek-v4.1-flash": 8,
}
"""The most ranks for which the small checkpoint of a family can be cut without padding."""


@lru_cache(maxsize=2)
def full(name: str) -> list[TensorEntry]:
    return FAMILIES[name].tensors(FAMILIES[name].full)


def small(name: str) -> list[TensorEntry]:
    return FAMILIES[name].tensors(FAMILIES[name].small)


def shapes(tensors: Iterable[TensorEntry]) -> dict[str, tuple[str, tuple[int, ...]]]:
    return {name: (dtype, shape) for name, dtype, shape in tensors}


def elements(tensors: Iterable[TensorEntry]) -> Counter[str]:
    """Number of elements by dtype, the scales too."""
    found: Counter[str] = Counter()
    for _, dtype, shape in tensors:
        found[dtype] += prod(shape)
    return found


def kinds(tensors: Iterable[TensorEntry]) -> set[str]:
    """The names without their numbers; one expert stands for all."""
    found = (name for name, _, _ in tensors if ".experts." not in name or ".experts.0." in name)
    return {re.sub(r"\d+\.", "", name) for name in found}


def bytes_of(tensors: Iterable[TensorEntry]) -> int:
    return sum(map(compute_data_size, tensors))


def gibibytes(tensors: Iterable[TensorEntry]) -> str:
    return f"{bytes_of(tensors) / 2**30:.2f}"


def cut_of(name: str, cuts: Mapping[str, int]) -> int | None:
    """The dimension that DeepSeek's script cuts: it looks at the last part of a name but one, or at the last."""
    parts = name.removesuffix(".weight").removesuffix(".scale").removesuffix(".weight_scale_inv").split(".")
    return cuts.get(parts[-1])


def expert_count(config: Mapping[str, Any], name: str) -> int:
    config = config.get("text_config", config)
    key = "dspark_n_routed_experts" if name.startswith("mtp.") else "n_routed_experts"
    return int(config.get(key, config["n_routed_experts"]))


def first_rank(family: Family, tensors: Iterable[TensorEntry], ranks: int, *, fp8: bool = False) -> list[TensorEntry]:
    """What DeepSeek's scripts put into the file of rank 0 of `ranks`, under the names of the source; by loops."""
    cuts = V3_CUTS if "kv_lora_rank" in family.full else V4_CUTS
    found = []
    for name, dtype, shape in tensors:
        if expert := EXPERT.search(name):
            if int(expert[1]) < expert_count(family.full, name) // ranks:
                found.append(unpacked(name, dtype, shape, fp8=fp8) if cuts is V4_CUTS else (name, dtype, shape))
        elif ".engram.embed." in name:
            found.append((name, dtype, (-(-shape[0] // ranks), shape[1])))
        elif not name.endswith(".wo_a.scale"):
            cut = cut_of(name, cuts)
            assert cut is None or shape[cut] % ranks == 0, name
            local = tuple(size // ranks if cut == i else size for i, size in enumerate(shape))
            found.append((name, "BF16" if name.endswith(".wo_a.weight") else dtype, local))
    return found


def unpacked(name: str, dtype: str, shape: tuple[int, ...], *, fp8: bool) -> TensorEntry:
    """A packed weight counted by its values, or as FP8; that has a scale for each block of 128, not for 32 of a row."""
    rows, columns = shape
    if dtype == "I8":
        return name, "F8_E4M3" if fp8 else "F4", (rows, 2 * columns)
    return name, dtype, (rows // 128, columns // 4) if fp8 else shape


def file_size(tensors: Iterable[TensorEntry]) -> int:
    """In bytes, of a file that safetensors writes without metadata."""
    ordered = sorted(tensors, key=lambda tensor: make_order_key(tensor[0], tensor[1]))
    ends = list(accumulate(map(compute_data_size, ordered), initial=0))
    entries = [f"{format_entry(*tensor)}{ends[i]},{ends[i + 1]}]}}" for i, tensor in enumerate(ordered)]
    return len(format_header(entries)) + ends[-1]


def read_tensors(folder: Path) -> dict[str, torch.Tensor]:
    found = {}
    for path in folder.glob("*.safetensors"):
        with safe_open(path, framework="pt") as file:
            found.update({name: file.get_tensor(name) for name in file.keys()})  # noqa: SIM118 - not a mapping
    return found


@pytest.fixture(scope="module", params=FAMILIES)
def written(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> tuple[str, Path]:
    name = str(request.param)
    folder = tmp_path_factory.mktemp("families") / name
    write_small(folder, name)
    return name, folder


@pytest.mark.parametrize(
    ("name", "tensor_count", "element_count", "size"),
    [
        ("deepseek-v3", 91_991, 684_531_386_000, 688_574_839_360),
        ("deepseek-v3.2", 92_425, 685_396_921_376, 689_471_107_200),
        ("kimi-k2", 139_644, 1_026_470_731_056, 1_029_173_256_720),
        ("deepseek-v4-flash", 69_187, 158_069_433_298, 159_609_485_896),
        ("deepseek-v4-flash-0731", 72_317, 165_265_454_782, 166_878_536_440),
        ("deepseek-v4-flash-vision", 72_633, 165_731_860_414, 167_811_372_792),
        ("deepseek-v4-pro", 145_116, 861_608_274_846, 864_704_792_696),
        ("deepseek-v4-pro-0813", 149_782, 889_484_881_098, 892_727_580_904),
        ("deepseek-v4.1-flash", 96_085, 508_182_659_298, 510_286_023_000),
    ],
)
def test_tensors_elements_and_bytes_are_the_published_totals(
    name: str, tensor_count: int, element_count: int, size: int
) -> None:
    tensors = full(name)
    assert len(shapes(tensors)) == len(tensors) == tensor_count
    assert elements(tensors).total() == element_count
    assert bytes_of(tensors) == size


@pytest.mark.parametrize(
    ("name", "tensor_count", "element_count", "size"),
    [
        ("glm-5.1", 59_870, 753_864_139_008, "1404.18"),
        ("glm-5.1-fp8", 119_028, 753_910_024_032, "704.23"),
        ("glm-5.2", 59_585, 753_329_940_480, "1403.19"),
        ("glm-5.2-fp8", 118_629, 753_375_793_584, "703.72"),
    ],
)
def test_glm_has_the_published_totals_its_size_known_in_gibibytes(
    name: str, tensor_count: int, element_count: int, size: str
) -> None:
    tensors = full(name)
    assert len(shapes(tensors)) == len(tensors) == tensor_count
    assert elements(tensors).total() == element_count
    assert gibibytes(tensors) == size


def test_glm_52_has_the_published_bytes_and_an_indexer_in_22_layers() -> None:
    assert bytes_of(full("glm-5.2")) == 1_506_659_919_872
    layers = {int(name.split(".")[2]) for name, _, _ in full("glm-5.2") if ".indexer." in name}
    assert layers == {0, 1, 2, *range(6, 78, 4), 78}


@pytest.mark.parametrize(
    ("name", "counts", "total"),
    [
        ("deepseek-v4-flash-0731", {"BF16": 1_483_567_488, "F8_E4M3": 6_304_038_912}, 304_180_418_494),
        ("deepseek-v4-flash-vision", {}, 304_646_824_126),
        (
            "deepseek-v4-pro-0813",
            {"BF16": 2_954_820_352, "F8_E4M3": 23_952_621_568, "I8": 1_623_497_637_888},
            1_650_497_936_906,
        ),
    ],
)
def test_the_hub_counts_as_many_parameters(name: str, counts: Mapping[str, int], total: int) -> None:
    """It counts two values for each packed byte, and no scales."""
    found = elements(full(name))
    found["I8"] *= 2
    del found["F8_E8M0"]
    assert found.total() == total
    assert {dtype: found[dtype] for dtype in counts} == counts


def test_v32_exp_has_the_published_number_of_tensors_and_elements() -> None:
    """Its bytes are not published; that its norms are BF16 is assumed."""
    tensors = full("deepseek-v3.2-exp")
    assert len(shapes(tensors)) == len(tensors) == 92_425
    assert elements(tensors).total() == 685_396_921_376


def test_v4_flash_has_the_published_number_of_tensors_of_each_dtype() -> None:
    found = Counter(dtype for _, dtype, _ in full("deepseek-v4-flash"))
    assert found == {"BF16": 433, "F32": 417, "F8_E4M3": 375, "F8_E8M0": 34_167, "I64": 3, "I8": 33_792}


def test_the_three_drafting_blocks_of_v4_flash_0731_have_the_published_numbers_of_tensors() -> None:
    found = Counter(name[:5] for name, _, _ in full("deepseek-v4-flash-0731") if name.startswith("mtp."))
    assert found == {"mtp.0": 1_568, "mtp.1": 1_565, "mtp.2": 1_572}


def test_the_parts_of_vision_exp_have_the_published_numbers_of_tensors() -> None:
    """The hash layers have both biases too."""
    names = [name for name, _, _ in full("deepseek-v4-flash-vision")]
    blocks = Counter(name[:5] for name in names if name.startswith("mtp."))
    assert blocks == {"mtp.0": 1_569, "mtp.1": 1_566, "mtp.2": 1_573}
    assert Counter(name.split(".")[0] for name in names if re.match("vision|aligner|image", name)) == {
        "vision": 259,
        "aligner": 4,
        **dict.fromkeys(("image_start", "image_end", "image_newline", "image_pad"), 1),
    }
    assert sum(name.endswith(".bias_vl") for name in names) == 43 + 3
    assert sum(name.endswith("ffn.gate.bias") for name in names) == 43 + 3
    assert sum(dtype == "F8_E4M3" for _, dtype, _ in full("deepseek-v4-flash-vision")) == 390


def test_v41_has_the_published_number_of_elements_of_each_dtype() -> None:
    assert elements(full("deepseek-v4.1-flash")) == {
        "I8": 278_585_671_680,
        "F8_E4M3": 204_015_223_296,
        "F8_E8M0": 23_563_015_184,
        "BF16": 1_976_441_856,
        "F32": 42_307_282,
    }


def test_the_parts_of_v41_have_the_published_tensors_and_bytes() -> None:
    parts: dict[str, list[TensorEntry]] = {}
    for tensor in full("deepseek-v4.1-flash"):
        first = tensor[0].split(".")[0]
        part = "images" if first.startswith(("vision", "aligner", "image_")) else first if first == "mtp" else "text"
        parts.setdefault("engram" if ".engram." in tensor[0] else part, []).append(tensor)
    assert {part: bytes_of(tensors) for part, tensors in parts.items()} == {
        "text": 298_309_535_168,
        "engram": 203_073_076_240,
        "mtp": 7_932_874_632,
        "images": 970_536_960,
    }
    assert (len(parts["mtp"]), len(parts["images"]), len(parts["engram"])) == (2_401, 266, 12)
    assert sum(compute_data_size(tensor) for tensor in full("deepseek-v4.1-flash") if EXPERT.search(tensor[0])) == (
        295_997_276_160
    )


@pytest.mark.parametrize(
    ("family", "name", "dtype", "shape"),
    [
        ("deepseek-v3.2", "model.layers.0.self_attn.indexer.wq_b.weight", "F8_E4M3", (8192, 1536)),
        ("deepseek-v3.2", "model.layers.61.self_attn.indexer.wk.weight_scale_inv", "F32", (1, 56)),
        ("deepseek-v3.2", "model.layers.61.self_attn.indexer.k_norm.bias", "F32", (128,)),
        ("deepseek-v3.2", "model.layers.60.self_attn.indexer.weights_proj.weight", "BF16", (64, 7168)),
        ("deepseek-v3.2", "model.layers.61.shared_head.norm.weight", "F32", (7168,)),
        ("deepseek-v3.2", "model.layers.61.enorm.weight", "F32", (7168,)),
        ("deepseek-v3.2", "model.layers.0.input_layernorm.weight", "F32", (7168,)),
        ("deepseek-v3.2-exp", "model.layers.0.input_layernorm.weight", "BF16", (7168,)),
        ("deepseek-v3.2-exp", "model.layers.0.self_attn.indexer.k_norm.weight", "F32", (128,)),
        ("kimi-k2", "model.layers.60.self_attn.rotary_emb.inv_freq", "BF16", (56,)),
        ("kimi-k2", "model.layers.1.mlp.experts.383.down_proj.weight_scale_inv", "F32", (56, 16)),
        ("glm-5.1-fp8", "model.layers.78.eh_proj.weight", "BF16", (6144, 12288)),
        ("glm-5.1-fp8", "model.layers.78.self_attn.indexer.k_norm.weight", "BF16", (128,)),
        ("glm-5.1-fp8", "model.layers.61.self_attn.kv_b_proj.weight", "F8_E4M3", (28672, 512)),
        ("glm-5.2-fp8", "model.layers.74.self_attn.indexer.wq_b.weight_scale_inv", "F32", (32, 16)),
        ("glm-5.2-fp8", "model.layers.78.self_attn.indexer.wk.weight", "F8_E4M3", (128, 6144)),
        ("deepseek-v4-flash", "layers.2.attn.compressor.ape", "F32", (4, 1024)),
        ("deepseek-v4-flash", "layers.3.attn.compressor.ape", "F32", (128, 512)),
        ("deepseek-v4-flash", "layers.2.attn.indexer.compressor.wgate.weight", "BF16", (256, 4096)),
        ("deepseek-v4-flash", "layers.2.ffn.gate.tid2eid", "I64", (129280, 6)),
        ("deepseek-v4-flash", "layers.0.attn.wo_a.scale", "F8_E8M0", (64, 32)),
        ("deepseek-v4-flash", "layers.0.hc_attn_fn", "F32", (24, 16384)),
        ("deepseek-v4-flash", "mtp.0.e_proj.scale", "F8_E8M0", (32, 32)),
        ("deepseek-v4-flash", "mtp.0.ffn.gate.bias", "F32", (256,)),
        ("deepseek-v4-flash-0731", "mtp.0.main_proj.scale", "F8_E8M0", (32, 96)),
        ("deepseek-v4-flash-0731", "mtp.2.confidence_head.proj.weight", "BF16", (1, 4352)),
        ("deepseek-v4-flash-0731", "mtp.2.markov_head.markov_w2.weight", "BF16", (129280, 256)),
        ("deepseek-v4-flash-vision", "vision.patch_embed.proj.weight", "BF16", (1024, 588)),
        ("deepseek-v4-flash-vision", "aligner.w1.weight", "BF16", (4096, 9216)),
        ("deepseek-v4-flash-vision", "image_pad", "BF16", (4096,)),
        ("deepseek-v4-flash-vision", "layers.0.ffn.gate.bias", "F32", (256,)),
        ("deepseek-v4-flash-vision", "mtp.2.ffn.gate.bias_vl", "F32", (256,)),
        ("deepseek-v4-pro", "layers.60.ffn.experts.383.w2.weight", "I8", (7168, 1536)),
        ("deepseek-v4-pro", "layers.60.ffn.experts.383.w1.scale", "F8_E8M0", (3072, 224)),
        ("deepseek-v4-pro", "layers.0.attn.compressor.ape", "F32", (128, 512)),
        ("deepseek-v4.1-flash", "layers.14.engram.embed.weight", "F8_E4M3", (384016682, 256)),
        ("deepseek-v4.1-flash", "layers.14.engram.embed.scale", "F8_E8M0", (384016682, 8)),
        ("deepseek-v4.1-flash", "layers.1.engram.wkv.scale", "F8_E8M0", (800, 192)),
        ("deepseek-v4.1-flash", "layers.20.attn.indexer.wk.weight", "BF16", (128, 512)),
        ("deepseek-v4.1-flash", "layers.36.attn.indexer.wq_b.scale", "F8_E8M0", (128, 40)),
        ("deepseek-v4.1-flash", "mtp.2.markov_head.head.weight", "BF16", (129280, 256)),
        ("deepseek-v4.1-flash", "mtp.0.ffn.experts.127.w1.weight", "I8", (2304, 2560)),
        ("deepseek-v4.1-flash", "vision.blocks.31.mlp.w1.weight", "BF16", (5632, 1024)),
        ("deepseek-v4.1-flash", "aligner.w1.weight", "BF16", (5120, 9216)),
    ],
)
def test_a_tensor_has_the_published_shape(family: str, name: str, dtype: str, shape: tuple[int, ...]) -> None:
    assert shapes(full(family))[name] == (dtype, shape)


@pytest.mark.parametrize(
    ("family", "name"),
    [
        ("kimi-k2", "model.layers.61.eh_proj.weight"),
        ("glm-5.1-fp8", "model.layers.78.embed_tokens.weight"),
        ("glm-5.1-fp8", "model.layers.78.shared_head.head.weight"),
        ("glm-5.2", "model.layers.3.self_attn.indexer.wk.weight"),
        ("glm-5.2-fp8", "model.layers.77.self_attn.indexer.wq_b.weight_scale_inv"),
        ("deepseek-v4-flash", "layers.3.ffn.gate.tid2eid"),
        ("deepseek-v4-flash", "layers.2.ffn.gate.bias"),
        ("deepseek-v4-flash", "layers.0.attn.compressor.ape"),
        ("deepseek-v4-flash", "layers.3.attn.indexer.wq_b.weight"),
        ("deepseek-v4-flash", "mtp.0.attn.compressor.ape"),
        ("deepseek-v4-flash-0731", "mtp.0.e_proj.weight"),
        ("deepseek-v4-flash-0731", "mtp.0.norm.weight"),
        ("deepseek-v4.1-flash", "layers.20.attn.compressor.wgate.weight"),
        ("deepseek-v4.1-flash", "layers.24.attn.indexer.wk.weight"),
        ("deepseek-v4.1-flash", "layers.3.attn.compressor.wkv.weight"),
        ("deepseek-v4.1-flash", "hc_head_fn"),
    ],
)
def test_a_tensor_that_the_published_list_lacks_is_not_there(family: str, name: str) -> None:
    assert name not in shapes(full(family))


@pytest.mark.parametrize(
    ("name", "dropped", "ranks", "tensor_count", "size"),
    [
        ("deepseek-v3", ".layers.61.", 1, 90_427, 673_150_611_808),
        ("deepseek-v3", ".layers.61.", 2, 45_883, 337_144_622_688),
        ("deepseek-v3", ".layers.61.", 4, 23_611, 169_141_628_128),
        ("deepseek-v3", ".layers.61.", 8, 12_475, 85_140_130_848),
        ("deepseek-v3", ".layers.61.", 16, 6_907, 43_139_382_208),
        ("deepseek-v3.2", ".layers.61.", 8, 12_902, 86_021_900_672),
        ("deepseek-v3.2", ".layers.61.", 16, 7_334, 44_021_152_032),
        ("kimi-k2", ".rotary_emb.", 8, None, 129_745_749_728),
        ("kimi-k2", ".rotary_emb.", 16, None, 65_500_928_288),
        ("deepseek-v4-flash", "-", 1, 69_143, 161_085_790_792),
        ("deepseek-v4-flash", "-", 2, 35_351, 81_684_107_080),
        ("deepseek-v4-flash", "-", 4, 18_455, 41_983_265_224),
        ("deepseek-v4-flash", "-", 8, 10_007, 22_132_844_296),
        ("deepseek-v4-flash-0731", "-", 4, 19_279, 43_884_972_280),
        ("deepseek-v4-pro", "-", 8, 20_062, 115_064_105_016),
        ("deepseek-v4-pro", "-", 16, 11_134, 61_221_163_352),
    ],
)
def test_a_rank_of_the_script_gets_the_figures_derived_before(
    name: str, dropped: str, ranks: int, tensor_count: int | None, size: int
) -> None:
    """They were derived by hand from the rules of DeepSeek's scripts, not published."""
    kept = [tensor for tensor in full(name) if dropped not in tensor[0]]
    found = first_rank(FAMILIES[name], kept, ranks)
    assert bytes_of(found) == size
    assert tensor_count in {None, len(found)}


@pytest.mark.parametrize(("ranks", "size"), [(4, 75_206_478_280), (8, 38_744_450_824)])
def test_a_rank_of_v4_flash_with_fp8_experts_gets_the_bytes_derived_before(ranks: int, size: int) -> None:
    name = "deepseek-v4-flash"
    assert bytes_of(first_rank(FAMILIES[name], full(name), ranks, fp8=True)) == size


def test_the_files_of_v41_for_four_ranks_have_the_published_sizes() -> None:
    """To the byte, with the headers: so the names are as long as the true ones, the guessed ones of vision too."""
    name = "deepseek-v4.1-flash"
    found = first_rank(FAMILIES[name], full(name), 4)
    tables = [tensor for tensor in found if ".engram.embed." in tensor[0]]
    others = [tensor for tensor in found if ".engram.embed." not in tensor[0]]
    assert len(others) == 25_190
    assert (file_size(others), file_size(tables)) == (79_983_574_400, 50_689_508_688)


def test_a_small_checkpoint_loads_as_listed(written: tuple[str, Path]) -> None:
    name, folder = written
    found = {key: (DTYPES[tensor.dtype], tuple(tensor.shape)) for key, tensor in read_tensors(folder).items()}
    assert found == shapes(small(name))
    assert json.loads((folder / "config.json").read_bytes()) == FAMILIES[name].small


def test_a_small_checkpoint_is_small_and_spread_over_four_files(written: tuple[str, Path]) -> None:
    _, folder = written
    sizes = [path.stat().st_size for path in folder.glob("*.safetensors")]
    assert len(sizes) == 4
    assert sum(sizes) < 15_000_000


def test_some_scales_lie_in_other_files_than_their_weights(written: tuple[str, Path]) -> None:
    name, folder = written
    files = json.loads((folder / "model.safetensors.index.json").read_bytes())["weight_map"]
    pairs = {key: key.removesuffix("_scale_inv") for key in files if key.endswith("_scale_inv")}
    pairs |= {key: key.removesuffix("scale") + "weight" for key in files if key.endswith(".scale")}
    assert sum(files[scale] != files[weight] for scale, weight in pairs.items()) == (
        0 if name in {"glm-5.1", "glm-5.2"} else 3
    )


def test_the_values_are_ordinary(written: tuple[str, Path]) -> None:
    name, folder = written
    parts: dict[str, list[torch.Tensor]] = {}
    for tensor in read_tensors(folder).values():
        parts.setdefault(DTYPES[tensor.dtype], []).append(tensor.flatten())
    values = {dtype: torch.cat(tensors) for dtype, tensors in parts.items()}
    for dtype in values.keys() & {"BF16", "F32", "F8_E4M3"}:
        assert torch.isfinite(values[dtype].float()).all()
    if "I8" in values:
        exponents = values["F8_E8M0"].view(torch.uint8)
        assert (int(exponents.min()), int(exponents.max())) == (112, 119)
        assert torch.bincount(values["I8"].view(torch.uint8).int(), minlength=256).all()
    if "I64" in values:
        assert values["I64"].min() == 0
        assert values["I64"].max() < expert_count(FAMILIES[name].small, "layers.0")


def test_a_small_checkpoint_has_what_sorts_wrongly() -> None:
    for name in FAMILIES.keys() - {"deepseek-v3-for-32"}:
        numbers = {int(found[1]) for key, _, _ in small(name) if (found := EXPERT.search(key))}
        assert {2, 10} <= numbers, name
        layers = {int(found[1]) for key, _, _ in small(name) if (found := re.search(r"layers\.(\d+)\.", key))}
        assert {2, 10} <= layers or name.startswith(("deepseek-v4-flash-", "deepseek-v4-pro")), name


def test_a_small_checkpoint_has_every_kind_of_tensor_that_the_full_one_has() -> None:
    for name in FAMILIES.keys() - {"deepseek-v3-for-32"}:
        assert kinds(small(name)) == kinds(full(name)), name


@pytest.mark.parametrize("name", RANKS)
def test_a_small_checkpoint_can_be_cut_between_blocks(name: str) -> None:
    config = FAMILIES[name].small
    block = config.get("quantization_config", {"weight_block_size": [1]})["weight_block_size"][0]
    tensors = small(name)
    cuts = V3_CUTS if "kv_lora_rank" in config else V4_CUTS
    for key, dtype, shape in tensors:
        cut = cut_of(key, cuts)
        if EXPERT.search(key):
            assert expert_count(config, key) % RANKS[name] == 0
        elif cut is not None and ".engram.embed." not in key:
            unit = RANKS[name] * (block if dtype == "F8_E4M3" and key.endswith(".weight") else 1)
            assert shape[cut] % unit == 0, key


def test_a_thirty_second_of_the_wide_small_v3_ends_inside_blocks_as_in_the_full_one() -> None:
    found = shapes(small("deepseek-v3-for-32"))
    expected = shapes(full("deepseek-v3"))
    for layer, kind in ((0, "mlp.gate_proj"), (1, "mlp.shared_experts.up_proj")):
        key = f"model.layers.{layer}.{kind}.weight"
        assert found[key][1][0] == expected[key.replace("layers.1", "layers.3")][1][0]
    assert found["model.layers.0.mlp.gate_proj.weight"][1][0] / 32 / 128 == 4.5
    assert found["model.layers.1.mlp.shared_experts.up_proj.weight"][1][0] / 32 / 128 == 0.5


@pytest.mark.parametrize("name", ["deepseek-v3.2", "deepseek-v4-pro", "deepseek-v4.1-flash"])
def test_a_full_checkpoint_is_written_as_holes_and_read_back(tmp_path: Path, name: str) -> None:
    write_full(tmp_path, name)
    assert sum(path.stat().st_blocks * 512 for path in tmp_path.iterdir()) < 60e6
    checkpoint = read_checkpoint(tmp_path)
    assert len(checkpoint.files) == FAMILIES[name].files
    found = {tensor.name: (tensor.dtype, tensor.shape) for tensor in checkpoint.tensors.values()}
    assert found == shapes(full(name))
    assert checkpoint.config == FAMILIES[name].full


def test_a_checkpoint_can_be_one_file_without_an_index(tmp_path: Path) -> None:
    write_small(tmp_path, "deepseek-v4-pro", files=1, index=False)
    assert [path.name for path in tmp_path.glob("model*")] == ["model-00001-of-00001.safetensors"]
    assert read_checkpoint(tmp_path).tensors.keys() == shapes(small("deepseek-v4-pro")).keys()


def test_an_impossible_number_of_files_is_refused(tmp_path: Path) -> None:
    with pytest.raises(Refused, match="wrong number of files"):
        write_tensors(tmp_path / "new", small("deepseek-v4-pro"), {}, 100_000)
