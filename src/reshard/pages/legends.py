"""Legends: what the colours of a drawing say, as a list of words beside swatches; and sizes in decimal units."""

from collections.abc import Iterable, Sequence

from reshard.pages.heat_map import SHARES
from reshard.pages.markup import Markup, make_element, make_list
from reshard.pages.module_kinds import KINDS

LETTERS = "ABCDEFGHIJ"
"""Of the kinds, in their order: a bar shows them in its parts, so that nobody has to tell colours apart."""

UNITS = ("bytes", "kB", "MB", "GB", "TB", "PB")


def format_decimal(size: float) -> str:
    """Formats a size of bytes in powers of 1000, as GPUs are sold: `43.21 GB`, `12 bytes`."""
    unit = 0
    while size >= 999.995 and unit < len(UNITS) - 1:
        size, unit = size / 1000, unit + 1
    return f"{size:,.2f} {UNITS[unit]}" if unit else f"{size:.0f} bytes"


def make_legend(words: Iterable[tuple[str, str, str]]) -> Markup:
    """Makes a legend of the class, the letter and the words of each colour."""
    return make_list(
        (
            make_element("span", make_element("span", letter, class_=f"swatch {kind}"), text)
            for kind, letter, text in words
        ),
        class_="legend",
    )


def make_size_legend(largest: int) -> Markup:
    """Makes the legend of a heat map of sizes; `largest` is that of a cell, in bytes."""
    steps = [(f"s{level}", "", f"to {format_decimal(share * largest)}") for level, share in enumerate(SHARES, 1)]
    return make_legend([("s0", "", "nothing"), *steps])


def make_kind_legend(kinds: Sequence[int]) -> Markup:
    """Makes the legend of bars of kinds, which are indices into KINDS."""
    return make_legend((f"k{kind}", LETTERS[kind], KINDS[kind]) for kind in kinds)
