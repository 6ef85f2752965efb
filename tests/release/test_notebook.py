"""The notebook in examples/ gives the outputs that are stored in it. Needs no torch."""

import copy
from pathlib import Path

import nbformat
import pytest
from nbclient import NotebookClient
from repository import ROOT


@pytest.fixture(autouse=True)
def fresh_user(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Programs of the notebook write into a home; and the plot is to be seen where another backend is set."""
    for name in ("HOME", "IPYTHONDIR", "JUPYTER_CONFIG_DIR", "JUPYTER_DATA_DIR", "JUPYTER_RUNTIME_DIR", "MPLCONFIGDIR"):
        monkeypatch.setenv(name, str(tmp_path / name))
    monkeypatch.setenv("MPLBACKEND", "agg")


def test_the_notebook_gives_the_outputs_that_are_stored_in_it() -> None:
    stored = nbformat.read(ROOT / "examples" / "explore_a_checkpoint.ipynb", as_version=4)
    run = copy.deepcopy(stored)
    NotebookClient(run, kernel_name="python3", timeout=120).execute()
    found, wanted = ([list_outputs(cell) for cell in book.cells if cell.cell_type == "code"] for book in (run, stored))
    assert found == wanted
    assert sum(map(len, wanted)) == 7
    assert [one for outputs in wanted for one in outputs if "image/png" in one]


def list_outputs(cell: nbformat.NotebookNode) -> list[str]:
    """The text of each output; of an image, that it is one: its bytes depend on the version of matplotlib."""
    assert all(one.output_type in ("stream", "display_data", "execute_result") for one in cell.outputs), cell.outputs
    return [one.get("text") or " ".join(sorted(one.data)) for one in cell.outputs]
