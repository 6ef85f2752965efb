"""Finds faults in what a recipe says of its files: their names; and what a right side without ranks cannot have."""

from collections.abc import Iterator, Mapping
from typing import Any

from reshard.formats.json_input import is_plain
from reshard.recipes.flattening import FLATTEN
from reshard.recipes.fusions import FUSED
from reshard.recipes.patterns import PLACEHOLDER
from reshard.recipes.placeholder_checks import Fault

WHOLE_FILE = "model.safetensors"
"""The one name that `files` may have without `{rank}`: loaders find it without an index."""


def check_files(table: Mapping[str, Any]) -> Iterator[Fault]:
    """Finds faults in the names of the files; and in a right side without ranks, what could not be read back."""
    files = table.get("files")
    if files == WHOLE_FILE:
        rows = [row for row in table.get("rules") or () if isinstance(row, list) and row]
        if not any(row[0] in FUSED for row in rows):
            yield ("files",), f"{files!r} without a fused tensor", "a concat or a stack: by it such files are known"
        if any(row[0] == FLATTEN for row in rows):
            yield ("files",), f"{FLATTEN}, with {files!r}", "rank files: of whole files it is not read back"
        for key in ("constants", "scales", "run"):
            if table.get(key):
                yield (key,), f"{key}, with {files!r}", "rank files: of whole files it is not read back"
    elif isinstance(files, str) and not is_files_pattern(files):
        expected = f"a file name with {{rank}}, and perhaps {{ranks}}, that ends in .safetensors; or {WHOLE_FILE}"
        yield ("files",), repr(files), expected
    elif isinstance(files, str) and "{ranks}" not in files and not table.get("describes"):
        yield ("files",), repr(files), "{ranks} in it, or describes = true: else nothing tells that a file is missing"


def is_files_pattern(text: str) -> bool:
    """Whether a text makes a file name for each rank, which no side file can have, and nothing but that."""
    rest = text.replace("{rank}", "", 1).replace("{ranks}", "", 1)
    return (
        {"rank"} <= set(PLACEHOLDER.findall(text)) <= {"rank", "ranks"}
        and not set(rest) & set("{}")
        and is_plain(rest)
        and rest.endswith(".safetensors")
    )
