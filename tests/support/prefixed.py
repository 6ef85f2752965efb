"""Tiny Llamas and Qwen3s under the names that trainers give them, written by safetensors."""

import json
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from torch import Tensor

INDEX = "model.safetensors.index.json"

LLAMA: Mapping[str, Any] = {
    "model_type": "llama",
    "architectures": ["LlamaForCausalLM"],
    "hidden_size": 8,
    "intermediate_size": 16,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "vocab_size": 12,
    "tie_word_embeddings": False,
}

QWEN3: Mapping[str, Any] = {**LLAMA, "model_type": "qwen3", "architectures": ["Qwen3ForCausalLM"], "head_dim": 2}

Rename = Callable[[str], str]


def make_tensors(config: Mapping[str, Any] = LLAMA) -> dict[str, Tensor]:
    """The tensors of a model, of random values, in the order of the model."""
    torch.manual_seed(12)
    hidden, inner, words = config["hidden_size"], config["intermediate_size"], config["vocab_size"]
    kv = hidden // config["num_attention_heads"] * config["num_key_value_heads"]
    shapes: dict[str, tuple[int, ...]] = {"model.embed_tokens.weight": (words, hidden)}
    for layer in range(config["num_hidden_layers"]):
        own: dict[str, tuple[int, ...]] = {"input_layernorm": (hidden,), "post_attention_layernorm": (hidden,)}
        own |= {"self_attn.q_proj": (hidden, hidden), "self_attn.o_proj": (hidden, hidden)}
        own |= {"self_attn.k_proj": (kv, hidden), "self_attn.v_proj": (kv, hidden)}
        own |= {"mlp.gate_proj": (inner, hidden), "mlp.up_proj": (inner, hidden), "mlp.down_proj": (hidden, inner)}
        if config["model_type"] == "qwen3":
            own |= {"self_attn.q_norm": (config["head_dim"],), "self_attn.k_norm": (config["head_dim"],)}
        shapes |= {f"model.layers.{layer}.{name}.weight": shape for name, shape in own.items()}
    shapes["model.norm.weight"] = (hidden,)
    if not config["tie_word_embeddings"]:
        shapes["lm_head.weight"] = (words, hidden)
    return {name: torch.randn(shape).bfloat16() for name, shape in shapes.items()}


def write_model_as(
    folder: Path, rename: Rename, config: Mapping[str, Any] = LLAMA, *, files: int = 2, without: str = ""
) -> dict[str, Tensor]:
    """Writes a model under other names, in several files with an index; returns its tensors under their own names."""
    tensors = {name: tensor for name, tensor in make_tensors(config).items() if name != without}
    write_tensors_as(folder, {rename(name): tensor for name, tensor in tensors.items()}, config, files=files)
    return tensors


def write_tensors_as(
    folder: Path, tensors: Mapping[str, Tensor], config: Mapping[str, Any] | None = LLAMA, *, files: int = 2
) -> None:
    """Writes tensors as they are named, in several files with an index."""
    folder.mkdir(parents=True)
    names = list(tensors)
    weight_map: dict[str, str] = {}
    for number in range(files):
        file = f"model-{number + 1:05}-of-{files:05}.safetensors" if files > 1 else "model.safetensors"
        chosen = names[number * len(names) // files : (number + 1) * len(names) // files]
        save_file({name: tensors[name] for name in chosen}, folder / file, metadata={"format": "pt", "by": "a trainer"})
        weight_map |= dict.fromkeys(chosen, file)
    if files > 1:
        total = sum(tensor.nbytes for tensor in tensors.values())
        (folder / INDEX).write_text(json.dumps({"metadata": {"total_size": total}, "weight_map": weight_map}))
    if config is not None:
        (folder / "config.json").write_text(json.dumps(config))


def add_prefix(prefix: str) -> Rename:
    """Puts a prefix in front of every name."""
    return lambda name: prefix + name


def name_text_model(name: str) -> str:
    """As VL trainings save the text model: `lm_head` stays."""
    return name.replace("model.", "model.language_model.", 1)


def name_old_text_model(name: str) -> str:
    """As older VL models have it: the head lies within."""
    return "language_model." + name


def leave_out_body(name: str) -> str:
    """As embedding models have it: no `model.`."""
    return name.removeprefix("model.")


def wrap_layers(name: str) -> str:
    """Every second layer is compiled, and the MLP of each wrapped by FSDP."""
    name = name.replace("layers.1.", "layers.1._orig_mod.")
    return name.replace(".mlp.", ".mlp._fsdp_wrapped_module._checkpoint_wrapped_module.")


def double_body(name: str) -> str:
    """`model.` twice, but not before the head."""
    return name.replace("model.", "model.model.", 1)


TAKEN_OUT = (
    "then 6 of 21 names: `_fsdp_wrapped_module.` was taken out; "
    "then 6 of 21 names: `_checkpoint_wrapped_module.` was taken out"
)

WAYS: Mapping[str, tuple[Rename, str]] = {
    "compiled": (add_prefix("_orig_mod."), "all 21 names: `_orig_mod.` in front was taken off"),
    "ddp": (add_prefix("module."), "all 21 names: `module.` in front was taken off"),
    "peft": (add_prefix("base_model.model."), "all 21 names: `base_model.model.` in front was taken off"),
    "chain": (
        add_prefix("_orig_mod.module._fsdp_wrapped_module."),
        "all 21 names: `_orig_mod.module._fsdp_wrapped_module.` in front was taken off",
    ),
    "student": (add_prefix("agent.student."), "all 21 names: `agent.student.` in front was taken off"),
    "text-model": (name_text_model, "20 of 21 names: `model.language_model.` in front became `model.`"),
    "old-text-model": (name_old_text_model, "all 21 names: `language_model.` in front was taken off"),
    "outer-text-model": (
        lambda name: name if name.startswith("lm_head") else "language_model." + name,
        "20 of 21 names: `language_model.` in front was taken off",
    ),
    "doubled": (double_body, "20 of 21 names: `model.model.` in front became `model.`"),
    "all-doubled": (add_prefix("model."), "all 21 names: `model.` in front was taken off"),
    "bare": (leave_out_body, "20 of 21 names: `model.` was put in front"),
    "wrapped-layers": (
        wrap_layers,
        f"9 of 21 names: `_orig_mod.` was taken out; {TAKEN_OUT}",
    ),
    "all": (
        lambda name: "module." + wrap_layers(name),
        f"all 21 names: `module.` in front was taken off; then 9 of 21 names: `_orig_mod.` was taken out; {TAKEN_OUT}",
    ),
}
"""By word: how trainers name the tensors of a Llama, and what the note says of it."""
