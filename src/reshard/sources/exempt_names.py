"""The modules that a config exempts from quantization, under other names: as the tensors are renamed, so are these."""

from bisect import bisect_left
from collections.abc import Callable, Collection, Mapping, Sequence
from typing import Any

from reshard.formats.renaming import Renaming, rename_all
from reshard.sources.exemptions import EXEMPT_KEYS
from reshard.sources.quantization_config import CONFIG_KEYS

Change = Callable[[Sequence[Any]], list[Any]]
"""Of a list of exempt modules."""

LEAF = ".weight"
"""Stands for the tensors of a module, so that its name is changed as theirs are."""


def rename_exempt_modules(
    config: Mapping[str, Any] | None, names: Collection[str], renaming: Renaming
) -> Mapping[str, Any] | None:
    """Renames the exempt modules of a config as `renaming` does the tensors, whose old names are `names`. A loader
    would else take an unquantized module for a quantized one. The config itself comes back if nothing is to be renamed.

    A module stays if no tensor has its name in front: many configs have the names of the recipe already.
    """
    dotted = sorted(name + "." for name in names)
    return replace_exempt_modules(config, lambda modules: rename_modules(modules, dotted, renaming))


def replace_exempt_modules(config: Mapping[str, Any] | None, change: Change) -> Mapping[str, Any] | None:
    """Replaces each list of exempt modules in a config, at the top and in `text_config`, by a function. The config
    itself comes back if all stay.
    """
    if config is None:
        return None
    tables = {key: config[key] for key in CONFIG_KEYS if isinstance(config.get(key), dict)}
    changed = {key: replace_in_table(table, change) for key, table in tables.items()}
    if isinstance(text := config.get("text_config"), dict):
        inner = {key: replace_in_table(text[key], change) for key in CONFIG_KEYS if isinstance(text.get(key), dict)}
        tables["text_config"], changed["text_config"] = text, {**text, **inner}
    return config if changed == tables else {**config, **changed}


def replace_in_table(table: Mapping[str, Any], change: Change) -> dict[str, Any]:
    """Replaces the lists of exempt modules in one table of a quantization; other entries than texts stay."""
    lists = {key: table[key] for key in EXEMPT_KEYS if isinstance(table.get(key), list)}
    return {**table, **{key: change(modules) for key, modules in lists.items()}}


def rename_modules(modules: Sequence[Any], names: Sequence[str], renaming: Renaming) -> list[Any]:
    """Renames those modules that tensors begin with; `names` as for `has_tensors_of`. What follows a `.*` stays."""
    found = list(modules)
    for place, module in enumerate(modules):
        if isinstance(module, str):
            before, star, rest = module.partition(".*")  # `model.language_model.visual.*` is a pattern
            if has_tensors_of(before, names):
                found[place] = rename_module(before, renaming) + star + rest
    return found


def has_tensors_of(module: str, names: Sequence[str]) -> bool:
    """Whether a tensor is of that module, or is what it names; `names` are sorted, each with a dot behind."""
    place = bisect_left(names, module + ".")
    return place < len(names) and names[place].startswith(module + ".")


def rename_module(module: str, renaming: Renaming) -> str:
    """Renames a module, or a tensor, as the tensors of a module are; one that is nothing but the prefix stays."""
    (renamed,) = rename_all([module + LEAF], renaming)
    return renamed.removesuffix(LEAF) if renamed.endswith(LEAF) and len(renamed) > len(LEAF) else module
