"""Runs small models in the real vLLM from rank files: `make vllm`.

Each model is loaded from its Hugging Face checkpoint and with `load_format="sharded_state"` from rank files, at 1 and 2
ranks, on the CPU. The log-probabilities and the greedy tokens must be the same to the bit. With `--files oracle` the
rank files are those of `vllm_oracle`, else `reshard` makes them. FP8 and MXFP4, which vLLM has kernels for on few CPUs,
are left out unless they are named; MXFP4 is loaded by `load_vllm.py`.
"""

import argparse
import json
import os
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).parents[1] / "support"))

from safetensors.torch import load_file, save_file
from vllm_models import CASES, MXFP4, SCALE_DTYPES, write_case
from vllm_oracle import write_rank_files

RANKS = (1, 2)

STATE = "sharded_state"

ANSWER = "ANSWER "
"""Begins a line that is none of vLLM's."""

PROMPTS = [[7, 1, 95, 33, 0, 64, 12, 12, 50], [3, 90, 2, 47, 48, 23, 24, 71, 72, 99]]

TOKENS = 16

COMPLAINTS = ("Attempted to load weight", "loading tensor of shape")
"""What vLLM says of a tensor of another dtype or shape, before it goes on."""

ENVIRONMENT = {
    "HF_HUB_OFFLINE": "1",
    "TORCHDYNAMO_DISABLE": "1",
    "VLLM_CPU_KVCACHE_SPACE": "1",
    "VLLM_ENABLE_V1_MULTIPROCESSING": "0",
    "VLLM_NO_USAGE_STATS": "1",
}


def main() -> int:
    """Runs every model; returns the exit code."""
    parser = argparse.ArgumentParser(description=__doc__)
    usual = [case for case in CASES if case not in (*SCALE_DTYPES, MXFP4)]
    parser.add_argument("cases", nargs="*", default=usual, help="models, by default all in BF16")
    parser.add_argument("--files", choices=("reshard", "oracle"), default="reshard", help="who makes the rank files")
    parser.add_argument("--ranks", nargs="*", type=int, default=RANKS)
    options = parser.parse_args()
    faults = 0
    with tempfile.TemporaryDirectory(prefix="reshard-vllm-") as name:
        for ranks in options.ranks:
            jobs = [lay_out(Path(name), case, ranks, options.files) for case in options.cases]
            jobs += [remove_tensor(jobs[0])] if ranks == 1 else []
            answers, said = run(
                [(job["source"], "auto") for job in jobs] + [(job["target"], STATE) for job in jobs], ranks
            )
            for job, wanted, found in zip(jobs, answers, answers[len(jobs) :], strict=False):
                fault = find_fault(job, wanted, found)
                faults += bool(fault)
                print(f"{job['case']} at {ranks} ranks: {fault or job['expected']}", flush=True)
            complaints = [line for line in said.splitlines() if any(text in line for text in COMPLAINTS)]
            faults += len(complaints)
            print("\n".join(complaints) or f"no complaint of vLLM at {ranks} ranks", flush=True)
    print(f"{'passed' if not faults else f'{faults} failed'}: files of {options.files}")
    return int(bool(faults))


def lay_out(folder: Path, case: str, ranks: int, maker: str) -> dict[str, str]:
    """Writes checkpoint and rank files of a case."""
    source, target = folder / case, folder / f"{case}-{ranks}"
    if not source.exists():
        source.mkdir()
        write_case(source, case)
    if maker == "oracle":
        write_rank_files(source, target, ranks)
    else:
        command = [
            sys.executable,
            "-m",
            "reshard",
            "convert",
            str(source),
            str(target),
            "--tp",
            str(ranks),
            "--for",
            "vllm",
        ]
        subprocess.run(command, check=True, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    expected = "the same tokens and log-probabilities"
    return {"case": case, "source": str(source), "target": str(target), "expected": expected}


def remove_tensor(job: dict[str, str]) -> dict[str, str]:
    """The same without one tensor, which must be seen: else the comparison would prove nothing."""
    target = Path(f"{job['target']}-short")
    shutil.copytree(job["target"], target)
    path = target / "model-rank-0-part-0.safetensors"
    tensors = load_file(path)
    del tensors["model.norm.weight"]
    save_file(tensors, path)
    return {**job, "case": f"{job['case']} without a norm", "target": str(target), "expected": "vLLM refuses it"}


def find_fault(job: dict[str, str], wanted: Any, found: Any) -> str:
    """Compares what the checkpoint and the rank files gave; empty if all is as it should be."""
    if not wanted["tokens"]:
        return f"the checkpoint does not run: {wanted['said']}"
    if job["target"].endswith("-short"):
        return "" if "Missing keys" in found["said"] else "vLLM does not see it"
    if not found["tokens"]:
        return f"the rank files do not run: {found['said']}"
    if len({token for tokens in wanted["tokens"] for token in tokens}) < 4:
        return "tokens of so few kinds prove nothing"
    if found["tokens"] != wanted["tokens"]:
        return f"{found['tokens']} for {wanted['tokens']}"
    return "" if found == wanted else "the tokens are the same, the log-probabilities differ"


def run(folders: Sequence[tuple[str, str]], ranks: int) -> tuple[list[Any], str]:
    """What vLLM computes from each folder, in its load format, in one new process; and what it said."""
    binding = {"VLLM_CPU_OMP_THREADS_BIND": "|".join(str(core % (os.cpu_count() or 1)) for core in range(ranks))}
    command = [sys.executable, __file__, "generate", json.dumps([ranks, folders])]
    environment = {**os.environ, **ENVIRONMENT, **binding}
    done = subprocess.run(command, env=environment, capture_output=True, text=True, check=False)
    answers = [json.loads(line.removeprefix(ANSWER)) for line in done.stdout.splitlines() if line.startswith(ANSWER)]
    if len(answers) != len(folders):
        sys.exit(done.stdout + done.stderr)
    return answers, done.stdout + done.stderr


def generate(ranks: int, folders: Sequence[tuple[str, str]]) -> None:
    """Prints what vLLM computes from each folder: tokens and log-probabilities, or why it does not."""
    for folder, load_format in folders:
        try:
            answer = generate_tokens(folder, ranks, load_format)
        except Exception as error:  # noqa: BLE001 - whatever vLLM raises is the answer
            answer = {"tokens": [], "said": f"{error}"}
        print(f"{ANSWER}{json.dumps(answer)}", flush=True)


def generate_tokens(folder: str, ranks: int, load_format: str) -> dict[str, Any]:
    """Loads a model and continues each prompt."""
    from vllm import LLM, SamplingParams  # noqa: PLC0415 - takes half a minute
    from vllm.distributed import cleanup_dist_env_and_memory  # noqa: PLC0415

    model = LLM(
        folder,
        tensor_parallel_size=ranks,
        load_format=load_format,
        enforce_eager=True,
        skip_tokenizer_init=True,
        max_model_len=64,
        max_num_seqs=2,
        enable_prefix_caching=False,
    )
    wishes = SamplingParams(
        temperature=0, max_tokens=TOKENS, logprobs=5, prompt_logprobs=1, ignore_eos=True, detokenize=False
    )
    outputs = model.generate([{"prompt_token_ids": prompt} for prompt in PROMPTS], wishes, use_tqdm=False)
    chances = [
        {str(token): chance.logprob for token, chance in place.items()}
        for output in outputs
        for place in (*output.prompt_logprobs[1:], *output.outputs[0].logprobs)
    ]
    model.llm_engine.engine_core.shutdown()
    del model
    cleanup_dist_env_and_memory()
    return {"tokens": [list(output.outputs[0].token_ids) for output in outputs], "chances": chances}


if __name__ == "__main__":
    if sys.argv[1:2] == ["generate"]:
        generate(*json.loads(sys.argv[2]))
    else:
        sys.exit(main())
