"""Reads the two sides of a verification: rank files and a whole checkpoint, with the manifest's recipe and subset."""

from bisect import bisect_left
from collections.abc import Iterator, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass, replace
from typing import Any

from reshard.errors import Problem, Refused, refuse, require_none
from reshard.formats.boxed_folder import list_whole_files
from reshard.formats.folder import Folder, read_folder
from reshard.formats.huggingface import list_safetensors_files, read_config, read_headers
from reshard.formats.manifest import find_asked_subset, format_subset, read_subset, read_valid_manifest
from reshard.paths import AnyPath
from reshard.recipe_types import Recipe
from reshard.recipes.recipe import list_packaged_recipes, list_recipes_to_try
from reshard.sources.checkpoints import read_folder_checkpoint
from reshard.sources.engine_choice import is_chosen_by_name
from reshard.sources.exempt_names import replace_exempt_modules
from reshard.sources.fitted_names import match_or_rename
from reshard.sources.rank_names import RankNames, find_rank_names, narrow_by_metadata
from reshard.sources.source import Source, read_source
from reshard.sources.stacked_experts import Stacking, Unstacked, find_stacking, unstack_checkpoint
from reshard.sources.subset import narrow_checkpoint
from reshard.types import Checkpoint, File


@dataclass(frozen=True, slots=True)
class VerifiedSides:
    """The two sides that `verify_target` compares."""

    folder: AnyPath
    """The folder of the rank files, or of the cast files in the original layout."""
    whole: Checkpoint
    """The other side: the checkpoint in the original layout."""
    recipe: Recipe
    files: Sequence[File]
    """The files of the source, as the manifest of the target should name them."""
    ignores_extra_files: bool = False
    """Whether other tensor files in `folder` are left out: it is the source, and the user said so."""
    unstacked: Unstacked | None = None
    """Of a source with stacked experts: as it lies there, and as it was read."""


def read_sides(
    target: AnyPath,
    source: AnyPath,
    recipe: str | None,
    *,
    ignore_extra_files: bool,
    config_folder: AnyPath | None = None,
) -> VerifiedSides:
    """Reads the headers of a target and its source. Raises Refused if the target was made with another recipe.

    A checkpoint that was restored from rank files is verified in reverse: are the rank files cut from it? So the proof
    does not depend on the code that assembled the shards.
    """
    recipes = list_recipes_to_try(recipe)
    if names := find_rank_names(source, list_whole_files(source), recipes):
        return read_restored_sides(
            target, source, names, recipe, ignore_extra_files=ignore_extra_files, config_folder=config_folder
        )
    manifest = read_valid_manifest(target)
    made_with = find_recipe_name(manifest)
    if recipe is None and made_with not in {"", *(known.name for known in list_packaged_recipes())}:
        raise refuse_recipe(target, made_with, "a packaged recipe")
    if recipe is None:
        named = made_with or find_recipe_of_ranks(target, recipes)
        recipe = named if is_chosen_by_name(named) else None
    engine = "" if recipe else find_engine_of_names(target, recipes)
    found = read_source(
        source, recipe, for_engine=engine, ignore_extra_files=ignore_extra_files, config_folder=config_folder
    )
    found = compute_expected_config(found)
    if made_with not in ("", found.recipe.name):
        raise refuse_recipe(target, made_with, f"the recipe {found.recipe.name}, which the source wants")
    before, now = found.checkpoint.subset, manifest.get("subset", {})
    if now:
        whole = narrow_checkpoint(
            found.checkpoint, found.recipe, found.matched, find_asked_subset(before, now, str(target))
        )
    else:
        whole = find_named_source(found, target)
    return VerifiedSides(target, whole, found.recipe, whole.files, unstacked=found.unstacked)


def read_restored_sides(
    target: AnyPath,
    source: AnyPath,
    names: RankNames,
    recipe: str | None,
    *,
    ignore_extra_files: bool,
    config_folder: AnyPath | None,
) -> VerifiedSides:
    """Reads the sides in reverse: the target is the whole checkpoint, the source the rank files. Raises Refused."""
    restored = read_folder(target)
    if find_rank_names(target, restored.names, names.recipes):
        found, remedy = "rank files, as the target has them", "reshard diff; or hold both against the whole checkpoint"
        raise refuse("rank-files", "--source", found, "what the target was made from, whole", remedy)
    require_none(check_subsets(source, target))
    whole = replace(read_folder_checkpoint(restored, ignore_extra_files=ignore_extra_files), subset=restored.subset)
    if not ignore_extra_files:
        require_none(check_nothing_aside(restored, whole))
    ranks = read_source(source, recipe, ignore_extra_files=ignore_extra_files, config_folder=config_folder)
    unstacked = unstack_checkpoint(whole)
    fitted = match_or_rename(unstacked.checkpoint if unstacked else whole, [ranks.recipe], is_asked=True)
    files = ranks.checkpoint.files
    return VerifiedSides(source, fitted.checkpoint, ranks.recipe, files, ignore_extra_files, unstacked)


def check_nothing_aside(restored: Folder, whole: Checkpoint) -> Iterator[Problem]:
    """Reports what a restored checkpoint has too much. In a source it may be left aside; here nothing wrote it."""
    remedy = "move it away, or pass --ignore-extra-files to leave it out"
    for name in sorted(set(restored.names).difference(file.name for file in whole.files)):
        yield Problem("extra-file", name, "a file that was not restored", "none", remedy)
    for note in whole.notes:
        if note.kind in ("shadowed", "not-in-index"):
            yield Problem("extra-tensor", str(restored.path), note.text, "none", "convert it again")


def find_recipe_of_ranks(target: AnyPath, recipes: Sequence[Recipe]) -> str:
    """Finds the recipe that rank files without a manifest are of: that of their metadata, else the one by which they
    can be read. Empty if neither tells, or if no recipe of files with such names must be named.
    """
    names = find_rank_names(target, list_target_names(target), recipes)
    if names is None or not any(recipe.by_name for recipe in names.recipes):
        return ""
    try:
        stored = read_headers(target, [name for name in names.wanted if name not in names.missing])
        said = narrow_by_metadata(stored.metadata, names.recipes)
        return said[0].name if len(said) == 1 else read_source(target, ignore_extra_files=True).recipe.name
    except Refused:
        return ""


def find_engine_of_names(target: AnyPath, recipes: Sequence[Recipe]) -> str:
    """Finds the engine that the files of a target are for, by the names of files or stacked experts; empty for none."""
    names = find_rank_names(target, list_target_names(target), recipes)
    return names.recipes[0].engine if names else find_engine_of_stacks(target)


def find_engine_of_stacks(target: AnyPath) -> str:
    """Finds the engine whose stacked experts a target has; empty for none, and for a target that cannot be read:
    `verify_target` tells of it. Raises Refused if the names are those of stacked experts but for a prefix.
    """
    found: Stacking | None = None
    with suppress(Refused):
        stored = read_headers(target, list_target_names(target))
        tensors = {tensor.name: tensor for tensor in stored.tensors}
        checkpoint = Checkpoint(target, stored.files, tensors, read_config(target))
        found = find_stacking(checkpoint, ())
        if not found.is_told and not unstack_checkpoint(checkpoint):  # models of other forms have such names too
            return ""
    if not found or not found.recipes:
        return ""
    for note in found.stored.notes if found.stored is not checkpoint else ():
        remedy = "first --to hf into another folder, which gives them these names; then verify that one"
        raise refuse("prefix", str(target), "names with another prefix than the recipe's", note.text, remedy)
    return found.recipes[0].engine


def find_named_source(found: Source, target: AnyPath) -> Checkpoint:
    """Finds the source under the names that the target should have: those of the recipe; those in the source's own
    files, if the target has whole files with these names: it was restored from rank files.
    """
    own = found.stored
    if own and found.origin.renaming and not find_rank_names(target, list_target_names(target), [found.recipe]):
        return own if holds_only(target, own) else found.checkpoint
    return found.checkpoint


def compute_expected_config(found: Source) -> Source:
    """Computes the config of a renamed source a second time, from its file: where each tensor lies tells its old and
    its new name, and so those of the modules.
    """
    own = found.stored
    if own is None or not found.origin.renaming:
        return found
    places = {(tensor.file, tensor.offset, tensor.size): name for name, tensor in found.checkpoint.tensors.items()}
    pairs = [(name, places.get((one.file, one.offset, one.size), name)) for name, one in sorted(own.tensors.items())]
    dotted = [old + "." for old, _ in pairs]

    def expect(module: Any) -> Any:
        before, star, rest = str(module).partition(".*")
        place = bisect_left(dotted, before + ".")
        is_one = isinstance(module, str) and place < len(dotted) and dotted[place].startswith(before + ".")
        return infer_module(before, *pairs[place]) + star + rest if is_one else module

    config = replace_exempt_modules(own.config, lambda modules: [expect(module) for module in modules])
    return replace(found, checkpoint=replace(found.checkpoint, config=config))


def infer_module(module: str, old: str, new: str) -> str:
    """Finds the new name of a module by the old and the new name of a tensor of it: what the tensor's name has behind
    the module is taken off its new name, from the end.
    """
    before, after = old.split("."), new.split(".")
    while len(before) > module.count(".") + 1:
        last = before.pop()
        if after and after[-1] == last:
            after.pop()
    return ".".join(after) or module


def list_target_names(target: AnyPath) -> Sequence[str]:
    """Lists the tensor files of a target; none if it cannot be read: `verify_target` tells of it."""
    try:
        return list_safetensors_files(target)
    except Refused:
        return []


def holds_only(target: AnyPath, own: Checkpoint) -> bool:
    """Whether all tensors of a target have names of a checkpoint. A damaged target has none: `verify_target` tells of
    it.
    """
    try:
        stored = read_headers(target, list_target_names(target))
    except Refused:
        return False
    return all(tensor.name in own.tensors for tensor in stored.tensors)


def find_recipe_name(manifest: Mapping[str, Any]) -> str:
    """Finds the recipe that a target was made with; empty if its manifest does not name one."""
    made_with = manifest.get("recipe")
    return str(made_with.get("name", "")) if isinstance(made_with, dict) else ""


def refuse_recipe(target: AnyPath, made_with: str, expected: str) -> Exception:
    """Makes the refusal for another recipe than the target's: with it, every tensor would look wrong."""
    found, remedy = f"made by the recipe {made_with}", "pass the file or the name of that recipe with --recipe"
    return refuse("no-recipe", str(target), found, expected, remedy)


def check_subsets(source: AnyPath, target: AnyPath) -> Iterator[Problem]:
    """Reports a target whose subset is not the source's: part of a model cannot be compared with the whole."""
    if (now := read_subset(target)) != read_subset(source):
        remedy = "verify it without --source, by the checksums of its manifest"
        text = format_subset(now) or "a whole model"
        yield Problem("incomplete-source", str(target), text, "what the ranks hold", remedy)
