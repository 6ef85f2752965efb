"""Rows that share a name, of which the config chooses one."""

from typing import Any

import pytest

from reshard.errors import Refused
from reshard.recipes.alternatives import list_rules
from reshard.recipes.recipe import load_recipe, parse_recipe

HEAD = 'name = "x"\nabout = "x"\nleft = "l"\nright = "r"\nfiles = "model{rank}-mp{ranks}.safetensors"\n'


def rows_of(config: dict[str, Any] | None) -> list[tuple[str, str, str]]:
    """The rows of a tied model's two tables that are in force."""
    rules = [rule for _, rule in list_rules(load_recipe("vllm-llama"), config)]
    names = ("model.embed_tokens.weight", "lm_head.weight")
    return [(rule.relation, rule.left, rule.right) for rule in rules if rule.left in names]


def test_the_config_chooses() -> None:
    table, head = "model.embed_tokens.weight", "lm_head.weight"
    assert rows_of({"tie_word_embeddings": True}) == [("same", table, head), ("drop", head, "")]
    for config in ({"tie_word_embeddings": False}, {"tie_word_embeddings": None}, {}, None):
        assert rows_of(config) == [("same", table, table), ("same", head, head)]


def test_rows_that_share_no_name_are_left_to_the_tensors() -> None:
    """Old configs of Llama lack `attention_bias`: then the tensors tell. Three biases share the name on the right."""
    rules = [rule.left for _, rule in list_rules(load_recipe("vllm-llama"), {})]
    assert "model.layers.{i}.self_attn.q_proj.bias" in rules
    assert len(rules) == len(load_recipe("vllm-llama").rules) - 2


def parse_rows(first: str, second: str) -> None:
    """Reads a recipe of two rows that share a name, with these conditions."""
    rows = f'["same", "w", "x", "rows", "", "{first}"],\n["same", "w", "y", "rows", "", "{second}"],\n'
    parse_recipe(f"{HEAD}rules = [\n{rows}]\n", "x.toml")


@pytest.mark.parametrize(
    ("first", "second"),
    [("if a", "if a"), ("if a", "unless b"), ("if a", "maybe"), ("maybe if a", "unless a"), ("unless a", "unless a")],
)
def test_only_opposites_may_share_a_name(first: str, second: str) -> None:
    parse_rows("if a", "unless a")
    parse_rows("unless a.b", "if a.b")
    with pytest.raises(Refused) as refused:
        parse_rows(first, second)
    assert {problem.expected for problem in refused.value.problems} == {"each name in one row"}
