"""Cuts a tensor into its boxes: along a dimension, where no box is in the way, and each piece again. What does not fill
the tensor exactly once is a fault.

    [8, 6] in three boxes:  | 0 0 0 0 | 2 2 |
                            | 1 1 1 1 | 2 2 |     along dimension 1, and the first piece along dimension 0
"""

from collections import Counter
from collections.abc import Sequence
from itertools import islice
from math import prod
from typing import NamedTuple

MOST_CUTS = 8
"""So deep pieces are cut again. A mesh of ranks cuts each dimension once, and each level takes a buffer to read."""

MOST_COMPARED = 2000
"""Boxes that no cut goes through are compared in pairs up to this number."""

Lengths = tuple[int, ...]

Place = tuple[Lengths, Lengths]
"""Offsets and shape of a box, in elements."""


class BoxCut(NamedTuple):
    """A piece of a tensor that consists of smaller pieces, side by side along a dimension."""

    dimension: int
    shape: Lengths
    """In elements."""
    pieces: tuple["BoxCut | int", ...]
    """In their order; a number is a single box, counted without replicas."""


class BoxFlaw(NamedTuple):
    """One reason why boxes do not make up a tensor."""

    kind: str
    """`dimensions`, `outside`, `hole`, `overlap` or `uncut`."""
    place: Place
    """Where in the tensor."""
    boxes: tuple[int, ...]
    """The boxes at fault, counted with replicas."""
    lacking: int = 0
    """Of a hole: its elements, where they are fewer than those of its place."""


class BoxLayout(NamedTuple):
    """How the boxes of a tensor lie in it."""

    shape: Lengths
    """Of the tensor, in elements."""
    copies: tuple[tuple[int, ...], ...]
    """For each box, empty ones left out, its replicas: places in the sequence that was laid out."""
    root: BoxCut | int | None
    """None of an empty tensor, and where there is a fault."""
    faults: tuple[BoxFlaw, ...]


class PlacedBox(NamedTuple):
    """A box within a tensor."""

    begin: Lengths
    end: Lengths
    number: int
    """Counted without replicas."""


def lay_out_boxes(shape: Lengths | None, places: Sequence[Place]) -> BoxLayout:
    """Lays out boxes, of which there is at least one, in a tensor of `shape`; if it is None, it follows from them."""
    ranks = Counter([len(lengths) for place in places for lengths in place] if shape is None else [len(shape)])
    rank = ranks.most_common(1)[0][0]
    if wrong := tuple(number for number, place in enumerate(places) if {*map(len, place)} != {rank}):
        return BoxLayout(shape or (), (), None, (BoxFlaw("dimensions", places[wrong[0]], wrong),))
    ends = [tuple(map(sum, zip(*place, strict=True))) for place in places]
    found = tuple(map(max, zip(*ends, strict=True))) if shape is None else shape
    faults = [
        BoxFlaw("outside", places[number], (number,))
        for number, end in enumerate(ends)
        if min(places[number][0], default=0) < 0 or any(a > b for a, b in zip(end, found, strict=True))
    ]
    numbers: dict[Place, list[int]] = {}
    for number, place in enumerate(places):
        if prod(place[1]):
            numbers.setdefault(place, []).append(number)
    copies = tuple(map(tuple, numbers.values()))
    if faults or not prod(found):
        return BoxLayout(found, copies, None, tuple(faults))
    pieces = [PlacedBox(places[some[0]][0], ends[some[0]], number) for number, some in enumerate(copies)]
    cutter = BoxCutter(copies, faults)
    root = cutter.cut((0,) * len(found), found, pieces, 0)
    return BoxLayout(found, copies, None if faults else root, tuple(faults))


class PieceSplit(NamedTuple):
    """Pieces split along a dimension."""

    dimension: int
    groups: Sequence[Sequence[PlacedBox]]
    """In their order."""
    spans: Sequence[tuple[int, int]]
    """The begin and the end of each group."""
    gaps: Sequence[tuple[int, int]]
    """Where no piece is, all through the region."""


class BoxCutter(NamedTuple):
    """Cuts the pieces of one tensor, and collects the faults."""

    copies: Sequence[Sequence[int]]
    faults: list[BoxFlaw]

    def cut(self, begin: Lengths, end: Lengths, pieces: Sequence[PlacedBox], level: int) -> BoxCut | int | None:
        """Cuts the region from `begin` to `end`, which the pieces should fill. None if it has a fault."""
        if not pieces:
            self.add("hole", begin, end, pieces)
            return None
        if len(pieces) == 1 and pieces[0][:2] == (begin, end):
            return pieces[0].number
        ways = [split_pieces(pieces, place, begin[place], end[place]) for place in range(len(begin))]
        ways.sort(key=lambda way: not way.gaps)  # first a gap that goes all through: it is told as one hole
        for way in ways:
            if way.gaps or len(way.groups) > 1:
                return self.cut_along(way, begin, end, level)
        self.faults.append(self.explain_core(begin, end, pieces))
        return None

    def cut_along(self, way: PieceSplit, begin: Lengths, end: Lengths, level: int) -> BoxCut | None:
        """Cuts a region into groups of pieces; what lies between two groups is a hole."""
        if level == MOST_CUTS:
            self.add("uncut", begin, end, [piece for group in way.groups for piece in group])
            return None

        def replace_bounds(low: int, high: int) -> tuple[Lengths, Lengths]:
            one, other = list(begin), list(end)
            one[way.dimension], other[way.dimension] = low, high
            return tuple(one), tuple(other)

        for gap in way.gaps:
            self.add("hole", *replace_bounds(*gap), [])
        pieces = [
            self.cut(*replace_bounds(*span), group, level + 1)
            for span, group in zip(way.spans, way.groups, strict=True)
        ]
        whole = tuple(piece for piece in pieces if piece is not None)
        is_whole = len(whole) == len(pieces) and not way.gaps
        return BoxCut(way.dimension, measure(begin, end), whole) if is_whole else None

    def explain_core(self, begin: Lengths, end: Lengths, pieces: Sequence[PlacedBox]) -> BoxFlaw:
        """Explains pieces that no cut goes through: two overlap, or there is a hole, or they lie like a pinwheel."""
        lacking = prod(measure(begin, end)) - sum(prod(measure(*piece[:2])) for piece in pieces)
        if pair := find_overlap(pieces):
            low = tuple(map(max, pair[0].begin, pair[1].begin))
            high = tuple(map(min, pair[0].end, pair[1].end))
            return BoxFlaw("overlap", (low, measure(low, high)), self.list_first(pair))
        what = "overlap" if lacking < 0 else "hole" if lacking else "uncut"
        return BoxFlaw(what, (begin, measure(begin, end)), self.list_first(pieces), lacking)

    def add(self, kind: str, begin: Lengths, end: Lengths, pieces: Sequence[PlacedBox]) -> None:
        """Adds a fault of a region."""
        self.faults.append(BoxFlaw(kind, (begin, measure(begin, end)), self.list_first(pieces)))

    def list_first(self, pieces: Sequence[PlacedBox]) -> tuple[int, ...]:
        """The first replica of each piece."""
        return tuple(self.copies[piece.number][0] for piece in pieces)


def measure(begin: Lengths, end: Lengths) -> Lengths:
    """Measures the shape of a region, in elements."""
    return tuple(high - low for low, high in zip(begin, end, strict=True))


def split_pieces(pieces: Sequence[PlacedBox], dimension: int, begin: int, end: int) -> PieceSplit:
    """Splits pieces along a dimension, from `begin` to `end`, so that a cut between two groups goes through none."""
    groups: list[list[PlacedBox]] = []
    spans: list[tuple[int, int]] = []
    gaps: list[tuple[int, int]] = []
    reached = begin
    for piece in sorted(pieces, key=lambda piece: piece.begin[dimension]):
        low, high = piece.begin[dimension], piece.end[dimension]
        if groups and low < reached:
            groups[-1].append(piece)
            spans[-1] = spans[-1][0], max(reached, high)
        else:
            groups.append([piece])
            spans.append((low, high))
            if low > reached:
                gaps.append((reached, low))
        reached = max(reached, high)
    if reached < end:
        gaps.append((reached, end))
    return PieceSplit(dimension, groups, spans, gaps)


def find_overlap(pieces: Sequence[PlacedBox]) -> tuple[PlacedBox, PlacedBox] | None:
    """Finds two pieces that overlap. Beyond MOST_COMPARED pieces it does not look."""
    in_order = sorted(pieces)[: MOST_COMPARED + 1]
    for number, one in enumerate(in_order if len(in_order) <= MOST_COMPARED else ()):
        for other in islice(in_order, number + 1, None):
            if other.begin[0] >= one.end[0]:
                break
            if all(a < d and c < b for a, b, c, d in zip(one.begin, one.end, other.begin, other.end, strict=True)):
                return one, other
    return None
