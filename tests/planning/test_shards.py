"""Rows of heads and packed rows, with and without block scales: cut as element by element, put together again, refused.

What a rank should hold is said here in loops over rows; what it holds is read with safetensors.
"""

import json
import tempfile
from pathlib import Path

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from jobs import Job, convert_checkpoint
from safetensors.torch import load_file, save_file
from torch import Tensor
from verified_targets import verify_target

from reshard.errors import Refused
from reshard.planning.rank_checks import list_working_ranks
from reshard.planning.shards import Limit
from reshard.recipes.recipe import load_recipe
from reshard.recipes.splits import count_parts
from reshard.sources.checkpoints import read_checkpoint

RECIPE = """
name = "table"
about = "one tensor"
left = "one"
right = "other"
files = "{rank}-of-{ranks}.safetensors"
padded = ["width"]
scales.p = { left = "weight_scale_inv", right = "weight_scale_inv", block = [%d, 2] }
rules = [["same", "x.{p}", "x.{p}", "%s", "[width, ?]"]]
"""
KINDS = {"not-divisible", "straddles-blocks"}


def write_source(folder: Path, rows: int, columns: int, block: int, *, scaled: bool, heads: int | None) -> None:
    """A tensor of which no two rows are alike, of F8 with block scales or of BF16."""
    folder.mkdir()
    numbers = torch.arange(rows * columns).reshape(rows, columns)
    if scaled:
        shape = -(-rows // block), -(-columns // 2)
        scale = torch.arange(shape[0] * shape[1], dtype=torch.float32).reshape(shape)
        weight = (numbers % 120).to(torch.uint8).view(torch.float8_e4m3fn)
        save_file({"x.weight": weight, "x.weight_scale_inv": scale}, folder / "model.safetensors")
    else:
        save_file({"x.weight": numbers.to(torch.bfloat16)}, folder / "model.safetensors")
    config = {"width": rows, **({} if heads is None else {"heads": heads})}
    (folder / "config.json").write_text(json.dumps(config))


def recipe_file(folder: Path, split: str, block: int) -> str:
    (folder / "table.toml").write_text(RECIPE % (block, split))
    return str(folder / "table.toml")


def rows_held(split: str, rows: int, heads: int, ranks: int, rank: int) -> list[int] | None:
    """The rows of the whole that a rank holds, in their order; None if it would have to cut a head or a row."""
    if split == "packed rows":
        if ranks == 1:
            return list(range(rows))
        if rows % 2 or (rows // 2) % ranks:
            return None
        part = rows // 2 // ranks
        return [half * (rows // 2) + rank * part + row for half in range(2) for row in range(part)]
    if (heads % ranks and ranks % heads) or rows % heads:
        return None if min(heads, ranks) > 1 else (list(range(rows)))
    mine = range(rank * heads // ranks, rank * heads // ranks + max(1, heads // ranks))
    return [row for head in mine for row in range(head * (rows // heads), (head + 1) * (rows // heads))]


def scales_held(held: list[int], block: int, rows: int) -> list[int] | None:
    """The rows of scales that a rank needs: that of row r of its part is r // block, as kernels count; None if no row
    of scales can be so.
    """
    if len(held) == rows:
        return list(range(-(-rows // block)))
    needed: dict[int, set[int]] = {}
    for place, row in enumerate(held):
        needed.setdefault(place // block, set()).add(row // block)
    if any(len(blocks) > 1 for blocks in needed.values()):
        return None
    return [min(needed[place]) for place in sorted(needed)]


def require_ranks(folder: Path, source: Path, split: str, block: int, heads: int, ranks: int) -> None:
    whole = load_file(source / "model.safetensors")
    rows = len(whole["x.weight"])
    for rank in range(ranks):
        found = load_file(folder / f"{rank}-of-{ranks}.safetensors")
        held = rows_held(split, rows, heads, ranks, rank)
        assert held is not None
        require_equal(found["x.weight"], whole["x.weight"], held)
        if "x.weight_scale_inv" in whole:
            scales = scales_held(held, block, rows)
            assert scales is not None
            require_equal(found["x.weight_scale_inv"], whole["x.weight_scale_inv"], scales)
        assert found.keys() == whole.keys()


def require_equal(found: Tensor, whole: Tensor, rows: list[int]) -> None:
    assert found.shape == (len(rows), whole.shape[1])
    assert found.dtype == whole.dtype
    assert torch.equal(found.view(torch.uint8), whole.view(torch.uint8)[rows])


@given(data=st.data())
@settings(max_examples=40)
@pytest.mark.parametrize("split", ["rows of heads", "packed rows"])
def test_what_each_rank_holds_and_what_they_make_together(split: str, data: st.DataObject) -> None:
    heads, ranks = data.draw(st.integers(1, 8)), data.draw(st.integers(1, 12))
    rows = data.draw(st.integers(1, 24)) if split == "packed rows" else heads * data.draw(st.integers(1, 9))
    block = data.draw(st.integers(1, 6)) if data.draw(st.booleans()) else 0
    require_right(split, rows, data.draw(st.integers(1, 5)), block, heads, ranks, data.draw(st.integers(1, 12)))


@pytest.mark.parametrize(
    ("split", "rows", "block", "heads", "ranks", "again"),
    [
        # Two ranks share a head, and two heads a block: four ranks share a scale.
        ("rows of heads", 4, 4, 2, 4, 2),
        ("rows of heads", 8, 4, 4, 8, 2),
        ("rows of heads", 8, 8, 4, 8, 4),
        # A single head for all, of one block and a half.
        ("rows of heads", 6, 4, 1, 3, 1),
        # Heads that are whole blocks, and several heads a rank.
        ("rows of heads", 12, 2, 3, 9, 3),
        ("rows of heads", 16, 2, 4, 2, 8),
        # Heads of a block and a half: one rank alone.
        ("rows of heads", 12, 4, 2, 2, 1),
        # Whole blocks of each half, and less than that.
        ("packed rows", 16, 2, 1, 4, 2),
        ("packed rows", 16, 4, 1, 2, 1),
        ("packed rows", 8, 4, 1, 2, 1),
        ("packed rows", 8, 8, 1, 2, 1),
        ("packed rows", 12, 4, 1, 3, 1),
        ("packed rows", 7, 4, 1, 1, 1),
    ],
)
def test_heads_and_halves_under_blocks(split: str, rows: int, block: int, heads: int, ranks: int, again: int) -> None:
    require_right(split, rows, 3, block, heads, ranks, again)


def require_right(split: str, rows: int, columns: int, block: int, heads: int, ranks: int, again: int) -> None:
    """A tensor is cut for `ranks`, led back, and cut for `again`; or refused. Without a block it has no scale."""
    with tempfile.TemporaryDirectory() as name:
        folder, side = Path(name), block or 4
        write_source(folder / "source", rows, columns, side, scaled=block > 0, heads=heads)
        recipe = recipe_file(folder, split, side)
        if not fits(split, rows, heads, ranks, block or 1):
            with pytest.raises(Refused) as refused:
                convert_checkpoint(Job(folder / "source", ranks, recipe), folder / "ranks")
            assert {problem.kind for problem in refused.value.problems} <= KINDS
            return
        convert_checkpoint(Job(folder / "source", ranks, recipe), folder / "ranks")
        require_ranks(folder / "ranks", folder / "source", split, side, heads, ranks)
        report = verify_target(folder / "ranks", read_checkpoint(folder / "source"), load_recipe(recipe))
        assert report.problems == ()
        convert_checkpoint(Job(folder / "ranks", 1, recipe, to="hf"), folder / "back")
        wanted = (folder / "source" / "model.safetensors").read_bytes()
        assert (folder / "back" / "model.safetensors").read_bytes() == wanted
        if fits(split, rows, heads, again, block or 1):
            convert_checkpoint(Job(folder / "ranks", again, recipe), folder / "again")
            require_ranks(folder / "again", folder / "source", split, side, heads, again)


def fits(split: str, rows: int, heads: int, ranks: int, block: int) -> bool:
    """Whether every rank can hold its rows, and scales for them, all alike in shape."""
    held = [rows_held(split, rows, heads, ranks, rank) for rank in range(ranks)]
    if any(part is None for part in held) or (split != "packed rows" and parts_are_odd(heads, ranks)):
        return False
    if block == 1 or len(held[0] or []) == rows:
        return True
    part = len(held[0] or []) // (2 if split == "packed rows" else 1)
    # A part that is no whole blocks must lie inside one, in every rank.
    inside = block % part == 0 and split != "packed rows"
    return part % block == 0 or inside


def parts_are_odd(heads: int, ranks: int) -> bool:
    return bool(heads % ranks and ranks % heads)


@pytest.mark.parametrize(
    ("ranks", "heads", "wanted"),
    [(1, 8, 1), (2, 8, 2), (8, 8, 8), (16, 8, 8), (64, 8, 8), (3, 8, 0), (12, 8, 0), (5, 1, 1), (4, 0, 4), (9, 3, 3)],
)
def test_into_how_many_parts_heads_are_cut(ranks: int, heads: int, wanted: int) -> None:
    assert count_parts(ranks, heads) == wanted


@pytest.mark.parametrize(
    ("limits", "wanted"),
    [
        # Two heads of 64: more ranks than heads share them, if they are a multiple.
        ([Limit(128, units=2), Limit(64)], "1, 2, 4, 8, 16, 32, 64"),
        ([Limit(192, units=3), Limit(576)], "1, 3, 6, 9, 12, 18, 24, 36, 48, 72, 96, 144, 192, 288, 576"),
        # One head: any number; what else there is decides.
        ([Limit(4, units=1), Limit(6)], "1, 2, 3, 6"),
        # A head of 64 lies inside a block of 128.
        ([Limit(256, 128, units=4), Limit(8)], "1, 2, 4, 8"),
        ([Limit(288, 128, units=3), Limit(6)], "1"),
        # Of two halves no part may lie inside a block.
        ([Limit(256, 128, whole_blocks=True)], "1, 2"),
        ([Limit(256, 128)], "1, 2, 4, 8, 16, 32, 64, 128, 256"),
        ([Limit(1)], "1"),
    ],
)
def test_the_ranks_that_work(limits: list[Limit], wanted: str) -> None:
    assert list_working_ranks(limits) == wanted


def refusal(
    folder: Path, split: str, ranks: int, rows: int, heads: int | None, *, pad: bool = False, scaled: bool = False
) -> Refused:
    write_source(folder / "source", rows, 2, 4, scaled=scaled, heads=heads)
    recipe = recipe_file(folder, split, 4)
    with pytest.raises(Refused) as refused:
        convert_checkpoint(Job(folder / "source", ranks, recipe, pad=pad), folder / "ranks")
    return refused.value


@pytest.mark.parametrize(
    ("split", "ranks", "rows", "heads", "found"),
    [
        ("rows of heads", 3, 8, 4, ("x.weight (4 heads)", "3 ranks")),
        ("rows of heads", 2, 8, None, ("x.weight", "no heads for 2 ranks")),
        ("rows of heads", 2, 8, 0, ("x.weight", "no heads for 2 ranks")),
        # The config is of another model: a head would be one row and a half.
        ("rows of heads", 2, 6, 4, ("x.weight (6 rows of heads)", "2 ranks")),
        ("packed rows", 2, 5, None, ("x.weight (5 packed rows)", "2 ranks")),
        ("packed rows", 4, 4, None, ("x.weight (4 packed rows)", "4 ranks")),
    ],
)
def test_what_would_cut_a_head_or_mix_the_halves_is_refused(
    split: str, ranks: int, rows: int, heads: int | None, found: tuple[str, str], tmp_path: Path
) -> None:
    refused = refusal(tmp_path, split, ranks, rows, heads)
    (problem,) = refused.problems
    assert (problem.kind, problem.subject, problem.found) == ("not-divisible", *found)


@pytest.mark.parametrize("heads", [None, 0])
def test_the_way_out_of_heads_without_a_number_is_no_number_of_ranks(heads: int | None, tmp_path: Path) -> None:
    refused = refusal(tmp_path, "rows of heads", 2, 8, heads)
    (remedy,) = (problem.remedy for problem in refused.problems)
    assert remedy.endswith(f"one with heads; or --config FOLDER; or give the right key in {tmp_path / 'table.toml'}")


@pytest.mark.parametrize(
    ("split", "rows", "remedy"),
    [("packed rows", 12, "--mp with one of 1"), ("rows", 12, "--mp with one of 1, 3, 6, 12, or --pad")],
)
def test_padding_is_no_way_out_for_halves(split: str, rows: int, remedy: str, tmp_path: Path) -> None:
    refused = refusal(tmp_path, split, 2, rows, None, scaled=True)
    assert [(problem.kind, problem.remedy) for problem in refused.problems] == [("straddles-blocks", remedy)]


def test_halves_are_not_padded(tmp_path: Path) -> None:
    """Zeros behind the last row would make rows of the second half those of the first."""
    refused = refusal(tmp_path, "packed rows", 4, 6, None, pad=True)
    assert [(problem.kind, problem.found) for problem in refused.problems] == [
        ("wrong-option", "6 packed rows padded to 8")
    ]


def test_rank_files_without_a_config_do_not_tell_the_heads(tmp_path: Path) -> None:
    write_source(tmp_path / "source", 8, 2, 4, scaled=False, heads=2)
    recipe = recipe_file(tmp_path, "rows of heads", 4)
    convert_checkpoint(Job(tmp_path / "source", 4, recipe), tmp_path / "ranks")
    (tmp_path / "ranks" / "reshard.json").unlink()
    with pytest.raises(Refused, match=r"no heads in a config\.json"):
        convert_checkpoint(Job(tmp_path / "ranks", 1, recipe, to="hf"), tmp_path / "back")
