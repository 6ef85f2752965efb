"""Tensors cut in blocks, of which the last rank has fewer; joined last dimensions; a tensor in the first rank alone."""

import json
import shutil
from collections.abc import Callable, Mapping
from math import ceil
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from jobs import Job, convert_checkpoint
from numpy.typing import NDArray
from safetensors.numpy import load_file, save_file

import reshard
from reshard.errors import Refused
from reshard.formats.manifest import compute_manifest_checksum
from reshard.planning.rank_choices import list_rank_choices
from reshard.sources.constants import LARGEST_READ
from reshard.sources.source import read_source
from reshard.types import Layout

Array = NDArray[Any]

HEAD = """
name   = "shares"
about  = "parts that are not alike"
left   = "huggingface"
right  = "shares"
files  = "rank{rank}-of-{ranks}.safetensors"
"""

ROWS: Mapping[str, tuple[tuple[int, ...], str, str, str, tuple[int, int] | None]] = {
    "wide": ((3, 14, 2, 4), "flatten", "dimension 1 in blocks of 2", "U8 [?, ?, ?, 4]", (1, 2)),
    "joined": ((3, 5, 7, 4), "flatten", "dimension 2 in blocks of 1", "U8 [?, ?, ?, 4]", (2, 1)),
    "vector": ((22,), "same", "dimension 0 in blocks of 4", "U8 [?]", (0, 4)),
    "last": ((2, 3, 20), "same", "dimension 2 in blocks of 3", "U8 [?, ?, ?]", (2, 3)),
    "rows": ((6, 4), "flatten", "rows", "U8 [?, 4]", (0, 1)),
    "whole": ((3, 2), "flatten", "replicate", "U8 [3, 2]", None),
    "one": ((5, 6), "same", "first rank", "U8 [?, ?]", None),
    "values": ((4,), "same", "first rank", "U8 [?]", None),
    "boxes": ((2, 3, 4), "flatten", "first rank", "U8 [?, ?, 4]", None),
}
"""By the name of a tensor: its shape, the cells of its row, and the dimension and the block that ranks share it by."""

RANKS = (1, 2, 3)

FIRST = ("one", "values", "boxes")


def write_recipe(folder: Path, rows: str = "") -> str:
    rows = rows or "".join(
        f'["{relation}", "box.{name}", "box.{name}", "{split}", "{shape}"],\n'
        for name, (_, relation, split, shape, _) in ROWS.items()
    )
    path = folder / "shares.toml"
    path.write_text(f"{HEAD}\nrules = [\n{rows}]\n", encoding="utf-8")
    return str(path)


def make_tensors() -> dict[str, Array]:
    random = np.random.default_rng(3)
    return {f"box.{name}": random.integers(1, 256, row[0], np.uint8) for name, row in ROWS.items()}


def write(folder: Path, tensors: Mapping[str, Array]) -> None:
    folder.mkdir()
    save_file(dict(tensors), folder / "model.safetensors", {"format": "pt"})
    (folder / "config.json").write_text("{}", encoding="utf-8")


def share(name: str, tensor: Array, rank: int, ranks: int) -> Array:
    """What a rank should have of a tensor."""
    _, relation, _, _, cut = ROWS[name.removeprefix("box.")]
    if cut:
        dimension, block = cut
        most = ceil(ceil(tensor.shape[dimension] / block) / ranks) * block
        tensor = np.split(tensor, range(most, tensor.shape[dimension], most), dimension)[rank]
    elif name.removeprefix("box.") in FIRST and rank:
        tensor = np.zeros_like(tensor)
    return tensor.reshape(*tensor.shape[:-2], -1) if relation == "flatten" else tensor


def name_rank(rank: int, ranks: int) -> str:
    return f"rank{rank}-of-{ranks}.safetensors"


def require_ranks(folder: Path, tensors: Mapping[str, Array], ranks: int) -> None:
    for rank in range(ranks):
        found = load_file(folder / name_rank(rank, ranks))
        assert found.keys() == tensors.keys()
        for name, tensor in tensors.items():
            assert np.array_equal(found[name], share(name, tensor, rank, ranks)), f"{name} of rank {rank}"


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, str]:
    """A folder with a checkpoint and its files for each number of ranks; and the recipe."""
    folder = tmp_path_factory.mktemp("shares")
    recipe = write_recipe(folder)
    write(folder / "source", make_tensors())
    for ranks in RANKS:
        convert_checkpoint(Job(folder / "source", ranks, recipe=recipe), folder / f"ranks-{ranks}")
    return folder, recipe


def copy_ranks(made: tuple[Path, str], ranks: int, target: Path) -> Path:
    return Path(shutil.copytree(made[0] / f"ranks-{ranks}", target / "ranks"))


@pytest.mark.parametrize("ranks", RANKS)
def test_each_rank_has_its_blocks_and_they_lead_back(made: tuple[Path, str], ranks: int, tmp_path: Path) -> None:
    folder, recipe = made
    require_ranks(folder / f"ranks-{ranks}", make_tensors(), ranks)
    report = reshard.verify(folder / f"ranks-{ranks}", folder / "source", recipe=recipe)
    assert report.problems == ()
    assert report.compared == report.size > 0
    convert_checkpoint(Job(folder / f"ranks-{ranks}", 1, recipe=recipe, to="hf"), tmp_path / "back")
    wanted = (folder / "source" / "model.safetensors").read_bytes()
    assert (tmp_path / "back" / "model.safetensors").read_bytes() == wanted
    assert reshard.verify(tmp_path / "back", folder / f"ranks-{ranks}", recipe=recipe).problems == ()
    assert reshard.verify(folder / f"ranks-{ranks}").problems == ()


@pytest.mark.parametrize("ranks", RANKS)
def test_rank_files_of_others_lead_back_without_config_and_manifest(ranks: int, tmp_path: Path) -> None:
    """The parts together tell the length; and zeros of other ranks are left out."""
    tensors, recipe = make_tensors(), write_recipe(tmp_path)
    (tmp_path / "ranks").mkdir()
    for rank in range(ranks):
        parts = {name: np.ascontiguousarray(share(name, tensor, rank, ranks)) for name, tensor in tensors.items()}
        save_file(parts, tmp_path / "ranks" / name_rank(rank, ranks))
    convert_checkpoint(Job(tmp_path / "ranks", 1, recipe=recipe, to="hf"), tmp_path / "back")
    found = load_file(tmp_path / "back" / "model.safetensors")
    assert found.keys() == tensors.keys()
    assert all(np.array_equal(found[name], tensor) for name, tensor in tensors.items())


@pytest.mark.parametrize(("first", "second"), [(3, 2), (2, 3), (1, 3), (3, 1)])
def test_ranks_of_one_number_become_those_of_another(
    made: tuple[Path, str], first: int, second: int, tmp_path: Path
) -> None:
    convert_checkpoint(Job(made[0] / f"ranks-{first}", second, recipe=made[1]), tmp_path / "again")
    require_ranks(tmp_path / "again", make_tensors(), second)


def test_parts_of_the_last_rank_are_planned_loaded_opened_and_compared(made: tuple[Path, str]) -> None:
    folder, recipe = made
    tensors = make_tensors()
    wanted = {name: share(name, tensor, 2, 3) for name, tensor in tensors.items()}
    for source in (folder / "source", folder / "ranks-2"):
        plan = reshard.plan(source, mp=3, recipe=recipe, ranks=[2])
        assert {tensor.name: tensor.shape for tensor in plan.tensors(0)} == {
            name: part.shape for name, part in wanted.items()
        }
        loaded = reshard.load(source, mp=3, rank=2, recipe=recipe, framework="numpy")
        assert all(np.array_equal(loaded[name], part) for name, part in wanted.items())
    with reshard.open(folder / "ranks-3", recipe=recipe, framework="numpy") as opened:
        for name, tensor in tensors.items():
            assert np.array_equal(opened[name][...], tensor), name
            assert np.array_equal(opened[name][1:], tensor[1:]), name
    report = reshard.diff(folder / "ranks-3", folder / "source", recipe=recipe)
    assert (report.is_same, report.same) == (True, len(tensors))
    choices = list_rank_choices(read_source(folder / "source", recipe), Layout(0))
    sizes = [sum(part.nbytes for part in load_file(folder / f"ranks-{n}" / name_rank(0, n)).values()) for n in RANKS]
    assert [(choice.ranks, choice.size) for choice in choices] == list(zip(RANKS, sizes, strict=True))


@pytest.mark.parametrize("name", [name for name in ROWS if name != "whole"])
@pytest.mark.parametrize("rank", [0, 2])
def test_verify_sees_one_wrong_value_in_each_part(made: tuple[Path, str], name: str, rank: int, tmp_path: Path) -> None:
    """Also where zeros should be, in a rank that is not the first."""
    ranks = copy_ranks(made, 3, tmp_path)
    path = ranks / name_rank(rank, 3)
    tensors = load_file(path)
    changed = tensors[f"box.{name}"].copy()
    changed.reshape(-1)[-1] ^= 1
    save_file({**tensors, f"box.{name}": changed}, path)
    for sample in (None, 0.01):
        found = reshard.verify(ranks, made[0] / "source", recipe=made[1], sample=sample).problems
        assert [problem.kind for problem in found] == ["differs"]
        assert f"{path.name}: box.{name}" in found[0].subject


def test_verify_sees_parts_of_another_length_and_shape(made: tuple[Path, str], tmp_path: Path) -> None:
    ranks, tensors = copy_ranks(made, 2, tmp_path), make_tensors()
    path = ranks / name_rank(1, 2)
    wrong = {
        "box.last": np.ascontiguousarray(tensors["box.last"][:, :, 10:]),  # halves
        "box.joined": np.ascontiguousarray(tensors["box.joined"][:, :, 4:]),  # the right bytes, not joined
    }
    save_file({**load_file(path), **wrong}, path)
    found = reshard.verify(ranks, made[0] / "source", recipe=made[1]).problems
    assert [(problem.kind, problem.subject.rpartition(": ")[2]) for problem in found] == [
        ("wrong-shape", "box.joined"),
        ("wrong-shape", "box.last"),
    ]
    assert [problem.expected for problem in found] == ["U8 [3, 5, 12]", "U8 [2, 3, 8]"]


def test_rounding_keeps_to_the_parts(tmp_path: Path) -> None:
    rows = """
["flatten", "box.a", "box.a", "dimension 1 in blocks of 2", "[?, ?, 4]"],
["same",    "box.b", "box.b", "dimension 0 in blocks of 3", "[?, ?]"],
["same",    "box.c", "box.c", "first rank",                 "[?, ?]"],
"""
    recipe = write_recipe(tmp_path, rows)
    random = np.random.default_rng(7)
    shapes = {"box.a": (3, 5, 4), "box.b": (8, 6), "box.c": (3, 2)}
    tensors = {name: random.integers(-99, 99, shape).astype(np.float32) for name, shape in shapes.items()}
    write(tmp_path / "source", tensors)
    convert_checkpoint(Job(tmp_path / "source", 3, recipe=recipe, cast="bf16"), tmp_path / "ranks")
    wanted: dict[str, list[Array]] = {
        "box.a": [part.reshape(3, -1) for part in np.split(tensors["box.a"], [2, 4], 1)],
        "box.b": np.split(tensors["box.b"], [3, 6]),
        "box.c": [tensors["box.c"], np.zeros((3, 2)), np.zeros((3, 2))],
    }
    for rank in range(3):
        with reshard.open(tmp_path / "ranks" / name_rank(rank, 3), framework="numpy") as found:
            for name, parts in wanted.items():
                assert found[name].dtype == "BF16"
                # These whole numbers have eight bits at most: nothing is lost.
                values = (found[name][...].astype(np.uint32) << 16).view(np.float32)
                assert np.array_equal(values, parts[rank]), f"{name} of rank {rank}"
    for sample in (None, 0.01):
        assert reshard.verify(tmp_path / "ranks", tmp_path / "source", recipe=recipe, sample=sample).problems == ()
    path = tmp_path / "ranks" / name_rank(2, 3)
    content = bytearray(path.read_bytes())
    content[-1] ^= 1  # of box.c, where zeros should be
    path.write_bytes(content)
    (problem,) = reshard.verify(tmp_path / "ranks", tmp_path / "source", recipe=recipe).problems
    assert (problem.kind, problem.subject) == ("differs", f"{path.name}: box.c")


@pytest.mark.parametrize("shape", [(2, 7, 1 << 20, 2), (900, 7, 600, 2), (7, 3, 1 << 19, 2)])
def test_parts_longer_or_more_than_a_window_holds(shape: tuple[int, ...], tmp_path: Path) -> None:
    dimension = shape.index(7)
    row = f'["flatten", "box.a", "box.a", "dimension {dimension} in blocks of 1", "U8 [?, ?, ?, 2]"],'
    recipe = write_recipe(tmp_path, row)
    tensor = np.random.default_rng(5).integers(256, size=shape, dtype=np.uint8)
    write(tmp_path / "source", {"box.a": tensor})
    convert_checkpoint(Job(tmp_path / "source", 4, recipe=recipe), tmp_path / "ranks")
    parts = np.split(tensor, [2, 4, 6], dimension)
    for rank, part in enumerate(parts):
        found = load_file(tmp_path / "ranks" / name_rank(rank, 4))["box.a"]
        assert np.array_equal(found, part.reshape(*part.shape[:-2], -1))
    assert reshard.verify(tmp_path / "ranks", tmp_path / "source", recipe=recipe).problems == ()
    convert_checkpoint(Job(tmp_path / "ranks", 1, recipe=recipe, to="hf"), tmp_path / "back")
    assert np.array_equal(load_file(tmp_path / "back" / "model.safetensors")["box.a"], tensor)


# --- what is refused ---


@pytest.mark.parametrize(
    ("length", "block", "works"),
    [(14, 2, "1, 2, 3, 4, 7"), (13, 2, "1, 2, 3, 4, 7"), (5, 1, "1, 2, 3, 5"), (6, 9, "1")],
)
def test_a_rank_that_would_get_nothing_is_refused_with_the_numbers_that_work(
    length: int, block: int, works: str, tmp_path: Path
) -> None:
    recipe = write_recipe(tmp_path, f'["same", "box.a", "box.a", "dimension 1 in blocks of {block}"],')
    write(tmp_path / "source", {"box.a": np.ones((2, length), np.float32)})
    allowed = {int(number) for number in works.split(", ")}
    for ranks in range(1, 2 * length):
        if ranks in allowed:
            assert len(reshard.plan(tmp_path / "source", mp=ranks, recipe=recipe).files) == ranks
            continue
        with pytest.raises(Refused) as caught:
            reshard.plan(tmp_path / "source", mp=ranks, recipe=recipe)
        (problem,) = caught.value.problems
        assert (problem.kind, problem.subject) == (
            "not-divisible",
            f"box.a ({length} in dimension 1 in blocks of {block})",
        )
        assert problem.remedy == f"mp with one of {works}"
        assert "something for each rank" in problem.expected


def test_of_a_length_of_nothing_no_rank_gets_something(tmp_path: Path) -> None:
    recipe = write_recipe(tmp_path, '["same", "box.a", "box.a", "dimension 1 in blocks of 3"],')
    write(tmp_path / "source", {"box.a": np.ones((2, 0), np.float32)})
    with pytest.raises(Refused) as caught:
        reshard.plan(tmp_path / "source", mp=2, recipe=recipe)
    (problem,) = caught.value.problems
    assert (problem.kind, problem.expected) == ("not-divisible", "something for each rank")


@pytest.mark.parametrize(
    ("name", "shapes", "words"),
    [
        ("last", ((2, 3, 10), (2, 3, 10)), ("parts of 10, 10 in the ranks", "12, 8")),
        ("last", ((2, 3, 20), (2, 3, 0)), ("parts of 20, 0 in the ranks", "12, 8")),
        ("last", ((2, 3, 12), (2, 2, 8)), ("U8 [2, 2, 8] and U8 [2, 3, 12]", "one dtype and shape")),
        ("joined", ((3, 5, 14), (3, 5, 14)), ("U8 [3, 5, 14]", "a multiple of 4 at the end")),
        ("wide", ((3, 6, 8), (3, 8, 8)), ("parts of 6, 8 in the ranks", "8, 6")),
        ("one", ((5, 6), (4, 6)), ("U8 [4, 6] and U8 [5, 6]", "one dtype and shape")),
    ],
)
def test_parts_that_no_cut_gives_are_refused(
    made: tuple[Path, str],
    name: str,
    shapes: tuple[tuple[int, ...], ...],
    words: tuple[str, str],
    tmp_path: Path,
) -> None:
    ranks = copy_ranks(made, 2, tmp_path)
    (ranks / "reshard.json").unlink()
    for rank, shape in enumerate(shapes):
        path = ranks / name_rank(rank, 2)
        save_file({**load_file(path), f"box.{name}": np.ones(shape, np.uint8)}, path)
    with pytest.raises(Refused) as caught:
        convert_checkpoint(Job(ranks, 1, recipe=made[1], to="hf"), tmp_path / "back")
    problem = caught.value.problems[0]
    assert problem.kind == "wrong-shape"
    assert f"box.{name}" in problem.subject
    assert words[0] in problem.found
    assert words[1] in problem.expected


def test_a_manifest_does_not_decide_what_the_first_rank_has(made: tuple[Path, str], tmp_path: Path) -> None:
    ranks = copy_ranks(made, 2, tmp_path)
    path = ranks / "reshard.json"
    manifest = json.loads(path.read_text(encoding="utf-8"))
    assert manifest["origin"]["shapes"]["box.one"] == [5, 6]
    manifest["origin"]["shapes"]["box.one"] = [7, 6]
    del manifest["xxh3_128"]
    manifest["xxh3_128"] = compute_manifest_checksum(manifest)
    path.write_text(json.dumps(manifest), encoding="utf-8")
    convert_checkpoint(Job(ranks, 1, recipe=made[1], to="hf"), tmp_path / "back")
    found = load_file(tmp_path / "back" / "model.safetensors")
    assert np.array_equal(found["box.one"], make_tensors()["box.one"])


def write_byte(path: Path, name: str, place: int, value: int) -> None:
    """Writes one byte of a tensor."""
    tensors = load_file(path)
    tensors[name].reshape(-1)[place] = value
    save_file(tensors, path)


def list_readers(recipe: str, folder: Path) -> Mapping[str, Callable[[Path], object]]:
    """What reads rank files, each of a folder. `folder` has the checkpoint of them."""
    return {
        "convert": lambda ranks: reshard.convert(ranks, ranks.parent / "back", to="hf", recipe=recipe),
        "plan": lambda ranks: reshard.plan(ranks, mp=1, recipe=recipe),
        "diff": lambda ranks: reshard.diff(folder / "source", ranks, recipe=recipe),
        "verify": lambda ranks: reshard.verify(folder / "source", ranks, recipe=recipe),
        "load": lambda ranks: reshard.load(ranks, mp=1, rank=0, recipe=recipe),
        "open": lambda ranks: reshard.open(ranks, recipe=recipe),
    }


@pytest.mark.parametrize("reader", list_readers("", Path()))
@pytest.mark.parametrize(("name", "place"), [("one", 29), ("boxes", 3)])
def test_what_is_no_zero_in_another_rank_is_refused(
    made: tuple[Path, str], name: str, place: int, reader: str, tmp_path: Path
) -> None:
    """Only rank 0 is read: the value would be lost without a word."""
    ranks = copy_ranks(made, 3, tmp_path)
    (ranks / "reshard.json").unlink()
    read = list_readers(made[1], made[0])[reader]
    if reader != "convert":  # which writes
        read(ranks)
    write_byte(ranks / name_rank(2, 3), f"box.{name}", place, 1)
    with pytest.raises(Refused) as caught:
        read(ranks)
    (problem,) = caught.value.problems
    assert (problem.kind, problem.subject) == ("wrong-value", f"{name_rank(2, 3)}: box.{name}")
    assert problem.found == f"byte {place} is not zero"
    assert not (tmp_path / "back").exists()


def test_zeros_longer_than_a_read_are_all_looked_at(tmp_path: Path) -> None:
    recipe = write_recipe(tmp_path, '["same", "box.a", "box.a", "first rank"],')
    (tmp_path / "ranks").mkdir()
    size, path = 2 * LARGEST_READ + 5, tmp_path / "ranks" / name_rank(1, 2)
    save_file({"box.a": np.ones(size, np.uint8)}, tmp_path / "ranks" / name_rank(0, 2))
    save_file({"box.a": np.zeros(size, np.uint8)}, path)
    assert reshard.load(tmp_path / "ranks", mp=1, rank=0, recipe=recipe)["box.a"].sum() == size
    for place in (0, LARGEST_READ - 1, LARGEST_READ, size - 1):
        write_byte(path, "box.a", place, 7)
        with pytest.raises(Refused, match=f"byte {place:,} is not zero"):
            reshard.open(tmp_path / "ranks", recipe=recipe)
        write_byte(path, "box.a", place, 0)


def test_files_under_each_others_names_are_refused_without_metadata(tmp_path: Path) -> None:
    recipe = write_recipe(tmp_path, '["same", "box.a", "box.a", "first rank"], ["same", "box.b", "box.b", "rows"],')
    (tmp_path / "ranks").mkdir()
    for rank, value in enumerate((0, 3)):
        parts = {"box.a": np.full(4, value, np.uint8), "box.b": np.full(4, rank, np.uint8)}
        save_file(parts, tmp_path / "ranks" / name_rank(rank, 2))
    with pytest.raises(Refused) as caught:
        convert_checkpoint(Job(tmp_path / "ranks", 1, recipe=recipe, to="hf"), tmp_path / "back")
    (problem,) = caught.value.problems
    assert (problem.kind, problem.subject) == ("wrong-value", f"{name_rank(1, 2)}: box.a")
    assert "exchanged" in problem.remedy


@pytest.mark.parametrize("ranks", [1, 2])
@pytest.mark.parametrize("split", ["first rank", "padded rows", "rows padded to 4"])
def test_a_scalar_that_is_to_be_padded_is_refused(split: str, ranks: int, tmp_path: Path) -> None:
    recipe = write_recipe(tmp_path, f'["same", "box.a", "box.a", "{split}", "[n]"],')
    (tmp_path / "ranks").mkdir()
    for rank in range(ranks):
        save_file({"box.a": np.zeros((), np.float32)}, tmp_path / "ranks" / name_rank(rank, ranks))
    with pytest.raises(Refused) as caught:
        convert_checkpoint(Job(tmp_path / "ranks", 1, recipe=recipe, to="hf"), tmp_path / "back")
    (problem,) = caught.value.problems
    assert (problem.kind, problem.subject, problem.found) == ("wrong-shape", "box.a", "[] in a rank")
    assert problem.expected == f"at least 1 dimensions, cut on {split}"


def test_a_last_dimension_of_another_length_is_refused_without_a_config_too(tmp_path: Path) -> None:
    recipe = write_recipe(tmp_path, '["flatten", "box.a", "box.a", "rows", "U8 [?, 4]"],')
    write(tmp_path / "source", {"box.a": np.ones((6, 5), np.uint8)})
    (tmp_path / "source" / "config.json").unlink()
    with pytest.raises(Refused, match=r"\[\?, 4\], by the recipe"):
        convert_checkpoint(Job(tmp_path / "source", 2, recipe=recipe), tmp_path / "ranks")


def test_a_tensor_without_the_dimension_is_refused(tmp_path: Path) -> None:
    recipe = write_recipe(tmp_path, '["same", "box.a", "box.a", "dimension 2 in blocks of 3"],')
    write(tmp_path / "source", {"box.a": np.ones((4, 6), np.float32)})
    with pytest.raises(Refused, match="at least 3 dimensions"):
        convert_checkpoint(Job(tmp_path / "source", 2, recipe=recipe), tmp_path / "ranks")
