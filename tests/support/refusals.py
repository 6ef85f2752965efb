"""Jobs that are to be refused: how each damages a small checkpoint or the options, and what the refusal says.

Nothing of the package under test does the damage.
"""

import json
import os
import re
import shutil
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest

from reshard.recipes.recipe import FAMILIES_FOLDER
from reshard.synthetic import SMALL_V3, write_checkpoint

INDEX = "model.safetensors.index.json"

FIRST, SECOND, THIRD = (f"model-0000{number}-of-00003.safetensors" for number in (1, 2, 3))

TINY: Mapping[str, Any] = {
    **SMALL_V3,
    "hidden_size": 128,
    "intermediate_size": 512,
    "kv_lora_rank": 128,
    "moe_intermediate_size": 128,
    "n_routed_experts": 8,
    "num_hidden_layers": 3,
    "q_lora_rank": 96,
    "qk_nope_head_dim": 64,
    "v_head_dim": 64,
    "vocab_size": 128,
}
"""3 MB: one dense layer, two expert layers and an MTP layer. 1, 2, 4 and 8 ranks suit it."""

EMBED = "model.embed_tokens.weight"

NORM = "model.norm.weight"

OUTPUT = "model.layers.0.self_attn.o_proj.weight"

EXPERT = "model.layers.2.mlp.experts.5.up_proj.weight"

Stored = dict[str, tuple[str, list[int], bytes]]
"""Name -> dtype, shape and data of the tensors of a file."""


@dataclass
class Trial:
    """A job that is going to be refused."""

    source: Path
    target: Path
    command: str = "convert"
    options: list[str] = field(default_factory=lambda: ["--mp", "2"])

    @property
    def arguments(self) -> list[str]:
        if self.command == "deepseek":
            return ["deepseek", "--hf-ckpt-path", str(self.source), "--save-path", str(self.target), *self.options]
        return [self.command, str(self.source), str(self.target), *self.options]


Damage = Callable[[Trial], object]


def load(path: Path) -> Stored:
    content = path.read_bytes()
    start = 8 + int.from_bytes(content[:8], "little")
    header, data = json.loads(content[8:start]), content[start:]
    header.pop("__metadata__", None)
    return {
        name: (entry["dtype"], entry["shape"], data[slice(*entry["data_offsets"])]) for name, entry in header.items()
    }


def save(path: Path, tensors: Stored) -> None:
    header, end = {}, 0
    for name, (dtype, shape, data) in tensors.items():
        header[name] = {"dtype": dtype, "shape": shape, "data_offsets": [end, end + len(data)]}
        end += len(data)
    text = json.dumps(header).encode()
    path.write_bytes(len(text).to_bytes(8, "little") + text + b"".join(data for _, _, data in tensors.values()))


def set_header(path: Path, text: bytes) -> None:
    """Puts another header before the data of a file."""
    content = path.read_bytes()
    start = 8 + int.from_bytes(content[:8], "little")
    path.write_bytes(len(text).to_bytes(8, "little") + text + content[start:])


def replace_in_header(path: Path, old: str, new: str) -> None:
    """Replaces the first such text in the header of a file."""
    content = path.read_bytes()
    header = content[8 : 8 + int.from_bytes(content[:8], "little")]
    assert re.search(old.encode(), header)
    set_header(path, re.sub(old.encode(), new.encode(), header, count=1))


def files(source: Path) -> list[Path]:
    return sorted(source.glob("*.safetensors"))


def edit_index(source: Path, change: Callable[[dict[str, Any]], object]) -> None:
    index = json.loads((source / INDEX).read_bytes())
    change(index["weight_map"])
    (source / INDEX).write_text(json.dumps(index))


def edit_tensors(source: Path, change: Callable[[Stored], Stored]) -> None:
    """Changes the tensors of every file, and the index with them."""
    weight_map = {}
    for path in files(source):
        tensors = change(load(path))
        save(path, tensors)
        if not tensors:
            path.unlink()
        weight_map.update(dict.fromkeys(tensors, path.name))
    (source / INDEX).write_text(json.dumps({"weight_map": weight_map}))


def without(*patterns: str) -> Damage:
    """Removes every tensor whose name holds one of the patterns, from its file and from the index."""
    removed: list[str] = []

    def change(tensors: Stored) -> Stored:
        kept = {name: tensor for name, tensor in tensors.items() if not any(re.search(p, name) for p in patterns)}
        removed.extend(tensors.keys() - kept.keys())
        return kept

    def damage(trial: Trial) -> None:
        edit_tensors(trial.source, change)
        assert removed

    return damage


def renamed(old: str, new: str) -> Damage:
    def change(tensors: Stored) -> Stored:
        return {re.sub(old, new, name): tensor for name, tensor in tensors.items()}

    return lambda trial: edit_tensors(trial.source, change)


def reshaped(name: str, change: Callable[[list[int]], list[int]]) -> Damage:
    """Gives one tensor another shape of as many elements."""

    def change_all(tensors: Stored) -> Stored:
        return {
            key: (dtype, change(shape) if key == name else shape, data) for key, (dtype, shape, data) in tensors.items()
        }

    return lambda trial: edit_tensors(trial.source, change_all)


def file_of(source: Path, tensor: str) -> Path:
    return next(path for path in files(source) if tensor in load(path))


def config(**changed: object) -> Damage:
    """Changes the config only."""
    return lambda trial: (trial.source / "config.json").write_text(json.dumps({**TINY, **changed}))


def model(*options: str, **changed: object) -> Damage:
    """Another model: its files and its config agree. Its data are holes."""

    def damage(trial: Trial) -> None:
        shutil.rmtree(trial.source)
        write_checkpoint(trial.source, {**TINY, **changed}, 3, sparse=True)
        trial.options[:] = options

    return damage


def options(*words: str) -> Damage:
    def damage(trial: Trial) -> None:
        trial.options[:] = words

    return damage


def all_of(*damages: Damage) -> Damage:
    def damage(trial: Trial) -> None:
        for step in damages:
            step(trial)

    return damage


def recipe(old: str, new: str) -> Damage:
    """Converts by an own recipe: the packaged one with an edit."""

    def damage(trial: Trial) -> None:
        text = (FAMILIES_FOLDER / "deepseek-v3.toml").read_text(encoding="utf-8")
        assert old in text
        path = trial.source.parent / "mine.toml"
        path.write_text(text.replace(old, new, 1), encoding="utf-8")
        trial.options[:] = ["--mp", "2", "--recipe", str(path)]

    return damage


def no_source(trial: Trial) -> None:
    shutil.rmtree(trial.source)


def empty_source(trial: Trial) -> None:
    shutil.rmtree(trial.source)
    trial.source.mkdir()


def only_side_files(trial: Trial) -> None:
    for path in [*files(trial.source), trial.source / INDEX]:
        path.unlink()


def file_missing(trial: Trial) -> None:
    (trial.source / SECOND).unlink()


def file_missing_without_index(trial: Trial) -> None:
    (trial.source / INDEX).unlink()
    (trial.source / SECOND).unlink()


def tensor_missing(trial: Trial) -> None:
    path = file_of(trial.source, OUTPUT)
    save(path, {name: tensor for name, tensor in load(path).items() if name != OUTPUT})


def tensor_in_another_file(trial: Trial) -> None:
    moved = load(trial.source / FIRST).pop(EMBED)
    save(trial.source / FIRST, {name: tensor for name, tensor in load(trial.source / FIRST).items() if name != EMBED})
    save(trial.source / THIRD, {**load(trial.source / THIRD), EMBED: moved})


def tensor_in_two_files(trial: Trial) -> None:
    copied = load(trial.source / FIRST)[EMBED]
    save(trial.source / THIRD, {**load(trial.source / THIRD), EMBED: copied})
    (trial.source / INDEX).unlink()  # which would decide


def index_names(file_name: str) -> Damage:
    return lambda trial: edit_index(trial.source, lambda weight_map: weight_map.update({EMBED: file_name}))


def stray_file(trial: Trial) -> None:
    save(trial.source / "stray.safetensors", {"stray": ("U8", [2], b"12")})


def truncated_file(trial: Trial) -> None:
    os.truncate(trial.source / SECOND, (trial.source / SECOND).stat().st_size - 1)


def header_too_long(trial: Trial) -> None:
    with (trial.source / SECOND).open("r+b") as file:
        file.write(b"\xff\xff\xff\xff\xff\xff\xff\x7f")


def header_not_json(trial: Trial) -> None:
    set_header(trial.source / SECOND, b"{broken")


def wrong_offsets(trial: Trial) -> None:
    replace_in_header(trial.source / SECOND, r'"data_offsets":\[0,\d+\]', '"data_offsets":[0,1]')


def gap_in_the_data(trial: Trial) -> None:
    tensors = load(trial.source / SECOND)
    first = next(iter(tensors))
    header = json.dumps({
        name: {"dtype": dtype, "shape": shape, "data_offsets": [0, len(data)]}
        for name, (dtype, shape, data) in tensors.items() if name != first
    })  # fmt: skip
    set_header(trial.source / SECOND, header.encode())


def unknown_dtype(trial: Trial) -> None:
    replace_in_header(trial.source / SECOND, '"F8_E4M3"', '"F7_E4M2"')


def index_not_json(trial: Trial) -> None:
    (trial.source / INDEX).write_text("{")


def config_not_json(trial: Trial) -> None:
    (trial.source / "config.json").write_text("[]")


def no_config(trial: Trial) -> None:
    (trial.source / "config.json").unlink()


def scale_alone(trial: Trial) -> None:
    """Adds the scale of a weight that a model with whole queries does not have."""
    scale = "model.layers.0.self_attn.q_b_proj.weight_scale_inv"
    save(trial.source / FIRST, {**load(trial.source / FIRST), scale: ("F32", [8, 1], bytes(32))})
    edit_index(trial.source, lambda weight_map: weight_map.update({scale: FIRST}))


def bf16_with_a_scale(trial: Trial) -> None:
    def change(tensors: Stored) -> Stored:
        return {
            name: ("BF16", shape, data * 2) if name == OUTPUT else (dtype, shape, data)
            for name, (dtype, shape, data) in tensors.items()
        }

    edit_tensors(trial.source, change)


def n_experts(count: int) -> Damage:
    def damage(trial: Trial) -> None:
        trial.command = "deepseek"
        trial.options[:] = ["--n-experts", str(count), "--model-parallel", "2"]

    return damage


def target_not_empty(trial: Trial) -> None:
    trial.target.mkdir()
    (trial.target / "notes.txt").write_bytes(b"kept")


def target_with_rank_file(trial: Trial) -> None:
    trial.target.mkdir()
    (trial.target / "model0-mp2.safetensors").write_bytes(b"kept")


def target_is_a_file(trial: Trial) -> None:
    trial.target.write_bytes(b"kept")


def target_inside_source(trial: Trial) -> None:
    trial.target = trial.source / "ranks"


def target_is_the_source(trial: Trial) -> None:
    trial.target = trial.source


def target_inside_source_by_a_link(trial: Trial) -> None:
    (trial.source.parent / "link").symlink_to(trial.source)
    trial.target = trial.source.parent / "link" / "ranks"


def target_below_a_file(trial: Trial) -> None:
    (trial.source.parent / "file").write_bytes(b"kept")
    trial.target = trial.source.parent / "file" / "sub" / "target"


def target_below_a_read_only_folder(trial: Trial) -> None:
    locked = trial.source.parent / "locked"
    locked.mkdir(mode=0o555)
    if os.access(locked, os.W_OK):
        pytest.skip("this user may write everywhere")
    trial.target = locked / "target"


def disk_too_small(trial: Trial) -> None:
    """A model of 2 TiB, as holes."""
    model("--mp", "2", vocab_size=2**32)(trial)
    free = shutil.disk_usage(trial.source).free
    if free > 2 * 2**40:
        pytest.skip(f"the disk has {free:,} bytes free")


def side_file_that_is_no_utf8(trial: Trial) -> None:
    Path(os.fsdecode(os.fsencode(trial.source) + b"/token\xff")).write_bytes(b"{}")


REFUSALS = [
    # The source and its files.
    ("no source", no_source, "no-source", "No such file or directory"),
    ("a source folder without files", empty_source, "empty-source", "is it the right folder?"),
    ("a source folder with side files only", only_side_files, "empty-source", "no file that ends in .safetensors"),
    ("a file of the index is missing", file_missing, "missing-file", SECOND),
    ("a tensor of the index is missing", tensor_missing, "missing-tensor", OUTPUT),
    ("a tensor stands in another file", tensor_in_another_file, "misplaced-tensor", THIRD),
    ("a tensor stands in two files", tensor_in_two_files, "tensor-twice", f"in {FIRST} and in {THIRD}"),
    ("the index names a file above", index_names("../secret.safetensors"), "unsafe-file-name", "../secret"),
    ("the index names a file by its full path", index_names("/etc/a.safetensors"), "unsafe-file-name", "/etc/a"),
    ("the index names a file below", index_names("sub/a.safetensors"), "unsafe-file-name", "sub/a"),
    ("the index names another kind of file", index_names("config.json"), "unsafe-file-name", "config.json"),
    ("the index is no JSON", index_not_json, "not-json", INDEX),
    ("a file that the index does not name", stray_file, "extra-file", "--ignore-extra-files"),
    ("a numbered file is missing, no index", file_missing_without_index, "missing-file", SECOND),
    ("a file is cut off", truncated_file, "truncated-file", SECOND),
    ("a header is too long", header_too_long, "header-too-long", "at most 100,000,000 bytes"),
    ("a header is no JSON", header_not_json, "header-not-json", SECOND),
    ("offsets do not suit the shape", wrong_offsets, "wrong-offsets", SECOND),
    ("offsets leave a gap", gap_in_the_data, "overlap", SECOND),
    ("a dtype is unknown", unknown_dtype, "unknown-dtype", "F7_E4M2"),
    # The names.
    ("no rule knows a tensor", renamed("^model.norm.weight$", "model.norms.weight"), "no-rule", "'model.norm.weight'"),
    ("a layer with a leading zero", renamed(r"layers\.0\.", "layers.00."), "no-rule", "model.layers.00."),
    ("two rules know a tensor", recipe("rules = [", 'rules = [\n["same", "model.layers.0.input_layernorm.weight", "x", '
     '"replicate"],'), "two-rules", "'model.layers.{i}.input_layernorm.weight'"),
    ("a hole in the layers", without(r"layers\.1\."), "gap", "layers 0, 2"),
    ("the last layer is gone", without(r"layers\.2\."), "contradiction", "num_hidden_layers"),
    ("no layer at all", without(r"layers\."), "contradiction", "num_hidden_layers"),
    ("a hole in the experts", without(r"experts\.2\."), "gap", "experts 0-1, 3-7"),
    ("an expert of one layer is gone", without(r"layers\.2\.mlp\.experts\.2\."), "missing-tensor", "layers.2.mlp.exp"),
    ("a norm is gone", without(r"^model\.norm"), "missing-tensor", NORM),
    ("MTP layers behind a hole", renamed(r"layers\.3\.", "layers.4."), "gap", "MTP layers 4"),
    # The config.
    ("the config has more layers", config(num_hidden_layers=4), "contradiction", "4, as num_hidden_layers of"),
    ("the config has fewer layers", config(num_hidden_layers=2), "contradiction", "2, as num_hidden_layers of"),
    ("the config has more dense layers", config(first_k_dense_replace=2), "contradiction", "first_k_dense_replace"),
    ("the config has more experts", config(n_routed_experts=16), "contradiction", "16, as n_routed_experts of"),
    ("the config has fewer experts", config(n_routed_experts=4), "contradiction", "8 by the names of the tensors"),
    ("the config has whole queries", config(q_lora_rank=None), "contradiction", "if q_lora_rank"),
    ("the config has more heads", config(num_attention_heads=16), "wrong-shape", "num_attention_heads"),
    ("the config has another vocabulary", config(vocab_size=129), "wrong-shape", "[129, "),
    ("the config has wider experts", config(moe_intermediate_size=2048), "wrong-shape", "shared_experts.gate_proj"),
    ("the config is no object", config_not_json, "not-json", "a JSON object"),
    ("the option has fewer experts", n_experts(4), "contradiction", "8, by the names of the tensors"),
    ("the option has more experts", n_experts(256), "contradiction", "--n-experts"),
    # The ranks.
    ("experts that the ranks do not divide", model("--mp", "4", n_routed_experts=6), "not-divisible", "experts (6)"),
    ("heads that the ranks do not divide", model("--mp", "4", num_attention_heads=6), "not-divisible",
     "num_attention_heads"),
    ("a dimension that the ranks do not divide", model("--mp", "4", vocab_size=130), "not-divisible", "(130 rows)"),
    ("columns that the ranks do not divide", model("--mp", "4", moe_intermediate_size=130), "not-divisible",
     "(130 rows or columns)"),
    ("blocks that the ranks would cut", model("--mp", "4", intermediate_size=768), "straddles-blocks", "(192 rows "),
    ("no ranks", options("--mp", "0"), "wrong-ranks", "0 ranks"),
    ("ranks below nothing", options("--mp", "-2"), "wrong-ranks", "-2 ranks"),
    ("more ranks than there are", options("--mp", "1000000"), "wrong-ranks", "1 to 4096"),
    ("a rank that there is not", options("--mp", "2", "--ranks", "0,2-7"), "unknown-rank", "ranks from 0 to 1"),
    ("too little memory", options("--mp", "2", "--max-memory", "1KiB"), "too-little-memory", "1,024 bytes"),
    # Weights and scales.
    ("a scale without its weight", without(re.escape(OUTPUT) + "$"), "missing-tensor", OUTPUT),
    ("a scale whose weight the model does not have", all_of(model("--mp", "2", q_lora_rank=None), scale_alone),
     "scale-without-weight", "model.layers.0.self_attn.q_b_proj.weight"),
    ("an FP8 weight without its scale", without(re.escape(EXPERT) + "_scale_inv"), "weight-without-scale", EXPERT),
    ("a scale for a BF16 weight", bf16_with_a_scale, "scale-without-weight", OUTPUT),
    ("a scale of the wrong shape", reshaped(OUTPUT + "_scale_inv", lambda shape: shape[::-1]), "wrong-scale",
     "for a weight of [128, 512]"),
    # The target.
    ("a target with files", target_not_empty, "target-not-empty", "notes.txt"),
    ("a target with a rank file", target_with_rank_file, "no-manifest", "model0-mp2.safetensors"),
    ("a target that is a file", target_is_a_file, "target-not-folder", "a file"),
    ("a target inside the source", target_inside_source, "target-inside-source", "ranks"),
    ("a target that is the source", target_is_the_source, "target-inside-source", "source"),
    ("a target inside the source by a link", target_inside_source_by_a_link, "target-inside-source", "link/ranks"),
    ("a target below a file", target_below_a_file, "no-permission", "file"),
    ("a target below a read-only folder", target_below_a_read_only_folder, "no-permission", "locked"),
    ("a disk that is too small", disk_too_small, "no-space", "2.00 TiB"),
    # The recipe.
    ("an unknown recipe", options("--mp", "2", "--recipe", "deepseek-v33"), "unknown-recipe", "mean deepseek-v3"),
    ("a recipe file that is not there", options("--mp", "2", "--recipe", "mine.toml"), "unknown-recipe", "mine.toml"),
    ("a faulty recipe", recipe('"by e"', '"by f"'), "wrong-recipe", "'by f'"),
    ("another model's recipe", options("--mp", "2", "--recipe", "deepseek-v2"), "quantized", "another --recipe"),
    ("an unknown architecture", all_of(
        config(model_type="phi3", architectures=["Phi3ForCausalLM"]), renamed("input_layernorm", "ln_1"),
     ), "no-recipe", "phi3; the nearest recipe is deepseek-v3"),
    ("unknown names without a config", all_of(no_config, renamed("input_layernorm", "ln_1")), "no-recipe",
     "no model_type in a config.json"),
]  # fmt: skip
