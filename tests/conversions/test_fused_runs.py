"""Conversions into fused rank files, byte for byte against numpy: what is fused, made of nothing, padded and cast."""

import json
import re
import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest
import torch
from fused_models import SCALE, assert_file, make_rank, write_source
from jobs import Job, convert_checkpoint
from oracle_casts import dequantize
from safetensors.torch import load_file
from targets import leave_unfinished
from torch import Tensor
from torture import BATCH, RECORD, contents
from xxhash import xxh3_64_digest

import reshard
from reshard.cli.main import main
from reshard.execution.execute import Settings
from reshard.formats.target_names import JOURNAL
from reshard.types import Subset

Options = Mapping[str, Any]


@pytest.fixture(scope="module", params=[None, (4, 4)], ids=["bf16", "fp8"])
def source(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("fused") / "source"
    write_source(folder, block=request.param)
    return folder


def make_job(source: Path, mp: int, **options: Any) -> Job:
    return Job(source, mp, str(source.parent / "fused.toml"), **options)


def load_source(source: Path) -> dict[str, Tensor]:
    return {name: tensor for path in source.glob("*.safetensors") for name, tensor in load_file(path).items()}


def read_config(folder: Path) -> Any:
    return json.loads((folder / "config.json").read_text())


def assert_target(target: Path, tensors: Mapping[str, Tensor], config: Options, ranks: int) -> None:
    """Each rank is there, and nothing else."""
    names = {f"part-{rank}.safetensors" for rank in range(ranks)}
    assert {path.name for path in target.iterdir()} == {*names, "config.json", "reshard.json"}
    for rank in range(ranks):
        assert_file(target / f"part-{rank}.safetensors", make_rank(tensors, config, ranks, rank))


@pytest.mark.parametrize("ranks", [1, 2, 4])
def test_every_rank_has_what_numpy_makes(ranks: int, source: Path, tmp_path: Path) -> None:
    convert_checkpoint(make_job(source, ranks), tmp_path / "target")
    assert_target(tmp_path / "target", load_source(source), read_config(source), ranks)
    assert (tmp_path / "target" / "config.json").read_bytes() == (source / "config.json").read_bytes()


@pytest.mark.parametrize("ranks", [1, 2, 4])
def test_a_cast_is_fused_like_any_tensor(ranks: int, tmp_path: Path) -> None:
    recipe = write_source(tmp_path / "source", block=(4, 4))
    convert_checkpoint(Job(tmp_path / "source", ranks, str(recipe), cast="bf16"), tmp_path / "target")
    tensors = load_source(tmp_path / "source")
    for name in [name for name in tensors if name.endswith(SCALE)]:
        weight = name.removesuffix(SCALE) + "weight"
        tensors[weight] = dequantize(tensors[weight], tensors.pop(name), 4)
    tensors = {name: tensor.bfloat16() if name.endswith("bias") else tensor for name, tensor in tensors.items()}
    assert_target(tmp_path / "target", tensors, read_config(tmp_path / "source"), ranks)
    assert "quantization_config" not in read_config(tmp_path / "target")


def test_quantized_weights_are_fused_with_their_scales(tmp_path: Path) -> None:
    """As whole files have them after the same cast."""
    recipe = str(write_source(tmp_path / "source", block=(4, 4)))
    plain, whole = tmp_path / "plain", tmp_path / "whole"
    convert_checkpoint(Job(tmp_path / "source", 1, recipe, to="hf", cast="bf16"), plain)
    convert_checkpoint(Job(plain, 1, recipe, to="hf", cast="fp8"), whole)
    convert_checkpoint(Job(plain, 4, recipe, cast="fp8"), tmp_path / "target")
    assert_target(tmp_path / "target", load_source(whole), read_config(whole), 4)
    assert read_config(tmp_path / "target")["quantization_config"]["weight_block_size"] == [4, 4]


@pytest.mark.parametrize("settings", [Settings(jobs=4), Settings(cache="no"), Settings(jobs=3, cache="no")], ids=str)
def test_threads_and_cache_change_nothing(settings: Settings, source: Path, tmp_path: Path) -> None:
    convert_checkpoint(make_job(source, 4), tmp_path / "target", settings)
    assert_target(tmp_path / "target", load_source(source), read_config(source), 4)


def test_ranks_can_be_made_apart(source: Path, tmp_path: Path) -> None:
    for ranks in ([1], [0, 3]):
        convert_checkpoint(make_job(source, 4, ranks=ranks), tmp_path / "target")
    assert not (tmp_path / "target" / "part-2.safetensors").exists()
    for rank in (0, 1, 3):
        expected = make_rank(load_source(source), read_config(source), 4, rank)
        assert_file(tmp_path / "target" / f"part-{rank}.safetensors", expected)


def test_an_interrupted_run_is_finished_by_the_next(source: Path, tmp_path: Path) -> None:
    """Of every second group the journal loses the record, and the file the bytes."""
    target = tmp_path / "target"
    leave_unfinished(make_job(source, 2), target)
    content = (target / JOURNAL).read_bytes()
    place, records = content.index(b"\n") + 1, list[bytes]()
    while place < len(content):
        (count,) = BATCH.unpack_from(content, place)
        start = place + BATCH.size
        records += [content[start + at * RECORD.size :][: RECORD.size] for at in range(count)]
        place = start + count * RECORD.size + 8
    kept = records[::2]
    batch = BATCH.pack(len(kept)) + b"".join(kept)
    (target / JOURNAL).write_bytes(content[: content.index(b"\n") + 1] + batch + xxh3_64_digest(batch))
    for offset, file, size, _ in map(RECORD.unpack, records[1::2]):
        with (target / f"part-{file}.safetensors.partial").open("r+b") as opened:
            opened.seek(offset)
            opened.write(bytes(size))
    done = convert_checkpoint(make_job(source, 2), target).done
    assert done is not None
    assert done.resumed == sum(RECORD.unpack(record)[2] for record in kept) > 0
    assert_target(target, load_source(source), read_config(source), 2)


@pytest.mark.parametrize("framework", ["torch", "numpy"])
def test_load_gives_fused_tensors(framework: str, source: Path) -> None:
    recipe = str(source.parent / "fused.toml")
    for ranks, rank in ((1, 0), (4, 3)):
        found = reshard.load(source, mp=ranks, rank=rank, recipe=recipe, framework=framework)
        expected = make_rank(load_source(source), read_config(source), ranks, rank)
        assert found.keys() == expected.keys()
        for name, tensor in expected.items():
            assert tuple(found[name].shape) == tuple(tensor.shape)
            one = found[name] if framework == "torch" else torch.from_numpy(found[name])
            assert to_bytes(one) == to_bytes(tensor), name


def to_bytes(tensor: Tensor) -> bytes:
    return tensor.reshape(-1).view(torch.uint8).numpy().tobytes()


def test_some_layers_and_experts_are_a_smaller_model(source: Path, tmp_path: Path) -> None:
    """Layer 1 becomes layer 0; experts 1, 3, 10 and 11 become 0 to 3."""
    subset = Subset(layers=(1,), experts=(1, 3, 10, 11), renumber=True)
    convert_checkpoint(make_job(source, 2, subset=subset), tmp_path / "target")
    tensors = {}
    for name, tensor in load_source(source).items():
        found = re.sub(r"layers\.1\.", "layers.0.", name)
        expert = re.search(r"mlp\.(\d+)", name)
        if "layers.0." in name or (expert and int(expert[1]) not in subset.experts):  # type: ignore[operator]
            continue
        if expert:
            found = re.sub(r"mlp\.\d+", f"mlp.{subset.experts.index(int(expert[1]))}", found)  # type: ignore[union-attr]
        tensors[found] = tensor[[1, 3, 10, 11]] if name.endswith("router") else tensor
    config = {**read_config(source), "num_hidden_layers": 1, "num_experts": 4}
    assert_target(tmp_path / "target", tensors, config, 2)


def test_chosen_tensors_come_with_all_parts_of_what_they_are_fused_into(source: Path, tmp_path: Path) -> None:
    """And without constants, which have no name to choose them by."""
    job = make_job(source, 4, subset=Subset(only=("model.layers.1.k.weight", "*.layers.0.mlp.2.up.*")))
    convert_checkpoint(job, tmp_path / "target")
    for rank in range(4):
        expected = make_rank(load_source(source), read_config(source), 4, rank)
        words = ("weight", SCALE)
        names = [f"model.layers.{name}.{word}" for name in ("0.mlp.w13", "1.qkv") for word in words]
        chosen = {name: expected[name] for name in names if name in expected}
        assert_file(tmp_path / "target" / f"part-{rank}.safetensors", chosen)


def test_the_manifest_and_the_summary_count_fused_tensors_once(
    source: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    recipe = str(source.parent / "fused.toml")
    count = len(make_rank(load_source(source), read_config(source), 2, 0))
    words = [str(source), str(tmp_path / "target"), "--mp", "2", "--recipe", recipe]
    assert main(["convert", *words, "--json"]) == 0
    said = json.loads(capsys.readouterr().out)
    assert [file["tensors"] for file in said["files"]] == [count, count]
    manifest = json.loads((tmp_path / "target" / "reshard.json").read_text())
    assert [file["tensors"] for file in manifest["files"]] == [count, count]
    assert manifest["casts"] == {"fill": 5, "pad": 1}
    assert sum(share["tensors"] for share in manifest["coverage"]) == len(load_source(source))
    assert main(["plan", str(source), "--mp", "2", "--recipe", recipe]) == 0
    text = capsys.readouterr().out
    assert re.search(rf"part-1\.safetensors +{count} ", text)
    assert "made, of one value: 2 tensors of F32" in text
    assert main(["verify", str(tmp_path / "target")]) == 0


def test_a_damaged_fused_tensor_is_repaired(source: Path, tmp_path: Path) -> None:
    target, recipe = tmp_path / "target", str(source.parent / "fused.toml")
    convert_checkpoint(make_job(source, 2), target)
    before = contents(target)
    path = target / "part-1.safetensors"
    content = bytearray(path.read_bytes())
    content[-1] ^= 1
    path.write_bytes(content)
    assert reshard.repair(target, source, recipe=recipe).repaired == ("part-1.safetensors",)
    assert contents(target) == before


def test_a_moved_source_that_lies_in_one_piece_is_read_in_one(tmp_path: Path) -> None:
    """q, k and v behind each other in one file, as they come to lie: at 1 rank their copies are one."""
    recipe = write_source(tmp_path / "source")
    tensors, config = load_source(tmp_path / "source"), read_config(tmp_path / "source")
    shutil.rmtree(tmp_path / "source")
    write_source(tmp_path / "source", lambda fresh: fresh.update(tensors))
    convert_checkpoint(Job(tmp_path / "source", 1, str(recipe)), tmp_path / "target", Settings(jobs=1))
    assert_target(tmp_path / "target", tensors, config, 1)
