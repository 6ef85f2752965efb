"""Summarizes a checkpoint of either layout from its headers: layout, recipe, counts, dtypes."""

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from reshard.errors import Refused, require_none
from reshard.formats.folder import read_checkpoint
from reshard.formats.huggingface import Stored, file_names, read_config, read_file, read_headers
from reshard.formats.manifest import is_subset, manifest_at, subset_text
from reshard.formats.target_names import MANIFEST, require_finished
from reshard.recipes.patterns import split_name
from reshard.recipes.recipe import recipes_to_try
from reshard.sources.match import Matched, choose_recipe, match, wanted_recipes
from reshard.sources.rank_files import held_tensors, holder_problems, left_names
from reshard.sources.rank_names import RankNames, find_foreign_recipe, find_rank_names, parse_rank_name
from reshard.text import counted, listed, printable, size_text, table
from reshard.types import Checkpoint, Recipe, Tensor


@dataclass(frozen=True, slots=True, repr=False)
class Content:
    """The summary of a checkpoint, from its headers."""

    path: str
    layout: str
    """The recipe's name for the layout, such as `huggingface`; empty if no recipe fits."""
    recipe: str
    """The recipe that fits; several joined by ` or `; empty if none does."""
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
    remark: str
    """Why no recipe fits."""
    names: Mapping[str, tuple[int, str]]
    """If no recipe fits: by name, with `#` for each number, the number of tensors, and their dtypes and shapes."""
    made: Mapping[str, str] = field(default_factory=dict)
    """The options it was made with, such as `{"--cast": "bf16"}`, by its manifest, if it has one."""
    subset: str = ""
    """The part of a larger checkpoint that it is, by its manifest; empty if it is whole."""

    def __str__(self) -> str:
        return content_text(self)

    __repr__ = __str__


def inspect_path(path: str | Path, recipe: str | None = None) -> Content:
    """Summarizes a folder of safetensors files in either layout, or a single file, from the headers alone.

        print(reshard.inspect("DeepSeek-V3"))

    `recipe` is a packaged recipe's name or a TOML file; by default the packaged recipes are tried. Raises Refused.
    """
    path = Path(path)
    content = content_at(path, recipe)
    subset = manifest_at(path).get("subset") if path.is_dir() else None
    return replace(content, subset=subset_text(subset)) if isinstance(subset, dict) and is_subset(subset) else content


def content_at(path: Path, recipe: str | None) -> Content:
    require_finished(path)
    recipes = recipes_to_try(recipe)
    if path.is_dir() and (names := find_rank_names(path, file_names(path), recipes)):
        return rank_content(path, names)
    for name in file_names(path)[:1]:
        for known in recipes if not path.is_dir() else ():
            if numbers := parse_rank_name(name, known):
                return content_of(path, read_headers(path.parent, [name]), known.right, "", numbers[1], {}, "")
    if path.is_dir() and (made_with := find_foreign_recipe(manifest_at(path), recipes)):
        remark = f"made by the recipe {made_with}, which is not packaged: pass its file with --recipe"
        return content_of(path, read_headers(path, file_names(path)), "", "", 0, {}, remark)
    checkpoint = read_checkpoint(path) if path.is_dir() else read_file(path)
    stored = Stored(checkpoint.folder, checkpoint.files, tuple(checkpoint.tensors.values()))
    try:
        chosen, matched = choose_recipe(checkpoint, recipes)
    except Refused as refused:
        return content_of(path, stored, "", "", 0, {}, str(refused))
    content = content_of(path, stored, chosen.left, chosen.name, 0, name_counts(matched, chosen), "")
    return replace(content, made=made_by(manifest_at(path))) if path.is_dir() else content


def rank_content(path: Path, names: RankNames) -> Content:
    """Summarizes rank files, with every recipe that fits if neither manifest nor config names one."""
    present = [name for name in names.wanted if name not in names.missing]
    stored, config = read_headers(path, present), read_config(path)
    manifest = manifest_at(path)
    found = manifest.get("recipe")
    wanted = found.get("name") if isinstance(found, dict) else ""
    known = [recipe for recipe in names.recipes if recipe.name == wanted] or wanted_recipes(config or {}, names.recipes)
    counts: dict[str, dict[str, int]] = {}
    remarks: list[str] = []
    for recipe in known:
        try:
            require_none(names.problems(ignore_extra_files=True))
            counts[recipe.name] = counts_of_ranks(stored, recipe, config)
        except Refused as refused:
            remarks.append(str(refused))
    remark = "" if counts else min(remarks, key=len)
    by = " or ".join(counts)
    first = next(iter(counts.values()), {})
    content = content_of(path, stored, names.recipes[0].right, by, len(names.wanted), first, remark)
    return replace(content, made=made_by(manifest))


def made_by(manifest: Mapping[str, Any]) -> Mapping[str, str]:
    """The options of the conversion and their values, by the manifest; a flag has the value `keep` or none."""
    layout = manifest.get("layout")
    layout = layout if isinstance(layout, dict) else {}
    flags = {"--mtp": ("keep_optional", "keep"), "--pad": ("pad", "")}
    texts = {"--cast": "cast", "--expert-dtype": "expert_dtype"}
    values = {option: layout[key] for option, key in texts.items() if isinstance(layout.get(key), str) and layout[key]}
    return values | {option: value for option, (key, value) in flags.items() if layout.get(key) is True}


def counts_of_ranks(stored: Stored, recipe: Recipe, config: Mapping[str, Any] | None) -> dict[str, int]:
    """Raises Refused if the recipe does not fit."""
    gathered, problems = held_tensors(stored, recipe, config or {})
    require_none([*problems, *holder_problems(gathered.values(), len(stored.files))])
    return counts_of(Checkpoint(stored.folder, stored.files, left_names(gathered.values()), config), recipe)


def counts_of(checkpoint: Checkpoint, recipe: Recipe) -> dict[str, int]:
    return name_counts(match(checkpoint, recipe), recipe)


def name_counts(matched: Matched, recipe: Recipe) -> dict[str, int]:
    """By the plural that a recipe gives: `{"layers": 61, "experts": 256}`."""
    counts = matched.counts
    return {recipe.placeholders[letter].counts: count for letter, count in counts.items() if count}


def content_of(
    path: Path, stored: Stored, layout: str, recipe: str, ranks: int, counts: Mapping[str, int], remark: str
) -> Content:
    dtypes: dict[str, tuple[int, int]] = {}
    for tensor in stored.tensors:
        tensors, size = dtypes.get(tensor.dtype, (0, 0))
        dtypes[tensor.dtype] = tensors + 1, size + tensor.size
    size = sum(tensor.size for tensor in stored.tensors)
    ordered = dict(sorted(dtypes.items(), key=lambda item: -item[1][1]))
    names = names_of(stored.tensors) if remark and not ranks else {}
    return Content(
        str(path), layout, recipe, ranks, len(stored.files), len(stored.tensors), size, counts, ordered, remark, names
    )


def names_of(tensors: Iterable[Tensor]) -> dict[str, tuple[int, str]]:
    """Groups names that differ in their numbers only; sorted."""
    kinds: dict[str, list[str]] = {}
    for tensor in tensors:
        kinds.setdefault(split_name(tensor.name)[0], []).append(f"{tensor.dtype} {list(tensor.shape)}")
    return {name: (len(kinds[name]), listed(dict.fromkeys(kinds[name]), 3)) for name in sorted(kinds)}


SHOWN_NAMES = 200
"""At most so many lines of names are printed."""


def content_text(content: Content) -> str:
    """The text of a content for a person."""
    known = f"{content.layout} layout" if content.layout else "no known layout"
    by = f", recipe {content.recipe}" if content.recipe else ""
    ranks = f", cut for {counted(content.ranks, 'ranks')}" if content.ranks else ""
    files = counted(content.files, "files")
    lines = [
        f"{content.path}: {known}{by}{ranks}",
        f"{files}, {counted(content.tensors, 'tensors')}, {content.size:,} bytes ({size_text(content.size)})",
    ]
    if content.counts:
        lines.append(", ".join(counted(count, name) for name, count in content.counts.items()))
    if content.subset:
        lines.append(f"a subset: {content.subset}")
    if content.made:
        words = [f"{option} {value}".rstrip() for option, value in content.made.items()]
        lines.append(f"made with {', '.join(words)}, by {MANIFEST}")
    rows = [(dtype, f"{count:,}", f"{size:,}") for dtype, (count, size) in content.dtypes.items()]
    lines += ["", table(("dtype", "tensors", "bytes"), rows)]
    if content.names:
        shapes = [(name, f"{count:,}", shape) for name, (count, shape) in content.names.items()]
        lines += ["", table(("names, with # for a number", "tensors", "dtype and shape"), shapes[:SHOWN_NAMES])]
        lines += [f"... and {len(shapes) - SHOWN_NAMES:,} more; --json lists them all"] * (len(shapes) > SHOWN_NAMES)
    lines += ["", content.remark] if content.remark else []
    return "\n".join(printable(line) for text in lines for line in text.split("\n"))
