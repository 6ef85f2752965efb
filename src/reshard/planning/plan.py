"""Stage 3: a job -> Plan, proven to tile every target file and to cover the source."""

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from fnmatch import fnmatchcase
from itertools import chain
from pathlib import Path
from typing import Any

import numpy as np

from reshard.errors import Problem, refuse, require_none
from reshard.formats.manifest import Origin, left_out
from reshard.planning.copies import Copies
from reshard.planning.file_layout import Pieces, TargetFile, dealt_to_files, formed, lay_out, pieces_of
from reshard.planning.proofs import cover, require_tiling
from reshard.planning.shards import ranks_problems, series_of, whole_series
from reshard.planning.transforms import Terms, outcome_of, padded_config, padding_problems
from reshard.recipes.recipe import load_recipe, packaged_recipes
from reshard.sources.block_scales import CAST_TO_FP8, Kind, config_problems, kinds_of, pairing_problems
from reshard.sources.match import Family, Matched, choose_recipe, match
from reshard.sources.source import read_source
from reshard.sources.subset import narrowed
from reshard.types import (
    EVERYTHING,
    FILE_SIZE,
    MOST_RANKS,
    RANKS,
    WHOLE,
    Cast,
    Checkpoint,
    Form,
    Layout,
    Recipe,
    Share,
    Subset,
    Tensor,
)


@dataclass(frozen=True, slots=True)
class Plan:
    """Everything that a conversion will do."""

    source: Checkpoint
    recipe: Recipe
    layout: Layout
    counts: dict[str, int]
    """How many members each placeholder of the recipe has."""
    config: Mapping[str, Any] | None
    """That of the source, with the values that padding has raised."""
    pieces: Pieces
    files: tuple[TargetFile, ...]
    copies: Copies
    """Their `target_file` is an index into `files`; their `source_file` one into those of the source and the casts."""
    casts: tuple[Cast, ...]
    coverage: tuple[Share, ...]

    @property
    def size(self) -> int:
        """Of all files to be written, in bytes."""
        return sum(file.size for file in self.files)

    def tensors(self, index: int) -> Iterator[Tensor]:
        """The tensors of one target file, in their order."""
        file, pieces = self.files[index], self.pieces
        start = len(file.header)
        for piece, end in zip(file.pieces.tolist(), file.ends.tolist(), strict=True):
            shape = pieces.cuts[pieces.cut[piece]].shape
            yield Tensor(pieces.names[piece], pieces.tensors[piece].dtype, shape, index, start, end - start)
            start = end


def make_plan(
    checkpoint: Checkpoint, recipe: Recipe, layout: Layout, forms: Sequence[Form] = (), only: Sequence[str] = ()
) -> Plan:
    """The plan of a conversion, proven to tile every target file and to cover the source. Whole files are split as the
    `forms` say, if these know every tensor. Of the tensors go those along whose names fit a pattern of `only`, if any.

    Raises Refused if recipe, checkpoint and layout do not fit, with every reason and the numbers of ranks that work.
    """
    require_none(option_problems(recipe, layout))
    matched = match(checkpoint, recipe, keep_optional=layout.keep_optional or layout.to == WHOLE)
    kinds = kept_kinds(matched, recipe, layout)
    problems = pairing_problems(matched, kinds, recipe, layout), config_problems(kinds, recipe, checkpoint.config)
    require_none(chain(*problems))
    config = padded_config(checkpoint.config, kinds, recipe, layout) if layout.pad else checkpoint.config
    if only:
        checkpoint, matched = only_named(checkpoint, matched, only)
        kinds = kept_kinds(matched, recipe, layout)
    terms = Terms(recipe, layout, config if layout.pad else None, checkpoint.parts, config or {})
    casts: list[Cast] = []
    outcomes = [outcome_of(kind, terms, casts) for kind in kinds]
    if layout.cast and not casts:
        raise refuse("wrong-option", "--cast", layout.cast, "weights that it changes: there are none", "no --cast")
    if layout.to == WHOLE:
        series = [one for outcome in outcomes for one in whole_series(outcome)]
        pieces = pieces_of(series)
        places = {name: place for place, name in enumerate(checkpoint.tensors)}
        found = formed(pieces, forms)
        pieces, forms = found or (dealt_to_files(pieces, casts, checkpoint.parts, places, layout.file_size), ())
    else:
        require_none(padding_problems(outcomes))
        require_none(ranks_problems(config or {}, recipe, layout, matched, outcomes))
        series = [one for outcome in outcomes for one in series_of(outcome, terms, matched.counts)]
        pieces, forms = pieces_of(series), ()
    files, copies = lay_out(recipe, layout, pieces, forms)
    require_tiling(copies, [len(file.header) for file in files], [file.size for file in files])
    coverage = cover(checkpoint, recipe, layout, matched, series, casts, copies)
    counts = dict(matched.counts)
    return Plan(checkpoint, recipe, layout, counts, config, pieces, files, copies, tuple(casts), coverage)


def kept_kinds(matched: Matched, recipe: Recipe, layout: Layout) -> list[Kind]:
    """All that is kept. Raises Refused if that is nothing."""
    kinds = kinds_of(matched, recipe, layout)
    if not kinds:
        found, expected = "every tensor is dropped", "at least one to convert"
        raise refuse("nothing-kept", recipe.name, found, expected, "another recipe")
    return kinds


def option_problems(recipe: Recipe, layout: Layout) -> Iterator[Problem]:
    """A number of ranks that is none, values that no option has, and options that the recipe has no use for, so that
    they would do nothing.
    """
    for option, value, known in (
        ("--to", layout.to, (RANKS, WHOLE)),
        ("--cast", layout.cast, ("", "bf16", *CAST_TO_FP8)),
        ("--expert-dtype", layout.expert_dtype, ("", "fp8")),
    ):
        if value not in known:
            yield Problem("wrong-option", option, repr(value), "one of " + ", ".join(filter(None, known)))
    if not 1 <= layout.ranks <= MOST_RANKS:
        yield Problem("wrong-ranks", "--mp", f"{layout.ranks} ranks", f"1 to {MOST_RANKS}")
    if layout.cast and not recipe.scales:
        yield Problem("wrong-option", "--cast", layout.cast, "a recipe with block scales", f"{recipe.name} has none")
    if layout.cast in CAST_TO_FP8 and any(scale.packed for scale in recipe.scales.values()):
        expected = f"bf16; the model of {recipe.name} reads FP8 and FP4 side by side, which no cast makes"
        yield Problem("wrong-option", "--cast", layout.cast, expected)
    if layout.expert_dtype and not any(scale.packed for scale in recipe.scales.values()):
        yield Problem("wrong-option", "--expert-dtype", layout.expert_dtype, "a recipe with packed FP4 weights")
    if layout.keep_optional and not any(rule.optional for rule in recipe.rules):
        yield Problem("wrong-option", "--mtp", "keep", f"a recipe that leaves MTP layers out; {recipe.name} does not")
    if layout.pad and not recipe.padded:
        yield Problem(
            "wrong-option", "--pad", "given", f"a recipe that says what may be padded; {recipe.name} does not"
        )
    if layout.to == WHOLE and (layout.pad or layout.ranks != 1):
        yield Problem("wrong-option", "--to hf", "with --mp or --pad", "neither: nothing is cut")
    if layout.to == WHOLE and layout.keep_optional:
        yield Problem("wrong-option", "--mtp", "keep, with --to hf", "neither word: whole files keep everything")
    if layout.cast and layout.expert_dtype:
        expected = "one of them: both say what becomes of FP4 experts"
        yield Problem("wrong-option", "--expert-dtype", f"{layout.expert_dtype}, with --cast {layout.cast}", expected)


def only_ranks(plan: Plan, ranks: Sequence[int]) -> Plan:
    """The part of a plan that writes the files of some ranks. Raises Refused for ranks that the plan has not."""
    if unknown := sorted(set(ranks) - {file.rank for file in plan.files}):
        found = f"rank {unknown[0]}"
        raise refuse("unknown-rank", "--ranks", found, f"ranks from 0 to {plan.layout.ranks - 1}")
    files = tuple(file for file in plan.files if file.rank in ranks)
    new_index = np.full(len(plan.files), -1)
    new_index[[index for index, file in enumerate(plan.files) if file.rank in ranks]] = np.arange(len(files))
    chosen = new_index[plan.copies.target_file] >= 0
    columns = {name: getattr(plan.copies, name)[chosen] for name in Copies.__slots__}
    columns["target_file"] = new_index[columns["target_file"]]
    return replace(plan, files=files, copies=Copies(**columns))


def describe_layout(layout: Layout) -> dict[str, Any]:
    """As JSON values, without what is usual."""
    usual = asdict(Layout(0))
    return {key: value for key, value in asdict(layout).items() if value != usual[key]}


def only_named(checkpoint: Checkpoint, matched: Matched, patterns: Sequence[str]) -> tuple[Checkpoint, Matched]:
    """The tensors whose names fit a pattern, as a shell has them; with a weight goes its block scale, and with a scale
    its weight. Counts stay those of the whole. Raises Refused for each pattern that nothing fits.
    """
    used: set[str] = set()
    units = set()
    for family in matched.families:
        for tensor, numbers in zip(family.tensors, family.numbers, strict=True):
            if fitting := [pattern for pattern in patterns if fnmatchcase(tensor.name, pattern)]:
                units.add((family.rule, numbers))
                used.update(fitting)
    expected, remedy = "names of the source, such as 'model.layers.0.*'", "the index of the source has them"
    require_none(
        Problem("nothing-kept", "--only", f"no tensor fits {pattern!r}", expected, remedy)
        for pattern in patterns
        if pattern not in used
    )
    families = [chosen_of(family, units) for family in matched.families]
    kept = {tensor.name for family in families for tensor in family.tensors}
    tensors = {name: tensor for name, tensor in checkpoint.tensors.items() if name in kept}
    described = {**checkpoint.subset, "only": list(patterns)}
    described["left_out"] = left_out(checkpoint.tensors, tensors, described.get("left_out", {}))
    chosen = Matched(tuple(family for family in families if family.tensors), matched.counts)
    return replace(checkpoint, tensors=tensors, subset=described), chosen


def chosen_of(family: Family, units: set[tuple[int, tuple[str, ...]]]) -> Family:
    chosen = [place for place, numbers in enumerate(family.numbers) if (family.rule, numbers) in units]
    return family._replace(
        tensors=[family.tensors[place] for place in chosen],
        numbers=[family.numbers[place] for place in chosen],
        names=[family.names[place] for place in chosen],
    )


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
    found = [plan.counts[letter] for letter, place in plan.recipe.placeholders.items() if place.counts == "experts"]
    if job.experts is not None and job.experts not in found:
        expected = f"{found[0] if found else 0}, by the names of the tensors"
        raise refuse("contradiction", "--n-experts", str(job.experts), expected, "correct the option")
