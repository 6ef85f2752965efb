"""The table of mutations is true: each fault can be made where it says, and each test that it names is there.

That the tests see the faults, `make mutations` shows: it takes minutes.
"""

import ast
from functools import cache
from pathlib import Path

import pytest
from mutations import MUTATIONS, Mutation, module_path
from repository import ROOT, find_test_file


@cache
def functions(path: Path) -> set[str]:
    return {node.name for node in ast.parse(path.read_text(encoding="utf-8")).body if isinstance(node, ast.FunctionDef)}


@pytest.mark.parametrize("mutation", MUTATIONS, ids=[f"{one.module}-{one.what}" for one in MUTATIONS])
def test_a_mutation_can_be_made_and_has_a_test(mutation: Mutation) -> None:
    text = module_path(ROOT, mutation.module).read_text(encoding="utf-8")
    assert text.count(mutation.before) == 1
    assert ast.dump(ast.parse(text)) != ast.dump(ast.parse(text.replace(mutation.before, mutation.after)))
    file, _, test = mutation.test.partition("::")
    assert test.partition("[")[0] in functions(find_test_file(file))


def test_no_mutation_is_listed_twice() -> None:
    assert len({(one.module, one.before, one.after) for one in MUTATIONS}) == len(MUTATIONS) >= 30


def test_the_page_tells_of_every_mutation() -> None:
    page = (ROOT / "docs" / "mutations.md").read_text(encoding="utf-8")
    for number, mutation in enumerate(MUTATIONS, 1):
        assert f"| {number} | `{mutation.module}` | {mutation.what} | `{mutation.test}` |" in page
