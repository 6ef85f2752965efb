"""Looks at the target folder before a job: which ranks are finished, and whether the rest can be written."""

from collections.abc import Iterator, Mapping
from dataclasses import replace
from functools import partial
from pathlib import Path

from reshard.errors import Problem, refuse, require_none
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
from reshard.formats.target_names import MANIFEST, list_names
from reshard.formats.unfinished_downloads import check_unfinished
from reshard.paths import AnyPath
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
from reshard.target.places import TargetPlace
from reshard.target.restart import (
    check_begun_removal,
    check_removed_files,
    choose_files_to_remove,
    leave_out_files,
    list_files_beside,
    refuse_to_remove,
)
from reshard.target.room import check_folder, check_space, check_stored_folder
from reshard.target.shares import check_lacking_shares, check_spread_shares, choose_share
from reshard.target.side_files import FoundFiles, collect_side_files, find_beside
from reshard.target.state import (
    TargetState,
    check_manifests,
    check_replaced_sides,
    check_side_files,
    check_written_files,
    list_lost_sides,
    note_joined,
    require_same,
)
from reshard.target.tokenizer import find_tokenizer, note_lacking
from reshard.types import Share

WITHOUT_CHOICE = Settings()


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
    if share is None:
        return look_at_folder(begun, settings, is_spread=is_spread)
    return look_at_folder(choose_share(begun, read_state(begun), share), settings)


def look_at_folder(begun: TargetState, settings: Settings, *, is_spread: bool = False) -> TargetState:
    """Finds out what there is of a job in its folder, and checks that the rest can be written. Raises Refused."""
    state = read_state(begun, settings)
    is_to_join = not is_spread or not (state.plan.files or settings.restart)
    shares = check_lacking_shares(state, begun.plan, settings) if is_to_join else check_spread_shares(state, settings)
    if problems := [*check_state(state), *shares]:
        require_same(state)  # what another run has brought in the meantime is nobody's fault
        require_none(problems)
    if state.removed and not settings.yes:
        raise refuse_to_remove(state)  # last: who agrees must not be refused then for another reason
    notes = [note_joined(state)] if state.must_be_joined else []
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


def describe_others(state: TargetState) -> OtherFiles:
    """Describes the manifest and the side files for `execute_plan`. The manifest gets its final name last."""

    def write(records: Records, checksums: Mapping[str, str]) -> bytes:
        sizes = {name: side.size for name, side in state.sides.items()}
        return write_manifest(state.plan, state.samples, sizes, checksums, records, state.known, state.origin)

    kept = list_rank_files(state.known) - {file.name for file in state.plan.files}
    kept |= {MANIFEST, *state.sides, *state.same} if kept else set()
    check = partial(require_same, state)
    return OtherFiles(
        state.sides,
        write,
        check,
        state.part,
        frozenset(kept),
        state.superseded,
        state.removed,
        state.moved,
        state.samples,
    )


def check_room(state: TargetState) -> Iterator[Problem]:
    """Checks that the remaining files can be written, and that the folder holds only files of this conversion (perhaps
    for other ranks).
    """
    present = {*list_names(state.folder)} - list_files_beside(state)
    yield from check_vouched(state)
    if is_other_conversion(state):
        return
    ours = find_own_files(state)[0]
    ours |= {
        f"{name}/{left}" for name in list_share_folders(state.folder) for left in list_own_names(state.folder / name)
    }
    remedy = "move them out of the folder, or another target" if state.known else "another target"
    if isinstance(state.folder, Path):
        yield from check_folder(state.plan.path, state.folder, state.size, ours, present, remedy)
    else:
        yield from check_stored_folder(state.plan.path, state.folder, present - ours, remedy)
