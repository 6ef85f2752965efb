"""Formats bytes as bars on a terminal that can show them: each dtype, which is the legend, and each file."""

import sys
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import NamedTuple, TextIO
from unicodedata import combining, east_asian_width

from reshard.cli.painting import has_screen, paint_part
from reshard.formats.huggingface import SUFFIX
from reshard.text import escape, format_count, format_size, measure_terminal, round_to_total, shorten_name

BLOCKS, PLAIN = "█▓▒░▚▖", "#=+-%."
"""What stands for each dtype, the one with most bytes first; any further ones share the last. A dtype is told by these,
and not by its colour alone."""

COLORS = "36", "33", "35", "34", "37", "90"
"""Of the dtypes, by their numbers in an escape sequence. Green and red are for verdicts."""

NARROWEST = 40
"""In columns: nothing is drawn on a narrower terminal."""

WIDEST_BAR, SHORTEST_BAR = 100, 8
"""In columns. Where less is left beside the name of a file, its bar stands on a line of its own."""

MOST_FILES = 16
"""Of more files those with equal parts share a line, and at most so many lines are drawn."""

UNEVEN = 1
"""In percent: files that differ by so much from the median say so."""


class FileParts(NamedTuple):
    """The bytes of a file, or of each of several files that are alike."""

    label: str
    parts: Mapping[str, int]
    """By dtype, in bytes; headers do not count."""
    files: int = 1

    @property
    def size(self) -> int:
        """In bytes, of each file."""
        return sum(self.parts.values())


def format_bars(parts: Iterable[FileParts]) -> list[str]:
    """Formats the dtypes of all files, and the files, after an empty line. Nothing where standard output is no terminal
    that can show them: a pipe or a file gets no line more, and `parts` is not measured for it.
    """
    width, sizes = measure_terminal(), Counter[str]()
    if width < NARROWEST or not has_screen(sys.stdout):
        return []
    files = list(parts)
    for file in files:
        sizes.update(file.parts)
    if not sizes.total():
        return []
    dtypes = [dtype for dtype, _ in sizes.most_common()]
    glyphs = choose_glyphs(sys.stdout)
    marks = {dtype: glyphs[min(place, len(glyphs) - 1)] for place, dtype in enumerate(dtypes)}
    return ["", *format_dtype_bars(sizes, marks, width), "", *format_file_bars(files, marks, width)]


def choose_glyphs(stream: TextIO) -> str:
    """Chooses blocks, or where the encoding of a stream has none, letters."""
    try:
        BLOCKS.encode(stream.encoding)
    except (UnicodeEncodeError, LookupError):
        return PLAIN
    return BLOCKS


def format_dtype_bars(sizes: Mapping[str, int], marks: Mapping[str, str], width: int) -> Iterator[str]:
    """Formats the bytes of each dtype. A whole bar is all bytes."""
    total = sum(sizes.values())
    yield "tensors by dtype:"
    ordered = [(dtype, sizes[dtype]) for dtype in marks]
    rows = [(f"{marks[dtype]} {dtype}", format_size(size), round_percent(size, total)) for dtype, size in ordered]
    bars = [({dtype: size}, total) for dtype, size in ordered]
    yield from format_bar_rows(rows, bars, marks, width)


def format_file_bars(files: Sequence[FileParts], marks: Mapping[str, str], width: int) -> Iterator[str]:
    """Formats the files, each with its dtypes. A whole bar is the largest of them."""
    total, middle = sum(file.size for file in files), sorted(file.size for file in files)[len(files) // 2]
    uneven = [file for file in files if is_uneven(file, middle)]
    groups = group_files(files) if len(files) > MOST_FILES else files
    shown = choose_shown(groups, middle)
    largest = max(file.size for file in files)
    yield "tensors by file" + (" (+N%: over the median):" if uneven else ":")
    rows = []
    for file in shown:
        more = f"{(file.size - middle) / middle:+.0%}" if is_uneven(file, middle) else ""
        row = file.label, format_size(file.size), round_percent(file.size, total)
        rows.append((*row, more) if uneven else row)
    yield from format_bar_rows(rows, [(file.parts, largest) for file in shown], marks, width)
    if left := [file for file in groups if file not in shown]:
        count, sizes = sum(file.files for file in left), sorted(file.size for file in left)
        yield f"and {format_count(count, 'more files')}, {format_size(sizes[0])} to {format_size(sizes[-1])} each"


def is_uneven(file: FileParts, middle: int) -> bool:
    """Whether a file is not as large as most others; `middle` is their median, in bytes."""
    return bool(middle) and abs(file.size - middle) * 100 >= UNEVEN * middle


def group_files(files: Sequence[FileParts]) -> list[FileParts]:
    """Groups the files whose parts are equal, in the order of the first of each."""
    alike: dict[tuple[tuple[str, int], ...], list[FileParts]] = {}
    for file in files:
        alike.setdefault(tuple(sorted(file.parts.items())), []).append(file)
    return [
        first._replace(label=f"{first.label} and {len(more)} alike, each", files=1 + len(more)) if more else first
        for first, *more in alike.values()
    ]


def choose_shown(groups: Sequence[FileParts], middle: int) -> list[FileParts]:
    """Chooses what to draw, in its order: most files, or the first ones, and what differs most from their median."""
    most = sorted(range(len(groups)), key=lambda place: -groups[place].files)
    distant = sorted(most, key=lambda place: -abs(groups[place].size - middle))
    chosen = list(dict.fromkeys([*most[: MOST_FILES // 2], *distant]))[:MOST_FILES]
    return [groups[place] for place in sorted(chosen)]


def format_bar_rows(
    rows: Sequence[Sequence[str]],
    bars: Sequence[tuple[Mapping[str, int], int]],
    marks: Mapping[str, str],
    width: int,
) -> Iterator[str]:
    """Formats rows, each with its bar at the end, so that who has them read aloud hears the numbers first. `bars` has
    the bytes of each dtype, and the bytes of a whole bar.
    """
    widths = [max(map(measure_columns, column)) for column in zip(*rows, strict=True)]
    is_wide = width - sum(widths) - 2 * len(widths) >= SHORTEST_BAR
    left = width - sum(widths) - 2 * len(widths) if is_wide else width - sum(widths[1:]) - 2 * len(widths)
    for (label, *cells), (parts, whole) in zip(rows, bars, strict=True):
        numbers = "  ".join(cell.rjust(size) for cell, size in zip(cells, widths[1:], strict=True))
        bar = format_bar(parts, whole, marks, min(left, WIDEST_BAR))
        if is_wide:
            yield f"{label}{' ' * (widths[0] - measure_columns(label))}  {numbers}  {bar}".rstrip()
        else:
            yield label
            yield f"  {numbers}  {bar}".rstrip()


def measure_columns(text: str) -> int:
    """Measures the columns of a text on a terminal: a Chinese character has two, an accent by itself none."""
    return sum(0 if combining(letter) else 1 + (east_asian_width(letter) in "WF") for letter in text)


def format_bar(parts: Mapping[str, int], whole: int, marks: Mapping[str, str], width: int) -> str:
    """Formats the parts of a bar, of which `whole` bytes would fill the width."""
    cells = round_to_total([*(parts.get(dtype, 0) for dtype in marks), whole - sum(parts.values())], width)
    drawn = zip(marks.values(), cells[:-1], COLORS + COLORS[-1:] * len(marks), strict=False)
    return "".join(paint_part(mark * count, color, sys.stdout) for mark, count, color in drawn if count)


def round_percent(part: int, whole: int) -> str:
    """Rounds a share, but not to nothing."""
    return "<0.1%" if 0 < part * 2000 < whole else f"{part / whole:.1%}"


def make_label(name: str) -> str:
    """Makes the label of a file: its name without the ending that all have."""
    return escape(shorten_name(name.removesuffix(SUFFIX)))
