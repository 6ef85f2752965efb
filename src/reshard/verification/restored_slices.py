"""Slices that were made from rank files, whose proof runs in reverse: that each file has the rows of its own rank.

The rank files are compared with the whole tensors that the slices hold, wherever these lie. So their places are checked
here, before they are put together; and what was proven is counted by the slices, not by the rank files.
"""

from collections.abc import Collection
from dataclasses import replace

from reshard.errors import Problem
from reshard.paths import AnyPath
from reshard.recipe_types import Recipe
from reshard.verification.expected import FILL
from reshard.verification.report import Report
from reshard.verification.slices import read_sliced_target
from reshard.verification.target_folder import choose_files, list_target_files


def check_restored_slices(
    target: AnyPath, recipe: Recipe, ranks: Collection[int] | None, *, ignore_extra_files: bool
) -> Report | None:
    """Checks names, rows and places of all slices of a target, from their headers; None of any other target. `recipe`
    is that of the rank files. Raises Refused if only some ranks are asked for.
    """
    folder = list_target_files(target, recipe)
    if not folder.is_sliced:
        return None
    choose_files(folder, ranks)
    sliced = read_sliced_target(target, folder)
    found = f"a file beside those of {folder.ranks} ranks"
    extra = [Problem("extra-file", name, found, "none") for name in folder.extra if not ignore_extra_files]
    tensors = [tensor for file in sliced.files for tensor in file.tensors]
    return Report(
        ranks=folder.ranks,
        files=len(sliced.files),
        tensors=len(tensors),
        size=sum(tensor.size for tensor in tensors),
        compared=0,
        is_sampled=False,
        problems=(*sliced.problems, *extra),
    )


def count_slices(report: Report, sliced: Report) -> Report:
    """Counts what a report of rank files has proven by the slices of the target; what casts have made is counted in
    rank files alone. Constants of the recipe lie there only.
    """
    if report.casts.keys() - {FILL}:
        return report
    compared = min(report.compared, sliced.size) if report.is_sampled else sliced.size
    return replace(sliced, compared=compared, is_sampled=report.is_sampled, problems=report.problems, note=report.note)
