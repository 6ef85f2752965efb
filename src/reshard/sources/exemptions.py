"""The modules that a `quantization_config` leaves as they are: lists of names and patterns, which strangers wrote."""

import re
from collections.abc import Iterator, Mapping
from fnmatch import translate
from typing import Any, NamedTuple, TypeGuard

EXEMPT_KEYS = ("modules_to_not_convert", "ignored_layers", "ignore")
"""Config keys that list the modules without block scales; each quantizer has its own key."""

OTHER_EXEMPT_KEYS = ("exclude", "exclude_modules", "llm_int8_skip_modules")
"""The same of quantizers without block scales."""

REGEX, EXCLUDED = "re:", "-:"
"""How a pattern begins that is a regular expression, in compressed-tensors; and an excluding one, in GPTQModel."""

SIMPLE_REGEX = re.compile(r"(\^?)((?:\\\.|\.\*|[\w.-])*)(\$?)")
"""A regular expression that is as good as a shell pattern. Others are not run: one can take hours."""

GLOB = re.compile(r"[\w.*?-]+")
"""A shell pattern, as ModelOpt has them, or a name."""

CLASS = re.compile(r"[A-Z]\w*")
"""The name of a class of modules, such as `Linear`: which modules are of it is not known here."""

AS_GLOB = {r"\.": ".", ".*": "*", ".": "?"}


class Exemptions(NamedTuple):
    """The exempt modules."""

    words: tuple[str, ...]
    """Parts of their names."""
    patterns: tuple[re.Pattern[str], ...]
    """Of their whole names."""
    are_clear: bool
    """Whether all is understood: if not, any module may be exempt."""

    def cover(self, tensor: str) -> bool:
        """Whether a tensor is of an exempt module."""
        module = tensor.removesuffix(".weight")
        return any(word in tensor for word in self.words) or any(one.match(module) for one in self.patterns)


def read_exemptions(table: Mapping[str, Any]) -> Exemptions:
    """Reads the exempt modules of a quantization."""
    inner = table.get("quantization")
    entries = [*list_exempt_entries(table), *(list_exempt_entries(inner) if isinstance(inner, Mapping) else ())]
    globs = [make_glob(entry) for entry in entries]
    words = tuple(glob for glob in globs if glob and not set(glob) & set("*?"))
    patterns = tuple(re.compile(translate(glob)) for glob in globs if glob and set(glob) & set("*?"))
    return Exemptions(words, patterns, None not in globs and not has_own_choice(table))


def list_exempt_entries(table: Mapping[str, Any]) -> Iterator[str]:
    """Lists the names and patterns. Anything else in the place of a list, or of a name in it, exempts nothing."""
    for key in (*EXEMPT_KEYS, *OTHER_EXEMPT_KEYS):
        value = table.get(key)
        yield from (entry for entry in value if isinstance(entry, str)) if isinstance(value, list) else ()


def make_glob(entry: str) -> str | None:
    """Makes a shell pattern, or a name, of an entry; None if it is not understood. A regular expression is matched from
    the beginning of a name on, to any end.
    """
    if entry.startswith(REGEX):
        found = SIMPLE_REGEX.fullmatch(entry, len(REGEX))
        if not found:
            return None
        glob = re.sub(r"\\\.|\.\*|\.", lambda part: AS_GLOB[part[0]], found[2])
        return glob if found[3] else f"{glob}*"
    return entry if GLOB.fullmatch(entry) and not CLASS.fullmatch(entry) else None


def has_own_choice(table: Mapping[str, Any]) -> bool:
    """Whether a quantization chooses its modules in another way than by a list of exempt ones."""
    groups, rules = table.get("config_groups"), table.get("dynamic")
    targets = [group.get("targets") for group in groups.values() if isinstance(group, dict)] if is_table(groups) else []
    return (
        any(target is not None and (not isinstance(target, list) or "Linear" not in target) for target in targets)
        or (is_table(rules) and any(key.startswith(EXCLUDED) for key in rules))
        or any(value is False and "." in key for key, value in table.items())  # MLX: a module of its own
        or (is_table(table.get("layer_quant_config")) and not is_table(table.get("global_quant_config")))
    )


def is_table(value: Any) -> TypeGuard[Mapping[str, Any]]:
    """Whether a value of JSON is an object."""
    return isinstance(value, Mapping)
