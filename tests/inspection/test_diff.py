"""Two checkpoints compared: every dtype against torch and plain loops, every layout, refusals, and the memory."""

import cmath
import json
import math
import os
import random
import shutil
from collections.abc import Callable, Mapping, Sequence
from fractions import Fraction
from itertools import product
from pathlib import Path
from typing import Any, NamedTuple

import oracle_casts
import pytest
import torch
from families import write_small
from jobs import Job, convert_checkpoint
from safetensors.torch import load_file, save_file
from torch import Tensor

from reshard.cli.main import main
from reshard.errors import Refused
from reshard.inspection.diff import diff_checkpoints
from reshard.inspection.diff_report import DiffReport
from reshard.inspection.tensor_pairs import DiffChoice
from reshard.storage.local import Ways
from reshard.synthetic import write_tensors

Stored = Mapping[str, tuple[str, Sequence[int], bytes]]
"""By name: dtype, shape and data."""
FLOATS = {
    "F64": torch.float64,
    "F32": torch.float32,
    "F16": torch.float16,
    "BF16": torch.bfloat16,
    "C64": torch.complex64,
    "F8_E4M3": torch.float8_e4m3fn,
    "F8_E5M2": torch.float8_e5m2,
    "F8_E4M3FNUZ": torch.float8_e4m3fnuz,
    "F8_E5M2FNUZ": torch.float8_e5m2fnuz,
    "F8_E8M0": torch.float8_e8m0fnu,
}
INTEGERS = {"BOOL": 8, "U8": 8, "I8": 8, "I16": 16, "U16": 16, "I32": 32, "U32": 32, "I64": 64, "U64": 64}
SIZES = {"F64": 8, "F32": 4, "F16": 2, "BF16": 2, "C64": 8, **{dtype: bits // 8 for dtype, bits in INTEGERS.items()}}
SPECIAL = {
    "F64": [0, 1, 1 << 63, 0x7FF << 52, 0xFFF << 52, (0x7FF << 52) + 1, 0x7FF8 << 48, (0x7FF << 52) - 1, (1 << 64) - 1],
    "F32": [0, 1, 1 << 31, 0x7F800000, 0xFF800000, 0x7F800001, 0x7FC00000, 0x7F7FFFFF, 0xFF7FFFFF, 0x807FFFFF],
    "F16": [0, 1, 1 << 15, 0x7C00, 0xFC00, 0x7C01, 0x7E00, 0x7BFF, 0xFBFF, 0x83FF],
    "BF16": [0, 1, 1 << 15, 0x7F80, 0xFF80, 0x7F81, 0x7FC0, 0x7F7F, 0xFF7F, 0x807F],
    "I64": [0, 1, 1 << 63, (1 << 63) - 1, (1 << 63) + 1, (1 << 64) - 1, (1 << 60) + 1, 1 << 60],
    "U64": [0, 1, 1 << 63, (1 << 63) - 1, (1 << 63) + 1, (1 << 64) - 1, (1 << 60) + 1, 1 << 60],
}
"""Zeros, subnormals, infinities, NaNs of two kinds and the largest; of all of them, every one against every other."""
LARGEST = 1.7976931348623157e308


class Expected(NamedTuple):
    different: int
    first: int
    last: int
    nans: tuple[int, int]
    infinite: int
    max_absolute: float | None
    max_relative: float | None


def write(path: Path, tensors: Stored) -> Path:
    """A safetensors file by hand, its header of an odd length: no element need lie on a multiple of its size."""
    header: dict[str, Any] = {}
    end = 0
    for name, (dtype, shape, data) in tensors.items():
        header[name] = {"dtype": dtype, "shape": list(shape), "data_offsets": [end, end + len(data)]}
        end += len(data)
    text = json.dumps(header).encode()
    text += b" " * (1 - len(text) % 2)
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(len(text).to_bytes(8, "little") + text + b"".join(data for _, _, data in tensors.values()))
    return path


def numbers_of(data: bytes, dtype: str) -> list[Any]:
    """What torch or Python make of the bytes."""
    if dtype == "F4":
        return [oracle_casts.FP4_VALUES[code] for byte in data for code in (byte & 15, byte >> 4)]
    if dtype in INTEGERS:
        size = INTEGERS[dtype] // 8
        return [int.from_bytes(data[i : i + size], "little", signed=dtype[0] == "I") for i in range(0, len(data), size)]
    found = torch.frombuffer(bytearray(data), dtype=FLOATS[dtype])
    if dtype.startswith("F8"):
        return found.float().tolist()
    return found.tolist()


def bits_of(data: bytes, dtype: str) -> list[Any]:
    if dtype == "F4":
        return [code for byte in data for code in (byte & 15, byte >> 4)]
    size = SIZES.get(dtype, 1)
    return [data[i : i + size] for i in range(0, len(data), size)]


def expected(one: bytes, other: bytes, dtype: str) -> Expected | None:
    """Element by element, in whole numbers and fractions."""
    places = [i for i, (x, y) in enumerate(zip(*(bits_of(d, dtype) for d in (one, other)), strict=True)) if x != y]
    if not places:
        return None
    if dtype.startswith("F6_"):
        return Expected(len(places), places[0], places[-1], (0, 0), 0, None, None)
    sides = [numbers_of(data, dtype) for data in (one, other)]
    pairs = [(sides[0][i], sides[1][i]) for i in places]
    nans = [[cmath.isnan(pair[side]) for pair in pairs] for side in (0, 1)]
    infinite = [any(map(cmath.isinf, pair)) and not any(map(cmath.isnan, pair)) for pair in pairs]
    finite = [pair for pair in pairs if all(map(cmath.isfinite, pair))]
    absolute, relative = zip(*(distance(*pair) for pair in finite), strict=True) if finite else ((), ())
    return Expected(
        len(places),
        places[0],
        places[-1],
        (sum(nans[0]), sum(nans[1])),
        sum(infinite),
        max(absolute, default=None),
        max(relative, default=None),
    )


def distance(x: Any, y: Any) -> tuple[float, float]:
    if isinstance(x, complex):
        larger = max(abs(x), abs(y))
        return abs(x - y), abs(x - y) / larger if larger else 0
    exact, larger = abs(Fraction(x) - Fraction(y)), max(abs(Fraction(x)), abs(Fraction(y)))
    return float(min(exact, Fraction(LARGEST))), float(exact / larger) if larger else 0


def require_apart(report: DiffReport, wanted: Mapping[str, Expected | None]) -> None:
    """The report says of each tensor just what is wanted; numbers to the last bits."""
    found = {difference.name: difference.apart for difference in report.values}
    assert found.keys() == {name for name, apart in wanted.items() if apart}
    for name, apart in wanted.items():
        if apart:
            counts = Expected(*(getattr(found[name], field) for field in Expected._fields))
            assert counts[:5] == apart[:5], name
            for got, right in zip(counts[5:], apart[5:], strict=True):
                assert (got is None) == (right is None), name
                assert math.isclose(got or 0, right or 0, rel_tol=1e-14), (name, got, right)
    assert report.same == len(wanted) - len(found)


def data_of(dtype: str, seed: int) -> tuple[bytes, bytes]:
    """Random bits, of which a third of the bytes differ; and every special value against every other."""
    chance = random.Random(f"{dtype} {seed}")
    size = SIZES.get(dtype, 1)
    one = bytearray(chance.randbytes(1200 * size))
    other = bytearray(byte ^ chance.choice([0, 0, 1 << chance.randrange(8)]) for byte in one)
    for x, y in product(SPECIAL.get(dtype, ()), repeat=2):
        one += x.to_bytes(size, "little")
        other += y.to_bytes(size, "little")
    return bytes(one), bytes(other)


# --- values ---


@pytest.mark.parametrize("dtype", [*FLOATS, *INTEGERS, "F4", "F6_E2M3", "F6_E3M2"])
def test_elements_are_compared_as_torch_and_fractions_have_them(tmp_path: Path, dtype: str) -> None:
    count = {"F4": 2, "F6_E2M3": 4 / 3, "F6_E3M2": 4 / 3}.get(dtype, 1 / SIZES.get(dtype, 1))
    sides: list[dict[str, tuple[str, Sequence[int], bytes]]] = [{}, {}]
    wanted = {}
    for seed in range(3):
        one, other = data_of(dtype, seed)
        for name, x, y in ((f"apart.{seed}", one, other), (f"alike.{seed}", one, one), (f"back.{seed}", other, one)):
            sides[0][name], sides[1][name] = ((dtype, [int(len(data) * count)], data) for data in (x, y))
            wanted[name] = expected(x, y, dtype)
    a, b = write(tmp_path / "a.safetensors", sides[0]), write(tmp_path / "b.safetensors", sides[1])
    assert any(wanted.values())
    require_apart(diff_checkpoints(a, b), wanted)


@pytest.mark.parametrize(
    ("dtype", "x", "y", "wanted"),
    [
        ("F32", 0, 1 << 31, (1, (0, 0), 0, 0.0, 0.0)),  # 0 and -0
        ("BF16", 0x7FC0, 0x7FC0, None),
        ("BF16", 0x7FC0, 0x7FC1, (1, (1, 1), 0, None, None)),
        ("BF16", 0x7F80, 0x3F80, (1, (0, 0), 1, None, None)),  # infinity and 1
        ("BF16", 0x7F80, 0xFF80, (1, (0, 0), 1, None, None)),
        ("BF16", 0x3F80, 0x7FC0, (1, (0, 1), 0, None, None)),
        ("BF16", 0x3F80, 0x3F81, (1, (0, 0), 0, 2.0**-7, 2.0**-7 / (1 + 2.0**-7))),
        ("BF16", 1, 0x8001, (1, (0, 0), 0, 2.0**-132, 2.0)),  # subnormals of either sign
        ("F16", 1, 0, (1, (0, 0), 0, 2.0**-24, 1.0)),
        ("F8_E8M0", 127, 130, (1, (0, 0), 0, 7.0, 7 / 8)),
        ("F64", 0x7FEFFFFFFFFFFFFF, 0xFFEFFFFFFFFFFFFF, (1, (0, 0), 0, LARGEST, 2.0)),
        ("U64", (1 << 63) + 1, 1 << 63, (1, (0, 0), 0, 1.0, 2.0**-63)),
        ("I64", 1 << 63, (1 << 63) - 1, (1, (0, 0), 0, 2.0**64, 2.0)),  # the least and the largest
        ("I8", 0x80, 0x7F, (1, (0, 0), 0, 255.0, 255 / 128)),
    ],
)
def test_single_values_by_hand(tmp_path: Path, dtype: str, x: int, y: int, wanted: tuple[Any, ...] | None) -> None:
    size = SIZES.get(dtype, 1)
    a, b = (
        write(tmp_path / f"{name}.safetensors", {"x": (dtype, [], value.to_bytes(size, "little"))})
        for name, value in (("a", x), ("b", y))
    )
    report = diff_checkpoints(a, b)
    require_apart(report, {"x": Expected(wanted[0], 0, 0, *wanted[1:]) if wanted else None})


@pytest.mark.parametrize("way", ["cached", "direct", "dropped"])
@pytest.mark.parametrize("dtype", ["F8_E4M3", "F32", "F4"])
def test_a_tensor_of_several_windows_is_compared_to_its_ends(
    tmp_path: Path, dtype: str, way: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Bytes are changed on both sides of every border between windows, and at the ends."""
    monkeypatch.setattr("reshard.inspection.diff.choose_ways_to_read", lambda _path, _size: Ways(way, "cached"))
    size = (9 << 20) + 8
    one = random.Random(dtype).randbytes(size)
    other = bytearray(one)
    changed = [0, (4 << 20) - 1, 4 << 20, (8 << 20) - 1, 8 << 20, size - 1, 5_000_000, 5_131_072]
    for place in changed:
        other[place] ^= 1
    shape = [size * 2 if dtype == "F4" else size // SIZES.get(dtype, 1)]
    a = write(tmp_path / "a.safetensors", {"before": ("U8", [3], b"abc"), "x": (dtype, shape, one)})
    b = write(tmp_path / "b.safetensors", {"x": (dtype, shape, bytes(other)), "before": ("U8", [3], b"abc")})
    places = {place * 2 if dtype == "F4" else place // SIZES.get(dtype, 1) for place in changed}
    report = diff_checkpoints(a, b)
    assert (report.same, report.compared) == (1, size + 3)
    (found,) = report.values
    assert (found.elements, found.apart.different) == (shape[0], len(places))
    assert (found.apart.first, found.apart.last) == (min(places), max(places))


@pytest.mark.parametrize("dtype", ["BF16", "F8_E5M2", "I16"])
def test_what_is_counted_adds_up_over_a_long_tensor(tmp_path: Path, dtype: str) -> None:
    """Changed bits all over it: in most stretches that are looked at together some are NaN, some infinite."""
    chance, size = random.Random(dtype), 600_000
    one = chance.randbytes(size)
    other = bytearray(one)
    for place in chance.sample(range(size), 3000):
        other[place] ^= 1 << chance.randrange(8)
    if dtype == "BF16":
        for place in range(1000, size, 40_000):
            other[place : place + 4] = b"\x80\x7f\xc0\xff"  # infinity and NaN
    shape = [size // SIZES.get(dtype, 1)]
    a = write(tmp_path / "a.safetensors", {"x": (dtype, shape, one)})
    b = write(tmp_path / "b.safetensors", {"x": (dtype, shape, bytes(other))})
    wanted = expected(one, bytes(other), dtype)
    assert wanted
    assert dtype == "I16" or (min(wanted.nans) > 5 and wanted.infinite > 2)
    require_apart(diff_checkpoints(a, b), {"x": wanted})


# --- layouts ---


@pytest.fixture(scope="module")
def root(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("diff")


Made = Callable[[str, int], Path]


@pytest.fixture(scope="module")
def made(root: Path) -> Made:
    """The small checkpoint of a family, or its rank files; made once, not to be changed."""

    def of(name: str, ranks: int = 0) -> Path:
        source, target = root / name, root / f"{name}-mp{ranks}"
        if not source.exists():
            write_small(source, name)
        if ranks and not target.exists():
            keep = name.startswith(("deepseek-v3", "glm"))
            convert_checkpoint(Job(source, ranks, keep_mtp=keep), target)
        return target if ranks else source

    return of


def is_nothing(report: DiffReport) -> bool:
    return (report.values, report.kinds, report.only_a, report.only_b) == ((), (), (), ()) and report.is_same


def load(folder: Path) -> dict[str, Tensor]:
    return {name: tensor for path in folder.glob("*.safetensors") for name, tensor in load_file(path).items()}


def change_byte(path: Path, name: str, place: int, mask: int) -> None:
    """Flips bits of one byte of a tensor."""
    content = bytearray(path.read_bytes())
    start = 8 + int.from_bytes(content[:8], "little")
    begin, end = json.loads(content[8:start])[name]["data_offsets"]
    assert begin + place < end
    content[start + begin + place] ^= mask
    path.write_bytes(content)


@pytest.mark.parametrize("name", ["deepseek-v3", "deepseek-v3.2", "glm-5.1-fp8"])
def test_a_checkpoint_and_its_rank_files_are_the_same(made: Made, name: str) -> None:
    count = len(load(made(name, 0)))
    for ranks in (1, 4):
        for sides in ((made(name, 0), made(name, ranks)), (made(name, ranks), made(name, 0))):
            report = diff_checkpoints(*sides)
            assert is_nothing(report)
            assert (report.same, "" in report.recipes) == (count, True)
            assert report.recipes[sides.index(made(name, ranks))].startswith(("deepseek-v3", "glm-5"))


def test_rank_files_of_4_and_of_8_are_the_same(made: Made) -> None:
    report = diff_checkpoints(made("deepseek-v3", 4), made("deepseek-v3", 8))
    assert is_nothing(report)
    assert report.same == len(load(made("deepseek-v3", 0)))


def test_one_file_and_many_are_the_same(made: Made, tmp_path: Path) -> None:
    source = made("deepseek-v3", 0)
    save_file(load(source), tmp_path / "model.safetensors")
    for one in (tmp_path, tmp_path / "model.safetensors"):
        assert is_nothing(diff_checkpoints(source, one))
        assert is_nothing(diff_checkpoints(one, made("deepseek-v3", 4)))


def test_a_changed_element_of_a_rank_file_is_found_under_the_name_of_the_checkpoint(made: Made, tmp_path: Path) -> None:
    """Rank 2 of 4 holds the third quarter of the columns of `wo`."""
    target = shutil.copytree(made("deepseek-v3", 4), tmp_path / "target")
    file = target / "model2-mp4.safetensors"
    part = load_file(file)["layers.1.attn.wo.weight"]
    row, column = part.shape[0] - 2, 5
    change_byte(file, "layers.1.attn.wo.weight", row * part.shape[1] + column, 0x80)  # the sign of an F8
    value = abs(float(part[row, column].float()))
    report = diff_checkpoints(made("deepseek-v3", 0), target)
    place = row * 4 * part.shape[1] + 2 * part.shape[1] + column
    wanted = dict.fromkeys(load(made("deepseek-v3", 0)))
    changed = {"model.layers.1.self_attn.o_proj.weight": Expected(1, place, place, (0, 0), 0, 2 * value, 2.0)}
    assert value > 0
    require_apart(report, wanted | changed)


def test_an_expert_of_a_rank_file_is_found(made: Made, tmp_path: Path) -> None:
    target = shutil.copytree(made("deepseek-v3", 4), tmp_path / "target")
    name = next(name for name in load_file(target / "model3-mp4.safetensors") if ".experts.13.w1.weight" in name)
    change_byte(target / "model3-mp4.safetensors", name, 0, 1)
    (found,) = diff_checkpoints(target, made("deepseek-v3", 8)).values
    assert found.name == f"model.{name}".replace(".ffn.", ".mlp.").replace(".w1.", ".gate_proj.")


def test_replicas_that_differ_are_refused_unless_the_first_is_asked_for(made: Made, tmp_path: Path) -> None:
    target = shutil.copytree(made("deepseek-v3", 4), tmp_path / "target")
    change_byte(target / "model2-mp4.safetensors", "norm.weight", 1, 1)
    with pytest.raises(Refused) as refused:
        diff_checkpoints(made("deepseek-v3", 0), target)
    assert [problem.kind for problem in refused.value.problems] == ["replicas-differ"]
    assert is_nothing(diff_checkpoints(made("deepseek-v3", 0), target, DiffChoice(replicas="first")))
    assert is_nothing(diff_checkpoints(made("deepseek-v3", 0), target, DiffChoice(only=["model.layers.0.*"])))
    change_byte(target / "model0-mp4.safetensors", "norm.weight", 1, 1)
    (found,) = diff_checkpoints(made("deepseek-v3", 0), target, DiffChoice(replicas="first")).values
    assert found.name == "model.norm.weight"


def test_rank_files_without_the_mtp_layers_lack_them(made: Made, tmp_path: Path) -> None:
    source = made("deepseek-v3", 0)
    convert_checkpoint(Job(source, 2), tmp_path / "target")
    report = diff_checkpoints(source, tmp_path / "target")
    layers = json.loads((source / "config.json").read_text())["num_hidden_layers"]
    mtp = {name for name in load(source) if name.startswith(f"model.layers.{layers}.")}
    assert (set(report.only_a), report.only_b, report.values, report.kinds) == (mtp, (), (), ())
    report = diff_checkpoints(tmp_path / "target", source)
    assert (report.only_a, set(report.only_b)) == ((), mtp)


def test_a_missing_rank_file_is_refused(made: Made, tmp_path: Path) -> None:
    target = shutil.copytree(made("deepseek-v3", 4), tmp_path / "target")
    (target / "model1-mp4.safetensors").unlink()
    with pytest.raises(Refused, match="model1-mp4"):
        diff_checkpoints(made("deepseek-v3", 0), target)


def test_what_no_recipe_knows_is_compared_by_its_names(tmp_path: Path) -> None:
    one = {"some.weight": torch.arange(6.0), "other": torch.ones(2, 2)}
    for folder, tensors in (("a", one), ("b", one | {"other": torch.tensor([[1.0, 1.0], [1.0, 1.5]])})):
        (tmp_path / folder).mkdir()
        save_file(tensors, tmp_path / folder / "model.safetensors")
    report = diff_checkpoints(tmp_path / "a", tmp_path / "b")
    assert report.recipes == ("", "")
    require_apart(report, {"some.weight": None, "other": Expected(1, 3, 3, (0, 0), 0, 0.5, 1 / 3)})


def test_single_rank_files_are_compared_by_their_names(made: Made) -> None:
    """Another rank has other experts, other parts of the same name, and the same norms."""
    folder = made("deepseek-v3", 4)
    files = folder / "model0-mp4.safetensors", folder / "model1-mp4.safetensors"
    sides = [load_file(file) for file in files]
    report = diff_checkpoints(*files)
    both = [name for name in sides[0] if name in sides[1]]
    same = [name for name in both if oracle_equal(sides[0][name], sides[1][name])]
    assert 0 < len(same) < len(both) < len(sides[0])
    assert (report.same, {found.name for found in report.values}) == (len(same), set(both) - set(same))
    assert set(report.only_a) == set(sides[0]) - set(both)
    assert set(report.only_b) == set(sides[1]) - set(both)


def oracle_equal(one: Tensor, other: Tensor) -> bool:
    return torch.equal(one.reshape(-1).view(torch.uint8), other.reshape(-1).view(torch.uint8))


def test_missing_tensors_and_other_kinds_are_told_apart(tmp_path: Path) -> None:
    a = {
        "same": torch.ones(3),
        "empty": torch.ones(0, 4),
        "dtype": torch.ones(4),
        "shape": torch.ones(2, 6),
        "flat": torch.ones(4, 1),
        "gone": torch.ones(1),
        "hollow": torch.ones(0),
        "no elements": torch.ones(0, 2),
    }
    b = {
        "same": torch.ones(3),
        "empty": torch.ones(0, 4),
        "dtype": torch.ones(4, dtype=torch.bfloat16),
        "shape": torch.ones(3, 4),
        "flat": torch.ones(4),
        "new": torch.ones(1),
        "no elements": torch.ones(2, 0),
    }
    save_file(a, tmp_path / "a.safetensors")
    save_file(b, tmp_path / "b.safetensors")
    report = diff_checkpoints(tmp_path / "a.safetensors", tmp_path / "b.safetensors")
    assert {(kind.name, kind.a, kind.b) for kind in report.kinds} == {
        ("dtype", "F32 [4]", "BF16 [4]"),
        ("shape", "F32 [2, 6]", "F32 [3, 4]"),
        ("flat", "F32 [4, 1]", "F32 [4]"),
        ("no elements", "F32 [0, 2]", "F32 [2, 0]"),
    }
    assert (set(report.only_a), report.only_b) == ({"gone", "hollow"}, ("new",))
    assert (report.same, report.values, report.is_same) == (2, (), False)


def test_patterns_choose_what_is_compared(made: Made, tmp_path: Path) -> None:
    source = made("deepseek-v3", 0)
    tensors = load(source)
    changed = tensors | {"model.norm.weight": tensors["model.norm.weight"] + 1}
    del changed["lm_head.weight"]
    save_file(changed, tmp_path / "b.safetensors")
    b = tmp_path / "b.safetensors"
    both = diff_checkpoints(source, b)
    assert (len(both.values), both.only_a) == (1, ("lm_head.weight",))
    report = diff_checkpoints(source, b, DiffChoice(only=["*.1.self_attn.*", "model.embed*"]))
    fitting = {name for name in tensors if name.startswith(("model.layers.1.self_attn.", "model.embed"))}
    assert is_nothing(report)
    assert report.same == len(fitting)
    assert report.compared == sum(tensors[name].nbytes for name in fitting)
    assert not diff_checkpoints(source, b, DiffChoice(only=["lm_head.*"])).is_same
    with pytest.raises(Refused) as refused:
        diff_checkpoints(source, b, DiffChoice(only=["lm_head", "model.*", "MODEL.*"]))
    assert [problem.subject for problem in refused.value.problems] == ["--only lm_head", "--only MODEL.*"]


def test_the_most_different_come_first(tmp_path: Path) -> None:
    base = torch.full((100,), 2.0)
    a = dict.fromkeys(["tiny", "sign", "few", "many", "nan"], base)
    b = {name: base.clone() for name in a}
    b["tiny"][:] = 2.0001
    b["sign"][7] = -2.0
    b["few"][:2] = 3.0
    b["many"][:9] = 3.0
    b["nan"][0] = torch.nan
    save_file({name: tensor.clone() for name, tensor in a.items()}, tmp_path / "a.safetensors")
    save_file(b, tmp_path / "b.safetensors")
    report = diff_checkpoints(tmp_path / "a.safetensors", tmp_path / "b.safetensors")
    assert [found.name for found in report.values] == ["nan", "sign", "many", "few", "tiny"]


def lines_of(capsys: pytest.CaptureFixture[str], *words: object) -> list[str]:
    """What `diff` prints."""
    main(["diff", *map(str, words)])
    return capsys.readouterr().out.splitlines()


def test_a_nan_is_in_the_verdict_the_text_and_the_tables(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Its tensor has no difference that is a number, and stands before those that have one."""
    names = [f"layers.{number}.{kind}" for number in range(4) for kind in ("a", "b")]
    base = {name: torch.full((5,), 2.0) for name in names}
    b = {name: tensor.clone() for name, tensor in base.items()}
    b["layers.1.a"][3] = torch.nan
    save_file(base, tmp_path / "a.safetensors")
    save_file(b, tmp_path / "b.safetensors")
    sides = tmp_path / "a.safetensors", tmp_path / "b.safetensors"
    verdict = "different: 1 of 8 tensors differs; 1 NaN only in B, in layers.1.a"
    assert lines_of(capsys, *sides)[0] == verdict
    assert verdict in str(diff_checkpoints(*sides))
    for name in ("layers.2.a", "layers.2.b"):
        b[name][:] = 3.0
    b["layers.1.b"][0] = torch.inf
    save_file(b, sides[1])
    report = diff_checkpoints(*sides)
    assert [(group.name, group.nans, group.infinite) for group in report.layers[:2]] == [
        ("layers.1", (0, 1), 1),
        ("layers.2", (0, 0), 0),
    ]
    assert [(group.nans, group.infinite) for group in report.modules] == [((0, 1), 0), ((0, 0), 1)]
    lines = lines_of(capsys, *sides)
    assert "; 1 NaN only in B, 1 infinite on a side, in layers.1." in lines[0]
    assert "; the largest relative norm of a difference is 50 % in layers.2." in lines[0]
    table = lines[next(n for n, line in enumerate(lines) if line.startswith("by layer")) :]
    assert (table[0].split()[-4:], table[1].split()[-2:]) == (["NaN", "in", "B", "infinite"], ["1", "1"])
    base["layers.1.a"][:2] = torch.tensor([torch.nan, 0])
    save_file(base, sides[0])
    assert "; 1 NaN in A and 1 in B, 1 infinite on a side, in " in lines_of(capsys, *sides)[0]


def test_what_the_index_does_not_name_is_in_the_verdict(
    made: Made, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    source = made("deepseek-v3", 0)
    b = shutil.copytree(source, tmp_path / "b")
    file = next(path for path in b.glob("*.safetensors") if "lm_head.weight" in load_file(path))
    save_file(load_file(file) | {"value_head.weight": torch.ones(3)}, file)
    count = f"{len(load(source)):,}"
    verdict = f"same: {count} tensors, equal bit by bit; B holds 1 more that its index does not name"
    assert lines_of(capsys, source, b)[0] == verdict
    report = diff_checkpoints(source, b)
    assert report.is_same
    assert verdict in str(report)
    assert [(left.side, left.names) for left in report.left_aside] == [("B", ("value_head.weight",))]
    assert diff_checkpoints(source, b, DiffChoice(only=["lm_head.*"])).left_aside == ()
    (tmp_path / "one").mkdir()
    save_file(load(source), tmp_path / "one" / "model.safetensors")
    save_file({"value_head.weight": torch.ones(3)}, tmp_path / "one" / "value.safetensors")
    assert lines_of(capsys, tmp_path / "one", source)[0].endswith("; A holds 1 more in files that were left aside")


def test_a_prefix_of_some_names_is_noted_and_not_changed(tmp_path: Path) -> None:
    names = [f"model.layers.{number}.mlp.up_proj.weight" for number in range(4)]
    save_file({name: torch.ones(3) for name in names}, tmp_path / "a.safetensors")
    save_file(
        {f"{'module.' * (n < 3)}{name}": torch.ones(3) for n, name in enumerate(names)}, tmp_path / "b.safetensors"
    )
    for letter, sides in (("B", ("a", "b")), ("A", ("b", "a"))):
        report = diff_checkpoints(tmp_path / f"{sides[0]}.safetensors", tmp_path / f"{sides[1]}.safetensors")
        assert (report.same, len(report.only_a), len(report.only_b)) == (1, 3, 3)
        (note,) = report.notes
        assert note.kind == "prefix"
        assert note.text.startswith(f"{letter}: the names are compared as they are")
        assert "3 of 4 names: `module.` in front was taken off) 3 more would be" in note.text
    save_file({name + "er": torch.ones(3) for name in names}, tmp_path / "b.safetensors")
    assert diff_checkpoints(tmp_path / "a.safetensors", tmp_path / "b.safetensors").notes == ()


def test_a_pattern_with_a_slip_is_refused_with_the_nearest(made: Made) -> None:
    with pytest.raises(Refused, match=r"--only 'model\.layers\.\*' fits \d+ names"):
        diff_checkpoints(made("deepseek-v3", 0), made("deepseek-v3", 0), DiffChoice(only=["model.layer.*"]))


def test_quiet_prints_the_verdict_alone_and_only_of_differences(
    made: Made, bf16: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    source = made("deepseek-v3", 0)
    assert lines_of(capsys, source, source, "--quiet") == []
    (line,) = lines_of(capsys, source, bf16, "--quiet")
    assert line.startswith("different: ")


# --- block scales ---


def test_scaled_weights_are_compared_as_they_are_stored(
    made: Made, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """The code and the scale, each by itself: half the code by twice the scale is another code and another scale."""
    source = made("deepseek-v3", 0)
    tensors = load(source)
    name = "model.layers.1.self_attn.o_proj.weight"
    codes = torch.full(tensors[name].shape, 2.0).to(torch.float8_e4m3fn)
    halves = torch.full(tensors[name].shape, 1.0).to(torch.float8_e4m3fn)
    scale = torch.ones_like(tensors[f"{name}_scale_inv"])
    for folder, code, by in (("a", codes, scale), ("b", halves, scale * 2)):
        (tmp_path / folder).mkdir()
        shutil.copyfile(source / "config.json", tmp_path / folder / "config.json")
        save_file(tensors | {name: code, f"{name}_scale_inv": by}, tmp_path / folder / "model.safetensors")
    report = diff_checkpoints(tmp_path / "a", tmp_path / "b")
    size, scales = codes.numel(), scale.numel()
    wanted = dict.fromkeys(tensors) | {
        name: Expected(size, 0, size - 1, (0, 0), 0, 1.0, 0.5),
        f"{name}_scale_inv": Expected(scales, 0, scales - 1, (0, 0), 0, 1.0, 0.5),
    }
    require_apart(report, wanted)
    assert {found.name: found.is_coded for found in report.values} == {name: True, f"{name}_scale_inv": False}
    lines = lines_of(capsys, tmp_path / "a", tmp_path / "b")
    assert [line.split()[1] for line in lines if line.startswith(f"{name} ")] == ["F8_E4M3*"]
    assert [line.split()[1] for line in lines if line.startswith(f"{name}_")] == ["F32"]
    assert sum(line.startswith("* codes of block-scaled weights") for line in lines) == 1


@pytest.fixture(scope="module")
def bf16(made: Made, root: Path) -> Path:
    """The small V3 in BF16, by torch."""
    source, folder = made("deepseek-v3", 0), root / "bf16"
    folder.mkdir()
    shutil.copyfile(source / "config.json", folder / "config.json")
    save_file(oracle_casts.cast_to_bf16(source), folder / "model.safetensors")
    return folder


def test_fp8_and_its_bf16_are_of_other_kinds(made: Made, bf16: Path) -> None:
    source = made("deepseek-v3", 0)
    tensors = load(source)
    scaled = {name for name, tensor in tensors.items() if tensor.dtype == torch.float8_e4m3fn}
    report = diff_checkpoints(source, bf16)
    assert {kind.name for kind in report.kinds} == scaled
    assert set(report.only_a) == {f"{name}_scale_inv" for name in scaled}
    assert (report.values, report.only_b, report.dequantized) == ((), (), 0)
    (note,) = report.notes
    assert note.text.startswith(f"{len(scaled):,} tensors have block scales on a side")
    assert "--dequantize compares their numbers" in note.text
    assert diff_checkpoints(source, bf16, DiffChoice(dequantize=True)).notes == ()
    assert diff_checkpoints(source, source).notes == ()


@pytest.mark.parametrize("ranks", [0, 1, 4])
def test_fp8_is_the_same_as_its_bf16_once_dequantized(made: Made, bf16: Path, ranks: int) -> None:
    scaled = sum(tensor.dtype == torch.float8_e4m3fn for tensor in load(made("deepseek-v3", 0)).values())
    for sides in ((made("deepseek-v3", ranks), bf16), (bf16, made("deepseek-v3", ranks))):
        report = diff_checkpoints(*sides, DiffChoice(dequantize=True))
        assert is_nothing(report)
        assert (report.dequantized, report.same) == (scaled, len(load(bf16)))


def test_f32_is_rounded_to_be_compared_with_bf16_and_not_with_f16(bf16: Path, tmp_path: Path) -> None:
    tensors = load(bf16)
    long = {name: tensor.float() * 1.001953125 for name, tensor in tensors.items() if "norm" in name}
    for folder, changed in (("a", long), ("b", {name: tensor.bfloat16() for name, tensor in long.items()})):
        (tmp_path / folder).mkdir()
        save_file(tensors | changed, tmp_path / folder / "model.safetensors")
    (tmp_path / "c").mkdir()
    save_file(tensors | {name: tensor.half() for name, tensor in long.items()}, tmp_path / "c" / "model.safetensors")
    report = diff_checkpoints(tmp_path / "a", tmp_path / "b", DiffChoice(dequantize=True))
    assert is_nothing(report)
    assert (report.dequantized, report.rounded) == (0, len(long))
    assert {kind.name for kind in diff_checkpoints(tmp_path / "a", tmp_path / "b").kinds} == long.keys()
    halves = diff_checkpoints(tmp_path / "a", tmp_path / "c", DiffChoice(dequantize=True))
    assert {kind.name for kind in halves.kinds} == long.keys()


def test_rank_files_cast_to_bf16_are_the_same_as_their_source_once_dequantized(made: Made, tmp_path: Path) -> None:
    source = made("deepseek-v3", 0)
    convert_checkpoint(Job(source, 4, cast="bf16", keep_mtp=True), tmp_path / "target")
    assert is_nothing(diff_checkpoints(tmp_path / "target", source, DiffChoice(dequantize=True)))


def test_padding_is_no_difference(made: Made, tmp_path: Path) -> None:
    """The manifest tells what was there before."""
    source = made("deepseek-v3-for-32", 0)
    convert_checkpoint(Job(source, 32, pad=True, keep_mtp=True), tmp_path / "target")
    assert is_nothing(diff_checkpoints(source, tmp_path / "target"))


def test_a_scale_of_another_shape_dequantizes_nothing(made: Made, bf16: Path, tmp_path: Path) -> None:
    source = made("deepseek-v3", 0)
    name = "model.layers.1.self_attn.o_proj.weight"
    tensors = load(source)
    save_file(tensors | {f"{name}_scale_inv": torch.ones(99, 1)}, tmp_path / "a.safetensors")
    report = diff_checkpoints(tmp_path / "a.safetensors", bf16, DiffChoice(dequantize=True))
    assert [kind.name for kind in report.kinds] == [name]
    assert (report.values, report.only_a, report.only_b) == ((), (f"{name}_scale_inv",), ())


def test_how_far_dequantized_values_are_apart(made: Made, bf16: Path, tmp_path: Path) -> None:
    tensors = load(bf16)
    name = "model.layers.1.self_attn.o_proj.weight"
    before = tensors[name].clone()
    tensors[name] += torch.rand(before.shape) * (torch.rand(before.shape) < 0.1)
    folder = shutil.copytree(bf16, tmp_path / "b")
    save_file(tensors, folder / "model.safetensors")
    one, other = (tensor.view(torch.uint8).numpy().tobytes() for tensor in (before, tensors[name]))
    report = diff_checkpoints(made("deepseek-v3", 4), folder, DiffChoice(dequantize=True))
    apart = expected(one, other, "BF16")
    assert apart
    assert apart.different > 10
    require_apart(report, dict.fromkeys(tensors) | {name: apart})
    (found,) = report.values
    assert (found.dtype, found.elements) == ("BF16", before.numel())


def test_a_stray_scale_beside_bf16_is_still_missing_on_the_other_side(made: Made, bf16: Path, tmp_path: Path) -> None:
    folder = shutil.copytree(bf16, tmp_path / "b")
    name = "model.layers.1.self_attn.o_proj.weight_scale_inv"
    save_file(load(bf16) | {name: torch.ones(1, 1)}, folder / "model.safetensors")
    report = diff_checkpoints(made("deepseek-v3", 0), folder, DiffChoice(dequantize=True))
    assert (report.only_a, report.only_b, report.values, report.kinds) == ((), (name,), (), ())


def test_v4_and_its_rank_files_differ_in_what_is_dequantized(made: Made) -> None:
    """Its code wants `wo_a` in BF16. FP4 is I8 on one side and F4 on the other, and no difference."""
    sides = made("deepseek-v4-flash", 0), made("deepseek-v4-flash", 4)
    report = diff_checkpoints(*sides)
    assert {kind.name.rpartition(".attn.")[2] for kind in report.kinds} == {"wo_a.weight"}
    assert {name.rpartition(".attn.")[2] for name in report.only_a} == {"wo_a.scale"}
    assert (report.values, report.only_b) == ((), ())
    assert len(report.only_a) == len(report.kinds) > 1
    again = diff_checkpoints(*sides, DiffChoice(dequantize=True))
    assert is_nothing(again)
    assert again.dequantized == len(report.kinds)


def test_fp4_in_i8_is_compared_as_the_numbers_that_it_holds(made: Made, tmp_path: Path) -> None:
    source = made("deepseek-v4-flash", 0)
    tensors = load(source)
    name = next(name for name, tensor in tensors.items() if tensor.dtype == torch.int8)
    after = tensors[name].clone().view(torch.uint8)
    after[1, 2], after[3, 0] = after[1, 2] ^ 0x71, after[3, 0] ^ 0x0F
    folder = shutil.copytree(source, tmp_path / "b")
    for path in folder.glob("*.safetensors"):
        if name in load_file(path):
            save_file(load_file(path) | {name: after.view(torch.int8)}, path)
    report = diff_checkpoints(source, folder)
    one, other = (tensor.view(torch.uint8).numpy().tobytes() for tensor in (tensors[name], after))
    apart = expected(one, other, "F4")
    assert apart
    assert apart.different == 3
    require_apart(report, dict.fromkeys(tensors) | {name: apart})
    assert (report.values[0].dtype, report.values[0].elements) == ("F4", 2 * after.numel())


def test_fp4_and_the_fp8_that_it_was_cast_to_are_the_same_once_dequantized(made: Made, tmp_path: Path) -> None:
    source = made("deepseek-v4-flash", 0)
    convert_checkpoint(Job(source, 1, to="hf", expert_dtype="fp8"), tmp_path / "b")
    assert len(diff_checkpoints(source, tmp_path / "b").kinds) > 1
    report = diff_checkpoints(source, tmp_path / "b", DiffChoice(dequantize=True))
    assert is_nothing(report)
    assert report.dequantized == sum(tensor.dtype == torch.int8 for tensor in load(source).values())


# --- files that change meanwhile ---


def spoiling(before: Callable[[], object], meanwhile: Callable[[], object]) -> Callable[[int, int], None]:
    """A progress that spoils something when the headers are read, and something when the first bytes are compared."""
    told: list[int] = []

    def show(done: int, _total: int) -> None:
        told.append(done)
        if len(told) <= 2:
            (before, meanwhile)[len(told) - 1]()

    return show


def nothing() -> None:
    pass


@pytest.fixture
def twins(tmp_path: Path) -> tuple[Path, Path]:
    """Two files of the same tensors, written long ago."""
    tensors = {"x": torch.arange(4.0), "y": torch.full((4,), 9.0)}
    paths = tmp_path / "a" / "model.safetensors", tmp_path / "b" / "model.safetensors"
    for path in paths:
        path.parent.mkdir()
        save_file(tensors, path)
        os.utime(path, (1, 1))
    return paths


def require_refused(twins: tuple[Path, Path], changed: Path, **spoils: Callable[[], object]) -> None:
    """By the name of the changed file, and of its folder."""
    with pytest.raises(Refused) as error:
        diff_checkpoints(*twins, progress=spoiling(**{"before": nothing, "meanwhile": nothing, **spoils}))
    assert [(problem.kind, problem.subject) for problem in error.value.problems] == [("file-changed", str(changed))]


@pytest.mark.parametrize("side", [0, 1])
def test_a_file_that_is_replaced_before_its_data_is_read_is_refused(side: int, twins: tuple[Path, Path]) -> None:
    """By one of the same size in which x lies where y lay."""
    path, twin = twins[side], twins[side].with_name("twin")
    twin.write_bytes(path.read_bytes().replace(b'"x"', b"%").replace(b'"y"', b'"x"').replace(b"%", b'"y"'))
    require_refused(twins, path, before=lambda: twin.replace(path))


@pytest.mark.parametrize("side", [0, 1])
@pytest.mark.parametrize("spoil", [Path.touch, Path.unlink, lambda path: os.truncate(path, 160)])
def test_a_file_that_changes_while_it_is_compared_is_refused(
    side: int, spoil: Callable[[Path], object], twins: tuple[Path, Path]
) -> None:
    path = twins[side]
    require_refused(twins, path, meanwhile=lambda: spoil(path))


# --- memory ---

RECIPE = """
name  = "large"
about = "one tensor"
left  = "one"
right = "other"
files = "{rank}-of-{ranks}.safetensors"
rules = [["same", "wide.weight", "wide.weight", "columns"]]
"""


def test_a_tensor_of_200_megabytes_takes_no_more_memory_than_the_buffers(tmp_path: Path) -> None:
    """Joined from the columns of four ranks, and different in nearly every element. Looked at after every stretch."""
    (tmp_path / "large.toml").write_text(RECIPE)
    wide = [("wide.weight", "BF16", (10_000, 10_000))]
    write_tensors(tmp_path / "a", wide, {}, 1, seed=1)
    write_tensors(tmp_path / "other", wide, {}, 1, seed=2)
    convert_checkpoint(Job(tmp_path / "other", 4, recipe=str(tmp_path / "large.toml")), tmp_path / "b")
    before, seen = private_memory(), []

    choice = DiffChoice(recipe=str(tmp_path / "large.toml"))
    report = diff_checkpoints(
        tmp_path / "a", tmp_path / "b", choice, lambda _done, _total: seen.append(private_memory())
    )
    shutil.rmtree(tmp_path)
    assert report.values[0].apart.different > 99_000_000
    assert len(seen) > 40
    assert max(seen) - before < 100 << 20  # four threads at most, each with 12 MiB of buffers


def private_memory() -> int:
    return int(Path("/proc/self/status").read_text().split("RssAnon:")[1].split()[0]) << 10


# --- the command ---


def refuse_constant(text: str) -> float:
    raise AssertionError(f"{text} is no JSON")


def test_the_command_exits_with_0_where_all_is_the_same(made: Made, capsys: pytest.CaptureFixture[str]) -> None:
    a, b = str(made("deepseek-v3", 0)), str(made("deepseek-v3", 4))
    assert main(["diff", a, b]) == 0
    text = capsys.readouterr().out
    assert "by the recipe deepseek-v3" in text
    assert "other values" in text
    assert main(["diff", a, b, "--json"]) == 0
    assert json.loads(capsys.readouterr().out)["status"] == "same"


def test_the_command_exits_with_1_and_says_what_differs(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    names = [f"layers.{number}.weight" for number in range(30)]
    a = {name: torch.full((5,), 2.0) for name in names}
    b = {name: torch.tensor([2.0, 2, 2 + number, torch.inf, torch.nan]) for number, name in enumerate(names)}
    save_file(a | {"only\x1b[31m": torch.ones(1)}, tmp_path / "a.safetensors")
    save_file(b | {"new\nline": torch.ones(1)}, tmp_path / "b.safetensors")
    sides = [str(tmp_path / "a.safetensors"), str(tmp_path / "b.safetensors")]
    assert main(["diff", *sides, "--show", "4"]) == 1
    text = capsys.readouterr().out
    assert text.startswith(
        "different: 32 of 32 tensors differ; 30 NaNs only in B, 30 infinite on a side, in layers.29.weight and 29 more "
        "tensors; the largest relative norm of a difference is 837 % in "
    )
    assert "... and 26 more" in text
    assert text.index("layers.29.weight") < text.index("layers.28.weight")
    assert "layers.20.weight" not in text
    assert "\x1b" not in text
    assert "only\\x1b[31m" in text
    assert "new\\nline" in text
    assert main(["diff", *sides, "--json"]) == 1
    found = json.loads(capsys.readouterr().out, parse_constant=refuse_constant)
    assert (found["status"], len(found["values"]), found["only_a"]) == ("differs", 30, ["only\x1b[31m"])
    assert found["values"][0] == {
        "name": "layers.29.weight",
        "dtype": "F32",
        "elements": 5,
        "apart": {
            "different": 3,
            "first": 2,
            "last": 4,
            "nans": [0, 1],
            "infinite": 1,
            "max_absolute": 29.0,
            "max_relative": 29 / 31,
        },
        "overall": {
            "finite": 3,
            "rmse": pytest.approx(29 / math.sqrt(3)),
            "relative_norm": pytest.approx(29 / math.sqrt(12)),
            "cosine": pytest.approx((4 + 4 + 62) / math.sqrt(12 * (4 + 4 + 31**2))),
        },
        "is_coded": False,
    }


def test_the_command_exits_with_2_where_it_refuses(
    made: Made, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    source = str(made("deepseek-v3", 0))
    assert main(["diff", source, str(tmp_path / "nothing")]) == 2
    assert "nothing" in capsys.readouterr().err
    (tmp_path / "broken.safetensors").write_bytes(b"no header")
    assert main(["diff", source, str(tmp_path / "broken.safetensors"), "--json"]) == 2
    assert json.loads(capsys.readouterr().out)["status"] == "refused"
    assert main(["diff", source, source, "--only", "nothing"]) == 2
    assert main(["diff", source, source, "--replicas", "first"]) == 2


def test_the_command_takes_its_options(made: Made, bf16: Path, capsys: pytest.CaptureFixture[str]) -> None:
    a, b = str(made("deepseek-v3", 4)), str(bf16)
    only = ["--only", "*.o_proj.*", "--only", "*norm.weight"]
    assert main(["diff", a, b, *only]) == 1
    assert "BF16 [" in capsys.readouterr().out
    options = ["--dequantize", "--recipe", "deepseek-v3", "--replicas", "first", "--ignore-extra-files"]
    assert main(["diff", a, b, *only, *options]) == 0
    assert "dequantized" in capsys.readouterr().out
