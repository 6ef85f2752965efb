"""`--to dcp`: slices that torch and transformers load, and that give back the files that they were made of."""

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from families import write_small
from jobs import Job
from safetensors import safe_open
from sliced_loads import load_in_processes, slice_name
from small_models import write_model
from stacked_models import compute_logits, read_tensors, write_stacked_model
from targets import leave_unfinished
from torch import Tensor
from torch.distributed.checkpoint.hf_storage import HuggingFaceStorageReader
from torch.distributed.checkpoint.state_dict_loader import load

import reshard
from reshard.cli.main import main
from reshard.errors import Refused

HEAD, TABLE = "lm_head.weight", "model.embed_tokens.weight"


@pytest.fixture(scope="module")
def models(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("models")
    write_model(folder / "llama", "llama", dtype="bfloat16")
    write_model(folder / "tied", "llama-tied")
    write_model(folder / "gpt-oss", "gpt-oss", dtype="bfloat16")
    write_stacked_model(folder / "moe", "qwen3-moe")
    for name in ("deepseek-v3", "deepseek-v4-flash"):
        write_small(folder / name, name)
    return folder


def assert_chunks(target: Path, whole: dict[str, Tensor], ranks: int) -> None:
    """The files are those of `torch.chunk`, with the places that torch's reader wants."""
    assert sorted(path.name for path in target.glob("*.safetensors")) == [slice_name(rank) for rank in range(ranks)]
    for rank in range(ranks):
        with safe_open(target / slice_name(rank), "pt") as file:
            said = file.metadata()
            assert said["format"] == "pt"
            assert said["DCP_VERSION"] == "1.0"
            places = json.loads(said["DCP_SHARDING_INFO"])
            assert places.keys() == set(file.keys())
            for name, tensor in whole.items():
                chunks = tensor.chunk(ranks) if tensor.dim() else (tensor,)
                assert (name in places) == (rank < len(chunks)), (rank, name)
                if rank < len(chunks):
                    found = file.get_tensor(name)
                    assert found.dtype == tensor.dtype
                    assert torch.equal(view_bytes(found), view_bytes(chunks[rank])), (rank, name)
                    first = sum(chunk.shape[0] for chunk in chunks[:rank]) if tensor.dim() else 0
                    assert places[name] == {"saved_offsets": [first, *[0] * (tensor.dim() - 1)][: tensor.dim()]}


def view_bytes(tensor: Tensor) -> Tensor:
    """Not all dtypes can be compared."""
    return tensor.contiguous().reshape(-1).view(torch.uint8)


@pytest.mark.parametrize("ranks", [1, 2, 3, 4, 7, 100])
def test_each_rank_has_its_chunks(ranks: int, models: Path, tmp_path: Path) -> None:
    """With 100 ranks for 96 rows, the last four have nothing at all."""
    reshard.convert(models / "llama", tmp_path / "target", to="dcp", ranks=ranks)
    assert_chunks(tmp_path / "target", read_tensors(models / "llama"), ranks)
    assert reshard.verify(tmp_path / "target").is_proven
    report = reshard.verify(tmp_path / "target", models / "llama")
    assert report.is_proven, report
    assert report.files == ranks
    assert reshard.verify(tmp_path / "target", models / "llama", sample=0.1).verdict == "sampled"
    names = {path.name for path in (tmp_path / "target").iterdir() if path.suffix != ".safetensors"}
    assert names == {"config.json", "generation_config.json", "tokenizer.json", "reshard.json"}


@pytest.mark.parametrize("name", ["llama", "tied", "gpt-oss", "moe/hub-parts", "deepseek-v3", "deepseek-v4-flash"])
def test_the_original_files_come_back(name: str, models: Path, tmp_path: Path) -> None:
    source = models / name
    reshard.convert(source, tmp_path / "target", to="dcp", mp=3)
    whole = read_tensors(source)
    assert_chunks(tmp_path / "target", {HEAD: whole[TABLE], **whole} if name == "tied" else whole, 3)
    assert reshard.verify(tmp_path / "target", source).is_proven
    reshard.convert(tmp_path / "target", tmp_path / "again", to="hf")
    files = {path.name for path in source.iterdir()}
    assert {path.name for path in (tmp_path / "again").iterdir()} == {*files, "reshard.json"}
    for file in files:
        assert (tmp_path / "again" / file).read_bytes() == (source / file).read_bytes(), file
    assert reshard.verify(tmp_path / "again", tmp_path / "target").is_proven


def test_without_a_manifest_the_tensors_come_back(models: Path, tmp_path: Path) -> None:
    reshard.convert(models / "llama", tmp_path / "target", to="dcp", mp=3)
    (tmp_path / "target" / "reshard.json").unlink()
    assert reshard.verify(tmp_path / "target", models / "llama").is_proven
    conversion = reshard.convert(tmp_path / "target", tmp_path / "again", to="hf")
    assert "numbering" in {note.kind for note in conversion.plan.notes}
    found, wanted = read_tensors(tmp_path / "again"), read_tensors(models / "llama")
    assert all(torch.equal(found[name], tensor) for name, tensor in wanted.items())


@pytest.mark.parametrize(
    ("name", "options"),
    [
        ("tied", {"cast": "bf16"}),
        ("deepseek-v3", {"cast": "bf16"}),
        ("deepseek-v4-flash", {"expert_dtype": "fp8"}),
        ("deepseek-v4-flash", {"cast": "bf16"}),
    ],
)
def test_casts_are_those_of_whole_files(name: str, options: dict[str, Any], models: Path, tmp_path: Path) -> None:
    """Block scales are cut by their own rows."""
    source = models / name
    reshard.convert(source, tmp_path / "whole", to="hf", allow_inexact=True, **options)
    reshard.convert(source, tmp_path / "target", to="dcp", mp=5, allow_inexact=True, **options)
    whole = read_tensors(tmp_path / "whole")
    assert_chunks(tmp_path / "target", {HEAD: whole[TABLE], **whole} if name == "tied" else whole, 5)
    assert (tmp_path / "target" / "config.json").read_bytes() == (tmp_path / "whole" / "config.json").read_bytes()
    report = reshard.verify(tmp_path / "target", source)
    assert report.is_proven, report
    assert report.casts


@pytest.mark.parametrize("cast", ["fp8", "fp8-ue8m0"])
def test_weights_are_quantized(cast: str, models: Path, tmp_path: Path) -> None:
    reshard.convert(models / "deepseek-v3", tmp_path / "bf16", to="hf", cast="bf16")
    reshard.convert(tmp_path / "bf16", tmp_path / "whole", to="hf", cast=cast)
    reshard.convert(tmp_path / "bf16", tmp_path / "target", to="dcp", mp=4, cast=cast)
    assert_chunks(tmp_path / "target", read_tensors(tmp_path / "whole"), 4)
    report = reshard.verify(tmp_path / "target", tmp_path / "bf16")
    assert report.is_proven, report


def test_torch_loads_them_in_several_processes(models: Path, tmp_path: Path) -> None:
    """And three processes of torch save the same slices as are made for three ranks."""
    reshard.convert(models / "llama", tmp_path / "target", to="dcp", mp=5)
    load_in_processes(tmp_path / "target", models / "llama", tmp_path / "saved")
    reshard.convert(models / "llama", tmp_path / "made", to="dcp", mp=3)
    assert read_slices(tmp_path / "made") == read_slices(tmp_path / "saved")


def read_slices(folder: Path) -> dict[str, tuple[dict[str, Any], dict[str, bytes]]]:
    """By file: what the metadata say, and the bytes of each tensor."""
    found = {}
    for path in sorted(folder.glob("*.safetensors")):
        with safe_open(path, "pt") as file:
            said = file.metadata()
            said["DCP_SHARDING_INFO"] = json.loads(said["DCP_SHARDING_INFO"])
            names = file.keys()
            found[path.name] = said, {name: bytes(view_bytes(file.get_tensor(name)).numpy()) for name in names}
    return found


def test_torch_loads_them_in_one_process(models: Path, tmp_path: Path) -> None:
    reshard.convert(models / "moe" / "hub", tmp_path / "target", to="dcp", mp=4)
    whole = read_tensors(models / "moe" / "hub")
    state = {name: torch.zeros_like(tensor) for name, tensor in whole.items()}
    load(state, storage_reader=HuggingFaceStorageReader(str(tmp_path / "target")), no_dist=True)
    assert all(torch.equal(state[name], tensor) for name, tensor in whole.items())


@pytest.mark.parametrize("name", ["llama", "tied", "gpt-oss"])
def test_transformers_loads_them(name: str, models: Path, tmp_path: Path) -> None:
    """A tied head is a tensor of its own there: transformers refuses slices without it."""
    reshard.convert(models / name, tmp_path / "target", to="dcp", mp=3)
    assert torch.equal(compute_logits(tmp_path / "target"), compute_logits(models / name))


@pytest.mark.parametrize("ranks", [1, 3, 4, 12])
def test_stacked_experts_for_transformers(ranks: int, models: Path, tmp_path: Path) -> None:
    """Ten experts for four ranks: 3, 3, 3, 1."""
    source, target = models / "moe" / "hub", tmp_path / "target"
    reshard.convert(source, target, to="dcp", mp=ranks, for_engine="transformers")
    assert_chunks(target, read_tensors(models / "moe" / "stacked"), ranks)
    if ranks == 4:
        assert torch.equal(compute_logits(target), compute_logits(source))
    for one in (source, models / "moe" / "stacked"):
        report = reshard.verify(target, one)
        assert report.is_proven, report
    reshard.convert(target, tmp_path / "again", to="hf")
    for name in ("model.safetensors", "config.json"):
        assert (tmp_path / "again" / name).read_bytes() == (source / name).read_bytes()
    assert reshard.verify(tmp_path / "again", target).is_proven
    (target / "reshard.json").unlink()
    assert reshard.verify(target, source).is_proven


ODD = """
name        = "odd"
about       = "tensors of odd shapes"
left        = "plain"
right       = "plain-ranks"
model_types = ["odd"]
files       = "odd-{rank}-of-{ranks}.safetensors"
rules = [
["same", "scalar", "scalar", "replicate"],
["same", "none",   "none",   "replicate"],
["same", "empty",  "empty",  "replicate"],
["same", "one",    "one",    "replicate"],
["same", "cube",   "cube",   "replicate"],
["same", "small",  "small",  "replicate"],
]
"""

ODD_TENSORS = {
    "scalar": ("F32", [], 4),
    "none": ("F32", [0, 4], 0),
    "empty": ("BF16", [5, 0], 0),
    "one": ("F32", [1, 3], 12),
    "cube": ("U8", [7, 3, 2], 42),
    "small": ("F4", [4, 6], 12),
}
"""By name: dtype, shape, bytes."""


def write_odd_tensors(folder: Path) -> None:
    folder.mkdir()
    (folder / "config.json").write_text('{"model_type": "odd"}')
    header, end = {}, 0
    for name, (dtype, shape, size) in ODD_TENSORS.items():
        header[name] = {"dtype": dtype, "shape": shape, "data_offsets": [end, end + size]}
        end += size
    text = json.dumps(header).encode()
    (folder / "model.safetensors").write_bytes(len(text).to_bytes(8, "little") + text + bytes(range(end)))


def test_odd_shapes(tmp_path: Path) -> None:
    """A scalar is written once; so are a tensor without rows, and one of half bytes, which torch counts otherwise."""
    (tmp_path / "odd.toml").write_text(ODD)
    source, recipe = tmp_path / "source", str(tmp_path / "odd.toml")
    write_odd_tensors(source)
    for ranks in (1, 3):
        target, again = tmp_path / f"target{ranks}", tmp_path / f"again{ranks}"
        reshard.convert(source, target, to="dcp", mp=ranks, recipe=recipe)
        report = reshard.verify(target, source, recipe=recipe)
        assert report.is_proven, report
        assert report.tensors == (6 if ranks == 1 else 4 + 3 + 3)
        reshard.convert(target, again, to="hf", recipe=recipe)
        for path in source.glob("*.safetensors"):
            assert (again / path.name).read_bytes() == path.read_bytes()


def test_what_transformers_does_not_load_is_noted(models: Path) -> None:
    def kinds(name: str, **options: Any) -> set[str]:
        return {note.kind for note in reshard.plan(models / name, to="dcp", mp=2, **options).notes}

    assert not kinds("llama")
    assert kinds("tied") == {"tied"}
    assert kinds("moe/hub") == {"loader-names"}
    assert not kinds("moe/hub", for_engine="transformers")
    assert "loader-quantized" in kinds("deepseek-v3")
    assert "loader-quantized" not in kinds("deepseek-v3", cast="bf16")


def test_from_other_layouts(models: Path, tmp_path: Path) -> None:
    """Rank files, other slices, and a part of a model."""
    reshard.convert(models / "llama", tmp_path / "ranks", mp=2)
    reshard.convert(tmp_path / "ranks", tmp_path / "a", to="dcp", mp=4)
    reshard.convert(models / "llama", tmp_path / "b", to="dcp", mp=3)
    reshard.convert(tmp_path / "b", tmp_path / "c", to="dcp", mp=4)
    for folder in ("a", "c"):
        assert_chunks(tmp_path / folder, read_tensors(models / "llama"), 4)
    assert reshard.verify(tmp_path / "a", tmp_path / "ranks").is_proven
    assert reshard.verify(tmp_path / "c", tmp_path / "b").is_proven
    reshard.convert(tmp_path / "b", tmp_path / "again", mp=2)
    for path in (tmp_path / "ranks").glob("*.safetensors"):
        assert (tmp_path / "again" / path.name).read_bytes() == path.read_bytes()
    reshard.convert(models / "llama", tmp_path / "part", to="dcp", mp=2, layers=[0, 2], renumber=True)
    reshard.convert(models / "llama", tmp_path / "whole", to="hf", layers=[0, 2], renumber=True)
    assert_chunks(tmp_path / "part", read_tensors(tmp_path / "whole"), 2)
    assert reshard.verify(tmp_path / "part", models / "llama").is_proven


def test_a_tied_head_of_rank_files(models: Path, tmp_path: Path) -> None:
    """Rank files have no such tensor: it is held against the embedding beside it."""
    target = tmp_path / "target"
    reshard.convert(models / "tied", tmp_path / "ranks", mp=2)
    reshard.convert(tmp_path / "ranks", target, to="dcp", mp=3)
    whole = read_tensors(models / "tied")
    assert_chunks(target, {HEAD: whole[TABLE], **whole}, 3)
    assert reshard.verify(target, tmp_path / "ranks").is_proven
    reshard.convert(target, tmp_path / "again", to="hf")
    for path in (models / "tied").iterdir():
        assert (tmp_path / "again" / path.name).read_bytes() == path.read_bytes()
    with safe_open(target / slice_name(2), "np") as file:
        head = file.get_tensor(HEAD).tobytes()
    content = (target / slice_name(2)).read_bytes()
    place = content.index(head)  # the first of the two, by its name
    (target / slice_name(2)).write_bytes(content[:place] + b"\xff" + content[place + 1 :])
    (problem,) = reshard.verify(target, tmp_path / "ranks").problems
    assert (problem.kind, problem.subject) == ("differs", HEAD)


def test_they_are_opened_and_compared(models: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    reshard.convert(models / "llama", tmp_path / "target", to="dcp", mp=3)
    assert reshard.diff(tmp_path / "target", models / "llama").is_same
    wanted = reshard.load(models / "llama", mp=2, rank=1)
    found = reshard.load(tmp_path / "target", mp=2, rank=1)
    assert all(torch.equal(found[name], tensor) for name, tensor in wanted.items())
    with reshard.open(tmp_path / "target") as opened:
        assert torch.equal(opened[TABLE][1:40], read_tensors(models / "llama")[TABLE][1:40])
    assert main(["inspect", str(tmp_path / "target")]) == 0
    assert "stored in 90 parts" in capsys.readouterr().out


def test_damage_is_seen_and_repaired(models: Path, tmp_path: Path) -> None:
    target = tmp_path / "target"
    reshard.convert(models / "llama", target, to="dcp", mp=4)
    whole_names = read_tensors(models / "llama").keys()
    for rank in range(4):
        path = target / slice_name(rank)
        whole = path.read_bytes()
        header = int.from_bytes(whole[:8], "little") + 8
        for place in (header, (header + len(whole)) // 2, len(whole) - 1):
            path.write_bytes(whole[:place] + bytes([whole[place] ^ 1]) + whole[place + 1 :])
            (problem,) = reshard.verify(target, models / "llama").problems
            assert problem.kind == "differs"
            assert problem.subject.startswith(path.name)
            (problem,) = reshard.verify(target).problems
            assert problem.kind == "wrong-checksum"
            assert problem.subject.rpartition(": ")[2].split(",")[0] in whole_names, problem
        assert reshard.repair(target, models / "llama").is_proven
        assert path.read_bytes() == whole
        path.unlink()
        for report in (reshard.verify(target, models / "llama"), reshard.verify(target)):
            (problem,) = report.problems
            assert (problem.kind, problem.subject) == ("missing-file", path.name)
        with pytest.raises(Refused, match=f"shard-0000{rank + 1}-"):
            reshard.convert(target, tmp_path / "again", to="hf")
        assert reshard.repair(target, models / "llama").is_proven
        assert path.read_bytes() == whole


def test_the_last_file_is_missed_without_a_manifest(models: Path, tmp_path: Path) -> None:
    target = tmp_path / "target"
    reshard.convert(models / "llama", target, to="dcp", mp=4)
    for name in ("reshard.json", slice_name(3)):
        (target / name).unlink()
    kinds = {problem.kind for problem in reshard.verify(target, models / "llama").problems}
    assert kinds == {"wrong-shape"}
    with pytest.raises(Refused, match="wrong shape"):
        reshard.convert(target, tmp_path / "again", to="hf")


def test_exchanged_files_are_named(models: Path, tmp_path: Path) -> None:
    target = tmp_path / "target"
    reshard.convert(models / "llama", target, to="dcp", mp=4)
    first, second = target / slice_name(0), target / slice_name(1)
    first.rename(tmp_path / "first")
    second.rename(first)
    (tmp_path / "first").rename(second)
    for report in (reshard.verify(target, models / "llama"), reshard.verify(target)):
        assert {(one.kind, one.subject) for one in report.problems} == {
            ("swapped-file", first.name),
            ("swapped-file", second.name),
        }


def rewrite_places(path: Path, **changes: list[int]) -> None:
    """Changes the places of tensors in the metadata of a file, which stays as long as it was."""
    content = path.read_bytes()
    size = int.from_bytes(content[:8], "little")
    header = json.loads(content[8 : 8 + size])
    places = json.loads(header["__metadata__"]["DCP_SHARDING_INFO"])
    for name, offsets in changes.items():
        places[name.replace("__", ".")] = {"saved_offsets": offsets}
    header["__metadata__"]["DCP_SHARDING_INFO"] = json.dumps(places, separators=(",", ":"))
    text = json.dumps(header, separators=(",", ":")).encode().ljust(size)
    path.write_bytes(len(text).to_bytes(8, "little") + text + content[8 + size :])


def test_a_wrong_place_is_seen(models: Path, tmp_path: Path) -> None:
    """The bytes are right; torch would put them elsewhere."""
    target = tmp_path / "target"
    reshard.convert(models / "llama", target, to="dcp", mp=4)
    rewrite_places(target / slice_name(1), lm_head__weight=[48, 0])
    (problem,) = reshard.verify(target, models / "llama").problems
    assert problem.kind == "wrong-shape"
    assert problem.subject == f"{slice_name(1)}: {HEAD}"
    (target / "reshard.json").unlink()
    with pytest.raises(Refused, match="lm_head"):
        reshard.convert(target, tmp_path / "again", to="hf")


def test_an_interrupted_job_goes_on(models: Path, tmp_path: Path) -> None:
    target = tmp_path / "target"
    reshard.convert(models / "llama", tmp_path / "wanted", to="dcp", mp=3)
    leave_unfinished(Job(models / "llama", 3, to="dcp"), target)
    done = reshard.convert(models / "llama", target, to="dcp", ranks=3).done
    assert done is not None
    assert done.resumed > 0
    assert reshard.convert(models / "llama", target, to="dcp", ranks=3).done is None
    for path in (tmp_path / "wanted").glob("*.safetensors"):
        assert (target / path.name).read_bytes() == path.read_bytes()
    with pytest.raises(Refused, match="slices for 3 ranks") as refused:
        reshard.convert(models / "llama", target, to="dcp", ranks=4)
    assert f"reshard convert {target} NEW --to dcp --mp 4 makes the ranks" in str(refused.value)
    again = reshard.convert(models / "llama", target, to="dcp", ranks=4, restart=True, yes=True)
    assert len(again.plan.files) == 4
    assert reshard.verify(target, models / "llama").is_proven


def test_parts_are_joined(models: Path, tmp_path: Path) -> None:
    one, other = tmp_path / "one", tmp_path / "other"
    reshard.convert(models / "tied", one, to="dcp", mp=4, ranks=[0, 1])
    reshard.convert(models / "tied", other, to="dcp", mp=4, ranks=[2, 3])
    assert reshard.verify(one, ranks=[0, 1]).is_proven
    content = reshard.inspect(other)
    assert (content.layout, content.recipe, content.ranks, content.files) == ("slices", "llama", 4, 2)
    assert [note.text for note in content.notes] == ["a part of a target: ranks 2-3 of 4, by reshard.json"]
    with pytest.raises(Refused, match=slice_name(3)):
        reshard.convert(one, tmp_path / "again", to="hf")
    with pytest.raises(Refused, match=slice_name(3)):
        reshard.open(one)
    shutil.copytree(other, one, dirs_exist_ok=True)
    reshard.convert(models / "tied", one, to="dcp", mp=4)
    assert reshard.verify(one, models / "tied").is_proven
    assert not list(one.glob("reshard.ranks*"))


@pytest.mark.parametrize(
    ("options", "said"),
    [
        ({"mp": None}, "no number of ranks"),
        ({"mp": 2, "ranks": 2}, "each is the number of ranks"),
        ({"mp": 2, "ranks": [2]}, "ranks from 0 to 1"),
        ({"mp": 0}, "0 ranks"),
        ({"mp": 5000}, "1 to 4096"),
        ({"mp": 2, "pad": True}, "no padding"),
        ({"mp": 2, "max_file_size": 100}, "a rank has one file"),
        ({"mp": 2, "for_engine": "vllm"}, 'vllm, with to="dcp"'),
        ({"mp": 2, "keep_mtp": True}, "everything is kept"),
        ({"mp": 2, "to": "ranks", "ranks": 1}, "a list of whole numbers"),
    ],
)
def test_options_that_say_nothing_right(options: dict[str, Any], said: str, models: Path, tmp_path: Path) -> None:
    with pytest.raises(Refused) as refused:
        reshard.convert(models / "deepseek-v3", tmp_path / "target", **{"to": "dcp", **options})
    assert said in str(refused.value)
    assert not (tmp_path / "target").exists()


def test_the_number_of_ranks_on_the_command_line(
    models: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    source, target = str(models / "llama"), str(tmp_path / "target")
    assert main(["convert", source, target, "--to", "dcp", "--ranks", "0-3"]) == 2
    assert "add --mp N" in capsys.readouterr().err
    assert main(["convert", source, target, "--to", "dcp", "--ranks", "3"]) == 0
    assert f"reshard verify {target} --source {source}" in capsys.readouterr().out
    assert len(list((tmp_path / "target").glob("*.safetensors"))) == 3
    assert main(["convert", source, target, "--to", "dcp", "--mp", "3"]) == 0
    assert "converted already" in capsys.readouterr().out
    assert main(["plan", source, "--to", "dcp", "--ranks", "3"]) == 0
    assert "slices for 3 ranks" in capsys.readouterr().out
    assert main(["convert", source, f"{target}2", "--to", "dcp", "--mp", "3", "--ranks", "1"]) == 0
    said = capsys.readouterr().out
    assert f"reshard verify {target}2 --ranks 1\n" in said
    assert f"reshard convert {source} {target}2 --to dcp --mp 3" in said
    assert [path.name for path in (tmp_path / "target2").glob("*.safetensors")] == [slice_name(1)]
    assert main(["verify", target, "--source", source, "--ranks", "1"]) == 2
    (tmp_path / "target" / slice_name(2)).unlink()
    assert main(["verify", target, "--source", source]) == 1
    assert f"reshard verify {target} --ranks 0-1\n" in capsys.readouterr().out
