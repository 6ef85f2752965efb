"""What lies at a path: a Hugging Face checkpoint or rank files -> Checkpoint, Recipe and Origin."""

import re
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, NamedTuple

from xxhash import xxh3_128_hexdigest

from reshard.errors import Problem, Refused, refuse, require_none
from reshard.formats.huggingface import (
    CONFIG,
    INDEX,
    Stored,
    file_names,
    read_checkpoint,
    read_config,
    read_headers,
    read_index,
    read_metadata,
)
from reshard.formats.manifest import Origin, known_manifest, read_manifest, read_origin, subset_text
from reshard.formats.ranges import CheckedRange, parse_ranges
from reshard.formats.target_names import MANIFEST
from reshard.recipes.recipe import recipes_to_try
from reshard.sources.match import choose_recipe, match, wanted_recipes
from reshard.sources.rank_files import gather
from reshard.text import listed
from reshard.types import MOST_RANKS, RANKS, Checkpoint, Form, Recipe, Tensor

AGAIN = "convert it again; or remove reshard.json, to take the rank files as they are"


@dataclass(frozen=True, slots=True)
class Source:
    """What there is to be converted."""

    checkpoint: Checkpoint
    recipe: Recipe
    origin: Origin
    """What is known of the checkpoint that it was once; nothing, if it is that itself."""


def read_source(
    path: Path, recipe: str | None = None, *, ignore_extra_files: bool = False, first_replica: bool = False
) -> Source:
    """A checkpoint, or rank files as one; with the recipe of that name or file, else the one that it wants.

    Raises Refused.
    """
    recipes = recipes_to_try(recipe)
    if names := ranks_at(path, recipes):
        require_none(names.problems(ignore_extra_files=ignore_extra_files))
        return read_rank_files(path, names, recipe, first_replica=first_replica)
    manifest = known_manifest(path)
    if made_by := foreign_recipe(manifest, recipes):
        found, remedy = f"rank files made by the recipe {made_by}", "pass the file of that recipe with --recipe"
        raise refuse("no-recipe", str(path), found, "a packaged recipe, or that one", remedy)
    subset = manifest.get("subset", {})
    require_whole(subset, path)
    checkpoint = replace(read_checkpoint(path, ignore_extra_files=ignore_extra_files), subset=subset)
    return Source(checkpoint, recipes[0] if recipe else choose_recipe(checkpoint, recipes), Origin())


def holds_rank_files(path: Path, recipe: str | None = None) -> bool:
    """Whether a folder holds the rank files of a recipe. Raises Refused if it is not there."""
    return path.is_dir() and ranks_at(path, recipes_to_try(recipe)) is not None


class RankNames(NamedTuple):
    """Rank files as their names tell."""

    recipes: Sequence[Recipe]
    """Those whose rank files they could be."""
    wanted: Sequence[str]
    """The names that there should be, in the order of the ranks."""
    missing: Sequence[str]
    extra: Sequence[str]
    """Those of other safetensors files."""

    def problems(self, *, ignore_extra_files: bool) -> Iterator[Problem]:
        """Why they are not just the files of all ranks."""
        ranks = len(self.wanted)
        for name in self.missing:
            expected = f"{ranks} rank files, by the names of the others"
            yield Problem("missing-file", name, "no such file", expected, "copy it there")
        for name in () if ignore_extra_files else self.extra:
            remedy = "move it away, or pass --ignore-extra-files to leave it out"
            yield Problem("extra-file", name, f"a file beside those of {ranks} ranks", "none", remedy)


def read_rank_files(path: Path, names: RankNames, recipe: str | None, *, first_replica: bool) -> Source:
    """Rank files as one checkpoint, by the recipe that is asked for, or that the manifest names, or that their config
    asks for, or else by the one that fits their tensors.
    """
    stored = read_headers(path, names.wanted)
    manifest = read_manifest(path)
    subset = manifest.get("subset", {})
    require_whole(subset, path)
    require_none([*changed_files(stored, manifest), *exchanged_files(path, names)])
    origin = origin_at(path, manifest, names)
    found: list[Source] = []
    refusals: list[Refused] = []
    recipes = names.recipes if recipe else recipes_for(path, names.recipes, origin)
    for known in recipes:
        try:
            checkpoint = gather(stored, known, origin.config, origin.shapes, first_replica=first_replica)
            match(checkpoint, known)
        except Refused as refused:
            refusals.append(refused)
        else:
            found.append(Source(replace(checkpoint, subset=subset), known, origin))
    if not found:
        raise min(refusals, key=lambda refused: len(refused.problems))
    if len(found) > 1:
        fitting = listed(source.recipe.name for source in found)
        raise refuse("no-recipe", str(path), f"{fitting} all fit", "one recipe", "choose one with --recipe")
    return found[0]


def require_whole(subset: Mapping[str, Any], path: Path) -> None:
    """Chosen tensors are no source. Raises Refused."""
    if "only" in subset:
        remedy = "convert what these tensors came from"
        raise refuse("incomplete-source", str(path), subset_text(subset), "a whole model", remedy)


def recipes_for(path: Path, recipes: Sequence[Recipe], origin: Origin) -> Sequence[Recipe]:
    """The recipe that the manifest names, else those that the config asks for."""
    if not origin.recipe:
        return wanted_recipes(origin.config or {}, recipes)
    if named := [recipe for recipe in recipes if recipe.name == origin.recipe]:
        return named
    remedy = "pass the file of that recipe with --recipe"
    raise refuse("no-recipe", str(path), f"made by the recipe {origin.recipe}", "a packaged recipe", remedy)


def origin_at(folder: Path, manifest: Mapping[str, Any], names: RankNames) -> Origin:
    """What is known of the checkpoint: by the manifest, else by a config and an index beside the rank files."""
    origin, config, weight_map = read_origin(manifest), read_config(folder), read_index(folder)
    if weight_map and not {*names.wanted, *names.extra}.isdisjoint(weight_map.values()):
        weight_map = None  # an index of the rank files themselves: it tells nothing of the files that there once were
    beside = {name: value for name, value in ((CONFIG, config), (INDEX, weight_map)) if value is not None}
    texts = {name: (folder / name).read_bytes() for name in beside}
    return replace(
        origin,
        config=config if origin.config is None else origin.config,
        forms=origin.forms or forms_of_map(weight_map or {}),
        texts=texts if origin.texts is None else {**texts, **origin.texts},
    )


def forms_of_map(weight_map: Mapping[str, str]) -> tuple[Form, ...]:
    """Files of which an index tells the tensors, and nothing else."""
    names: dict[str, list[str]] = {}
    for name, file in weight_map.items():
        names.setdefault(file, []).append(name)
    return tuple(
        Form(file, b"", {name: Tensor(name, "", (), 0, 0, 0) for name in names[file]}) for file in sorted(names)
    )


def changed_files(stored: Stored, manifest: Mapping[str, Any]) -> Iterator[Problem]:
    """Rank files that are not those that the manifest speaks of, as far as header, size and two ranges of each tell."""
    entries = {entry["name"]: entry for entry in manifest.get("files", ())}
    for file in stored.files if entries else ():
        entry = entries.get(file.name)
        if entry is None:
            yield Problem("extra-file", file.name, f"a file that {MANIFEST} does not name", "none", AGAIN)
        elif entry["size"] != file.size:
            yield Problem("wrong-size", file.name, f"{file.size:,} bytes", f"{entry['size']:,} bytes", AGAIN)
        elif found := changed_range(stored.folder / file.name, parse_ranges(entry["ranges"])):
            text = f"{file.name}: bytes {found.start:,} to {found.stop:,}"
            remedy = f"is it another rank's, or of another conversion? reshard verify tells more; {AGAIN}"
            yield Problem("wrong-checksum", text, "other bytes than were written", "those of the manifest", remedy)


def exchanged_files(path: Path, names: RankNames) -> Iterator[Problem]:
    """Rank files that are another's by what they say of themselves, as those of tensor-parallel recipes do."""
    ranks = len(names.wanted)
    for rank, name in enumerate(names.wanted):
        said = read_metadata(path / name)
        if {"rank", "ranks"} <= said.keys() and (said["rank"], said["ranks"]) != (str(rank), str(ranks)):
            found = f"rank {said['rank']} of {said['ranks']}, as its header says"
            yield Problem("wrong-ranks", name, found, f"rank {rank} of {ranks}", "give each file its own name back")


def changed_range(path: Path, ranges: Sequence[CheckedRange]) -> range | None:
    """The first byte range of a file whose checksum is another: of the header, the one in the middle, and the last."""
    with path.open("rb", buffering=0) as file:
        for place in sorted({0, len(ranges) // 2, len(ranges) - 1}):
            offset, size, digest = ranges[place]
            file.seek(offset)
            if xxh3_128_hexdigest(file.read(size)) != digest:
                return range(offset, offset + size)
    return None


def ranks_at(path: Path, recipes: Sequence[Recipe]) -> RankNames | None:
    """The rank files at a path; None if something else lies there, or it holds a checkpoint with an index besides.

    Raises Refused for a single one of several.
    """
    names = file_names(path)
    for recipe in recipes:
        numbers = {name: found for name in names if (found := numbers_of(name, recipe))}
        if numbers and (len(numbers) == len(names) or not (path / INDEX).exists()):
            if not path.is_dir():
                text = f"one of {numbers[path.name][1]} rank files"
                raise refuse("rank-files", str(path), text, "the folder that holds all of them", f"name {path.parent}")
            return rank_names(names, numbers, [known for known in recipes if known.files == recipe.files])
    return None


def rank_names(names: Sequence[str], numbers: dict[str, tuple[int, int]], recipes: Sequence[Recipe]) -> RankNames:
    """How many ranks there are is told by the names of most."""
    ranks = Counter(total for _, total in numbers.values()).most_common(1)[0][0]
    if not 1 <= ranks <= MOST_RANKS:
        raise refuse("wrong-ranks", next(iter(numbers)), f"{ranks} ranks", f"1 to {MOST_RANKS}")
    wanted = [recipes[0].files.format(rank=rank, ranks=ranks) for rank in range(ranks)]
    missing = sorted(set(wanted) - set(names), key=wanted.index)
    return RankNames(recipes, wanted, missing, sorted(set(names) - set(wanted)))


def foreign_recipe(manifest: Mapping[str, Any], recipes: Sequence[Recipe]) -> str:
    """The recipe that cut rank files, by their manifest, if it is none of these.

    The names of the files tell nothing then, and they are not to be taken for whole ones.
    """
    recipe, layout = manifest.get("recipe"), manifest.get("layout")
    if not isinstance(recipe, dict) or not isinstance(layout, dict) or layout.get("to", RANKS) != RANKS:
        return ""
    name = str(recipe.get("name"))
    return "" if name in {known.name for known in recipes} else name


def numbers_of(name: str, recipe: Recipe) -> tuple[int, int] | None:
    """The rank and the number of ranks in the name of a rank file, if it is one, as the recipe spells it."""
    pattern = re.escape(recipe.files)
    for key in ("rank", "ranks"):
        pattern = pattern.replace(rf"\{{{key}\}}", rf"(?P<{key}>0|[1-9][0-9]{{0,8}})")
    found = re.fullmatch(pattern, name)
    return (int(found["rank"]), int(found["ranks"])) if found else None
