"""Rank files against their source: nothing is wrong with good ones, and every damage is seen and named."""

import json
import os
import re
import shutil
import subprocess
import sys
from collections.abc import Callable, Mapping
from fractions import Fraction
from pathlib import Path
from random import Random
from typing import Any

import numpy as np
import oracle
import pytest
import torch
from jobs import Job, convert_checkpoint
from safetensors.torch import load_file, save_file
from torch import Tensor
from verified_targets import verify_target

from reshard.errors import Refused
from reshard.recipes.recipe import load_recipe
from reshard.sources.checkpoints import read_checkpoint
from reshard.synthetic import SMALL_V3, write_checkpoint
from reshard.verification.report import Report

RANKS = 4
MTP_LAYER = 3
CONFIG: Mapping[str, Any] = {
    **SMALL_V3,
    "hidden_size": 40,
    "intermediate_size": 1024,
    "kv_lora_rank": 24,
    "moe_intermediate_size": 64,
    "n_routed_experts": 12,
    "num_hidden_layers": MTP_LAYER,
    "q_lora_rank": 20,
    "qk_nope_head_dim": 16,
    "qk_rope_head_dim": 16,
    "v_head_dim": 16,
    "vocab_size": 64,
}
"""For 4 ranks: dense weights are cut in whole blocks, the others inside one; experts 2 and 10 are of ranks 0 and 3."""
EMBED = "embed.weight"
NORM = "layers.1.attn_norm.weight"
DENSE_SCALE = "layers.0.ffn.w1.scale"
COLUMNS = "layers.0.ffn.w2.weight"
EXPERT = "layers.1.ffn.experts.2.w1.weight"
LEAST = Fraction(1, 10**8)
"""The smallest sample: the ends of every tensor."""
Tensors = dict[str, Tensor]


@pytest.fixture(scope="session")
def source(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("verify") / "source"
    write_checkpoint(folder, CONFIG, 3)
    return folder


@pytest.fixture(scope="session")
def good(source: Path) -> Path:
    convert_checkpoint(Job(source, RANKS), source.parent / "good")
    return source.parent / "good"


@pytest.fixture
def target(good: Path, tmp_path: Path) -> Path:
    """A copy to be damaged."""
    return shutil.copytree(good, tmp_path / "target")


def verify(target: Path, source: Path, sample: Fraction | None = None) -> Report:
    return verify_target(target, read_checkpoint(source), load_recipe("deepseek-v3"), sample=sample)


def rank_file(target: Path, rank: int) -> Path:
    return target / f"model{rank}-mp{RANKS}.safetensors"


def load(target: Path, rank: int) -> Tensors:
    return load_file(rank_file(target, rank))


def change(target: Path, rank: int, changes: Mapping[str, Tensor | None]) -> None:
    """Write a rank file anew with these tensors in the place of its own; None leaves one out."""
    tensors = {**load(target, rank), **changes}
    save_file({name: tensor for name, tensor in tensors.items() if tensor is not None}, rank_file(target, rank))


def subject(rank: int, name: str) -> str:
    """How a tensor of a rank file is named in a problem."""
    return f"model{rank}-mp{RANKS}.safetensors: {name}"


def facts(report: Report) -> set[tuple[str, str]]:
    return {(problem.kind, problem.subject) for problem in report.problems}


def data_places(path: Path) -> dict[str, tuple[int, int]]:
    """Where the data of each tensor begin and end, in bytes from the start of the file."""
    content = path.read_bytes()
    start = 8 + int.from_bytes(content[:8], "little")
    header = json.loads(content[8:start])
    return {
        name: (start + entry["data_offsets"][0], start + entry["data_offsets"][1]) for name, entry in header.items()
    }


def flipped(content: bytes, place: int, bit: int) -> bytes:
    return content[:place] + bytes([content[place] ^ 1 << bit]) + content[place + 1 :]


# --- good ones ---


@pytest.mark.parametrize("ranks", [1, 2, 4])
def test_good_rank_files_have_no_problems(ranks: int, source: Path, tmp_path: Path) -> None:
    """As the oracle writes them."""
    oracle.convert(source, tmp_path, ranks, mtp_layers=[MTP_LAYER])
    report = verify(tmp_path, source)
    assert report.problems == ()
    shares = [load_file(path) for path in tmp_path.glob("*.safetensors")]
    assert (report.files, report.tensors) == (ranks, sum(map(len, shares)))
    assert report.size == sum(tensor.nbytes for share in shares for tensor in share.values())


def test_progress_tells_of_every_byte(good: Path, source: Path) -> None:
    told: list[int] = []
    verify_target(good, read_checkpoint(source), load_recipe("deepseek-v3"), told.append)
    assert sum(told) == sum(path.stat().st_size for path in good.glob("*.safetensors"))
    assert min(told) >= 0


def test_the_order_of_tensors_and_metadata_are_no_problem(target: Path, source: Path) -> None:
    save_file(load(target, 1), rank_file(target, 1), metadata={"format": "pt"})
    assert verify(target, source).problems == ()


def test_only_the_rank_files_are_looked_at(target: Path, source: Path) -> None:
    (target / "README.md").write_text("of no rank")
    (target / "tokenizer.json").unlink()
    assert verify(target, source).problems == ()


# --- flipped bits ---


@pytest.mark.parametrize("rank", range(RANKS))
def test_a_flipped_bit_is_seen_wherever_it_is(rank: int, target: Path, source: Path) -> None:
    random = Random(rank)
    path = rank_file(target, rank)
    content, places = path.read_bytes(), data_places(path)
    for _ in range(12):
        place, bit = random.randrange(len(content)), random.randrange(8)
        path.write_bytes(flipped(content, place, bit))
        found = facts(verify(target, source))
        names = [name for name, (start, end) in places.items() if start <= place < end]
        if names:
            assert found == {("differs", subject(rank, names[0]))}, (place, bit)
        assert found, (place, bit)


@pytest.mark.parametrize("is_last", [False, True])
@pytest.mark.parametrize("rank", range(RANKS))
def test_the_first_and_the_last_bit_of_every_tensor_are_seen(
    rank: int, target: Path, source: Path, *, is_last: bool
) -> None:
    path = rank_file(target, rank)
    content, places = path.read_bytes(), data_places(path)
    for start, end in places.values():
        content = flipped(content, end - 1, 7) if is_last else flipped(content, start, 0)
    path.write_bytes(content)
    report = verify(target, source)
    assert facts(report) == {("differs", subject(rank, name)) for name in places}
    for problem in report.problems:
        start, end = places[problem.subject.split(": ")[1]]
        assert f"first in byte {end - start - 1 if is_last else 0:,} of the tensor" in problem.found


def test_a_flipped_bit_of_the_header_is_seen(target: Path, source: Path) -> None:
    path = rank_file(target, 0)
    content = path.read_bytes()
    length = 8 + int.from_bytes(content[:8], "little")
    random = Random(0)
    for place in [*range(10), *random.sample(range(10, length), 60), length - 1]:
        path.write_bytes(flipped(content, place, random.randrange(8)))
        assert verify(target, source).problems != (), place


def test_a_flipped_bit_of_the_source_is_seen_in_every_rank_that_holds_it(
    good: Path, source: Path, tmp_path: Path
) -> None:
    shutil.copytree(source, tmp_path / "source")
    tensor = read_checkpoint(source).tensors["model.layers.1.input_layernorm.weight"]
    path = tmp_path / "source" / read_checkpoint(source).files[tensor.file].name
    path.write_bytes(flipped(path.read_bytes(), tensor.offset + 3, 5))
    assert facts(verify(good, tmp_path / "source")) == {("differs", subject(rank, NORM)) for rank in range(RANKS)}


OWN_RECIPE = """
name = "own"
about = "for one test"
left = "one"
right = "other"
files = "model{rank}-mp{ranks}.safetensors"
rules = [
["same", "whole", "whole", "replicate"],
["same", "short", "short", "columns"],
["same", "long", "long", "columns"],
["same", "rows", "rows", "rows"],
]
"""


@pytest.fixture(scope="session")
def large(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Tensors that are compared in several bands, or whose rows are larger than a band: source, recipe and 2 ranks."""
    folder = tmp_path_factory.mktemp("large")
    (folder / "source").mkdir()
    shapes = {"whole": (9_000_001,), "short": (90_001, 200), "long": (3, 9_000_002), "rows": (6, 3_000_001)}
    random = np.random.default_rng(0)
    tensors = {name: torch.from_numpy(random.integers(0, 256, shape, np.uint8)) for name, shape in shapes.items()}
    save_file(tensors, folder / "source" / "large.safetensors")
    (folder / "own.toml").write_text(OWN_RECIPE)
    (folder / "target").mkdir()
    for rank in range(2):
        cut = {"whole": None, "short": 1, "long": 1, "rows": 0}
        share = {
            name: tensor if cut[name] is None else tensor.chunk(2, cut[name] or 0)[rank].contiguous()
            for name, tensor in tensors.items()
        }
        save_file(share, folder / "target" / f"model{rank}-mp2.safetensors")
    return folder


def verify_large(large: Path, sample: Fraction | None = None) -> Report:
    recipe = load_recipe(str(large / "own.toml"))
    return verify_target(large / "target", read_checkpoint(large / "source"), recipe, sample=sample)


def invert(path: Path, start: int, end: int) -> None:
    """Every bit of a stretch of a file; twice, and it is as before."""
    with path.open("r+b") as file:
        file.seek(start)
        content = file.read(end - start)
        file.seek(start)
        file.write((~np.frombuffer(content, np.uint8)).tobytes())


@pytest.fixture(params=["through the cache", "past the cache"])
def way(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    """As on a machine that has memory enough, and on one that has none to spare."""
    if request.param == "past the cache":
        monkeypatch.setattr("reshard.storage.page_cache.measure_available_memory", lambda: 0)


@pytest.mark.usefixtures("way")
@pytest.mark.parametrize("name", ["whole", "short", "long", "rows"])
def test_a_flipped_bit_is_seen_in_every_band_of_a_large_tensor(name: str, large: Path) -> None:
    assert verify_large(large).problems == ()
    path = large / "target" / "model1-mp2.safetensors"
    start, end = data_places(path)[name]
    for place in (start, (start + end) // 2, end - 1):
        invert(path, place, place + 1)
        (problem,) = verify_large(large).problems
        invert(path, place, place + 1)
        assert (problem.kind, problem.subject) == ("differs", f"model1-mp2.safetensors: {name}")
        assert problem.found == (
            f"1 other byte than in the source, first in byte {place - start:,} of the tensor, "
            f"last in byte {place - start:,}"
        )


@pytest.mark.usefixtures("way")
@pytest.mark.parametrize("name", ["whole", "short", "long", "rows"])
def test_all_bytes_that_differ_are_counted_whichever_thread_finds_them(name: str, large: Path) -> None:
    path = large / "target" / "model0-mp2.safetensors"
    start, end = data_places(path)[name]
    stretches = [(start + 7, start + 9), (start + 2_000_000, end - 1_000_000), (end - 50, end - 3)]
    for stretch in stretches:
        invert(path, *stretch)
    problems = {verify_large(large).problems for _ in range(3)}
    for stretch in stretches:
        invert(path, *stretch)
    ((problem,),) = problems
    count = sum(after - first for first, after in stretches)
    assert problem.found == (
        f"{count:,} other bytes than in the source, first in byte 7 of the tensor, last in byte {end - start - 4:,}"
    )


# --- memory and files that change ---


VERIFY_AND_TELL_MEMORY = """
import sys
from pathlib import Path
from reshard.sources.checkpoints import read_checkpoint
from reshard.recipes.recipe import load_recipe
from reshard.verification.verify import trace_target, verify_traced

def peak():
    return int(Path("/proc/self/status").read_text().split("VmHWM:")[1].split()[0]) << 10

small, large = map(Path, sys.argv[1:])
for folder in (small, large):
    before = peak()
    sides = folder / "target", read_checkpoint(folder / "source"), load_recipe(str(small / "own.toml"))
    traced = trace_target(*sides, None, stacked=None, packed=None, ignore_extra_files=False)
    report = verify_traced(traced, lambda _: None, None)
    assert not report.problems, report.problems
print(peak() - before, report.compared)
"""


def write_zeros(path: Path, shapes: Mapping[str, tuple[int, ...]]) -> None:
    """A safetensors file of zeros that takes no room on the disk."""
    header, end = {}, 0
    for name, shape in shapes.items():
        size = int(np.prod(shape))
        header[name] = {"dtype": "U8", "shape": shape, "data_offsets": [end, end + size]}
        end += size
    text = json.dumps(header).encode()
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(len(text).to_bytes(8, "little") + text)
    os.truncate(path, 8 + len(text) + end)


def test_a_row_of_any_width_takes_no_more_memory(tmp_path: Path) -> None:
    """A row of 120 MB, cut by columns, and a tensor of 120 MB that is cut by rows."""
    for name, size in (("small", 8 << 20), ("large", 120 << 20)):
        write_zeros(tmp_path / name / "source" / "a.safetensors", {"long": (1, size), "rows": (2, size // 2)})
        for rank in range(2):
            shapes = {"long": (1, size // 2), "rows": (1, size // 2)}
            write_zeros(tmp_path / name / "target" / f"model{rank}-mp2.safetensors", shapes)
    rules = [line for line in OWN_RECIPE.splitlines() if "whole" not in line and "short" not in line]
    (tmp_path / "small" / "own.toml").write_text("\n".join(rules))
    command = [sys.executable, "-c", VERIFY_AND_TELL_MEMORY, str(tmp_path / "small"), str(tmp_path / "large")]
    done = subprocess.run(command, check=True, capture_output=True, text=True)
    more, compared = map(int, done.stdout.split())
    assert compared == 240 << 20
    assert more < 16 << 20


@pytest.mark.parametrize("side", ["source", "target"])
def test_a_file_that_ends_early_meanwhile_is_refused(side: str, source: Path, target: Path, tmp_path: Path) -> None:
    shutil.copytree(source, tmp_path / "source")
    checkpoint = read_checkpoint(tmp_path / "source")
    path = rank_file(target, 1) if side == "target" else tmp_path / "source" / checkpoint.files[1].name
    with pytest.raises(Refused, match=re.escape(path.name)):
        verify_target(
            target, checkpoint, load_recipe("deepseek-v3"), lambda _: os.truncate(path, path.stat().st_size // 2)
        )


# --- samples ---


def test_a_sample_of_good_files_has_no_problems_and_tells_its_size(large: Path) -> None:
    reports = [verify_large(large, Fraction(share)) for share in ("1/1000", "1/100", "1/4", "1")]
    assert all(report.problems == () and report.is_sampled for report in reports)
    sizes = [report.compared / report.size for report in reports]
    assert sizes[3] == 1
    assert 0 < sizes[0] < sizes[1] < 0.03
    assert 0.23 < sizes[2] < 0.28
    whole = verify_large(large)
    assert (whole.compared, whole.is_sampled) == (whole.size, False)


@pytest.mark.usefixtures("way")
def test_a_sample_compares_as_many_bytes_as_it_says(large: Path) -> None:
    """All bytes of a file are wrong: those that it finds are those that it has compared, the same ones every time."""
    path = large / "target" / "model1-mp2.safetensors"
    places = data_places(path).values()
    start, end = min(place[0] for place in places), max(place[1] for place in places)
    recipe, source = load_recipe(str(large / "own.toml")), read_checkpoint(large / "source")
    invert(path, start, end)
    reports = [verify_target(large / "target", source, recipe, ranks=[1], sample=Fraction(1, 10)) for _ in range(2)]
    invert(path, start, end)
    assert reports[0] == reports[1]
    counts = [int(problem.found.split()[0].replace(",", "")) for problem in reports[0].problems]
    assert len(counts) == 4
    assert sum(counts) == reports[0].compared
    assert 0.08 < sum(counts) / (end - start) < 0.13


@pytest.mark.parametrize("place", [0, 1, -1, -2])
@pytest.mark.parametrize("rank", range(RANKS))
def test_a_sample_sees_the_ends_of_every_tensor(rank: int, place: int, target: Path, source: Path) -> None:
    path = rank_file(target, rank)
    content, places = path.read_bytes(), data_places(path)
    for start, end in places.values():
        content = flipped(content, start + place if place >= 0 else end + place, 3)
    path.write_bytes(content)
    assert facts(verify(target, source, LEAST)) == {("differs", subject(rank, name)) for name in places}


@pytest.mark.parametrize("name", ["whole", "short", "long", "rows"])
@pytest.mark.parametrize("rank", [0, 1])
def test_a_sample_sees_the_ends_of_large_tensors(rank: int, name: str, large: Path) -> None:
    path = large / "target" / f"model{rank}-mp2.safetensors"
    start, end = data_places(path)[name]
    for place in (start, end - 1, start + 90, end - 90):
        invert(path, place, place + 1)
        problems = verify_large(large, LEAST).problems
        invert(path, place, place + 1)
        assert [problem.subject for problem in problems] == [f"{path.name}: {name}"]


def test_a_sample_looks_at_every_header_in_full(target: Path, source: Path) -> None:
    change(target, 2, {NORM: None, EMBED: retyped(load(target, 2)[EMBED]), "extra": torch.zeros(1)})
    change(target, 1, {"norm.weight": load(target, 1)["norm.weight"].view(1, -1)})
    assert facts(verify(target, source, LEAST)) == {
        ("wrong-ranks", "model.layers.1.input_layernorm.weight"),
        ("wrong-shape", subject(2, EMBED)),
        ("extra-tensor", subject(2, "extra")),
        ("wrong-shape", subject(1, "norm.weight")),
    }


def test_a_sample_sees_swapped_experts(target: Path, source: Path) -> None:
    names = [f"layers.2.ffn.experts.{expert}.w1.weight" for expert in (0, 1)]
    tensors = load(target, 0)
    change(target, 0, {names[0]: tensors[names[1]], names[1]: tensors[names[0]]})
    assert facts(verify(target, source, LEAST)) == {("differs", subject(0, name)) for name in names}


def test_progress_of_a_sample_tells_of_every_byte(good: Path, source: Path) -> None:
    told: list[int] = []
    verify_target(good, read_checkpoint(source), load_recipe("deepseek-v3"), told.append, sample=LEAST)
    assert sum(told) == sum(path.stat().st_size for path in good.glob("*.safetensors"))


# --- files ---


@pytest.mark.parametrize("size", [0, 7, 8, 500, -100_000, -1])
def test_a_truncated_file_is_named(size: int, target: Path, source: Path) -> None:
    path = rank_file(target, 2)
    path.write_bytes(path.read_bytes()[:size])
    found = facts(verify(target, source))
    assert found == {("truncated-file", path.name)}


def test_a_file_that_goes_on_is_named(target: Path, source: Path) -> None:
    path = rank_file(target, 2)
    path.write_bytes(path.read_bytes() + b"\0")
    assert facts(verify(target, source)) == {("wrong-size", path.name)}


@pytest.mark.parametrize("rank", range(RANKS))
def test_a_missing_file_is_named(rank: int, target: Path, source: Path) -> None:
    rank_file(target, rank).unlink()
    report = verify(target, source)
    assert [problem.kind for problem in report.problems] == ["missing-file"]
    assert report.problems[0].subject.endswith(f"model{rank}-mp4.safetensors")
    assert report.problems[0].remedy.endswith("; else copy it there, or convert again")
    assert report.files == RANKS - 1


def test_beside_a_missing_file_the_others_are_compared(target: Path, source: Path) -> None:
    rank_file(target, 3).unlink()
    change(target, 0, {NORM: None, EMBED: load(target, 1)[EMBED]})
    found = facts(verify(target, source))
    assert ("wrong-ranks", "model.layers.1.input_layernorm.weight") in found
    assert ("differs", subject(0, EMBED)) in found


@pytest.mark.parametrize("stray", ["model4-mp4.safetensors", "model0-mp2.safetensors", "model0-mp8.safetensors"])
def test_a_rank_file_too_many_is_named(stray: str, target: Path, source: Path) -> None:
    shutil.copyfile(rank_file(target, 0), target / stray)
    problems = verify(target, source).problems
    assert any(stray in problem.subject for problem in problems)


def test_an_empty_folder_is_refused(source: Path, tmp_path: Path) -> None:
    with pytest.raises(Refused, match="no file such as model0-mpN"):
        verify(tmp_path, source)


def test_a_target_that_is_no_folder_is_refused_as_such(source: Path, tmp_path: Path) -> None:
    (tmp_path / "file").write_bytes(b"")
    for name, word in (("not there", "no such folder"), ("file", "a file")):
        with pytest.raises(Refused, match=f"found:    {word}"):
            verify(tmp_path / name, source)


def swap(first: Path, second: Path) -> None:
    kept = first.with_name("kept")
    first.rename(kept)
    second.rename(first)
    kept.rename(second)


def test_swapped_files_are_named(target: Path, source: Path) -> None:
    """By their experts; and nothing more is said of them."""
    swap(rank_file(target, 0), rank_file(target, 1))
    problems = verify(target, source).problems
    assert {(problem.kind, problem.subject, problem.found) for problem in problems} == {
        ("swapped-file", rank_file(target, rank).name, f"the header of {rank_file(target, 1 - rank).name}")
        for rank in (0, 1)
    }


def test_swapped_files_without_experts_are_seen(target: Path, source: Path) -> None:
    """Nothing but the bytes tells: what every rank holds is equal in both."""
    for rank in range(RANKS):
        change(target, rank, {name: None for name in load(target, rank) if ".experts." in name})
    names = load(target, 0).keys()
    same = {name for name in names if torch.equal(bits(load(target, 0)[name]), bits(load(target, 1)[name]))}
    swap(rank_file(target, 0), rank_file(target, 1))
    assert {fact for fact in facts(verify(target, source)) if fact[0] == "differs"} == {
        ("differs", subject(rank, name)) for rank in (0, 1) for name in names - same
    }


def bits(tensor: Tensor) -> Tensor:
    return tensor.view(torch.uint8)


# --- tensors too many and too few ---


@pytest.mark.parametrize(
    "name",
    [
        "extra",
        "layers.0.attn_norm.bias",
        "layers.9.attn_norm.weight",
        "layers.01.attn_norm.weight",
        "layers.#.attn_norm.weight",
        "layers.1.ffn.experts.12.w1.weight",
        "model.norm.weight",
        "",
    ],
)
def test_an_extra_tensor_is_named(name: str, target: Path, source: Path) -> None:
    change(target, 2, {name: torch.zeros(40, dtype=torch.bfloat16)})
    assert facts(verify(target, source)) == {("extra-tensor", subject(2, name))}


@pytest.mark.parametrize("rank", [0, 3])
@pytest.mark.parametrize(
    ("name", "origin"),
    [
        (NORM, "model.layers.1.input_layernorm.weight"),
        (EMBED, "model.embed_tokens.weight"),
        (DENSE_SCALE, "model.layers.0.mlp.gate_proj.weight_scale_inv"),
        ("layers.2.attn.wkv_a.scale", "model.layers.2.self_attn.kv_a_proj_with_mqa.weight_scale_inv"),
        ("layers.2.ffn.gate.bias", "model.layers.2.mlp.gate.e_score_correction_bias"),
    ],
)
def test_a_tensor_that_one_rank_lacks_is_named(name: str, origin: str, rank: int, target: Path, source: Path) -> None:
    change(target, rank, {name: None})
    assert facts(verify(target, source)) == {("wrong-ranks", origin)}


@pytest.mark.parametrize("expert", [0, 2, 10, 11])
def test_an_expert_that_its_rank_lacks_is_named(expert: int, target: Path, source: Path) -> None:
    change(target, expert // 3, {f"layers.1.ffn.experts.{expert}.w2.scale": None})
    wanted = f"model.layers.1.mlp.experts.{expert}.down_proj.weight_scale_inv"
    assert facts(verify(target, source)) == {("missing-tensor", wanted)}


def test_a_tensor_that_all_ranks_lack_is_named(target: Path, source: Path) -> None:
    for rank in range(RANKS):
        change(target, rank, {"norm.weight": None})
    assert facts(verify(target, source)) == {("missing-tensor", "model.norm.weight")}


def test_the_last_expert_of_every_layer_is_missed(target: Path, source: Path) -> None:
    names = [name for name in load(target, 3) if ".experts.11." in name]
    change(target, 3, dict.fromkeys(names))
    missing = {name for kind, name in facts(verify(target, source)) if kind == "missing-tensor"}
    assert len(missing) == len(names) == 12
    assert all(".experts.11." in name for name in missing)


def test_the_head_of_an_mtp_layer_is_one_tensor_too_many(target: Path, source: Path) -> None:
    names = ("eh_proj", "enorm", "norm")
    for rank in range(RANKS):
        change(target, rank, {f"layers.{MTP_LAYER}.{name}.weight": torch.zeros(1) for name in names})
    assert facts(verify(target, source)) == {
        (kind, subject(rank, f"layers.{MTP_LAYER}.{name}.weight"))
        for rank in range(RANKS)
        for name in names
        for kind in ("extra-tensor", "wrong-shape")
    }


def test_the_body_of_an_mtp_layer_lacks_its_head(target: Path, source: Path) -> None:
    """As a converter leaves it in the rank files that knows only another number of layers, cut as it should be."""
    tensors = oracle.load_tensors(source, [])
    prefix = f"model.layers.{MTP_LAYER}."
    body = {
        name: tensor
        for name, tensor in tensors.items()
        if name.startswith(tuple(prefix + part for part in ("input_", "post_", "self_attn.", "mlp.")))
    }
    for rank in range(RANKS):
        change(target, rank, dict(oracle.rank_tensors(body, RANKS, rank, 128)))
    head = {name for name in tensors if name.startswith(prefix)} - body.keys()
    assert len(head) == 6
    assert facts(verify(target, source)) == {("missing-tensor", name) for name in head}


# --- tensors in the wrong place or of another kind ---


@pytest.mark.parametrize(("first", "second"), [(0, 1), (0, 2)])
def test_swapped_experts_within_a_rank_are_named(first: int, second: int, target: Path, source: Path) -> None:
    tensors = load(target, 0)
    names = {name: name.replace(f".experts.{first}.", f".experts.{second}.") for name in tensors}
    pairs = {name: other for name, other in names.items() if name != other and name.startswith("layers.2.")}
    swapped = {**{name: tensors[other] for name, other in pairs.items()}}
    swapped |= {other: tensors[name] for name, other in pairs.items()}
    change(target, 0, swapped)
    assert facts(verify(target, source)) == {("differs", subject(0, name)) for name in swapped}
    assert len(swapped) == 12


def test_experts_of_each_others_ranks_are_named(target: Path, source: Path) -> None:
    """Bytes and names fit, but the loader looks for them elsewhere."""
    names = [f"layers.1.ffn.experts.{expert}.w1.weight" for expert in (2, 10)]
    first, last = load(target, 0)[names[0]], load(target, 3)[names[1]]
    change(target, 0, {names[0]: None, names[1]: last})
    change(target, 3, {names[1]: None, names[0]: first})
    assert facts(verify(target, source)) == {
        ("wrong-ranks", f"model.layers.1.mlp.experts.{expert}.gate_proj.weight") for expert in (2, 10)
    }


def test_an_expert_in_two_ranks_is_named(target: Path, source: Path) -> None:
    change(target, 1, {EXPERT: load(target, 0)[EXPERT]})
    assert facts(verify(target, source)) == {("wrong-ranks", "model.layers.1.mlp.experts.2.gate_proj.weight")}


def retyped(tensor: Tensor) -> Tensor:
    return tensor.view({1: torch.int8, 2: torch.float16, 4: torch.int32}[tensor.element_size()])


RESHAPED: list[tuple[str, Callable[[Tensor], Tensor]]] = [
    ("dtype", retyped),
    ("transposed shape", lambda tensor: tensor.reshape(tensor.shape[::-1] if tensor.dim() > 1 else (1, -1))),
    ("flat shape", lambda tensor: tensor.reshape(-1) if tensor.dim() > 1 else tensor.reshape(-1, 1)),
    ("one dimension more", lambda tensor: tensor.unsqueeze(0)),
]


@pytest.mark.parametrize("name", [EMBED, NORM, COLUMNS, EXPERT, "layers.0.attn.wo.weight", "layers.1.ffn.gate.bias"])
@pytest.mark.parametrize("changed", [function for _, function in RESHAPED], ids=[name for name, _ in RESHAPED])
def test_another_dtype_or_shape_of_equal_bytes_is_named(
    changed: Callable[[Tensor], Tensor], name: str, target: Path, source: Path
) -> None:
    change(target, 0, {name: changed(load(target, 0)[name]).contiguous()})
    assert facts(verify(target, source)) == {("wrong-shape", subject(0, name))}


def test_a_share_that_is_too_large_is_named(target: Path, source: Path) -> None:
    """The whole tensor on every rank, as if it were replicated."""
    whole = oracle.load_tensors(source, [])["model.embed_tokens.weight"]
    for rank in range(RANKS):
        change(target, rank, {EMBED: whole})
    found = facts(verify(target, source))
    assert {fact for fact in found if fact[0] == "wrong-shape"} == {
        ("wrong-shape", subject(rank, EMBED)) for rank in range(RANKS)
    }


@pytest.mark.parametrize("rank", range(RANKS))
@pytest.mark.parametrize("name", [NORM, "layers.1.ffn.gate.bias", "layers.2.attn.wkv_a.weight"])
def test_a_replica_that_differs_in_one_rank_is_named(name: str, rank: int, target: Path, source: Path) -> None:
    changed = load(target, rank)[name].clone()
    bits(changed).view(-1)[5] ^= 16
    change(target, rank, {name: changed})
    report = verify(target, source)
    assert facts(report) == {("differs", subject(rank, name))}
    assert "byte 5 of" in report.problems[0].found


# --- conversions that look right ---


def rotated(shares: list[Tensor], _dimension: int) -> list[Tensor]:
    """Each rank has the part of the next one."""
    return shares[1:] + shares[:1]


def interleaved(shares: list[Tensor], dimension: int) -> list[Tensor]:
    """Rank 0 has rows 0, 4, 8, ... instead of the first quarter."""
    whole = torch.cat([bits(share) for share in shares], dimension)
    step = bits(shares[0]).size(dimension) // shares[0].size(dimension)
    length = shares[0].size(dimension) * RANKS
    chosen = [torch.arange(length).view(-1, 1)[rank::RANKS] * step + torch.arange(step) for rank in range(RANKS)]
    return [whole.index_select(dimension, places.flatten()).contiguous().view(shares[0].dtype) for places in chosen]


def cut_the_other_way(shares: list[Tensor], dimension: int) -> list[Tensor]:
    """A part of the other dimension, in the shape of the right part."""
    whole = torch.cat([bits(share) for share in shares], dimension).contiguous().view(shares[0].dtype)
    return [part.contiguous().reshape(shares[0].shape) for part in whole.chunk(RANKS, 1 - dimension)]


def first_for_all(shares: list[Tensor], _dimension: int) -> list[Tensor]:
    """Every rank has the part of the first."""
    return shares[:1] * RANKS


WRONG = [rotated, interleaved, cut_the_other_way, first_for_all]
CUT = {EMBED: 0, "layers.0.ffn.w1.weight": 0, COLUMNS: 1, "layers.2.attn.wo.weight": 1, DENSE_SCALE: 0}


@pytest.mark.parametrize(
    ("name", "wrong"),
    # A scale of one column cannot be cut along it.
    [(name, wrong) for name in CUT for wrong in WRONG if (name, wrong) != (DENSE_SCALE, cut_the_other_way)],
)
def test_parts_for_the_wrong_ranks_are_seen(
    name: str, wrong: Callable[[list[Tensor], int], list[Tensor]], target: Path, source: Path
) -> None:
    shares = [load(target, rank)[name] for rank in range(RANKS)]
    found = wrong(shares, CUT[name])
    differing = set()
    for rank in range(RANKS):
        assert found[rank].shape == shares[rank].shape
        change(target, rank, {name: found[rank]})
        if not torch.equal(bits(found[rank]), bits(shares[rank])):
            differing.add(("differs", subject(rank, name)))
    assert facts(verify(target, source)) == differing
    assert len(differing) >= RANKS - 1


def test_a_block_scale_of_the_neighbouring_block_is_seen(target: Path, source: Path) -> None:
    """Ranks 0 and 1 share the first block of 128 rows of `wq_b`, ranks 2 and 3 the second."""
    name = "layers.1.attn.wq_b.scale"
    scales = [load(target, rank)[name] for rank in range(RANKS)]
    assert torch.equal(scales[0], scales[1])
    assert not torch.equal(scales[1], scales[2])
    change(target, 1, {name: scales[2]})
    assert facts(verify(target, source)) == {("differs", subject(1, name))}


def test_scales_for_weights_of_another_layer_are_seen(target: Path, source: Path) -> None:
    names = [f"layers.{layer}.attn.wkv_b.scale" for layer in (1, 2)]
    tensors = load(target, 2)
    change(target, 2, {names[0]: tensors[names[1]], names[1]: tensors[names[0]]})
    assert facts(verify(target, source)) == {("differs", subject(2, name)) for name in names}


def test_ranks_in_another_number_of_the_same_files_are_seen(good: Path, source: Path, tmp_path: Path) -> None:
    """Two of four rank files under the names of two ranks."""
    for rank in range(2):
        shutil.copyfile(rank_file(good, rank), tmp_path / f"model{rank}-mp2.safetensors")
    found = facts(verify(tmp_path, source))
    assert ("wrong-shape", f"model0-mp2.safetensors: {EMBED}") in found
    assert ("missing-tensor", "model.layers.1.mlp.experts.11.gate_proj.weight") in found


# --- files that change meanwhile ---


def rename_two(path: Path, first: bytes, second: bytes) -> None:
    """Puts a file of the same size and data in the place of one: in it, two tensors have changed names."""
    content, twin = path.read_bytes(), path.with_name("twin")
    twin.write_bytes(content.replace(first, b"%").replace(second, first).replace(b"%", second))
    assert twin.read_bytes() != content
    twin.replace(path)


def spoilt_after(count: int, spoil: Callable[[], object]) -> Callable[[int], None]:
    """What to tell of progress, to have something spoilt when it is told for the time of that number."""
    told: list[int] = []

    def advance(size: int) -> None:
        told.append(size)
        if len(told) == count:
            spoil()

    return advance


def require_refused(target: Path, source: Path, changed: Path, count: int, spoil: Callable[[], object]) -> None:
    """By the name of the changed file. Progress is told of the header of each rank file first."""
    checkpoint = read_checkpoint(source)
    with pytest.raises(Refused) as error:
        verify_target(target, checkpoint, load_recipe("deepseek-v3"), spoilt_after(count, spoil))
    assert [(problem.kind, problem.subject) for problem in error.value.problems] == [("file-changed", str(changed))]


@pytest.fixture
def both(target: Path, source: Path, tmp_path: Path) -> Mapping[str, tuple[Path, Path]]:
    """Copies of the two folders and a file of each, last written to when the originals were."""
    copy = shutil.copytree(source, tmp_path / "source")
    return {"target": (target, rank_file(target, 0)), "source": (copy, copy / "model-00001-of-00003.safetensors")}


@pytest.mark.parametrize(
    ("side", "names"),
    [
        ("source", (b"layers.0.mlp.gate_proj.weight", b"layers.0.mlp.down_proj.weight")),
        ("target", (b"layers.1.attn_norm.weight", b"layers.2.attn_norm.weight")),
    ],
)
def test_a_file_that_is_replaced_before_its_data_is_read_is_refused(
    side: str, names: tuple[bytes, bytes], both: Mapping[str, tuple[Path, Path]]
) -> None:
    path = both[side][1]
    require_refused(both["target"][0], both["source"][0], path, 1, lambda: rename_two(path, *names))


@pytest.mark.parametrize("side", ["source", "target"])
@pytest.mark.parametrize("spoil", [Path.touch, Path.unlink, lambda path: os.truncate(path, 5_000)])
def test_a_file_that_changes_while_it_is_compared_is_refused(
    side: str, spoil: Callable[[Path], object], both: Mapping[str, tuple[Path, Path]]
) -> None:
    path = both[side][1]
    require_refused(both["target"][0], both["source"][0], path, RANKS + 1, lambda: spoil(path))
