"""Comparisons of two checkpoints in shares: the report is that of one process, to the last bit of every measure."""

import shutil
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from share_runs import diff_here, diff_shared, run_in_processes

import reshard
from reshard.errors import Refused
from reshard.inspection.diff_shares import DiffJob, compare_pairs_of_share
from reshard.inspection.tensor_pairs import DiffChoice
from reshard.synthetic import SMALL_V3, write_checkpoint
from reshard.types import Share

CONFIG = {**SMALL_V3, "num_hidden_layers": 3, "num_nextn_predict_layers": 0, "n_routed_experts": 4, "vocab_size": 4096}
COUNTS = (1, 2, 3, 5)


@pytest.fixture(scope="session")
def folders(tmp_path_factory: pytest.TempPathFactory) -> Mapping[str, Path]:
    folder = tmp_path_factory.mktemp("diffs")
    write_checkpoint(folder / "one", CONFIG, 3)
    write_checkpoint(folder / "other", {**CONFIG, "num_hidden_layers": 2}, 2)
    reshard.convert(folder / "one", folder / "ranks", mp=2)
    reshard.convert(folder / "one", folder / "bf16", to="hf", cast="bf16")
    change(folder / "one", folder / "changed")
    return {path.name: path for path in folder.iterdir()}


def change(source: Path, target: Path) -> None:
    """Every third tensor by a little, with NaNs and infinities in some; one of another shape, one less, one more."""
    target.mkdir()
    for path in sorted(source.glob("*.safetensors")):
        tensors = load_file(path)
        for number, name in enumerate(sorted(tensors)):
            tensor = tensors[name]
            if number % 3 == 0 and tensor.dtype in (torch.bfloat16, torch.float32) and tensor.numel() > 8:
                flat = tensor.flatten()
                flat[: 1 + number] *= 1.5
                flat[3] = float("nan") if number % 2 else float("inf")
                tensors[name] = flat.reshape(tensor.shape)
        first = min(tensors)
        tensors[first] = tensors[first].flatten()[:-1].clone()
        del tensors[max(tensors)]
        tensors[f"more.{path.stem}"] = torch.ones(3)
        save_file(tensors, target / path.name)


@pytest.mark.parametrize(
    ("a", "b", "choice"),
    [
        ("one", "changed", DiffChoice()),
        ("changed", "one", DiffChoice(only=("*.mlp.*",))),
        ("one", "ranks", DiffChoice()),
        ("ranks", "changed", DiffChoice(replicas="first")),
        ("one", "bf16", DiffChoice()),
        ("bf16", "changed", DiffChoice(dequantize=True)),
        ("other", "one", DiffChoice(dequantize=True)),
    ],
)
def test_the_report_is_that_of_one_process(folders: Mapping[str, Path], a: str, b: str, choice: DiffChoice) -> None:
    whole = diff_here(folders[a], folders[b], choice)
    assert whole.is_same == ((a, b) == ("one", "ranks"))
    for count in COUNTS:
        shared = diff_shared(folders[a], folders[b], choice, count)
        assert shared == whole
        assert str(shared) == str(whole)


def test_processes_of_their_own_find_the_same(folders: Mapping[str, Path]) -> None:
    whole = diff_here(folders["one"], folders["changed"], DiffChoice())
    assert whole.values
    assert diff_shared(folders["one"], folders["changed"], DiffChoice(), 3, run_in_processes) == whole


def test_each_tensor_is_compared_by_one_share(folders: Mapping[str, Path]) -> None:
    job = DiffJob(str(folders["one"]), str(folders["changed"]), "", DiffChoice())
    found = [compare_pairs_of_share(job, Share(number, 3)) for number in range(3)]
    assert all(found)
    names = [name for one in found for name in one]
    assert len(names) == len(set(names)) == len(compare_pairs_of_share(job, Share(0, 1)))


def test_other_files_on_another_machine_are_refused(folders: Mapping[str, Path]) -> None:
    def run_there(call: Callable[..., Any], tasks: Any) -> list[Any]:
        return [call(**{**task, "job": task["job"]._replace(b=str(folders["one"]))}) for task in tasks]

    with pytest.raises(Refused) as refused:
        diff_shared(folders["one"], folders["changed"], DiffChoice(), 2, run_there)
    assert refused.value.problems[0].kind == "another-job"


def test_a_copy_on_another_machine_is_refused(folders: Mapping[str, Path], tmp_path: Path) -> None:
    """With the same bytes and times."""
    shutil.copytree(folders["changed"], tmp_path / "changed")

    def run_there(call: Callable[..., Any], tasks: Any) -> list[Any]:
        return [call(**{**task, "job": task["job"]._replace(b=str(tmp_path / "changed"))}) for task in tasks]

    with pytest.raises(Refused) as refused:
        diff_shared(folders["one"], folders["changed"], DiffChoice(), 2, run_there)
    assert refused.value.problems[0].kind == "another-job"


def test_a_file_that_changes_between_two_shares_is_refused(folders: Mapping[str, Path], tmp_path: Path) -> None:
    change(folders["one"], tmp_path / "changed")

    def run_slowly(call: Callable[..., Any], tasks: Any) -> list[Any]:
        first = call(**tasks[0])
        path = min((tmp_path / "changed").iterdir())
        path.write_bytes(path.read_bytes())
        return [first, *(call(**task) for task in tasks[1:])]

    with pytest.raises(Refused) as refused:
        diff_shared(folders["one"], tmp_path / "changed", DiffChoice(), 2, run_slowly)
    assert refused.value.problems[0].kind == "file-changed"
