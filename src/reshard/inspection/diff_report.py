"""The report of a comparison, and its verdict in one line. Knows nothing of files."""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

from reshard.inspection.diff_groups import GroupDifference
from reshard.inspection.tensor_pairs import KindDifference, LeftAside
from reshard.inspection.value_distance import ValueDistance
from reshard.inspection.value_sums import OverallDistance, add_unusual
from reshard.text import escape, format_count, shorten_name
from reshard.types import Note


@dataclass(frozen=True, slots=True)
class ValueDifference:
    """A tensor whose elements differ."""

    name: str
    dtype: str
    """The dtype of the compared elements: F4 for packed I8, BF16 for dequantized weights."""
    elements: int
    apart: ValueDistance
    """Of the elements that differ."""
    overall: OverallDistance
    """Of the whole tensor."""
    is_coded: bool
    """Whether the elements are codes, which become numbers only with the block scales; all measures are of codes."""


@dataclass(frozen=True, slots=True, repr=False)
class DiffReport:
    """The result of comparing two checkpoints: how many tensors are equal, and every difference."""

    a: str
    b: str
    """The paths."""
    recipes: tuple[str, str]
    """The recipe that the rank files of each side were read with; empty for other layouts."""
    same: int
    """The number of tensors that are equal, bit by bit."""
    compared: int
    """The bytes that were compared, of one side."""
    dequantized: int
    """The number of tensors that were dequantized to be compared, equal or not."""
    rounded: int
    """The number of tensors that were rounded to BF16 to be compared, equal or not; dequantized ones do not count."""
    values: tuple[ValueDifference, ...]
    """The most different first: with NaNs and infinities, then by the relative norm."""
    kinds: tuple[KindDifference, ...]
    only_a: tuple[str, ...]
    only_b: tuple[str, ...]
    layers: tuple[GroupDifference, ...]
    """All layers, and what is in none, the most different first."""
    modules: tuple[GroupDifference, ...]
    """All tensors by their names without the numbers, the most different first."""
    left_aside: tuple[LeftAside, ...] = ()
    """Tensors that stand in the files of a side and were not compared."""
    equal: tuple[str, ...] = ()
    """The names of the tensors that are equal, bit by bit."""
    notes: tuple[Note, ...] = ()
    """What was left aside of a side, which is named first; and that names were changed to be compared."""

    @property
    def is_same(self) -> bool:
        """Whether there is no difference at all."""
        return not (self.values or self.kinds or self.only_a or self.only_b)

    @property
    def different(self) -> int:
        """The number of tensors that are not equal, or on one side only."""
        return len(self.values) + len(self.kinds) + len(self.only_a) + len(self.only_b)

    @property
    def worst(self) -> ValueDifference | None:
        """The one of `values` with the largest relative norm; those with NaNs and infinities may stand before it."""
        known = [found for found in self.values if found.overall.relative_norm is not None]
        return max(known, key=lambda found: found.overall.relative_norm or 0, default=None)

    @property
    def counts(self) -> dict[str, int]:
        """The number of tensors that are equal, and of each kind of difference."""
        return {
            "the same": self.same,
            "other values": len(self.values),
            "other dtype or shape": len(self.kinds),
            "only in A": len(self.only_a),
            "only in B": len(self.only_b),
        }

    def __str__(self) -> str:
        counts = ", ".join(f"{count:,} {kind}" for kind, count in self.counts.items() if count)
        return escape(f"{self.a} and {self.b}: {describe_verdict(self)} ({counts or 'no tensors'})")

    __repr__ = __str__


def describe_verdict(report: DiffReport) -> str:
    """Describes a report in one line."""
    if report.is_same:
        parts = [f"same: {format_count(report.same, 'tensors')}, equal bit by bit"]
    else:
        verb = "differs" if report.different == 1 else "differ"
        total = format_count(report.same + report.different, "tensors")
        parts = [f"different: {report.different:,} of {total} {verb}", *describe_unusual(report.values)]
        # With NaNs, all other numbers may be equal.
        if (worst := report.worst) and (worst.overall.relative_norm or len(parts) == 1):
            share = format_share(worst.overall.relative_norm or 0)
            parts.append(f"the largest relative norm of a difference is {share} in {shorten_name(worst.name)}")
    parts += [f"{left.side} holds {len(left.names):,} more {left.reason}" for left in report.left_aside]
    return "; ".join(parts)


def describe_unusual(values: Sequence[ValueDifference]) -> Iterator[str]:
    """Describes the NaNs and infinities among the elements that differ, and the tensors that have them."""
    odd = [found for found in values if found.apart.unusual.is_any]
    if not odd:
        return
    (a, b), infinite = add_unusual(found.apart.unusual for found in odd)
    counts = []
    if a and b:
        counts.append(f"{format_count(a, 'NaNs')} in A and {b:,} in B")
    elif a or b:
        counts.append(f"{format_count(a or b, 'NaNs')} only in {'A' if a else 'B'}")
    if infinite:
        counts.append(f"{infinite:,} infinite on a side")
    more = f" and {format_count(len(odd) - 1, 'more tensors')}" if len(odd) > 1 else ""
    yield f"{', '.join(counts)}, in {shorten_name(odd[0].name)}{more}"


def format_share(share: float) -> str:
    """Formats a share as a percentage with two digits or more: `0.31 %`, `150 %`, `3e-06 %`."""
    return f"{100 * share:.3g} %" if share < 10 else f"{100 * share:.0f} %" if share < 1e4 else f"{share:.3g} times"
