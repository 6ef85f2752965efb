"""Summarizes a checkpoint of either layout from its headers: layout, recipe, counts, dtypes."""

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from reshard.errors import Refused, require_none
from reshard.execution.staging import note_begun_repair
from reshard.formats.boxed_folder import list_whole_files
from reshard.formats.folder import Folder, read_folder
from reshard.formats.huggingface import (
    INDEX,
    FolderHeaders,
    list_safetensors_files,
    read_config,
    read_file,
    read_headers,
)
from reshard.formats.manifest import (
    format_subset,
    is_subset,
    list_rank_files,
    read_conversion_options,
    read_manifest_unchecked,
)
from reshard.formats.part_manifests import (
    find_recipe_name,
    note_not_joined,
    read_joined_manifest,
    require_shares_joined,
)
from reshard.formats.recognition import require_model, require_no_megatron
from reshard.formats.remote_names import read_location, require_path
from reshard.formats.target_names import MANIFEST, require_finished
from reshard.inspection.file_contents import FileContent, StoredBoxes, count_boxes, count_dtypes, list_file_contents
from reshard.inspection.tensor_list import ListedTensor, format_tensor_list, group_names, list_chosen_tensors
from reshard.inspection.unfinished import Unfinished, describe_unfinished, note_shares, read_unfinished
from reshard.paths import AnyPath, RemotePath
from reshard.planning.options import list_patterns
from reshard.recipe_types import Recipe
from reshard.recipes.recipe import list_recipes_to_try
from reshard.sources.boxed_hints import explain_boxed
from reshard.sources.checkpoints import check_named_slices, read_folder_checkpoint
from reshard.sources.constants import check_stored_constants
from reshard.sources.engine_choice import choose_for_engine
from reshard.sources.fitted_names import match_or_rename
from reshard.sources.held_shards import collect_shards, take_first_shards
from reshard.sources.match import Matched, match
from reshard.sources.rank_files import check_collected
from reshard.sources.rank_names import (
    RankNames,
    find_foreign_recipe,
    find_rank_names,
    narrow_by_metadata,
    note_files_beside_ranks,
    parse_rank_name,
)
from reshard.sources.recipe_choice import narrow_recipes
from reshard.sources.stacked_experts import unstack_checkpoint
from reshard.text import escape, format_count, format_numbers, format_size, format_table
from reshard.types import Checkpoint, Note


@dataclass(frozen=True, slots=True, repr=False)
class Content:
    """The summary of a checkpoint, from its headers."""

    path: str
    layout: str
    """The recipe's name for the layout, such as `huggingface`; empty if no recipe fits."""
    recipe: str
    """The recipe that fits; several joined by `or`; empty if none does."""
    ranks: int
    """The number of ranks that it is split for; 0 if it is whole."""
    files: int
    tensors: int
    size: int
    """Of all tensors, in bytes."""
    counts: Mapping[str, int]
    """Such as `{"layers": 61, "experts": 256}`."""
    dtypes: Mapping[str, tuple[int, int]]
    """By dtype: the number of tensors, and their bytes."""
    by_file: tuple[FileContent, ...]
    remark: str
    """The reason why no recipe fits; of slices, which files lack."""
    names: Mapping[str, tuple[int, str]]
    """If no recipe fits: by name, with `#` for each number, the number of tensors, and their dtypes and shapes."""
    made: Mapping[str, str] = field(default_factory=dict)
    """The options it was made with, such as `{"--cast": "bf16"}`, by its manifest, if it has one."""
    subset: str = ""
    """The part of a larger checkpoint that it is, by its manifest; empty if it is whole."""
    notes: tuple[Note, ...] = ()
    """What was left aside or changed while it was read."""
    listed: tuple[ListedTensor, ...] | None = None
    """The tensors that were asked for; None if none were."""
    reason: str = ""
    """The remark in one line, if it is that no recipe fits."""
    boxes: int = 0
    """Of a distributed checkpoint of torch: the number of parts in which its tensors are stored; else 0."""
    unfinished: Unfinished | None = None
    """The conversion into this folder that has not ended, if there is one. All other fields are about finished files:
    where there are none, only `path` and `recipe` say something.
    """

    def __str__(self) -> str:
        return format_content(self)

    __repr__ = __str__


def inspect_path(
    path: str | Path,
    recipe: str | None = None,
    tensors: Iterable[str] = (),
    *,
    ignore_extra_files: bool = False,
    config: str | Path | None = None,
) -> Content:
    """Summarizes a folder of safetensors files in either layout, or a single file, from the headers alone.

        print(reshard.inspect("DeepSeek-V3", tensors="*.mlp.gate_proj.*"))

    `recipe` is a packaged recipe's name or a TOML file; by default the packaged recipes are tried. The tensors whose
    names fit one of the shell patterns `tensors` are listed in `Content.listed`. `ignore_extra_files` and
    `config` are as for `convert`. How far an unfinished conversion is stands in `Content.unfinished`. Raises Refused.
    """
    place, patterns = require_path(path), list_patterns(tensors)
    (unfinished, notes), shares = find_unfinished_run(place), tuple(note_shares(place))
    is_mixed = bool(shares) and isinstance(place, RemotePath)  # their files lie there, and are not of the target yet
    if is_mixed and patterns:
        require_shares_joined(place)
    if (unfinished or shares) and not patterns and (is_mixed or not (place / MANIFEST).exists()):
        content = make_content(place, FolderHeaders(place, (), ()), "", getattr(unfinished, "recipe", ""), 0, {}, "")
        return replace(content, unfinished=unfinished, notes=shares)
    content = summarize_path(place, recipe, ignore_extra_files=ignore_extra_files, config_folder=read_location(config))
    content = replace(content, unfinished=unfinished, notes=(*content.notes, *notes, *shares))
    if patterns:
        content = replace(content, listed=list_chosen_tensors(place, patterns, recipe))
    subset = read_manifest_unchecked(place).get("subset") if place.is_dir() else None
    return replace(content, subset=format_subset(subset)) if isinstance(subset, dict) and is_subset(subset) else content


def find_unfinished_run(path: AnyPath) -> tuple[Unfinished | None, tuple[Note, ...]]:
    """Finds an unfinished conversion. Beside finished files a damaged journal is worth a note, without any Refused is
    raised.
    """
    try:
        return read_unfinished(path), tuple(note_begun_repair(path)) if isinstance(path, Path) else ()
    except Refused as refused:
        if not (path / MANIFEST).exists():
            raise
        return None, tuple(Note(one.kind, f"{one.subject}: {one.found}") for one in refused.problems)


def summarize_path(
    path: AnyPath, recipe: str | None, *, ignore_extra_files: bool, config_folder: AnyPath | None
) -> Content:
    require_finished(path)
    recipes = list_recipes_to_try(recipe)
    if path.is_dir() and (names := find_rank_names(path, list_whole_files(path), recipes)):
        return summarize_rank_files(path, names)
    for name in [] if path.is_dir() else list_safetensors_files(path):
        for known in recipes:
            if numbers := parse_rank_name(name, known):
                return make_content(path, read_headers(path.parent, [name]), known.right, "", numbers[1], {}, "")
    if path.is_dir() and (made_with := find_foreign_recipe(read_manifest_unchecked(path), recipes)):
        remark = f"made by the recipe {made_with}, which is not packaged: pass its file with --recipe"
        return make_content(path, read_headers(path, list_whole_files(path)), "", "", 0, {}, remark)
    # With an index a note names the files that are extra, which is all that is asked.
    is_free = ignore_extra_files or (path / INDEX).is_file()
    folder = read_folder(path, config_folder)
    if some := summarize_some_slices(folder):
        return some
    whole = read_folder_checkpoint(folder, ignore_extra_files=is_free) if path.is_dir() else read_file(path)
    checkpoint = replace(whole, config=folder.config)
    stored = FolderHeaders(checkpoint.folder, checkpoint.files, tuple(checkpoint.tensors.values()))
    try:
        unstacked = unstack_checkpoint(checkpoint, recipes)
        chosen = choose_for_engine(recipes, "", is_named=bool(recipe))
        with explain_boxed(checkpoint):
            fitted = match_or_rename(unstacked.checkpoint if unstacked else checkpoint, chosen, is_asked=False)
    except Refused as refused:
        remark = explain_no_recipe(checkpoint, refused)
        content = make_content(path, stored, "", "", 0, {}, remark, checkpoint.boxes)
        reason = shorten_refusal(refused) if remark == str(refused) else ""
        return replace(content, notes=checkpoint.notes, reason=reason, boxes=count_boxes(checkpoint))
    counts = name_counts(fitted.matched, fitted.recipe)
    layout, by = (unstacked.recipe.right, unstacked.recipe) if unstacked else (fitted.recipe.left, fitted.recipe)
    content = make_content(path, stored, layout, by.name, 0, counts, "", checkpoint.boxes)
    made = read_conversion_options(read_manifest_unchecked(path)) if path.is_dir() else {}
    return replace(content, made=made, notes=fitted.checkpoint.notes, boxes=count_boxes(checkpoint))


def summarize_some_slices(folder: Folder) -> Content | None:
    """Summarizes slices that lack others of the same target, by the manifest beside them; None of anything else."""
    lacking = list(check_named_slices(folder))
    if folder.boxed is None or not lacking:
        return None
    files, manifest = folder.boxed.files, folder.manifest
    parts = tuple(box.part for boxes in folder.boxed.boxes.values() for box in boxes)
    stored, name = FolderHeaders(folder.folder, files, parts), find_recipe_name(manifest)
    part = note_part(folder.path, [file.name for file in files])
    is_part = part and list_rank_files(manifest).isdisjoint(problem.subject for problem in lacking)
    remark = "" if is_part else str(Refused(lacking))
    content = make_content(folder.path, stored, "slices", name, manifest["ranks"], {}, remark)
    notes = (*([part] if part else []), *note_not_joined(folder.path))
    return replace(content, made=read_conversion_options(manifest), notes=notes)


def shorten_refusal(refused: Refused) -> str:
    """Says in one line why no recipe fits: the first problem, and how many there are beside it."""
    first, *others = refused.problems
    said = first.found  # of no recipe, it names the nearest one and what that does not know
    if first.kind != "no-recipe":
        said = f"{first.subject}: {first.found}; expected: {first.expected}"
    more = f" (and {format_count(len(others), 'more problems')})" if others else ""
    return f"no recipe fits: {said}{more}"


def explain_no_recipe(checkpoint: Checkpoint, refused: Refused) -> str:
    """Explains why no recipe fits: because it is no model, or what `refused` says."""
    try:
        require_model(checkpoint)
        require_no_megatron(checkpoint)
    except Refused as other:
        return str(other)
    return str(refused)


def summarize_rank_files(path: AnyPath, names: RankNames) -> Content:
    """Summarizes rank files, with every recipe that fits if neither manifest nor config names one."""
    present = [name for name in names.wanted if name not in names.missing]
    stored, config = read_headers(path, present), read_config(path)
    manifest = read_manifest_unchecked(path)
    found = manifest.get("recipe")
    wanted = found.get("name") if isinstance(found, dict) else ""
    by_manifest = [recipe for recipe in names.recipes if recipe.name == wanted]
    known = by_manifest or narrow_by_metadata(stored.metadata, narrow_recipes(config or {}, names.recipes))
    if names.missing and (part := note_part(path, present)):
        content = make_content(path, stored, known[0].right, known[0].name, len(names.wanted), {}, "")
        return replace(content, made=read_conversion_options(manifest), notes=(part, *note_not_joined(path)))
    counts: dict[str, dict[str, int]] = {}
    remarks: list[str] = []
    for recipe in known:
        try:
            require_none(names.problems(ignore_extra_files=True))
            counts[recipe.name] = count_members_of_ranks(stored, recipe, config)
        except Refused as refused:
            remarks.append(str(refused))
    remark = "" if counts else min(remarks, key=len)
    first = next(iter(counts.values()), {})
    content = make_content(path, stored, names.recipes[0].right, " or ".join(counts), len(names.wanted), first, remark)
    notes = (*note_files_beside_ranks(names), *note_not_joined(path))
    return replace(content, made=read_conversion_options(manifest), notes=notes)


def note_part(path: AnyPath, present: Sequence[str]) -> Note | None:
    """Notes that a folder holds some ranks only, which its manifests name; None if they do not name all of these."""
    try:
        manifest = read_joined_manifest(path)
    except Refused:
        return None
    if not list_rank_files(manifest) >= {*present}:
        return None
    ranks = format_numbers(entry["rank"] for entry in manifest["files"] if entry["name"] in present)
    return Note("part", f"a part of a target: ranks {ranks} of {manifest['ranks']}, by {MANIFEST}")


def count_members_of_ranks(stored: FolderHeaders, recipe: Recipe, config: Mapping[str, Any] | None) -> dict[str, int]:
    """Raises Refused if the recipe does not fit."""
    collected = collect_shards(stored, recipe, config or {})
    require_none(check_collected(collected, len(stored.files)))
    first = take_first_shards(collected.held.values())
    matched = match(Checkpoint(stored.folder, stored.files, first, config), recipe)
    require_none(check_stored_constants(stored, collected, recipe, matched.members))
    return name_counts(matched, recipe)


def name_counts(matched: Matched, recipe: Recipe) -> dict[str, int]:
    """By the plural that a recipe gives: `{"layers": 61, "experts": 256}`."""
    counts = matched.counts
    return {recipe.placeholders[letter].counts: count for letter, count in counts.items() if count}


def make_content(
    path: AnyPath,
    stored: FolderHeaders,
    layout: str,
    recipe: str,
    ranks: int,
    counts: Mapping[str, int],
    remark: str,
    boxes: StoredBoxes | None = None,
) -> Content:
    dtypes, by_file = count_dtypes(stored), list_file_contents(stored, boxes)
    size, tensors = sum(size for _, size in dtypes.values()), len(stored.tensors)
    names = group_names(stored.tensors) if remark and not ranks else {}
    return Content(
        str(path), layout, recipe, ranks, len(stored.files), tensors, size, counts, dtypes, by_file, remark, names
    )


MOST_SHOWN_NAMES = 200
"""At most so many lines of names are printed."""


def format_content(content: Content) -> str:
    """The text of a content for a person."""
    if not content.files:
        shares = [f"{content.path}: shares of a target, not joined yet", *(note.text for note in content.notes)]
        return str(content.unfinished or "\n".join(map(escape, shares)))
    known = f"{content.layout} layout" if content.layout else "no known layout"
    by = f", recipe {content.recipe}" if content.recipe else ""
    ranks = f", cut for {format_count(content.ranks, 'ranks')}" if content.ranks else ""
    files = format_count(content.files, "files")
    lines = [
        f"{content.path}: {known}{by}{ranks}",
        f"{files}, {format_count(content.tensors, 'tensors')}, {content.size:,} bytes ({format_size(content.size)})",
    ]
    if content.boxes:
        lines.append(f"a distributed checkpoint of torch: the tensors are stored in {content.boxes:,} parts")
    lines += [content.reason] if content.reason else []
    if content.counts:
        lines.append(", ".join(format_count(count, name) for name, count in content.counts.items()))
    if content.subset:
        lines.append(f"a subset: {content.subset}")
    if content.made:
        words = [f"{option} {value}".rstrip() for option, value in content.made.items()]
        lines.append(f"made with {', '.join(words)}, by {MANIFEST}")
    rows = [(dtype, f"{count:,}", f"{size:,}") for dtype, (count, size) in content.dtypes.items()]
    lines += ["", format_table(("dtype", "tensors", "bytes"), rows)]
    if content.listed is not None:
        lines += ["", format_tensor_list(content.listed)]
    elif content.names:
        shapes = [(name, f"{count:,}", shape) for name, (count, shape) in content.names.items()]
        table = format_table(("names, with # for a number", "tensors", "dtype and shape"), shapes[:MOST_SHOWN_NAMES])
        lines += ["", table]
        more = len(shapes) - MOST_SHOWN_NAMES
        lines += [f"... and {more:,} more; --json lists them all"] * (more > 0)
    lines += [f"note: {note.text}" for note in content.notes]
    lines += ["", content.remark] if content.remark else []
    lines += ["", *describe_unfinished(content.unfinished)] if content.unfinished else []
    return "\n".join(escape(line) for text in lines for line in text.split("\n"))
