"""Loads a small gpt-oss in MXFP4 into the real vLLM, from its checkpoint and from rank files: a part of `make vllm`.

Few CPUs have kernels for MXFP4, so that it is not run: the parameters are compared, byte for byte, before they are
packed for the kernels, for each kind of kernels whose sizes differ. Where they are larger than what a rank has, vLLM
warns of the shape, of exactly these tensors and no other.
"""

import logging
import re
import shutil
import sys
import tempfile
from collections.abc import Mapping
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).parents[1] / "support"))

import torch
from forced_kernels import KERNELS, RANKS, build_model, force_mxfp4, read_config, start_group
from run_vllm import STATE, lay_out
from safetensors.torch import load_file, save_file
from vllm.config import set_current_vllm_config
from vllm.model_executor.model_loader import get_model_loader
from vllm_models import MXFP4

TOO_SMALL = {("B12X_MXFP4_BF16", 2), ("B12X_MXFP4_BF16", 4)}
"""Kernels and ranks where vLLM itself cannot load the checkpoint: its parameters have no room for whole blocks, but in
the last rank, which has fewer."""

DAMAGED = "model.layers.1.mlp.experts.routed_experts.w2_bias"

WARNING = re.compile(r"loading tensor of shape .* into parameter '(\S+)' of shape")


class Warnings(logging.Handler):
    """Collects the names of parameters that vLLM warns of, and whatever else it warns of."""

    def __init__(self) -> None:
        super().__init__(logging.WARNING)
        self.names: set[str] = set()

    def emit(self, record: logging.LogRecord) -> None:
        text = record.getMessage()
        found = WARNING.search(text)
        if found or "Attempted to load" in text:
            self.names.add(found[1] if found else text)


def load(folder: Path, ranks: int, load_format: str) -> dict[str, torch.Tensor] | None:
    """The state of a model with all weights loaded and not processed; None if vLLM cannot load them."""
    config = read_config(folder, ranks, load_format)
    model = build_model(config)
    with set_current_vllm_config(config), torch.device("cpu"):
        try:
            get_model_loader(config.load_config).load_weights(model, config.model_config)
        except RuntimeError as error:
            if "must match" not in str(error):
                raise
            return None
    return model.state_dict()


def find_differences(wanted: Mapping[str, torch.Tensor], found: Mapping[str, torch.Tensor]) -> list[str]:
    """The names of tensors that differ in a byte, or that only one has."""
    both = wanted.keys() & found.keys()
    differing = [key for key in both if not torch.equal(view_bytes(wanted[key]), view_bytes(found[key]))]
    return sorted([*differing, *(wanted.keys() ^ found.keys())])


def view_bytes(tensor: torch.Tensor) -> torch.Tensor:
    return tensor.contiguous().reshape(-1).view(torch.uint8)


def compare(rank: int, ranks: int, source: Path, target: Path, store: str) -> None:
    """Compares what this rank has from the checkpoint and from its file, for each kind of kernels."""
    start_group(rank, ranks, store, source)
    warnings = Warnings()
    logger = logging.getLogger("vllm.model_executor.model_loader.sharded_state_loader")
    logger.addHandler(warnings)
    logger.propagate = False  # or the screen is full of them
    shapes = {key: tensor.shape for key, tensor in load_file(target / f"model-rank-{rank}-part-0.safetensors").items()}
    for kernels in KERNELS:
        force_mxfp4(kernels)
        warnings.names = set()
        wanted, found = load(source, ranks, "auto"), load(target, ranks, STATE)
        is_refused = (kernels, ranks) in TOO_SMALL and rank < ranks - 1
        require((wanted is None) == (found is None) == is_refused, f"{kernels} at {ranks} ranks, rank {rank}: loaded?")
        if wanted is None or found is None:
            tell(rank, f"{kernels} at {ranks} ranks: neither loads, as expected")
            continue
        require(not (wrong := find_differences(wanted, found)), f"{kernels} at {ranks} ranks, rank {rank}: {wrong}")
        larger = {key for key, shape in shapes.items() if shape != wanted[key].shape}
        require(warnings.names == larger, f"{kernels}: warnings of {warnings.names ^ larger}")
        require(all(".mlp.experts." in key for key in larger), f"{kernels}: larger than {larger}")
        tell(rank, f"{kernels} at {ranks} ranks: {len(wanted)} tensors equal; warnings of {len(larger)} in rank 0")
    force_mxfp4(KERNELS[0])
    wanted, found = load(source, ranks, "auto"), load(target.with_name(f"{target.name}-damaged"), ranks, STATE)
    require(find_differences(wanted or {}, found or {}) == [DAMAGED], f"one wrong value at {ranks} ranks is not seen")
    tell(rank, f"one wrong value at {ranks} ranks is seen")


def require(condition: Any, text: str) -> None:
    if not condition:
        sys.exit(text)


def tell(rank: int, text: str) -> None:
    if rank == 0:
        print(text, flush=True)


def damage(target: Path, ranks: int) -> None:
    """A copy of the rank files with another bias in each: of all ranks but the first where zeros should be."""
    copy = Path(shutil.copytree(target, target.with_name(f"{target.name}-damaged")))
    for rank in range(ranks):
        path = copy / f"model-rank-{rank}-part-0.safetensors"
        tensors = load_file(path)
        tensors[DAMAGED][3, 5] += 1
        save_file(tensors, path)


def main() -> None:
    """Compares at each number of ranks; ends with an error if anything differs."""
    with tempfile.TemporaryDirectory(prefix="reshard-vllm-") as name:
        for ranks in RANKS:
            job = lay_out(Path(name), MXFP4, ranks, "reshard")
            damage(Path(job["target"]), ranks)
            arguments = (ranks, Path(job["source"]), Path(job["target"]), f"{name}/store-{ranks}")
            torch.multiprocessing.spawn(compare, arguments, ranks)  # type: ignore[attr-defined, no-untyped-call]
    print(f"passed: {MXFP4} from files of reshard")


if __name__ == "__main__":
    main()
