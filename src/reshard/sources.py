"""Sources: a path -> Checkpoint, Recipe and Origin, whichever layout lies there.

Reads headers, the manifest and, of each rank file, two of the ranges whose checksums the manifest has.
"""

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from xxhash import xxh3_128_hexdigest

from reshard.books import MANIFEST
from reshard.choose import choose_recipe, wanted_recipes
from reshard.errors import Problem, Refused, listed, refuse, require_none
from reshard.gather import gather
from reshard.layout import Form
from reshard.manifest import read_manifest
from reshard.match import match
from reshard.origin import Origin, read_origin
from reshard.ranks import RankNames, foreign_recipe, ranks_at
from reshard.read import CONFIG, INDEX, Stored, read_checkpoint, read_config, read_headers, read_index, read_metadata
from reshard.recipe import recipes_to_try
from reshard.subset_text import subset_text
from reshard.types import Checkpoint, Recipe, Tensor

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


def subset_of(path: Path) -> Mapping[str, Any]:
    """What of a larger checkpoint a folder holds, by its manifest; empty if it is whole, or has no manifest of ours."""
    subset: Mapping[str, Any] = known_manifest(path).get("subset", {})
    return subset


def known_manifest(path: Path) -> Mapping[str, Any]:
    """The manifest of a folder; empty without one, and of a damaged one, which says nothing."""
    try:
        return read_manifest(path) if path.is_dir() else {}
    except Refused:
        return {}


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
        elif found := changed_range(stored.folder / file.name, entry["ranges"].split()):
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


def changed_range(path: Path, words: Sequence[str]) -> range | None:
    """The first range of a file whose checksum is another: of the header, the one in the middle, and the last."""
    sizes = list(map(int, words[::2]))
    with path.open("rb", buffering=0) as file:
        for place in sorted({0, len(sizes) // 2, len(sizes) - 1}):
            begin = sum(sizes[:place])
            file.seek(begin)
            if xxh3_128_hexdigest(file.read(sizes[place])) != words[2 * place + 1]:
                return range(begin, begin + sizes[place])
    return None
