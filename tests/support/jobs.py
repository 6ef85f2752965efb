"""Conversions as values, so that tests can pass them around and vary them; carried out by `reshard.api`."""

from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager, ExitStack
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest

from reshard import api
from reshard.execution.execute import Settings
from reshard.formats.manifest import Origin
from reshard.planning import planner
from reshard.planning.plan import Plan
from reshard.recipe_types import Recipe
from reshard.sources.match import match
from reshard.sources.source import Source
from reshard.target.conversion import Conversion
from reshard.types import COMPARE, EVERYTHING, RANKS, WHOLE, Advance, Checkpoint, Layout, Subset

Progress = Callable[[int], AbstractContextManager[Advance]]
"""Given the bytes of a job, a context that gives the function to be told of the bytes done."""


@dataclass(frozen=True, slots=True)
class Job:
    """What is to be converted, and how."""

    source: Path
    mp: int
    recipe: str | None = None
    ranks: Sequence[int] | None = None
    ignore_extra_files: bool = False
    n_experts: int | None = None
    to: str = RANKS
    cast: str = ""
    expert_dtype: str = ""
    keep_mtp: bool = False
    pad: bool = False
    max_file_size: int | None = None
    replicas: str = COMPARE
    subset: Subset = EVERYTHING

    @property
    def arguments(self) -> dict[str, Any]:
        """Those of `api.plan`."""
        names = ("to", "cast", "expert_dtype", "keep_mtp", "pad", "max_file_size", "replicas", "recipe", "ranks")
        subset = {name: getattr(self.subset, name) for name in ("layers", "experts", "renumber", "only")}
        return {**{name: getattr(self, name) for name in (*names, "mp", "ignore_extra_files")}, **subset}


NOTHING_CACHED = (
    "import reshard.storage.local, reshard.storage.page_cache\n"
    "for module in (reshard.storage.local, reshard.storage.page_cache):\n"
    "    module.is_range_cached = lambda *_: False\n"
)
"""Lines of Python, for a process in which the page cache counts as empty: a small file is in it, whole, once its header
has been read.
"""


def convert_checkpoint(
    job: Job, target: Path, settings: Settings | None = None, progress: Progress | None = None
) -> Conversion:
    """Converts. With `cache="no"` the page cache counts as empty: reading the headers has put small files into it."""
    settings = settings or Settings()
    with ExitStack() as stack:
        if settings.cache == "no":
            patch = stack.enter_context(pytest.MonkeyPatch.context())
            for module in ("local", "page_cache"):
                patch.setattr(f"reshard.storage.{module}.is_range_cached", lambda *_: False)
        advances: list[Advance] = []
        said = 0

        def tell(done: int, total: int) -> None:
            nonlocal said
            if not advances and progress:
                advances.append(stack.enter_context(progress(total)))
            step, said = done - said, done
            if step:
                advances[0](step)

        return api.convert(
            job.source,
            target,
            **job.arguments,
            n_experts=job.n_experts,
            jobs=settings.jobs,
            max_memory=settings.max_memory,
            cache=settings.cache,
            allow_inexact=settings.allow_inexact,
            restart=settings.restart,
            progress=tell if progress else None,
        )


def plan_conversion(job: Job) -> Plan:
    return api.plan(job.source, **job.arguments)


def make_plan(checkpoint: Checkpoint, recipe: Recipe, layout: Layout) -> Plan:
    """The plan for a checkpoint that lies nowhere."""
    matched = match(checkpoint, recipe, keep_optional=layout.keep_optional or layout.to == WHOLE)
    return planner.make_plan(Source(checkpoint.folder, checkpoint, recipe, matched, Origin()), layout)
