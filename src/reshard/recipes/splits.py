"""The splits of a recipe: which dimension is cut, into how many parts."""

ROWS, COLUMNS = 0, 1

DIMENSIONS = {"rows": ROWS, "padded rows": ROWS, "packed rows": ROWS, "columns": COLUMNS}

HALVES = 2
"""What is packed: a gate and what it lets through."""


def dimension_of(split: str) -> int | None:
    """Along which dimension a split cuts; None if it cuts nothing."""
    return ROWS if split.startswith("rows of ") else DIMENSIONS.get(split)


def parts_for(ranks: int, units: int) -> int:
    """Into how many parts so many ranks have a tensor cut: where there are fewer units (heads) than ranks, one for each
    unit, held by several ranks. 0 if neither number divides the other. Without units, one for each rank.
    """
    if not units or units % ranks == 0:
        return ranks
    return units if ranks % units == 0 else 0


SPLITS = ("replicate", "rows", "columns", "padded rows", "packed rows")
