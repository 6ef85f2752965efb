"""START HERE: the whole program in one function."""

from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager
from dataclasses import dataclass
from pathlib import Path

from reshard.choose import choose_recipe
from reshard.errors import refuse, require_none
from reshard.execute import Advance, execute_plan
from reshard.manifest import MANIFEST, manifest_bytes
from reshard.plan import Plan, make_plan, only_ranks
from reshard.read import read_checkpoint
from reshard.recipe import load_recipe, packaged_recipes
from reshard.target import side_files, target_problems
from reshard.types import Checkpoint, Layout, Recipe


@dataclass(frozen=True, slots=True)
class Job:
    """What is to be converted, and how."""

    source: Path
    ranks: int
    recipe: str | None = None
    """A packaged recipe's name or a file; by default the checkpoint itself tells."""
    only: Sequence[int] | None = None
    """Write the files of these ranks only."""
    ignore_extra_files: bool = False
    """Leave out safetensors files that the index does not name."""
    experts: int | None = None
    """How many experts the user says there are; refused if the names say otherwise."""


Progress = Callable[[int], AbstractContextManager[Advance]]
"""Given the bytes of a job, a context that gives the function to be told of the bytes done."""


@contextmanager
def silent(_total: int) -> Iterator[Advance]:
    """No progress."""
    yield lambda _: None


def convert_checkpoint(job: Job, target: Path, progress: Progress = silent) -> Plan:
    """Writes the rank files of a checkpoint, its side files and a manifest into the folder `target`.

    Raises Refused, and then nothing is there under a final name.
    """
    plan = plan_conversion(job)  #                                        headers only
    carried = side_files(plan.source.folder, plan.recipe.carry, [file.name for file in plan.source.files])
    needed = plan.size + sum(path.stat().st_size for path in carried.values())
    require_none(target_problems(job.source, target, needed))  #          the last chance to refuse
    others: dict[str, bytes | Path] = {**carried, MANIFEST: manifest_bytes(plan, carried)}
    with progress(plan.size) as advance:
        execute_plan(plan, target, others, advance)  #                    the only step that writes
    return plan


def plan_conversion(job: Job) -> Plan:
    """The plan of a job, from the headers of its source alone. Raises Refused."""
    checkpoint = read_checkpoint(job.source, ignore_extra_files=job.ignore_extra_files)
    plan = make_plan(checkpoint, recipe_for(job, checkpoint), Layout(job.ranks))
    require_experts(job, plan)
    return plan if job.only is None else only_ranks(plan, job.only)


def recipe_for(job: Job, checkpoint: Checkpoint) -> Recipe:
    return load_recipe(job.recipe) if job.recipe else choose_recipe(checkpoint, packaged_recipes())


def require_experts(job: Job, plan: Plan) -> None:
    """The number of experts that the user gave, as the old script demanded it, must be that of the names."""
    found = [plan.counts[letter] for letter, hole in plan.recipe.holes.items() if hole.counts == "experts"]
    if job.experts is not None and job.experts not in found:
        expected = f"{found[0] if found else 0}, by the names of the tensors"
        raise refuse("contradiction", "--n-experts", str(job.experts), expected, "leave the option out, or correct it")
