"""Rows that share a name, of which the config chooses one: a tied model's table has another name than an untied one's.

["same", "model.embed_tokens.weight", "model.embed_tokens.weight", "rows", "", "unless tie_word_embeddings"],
["same", "model.embed_tokens.weight", "lm_head.weight",            "rows", "", "if tie_word_embeddings"],
"""

from collections.abc import Iterator, Mapping, Sequence
from itertools import chain
from typing import Any

from reshard.recipe_types import Recipe, Rule


def list_rules(recipe: Recipe, config: Mapping[str, Any] | None) -> Iterator[tuple[int, Rule]]:
    """Lists the rows that may have tensors, with their indices: all, but of two alternatives only the one whose
    condition holds. A key that the config lacks counts as false.
    """
    lefts, rights = ([rule.left for rule in recipe.rules], [rule.right for rule in recipe.rules])
    chosen_by_config = find_alternatives(recipe.rules, lefts) | find_alternatives(recipe.rules, rights)
    for number, rule in enumerate(recipe.rules):
        word, _, key = rule.only.partition(" ")
        if number not in chosen_by_config or bool(get_answer(key, config or {})) == (word == "if"):
            yield number, rule


def find_alternatives(rules: Sequence[Rule], names: Sequence[str]) -> set[int]:
    """Finds the indices of rows that share a name with an alternative; `names` are those of one side."""
    by_name: dict[str, list[int]] = {}
    for number, name in enumerate(names):
        by_name.setdefault(name, []).append(number)
    pairs = [pair for pair in by_name.values() if is_choice_of_config([rules[number].only for number in pair])]
    return set(chain.from_iterable(pairs))


def is_choice_of_config(conditions: Sequence[str]) -> bool:
    """Whether two rows exclude each other: one is `if KEY`, the other `unless KEY`."""
    words = [condition.partition(" ") for condition in conditions]
    return sorted(word for word, _, _ in words) == ["if", "unless"] and len({key for _, _, key in words}) == 1


def get_answer(key: str, config: Mapping[str, Any]) -> bool | None:
    """Returns whether the value of a config key is true; None if the config lacks the key."""
    table: Any = config
    for part in key.split("."):
        # A key whose value is null counts as false (`q_lora_rank` of V2-Lite), and so does all that is within it.
        if table is None:
            return False
        if not isinstance(table, Mapping) or part not in table:
            return None
        table = table[part]
    return bool(table)
