"""The manifests of a folder: `reshard.json`, and those of parts that were made apart; joins them into one.

A run for some ranks (`--ranks`) writes its manifest twice: as `reshard.json`, and under a name of its own such as
`reshard.ranks-4-7.json`. So both manifests survive when the folders of two such runs are copied into one.
"""

import re
import shlex
from collections.abc import Collection, Iterable, Iterator, Mapping
from contextlib import suppress
from dataclasses import dataclass, replace
from typing import Any

from xxhash import xxh3_64_hexdigest

from reshard.errors import Problem, Refused, refuse
from reshard.formats.command_words import list_layout_words, list_named_recipe_words, list_subset_words
from reshard.formats.huggingface import SINGLE
from reshard.formats.manifest import list_rank_files, read_manifest, read_valid_manifest
from reshard.formats.share_names import find_share_of_folder, is_share_manifest, list_share_folders
from reshard.formats.target_names import MANIFEST, PARTIAL, STORE_RECORD, list_names
from reshard.paths import AnyPath, RemotePath
from reshard.text import format_count, format_list, format_numbers, format_runs
from reshard.types import SLICED, WHOLE, Note, Share

JOB_KEYS = ("reshard", "recipe", "layout", "source", "subset", "source_samples")
"""Manifest keys that are equal in two manifests of the same conversion, perhaps for other ranks."""

PART_NAME = re.compile(r"reshard\.ranks-[0-9a-f+-]+\.json")

MANIFEST_COPY = re.compile(r"reshard.*\.json.*", re.DOTALL)
"""Names that a manifest may have been given by hand, or by a copy that keeps what it replaces: `reshard.json~`."""

JOINING = "when all are finished, the command that made them joins them, without --share"

IF_GIVEN = ", and --config or --recipe FILE if they had it"
"""Behind the command, for no manifest has these paths."""

LONGEST_RANKS = 100
"""In characters: a file name has at most 255."""


@dataclass(frozen=True, slots=True)
class Manifests:
    """The manifests that lie in a folder."""

    main: Mapping[str, Any]
    """`reshard.json`; empty if there is none."""
    parts: Mapping[str, Mapping[str, Any]]
    """All others, by file name: each is as reshard has written it, perhaps for another conversion."""
    damaged: tuple[str, ...]
    """Names of part manifests that are not as reshard has written them."""

    @property
    def shares(self) -> list[str]:
        """The folders of the shares whose manifests are among them, by name."""
        return [name.rpartition("/")[0] for name in self.parts if is_share_manifest(name)]

    @property
    def named(self) -> Mapping[str, Mapping[str, Any]]:
        """All of them by file name, `reshard.json` first."""
        return {**({MANIFEST: self.main} if self.main else {}), **self.parts}


def name_part_manifest(ranks: Iterable[int]) -> str:
    """Names the manifest of some ranks: `reshard.ranks-0-3+7.json`. Of very many ranges the name has a checksum."""
    numbers = sorted(ranks)
    text = "+".join(format_runs(numbers))
    if len(text) > LONGEST_RANKS:
        text = f"{numbers[0]}-{numbers[-1]}-{xxh3_64_hexdigest(text.encode())}"
    return f"reshard.ranks-{text}.json"


def is_part_name(name: str) -> bool:
    """Whether a file has the name of a part's manifest, also while it is written."""
    return PART_NAME.fullmatch(name.removesuffix(PARTIAL)) is not None


def read_manifests(folder: AnyPath) -> Manifests:
    """Reads all manifests of a folder. Raises Refused if `reshard.json` is damaged."""
    main, parts, damaged = read_manifest(folder), {}, []
    for name in list_names(folder):
        if name in (MANIFEST, STORE_RECORD) or name.endswith(PARTIAL) or not MANIFEST_COPY.fullmatch(name):
            continue
        try:
            if found := read_manifest(folder, name):  # empty: a link to nothing
                parts[name] = found
        except Refused:
            damaged += [name] if is_part_name(name) else []
    return Manifests(main, parts, tuple(damaged))


def read_manifests_with_shares(folder: AnyPath) -> Manifests:
    """Reads all manifests of a folder, and those of the shares in it that are finished; one that is damaged is as good
    as none. Raises Refused if `reshard.json` is damaged.
    """
    found, shares = read_manifests(folder), {}
    for name in list_share_folders(folder):
        with suppress(Refused):
            if one := read_manifest(folder / name):
                shares[f"{name}/{MANIFEST}"] = one
    return replace(found, parts={**found.parts, **shares})


def find_file(folder: AnyPath, name: str, shares: Iterable[str]) -> AnyPath:
    """The path of a file of a target: in its folder, or where it is not there in that of one of its shares."""
    paths = (folder / name, *(folder / share / name for share in shares))
    return next((path for path in paths if path.is_file()), folder / name)


def is_same_conversion(one: Mapping[str, Any], other: Mapping[str, Any]) -> bool:
    """Whether two manifests are of the same conversion, perhaps for other ranks."""
    return all(one.get(key) == other.get(key) for key in JOB_KEYS)


def join_manifests(manifests: Iterable[Mapping[str, Any]]) -> dict[str, Any]:
    """Joins manifests of the same conversion: the files of all, in the order of their ranks. Empty if there are none.

    Side files that differ stand there twice, so that whoever compares them finds the difference.
    """
    known = list(manifests)
    if not known:
        return {}
    files: dict[str, Any] = {}
    for entry in (entry for manifest in known for entry in manifest["files"]):
        files.setdefault(entry["name"], entry)
    sides = [entry for manifest in known for entry in manifest["side_files"]]
    unique = [entry for place, entry in enumerate(sides) if entry not in sides[:place]]
    return {**known[0], "files": sorted(files.values(), key=lambda entry: entry["rank"]), "side_files": unique}


def check_agreement(folder: AnyPath, manifests: Mapping[str, Mapping[str, Any]]) -> Iterator[Problem]:
    """Reports rank files of which two manifests of one conversion, by file name, tell other bytes: one of them was made
    from a source that had changed where no sample is taken, or is wrong.
    """
    first: dict[str, tuple[str, Any]] = {}
    for name, manifest in manifests.items():
        for entry in manifest["files"]:
            other, known = first.setdefault(entry["name"], (name, entry))
            if known != entry:
                remedy = (
                    "verify each part in the folder that it was made in, with --source; then move the wrong part's "
                    "manifest and rank files out of this folder"
                )
                found = f"other bytes by {name} than by {other}"
                yield Problem("contradiction", str(folder / entry["name"]), found, "the same", remedy)


def choose_of_one_conversion(manifests: Manifests) -> dict[str, Mapping[str, Any]]:
    """Chooses the manifests of one conversion, by file name: that of `reshard.json`, else that of the first part."""
    named = manifests.named
    return {name: one for name, one in named.items() if is_same_conversion(one, next(iter(named.values())))}


def read_joined_manifest(folder: AnyPath) -> dict[str, Any]:
    """The manifest of a folder, joined with those of the other parts of the same conversion; empty if there is none.
    Raises Refused if `reshard.json` is damaged.
    """
    return join_manifests(choose_of_one_conversion(read_manifests(folder)).values())


def check_joined(folder: AnyPath, chosen: Mapping[str, Mapping[str, Any]], source: str = "SOURCE") -> Iterator[Problem]:
    """Reports parts of one conversion, by the names of their manifests, that were brought together but not joined:
    `reshard.json` does not name all. `source` stands in the command that joins them.
    """
    named = list_rank_files(chosen.get(MANIFEST, {}))
    others = {name: list_rank_files(one) - named for name, one in chosen.items()}
    if not any(others.values()):
        return
    joined = join_manifests(chosen.values())
    counts = [f"{name} names {format_count(len(files), 'others')}" for name, files in others.items() if files]
    found = f"names {len(named)} of {joined['ranks']} rank files; {format_list(counts)}"
    remedy = describe_join_command(folder, joined, source)
    yield Problem("not-joined", MANIFEST, found, "one manifest of all", remedy)


def note_not_joined(folder: AnyPath, source: str = "SOURCE") -> Iterator[Note]:
    """Notes parts that are not joined, or contradict each other. A damaged `reshard.json` says nothing."""
    try:
        chosen = choose_of_one_conversion(read_manifests(folder))
    except Refused:
        return
    for problem in (*check_agreement(folder, chosen), *check_joined(folder, chosen, source)):
        yield Note(problem.kind, f"the parts are not joined yet: {problem.subject} {problem.found}; {problem.remedy}")


def describe_join_command(folder: AnyPath, manifest: Mapping[str, Any], source: str) -> str:
    """Describes the command that joins the parts of a target, and writes the rank files that lack, as far as their
    manifest knows it.
    """
    command = format_join_command(folder, manifest, source)
    return f"to join them, run the command that made them without --ranks: {command}"


def format_join_command(folder: AnyPath | str, manifest: Mapping[str, Any], source: str = "SOURCE") -> str:
    """Formats the same command."""
    layout, recipe = manifest.get("layout"), manifest.get("recipe")
    words = *list_layout_words(layout), *list_named_recipe_words(recipe), *list_subset_words(manifest.get("subset", {}))
    return shlex.join(["reshard", "convert", source, str(folder), *words])


def find_unjoined_shares(folder: AnyPath) -> dict[str, Share]:
    """Finds the shares that are not joined, by the names of their folders: where `reshard.json` names some ranks only,
    those that are not finished, and those with other ranks. What a crash has left of a join is none of them.
    """
    shares = list_share_folders(folder) if folder.is_dir() else {}
    if not shares or not (folder / MANIFEST).exists():
        return shares
    manifest = read_valid_manifest(folder)  # that of a damaged one is told by whoever needs it
    named = list_rank_files(manifest)
    if not manifest or is_of_whole_files(manifest) or len(named) == manifest["ranks"]:
        return {}
    own = {name: list_rank_files(read_valid_manifest(folder / name)) for name in shares}
    return {name: share for name, share in shares.items() if not own[name] or own[name] - named}


def require_shares_joined(folder: AnyPath, ranks: Collection[int] | None = None) -> None:
    """Raises Refused if a folder holds shares that are not joined to a target; not if all of the `ranks` are finished
    beside them.
    """
    require_target_of_shares(folder)
    if not (shares := find_unjoined_shares(folder)):
        return
    there = {entry["rank"] for entry in read_valid_manifest(folder).get("files", ())}
    if ranks is None or not there >= {*ranks}:
        chosen = ",".join(format_runs(there))
        remedy = f"{describe_joining(folder, shares)}; verify and repair take what is joined: --ranks {chosen}"
        found = f"{describe_unjoined(folder, shares)}, beside {describe_share_files(read_valid_manifest(folder))}"
        raise refuse("not-joined", str(folder), found, "one target", remedy)


def require_target_of_shares(folder: AnyPath) -> None:
    """Raises Refused if a folder holds shares and nothing that is joined; and for a share in a store, whose tensors are
    not in its folder.
    """
    if folder.is_dir() and not (folder / MANIFEST).exists() and (shares := list_share_folders(folder)):
        remedy = describe_joining(folder, shares)
        raise refuse("not-joined", str(folder), describe_unjoined(folder, shares), "one target", remedy)
    if isinstance(folder, RemotePath) and find_share_of_folder(folder) and (manifest := read_valid_manifest(folder)):
        target = str(folder).rpartition("/")[0]
        remedy = f"{JOINING}: {format_join_command(target, manifest)}{IF_GIVEN}"
        raise refuse("not-joined", str(folder), f"a share, whose tensors lie in {target}", "a target", remedy)


def describe_unjoined(folder: AnyPath, shares: Mapping[str, Share]) -> str:
    """Describes how many of the shares in a folder are finished."""
    finished = [name for name in shares if (folder / name / MANIFEST).is_file()]
    return f"shares of it that are not joined, {len(finished)} of {next(iter(shares.values())).shares} finished"


def describe_joining(folder: AnyPath, shares: Iterable[str]) -> str:
    """Describes how shares are joined, by the names of their folders: the command, as far as a finished one knows it,
    and the one that verifies a share. In a store the tensors of a share are not in its folder.
    """
    text = JOINING
    found = {name: manifest for name in shares if (manifest := read_valid_manifest(folder / name))}
    for name, manifest in [*found.items()][:1]:
        text += f": {format_join_command(folder, manifest)}{IF_GIVEN}"
        if not isinstance(folder, RemotePath):
            text += f"; a share alone: {shlex.join(['reshard', 'verify', str(folder / name)])}"
    return text


def is_of_whole_files(manifest: Mapping[str, Any]) -> bool:
    """Whether a manifest is of whole files, not of rank files: of `--to hf`; or of a recipe without ranks, by the name
    of its one file.
    """
    layout, files = manifest.get("layout"), manifest.get("files")
    names = [entry.get("name") for entry in files if isinstance(entry, dict)] if isinstance(files, list) else []
    return names == [SINGLE] or (isinstance(layout, dict) and layout.get("to") == WHOLE)


def is_of_slices(manifest: Mapping[str, Any]) -> bool:
    """Whether a manifest is of slices, of `--to dcp`."""
    layout = manifest.get("layout")
    return isinstance(layout, dict) and layout.get("to") == SLICED


def find_recipe_name(manifest: Mapping[str, Any]) -> str:
    """Finds the recipe that a target was made with; empty if its manifest does not name one."""
    made_with = manifest.get("recipe")
    return str(made_with.get("name", "")) if isinstance(made_with, dict) else ""


def describe_share_files(manifest: Mapping[str, Any]) -> str:
    """Describes the files of a finished share: its ranks, or the number of whole files."""
    files = manifest["files"]
    if is_of_whole_files(manifest):
        return format_count(len(files), "files")
    ranks = format_numbers(entry["rank"] for entry in files)
    return f"{'ranks' if len(files) > 1 else 'rank'} {ranks} of {manifest['ranks']}"


def find_ranks_of_share(folder: AnyPath) -> tuple[int, ...] | None:
    """Finds the ranks that a share has, by the name of its folder and its manifest; None of whole files, and of any
    other folder.
    """
    manifest = read_valid_manifest(folder) if find_share_of_folder(folder) else {}
    if not manifest or is_of_whole_files(manifest):
        return None
    return tuple(sorted(entry["rank"] for entry in manifest["files"]))
