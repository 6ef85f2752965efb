"""Root mean square error, relative norm and cosine of `diff`, against exact fractions, numpy and torch."""

import json
import math
import random
import tracemalloc
from collections.abc import Callable
from fractions import Fraction
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from families import write_small
from jobs import Job, convert_checkpoint
from safetensors.torch import load_file, save_file
from test_diff import (  # type: ignore[import-not-found]
    FLOATS,
    INTEGERS,
    LARGEST,
    SIZES,
    data_of,
    numbers_of,
    write,
)
from torch import Tensor

from reshard.cli.main import main
from reshard.execution.windows import WINDOW_SIZE
from reshard.inspection.diff import diff_checkpoints
from reshard.inspection.diff_report import DiffReport
from reshard.inspection.value_distance import MEASURED_ELEMENTS, measure_range
from reshard.inspection.value_sums import OverallDistance


def root(value: Fraction) -> float:
    """The square root to float64, also of what is no float64."""
    scale = 1 << 4000
    return float(
        min(Fraction(math.isqrt(value.numerator * scale * scale // value.denominator), scale), Fraction(LARGEST))
    )


def expected_overall(one: bytes, other: bytes, dtype: str) -> OverallDistance:
    """Element by element, in fractions."""
    if dtype.startswith("F6_"):
        return OverallDistance(0, None, None, None)
    sides = [numbers_of(data, dtype) for data in (one, other)]
    pairs = [
        (complex(x), complex(y)) if isinstance(x, complex) else (x, y)
        for x, y in zip(*sides, strict=True)
        if np.isfinite(x) and np.isfinite(y)
    ]
    flat: list[tuple[Fraction, Fraction]] = []
    for x, y in pairs:
        both: Any = ((x.real, y.real), (x.imag, y.imag)) if isinstance(x, complex) else ((x, y),)
        flat += [(Fraction(float(a)) if isinstance(a, float) else Fraction(a), Fraction(b)) for a, b in both]
    squares = sum((a * a for a, _ in flat), Fraction(0)), sum((b * b for _, b in flat), Fraction(0))
    product = sum((a * b for a, b in flat), Fraction(0))
    apart = sum(((a - b) ** 2 for a, b in flat), Fraction(0))
    cosine = None
    if squares[0] and squares[1]:
        cosine = root(product**2 / (squares[0] * squares[1])) * (1 if product >= 0 else -1)
    relative = root(apart / squares[0]) if squares[0] else None if apart else 0.0
    return OverallDistance(len(pairs), root(apart / len(pairs)) if pairs else None, relative, cosine)


def require_close(found: OverallDistance, wanted: OverallDistance, name: object = "") -> None:
    assert found.finite == wanted.finite, name
    for field in ("rmse", "relative_norm", "cosine"):
        got, right = getattr(found, field), getattr(wanted, field)
        assert (got is None) == (right is None), (name, field, got, right)
        assert math.isclose(got or 0, right or 0, rel_tol=1e-12, abs_tol=1e-12 if field == "cosine" else 0), (
            name,
            field,
        )


@pytest.mark.parametrize("dtype", [*FLOATS, *INTEGERS, "F4", "F6_E2M3"])
@pytest.mark.parametrize("seed", [0, 1])
def test_the_whole_is_measured_as_fractions_have_it(tmp_path: Path, dtype: str, seed: int) -> None:
    """With zeros, subnormals, NaNs, infinities and the largest values."""
    one, other = data_of(dtype, seed)
    count = {"F4": 2, "F6_E2M3": 4 / 3}.get(dtype, 1 / SIZES.get(dtype, 1))
    shape = [int(len(one) * count)]
    a = write(tmp_path / "a.safetensors", {"x": (dtype, shape, one)})
    b = write(tmp_path / "b.safetensors", {"x": (dtype, shape, other)})
    for left, right, data in ((a, b, (one, other)), (b, a, (other, one))):
        (found,) = diff_checkpoints(left, right).values
        require_close(found.overall, expected_overall(*data, dtype), dtype)


@pytest.mark.parametrize(
    ("a", "b", "wanted"),
    [
        ([3.0, 4.0], [3.0, 4.5], (2, 0.5 / math.sqrt(2), 0.1, (9 + 18) / (5 * math.hypot(3, 4.5)))),
        ([0.0, 0.0], [0.0, 2.0], (2, math.sqrt(2), None, None)),
        ([0.0], [-0.0], (1, 0.0, 0.0, None)),
        ([1.0, 2.0], [-1.0, -2.0], (2, math.sqrt(10), 2.0, -1.0)),
        ([1.0, math.nan], [1.5, 7.0], (1, 0.5, 0.5, 1.0)),
        ([math.inf], [1.0], (0, None, None, None)),
        ([1e-200, 0.0], [1e-200, 1e-200], (2, 1e-200 / math.sqrt(2), 1.0, math.sqrt(0.5))),
        ([1e300, 1e300], [1e300, -1e300], (2, 1e300 * math.sqrt(2), math.sqrt(2), 0.0)),
        ([LARGEST, 1.0], [-LARGEST, 1.0], (2, LARGEST, 2.0, -1.0)),
        ([1e308] * 8, [-1e308] + [1e308] * 7, (8, 1e308 / math.sqrt(2), math.sqrt(0.5), 0.75)),
    ],
)
def test_small_tensors_by_hand(tmp_path: Path, a: list[float], b: list[float], wanted: tuple[Any, ...]) -> None:
    for name, values in (("a", a), ("b", b)):
        save_file({"x": torch.tensor(values, dtype=torch.float64)}, tmp_path / f"{name}.safetensors")
    (found,) = diff_checkpoints(tmp_path / "a.safetensors", tmp_path / "b.safetensors").values
    require_close(found.overall, OverallDistance(*wanted))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32, torch.float64, torch.float8_e4m3fn])
@pytest.mark.parametrize("where", ["all", "first", "last"])
def test_equal_windows_of_a_tensor_that_differs_count(tmp_path: Path, dtype: torch.dtype, where: str) -> None:
    """Also those that were read before the one window that differs; progress counts them once more."""
    elements = (3 * WINDOW_SIZE + 1234) // dtype.itemsize
    generator = torch.Generator().manual_seed(1)
    one = torch.randn(elements, generator=generator).to(dtype)
    other = one.clone()
    chosen = {"all": slice(None, None, 3), "first": slice(0, 5), "last": slice(-5, None)}[where]
    other[chosen] = (one[chosen].double() * 1.5 + 0.25).to(dtype)
    save_file({"x": one, "same": torch.ones(3)}, tmp_path / "a.safetensors")
    save_file({"x": other, "same": torch.ones(3)}, tmp_path / "b.safetensors")
    told: list[tuple[int, int]] = []
    report = diff_checkpoints(
        tmp_path / "a.safetensors", tmp_path / "b.safetensors", progress=lambda done, size: told.append((done, size))
    )
    (found,) = report.values
    x, y = one.double().numpy(), other.double().numpy()
    assert found.overall.finite == elements
    assert found.overall.rmse == pytest.approx(np.sqrt(np.mean((x - y) ** 2)), rel=1e-9)
    assert found.overall.relative_norm == pytest.approx(np.linalg.norm(x - y) / np.linalg.norm(x), rel=1e-9)
    assert found.overall.cosine == pytest.approx(x @ y / np.linalg.norm(x) / np.linalg.norm(y), rel=1e-9)
    assert found.apart.max_relative == pytest.approx(
        np.nanmax(np.abs(x - y) / np.maximum(np.maximum(np.abs(x), np.abs(y)), 1e-300)), rel=1e-12
    )
    assert [done for done, _ in told] == sorted(done for done, _ in told)
    assert told[-1][0] == told[-1][1] >= report.compared


def test_all_runs_give_the_same_numbers(tmp_path: Path) -> None:
    """Whichever thread finishes first."""
    generator = torch.Generator().manual_seed(2)
    one = torch.randn(5 * WINDOW_SIZE // 4, generator=generator)
    save_file({"x": one}, tmp_path / "a.safetensors")
    save_file({"x": one + torch.randn(len(one), generator=generator) / 100}, tmp_path / "b.safetensors")
    reports = [diff_checkpoints(tmp_path / "a.safetensors", tmp_path / "b.safetensors") for _ in range(4)]
    assert len({report.values[0].overall for report in reports}) == 1


# --- layers and modules ---


def make_pair(tmp_path: Path) -> tuple[Path, Path]:
    """Twelve layers, of which the feed-forward parts of 3 to 11 differ, the later the more; odd and empty shapes."""
    generator = torch.Generator().manual_seed(3)
    a: dict[str, Tensor] = {"empty": torch.empty(0, 3), "lm_head.weight": torch.ones(3, 5), "gone": torch.ones(1)}
    b: dict[str, Tensor] = {"empty": torch.empty(0, 3), "lm_head.weight": torch.ones(3, 5)}
    for layer in range(12):
        for module in ("self_attn.q_proj", "mlp.up_proj", "mlp.down_proj"):
            name = f"model.layers.{layer}.{module}.weight"
            a[name] = torch.randn(13, 7, generator=generator)
            b[name] = a[name].clone()
            if layer > 2 and "mlp" in module:
                b[name] *= 1 + layer / 1000
    save_file(a, tmp_path / "a.safetensors")
    save_file(b, tmp_path / "b.safetensors")
    return tmp_path / "a.safetensors", tmp_path / "b.safetensors"


def test_layers_and_modules_are_summed_up_the_worst_first(tmp_path: Path) -> None:
    a, b = make_pair(tmp_path)
    report = diff_checkpoints(a, b)
    one, other = load_file(a), load_file(b)
    layers = {group.name: group for group in report.layers}
    differing = [group.name for group in report.layers if not group.is_same]
    assert differing[:-1] == [f"model.layers.{layer}" for layer in range(11, 2, -1)]
    assert differing[-1] == ""  # what only A has
    assert [group.name for group in report.layers[10:]] == [f"model.layers.{layer}" for layer in (0, 1, 2)]
    for layer in range(3, 12):
        names = [f"model.layers.{layer}.mlp.{kind}_proj.weight" for kind in ("up", "down")]
        x, y = (np.concatenate([side[name].double().numpy().ravel() for name in names]) for side in (one, other))
        found = layers[f"model.layers.{layer}"]
        assert (found.tensors, found.different, found.unpaired, found.overall.finite) == (3, 2, 0, 2 * 13 * 7)
        assert found.overall.relative_norm == pytest.approx(np.linalg.norm(x - y) / np.linalg.norm(x), rel=1e-12)
    assert (layers[""].tensors, layers[""].different, layers[""].unpaired) == (3, 0, 1)
    modules = {group.name: (group.tensors, group.different, group.unpaired) for group in report.modules}
    assert modules["model.layers.#.mlp.up_proj.weight"] == (12, 9, 0)
    assert modules["model.layers.#.self_attn.q_proj.weight"] == (12, 0, 0)
    assert modules["gone"] == (1, 0, 1)


def test_the_verdict_names_the_largest_norm_though_others_stand_first(tmp_path: Path) -> None:
    """A NaN is listed first, whatever the rest of its tensor is."""
    one = {name: torch.ones(100) for name in ("with_nan", "half")}
    other = {name: tensor.clone() for name, tensor in one.items()}
    other["with_nan"][:2] = torch.tensor([math.nan, 1.01])
    other["half"] *= 1.5
    save_file(one, tmp_path / "a.safetensors")
    save_file(other, tmp_path / "b.safetensors")
    report = diff_checkpoints(tmp_path / "a.safetensors", tmp_path / "b.safetensors")
    assert [found.name for found in report.values] == ["with_nan", "half"]
    assert report.worst == report.values[1]


def test_the_summary_fits_a_screen(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    a, b = make_pair(tmp_path)
    assert main(["diff", str(a), str(b), "--show", "8"]) == 1
    text = capsys.readouterr().out
    lines = text.split("\n")
    assert lines[0].startswith("different: 19 of 39 tensors differ; the largest relative norm of a difference is 1.")
    assert lines[0].endswith(f" % in {diff_checkpoints(a, b).values[0].name}")
    assert text.index("by layer") < text.index("by module") < text.rindex("\nother values  ")
    assert len(text[: text.rindex("\nother values  ")].split("\n")) < 40
    assert "in no layer" not in text  # behind the eight worst
    assert main(["diff", str(a), str(b), "--json"]) == 1
    found = json.loads(capsys.readouterr().out)
    assert found["layers"][0]["name"] == "model.layers.11"
    assert found["modules"][0]["overall"]["relative_norm"] == diff_checkpoints(a, b).modules[0].overall.relative_norm
    assert main(["diff", str(a), str(a)]) == 0
    assert capsys.readouterr().out.startswith("same: 39 tensors, equal bit by bit\n")


@pytest.fixture(scope="module")
def llama(tmp_path_factory: pytest.TempPathFactory) -> Callable[[], DiffReport]:
    """A checkpoint against the rank files of a changed one."""
    folder = tmp_path_factory.mktemp("ranks")
    write_small(folder / "a", "deepseek-v3")
    write_small(folder / "b", "deepseek-v3")
    for path in (folder / "b").glob("*.safetensors"):
        tensors = load_file(path)
        for name, tensor in tensors.items():
            if name.endswith("o_proj.weight") and tensor.dtype == torch.float8_e4m3fn:
                tensor.view(torch.uint8)[::3] ^= 1
        save_file(tensors, path, {"format": "pt"})
    convert_checkpoint(Job(folder / "b", 4, keep_mtp=True), folder / "ranks")

    def run() -> DiffReport:
        return diff_checkpoints(folder / "a", folder / "ranks")

    return run


def test_rank_files_are_measured_as_the_whole_tensors(llama: Callable[[], DiffReport]) -> None:
    report = llama()
    assert len(report.values) > 3
    folder = Path(report.a)
    one: dict[str, Tensor] = {}
    other: dict[str, Tensor] = {}
    for side, tensors in ((folder, one), (folder.parent / "b", other)):
        for path in side.glob("*.safetensors"):
            tensors.update(load_file(path))
    for found in report.values:
        x, y = (side[found.name].double().numpy().ravel() for side in (one, other))
        finite = np.isfinite(x) & np.isfinite(y)
        assert found.overall.finite == finite.sum()
        assert found.overall.relative_norm == pytest.approx(
            np.linalg.norm((x - y)[finite]) / np.linalg.norm(x[finite]), rel=1e-12
        )


def test_random_bits_of_a_long_tensor_of_halves(tmp_path: Path) -> None:
    """Infinities and NaNs all over it are left out of the sums on both sides."""
    chance = random.Random(5)
    one = np.frombuffer(chance.randbytes(400_000), np.float16)
    other = np.frombuffer(chance.randbytes(400_000), np.float16)
    a = write(tmp_path / "a.safetensors", {"x": ("F16", [len(one)], one.tobytes())})
    b = write(tmp_path / "b.safetensors", {"x": ("F16", [len(one)], other.tobytes())})
    (found,) = diff_checkpoints(a, b).values
    finite = np.isfinite(one) & np.isfinite(other)
    x, y = one[finite].astype(np.float64), other[finite].astype(np.float64)
    assert found.overall.finite == len(x) < len(one)
    assert found.overall.cosine == pytest.approx(x @ y / np.linalg.norm(x) / np.linalg.norm(y), rel=1e-9)


@pytest.mark.parametrize(("odd", "shown"), [(1.0, ""), (math.nan, "  NaN in B"), (math.inf, "  infinite")])
def test_columns_of_nans_stand_there_if_there_are_any(
    odd: float, shown: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """They took the table over the width of a terminal of 120 columns, with zeros in nearly every model."""
    save_file({"x": torch.tensor([1.0, 2.0])}, tmp_path / "a.safetensors")
    save_file({"x": torch.tensor([1.5, odd])}, tmp_path / "b.safetensors")
    assert main(["diff", str(tmp_path / "a.safetensors"), str(tmp_path / "b.safetensors")]) == 1
    text = capsys.readouterr().out
    assert text.splitlines()[-2].endswith(f"  max abs  max rel{shown}")


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32, torch.float64])
@pytest.mark.parametrize("elements", [1, MEASURED_ELEMENTS - 1, MEASURED_ELEMENTS, 3 * MEASURED_ELEMENTS + 5])
@pytest.mark.parametrize("scale", [1.01, -1.0])
def test_pieces_of_every_length_have_the_sums_of_float64(dtype: torch.dtype, elements: int, scale: float) -> None:
    """Against `math.fsum` of exact squares: 1e-15 a piece. The arrays of one piece hold nothing of the one before."""
    generator = torch.Generator().manual_seed(elements)
    one = torch.randn(elements, generator=generator).to(dtype)
    other = (one.double() * scale + 0.01 * torch.randn(elements, generator=generator)).to(dtype)
    other[elements // 2 :: 7] = one[elements // 2 :: 7]
    other[-1] = scale * one[-1]  # of -1: the largest relative difference there is, in the last piece
    name = {"bfloat16": "BF16", "float16": "F16", "float32": "F32", "float64": "F64"}[str(dtype)[6:]]
    apart, sums = measure_range(one.view(torch.uint8).numpy(), other.view(torch.uint8).numpy(), name, 100)
    x, y = one.double().numpy(), other.double().numpy()
    for found, products in zip(sums[1:], (x * x, y * y, x * y, (x - y) ** 2), strict=True):
        assert float(found) == pytest.approx(math.fsum(products), rel=1e-14, abs=1e-14 * math.fsum(x * x))
    wrong = np.flatnonzero(x != y)
    assert (apart is None) == (not len(wrong))
    if apart:
        assert (apart.different, apart.first, apart.last) == (len(wrong), 100 + wrong[0], 100 + wrong[-1])
        assert apart.max_absolute == np.abs(x - y).max()
        larger = np.maximum(np.abs(x), np.abs(y))[wrong]
        assert apart.max_relative == (np.abs(x - y)[wrong] / larger).max()
    # And it changes neither side.
    assert one.double().numpy().tobytes() == x.tobytes()
    assert other.double().numpy().tobytes() == y.tobytes()


def test_a_window_is_measured_in_little_memory_of_its_own() -> None:
    """Of a window of 4 MiB, whatever its dtype: a few arrays of MEASURED_ELEMENTS numbers."""
    one = np.arange(WINDOW_SIZE // 2, dtype=np.uint16).view(np.uint8)
    other = one[::-1].copy()
    for dtype in ("BF16", "F16", "F32", "F64", "I64", "C64"):
        tracemalloc.start()
        measure_range(one, other, dtype, 0)
        peak = tracemalloc.get_traced_memory()[1]
        tracemalloc.stop()
        assert peak < 20 * 8 * MEASURED_ELEMENTS, dtype
