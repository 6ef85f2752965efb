"""Says in words how two jobs differ: the one that a target was made or begun by, and the one that is asked for.

Both may come from a file that is damaged: any value can be missing, or of another type.
"""

from collections.abc import Iterator, Mapping
from typing import Any

from reshard.text import format_count, format_list
from reshard.types import SLICED, WHOLE

Job = Mapping[str, Any]
"""A job as a manifest or a journal describes it."""


OTHER_SOURCE = "of another source, or of other bytes"


def describe_other_job(job: Job, other: Job, source: str = OTHER_SOURCE) -> str:
    """Describes a job by what it has otherwise than another one: `4 ranks, cast bf16`. `source` says of it whose bytes
    it has, if they are others.
    """
    return ", ".join(list_job_differences(job, other, source)) or "other values"


def list_job_differences(job: Job, other: Job, source: str) -> Iterator[str]:
    """Lists the values in which a job differs from another one, in words; the files only if nothing else differs."""
    found = [*list_layout_differences(job.get("layout"), other.get("layout"))]
    name, others = get_recipe_name(job), get_recipe_name(other)
    if name != others:
        found.append(f"by the recipe {name}")
    elif any(job.get(key) != other.get(key) for key in ("recipe", "recipe_sha256")):
        found.append("by another text of its recipe")
    if job.get("subset") != other.get("subset"):
        found.append("a part of a model" if job.get("subset") else "the whole model")
    if any(job.get(key) != other.get(key) for key in ("source", "source_samples")):
        found.append(source)
    if job.get("reshard") != other.get("reshard"):
        found.append(f"by reshard {job.get('reshard')}")
    policy = [key for key in ("replicas", "allow_inexact") if job.get(key) != other.get(key)]
    found.extend(f"{key.replace('_', ' ')}: {job.get(key)}" for key in policy)
    yield from found
    files = job.get("files")
    if not found and files != other.get("files") and isinstance(files, list):
        yield f"the files {format_list(map(str, files))}" if files else "nothing left to write"


def get_recipe_name(job: Job) -> Any:
    """The name of a job's recipe: a journal has it by itself, a manifest with its hash."""
    recipe = job.get("recipe")
    return recipe.get("name") if isinstance(recipe, dict) else recipe


def list_layout_differences(layout: Any, other: Any) -> Iterator[str]:
    """Lists the values of a layout that differ from those of another one, in words."""
    mine, others = (value if isinstance(value, dict) else {} for value in (layout, other))
    if any(mine.get(key) != others.get(key) for key in ("ranks", "to")):
        ranks = mine.get("ranks")
        if isinstance(ranks, int) and mine.get("to") != WHOLE:
            yield "slices for " * (mine.get("to") == SLICED) + format_count(ranks, "ranks")
        else:
            yield "whole files"
    for key in dict.fromkeys((*mine, *others)):
        if key not in ("ranks", "to") and mine.get(key) != others.get(key):
            words, value = key.replace("_", " "), mine.get(key)
            yield f"no {words}" if value is None else words if value is True else f"{words} {value}"
