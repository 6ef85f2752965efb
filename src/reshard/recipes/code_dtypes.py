"""The dtypes that the parameters of the inference code have, as a recipe lists them by names of the right side."""

from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import replace
from fnmatch import fnmatchcase
from typing import Any

from reshard.formats.safetensors import BITS
from reshard.recipe_types import Rule
from reshard.recipes.formulas import parse_shape
from reshard.recipes.placeholder_checks import Fault

KEY = "code_dtypes"

OTHERS = "others"
"""Key of the dtype of all parameters that no list names. With it the dtype of every parameter is known."""


def set_code_dtypes(rules: Iterable[Rule], dtypes: Mapping[str, Any]) -> Iterator[Rule]:
    """Gives each rule the dtype of its parameter: by the lists, else by its shape cell, else that of `others`."""
    for rule in rules:
        own = parse_shape(rule.shape)[0] if rule.shape else ""
        listed = find_dtypes(rule.right, dtypes)
        dtype = listed[0] if listed else own or dtypes.get(OTHERS, "")
        yield rule if rule.relation == "drop" else replace(rule, code_dtype=dtype)


def find_dtypes(right: str, dtypes: Mapping[str, Any]) -> list[str]:
    """The dtypes that list a right name; a sound recipe has at most one."""
    lists = {dtype: patterns for dtype, patterns in dtypes.items() if dtype != OTHERS}
    return [dtype for dtype, patterns in lists.items() if any(fnmatchcase(right, pattern) for pattern in patterns)]


def check_code_dtypes(dtypes: Any) -> Iterator[Fault]:
    """Faults in the table: it is lists of patterns by dtype, and perhaps one dtype for all others."""
    if not isinstance(dtypes, dict):
        yield (KEY,), repr(dtypes), f"{KEY}: a table of lists of names"
        return
    for dtype, patterns in dtypes.items():
        if dtype == OTHERS:
            if not isinstance(patterns, str) or patterns not in BITS:
                yield (KEY, dtype), repr(patterns), "a dtype: " + ", ".join(BITS)
        elif dtype not in BITS:
            yield (KEY, dtype), repr(dtype), f"{OTHERS}, or a dtype: " + ", ".join(BITS)
        elif not isinstance(patterns, list) or not all(isinstance(pattern, str) for pattern in patterns):
            yield (KEY, dtype), repr(patterns), "a list of right names, or of shell patterns of them"


def check_listed_names(dtypes: Mapping[str, Any], rights: Sequence[str]) -> Iterator[Fault]:
    """Faults in the lists of a sound table: a pattern that no right name fits, and a name that two lists name."""
    for dtype, patterns in dtypes.items():
        for pattern in patterns if dtype != OTHERS else ():
            if not any(fnmatchcase(right, pattern) for right in rights):
                yield (KEY, dtype), repr(pattern), "the right name of a row, or a shell pattern of some"
    for right in rights:
        if len(found := find_dtypes(right, dtypes)) > 1:
            yield (KEY, found[1]), f"{right!r}, listed as {' and '.join(found)}", "each name in one list"
