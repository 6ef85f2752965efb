"""An unfinished conversion, by its journal: how much of it is done, and the command that goes on; and shares of one."""

import os
import shlex
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from operator import eq
from typing import Any

import msgspec

from reshard.errors import refuse
from reshard.execution.journal import RECORD, find_holder, read_batches
from reshard.execution.store_journal import ID, parse_job, parse_note
from reshard.formats.command_words import list_layout_words, list_subset_words
from reshard.formats.manifest import list_rank_files, read_valid_manifest
from reshard.formats.part_manifests import describe_joining, describe_share_files, find_unjoined_shares
from reshard.formats.share_names import find_share_of_folder, name_share_folder
from reshard.formats.target_names import JOURNAL, MANIFEST, PARTIAL, PROGRESS
from reshard.paths import AnyPath, RemotePath
from reshard.recipe_types import Recipe
from reshard.recipes.recipe import list_packaged_recipes
from reshard.sources.engine_choice import list_recipe_words
from reshard.sources.rank_names import parse_rank_name
from reshard.storage.opened import map_paths, measure_open_file, open_regular_file
from reshard.text import escape, format_count, format_list, format_percent, format_runs, format_size
from reshard.types import Note, Share

LARGEST_JOURNAL = 1 << 30
"""In bytes. A model of 671B parameters has one of some megabytes."""


class JournalEntry(msgspec.Struct):
    """What is read of the first line of a journal."""

    recipe: str
    recipe_sha256: str
    layout: dict[str, Any]
    sizes: list[int]
    files: list[str]
    source: list[tuple[str, int, str, int | str]]
    allow_inexact: bool = False
    held_by: str = ""
    subset: dict[str, Any] = {}


@dataclass(frozen=True, slots=True, repr=False)
class Unfinished:
    """An unfinished conversion, by its journal."""

    path: str
    recipe: str
    ranks: str
    """The ranks that it is for, such as `4-7`; empty if it is for all, or for whole files."""
    size: int
    """Of all tensor files, in bytes."""
    durable: int
    """So many of these bytes are on the disk, or in the store; the same command does not write them again."""
    files: int
    whole_files: int
    """So many of the files have all their bytes there."""
    source_files: int
    source_size: int
    """In bytes."""
    source_names: str
    """The names of some source files: the journal has no path."""
    command: str
    """The command that goes on, with SOURCE for the path of the source, as far as the journal knows its options."""
    holder: str
    """The process that is at work there, if that is known."""
    begun_by: str = ""
    """In a store: the process that began. Whether any is still at work the store does not tell."""

    def __str__(self) -> str:
        return "\n".join(map(escape, describe_unfinished(self)))

    __repr__ = __str__


def describe_unfinished(found: Unfinished) -> Iterator[str]:
    """Describes an unfinished conversion for a person."""
    share = format_percent(found.durable, found.size)
    size = f"{format_size(found.durable)} of {format_size(found.size)} ({share})"
    ranks = f" of ranks {found.ranks}" if found.ranks else ""
    yield f"{found.path}: an unfinished conversion{ranks} by the recipe {found.recipe}"
    where = "in the store" if found.begun_by else "on the disk"
    yield f"{where}: {size}, {describe_whole(found)}"
    files = format_count(found.source_files, "files")
    yield f"made from: {files} ({found.source_names}), {format_size(found.source_size)}"
    if found.holder:
        yield f"at work: {found.holder}"
    else:
        if found.begun_by:
            yield f"begun by: {found.begun_by}; whether it is still at work, a store does not tell"
        yield "to go on: run the same convert command again. As far as the journal knows it, which has no paths:"
        yield f"  {found.command}"


def describe_whole(found: Unfinished) -> str:
    """Describes how many files have all their bytes. In a store these may be parts, of objects that appear later."""
    sent = "sent " if found.begun_by else ""
    return f"{found.whole_files:,} of {format_count(found.files, 'files')} {sent}whole"


def read_unfinished(path: AnyPath) -> Unfinished | None:
    """Reads how far the unfinished conversion in a folder is; None if there is none, or its journal has not begun.

    A journal whose files `reshard.json` names all is left over: that run has crashed after its last step. Raises
    Refused if the journal is damaged.
    """
    journal = path / JOURNAL
    if not journal.is_file():
        return None
    try:
        with open_regular_file(journal) as file:
            content = file.read(LARGEST_JOURNAL) if measure_open_file(file)[0] <= LARGEST_JOURNAL else b""
            inode = 0 if isinstance(path, RemotePath) else os.fstat(file.fileno()).st_ino
    except OSError as error:
        raise refuse("cannot-read", str(journal), error.strerror or str(error), "to read it") from None
    try:
        entry = msgspec.json.decode(content[: content.find(b"\n") + 1], type=JournalEntry)
    except ValueError:  # msgspec's own errors are ValueErrors
        return None
    if set(entry.files) <= list_rank_files(read_valid_manifest(path)):
        return None
    durable, whole = measure_progress(path, entry, content)
    packaged = list_packaged_recipes()
    recipes = [recipe for recipe in packaged if recipe.name == entry.recipe]
    ranks = find_chosen_ranks(entry.files, recipes, entry.layout.get("ranks"))
    return Unfinished(
        str(path),
        entry.recipe,
        ranks,
        sum(entry.sizes),
        durable,
        len(entry.files),
        whole,
        len(entry.source),
        sum(size for _, size, _, _ in entry.source),
        format_list([name for name, _, _, _ in entry.source], 2),
        shlex.join(make_words(entry, path, ranks, packaged)),
        "" if isinstance(journal, RemotePath) else find_holder(journal, inode),
        entry.held_by if isinstance(journal, RemotePath) else "",
    )


def measure_progress(path: AnyPath, entry: JournalEntry, content: bytes) -> tuple[int, int]:
    """The bytes that a journal knows to be durable, and the number of files that are whole. Raises Refused."""
    if isinstance(path, RemotePath):
        done = measure_noted_files(path, content, len(entry.files))
        return sum(done), sum(map(eq, done, entry.sizes))
    records = read_batches(content, content.find(b"\n") + 1, path / JOURNAL)[0]
    recorded = measure_recorded_files(records, len(entry.files))
    return sum(recorded), count_whole_files(path, entry, recorded)


def measure_recorded_files(records: bytes | bytearray, files: int) -> list[int]:
    """The sizes that a journal has recorded of so many files, in bytes, without their headers."""
    recorded = [0] * files
    for _, number, size, _ in RECORD.iter_unpack(records):
        if number < files:
            recorded[number] += size
    return recorded


def measure_noted_files(folder: RemotePath, content: bytes, files: int) -> list[int]:
    """The sizes that the notes of a job in a store tell of so many files, in bytes: of each that of its largest upload.
    `content` is that of the job's object. Raises Refused.
    """
    job, paths = parse_job(content).get(ID), [*(folder / PROGRESS).iterdir()] if (folder / PROGRESS).is_dir() else []
    contents = map_paths(lambda path: path.read_bytes(), folder, paths)
    done: Counter[tuple[int, str]] = Counter()
    for part in {part for note in (parse_note(one, job) for one in contents) if note for part in note.parts}:
        done[part.file, part.upload] += part.size
    return [max((size for (number, _), size in done.items() if number == index), default=0) for index in range(files)]


def count_whole_files(path: AnyPath, entry: JournalEntry, recorded: Sequence[int]) -> int:
    """Counts the files whose bytes behind the header are all recorded."""
    count = 0
    for name, size, done in zip(entry.files, entry.sizes, recorded, strict=False):
        for there in (path / (name + PARTIAL), path / name):
            try:
                with open_regular_file(there) as file:
                    count += int.from_bytes(file.read(8), "little") + 8 + done == size
                break
            except (OSError, ValueError):
                continue
    return count


def make_words(entry: JournalEntry, path: AnyPath, ranks: str, packaged: Sequence[Recipe]) -> list[str]:
    """The words of the command that began a conversion, as far as its journal knows them."""
    share = find_share_of_folder(path)
    target, ranks = (str(path.absolute()).rpartition("/")[0], "") if share else (str(path), ranks)
    words = ["reshard", "convert", "SOURCE", target, *list_layout_words(entry.layout)]
    words += ["--share", str(share)] if share else []
    is_packaged = any(recipe.text_hash == entry.recipe_sha256 for recipe in packaged)
    words += list_recipe_words(entry.recipe) if is_packaged else ["--recipe", "FILE"]
    words += ["--ranks", ranks] if ranks else []
    words += list_subset_words(entry.subset)
    return words + ["--allow-inexact"] * entry.allow_inexact


def find_chosen_ranks(files: Sequence[str], recipes: Sequence[Recipe], total: Any) -> str:
    """The ranks of the files, if not all ranks have one; empty if all have, or if no recipe knows their names. `total`
    is the number of ranks where the names do not tell it.
    """
    for recipe in recipes:
        found = [parse_rank_name(name, recipe) for name in files]
        numbers = {numbers[0] for numbers in found if numbers}
        ranks = {numbers[1] for numbers in found if numbers}
        if len(ranks) == 1 and len(numbers) != (ranks.pop() or total):
            return ",".join(format_runs(numbers))
    return ""


def note_shares(folder: AnyPath) -> Iterator[Note]:
    """Notes each share of a target, and how they are joined; nothing of a target that is whole. Raises Refused if a
    journal is damaged.
    """
    folders = find_unjoined_shares(folder)
    for count in sorted({share.shares for share in folders.values()}):
        for number in range(count):
            share = Share(number, count)
            yield Note("share", f"share {share}: {describe_share(folder / name_share_folder(share))}")
    if folders and isinstance(folder, RemotePath) and (manifest := read_valid_manifest(folder)):
        yield Note("part", f"finished beside them: {describe_share_files(manifest)}, by {MANIFEST}")
    if folders:
        yield Note("not-joined", describe_joining(folder, folders))


def describe_share(folder: AnyPath) -> str:
    """Describes how far a share is, by its folder."""
    if (folder / MANIFEST).exists():
        manifest = read_valid_manifest(folder)
        return f"finished, {describe_share_files(manifest)}" if manifest else f"its {MANIFEST} is damaged"
    unfinished = read_unfinished(folder)
    if unfinished is None:
        return "not begun" if not folder.is_dir() else "begun, nothing written yet"
    done = f"{format_size(unfinished.durable)} of {format_size(unfinished.size)}"
    at_work = f"; {unfinished.holder} is at work" if unfinished.holder else ""
    return f"unfinished, {done} ({format_percent(unfinished.durable, unfinished.size)}){at_work}"
