"""The state of a target folder before a job: manifests, finished files, parts made apart; and checks of them."""

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from reshard.errors import Problem, Refused, refuse
from reshard.execution.other_jobs import describe_other_job
from reshard.execution.side_writer import SideFile, compute_side_checksum
from reshard.formats.manifest import list_rank_files
from reshard.formats.part_manifests import (
    MANIFEST_COPY,
    Manifests,
    check_agreement,
    find_file,
    is_part_name,
    name_part_manifest,
    read_manifests_with_shares,
)
from reshard.formats.share_names import is_share_manifest
from reshard.formats.store_record import read_store_record
from reshard.formats.target_names import (
    JOURNAL,
    LOCK,
    LOCK_NAMES,
    MANIFEST,
    PARTIAL,
    PROGRESS,
    STORE_RECORD,
    list_names,
)
from reshard.paths import AnyPath, Entry, RemotePath
from reshard.planning.plan import Plan
from reshard.sources.changed_files import find_changed_range
from reshard.storage.opened import measure_path
from reshard.target.manifest_writer import describe_conversion_job
from reshard.target.places import TargetPlace, get_folder
from reshard.target.tokenizer import WORD
from reshard.text import format_count, format_list, format_numbers
from reshard.types import WHOLE, Note, Share

MOVE_AND_REPEAT = "move it out of the folder, and run the same command again"


@dataclass(frozen=True, slots=True)
class TargetState:
    """A target folder at the start of a job, and the part of the plan that remains to be done."""

    place: TargetPlace
    plan: Plan
    """The plan of the files that are not finished yet."""
    samples: Sequence[str]
    """For each source file: a checksum of samples of its data."""
    sides: Mapping[str, SideFile]
    """The side files, by name."""
    manifests: Manifests
    """All manifests in the folder."""
    same: Mapping[str, Mapping[str, Any]]
    """Those of this conversion (perhaps for other ranks), by file name."""
    known: Mapping[str, Any]
    """The same joined into one; empty if there is none."""
    origin: Mapping[str, Any]
    """The part of the new manifest that describes the source."""
    removed: tuple[str, ...] = ()
    """Finished files that are removed before anything is written, in this order; `known` does not name them."""
    share: Share | None = None
    """The share whose folder this is."""
    whole: "TargetState | None" = None
    """Of a share: the target that it is in, as it was when nothing had been looked for."""

    @property
    def folder(self) -> AnyPath:
        """Its path. A folder in a store is as it was when it was opened."""
        return get_folder(self.place)

    @property
    def size(self) -> int:
        """Of all files to be written but the manifest, in bytes."""
        return self.plan.size + sum(side.size for side in self.sides.values())

    @property
    def named(self) -> set[str]:
        """The rank files that the manifest of the whole folder names already."""
        return list_rank_files(self.same.get(MANIFEST, {}))

    @property
    def must_be_joined(self) -> bool:
        """Whether parts that were made apart lie here: `reshard.json` does not name all files that are known, or shares
        are still there.
        """
        return not list_rank_files(self.known) <= self.named or bool(self.shares)

    @property
    def shares(self) -> list[str]:
        """The folders of the finished shares of this conversion, by name."""
        return [name for name in self.manifests.shares if f"{name}/{MANIFEST}" in self.same]

    @property
    def moved(self) -> tuple[tuple[str, str], ...]:
        """The files that finished shares have in their folders, each with the name that the target has it under."""
        names = [entry["name"] for entry in self.known.get("files", ())]
        there = [(share, name) for share in self.shares for name in names if (self.folder / share / name).is_file()]
        return tuple((f"{share}/{name}", name) for share, name in there)

    @property
    def part(self) -> str:
        """The other name of the manifest after the run, if that does not name all ranks; else empty."""
        ranks = {file.rank for file in self.plan.files} | {entry["rank"] for entry in self.known.get("files", ())}
        is_part = self.plan.layout.to != WHOLE and len(ranks) < self.plan.layout.ranks and not self.share
        return name_part_manifest(ranks) if is_part else ""

    @property
    def superseded(self) -> tuple[str, ...]:
        """Manifests of parts, under the names that we gave them, that the manifest after the run replaces; those that
        an interrupted run has not finished; and what is left in the folders of shares, of each its manifest last.
        """
        begun = [name for name in list_names(self.folder) if name.endswith(PARTIAL)]
        names = [name for name in (*self.same, *begun) if is_part_name(name)]
        parts = [name for name in names if name.removesuffix(PARTIAL) != self.part]
        return (*parts, *(f"{share}/{name}" for share in self.shares for name in list_share_names(self, share)))


def list_share_names(state: TargetState, share: str) -> list[str]:
    """Lists the files beside the tensors that a finished share has in its folder, the manifest last."""
    folder = state.folder / share
    sides = [entry["name"] for entry in state.manifests.named[f"{share}/{MANIFEST}"]["side_files"]]
    notes = [f"{PROGRESS}/{name}" for name in list_names(folder / PROGRESS)]
    names = [name for name in (*sides, STORE_RECORD, *notes) if (folder / name).is_file()]
    # A folder with a journal and no manifest would be an unfinished share. The join locks the journal, and so makes it.
    return [*names, *(name for name in LOCK_NAMES if name != LOCK and (folder / name).is_file()), JOURNAL, MANIFEST]


def read_share_records(state: TargetState) -> dict[str, tuple[int, str]]:
    """Reads what a store told of the files of finished shares: size and ETag, by name. A record that is damaged is left
    out. Raises Refused if another run has joined them in the meantime.
    """
    found: dict[str, tuple[int, str]] = {}
    for share in state.shares if isinstance(state.folder, RemotePath) else ():
        try:
            record = read_store_record(state.folder / share) or {}
        except Refused:
            require_same(state)
            record = {}
        files = list_rank_files(state.manifests.named[f"{share}/{MANIFEST}"])
        found |= {name: (one.size, one.etag) for name, one in record.items() if name in files}
    return found


def list_lost_sides(state: TargetState) -> list[str]:
    """Lists the side files that are not in the target."""
    return [name for name in state.sides if not (state.folder / name).exists()]


def require_same(state: TargetState) -> None:
    """Raises Refused if the manifests in the target are not those that were looked at."""
    place = state.place
    if isinstance(place, Path):
        is_same = read_manifests_with_shares(place) == state.manifests
    else:  # by their versions, for the folder stays as it was when it was opened
        is_same = keep_manifests(place.store.list_entries()) == keep_manifests(place.folder.store.entries)
    if not is_same:
        raise refuse_changed_target(state)


def refuse_changed_target(state: TargetState, found: str = "another run has ended there just now") -> Refused:
    """The refusal of a target that is not as it was looked at."""
    return refuse("target-changed", str(state.folder), found, "none", "run it again")


def keep_manifests(entries: Mapping[str, Entry]) -> dict[str, Entry]:
    """Keeps those of the listed objects that may be manifests."""
    return {
        name: entry
        for name, entry in entries.items()
        if (MANIFEST_COPY.fullmatch(name) and name != STORE_RECORD) or is_share_manifest(name)
    }


def note_joined(state: TargetState) -> Note:
    """Notes which parts are joined, by the manifests that name them."""
    parts, known = [], state.named
    for name, one in state.same.items():
        if added := [entry["rank"] for entry in one["files"] if entry["name"] not in known]:
            parts.append(f"ranks {format_numbers(added)} of {name}")
        known |= list_rank_files(one)
    if shares := state.shares:
        text = f"{format_count(len(shares), 'shares')} are joined: {format_list(shares, 3)}"
        return Note("joined", text)
    return Note("joined", f"parts that were made apart are joined into {MANIFEST}: {format_list(parts)}")


def check_side_files(known: Mapping[str, Any], sides: Mapping[str, SideFile]) -> Iterator[Problem]:
    """Reports side files whose content would differ from the manifest: a changed tokenizer or config of the source."""
    for entry in known.get("side_files", ()):
        side = sides.get(entry["name"])
        if side and (side.size != entry["size"] or compute_side_checksum(side) != entry["xxh3_128"]):
            found = "other content than when the target was made, in the source or by its config.json"
            remedy = "another target, or the source as it was"
            if WORD in entry["name"]:
                found = "another tokenizer than when the target was made"
                remedy = "another target, or the source and --tokenizer-path as they were"
            yield Problem("source-changed", entry["name"], found, "the same", remedy)


def check_replaced_sides(state: TargetState) -> Iterator[Problem]:
    """Reports side files in the target that a run would replace by others, so that a person's changes are lost; and
    those that the target was made with, and that this run would no more vouch for.
    """
    if not state.known:
        return
    for name, side in state.sides.items():
        path = state.folder / name
        if path.exists() and not has_content(path, side):
            expected = "as this conversion writes it"
            yield Problem("wrong-checksum", str(path), "changed since it was written", expected, MOVE_AND_REPEAT)
    for name in dict.fromkeys(entry["name"] for entry in state.known["side_files"]):
        if name not in state.sides:
            found, expected = "nothing in the source that it comes from", "as when the target was made"
            remedy = "another target, or the source and --tokenizer-path as they were"
            yield Problem("source-changed", name, found, expected, remedy)


def has_content(path: AnyPath, side: SideFile) -> bool:
    """Whether a file has the content of a side file. Raises Refused if one of them cannot be read."""
    return has_size(path, side.size) and compute_path_checksum(path) == compute_side_checksum(side)


def has_size(path: AnyPath, size: int) -> bool:
    """Whether a path is a file of this size, in bytes."""
    return path.is_file() and measure_path(path) == size


def compute_path_checksum(path: AnyPath) -> str:
    """The xxh3-128 of a file, in hexadecimal. Raises Refused if it cannot be read."""
    version = path.entry.version if isinstance(path, RemotePath) else path.stat().st_mtime_ns
    return compute_side_checksum(SideFile(path, measure_path(path), version))


def check_written_files(state: TargetState) -> Iterator[Problem]:
    """Reports finished files whose size differs from the manifest. Before parts are joined, three byte ranges of every
    file are compared too: the header, one in the middle and the last. All of them were copied here, also those that
    `reshard.json` names: it is that of the part which was copied last.
    """
    planned = {file.name for file in state.plan.files}
    remedy = "copy it here again, or move it out of the folder, and run the same command again"
    for entry in state.known.get("files", ()):
        path = find_file(state.folder, entry["name"], state.shares)
        if not path.exists() or not (state.must_be_joined or entry["name"] in planned):
            continue
        if (size := measure_path(path)) != entry["size"]:
            found, expected = f"{size:,} bytes", f"{entry['size']:,} bytes, as they were written"
            yield Problem("wrong-size", str(path), found, expected, remedy)
        elif state.must_be_joined and (changed := find_changed_range(path, entry["ranges"])):
            subject = f"{path}: bytes {changed.offset:,} to {changed.stop:,}"
            expected = "those of the manifest of its part"
            yield Problem("wrong-checksum", subject, "other bytes than were written", expected, remedy)


def check_manifests(state: TargetState) -> Iterator[Problem]:
    """Reports a `reshard.json` of another conversion where the manifests of parts are of this one, manifests of parts
    that are damaged, and those that contradict each other.
    """
    if state.known and state.manifests.main and MANIFEST not in state.same:
        expected = f"that of {format_list(state.same)}"
        yield Problem("another-job", str(state.folder / MANIFEST), describe_other(state), expected, MOVE_AND_REPEAT)
    for name in state.manifests.damaged:
        expected = "what reshard has written"
        hint = f"copy it here again from the folder of its part; or {MOVE_AND_REPEAT}"
        yield Problem("wrong-manifest", str(state.folder / name), "damaged or changed", expected, hint)
    yield from check_agreement(state.folder, state.same)


def describe_other(state: TargetState, name: str = MANIFEST) -> str:
    """Describes in what the conversion of a manifest differs from this one."""
    wanted = describe_conversion_job(state.plan, state.samples)
    return f"of another conversion: {describe_other_job(state.manifests.named[name], wanted)}"
