"""START HERE: what reshard does, one function each, with the stages in their order."""

from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager
from dataclasses import dataclass, replace
from pathlib import Path

from reshard.errors import refuse
from reshard.execution.execute import USUAL, Done, Others, Settings, execute_plan
from reshard.execution.journal import Records
from reshard.formats.manifest import Origin, asked_of, known_manifest, read_manifest, subset_of, subset_text
from reshard.formats.target_names import MANIFEST
from reshard.planning.plan import Job, Plan
from reshard.sources.subset import narrowed
from reshard.target.folder import mend_target, prepare
from reshard.target.manifest_writer import manifest_of
from reshard.types import Advance, Checkpoint, File, Recipe
from reshard.verification.verify import Report


@dataclass(frozen=True, slots=True)
class Result:
    """What became of a job."""

    plan: Plan
    done: Done | None
    """None if the target was finished already."""
    mended: Sequence[str]
    """The side files of a finished target that had been lost, and were written again."""
    origin: Origin
    """What is known of the checkpoint that rank files came from."""


Progress = Callable[[int], AbstractContextManager[Advance]]
"""Given the bytes of a job, a context that gives the function to be told of the bytes done."""


@contextmanager
def silent(_total: int) -> Iterator[Advance]:
    """No progress."""
    yield lambda _: None


def convert_checkpoint(job: Job, target: Path, settings: Settings = USUAL, progress: Progress = silent) -> Result:
    """Writes the rank files of a checkpoint, its side files and a manifest into the folder `target`.

    A target that an interrupted run has begun is gone on with; a finished one is left alone. Raises Refused, and then
    nothing more is there under a final name.
    """
    work = prepare(job, target)  #                                        headers only; the last chance to refuse
    plan = work.plan
    if not plan.files:
        return Result(plan, None, mend_target(target, work.sides), work.known_origin)

    def contents(records: Records) -> dict[str, bytes]:
        manifest = manifest_of(plan, work.samples, work.sides, records, work.known, work.origin)
        return {**work.sides, MANIFEST: manifest}

    def require_same() -> None:
        if read_manifest(target) != work.manifest:
            raise refuse("target-changed", str(target), "another run has ended there just now", "none", "run it again")

    with progress(plan.size) as advance:
        others = Others([*work.sides, MANIFEST], contents, require_same)
        done = execute_plan(plan, target, others, advance, settings)  #   the only step that writes
    return Result(plan, done, (), work.known_origin)


def require_its_recipe(target: Path, recipe: Recipe) -> None:
    """By another recipe than the target was made with, every tensor would be wrong. Raises Refused."""
    made_with = known_manifest(target).get("recipe")
    name = made_with.get("name") if isinstance(made_with, dict) else recipe.name
    if name != recipe.name:
        found, remedy = f"made by the recipe {name}", "pass the file or the name of that recipe with --recipe"
        raise refuse("no-recipe", str(target), found, f"the recipe {recipe.name}, which the source wants", remedy)


def as_chosen(source: Checkpoint, recipe: Recipe, path: Path, target: Path) -> Checkpoint:
    """What of a source the target holds, by its manifest: all of it if that says nothing else, or is none."""
    before, now = subset_of(path), subset_of(target)
    if not now:
        return replace(source, subset=before)
    return narrowed(replace(source, subset=before), recipe, asked_of(before, now, str(target)))


def require_same_subset(source: Path, target: Path) -> None:
    """What was chosen of rank files cannot be held against all of them. Raises Refused."""
    if (now := subset_of(target)) != subset_of(source):
        remedy = "verify it without --source, by the checksums of its manifest"
        raise refuse(
            "incomplete-source", str(target), subset_text(now) or "a whole model", "what the ranks hold", remedy
        )


def with_note(report: Report, target: Path, files: Sequence[File]) -> Report:
    """Where there are problems: whether the manifest of a target says that it was made from other files than these."""
    known = known_manifest(target).get("source") if report.problems else None
    given = [{"name": file.name, "size": file.size, "header_sha256": file.header_hash} for file in files]
    if known is None or known == given:
        return report
    return replace(report, note=f"{MANIFEST} says that this was made from another checkpoint than the --source")
