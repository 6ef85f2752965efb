"""Pages in Chromium: every part is there and seen, by eye, by keyboard, and by what a screen reader is told."""

import shutil
from collections.abc import Iterator, Mapping
from io import BytesIO
from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest
from safetensors.torch import load_file, save_file
from targets import CONFIG

import reshard
from reshard.inspection.tensor_list import read_tensor_list
from reshard.pages.contents_page import format_contents_page
from reshard.pages.diff_page import format_diff_page
from reshard.pages.plan_page import format_plan_page
from reshard.synthetic import write_checkpoint

sync_api = pytest.importorskip("playwright.sync_api", reason="make browser installs playwright")
axe = pytest.importorskip("axe_playwright_python.sync_playwright", reason="make browser installs axe")
image = pytest.importorskip("PIL.Image", reason="make browser installs pillow")

CHROMIUM = next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), None)
pytestmark = pytest.mark.skipif(CHROMIUM is None, reason="no Chromium: apt-get install chromium")

NAMES = ("plan", "inspect", "diff")

PARTS: Mapping[str, list[str]] = {
    "plan": ["ranks", "layers", "sources", "replicas", "dtypes", "uses", "proofs"],
    "inspect": ["kinds", "places", "stored"],
    "diff": ["modules", "experts", "tensors", "unpaired"],
}

DRAWINGS: Mapping[str, list[str]] = {
    "plan": ["Tensors of each rank in bytes", "Bytes of each layer in each rank", "Bytes of each rank by source file"],
    "inspect": [
        "Bytes by module and layer, model.layers",
        "Bytes by module and layer, in no layer",
        "Bytes of each file",
    ],
    "diff": ["Relative difference by module and layer, model.layers", "Relative difference by layer and expert"],
}


@pytest.fixture(scope="module")
def written(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with the three pages."""
    folder = tmp_path_factory.mktemp("browser")
    write_checkpoint(folder / "model", {**CONFIG, "num_hidden_layers": 4}, 3)
    shutil.copytree(folder / "model", folder / "tuned")
    for path in (folder / "tuned").glob("*.safetensors"):
        tensors = load_file(path)
        for name in [name for name in tensors if ".experts.3." in name and name.endswith("down_proj.weight_scale_inv")]:
            tensors[name] = tensors[name] * 1.01
        for name in [name for name in tensors if name.endswith("2.input_layernorm.weight")]:
            tensors[name][0] = float("nan")
        save_file(tensors, path, metadata={"format": "pt"})
    texts = {
        "plan": format_plan_page(reshard.plan(folder / "model", mp=4)),
        "inspect": format_contents_page(reshard.inspect(folder / "model"), read_tensor_list(folder / "model", None)),
        "diff": format_diff_page(reshard.diff(folder / "model", folder / "tuned")),
    }
    for name, text in texts.items():
        (folder / f"{name}.html").write_text(text, encoding="utf-8")
    return folder


@pytest.fixture(scope="module")
def browser() -> Iterator[Any]:
    with sync_api.sync_playwright() as playwright:
        opened = playwright.chromium.launch(executable_path=CHROMIUM, args=["--no-sandbox", "--disable-gpu"])
        yield opened
        opened.close()


def open_page(browser: Any, path: Path, scheme: str = "light", width: int = 1100) -> Any:
    """Opens a page; nothing but the page itself may be asked for, and nothing may go wrong."""
    page = browser.new_page(viewport={"width": width, "height": 900}, color_scheme=scheme)
    asked: list[str] = []
    page.on("request", lambda request: asked.append(request.url))
    page.on("console", lambda message: pytest.fail(message.text))
    page.on("pageerror", lambda error: pytest.fail(str(error)))
    page.goto(path.as_uri())
    assert asked == [path.as_uri()]
    return page


def require_seen(page: Any, part: Any, width: int) -> None:
    """It is visible, has a size, and is within the width of the page."""
    assert part.is_visible()
    box = part.bounding_box()
    assert box["width"] > 20
    assert box["height"] > 10
    assert box["x"] >= 0
    assert box["x"] + box["width"] <= width
    assert page.evaluate("document.documentElement.scrollWidth <= window.innerWidth")


@pytest.mark.parametrize(("scheme", "width"), [("light", 1100), ("dark", 1100), ("light", 320)])
@pytest.mark.parametrize("name", NAMES)
def test_every_part_is_seen(name: str, scheme: str, width: int, browser: Any, written: Path) -> None:
    page = open_page(browser, written / f"{name}.html", scheme, width)
    assert [one.get_attribute("id") for one in page.locator("section").all()] == PARTS[name]
    for part in (*page.locator("section, h1, h2, dl.facts, nav, footer, main > section > .scroll").all(),):
        require_seen(page, part, width)
    back = image.open(BytesIO(page.screenshot())).convert("RGB").getpixel((1, 1))
    assert (sum(back) < 200) is (scheme == "dark")
    for title in DRAWINGS[name]:
        drawn = page.get_by_role("region", name=title, exact=True)
        assert drawn.count() == 1, title
        drawn.scroll_into_view_if_needed()
        require_seen(page, drawn, width)
        colours = image.open(BytesIO(drawn.screenshot())).convert("RGB").getcolors(1 << 24)
        most = max(count for count, _ in colours)
        assert len(colours) > 20
        assert sum(count for count, _ in colours) - most > 500, "not of one colour"
    page.close()


@pytest.mark.parametrize("width", [400, 1100])
@pytest.mark.parametrize("name", ["plan", "inspect"])
def test_bars_are_as_wide_as_the_page(name: str, width: int, browser: Any, written: Path) -> None:
    """Nothing of them has to be scrolled to, and their words are no smaller on a telephone."""
    page = open_page(browser, written / f"{name}.html", width=width)
    bars = page.locator("svg.bars")
    assert bars.evaluate("one => one.parentNode.scrollWidth <= one.parentNode.clientWidth")
    label, size, first = (bars.locator(one).first.bounding_box() for one in ("text", "text.row", "rect"))
    assert 0 <= label["x"] < label["x"] + label["width"] <= first["x"]
    assert size["x"] + size["width"] <= width
    ends = [box["x"] + box["width"] for box in (one.bounding_box() for one in bars.locator("rect").all())]
    assert 0.4 * width < max(ends) - first["x"] < size["x"] - first["x"]
    assert min(label["height"], size["height"]) >= 11
    shown = [one.bounding_box() for one in bars.locator("text.letter:visible").all()]
    on_a_line = sorted((box for box in shown if box["y"] == shown[0]["y"]), key=lambda box: box["x"])
    assert len(on_a_line) >= 2
    assert all(one["x"] + one["width"] <= other["x"] for one, other in pairwise(on_a_line))
    page.close()


def test_a_narrow_page_shows_the_numbers_of_its_tables(browser: Any, written: Path) -> None:
    page = open_page(browser, written / "plan.html", width=400)
    table = page.get_by_role("region", name="Table: Uses of the source tensors")
    for cell in table.locator("td").all():
        box = cell.bounding_box()
        assert box["x"] + box["width"] <= 400, cell.inner_text()
    drawn = page.get_by_role("region", name="Bytes of each layer in each rank", exact=True).locator("svg")
    assert drawn.bounding_box()["width"] == pytest.approx(0.75 * float(drawn.get_attribute("width")))
    page.close()


@pytest.mark.parametrize("name", NAMES)
def test_the_keyboard_reaches_everything(name: str, browser: Any, written: Path) -> None:
    page = open_page(browser, written / f"{name}.html")
    wanted = page.locator("a, summary, [tabindex='0']").count()
    hidden = page.locator("details [tabindex='0']").count()
    describe = "[document.activeElement.tagName, document.activeElement.className, document.activeElement.innerText]"
    page.keyboard.press("Tab")
    assert page.evaluate(describe)[1] == "skip"
    require_seen(page, page.locator(".skip"), 1100)
    stops = 1
    while stops <= wanted:
        page.keyboard.press("Tab")
        if page.evaluate("document.activeElement === document.body"):
            break
        stops += 1
        outline = page.evaluate("getComputedStyle(document.activeElement).outlineStyle")
        assert outline == "solid", page.evaluate(describe)
    assert stops == wanted - hidden
    page.locator("summary").first.focus()
    page.keyboard.press("Enter")
    assert page.locator("details").first.get_attribute("open") is not None
    require_seen(page, page.locator("details[open] > *:not(summary)").first, 1100)
    page.locator(".skip").focus()
    page.keyboard.press("Enter")
    assert page.evaluate("document.activeElement.id") == "content"
    page.close()


@pytest.mark.parametrize("name", NAMES)
def test_a_screen_reader_is_told_everything(name: str, browser: Any, written: Path) -> None:
    page = open_page(browser, written / f"{name}.html")
    page.evaluate("document.querySelectorAll('details').forEach(one => { one.open = true })")
    told = page.locator("body").aria_snapshot()
    for role in ("banner", 'navigation "Sections"', "main", "contentinfo", 'link "Skip to the content"'):
        assert role in told
    for title in DRAWINGS[name]:
        assert f'region "{title}"' in told
        assert f'img "{title}"' in told
    captions = [one.inner_text() for one in page.locator("caption").all()]
    assert len(captions) >= 3
    assert all(f'table "{caption}"' in told for caption in captions)
    assert "columnheader" in told
    assert "rowheader" in told
    page.close()


@pytest.mark.parametrize("scheme", ["light", "dark"])
@pytest.mark.parametrize("name", NAMES)
def test_axe_finds_nothing(name: str, scheme: str, browser: Any, written: Path) -> None:
    page = open_page(browser, written / f"{name}.html", scheme)
    page.evaluate("document.querySelectorAll('details').forEach(one => { one.open = true })")
    found = axe.Axe().run(page)
    assert found.violations_count == 0, found.generate_report()
    page.close()


def test_a_page_is_printed_whole(browser: Any, written: Path) -> None:
    page = open_page(browser, written / "plan.html", "dark")
    page.emulate_media(media="print")
    assert page.locator("nav").is_hidden()
    assert page.evaluate(
        "[...document.querySelectorAll('.scroll')].every(one => getComputedStyle(one).overflowX === 'visible')"
    )
    seen = "[...document.querySelectorAll('details:not([open]) table')].map(one => one.checkVisibility())"
    tables = page.evaluate(seen)
    assert len(tables) >= 4
    assert all(tables), "tables that nobody has opened are printed too"
    page.emulate_media(media="screen")
    assert not any(page.evaluate(seen))
    page.close()
