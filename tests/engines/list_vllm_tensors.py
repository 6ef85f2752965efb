"""Lists the tensors that vLLM's `sharded_state` wants of small models: `python tests/engines/list_vllm_tensors.py`.

For the environment of `make vllm`. The models are built as vLLM builds them before it loads a file, and their state is
filtered as its loader filters it: of tensors that share memory one name is kept. The tests read the list; they need no
vLLM. The choice of kernels for FP8, which most CPUs have none for, is left out: it comes after the shapes.
"""

import json
import os
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

os.environ |= {"VLLM_LOGGING_LEVEL": "ERROR", "TORCHDYNAMO_DISABLE": "1", "VLLM_ENABLE_V1_MULTIPROCESSING": "0"}
sys.path.insert(0, str(Path(__file__).parents[1] / "support"))

import torch
import vllm
from vllm.config import VllmConfig, set_current_vllm_config
from vllm.distributed import ensure_model_parallel_initialized, init_distributed_environment
from vllm.engine.arg_utils import EngineArgs
from vllm.model_executor.layers.quantization import fp8
from vllm.model_executor.model_loader.sharded_state_loader import ShardedStateLoader
from vllm.model_executor.model_loader.utils import initialize_model
from vllm.utils.torch_utils import set_default_torch_dtype
from vllm_models import CASES, write_case
from vllm_oracle import LIST

DTYPES = {torch.bfloat16: "BF16", torch.float32: "F32", torch.float8_e4m3fn: "F8_E4M3"}

RANKS = (1, 2, 4)

fp8.init_fp8_linear_kernel = lambda **_: None
fp8.select_fp8_moe_backend = lambda **_: (None, None)


def read_config(folder: Path, ranks: int) -> VllmConfig:
    """vLLM's configuration for a checkpoint."""
    arguments = {"skip_tokenizer_init": True, "enforce_eager": True, "load_format": "sharded_state"}
    return EngineArgs(model=str(folder), tensor_parallel_size=ranks, **arguments).create_engine_config()


def list_tensors(config: VllmConfig) -> Iterator[tuple[str, str]]:
    """Name, and dtype with shape, of each tensor that a rank's file must have."""
    with set_current_vllm_config(config), set_default_torch_dtype(config.model_config.dtype), torch.device("cpu"):
        state = ShardedStateLoader._filter_subtensors(initialize_model(config).state_dict())
    for name, tensor in sorted(state.items()):
        yield name, f"{DTYPES[tensor.dtype]} {list(tensor.shape)}"


def list_models(rank: int, ranks: int, sources: Path, store: str) -> None:
    """Lists every model, as one of several processes; the first writes what all found equal."""
    # There are groups for experts only if the first model has experts.
    with set_current_vllm_config(read_config(sources / "mixtral", ranks)):
        init_distributed_environment(ranks, rank, f"file://{store}", rank, "gloo")
        ensure_model_parallel_initialized(ranks, 1)
    found = {case: dict(list_tensors(read_config(sources / case, ranks))) for case in CASES}
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
    models = {}
    for case in CASES:
        names = {name for found in lists for name in found[case]}
        models[case] = {name: [found[case].get(name, "") for found in lists] for name in sorted(names)}
    lines = [f'{{"vllm": "{vllm.__version__}", "ranks": {list(RANKS)}, "models": {{']
    for case, tensors in models.items():
        rows = [f"{json.dumps(name)}: {json.dumps(shapes)}" for name, shapes in tensors.items()]
        lines += [f'"{case}": {{', ",\n".join(rows), "},"]
    lines[-1] = "}}}"
    LIST.write_text("\n".join(lines) + "\n")
    print(f"{LIST}: {len(models)} models")


if __name__ == "__main__":
    main()
