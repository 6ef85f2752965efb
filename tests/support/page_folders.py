"""What the pages speak of: small checkpoints under the names of large ones, each made where a page names it."""

import shutil
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from downloads import record
from packed_llamas import write_packed
from safetensors.torch import load_file, save_file
from small_models import write_model
from store_servers import serve_hub
from torch.distributed.checkpoint.filesystem import FileSystemWriter
from torch.distributed.checkpoint.state_dict_saver import save

from reshard.synthetic import SMALL_V3, write_checkpoint

FOR_16_RANKS: Mapping[str, Any] = {
    **SMALL_V3,
    "hidden_size": 128,
    "intermediate_size": 2048,
    "kv_lora_rank": 128,
    "moe_intermediate_size": 128,
    "n_routed_experts": 256,
    "num_attention_heads": 32,
    "num_hidden_layers": 2,
    "q_lora_rank": 128,
    "vocab_size": 512,
}
"""As many experts as DeepSeek-V3, and sizes that 16 ranks can cut."""

ON_HUB = "Qwen/Qwen3-8B"

TRAINED = ".layers.1.mlp."
"""In the names of the weights that a training has changed."""


def write_incomplete(folder: Path) -> None:
    """A checkpoint without its second file."""
    write_checkpoint(folder, SMALL_V3, 4)
    (folder / "model-00002-of-00004.safetensors").unlink()


def write_downloaded(folder: Path) -> None:
    """A model in BF16, with the records that the hub's downloader leaves."""
    write_model(folder, "qwen3", dtype="bfloat16")
    record(folder, [path.name for path in folder.iterdir()])


def write_tuned(folder: Path) -> None:
    """The same model after a training."""
    write_model(folder, "qwen3", dtype="bfloat16")
    for path in folder.glob("*.safetensors"):
        trained = {name: tensor.bfloat16() for name, tensor in train(load_file(path)).items()}
        save_file(trained, path, {"format": "pt"})


def write_training(folder: Path) -> None:
    """The same model as torch saves it in a training: its weights in F32, and the state of an optimizer."""
    whole = folder.with_suffix(".whole")
    write_model(whole, "qwen3", dtype="bfloat16")
    weights: dict[str, torch.Tensor] = {}
    for path in sorted(whole.glob("*.safetensors")):
        weights |= train(load_file(path))
    shutil.rmtree(whole)
    moments = {f"state.{name}.exp_avg": torch.zeros_like(tensor) for name, tensor in weights.items()}
    state = {"model": weights, "optim": moments, "step": 1000}
    save(state, storage_writer=FileSystemWriter(folder, thread_count=4), no_dist=True)


def train(weights: Mapping[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """The weights in F32, some of them changed by a hundredth."""
    return {name: tensor.float() * (1.01 if TRAINED in name else 1) for name, tensor in weights.items()}


def write_awq(folder: Path) -> None:
    """A Llama in 4 bits, as AWQ packs it."""
    both = folder.with_suffix(".both")
    write_packed(both, "awq")
    (both / "packed").rename(folder)
    shutil.rmtree(both)


WRITERS: Mapping[str, Callable[[Path], None]] = {
    "DeepSeek-V3": lambda folder: write_checkpoint(folder, FOR_16_RANKS, 4),
    "incomplete": write_incomplete,
    "empty": Path.mkdir,
    "Qwen3-8B": write_downloaded,
    "Qwen3-8B-tuned": write_tuned,
    "step-1000": write_training,
    "Llama-3.1-8B-AWQ": write_awq,
}


@contextmanager
def write_folders(folder: Path, text: str) -> Iterator[Mapping[str, str]]:
    """Writes the checkpoints whose names stand in the text of a page. A context, for one may lie on the hub; gives the
    settings for that.
    """
    for name in names_in(text):
        WRITERS[name](folder / name)
    if f"hf://{ON_HUB}" not in text:
        yield {}
        return
    write_model(folder / "hub", "qwen3", dtype="bfloat16")
    with serve_hub(folder / "hub", name=ON_HUB) as served:
        yield {
            "HF_ENDPOINT": served.endpoint,
            "HF_HUB_OFFLINE": "0",
            "HF_TOKEN": "",
            "HF_TOKEN_PATH": "none",
            "NO_PROXY": "*",
        }


def names_in(text: str) -> Iterable[str]:
    return [name for name in WRITERS if name in text]
