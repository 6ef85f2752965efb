"""The cells of a difference: how far the tensors of one layer and module, or of one expert, are apart."""

import re
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import NamedTuple

from reshard.formats.folders_below import split_numbers
from reshard.inspection.diff_report import DiffReport, ValueDifference, format_share
from reshard.numbered_names import name_layer
from reshard.pages.heat_map import LETTERED, NOT_THERE
from reshard.pages.module_kinds import split_at_layer

EXPERT = re.compile(r"\.experts\.(0|[1-9][0-9]{0,8})(?=\.|\Z)")

RELATIVE = (1e-5, 1e-4, 1e-3, 1e-2, 1e-1, 1.0)
"""Relative norms: where the levels from 2 on begin."""

MARKS = {
    "N": "NaN on a side",
    "I": "infinite on a side",
    "A": "only in A",
    "B": "only in B",
    "Z": "A is all zeros, B is not",
    "D": "another dtype or shape",
    "?": "other bytes, of a dtype whose values are not known",
}
"""Letters in cells, the gravest first, and what they say."""

ORDER = "".join(MARKS)


@dataclass(slots=True)
class DiffCell:
    """Some tensors, and how far the worst of them is apart."""

    tensors: int = 0
    different: int = 0
    relative: float = 0.0
    """The largest relative norm of a tensor, as far as it is known."""
    marks: set[str] = field(default_factory=set)

    @property
    def mark(self) -> str:
        """The gravest of its marks; empty without one."""
        return min(self.marks, key=ORDER.index, default="")

    @property
    def level(self) -> int:
        """The level of its colour."""
        if not self.tensors:
            return NOT_THERE
        if not self.different:
            return 0
        return LETTERED if self.marks else 1 + sum(self.relative >= limit for limit in RELATIVE)

    @property
    def rank(self) -> tuple[int, float, int]:
        """The larger, the worse: what has a letter before all that has none."""
        return len(ORDER) - ORDER.index(self.mark) if self.marks else 0, self.relative, self.different

    def add(self, relative: float, mark: str, *, is_equal: bool) -> None:
        """Adds a tensor."""
        self.tensors += 1
        self.different += not is_equal
        self.relative = max(self.relative, relative)
        self.marks |= {*mark}

    def describe(self) -> str:
        """Says in words how far it is apart."""
        if not self.different:
            return "equal"
        words = [MARKS[mark] for mark in ORDER if mark in self.marks]
        share = [format_share(self.relative)] if self.relative or not words else []
        return ", ".join([*share, *words])


class CellTable(NamedTuple):
    """Cells by row and column."""

    heading: str
    """The things that the columns number, such as `model.layers`; empty for what is in no layer."""
    rows: Mapping[str, Mapping[str, DiffCell]]
    """The worst row first."""
    columns: Sequence[str]
    """In the order of their numbers."""

    @property
    def cells(self) -> Iterator[tuple[str, str, DiffCell]]:
        """All cells that are there, with row and column."""
        return ((row, column, cell) for row, found in self.rows.items() for column, cell in found.items())


def list_states(report: DiffReport) -> Iterator[tuple[str, float, str, bool]]:
    """Lists all tensors: name, relative norm, marks, and whether both sides are equal."""
    yield from ((name, 0.0, "", True) for name in report.equal)
    yield from ((found.name, found.overall.relative_norm or 0.0, find_marks(found), False) for found in report.values)
    yield from ((kind.name, 0.0, "D", False) for kind in report.kinds)
    yield from ((name, 0.0, "A", False) for name in report.only_a)
    yield from ((name, 0.0, "B", False) for name in report.only_b)


def find_marks(found: ValueDifference) -> str:
    """The letters of a tensor with other values."""
    unusual, overall = found.apart.unusual, found.overall
    marks = "N" * any(unusual.nans) + "I" * bool(unusual.infinite)
    if overall.relative_norm is None and not marks:
        return "Z" if overall.rmse else "?"
    return marks


def tabulate_modules(report: DiffReport) -> list[CellTable]:
    """Cells by module and layer, a table for each kind of layer; what is in no layer comes last."""
    tables: dict[str, dict[str, dict[str, DiffCell]]] = {}
    for name, relative, marks, is_equal in list_states(report):
        kind, number, module = split_at_layer(name)
        cell = tables.setdefault(kind, {}).setdefault(module, {}).setdefault(number, DiffCell())
        cell.add(relative, marks, is_equal=is_equal)
    kinds = sorted(tables, key=lambda kind: (not kind, split_numbers(kind)))
    return [arrange_table(kind, tables[kind]) for kind in kinds]


def tabulate_experts(report: DiffReport) -> CellTable | None:
    """Cells by layer and expert; None where experts are not tensors of their own."""
    rows: dict[str, dict[str, DiffCell]] = {}
    for name, relative, marks, is_equal in list_states(report):
        layer, found = name_layer(name), EXPERT.search(name)
        if found and layer and found.start() >= len(layer):
            cell = rows.setdefault(layer, {}).setdefault(found[1], DiffCell())
            cell.add(relative, marks, is_equal=is_equal)
    if not rows:
        return None
    ordered = {layer: rows[layer] for layer in sorted(rows, key=split_numbers)}
    return arrange_table("expert", ordered)._replace(rows=ordered)


def arrange_table(heading: str, rows: Mapping[str, Mapping[str, DiffCell]]) -> CellTable:
    """Arranges rows, the worst first, and columns by their numbers."""
    columns = sorted({column for found in rows.values() for column in found}, key=lambda text: (len(text), text))
    worst = sorted(rows, key=lambda row: max(cell.rank for cell in rows[row].values()), reverse=True)
    return CellTable(heading, {row: rows[row] for row in worst}, columns)


def sort_worst(cells: Iterable[tuple[str, str, DiffCell]]) -> list[tuple[str, str, DiffCell]]:
    """Sorts the cells that differ, the worst first."""
    return sorted((one for one in cells if one[2].different), key=lambda one: one[2].rank, reverse=True)
