"""Legends: what the colours of a drawing say, as a list of words beside swatches."""

from collections.abc import Iterable, Sequence

from reshard.pages.heat_map import SHARES
from reshard.pages.markup import Markup, make_element, make_list
from reshard.pages.module_kinds import KINDS
from reshard.text import format_size

LETTERS = "ABCDEFGHIJ"
"""Of the kinds, in their order: a bar shows them in its parts, so that nobody has to tell colours apart."""


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
    steps = [(f"s{level}", "", f"to {format_size(int(share * largest))}") for level, share in enumerate(SHARES, 1)]
    return make_legend([("", "", "nothing"), *steps])


def make_kind_legend(kinds: Sequence[int]) -> Markup:
    """Makes the legend of bars of kinds, which are indices into KINDS."""
    return make_legend((f"k{kind}", LETTERS[kind], KINDS[kind]) for kind in kinds)
