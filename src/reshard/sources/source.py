"""Stages 1 and 2: reads a path into a Source: checkpoint, recipe and the rule of every tensor. Reads headers only."""

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace

from reshard.errors import Problem, Refused, refuse, require_none
from reshard.formats.folder import Folder, read_folder
from reshard.formats.huggingface import FolderHeaders, read_headers
from reshard.formats.manifest import Origin, format_subset
from reshard.formats.part_manifests import require_shares_joined
from reshard.formats.recognition import require_model, require_no_megatron, require_no_vllm_ranks
from reshard.formats.unfinished_downloads import name_begun_downloads
from reshard.paths import AnyPath
from reshard.recipe_types import Recipe
from reshard.recipes.recipe import has_dropped_part, list_packaged_recipes, list_recipes_to_try
from reshard.sources.block_scales import check_weights, group_weights
from reshard.sources.boxed_hints import explain_boxed
from reshard.sources.changed_files import check_changed_files, check_exchanged_files
from reshard.sources.checkpoints import read_folder_checkpoint, require_config_of_slices
from reshard.sources.completeness import note_no_drafts
from reshard.sources.constants import check_stored_constants, check_values
from reshard.sources.engine_choice import (
    choose_for_engine,
    keeps_everything,
    require_engine_of_ranks,
    require_engine_recipe,
)
from reshard.sources.fitted_names import match_or_rename
from reshard.sources.held_shards import collect_shards
from reshard.sources.match import Matched, match
from reshard.sources.not_in_index import require_all_named
from reshard.sources.origins import find_altered_origin, find_origin
from reshard.sources.packed_weights import Unpacked, require_plain_names, unpack_checkpoint
from reshard.sources.picked_members import note_others
from reshard.sources.rank_files import assemble_checkpoint
from reshard.sources.rank_names import (
    RankNames,
    find_rank_names,
    narrow_by_metadata,
    note_files_beside_ranks,
    require_known_recipe,
)
from reshard.sources.recipe_choice import narrow_recipes
from reshard.sources.stacked_experts import Unstacked, explain_stacks, unstack_checkpoint
from reshard.sources.subset import narrow_checkpoint
from reshard.sources.tied_heads import leave_out_tied_head
from reshard.text import format_list
from reshard.types import COMPARE, EVERYTHING, Checkpoint, Layout, Subset

MADE_FROM = "name the checkpoint that these rank files were made from"


@dataclass(frozen=True, slots=True)
class Source:
    """A checkpoint to be converted, with its recipe and everything else that later stages need."""

    path: AnyPath
    """As the caller gave it."""
    checkpoint: Checkpoint
    """Of rank files: whole tensors, assembled from the shards. The names are those of the recipe."""
    recipe: Recipe
    matched: Matched
    """The rule of every tensor."""
    origin: Origin
    """The original checkpoint of rank files, as far as it is known. Of a checkpoint in its original layout it has only
    the renaming that led from the names in the files to those of the recipe; and the config, if that was changed too.
    """
    stored: Checkpoint | None = None
    """Under the names in its files, experts stacked; None of rank files."""
    unstacked: Unstacked | None = None
    """Of a checkpoint with stacked experts: its names in the files, and all of it under the names of the hub."""
    unpacked: Unpacked | None = None
    """Of a checkpoint with packed weights that is read to be dequantized: its names in the files, and plain ones."""


def read_source(
    path: AnyPath,
    recipe: str | None = None,
    *,
    for_engine: str = "",
    ignore_extra_files: bool = False,
    replicas: str = COMPARE,
    subset: Subset = EVERYTHING,
    keep_optional: bool = False,
    config_folder: AnyPath | None = None,
    cast: str = "",
) -> Source:
    """Reads the headers of a Hugging Face checkpoint or of rank files, and finds the rule of each tensor.

    `recipe` is a name or a file; None takes the recipe that the manifest names, else the one for the config and tensor
    names, among those of `for_engine`. With a subset, the source has only its layers and experts. With a `cast` that
    takes them, weights that lie packed are read under their plain names. Raises Refused if a header is faulty, or if no
    recipe or more than one fits.
    """
    require_shares_joined(path)
    folder, recipes = read_folder(path, config_folder), list_recipes_to_try(recipe)
    chosen = choose_for_engine(recipes, for_engine, is_named=bool(recipe))
    if names := find_rank_names(path, folder.names, recipes):
        source = read_rank_files(folder, names, recipe, ignore_extra_files=ignore_extra_files, replicas=replicas)
        require_engine_of_ranks(source.recipe, for_engine, str(path))
    else:
        stored = read_huggingface(folder, recipes, ignore_extra_files=ignore_extra_files, replicas=replicas)
        unpacked = unpack_checkpoint(stored, cast)
        if unpacked and recipe:
            require_plain_names(recipes[0], cast)
        with explain_boxed(stored):
            source = match_huggingface(
                folder,
                unpacked.checkpoint if unpacked else stored,
                recipes,
                chosen,
                recipe,
                for_engine,
                ignore_extra_files=ignore_extra_files,
                keep_optional=keep_optional,
            )
            source = replace(source, unpacked=unpacked)
    return narrow_source(leave_out_added_head(source), subset)


def leave_out_added_head(source: Source) -> Source:
    """Leaves out of slices that reshard made the output head that it added."""
    if not source.origin.is_altered:
        return source
    checkpoint, matched = leave_out_tied_head(source.checkpoint, source.recipe, source.matched, source.origin)
    return replace(source, checkpoint=checkpoint, matched=matched)


def match_huggingface(
    folder: Folder,
    stored: Checkpoint,
    recipes: Sequence[Recipe],
    chosen: Sequence[Recipe],
    recipe: str | None,
    for_engine: str,
    *,
    ignore_extra_files: bool,
    keep_optional: bool,
) -> Source:
    """Finds the recipe of a checkpoint in the original layout, and the rule of each tensor: of `chosen`, unless stacked
    experts are to be taken apart first, for which any of `recipes` may tell. Raises Refused.
    """
    unstacked = unstack_checkpoint(stored, recipes)
    checkpoint = unstacked.checkpoint if unstacked else stored
    require_engine_recipe(checkpoint.config, chosen, "" if recipe else for_engine, f"--for {for_engine}")
    # First: a tensor that only the index lacks would be reported as missing.
    require_all_named(checkpoint, chosen, keep_optional=keep_optional, ignore_extra_files=ignore_extra_files)
    try:
        found = match_or_rename(checkpoint, chosen, is_asked=bool(recipe), keep_optional=keep_optional)
    except Refused as refused:
        require_model(checkpoint)  # what is no model needs no recipe
        if not recipe:
            require_no_megatron(checkpoint)
        raise explain_stacks(checkpoint, recipes, unstacked, refused) from None
    if found.renaming:  # under their new names the recipe may know them
        require_all_named(
            found.checkpoint, [found.recipe], keep_optional=keep_optional, ignore_extra_files=ignore_extra_files
        )
    is_changed = found.checkpoint.config is not checkpoint.config
    origin = Origin(config=checkpoint.config if is_changed else None, renaming=found.renaming)
    origin = find_altered_origin(folder, stored, is_stacked=bool(unstacked)) or origin
    members, is_stacked = found.matched.members, bool(unstacked)
    drafts = note_no_drafts(found.recipe, members, folder.config, is_stacked=is_stacked)
    others = note_others(found.recipe, members, folder.config)
    checkpoint = replace(found.checkpoint, notes=(*found.checkpoint.notes, *drafts, *others))
    return Source(folder.path, checkpoint, found.recipe, found.matched, origin, stored, unstacked)


def read_chosen(
    path: AnyPath,
    layout: Layout,
    subset: Subset,
    recipe: str | None,
    for_engine: str | None,
    replicas: str,
    *,
    ignore_extra_files: bool,
    config_folder: AnyPath | None,
) -> Source:
    """Reads the chosen part of a source, complete in everything that the layout keeps. Raises Refused."""
    keeps_all = keeps_everything(layout, recipe, for_engine)
    if for_engine and keeps_all:
        remedy = f"for files of {for_engine} leave out --to {layout.to}; for the names of the hub leave out --for"
        raise refuse("wrong-option", "--for", f"{for_engine}, with --to {layout.to}", "one of them", remedy)
    return read_source(
        path,
        recipe,
        for_engine=for_engine or "",
        ignore_extra_files=ignore_extra_files,
        replicas=replicas,
        subset=subset,
        keep_optional=layout.keep_optional or keeps_all,
        config_folder=config_folder,
        cast=layout.cast,
    )


def read_huggingface(
    folder: Folder, recipes: Sequence[Recipe], *, ignore_extra_files: bool, replicas: str
) -> Checkpoint:
    """Reads a checkpoint in the original layout. Raises Refused."""
    require_known_recipe(folder.path, folder.manifest, recipes)
    require_none(check_chosen_tensors(folder))
    require_config_of_slices(folder)
    require_no_vllm_ranks(folder.path, folder.names)
    checkpoint = read_folder_checkpoint(folder, ignore_extra_files=ignore_extra_files, replicas=replicas)
    return replace(checkpoint, subset=folder.subset)


def narrow_source(source: Source, subset: Subset) -> Source:
    """Narrows a source to the chosen layers and experts. Raises Refused if the model does not have them."""
    checkpoint = narrow_checkpoint(source.checkpoint, source.recipe, source.matched, subset)
    if checkpoint.subset or subset.only:
        # The original files cannot be restored: some of their tensors are left out.
        source = replace(source, origin=replace(source.origin, forms=(), texts=None))
    if checkpoint is source.checkpoint:
        return source
    return replace(source, checkpoint=checkpoint, matched=match(checkpoint, source.recipe))


def check_chosen_tensors(folder: Folder) -> Iterator[Problem]:
    """Reports a folder made with `--only`: most of the model is missing, so it cannot be a source."""
    if "only" in folder.subset:
        remedy = "convert what these tensors came from"
        yield Problem("incomplete-source", str(folder.path), format_subset(folder.subset), "a whole model", remedy)


def read_rank_files(
    folder: Folder, names: RankNames, recipe: str | None, *, ignore_extra_files: bool, replicas: str
) -> Source:
    """Reads rank files as one checkpoint. Raises Refused.

    The recipe is the requested one, else the one that the manifest names, else one for the config; of several the one
    that the metadata of the files name, else the one that fits the tensors.
    """
    require_none(name_begun_downloads(folder.path, names.problems(ignore_extra_files=ignore_extra_files)))
    stored = read_headers(folder.path, names.wanted)
    if folder.manifest_fault:
        raise folder.manifest_fault
    require_none(
        [*check_chosen_tensors(folder), *check_changed_files(stored, folder.manifest), *check_exchanged_files(stored)]
    )
    origin = find_origin(folder, names)
    recipes = names.recipes if recipe else find_recipes(stored, names.recipes, origin)
    is_by_names = not recipe and not origin.recipe and all(known.engine for known in recipes)
    if is_by_names:
        require_engine_recipe(origin.config, recipes, recipes[0].engine, str(folder.path), MADE_FROM)
    notes = tuple(note_files_beside_ranks(names))

    def assemble(known: Recipe) -> Source:
        collected = collect_shards(stored, known, origin.config or {})
        whole = assemble_checkpoint(stored, collected, known, origin.config, origin.shapes, replicas=replicas)
        checkpoint = replace(whole, subset=folder.subset, notes=notes, beside=folder.beside)
        matched = match(checkpoint, known)
        require_none(check_stored_constants(stored, collected, known, matched.members))
        require_none(check_values(stored, collected, known))
        return Source(folder.path, checkpoint, known, matched, origin)

    try:
        return require_one(folder.path, recipes, assemble)
    except Refused as refused:
        if recipe:
            raise explain_asked_recipe(stored, names.recipes[0], origin, refused) from None
        if not is_by_names:
            raise
        # They may be the engine's own, of a version that the recipe does not know.
        found, expected = "rank files for an engine, by their names", f"those of {recipes[0].name}: {recipes[0].about}"
        if len(recipes) > 1:
            expected = f"those of {recipes[0].engine}, by one of {format_list((one.name for one in recipes), 99)}"
        last = Problem("rank-files", str(folder.path), found, expected, MADE_FROM)
        raise Refused([*refused.problems, last]) from None


def explain_asked_recipe(stored: FolderHeaders, asked: Recipe, origin: Origin, refused: Refused) -> Refused:
    """Explains why rank files cannot be read by the recipe that was asked for, if their manifest or their metadata name
    another. Between two packaged recipes that says it all; one of the user's own may be meant for them, and be wrong.
    """
    said = {each.get("recipe", "") for each in stored.metadata}
    made_by = origin.recipe or (said.pop() if len(said) == 1 else "")
    if made_by in ("", asked.name):
        return refused
    known = {recipe.name for recipe in list_packaged_recipes()}
    first = "leave out --recipe" if made_by in known else "name the file of that recipe with --recipe"
    remedy = f"{first}; or, for rank files of {asked.name}: --to hf first, then convert the whole files with it"
    found = f"{asked.name}, for rank files made by the recipe {made_by}"
    problem = Problem("wrong-option", "--recipe", found, "the recipe that made them", remedy)
    return Refused([problem] if {asked.name, made_by} <= known else [problem, *refused.problems])


def require_one(path: AnyPath, recipes: Sequence[Recipe], assemble: Callable[[Recipe], Source]) -> Source:
    """Returns the source by the only recipe that fits. Raises Refused if several fit; if none fits, with the problems
    of the recipe that has the fewest.
    """
    found: list[Source] = []
    refusals: list[Refused] = []
    for recipe in recipes:
        try:
            found.append(assemble(recipe))
        except Refused as refused:
            refusals.append(refused)
    if not found:
        raise min(refusals, key=lambda refused: len(refused.problems))
    if len(found) > 1:
        found = [source for source in found if has_shapes_of_config(source)] or found
        # Of one rank the files of a family's usual recipe and of its others are the same.
        found = [source for source in found if not source.recipe.by_name] or found
        # Nothing in rank files tells of a part that they leave out, such as a vision tower.
        found = [source for source in found if not has_dropped_part(source.recipe)] or found
    if len(found) > 1:
        fitting = format_list(source.recipe.name for source in found)
        remedy = "choose one with --recipe"
        if found[0].origin.config is None:
            remedy = f"copy the model's config.json beside the files: it names the model; or {remedy}"
        raise refuse("no-recipe", str(path), f"{fitting} all fit", "one recipe", remedy)
    return found[0]


def has_shapes_of_config(source: Source) -> bool:
    """Whether the dtypes and shapes of a source are those that its recipe and config tell."""
    layout = Layout(1)
    kinds = group_weights(source.matched, source.recipe, layout)
    config = source.checkpoint.config
    return not any(check_weights(source.matched, kinds, source.recipe, layout, config))


def find_recipes(stored: FolderHeaders, recipes: Sequence[Recipe], origin: Origin) -> Sequence[Recipe]:
    """Finds the recipe that the manifest names, else the recipes for the config, of these those that the metadata of
    the files name. Raises Refused if the recipe in the manifest is unknown.
    """
    if not origin.recipe:
        return narrow_by_metadata(stored.metadata, narrow_recipes(origin.config or {}, recipes))
    if named := [recipe for recipe in recipes if recipe.name == origin.recipe]:
        return named
    remedy = "pass the file of that recipe with --recipe"
    found = f"made by the recipe {origin.recipe}"
    raise refuse("no-recipe", str(stored.folder), found, "a packaged recipe", remedy)
