"""Shares of a conversion in their target: what a share has to write there, and whether all of them can be joined.

Each share works in a folder of its own, `.share-1-of-4`, as in a target of its own: so each has its journal and lock.
The same command without `--share` joins them; it writes no tensor.
"""

import json
from collections import Counter
from collections.abc import Collection, Iterator, Mapping
from contextlib import suppress
from dataclasses import replace
from pathlib import Path
from typing import Any

from reshard.errors import Problem, require_none
from reshard.execution.execute import Settings, identify_job
from reshard.execution.journal import LONGEST_JOB_LINE, find_holder
from reshard.execution.other_jobs import describe_other_job
from reshard.execution.staging import STAGING
from reshard.execution.store_journal import list_job_names
from reshard.formats.manifest import list_rank_files
from reshard.formats.part_manifests import find_file
from reshard.formats.share_names import list_share_folders, name_share_folder
from reshard.formats.target_names import JOURNAL, LOCK, MANIFEST, list_names
from reshard.paths import AnyPath
from reshard.planning.plan import Plan
from reshard.planning.planner import keep_ranks
from reshard.planning.shares import find_share_of_files, keep_share
from reshard.storage.opened import open_regular_file
from reshard.target.manifest_writer import identify_conversion
from reshard.target.other_files import check_vouched, find_own_files
from reshard.target.places import TargetPlace, get_folder
from reshard.target.room import check_foreign_files
from reshard.target.share_store import open_share_view
from reshard.target.state import (
    MOVE_AND_REPEAT,
    TargetState,
    check_manifests,
    check_side_files,
    compute_path_checksum,
    describe_other,
)
from reshard.text import format_count, format_list, format_size
from reshard.types import Note, Share

COMPARED = ("reshard", "recipe_sha256", "layout", "subset")
"""Keys of a job that all shares of a conversion have alike."""


def choose_share(begun: TargetState, whole: TargetState, share: Share, *, restart: bool) -> TargetState:
    """Chooses the files that a share has to write, and its place. `whole` is what its target has of all files: what is
    finished there, or in other shares, is not made again. Raises Refused if it does not fit to what is there.
    """
    require_none(check_fingerprint(begun, share))
    require_none(check_beside_share(whole, begun.plan, share, restart=restart))
    assigned, lacking = keep_share(begun.plan, share).files, {file.name for file in whole.plan.files}
    others = set[str]().union(
        *(list_rank_files(one) for name, one in whole.same.items() if name != name_manifest(share))
    )
    own = [file.name for file in assigned if file.name in lacking or file.name not in others]
    place = open_share_place(begun.place, share, own)
    wanted = lacking | find_own_finished(whole, share, get_folder(place))
    plan = keep_ranks(begun.plan, [file.rank for file in assigned if file.name in wanted])
    size = format_size(sum(file.size for file in assigned))
    text = f"share {share} has {len(assigned):,} of {format_count(len(begun.plan.files), 'files')}, {size}"
    notes = (*plan.notes, Note("share", text))
    sides = begun.sides if plan.files and isinstance(place, Path) else {}  # in a store the join writes them
    return replace(begun, plan=replace(plan, notes=notes), place=place, sides=sides, share=share, whole=begun)


def name_manifest(share: Share) -> str:
    """Names the manifest of a share, as its target has it."""
    return f"{name_share_folder(share)}/{MANIFEST}"


def find_own_finished(whole: TargetState, share: Share, folder: AnyPath) -> set[str]:
    """Finds the finished files that lie in the folder of a share, by its manifest."""
    own = whole.same.get(name_manifest(share), {})
    return {name for name in list_rank_files(own) if (folder / name).is_file()}


def open_share_place(place: TargetPlace, share: Share, own: Collection[str]) -> TargetPlace:
    """Opens the place that a share writes to, in its target. Under the names `own` lie its tensor files, in a store
    beside those of others.
    """
    return place / name_share_folder(share) if isinstance(place, Path) else open_share_view(place, share, own)


def check_fingerprint(begun: TargetState, share: Share) -> Iterator[Problem]:
    """Reports a share whose conversion is not the one that it was made a part of."""
    found = identify_conversion(begun.plan, begun.samples) if share.fingerprint else ""
    if share.fingerprint != found:
        remedy = "the same files, options and version of reshard on every machine"
        expected = f"{share.fingerprint[:8]}, that of the other machines"
        yield Problem("another-job", f"--share {share}", f"the fingerprint {found[:8]}", expected, remedy)


def check_beside_share(whole: TargetState, plan: Plan, share: Share, *, restart: bool) -> Iterator[Problem]:
    """Reports what lies in the target of a share and does not fit to it. `plan` has the files of all shares. To
    `restart` it, no join may be at work.
    """
    folder, present = whole.folder, {*list_names(whole.folder)}
    ours, unknown = find_own_files(whole)
    found = [*check_vouched(whole, unknown), *check_manifests(whole), *check_other_shares(whole, plan)]
    found += [*check_side_files(whole.known, whole.sides), *check_own_manifest(whole, share)]
    counts = Counter(other.shares for other in list_share_folders(folder).values())
    for count in counts.keys() - {share.shares}:
        there, expected = f"{format_count(counts[count], 'shares')} of {count}", f"shares of {share.shares}"
        yield Problem(
            "another-job", str(folder), there, expected, f"--share I/{count}; or {describe_removal(folder, count)}"
        )
    if not found:
        yield from check_foreign_files(folder, present - ours, "another target")
    yield from found
    if whole.plan.files or restart:
        yield from check_run_for_all(folder, "--share")


def check_run_for_all(folder: AnyPath, option: str) -> Iterator[Problem]:
    """Reports a run for all files that has begun where shares are to be made, by an option."""
    if (folder / JOURNAL).is_file():
        there = f"a conversion without {option} that has not ended{describe_holder_of(folder)}"
        remedy = f"the same command without {option} goes on with it; or another target"
        yield Problem("unfinished-target", str(folder), there, "none, or shares", remedy)


def describe_removal(folder: AnyPath, count: int) -> str:
    """Describes how shares are got rid of: by hand, for a command would take work of days with it."""
    return f"if nobody needs them, move {folder}/.share-*-of-{count} out of it"


def check_own_manifest(whole: TargetState, share: Share) -> Iterator[Problem]:
    """Reports a damaged manifest in the folder of a share: nothing says what its files are."""
    path = whole.folder / name_manifest(share)
    if path.is_file() and name_manifest(share) not in whole.manifests.parts:
        hint = f"move {path.parent} out of the folder; the same command makes the share anew"
        yield Problem("wrong-manifest", str(path), "damaged", "what reshard has written", hint)


def check_other_shares(whole: TargetState, plan: Plan) -> Iterator[Problem]:
    """Reports shares, finished or begun, that are of another conversion, or of other ranks than `plan` has."""
    folder, expected = whole.folder, "a share of this conversion"
    remedy = f"another target; or, if nobody needs it any more, {MOVE_AND_REPEAT}"
    wanted, planned = identify_job(whole.plan, (), Settings()), {file.name for file in plan.files}
    for name in list_share_folders(folder):
        found, manifest = "", f"{name}/{MANIFEST}"
        job = {} if name in whole.manifests.shares else read_share_job(folder / name)
        files = list_rank_files(whole.same.get(manifest, {})) | list_job_names(job, "files")
        if name in whole.manifests.shares and manifest not in whole.same:
            found = describe_other(whole, manifest)
        elif job and list_compared(job) != list_compared(wanted):
            found = f"of another conversion: {describe_other_job(job, wanted)}"
        elif files - planned:
            found = f"of other --ranks: it has {format_list(sorted(files - planned), 3)}"
        if found:
            yield Problem("another-job", str(folder / name), found, expected, remedy)


def list_compared(job: Mapping[str, Any]) -> list[Any]:
    """Lists what all shares of a conversion have alike in their journals. A file has another time of change on another
    machine.
    """
    source = job.get("source")
    files = [entry[:3] if isinstance(entry, list) else entry for entry in source] if isinstance(source, list) else None
    return [*(json.dumps(job.get(key), sort_keys=True) for key in COMPARED), files]


def read_share_job(folder: AnyPath) -> Mapping[str, Any]:
    """Reads the job of a share that is not finished; empty if it has none yet, or if its journal is damaged."""
    with suppress(OSError, ValueError, RecursionError), open_regular_file(folder / JOURNAL) as file:
        job = json.loads(file.readline(LONGEST_JOB_LINE))
        return job if isinstance(job, dict) else {}
    return {}


def check_lacking_shares(state: TargetState, plan: Plan, settings: Settings) -> Iterator[Problem]:
    """Reports shares that cannot be joined: those that lack, those at work, and what somebody has changed in them.
    `plan` has all files. Nothing is reported where there are no shares.
    """
    folders = list_share_folders(state.folder)
    if not folders:
        return
    if settings.restart:
        expected = "a target without shares"
        count = next(iter(folders.values())).shares
        remedy = f"--restart with --share makes one of them anew; or {describe_removal(state.folder, count)}"
        yield Problem("unfinished-target", str(state.folder), f"has {format_list(folders)}", expected, remedy)
        return
    yield from check_other_shares(state, plan)
    if not state.plan.files:
        yield from check_finished_shares(state)
        return
    count = Counter(share.shares for share in folders.values()).most_common(1)[0][0]
    numbers, lacking = find_share_of_files(plan, count), {file.name for file in state.plan.files}
    for number in sorted({numbers[name] for name in lacking}):
        share = Share(number, count)
        names = [name for name in lacking if numbers[name] == number]
        found = f"{describe_progress(state, share)}; it makes {format_list(sorted(names), 3)}"
        remedy = f"the same command with --share {share}, on any machine; then this one again"
        yield Problem("unfinished-share", f"--share {share}", found, "finished: shares are joined all at once", remedy)


def check_spread_shares(state: TargetState, plan: Plan, settings: Settings) -> Iterator[Problem]:
    """Reports what lies in a target and does not fit to shares that are to be made there, all of them."""
    folder, shares = state.folder, list_share_folders(state.folder)
    counts = sorted({share.shares for share in shares.values()})
    if len(counts) > 1:
        there, expected = f"shares of {format_list(map(str, counts))}", "shares of one number"
        yield Problem("another-job", str(folder), there, expected, "another target")
    yield from check_other_shares(state, plan)
    if settings.restart:
        if state.shares and not settings.yes:
            found = f"finished shares, which --restart would remove: {format_list(state.shares)}"
            remedy = "add --yes to remove them; without --restart they are used"
            yield Problem("finished-target", str(folder), found, "--yes, or no finished share", remedy)
    else:
        yield from check_run_for_all(folder, "--on")


def describe_progress(state: TargetState, share: Share) -> str:
    """Describes why a share lacks files, by what there is of it."""
    folder = state.folder / name_share_folder(share)
    if name_manifest(share) in state.same:
        names = list_rank_files(state.same[name_manifest(share)])
        has_all = all(find_file(state.folder, name, state.shares).is_file() for name in names)
        return "finished, but of other --ranks" if has_all else "damaged"
    if not (folder / JOURNAL).is_file():
        return "damaged" if (folder / MANIFEST).is_file() else "not begun"
    return f"not finished{describe_holder_of(folder)}"


def describe_holder_of(folder: AnyPath) -> str:
    """Describes the process that is at work in a folder, behind a comma; nothing if none is known."""
    holder, journal = "", folder / JOURNAL
    if isinstance(journal, Path) and (journal.exists() or (folder / LOCK).exists()):
        holder = find_holder(journal, journal.stat().st_ino if journal.exists() else 0)
    return f", {holder} is at work" if holder else ""


def note_useless_shares(state: TargetState) -> Iterator[Note]:
    """Notes shares that have not ended, where all files are finished."""
    names = [] if state.plan.files else list_share_folders(state.folder).keys() - state.manifests.shares
    if names:
        text = f"left in {state.folder}, and of no use to the finished target: {format_list(sorted(names))}"
        yield Note("useless-share", text)


def check_finished_shares(state: TargetState) -> Iterator[Problem]:
    """Reports finished shares that cannot be joined: with files that would be lost or spoiled, or still at work."""
    yield from check_moved_files(state)
    for share in state.shares:
        folder = state.folder / share
        if holder := describe_holder_of(folder):
            way_on = "wait for it to end; if it has died, the same command with --share takes its lock over"
            yield Problem("target-in-use", str(folder), f"finished{holder}", "no run in it", way_on)


def check_moved_files(state: TargetState) -> Iterator[Problem]:
    """Reports files of finished shares that a join would lose or spoil. In a store nothing is moved."""
    remedy, seen = f"compare them and {MOVE_AND_REPEAT}", dict[str, str]()
    for before, after in state.moved if isinstance(state.folder, Path) else ():
        other = after if (state.folder / after).exists() else seen.get(after)
        seen[after] = before
        if other:
            found, expected = f"there, and as {other} too", "in one of the two"
            yield Problem("contradiction", str(state.folder / before), found, expected, remedy)
    for share in state.shares if isinstance(state.folder, Path) else ():
        folder = state.folder / share
        names = list_rank_files(state.same[f"{share}/{MANIFEST}"])
        if links := [path for path in (folder, *(folder / name for name in sorted(names))) if path.is_symlink()]:
            hint = "put what it leads to in its place, and run the same command again"
            yield Problem("target-not-folder", str(links[0]), "a link", "what was written there", hint)
        if (folder / STAGING).is_dir():
            hint = f"reshard repair {folder} goes on with it; then this command again"
            yield Problem("unfinished-share", str(folder), "a repair that has not ended", "a finished share", hint)
        for entry in state.manifests.named[f"{share}/{MANIFEST}"]["side_files"]:
            path = folder / entry["name"]
            if path.exists() and compute_path_checksum(path) != entry["xxh3_128"]:
                expected = "as this conversion has written it"
                yield Problem("wrong-checksum", str(path), "changed since it was written", expected, MOVE_AND_REPEAT)
