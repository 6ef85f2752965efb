"""Whole commands that dequantize packed weights: reshard against a script in torch, and the memory of both.

    python benchmarks/packed.py FOLDER

Makes one layer of the size of Llama-70B in INT4 of compressed-tensors, and in AWQ, and writes them in BF16, 1.7 GB: by
`reshard convert --to hf --cast bf16`, and by a script that loads all files, computes as compressed-tensors (INT4) or
AutoAWQ do, and saves one file. They take turns, A B B A. Source and target are in FOLDER; a folder in memory leaves the
disk out. Needs torch.
"""

import argparse
import json
import re
import shutil
import subprocess
import sys
from pathlib import Path
from statistics import median

import torch
from safetensors.torch import load_file, save_file

HIDDEN, INNER, GROUP = 8192, 28672, 128
CONFIG = {
    "model_type": "llama",
    "hidden_size": HIDDEN,
    "intermediate_size": INNER,
    "num_hidden_layers": 1,
    "num_attention_heads": 64,
    "num_key_value_heads": 8,
    "vocab_size": 256,
}
TABLES = {
    "int4": {
        "quant_method": "compressed-tensors",
        "config_groups": {"group_0": {"weights": {"num_bits": 4, "group_size": GROUP}}},
    },
    "awq": {"quant_method": "awq", "bits": 4, "group_size": GROUP, "version": "gemm"},
}
PLACES = [0, 4, 1, 5, 2, 6, 3, 7]
"""Of AutoAWQ: where in a word each of eight columns lies."""


def main() -> None:
    parser = argparse.ArgumentParser(description="Packed weights to BF16: reshard against a script in torch.")
    parser.add_argument("folder", type=Path)
    parser.add_argument("--rounds", type=int, default=2)
    parser.add_argument("--script", choices=sorted(TABLES), help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.script:
        dequantize(options.folder / options.script, options.folder / "script", options.script)
        return
    for kind in TABLES:
        if not (options.folder / kind).exists():
            write_source(options.folder / kind, kind)
        compare(options.folder, kind, options.rounds)


def write_source(folder: Path, kind: str) -> None:
    """One layer of random codes, in two files."""
    torch.manual_seed(0)
    inner = {f"mlp.{name}_proj": (INNER, HIDDEN) for name in ("gate", "up")} | {"mlp.down_proj": (HIDDEN, INNER)}
    heads = {f"self_attn.{name}_proj": (HIDDEN if name in "qo" else HIDDEN // 8, HIDDEN) for name in "qkvo"}
    tensors = {f"model.layers.0.{name}_layernorm.weight": torch.rand(HIDDEN) for name in ("input", "post_attention")}
    tensors |= {"model.norm.weight": torch.rand(HIDDEN)}
    tensors |= {f"{name}.weight": torch.rand(256, HIDDEN) for name in ("model.embed_tokens", "lm_head")}
    tensors = {name: tensor.bfloat16() for name, tensor in tensors.items()}
    for name, (rows, columns) in (inner | heads).items():
        module, groups = f"model.layers.0.{name}", columns // GROUP
        if kind == "awq":
            parts = {"qweight": (columns, rows // 8), "qzeros": (groups, rows // 8)}
            tensors[f"{module}.scales"] = (torch.rand(groups, rows) * 0.01).half()
        else:
            parts = {"weight_packed": (rows, columns // 8)}
            tensors[f"{module}.weight_scale"] = (torch.rand(rows, groups) * 0.01).bfloat16()
            tensors[f"{module}.weight_shape"] = torch.tensor([rows, columns])
        for word, shape in parts.items():
            tensors[f"{module}.{word}"] = torch.randint(-(2**31), 2**31 - 1, shape, dtype=torch.int32)
    folder.mkdir(parents=True)
    places = {}
    for number in (1, 2):
        chosen = sorted(tensors)[number - 1 :: 2]
        file = f"model-0000{number}-of-00002.safetensors"
        save_file({name: tensors[name] for name in chosen}, folder / file)
        places |= dict.fromkeys(chosen, file)
    (folder / "model.safetensors.index.json").write_text(json.dumps({"weight_map": places}))
    (folder / "config.json").write_text(json.dumps({**CONFIG, "quantization_config": TABLES[kind]}))


def dequantize(source: Path, target: Path, kind: str) -> None:
    """As a script does it: everything in memory."""
    tensors = {}
    for path in sorted(source.glob("*.safetensors")):
        tensors |= load_file(path)
    codes, done = {"awq": ".qweight", "int4": ".weight_packed"}[kind], {}
    for name, tensor in tensors.items():
        module = name.removesuffix(codes)
        if module != name and kind == "awq":
            weight, zeros = (unpack(tensors[f"{module}.{word}"])[..., PLACES] for word in ("qweight", "qzeros"))
            zeros = zeros.flatten(1).repeat_interleave(GROUP, 0)
            scales = tensors[f"{module}.scales"].repeat_interleave(GROUP, 0)
            done[f"{module}.weight"] = ((weight.flatten(1) - zeros) * scales).T.contiguous().bfloat16()
        elif module != name:
            scales = tensors[f"{module}.weight_scale"]
            values = (unpack(tensor).flatten(1) - 8).to(scales.dtype).unflatten(-1, (-1, GROUP))
            done[f"{module}.weight"] = (values * scales.unsqueeze(-1)).flatten(-2)
        elif name.endswith("norm.weight") or name in ("model.embed_tokens.weight", "lm_head.weight"):
            done[name] = tensor
    target.mkdir()
    save_file(done, target / "model.safetensors")


def unpack(words: torch.Tensor) -> torch.Tensor:
    """The codes of words [rows, words], int8 [rows, words, 8]."""
    found = torch.empty((*words.shape, 8), dtype=torch.int8)
    for place in range(8):
        found[..., place] = ((words >> (4 * place)) & 15).to(torch.int8)
    return found


def compare(folder: Path, kind: str, rounds: int) -> None:
    """Runs both in turn; the tensors must be equal."""
    convert = ["-m", "reshard", "convert", folder / kind, folder / "reshard", "--to", "hf", "--cast", "bf16"]
    commands = {"reshard": convert, "script": [__file__, folder, "--script", kind]}
    found: dict[str, list[tuple[float, int]]] = {name: [] for name in commands}
    for name in ["reshard", "script", "script", "reshard"] * rounds:
        shutil.rmtree(folder / name, ignore_errors=True)
        timed = ["/usr/bin/time", "-f", "%e %M", sys.executable, *map(str, commands[name])]
        said = subprocess.run(timed, check=True, capture_output=True, text=True).stderr
        seconds, memory = re.findall(r"^([\d.]+) (\d+)$", said, re.MULTILINE)[-1]
        found[name].append((float(seconds), int(memory) // 1024))
    one, other = (load_file(folder / name / "model.safetensors") for name in commands)
    if not all(torch.equal(one[name].view(torch.int16), tensor.view(torch.int16)) for name, tensor in other.items()):
        raise SystemExit(f"{kind}: the two differ")
    for name, runs in found.items():
        seconds = sorted(second for second, _ in runs)
        spread = f"{median(seconds):.1f} s ({seconds[0]:.1f} to {seconds[-1]:.1f})"
        print(f"{kind:5} {name:8} {spread}, {max(memory for _, memory in runs):,} MiB at most")
        shutil.rmtree(folder / name)


if __name__ == "__main__":
    main()
