"""What DeepSeek's script does in silence, and the test that shows that we refuse it, or do it right.

SHOWN lists them; where no other file has the test, it is here. Memory and time are measured in benchmarks/.
"""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest
from refusals import REFUSALS, TINY
from repository import find_test_file
from safetensors import safe_open

from reshard.cli.main import main
from reshard.synthetic import write_checkpoint

REFUSED = "test_refusals.py test_the_job_is_refused_and_nothing_is_written"

SHOWN = [
    # What the script does; the file, the test and, of a list of refusals, the row.
    ("an empty folder gives N empty files, exit 0", REFUSED, "a source folder without files"),
    ("a mistyped folder gives N empty files, exit 0", REFUSED, "no source"),
    ("a folder of tokenizer files gives N empty files, exit 0", REFUSED, "a source folder with side files only"),
    ("a file is missing: plausible files, exit 0", REFUSED, "a file of the index is missing"),
    ("a file is missing and there is no index", REFUSED, "a numbered file is missing, no index"),
    ("the missing file's tensors are not named", "test_huggingface.py test_a_damaged_checkpoint_is_refused", ""),
    ("--n-experts too small: experts vanish, exit 0", REFUSED, "the option has fewer experts"),
    ("--n-experts too large: wrong experts in each rank", REFUSED, "the option has more experts"),
    ("the config has another number of experts", REFUSED, "the config has fewer experts"),
    ("layer 61 of a deeper model is dropped", "test_script_failures.py test_layer_61_of_a_deeper_model_is_kept", ""),
    ("the same, by names alone", "test_match.py test_layers_with_the_marker_are_dropped_and_no_others", ""),
    ("MTP layers are dropped without a word", "test_cli.py test_plan_tells_what_is_dropped_and_why", ""),
    ("a stray file is merged in", REFUSED, "a file that the index does not name"),
    ("a stray copy of a tensor wins by chance", REFUSED, "a tensor stands in two files"),
    ("a truncated source file", REFUSED, "a file is cut off"),
    ("killed: a truncated file under its final name", "test_convert.py test_a_kill_leaves_no_final_name", ""),
    ("killed: all is to be done again", "test_resume.py test_a_killed_run_is_finished_by_the_next", ""),
    ("mp 32 fails with one dimension", "test_plan.py test_deepseek_v3_cannot_be_cut_for_32_ranks", ""),
    ("mp that works is not told", "test_refusals.py test_the_numbers_of_ranks_that_are_named_are_those_that_work", ""),
    ("experts that mp does not divide are lost", REFUSED, "experts that the ranks do not divide"),
    ("a block scale cut apart from its weight", REFUSED, "blocks that the ranks would cut"),
    ("a weight without its scale", REFUSED, "an FP8 weight without its scale"),
    ("a scale without its weight", REFUSED, "a scale without its weight"),
    ("a scale of another shape", REFUSED, "a scale of the wrong shape"),
    ("a target with other files is mixed with ours", REFUSED, "a target with files"),
    ("another family's names are mangled", REFUSED, "an unknown architecture"),
    ("no other family", "test_recipe.py test_an_own_file_works_like_a_packaged_one", ""),
]


@pytest.mark.parametrize(("failure", "test", "row"), SHOWN)
def test_each_failure_of_the_script_has_a_test(failure: str, test: str, row: str) -> None:
    file, name = test.split()
    assert f"\ndef {name}(" in find_test_file(file).read_text(encoding="utf-8"), failure
    assert not row or [entry for entry in REFUSALS if entry[0] == row], failure


@pytest.mark.parametrize("mtp_layers", [0, 1])
def test_layer_61_of_a_deeper_model_is_kept(
    mtp_layers: int, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """The script drops every name that has `model.layers.61` in it."""
    changed = {"num_hidden_layers": 63, "n_routed_experts": 2, "num_nextn_predict_layers": mtp_layers}
    config: Mapping[str, Any] = {**TINY, **changed}
    write_checkpoint(tmp_path / "source", config, 2, sparse=True)
    assert main(["convert", str(tmp_path / "source"), str(tmp_path / "target"), "--mp", "2"]) == 0
    assert capsys.readouterr().out.count("dropped: ") == mtp_layers
    for rank in range(2):
        with safe_open(tmp_path / "target" / f"model{rank}-mp2.safetensors", "np") as file:
            names = list(file.keys())
        layers = {int(name.split(".")[1]) for name in names if name.startswith("layers.")}
        assert layers == set(range(63))
        of_61, of_60 = ({name.split(".", 2)[2] for name in names if f".{layer}." in name[:12]} for layer in (61, 60))
        assert of_61 == of_60
