"""Lists the tensors that vLLM's `sharded_state` wants of small models: `python tests/engines/list_vllm_tensors.py`.

For the environment of `make vllm`. The models are built as vLLM builds them before it loads a file, and their state is
filtered as its loader filters it: of tensors that share memory one name is kept. The tests read the list; they need no
vLLM. Experts in MXFP4 have other sizes for other kernels: those of one layer are listed for each kind of kernels.
"""

import json
import os
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

os.environ |= {"VLLM_LOGGING_LEVEL": "ERROR"}
sys.path.insert(0, str(Path(__file__).parents[1] / "support"))

import torch
import vllm
from forced_kernels import KERNELS, RANKS, build_model, force_mxfp4, read_config, start_group
from vllm.config import VllmConfig
from vllm.model_executor.model_loader.sharded_state_loader import ShardedStateLoader
from vllm_models import CASES, MXFP4, write_case
from vllm_oracle import LIST

DTYPES = {torch.bfloat16: "BF16", torch.float32: "F32", torch.float8_e4m3fn: "F8_E4M3", torch.uint8: "U8"}

EXPERTS = "model.layers.0.mlp.experts."
"""Begins the names that are listed for each kind of kernels."""


def list_tensors(config: VllmConfig) -> Iterator[tuple[str, str]]:
    """Name, and dtype with shape, of each tensor that a rank's file must have."""
    state = ShardedStateLoader._filter_subtensors(build_model(config).state_dict())
    for name, tensor in sorted(state.items()):
        yield name, f"{DTYPES[tensor.dtype]} {list(tensor.shape)}"


def list_models(rank: int, ranks: int, sources: Path, store: str) -> None:
    """Lists every model, as one of several processes; the first writes what all found equal."""
    start_group(rank, ranks, store, sources / "mixtral")
    force_mxfp4(KERNELS[0])
    found = {case: dict(list_tensors(read_config(sources / case, ranks))) for case in CASES}
    for kernels in KERNELS:
        force_mxfp4(kernels)
        every = list_tensors(read_config(sources / MXFP4, ranks))
        found[kernels] = {name: text for name, text in every if name.startswith(EXPERTS)}
    others: list[Any] = [None] * ranks
    torch.distributed.all_gather_object(others, found)
    if any(other != found for other in others):
        sys.exit("the ranks differ")
    if rank == 0:
        (sources / f"{ranks}.json").write_text(json.dumps(found))


def main() -> None:
    """Writes the list: for each model and tensor what a rank has of it, at each number of ranks."""
    with tempfile.TemporaryDirectory(prefix="reshard-vllm-") as name:
        sources = Path(name)
        for case in CASES:
            (sources / case).mkdir()
            write_case(sources / case, case)
        for ranks in RANKS:
            torch.multiprocessing.spawn(list_models, (ranks, sources, f"{name}/store-{ranks}"), ranks)  # type: ignore[attr-defined, no-untyped-call]
        lists = [json.loads((sources / f"{ranks}.json").read_text()) for ranks in RANKS]
    lines = [f'{{"vllm": "{vllm.__version__}", "ranks": {list(RANKS)}, "models": {{']
    lines += [*format_lists(CASES, lists), '}, "kernels": {', *format_lists(KERNELS, lists), "}}"]
    LIST.write_text("\n".join(lines) + "\n")
    print(f"{LIST}: {len(CASES)} models, {len(KERNELS)} kinds of kernels")


def format_lists(keys: tuple[str, ...], lists: list[Any]) -> Iterator[str]:
    """Lines of JSON: for each key its tensors, and of each what a rank has of it, at each number of ranks."""
    for key in keys:
        names = sorted({name for found in lists for name in found[key]})
        rows = [f"{json.dumps(name)}: {json.dumps([found[key].get(name, '') for found in lists])}" for name in names]
        yield f'"{key}": {{\n' + ",\n".join(rows) + ("\n}" if key == keys[-1] else "\n},")


if __name__ == "__main__":
    main()
