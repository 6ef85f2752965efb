"""Targets that were cast, padded, relabelled or kept whole: true ones are proven, and what only numbers tell is seen.

Damage is done to single bytes, or with the safetensors package. What is right is told by the oracles or by torch.
"""

import json
import shutil
from collections.abc import Callable, Mapping
from fractions import Fraction
from functools import cache
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import oracle
import oracle_families
import pytest
import torch
from families import FAMILIES, FEW_V41, write_small
from jobs import Job, convert_checkpoint
from oracle_casts import dequantize, fp4_to_fp8, unpack_fp4
from safetensors.torch import load_file, save_file
from torch import Tensor
from verified_targets import verify_target

from reshard.cli.main import main
from reshard.errors import Refused
from reshard.execution.execute import Settings
from reshard.recipe_types import Recipe
from reshard.recipes.recipe import list_packaged_recipes, load_recipe
from reshard.sources.checkpoints import read_checkpoint
from reshard.sources.recipe_choice import choose_recipe
from reshard.synthetic import write_tensors
from reshard.types import Checkpoint
from reshard.verification.checksums import audit_target
from reshard.verification.report import Report

INDEX = "model.safetensors.index.json"
RECIPES = [recipe for recipe in list_packaged_recipes() if not recipe.engine]


class Case(NamedTuple):
    """A conversion: of a family, for a number of ranks, with options."""

    family: str
    ranks: int
    options: Mapping[str, Any]


CASES = {
    "v3 bf16": Case("deepseek-v3", 2, {"cast": "bf16"}),
    "v3 mtp": Case("deepseek-v3", 2, {"keep_mtp": True}),
    "v3 whole": Case("deepseek-v3", 1, {"to": "hf", "max_file_size": 3_000_000}),
    "v3 whole bf16": Case("deepseek-v3", 1, {"to": "hf", "cast": "bf16", "max_file_size": 3_000_000}),
    "v3 padded": Case("deepseek-v3-for-32", 32, {"pad": True}),
    "v3 padded bf16": Case("deepseek-v3-for-32", 32, {"pad": True, "cast": "bf16"}),
    "glm fp8": Case("glm-5.1", 1, {"cast": "fp8"}),
    "glm padded fp8": Case("glm-5.1", 2, {"cast": "fp8", "pad": True}),
    "glm whole ue8m0": Case("glm-5.1", 1, {"to": "hf", "cast": "fp8-ue8m0", "max_file_size": 2_000_000}),
    "v4": Case("deepseek-v4-pro", 4, {}),
    "v4 fp8": Case("deepseek-v4-pro", 2, {"expert_dtype": "fp8"}),
    "v4 bf16": Case("deepseek-v4-pro", 2, {"cast": "bf16"}),
    "v4 whole fp8": Case("deepseek-v4-pro", 1, {"to": "hf", "expert_dtype": "fp8", "max_file_size": 5_000_000}),
    "v4.1": Case("deepseek-v4.1-few", 4, {}),
    "v4.1 fp8": Case("deepseek-v4.1-few", 2, {"expert_dtype": "fp8"}),
    "v4.1 whole fp8": Case("deepseek-v4.1-few", 1, {"to": "hf", "expert_dtype": "fp8"}),
}
SETTINGS = Settings(jobs=1)
RECIPES = [recipe for recipe in list_packaged_recipes() if not recipe.engine]


class Made(NamedTuple):
    """A source, and a target that was made of it."""

    source: Path
    target: Path


@pytest.fixture(scope="session")
def sources(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Path]:
    """The small checkpoint of a family, written once."""
    folder = tmp_path_factory.mktemp("families")

    def source(family: str) -> Path:
        if family == "deepseek-v4.1-few" and not (folder / family).exists():
            write_tensors(folder / family, FAMILIES["deepseek-v4.1-flash"].tensors(FEW_V41), FEW_V41, 4)
        elif not (folder / family).exists():
            write_small(folder / family, family)
        return folder / family

    return source


@pytest.fixture(scope="session")
def good(sources: Callable[[str], Path], tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Made]:
    """A conversion, made once."""
    folder = tmp_path_factory.mktemp("good")

    def made(name: str) -> Made:
        case = CASES[name]
        source = sources(case.family)
        if not (folder / name).exists():
            convert_checkpoint(Job(source, case.ranks, **case.options), folder / name, SETTINGS)
        return Made(source, folder / name)

    return made


@pytest.fixture
def copied(good: Callable[[str], Made], tmp_path: Path) -> Callable[[str], Made]:
    """A conversion, to be damaged."""

    def copy(name: str) -> Made:
        made = good(name)
        return Made(made.source, shutil.copytree(made.target, tmp_path / "target"))

    return copy


def verify(made: Made, sample: Fraction | None = None, advance: Callable[[int], None] = lambda _: None) -> Report:
    files = tuple((path, path.stat().st_mtime_ns, path.stat().st_size) for path in sorted(made.source.iterdir()))
    return verify_target(made.target, *read(made.source, files), advance, sample=sample)


@cache
def read(folder: Path, _files: tuple[tuple[Path, int, int], ...]) -> tuple[Checkpoint, Recipe]:
    """A source and its recipe, read once while its files stay as they are."""
    source = read_checkpoint(folder)
    return source, choose_recipe(source, RECIPES)[0]


def facts(made: Made) -> set[tuple[str, str]]:
    return {(problem.kind, problem.subject) for problem in verify(made).problems}


class Bytes(NamedTuple):
    """Where a tensor lies in a file."""

    path: Path
    begin: int
    end: int
    shape: list[int]

    @property
    def subject(self) -> str:
        return f"{self.path.name}: "


def find(made: Made, name: str, file: str | None = None) -> Bytes:
    """A tensor of the target; in the first file that has it, or in the one named."""
    for path in sorted(made.target.glob("*.safetensors")):
        content = path.read_bytes()
        start = 8 + int.from_bytes(content[:8], "little")
        entry = json.loads(content[8:start]).get(name)
        if entry and file in (None, path.name):
            begin, end = entry["data_offsets"]
            return Bytes(path, start + begin, start + end, entry["shape"])
    raise LookupError(name)


def edit(place: Bytes, offset: int, change: Callable[[int], int]) -> None:
    """Changes a byte of a tensor; negative offsets count from its end."""
    content = bytearray(place.path.read_bytes())
    at = place.begin + offset if offset >= 0 else place.end + offset
    new = change(content[at])
    assert new != content[at]
    content[at] = new
    place.path.write_bytes(content)


def rewrite(path: Path, changes: Mapping[str, Tensor | None]) -> None:
    """Writes a file anew with these tensors in the place of its own; None leaves one out."""
    tensors = {**load_file(path), **changes}
    save_file({name: tensor for name, tensor in tensors.items() if tensor is not None}, path, {"format": "pt"})


def tensors_of(source: Path) -> dict[str, Tensor]:
    return oracle.load_tensors(source, ())


def value(name: str, made: Made, file: str | None = None) -> Tensor:
    return load_file(find(made, name, file).path)[name]


# --- true ones ---


@pytest.mark.parametrize("name", CASES)
def test_a_true_conversion_is_proven(name: str, good: Callable[[str], Made]) -> None:
    made, told = good(name), list[int]()
    report = verify(made, advance=told.append)
    assert report.problems == ()
    assert report.compared == report.size
    assert sum(told) == sum(path.stat().st_size for path in made.target.glob("*.safetensors"))
    assert report.is_whole == ("whole" in name)
    sample = verify(made, Fraction(1, 1000))
    assert sample.problems == ()
    assert 0 < sample.compared <= sample.size
    assert audit_target(made.target).problems == ()


@pytest.mark.parametrize("name", ["v3 padded bf16", "glm padded fp8", "v4", "v4 fp8", "v4.1", "v4.1 whole fp8"])
def test_the_smallest_pieces_add_up_to_all(name: str, good: Callable[[str], Made]) -> None:
    """A sample of everything: tiles are parts of rows then, too."""
    report = verify(good(name), Fraction(1))
    assert report.problems == ()
    assert report.compared == report.size


@pytest.mark.parametrize("name", ["v3 whole bf16", "v4 fp8", "glm fp8"])
def test_the_command_proves_it(name: str, good: Callable[[str], Made], capsys: pytest.CaptureFixture[str]) -> None:
    made = good(name)
    assert main(["verify", str(made.target), "--source", str(made.source)]) == 0
    assert ("whole files" in capsys.readouterr().out) == ("whole" in name)
    assert main(["verify", str(made.target)]) == 0


@pytest.mark.parametrize(
    ("name", "codes", "each", "cast", "words"),
    [
        ("v3 whole bf16", "v3 whole", 1, "dequantize", "dequantized to BF16"),
        ("glm whole ue8m0", "", 2, "quantize-ue8m0", "quantized to FP8, with powers of two as scales"),
        ("glm fp8", "", 2, "quantize", "quantized to FP8"),
    ],
)
def test_a_report_tells_what_was_cast_from_what_was_kept(
    name: str, codes: str, each: int, cast: str, words: str, good: Callable[[str], Made]
) -> None:
    """As many are cast as there are tensors of FP8 codes in the target, or in one without the cast; with new scales."""
    dtypes = {case: dtypes_of(good(case).target) for case in (name, codes or name)}
    count = each * dtypes[codes or name].count(torch.float8_e4m3fn)
    report = verify(good(name))
    assert report.casts == {cast: count}
    lines = str(report).split("\n")
    assert "all equal" not in str(report)
    assert f"{len(dtypes[name]) - count:,} tensors equal to the source" in lines
    assert f"{count:,} tensors as the cast should give: {words}" in lines


@pytest.mark.parametrize(("ranks", "end"), [(1, "BF16"), (4, "BF16, counted in each rank file")])
def test_tensors_of_several_rank_files_are_said_to_be_counted_in_each(ranks: int, end: str) -> None:
    report = Report(ranks, ranks, 6, 10, 10, is_sampled=False, problems=(), casts={"dequantize": 4})
    assert f"4 tensors as the cast should give: dequantized to {end}" in str(report).split("\n")


def dtypes_of(folder: Path) -> list[torch.dtype]:
    return [tensor.dtype for path in folder.glob("*.safetensors") for tensor in load_file(path).values()]


def test_without_a_cast_all_is_equal_to_the_source(good: Callable[[str], Made]) -> None:
    report = verify(good("v3 mtp"))
    assert report.casts == {}
    assert str(report).endswith("all equal")


@pytest.mark.parametrize(
    ("family", "ranks", "convert"),
    [
        ("deepseek-v4-flash", 2, oracle_families.convert_v4),
        ("deepseek-v4-flash", 4, lambda *job: oracle_families.convert_v4(*job, expert_dtype="fp8")),
        ("deepseek-v4.1-flash", 4, oracle_families.convert_v41),
        ("deepseek-v4.1-flash", 8, lambda *job: oracle_families.convert_v41(*job, expert_dtype="fp8")),
        ("deepseek-v3-for-32", 32, oracle_families.convert_v3_padded),
    ],
)
def test_what_the_oracle_casts_and_pads_is_proven(
    family: str, ranks: int, convert: Callable[[Path, Path, int], None], sources: Callable[[str], Path], tmp_path: Path
) -> None:
    convert(sources(family), tmp_path, ranks)
    assert verify(Made(sources(family), tmp_path)).problems == ()


@pytest.mark.parametrize("options", [{}, {"cast": "bf16"}])
def test_experts_that_come_as_fp8_have_blocks_of_their_own(
    options: Mapping[str, Any], good: Callable[[str], Made], tmp_path: Path
) -> None:
    """As the base models of V4 have them; here, what experts of FP4 were cast to."""
    source = good("v4 whole fp8").target
    convert_checkpoint(Job(source, 2, **options), tmp_path / "target", SETTINGS)
    made = Made(source, tmp_path / "target")
    report = verify(made)
    assert (report.problems, report.compared) == ((), report.size)
    edit(find(made, EXPERT + ".weight"), 0, up)
    assert facts(made) == {("differs", f"model0-mp2.safetensors: {EXPERT}.weight")}


def test_a_table_that_is_never_cast_may_not_be(copied: Callable[[str], Made]) -> None:
    made, name = copied("v4.1"), TABLE + ".weight"
    for rank in range(4):
        path = made.target / f"model{rank}-mp4.safetensors"
        rewrite(path, {name: load_file(path)[name].bfloat16()})
    assert facts(made) == {("wrong-shape", f"model{rank}-mp4.safetensors: {name}") for rank in range(4)}


def test_some_ranks_alone_tell_what_was_kept(good: Callable[[str], Made]) -> None:
    made = good("v3 mtp")
    source = read_checkpoint(made.source)
    for rank in (0, 1):
        report = verify_target(made.target, source, choose_recipe(source, RECIPES)[0], ranks=[rank])
        assert (report.problems, report.files) == ((), 1)


# --- single bytes ---


class Damage(NamedTuple):
    """A byte that is changed: of which tensor, in which file if there are several."""

    case: str
    tensor: str
    offset: int
    change: Callable[[int], int]
    file: str | None = None


def up(byte: int) -> int:
    return byte + 1 & 255


def swap_halves(byte: int) -> int:
    return byte >> 4 | byte << 4 & 255


EXPERT, GATE = "layers.1.ffn.experts.0.w1", "layers.0.ffn.w1"
TABLE = "layers.1.engram.embed"
DAMAGES = {
    "a dequantised value": Damage("v4", "layers.2.attn.wo_a.weight", 1000, up, "model1-mp4.safetensors"),
    "the last dequantised value": Damage("v3 bf16", GATE + ".weight", -2, up, "model1-mp2.safetensors"),
    "a dequantised value of a whole file": Damage("v3 whole bf16", "model.layers.3.mlp.up_proj.weight", 0, up),
    "a dequantised value of FP4": Damage("v4 bf16", EXPERT + ".weight", 77, up),
    "the sign of a dequantised value": Damage("v3 bf16", GATE + ".weight", 3, lambda byte: byte ^ 128),
    "an FP8 code made of FP4": Damage("v4 fp8", EXPERT + ".weight", 12, up),
    "a scale made of FP4's": Damage("v4 fp8", EXPERT + ".scale", 0, up),
    "the last scale made of FP4's": Damage("v4.1 fp8", EXPERT + ".scale", -1, lambda byte: byte - 1),
    "a scale made of FP4's in a whole file": Damage("v4 whole fp8", EXPERT + ".scale", 0, up),
    "a code that is quantised": Damage("glm fp8", GATE + ".weight", 5000, up),
    "a scale of what is quantised": Damage("glm fp8", GATE + ".scale", 4, up),
    "a scale of a power of two": Damage("glm whole ue8m0", "model.layers.0.mlp.up_proj.weight_scale_inv", 3, up),
    "rows of padding": Damage("v3 padded", GATE + ".weight", -1, up, "model31-mp32.safetensors"),
    "columns of padding": Damage("v3 padded", "layers.0.ffn.w2.weight", -1, up, "model31-mp32.safetensors"),
    "the scale of padded rows": Damage("v3 padded", GATE + ".scale", -1, up, "model31-mp32.safetensors"),
    "the scale of padded columns": Damage("v3 padded", "layers.0.ffn.w2.scale", -4, up, "model31-mp32.safetensors"),
    "padding of what is dequantised": Damage("v3 padded bf16", GATE + ".weight", -2, up, "model31-mp32.safetensors"),
    "padding of what is quantised": Damage("glm padded fp8", GATE + ".weight", -1, up, "model1-mp2.safetensors"),
    "the last row of a table": Damage("v4.1", TABLE + ".weight", -1, up, "model3-mp4.safetensors"),
    "the last scale of a table": Damage("v4.1", TABLE + ".scale", -1, up, "model3-mp4.safetensors"),
    "a byte of a whole file": Damage("v3 whole", "model.layers.5.mlp.gate_proj.weight", 9, up),
}


@pytest.mark.parametrize("case", sorted({damage.case for damage in DAMAGES.values()}))
def test_a_byte_of_no_other_than_this_value_is_seen(case: str, copied: Callable[[str], Made]) -> None:
    """All damages of a conversion at once: each is told by itself, and nothing else is."""
    made = copied(case)
    damages = [damage for damage in DAMAGES.values() if damage.case == case]
    places = {damage: find(made, damage.tensor, damage.file) for damage in damages}
    for damage in damages:
        edit(places[damage], damage.offset, damage.change)
    found = {(problem.kind, problem.subject): problem.found for problem in verify(made).problems}
    assert sorted(found) == sorted(("differs", places[damage].subject + damage.tensor) for damage in damages)
    for damage in damages:
        place = places[damage]
        words = found["differs", place.subject + damage.tensor]
        than = ("in the source", "are made of the source", "zeros")
        assert words.startswith(tuple(f"1 other byte than {those}, " for those in than))
        assert f"first in byte {damage.offset % (place.end - place.begin):,} of" in words


@pytest.mark.parametrize("damage", ["a dequantised value", "a byte of a whole file", "rows of padding"])
def test_the_command_sees_a_byte(damage: str, copied: Callable[[str], Made]) -> None:
    case, tensor, offset, change, file = DAMAGES[damage]
    made = copied(case)
    edit(find(made, tensor, file), offset, change)
    assert main(["verify", str(made.target), "--source", str(made.source)]) == 1


@pytest.mark.parametrize("damage", ["rows of padding", "columns of padding", "the last dequantised value"])
def test_a_sample_looks_at_the_ends(damage: str, copied: Callable[[str], Made]) -> None:
    case, tensor, offset, change, file = DAMAGES[damage]
    made = copied(case)
    edit(find(made, tensor, file), offset, change)
    assert [problem.kind for problem in verify(made, Fraction(1, 10**8)).problems] == ["differs"]


def test_swapped_halves_of_a_packed_byte_are_seen(copied: Callable[[str], Made]) -> None:
    made = copied("v4")
    place = find(made, EXPERT + ".weight")
    data = place.path.read_bytes()[place.begin : place.end]
    offset = next(number for number, byte in enumerate(data) if byte != swap_halves(byte))
    edit(place, offset, swap_halves)
    assert facts(made) == {("differs", place.subject + EXPERT + ".weight")}


def test_a_value_that_is_rounded_the_wrong_way_is_seen(copied: Callable[[str], Made]) -> None:
    """Cut off, where the nearest is above."""
    made = copied("v3 bf16")
    name, source = "model.layers.0.mlp.gate_proj.weight", tensors_of(made.source)
    block = torch.repeat_interleave(torch.repeat_interleave(source[name + "_scale_inv"], 128, 0), 128, 1)
    weight = source[name].float()
    exact = (weight * block[: weight.size(0), : weight.size(1)]).view(torch.int32).numpy().view(np.uint32)
    rounded = dequantize(source[name], source[name + "_scale_inv"], 128).view(torch.int16).numpy().view(np.uint16)
    wrong = np.flatnonzero((exact >> 16).reshape(-1) != rounded.reshape(-1))
    half = weight.size(0) // 2
    number = int(wrong[wrong < half * weight.size(1)][0])
    place = find(made, GATE + ".weight", "model0-mp2.safetensors")
    values = bytearray(place.path.read_bytes())
    values[place.begin + 2 * number : place.begin + 2 * number + 2] = int(exact.reshape(-1)[number] >> 16).to_bytes(
        2, "little"
    )
    place.path.write_bytes(values)
    assert facts(made) == {("differs", place.subject + GATE + ".weight")}


def test_the_rows_of_another_rank_are_seen(copied: Callable[[str], Made]) -> None:
    made, name = copied("v4"), "layers.2.attn.wo_a.weight"
    files = [f"model{rank}-mp4.safetensors" for rank in (1, 2)]
    first, second = (value(name, made, file) for file in files)
    assert not torch.equal(first, second)
    rewrite(made.target / files[0], {name: second})
    rewrite(made.target / files[1], {name: first})
    assert facts(made) == {("differs", f"{file}: {name}") for file in files}


def test_columns_of_another_rank_are_seen(copied: Callable[[str], Made]) -> None:
    made, name = copied("v3 bf16"), "layers.0.ffn.w2.weight"
    files = [f"model{rank}-mp2.safetensors" for rank in (0, 1)]
    first, second = (value(name, made, file) for file in files)
    rewrite(made.target / files[0], {name: second})
    rewrite(made.target / files[1], {name: first})
    assert facts(made) == {("differs", f"{file}: {name}") for file in files}


def test_a_scale_beside_its_codes_is_no_power_of_two(copied: Callable[[str], Made]) -> None:
    """Both are right by themselves: as `--cast fp8` makes them."""
    made, name = copied("glm whole ue8m0"), "model.layers.0.mlp.up_proj.weight"
    weight = tensors_of(made.source)[name]
    scale, codes = quantized(weight)
    place = find(made, name)
    rewrite(place.path, {name: codes, name + "_scale_inv": scale})
    assert facts(made) == {("differs", place.subject + name), ("differs", f"{place.subject}{name}_scale_inv")}


def quantized(weight: Tensor) -> tuple[Tensor, Tensor]:
    scale = torch.empty(-(-weight.size(0) // 128), -(-weight.size(1) // 128))
    codes = torch.empty(weight.shape, dtype=torch.float8_e4m3fn)
    for row in range(scale.size(0)):
        for column in range(scale.size(1)):
            square = slice(row * 128, row * 128 + 128), slice(column * 128, column * 128 + 128)
            scale[row, column] = weight[square].float().abs().max() / 448
            codes[square] = (weight[square].float() / scale[row, column]).to(torch.float8_e4m3fn)
    return scale, codes


def test_what_torch_quantises_is_proven(copied: Callable[[str], Made]) -> None:
    made = copied("glm fp8")
    source = tensors_of(made.source)
    for ours, theirs in (("layers.0.ffn.w1", "gate"), ("layers.0.ffn.w3", "up"), ("layers.0.ffn.w2", "down")):
        scale, codes = quantized(source[f"model.layers.0.mlp.{theirs}_proj.weight"])
        rewrite(made.target / "model0-mp1.safetensors", {f"{ours}.weight": codes, f"{ours}.scale": scale})
    assert verify(made).problems == ()


# --- what is rounded ---


@pytest.fixture
def inexact(sources: Callable[[str], Path], tmp_path: Path) -> Made:
    """Groups of FP4 whose scales are far below others of their block."""
    source = shutil.copytree(sources("deepseek-v4-flash"), tmp_path / "source")
    place = find(Made(source, source), EXPERT + ".scale")
    content = bytearray(place.path.read_bytes())
    content[place.begin : place.begin + 3] = [content[place.begin + 3] - 16] * 3
    place.path.write_bytes(content)
    convert_checkpoint(Job(source, 2, expert_dtype="fp8"), tmp_path / "inexact", Settings(jobs=1, allow_inexact=True))
    return Made(source, tmp_path / "inexact")


def test_values_that_are_rounded_are_counted(inexact: Made, capsys: pytest.CaptureFixture[str]) -> None:
    source = tensors_of(inexact.source)
    packed, groups = source[EXPERT + ".weight"], source[EXPERT + ".scale"]
    codes, scales = fp4_to_fp8(packed, groups, 128)
    before = unpack_fp4(packed).double() * groups.double().repeat_interleave(32, 1)
    after = codes.double() * scales.double().repeat_interleave(128, 0).repeat_interleave(128, 1)
    report = verify(inexact)
    assert report.problems == ()
    assert report.inexact == int((before != after).sum()) > 0
    assert main(["verify", str(inexact.target), "--source", str(inexact.source)]) == 0
    assert f"rounded: {report.inexact} values" in capsys.readouterr().out


def test_a_rounded_value_is_the_nearest(inexact: Made) -> None:
    place = find(inexact, EXPERT + ".weight")
    codes = place.path.read_bytes()[place.begin : place.end]
    width = place.shape[1]
    edit(place, next(number for number in range(96) if codes[number] not in (0, 128) and number < width), up)
    assert facts(inexact) == {("differs", place.subject + EXPERT + ".weight")}


def test_the_least_scale_is_the_least_there_is(sources: Callable[[str], Path], tmp_path: Path) -> None:
    """2^-127, where a 64th of the largest would be less."""
    source = shutil.copytree(sources("deepseek-v4-flash"), tmp_path / "source")
    place = find(Made(source, source), EXPERT + ".scale")
    content = bytearray(place.path.read_bytes())
    content[place.begin : place.end] = bytes(number % 6 for number in range(place.end - place.begin))
    place.path.write_bytes(content)
    convert_checkpoint(Job(source, 2, expert_dtype="fp8"), tmp_path / "target", SETTINGS)
    made = Made(source, tmp_path / "target")
    assert not value(EXPERT + ".scale", made).view(torch.uint8).any()
    report = verify(made)
    assert (report.problems, report.inexact) == ((), 0)


# --- names, dtypes and shapes ---


def test_a_scale_that_is_kept_though_its_weight_is_dequantised_is_seen(copied: Callable[[str], Made]) -> None:
    made, file = copied("v3 bf16"), "model0-mp2.safetensors"
    scale = tensors_of(made.source)["model.layers.0.self_attn.kv_a_proj_with_mqa.weight_scale_inv"]
    rewrite(made.target / file, {"layers.0.attn.wkv_a.scale": scale})
    assert facts(made) == {("extra-tensor", f"{file}: layers.0.attn.wkv_a.scale")}


def test_a_scale_of_what_is_always_dequantised_is_seen(copied: Callable[[str], Made]) -> None:
    made, file = copied("v4"), "model0-mp4.safetensors"
    scale = tensors_of(made.source)["layers.0.attn.wo_a.scale"]
    rewrite(made.target / file, {"layers.0.attn.wo_a.scale": scale})
    assert facts(made) == {("extra-tensor", f"{file}: layers.0.attn.wo_a.scale")}


def test_what_is_always_dequantised_may_not_stay_fp8(copied: Callable[[str], Made]) -> None:
    made, name = copied("v4"), "layers.0.attn.wo_a.weight"
    for rank in range(4):
        weight = tensors_of(made.source)[name].chunk(4)[rank].contiguous()
        rewrite(made.target / f"model{rank}-mp4.safetensors", {name: weight})
    assert facts(made) == {("wrong-shape", f"model{rank}-mp4.safetensors: {name}") for rank in range(4)}


def test_packed_weights_are_called_so(copied: Callable[[str], Made]) -> None:
    """As I8 a model would take the bytes for numbers."""
    made, name = copied("v4"), EXPERT + ".weight"
    rewrite(made.target / "model0-mp4.safetensors", {name: tensors_of(made.source)[name]})
    assert facts(made) == {("wrong-shape", f"model0-mp4.safetensors: {name}")}


def test_a_weight_that_is_cast_unlike_the_others_is_seen(copied: Callable[[str], Made]) -> None:
    """By itself it is right."""
    made, name = copied("v4 fp8"), EXPERT + ".weight"
    source = tensors_of(made.source)
    packed = source[name].view(torch.float4_e2m1fn_x2)
    rewrite(made.target / "model0-mp2.safetensors", {name: packed, EXPERT + ".scale": source[EXPERT + ".scale"]})
    assert facts(made) == {("mixture", f"model0-mp2.safetensors: {name}")}


def test_a_weight_that_is_padded_unlike_the_others_is_seen(copied: Callable[[str], Made]) -> None:
    """By itself it is right, with a scale for each block: only another weight of its layer does not fit it any more."""
    made, found = copied("v3 padded"), set()
    whole = tensors_of(made.source)
    weight = oracle_families.pad(whole["model.layers.0.mlp.gate_proj.weight"], 0, 32 * 768, 0.0)
    scale = oracle_families.pad(whole["model.layers.0.mlp.gate_proj.weight_scale_inv"], 0, 32 * 6, 1.0)
    for rank in range(32):
        file = f"model{rank}-mp32.safetensors"
        parts = {GATE + ".weight": weight.chunk(32)[rank].clone(), GATE + ".scale": scale.chunk(32)[rank].clone()}
        rewrite(made.target / file, parts)
        found.add(("mixture", f"{file}: {GATE}.weight"))
    assert facts(made) == found


def test_a_scale_that_was_not_made_is_missed(copied: Callable[[str], Made]) -> None:
    made = copied("glm fp8")
    rewrite(made.target / "model0-mp1.safetensors", {GATE + ".scale": None})
    assert facts(made) == {("missing-tensor", f"model0-mp1.safetensors: {GATE}.weight")}


@pytest.mark.parametrize("name", ["v4 fp8", "v4"])
def test_a_scale_that_is_not_there_is_missed(name: str, copied: Callable[[str], Made]) -> None:
    made = copied(name)
    rewrite(find(made, EXPERT + ".scale").path, {EXPERT + ".scale": None})
    assert facts(made) == {("missing-tensor", EXPERT + ".scale")}


@pytest.mark.parametrize(
    ("name", "left"),
    [
        ("layers.11.eh_proj.weight", "model.layers.11.eh_proj.weight"),
        ("layers.11.ffn.experts.3.w1.weight", "model.layers.11.mlp.experts.3.gate_proj.weight"),
    ],
)
def test_an_mtp_tensor_is_missed_where_the_others_are(name: str, left: str, copied: Callable[[str], Made]) -> None:
    made = copied("v3 mtp")
    for path in made.target.glob("*.safetensors"):
        rewrite(path, {name: None})
    assert facts(made) == {("missing-tensor", left)}


def test_an_mtp_tensor_is_missed_in_one_rank(copied: Callable[[str], Made]) -> None:
    made = copied("v3 mtp")
    rewrite(made.target / "model1-mp2.safetensors", {"layers.11.norm.weight": None})
    assert facts(made) == {("wrong-ranks", "model.layers.11.shared_head.norm.weight")}


# --- rows of heads, and of two halves ---

OWN = """
name   = "own"
about  = "for a test"
left   = "left"
right  = "right"
files  = "model{rank}-mp{ranks}.safetensors"
scales.p = { left = "weight_scale_inv", right = "scale", block = 8 }
placeholders.i = { counts = "layers", size = "layers" }
rules = [
["same", "layers.{i}.k.{p}",    "l.{i}.k.{p}",    "rows of heads"],
["same", "layers.{i}.both.{p}", "l.{i}.both.{p}", "packed rows"],
]
"""


@pytest.fixture(params=["as they are", "dequantised"])
def heads(request: pytest.FixtureRequest, tmp_path: Path) -> Made:
    """Two heads for four ranks, and a gate behind which is what it lets through; cut by torch."""
    random = torch.Generator().manual_seed(3)
    source = {}
    for name, rows in (("k", 32), ("both", 64)):
        codes = torch.randint(0, 120, (rows, 24), generator=random, dtype=torch.uint8)
        source[f"layers.0.{name}.weight"] = codes.view(torch.float8_e4m3fn)
        source[f"layers.0.{name}.weight_scale_inv"] = torch.rand((rows // 8, 3), generator=random)
    made = Made(tmp_path / "source", tmp_path / "target")
    made.source.mkdir()
    made.target.mkdir()
    save_file(source, made.source / "model.safetensors")
    (made.source / "config.json").write_text(json.dumps({"layers": 1, "heads": 2}))
    (tmp_path / "own.toml").write_text(OWN)
    for rank in range(4):
        share = {}
        for name, tensor in source.items():
            if ".k." in name:
                part = tensor.chunk(2)[rank // 2]
            else:
                part = torch.cat([half.chunk(4)[rank] for half in tensor.chunk(2)])
            share[name.replace("layers", "l").replace("weight_scale_inv", "scale")] = part.contiguous()
        if request.param == "dequantised":
            share = {
                name: dequantize(part, share[name.replace("weight", "scale")], 8)
                for name, part in share.items()
                if name.endswith("weight")
            }
        save_file(share, made.target / f"model{rank}-mp4.safetensors")
    return made


def verify_own(made: Made) -> Report:
    return verify_target(made.target, read_checkpoint(made.source), load_recipe(str(made.source.parent / "own.toml")))


def test_heads_that_ranks_share_and_halves_are_proven(heads: Made) -> None:
    report = verify_own(heads)
    assert report.problems == ()
    assert report.compared == report.size


@pytest.mark.parametrize("name", ["l.0.k.weight", "l.0.both.weight"])
@pytest.mark.parametrize("offset", [0, -1])
def test_a_byte_of_a_head_or_half_is_seen(name: str, offset: int, heads: Made) -> None:
    place = find(heads, name, "model2-mp4.safetensors")
    edit(place, offset, up)
    (problem,) = verify_own(heads).problems
    assert (problem.kind, problem.subject) == ("differs", place.subject + name)
    assert f"first in byte {offset % (place.end - place.begin):,} of" in problem.found


def test_halves_cut_as_if_they_were_one_are_seen(heads: Made) -> None:
    name = "l.0.both.weight"
    parts = [value(name, heads, f"model{rank}-mp4.safetensors") for rank in range(4)]
    whole = torch.cat([*(part[:8] for part in parts), *(part[8:] for part in parts)])
    for rank in range(4):
        rewrite(heads.target / f"model{rank}-mp4.safetensors", {name: whole.chunk(4)[rank].clone()})
    found = {(problem.kind, problem.subject) for problem in verify_own(heads).problems}
    assert found == {("differs", f"model{rank}-mp4.safetensors: {name}") for rank in range(4)}


# --- whole files ---


def change_json(path: Path, change: Callable[[dict[str, Any]], None]) -> None:
    content = json.loads(path.read_text())
    change(content)
    path.write_text(json.dumps(content))


def test_an_index_that_names_another_file_is_seen(copied: Callable[[str], Made]) -> None:
    made, name = copied("v3 whole"), "model.norm.weight"
    first = min(path.name for path in made.target.glob("*.safetensors"))
    assert find(made, name).path.name != first
    change_json(made.target / INDEX, lambda index: index["weight_map"].update({name: first}))
    assert facts(made) == {("wrong-index", f"{INDEX}: {name}")}


@pytest.mark.parametrize(
    ("change", "subject"),
    [
        (lambda index: index["weight_map"].pop("lm_head.weight"), "lm_head.weight"),
        (lambda index: index["weight_map"].update(more="model-00001-of-00004.safetensors"), "more"),
        (lambda index: index["metadata"].update(total_size=1), "total_size"),
    ],
)
def test_an_index_that_is_not_that_of_the_files_is_seen(
    change: Callable[[dict[str, Any]], None], subject: str, copied: Callable[[str], Made]
) -> None:
    made = copied("v3 whole bf16")
    change_json(made.target / INDEX, change)
    assert facts(made) == {("wrong-index", f"{INDEX}: {subject}")}


@pytest.mark.parametrize("name", [INDEX, "config.json"])
def test_a_file_beside_whole_ones_is_missed(name: str, copied: Callable[[str], Made]) -> None:
    made = copied("v3 whole")
    (made.target / name).unlink()
    assert facts(made) == {("missing-file", name)}


@pytest.mark.parametrize(
    ("name", "change", "key"),
    [
        ("v3 whole bf16", {"quantization_config": {"quant_method": "fp8"}}, "quantization_config"),
        ("v3 whole bf16", {"torch_dtype": "float8_e4m3fn"}, "torch_dtype"),
        ("v3 whole bf16", {"hidden_size": 41}, "hidden_size"),
        ("v3 whole", {"quantization_config": None}, "quantization_config"),
        ("glm whole ue8m0", {"quantization_config": {"quant_method": "fp8"}}, "quantization_config"),
        ("v4 whole fp8", {"expert_dtype": "fp4"}, "expert_dtype"),
        ("v4.1 whole fp8", {"quantization_config": {"expert_dtype": "fp4"}}, "quantization_config"),
    ],
)
def test_a_config_that_says_something_else_of_the_weights_is_seen(
    name: str, change: Mapping[str, Any], key: str, copied: Callable[[str], Made]
) -> None:
    made = copied(name)
    change_json(made.target / "config.json", lambda config: config.update(change))
    assert facts(made) == {("wrong-config", f"config.json: {key}")}


def test_a_tensor_that_no_whole_file_has_is_missed(copied: Callable[[str], Made]) -> None:
    made, name = copied("v3 whole"), "model.layers.11.enorm.weight"
    rewrite(find(made, name).path, {name: None})
    found = facts(made)
    assert ("missing-tensor", name) in found
    assert {kind for kind, _ in found} == {"missing-tensor", "wrong-index"}


def test_the_source_proves_nothing_of_itself(sources: Callable[[str], Path]) -> None:
    source = sources("deepseek-v3")
    with pytest.raises(Refused, match="the source itself"):
        verify(Made(source, source))


def test_a_tensor_in_two_whole_files_is_seen(copied: Callable[[str], Made]) -> None:
    made, name = copied("v3 whole"), "model.norm.weight"
    first = min(made.target.glob("*.safetensors"))
    rewrite(first, {name: value(name, made)})
    found = facts(made)
    assert "tensor-twice" in {kind for kind, _ in found}


def test_a_tensor_of_another_name_in_a_whole_file_is_seen(copied: Callable[[str], Made]) -> None:
    made = copied("v4.1 whole fp8")
    path = made.target / "model.safetensors"
    rewrite(path, {"more.weight": torch.zeros(1)})
    assert facts(made) == {("extra-tensor", "model.safetensors: more.weight")}


# --- without the source ---


@pytest.mark.parametrize(
    ("name", "side"),
    [
        ("v3 whole bf16", "config.json"),
        ("v3 whole bf16", INDEX),
        ("v4", "run_config.json"),
        ("v3 whole", "tokenizer.json"),
    ],
)
def test_side_files_are_audited(name: str, side: str, copied: Callable[[str], Made]) -> None:
    made = copied(name)
    with (made.target / side).open("ab") as file:
        file.write(b" ")
    assert [(problem.kind, problem.subject) for problem in audit_target(made.target).problems] == [
        ("wrong-checksum", side)
    ]


def test_a_byte_of_a_whole_file_is_audited(copied: Callable[[str], Made]) -> None:
    made, name = copied("v3 whole bf16"), "model.layers.3.mlp.up_proj.weight"
    place = find(made, name)
    edit(place, 5, up)
    report = audit_target(made.target)
    assert [problem.kind for problem in report.problems] == ["wrong-checksum"]
    assert report.problems[0].subject.startswith(place.path.name)
    assert report.is_whole
