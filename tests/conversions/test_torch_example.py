"""The example that runs a model from its rank files: on two processes, against transformers."""

import importlib.util
import json
import re
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from jobs import Job, convert_checkpoint
from safetensors.torch import load_file, save_file
from small_models import write_model

EXAMPLE = Path(__file__).parents[2] / "examples" / "tensor_parallel_torch.py"
IDS = [7, 1, 95, 33, 64, 12]
LLAMA3 = {
    "rope_type": "llama3",
    "rope_theta": 500_000.0,
    "factor": 8.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 32,
}


def run_example(folder: Path, *options: str) -> subprocess.CompletedProcess[str]:
    torchrun = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2"]
    return subprocess.run(
        [*torchrun, str(EXAMPLE), str(folder), "--ids", ",".join(map(str, IDS)), *options],
        capture_output=True,
        text=True,
        timeout=300,
        check=False,
    )


@pytest.mark.parametrize(
    ("name", "changes"),
    [
        ("llama", {"max_position_embeddings": 256, "rope_parameters": LLAMA3}),
        ("qwen3", {"num_key_value_heads": 1, "tie_word_embeddings": True}),
    ],
)
def test_two_processes_compute_and_generate_what_transformers_does(
    name: str, changes: dict[str, Any], tmp_path: Path
) -> None:
    write_model(tmp_path / "source", name, eos_token_id=None, **changes)
    convert_checkpoint(Job(tmp_path / "source", 2), tmp_path / "ranks")
    done = run_example(tmp_path / "ranks", "--tokens", "5", "--compare", str(tmp_path / "source"))
    assert done.returncode == 0, done.stderr
    assert float(re.findall(r"largest difference from transformers (\S+),", done.stdout)[0]) < 1e-3
    model = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "source", dtype=torch.float32)
    known = list(IDS)
    with torch.no_grad():
        for _ in range(5):
            known.append(int(model(torch.tensor([known])).logits[0, -1].argmax()))
    assert f"generated: {known[len(IDS) :]}" in done.stdout


def test_a_damaged_shard_is_seen_by_the_comparison(tmp_path: Path) -> None:
    write_model(tmp_path / "source", "llama")
    convert_checkpoint(Job(tmp_path / "source", 2), tmp_path / "ranks")
    path = tmp_path / "ranks" / "model-rank1-of-2.safetensors"
    tensors = load_file(path)
    tensors["model.layers.1.mlp.up_proj.weight"] *= -1
    save_file(tensors, path)
    done = run_example(tmp_path / "ranks", "--tokens", "1", "--compare", str(tmp_path / "source"))
    assert done.returncode
    assert "they differ by more than rounding" in done.stderr


@pytest.fixture(scope="module")
def example() -> Any:
    spec = importlib.util.spec_from_file_location("tensor_parallel_torch", EXAMPLE)
    assert spec
    assert spec.loader
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.mark.parametrize(
    ("changed", "words"),
    [
        ({"model_type": "mixtral"}, "this example runs llama, mistral, qwen2, qwen3 only"),
        ({"rope_parameters": {"rope_type": "yarn", "rope_theta": 1e4}}, "has default and llama3 only"),
        ({"sliding_window": 4}, "beyond the sliding window of 4"),
    ],
)
def test_what_it_does_not_run_it_refuses(changed: dict[str, Any], words: str, example: Any, tmp_path: Path) -> None:
    write_model(tmp_path / "source", "llama")
    convert_checkpoint(Job(tmp_path / "source", 2), tmp_path / "ranks")
    path = tmp_path / "ranks" / "config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | changed))
    with pytest.raises(SystemExit, match=words):
        example.make_turns(example.Rank(tmp_path / "ranks", 0, 2).config, len(IDS))
