"""Builds vLLM's models for kernels that the machine lacks: as on others, up to where the kernels pack the weights.

For the environment of `make vllm`. The choice of kernels for FP8, which most CPUs have none for, is left out: it comes
after the shapes. For MXFP4 it comes before them, and is made here.
"""

import os
from pathlib import Path
from typing import Any

os.environ |= {"TORCHDYNAMO_DISABLE": "1", "VLLM_ENABLE_V1_MULTIPROCESSING": "0"}

import torch
from vllm.config import VllmConfig, set_current_vllm_config
from vllm.distributed import ensure_model_parallel_initialized, init_distributed_environment
from vllm.engine.arg_utils import EngineArgs
from vllm.model_executor.layers.fused_moe.oracle.mxfp4 import Mxfp4MoeBackend
from vllm.model_executor.layers.quantization import fp8, mxfp4
from vllm.model_executor.model_loader.utils import initialize_model
from vllm.utils.torch_utils import set_default_torch_dtype

RANKS = (1, 2, 4)

KERNELS = (
    "CPU",
    "EMULATION",
    "TRITON",
    "MARLIN",
    "FLASHINFER_TRTLLM_MXFP4_BF16",
    "FLASHINFER_CUTLASS_MXFP4_BF16",
    "B12X_MXFP4_BF16",
)
"""Kernels for MXFP4, one of each kind of sizes but for AMD's, which vLLM widens there only."""

fp8.init_fp8_linear_kernel = lambda **_: None
fp8.select_fp8_moe_backend = lambda **_: (None, None)


def force_mxfp4(kernels: str) -> None:
    """Lets vLLM build models for these kernels."""
    chosen = Mxfp4MoeBackend[kernels]
    mxfp4.select_mxfp4_moe_backend = lambda *_: (chosen, None)


def read_config(folder: Path, ranks: int, load_format: str = "sharded_state") -> VllmConfig:
    """vLLM's configuration for a checkpoint."""
    arguments: dict[str, Any] = {"skip_tokenizer_init": True, "enforce_eager": True, "load_format": load_format}
    return EngineArgs(model=str(folder), tensor_parallel_size=ranks, **arguments).create_engine_config()


def start_group(rank: int, ranks: int, store: str, folder: Path) -> None:
    """Makes this process one of several ranks. There are groups for experts only if the model in the folder has any."""
    with set_current_vllm_config(read_config(folder, ranks)):
        init_distributed_environment(ranks, rank, f"file://{store}", rank, "gloo")
        ensure_model_parallel_initialized(ranks, 1)


def build_model(config: VllmConfig) -> torch.nn.Module:
    """A model as vLLM builds it before it loads a file."""
    with set_current_vllm_config(config), set_default_torch_dtype(config.model_config.dtype), torch.device("cpu"):
        model: torch.nn.Module = initialize_model(config)
    return model
