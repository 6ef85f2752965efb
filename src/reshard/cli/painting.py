"""Colours on terminals that have them."""

import os
from typing import TextIO

GREEN, RED = "32", "31"
"""Colours by their number in an escape sequence."""


def has_screen(stream: TextIO) -> bool:
    """Whether a stream is a terminal that shows more than lines of text."""
    return stream.isatty() and os.environ.get("TERM", "dumb") != "dumb"


def has_colors(stream: TextIO) -> bool:
    """Whether a stream is a terminal that shows colours, and the user has not switched them off with NO_COLOR."""
    return has_screen(stream) and not os.environ.get("NO_COLOR")


def paint_part(text: str, color: str, stream: TextIO) -> str:
    """Paints a part of a line, which must be escaped already, if the stream has colours."""
    return f"\x1b[{color}m{text}\x1b[0m" if has_colors(stream) else text


def paint(text: str, color: str, stream: TextIO) -> str:
    """Paints the first line of a text, which must be escaped already, if the stream has colours."""
    first, ending, rest = text.partition("\n")
    return f"{paint_part(first, color, stream)}{ending}{rest}"
