"""The page of a plan: its numbers are those of `plan --json`, and of the files that are really written."""

import json
import re
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from families import write_full
from packed_llamas import write_packed
from packed_models import make_packed_model, write_packed_model
from pages import Element, expand_cells, parse_page, read_drawings, read_facts, read_number, read_tables
from safetensors import safe_open
from safetensors.torch import save_file
from small_models import write_model

import reshard
from reshard.cli.main import main
from reshard.pages.columns import Line, merge_lines
from reshard.pages.plan_page import format_plan_page

V3_MOST = 300_000
"""Bytes of the page of DeepSeek-V3."""

PARTS = ["ranks", "layers", "sources", "replicas", "dtypes", "uses", "proofs"]


def sum_by_layer(files: list[Path]) -> dict[str, Counter[int]]:
    """Bytes by layer and rank, from the files alone."""
    found: dict[str, Counter[int]] = {}
    for rank, path in enumerate(files):
        with safe_open(path, "pt") as file:
            for name in file.keys():  # noqa: SIM118 - it is no dict
                layer = re.match(r"(?:.*?\.)?layers\.\d+", name)
                row = layer[0] if layer else name.rpartition(".")[0]
                tensor = file.get_tensor(name)
                found.setdefault(row, Counter())[rank] += tensor.numel() * tensor.element_size()
    return found


def expand_rows(name: str) -> list[str]:
    """`layers.3 to layers.5, 3 rows, each` -> the three names."""
    found = re.fullmatch(r"(.*\.)(\d+) to \1(\d+), (\d+) rows, each", name)
    if not found:
        assert ", each" not in name
        return [name]
    names = [f"{found[1]}{number}" for number in range(int(found[2]), int(found[3]) + 1)]
    assert len(names) == int(found[4])
    return names


def read_layers(page: Element, thing: str = "rank") -> dict[str, dict[int, int]]:
    rows = read_tables(page)[f"Bytes of each layer in each {thing}"][1:-1]
    return {name: expand_cells(row[1]) for row in rows for name in expand_rows(row[0])}


def page_of(source: Path, **arguments: Any) -> Element:
    return parse_page(format_plan_page(reshard.plan(source, **arguments)))


def test_numbers_are_those_of_the_command_and_of_the_files(
    source: Callable[[str], Path],
    converted: Callable[[str, int], Path],
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    folder, target, html = source("deepseek-v3"), converted("deepseek-v3", 2), tmp_path / "plan.html"
    assert main(["plan", str(folder), "--mp", "2", "--html", str(html), "--json"]) == 0
    told = json.loads(capsys.readouterr().out)
    assert told["page"] == str(html)
    page = parse_page(html.read_text(encoding="utf-8"))
    tables, facts = read_tables(page), read_facts(page)
    files = [target / file["name"] for file in told["files"]]
    size = sum(path.stat().st_size for path in files)
    assert facts["To be written"] == f"2 files, {sum(file['tensors'] for file in told['files']):,} tensors"
    assert read_number(facts["Their size"].split()[0]) == size == sum(file["size"] for file in told["files"])
    assert read_number(facts["Read of the source, about"].split()[0]) == told["reads"]
    wanted = {row: dict(ranks) for row, ranks in sum_by_layer(files).items()}
    assert read_layers(page) == wanted
    by_rank = [sum(ranks[rank] for ranks in wanted.values()) for rank in (0, 1)]
    made_of = tables["Source files that each file is made of"]
    assert [read_number(row[-1]) for row in made_of[1:]] == [*(path.stat().st_size for path in files), size]
    assert [read_number(row[2]) for row in made_of[1:]] == [*by_rank, sum(by_rank)]
    assert tables["Dtypes before and after"][-1][-1] == f"{sum(by_rank):,}"
    uses = {row[0]: row[1:] for row in tables["Uses of the source tensors"]}
    dropped = [use for use in told["coverage"] if use["use"] == "dropped"]
    assert uses["dropped"] == [
        f"{sum(use['tensors'] for use in dropped):,}",
        f"{sum(use['bytes'] for use in dropped):,}",
    ]
    assert uses["total"][1] == f"{sum(use['bytes'] for use in told['coverage']):,}"


def test_replicas_are_what_two_files_have_alike(
    source: Callable[[str], Path], converted: Callable[[str, int], Path]
) -> None:
    """Counted by the bytes of the tensors: those of one name that are equal in both files."""
    table = read_tables(page_of(source("deepseek-v3"), mp=2))["Tensors that are replicated"]
    one, other = (converted("deepseek-v3", 2) / f"model{rank}-mp2.safetensors" for rank in (0, 1))
    equal = Counter[str]()
    with safe_open(one, "pt") as a, safe_open(other, "pt") as b:
        for name in {*a.keys()} & {*b.keys()}:
            left, right = (side.get_tensor(name).flatten().view(torch.uint8) for side in (a, b))
            if torch.equal(left, right):
                equal[re.sub(r"\.\d+(?=\.)", ".#", name)] += len(left)
    assert {row[0]: read_number(row[4]) for row in table[1:-1]} == dict(equal)
    assert read_number(table[-1][4]) == sum(equal.values())


def sum_links(rows: list[list[str]]) -> Counter[int]:
    """Bytes by the number of the source file, of the table that has them for each rank."""
    found = Counter[int]()
    for name, words, total in rows:
        several = re.search(r", (\d+) rows, each", name)
        row = Counter[int]()
        for part in words.split("; "):
            numbers, size = part.rsplit(": ", 1)
            for run in numbers.split(", "):
                first, _, last = run.partition("-")
                row.update(dict.fromkeys(range(int(first), int(last or first) + 1), read_number(size)))
        assert sum(row.values()) == read_number(total)
        for number, taken in row.items():
            found[number] += taken * int(several[1] if several else 1)
    return found


@pytest.mark.parametrize(
    "arguments",
    [
        {"to": "hf"},
        {"to": "hf", "cast": "bf16"},
        {"to": "dcp", "ranks": 3},
        {"mp": 4, "ranks": [1, 3]},
        {"mp": 4, "share": "1/3"},
        {"mp": 2, "layers": [0, 2], "renumber": True},
        {"mp": 2, "keep_mtp": True},
        {"for_engine": "vllm", "mp": 2, "cast": "bf16"},
    ],
    ids=str,
)
def test_every_kind_of_target_adds_up(arguments: dict[str, Any], source: Callable[[str], Path]) -> None:
    plan = reshard.plan(source("deepseek-v3"), **arguments)
    text = format_plan_page(plan)
    page = parse_page(text)
    thing = (
        "rank" if "files" not in str(read_facts(page)) or "mp" in arguments or arguments.get("to") == "dcp" else "file"
    )
    tables = read_tables(page)
    payload = sum(file.size - len(file.header) for file in plan.files)
    made_of = tables["Source files that each file is made of"][1:]
    assert sum(map(read_number, made_of[-1][2:-2])) == payload
    assert read_number(made_of[-1][-1]) == plan.size
    sources = tables["Source files and where their bytes go"][-1]
    wanted: dict[int, int] = {}
    for name, _, _, size in tables["Source files and where their bytes go"][1:-1]:
        first, last = re.match(r"(\d+): ", name), re.search(r" to (\d+): ", name)
        wanted |= dict.fromkeys(range(int(first[1]), int((last or first)[1]) + 1), read_number(size))  # type: ignore[index]
    assert sum_links(tables[f"Bytes of each {thing} by source file"][1:]) == {
        number: size for number, size in wanted.items() if size
    }
    made = {cast.result.name for cast in plan.casts if cast.operation == "fill"}
    constants = sum(one.size for file in range(len(plan.files)) for one in plan.tensors(file) if one.name in made)
    assert read_number(sources[-1]) == payload - constants
    assert read_number(tables[f"Bytes of each layer in each {thing}"][-1][-1]) == payload
    assert read_number(tables[f"Bytes in each {thing}"][-1][-1]) == plan.size
    assert read_number(tables["Dtypes before and after"][-1][-1]) == payload
    assert [one.attributes["id"] for one in page.find_all("section")] == PARTS
    assert all(read_drawings(text))
    assert not [one for one in page.find_all("path") if one.attributes["class"] == "s0"], "nothing is not drawn"


@pytest.mark.parametrize("kind", ["awq", "nvfp4"])
def test_packed_weights_are_told_as_they_lie(kind: str, tmp_path: Path) -> None:
    write_packed(tmp_path / "model", kind)
    folder = tmp_path / "model" / "packed"
    plan = reshard.plan(folder, to="hf", cast="bf16")
    stored = Counter[str]()
    for path in folder.glob("*.safetensors"):
        with safe_open(path, "pt") as file:
            for name in (one for one in file.keys() if not one.endswith("input_scale")):  # noqa: SIM118 - of activations
                stored[file.get_slice(name).get_dtype()] += file.get_tensor(name).nbytes
    rows = read_tables(parse_page(format_plan_page(plan)))["Dtypes before and after"][1:-1]
    assert {row[0]: read_number(row[2]) for row in rows if row[2] != "0"} == dict(stored)


@pytest.mark.parametrize("model", ["kimi-k2-thinking", "kimi-k3"])
def test_packed_models_are_told_as_they_lie(model: str, tmp_path: Path) -> None:
    write_packed_model(tmp_path, make_packed_model(model))
    stored = Counter[str]()
    for path in tmp_path.glob("*.safetensors"):
        with safe_open(path, "pt") as file:
            for name in (one for one in file.keys() if not one.endswith("weight_shape")):  # noqa: SIM118 - it is no dict
                stored[file.get_slice(name).get_dtype()] += file.get_tensor(name).nbytes
    page = page_of(tmp_path, to="hf", cast="bf16")
    rows = read_tables(page)["Dtypes before and after"][1:-1]
    assert {row[0]: read_number(row[2]) for row in rows if row[2] != "0"} == dict(stored)
    assert "shapes of weights, and scales of activations" in page.text


def test_rank_files_as_a_source(converted: Callable[[str, int], Path]) -> None:
    folder = converted("deepseek-v3", 4)
    plan = reshard.plan(folder, mp=2)
    tables = read_tables(parse_page(format_plan_page(plan)))
    payload = sum(file.size - len(file.header) for file in plan.files)
    assert read_number(tables["Source files and where their bytes go"][-1][-1]) == payload
    assert "put together" in tables["Source files that each file is made of"][0]


def test_a_cell_that_differs_is_outlined_and_named(tmp_path: Path) -> None:
    """The vocabulary does not suit the ranks: the last one has less of the head, and of nothing else."""
    write_model(tmp_path / "model", "llama", vocab_size=90)
    plan = reshard.plan(tmp_path / "model", to="dcp", ranks=4)
    page = parse_page(format_plan_page(plan))
    layers = page.find_all("section")[1]
    assert len([one for one in layers.find_all("path") if one.attributes.get("class") == "odd"]) == 1
    named = [one.text for one in layers.find_all("li") if "are usual" in one.text]
    assert len(named) >= 1
    assert all("rank 3: " in words for words in named)
    assert "No cell stands out" in page_of(tmp_path / "model", mp=2).text


def test_without_a_usual_size_all_sizes_are_listed(tmp_path: Path) -> None:
    """Of two ranks, one has less of each layer: half of the cells each."""
    write_model(tmp_path / "model", "llama", num_hidden_layers=3, intermediate_size=91)
    layers = page_of(tmp_path / "model", to="dcp", ranks=2).find_all("section")[1]
    assert "No cell stands out" not in layers.text
    assert not [one for one in layers.find_all("path") if one.attributes.get("class") == "odd"]
    (named,) = [one.text for one in layers.find_all("li") if "rank 0: " in one.text]
    found = re.fullmatch(
        r"model\.layers\.0 to model\.layers\.2, 3 rows, each, rank 0: ([\d,]+) bytes; rank 1: ([\d,]+) bytes", named
    )
    assert found
    assert read_number(found[1]) > read_number(found[2])


def test_rows_merge_only_where_their_numbers_follow() -> None:
    labels = ["a.w", "b.w", "l.1", "l.2", "l.4", "rank 7", "rank 8", "9: m-9-of-12", "10: m-10-of-12", "11: m-12-of-12"]
    rows = merge_lines([Line(label, "", (1,)) for label in labels])
    assert [row[0] for row in rows] == [
        "a.w",
        "b.w",
        "l.1 to l.2, 2 rows, each",
        "l.4",
        "rank 7 to rank 8, 2 rows, each",
        "9: m-9-of-12 to 10: m-10-of-12, 2 rows, each",
        "11: m-12-of-12",
    ]
    assert len(merge_lines([Line("l.1", "", (1,)), Line("l.2", "", (2,))])) == 2


def test_layers_come_by_number(tmp_path: Path) -> None:
    write_model(tmp_path / "model", "llama", num_hidden_layers=12, intermediate_size=90)
    drawn = page_of(tmp_path / "model", to="dcp", ranks=4).find_all("section")[1].find_all("svg")[0]
    labels = [one.text for one in drawn.find_all("text") if one.attributes["class"] == "row"]
    layers = [label for label in labels if "layers" in label]
    assert layers == [f"model.layers.{number}" for number in range(12)], "each stands out"
    assert labels[0] == "model.embed_tokens"


def test_equal_layers_share_a_row(source: Callable[[str], Path], tmp_path: Path) -> None:
    write_model(tmp_path / "model", "llama", num_hidden_layers=100)
    layers = page_of(tmp_path / "model", mp=2).find_all("section")[1]
    labels = [one.text for one in layers.find_all("text") if one.attributes["class"] == "row"]
    assert labels == ["model.embed_tokens", "model.layers.0-99, each", "lm_head", "model.norm"]
    assert "4 rows: " in layers.find_all("desc")[0].text
    assert "Layers that follow each other and are equal share a row." in layers.text
    layers = page_of(source("deepseek-v3"), mp=2).find_all("section")[1]
    named = read_layers(page_of(source("deepseek-v3"), mp=2))
    labels = [one.text for one in layers.find_all("text") if one.attributes["class"] == "row"]
    shown = [label for label in labels if label.startswith("layers.")]
    assert len(shown) == len({str(sizes) for name, sizes in named.items() if name.startswith("layers.")}) == 2


@pytest.mark.parametrize(
    ("larger", "rows", "outlined"),
    [
        ({3, 4}, ["layers.0-2, each", "layers.3", "layers.4", "layers.5-11, each"], 2),
        ({*range(6)}, ["layers.0-5, each", "layers.6-11, each"], 0),
    ],
    ids=["two stand out", "no size is usual"],
)
def test_layers_of_other_sizes_have_rows_of_their_own(
    larger: set[int], rows: list[str], outlined: int, tmp_path: Path
) -> None:
    tensors = {f"layers.{layer}.w": torch.ones(6 if layer in larger else 4) for layer in range(12)}
    save_file(tensors, tmp_path / "model.safetensors")
    recipe = tmp_path / "own.toml"
    recipe.write_text(
        'name = "own"\nabout = "own"\nleft = "l"\nright = "r"\nfiles = "model{rank}-of-{ranks}.safetensors"\n'
        'carry = []\nmodel_types = []\narchitectures = []\nplaceholders.i = { counts = "layers" }\nchecked = ""\n'
        'rules = [["same", "layers.{i}.w", "layers.{i}.w", "replicate"]]\n',
        encoding="utf-8",
    )
    layers = page_of(tmp_path, mp=2, recipe=f"{recipe}").find_all("section")[1]
    labels = [one.text for one in layers.find_all("text") if one.attributes["class"] == "row"]
    assert labels == rows
    outlines = [one for one in layers.find_all("path") if one.attributes.get("class") == "odd"]
    assert sum(one.attributes["d"].count("M") for one in outlines) == outlined


def test_many_ranks_are_drawn_in_groups(tmp_path: Path) -> None:
    write_model(tmp_path / "model", "llama")
    text = format_plan_page(reshard.plan(tmp_path / "model", to="dcp", ranks=320))
    page = parse_page(text)
    assert len(text.encode()) < V3_MOST
    bars = page.find_all("section")[0].find_all("svg")[0]
    labels = [one.text for one in bars.find_all("text") if one.text.startswith("rank")]
    assert labels[:2] == ["rank 0-4", "rank 5-9"]
    assert len(labels) == 64
    assert "A bar stands for several ranks" in page.text


def test_neighbours_that_differ_alike_are_one_line(tmp_path: Path) -> None:
    write_model(tmp_path / "model", "llama", num_hidden_layers=4, intermediate_size=90)
    page = page_of(tmp_path / "model", to="dcp", ranks=4)
    named = [one.text for one in page.find_all("li") if "are usual" in one.text]
    assert len([words for words in named if words.startswith("model.layers.0 to model.layers.3, rank 3: ")]) == 1
    assert not [words for words in named if words.startswith("model.layers.1")]


def test_v3_is_small_and_always_the_same(tmp_path: Path) -> None:
    """Of the published sizes, so that the lines of GPUs are drawn."""
    write_full(tmp_path / "v3", "deepseek-v3")
    plan = reshard.plan(tmp_path / "v3", mp=16)
    text = format_plan_page(plan)
    assert len(text.encode()) < V3_MOST
    assert format_plan_page(plan) == text
    page = parse_page(text)
    lines = [one.text for one in page.find_all("svg")[0].find_all("text") if one.text.endswith(" GB")]
    assert lines[-5:] == ["80 GB", "96 GB", "141 GB", "180 GB", "192 GB"]
    largest = max(file.size - len(file.header) for file in plan.files)
    fits = read_tables(page)["The largest rank in the memory of common GPUs"][1:]
    assert [row[2] for row in fits] == [f"{largest / gpu / 1e7:.1f} %" for gpu in (80, 96, 141, 180, 192)]
    assert "no KV cache, no activations" in page.text
    assert f"{plan.size:,} bytes" in page.find_all("section")[-1].text


def test_bars_are_as_wide_as_the_page_and_end_where_the_longest_ends(tmp_path: Path) -> None:
    """Without lines of GPUs: the parts of the longest bar are the whole width, and nothing is drawn behind a bar."""
    write_model(tmp_path / "model", "llama", vocab_size=90)
    drawn = page_of(tmp_path / "model", to="dcp", ranks=4).find_all("svg")[0]
    assert "viewbox" not in drawn.attributes
    assert drawn.attributes["class"] == "bars short"
    bars: dict[str, float] = {}
    for one in drawn.find_all("rect"):
        assert re.fullmatch(r"k\d", one.attributes["class"])
        bars[one.attributes["y"]] = bars.get(one.attributes["y"], 0.0) + float(
            one.attributes["width"].removesuffix("%")
        )
    assert len(bars) == 4
    assert max(bars.values()) == pytest.approx(100, abs=0.05)
    assert min(bars.values()) < 99, "the last rank has less"
    assert not drawn.find_all("line")


def test_memories_are_in_gb_and_all_else_in_powers_of_1024(source: Callable[[str], Path]) -> None:
    plan = reshard.plan(source("deepseek-v3"), mp=2)
    page = parse_page(format_plan_page(plan))
    largest = max(file.size - len(file.header) for file in plan.files)
    assert f"80 GB is {80e9 / largest:,.0f} times the longest bar" in page.text
    assert page.text.count("1,000,000,000") == 1, "what a GB is stands there once"
    units = {*re.findall(r"[\d.]+ (bytes|[kKMGT]i?B)", page.text)}
    assert units == {"bytes", "KiB", "MiB", "GB"}
    assert {*re.findall(r"(\d+) GB", page.text)} == {"80", "96", "141", "180", "192"}
