"""Training checkpoints to whole files: `python benchmarks/training.py FOLDER [--only WORD]`.

torch saves models of the shape of Llama below FOLDER, from four processes that hold rows of each tensor, as FSDP 2
does. Each time is that of a whole process, imports and the wait for the disk included: ours waits itself, behind
torch's comes a `sync` of what it wrote. They run in turn, forwards and backwards (A B, B A, ...), sources in the page
cache. A ratio is torch's time divided by ours, the median of five pairs (least to most): above 1, reshard is faster.
`peak` is what a process has had in memory at most (`ru_maxrss`), pages of mapped files too; `own` the same without
those, watched in a run of its own. Then peak and time by the size of the checkpoint. Needs torch and safetensors.
"""

import argparse
import json
import multiprocessing
import os
import statistics
import subprocess
import sys
import time
from collections.abc import Sequence
from compileall import compile_dir
from dataclasses import dataclass
from pathlib import Path

from run import anonymous, fresh, machine, measure_folder, prepare, spread, sync_files

import reshard

WORLD = 4
CONFIG = {"model_type": "llama", "architectures": ["LlamaForCausalLM"], "hidden_size": 2048, "intermediate_size": 5632,
          "num_attention_heads": 32, "num_key_value_heads": 8, "head_dim": 64, "vocab_size": 32000,
          "tie_word_embeddings": False, "hidden_act": "silu", "rms_norm_eps": 1e-5}  # fmt: skip
MOMENTS = "exp_avg", "exp_avg_sq"

CONSOLIDATE = """
import json, sys
from torch.distributed.checkpoint._consolidate_hf_safetensors import consolidate_safetensors_files
source, target, names, files = sys.argv[1:]
names = json.load(open(names))
numbers = {name: 1 + place * int(files) // len(names) for place, name in enumerate(names)}
consolidate_safetensors_files(source, target, numbers, num_threads=int(files))
"""


@dataclass(frozen=True)
class Save:
    """A checkpoint, and torch's own way to make one of it that is not distributed."""

    name: str
    form: str
    """`distcp`, `state` with the state of an optimizer in F32, or `slices`."""
    layers: int
    """About 88 MB each."""
    theirs: str
    """`dcp_to_torch_save`, or `consolidate_safetensors_files` into so many files, as many threads."""
    files: int = 1


SAVES = (
    Save(".distcp, weights only", "distcp", 25, "dcp_to_torch_save"),
    Save(".distcp with the state of an optimizer", "state", 10, "dcp_to_torch_save"),
    Save("safetensors slices, one file", "slices", 25, "consolidate_safetensors_files"),
    Save("safetensors slices, two files", "slices", 25, "consolidate_safetensors_files", 2),
)
SIZES = {"1 GB": 10, "4 GB": 44, "16 GB": 180}


def main() -> None:
    # The program that torch is imported by: a parent's memory is counted with its child's.
    if sys.argv[1:2] == ["save"]:
        save_from_processes(Path(sys.argv[2]), sys.argv[3], int(sys.argv[4]))
        return
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("folder", type=Path)
    parser.add_argument("--only", default="", help="rows whose name holds this word")
    options = parser.parse_args()
    folder: Path = options.folder
    folder.mkdir(parents=True, exist_ok=True)
    print(machine())
    compile_dir(Path(reshard.__file__).parent, quiet=1)  # as it is once it is installed
    for save in SAVES:
        if options.only in save.name:
            print(compare_with_torch(folder, save), flush=True)
    for name, layers in SIZES.items():
        if options.only in f"memory, {name}":
            print(measure_memory(folder, name, layers), flush=True)


def make(folder: Path, form: str, layers: int) -> tuple[Path, Path]:
    """The checkpoint, and the folder with its config; made if they are not there yet."""
    path, beside = folder / f"{form}-{layers}", folder / f"config-{layers}"
    if not path.exists():
        beside.mkdir(exist_ok=True)
        (beside / "config.json").write_text(json.dumps({**CONFIG, "num_hidden_layers": layers}))
        (beside / "names.json").write_text(json.dumps([name for name, _ in list_weights(layers)]))
        subprocess.run([sys.executable, __file__, "save", str(path), form, str(layers)], check=True)
        os.sync()
    return path, beside


def compare_with_torch(folder: Path, save: Save) -> str:
    """Time and memory of our conversion and of torch's."""
    (source, beside), target = make(folder, save.form, save.layers), folder / "target"
    ours, theirs = convert(source, target, beside, save.files), torch_command(source, target, beside, save)
    times: dict[str, list[float]] = {"theirs": [], "ours": []}
    peaks: dict[str, list[int]] = {"theirs": [], "ours": []}
    sizes = {}
    for turn in range(5):
        for name in list(times)[:: 1 if turn % 2 else -1]:
            prepare_target(target, is_made=name == "theirs")
            prepare(source, "warm")
            started = time.perf_counter()
            peaks[name].append(run_measured({"theirs": theirs, "ours": ours}[name]))
            if name == "theirs":
                subprocess.run(sync_files(target), check=True)
            times[name].append(time.perf_counter() - started)
            sizes[name] = measure_folder(target)
    own = {}
    for name, command in (("theirs", theirs), ("ours", ours)):
        prepare_target(target, is_made=name == "theirs")
        own[name] = anonymous(command)
    fresh(target)
    parts = [f"{save.name:40}", f"{measure_folder(source) / 1e9:.2f} GB"]
    for name in ("ours", "theirs"):
        parts += [f"{name} {sizes[name] / 1e9:.2f} GB in {statistics.median(times[name]):.2f} s",
                  f"peak {max(peaks[name]) >> 20:,} MiB, own {own[name] >> 20:,} MiB"]  # fmt: skip
    parts += [f"time / ours {spread([a / b for a, b in zip(times['theirs'], times['ours'], strict=True)])}"]
    return " | ".join(parts)


def prepare_target(target: Path, *, is_made: bool) -> None:
    """No target, or an empty folder: torch's ways make none."""
    fresh(target)
    if is_made:
        target.mkdir()


def convert(source: Path, target: Path, beside: Path, files: int = 1) -> list[str]:
    """Our command."""
    words = ["convert", str(source), str(target), "--to", "hf", "--config", str(beside), "--quiet"]
    size = measure_folder(source) // files + (64 << 20)
    return [sys.executable, "-m", "reshard", *words, "--max-file-size", str(size)]


def torch_command(source: Path, target: Path, beside: Path, save: Save) -> list[str]:
    """The program of torch."""
    if save.theirs == "dcp_to_torch_save":
        module = "torch.distributed.checkpoint.format_utils"
        return [sys.executable, "-m", module, "dcp_to_torch", str(source), str(target / "model.pt")]
    arguments = [str(source), str(target), str(beside / "names.json"), str(save.files)]
    return [sys.executable, "-c", CONSOLIDATE, *arguments]


def run_measured(command: Sequence[str]) -> int:
    """Runs a command. Returns the most memory that it has had, in bytes."""
    process = subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    _, status, usage = os.wait4(process.pid, 0)
    process.returncode = os.waitstatus_to_exitcode(status)
    if status:
        raise SystemExit(f"{command} failed")
    return usage.ru_maxrss << 10


def measure_memory(folder: Path, name: str, layers: int) -> str:
    """The memory of a conversion of a checkpoint of some size."""
    (source, beside), target = make(folder, "distcp", layers), fresh(folder / "target")
    started = time.perf_counter()
    peak = run_measured(convert(source, target, beside))
    seconds = time.perf_counter() - started
    own = anonymous(convert(source, fresh(target), beside))
    fresh(target)
    size = measure_folder(source)
    memory = f"peak {peak / 2**20:.0f} MiB, own {own / 2**20:.0f} MiB"
    return f"memory, {name}: {size / 1e9:.2f} GB, {memory}, {seconds:.1f} s"


# What torch saves.


def list_weights(layers: int) -> list[tuple[str, tuple[int, ...]]]:
    """Names and shapes of the model."""
    hidden, inner, vocabulary = CONFIG["hidden_size"], CONFIG["intermediate_size"], CONFIG["vocab_size"]
    keys = CONFIG["num_key_value_heads"] * CONFIG["head_dim"]
    layer = [("self_attn.q_proj", (hidden, hidden)), ("self_attn.k_proj", (keys, hidden)),
             ("self_attn.v_proj", (keys, hidden)), ("self_attn.o_proj", (hidden, hidden)),
             ("mlp.gate_proj", (inner, hidden)), ("mlp.up_proj", (inner, hidden)),
             ("mlp.down_proj", (hidden, inner)), ("input_layernorm", (hidden,)),
             ("post_attention_layernorm", (hidden,))]  # fmt: skip
    weights = [("model.embed_tokens.weight", (vocabulary, hidden)), ("model.norm.weight", (hidden,)),
               ("lm_head.weight", (vocabulary, hidden))]  # fmt: skip
    weights += [(f"model.layers.{i}.{name}.weight", shape) for i in range(layers) for name, shape in layer]
    return weights


def save_from_processes(path: Path, form: str, layers: int) -> None:
    """Forks four processes, which save together."""
    context = multiprocessing.get_context("fork")
    processes = [context.Process(target=save_as_rank, args=(rank, path, form, layers)) for rank in range(WORLD)]
    for process in processes:
        process.start()
    for process in processes:
        process.join()
    path.with_name("store").unlink(missing_ok=True)
    sys.exit(any(process.exitcode for process in processes))


def save_as_rank(rank: int, path: Path, form: str, layers: int) -> None:
    """Saves the rows of one process. Tensors of one shape are one in memory, and each is written; but safetensors wants
    each in memory of its own.
    """
    import torch  # noqa: PLC0415
    import torch.distributed as dist  # noqa: PLC0415
    from torch.distributed.checkpoint.hf_storage import HuggingFaceStorageWriter  # noqa: PLC0415
    from torch.distributed.checkpoint.state_dict_saver import save  # noqa: PLC0415
    from torch.distributed.device_mesh import init_device_mesh  # noqa: PLC0415
    from torch.distributed.tensor import DTensor, Shard  # noqa: PLC0415

    dist.init_process_group("gloo", init_method=f"file://{path.with_name('store')}", rank=rank, world_size=WORLD)
    mesh, rows, generator = init_device_mesh("cpu", (WORLD,)), {}, torch.Generator().manual_seed(rank)

    def take_rows(shape: tuple[int, ...], dtype: torch.dtype) -> DTensor:
        if (shape, dtype) not in rows or form == "slices":
            local = torch.randn((shape[0] // WORLD, *shape[1:]), generator=generator).to(dtype)
            rows[shape, dtype] = DTensor.from_local(local, mesh, [Shard(0)], run_check=False)
        return rows[shape, dtype]

    weights = list_weights(layers)
    model = {name: take_rows(shape, torch.bfloat16) for name, shape in weights}
    if form == "slices":
        save(model, storage_writer=HuggingFaceStorageWriter(str(path), save_distributed=True))
    else:
        state = {"model": model}
        if form == "state":
            names = ((f"state.{name}.{moment}", shape) for name, shape in weights for moment in MOMENTS)
            state["optim"] = {name: take_rows(shape, torch.float32) for name, shape in names}
        save(state, checkpoint_id=path)
    dist.barrier()
    dist.destroy_process_group()


if __name__ == "__main__":
    main()
