"""The oracles of the V4 line, against the skeletons of their models and expectations worked out by hand."""

import functools
import json
from collections.abc import Callable
from pathlib import Path

import handmade
import oracle_casts
import oracle_families
import pytest
import skeletons
import torch
from handmade import V4, V4_0731, V41, VISION, is_same, read, read_ranks
from safetensors.torch import load_file
from skeletons import Args, Parameters
from skeletons_v4 import v4_0731_parameters, v4_parameters, v4_vision_parameters, v41_parameters

Skeleton = Callable[[Args, int, int], Parameters]
Converter = Callable[..., None]
Convert = Callable[..., Path]
FAMILIES: dict[str, tuple[Converter, Skeleton, Args]] = {
    "v4": (oracle_families.convert_v4, v4_parameters, V4),
    "v4-0731": (oracle_families.convert_v4_0731, v4_0731_parameters, V4_0731),
    "v4-vision": (oracle_families.convert_v4_0731, v4_vision_parameters, V4_0731 | VISION),
    "v41": (oracle_families.convert_v41, v41_parameters, V41),
}


@pytest.fixture(scope="session")
def folders(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """A tiny checkpoint of each release."""
    root = tmp_path_factory.mktemp("v4")
    for name, (_, skeleton, args) in FAMILIES.items():
        torch.manual_seed(len(name))
        handmade.write_v4(root / name, skeleton(args, 1, 0), 32 if name == "v41" else 128)
    return {name: root / name for name in FAMILIES}


@pytest.fixture(scope="session")
def convert(folders: dict[str, Path], tmp_path_factory: pytest.TempPathFactory) -> Convert:
    """A function that gives the folder of rank files of a release, made once for each set of arguments."""

    @functools.cache
    def run(name: str, ranks: int, expert_dtype: str = "fp4") -> Path:
        target = tmp_path_factory.mktemp(f"{name}-{ranks}-{expert_dtype}")
        FAMILIES[name][0](folders[name], target, ranks, expert_dtype=expert_dtype)
        return target

    return run


# --- what the models load ---


@pytest.mark.parametrize(
    ("name", "ranks", "expert_dtype"),
    [
        *(("v4", ranks, dtype) for ranks in (1, 2, 8) for dtype in ("fp4", "fp8")),
        *(("v41", ranks, dtype) for ranks in (1, 4, 8) for dtype in ("fp4", "fp8")),
        *((name, ranks, "fp4") for ranks in (1, 4) for name in ("v4-0731", "v4-vision")),
    ],
)
def test_rank_files_are_what_the_model_allocates(name: str, ranks: int, expert_dtype: str, convert: Convert) -> None:
    folder = convert(name, ranks, expert_dtype)
    _, skeleton, args = FAMILIES[name]
    for rank in range(ranks):
        parameters = skeleton({**args, "expert_dtype": expert_dtype}, ranks, rank)
        path = folder / f"model{rank}-mp{ranks}.safetensors"
        assert skeletons.differences(parameters, path) == []
        module = skeletons.load(parameters, path, strict=True)
        wide = load_file(path)["layers.1.attn.kv_norm.weight"].float()
        assert torch.equal(module.get_parameter("layers.1.attn.kv_norm.weight").float(), wide)


def test_converter_of_april_would_leave_the_bigram_head_whole(folders: dict[str, Path], tmp_path: Path) -> None:
    oracle_families.convert_v4(folders["v4-0731"], tmp_path, 2)
    lines = skeletons.differences(v4_0731_parameters(V4_0731, 2, 0), tmp_path / "model0-mp2.safetensors")
    assert [line.split(" ")[0] for line in lines] == [f"mtp.2.markov_head.markov_w{i}.weight" for i in (1, 2)]


# --- cuts ---


def test_tensors_of_v4_are_cut_by_hand(convert: Convert, folders: dict[str, Path]) -> None:
    """Two ranks: the second one has the second half of each of these."""
    source = read(folders["v4"])
    _, share = read_ranks(convert("v4", 2), 2)
    wanted = {
        "embed.weight": source["embed.weight"][32:],
        "head.weight": source["head.weight"][32:],
        "layers.2.attn.attn_sink": source["layers.2.attn.attn_sink"][4:],
        "layers.2.attn.wq_b.weight": source["layers.2.attn.wq_b.weight"][512:],
        "layers.2.attn.wq_b.scale": source["layers.2.attn.wq_b.scale"][4:],
        "layers.2.attn.wo_b.weight": source["layers.2.attn.wo_b.weight"][:, 512:],
        "layers.2.attn.wo_b.scale": source["layers.2.attn.wo_b.scale"][:, 4:],
        "mtp.0.attn.wo_b.weight": source["mtp.0.attn.wo_b.weight"][:, 512:],
        "layers.1.attn.indexer.wq_b.weight": source["layers.1.attn.indexer.wq_b.weight"][128:],
        "layers.1.attn.indexer.wq_b.scale": source["layers.1.attn.indexer.wq_b.scale"][1:],
        "layers.1.attn.indexer.weights_proj.weight": source["layers.1.attn.indexer.weights_proj.weight"][4:],
    }
    for name, tensor in wanted.items():
        assert is_same(share[name], tensor), name
    whole = {name for name in share if name in source and share[name].shape == source[name].shape}
    for part in ("shared_experts.w1.weight", "shared_experts.w2.scale", "gate.weight", "gate.bias"):
        assert f"layers.3.ffn.{part}" in whole
    for name in ("layers.0.ffn.gate.tid2eid", "layers.1.attn.compressor.ape", "hc_head_fn", "mtp.0.e_proj.scale"):
        assert is_same(share[name], source[name]), name


def test_stored_dtypes_stay(convert: Convert) -> None:
    """The model widens these when it loads them; the file does not."""
    share = read_ranks(convert("v4", 4), 4)[2]
    assert share["layers.0.ffn.gate.tid2eid"].dtype == torch.int64
    for name in ("norm.weight", "head.weight", "layers.1.attn.compressor.wkv.weight"):
        assert share[name].dtype == torch.bfloat16, name


def test_output_a_is_the_rounded_product_of_float64_without_scale(convert: Convert, folders: dict[str, Path]) -> None:
    source = read(folders["v41"])
    for rank, share in enumerate(read_ranks(convert("v41", 4), 4)):
        for block in ("layers.3", "mtp.1"):
            codes, scale = source[f"{block}.attn.wo_a.weight"].double(), source[f"{block}.attn.wo_a.scale"].double()
            rows, columns = (torch.arange(size) // 32 for size in codes.shape)
            exact = (codes * scale[rows][:, columns])[rank * 256 : (rank + 1) * 256]
            assert is_same(share[f"{block}.attn.wo_a.weight"], exact.bfloat16())
            assert torch.equal(share[f"{block}.attn.wo_a.weight"].double(), exact)
            assert f"{block}.attn.wo_a.scale" not in share


@pytest.mark.parametrize(
    ("name", "expert", "holder"),
    [("layers.1", 2, 0), ("layers.1", 10, 2), ("mtp.1", 2, 1), ("layers.3", 15, 3), ("mtp.2", 7, 3)],
)
def test_experts_are_dealt_by_number_apart_in_backbone_and_drafter(
    name: str, expert: int, holder: int, convert: Convert, folders: dict[str, Path]
) -> None:
    """Four ranks of 16 experts in the backbone, four a rank, and of 8 in the drafter of V4.1, two a rank."""
    shares = read_ranks(convert("v41", 4), 4)
    key = f"{name}.ffn.experts.{expert}.w2"
    assert [rank for rank, share in enumerate(shares) if f"{key}.weight" in share] == [holder]
    assert [rank for rank, share in enumerate(shares) if f"{key}.scale" in share] == [holder]
    assert is_same(shares[holder][f"{key}.weight"].view(torch.int8), read(folders["v41"])[f"{key}.weight"])


def test_embedding_and_head_of_the_drafter_are_dropped_by_their_whole_names(
    convert: Convert, folders: dict[str, Path], tmp_path: Path
) -> None:
    more = {f"mtp.{stage}.{part}.weight": torch.zeros(2, 2) for stage in (0, 11) for part in ("embed", "head")}
    handmade.write(tmp_path / "source", read(folders["v41"]) | more)
    oracle_families.convert_v41(tmp_path / "source", tmp_path / "out", 2)
    _, share = read_ranks(tmp_path / "out", 2)
    assert share.keys() == read_ranks(convert("v41", 2), 2)[1].keys()
    for part in ("embed", "head"):
        whole = read(folders["v41"])[f"mtp.2.markov_head.{part}.weight"]
        assert is_same(share[f"mtp.2.markov_head.{part}.weight"], whole[32:])


# --- engram tables and vision ---


def test_engram_rows_are_dealt_and_the_tail_is_padded(convert: Convert, folders: dict[str, Path]) -> None:
    """13 rows on 4 ranks are 4, 4, 4 and 1; three rows of zeros with the scale one follow."""
    weight, scale = (read(folders["v41"])[f"layers.1.engram.embed.{part}"] for part in ("weight", "scale"))
    shares = read_ranks(convert("v41", 4), 4)
    for rank in range(3):
        assert is_same(shares[rank]["layers.1.engram.embed.weight"], weight[rank * 4 : rank * 4 + 4])
        assert is_same(shares[rank]["layers.1.engram.embed.scale"], scale[rank * 4 : rank * 4 + 4])
    last_weight, last_scale = (shares[3][f"layers.1.engram.embed.{part}"] for part in ("weight", "scale"))
    assert is_same(last_weight[:1], weight[12:])
    assert last_weight[1:].view(torch.uint8).tolist() == [[0] * 64] * 3
    assert is_same(last_scale[:1], scale[12:])
    assert last_scale[1:].view(torch.uint8).tolist() == [[127] * 2] * 3


def test_a_rank_past_the_end_of_a_table_has_padding_only() -> None:
    """5 rows on 4 ranks are 2, 2, 1 and none."""
    table = torch.arange(1.0, 6.0).reshape(5, 1)
    shares = [oracle_families.engram_share(table, 4, rank, 0.0).flatten().tolist() for rank in range(4)]
    assert shares == [[1.0, 2.0], [3.0, 4.0], [5.0, 0.0], [0.0, 0.0]]


def test_rest_of_engram_and_vision_is_whole_under_its_own_names(convert: Convert, folders: dict[str, Path]) -> None:
    source = read(folders["v41"])
    prefixes = ("vision.", "aligner.", "image_", "layers.1.engram.wkv", "layers.1.engram.q_weight")
    names = {name for name in source if name.startswith(prefixes)}
    assert "vision.blocks.1.mlp.w2.weight" in names
    for share in read_ranks(convert("v41", 8), 8):
        assert all(is_same(share[name], source[name]) for name in names)


# --- FP4 and files ---


def test_fp4_is_written_with_its_logical_shape_in_the_order_of_dtypes(convert: Convert) -> None:
    content = (convert("v4", 2) / "model0-mp2.safetensors").read_bytes()
    header = json.loads(content[8 : 8 + int.from_bytes(content[:8], "little")])
    assert "__metadata__" not in header
    assert header["layers.1.ffn.experts.2.w1.weight"]["dtype"] == "F4"
    assert header["layers.1.ffn.experts.2.w1.weight"]["shape"] == [128, 128]
    dtypes = [header[name]["dtype"] for name in header]
    assert list(dict.fromkeys(dtypes)) == ["I64", "F32", "BF16", "F8_E8M0", "F8_E4M3", "F4"]


def test_fp8_experts_have_the_values_of_the_fp4_ones(convert: Convert, folders: dict[str, Path]) -> None:
    source = read(folders["v4"])
    for share in read_ranks(convert("v4", 4, "fp8"), 4):
        experts = [name.removesuffix(".weight") for name in share if ".experts." in name and name.endswith(".weight")]
        assert len(experts) == 5 * 4 * 3
        for name in experts:
            codes, scale = share[f"{name}.weight"], share[f"{name}.scale"]
            assert (codes.dtype, tuple(scale.shape)) == (torch.float8_e4m3fn, (1, 1))
            assert oracle_casts.is_exact_cast(source[f"{name}.weight"], source[f"{name}.scale"], codes, scale), name


def test_experts_that_are_stored_in_fp8_stay(folders: dict[str, Path], tmp_path: Path) -> None:
    """The base models of V4 have such experts."""
    oracle_families.convert_v4(folders["v4"], tmp_path / "fp8", 1, expert_dtype="fp8")
    kept = {name: tensor for name, tensor in read(tmp_path / "fp8").items() if ".experts." in name}
    others = {name: tensor for name, tensor in read(folders["v4"]).items() if ".experts." not in name}
    handmade.write(tmp_path / "base", kept | others)
    oracle_families.convert_v4(tmp_path / "base", tmp_path / "out", 1)
    (share,) = read_ranks(tmp_path / "out", 1)
    assert all(is_same(share[name], tensor) for name, tensor in kept.items())


@pytest.mark.parametrize("name", list(FAMILIES))
def test_only_two_tokenizer_files_are_copied(name: str, convert: Convert) -> None:
    written = {path.name for path in convert(name, 1).iterdir()}
    assert written == {"model0-mp1.safetensors", "tokenizer.json", "tokenizer_config.json"}


@pytest.mark.parametrize(
    ("more", "message"),
    [
        ("model.norm.weight", "not a name of V4"),
        ("layers.0.mlp.gate.weight", "not a name of V4"),
        ("layers.0.ffn.experts.16.w1.weight", "17 experts of layers cannot be dealt"),
        ("mtp.0.ffn.experts.16.w1.weight", "17 experts of mtp cannot be dealt"),
    ],
)
def test_oracle_refuses_what_no_release_has(more: str, message: str, folders: dict[str, Path], tmp_path: Path) -> None:
    handmade.write(tmp_path / "source", read(folders["v4"]) | {more: torch.zeros(2, 2)})
    with pytest.raises(ValueError, match=message):
        oracle_families.convert_v4(tmp_path / "source", tmp_path / "out", 2)


def test_oracle_refuses_another_expert_dtype(folders: dict[str, Path], tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="neither fp4 nor fp8"):
        oracle_families.convert_v4(folders["v4"], tmp_path, 1, expert_dtype="bf16")
