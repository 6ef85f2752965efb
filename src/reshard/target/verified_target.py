"""A target that is compared with its source: what is read, compared, and said of it by the manifest of the target."""

from fractions import Fraction

from reshard.formats.part_manifests import require_shares_joined
from reshard.paths import AnyPath
from reshard.sources.verified_source import VerifiedSides, find_recipe_of_rank_files, read_sides
from reshard.storage.counting import count_progress
from reshard.target.mending_hints import reword_hints
from reshard.types import Progress
from reshard.verification.packed_source import PackedSource
from reshard.verification.repeated_tensors import add_repeated_tensor
from reshard.verification.report import Report
from reshard.verification.report_notes import add_side_files, add_target_note
from reshard.verification.restored_slices import check_restored_slices, count_slices
from reshard.verification.stacked_source import StackedSource
from reshard.verification.target_folder import measure_target_files
from reshard.verification.verify import Compare, TracedTarget, trace_target, verify_traced


def verify_against_source(
    folder: AnyPath,
    source: AnyPath,
    config_folder: AnyPath | None,
    recipe: str | None,
    ranks: tuple[int, ...] | None,
    sample: Fraction | None,
    progress: Progress | None,
    compare: Compare,
    *,
    ignore_extra_files: bool,
) -> Report:
    """Compares a target with its source. Raises Refused."""
    require_shares_joined(folder, ranks)
    require_shares_joined(source)
    of_ranks = find_recipe_of_rank_files(source, recipe)
    sliced = of_ranks and check_restored_slices(folder, of_ranks, ranks, ignore_extra_files=ignore_extra_files)
    if sliced and sliced.problems:
        return reword_hints(sliced, folder, source, folder)
    sides = read_sides(folder, source, recipe, ignore_extra_files=ignore_extra_files, config_folder=config_folder)
    report = compare_sides(sides, ranks, sample, progress, compare)
    report = add_side_files(count_slices(report, sliced) if sliced else report, folder)
    return reword_hints(add_target_note(report, folder, source, sides.files), folder, source, sides.folder)


def compare_sides(
    sides: VerifiedSides,
    ranks: tuple[int, ...] | None,
    sample: Fraction | None,
    progress: Progress | None,
    compare: Compare,
) -> Report:
    """Compares the two sides of a verification. Raises Refused."""
    with count_progress(progress, measure_target_files(sides.folder, sides.recipe, ranks)) as advance:
        report = verify_traced(trace_sides(sides, ranks), advance, sample, compare)
    return add_repeated_tensor(report, sides.whole, sides.repeated)


def trace_sides(sides: VerifiedSides, ranks: tuple[int, ...] | None) -> TracedTarget:
    """Traces each tensor of a target to the source, by the headers. Raises Refused."""
    return trace_target(
        sides.folder,
        sides.whole,
        sides.recipe,
        ranks,
        stacked=StackedSource(*sides.unstacked) if sides.unstacked else None,
        packed=PackedSource(*sides.unpacked) if sides.unpacked else None,
        ignore_extra_files=sides.ignores_extra_files,
    )
