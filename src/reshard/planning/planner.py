"""Stage 3: Source + Layout -> Plan, proven to write every target byte once and to use every kept source tensor."""

from collections.abc import Collection, Iterator, Sequence
from dataclasses import replace
from fnmatch import fnmatchcase

import numpy as np

from reshard.errors import Problem, refuse, require_none
from reshard.formats.manifest import Origin, count_left_out
from reshard.formats.name_patterns import require_fitting
from reshard.formats.renaming import format_renaming, format_step
from reshard.planning.constants import check_constants_apart, make_constants
from reshard.planning.copies import Copies
from reshard.planning.dtype_notes import note_dtypes
from reshard.planning.file_layout import Pieces, assign_to_files, lay_out_files, order_pieces, restore_forms
from reshard.planning.fused_parts import check_part_counts, cut_outcomes
from reshard.planning.nvfp4 import check_nvfp4, group_under_parents
from reshard.planning.options import AS_STORED, check_options
from reshard.planning.plan import Plan
from reshard.planning.proofs import prove_coverage, require_tiling
from reshard.planning.rank_checks import check_ranks
from reshard.planning.shards import Series, keep_whole
from reshard.planning.slices import note_loader_names, slice_series
from reshard.planning.transforms import Outcome, Terms, check_padding, raise_config, transform_weights
from reshard.recipe_types import Recipe
from reshard.recipes.fusions import list_fusions
from reshard.sources.block_scales import WeightGroup, check_weights, group_weights
from reshard.sources.boxed_hints import explain_boxed
from reshard.sources.engine_choice import choose_uncut_layout
from reshard.sources.fitted_names import RENAMED, explain_renaming
from reshard.sources.match import Family, Matched, check_optional
from reshard.sources.source import Source
from reshard.sources.tied_heads import drop_tied_note, repeat_tied_head
from reshard.types import FILE_SIZE, NVFP4, SLICED, WHOLE, Cast, Checkpoint, Layout, Note, OriginalFile

Units = set[tuple[int, tuple[str, ...]]]
"""Weights with their block scales: the index of their rule, and the numbers that fill its placeholders."""


def make_plan(source: Source, layout: Layout, *, ranks: Sequence[int] | None = None, only: Sequence[str] = ()) -> Plan:
    """Makes the plan of a conversion. `ranks` limits it to the files of some ranks, `only` to the tensors whose
    original names match a shell pattern.

    Raises Refused if recipe, checkpoint and layout do not fit, with every reason and the numbers of ranks that work.
    """
    require_none(check_options(source.recipe, layout, ranks))
    layout = replace(layout, expert_dtype="") if layout.expert_dtype == AS_STORED else layout
    with explain_boxed(source.checkpoint), explain_renaming(source.checkpoint):
        if layout.to == SLICED:
            checkpoint, matched = repeat_tied_head(source.checkpoint, source.recipe, source.matched)
            source = replace(source, checkpoint=checkpoint, matched=matched)
        plan = plan_all_files(source, layout, only)
    return plan if ranks is None else keep_ranks(plan, ranks)


def plan_all_files(source: Source, layout: Layout, only: Sequence[str]) -> Plan:
    """Makes the plan of all files. Raises Refused."""
    uncut = choose_uncut_layout(source.recipe, layout)
    kinds = group_kept_weights(source, uncut)
    checkpoint, matched = source.checkpoint, source.matched
    config = raise_config(checkpoint.config, kinds, source.recipe, layout) if layout.pad else checkpoint.config
    if only:
        checkpoint, matched = keep_named(checkpoint, matched, only, fused=list_fused_rules(source.recipe, uncut))
        checkpoint, kinds = drop_tied_note(checkpoint), require_kept(matched, source, uncut)
    padded, packed = config if layout.pad else None, checkpoint.packed
    terms = Terms(source.recipe, uncut, padded, checkpoint.parts, config or {}, packed)
    outcomes, casts = transform_groups(kinds, terms)
    require_none(check_outcomes(outcomes, casts, terms, matched))
    series = list_series(outcomes, terms, casts, checkpoint, matched, slices=layout.ranks * (layout.to == SLICED))
    pieces, forms = arrange_tensors(series, layout, casts, checkpoint, source.origin)
    files, copies = lay_out_files(source.recipe, layout, pieces, forms)
    require_tiling(copies, [len(file.header) for file in files], [file.size for file in files])
    coverage = prove_coverage(checkpoint, source.recipe, uncut, matched, series, casts, copies)
    return Plan(
        source.path,
        checkpoint,
        source.recipe,
        source.origin,
        layout,
        matched.counts,
        config,
        pieces,
        files,
        copies,
        tuple(casts),
        coverage,
        (
            *checkpoint.notes,
            *note_restored_names(source, uncut, forms),
            *note_dtypes(source.recipe, uncut, outcomes, config or {}),
            *note_loader_names(source.recipe, layout, config or {}, list_scale_dtypes(outcomes)),
        ),
    )


def transform_groups(kinds: Sequence[WeightGroup], terms: Terms) -> tuple[list[Outcome], list[Cast]]:
    """Casts and pads all weight groups, as the layout asks; also returns the casts. Raises Refused."""
    casts: list[Cast] = []
    outcomes = [transform_weights(kind, terms, casts) for kind in kinds]
    group_under_parents(casts)
    return outcomes, casts


def list_scale_dtypes(outcomes: Sequence[Outcome]) -> frozenset[str]:
    """Lists the dtypes of the block scales in a target."""
    return frozenset(tensor.dtype for outcome in outcomes for tensor in outcome.scales[:1])


def note_restored_names(source: Source, layout: Layout, forms: Sequence[OriginalFile]) -> Iterator[Note]:
    """Notes that whole files of rank files get the original names back, which the recipe does not know; or that they
    do not.
    """
    renaming = source.origin.renaming
    if not renaming or not source.origin.is_of_ranks or layout.to != WHOLE:
        return
    if any(form.header for form in forms):
        names = [name for form in forms for name in form.tensors]
        text = (
            f"the names of the original come back, as its files had them ({format_renaming(names, renaming)}, before)"
        )
        yield Note(RENAMED, f"{text}; with --max-file-size the names stay as in the recipe")
    else:
        steps = "; then ".join(map(format_step, renaming))
        text = f"the names stay as in the recipe; those of the original do not come back ({steps}, before)"
        yield Note(RENAMED, f"{text}: they do only with all original files, byte for byte")


def group_kept_weights(source: Source, layout: Layout) -> list[WeightGroup]:
    """Groups the kept weights by rule, dtype and shape. Raises Refused if weights, block scales and config disagree."""
    checkpoint, recipe, matched = source.checkpoint, source.recipe, source.matched
    if layout.keep_optional or layout.to == WHOLE:
        require_none(check_optional(checkpoint, recipe, matched))
    kinds = require_kept(matched, source, layout)
    require_none(check_weights(matched, kinds, recipe, layout, checkpoint.config))
    require_none(check_nvfp4(checkpoint, kinds) if layout.cast == NVFP4 else ())
    return kinds


def require_kept(matched: Matched, source: Source, layout: Layout) -> list[WeightGroup]:
    """Groups the kept weights. Raises Refused if no tensor is kept."""
    kinds = group_weights(matched, source.recipe, layout)
    if not kinds:
        found, expected = "every tensor is dropped", "at least one to convert"
        raise refuse("nothing-kept", source.recipe.name, found, expected, "another recipe")
    return kinds


def check_outcomes(
    outcomes: Sequence[Outcome], casts: Sequence[Cast], terms: Terms, matched: Matched
) -> Iterator[Problem]:
    """Reports a cast that changes nothing, and every tensor that cannot be cut for the number of ranks."""
    layout = terms.layout
    is_idle = all(cast.operation == "pad" for cast in casts)
    if layout.cast and is_idle and not terms.packed:  # else the chosen part is without packed weights, and copied
        yield Problem("wrong-option", "--cast", layout.cast, "weights that it changes: there are none", "no --cast")
    elif layout.to != WHOLE:
        kinds = [outcome.kind for outcome in outcomes]
        if torn := [*check_padding(outcomes), *check_part_counts(kinds, terms.recipe, matched.counts)]:
            yield from torn
        else:
            yield from check_ranks(terms.config, terms.recipe, layout, matched, outcomes)


def list_series(
    outcomes: Sequence[Outcome],
    terms: Terms,
    casts: list[Cast],
    checkpoint: Checkpoint,
    matched: Matched,
    slices: int,
) -> list[Series]:
    """Cuts the tensors for the ranks and adds the constants, or keeps the tensors whole in the original layout; then
    cuts them into `slices`, if there are to be any. Raises Refused for parts of fused tensors that do not fit together.
    """
    if terms.layout.to == WHOLE:
        series = [one for outcome in outcomes for one in keep_whole(outcome)]
    else:
        series = cut_outcomes(outcomes, terms, matched.counts)
        constants = [] if "only" in checkpoint.subset else list(make_constants(terms, matched, outcomes, casts))
        require_none(check_constants_apart(constants, series))
        series += constants
    return slice_series(series, terms.recipe, slices) if slices else series


def arrange_tensors(
    series: Sequence[Series], layout: Layout, casts: Sequence[Cast], checkpoint: Checkpoint, origin: Origin
) -> tuple[Pieces, Sequence[OriginalFile]]:
    """Orders the tensors for the ranks, or assigns them to files in the original layout. Returns the pieces in file
    order, and the original files to restore; none if they cannot be restored.
    """
    pieces = order_pieces(series)
    if layout.to != WHOLE:
        return pieces, ()
    if found := restore_forms(pieces, origin.forms if layout.file_size is None else (), origin.renaming):
        return found
    places = {name: place for place, name in enumerate(checkpoint.tensors)}
    most = FILE_SIZE if layout.file_size is None else layout.file_size
    return assign_to_files(pieces, casts, checkpoint.parts, places, most), ()


def keep_ranks(plan: Plan, ranks: Sequence[int]) -> Plan:
    """Keeps the files of some ranks only. Raises Refused for ranks that the plan does not have."""
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


def list_fused_rules(recipe: Recipe, layout: Layout) -> set[int]:
    """Lists the rows, by their indices, whose tensors are fused in a target."""
    fusions = list_fusions(recipe) if layout.to != WHOLE else []
    return {number for fusion in fusions for number in fusion.rules}


def keep_named(
    checkpoint: Checkpoint, matched: Matched, patterns: Sequence[str], *, fused: Collection[int]
) -> tuple[Checkpoint, Matched]:
    """Keeps the tensors whose names match a shell pattern. A weight and its block scale are kept together, and so are
    all parts of a fused tensor; `fused` are the indices of their rules. The counts of members do not change. Raises
    Refused with each pattern that matches no tensor.
    """
    used: set[str] = set()
    units: Units = set()
    for family in matched.families:
        for tensor, numbers in zip(family.tensors, family.numbers, strict=True):
            if fitting := [pattern for pattern in patterns if fnmatchcase(tensor.name, pattern)]:
                units.add((family.rule, numbers))
                used.update(fitting)
    if lacking := [pattern for pattern in patterns if pattern not in used]:
        names = [tensor.name for family in matched.families for tensor in family.tensors]
        require_fitting("nothing-kept", "--only", lacking, names, "no tensor of such a name")
    units |= find_units_beside(matched, units, fused)
    families = [keep_units(family, units) for family in matched.families]
    kept = {tensor.name for family in families for tensor in family.tensors}
    tensors = {name: tensor for name, tensor in checkpoint.tensors.items() if name in kept}
    described = {**checkpoint.subset, "only": list(patterns)}
    described["left_out"] = count_left_out(checkpoint.tensors, tensors, described.get("left_out", {}))
    chosen = Matched(tuple(family for family in families if family.tensors), matched.members)
    return replace(checkpoint, tensors=tensors, subset=described), chosen


def find_units_beside(matched: Matched, units: Units, fused: Collection[int]) -> Units:
    """Finds the rule and numbers of all parts of the fused tensors that have a part among `units`."""
    parts = [
        ((family.rule, numbers), name)
        for family in matched.families
        if family.rule in fused and not family.is_scale
        for numbers, name in zip(family.numbers, family.names, strict=True)
    ]
    wanted = {name for unit, name in parts if unit in units}
    return {unit for unit, name in parts if name in wanted}


def keep_units(family: Family, units: Units) -> Family:
    """Keeps the tensors of a family whose rule and numbers are among `units`."""
    chosen = [place for place, numbers in enumerate(family.numbers) if (family.rule, numbers) in units]
    return family._replace(
        tensors=[family.tensors[place] for place in chosen],
        numbers=[family.numbers[place] for place in chosen],
        names=[family.names[place] for place in chosen],
    )
