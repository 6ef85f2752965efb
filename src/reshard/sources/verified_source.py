"""Reads the two sides of a verification: rank files and a whole checkpoint, with the manifest's recipe and subset."""

from bisect import bisect_left
from collections.abc import Iterator, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass, replace
from typing import Any

from reshard.errors import Problem, Refused, refuse, require_none
from reshard.formats.boxed_folder import is_boxed_folder, list_whole_files
from reshard.formats.folder import Folder, read_folder
from reshard.formats.huggingface import list_safetensors_files, read_config, read_headers
from reshard.formats.manifest import find_asked_subset, format_subset, read_subset, read_valid_manifest
from reshard.formats.part_manifests import find_recipe_name
from reshard.formats.share_names import find_share_of_folder
from reshard.paths import AnyPath
from reshard.recipe_types import Recipe
from reshard.recipes.recipe import list_packaged_recipes, list_recipes_to_try
from reshard.sources.checkpoints import read_folder_checkpoint
from reshard.sources.engine_choice import is_chosen_by_name
from reshard.sources.exempt_names import replace_exempt_modules
from reshard.sources.fitted_names import match_or_rename
from reshard.sources.packed_weights import Unpacked
from reshard.sources.quantization_config import CODES
from reshard.sources.rank_names import RankNames, find_rank_names, narrow_by_metadata
from reshard.sources.source import Source, read_source
from reshard.sources.stacked_experts import Stacking, Unstacked, find_stacking, unstack_checkpoint
from reshard.sources.subset import narrow_checkpoint
from reshard.sources.tied_heads import add_tied_name, find_tied_head, list_tied_rules
from reshard.types import NVFP4, Checkpoint, File, Tensor


@dataclass(frozen=True, slots=True)
class VerifiedSides:
    """The two sides that a verification compares."""

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
    repeated: tuple[str, Tensor | None, Tensor] | None = None
    """Of slices: the name of a tied head that the other side does not have, the head, which is left out of `whole`, and
    the embedding, which must have the same bytes.
    """
    unpacked: Unpacked | None = None
    """Of a source with packed weights that the target has in BF16: as it lies there, and as it was read."""


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
    found = read_named_source(
        target, source, recipe, manifest, ignore_extra_files=ignore_extra_files, config_folder=config_folder
    )
    before, now = found.checkpoint.subset, manifest.get("subset", {})
    if now:
        whole = narrow_checkpoint(
            found.checkpoint, found.recipe, found.matched, find_asked_subset(before, now, str(target))
        )
    else:
        whole = find_named_source(found, target)
    if is_boxed_folder(target):
        whole = add_tied_name(whole, found.recipe, found.matched)
    repeated = find_added_head(found, whole, target)
    if repeated:
        whole = drop_head(whole, repeated[0])
    unstacked, unpacked = found.unstacked, found.unpacked
    return VerifiedSides(
        target, whole, found.recipe, whole.files, unstacked=unstacked, repeated=repeated, unpacked=unpacked
    )


def read_named_source(
    target: AnyPath,
    source: AnyPath,
    recipe: str | None,
    manifest: Mapping[str, Any],
    *,
    ignore_extra_files: bool,
    config_folder: AnyPath | None,
) -> Source:
    """Reads a source in the original layout, by the recipe that a target was made with. Raises Refused."""
    recipes = list_recipes_to_try(recipe)
    made_with = find_recipe_name(manifest)
    if recipe is None and made_with not in {"", *(known.name for known in list_packaged_recipes())}:
        raise refuse_recipe(target, made_with, "a packaged recipe")
    if recipe is None:
        named = made_with or find_recipe_of_ranks(target, recipes)
        recipe = named if is_chosen_by_name(named) else None
    engine = "" if recipe else find_engine_of_names(target, recipes)
    found = read_source(
        source,
        recipe,
        for_engine=engine,
        ignore_extra_files=ignore_extra_files,
        config_folder=config_folder,
        cast=find_cast(target, manifest),
    )
    found = compute_expected_config(found)
    if made_with not in ("", found.recipe.name):
        raise refuse_recipe(target, made_with, f"the recipe {found.recipe.name}, which the source wants")
    return found


def find_cast(target: AnyPath, manifest: Mapping[str, Any]) -> str:
    """Finds the cast that a target was made with: as its manifest says, or by what it has: a factor of NVFP4, or no
    codes. Empty if there is none.
    """
    layout, casts = manifest.get("layout"), manifest.get("casts")
    told = layout.get("cast", "") if isinstance(layout, Mapping) else None
    # Without such a cast it may be of a version that left packed weights as they were.
    is_open = told == "bf16" and isinstance(casts, Mapping) and "dequantize" not in casts
    if told is not None and not is_open:
        return str(told)
    with suppress(Refused):
        tensors = read_headers(target, list_target_names(target)).tensors
        if any(tensor.name.endswith(".weight_global_scale") for tensor in tensors):
            return NVFP4
        return "" if any(tensor.dtype in CODES for tensor in tensors) else "bf16"
    return ""


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
    if find_share_of_folder(target):
        remedy = "leave --source out: the checksums of its manifest prove a share"
        raise refuse(
            "wrong-option", "--source", "rank files, and one share of what they hold", "all shares, joined", remedy
        )
    if find_rank_names(target, restored.names, names.recipes):
        found, remedy = "rank files, as the target has them", "reshard diff; or hold both against the whole checkpoint"
        raise refuse("rank-files", "--source", found, "what the target was made from, whole", remedy)
    require_none(check_subsets(source, target))
    whole = read_folder_checkpoint(restored, ignore_extra_files=ignore_extra_files, is_verified=True)
    whole = replace(whole, subset=restored.subset)
    if not ignore_extra_files:
        require_none(check_nothing_aside(restored, whole))
    ranks = read_source(source, recipe, ignore_extra_files=ignore_extra_files, config_folder=config_folder)
    unstacked = unstack_checkpoint(whole)
    fitted = match_or_rename(unstacked.checkpoint if unstacked else whole, [ranks.recipe], is_asked=True)
    files, whole = ranks.checkpoint.files, fitted.checkpoint
    repeated = find_repeated_head(ranks, whole) if restored.boxed else None
    if repeated:
        whole = drop_head(whole, repeated[0])
    return VerifiedSides(source, whole, ranks.recipe, files, ignore_extra_files, unstacked, repeated)


def find_repeated_head(ranks: Source, whole: Checkpoint) -> tuple[str, Tensor | None, Tensor] | None:
    """Finds the name of the output head that rank files lack, for it is the embedding; the head of a target, None if it
    has none; and that embedding.
    """
    found = find_tied_head(ranks.checkpoint, ranks.recipe, ranks.matched)
    table = whole.tensors.get(found[1].name) if found else None
    return (found[0], whole.tensors.get(found[0]), table) if found and table else None


def find_added_head(found: Source, whole: Checkpoint, target: AnyPath) -> tuple[str, Tensor | None, Tensor] | None:
    """Finds the tied head of slices that whole files made of them lack, and the embedding: the manifest of the slices,
    which is not there any more, told that it was added. None of any other sides.
    """
    tied = list_tied_rules(whole, found.recipe) if whole.boxes is not None else []
    families = found.matched.families
    heads = [family.tensors[0] for family in families if family.rule in tied]
    others = tuple(family for family in families if family.rule not in tied)
    pair = find_tied_head(whole, found.recipe, replace(found.matched, families=others))
    names = list_target_names(target)
    if not heads or not pair or find_rank_names(target, names, [found.recipe]):
        return None
    with suppress(Refused):
        if heads[0].name not in read_named_tensors(target).tensors:
            return heads[0].name, heads[0], pair[1]
    return None


def drop_head(whole: Checkpoint, head: str) -> Checkpoint:
    """Drops a head that is held against the embedding instead."""
    return replace(whole, tensors={name: tensor for name, tensor in whole.tensors.items() if name != head})


def find_recipe_of_rank_files(source: AnyPath, recipe: str | None) -> Recipe | None:
    """Finds a recipe of a source of rank files, by their names; None of another source. Raises Refused."""
    names = find_rank_names(source, list_whole_files(source), list_recipes_to_try(recipe))
    return names.recipes[0] if names else None


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
    the verification tells of it. Raises Refused if the names are those of stacked experts but for a prefix.
    """
    found: Stacking | None = None
    with suppress(Refused):
        checkpoint = read_named_tensors(target)
        found = find_stacking(checkpoint, ())
        if not found.is_told and not unstack_checkpoint(checkpoint):  # models of other forms have such names too
            return ""
    if not found or not found.recipes:
        return ""
    for note in found.stored.notes if found.stored is not checkpoint else ():
        remedy = "first --to hf into another folder, which gives them these names; then verify that one"
        raise refuse("prefix", str(target), "names with another prefix than the recipe's", note.text, remedy)
    return found.recipes[0].engine


def read_named_tensors(target: AnyPath) -> Checkpoint:
    """Reads the tensors of a target by their names: if several files have one, that of the last. Raises Refused."""
    if is_boxed_folder(target):
        return read_folder_checkpoint(read_folder(target), is_verified=True)
    stored = read_headers(target, list_target_names(target))
    return Checkpoint(target, stored.files, {one.name: one for one in stored.tensors}, read_config(target))


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
    """Lists the tensor files of a target; none if it cannot be read: the verification tells of it."""
    try:
        return list_safetensors_files(target)
    except Refused:
        return []


def holds_only(target: AnyPath, own: Checkpoint) -> bool:
    """Whether all tensors of a target have names of a checkpoint. A damaged target has none: the verification tells of
    it.
    """
    try:
        names = read_named_tensors(target).tensors.keys()
    except Refused:
        return False
    return names <= own.tensors.keys()


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
