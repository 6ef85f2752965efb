"""Finds rank and stacked files that are not as their manifest says: changed, exchanged, or of another conversion."""

from collections import Counter
from collections.abc import Iterator, Mapping
from dataclasses import replace
from typing import Any

from xxhash import xxh3_128_hexdigest

from reshard.errors import Problem
from reshard.formats.huggingface import FolderHeaders
from reshard.formats.part_manifests import is_of_slices
from reshard.formats.ranges import CheckedRange, pick_ranges
from reshard.formats.target_names import MANIFEST
from reshard.paths import AnyPath
from reshard.storage.opened import open_regular_file

AGAIN = "convert it again; or move reshard.json elsewhere, to take the files as they are"

COPY_SLICES = "copy the file of the same conversion there; or reshard repair writes it again"
"""Nothing but the manifest tells slices of two models of one shape apart: it stays."""

EXTRA_SLICES = "move it elsewhere; or, if it is of another part, copy the manifest of that part here too"

OF_OTHER_SAVE = "; if another program has saved all of these files since, move reshard.json elsewhere"


def check_changed_files(stored: FolderHeaders, manifest: Mapping[str, Any]) -> Iterator[Problem]:
    """Reports rank files and slices that differ from the manifest: in name, in size, or in one of three byte ranges of
    each.
    """
    if not is_of_slices(manifest):
        yield from compare_with_manifest(stored, manifest, AGAIN, AGAIN)
        return
    problems = list(compare_with_manifest(stored, manifest, COPY_SLICES, EXTRA_SLICES))
    if len(problems) < len(stored.files):
        yield from problems
        return
    for problem in problems:
        yield replace(problem, remedy=problem.remedy + OF_OTHER_SAVE)


def compare_with_manifest(
    stored: FolderHeaders, manifest: Mapping[str, Any], remedy: str, extra: str
) -> Iterator[Problem]:
    """Reports the same, each with this remedy; `extra` is that of a file that should not be there."""
    entries = {entry["name"]: entry for entry in manifest.get("files", ())}
    for file in stored.files if entries else ():
        entry = entries.get(file.name)
        if entry is None:
            yield Problem("extra-file", file.name, f"a file that {MANIFEST} does not name", "none", extra)
        elif entry["size"] != file.size:
            yield Problem("wrong-size", file.name, f"{file.size:,} bytes", f"{entry['size']:,} bytes", remedy)
        elif found := find_changed_range(stored.folder / file.name, entry["ranges"]):
            text = f"{file.name}: bytes {found.offset:,} to {found.stop:,}"
            asked = f"is it another rank's, or of another conversion? reshard verify tells more; {remedy}"
            yield Problem("wrong-checksum", text, "other bytes than were written", "those of the manifest", asked)


def check_exchanged_files(stored: FolderHeaders) -> Iterator[Problem]:
    """Reports rank files whose metadata names another rank, or another recipe than most. Files of recipes that
    describe them have such metadata.
    """
    ranks, recipes = len(stored.files), Counter(said["recipe"] for said in stored.metadata if "recipe" in said)
    for file, said in zip(stored.files, stored.metadata, strict=True):
        usual = recipes.most_common(1)[0][0] if len(recipes) > 1 else said.get("recipe")
        if said.get("recipe", usual) != usual:
            found, expected = f"made by the recipe {said['recipe']}, as its header says", f"{usual}, like most others"
            yield Problem("wrong-ranks", file.name, found, expected, "copy the file of the same conversion there")
    for rank, (file, said) in enumerate(zip(stored.files, stored.metadata, strict=True)):
        if {"rank", "ranks"} <= said.keys() and (said["rank"], said["ranks"]) != (str(rank), str(ranks)):
            found = f"rank {said['rank']} of {said['ranks']}, as its header says"
            yield Problem(
                "wrong-ranks", file.name, found, f"rank {rank} of {ranks}", "give each file its own name back"
            )


def find_changed_range(path: AnyPath, ranges: str) -> CheckedRange | None:
    """Finds the first byte range with another checksum, of three: the header, the middle one and the last. None if all
    are equal.
    """
    with open_regular_file(path) as file:
        for checked in pick_ranges(ranges):
            file.seek(checked.offset)
            if xxh3_128_hexdigest(file.read(checked.size)) != checked.digest:
                return checked
    return None
