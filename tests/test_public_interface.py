"""The public interface: its names, how light it is to import, how it refuses and how its values print."""

import inspect
import pickle
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any, cast

import pytest

import reshard
from reshard.synthetic import SMALL_V3, write_checkpoint

FUNCTIONS = ("convert", "diff", "inspect", "load", "open", "plan", "repair", "verify")
NAMES = sorted(["Problem", "Refused", *FUNCTIONS])


@pytest.fixture(scope="module")
def small(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("small") / "source"
    write_checkpoint(folder, SMALL_V3, 2)
    return folder


def modules_after(program: str) -> set[str]:
    """The modules that a new Python has imported once a program has run."""
    text = f"import sys\n{program}\nprint(*sys.modules)"
    return set(subprocess.run([sys.executable, "-c", text], check=True, capture_output=True, text=True).stdout.split())


def test_the_public_names_are_just_these() -> None:
    assert sorted(reshard.__all__) == NAMES
    assert dir(reshard) == sorted([*NAMES, "__version__"])
    with pytest.raises(AttributeError, match="no attribute 'convert_checkpoint'"):
        _ = reshard.convert_checkpoint  # type: ignore[attr-defined]


def test_the_package_says_that_it_has_types() -> None:
    folder = Path(reshard.__file__).parent
    assert (folder / "py.typed").read_bytes() == b""
    assert "__version__" in (folder / "__init__.pyi").read_text(encoding="utf-8")


def test_an_import_alone_loads_neither_numpy_nor_torch_nor_the_functions() -> None:
    assert not {"numpy", "torch", "msgspec", "rich", "reshard.api", "reshard.errors"} & modules_after("import reshard")


def test_looking_at_a_checkpoint_needs_no_numpy(small: Path) -> None:
    loaded = modules_after(f"import reshard\nreshard.inspect({str(small)!r})")
    assert "reshard.inspection.contents" in loaded
    assert not {"numpy", "torch"} & loaded


@pytest.mark.parametrize("name", FUNCTIONS)
def test_each_function_is_documented_with_types_and_an_example(name: str) -> None:
    function: Callable[..., Any] = getattr(reshard, name)
    assert f"reshard.{name}(" in (function.__doc__ or "")
    assert "Refused" in (function.__doc__ or "")
    signature = inspect.signature(function)
    assert signature.return_annotation is not inspect.Signature.empty
    assert all(one.annotation is not inspect.Parameter.empty for one in signature.parameters.values())


@pytest.mark.parametrize("as_path", [str, Path])
def test_the_functions_work_together(as_path: Callable[[Path], Any], small: Path, tmp_path: Path) -> None:
    source, target = as_path(small), as_path(tmp_path / "ranks")
    told: list[tuple[int, int]] = []
    plan = reshard.plan(source, mp=2)
    conversion = reshard.convert(source, target, mp=2, progress=lambda done, total: told.append((done, total)))
    written = sum(path.stat().st_size for path in Path(target).iterdir() if path.name != "reshard.json")
    assert written > plan.size
    assert (told[0], told[-1]) == ((0, written), (written, written))
    assert [file.name for file in conversion.plan.files] == [file.name for file in plan.files]
    report = reshard.verify(target, source)
    assert report.is_proven
    assert report.compared == report.size > 0
    sampled = reshard.verify(target, sample=0.01)
    assert (sampled.problems, sampled.is_sampled, sampled.is_proven) == ((), True, False)
    assert reshard.inspect(target).ranks == 2
    assert not reshard.diff(source, target, only=["model.layers.0.*"]).values
    state = reshard.load(source, mp=2, rank=1, framework="numpy")
    with reshard.open(source, framework="numpy") as tensors:
        assert (tensors["model.norm.weight"][:] == state["norm.weight"]).all()
        assert repr(tensors).startswith(f"{source}: 619 tensors, ")
        assert repr(tensors["model.norm.weight"]) == "model.norm.weight: BF16 [256], not read yet"
    again = reshard.convert(source, target, mp=2)
    assert (again.done, again.mended) == (None, [])


def test_values_print_as_text_for_people(small: Path, tmp_path: Path) -> None:
    conversion = reshard.convert(small, tmp_path / "ranks", mp=2)
    report = reshard.verify(tmp_path / "ranks", small)
    for value, words in (
        (reshard.plan(small, mp=2), "2 ranks by the recipe deepseek-v3"),
        (conversion, "2 rank files"),
        (conversion, "dropped: "),
        (report, "all equal"),
        (reshard.inspect(small), "huggingface layout"),
        (reshard.diff(small, small), "the same"),
    ):
        assert words in str(value)
        assert repr(value) == str(value)
        assert len(str(value)) < 5_000


@pytest.mark.parametrize(
    ("call", "words"),
    [
        (reshard.convert, 'one of 1, 2, 4; or to="hf"'),
        (lambda source, target: reshard.convert(source, target, mp=3), "mp with one of 1, 2, 4"),
        (lambda source, target: reshard.convert(source, target, to="hf", ranks=[0]), "ranks: wrong option"),
        (lambda source, _: reshard.plan(source, mp=cast(int, "4")), "a whole number"),
        (lambda source, _: reshard.plan(source, mp=2, replicas="all"), "compare or first"),
        (lambda source, _: reshard.plan(source, mp=2, replicas="first"), "replicas: wrong option"),
        (lambda source, _: reshard.load(source, mp=2, rank=2, framework="numpy"), "rank: unknown rank"),
        (lambda source, target: reshard.convert(source, target, mp=2, jobs=0), "jobs: wrong option"),
        (lambda source, target: reshard.convert(source, target, mp=2, cache="maybe"), "auto, yes or no"),
        (lambda source, target: reshard.convert(source, target, mp=2, max_memory=1), "max_memory"),
        (lambda source, _: reshard.verify(source, recipe="llama"), "with source only"),
        (lambda source, _: reshard.verify(source, source, sample=cast(float, "1%")), "more than 0 and at most 1"),
        (lambda source, _: reshard.plan(source, mp=2, layers=cast(Any, "0-3")), "layers: wrong option"),
        (lambda source, target: reshard.convert(source, target, mp=2, ranks=[]), "ranks: wrong option"),
        (lambda source, _: reshard.verify(source, source, ranks=[]), "ranks: wrong option"),
        (lambda source, _: reshard.plan(source, to="hf", max_file_size=-1), "max_file_size: wrong option"),
        (lambda source, _: reshard.plan(source, mp=2, layers=cast(Any, 3)), "a list of whole numbers"),
        (lambda source, target: reshard.convert(source, target, mp=2, jobs=cast(int, "2")), "jobs: wrong option"),
        (lambda source, target: reshard.convert(source, target, mp=2, max_memory=cast(int, "1GB")), "a whole number"),
        (lambda source, _: reshard.plan(source, to="hf", max_file_size=cast(int, "5GB")), "max_file_size"),
        (lambda source, _: reshard.plan(source, mp=2, ranks=[cast(int, 1.5)]), "ranks: wrong option"),
        (lambda source, _: reshard.plan(source, mp=2, only="nothing.*"), "only nothing.*: nothing kept"),
        (lambda source, _: reshard.verify(source, source, sample=2), "more than 0 and at most 1"),
    ],
)
def test_a_refusal_speaks_of_arguments_and_not_of_options(
    call: Callable[[Path, Path], Any], words: str, small: Path, tmp_path: Path
) -> None:
    with pytest.raises(reshard.Refused) as error:
        call(small, tmp_path / "target")
    assert words in str(error.value)
    assert "--" not in str(error.value)
    assert not (tmp_path / "target").exists()


def test_names_of_files_stay_as_they_are_in_a_refusal(tmp_path: Path) -> None:
    folder = tmp_path / "--mp 4 --to hf"
    folder.mkdir()
    with pytest.raises(reshard.Refused) as error:
        reshard.inspect(folder)
    assert error.value.problems[0].subject == str(folder)


def test_a_refusal_survives_pickling(small: Path) -> None:
    with pytest.raises(reshard.Refused) as error:
        reshard.plan(small, mp=3)
    again = pickle.loads(pickle.dumps(error.value))  # noqa: S301
    assert type(again) is reshard.Refused
    assert again.problems == error.value.problems
    assert str(again) == str(error.value)
