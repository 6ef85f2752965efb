"""The oracle agrees with the script that it stands for, and the tiny checkpoints hold the traps they promise."""

import json
import runpy
import shutil
from pathlib import Path

import checkpoints
import oracle
import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

MANY_RANKS = [2, 4, 8, 16]
QUERY_CODES = "model.layers.0.self_attn.q_b_proj.weight"
OUTPUT_CODES = "model.layers.0.self_attn.o_proj.weight"


@pytest.fixture(scope="session")
def folders(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """One folder for each tiny checkpoint, by name."""
    root = tmp_path_factory.mktemp("checkpoints")
    names = ("v2", "v2-lite", "v3", "fp8", "fp8-block4", "mtp", "one-file", "without-index")
    found = {name: root / name for name in names}
    checkpoints.write_deepseek_v2(found["v2"], q_lora=True)
    checkpoints.write_deepseek_v2(found["v2-lite"], q_lora=False)
    checkpoints.write_deepseek_v3(found["v3"])
    checkpoints.quantize(found["v3"], found["fp8"])
    checkpoints.quantize(found["v3"], found["fp8-block4"], block=4)
    for name in ("mtp", "one-file", "without-index"):
        shutil.copytree(found["fp8"], found[name])
    checkpoints.add_mtp(found["mtp"], 61)
    checkpoints.merge_to_one_file(found["one-file"])
    checkpoints.without_index(found["without-index"])
    return found


@pytest.fixture(scope="session")
def reference(request: pytest.FixtureRequest) -> Path:
    """The script given by `--reference PATH`."""
    path = request.config.getoption("--reference", default=None)
    if path is None:
        pytest.skip("needs --reference PATH, a runnable copy of the script that reshard replaces")
    return Path(path)


def run_reference(reference: Path, source: Path, target: Path, ranks: int) -> None:
    experts = checkpoints.read_config(source)["n_routed_experts"]
    runpy.run_path(str(reference))["main"](str(source), str(target), experts, ranks)


def run_oracle(source: Path, target: Path, ranks: int) -> list[dict[str, Tensor]]:
    """Return the tensors of each rank."""
    oracle.convert(source, target, ranks, mtp_layers=[61])
    return [load_file(target / f"model{rank}-mp{ranks}.safetensors") for rank in range(ranks)]


def read_folder(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in folder.iterdir()}


def is_same(left: Tensor, right: Tensor) -> bool:
    """Compare bits, since F8 tensors have no equality."""
    return left.dtype == right.dtype and torch.equal(left.view(torch.uint8), right.view(torch.uint8))


# --- with the script ---


@pytest.mark.parametrize("ranks", [1, 2, 4, 8, 16])
@pytest.mark.parametrize("name", ["v2", "v2-lite", "v3"])
def test_oracle_writes_the_bytes_of_the_script_for_bf16(
    name: str, ranks: int, folders: dict[str, Path], reference: Path, tmp_path: Path
) -> None:
    run_reference(reference, folders[name], tmp_path / "script", ranks)
    oracle.convert(folders[name], tmp_path / "oracle", ranks)
    assert read_folder(tmp_path / "oracle") == read_folder(tmp_path / "script")


@pytest.mark.parametrize(
    ("name", "ranks"),
    [("fp8", 1), ("one-file", 1), ("without-index", 1), ("mtp", 1), *(("fp8-block4", ranks) for ranks in [1, 2, 4, 8])],
)
def test_oracle_writes_the_bytes_of_the_script_for_fp8(
    name: str, ranks: int, folders: dict[str, Path], reference: Path, tmp_path: Path
) -> None:
    run_reference(reference, folders[name], tmp_path / "script", ranks)
    oracle.convert(folders[name], tmp_path / "oracle", ranks, mtp_layers=[61])
    assert read_folder(tmp_path / "oracle") == read_folder(tmp_path / "script")


@pytest.mark.parametrize(("name", "ranks"), [*(("fp8", ranks) for ranks in MANY_RANKS), ("fp8-block4", 16)])
def test_script_refuses_a_block_shared_by_ranks(
    name: str, ranks: int, folders: dict[str, Path], reference: Path, tmp_path: Path
) -> None:
    with pytest.raises(AssertionError, match="must be divisible"):
        run_reference(reference, folders[name], tmp_path / "script", ranks)


# --- the oracle by itself ---


@pytest.mark.parametrize("name", ["v2", "v2-lite", "v3", "fp8", "mtp", "one-file", "without-index"])
def test_one_rank_holds_every_tensor_unchanged(name: str, folders: dict[str, Path], tmp_path: Path) -> None:
    source = checkpoints.load_checkpoint(folders[name])
    source = {old: tensor for old, tensor in source.items() if not old.startswith("model.layers.61.")}
    (whole,) = run_oracle(folders[name], tmp_path, 1)
    assert len(whole) == len(source)
    for old, tensor in source.items():
        assert is_same(whole[oracle.look_up(old)[0]], tensor), old


# One tensor of each kind, written by hand: its name in the checkpoint and in the demo, its shape on one of 4 ranks.
KINDS: list[tuple[str, str, tuple[int, ...]]] = [
    ("model.embed_tokens.weight", "embed.weight", (68, 161)),
    ("lm_head.weight", "head.weight", (68, 161)),
    ("model.norm.weight", "norm.weight", (161,)),
    ("model.layers.10.input_layernorm.weight", "layers.10.attn_norm.weight", (161,)),
    ("model.layers.2.post_attention_layernorm.weight", "layers.2.ffn_norm.weight", (161,)),
    ("model.layers.2.self_attn.q_a_proj.weight", "layers.2.attn.wq_a.weight", (45, 161)),
    ("model.layers.2.self_attn.q_a_proj.weight_scale_inv", "layers.2.attn.wq_a.scale", (1, 2)),
    ("model.layers.2.self_attn.q_a_layernorm.weight", "layers.2.attn.q_norm.weight", (45,)),
    ("model.layers.2.self_attn.q_b_proj.weight", "layers.2.attn.wq_b.weight", (128, 45)),
    ("model.layers.2.self_attn.q_b_proj.weight_scale_inv", "layers.2.attn.wq_b.scale", (1, 1)),
    ("model.layers.2.self_attn.kv_a_proj_with_mqa.weight", "layers.2.attn.wkv_a.weight", (147, 161)),
    ("model.layers.2.self_attn.kv_a_proj_with_mqa.weight_scale_inv", "layers.2.attn.wkv_a.scale", (2, 2)),
    ("model.layers.2.self_attn.kv_a_layernorm.weight", "layers.2.attn.kv_norm.weight", (131,)),
    ("model.layers.2.self_attn.kv_b_proj.weight", "layers.2.attn.wkv_b.weight", (128, 131)),
    ("model.layers.2.self_attn.kv_b_proj.weight_scale_inv", "layers.2.attn.wkv_b.scale", (1, 2)),
    ("model.layers.2.self_attn.o_proj.weight", "layers.2.attn.wo.weight", (161, 64)),
    ("model.layers.2.self_attn.o_proj.weight_scale_inv", "layers.2.attn.wo.scale", (2, 1)),
    ("model.layers.0.mlp.gate_proj.weight", "layers.0.ffn.w1.weight", (512, 161)),
    ("model.layers.0.mlp.gate_proj.weight_scale_inv", "layers.0.ffn.w1.scale", (4, 2)),
    ("model.layers.0.mlp.down_proj.weight", "layers.0.ffn.w2.weight", (161, 512)),
    ("model.layers.0.mlp.down_proj.weight_scale_inv", "layers.0.ffn.w2.scale", (2, 4)),
    ("model.layers.0.mlp.up_proj.weight", "layers.0.ffn.w3.weight", (512, 161)),
    ("model.layers.2.mlp.gate.weight", "layers.2.ffn.gate.weight", (16, 161)),
    ("model.layers.2.mlp.gate.e_score_correction_bias", "layers.2.ffn.gate.bias", (16,)),
    ("model.layers.3.mlp.shared_experts.gate_proj.weight", "layers.3.ffn.shared_experts.w1.weight", (8, 161)),
    ("model.layers.3.mlp.shared_experts.down_proj.weight", "layers.3.ffn.shared_experts.w2.weight", (161, 8)),
    ("model.layers.3.mlp.shared_experts.up_proj.weight", "layers.3.ffn.shared_experts.w3.weight", (8, 161)),
    ("model.layers.10.mlp.experts.2.gate_proj.weight", "layers.10.ffn.experts.2.w1.weight", (32, 161)),
    ("model.layers.10.mlp.experts.2.gate_proj.weight_scale_inv", "layers.10.ffn.experts.2.w1.scale", (1, 2)),
    ("model.layers.2.mlp.experts.10.down_proj.weight", "layers.2.ffn.experts.10.w2.weight", (161, 32)),
    ("model.layers.2.mlp.experts.10.up_proj.weight", "layers.2.ffn.experts.10.w3.weight", (32, 161)),
]


def test_each_kind_of_tensor_has_its_name_and_its_shape_in_the_demo(folders: dict[str, Path], tmp_path: Path) -> None:
    source = checkpoints.load_checkpoint(folders["fp8"])
    (whole,) = run_oracle(folders["fp8"], tmp_path / "whole", 1)
    shares = run_oracle(folders["fp8"], tmp_path / "shares", 4)
    for old, new, shape in KINDS:
        assert is_same(whole[new], source[old]), old
        assert {tuple(share[new].shape) for share in shares if new in share} == {shape}, old


@pytest.mark.parametrize(("name", "ranks"), [("v2", 4), ("v2-lite", 16), ("v3", 2), ("v3", 16), ("fp8-block4", 8)])
def test_shares_join_to_the_whole(name: str, ranks: int, folders: dict[str, Path], tmp_path: Path) -> None:
    (whole,) = run_oracle(folders[name], tmp_path / "whole", 1)
    shares = run_oracle(folders[name], tmp_path / "shares", ranks)
    assert {key for share in shares for key in share} == set(whole)
    for key, tensor in whole.items():
        assert is_joined([share[key] for share in shares if key in share], tensor), key


def test_whole_query_projection_of_v2_lite_is_cut_by_rows(folders: dict[str, Path], tmp_path: Path) -> None:
    source = checkpoints.load_checkpoint(folders["v2-lite"])["model.layers.10.self_attn.q_proj.weight"]
    shares = run_oracle(folders["v2-lite"], tmp_path, 4)
    for rank, share in enumerate(shares):
        assert is_same(share["layers.10.attn.wq.weight"], source[rank * 64 : (rank + 1) * 64].contiguous())


def is_joined(pieces: list[Tensor], whole: Tensor) -> bool:
    """Say whether the pieces are copies of the whole, or give it when laid end to end along the dimension cut."""
    if pieces[0].shape == whole.shape:
        return all(is_same(piece, whole) for piece in pieces)
    dimension = cut_dimension(pieces[0], whole)
    return dimension is not None and is_same(torch.cat(pieces, dimension), whole)


def cut_dimension(piece: Tensor, whole: Tensor) -> int | None:
    different = [number for number in range(whole.dim()) if piece.size(number) != whole.size(number)]
    return different[0] if different else None


@pytest.mark.parametrize(("name", "ranks"), [("v2-lite", 2), ("v2-lite", 16), ("fp8", 8)])
def test_experts_are_dealt_in_order_of_number(name: str, ranks: int, folders: dict[str, Path], tmp_path: Path) -> None:
    for rank, share in enumerate(run_oracle(folders[name], tmp_path, ranks)):
        experts = {(key.split(".")[1], int(key.split(".")[4])) for key in share if ".ffn.experts." in key}
        wanted = range(rank * 16 // ranks, (rank + 1) * 16 // ranks)
        assert experts == {(str(layer), expert) for layer in range(1, 11) for expert in wanted}


def write_scaled(folder: Path, rows: int, columns: int) -> None:
    """Write one weight cut by rows and one cut by columns; scale number i of a cut dimension is i."""
    row_scale = torch.arange(-(-rows // 128), dtype=torch.float32).reshape(-1, 1)
    column_scale = torch.arange(-(-columns // 128), dtype=torch.float32).reshape(1, -1)
    weights = {
        QUERY_CODES: torch.zeros(rows, 3).to(torch.float8_e4m3fn),
        OUTPUT_CODES: torch.zeros(3, columns).to(torch.float8_e4m3fn),
    }
    scales = {f"{QUERY_CODES}_scale_inv": row_scale, f"{OUTPUT_CODES}_scale_inv": column_scale}
    save_file(weights, folder / "weights.safetensors")
    save_file(scales, folder / "scales.safetensors")


@pytest.mark.parametrize(
    ("length", "ranks", "wanted"),
    [
        (256, 1, [[0, 1]]),
        (256, 2, [[0], [1]]),
        (512, 2, [[0, 1], [2, 3]]),
        (256, 4, [[0], [0], [1], [1]]),
        (256, 8, [[0], [0], [0], [0], [1], [1], [1], [1]]),
        (384, 6, [[0], [0], [1], [1], [2], [2]]),
        (32, 4, [[0], [0], [0], [0]]),
        (200, 1, [[0, 1]]),
    ],
)
def test_scale_of_a_shared_block_is_duplicated(
    length: int, ranks: int, wanted: list[list[float]], tmp_path: Path
) -> None:
    write_scaled(tmp_path, length, length)
    shares = run_oracle(tmp_path, tmp_path / "out", ranks)
    assert [share["layers.0.attn.wq_b.scale"].flatten().tolist() for share in shares] == wanted
    assert [share["layers.0.attn.wo.scale"].flatten().tolist() for share in shares] == wanted
    assert all(share["layers.0.attn.wo.scale"].dim() == 2 for share in shares)


@pytest.mark.parametrize(("length", "ranks"), [(384, 2), (200, 2), (192, 4), (1152, 6)])
def test_oracle_refuses_a_share_that_straddles_blocks(length: int, ranks: int, tmp_path: Path) -> None:
    write_scaled(tmp_path, length, length)
    with pytest.raises(ValueError, match="straddles"):
        oracle.convert(tmp_path, tmp_path / "out", ranks)


@pytest.mark.parametrize("ranks", [3, 32])
def test_oracle_refuses_ranks_that_do_not_divide(ranks: int, folders: dict[str, Path], tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="cannot be"):
        oracle.convert(folders["v3"], tmp_path, ranks)


def test_mtp_layer_is_dropped(folders: dict[str, Path], tmp_path: Path) -> None:
    oracle.convert(folders["fp8"], tmp_path / "without", 4)
    oracle.convert(folders["mtp"], tmp_path / "with", 4, mtp_layers=[61])
    assert read_folder(tmp_path / "with") == read_folder(tmp_path / "without")


def test_mtp_layer_is_refused_when_not_dropped(folders: dict[str, Path], tmp_path: Path) -> None:
    with pytest.raises(KeyError, match="model"):
        oracle.convert(folders["mtp"], tmp_path, 1)


def test_tokenizer_files_are_copied(folders: dict[str, Path], tmp_path: Path) -> None:
    oracle.convert(folders["v2"], tmp_path, 1)
    written = read_folder(tmp_path)
    del written["model0-mp1.safetensors"]
    assert written == checkpoints.TOKENIZER_FILES


# --- the checkpoints ---


@pytest.mark.parametrize(("name", "count"), [("v2", 625), ("v2-lite", 603), ("v3", 635), ("fp8", 1203), ("mtp", 1327)])
def test_checkpoint_has_hub_names(name: str, count: int, folders: dict[str, Path]) -> None:
    tensors = checkpoints.load_checkpoint(folders[name])
    assert len(tensors) == count
    assert not any("gate_up_proj" in key for key in tensors)
    for layer in (1, 2, 10):
        for expert in range(16):
            assert f"model.layers.{layer}.mlp.experts.{expert}.gate_proj.weight" in tensors
    assert ("model.layers.0.self_attn.q_proj.weight" in tensors) == (name == "v2-lite")
    assert "model.layers.0.mlp.down_proj.weight" in tensors


@pytest.mark.parametrize("name", ["v2", "v2-lite", "v3", "fp8", "mtp"])
def test_index_tells_the_file_of_every_tensor(name: str, folders: dict[str, Path]) -> None:
    index = json.loads((folders[name] / checkpoints.INDEX_NAME).read_text())
    files = checkpoints.load_files(folders[name])
    assert index["weight_map"] == {key: file_name for file_name, tensors in files.items() for key in tensors}
    assert len(files) >= 5


def test_only_the_gate_bias_of_v3_is_f32(folders: dict[str, Path]) -> None:
    tensors = checkpoints.load_checkpoint(folders["v3"])
    wide = {key for key in tensors if tensors[key].dtype == torch.float32}
    assert wide == {f"model.layers.{layer}.mlp.gate.e_score_correction_bias" for layer in range(1, 11)}
    assert {tensor.dtype for tensor in tensors.values()} == {torch.float32, torch.bfloat16}


@pytest.mark.parametrize("name", ["v2", "v2-lite", "v3", "fp8", "mtp"])
def test_no_two_weights_are_equal(name: str, folders: dict[str, Path]) -> None:
    """A scale or a bias may repeat by chance; a weight that repeats would hide a swap."""
    tensors = checkpoints.load_checkpoint(folders[name])
    weights = [tensor.view(torch.uint8).numpy().tobytes() for key, tensor in tensors.items() if key.endswith("weight")]
    assert len(set(weights)) == len(weights)


def test_fp8_has_the_dtypes_and_shapes_of_the_real_one(folders: dict[str, Path]) -> None:
    tensors = checkpoints.load_checkpoint(folders["mtp"])
    for key, tensor in tensors.items():
        scale = tensors.get(f"{key}_scale_inv")
        assert (scale is not None) == (tensor.dtype == torch.float8_e4m3fn), key
        if scale is not None:
            assert scale.dtype == torch.float32
            assert tuple(scale.shape) == tuple(-(-size // 128) for size in tensor.shape)
    assert tensors["model.layers.61.eh_proj.weight"].dtype == torch.bfloat16
    assert tensors["model.layers.2.self_attn.kv_a_proj_with_mqa.weight_scale_inv"].shape == (2, 2)


def test_fp8_times_scale_is_close_to_bf16(folders: dict[str, Path]) -> None:
    codes = checkpoints.load_checkpoint(folders["fp8"])
    for key, weight in checkpoints.load_checkpoint(folders["v3"]).items():
        if checkpoints.is_quantized(key):
            scale = codes[f"{key}_scale_inv"].repeat_interleave(128, 0).repeat_interleave(128, 1)
            restored = codes[key].float() * scale[: weight.size(0), : weight.size(1)]
            torch.testing.assert_close(restored, weight.float(), rtol=1 / 16, atol=1e-3)


def test_some_scales_lie_in_another_file_than_their_weight(folders: dict[str, Path]) -> None:
    weight_map = json.loads((folders["fp8"] / checkpoints.INDEX_NAME).read_text())["weight_map"]
    scales = [key for key in weight_map if key.endswith("_scale_inv")]
    apart = [key for key in scales if weight_map[key] != weight_map[oracle.weight_name(key)]]
    assert 0 < len(apart) < len(scales)


@pytest.mark.parametrize("ranks", MANY_RANKS)
def test_scales_are_cut_as_well_as_duplicated(ranks: int, folders: dict[str, Path], tmp_path: Path) -> None:
    (whole,) = run_oracle(folders["fp8"], tmp_path / "whole", 1)
    share = run_oracle(folders["fp8"], tmp_path / "shares", ranks)[-1]
    copies = set()
    for key in share:
        scale = key.removesuffix("weight") + "scale"
        dimension = cut_dimension(share[key], whole[key])
        if key.endswith(".weight") and scale in share and dimension is not None:
            copies.add(share[scale].size(dimension) * ranks // whole[scale].size(dimension))
    assert 1 in copies
    assert max(copies) > 1


def test_variants_hold_the_same_tensors(folders: dict[str, Path]) -> None:
    original = checkpoints.load_checkpoint(folders["fp8"])
    for name in ("one-file", "without-index"):
        assert not (folders[name] / checkpoints.INDEX_NAME).exists()
        variant = checkpoints.load_checkpoint(folders[name])
        assert variant.keys() == original.keys()
        assert all(is_same(variant[key], original[key]) for key in original)
    assert [path.name for path in folders["one-file"].glob("*.safetensors")] == ["model.safetensors"]


def test_checkpoints_are_small(folders: dict[str, Path]) -> None:
    for folder in folders.values():
        assert sum(path.stat().st_size for path in folder.iterdir()) < 20_000_000
