"""The scripts in examples/ print what torch, transformers and safetensors find."""

import re
import subprocess
import sys
from pathlib import Path

import pytest
import torch
import transformers
from jobs import Job, convert_checkpoint
from repository import ROOT
from safetensors.torch import load_file
from small_models import write_model

from reshard.synthetic import SMALL_V3, write_checkpoint

EXAMPLES = ROOT / "examples"


def run_example(name: str, *words: object, before: tuple[str, ...] = ()) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, *before, str(EXAMPLES / name), *map(str, words)]
    return subprocess.run(command, capture_output=True, text=True, check=False, timeout=300)


@pytest.fixture(scope="module")
def llama(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("llama") / "source"
    write_model(folder, "llama")
    return folder


# --- into a module ---


@pytest.mark.parametrize("ranks", [1, 2])
def test_a_layer_in_modules_of_ranks_computes_what_transformers_does(ranks: int, llama: Path) -> None:
    torchrun = ("-m", "torch.distributed.run", "--standalone", "--nproc-per-node", str(ranks))
    done = run_example("load_into_module.py", llama, "--layer", "1", before=torchrun)
    assert done.returncode == 0, done.stderr
    layer = transformers.AutoModelForCausalLM.from_pretrained(llama, dtype=torch.float32).model.layers[1].mlp
    size = sum(weight.numel() for weight in layer.parameters()) * 4 // ranks
    assert f"loaded: {size} bytes on each of {ranks} ranks" in done.stdout
    found = torch.tensor([float(word) for word in done.stdout.partition("output: ")[2].split()])
    with torch.no_grad():
        wanted = layer(torch.linspace(-1, 1, len(found)))
    assert wanted.abs().max() > 0.1
    assert torch.allclose(found, wanted, rtol=1e-3, atol=1e-4)


# --- a gate ---


def test_the_gate_tells_proven_damaged_and_refused_apart(llama: Path, tmp_path: Path) -> None:
    ranks = tmp_path / "ranks"
    convert_checkpoint(Job(llama, 2), ranks)
    for words in ((), ("--source", llama)):
        done = run_example("gate_in_ci.py", ranks, *words)
        assert (done.returncode, done.stderr) == (0, "")
        assert re.fullmatch(r"proven: [1-9]\d+ bytes\n", done.stdout)
    for path in sorted(ranks.glob("*.safetensors")):
        content = bytearray(path.read_bytes())
        content[-1] ^= 1
        path.write_bytes(content)
    done = run_example("gate_in_ci.py", ranks, "--source", llama, "--show", "1")
    assert (done.returncode, done.stdout) == (1, "")
    verdict, first, *rest = done.stderr.splitlines()
    assert (verdict, rest) == ("NOT proven", ["... and 1 more"])
    assert "model-rank0-of-2.safetensors" in first
    done = run_example("gate_in_ci.py", tmp_path / "nothing")
    assert (done.returncode, done.stdout) == (2, "")
    assert done.stderr.startswith("refused\n")
    assert len(done.stderr.splitlines()) == 2


# --- statistics ---


def test_statistics_are_those_of_the_whole_tensors(llama: Path) -> None:
    done = run_example("summarize_layers.py", llama, "--only", "*mlp*")
    assert done.returncode == 0, done.stderr
    rows = {words[3].strip("'"): words[:3] for line in done.stdout.splitlines()[1:] if (words := line.split())}
    files = [load_file(path) for path in llama.glob("*.safetensors")]
    wanted = {name: tensor for file in files for name, tensor in file.items() if "mlp" in name}
    assert rows.keys() == wanted.keys()
    for name, tensor in wanted.items():
        values = tensor.double()
        numbers = [values.mean(), values.std(correction=0), values.abs().max()]
        assert [float(word) for word in rows[name]] == pytest.approx([float(one) for one in numbers], rel=1e-4)


def test_a_tensor_that_is_read_in_pieces_has_the_same_statistics(llama: Path) -> None:
    """So few bytes at a time that every piece is a row."""
    code = "import sys, summarize_layers; summarize_layers.MOST_BYTES = 1; summarize_layers.main()"
    found = [
        subprocess.run([sys.executable, *words, str(llama)], capture_output=True, text=True, check=True, cwd=EXAMPLES)
        for words in (["-c", code], ["summarize_layers.py"])
    ]
    assert found[0].stdout == found[1].stdout
    assert len(found[0].stdout.splitlines()) > 10


def test_statistics_of_codes_are_refused(tmp_path: Path) -> None:
    write_checkpoint(tmp_path / "source", SMALL_V3, 2)
    done = run_example("summarize_layers.py", tmp_path / "source")
    assert done.returncode == 1
    assert "has F8_E4M3: convert with --cast bf16 --to hf first" in done.stderr


# --- mistakes of users ---

ALONE = {"TORCHELASTIC_RUN_ID": "1", "RANK": "0", "WORLD_SIZE": "1", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": "0"}
"""What torchrun sets for one process."""


@pytest.mark.parametrize(
    ("words", "variables", "code", "told"),
    [
        (["summarize_layers.py", "nothing"], {}, 2, "nothing: no source"),
        (["load_into_module.py", "source"], {}, 2, "start it with torchrun"),
        (["load_into_module.py", "nothing"], ALONE, 2, "nothing: no source"),
        (["load_into_module.py", "source", "--layer", "99"], ALONE, 2, "layer 99 is none of gate_proj"),
        (["gate_in_ci.py", "source", "--show", "-1"], {}, 2, "--show: 0 or more"),
        (["tensor_parallel_torch.py", "source"], {}, 2, "start it with torchrun"),
        (["tensor_parallel_torch.py", "nothing"], ALONE, 1, "model-rank0-of-1.safetensors is not there"),
    ],
)
def test_a_mistake_is_told_in_a_sentence(
    words: list[str], variables: dict[str, str], code: int, told: str, llama: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name in ALONE:
        monkeypatch.delenv(name, raising=False)
    for name, value in variables.items():
        monkeypatch.setenv(name, value)
    places = {name: str(llama.parent / name) for name in ("source", "nothing")}
    done = run_example(words[0], *(places.get(word, word) for word in words[1:]))
    assert (done.returncode, done.stdout) == (code, "")
    assert told in done.stderr
    assert "Traceback" not in done.stderr


def test_a_gate_that_shows_nothing_counts_all(llama: Path) -> None:
    done = run_example("gate_in_ci.py", llama.parent / "nothing", "--show", "0")
    assert (done.returncode, done.stderr) == (2, "refused\n... and 1 more\n")


def test_the_page_of_the_examples_lists_all_of_them() -> None:
    page = (EXAMPLES / "README.md").read_text(encoding="utf-8")
    files = {path.name for path in EXAMPLES.iterdir() if path.suffix in (".py", ".ipynb")}
    assert set(re.findall(r"^\| \[`([\w.]+)`\]\(\1\) \|", page, re.MULTILINE)) == files
