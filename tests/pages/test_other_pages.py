"""The pages of contents and of differences; names of strangers on all pages; colours."""

import json
import re
from argparse import Namespace
from collections import Counter
from collections.abc import Callable
from dataclasses import replace
from html import unescape
from itertools import pairwise
from pathlib import Path

import pytest
import torch
from jobs import Job
from pages import Element, parse_page, read_drawings, read_facts, read_number, read_tables
from safetensors.torch import load_file, save_file
from targets import CONFIG, leave_unfinished

import reshard
from reshard.cli.inspect import read_drawn_tensors
from reshard.cli.main import main
from reshard.errors import Refused
from reshard.inspection.diff_report import DiffReport
from reshard.inspection.tensor_list import read_tensor_list
from reshard.pages.contents_page import format_contents_page
from reshard.pages.diff_cells import DiffCell, sort_worst
from reshard.pages.diff_page import format_diff_page
from reshard.pages.markup import escape_text, make_element
from reshard.pages.module_kinds import KINDS, OTHER, find_module_kind, sort_rows
from reshard.pages.page import STYLE
from reshard.pages.plan_page import format_plan_page
from reshard.recipes.recipe import list_packaged_recipes
from reshard.synthetic import write_checkpoint

HOSTILE = (
    "</svg><script>alert(1)</script>",
    '" onload="alert(1)',
    '"><b onfocus="alert(1)">.0.weight',
    "<!--",
    "&lt;b&gt;",
    "line\nbreak\x1b[31m",
    "\u202etxt.exe",
    "]]>",
    "layers.0.</title><img src=x>",
    "model.layers.1.experts.0.<style>*{display:none}</style>",
    "x" * 5000,
)
"""Names of tensors that a stranger may choose."""


ELEMENTS = set(
    """
    html head meta title style body a header p h1 h2 h3 dl div dt dd nav ul li main section svg g desc text path rect
    line details summary table caption thead tbody tr th td footer span
    """.split()  # noqa: SIM905
)
"""Of all pages: none of them loads anything, or runs."""

ATTRIBUTES = set(
    """
    lang charset name content class id href role tabindex scope d x y dx x1 x2 y1 y2 width height viewbox aria-label
    aria-labelledby aria-describedby aria-hidden
    """.split()  # noqa: SIM905
)


def read_contents(folder: Path) -> str:
    return format_contents_page(reshard.inspect(folder), read_tensor_list(folder, None))


def check_page(text: str) -> Element:
    """Checks what holds for every page. Returns its elements."""
    page = parse_page(text)
    assert all(read_drawings(text))
    for element in walk(page):
        assert {*element.attributes} <= ATTRIBUTES, element
        assert element.name in ELEMENTS, element
    style = "".join(one.text for one in page.find_all("style"))
    assert not [address for address in ("http", "//", "@import", "url(") if address in style]
    assert text.isprintable() or {one for one in text if not one.isprintable()} == {"\n"}
    (html,) = page.find_all("html")
    assert html.attributes == {"lang": "en"}
    assert [len(page.find_all(name)) for name in ("h1", "header", "nav", "main", "footer", "title")][:5] == [1] * 5
    ids = [one for name in ("section", "h2", "main", "title", "desc") for one in page.find_all(name)]
    named = [one.attributes["id"] for one in ids if "id" in one.attributes]
    assert len({*named}) == len(named)
    levels = [int(one) for one in re.findall(r"<h([1-6])", text)]
    assert levels[0] == 1
    assert all(after - before <= 1 for before, after in pairwise(levels))
    links = {one.attributes["href"] for one in page.find_all("a")}
    assert links <= {f"#{name}" for name in named}
    for drawn in page.find_all("svg"):
        assert drawn.attributes["role"] == "img"
        assert {drawn.attributes["aria-labelledby"], drawn.attributes["aria-describedby"]} <= {*named}
    for table in page.find_all("table"):
        assert table.find_all("caption")[0].text
        assert all(cell.attributes["scope"] in ("col", "row") for cell in table.find_all("th"))
        assert len({len(row.children) for row in table.find_all("tr")}) == 1
    return page


def test_contents_add_up(source: Callable[[str], Path]) -> None:
    folder = source("deepseek-v3")
    text = read_contents(folder)
    page = check_page(text)
    tables, stored = read_tables(page), Counter[str]()
    counts = Counter[str]()
    for path in folder.glob("*.safetensors"):
        for tensor in load_file(path).values():
            stored[str(tensor.dtype)] += tensor.nbytes
            counts[str(tensor.dtype)] += 1
    total = sum(stored.values())
    by_dtype = tables["Tensors and bytes by dtype"][1:]
    assert sorted(read_number(row[2]) for row in by_dtype) == sorted([*stored.values(), total])
    assert sorted(read_number(row[1]) for row in by_dtype) == sorted([*counts.values(), sum(counts.values())])
    places = [rows[-1] for caption, rows in tables.items() if caption.startswith("Bytes by module and layer")]
    assert sum(read_number(row[-1]) for row in places) == total
    assert read_number(tables["Tensors and bytes of each file"][-1][-1]) == total
    assert read_facts(page)["Tensors"] == f"{sum(counts.values()):,}"


def test_a_layer_that_differs_is_outlined_and_named(tmp_path: Path) -> None:
    tensors = {f"model.layers.{layer}.up_proj.weight": torch.zeros(4, 8) for layer in range(12)}
    tensors["model.layers.10.up_proj.weight"] = torch.zeros(4, 9)
    save_file(tensors, tmp_path / "model.safetensors")
    page = parse_page(read_contents(tmp_path))
    assert len([one for one in page.find_all("path") if one.attributes.get("class") == "odd"]) == 1
    assert "up_proj.weight, layer 10: 144 bytes, where 128 are usual" in [one.text for one in page.find_all("li")]


def test_layers_without_a_usual_size_are_all_named(tmp_path: Path) -> None:
    tensors = {f"model.layers.{layer}.up_proj.weight": torch.zeros(4, 8 + layer % 2) for layer in range(4)}
    save_file(tensors, tmp_path / "model.safetensors")
    page = parse_page(read_contents(tmp_path))
    assert not [one for one in page.find_all("path") if one.attributes.get("class") == "odd"]
    assert "outlined" not in page.find_all("main")[0].text
    named = [one.text for one in page.find_all("li") if "no size is usual" in one.text]
    assert named == [
        "up_proj.weight, layers 0, 2: 128 bytes, no size is usual",
        "up_proj.weight, layers 1, 3: 144 bytes, no size is usual",
    ]


def test_a_module_that_a_layer_lacks_has_the_colour_of_nothing(tmp_path: Path) -> None:
    tensors = {f"model.layers.{layer}.up_proj.weight": torch.zeros(4, 8) for layer in range(3)}
    save_file(tensors | {"model.layers.2.gate.weight": torch.zeros(2, 2)}, tmp_path / "model.safetensors")
    places = parse_page(read_contents(tmp_path)).find_all("section")[1]
    (legend,) = [one for one in places.find_all("li") if one.text == "nothing"]
    assert [one.attributes["class"].split() for one in legend.find_all("span")[1:]] == [["swatch"]]
    cells = [one for one in places.find_all("path") if re.fullmatch(r"s\d", one.attributes["class"])]
    widths = [(one.attributes["class"], re.findall(r"h(\d+)v", one.attributes["d"])) for one in cells]
    assert widths == [("s7", ["102"]), ("s5", ["34"])], "of two layers nothing is drawn: the colour of the page"


def test_an_unfinished_target_has_a_page(tmp_path: Path) -> None:
    write_checkpoint(tmp_path / "source", CONFIG, 2)
    leave_unfinished(Job(tmp_path / "source", 2), tmp_path / "target")
    content = reshard.inspect(tmp_path / "target")
    page = check_page(format_contents_page(content, ()))
    assert "an unfinished conversion by the recipe deepseek-v3" in page.text
    assert "on the disk: " in page.text
    assert content.unfinished is not None
    tenths = content.unfinished.durable * 1000 // content.unfinished.size
    heading = f"Unfinished ({tenths // 10}.{tenths % 10}%): target"
    assert (page.find_all("h1")[0].text, read_facts(page)) == (heading, {}), (
        "what is known of finished files is nothing"
    )
    assert "no known layout" not in page.text


def test_slices_are_the_files_of_a_distributed_checkpoint(tmp_path: Path) -> None:
    write_checkpoint(tmp_path / "source", CONFIG, 2)
    reshard.convert(tmp_path / "source", tmp_path / "slices", to="dcp", ranks=3)
    page = check_page(read_contents(tmp_path / "slices"))
    rows = read_tables(page)["Bytes of each file"][1:]
    names, sizes = [], []
    for place, path in enumerate(sorted((tmp_path / "slices").glob("*.safetensors")), 1):
        with path.open("rb") as file:
            sizes.append(path.stat().st_size - 8 - int.from_bytes(file.read(8), "little"))
        names.append(f"{place}: {path.name}")
    assert sizes[0] == sizes[1] > sizes[2]
    assert rows == [
        [f"{names[0]} to {names[1]}, 2 rows, each", f"{sizes[0]:,}"],
        [names[2], f"{sizes[2]:,}"],
        ["total", f"{sum(sizes):,}"],
    ]
    assert "3 files; " in page.find_all("section")[-1].text


def test_a_file_that_is_left_aside_is_not_drawn(tmp_path: Path) -> None:
    write_checkpoint(tmp_path / "model", CONFIG, 1)
    (path,) = (tmp_path / "model").glob("*.safetensors")
    path.rename(path.with_name("model.safetensors"))
    (tmp_path / "model" / "model.safetensors.index.json").unlink(missing_ok=True)
    save_file({"other.weight": torch.ones(3)}, tmp_path / "model" / "other.safetensors")
    content = reshard.inspect(tmp_path / "model", ignore_extra_files=True)
    assert len(content.by_file) == 1
    page = check_page(format_contents_page(content, read_tensor_list(tmp_path / "model", None)))
    assert read_number(read_tables(page)["Tensors and bytes by dtype"][-1][2]) == content.size


def test_a_file_damaged_meanwhile_is_refused(tmp_path: Path) -> None:
    """It is read a second time, for the page: what is wrong then is told, and no page of half of it written."""
    write_checkpoint(tmp_path / "source", CONFIG, 2)
    options = Namespace(path=tmp_path / "source", recipe=None)
    content = reshard.inspect(tmp_path / "source")
    next((tmp_path / "source").glob("model-00002-*")).write_bytes(b"\x08" + b"\0" * 3)
    with pytest.raises(Refused) as refused:
        read_drawn_tensors(content, options)
    assert {problem.kind for problem in refused.value.problems} == {"truncated-file"}


def test_slices_that_lack_others_have_a_page(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    write_checkpoint(tmp_path / "source", CONFIG, 2)
    reshard.convert(tmp_path / "source", tmp_path / "slices", to="dcp", ranks=2)
    next((tmp_path / "slices").glob("shard-00002-*")).unlink()
    assert main(["inspect", f"{tmp_path / 'slices'}", "--html", f"{tmp_path / 'page.html'}"]) == 0
    assert capsys.readouterr().out.endswith(f"page: {tmp_path / 'page.html'}\n")
    page = check_page((tmp_path / "page.html").read_text(encoding="utf-8"))
    assert "The tensors are not drawn" in page.text
    assert "shard-00002-model-00001-of-00001.safetensors: missing file" in page.text


@pytest.fixture(scope="module")
def changed(tmp_path_factory: pytest.TempPathFactory) -> DiffReport:
    """Two models of three layers and four experts, of which little differs, in every way."""
    folder = tmp_path_factory.mktemp("changed")
    ones = {
        f"model.layers.{layer}.mlp.experts.{expert}.up_proj.weight": torch.ones(10)
        for layer in range(1, 3)
        for expert in range(4)
    }
    ones |= {f"model.layers.{layer}.norm.weight": torch.ones(10) for layer in range(3)}
    ones |= {"lm_head.weight": torch.ones(10), "model.zero.weight": torch.zeros(10)}
    other = {name: tensor.clone() for name, tensor in ones.items()}
    other["model.layers.1.mlp.experts.2.up_proj.weight"] *= 1.05
    other["model.layers.2.mlp.experts.3.up_proj.weight"][4] = float("nan")
    other["model.layers.2.norm.weight"][4] = float("inf")
    other["model.layers.0.norm.weight"] *= 1.5
    other["model.zero.weight"] += 1
    other["lm_head.weight"] = other["lm_head.weight"].half()
    other["model.layers.0.extra.weight"] = other.pop("model.layers.1.norm.weight")
    for name, tensors in (("a", ones), ("b", other)):
        (folder / name).mkdir()
        save_file(tensors, folder / name / "model.safetensors")
    return reshard.diff(folder / "a", folder / "b")


def marks_of(drawn: Element) -> list[str]:
    return [one.text for one in drawn.find_all("text") if one.attributes.get("class", "").startswith("mark")]


def test_a_difference_is_drawn_with_letters_and_words(changed: DiffReport) -> None:
    page = check_page(format_diff_page(changed))
    modules, experts = page.find_all("section")[:2]
    layers, alone = modules.find_all("svg")
    labels = [one.text for one in layers.find_all("text") if one.attributes["class"] == "row"]
    assert labels == ["mlp.experts.#.up_proj.weight", "norm.weight", "extra.weight"], "N, then I, then B"
    assert sorted(marks_of(layers)) == ["A", "B", "I", "N"]
    assert sorted(marks_of(alone)) == ["D", "Z"]
    titles = [one.text for one in layers.find_all("title")]
    assert "0: 50 %" in titles
    assert "1: 5 %" in titles
    words = modules.text
    for said in (
        "NaN on a side",
        "infinite on a side",
        "only in A",
        "only in B",
        "another dtype or shape",
        "A is all zeros",
    ):
        assert said in words
    (drawn,) = experts.find_all("svg")
    assert marks_of(drawn) == ["N"]
    rows = read_tables(experts)["Experts that differ, the worst first"][1:]
    assert [row[:2] for row in rows] == [["model.layers.2", "3"], ["model.layers.1", "2"]]
    assert "2 of 8 experts differ" in experts.text
    cells = [one.attributes for one in drawn.find_all("path") if one.attributes["class"] in ("s0", "s5", "s8")]
    runs = {one["class"]: [int(width) for width in re.findall(r"h(\d+)v", one["d"])] for one in cells}
    assert [len(runs[level]) for level in ("s5", "s8")] == [1, 1]
    assert sum(runs["s0"]) == 3 * sum(runs["s5"] + runs["s8"]), "six of eight are equal"
    text = page.find_all("section")[2].text
    assert re.search(r"model\.layers\.0\.norm\.weight.*50 %", text)


def cells_at_letters(drawn: Element) -> list[tuple[str, str]]:
    """Each letter of a heat map, with the class of the cell that it stands in."""
    cells = []
    for one in drawn.find_all("path"):
        for x, y, width, height in re.findall(r"M(\d+) (\d+)h(\d+)v(\d+)h-\d+z", one.attributes["d"]):
            cells.append((int(x), int(y), int(width), int(height), one.attributes["class"]))
    return [
        (one.text, kind)
        for one in drawn.find_all("text")
        if one.attributes["class"] == "mark"
        for x, y, width, height, kind in cells
        if x < float(one.attributes["x"]) < x + width and y < int(one.attributes["y"]) - 4 <= y + height
    ]


def test_cells_with_a_letter_have_one_colour_apart_from_the_scale(changed: DiffReport) -> None:
    """A lost expert, or a NaN, has no place on the scale, neither at its pale end nor at the other."""
    page = check_page(format_diff_page(changed))
    drawings = page.find_all("svg")
    found = [one for drawn in drawings for one in cells_at_letters(drawn)]
    assert sorted(found) == [(letter, "s8") for letter in "ABDINNZ"]
    swatches = [one for one in page.find_all("span") if one.attributes.get("class", "").startswith("swatch")]
    assert {one.attributes["class"] for one in swatches if one.text} == {"swatch s8"}
    assert not [one for one in swatches if not one.text and "s8" in one.attributes["class"]]
    assert "Cells with a letter have a colour of their own, and come first: see the letter." in page.text


def test_what_is_lost_comes_before_what_is_far_apart() -> None:
    """The worst first: NaN, infinite, missing, all zeros, another dtype; then by the norm."""
    marks = ["N", "I", "A", "B", "Z", "D", ""]
    cells = [DiffCell(1, 1, 0.0 if mark else 9.0, {*mark}) for mark in marks]
    found = sort_worst((mark, "0", cell) for mark, cell in reversed([*zip(marks, cells, strict=True)]))
    assert [mark for mark, _, _ in found] == marks


def test_a_difference_without_one_says_so(source: Callable[[str], Path]) -> None:
    page = check_page(format_diff_page(reshard.diff(source("deepseek-v3"), source("deepseek-v3"))))
    assert "are equal bit by bit" in page.text
    assert "all are equal" in page.text


def test_one_cell_differs(tmp_path: Path) -> None:
    """Of a difference of one tensor, every sentence is of one."""
    for name, value in (("a", 1.0), ("b", 2.0)):
        (tmp_path / name).mkdir()
        tensors = {f"model.layers.0.mlp.experts.{number}.w": torch.ones(2) for number in range(2)}
        tensors["model.layers.0.mlp.experts.1.w"] *= value
        save_file(tensors, tmp_path / name / "model.safetensors")
    words = parse_page(format_diff_page(reshard.diff(tmp_path / "a", tmp_path / "b"))).text
    assert "1 cell differs, the worst in" in words
    assert "1 of 2 experts differs, the worst in" in words


def test_many_experts_are_drawn_in_few_bytes() -> None:
    empty = DiffReport("a", "b", ("", ""), 0, 0, 0, 0, (), (), (), (), (), ())
    names = [f"model.layers.{layer}.mlp.experts.{expert}.w.weight" for layer in range(61) for expert in range(256)]
    text = format_diff_page(replace(empty, only_a=tuple(names[::7]), equal=tuple(set(names) - set(names[::7]))))
    page = check_page(text)
    assert len(text.encode()) < 300_000
    (experts,) = page.find_all("section")[1].find_all("svg")
    assert marks_of(experts) == [], "the cells are too narrow"
    assert "outlined: only in A" in page.text
    (outlines,) = [one for one in experts.find_all("path") if one.attributes["class"] == "odd"]
    (colour,) = [one for one in experts.find_all("path") if one.attributes["class"] == "s8"]
    assert colour.attributes["d"] == outlines.attributes["d"]


def test_names_of_strangers_do_nothing(tmp_path: Path) -> None:
    for number, name in enumerate(("a", "b")):
        (tmp_path / name).mkdir()
        tensors = {hostile: torch.full((2,), number + 1.0) for hostile in HOSTILE}
        save_file(tensors, tmp_path / name / "model.safetensors")
    folder = tmp_path / "<b>&'\"\u202e"
    (tmp_path / "a").rename(folder)
    for text in (read_contents(folder), format_diff_page(reshard.diff(folder, tmp_path / "b"))):
        page = check_page(text)
        assert "</svg><script>" in page.text
        assert "\\x1b[31m" in page.text
        assert len(text) < 200_000


def walk(element: Element) -> list[Element]:
    return [found for one in element.children for found in (one, *walk(one))]


def test_a_plan_of_names_of_strangers_does_nothing(tmp_path: Path) -> None:
    """A recipe of one's own takes names of any kind."""
    name = "</svg><script>alert(1)</script>\u202e"
    save_file({name: torch.ones(4), "model.layers.0.<b>": torch.ones(4)}, tmp_path / "model.safetensors")
    recipe = write_recipe(
        tmp_path,
        f'["same", {json.dumps(name)}, {json.dumps(name)}, "rows"]',
        '["same", "model.layers.{i}.<b>", "model.layers.{i}.<b>", "replicate"]',
        placeholders='placeholders.i = { counts = "layers" }\n',
    )
    page = check_page(format_plan_page(reshard.plan(tmp_path, 2, recipe=f"{recipe}")))
    assert "</svg><script>alert(1)</script>\\u202e" in page.text


def write_recipe(folder: Path, *rules: str, placeholders: str = "") -> Path:
    recipe = folder / "own.toml"
    recipe.write_text(
        'name = "own"\nabout = "<i>own</i>"\nleft = "l"\nright = "r"\nfiles = "model{rank}-of-{ranks}.safetensors"\n'
        f'carry = []\nmodel_types = []\narchitectures = []\n{placeholders}checked = ""\n'
        f"rules = [\n{''.join(f'{rule},{chr(10)}' for rule in rules)}]\n",
        encoding="utf-8",
    )
    return recipe


def test_what_is_equal_comes_by_name(tmp_path: Path) -> None:
    """Not in the order of hashes, which is another one in every run."""
    dtypes = {"F32": torch.float32, "I32": torch.int32, "F16": torch.float16, "BF16": torch.bfloat16}
    dtypes |= {"I16": torch.int16, "U8": torch.uint8, "I8": torch.int8, "I64": torch.int64, "F64": torch.float64}
    tensors = {f"t.{name}": torch.zeros(16 // dtype.itemsize, dtype=dtype) for name, dtype in dtypes.items()}
    save_file(tensors, tmp_path / "model.safetensors")
    wanted = [*sorted(dtypes), "total"]
    contents = read_tables(parse_page(read_contents(tmp_path)))
    assert [row[0] for row in contents["Tensors and bytes by dtype"][1:]] == wanted
    recipe = write_recipe(tmp_path, *(f'["same", "{name}", "{name}", "replicate"]' for name in tensors))
    plan = read_tables(parse_page(format_plan_page(reshard.plan(tmp_path, 2, recipe=f"{recipe}"))))
    assert [row[0] for row in plan["Dtypes before and after"][1:]] == wanted
    assert sort_rows(["a.1", "a.01", "a.001"]) == sort_rows(["a.001", "a.01", "a.1"])


def test_kinds_are_told_by_words() -> None:
    """Of the names of all packaged recipes, few are of no kind."""
    names = {
        name.replace("{i}", "#")
        for recipe in list_packaged_recipes()
        for rule in recipe.rules
        for name in (rule.left, rule.right)
    }
    kinds = Counter(find_module_kind(name) for name in names if name)
    assert {*kinds} == {*KINDS}
    assert kinds[OTHER] < 30
    for name, kind in (
        ("layers.#.ffn.shared_experts.w1.weight", "shared experts"),
        ("model.layers.#.mlp.experts.gate_up_proj_scales", "scales of weights"),
        ("model.layers.#.mlp.shared_expert_gate.weight", "routers"),
        ("model.layers.#.self_attn.q_norm.weight", "norms"),
        ("model.layers.#.mlp.gate_proj.weight", "dense MLP"),
        ("model.layers.#.block_sparse_moe.experts.#.w1.weight", "routed experts"),
        ("lm_head.weight", "embedding, head"),
        ("model.visual.blocks.#.attn.qkv.weight", "vision"),
    ):
        assert find_module_kind(name) == kind


def test_rows_come_in_the_order_of_the_model() -> None:
    rows = ["lm_head", "model.layers.10", "model.embed_tokens", "model.layers.9", "model.norm"]
    assert sort_rows(rows) == ["model.embed_tokens", "model.layers.9", "model.layers.10", "lm_head", "model.norm"]


# --- colours ---


def read_colours() -> list[dict[str, str]]:
    """The variables of the light and of the dark scheme."""
    blocks = re.findall(r":root \{(.*?)\}", STYLE.read_text(encoding="utf-8"), re.DOTALL)
    return [dict(re.findall(r"--([\w-]+): (#[0-9a-f]{6});", block)) for block in blocks]


def luminance(colour: str) -> float:
    parts = (int(colour[at : at + 2], 16) / 255 for at in (1, 3, 5))
    red, green, blue = (part / 12.92 if part <= 0.04045 else ((part + 0.055) / 1.055) ** 2.4 for part in parts)
    return 0.2126 * red + 0.7152 * green + 0.0722 * blue


def contrast(one: str, other: str) -> float:
    light, dark = sorted((luminance(one), luminance(other)), reverse=True)
    return (light + 0.05) / (dark + 0.05)


@pytest.mark.parametrize("scheme", [0, 1], ids=["light", "dark"])
def test_colours_can_be_told_apart(scheme: int) -> None:
    light, dark = read_colours()
    assert light.keys() == dark.keys()
    colours = (light, dark)[scheme]
    for name in ("text", "quiet", "link"):
        assert contrast(colours[name], colours["back"]) >= 4.5, name
    for kind in range(len(KINDS)):
        assert contrast(colours["letter"], colours[f"k{kind}"]) >= 4.5, kind
        assert contrast(colours["back"], colours[f"k{kind}"]) >= 3, kind
    for name in ("letter", "back"):
        assert contrast(colours[name], colours["odd"]) >= 4.5, "of cells with a letter, and of outlines"
    warmth = {name: int(colour[1:3], 16) - int(colour[5:], 16) for name, colour in colours.items()}
    assert warmth["odd"] > 90, "orange and blue: colours that most of the colour-blind can tell apart"
    assert max(warmth[f"s{level}"] for level in range(8)) < 0
    steps = [luminance(colours[f"s{level}"]) for level in range(1, 8)]
    assert steps == sorted(steps, reverse=not scheme), "each level is darker, or brighter, than the one before"
    assert all(contrast(colours[f"s{n}"], colours[f"s{n + 1}"]) >= 1.15 for n in range(1, 7))
    assert contrast(colours["s1"], colours["back"]) >= 1.15, "little is not nothing"
    assert contrast(colours["odd"], colours["back"]) >= 3
    assert contrast(colours["memory"], colours["s0"]) >= 3


def test_the_text_of_a_page_is_escaped_once() -> None:
    inside = escape_text("a < b & 'c'")
    assert make_element("p", inside, title=inside) == f'<p title="{inside}">{inside}</p>'
    assert unescape(inside) == "a < b & 'c'"
