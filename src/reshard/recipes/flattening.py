"""Flattened tensors: those whose last two dimensions are one on the right side. Their bytes are the same.

    flatten    [experts, rows, blocks, 16]  ->  [experts, rows, blocks * 16]

The way back is told by the row alone: its shape ends in a number.
"""

from collections.abc import Iterator

from reshard.recipe_types import Rule
from reshard.recipes.formulas import parse_shape

FLATTEN = "flatten"
"""The relation of such a row."""


def read_last_length(rule: Rule) -> int:
    """Reads the last length of the left tensors of a row, in elements."""
    return int(parse_shape(rule.shape)[1][-1])


def flatten_shape(shape: tuple[int, ...]) -> tuple[int, ...]:
    """Makes one dimension of the last two."""
    return (*shape[:-2], shape[-2] * shape[-1])


def check_flatten(rule: Rule, *, is_scaled: bool) -> Iterator[tuple[str, str]]:
    """Reports a flattened row whose shape does not tell the way back, or whose last dimension is cut: the found, and
    the expected. `is_scaled`: its weights have block scales.
    """
    try:
        lengths = parse_shape(rule.shape)[1] if rule.shape else []
    except ValueError:
        return  # told with the shape
    if len(lengths) < 2 or not lengths[-1].isdecimal() or not 0 < int(lengths[-1]) < 1 << 31:
        expected = "for flatten, a shape of two dimensions or more that ends in a number, such as [?, 16]"
        yield repr(rule.shape), expected
    elif rule.split.dimension == len(lengths) - 1:
        yield f"{rule.split.text!r} of {rule.shape}", "for flatten, a cut before the last dimension"
    if is_scaled:
        yield repr(rule.left), "`same`: a weight with block scales has two dimensions on both sides"
