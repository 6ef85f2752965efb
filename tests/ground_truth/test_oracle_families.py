"""The oracles of the V3 line and the plain casts, against expectations worked out by hand."""

from pathlib import Path

import handmade
import oracle
import oracle_casts
import oracle_families
import pytest
import skeletons
import torch
from handmade import V3, is_same, read, read_ranks
from torch import Tensor

ATTENTION = "model.layers.1.self_attn"


@pytest.fixture(scope="session")
def v32(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A tiny V3.2 in FP8."""
    folder = tmp_path_factory.mktemp("v32")
    torch.manual_seed(32)
    handmade.write_v3(folder, skeletons.v32_parameters(V3, 1, 0, gate_bias=True))
    return folder


@pytest.fixture(scope="session")
def v3(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A tiny V3 in FP8."""
    folder = tmp_path_factory.mktemp("v3")
    torch.manual_seed(3)
    handmade.write_v3(folder, skeletons.v3_parameters(V3, 1, 0, gate_bias=True))
    return folder


def add(source: Path, folder: Path, more: dict[str, Tensor], **config: object) -> None:
    """Write a checkpoint with more tensors."""
    handmade.write(folder, read(source) | more, **({"num_hidden_layers": V3["n_layers"]} | config))


# --- V3, V3.2, GLM-5.1, Kimi-K2 ---


@pytest.mark.parametrize("ranks", [1, 2, 4])
def test_rank_files_of_v3_load_strictly(ranks: int, v3: Path, tmp_path: Path) -> None:
    oracle_families.convert_v3(v3, tmp_path, ranks)
    for rank in range(ranks):
        parameters = skeletons.v3_parameters(V3, ranks, rank, gate_bias=True)
        path = tmp_path / f"model{rank}-mp{ranks}.safetensors"
        assert skeletons.differences(parameters, path) == []
        skeletons.load(parameters, path, strict=True)


@pytest.mark.parametrize("ranks", [1, 2, 4])
def test_rank_files_of_v32_load_strictly(ranks: int, v32: Path, tmp_path: Path) -> None:
    oracle_families.convert_v32(v32, tmp_path, ranks)
    for rank in range(ranks):
        parameters = skeletons.v32_parameters(V3, ranks, rank, gate_bias=True)
        path = tmp_path / f"model{rank}-mp{ranks}.safetensors"
        assert skeletons.differences(parameters, path) == []
        module = skeletons.load(parameters, path, strict=True)
        loaded = module.get_parameter("layers.1.attn.indexer.wq_b.weight")
        assert is_same(loaded.data, read(v32)[f"{ATTENTION}.indexer.wq_b.weight"])


def test_model_of_v3_refuses_a_file_of_v32(v32: Path, tmp_path: Path) -> None:
    oracle_families.convert_v32(v32, tmp_path, 1)
    with pytest.raises(RuntimeError, match=r"layers\.0\.attn\.indexer"):
        skeletons.load(
            skeletons.v3_parameters(V3, 1, 0, gate_bias=True), tmp_path / "model0-mp1.safetensors", strict=True
        )


def test_a_width_that_is_not_7168_has_no_gate_bias(v3: Path, tmp_path: Path) -> None:
    """So the model of a release as narrow as GLM-5.1 does not take its own bias."""
    oracle_families.convert_v3(v3, tmp_path, 1)
    parameters = skeletons.v3_parameters(V3, 1, 0)
    assert skeletons.differences(parameters, tmp_path / "model0-mp1.safetensors") == [
        "unexpected layers.1.ffn.gate.bias"
    ]


def test_indexer_is_whole_on_every_rank_and_the_query_is_cut(v32: Path, tmp_path: Path) -> None:
    oracle_families.convert_v32(v32, tmp_path, 2)
    source = read(v32)
    for rank, share in enumerate(read_ranks(tmp_path, 2)):
        for part in ("wq_b.weight", "wk.weight", "k_norm.weight", "k_norm.bias", "weights_proj.weight"):
            assert is_same(share[f"layers.1.attn.indexer.{part}"], source[f"{ATTENTION}.indexer.{part}"]), part
        for part in ("wq_b", "wk"):
            scale = source[f"{ATTENTION}.indexer.{part}.weight_scale_inv"]
            assert is_same(share[f"layers.1.attn.indexer.{part}.scale"], scale)
        query = source[f"{ATTENTION}.q_b_proj.weight"]
        assert is_same(share["layers.1.attn.wq_b.weight"], query[rank * 128 : (rank + 1) * 128])


def test_only_the_v32_oracle_knows_the_indexer(v32: Path, tmp_path: Path) -> None:
    with pytest.raises(KeyError, match="indexer"):
        oracle_families.convert_v3(v32, tmp_path, 1)


def test_experts_of_v32_are_dealt_in_order_of_number(v32: Path, tmp_path: Path) -> None:
    """Experts 2 and 10 tell an order by number from one by name."""
    oracle_families.convert_v32(v32, tmp_path, 4)
    shares, source = read_ranks(tmp_path, 4), read(v32)
    for expert, holder in ((2, 0), (3, 0), (4, 1), (10, 2), (12, 3)):
        name = f"layers.1.ffn.experts.{expert}.w2.weight"
        assert [rank for rank, share in enumerate(shares) if name in share] == [holder]
        assert is_same(shares[holder][name], source[f"model.layers.1.mlp.experts.{expert}.down_proj.weight"])


def test_kimi_k2_is_v3_without_rotary_frequencies(v3: Path, tmp_path: Path) -> None:
    frequencies = {f"model.layers.{layer}.self_attn.rotary_emb.inv_freq": torch.rand(2) for layer in range(2)}
    add(v3, tmp_path / "kimi", frequencies)
    (tmp_path / "kimi" / "tiktoken.model").write_bytes(b"x")
    oracle_families.convert_v3(v3, tmp_path / "v3-out", 2)
    oracle_families.convert_kimi_k2(tmp_path / "kimi", tmp_path / "kimi-out", 2)
    assert read_folder(tmp_path / "kimi-out") == read_folder(tmp_path / "v3-out") | {"tiktoken.model": b"x"}


def read_folder(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in folder.iterdir()}


def test_glm_loses_the_layer_past_its_own_and_no_other(tmp_path: Path) -> None:
    """Layer 61 is a real one here, and layers 7 and 8 begin with the digits of 78."""
    norm = "input_layernorm.weight"
    tensors = {f"model.layers.{layer}.{norm}": torch.full((2,), float(layer)) for layer in range(79)}
    tensors["model.layers.78.eh_proj.weight"] = torch.zeros(2, 4)
    handmade.write(tmp_path / "glm", tensors, num_hidden_layers=78)
    oracle_families.convert_glm51(tmp_path / "glm", tmp_path / "out", 1)
    (share,) = read_ranks(tmp_path / "out", 1)
    assert {name: tensor[0].item() for name, tensor in share.items()} == {
        f"layers.{layer}.attn_norm.weight": float(layer) for layer in range(78)
    }


def test_mtp_layers_given_by_number_are_dropped_instead(v3: Path, tmp_path: Path) -> None:
    add(v3, tmp_path / "source", {"model.layers.61.enorm.weight": torch.zeros(2)})
    oracle_families.convert_v3(tmp_path / "source", tmp_path / "out", 1, mtp_layers=[61])
    assert not [name for name in read(tmp_path / "out") if ".61." in name]
    with pytest.raises(KeyError, match="enorm"):
        oracle_families.convert_v3(tmp_path / "source", tmp_path / "other", 1)


# --- V3 with padding ---


def test_padded_v3_loads_in_a_model_of_the_larger_widths(v3: Path, tmp_path: Path) -> None:
    """8 ranks: 4 blocks of the dense width become 8, one block of the shared experts becomes 8 experts' width."""
    oracle_families.convert_v3_padded(v3, tmp_path, 8)
    args = V3 | {"inter_dim": 8 * 128, "n_shared_experts": 8}
    for rank in range(8):
        parameters = skeletons.v3_parameters(args, 8, rank, gate_bias=True)
        path = tmp_path / f"model{rank}-mp8.safetensors"
        assert skeletons.differences(parameters, path) == []
        skeletons.load(parameters, path, strict=True)


def test_padding_is_zero_weights_with_scale_one_at_the_tail(v3: Path, tmp_path: Path) -> None:
    oracle_families.convert_v3_padded(v3, tmp_path, 8)
    shares, source = read_ranks(tmp_path, 8), read(v3)
    up, down = source["model.layers.0.mlp.up_proj.weight"], source["model.layers.0.mlp.down_proj.weight"]
    for rank, share in enumerate(shares):
        rows, columns = share["layers.0.ffn.w3.weight"], share["layers.0.ffn.w2.weight"]
        if rank < 4:
            assert is_same(rows, up[rank * 128 : rank * 128 + 128])
            assert is_same(columns, down[:, rank * 128 : rank * 128 + 128])
            scale = source["model.layers.0.mlp.down_proj.weight_scale_inv"]
            assert is_same(share["layers.0.ffn.w2.scale"], scale[:, rank : rank + 1])
        else:
            assert not rows.view(torch.uint8).any()
            assert not columns.view(torch.uint8).any()
            assert share["layers.0.ffn.w3.scale"].tolist() == [[1.0, 1.0]]
            assert share["layers.0.ffn.w2.scale"].tolist() == [[1.0], [1.0]]


def test_a_width_with_a_part_of_a_block_is_padded_after_it() -> None:
    name = "model.layers.0.mlp.gate_proj.weight"
    weight, scale = torch.ones(150, 3).to(torch.float8_e4m3fn), torch.tensor([[5.0], [7.0]])
    padded = oracle_families.pad_to_blocks({name: weight, f"{name}_scale_inv": scale}, 3, 128)
    assert padded[name].shape == (384, 3)
    assert padded[name].float().sum(1).tolist() == [3.0] * 150 + [0.0] * 234
    assert padded[f"{name}_scale_inv"].flatten().tolist() == [5.0, 7.0, 1.0]


@pytest.mark.parametrize(
    ("length", "ranks", "wanted"),
    [(18432, 16, 18432), (18432, 32, 20480), (18432, 64, 24576), (2048, 16, 2048), (2048, 32, 4096), (2048, 64, 8192)],
)
def test_widths_of_the_real_v3_grow_to_whole_blocks_a_rank(length: int, ranks: int, wanted: int) -> None:
    name = "model.layers.3.mlp.shared_experts.down_proj.weight"
    weight = torch.ones(1, length).to(torch.float8_e4m3fn)
    padded = oracle_families.pad_to_blocks(
        {name: weight, f"{name}_scale_inv": torch.ones(1, length // 128)}, ranks, 128
    )
    assert padded[name].shape == (1, wanted)
    assert padded[f"{name}_scale_inv"].shape == (1, wanted // 128)


def test_padding_leaves_every_other_tensor_alone(v3: Path, tmp_path: Path) -> None:
    """With 2 ranks only the one block of the shared experts has to grow."""
    oracle_families.convert_v3_padded(v3, tmp_path / "padded", 2)
    oracle_families.convert_v3(v3, tmp_path / "plain", 2)
    for padded, plain in zip(read_ranks(tmp_path / "padded", 2), read_ranks(tmp_path / "plain", 2), strict=True):
        assert padded.keys() == plain.keys()
        grown = {name for name in padded if not is_same(padded[name], plain[name])}
        assert {name.rsplit(".", 2)[0] for name in grown} == {"layers.1.ffn.shared_experts"}


@pytest.mark.parametrize("prefix", ["layers.0.ffn", "layers.1.ffn.shared_experts"])
def test_padded_parts_add_up_to_the_whole_layer(prefix: str, v3: Path, tmp_path: Path) -> None:
    """The sum over ranks of w2 (w1 x * w3 x) is that of one rank, to the rounding of float64."""
    oracle_families.convert_v3(v3, tmp_path / "whole", 1)
    oracle_families.convert_v3_padded(v3, tmp_path / "parts", 8)
    torch.manual_seed(0)
    inputs = torch.randn(V3["dim"], dtype=torch.float64)
    (whole,) = [layer_output(share, prefix, inputs) for share in read_ranks(tmp_path / "whole", 1)]
    parts = [layer_output(share, prefix, inputs) for share in read_ranks(tmp_path / "parts", 8)]
    torch.testing.assert_close(torch.stack(parts).sum(0), whole, rtol=1e-9, atol=1e-6)


def layer_output(share: dict[str, Tensor], prefix: str, inputs: Tensor) -> Tensor:
    first, second, third = (exact_weight(share, f"{prefix}.w{number}") for number in (1, 2, 3))
    return second @ ((first @ inputs) * (third @ inputs))


def exact_weight(share: dict[str, Tensor], name: str) -> Tensor:
    """Return the float64 products of codes and scales, element by element as the model indexes them."""
    weight, scale = share[f"{name}.weight"].double(), share[f"{name}.scale"].double()
    rows, columns = (torch.arange(size) // 128 for size in weight.shape)
    return weight * scale[rows][:, columns]


# --- casts ---


def test_a_dequantized_weight_is_the_rounded_product_of_float64() -> None:
    """The exact product has 28 bits: it is rounded to float32 and then to BF16, never straight to BF16."""
    torch.manual_seed(1)
    codes = handmade.random_tensor((150, 70), torch.float8_e4m3fn)
    scale = torch.rand(3, 2) + 0.01
    rows, columns = torch.arange(150) // 64, torch.arange(70) // 64
    exact = codes.double() * scale.double()[rows][:, columns]
    result = oracle_casts.dequantize(codes, scale, 64)
    assert is_same(result, exact.float().bfloat16())


def test_dequantize_sees_a_scale_of_another_shape() -> None:
    with pytest.raises(ValueError, match="does not fit"):
        oracle_casts.dequantize(torch.zeros(150, 70).to(torch.float8_e4m3fn), torch.ones(2, 2), 64)


def test_a_whole_checkpoint_in_bf16_keeps_its_names(v32: Path) -> None:
    source, result = read(v32), oracle_casts.cast_to_bf16(v32)
    assert result.keys() == {name for name in source if not name.endswith("_scale_inv")}
    for name, tensor in source.items():
        scale = source.get(f"{name}_scale_inv")
        if scale is not None:
            rows, columns = (torch.arange(size) // 128 for size in tensor.shape)
            exact = tensor.double() * scale.double()[rows][:, columns]
            assert is_same(result[name], exact.float().bfloat16()), name
        elif name in result:
            assert is_same(result[name], tensor), name
    assert not [name for name, tensor in result.items() if tensor.dtype == torch.float8_e4m3fn]


def test_a_cast_checkpoint_finds_the_scales_of_v4_and_leaves_fp4(tmp_path: Path) -> None:
    codes, scale = torch.full((2, 3), 1.5).to(torch.float8_e4m3fn), torch.tensor([[4.0]]).to(torch.float8_e8m0fnu)
    packed, groups = torch.ones(2, 16, dtype=torch.int8), torch.ones(2, 1).to(torch.float8_e8m0fnu)
    expert = "layers.0.ffn.experts.0.w1"
    tensors = {"a.weight": codes, "a.scale": scale, f"{expert}.weight": packed, f"{expert}.scale": groups}
    handmade.write(tmp_path, tensors)
    result = oracle_casts.cast_to_bf16(tmp_path)
    assert result.keys() == tensors.keys() - {"a.scale"}
    assert result["a.weight"].tolist() == [[6.0] * 3] * 2
    assert is_same(result[f"{expert}.weight"], packed)


def test_an_engram_table_is_not_cast(tmp_path: Path) -> None:
    """Its scales serve 32 columns of one row, not a square."""
    table = torch.zeros(40, 64).to(torch.float8_e4m3fn)
    name = "layers.1.engram.embed"
    handmade.write(tmp_path, {f"{name}.weight": table, f"{name}.scale": torch.ones(40, 2).to(torch.float8_e8m0fnu)})
    with pytest.raises(ValueError, match="does not fit"):
        oracle_casts.cast_to_bf16(tmp_path)


def test_an_f8_weight_without_a_scale_is_not_cast(tmp_path: Path) -> None:
    handmade.write(tmp_path, {"a.weight": torch.zeros(2, 3).to(torch.float8_e4m3fn)})
    with pytest.raises(ValueError, match=r"a\.weight has no scale"):
        oracle_casts.cast_to_bf16(tmp_path)


def test_the_low_half_of_a_byte_is_the_even_column() -> None:
    packed = torch.tensor([[0x21, 0x73], [0xF8, 0x9A]], dtype=torch.uint8).view(torch.int8)
    assert oracle_casts.unpack_fp4(packed).tolist() == [[0.5, 1.0, 1.5, 6.0], [0.0, -6.0, -1.0, -0.5]]


def test_minus_zero_becomes_plus_zero() -> None:
    packed = torch.full((32, 16), 0x88, dtype=torch.uint8).view(torch.int8)
    codes, _ = oracle_casts.fp4_to_fp8(packed, torch.ones(32, 1).to(torch.float8_e8m0fnu), 32)
    assert not codes.view(torch.uint8).any()


def scale_bytes(*rows: list[int]) -> Tensor:
    return torch.tensor(rows, dtype=torch.uint8).view(torch.float8_e8m0fnu)


def test_fp8_scale_is_a_64th_of_the_largest_of_its_block() -> None:
    """A block of 32: rows with scales 2^0 and 2^3. A code of 1.5 is 1.5 * 8 under the new scale 2^3 / 64."""
    packed = torch.full((32, 16), 0x33, dtype=torch.int8)
    scale = scale_bytes(*([[127]] * 31), [130])
    codes, new_scale = oracle_casts.fp4_to_fp8(packed, scale, 32)
    assert new_scale.view(torch.uint8).tolist() == [[124]]
    assert codes.float()[0].tolist() == [12.0] * 32
    assert codes.float()[31].tolist() == [96.0] * 32


@pytest.mark.parametrize("block", [32, 128])
def test_fp4_to_fp8_keeps_every_value(block: int) -> None:
    torch.manual_seed(block)
    packed = handmade.random_tensor((256, 128), torch.float4_e2m1fn_x2)
    scale = handmade.random_tensor((256, 8), torch.float8_e8m0fnu)
    codes, new_scale = oracle_casts.fp4_to_fp8(packed, scale, block)
    assert tuple(new_scale.shape) == (256 // block, 256 // block)
    assert oracle_casts.is_exact_cast(packed, scale, codes, new_scale)


@pytest.mark.parametrize(("smallest", "is_exact"), [(127, True), (126, False)])
def test_fp4_to_fp8_is_exact_down_to_a_2_to_the_14th_of_the_largest(smallest: int, is_exact: bool) -> None:  # noqa: FBT001
    """All 16 codes under each scale; the largest scale is 2^14."""
    packed = torch.arange(0, 256, 1).to(torch.uint8).view(torch.int8).reshape(16, 16).repeat(2, 1)
    scale = scale_bytes(*([[141]] * 16), *([[smallest]] * 16))
    codes, new_scale = oracle_casts.fp4_to_fp8(packed, scale, 32)
    assert oracle_casts.is_exact_cast(packed, scale, codes, new_scale) == is_exact


def test_fp4_to_fp8_refuses_a_part_of_a_block() -> None:
    with pytest.raises(ValueError, match="whole blocks"):
        oracle_casts.fp4_to_fp8(torch.zeros(96, 64, dtype=torch.int8), torch.ones(96, 4).to(torch.float8_e8m0fnu), 128)


def test_block_size_of_config_wins_over_the_default(tmp_path: Path) -> None:
    assert oracle.block_size(tmp_path, 32) == 32
    (tmp_path / "config.json").write_text('{"quantization_config": {"weight_block_size": [64, 64]}}')
    assert oracle.block_size(tmp_path, 32) == 64
