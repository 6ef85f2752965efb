"""START HERE: the whole program in one function."""

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, ExitStack, contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from xxhash import xxh3_128_hexdigest

from reshard.books import MANIFEST
from reshard.choose import choose_recipe
from reshard.configs import RUN_CONFIG, made_files
from reshard.errors import Problem, refuse, require_none
from reshard.execute import USUAL, Done, Others, Settings, execute_plan, finish, write_whole
from reshard.journal import JOURNAL, PARTIAL, Records, left_names, lock
from reshard.manifest import file_names_of, finished_ranks, manifest_of, read_manifest, same_job, sample_source
from reshard.origin import Origin, origin_of
from reshard.plan import Plan, make_plan, only_ranks
from reshard.read import require_no_pointer
from reshard.recipe import load_recipe, packaged_recipes
from reshard.restored import as_they_were
from reshard.sources import read_source
from reshard.subset import narrowed
from reshard.target import our_names, side_files, target_problems
from reshard.types import EVERYTHING, FILE_SIZE, RANKS, WHOLE, Advance, Checkpoint, Layout, Recipe, Subset

LARGEST_SIDE_FILE = 256 << 20
"""In bytes. Side files are tokenizers and the like; they are read whole."""


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
    to: str = RANKS
    cast: str = ""
    expert_dtype: str = ""
    keep_optional: bool = False
    pad: bool = False
    file_size: int | None = None
    """These six are those of a Layout. Without a size, rank files go back into the files that they came from."""
    first_replica: bool = False
    """Of what several ranks of a source hold, take that of the first and do not compare."""
    subset: Subset = EVERYTHING
    """Convert these layers, experts and tensors only."""

    @property
    def layout(self) -> Layout:
        """How the target is cut, and what becomes of its numbers."""
        size = FILE_SIZE if self.file_size is None else self.file_size
        return Layout(self.ranks, self.to, self.cast, self.expert_dtype, self.keep_optional, self.pad, size)


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


@dataclass(frozen=True, slots=True)
class Work:
    """What is to be done in a target, as it was when it was looked at."""

    plan: Plan
    """Of the files that are not there yet."""
    samples: Sequence[str]
    sides: Mapping[str, bytes]
    manifest: Mapping[str, Any]
    """That of the target; empty if there is none."""
    known: Mapping[str, Any]
    """The same, if it is of this job for other ranks; else empty."""
    origin: Mapping[str, Any]
    """What the manifest will keep of the source."""
    known_origin: Origin
    """What is known of where the source came from."""


def prepare(job: Job, target: Path) -> Work:
    """What is left to do in the target. Raises Refused if anything stands in the way."""
    plan, origin = plan_with_origin(job)
    try:
        samples = sample_source(plan)
        kept = origin_of(plan, origin)
    except OSError as error:
        raise refuse("cannot-read", str(error.filename), error.strerror or str(error), "to read the source") from None
    manifest = read_manifest(target)
    known = manifest if same_job(manifest, plan, samples) else {}
    sides = read_side_files(plan, origin)  # of all files, for an index names all
    if finished := finished_ranks(known, plan, target):
        plan = only_ranks(plan, [file.rank for file in plan.files if file.rank not in finished])
    require_none([*changed_side_files(known, sides), *damaged_files(known, plan, target)])
    if plan.files:
        require_room(job, plan, target, sides, known)
    return Work(plan, samples, sides, manifest, known, kept, origin)


def changed_side_files(known: Mapping[str, Any], sides: Mapping[str, bytes]) -> Iterator[Problem]:
    """What is no longer as it was when the target was made: a tokenizer, or the config that a file was made of."""
    for entry in known.get("side_files", ()):
        content = sides.get(entry["name"])
        if content is not None and xxh3_128_hexdigest(content) != entry["xxh3_128"]:
            found = "other content than when the target was made, in the source or by its config.json"
            yield Problem("source-changed", entry["name"], found, "the same", "another target, or the source as it was")


def damaged_files(known: Mapping[str, Any], plan: Plan, target: Path) -> Iterator[Problem]:
    """Files of the same job that have a final name and not the size that they were given."""
    sizes = {entry["name"]: entry["size"] for entry in known.get("files", ())}
    for file in plan.files:
        path = target / file.name
        if file.name in sizes and path.exists():
            found, expected = f"{path.stat().st_size:,} bytes", f"{sizes[file.name]:,} bytes, as they were written"
            yield Problem("wrong-size", str(path), found, expected, "remove the file and run the same command again")


def mend_target(target: Path, sides: Mapping[str, bytes]) -> list[str]:
    """Writes the side files that a finished target lacks, and returns their names.

    Raises Refused if it lacks some while other ranks are half written there: their journal is not ours to end.
    """
    lost = [name for name in sides if not (target / name).exists()]
    if any(name.endswith(PARTIAL) for name in left_names(target)):
        if lost:
            found, remedy = "an unfinished conversion of other ranks", "run its command again, then this one"
            raise refuse("another-job", str(target / JOURNAL), found, "none", remedy)
    elif lost:
        with ExitStack() as stack:
            lock(stack, target / JOURNAL)
            for name in lost:
                write_whole(target / (name + PARTIAL), sides[name])
            finish(target, lost)
    elif (target / JOURNAL).exists():  # of a job that a crash has ended behind its last rename
        with ExitStack() as stack:
            lock(stack, target / JOURNAL)
            (target / JOURNAL).unlink()
    return lost


def plan_conversion(job: Job) -> Plan:
    """The plan of a job, from the headers of its source alone. Raises Refused."""
    return plan_with_origin(job)[0]


def plan_with_origin(job: Job) -> tuple[Plan, Origin]:
    """The same, and what is known of where the source came from."""
    found = read_source(
        job.source, job.recipe, ignore_extra_files=job.ignore_extra_files, first_replica=job.first_replica
    )
    checkpoint, origin = narrowed(found.checkpoint, found.recipe, job.subset), found.origin
    if checkpoint.subset or job.subset.only:
        origin = replace(origin, forms=(), texts=None)  # what is left is not the files that there once were
    forms = origin.forms if job.file_size is None else ()
    plan = make_plan(checkpoint, found.recipe, job.layout, forms, job.subset.only)
    require_experts(job, plan)
    require_none(useless_options(job))
    return (plan if job.only is None else only_ranks(plan, job.only)), origin


def useless_options(job: Job) -> Iterator[Problem]:
    """Options that would do nothing."""
    if job.to == WHOLE and job.only is not None:
        yield Problem("wrong-option", "--ranks", "with --to hf", "no ranks: nothing is cut")
    if job.to == RANKS and job.file_size is not None:
        yield Problem("wrong-option", "--max-file-size", "without --to hf", "--to hf: a rank has one file")


def recipe_for(job: Job, checkpoint: Checkpoint) -> Recipe:
    """The recipe that the job names, else the one that the checkpoint wants."""
    return load_recipe(job.recipe) if job.recipe else choose_recipe(checkpoint, packaged_recipes())


def require_experts(job: Job, plan: Plan) -> None:
    """The number of experts that the user gave, as the old script demanded it, must be that of the names."""
    found = [plan.counts[letter] for letter, hole in plan.recipe.holes.items() if hole.counts == "experts"]
    if job.experts is not None and job.experts not in found:
        expected = f"{found[0] if found else 0}, by the names of the tensors"
        raise refuse("contradiction", "--n-experts", str(job.experts), expected, "correct the option")


def read_side_files(plan: Plan, origin: Origin) -> dict[str, bytes]:
    """The contents of the small files that go along, by name. Raises Refused if one cannot be read or is not small.

    Those that are made for the target replace others of their name. Beside whole files goes all that stands beside them
    in the source; beside chosen tensors nothing does.
    """
    if "only" in plan.source.subset:
        return made_files(plan)
    patterns, made = plan.recipe.carry, made_files(plan)
    if plan.layout.to == WHOLE:
        patterns, made = ("*",), as_they_were(plan, made, origin)
    ours = {RUN_CONFIG} if origin.is_of_ranks else set()  # of the rank files, not of the model
    found = side_files(plan.source.folder, patterns)
    sides = {**{name: read_small(path) for name, path in found.items() if name not in {*made, *ours}}, **made}
    return dict(sorted(sides.items()))


def read_small(path: Path) -> bytes:
    try:
        size = path.stat().st_size
        if size > LARGEST_SIDE_FILE:
            found, expected = f"{size:,} bytes", f"at most {LARGEST_SIDE_FILE:,} for a file that goes along"
            raise refuse(
                "too-large", str(path), found, expected, "move it away, or correct `carry` in a recipe of yours"
            )
        content = path.read_bytes()
    except OSError as error:
        raise refuse("cannot-read", str(path), error.strerror or str(error), "a readable file") from None
    require_no_pointer(path, content)
    return content


def require_room(job: Job, plan: Plan, target: Path, sides: Mapping[str, bytes], known: Mapping[str, Any]) -> None:
    """The target can be written to, and holds nothing but what this job, or the same for other ranks, put there."""
    ours = our_names(target)
    if known:
        ours |= {MANIFEST, *sides, *file_names_of(known)} - {file.name for file in plan.files}
    needed = plan.size + sum(map(len, sides.values()))
    require_none(target_problems(job.source, target, needed, ours))
