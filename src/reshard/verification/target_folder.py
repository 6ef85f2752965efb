"""Lists and reads the tensor files of a target folder."""

import re
from collections import Counter
from collections.abc import Collection, Iterable, Iterator, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any, NamedTuple

from reshard.errors import Problem, Refused, refuse
from reshard.formats.huggingface import (
    SINGLE,
    is_safetensors_name,
    read_described_header,
    read_stated_ranks,
)
from reshard.formats.manifest import read_valid_manifest
from reshard.formats.part_manifests import is_of_slices, require_target_of_shares
from reshard.formats.remote_names import restore_address, suggest_download, suggest_near
from reshard.formats.share_names import find_share_of_folder
from reshard.formats.slice_names import is_sliced_folder, name_slices, parse_shard_numbers
from reshard.formats.target_names import require_finished
from reshard.paths import AnyPath, RemotePath
from reshard.recipe_types import Recipe
from reshard.recipes.recipe import has_ranks
from reshard.storage.opened import measure_path
from reshard.storage.remote_store import fetch_heads
from reshard.text import format_runs
from reshard.types import MOST_RANKS, File, Tensor

CONVERT_AGAIN_HINT = "convert again, into another folder"

PADDING = "zeros, behind the last row of"
"""How the expected of a problem begins where only padding differs, which no reading of rank files looks at."""

REPAIR_HINT = "reshard repair writes it again"

COPY_AGAIN_HINT = f"{REPAIR_HINT}; or copy the file here again"

MISSING_FILE_HINT = "copy it there, or convert again"

LOST_FILE_HINT = f"copy it there, or {REPAIR_HINT}"

PUT_AGAIN_HINT = "put the sound file there in its place; or convert again, with --restart --yes"
"""The hint for a file in a store, where nothing is repaired."""

PUT_LOST_HINT = "run the same convert again, which writes what is missing and nothing else; or put the file there"
"""The hint for a file that is not in a store any more."""

HINTS_OF_STORES = {
    COPY_AGAIN_HINT: PUT_AGAIN_HINT,
    LOST_FILE_HINT: PUT_LOST_HINT,
    REPAIR_HINT: PUT_AGAIN_HINT,
}
"""In the order in which they are looked for: the last one stands in the others."""


class TargetFolder(NamedTuple):
    """The tensor files that a target folder should have."""

    names: Mapping[int, str]
    """By rank; with whole files, by a running number."""
    ranks: int
    """How many; 1 with whole files."""
    is_whole: bool
    """Whether the files hold whole tensors under the names of the source, instead of one rank each."""
    extra: Sequence[str]
    """Names of tensor files that do not belong to the set of rank files."""
    is_joint: bool = False
    """Whether all files together are the right side of a recipe, which has no ranks."""
    is_sliced: bool = False
    """Whether each file has slices of whole tensors: all of them together are whole files, or the right side."""
    is_share: bool = False
    """Whether these whole files are those of a share: other processes make the others."""

    def find_rank(self, number: int) -> int:
        """The rank that a file holds, by its number."""
        return 0 if self.is_whole or self.is_joint else number


class TargetHeader(NamedTuple):
    """A file of the target and the tensors in its header."""

    number: int
    """Its rank; with whole files, a running number."""
    file: File
    tensors: Sequence[Tensor]
    said: Mapping[str, Any]
    """The metadata of the header: of some recipes rank and number of ranks."""


def require_target_folder(target: AnyPath) -> None:
    """Raises Refused if `target` is no folder, or if its conversion has not finished."""
    if not target.is_dir():
        found = "a file" if target.exists() else "no such folder"
        remedy = suggest_near(target) or (isinstance(target, Path) and suggest_download(target)) or "is the path right?"
        raise refuse("empty-target", restore_address(target), found, "a folder that was converted into", remedy)
    require_finished(target)
    require_target_of_shares(target)


def reword_for_store(target: AnyPath, problems: Iterable[Problem]) -> Iterator[Problem]:
    """The problems of a target; if it lies in a store, without the hint to repair it."""
    for problem in problems:
        remedy = problem.remedy
        for hint, other in HINTS_OF_STORES.items() if isinstance(target, RemotePath) else ():
            remedy = remedy.replace(hint, other)
        yield replace(problem, remedy=remedy)


def list_target_files(target: AnyPath, recipe: Recipe) -> TargetFolder:
    """Lists the tensor files that a folder should have. The number of ranks is the one that most file names say, or
    most headers, where names do not; if no file is named like a rank file, all are whole files. Raises Refused if there
    are no tensor files.
    """
    pattern = re.escape(recipe.files).replace(r"\{rank\}", r"(\d+)").replace(r"\{ranks\}", r"(\d+)")
    require_target_folder(target)
    entries = sorted(path.name for path in target.iterdir() if path.is_file())
    tensor_files = [name for name in entries if is_safetensors_name(name)]
    manifest = read_valid_manifest(target)
    if is_sliced_folder(tensor_files) or is_of_slices(manifest):
        return list_sliced_files(manifest, recipe, tensor_files)
    fitting = [found for name in entries if (found := re.fullmatch(pattern, name))]
    is_share = find_share_of_folder(target) is not None and bool(manifest)
    if not has_ranks(recipe) and tensor_files:
        names = [SINGLE] if SINGLE in tensor_files else tensor_files  # the one that loaders find without an index
        extra = [name for name in tensor_files if name not in names]
        return TargetFolder(dict(enumerate(names)), 1, is_whole=False, extra=extra, is_joint=True, is_share=is_share)
    if not fitting and tensor_files:
        return TargetFolder(dict(enumerate(tensor_files)), 1, is_whole=True, extra=(), is_share=is_share)
    if not fitting:
        lacking = f"no file such as {recipe.files.format(rank='0', ranks='N')}"
        raise refuse("empty-target", str(target), lacking, "a folder of rank files", "is it the right folder?")
    if "{ranks}" in recipe.files:
        ranks = Counter(max(map(int, found.groups())) for found in fitting).most_common(1)[0][0]
    else:
        said = Counter(filter(None, (read_stated_ranks(target / found[0]) for found in fitting)))
        ranks = said.most_common(1)[0][0] if said else 1 + max(int(found[1]) for found in fitting)
    if ranks > MOST_RANKS:
        raise refuse("wrong-ranks", fitting[0][0], f"{ranks} ranks", f"at most {MOST_RANKS}")
    by_rank = {rank: recipe.files.format(rank=rank, ranks=ranks) for rank in range(ranks)}
    known = set(by_rank.values())
    return TargetFolder(by_rank, ranks, is_whole=False, extra=[name for name in tensor_files if name not in known])


def list_sliced_files(manifest: Mapping[str, Any], recipe: Recipe, names: Sequence[str]) -> TargetFolder:
    """Lists the files of slices that a folder should have: as many as its manifest tells, else as the names count."""
    told = manifest["ranks"] if is_of_slices(manifest) else max(shard for shard, _, _ in parse_shard_numbers(names))
    ranks = min(max(told, 1), MOST_RANKS)
    known = name_slices(ranks)
    extra = [name for name in names if name not in known]
    is_whole = has_ranks(recipe)
    return TargetFolder(dict(enumerate(known)), ranks, is_whole, extra, is_joint=not is_whole, is_sliced=True)


def measure_target_files(target: AnyPath, recipe: Recipe, ranks: Collection[int] | None) -> int:
    """The bytes of the tensor files that a verification reads: all that there are, or those of some ranks. Raises
    Refused as `list_target_files`.
    """
    names = choose_files(list_target_files(target, recipe), ranks).values()
    return sum(measure_path(target / name) for name in names if (target / name).is_file())


def choose_files(folder: TargetFolder, ranks: Collection[int] | None) -> Mapping[int, str]:
    """Chooses the files of some ranks by their number, or all. Raises Refused for ranks that there are not, and for any
    where the files are whole.
    """
    if ranks is None:
        return folder.names
    if folder.is_sliced:
        remedy = "leave --source out: the checksums of the manifest prove the files of some ranks"
        raise refuse("wrong-option", "--ranks", "some slices, with --source", "all: only so are tensors whole", remedy)
    if folder.is_whole or folder.is_joint:
        raise refuse_ranks_of_whole_files()
    if unknown := sorted(set(ranks) - set(range(folder.ranks))):
        raise refuse("unknown-rank", "--ranks", f"rank {unknown[0]}", f"ranks from 0 to {folder.ranks - 1}")
    return {number: name for number, name in folder.names.items() if number in ranks}


def refuse_ranks_of_whole_files() -> Refused:
    """Makes the refusal of `--ranks` for a target that has none."""
    found, remedy = "a target of whole files", "leave it out: all files are verified"
    return refuse("wrong-option", "--ranks", found, "a target of rank files", remedy)


def read_target_headers(target: AnyPath, names: Mapping[int, str]) -> tuple[list[TargetHeader], list[Problem]]:
    """Reads the headers of the files; the problems are of files that are missing or cannot be read."""
    files: list[TargetHeader] = []
    problems: list[Problem] = []
    fetch_heads(target, names.values())
    here = ",".join(format_runs(number for number, name in names.items() if (target / name).exists()))
    remedy = f"for the ranks that are here: --ranks {here}; else {MISSING_FILE_HINT}" if here else MISSING_FILE_HINT
    for number, name in names.items():
        if not (target / name).exists():  # never of whole files: those are what lies there
            found = "a link to nothing" if (target / name).is_symlink() else "no such file"
            problems.append(Problem("missing-file", name, found, f"one of {len(names)} files", remedy))
            continue
        try:
            files.append(TargetHeader(number, *read_described_header(target / name, number)))
        except Refused as refused:
            problems.extend(refused.problems)
    return files, problems
