"""Parses the values of options: paths, numbers, sizes, shares and ranges. Each function raises argparse's own error."""

import re
from argparse import Action, ArgumentParser, ArgumentTypeError, Namespace
from pathlib import Path
from typing import Any

from reshard.text import ADDRESS, make_path


def parse_word(text: str) -> str:
    """Returns a word that is not empty. Raises ArgumentTypeError."""
    if not text:
        raise ArgumentTypeError("an empty string; is a variable not set?")
    return text


def parse_path(text: str) -> Path | str:
    """Parses a path; an empty string would be the folder that we are in. An address stays as it is: a path would drop
    slashes, and one whose bucket is lacking would lead to another. Raises ArgumentTypeError.
    """
    return text if ADDRESS.fullmatch(parse_word(text)) else Path(text)


def parse_source(text: str) -> Path | str:
    """Parses a path of something to read; an address stays as it is. Raises ArgumentTypeError."""
    return text if ADDRESS.fullmatch(parse_word(text)) else make_path(text)


class KeepOneValue(Action):
    """An option with two spellings: a second value that differs is refused, for the last one would win in silence."""

    def __call__(
        self, parser: ArgumentParser, namespace: Namespace, values: Any, option_string: str | None = None
    ) -> None:
        """Keeps the value. Ends the program if there is another one."""
        known = getattr(namespace, self.dest)
        if known not in (None, values):
            parser.error(f"{option_string} {values}: {known} ranks were asked for already")
        setattr(namespace, self.dest, values)


def parse_number(text: str) -> int:
    """Parses a whole number. Raises ArgumentTypeError."""
    try:
        return int(text)
    except ValueError:
        raise ArgumentTypeError(f"{text!r} is not a number") from None


def parse_positive(text: str) -> int:
    """Parses a whole number from 1 to 9999. Raises ArgumentTypeError."""
    if not re.fullmatch(r"[1-9]\d{0,3}", text):
        raise ArgumentTypeError(f"{text!r} is not a number from 1 to 9999")
    return int(text)


def parse_fraction(text: str) -> Any:
    """Parses a percentage above 0 and up to 100 into a Fraction: `0.5%` -> 1/200. Raises ArgumentTypeError."""
    # Slow to import, and needed for a sample only.
    from fractions import Fraction  # noqa: PLC0415

    found = re.fullmatch(r"([0-9]{1,3}(?:\.[0-9]{1,6})?) ?%", text.strip())
    if not found:
        raise ArgumentTypeError(f"{text!r} is not like 1% or 0.5%")
    value = Fraction(found[1]) / 100
    if not 0 < value <= 1:
        raise ArgumentTypeError(f"{text!r} is out of range: more than 0%, at most 100%")
    return value


UNITS = {
    "": 1,
    **{unit: 1 << 10 * (power + 1) for power, unit in enumerate("kmgt")},
    **{f"{unit}ib": 1 << 10 * (power + 1) for power, unit in enumerate("kmgt")},
    **{f"{unit}b": 1000 ** (power + 1) for power, unit in enumerate("kmgt")},
}
"""Units of size by name in lower case, in bytes. A single letter is the binary unit."""


def parse_size(text: str) -> int:
    """Parses a size into bytes: `256MiB` -> 268435456, `1.5kB` -> 1500, `12` -> 12. Raises ArgumentTypeError."""
    found = re.fullmatch(r"([0-9]{1,15})(?:\.([0-9]{1,9}))?\s*([kmgt](?:i?b)?)?", text.strip().lower())
    if not found:
        units = "KiB, MiB, GiB, TiB (or K, M, G, T), kB, MB, GB, TB, or none for bytes"
        raise ArgumentTypeError(f"{text!r} is not a size like 256MiB or 1.5GB; the units are {units}")
    whole, decimals, unit = found[1], found[2] or "", found[3] or ""
    size: int = int(whole + decimals) * UNITS[unit] // 10 ** len(decimals)
    return size


def parse_numbers(text: str) -> list[int]:
    """Parses numbers and ranges: `0-3,7` -> [0, 1, 2, 3, 7]. Raises ArgumentTypeError."""
    found: set[int] = set()
    for part in text.split(","):
        ends = re.fullmatch(r"(\d{1,6})(?:-(\d{1,6}))?", part.strip())
        if not ends or int(ends[2] or ends[1]) < int(ends[1]):
            raise ArgumentTypeError(f"{text!r} is not like 0-3,7")
        found |= set(range(int(ends[1]), int(ends[2] or ends[1]) + 1))
    return sorted(found)
