"""Tiny checkpoints that transformers itself writes, with the traps that real ones hold.

There are 11 layers and 16 experts, so that 10 sorts before 2; the bias of the gate is F32 beside BF16 weights.
Every function works on a folder and holds a whole checkpoint in memory.
"""

import json
import shutil
import tempfile
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import torch
from made_once import make_once
from safetensors.torch import load_file, save_file
from torch import Tensor
from transformers import DeepseekV2Config, DeepseekV2ForCausalLM, DeepseekV3Config, DeepseekV3ForCausalLM

INDEX_NAME = "model.safetensors.index.json"
TOKENIZER_FILES = {
    "tokenizer.json": b'{"version": "1.0", "model": {"type": "WordLevel", "vocab": {"<s>": 0, "\xc3\xa9": 1}}}\n',
    "tokenizer_config.json": b'{"tokenizer_class": "PreTrainedTokenizerFast"}\n',
    "special_tokens_map.json": b'{"bos_token": "<s>"}\n',
}


@make_once
def write_deepseek_v2(folder: Path, *, q_lora: bool) -> None:
    """Write a BF16 DeepSeek-V2, or with q_lora false one with a whole `q_proj` like V2-Lite."""
    config = DeepseekV2Config(
        vocab_size=272,
        hidden_size=80,
        intermediate_size=176,
        moe_intermediate_size=24,
        num_hidden_layers=11,
        first_k_dense_replace=1,
        n_routed_experts=16,
        n_shared_experts=2,
        num_experts_per_tok=4,
        num_attention_heads=16,
        num_key_value_heads=16,
        q_lora_rank=45 if q_lora else None,
        kv_lora_rank=37,
        qk_nope_head_dim=12,
        qk_rope_head_dim=4,
        v_head_dim=10,
    )
    torch.manual_seed(2)
    _save_twice(DeepseekV2ForCausalLM(config), folder, shard_size="700KB")


@make_once
def write_deepseek_v3(folder: Path) -> None:
    """Write a BF16 DeepSeek-V3 whose cut dimensions suit blocks of 128 at 1 to 16 ranks.

    Sizes on the cut dimension: dense 2048 (always whole blocks), q_b and kv_b 512 (whole blocks up to 4 ranks),
    o 256 (2 ranks), shared experts 32 (less than one block). The other dimensions are odd and end inside a block.
    """
    config = DeepseekV3Config(
        vocab_size=272,
        hidden_size=161,
        intermediate_size=2048,
        moe_intermediate_size=32,
        num_hidden_layers=11,
        first_k_dense_replace=1,
        n_routed_experts=16,
        n_shared_experts=1,
        num_experts_per_tok=4,
        n_group=4,
        topk_group=2,
        num_attention_heads=16,
        num_key_value_heads=16,
        q_lora_rank=45,
        kv_lora_rank=131,
        qk_nope_head_dim=16,
        qk_rope_head_dim=16,
        v_head_dim=16,
    )
    torch.manual_seed(3)
    _save_twice(DeepseekV3ForCausalLM(config), folder, shard_size="2MB")
    _update_config(folder, num_nextn_predict_layers=0)


def quantize(folder: Path, out: Path, *, block: int = 128) -> None:
    """Write a V3 checkpoint as FP8: codes, one F32 scale for each block, every third scale in the next file."""
    files = load_files(folder)
    quantized: dict[str, dict[str, Tensor]] = {name: {} for name in files}
    scale_count = 0
    for file_name, following_name in _with_following(files):
        for name, tensor in files[file_name].items():
            if not is_quantized(name):
                quantized[file_name][name] = tensor
                continue
            codes, scale = _quantize_blocks(tensor, block)
            scale_file = following_name if scale_count % 3 == 2 else file_name
            quantized[file_name][name] = codes
            quantized[scale_file][f"{name}_scale_inv"] = scale
            scale_count += 1
    out.mkdir(parents=True, exist_ok=True)
    _copy_other_files(folder, out)
    _save_files(out, quantized)
    _write_index(out)
    settings = {"activation_scheme": "dynamic", "fmt": "e4m3", "quant_method": "fp8"}
    _update_config(out, quantization_config={**settings, "weight_block_size": [block, block]})


def add_mtp(folder: Path, layer: int) -> None:
    """Add a multi-token-prediction layer in one more file: the last layer, changed, and its six own tensors."""
    tensors = load_checkpoint(folder)
    last = f"model.layers.{read_config(folder)['num_hidden_layers'] - 1}."
    own = f"model.layers.{layer}."
    added = {own + name.removeprefix(last): _changed(tensors[name]) for name in tensors if name.startswith(last)}
    norm = tensors["model.norm.weight"]
    torch.manual_seed(layer)
    for number, name in enumerate(("enorm", "hnorm", "shared_head.norm")):
        added[f"{own}{name}.weight"] = norm + 1 + number
    added[f"{own}eh_proj.weight"] = torch.randn(len(norm), 2 * len(norm)).to(norm.dtype)
    added[f"{own}embed_tokens.weight"] = _changed(tensors["model.embed_tokens.weight"])
    added[f"{own}shared_head.head.weight"] = _changed(tensors["lm_head.weight"])
    _save_files(folder, {f"model-mtp-{layer}.safetensors": added})
    if (folder / INDEX_NAME).exists():
        _write_index(folder)
    _update_config(folder, num_nextn_predict_layers=1)


def without_index(folder: Path) -> None:
    """Remove the index of a checkpoint; its files stay as they are."""
    (folder / INDEX_NAME).unlink()


def merge_to_one_file(folder: Path) -> None:
    """Put every tensor into a single `model.safetensors` without an index."""
    tensors = load_checkpoint(folder)
    for path in folder.glob("*.safetensors"):
        path.unlink()
    (folder / INDEX_NAME).unlink(missing_ok=True)
    _save_files(folder, {"model.safetensors": tensors})


def load_files(folder: Path) -> dict[str, dict[str, Tensor]]:
    """Return the tensors of each weight file, by file name in order."""
    return {path.name: load_file(path) for path in sorted(folder.glob("*.safetensors"))}


def load_checkpoint(folder: Path) -> dict[str, Tensor]:
    """Return all tensors of a checkpoint."""
    return {name: tensor for tensors in load_files(folder).values() for name, tensor in tensors.items()}


def read_config(folder: Path) -> dict[str, Any]:
    """Return the fields of config.json."""
    config: dict[str, Any] = json.loads((folder / "config.json").read_text())
    return config


def is_quantized(name: str) -> bool:
    """Say whether FP8 checkpoints hold this tensor as codes: every projection, but not that of the MTP layer."""
    return name.endswith(("_proj.weight", "_proj_with_mqa.weight")) and not name.endswith(".eh_proj.weight")


def _save_twice(model: DeepseekV2ForCausalLM | DeepseekV3ForCausalLM, folder: Path, shard_size: str) -> None:
    """Save, load and save, since only a loaded model holds the bias of the gate in F32."""
    with tempfile.TemporaryDirectory() as first:
        model.bfloat16().save_pretrained(first)
        loaded = type(model).from_pretrained(first, dtype=torch.bfloat16)
    for name, parameter in loaded.named_parameters():
        # Some releases of transformers load it as F32; the published checkpoints have BF16.
        if name.endswith(".mlp.gate.weight"):
            parameter.data = parameter.data.bfloat16()
    _fill_with_random_values(loaded.state_dict().values())
    loaded.save_pretrained(folder, max_shard_size=shard_size)
    for name, content in TOKENIZER_FILES.items():
        (folder / name).write_bytes(content)


def _fill_with_random_values(tensors: Iterable[Tensor]) -> None:
    """Replace all values, since a new model has equal norms and equal biases."""
    for tensor in tensors:
        tensor.copy_(torch.randn(tensor.shape))


def _with_following(names: Iterable[str]) -> list[tuple[str, str]]:
    """Pair each name with the next one, the last with the first."""
    ordered = list(names)
    return list(zip(ordered, ordered[1:] + ordered[:1], strict=True))


def _quantize_blocks(weight: Tensor, block: int) -> tuple[Tensor, Tensor]:
    """Return the F8 codes of a weight and the F32 scale of each block, such that codes * scale is the weight."""
    rows, columns = weight.shape
    padding = (0, -columns % block, 0, -rows % block)
    padded = torch.nn.functional.pad(weight.float(), padding)
    blocks = padded.reshape(padded.shape[0] // block, block, padded.shape[1] // block, block)
    scale = blocks.abs().amax(dim=(1, 3)) / 448
    codes = (blocks / scale[:, None, :, None]).reshape(padded.shape)[:rows, :columns]
    return codes.contiguous().to(torch.float8_e4m3fn), scale


def _changed(tensor: Tensor) -> Tensor:
    """Return other values of the same dtype; scales stay positive."""
    if tensor.dtype == torch.float32:
        return tensor * 2
    return tensor.float().neg().to(tensor.dtype)


def _copy_other_files(source: Path, target: Path) -> None:
    for path in source.iterdir():
        if path.suffix != ".safetensors" and path.name != INDEX_NAME:
            shutil.copyfile(path, target / path.name)


def _save_files(folder: Path, files: dict[str, dict[str, Tensor]]) -> None:
    for file_name, tensors in files.items():
        save_file(tensors, folder / file_name, metadata={"format": "pt"})


def _write_index(folder: Path) -> None:
    files = load_files(folder)
    weight_map = {name: file_name for file_name, tensors in files.items() for name in tensors}
    total_size = sum(tensor.nbytes for tensors in files.values() for tensor in tensors.values())
    index = {"metadata": {"total_size": total_size}, "weight_map": dict(sorted(weight_map.items()))}
    (folder / INDEX_NAME).write_text(json.dumps(index, indent=2) + "\n")


def _update_config(folder: Path, **fields: object) -> None:
    config = read_config(folder) | fields
    (folder / "config.json").write_text(json.dumps(config, indent=2) + "\n")
