"""Rank files as a source: back to the files that they came from, or to another number of ranks, byte for byte.

The files that come back are compared with the originals, those of other ranks with what the original gives, and the
tensors of what an oracle has cut with the originals, by torch.
"""

import json
import os
import runpy
import shutil
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

import oracle
import pytest
import torch
from checkpoints import write_deepseek_v2
from conversions import LEGAL, ORACLES
from families import FAMILIES, write_small
from jobs import Job, convert_checkpoint
from oracle_casts import dequantize
from safetensors.torch import load_file

import reshard.execution.execute
import reshard.execution.writer
from reshard.cli.main import main
from reshard.errors import Refused
from reshard.execution.execute import Settings
from reshard.formats.manifest import compute_manifest_checksum
from reshard.storage.local import make_durable
from reshard.synthetic import write_tensors
from reshard.target.conversion import Conversion

WAYS = [(1, "yes"), (2, "no"), (4, "yes"), (1, "no"), (2, "yes"), (4, "no")]
"""Threads, and whether the page cache is used."""
WITH_MTP = ("deepseek-v3", "deepseek-v3.2-exp", "deepseek-v3.2", "kimi-k2", "glm-5.1", "glm-5.1-fp8", "glm-5.2-fp8")
V4 = [name for name in ORACLES if "v4" in name]
EXACT = [name for name in ORACLES if name not in V4 and name != "kimi-k2"]
"""Families of which nothing is dropped or cast, if their MTP layers are kept."""
INDEX = "model.safetensors.index.json"
Source = Callable[[str], Path]
Make = Callable[[str, int], Path]


@pytest.fixture(scope="module")
def ranks_of(source: Source, tmp_path_factory: pytest.TempPathFactory) -> Make:
    """The rank files of a family with all that can be kept, written once."""
    root = tmp_path_factory.mktemp("ranks")

    def of(name: str, ranks: int) -> Path:
        target = root / f"{name}-{ranks}"
        if not target.exists():
            convert(job_of(source(name), name, ranks), target)
        return target

    return of


@pytest.fixture
def folder(tmp_path: Path) -> Iterator[Path]:
    """Emptied afterwards: the whole file writes gigabytes."""
    yield tmp_path
    shutil.rmtree(tmp_path)


def job_of(folder: Path, name: str, ranks: int) -> Job:
    """With all that can be kept."""
    return Job(folder, ranks, keep_mtp=name in WITH_MTP and name != "kimi-k2")


def whole(folder: Path, **options: Any) -> Job:
    return Job(folder, 1, to="hf", **options)


def convert(job: Job, target: Path, number: int = 0) -> Conversion:
    jobs, cache = WAYS[number % len(WAYS)]
    return convert_checkpoint(job, target, Settings(jobs=jobs, cache=cache))


def contents(folder: Path) -> dict[str, bytes]:
    """Of all files but the manifest, which differs in what it tells of the source."""
    return {path.name: path.read_bytes() for path in folder.iterdir() if path.name != "reshard.json"}


def require_same(wanted: Path, found: Path) -> None:
    ours, theirs = contents(found), contents(wanted)
    assert sorted(ours) == sorted(theirs)
    assert [name for name in theirs if ours[name] != theirs[name]] == []


def tensors_of(folder: Path) -> dict[str, torch.Tensor]:
    return oracle.load_tensors(folder, ())


def require_tensors(wanted: Mapping[str, torch.Tensor], found: Mapping[str, torch.Tensor]) -> None:
    assert sorted(found) == sorted(wanted)
    for name, tensor in wanted.items():
        assert (found[name].dtype, found[name].shape) == (tensor.dtype, tensor.shape), name
        assert torch.equal(found[name].view(torch.uint8), tensor.view(torch.uint8)), name


def kinds(error: pytest.ExceptionInfo[Refused]) -> set[str]:
    return {problem.kind for problem in error.value.problems}


def flip(path: Path, name: str, place: int = 0) -> None:
    """Changes a bit of a tensor in a file."""
    content = bytearray(path.read_bytes())
    start = 8 + int.from_bytes(content[:8], "little")
    begin, _ = json.loads(content[8:start])[name]["data_offsets"]
    content[start + begin + place] ^= 1
    path.write_bytes(content)


def without_manifest(folder: Path, target: Path) -> Path:
    """The rank files as DeepSeek's script leaves them."""
    shutil.copytree(folder, target, ignore=shutil.ignore_patterns("reshard.json", "run_config.json"))
    return target


# --- there and back ---


@pytest.mark.parametrize(("name", "ranks"), [(name, ranks) for name in EXACT for ranks in LEGAL[name]])
def test_rank_files_become_the_files_that_they_came_from(
    name: str, ranks: int, source: Source, ranks_of: Make, folder: Path
) -> None:
    convert(whole(ranks_of(name, ranks)), folder / "back", ranks)
    require_same(source(name), folder / "back")


@pytest.mark.parametrize("name", ORACLES)
def test_other_ranks_are_those_of_the_source(name: str, ranks_of: Make, folder: Path) -> None:
    legal = LEGAL[name]
    pairs = [(legal[-1], 1), (1, legal[-1]), (legal[-1], legal[-2])]
    for number, (before, after) in enumerate(pairs):
        target = folder / f"{before}-{after}"
        convert(job_of(ranks_of(name, before), name, after), target, number)
        require_same(ranks_of(name, after), target)
        shutil.rmtree(target)


@pytest.mark.parametrize("name", EXACT)
def test_over_several_numbers_of_ranks_the_files_still_come_back(
    name: str, source: Source, ranks_of: Make, folder: Path
) -> None:
    convert(job_of(ranks_of(name, 8), name, 2), folder / "two")
    convert(job_of(folder / "two", name, 4), folder / "four")
    convert(whole(folder / "four"), folder / "back")
    require_same(source(name), folder / "back")


@pytest.mark.parametrize("way", WAYS)
def test_threads_and_cache_change_nothing(way: tuple[int, str], source: Source, ranks_of: Make, folder: Path) -> None:
    job = whole(ranks_of("deepseek-v3", 8))
    convert_checkpoint(job, folder / "back", Settings(jobs=way[0], cache=way[1]))
    require_same(source("deepseek-v3"), folder / "back")


def test_past_the_cache_the_source_is_read_directly(ranks_of: Make, folder: Path) -> None:
    job = whole(ranks_of("deepseek-v3", 8))
    done = convert_checkpoint(job, folder / "back", Settings(cache="no")).done
    assert done is not None
    assert done.ways.read in ("direct", "uncached", "dropped")
    convert(job, folder / "again")
    require_same(folder / "back", folder / "again")


def test_a_single_file_without_an_index_comes_back_alone(folder: Path) -> None:
    write_small(folder / "source", "deepseek-v3", files=1, index=False)
    convert(Job(folder / "source", 4, keep_mtp=True), folder / "ranks")
    convert(whole(folder / "ranks"), folder / "back")
    require_same(folder / "source", folder / "back")


def test_many_files_without_an_index_come_back_without(folder: Path) -> None:
    write_small(folder / "source", "deepseek-v3", files=11, index=False)
    convert(Job(folder / "source", 2, keep_mtp=True), folder / "ranks")
    convert(whole(folder / "ranks"), folder / "back")
    require_same(folder / "source", folder / "back")


def test_three_ranks_where_three_divide(folder: Path) -> None:
    family = FAMILIES["deepseek-v3"]
    config = {
        **family.small,
        "n_routed_experts": 12,
        "num_attention_heads": 12,
        "num_key_value_heads": 12,
        "intermediate_size": 1536,
        "moe_intermediate_size": 192,
        "vocab_size": 276,
    }
    write_tensors(folder / "source", family.tensors(config), config, 3)
    convert(Job(folder / "source", 3, keep_mtp=True), folder / "three")
    convert(whole(folder / "three"), folder / "back")
    require_same(folder / "source", folder / "back")
    convert(Job(folder / "three", 6, keep_mtp=True), folder / "six")
    convert(Job(folder / "source", 6, keep_mtp=True), folder / "wanted")
    require_same(folder / "wanted", folder / "six")


# --- padding ---


def test_padding_is_taken_away_again(source: Source, folder: Path) -> None:
    """Rows and columns, over the end of the last ranks: 144 blocks in 32 times 5."""
    origin = source("deepseek-v3-for-32")
    convert(Job(origin, 32, pad=True), folder / "ranks")
    convert(whole(folder / "ranks"), folder / "back", 1)
    require_same(origin, folder / "back")


def test_what_was_padded_is_cut_for_other_ranks_without(source: Source, ranks_of: Make, folder: Path) -> None:
    convert(Job(source("deepseek-v3-for-32"), 32, pad=True), folder / "ranks")
    convert(Job(folder / "ranks", 16), folder / "found")
    require_same(ranks_of("deepseek-v3-for-32", 16), folder / "found")
    with pytest.raises(Refused) as error:
        convert(Job(folder / "ranks", 32), folder / "again")
    assert kinds(error) == {"straddles-blocks"}
    convert(Job(folder / "found", 32, pad=True), folder / "again")
    require_same(folder / "ranks", folder / "again")


def test_tables_that_are_filled_up_need_a_manifest(ranks_of: Make, folder: Path) -> None:
    """Nothing else tells how many of the last rank's rows are padding."""
    ranks = without_manifest(ranks_of("deepseek-v4.1-flash", 8), folder / "ranks")
    for job in (whole(ranks), Job(ranks, 2)):
        with pytest.raises(Refused) as error:
            convert(job, folder / "back")
        assert kinds(error) == {"unknown-padding"}
    assert not (folder / "back").exists()


# --- what was dropped or cast ---


def test_what_was_dropped_is_said_and_all_else_comes_back(
    source: Source, folder: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    origin = source("deepseek-v3")
    convert(Job(origin, 4), folder / "four")
    convert(Job(folder / "four", 2), folder / "two")
    assert main(["convert", str(folder / "two"), str(folder / "back"), "--to", "hf"]) == 0
    wanted = oracle.load_tensors(origin, [11])
    lost = sum(tensor.nbytes for name, tensor in tensors_of(origin).items() if name not in wanted)
    count = len(tensors_of(origin)) - len(wanted)
    line = f"not restored: {count:,} tensors, {lost:,} bytes: MTP layers, dropped when converted"
    assert line in capsys.readouterr().out
    require_tensors(wanted, tensors_of(folder / "back"))
    assert (folder / "back" / "config.json").read_bytes() == (origin / "config.json").read_bytes()
    before, after = (json.loads((path / INDEX).read_text())["weight_map"] for path in (origin, folder / "back"))
    assert after == {name: file for name, file in before.items() if name in wanted}
    for path in origin.glob("*.safetensors"):
        if wanted.keys() >= load_file(path).keys():
            assert path.read_bytes() == (folder / "back" / path.name).read_bytes()


def test_plan_says_what_will_not_be_restored(source: Source, folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    convert(Job(source("kimi-k2"), 4), folder / "ranks")
    assert main(["plan", str(folder / "ranks"), "--to", "hf"]) == 0
    output = capsys.readouterr().out
    assert "not restored: " in output
    assert "model.layers.{i}.self_attn.rotary_emb.inv_freq, dropped when converted" in output
    assert main(["plan", str(folder / "ranks"), "--to", "hf", "--json"]) == 0
    assert len(json.loads(capsys.readouterr().out)["not_restored"]) == 1


@pytest.mark.parametrize("name", V4)
def test_what_was_dequantised_comes_back_in_bf16_and_the_config_says_so(
    name: str, source: Source, ranks_of: Make, folder: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["convert", str(ranks_of(name, 4)), str(folder / "back"), "--to", "hf"]) == 0
    output = capsys.readouterr().out
    assert "not as it was: " in output
    assert "attn.wo_a.{p}, dequantized when converted" in output
    before, after = tensors_of(source(name)), tensors_of(folder / "back")
    block = oracle.block_size(source(name), 32 if "v4.1" in name else 128)
    for scale in [key for key in before if key.endswith(".attn.wo_a.scale")]:
        weight = scale.removesuffix("scale") + "weight"
        before[weight] = dequantize(before[weight], before.pop(scale), block)
    require_tensors(before, after)
    config = json.loads((folder / "back" / "config.json").read_text())
    quantization = config["quantization_config"]
    assert quantization.pop("modules_to_not_convert") == ["attn.wo_a"]
    assert config == json.loads((source(name) / "config.json").read_text())
    # What has come back is a source like any other: its ranks are the same again.
    convert(job_of(folder / "back", name, 2), folder / "again")
    require_same(ranks_of(name, 2), folder / "again")


def test_fp8_experts_of_v4_come_back(source: Source, folder: Path) -> None:
    """As the base models have them: made here from FP4."""
    convert(whole(source("deepseek-v4-pro"), expert_dtype="fp8"), folder / "source")
    convert(Job(folder / "source", 8), folder / "ranks")
    convert(whole(folder / "ranks"), folder / "back")
    wanted = {name: tensor for name, tensor in tensors_of(folder / "source").items() if ".wo_a." not in name}
    found = {name: tensor for name, tensor in tensors_of(folder / "back").items() if ".wo_a." not in name}
    require_tensors(wanted, found)


def test_ranks_of_a_cast_come_back_as_the_cast_of_the_whole(source: Source, folder: Path) -> None:
    origin = source("deepseek-v3")
    convert(Job(origin, 4, cast="bf16", keep_mtp=True), folder / "ranks")
    convert(whole(folder / "ranks"), folder / "back")
    convert(whole(origin, cast="bf16"), folder / "wanted")
    require_tensors(tensors_of(folder / "wanted"), tensors_of(folder / "back"))
    configs = [json.loads((folder / which / "config.json").read_text()) for which in ("wanted", "back")]
    assert configs[0] == configs[1]
    # The other way round, cast on the way back.
    convert(Job(origin, 4, keep_mtp=True), folder / "scaled")
    convert(whole(folder / "scaled", cast="bf16"), folder / "cast")
    require_tensors(tensors_of(folder / "wanted"), tensors_of(folder / "cast"))


def test_a_cast_on_the_way_to_other_ranks_is_that_of_the_source(source: Source, ranks_of: Make, folder: Path) -> None:
    for ranks in (8, 2):
        convert(Job(ranks_of("deepseek-v3.2", 4), ranks, cast="bf16"), folder / "found")
        convert(Job(source("deepseek-v3.2"), ranks, cast="bf16"), folder / "wanted")
        require_same(folder / "wanted", folder / "found")
        shutil.rmtree(folder / "found")
        shutil.rmtree(folder / "wanted")
    convert(Job(ranks_of("deepseek-v4-flash", 4), 2, expert_dtype="fp8"), folder / "found")
    convert(Job(source("deepseek-v4-flash"), 2, expert_dtype="fp8"), folder / "wanted")
    require_same(folder / "wanted", folder / "found")


# --- what another converter has written: no manifest, no config ---


@pytest.mark.parametrize("ranks", [1, 4, 8])
def test_files_of_another_converter_come_back(
    ranks: int, source: Source, folder: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    origin = source("deepseek-v3")
    ORACLES["deepseek-v3"](origin, folder / "ranks", ranks)
    command = ["convert", str(folder / "ranks"), str(folder / "back"), "--to", "hf", "--max-file-size", "2MB"]
    assert main(command) == 0
    assert "without a manifest nobody knows whether the model had these, dropped" in capsys.readouterr().out
    require_tensors(oracle.load_tensors(origin, [11]), tensors_of(folder / "back"))
    paths = sorted((folder / "back").glob("*.safetensors"))
    assert [path.name for path in paths] == [
        f"model-{number:05}-of-{len(paths):05}.safetensors" for number in range(1, len(paths) + 1)
    ]
    assert len(paths) > 3
    assert max(path.stat().st_size for path in paths) <= 2 * 10**6
    index = json.loads((folder / "back" / INDEX).read_text())["weight_map"]
    assert index == {name: path.name for path in paths for name in load_file(path)}


def test_however_many_ranks_there_were_the_files_are_the_same(source: Source, folder: Path) -> None:
    for ranks in (1, 2, 8):
        ORACLES["deepseek-v3"](source("deepseek-v3"), folder / "ranks", ranks)
        convert(whole(folder / "ranks", max_file_size=2 * 10**6), folder / f"back-{ranks}")
        shutil.rmtree(folder / "ranks")
    require_same(folder / "back-1", folder / "back-2")
    require_same(folder / "back-1", folder / "back-8")


@pytest.mark.parametrize("q_lora", [True, False])
def test_files_of_another_converter_of_v2_come_back(q_lora: bool, folder: Path) -> None:  # noqa: FBT001
    write_deepseek_v2(folder / "source", q_lora=q_lora)
    oracle.convert(folder / "source", folder / "ranks", 4)
    result = convert(whole(folder / "ranks"), folder / "back")
    assert result.plan.recipe.name == "deepseek-v2"
    require_tensors(tensors_of(folder / "source"), tensors_of(folder / "back"))
    convert(Job(folder / "ranks", 8), folder / "eight")
    oracle.convert(folder / "source", folder / "wanted", 8)
    for path in (folder / "wanted").iterdir():
        assert path.read_bytes() == (folder / "eight" / path.name).read_bytes()


@pytest.mark.parametrize("name", V4[:3])
def test_files_of_another_converter_of_v4_come_back(name: str, source: Source, ranks_of: Make, folder: Path) -> None:
    ORACLES[name](source(name), folder / "ranks", 4)
    convert(whole(folder / "ranks"), folder / "back")
    convert(whole(ranks_of(name, 4)), folder / "wanted")
    require_tensors(tensors_of(folder / "wanted"), tensors_of(folder / "back"))
    assert not (folder / "back" / "config.json").exists()


def test_a_config_and_an_index_beside_them_are_used(source: Source, folder: Path) -> None:
    origin = source("deepseek-v3")
    ORACLES["deepseek-v3"](origin, folder / "ranks", 4)
    for name in ("config.json", INDEX):
        shutil.copyfile(origin / name, folder / "ranks" / name)
    convert(whole(folder / "ranks"), folder / "back")
    require_tensors(oracle.load_tensors(origin, [11]), tensors_of(folder / "back"))
    assert (folder / "back" / "config.json").read_bytes() == (origin / "config.json").read_bytes()
    before, after = (json.loads((path / INDEX).read_text())["weight_map"] for path in (origin, folder / "back"))
    assert after.items() <= before.items()


def test_two_recipes_that_fit_are_refused_with_the_way_out(
    source: Source, folder: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    origin = source("glm-5.1")
    ORACLES["glm-5.1"](origin, folder / "ranks", 4)
    with pytest.raises(Refused, match="deepseek-v32, glm-5 all fit") as error:
        convert(whole(folder / "ranks"), folder / "back")
    assert error.value.problems[0].remedy.startswith("copy the model's config.json beside the files")
    assert error.value.problems[0].remedy.endswith("choose one with --recipe")
    assert main(["inspect", str(folder / "ranks")]) == 0
    assert "recipe deepseek-v32 or glm-5, cut for 4 ranks" in capsys.readouterr().out
    convert(whole(folder / "ranks", recipe="glm-5"), folder / "back")
    require_tensors(oracle.load_tensors(origin, [11]), tensors_of(folder / "back"))
    shutil.copyfile(origin / "config.json", folder / "ranks" / "config.json")
    assert convert(whole(folder / "ranks"), folder / "by-config").plan.recipe.name == "glm-5"


def test_a_size_that_is_asked_for_is_kept_to_whatever_the_manifest_says(ranks_of: Make, folder: Path) -> None:
    ranks = ranks_of("deepseek-v3", 4)
    assert main(["convert", str(ranks), str(folder / "back"), "--to", "hf", "--max-file-size", "1MB"]) == 0
    paths = list((folder / "back").glob("*.safetensors"))
    assert len(paths) > 4
    assert max(path.stat().st_size for path in paths) <= 10**6


# --- refusals ---


@pytest.fixture
def four(ranks_of: Make, folder: Path) -> Path:
    """A copy of four rank files and their manifest, to be spoiled."""
    return Path(shutil.copytree(ranks_of("deepseek-v3", 4), folder / "four"))


def require_refused(job: Job, target: Path, *wanted: str) -> Refused:
    """Refused for just those reasons, and nothing has a final name."""
    with pytest.raises(Refused) as error:
        convert(job, target)
    assert kinds(error) == set(wanted)
    assert not target.exists() or not [path for path in target.iterdir() if not path.name.endswith(".partial")]
    return error.value


def test_a_missing_rank_file_is_refused(four: Path, folder: Path) -> None:
    (four / "model2-mp4.safetensors").unlink()
    refused = require_refused(whole(four), folder / "back", "missing-file")
    assert [problem.subject for problem in refused.problems] == ["model2-mp4.safetensors"]


def test_files_of_another_number_of_ranks_are_refused(four: Path, ranks_of: Make, folder: Path) -> None:
    for name in ("model0-mp2.safetensors", "model1-mp2.safetensors"):
        shutil.copyfile(ranks_of("deepseek-v3", 2) / name, four / name)
    refused = require_refused(whole(four), folder / "back", "extra-file")
    assert {problem.subject for problem in refused.problems} == {"model0-mp2.safetensors", "model1-mp2.safetensors"}
    convert(whole(four, ignore_extra_files=True), folder / "back")


def test_a_truncated_rank_file_is_refused(four: Path, folder: Path) -> None:
    with (four / "model1-mp4.safetensors").open("r+b") as file:
        file.truncate(file.seek(0, os.SEEK_END) - 1)
    require_refused(whole(four), folder / "back", "truncated-file")


def test_a_rank_file_of_another_model_is_refused_by_the_manifest(four: Path, folder: Path) -> None:
    """With the same names, shapes and sizes: only the data tell."""
    family = FAMILIES["deepseek-v3"]
    write_tensors(folder / "twin", family.tensors(family.small), family.small, 4, seed=1)
    convert(Job(folder / "twin", 4, keep_mtp=True), folder / "other")
    shutil.copyfile(folder / "other" / "model3-mp4.safetensors", four / "model3-mp4.safetensors")
    refused = require_refused(whole(four), folder / "back", "wrong-checksum")
    assert "model3-mp4.safetensors: bytes " in refused.problems[0].subject
    (four / "reshard.json").unlink()
    # Without the manifest the replicas differ.
    require_refused(whole(four), folder / "back", "replicas-differ")


def test_rank_files_that_changed_places_are_refused(four: Path, folder: Path) -> None:
    one, two = four / "model1-mp4.safetensors", four / "model2-mp4.safetensors"
    one.rename(four / "third")
    two.rename(one)
    (four / "third").rename(two)
    with pytest.raises(Refused) as error:
        convert(whole(four), folder / "back")
    assert kinds(error) <= {"wrong-size", "wrong-checksum"}
    (four / "reshard.json").unlink()
    refused = require_refused(whole(four), folder / "back", "wrong-ranks")
    assert all(".mlp.experts." in problem.subject for problem in refused.problems)


def test_a_rank_file_of_another_conversion_is_refused(four: Path, source: Source, folder: Path) -> None:
    convert(Job(source("deepseek-v3"), 4), folder / "other")  # without the MTP layer
    shutil.copyfile(folder / "other" / "model3-mp4.safetensors", four / "model3-mp4.safetensors")
    (four / "reshard.json").unlink()
    refused = require_refused(whole(four), folder / "back", "wrong-ranks")
    assert all("model.layers.11." in problem.subject for problem in refused.problems)


@pytest.mark.parametrize(
    ("name", "place", "rank"),
    [("norm.weight", 3, 2), ("layers.3.attn.wkv_a.weight", 50, 3), ("layers.10.ffn.gate.bias", 0, 1)],
)
def test_replicas_that_differ_are_refused_by_name_and_file(
    name: str, place: int, rank: int, four: Path, source: Source, folder: Path
) -> None:
    (four / "reshard.json").unlink()
    flip(four / f"model{rank}-mp4.safetensors", name, place)
    refused = require_refused(whole(four), folder / "back", "replicas-differ")
    assert refused.problems[0].subject == name
    assert refused.problems[0].found == f"other bytes in model{rank}-mp4.safetensors than in model0-mp4.safetensors"
    require_refused(Job(four, 2), folder / "two", "replicas-differ")
    shutil.rmtree(folder / "back", ignore_errors=True)
    convert(whole(four, replicas="first"), folder / "back")
    require_tensors(tensors_of(source("deepseek-v3")), tensors_of(folder / "back"))


def test_of_replicas_that_differ_the_first_can_be_taken(four: Path, source: Source, folder: Path) -> None:
    (four / "reshard.json").unlink()
    flip(four / "model0-mp4.safetensors", "norm.weight")
    command = ["convert", str(four), str(folder / "back"), "--to", "hf"]
    assert main(command) == 2
    assert main([*command, "--replicas", "first", "--restart"]) == 0
    wanted = tensors_of(source("deepseek-v3"))
    wanted["model.norm.weight"].view(torch.uint8)[0] ^= 1
    require_tensors(wanted, tensors_of(folder / "back"))


def test_replicas_of_a_source_that_has_none_are_refused(
    source: Source, folder: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    command = ["convert", str(source("deepseek-v3")), str(folder / "ranks"), "--mp", "2", "--replicas", "first"]
    assert main(command) == 2
    assert "--replicas: wrong option" in capsys.readouterr().err
    assert not (folder / "ranks").exists()


def test_block_scales_that_two_ranks_share_must_be_equal(folder: Path) -> None:
    """A shared expert of 512 rows: 64 for each of 8 ranks, of blocks of 128."""
    family = FAMILIES["deepseek-v3"]
    config = {**family.small, "moe_intermediate_size": 512}
    write_tensors(folder / "source", family.tensors(config), config, 2)
    convert(Job(folder / "source", 8, keep_mtp=True), folder / "ranks")
    name = "layers.10.ffn.shared_experts.w1.scale"
    files = [load_file(folder / "ranks" / f"model{rank}-mp8.safetensors") for rank in (4, 5, 6)]
    assert files[0][name].shape[0] == 1
    assert torch.equal(files[0][name], files[1][name])
    assert not torch.equal(files[1][name], files[2][name])
    convert(whole(folder / "ranks"), folder / "back")
    require_same(folder / "source", folder / "back")
    (folder / "ranks" / "reshard.json").unlink()
    flip(folder / "ranks" / "model5-mp8.safetensors", name)
    refused = require_refused(whole(folder / "ranks"), folder / "no", "replicas-differ")
    found = "other bytes in model5-mp8.safetensors than in model4-mp8.safetensors"
    assert (refused.problems[0].subject, refused.problems[0].found) == (name, found)


def test_one_of_several_rank_files_is_refused_with_the_folder_to_name(four: Path, folder: Path) -> None:
    refused = require_refused(whole(four / "model0-mp4.safetensors"), folder / "back", "rank-files")
    assert refused.problems[0].remedy == f"name {four}"


@pytest.mark.parametrize("name", ["model0-mp999999999.safetensors", "model0-mp0.safetensors"])
def test_a_name_that_claims_too_many_ranks_is_refused(name: str, four: Path, folder: Path) -> None:
    for path in four.iterdir():
        path.unlink()
    (four / name).write_bytes(b"")
    require_refused(whole(four), folder / "back", "wrong-ranks")


# --- hostile manifests ---


def rewritten(folder: Path, change: Callable[[dict[str, Any]], None]) -> None:
    """A manifest that says something else, with the right checksum: anyone can write one."""
    manifest = json.loads((folder / "reshard.json").read_text())
    del manifest["xxh3_128"]
    change(manifest)
    manifest["xxh3_128"] = compute_manifest_checksum(manifest)
    (folder / "reshard.json").write_text(json.dumps(manifest))


def renamed(name: str) -> Callable[[dict[str, Any]], None]:
    def change(manifest: dict[str, Any]) -> None:
        headers = manifest["origin"]["headers"]
        headers[name] = headers.pop("model-00001-of-00004.safetensors")

    return change


@pytest.mark.parametrize(
    "change",
    [
        renamed("../outside.safetensors"),
        renamed("reshard.json"),
        renamed(".."),
        renamed("a/b.safetensors"),
        lambda manifest: manifest["origin"]["headers"].update({"x.safetensors": "no base 64"}),
        lambda manifest: manifest["origin"].update(lost=[{"use": "\x1b[2J"}]),
        lambda manifest: manifest["origin"].update(shapes=[]),
        lambda manifest: manifest["origin"].update(texts={"config.json": 3}),
        lambda manifest: manifest.update(origin=7),
        lambda manifest: manifest.pop("origin"),
        lambda manifest: manifest.update(recipe=[]),
    ],
)
def test_a_manifest_that_is_not_ours_is_as_good_as_none(
    change: Callable[[dict[str, Any]], None], four: Path, source: Source, folder: Path
) -> None:
    rewritten(four, change)
    try:
        convert(whole(four), folder / "deep" / "back")
    except Refused as refused:
        assert {problem.kind for problem in refused.problems} <= {"no-recipe"}  # noqa: PT017
        return
    assert {path.name for path in folder.iterdir()} <= {"four", "deep"}
    assert sorted(path.name for path in (folder / "deep").iterdir()) == ["back"]
    require_tensors(tensors_of(source("deepseek-v3")), tensors_of(folder / "deep" / "back"))


@pytest.mark.parametrize("shape", [[], [1], [9, 9, 9], [10**9, 40], [0, 0]])
def test_a_shape_of_the_manifest_that_cannot_be_is_refused(shape: list[int], four: Path, folder: Path) -> None:
    rewritten(four, lambda manifest: manifest["origin"]["shapes"].update({"model.embed_tokens.weight": shape}))
    require_refused(whole(four), folder / "back", "wrong-shape")


# --- crashes ---


class Crash(BaseException):
    """The end of the program, without a word."""


@pytest.mark.parametrize(("name", "options"), [("deepseek-v3", {"to": "hf"}), ("deepseek-v4-flash", {"to": "ranks"})])
def test_a_run_that_was_ended_in_the_middle_is_gone_on_with(
    name: str, options: dict[str, str], ranks_of: Make, folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    job = Job(ranks_of(name, 4), 1 if options["to"] == "hf" else 2, **options)  # type: ignore[arg-type]
    convert_checkpoint(job, folder / "wanted", Settings(jobs=1))
    add, seen = reshard.execution.writer.Ledger.add, []

    def crashing(self: Any, *arguments: Any) -> None:
        add(self, *arguments)
        seen.append(1)
        if len(seen) % 10 == 0:
            self.flush()
        if len(seen) == 35:
            raise Crash

    with monkeypatch.context() as patch:
        patch.setattr(reshard.execution.writer.Ledger, "add", crashing)
        with pytest.raises(Crash):
            convert_checkpoint(job, folder / "found", Settings(jobs=1))
    assert all(path.name.endswith((".partial", ".journal")) for path in (folder / "found").iterdir())
    done = convert_checkpoint(job, folder / "found", Settings(jobs=2)).done
    assert done is not None
    assert done.resumed > 0
    require_same(folder / "wanted", folder / "found")
    manifests = [(folder / which / "reshard.json").read_bytes() for which in ("wanted", "found")]
    assert manifests[0] == manifests[1]
    assert convert_checkpoint(job, folder / "found").done is None


def test_a_file_that_was_lost_is_written_again_and_the_index_still_names_all(
    source: Source, ranks_of: Make, folder: Path
) -> None:
    job, back = whole(ranks_of("deepseek-v3", 4)), folder / "back"
    convert(job, back)
    (back / "model-00003-of-00004.safetensors").unlink()
    (back / INDEX).unlink()
    assert convert(job, back).done is not None
    require_same(source("deepseek-v3"), back)
    (back / INDEX).unlink()
    convert(job, back)
    require_same(source("deepseek-v3"), back)


def test_a_rank_file_that_changes_under_the_way_is_seen(
    four: Path, folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def change_too(*arguments: Any) -> None:
        make_durable(*arguments)
        flip(four / "model2-mp4.safetensors", "norm.weight")

    monkeypatch.setattr(reshard.execution.execute, "make_durable", change_too)
    with pytest.raises(Refused) as error:
        convert(whole(four), folder / "back")
    assert kinds(error) == {"source-changed"}
    assert not list((folder / "back").glob("*.safetensors"))


# --- verify and inspect ---


def test_what_came_back_is_verified_against_the_rank_files(ranks_of: Make, folder: Path) -> None:
    ranks, back = ranks_of("deepseek-v3", 4), folder / "back"
    convert(whole(ranks), back)
    assert main(["verify", str(back)]) == 0
    assert main(["verify", str(back), "--source", str(ranks)]) == 0
    name = "model.layers.10.mlp.experts.10.up_proj.weight"
    flip(back / json.loads((back / INDEX).read_text())["weight_map"][name], name)
    assert main(["verify", str(back), "--source", str(ranks)]) == 1


def test_ranks_against_ranks_are_refused_with_the_way_out(ranks_of: Make, capsys: pytest.CaptureFixture[str]) -> None:
    ranks = [str(ranks_of("deepseek-v3", number)) for number in (4, 2)]
    assert main(["verify", ranks[0], "--source", ranks[1]]) == 2
    assert "hold both against the whole checkpoint" in capsys.readouterr().err


def test_the_command_that_is_named_next_is_one_that_works(
    ranks_of: Make, folder: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    for target, options in ((folder / "back", ["--to", "hf"]), (folder / "two", ["--mp", "2"])):
        assert main(["convert", str(ranks_of("deepseek-v3", 4)), str(target), *options]) == 0
        lines = capsys.readouterr().out.splitlines()
        line = lines[lines.index("next:") + 1]
        assert main(line.removeprefix("  reshard ").split()) == 0


@pytest.mark.parametrize("name", ORACLES)
def test_inspect_tells_recipe_and_counts_of_rank_files(
    name: str, source: Source, ranks_of: Make, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["inspect", str(source(name)), "--json"]) == 0
    before = json.loads(capsys.readouterr().out)
    assert main(["inspect", str(ranks_of(name, 4)), "--json"]) == 0
    after = json.loads(capsys.readouterr().out)
    assert (after["recipe"], after["ranks"], after["counts"]) == (before["recipe"], 4, before["counts"])


def test_inspect_says_what_is_wrong_with_rank_files(four: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (four / "model1-mp4.safetensors").unlink()
    assert main(["inspect", str(four)]) == 0
    assert "\nnote: a part of a target: ranks 0, 2-3 of 4, by reshard.json\n" in capsys.readouterr().out


@pytest.mark.parametrize("target", ["2", "hf"])
def test_the_files_of_the_script_come_back(target: str, folder: Path, request: pytest.FixtureRequest) -> None:
    """Those of DeepSeek's own script, given by `--reference PATH`."""
    path = request.config.getoption("--reference", default=None)
    if path is None:
        pytest.skip("needs --reference PATH, a runnable copy of the script that reshard replaces")
    write_deepseek_v2(folder / "source", q_lora=True)
    main_of_script = runpy.run_path(str(path))["main"]
    main_of_script(str(folder / "source"), str(folder / "four"), 16, 4)
    if target == "hf":
        convert(whole(folder / "four"), folder / "back")
        require_tensors(tensors_of(folder / "source"), tensors_of(folder / "back"))
        return
    main_of_script(str(folder / "source"), str(folder / "two"), 16, 2)
    convert(Job(folder / "four", 2), folder / "found")
    for file in (folder / "two").iterdir():
        assert file.read_bytes() == (folder / "found" / file.name).read_bytes()
