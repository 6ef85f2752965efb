"""A converter for tensor parallelism that knows nothing of recipes: cuts by names, with torch. Imports nothing of the
package under test. And forms of models that transformers does not write.
"""

import json
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file
from small_models import write_model
from torch import Tensor

ROWS = (
    r"(embed_tokens|lm_head|q_proj|gate_proj|up_proj)\.(weight|bias|weight_scale|weight_scale_inv)"
    r"|shared_head\.head\.weight|sinks|linear_attn\.(in_proj_\w+|out_proj)\.(weight|weight_scale_inv)"
)
COLUMNS = r"(o_proj|down_proj)\.(weight|weight_scale_inv)"
OF_HEADS = r"[kv]_proj\.(weight|bias|weight_scale|weight_scale_inv)"
FUSED = r"experts\.(gate_up_proj|down_proj)(_bias|_blocks|_scales)?"
EXPERT = r"experts\.(\d+)\."


def share(name: str, tensor: Tensor, config: Mapping[str, Any], rank: int, ranks: int) -> Tensor | None:
    """What a rank has of a tensor, with whole experts; None if nothing. Of a vision tower every rank has all."""
    config = config.get("text_config", config)
    count = config.get("num_experts") or config.get("num_local_experts") or config.get("n_routed_experts") or 0
    if found := re.search(EXPERT, name):
        return tensor if int(found[1]) * ranks // count == rank else None
    if re.search(rf"\.({FUSED})$", name):
        return tensor[rank * count // ranks : (rank + 1) * count // ranks]
    if re.search(rf"\.({OF_HEADS})$", name):
        heads = config["num_key_value_heads"]
        first, last = rank * heads // ranks, -(-(rank + 1) * heads // ranks)
        width = len(tensor) // heads
        return tensor[first * width : last * width]
    if re.search(rf"(^|\.)({ROWS})$", name):
        return tensor.chunk(ranks)[rank]
    if re.search(rf"\.({COLUMNS})$", name):
        return tensor.chunk(ranks, 1)[rank]
    return tensor


CUT_EXPERTS: Mapping[str, int] = {
    r"experts\.\d+\.(w1|w3|gate_proj|up_proj)\.weight": 0,
    r"experts\.\d+\.(w2|down_proj)\.weight": 1,
    r"experts\.gate_up_proj": 2,
    r"experts\.gate_up_proj_(bias|blocks|scales)": 1,
    r"experts\.down_proj": 1,
    r"experts\.down_proj_(blocks|scales)": 2,
}
"""By the end of a name: the dimension of the inner channels of experts."""


def share_with_cut_experts(name: str, tensor: Tensor, config: Mapping[str, Any], rank: int, ranks: int) -> Tensor:
    """What a rank has of a tensor, with all experts, each cut."""
    for ending, dimension in CUT_EXPERTS.items():
        if re.search(rf"\.{ending}$", name):
            width = tensor.shape[dimension] // ranks
            assert width * ranks == tensor.shape[dimension], name
            return tensor.narrow(dimension, rank * width, width)
    if name.endswith("experts.down_proj_bias"):
        return tensor
    found = share(name, tensor, config, rank, ranks)
    assert found is not None
    return found


def tensors_of(folder: Path) -> dict[str, Tensor]:
    return {name: tensor for path in sorted(folder.glob("*.safetensors")) for name, tensor in load_file(path).items()}


def rewrite(folder: Path, tensors: Mapping[str, Tensor], **changes: Any) -> None:
    """The same checkpoint with other tensors, in one file, and another config."""
    for path in [*folder.glob("*.safetensors"), *folder.glob("*.index.json")]:
        path.unlink()
    save_file(dict(tensors), folder / "model.safetensors", {"format": "pt"})
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps({**config, **changes}))


def write_mxfp4(folder: Path, *, intermediate_size: int = 96) -> None:
    """gpt-oss as it is published: experts of 32 values in 16 bytes, and a scale for each 32."""
    write_model(folder, "gpt-oss", hidden_size=64, intermediate_size=intermediate_size)
    tensors = tensors_of(folder)
    for name in [name for name in tensors if re.search(r"experts\.(gate_up|down)_proj$", name)]:
        experts, before, after = tensors.pop(name).shape
        tensors[f"{name}_blocks"] = torch.randint(256, (experts, after, before // 32, 16), dtype=torch.uint8)
        tensors[f"{name}_scales"] = torch.randint(256, (experts, after, before // 32), dtype=torch.uint8)
    rewrite(folder, tensors, quantization_config={"quant_method": "mxfp4"})
