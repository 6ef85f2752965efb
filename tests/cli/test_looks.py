"""Looks on a terminal: colours of verdicts, tables that are too wide for it, bars. Nothing of these in a pipe."""

import json
import os
import pty
import re
import shutil
import subprocess
import sys
from collections.abc import Mapping
from pathlib import Path

import numpy as np
import pytest
from rich.cells import cell_len
from safetensors.numpy import save_file

import reshard
from reshard.cli.main import main
from reshard.synthetic import SMALL_V3, write_checkpoint

GREEN, RED, PLAIN = "\x1b[32m", "\x1b[31m", "\x1b[0m"


@pytest.fixture(scope="module")
def source(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("looks") / "source"
    write_checkpoint(folder, SMALL_V3, 2)
    return folder


@pytest.fixture(scope="module")
def ranks(source: Path) -> Path:
    target = source.parent / "ranks"
    assert main(["convert", str(source), str(target), "--mp", "2"]) == 0
    return target


@pytest.fixture
def damaged(ranks: Path, tmp_path: Path) -> Path:
    target = shutil.copytree(ranks, tmp_path / "damaged")
    with (target / "model0-mp2.safetensors").open("r+b") as file:
        file.seek(-1, os.SEEK_END)
        (last,) = file.read(1)
        file.seek(-1, os.SEEK_END)
        file.write(bytes([last ^ 1]))
    return target


def environment(changes: Mapping[str, str]) -> dict[str, str]:
    kept = {name: value for name, value in os.environ.items() if name not in ("NO_COLOR", "COLUMNS", "FORCE_COLOR")}
    return {**kept, "TERM": "xterm-256color", **changes}


def look(*words: object, **changes: str) -> str:
    """What a command shows on a terminal that is both its standard output and its standard error."""
    ours, theirs = pty.openpty()
    command = [sys.executable, "-m", "reshard", *map(str, words)]
    process = subprocess.Popen(
        command, stdin=subprocess.DEVNULL, stdout=theirs, stderr=theirs, env=environment(changes)
    )
    os.close(theirs)
    pieces = []
    while piece := read_piece(ours):
        pieces.append(piece)
    os.close(ours)
    process.wait(timeout=60)
    return b"".join(pieces).decode().replace("\r\n", "\n")


def without_bar(text: str) -> str:
    """What comes behind the bar of the progress, which has colours of its own and shows the cursor again at its end."""
    return text.rpartition("\x1b[?25h")[2]


def read_piece(descriptor: int) -> bytes:
    """The next bytes of a terminal; none at its end, which is an error on Linux."""
    try:
        return os.read(descriptor, 4096)
    except OSError:
        return b""


def test_a_long_list_of_tensors_is_cut_on_a_terminal(source: Path) -> None:
    shown = look("inspect", source, "--tensors", COLUMNS="200")
    count = int(re.search(r"(\d+) tensors listed", shown)[1])  # type: ignore[index]
    assert f"... and {count - 100} more; --json has all, and a pattern narrows the list" in shown


# colours


def test_a_proof_is_green_and_problems_and_refusals_are_red(source: Path, ranks: Path, damaged: Path) -> None:
    assert f"{GREEN}{ranks}: proven against reshard.json{PLAIN}\n2 of 2 rank files" in look("verify", ranks)
    assert f"{GREEN}{ranks}: proven against {source}{PLAIN}\n" in look("verify", ranks, "--source", source)
    assert f"{RED}{damaged}: 1 problem{PLAIN}\nmodel0-mp2" in look("verify", damaged)
    assert look("inspect", source / "none") == (
        f"{RED}reshard: refused{PLAIN}\n{source / 'none'}: no source\n"
        "  hint:     is the path right? to try reshard out: reshard demo NEW makes NEW/source\n"
        "  found:    No such file or directory\n  expected: a folder or a safetensors file\n"
    )


def test_a_sample_proves_nothing_and_has_no_colour(ranks: Path) -> None:
    text = without_bar(look("verify", ranks, "--sample", "50%"))
    assert "no difference" in text
    assert GREEN not in text


@pytest.mark.parametrize("changes", [{"NO_COLOR": "1"}, {"TERM": "dumb"}])
def test_no_colours_where_they_are_not_wanted(changes: dict[str, str], source: Path, damaged: Path) -> None:
    for words in (["verify", damaged], ["inspect", source / "none"]):
        text = look(*words, **changes)
        assert "1 problem" in text or "refused" in text
        assert RED not in text


def test_an_empty_no_color_switches_nothing_off(source: Path) -> None:
    assert RED in look("inspect", source / "none", NO_COLOR="")


def test_a_pipe_and_json_have_no_escape_sequences(source: Path, ranks: Path, damaged: Path) -> None:
    for target in (ranks, damaged, source / "none"):
        command = [sys.executable, "-m", "reshard", "verify", str(target)]
        done = subprocess.run(
            command, check=False, capture_output=True, env=environment({"FORCE_COLOR": "1"}), timeout=60
        )
        assert b"\x1b" not in done.stdout + done.stderr
    assert json.loads(without_bar(look("verify", damaged, "--json")))["status"] == "differs"


def test_a_name_with_an_escape_sequence_stays_escaped(tmp_path: Path) -> None:
    text = look("inspect", tmp_path / "ev\x1b[35mil")
    assert "ev\\x1b[35mil" in text
    assert "\x1b[35m" not in text


# tables


def test_a_table_that_is_too_wide_becomes_records(source: Path) -> None:
    wide = look("plan", source, "--mp", "2", COLUMNS="200")
    narrow = look("plan", source, "--mp", "2", COLUMNS="60")
    assert re.search(r"^source tensors +tensors +bytes$", wide, re.MULTILINE)
    row = re.compile(r"^(dropped|total|used once) +([\d,]+) +([\d,]+)", re.MULTILINE)
    assert len(row.findall(wide)) == 4, "the total of the files too"
    for name, tensors, size in row.findall(wide)[1:]:
        assert f"\n{name}\n    tensors: {tensors}  bytes: {size}" in narrow
    # The table of files fits.
    assert re.search(r"^file +tensors +bytes$", narrow, re.MULTILINE)


@pytest.mark.parametrize(
    ("words", "columns"), [(["plan", "--mp", "2"], 30), (["plan", "--mp", "2"], 60), (["inspect"], 25)]
)
def test_the_records_fit_the_terminal(words: list[str], columns: int, source: Path) -> None:
    """But for the names, which nothing can shorten."""
    records = re.findall(r"^    .*$", look(*words, source, COLUMNS=str(columns)), re.MULTILINE)
    assert len(records) > 3
    assert [line for line in records if len(line) > columns] == []


def test_a_narrow_record_has_a_line_for_each_cell(source: Path) -> None:
    text = look("plan", source, "--mp", "2", COLUMNS="30")
    assert re.search(r"^total\n    tensors: [\d,]+\n    bytes: [\d,]+\n    [\d.]+ MiB$", text, re.MULTILINE)


def test_a_record_fills_its_lines_and_the_table_keeps_its_title(source: Path) -> None:
    """Not a line for each cell as soon as one line is too short for all: of a screen that holds four tensors then."""
    lines = look("inspect", source, "--tensors", "*mlp.experts.0.up_proj.*", COLUMNS="60").splitlines()
    place = lines.index("name:")
    assert lines[place + 1].endswith("mlp.experts.0.up_proj.weight")
    assert lines[place + 2].startswith("    dtype: F8_E4M3  shape: [")
    assert lines[place + 3].startswith("    file: model-0000")


def test_a_pipe_keeps_the_whole_table(source: Path) -> None:
    command = [sys.executable, "-m", "reshard", "plan", str(source), "--mp", "2"]
    done = subprocess.run(
        command, check=True, capture_output=True, text=True, env=environment({"COLUMNS": "30"}), timeout=60
    )
    assert re.search(r"^source tensors +tensors +bytes$", done.stdout, re.MULTILINE)


def test_the_width_of_the_terminal_itself_counts(source: Path) -> None:
    """A new pseudo-terminal says 0 columns: unknown, so nothing is folded."""
    assert re.search(r"^source tensors +tensors +bytes$", look("plan", source, "--mp", "2"), re.MULTILINE)


# bars

SIGNS = "█▓▒░▚▖"
COLORED = re.compile(r"\x1b\[\d+m")


def list_bars(text: str, signs: str = SIGNS) -> dict[str, str]:
    """The bar of each line that has one, by what begins the line; of a file whose bar has a line of its own, by that
    line. Before a dtype stands its sign.
    """
    picture = COLORED.sub("", text).partition("tensors by dtype:\n")[2]
    found, above = {}, ""
    for line in picture.splitlines():
        if match := re.search(rf"(?: KiB| MiB| bytes?)  +<?[\d.]+%.*?  ([{re.escape(signs)}]+)$", line):
            found[line.split("  ")[0].strip() or above] = match[1]
        above = line.strip()
    return found


@pytest.mark.parametrize("columns", [40, 80, 200])
def test_the_bars_of_a_plan_are_its_bytes(columns: int, source: Path) -> None:
    """The oracle is the files themselves, once they are written."""
    target = source.parent / "ranks"
    text = look("plan", source, "--mp", "2", COLUMNS=str(columns), NO_COLOR="1")
    if not target.exists():
        reshard.convert(source, target, mp=2)
    sizes = measure_files(target)
    bars = list_bars(text)
    dtypes = {dtype: sum(file.get(dtype, 0) for file in sizes.values()) for dtype in ("F8_E4M3", "BF16", "F32")}
    assert sorted(dtypes, key=lambda dtype: -dtypes[dtype]) == ["F8_E4M3", "BF16", "F32"], "the signs are in this order"
    signs = dict(zip(dtypes, SIGNS, strict=False))
    assert {bar.split()[1] for bar in bars if bar[0] in SIGNS} == {"F8_E4M3", "BF16"}, "F32 is too little to see"
    largest = max(sum(file.values()) for file in sizes.values())
    for name, file in sizes.items():
        bar = bars[name.removesuffix(".safetensors")]
        width = len(bar) * largest / sum(file.values())
        assert len(bar) >= 8
        assert re.fullmatch("█*▓*▒*", bar), "the parts are in the order of the legend"
        for dtype, size in file.items():
            assert abs(bar.count(signs[dtype]) - size / largest * width) <= 1
    assert max(map(len, text.partition("tensors by dtype")[2].partition("source tensors")[0].splitlines())) <= columns


def measure_files(folder: Path) -> dict[str, dict[str, int]]:
    """File -> dtype -> bytes, by the headers as JSON has them."""
    found: dict[str, dict[str, int]] = {}
    for path in sorted(folder.glob("*.safetensors")):
        with path.open("rb") as file:
            header = json.loads(file.read(int.from_bytes(file.read(8), "little")))
        sizes = found.setdefault(path.name, {})
        for name, entry in header.items():
            if name != "__metadata__":
                begin, end = entry["data_offsets"]
                sizes[entry["dtype"]] = sizes.get(entry["dtype"], 0) + end - begin
    return found


def test_inspect_has_the_bytes_of_each_file_and_draws_them(source: Path, ranks: Path) -> None:
    for folder in (source, ranks):
        sizes = measure_files(folder)
        assert {file.name: dict(file.dtypes) for file in reshard.inspect(folder).by_file} == sizes
        bars = list_bars(look("inspect", folder, COLUMNS="100"))
        assert {name.removesuffix(".safetensors") for name in sizes} <= bars.keys()


def test_a_pipe_and_terminals_without_blocks_have_the_text_alone(source: Path) -> None:
    for words in (["plan", source, "--mp", "2"], ["inspect", source]):
        command = [sys.executable, "-m", "reshard", *map(str, words)]
        done = subprocess.run(command, check=True, capture_output=True, text=True, env=environment({}), timeout=60)
        shown = look(*words, COLUMNS="200")
        before, _, picture = shown.partition("\ntensors by dtype:\n")
        _bars, _, behind = picture.partition("\nsource tensors")
        assert list_bars(shown)
        assert before + ("\nsource tensors" + behind if behind else "") == done.stdout
        assert not re.search(f"[{SIGNS}]", done.stdout)
        assert look(*words, COLUMNS="200", TERM="dumb") == done.stdout
    assert look(*words, COLUMNS="39") == done.stdout, "too narrow for bars"


def test_the_signs_tell_the_dtypes_without_colours_and_without_blocks(source: Path) -> None:
    colored, plain = (look("inspect", source, COLUMNS="90", **more) for more in ({}, {"NO_COLOR": "1"}))
    assert "\x1b[36m█" in colored
    assert COLORED.sub("", colored) == plain
    letters = look("inspect", source, COLUMNS="90", NO_COLOR="1", PYTHONIOENCODING="ascii")
    assert letters == plain.translate(str.maketrans(SIGNS, "#=+-%."))
    assert re.search(r"^# F8_E4M3 .*  #+\n= BF16 .*  =+\n\+ F32 ", letters, re.MULTILINE)


def test_a_file_that_is_not_as_large_as_the_others_stands_out(tmp_path: Path) -> None:
    for number, size in enumerate((1000, 1000, 1100, 1000, 700)):
        save_file({f"w{number}": np.zeros(size, np.int8)}, tmp_path / f"{'ab'[number == 4]}{number}.safetensors")
    text = look("inspect", tmp_path, COLUMNS="80")
    rows = re.findall(r"^(\w\d) +[\d,.]+ \w+ +[\d.]+%  ([-+]\d+%)?", text, re.MULTILINE)
    assert rows == [("a0", ""), ("a1", ""), ("a2", "+10%"), ("a3", ""), ("b4", "-30%")]


def test_many_files_are_grouped_and_cut_with_a_line_that_says_so(tmp_path: Path) -> None:
    sizes = [*[500] * 280, *range(1000, 1040)]
    for number, size in enumerate(sizes):
        save_file({f"w{number}": np.zeros(size, np.int8)}, tmp_path / f"f{number:03}.safetensors")
    text = look("inspect", tmp_path, COLUMNS="80").partition("tensors by file")[2]
    assert re.search(r"^f000 and 279 alike, each +500 bytes ", text, re.MULTILINE)
    shown = re.findall(r"^f(\d+)", text, re.MULTILINE)
    left = re.search(r"^and (\d+) more files, [\d,]+ bytes to 1.\d\d KiB each$", text, re.MULTILINE)
    assert left
    assert len(shown) == 16
    assert 279 + len(shown) + int(left[1]) == 320
    assert shown[-1] == "319", "the largest of all is not left out"


def test_the_name_of_a_file_stays_escaped_beside_its_bar(tmp_path: Path) -> None:
    save_file({"w": np.zeros(9, np.int8)}, tmp_path / "ev\x1b[35mil.safetensors")
    text = look("inspect", tmp_path, COLUMNS="80")
    assert "\nev\\x1b[35mil  9 bytes" in text
    assert "\x1b[35m" not in text.replace("\x1b[35m░", "")


def test_names_in_wide_letters_leave_their_bars_on_the_line(tmp_path: Path) -> None:
    for name, size in (("权重文件第一部分", 900), ("e\u0301tude", 1000)):
        save_file({f"w{size}": np.zeros(size, np.int8)}, tmp_path / f"{name}.safetensors")
    text = look("inspect", tmp_path, COLUMNS="60", NO_COLOR="1").partition("tensors by file")[2]
    rows = [line for line in text.splitlines() if "█" in line]
    assert len(rows) == 2
    assert [cell_len(line.partition("█")[0]) for line in rows] == [cell_len(rows[0].partition("█")[0])] * 2
    assert max(map(cell_len, rows)) <= 60


def test_the_narrowest_terminal_has_no_line_that_is_longer(tmp_path: Path) -> None:
    for number, size in enumerate((1000, 1000, 1100, 1000, 700)):
        save_file({f"w{number}": np.zeros(size, np.int8)}, tmp_path / f"f{number}.safetensors")
    text = look("inspect", tmp_path, COLUMNS="40", NO_COLOR="1").partition("tensors by dtype")[2]
    assert "+10%" in text
    assert max(map(cell_len, text.splitlines())) <= 40
