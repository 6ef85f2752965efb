"""Looks at the target folder before a job: which ranks are finished, and whether the rest can be written."""

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import TypeVar

from reshard.errors import Problem, Refused, refuse, require_none
from reshard.execution.execute import OtherFiles, Settings
from reshard.execution.parts import check_upload_limits
from reshard.execution.records import Records
from reshard.execution.staging import note_begun_repair
from reshard.formats.manifest import list_rank_files
from reshard.formats.part_manifests import (
    Manifests,
    is_same_conversion,
    join_manifests,
    read_manifests_with_shares,
)
from reshard.formats.share_names import list_share_folders
from reshard.formats.target_names import JOURNAL, MANIFEST, PROGRESS, list_names
from reshard.formats.unfinished_downloads import check_unfinished
from reshard.paths import AnyPath, Entry, RemotePath
from reshard.planning.plan import Plan
from reshard.planning.planner import keep_ranks
from reshard.target.left_files import list_own_names
from reshard.target.manifest_writer import (
    describe_conversion_job,
    describe_origin,
    find_finished_ranks,
    read_source_facts,
    write_manifest,
)
from reshard.target.other_files import check_vouched, find_own_files, is_other_conversion
from reshard.target.places import TargetPlace, get_folder, open_now
from reshard.target.restart import (
    check_begun_removal,
    check_removed_files,
    choose_files_to_remove,
    leave_out_files,
    list_files_beside,
    refuse_to_remove,
)
from reshard.target.room import check_folder, check_space, check_stored_folder
from reshard.target.shares import (
    check_beside_share,
    check_lacking_shares,
    check_moved_files,
    check_spread_shares,
    choose_share,
    note_useless_shares,
)
from reshard.target.side_files import FoundFiles, collect_side_files, find_beside
from reshard.target.state import (
    TargetState,
    check_manifests,
    check_replaced_sides,
    check_side_files,
    check_written_files,
    list_lost_sides,
    note_joined,
    read_share_records,
    refuse_changed_target,
    require_same,
)
from reshard.target.tokenizer import find_tokenizer, note_lacking
from reshard.types import Share

WITHOUT_CHOICE = Settings()

LOOKS = 5
"""The most looks at a target in which shares go on."""

Seen = TypeVar("Seen")


def look_at_target(
    plan: Plan,
    place: TargetPlace,
    tokenizer_path: AnyPath | None = None,
    beside: FoundFiles | None = None,
    settings: Settings = WITHOUT_CHOICE,
    share: Share | None = None,
    *,
    is_spread: bool = False,
) -> TargetState:
    """Finds the files of a plan that remain to be written; writes nothing. The tokenizer is that of `tokenizer_path`,
    or of the source. The source is looked at again if what lies `beside` its tensors is not given. With the settings
    `restart` and `yes`, finished files are to be written too. Of a `share` it is those files that the share has to
    write, in a place of its own; or they `is_spread` over shares, which are to be made. Raises Refused if they cannot
    be written.
    """
    beside = beside or find_beside(plan)
    tokenizer = find_tokenizer(tokenizer_path, plan.recipe)
    plan = replace(plan, notes=(*plan.notes, *note_lacking(tokenizer, plan.recipe, beside.copied)))
    try:
        samples, headers = read_source_facts(plan)
        origin = describe_origin(plan, headers)
    except OSError as error:
        raise refuse("cannot-read", str(error.filename), error.strerror or str(error), "to read the source") from None
    sides = collect_side_files(plan, tokenizer, beside)  # of all files: an index names all
    require_none(check_unfinished(plan.side_folder, sides))
    begun = TargetState(place, plan, samples, sides, Manifests({}, {}, ()), {}, {}, origin)
    return look_again_if_changed(begun, lambda now: look_at_place(now, settings, share, is_spread=is_spread), share)


def look_at_place(begun: TargetState, settings: Settings, share: Share | None, *, is_spread: bool) -> TargetState:
    """Looks at a target as it was listed. Raises Refused."""
    if share is not None:
        begun = choose_share(begun, read_state(begun), share, restart=settings.restart)
    return look_at_folder(begun, settings, is_spread=is_spread)


def look_again_if_changed(begun: TargetState, look: Callable[[TargetState], Seen], share: Share | None) -> Seen:
    """Looks at a target. In a store shares end and are joined while it is listed and read: where that may be why it is
    refused, looks again. Raises Refused.
    """
    for _ in range(LOOKS):
        try:
            return look(begun)
        except Refused:
            place = begun.place
            if isinstance(place, Path) or not (share or list_share_folders(place.folder)):
                raise
            now = open_now(place)
            if isinstance(now, Path) or leave_out_notes(now.folder) == leave_out_notes(place.folder):
                raise
            begun = replace(begun, place=now)
    return look(begun)


def leave_out_notes(folder: RemotePath) -> dict[str, Entry]:
    """The objects in a folder but for the notes of runs."""
    return {name: entry for name, entry in folder.store.entries.items() if f"{PROGRESS}/" not in name}


def require_still_same(state: TargetState, settings: Settings) -> None:
    """Raises Refused if a target is not as it was looked at: what has begun beside a run before its journal was there
    was not seen then. Of two that begin at once, one sees the other.
    """
    require_same(state)
    whole, share = state.whole, state.share
    if not whole or not share:
        folder = get_folder(open_now(state.place))
        if state.plan.files and list_share_folders(folder):
            raise refuse_changed_target(state, "a share has begun there just now")
        if state.shares:
            require_none(check_moved_files(state))
            before = list_begun(state.folder, state.shares)
            if not isinstance(folder, Path) and list_begun(folder, state.shares) != before:
                raise refuse_changed_target(state, "a share has begun there again just now")
        return

    def look(begun: TargetState) -> None:
        now = read_state(begun)
        require_none(check_beside_share(now, whole.plan, share, restart=settings.restart))
        lacking = {file.name for file in now.plan.files}.union(state.removed)
        if not lacking.issuperset(file.name for file in state.plan.files):
            raise refuse_changed_target(state)

    look_again_if_changed(replace(whole, place=open_now(whole.place)), look, share)


def list_begun(folder: AnyPath, shares: Sequence[str]) -> list[str]:
    """Lists the shares with a journal. On a disk their locks keep others out."""
    return [name for name in shares if (folder / name / JOURNAL).is_file()]


def look_at_folder(begun: TargetState, settings: Settings, *, is_spread: bool = False) -> TargetState:
    """Finds out what there is of a job in its folder, and checks that the rest can be written. Raises Refused."""
    state = read_state(begun, settings)
    is_to_join = not is_spread or not (state.plan.files or settings.restart)
    check_shares = check_lacking_shares if is_to_join else check_spread_shares
    if problems := [*check_state(state), *check_shares(state, begun.plan, settings)]:
        require_same(state)  # what another run has brought in the meantime is nobody's fault
        require_none(problems)
    if state.removed and not settings.yes:
        raise refuse_to_remove(state)  # last: who agrees must not be refused then for another reason
    notes = [note_joined(state)] if state.must_be_joined else []
    notes += note_useless_shares(state)
    if isinstance(state.folder, Path) and not state.removed:
        notes += note_begun_repair(state.folder)
    return replace(state, plan=replace(state.plan, notes=(*state.plan.notes, *notes)))


def read_state(begun: TargetState, settings: Settings = WITHOUT_CHOICE) -> TargetState:
    """Reads what there is of a job in its folder: manifests and finished files. Raises Refused."""
    folder, plan = begun.folder, begun.plan
    manifests = read_manifests_with_shares(folder)
    wanted = describe_conversion_job(plan, begun.samples)
    same = {name: one for name, one in manifests.named.items() if is_same_conversion(one, wanted)}
    removed = choose_files_to_remove(folder, plan, manifests, same, yes=settings.yes) if settings.restart else ()
    known = leave_out_files(join_manifests(same.values()), removed)
    same = same if known else {}
    if finished := find_finished_ranks(known, plan, folder, manifests.shares):
        plan = keep_ranks(plan, [file.rank for file in plan.files if file.rank not in finished])
    return replace(begun, plan=plan, manifests=manifests, same=same, known=known, removed=removed)


def check_state(state: TargetState) -> Iterator[Problem]:
    """Reports files that changed since this conversion wrote them; if there are none, reasons why the remaining files
    cannot be written.
    """
    has_work = bool(state.plan.files) or state.must_be_joined
    found = [*check_side_files(state.known, state.sides), *check_written_files(state), *check_manifests(state)]
    if not found and has_work:
        found += check_replaced_sides(state)
    found += [*check_removed_files(state), *check_begun_removal(state)]
    yield from found
    if not found and has_work:
        yield from check_room(state)
        if not isinstance(state.place, Path):
            yield from check_upload_limits(state.plan, state.place.store.limits)
    elif not found and isinstance(state.folder, Path):
        yield from check_space(state.folder, sum(state.sides[name].size for name in list_lost_sides(state)), set())


def describe_others(state: TargetState, settings: Settings = WITHOUT_CHOICE) -> OtherFiles:
    """Describes the manifest and the side files for `execute_plan`. The manifest gets its final name last."""

    def write(records: Records, checksums: Mapping[str, str]) -> bytes:
        sizes = {name: side.size for name, side in state.sides.items()}
        return write_manifest(state.plan, state.samples, sizes, checksums, records, state.known, state.origin)

    kept = list_rank_files(state.known) - {file.name for file in state.plan.files}
    kept |= {MANIFEST, *state.sides, *state.same} if kept else set()
    check = partial(require_still_same, state, settings)
    return OtherFiles(
        state.sides,
        write,
        check,
        state.part,
        frozenset(kept),
        state.superseded,
        state.removed,
        state.moved,
        read_share_records(state),
        state.samples,
    )


def check_room(state: TargetState) -> Iterator[Problem]:
    """Checks that the remaining files can be written, and that the folder holds only files of this conversion (perhaps
    for other ranks).
    """
    present = {*list_names(state.folder)} - list_files_beside(state)
    ours, unknown = find_own_files(state)
    yield from check_vouched(state, unknown)
    if is_other_conversion(state):
        return
    ours |= {
        f"{name}/{left}" for name in list_share_folders(state.folder) for left in list_own_names(state.folder / name)
    }
    remedy = "move them out of the folder, or another target" if state.known else "another target"
    if isinstance(state.folder, Path):
        yield from check_folder(state.plan.path, state.folder, state.size, ours, present, remedy)
    else:
        yield from check_stored_folder(state.plan.path, state.folder, present - ours, remedy)
