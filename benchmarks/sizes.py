"""How large the file of a rank is, for each number of ranks that a family can be cut for, at its full size.

    python benchmarks/sizes.py
    python benchmarks/sizes.py deepseek-v3
    python benchmarks/sizes.py deepseek-v4-flash --expert-dtype fp8

Makes the checkpoint in a temporary folder: all names, shapes and sizes are true, the data are holes in sparse files.
The sizes are those that `reshard plan` shows with the same options. Without a name, lists the names.
"""

import argparse
import gc
import sys
import tempfile
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).parents[1] / "tests" / "support"))  # the lists of the published tensors

from families import FAMILIES, write_full
from hybrid_families import HYBRIDS, write_full_hybrid
from jobs import make_plan

from reshard.errors import Refused
from reshard.planning.plan import Plan
from reshard.recipes.recipe import list_packaged_recipes
from reshard.sources.checkpoints import read_checkpoint
from reshard.sources.engine_choice import choose_for_engine
from reshard.sources.recipe_choice import choose_recipe
from reshard.sources.stacked_experts import read_under_hub_names
from reshard.synthetic import DEEPSEEK_V2_LITE, write_checkpoint
from reshard.text import escape, format_size, format_table
from reshard.types import Checkpoint, Layout

RANKS = (1, 2, 4, 8, 16, 32, 64)
V2: Mapping[str, Any] = {
    **DEEPSEEK_V2_LITE,
    "hidden_size": 5120,
    "intermediate_size": 12288,
    "moe_intermediate_size": 1536,
    "n_routed_experts": 160,
    "num_attention_heads": 128,
    "num_hidden_layers": 60,
    "q_lora_rank": 1536,
}
V2_MODELS = {"deepseek-v2-lite": (DEEPSEEK_V2_LITE, 4), "deepseek-v2": (V2, 55)}
NAMES = [*V2_MODELS, *(name for name in FAMILIES if name != "deepseek-v3-for-32"), *HYBRIDS]


def main() -> None:
    parser = argparse.ArgumentParser(description="The size of a rank file of a family, for 1 to 64 ranks.")
    parser.add_argument("name", nargs="?", choices=NAMES)
    parser.add_argument("--cast", default="")
    parser.add_argument("--expert-dtype", default="")
    parser.add_argument("--mtp", choices=("drop", "keep"), default="drop")
    parser.add_argument("--pad", action="store_true")
    options = parser.parse_args()
    if not options.name:
        print("\n".join(NAMES))
        return
    gc.disable()  # as the command does
    print("\n".join(map(escape, lines(options))))


def lines(options: argparse.Namespace) -> Iterator[str]:
    """A table of the numbers of ranks that work, then those that are refused."""
    checkpoint = full_checkpoint(options.name)
    recipe = choose_recipe(checkpoint, choose_for_engine(list_packaged_recipes(), "", is_named=False))[0]
    yield f"{options.name}: {len(checkpoint.tensors):,} tensors, recipe {recipe.name}"
    rows, refusals = [], []
    for ranks in RANKS:
        keep = options.mtp == "keep"
        layout = Layout(
            ranks, cast=options.cast, expert_dtype=options.expert_dtype, keep_optional=keep, pad=options.pad
        )
        try:
            rows.append(row(make_plan(checkpoint, recipe, layout)))
        except Refused as refused:
            problem = refused.problems[0]
            refusals.append(f"--mp {ranks}: refused: {problem.subject}: {problem.found}")
    yield from format_table(("--mp", "tensors a rank", "bytes of the largest rank", ""), rows).splitlines()
    yield from refusals


def full_checkpoint(name: str) -> Checkpoint:
    with tempfile.TemporaryDirectory(prefix="reshard-sizes-") as folder:
        if name in V2_MODELS:
            config, files = V2_MODELS[name]
            write_checkpoint(Path(folder) / name, config, files, sparse=True)
        elif name in HYBRIDS:
            write_full_hybrid(Path(folder) / name, name)
        else:
            write_full(Path(folder) / name, name)
        return read_under_hub_names(read_checkpoint(Path(folder) / name))


def row(plan: Plan) -> tuple[str, str, str, str]:
    largest = max(plan.files, key=lambda file: file.size)
    config = plan.source.config or {}
    raised = [f", {key} {value}" for key, value in (plan.config or {}).items() if value != config.get(key)]
    size = f"{largest.size:,}", format_size(largest.size) + "".join(raised)
    return str(plan.layout.ranks), f"{len(largest.pieces):,}", *size


if __name__ == "__main__":
    main()
