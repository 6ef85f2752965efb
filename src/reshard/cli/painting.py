"""Colours for verdicts, on terminals that have them."""

import os
from typing import TextIO

GREEN, RED = "32", "31"
"""Colours by their number in an escape sequence."""


def has_colors(stream: TextIO) -> bool:
    """Whether a stream is a terminal that shows colours, and the user has not switched them off with NO_COLOR."""
    return stream.isatty() and not os.environ.get("NO_COLOR") and os.environ.get("TERM", "dumb") != "dumb"


def paint(text: str, color: str, stream: TextIO) -> str:
    """Paints the first line of a text, which must be escaped already, if the stream has colours."""
    if not has_colors(stream):
        return text
    first, ending, rest = text.partition("\n")
    return f"\x1b[{color}m{first}\x1b[0m{ending}{rest}"
