"""Engines that read the files of a target: a table, and the commands that start them, or load slices. What no row knows
has no command.

The rows on DeepSeek's code are from the READMEs beside it; those on vLLM from its table of models (`registry.py`, as of
2026). docs/families has a page for each model, with what was tried of them.
"""

import json
import shlex
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import NamedTuple

import reshard
from reshard.planning.plan import Plan
from reshard.planning.slices import UNREAD
from reshard.target.run_config import RUN_CONFIG

RANKS_PER_NODE = 8
"""The most GPUs of a node, and so the most ranks."""


class Generator(NamedTuple):
    """The `generate.py` that reads the rank files of a recipe."""

    model_type: str
    """Others of the recipe, such as Kimi-K2, need changes of the code."""
    place: str
    """Where it lies, if not beside the source."""
    options: str = "--interactive"
    casts: tuple[str, ...] = ("",)
    """The values of `--cast` whose weights it reads."""


V3_CASTS = ("", "bf16", "fp8", "fp8-ue8m0")
GENERATORS = {
    "deepseek-v2": Generator("deepseek_v2", "in the folder inference of DeepSeek-V3", casts=V3_CASTS),
    "deepseek-v3": Generator("deepseek_v3", "in the folder inference of DeepSeek-V3", casts=V3_CASTS),
    "deepseek-v32": Generator("deepseek_v32", "in the folder inference of DeepSeek-V3.2-Exp"),
    "deepseek-v4": Generator("deepseek_v4", "in the folder inference of the checkpoint"),
    "deepseek-v41": Generator(
        "deepseek_v41", "in the folder inference of the checkpoint", "--interactive --thinking-mode chat"
    ),
}
"""By recipe. Of the DSpark models and of Vision-Exp the options are not known, of GLM-5 no such code."""

EXAMPLE = Path("examples", "tensor_parallel_torch.py")
"""In the source folder of reshard: the one reader of plain tensor-parallel files that is known."""

EXAMPLE_RECIPES = ("llama", "qwen2", "qwen3")
"""What the example reads: dense models in floating point."""

VLLM = "vllm"
"""As the engine of a recipe: rank files for its `sharded_state`."""

VLLM_CASTS = {
    **dict.fromkeys(("deepseek-v2", "deepseek-v3", "deepseek-v32", "glm-5", "kimi-k25"), ("", "bf16")),
    **dict.fromkeys(("llama", "qwen2", "qwen3", "qwen3-moe", "mixtral", "glm4-moe"), ("", "bf16")),
    **dict.fromkeys(("qwen3-next", "qwen35", "qwen35-moe", "minimax-m2"), ("", "bf16")),
    **dict.fromkeys(("vllm-llama", "vllm-qwen2", "vllm-qwen3", "vllm-qwen3-moe", "vllm-mixtral"), ("", "bf16")),
    **dict.fromkeys(("vllm-deepseek-v2", "vllm-deepseek-v3"), ("", "bf16")),
    **dict.fromkeys(("deepseek-v4", "glm4-moe-fp8", "gpt-oss", "vllm-gpt-oss"), ("",)),
}
"""By recipe: the values of `--cast` after which whole files are read by vLLM."""

TRANSFORMERS = "transformers"

TRANSFORMERS_RECIPES = ("llama", "qwen2", "qwen3", "gpt-oss")
"""Those whose names are the same in the memory of transformers as on the hub: it loads slices by the former."""

NOT_LOADED = {"loader-names", "loader-quantized"}
"""Kinds of the notes on slices that transformers does not load."""


class Start(NamedTuple):
    """How an engine is started with the files of a target."""

    text: str
    """Where, and on how many nodes, in words."""
    command: str
    """For a shell. `$RANK` and `$ADDR` in it are those of the node."""


def count_ranks_per_node(ranks: int) -> int:
    """The number of ranks on each node: all if one node can have them, else the most that all nodes have alike."""
    return next(number for number in range(min(ranks, RANKS_PER_NODE), 0, -1) if ranks % number == 0)


def make_rank_start(plan: Plan, folder: Path, names: Sequence[str], own: int) -> Start | None:
    """Makes the command that starts the engine for the rank files in a folder, with `own` ranks on each node; None if
    none is known. `names` are the names of the files in the folder.
    """
    generator = GENERATORS.get(plan.recipe.name)
    model_type, layout = (plan.config or {}).get("model_type"), plan.layout
    if generator and generator.model_type == model_type and RUN_CONFIG in names:
        # A strict loader refuses tensors that it does not know, such as those of MTP layers.
        can_read = layout.cast in generator.casts and not layout.keep_optional
        return make_generator_start(plan, folder, generator, own) if can_read else None
    if plan.recipe.engine == VLLM and own == layout.ranks and "config.json" in names:
        words = ["vllm", "serve", str(folder), "--load-format", "sharded_state"]
        return Start("start", shlex.join([*words, "--tensor-parallel-size", str(layout.ranks)]))
    if plan.recipe.name in EXAMPLE_RECIPES and own == layout.ranks and "config.json" in names:
        return make_example_start(layout.ranks, folder, names)
    return None


def make_generator_start(plan: Plan, folder: Path, generator: Generator, own: int) -> Start:
    """Makes the command that starts DeepSeek's `generate.py`."""
    ranks = plan.layout.ranks
    nodes = ranks // own
    spread = f"--nnodes {nodes} --nproc-per-node {own} --node-rank $RANK --master-addr $ADDR"
    processes = f"--nproc-per-node {ranks}" if nodes == 1 else spread
    files = shlex.join(["--ckpt-path", str(folder), "--config", str(folder / RUN_CONFIG)])
    command = f"torchrun {processes} generate.py {files} {generator.options}"
    code = plan.side_folder.absolute() / "inference"
    is_beside = isinstance(code, Path) and (code / "generate.py").is_file()
    command = f"cd {shlex.quote(str(code))} && {command}" if is_beside else command
    where = "on one node" if nodes == 1 else f"on {nodes} nodes ($RANK from 0 on, $ADDR of the first)"
    return Start(f"start {where}" + ("" if is_beside else f", {generator.place}"), command)


def make_example_start(ranks: int, folder: Path, names: Sequence[str]) -> Start:
    """Makes the command that starts the example for dense tensor-parallel models, with a prompt if a tokenizer is
    there.
    """
    path = Path(reshard.__file__).parents[2] / EXAMPLE
    text = "try" if path.is_file() else "try, in the source folder of reshard"
    words = ["torchrun", "--nproc-per-node", str(ranks), str(path if path.is_file() else EXAMPLE), str(folder)]
    words += ["--prompt", "The sky is"] if any("tokenizer" in name for name in names) else ["--ids", "1,2,3"]
    return Start(text, shlex.join(words))


def make_whole_start(plan: Plan, folder: Path, names: Sequence[str]) -> Start | None:
    """Makes the command that starts the engine for whole files in a folder; None if none is known."""
    casts = VLLM_CASTS.get(plan.recipe.name.removesuffix("-cut-experts"), ())
    if plan.layout.cast not in casts or plan.layout.expert_dtype or "config.json" not in names:
        return None
    return Start("start", shlex.join(["vllm", "serve", str(folder)]))


def list_slice_loads(plan: Plan, folder: Path, names: Sequence[str]) -> Iterator[Start]:
    """Lists the lines of Python that load the slices in a folder, the shortest first. torch loads into tensors that its
    caller has, each whole or a part.
    """
    where = json.dumps(str(folder), ensure_ascii=False)
    is_known = plan.recipe.name in TRANSFORMERS_RECIPES or plan.recipe.engine == TRANSFORMERS
    if is_known and "config.json" in names and not any(note.kind in NOT_LOADED for note in plan.notes):
        yield Start("load with transformers, in Python", f"AutoModelForCausalLM.from_pretrained({where})")
    if not any(tensor.dtype in UNREAD for tensor in plan.pieces.tensors):
        line = f"dcp.load(state, storage_reader=HuggingFaceStorageReader({where}))"
        yield Start("load with torch, in Python, into the tensors of your model (state)", line)
