"""Draft: names of a checkpoint and how they are split -> the TOML text of a recipe. Knows no plan and no checkpoint."""

import json
import re
from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import Any, NamedTuple

from reshard.errors import refuse

OWN = "write a recipe by hand: docs/recipes.md"
WEIGHT, SCALE = ".weight", ".weight_scale_inv"
ATTENTION = re.compile(r"\.(self_)?att(n|ention)\.")
SIZES = {"layers": ("num_hidden_layers",), "experts": ("num_experts", "num_local_experts", "n_routed_experts")}
"""What a config calls how many there are."""
LETTERS = "dsabcfghjklmnoqrtuvwxyz"
"""For holes, in the order in which they are taken: `i` is for layers, `e` for experts, `p` for weights and scales."""
FILES = "model-rank{rank}-of-{ranks}.safetensors"
SIDE_FILES = ("config.json", "generation_config.json", "*token*", "vocab.json", "merges.txt", "chat_template*")


class Kept(NamedTuple):
    """Tensors of a checkpoint whose names differ in their numbers only, and what is to become of them."""

    key: str
    members: Sequence[tuple[str, ...]]
    split: str
    """`by` alone for what is dealt; for what is dropped, the reason."""
    shape: str = ""
    is_scaled: bool = False
    is_dropped: bool = False

    def numbers(self, place: int) -> frozenset[str]:
        """All that stand in a numbered place."""
        return frozenset(member[place] for member in self.members)


Letters = Mapping[tuple[str, frozenset[str]], str]
"""By the text of names up to a number, and all numbers that stand there: the letter of a hole."""


def recipe_text(kept: Sequence[Kept], about: str, config: Mapping[str, Any]) -> str:
    """The recipe as TOML, its columns aligned."""
    letters = letters_of(kept)
    rows = [[quoted(cell) for cell in row_of(kind, letters)] for kind in kept]
    widths = [max(len(row[column]) for row in rows) + 1 for column in range(4)]
    lines = []
    for *cells, last in rows:
        padded = [f"{cell},".ljust(width) for cell, width in zip(cells, widths, strict=False)]
        lines.append(f"[{' '.join([*padded, last])}],")
    head = [*head_lines(kept, about, config), *hole_lines(letters, config)]
    return "\n".join([*head, "", "rules = [", *lines, "]", ""])


def letters_of(kept: Iterable[Kept]) -> Letters:
    """A letter for each numbered place; where some names have but some of its numbers, another for each such choice.

    The first letter of a place is that of all its numbers. Raises Refused if the alphabet is too short.
    """
    choices: dict[str, dict[frozenset[str], None]] = {}
    for kind in kept:
        for place, prefix in enumerate(prefixes(kind.key)):
            choices.setdefault(prefix, {})[kind.numbers(place)] = None
    usual, free = {"layers": "i", "experts": "e"}, iter(LETTERS)
    letters: dict[tuple[str, frozenset[str]], str] = {}
    for prefix, found in choices.items():
        whole = frozenset[str]().union(*found)
        for numbers in dict.fromkeys([whole, *found]):
            own = usual.pop(counted(prefix), "") if numbers == whole else ""
            letters[prefix, numbers] = own or next(free, "")
    if "" in letters.values():
        expected = f"at most {len(LETTERS)}, one for each letter"
        raise refuse("no-split", "names with numbers", f"{len(letters):,} kinds of layers", expected, OWN)
    return letters


def prefixes(key: str) -> list[str]:
    """`layers.#.experts.#.w` -> `layers.#`, `layers.#.experts.#`."""
    return [key[: found.end()] for found in re.finditer(r"(?<!\\)#", key)]


def counted(prefix: str) -> str:
    """`layers.#.experts.#` -> `experts`."""
    return prefix.removesuffix(".#").rpartition(".")[2]


def row_of(kind: Kept, letters: Letters) -> list[str]:
    name, done, letter = "", 0, ""
    for place, prefix in enumerate(prefixes(kind.key)):
        letter = letters[prefix, kind.numbers(place)]
        name += f"{kind.key[done : len(prefix) - 1]}{{{letter}}}"
        done = len(prefix)
    name += kind.key[done:]
    name = name.removesuffix(WEIGHT) + ".{p}" if kind.is_scaled else name
    if kind.is_dropped:
        return ["drop", name, "", kind.split]
    split = f"by {letter}" if kind.split == "by" else kind.split
    return ["same", name, name, split, *([kind.shape] if kind.shape else [])]


def head_lines(kept: Sequence[Kept], about: str, config: Mapping[str, Any]) -> Iterator[str]:
    name = str(config.get("model_type", "derived"))
    yield f"name         = {quoted(name.replace('_', '-') + '-derived')}"  # not to be taken for a packaged one
    yield f"about        = {quoted(about)}"
    yield f"checked      = {quoted('nothing yet: derived')}"
    yield 'left         = "huggingface"'
    yield 'right        = "tensor-parallel"'
    yield f"files        = {quoted(FILES)}"
    yield f"carry        = [{', '.join(map(quoted, SIDE_FILES))}]"
    yield "describes    = true"
    if "num_attention_heads" in config and any(kind.split == "rows" and ATTENTION.search(kind.key) for kind in kept):
        yield f"ranks_divide = [{quoted('num_attention_heads')}]"
    if any(kind.shape for kind in kept):
        yield f"padded       = [{quoted('vocab_size')}]"
    if any(kind.is_scaled for kind in kept):
        block = (config.get("quantization_config") or {}).get("weight_block_size") or 128
        yield ""
        yield f"scales.p = {{ left = {quoted(SCALE[1:])}, right = {quoted(SCALE[1:])}, block = {json.dumps(block)} }}"


def hole_lines(letters: Letters, config: Mapping[str, Any]) -> Iterator[str]:
    yield ""
    whole: dict[str, str] = {}
    for (prefix, numbers), letter in letters.items():
        word = counted(prefix)
        if prefix in whole:
            fields = [f"counts = {quoted(f'some {word}, {letter}')}", f"some_of = {quoted(whole[prefix])}"]
        else:
            whole[prefix] = letter
            size = next((key for key in SIZES.get(word, ()) if config.get(key) == len(numbers)), "")
            fields = [f"counts = {quoted(word)}", *([f"size = {quoted(size)}"] if size else [])]
        yield f"holes.{letter} = {{ {', '.join(fields)} }}"


def quoted(text: str) -> str:
    """A string of TOML."""
    return json.dumps(text, ensure_ascii=False)
