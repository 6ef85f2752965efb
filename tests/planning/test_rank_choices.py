"""The numbers of ranks that `plan` lists, and refusals of others: against plans that are made in full."""

from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import pytest
from small_models import write_model

from reshard import api
from reshard.errors import Refused
from reshard.planning.options import choose_subset
from reshard.planning.plan import Plan
from reshard.planning.rank_choices import MOST_TRIED, RankChoice, list_rank_choices
from reshard.sources.source import read_source
from reshard.synthetic import DEEPSEEK_V3, write_checkpoint
from reshard.types import Layout

MOST_PLANNED = 17
"""Numbers of ranks that are planned in full, one after the other."""
Options = Mapping[str, Any]


@pytest.fixture(scope="module")
def v3(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """DeepSeek-V3 in its full width, but with fewer layers, of holes."""
    folder = tmp_path_factory.mktemp("wide") / "deepseek-v3"
    write_checkpoint(folder, {**DEEPSEEK_V3, "num_hidden_layers": 5}, 2, sparse=True)
    return folder


def list_choices(source: Path, options: Options) -> tuple[RankChoice, ...]:
    layout = Layout(0, **{key: value for key, value in options.items() if key != "only"})
    subset = choose_subset(None, None, options.get("only", ()), renumber=False)
    return list_rank_choices(read_source(source), layout, subset.only)


def try_plan(source: Path, ranks: int, options: Options) -> Plan | None:
    try:
        return api.plan(source, mp=ranks, **options)
    except Refused:
        return None


def make_choice(source: Path, ranks: int, options: Options) -> RankChoice | None:
    """By plans: first as it is asked, then with `--pad`."""
    plain = try_plan(source, ranks, {**options, "pad": False})
    plan = try_plan(source, ranks, options) or try_plan(source, ranks, {**options, "pad": True})
    if plan is None:
        return None
    sizes = [file.size - len(file.header) for file in plan.files]
    largest = sizes.index(max(sizes))
    return RankChoice(ranks, plain is None, len(plan.files[largest].pieces), sizes[largest])


@pytest.mark.parametrize(
    ("family", "options"),
    [
        ("deepseek-v3", {}),
        ("deepseek-v3-for-32", {}),
        ("deepseek-v3", {"cast": "bf16"}),
        ("deepseek-v3-for-32", {"pad": True}),
        ("deepseek-v3", {"only": ["*.experts.*", "*norm*"]}),
        ("deepseek-v4-flash", {"expert_dtype": "fp8"}),
        ("deepseek-v4.1-flash", {}),
        ("llama", {}),
        ("qwen3-moe", {}),
        ("gpt-oss", {}),
    ],
)
def test_the_choices_are_those_of_full_plans(
    family: str, options: Options, source: Callable[[str], Path], tmp_path: Path
) -> None:
    folder = tmp_path / family
    if family in ("llama", "qwen3-moe", "gpt-oss"):
        write_model(folder, family)
    else:
        folder = source(family)
    found = [choice for choice in list_choices(folder, options) if choice.ranks <= MOST_PLANNED]
    wanted = [make_choice(folder, ranks, options) for ranks in range(1, MOST_PLANNED + 1)]
    assert found == [choice for choice in wanted if choice]
    assert len(found) > 1


def test_some_choices_need_padding(source: Callable[[str], Path]) -> None:
    found = {choice.ranks: choice.needs_pad for choice in list_choices(source("deepseek-v3-for-32"), {})}
    assert (found[16], found[32]) == (False, True)


def test_the_choices_of_the_widths_of_a_large_model(v3: Path) -> None:
    found = {choice.ranks: choice for choice in list_choices(v3, {})}
    assert list(found) == [1, 2, 4, 8, 16, 32, 64]
    assert [ranks for ranks, choice in found.items() if choice.needs_pad] == [32, 64]
    assert max(found) <= MOST_TRIED


def test_a_cast_that_changes_nothing_has_no_choices(tmp_path: Path) -> None:
    write_model(tmp_path / "llama", "llama")
    with pytest.raises(Refused) as refused:
        list_choices(tmp_path / "llama", {"cast": "fp8"})
    (problem,) = refused.value.problems
    assert problem.subject == "--cast"
    assert "leave --cast out" in problem.remedy


# --- refusals ---


@pytest.mark.parametrize("options", [{"keep_mtp": True}, {"cast": "bf16"}])
def test_a_refused_number_of_ranks_fits_a_screen(options: Options, v3: Path) -> None:
    for ranks in (3, 7, 48, 96, 4096):
        with pytest.raises(Refused) as refused:
            api.plan(v3, mp=ranks, **options)
        lines = str(refused.value).splitlines()
        assert len(lines) <= 15
        assert len(refused.value.problems) <= 10
        assert lines[1].startswith("  hint:     --mp with one of 1, 2, 4, 8, 16")


def test_a_refusal_names_layers_weights_and_the_length_of_a_rank(v3: Path) -> None:
    with pytest.raises(Refused) as refused:
        api.plan(v3, mp=32)
    (problem,) = refused.value.problems
    names = "mlp.gate_proj.weight, mlp.up_proj.weight, mlp.down_proj.weight"
    assert problem.subject == f"dense layers 0-2, {names} (576 rows or columns a rank)"
    assert problem.remedy == "--mp with one of 1, 2, 4, 8, 16, or --pad"
    assert len(api.plan(v3, mp=32, pad=True).files) == 32


def test_padding_is_advised_only_where_it_helps(v3: Path) -> None:
    """It would widen the dense layers, but not the heads."""
    with pytest.raises(Refused) as refused:
        api.plan(v3, mp=256)
    assert not any("--pad" in problem.remedy for problem in refused.value.problems)
