"""Stage 3: Checkpoint + Recipe + Layout -> Plan. Pure: opens no file; what it returns can be printed and proven."""

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from itertools import chain
from typing import Any

import numpy as np

from reshard.copies import Copies, require_tiling
from reshard.coverage import Share, cover
from reshard.cut import Limit, limit_of, parts_for, weight_problems, working_ranks
from reshard.errors import Problem, refuse, require_none
from reshard.holes import config_value
from reshard.layout import Form, Pieces, TargetFile, dealt_to_files, formed, lay_out, pieces_of
from reshard.match import Matched, match
from reshard.only import only_named
from reshard.padding import is_paddable, padded_config
from reshard.results import Outcome, Terms, outcome_of, series_of, whole_series
from reshard.types import MOST_RANKS, RANKS, WHOLE, Cast, Checkpoint, Layout, Recipe, Rule, Tensor
from reshard.units import CAST_TO_FP8, Kind, config_problems, kinds_of, pairing_problems, units_of

HEADS_EXPECTED = "a number in config.json that divides the ranks, or that they divide"


@dataclass(frozen=True, slots=True)
class Plan:
    """Everything that a conversion will do."""

    source: Checkpoint
    recipe: Recipe
    layout: Layout
    counts: dict[str, int]
    """How many members each hole of the recipe has."""
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


def padding_problems(outcomes: Sequence[Outcome]) -> Iterator[Problem]:
    """Rows behind the last of two halves would become rows of the second."""
    for outcome in outcomes:
        before, after = outcome.kind.weights[0].shape[:1], outcome.weights[0].shape[:1]
        if outcome.kind.rule.split == "packed rows" and before != after:
            found = f"{before[0]:,} packed rows padded to {after[0]:,}"
            yield Problem(
                "wrong-option", outcome.kind.rule.left, found, "halves that are as they were", "without --pad"
            )


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


def ranks_problems(
    config: Mapping[str, Any], recipe: Recipe, layout: Layout, matched: Matched, outcomes: Sequence[Outcome]
) -> Iterator[Problem]:
    """Everything that the number of ranks does not suit, with the numbers that suit all."""
    limits = set()
    problems = []
    helps = not layout.pad and not any(halves_grow(outcome.kind, recipe, layout, config) for outcome in outcomes)
    for subject, length in counted_lengths(config, recipe, matched):
        limits.add(Limit(length))
        if length % layout.ranks:
            found = f"{length} for {layout.ranks} ranks"
            problems.append(Problem("not-divisible", subject, found, f"a multiple of {layout.ranks}"))
            helps = False
    for outcome in outcomes:
        weight, split = outcome.weights[0], outcome.kind.rule.split
        units = units_of(outcome.kind.rule, config)
        if units is None:
            problems.append(unknown_units(outcome.kind.rule, recipe, layout))
            continue
        limit = limit_of(weight, split, outcome.block, units)
        grows = split == "padded rows" or (layout.pad and is_paddable(outcome.kind, recipe, layout, config))
        # What is raised to suit these ranks says nothing of other numbers of them.
        if limit and not grows:
            limits.add(limit)
        parts = parts_for(layout.ranks, units)
        if not parts:
            found = f"{units} {split.removeprefix('rows of ')} for {layout.ranks} ranks"
            problems.append(Problem("not-divisible", outcome.kind.rule.left, found, HEADS_EXPECTED))
        elif next(weight_problems(weight, split, parts, outcome.block, units), None):
            helps = helps and is_paddable(outcome.kind, recipe, layout, config)
            for tensor in outcome.weights:
                problems.extend(weight_problems(tensor, split, parts, outcome.block, units))
    # A tensor of too few dimensions suits no number of ranks.
    works = all(problem.kind != "wrong-shape" for problem in problems)
    remedy = f"--mp with one of {working_ranks(limits)}" if works and problems else ""
    if remedy and helps:
        remedy += ", or --pad"
    yield from (problem if problem.remedy else replace(problem, remedy=remedy) for problem in problems)


def unknown_units(rule: Rule, recipe: Recipe, layout: Layout) -> Problem:
    """Heads that no config tells the number of: another number of ranks does not help."""
    key = rule.split.removeprefix("rows of ")
    remedy = f"a config.json with {key}, or the right key in {recipe.origin}"
    return Problem("not-divisible", rule.left, f"no {key} for {layout.ranks} ranks", HEADS_EXPECTED, remedy)


def halves_grow(kind: Kind, recipe: Recipe, layout: Layout, config: Mapping[str, Any]) -> bool:
    """Whether padding would put rows behind the second of two halves."""
    return kind.rule.split == "packed rows" and is_paddable(kind, recipe, layout, config)


def counted_lengths(config: Mapping[str, Any], recipe: Recipe, matched: Matched) -> Iterator[tuple[str, int]]:
    """What the ranks must divide besides dimensions: the members dealt to them, and config values such as heads."""
    for letter in sorted({rule.split.removeprefix("by ") for rule in recipe.rules if rule.split.startswith("by ")}):
        if matched.counts[letter]:
            yield recipe.holes[letter].counts, matched.counts[letter]
    for key in recipe.ranks_divide:
        value = config_value(key, config)
        if type(value) is int and value > 0:
            yield key, value


def describe_layout(layout: Layout) -> dict[str, Any]:
    """As JSON values, without what is usual."""
    usual = asdict(Layout(0))
    return {key: value for key, value in asdict(layout).items() if value != usual[key]}
