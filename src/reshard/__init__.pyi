from collections.abc import Iterable
from fractions import Fraction
from typing import Literal, overload

from reshard.api import Location
from reshard.api import convert as convert
from reshard.api import diff as diff
from reshard.api import plan as plan
from reshard.errors import Problem as Problem
from reshard.errors import Refused as Refused
from reshard.inspection.contents import inspect_path
from reshard.loading.lazy import open_tensors
from reshard.loading.load import load as load
from reshard.target.repair import repair as repair
from reshard.types import Progress
from reshard.verification.download import DownloadReport
from reshard.verification.report import Report

__version__: str
__all__ = ["Problem", "Refused", "convert", "diff", "inspect", "load", "open", "plan", "repair", "verify"]

inspect = inspect_path
open = open_tensors  # noqa: A001

# The options decide what kind of report there is, and which options go together.
@overload
def verify(
    target: Location,
    source: Location | None = None,
    *,
    recipe: str | None = None,
    ranks: Iterable[int] | None = None,
    ignore_extra_files: bool = False,
    config: Location | None = None,
    sample: float | Fraction | None = None,
    checksums_only: bool = False,
    on: str | None = None,
    progress: Progress | None = None,
) -> Report: ...
@overload
def verify(target: Location, *, download: Literal[True], progress: Progress | None = None) -> DownloadReport: ...
@overload
def verify(target: Location, *, sums: Location, progress: Progress | None = None) -> DownloadReport: ...
