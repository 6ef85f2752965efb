"""What strangers can write into a file: refused by every command, at once, with nothing written and nothing raw said.

Here are whole files as byte literals, through the command itself, with a limit on time. Elsewhere:

- test_safetensors.py: each fault of a header by itself, held against the safetensors package; all are run here again;
- test_huggingface.py: indexes, configs and folders that contradict; test_refusals.py: damaged checkpoints, odd options;
- test_recipe.py: each fault of a recipe with its line; test_verify.py: damaged rank files;
- test_resume.py: damaged journals; test_cli.py: names with escape sequences, on every way to the terminal;
- fuzz.py makes more of them. What it found is in seeds/, and is run here.
"""

import json
import os
import re
import signal
import stat
import subprocess
import sys
import unicodedata
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from itertools import pairwise
from pathlib import Path
from typing import Any

import fuzz
import numpy as np
import pytest
from header_faults import FAULTS, whole_file
from refusals import TINY
from safetensors import SafetensorError, deserialize
from safetensors.numpy import save
from xxhash import xxh3_128_hexdigest

from reshard.cli.main import main
from reshard.errors import LONGEST_DETAIL, MOST_PROBLEMS, Refused
from reshard.execution.journal import list_left_files
from reshard.formats.manifest import compute_manifest_checksum, read_manifest
from reshard.formats.safetensors import parse_header
from reshard.formats.target_names import JOURNAL
from reshard.recipes.recipe import load_recipe, parse_recipe
from reshard.sources.checkpoints import read_checkpoint
from reshard.sources.match import match
from reshard.synthetic import write_checkpoint
from reshard.text import escape
from reshard.types import Checkpoint, Tensor

INDEX, CONFIG, MANIFEST = "model.safetensors.index.json", "config.json", "reshard.json"
ONE = b'"dtype":"U8","shape":[1],"data_offsets":[0,1]'
DOTS = b"." * 10_000
LIMIT = 60
"""In seconds. All of this takes milliseconds; what is wrong would take hours."""


class Late(BaseException):
    """Caught by nobody."""


@contextmanager
def in_time(seconds: int = LIMIT) -> Iterator[None]:
    """Fails if the block does not end in time."""

    def late(*_: object) -> None:
        raise Late

    before = signal.signal(signal.SIGALRM, late)
    signal.alarm(seconds)
    try:
        yield
    finally:
        signal.alarm(0)
        signal.signal(signal.SIGALRM, before)


def contents(folder: Path) -> dict[str, bytes]:
    return {str(path): path.read_bytes() for path in folder.rglob("*") if path.is_file() and not path.is_symlink()}


def is_raw(text: str) -> bool:
    """Whether a text holds what a terminal could obey: control and format characters, surrogates, odd line ends."""
    return any(
        unicodedata.category(letter) in {"Cc", "Cf", "Cs", "Co", "Zl", "Zp"} for letter in text if letter != "\n"
    )


def run(capsys: pytest.CaptureFixture[str], *words: str | Path) -> tuple[int, str]:
    """The exit code of a command, and all that it says. It must come back in time and say nothing raw."""
    with in_time():
        code = main(list(map(str, words)))
    out, err = capsys.readouterr()
    assert not is_raw(out + err)
    return code, out + err


def require_refused(capsys: pytest.CaptureFixture[str], folder: Path, kind: str) -> None:
    """Each command refuses what lies in `folder/source` for that reason, and writes nothing."""
    source, before = folder / "source", contents(folder)
    code, said = run(capsys, "plan", source, "--mp", "2", "--json")
    assert code == 2
    assert kind in {problem["kind"] for problem in json.loads(said.partition("\nreshard: refused")[0])["problems"]}
    for words in (["--mp", "2"], ["--mp", "1", "--restart", "--ignore-extra-files"]):
        code, said = run(capsys, "convert", source, folder / "target", *words)
        assert (code, "\n  found:    " in said) == (2, True)
    assert contents(folder) == before


def source_of(folder: Path, files: dict[str, bytes]) -> Path:
    source = folder / "source"
    source.mkdir()
    for name, content in files.items():
        (source / name).write_bytes(content)
    return source


# --- safetensors files ---

FILES = [
    # A length that is none.
    (b"", "truncated-file"),
    (b"\0" * 7, "truncated-file"),
    (b"\0" * 8, "header-not-json"),
    (b"\1\0\0\0\0\0\0\0", "truncated-file"),
    (b"\xff\xff\xff\xff\xff\xff\xff\x7f{}", "header-too-long"),
    (b"\xff\xff\xff\xff\xff\xff\xff\xff{}", "header-too-long"),
    (b"\0\0\0\0\0\0\0\x80{}", "header-too-long"),
    (b"\xff\xe0\xf5\5\0\0\0\0{}", "truncated-file"),
    (b"\1\xe1\xf5\5\0\0\0\0{}", "header-too-long"),
    (b"\x1f\x8b\x08\0\0\0\0\0\0\0", "other-format"),
    (b"PK\3\4\x14\0\0\0\x08\0", "other-format"),
    (b"\x89PNG\r\n\x1a\n", "header-too-long"),
    (b"GGUF\3\0\0\0\0\0\0\0\0\0\0\0", "other-format"),
    # Huge numbers.
    (whole_file(b'{"a":{"dtype":"U8","shape":[9223372036854775807],"data_offsets":[0,9223372036854775807]}}', 1),
     "truncated-file"),
    (whole_file(b'{"a":{"dtype":"F64","shape":[9223372036854775807],"data_offsets":[0,8]}}', 8), "wrong-offsets"),
    (whole_file(b'{"a":{"dtype":"F64","shape":[2305843009213693952],"data_offsets":[0,0]}}', 0), "wrong-offsets"),
    (whole_file(b'{"a":{"dtype":"U8","shape":[18446744073709551617],"data_offsets":[0,1]}}', 1), "wrong-shape"),
    (whole_file(b'{"a":{"dtype":"U8","shape":[1],"data_offsets":[18446744073709551615,18446744073709551616]}}', 1),
     "wrong-offsets"),
    (whole_file(b'{"a":{"dtype":"U8","shape":[' + b"4294967296," * 63 + b'1],"data_offsets":[0,0]}}', 0),
     "wrong-shape"),
    (whole_file(b'{"a":{"dtype":"U8","shape":[1],"data_offsets":[0,' + b"1" * 100_000 + b"]}}", 1), "header-not-json"),
    (whole_file(b'{"a":{"dtype":"U8","shape":[1],"data_offsets":[0,-0.0]}}', 1), "header-not-json"),
    (whole_file(b'{"a":{"dtype":"U8","shape":[-Infinity],"data_offsets":[0,1]}}', 1), "header-not-json"),
    # Names beside faults: what is said of them must not be raw.
    (whole_file(b'{"\\u001b[2J\\u009b31m":{}}', 0), "wrong-entry"),
    (whole_file(b'{"\\u202e\\u200f\\ufeff\\ue000":{"dtype":"\\u0007"}}', 0), "wrong-entry"),
    (whole_file(b'{"a":{"dtype":"\\u001b]0;x\\u0007","shape":[1],"data_offsets":[0,1]}}', 1), "unknown-dtype"),
    (whole_file(b'{"' + DOTS + b'":{"dtype":"U8","shape":[2],"data_offsets":[0,1]}}', 1), "wrong-offsets"),
    (whole_file(b'{"a\x1b":{' + ONE + b"}}", 1), "header-not-json"),
    (whole_file(b'{"\xed\xa0\x80":{' + ONE + b"}}", 1), "header-not-json"),
    (whole_file(b'{"\xc0\xaf":{' + ONE + b"}}", 1), "header-not-json"),
    (whole_file('{"a":1}'.encode("utf-16"), 0), "header-not-json"),
    # Depth.
    (whole_file(b'{"__metadata__":' + b"[" * 50_000 + b"]" * 50_000 + b"}", 0), "header-not-json"),
    (whole_file(b"[" * 1_000_000, 0), "header-not-json"),
    (whole_file(b'{"":' * 200_000, 0), "header-not-json"),
]  # fmt: skip


@pytest.mark.parametrize(
    ("content", "kind"),
    [pytest.param(content, kind, id=f"{number} {kind}") for number, (content, kind) in enumerate(FILES)],
)
def test_a_hostile_file_is_refused(
    content: bytes, kind: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(SafetensorError):
        deserialize(content)  # type: ignore[no-untyped-call]
    source = source_of(tmp_path, {"model.safetensors": content})
    require_refused(capsys, tmp_path, kind)
    for path in (source, source / "model.safetensors"):
        code, said = run(capsys, "inspect", path)
        assert (code, kind.replace("-", " ") in said) == (2, True)


@pytest.mark.parametrize(("text", "data_size", "kind", "word"), FAULTS)
def test_a_faulty_header_is_refused_by_the_commands_too(
    text: bytes, data_size: int, kind: str, word: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    source_of(tmp_path, {"model.safetensors": whole_file(text, data_size)})
    require_refused(capsys, tmp_path, kind)
    code, said = run(capsys, "inspect", tmp_path / "source")
    assert code == 2
    assert word.isascii()
    assert kind.replace("-", " ") in said


STRANGE_NAMES = [
    b"/etc/passwd", b"../../x", b"..", b".", b"", b"a/b", b"a\\\\b", b"\\u0000", b"a\\u0000b", b"a\\nb", b"\\r",
    b"\\u001b[2J", b"\\u202ea", b"\\u200b", b"\\u009b1m", b"\\ufeff", b"\\ue000", b"\\udbff\\udfff", DOTS, DOTS + b"0",
    b"0." * 10_000, b"#", b"\\\\#", b"%s%n{0}", b"__metadata__ ", b"layers.{i}", b"model.layers.0" + b"0" * 9_000,
    b"a" * 1_000_000, b"model.layers.999999999.eh_proj.weight", "model.layers.\u0663.input_layernorm.weight".encode(),
]  # fmt: skip


@pytest.mark.parametrize("name", [pytest.param(name, id=ascii(name[:40])) for name in STRANGE_NAMES])
def test_a_strange_name_is_named_and_goes_nowhere(
    name: bytes, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """The file is right; no recipe knows the name. Nothing is ever made of it: no path, no pattern, no format."""
    content = whole_file(b'{"' + name + b'":{' + ONE + b"}}", 1)
    assert len(deserialize(content)) == 1  # type: ignore[no-untyped-call]
    source_of(tmp_path, {"model.safetensors": content})
    require_refused(capsys, tmp_path, "no-recipe")
    code, said = run(capsys, "inspect", tmp_path / "source")
    assert (code, "1 tensor," in said) == (0, True)
    source = str(tmp_path / "source")
    for words in (
        ["plan", source, "--mp", "2", "--recipe", "deepseek-v3"],
        ["recipes", "check", "deepseek-v3", source],
    ):
        code, said = run(capsys, *words)
        assert code == 2
        assert len(said) < 20_000


def test_a_value_nested_as_deep_as_can_be_read_is_refused() -> None:
    """Between the deepest that JSON reads here and the deepest that it writes there is a step or two."""
    for depth in range(900, 1010):
        text = b'{"a":{"dtype":"U8","shape":[1],"data_offsets":' + b"[" * depth + b"]" * depth + b"}}"
        with pytest.raises(Refused):
            parse_header(text, 0, 1, "x")
        text = b'{"a":' + b'{"":' * depth + b"1" + b"}" * depth + b"}"
        with pytest.raises(Refused):
            parse_header(text, 0, 1, "x")


def test_a_name_twice_is_found_among_many_at_once() -> None:
    names = [f'"{number}":1' for number in range(200_000)]
    text = ("{" + ",".join([*names, names[-1]]) + "}").encode()
    with in_time(), pytest.raises(Refused, match="'199999' stands twice"):
        parse_header(text, 0, 1, "x")


def test_the_faults_of_many_entries_end_at_a_limit(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    text = ("{" + ",".join(f'"{number}":{{}}' for number in range(60_000)) + "}").encode()
    files = {f"{letter}.safetensors": whole_file(text, 0) for letter in "abc"}
    source_of(tmp_path, files)
    code, said = run(capsys, "plan", tmp_path / "source", "--mp", "2")
    assert (code, "c.safetensors" in said, "99,989 more" in said) == (2, False, True)
    assert "only the first 100,000 problems" in said


# --- indexes ---

RIGHT = {"a.safetensors": save({"a": np.ones(2)}), "b.safetensors": save({"b": np.ones(2)})}

INDEXES = [
    (b"", "not-json"),
    (b"\0", "not-json"),
    (b"{", "not-json"),
    (b"null", "not-json"),
    (b'"a"', "not-json"),
    (b"[" * 1_000_000, "not-json"),
    (b'{"weight_map":' * 100_000, "not-json"),
    (b'{"weight_map":{"a":"a.safetensors","b":"b.safetensors"},"x":' + b"1" * 100_000 + b"}", "not-json"),
    (b'{"weight_map":{"a":"a.safetensors","a":"a.safetensors","b":"b.safetensors"}}', "not-json"),
    (b'{"weight_map":{"a":"a.safetensors"},"weight_map":{"a":"a.safetensors","b":"b.safetensors"}}', "not-json"),
    (b'{"\xff":{}}', "not-json"),
    (b'{"weight_map":null}', "wrong-index"),
    (b'{"weight_map":NaN}', "wrong-index"),
    (b'{"weight_map":"a.safetensors"}', "wrong-index"),
    (b'{"weight_map":{"a":NaN}}', "unsafe-file-name"),
    (b'{"weight_map":{"a":1.5}}', "unsafe-file-name"),
    (b'{"weight_map":{"a":{}}}', "unsafe-file-name"),
    (b'{"weight_map":{"a":' + b"[" * 900 + b"]" * 900 + b"}}", "unsafe-file-name"),
    (b'{"weight_map":{"a":"/etc/passwd"}}', "unsafe-file-name"),
    (b'{"weight_map":{"a":"/a.safetensors"}}', "unsafe-file-name"),
    (b'{"weight_map":{"a":"../source/a.safetensors","b":"b.safetensors"}}', "unsafe-file-name"),
    (b'{"weight_map":{"a":"./a.safetensors","b":"b.safetensors"}}', "unsafe-file-name"),
    (b'{"weight_map":{"a":"..\\\\a.safetensors"}}', "unsafe-file-name"),
    (b'{"weight_map":{"a":"C:\\\\a.safetensors"}}', "unsafe-file-name"),
    (b'{"weight_map":{"a":"a.safetensors/../b.safetensors"}}', "unsafe-file-name"),
    (b'{"weight_map":{"a":"~/a.safetensors"}}', "unsafe-file-name"),
    (b'{"weight_map":{"a":"a.safetensors\\u0000/x.safetensors"}}', "unsafe-file-name"),
    (b'{"weight_map":{"a":"a.safetensors\\n"}}', "unsafe-file-name"),
    (b'{"weight_map":{"a":"\\u001b[2J"}}', "unsafe-file-name"),
    (b'{"weight_map":{"a":"' + DOTS + b'.safetensors"}}', "missing-file"),
    (b'{"weight_map":{"a":"..safetensors"}}', "missing-file"),
    (b'{"weight_map":{"a":"\\ud800.safetensors"}}', "unsafe-file-name"),
    (b'{"weight_map":{"a":"\\u001b.safetensors"}}', "missing-file"),
    (b'{"weight_map":{"a":"*.safetensors"}}', "missing-file"),
    (b'{"weight_map":{"a":"a.safetensors","b":"b.safetensors","\\u001b[2J":"b.safetensors"}}', "missing-tensor"),
    (b'{"weight_map":{"a":"a.safetensors"}}', "extra-file"),
    (b'{"weight_map":{"a":"b.safetensors","b":"a.safetensors"}}', "misplaced-tensor"),
]  # fmt: skip


@pytest.mark.parametrize(
    ("content", "kind"),
    [pytest.param(content, kind, id=f"{number} {kind}") for number, (content, kind) in enumerate(INDEXES)],
)
def test_a_hostile_index_is_refused(
    content: bytes, kind: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "a.safetensors").write_bytes(RIGHT["a.safetensors"])
    source_of(tmp_path, {**RIGHT, INDEX: content})
    require_refused(capsys, tmp_path, kind)
    code, said = run(capsys, "inspect", tmp_path / "source")
    assert (code, "left aside: b.safetensors" in said) == ((0, True) if kind == "extra-file" else (2, False))


def test_an_index_of_many_missing_files_is_refused_at_once(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    weight_map = {str(number): f"{number}.safetensors" for number in range(30_000)}
    source_of(tmp_path, {INDEX: json.dumps({"weight_map": weight_map}).encode()})
    code, said = run(capsys, "plan", tmp_path / "source", "--mp", "2")
    assert (code, bool(re.search(r"\.\.\. and more: 29,99\d missing-file; all of them: --json", said))) == (2, True)


def test_file_names_that_claim_many_files_are_refused_at_once(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    source_of(tmp_path, {f"{number}-00001-of-99999.safetensors": b"" for number in range(1_000)})
    code, said = run(capsys, "plan", tmp_path / "source", "--mp", "2")
    assert (code, "99999 files by their names" in said) == (2, True)


@pytest.mark.parametrize("name", [INDEX, CONFIG])
def test_what_is_too_large_to_be_read_whole_is_not_read(
    name: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """A file of holes: a download of a few bytes."""
    os.truncate(source_of(tmp_path, {**RIGHT, name: b""}) / name, 2**40)
    assert run(capsys, "plan", tmp_path / "source", "--mp", "2")[0] == 2
    with in_time(), pytest.raises(Refused, match=r"too large\n  hint: .*\n  found:    1,099,511,627,776 bytes"):
        read_checkpoint(tmp_path / "source")


# --- links, pipes and devices ---


@pytest.mark.parametrize("name", [INDEX, CONFIG, "b.safetensors"])
@pytest.mark.parametrize(
    "replace",
    [
        pytest.param(os.mkfifo, id="a pipe"),
        pytest.param(lambda path: path.symlink_to("/dev/zero"), id="a link to what never ends"),
        pytest.param(lambda path: path.symlink_to("/dev/tty"), id="a link to the terminal"),
        pytest.param(lambda path: path.symlink_to(path), id="a link to itself"),
        pytest.param(lambda path: path.symlink_to("/proc/self/mem"), id="a link to memory"),
    ],
)
def test_what_never_ends_or_never_begins_is_refused(
    name: str, replace: Callable[[Path], None], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    source = source_of(tmp_path, RIGHT)
    (source / name).unlink(missing_ok=True)
    replace(source / name)
    code, said = run(capsys, "plan", source, "--mp", "2")
    assert (code, str(name) in said, "found:" in said) == (2, True, True)
    assert run(capsys, "inspect", source)[0] == 2
    assert run(capsys, "inspect", source / name)[0] == 2


def test_a_link_out_of_the_folder_is_followed_but_no_name_of_the_index_is(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """The user named the folder, and the cache of the hub is all such links; the index is a stranger's."""
    blob = tmp_path / "blobs" / "0123"
    blob.parent.mkdir()
    blob.write_bytes(RIGHT["b.safetensors"])
    index = {"weight_map": {"a": "a.safetensors", "b": "b.safetensors"}}
    source = source_of(tmp_path, {"a.safetensors": RIGHT["a.safetensors"], INDEX: json.dumps(index).encode()})
    (source / "b.safetensors").symlink_to("../blobs/0123")
    assert read_checkpoint(source).tensors.keys() == {"a", "b"}
    for name in ("../blobs/0123", str(blob), "../blobs/0123.safetensors"):
        index["weight_map"]["b"] = name
        (source / INDEX).write_text(json.dumps(index))
        require_refused(capsys, tmp_path, "unsafe-file-name")


@pytest.mark.parametrize("name", [JOURNAL, "model0-mp2.safetensors.partial", MANIFEST + ".partial"])
def test_a_link_in_the_target_is_never_written_through(
    name: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Put there by somebody else, in a folder that others may write to."""
    victim, target = tmp_path / "victim", tmp_path / "target"
    victim.write_bytes(b"kept")
    source = tmp_path / "source"
    write_checkpoint(source, TINY, 1, sparse=True)
    target.mkdir()
    (target / name).symlink_to(victim)
    capsys.readouterr()
    assert run(capsys, "convert", source, target, "--mp", "2")[0] == 2
    assert victim.read_bytes() == b"kept"


# --- configs ---

VALUES = [
    b"-1", b"0", b"1.5", b"NaN", b"Infinity", b"1e999", b"true", b'""', b'"\\u001b[2J"', b"[]", b"{}", b"9" * 4_000,
    b'"\\ud800"',
    *(b"[" * depth + b"]" * depth for depth in (50, 900, 955, 960, 965, 970, 975, 980)), b'"' + b"x" * 1_000_000 + b'"',
]  # fmt: skip
KEYS = [
    "model_type", "architectures", "num_hidden_layers", "first_k_dense_replace", "n_routed_experts", "q_lora_rank",
    "num_attention_heads", "num_nextn_predict_layers",
]  # fmt: skip


@pytest.mark.parametrize("key", KEYS)
def test_no_value_of_a_config_leads_to_more_than_a_refusal(
    key: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    source = tmp_path / "source"
    write_checkpoint(source, TINY, 1, sparse=True)
    right: dict[str, Any] = dict(TINY)
    right.pop(key, None)
    capsys.readouterr()
    for value in VALUES:
        text = json.dumps(right).encode().removesuffix(b"}") + b', "' + key.encode() + b'":' + value + b"}"
        (source / CONFIG).write_bytes(text)
        code, said = run(capsys, "plan", source, "--mp", "2")
        assert code in {0, 2}
        assert len(said) < 20_000
        assert code == 0 or "\n  found:    " in said
        assert run(capsys, "plan", source, "--mp", "2", "--recipe", "deepseek-v3")[0] in {0, 2}


# --- names that claim too much ---


def test_what_is_missing_of_a_billion_is_named_up_to_a_limit() -> None:
    """Some names are enough to claim 30,000 layers of 30,000 experts each."""
    names = [f"model.layers.{i}.mlp.experts.0.up_proj.weight" for i in range(30_000)]
    names += [f"model.layers.0.mlp.experts.{e}.up_proj.weight" for e in range(30_000)]
    checkpoint = Checkpoint(Path("x"), (), {name: Tensor(name, "BF16", (1, 1), 0, 0, 2) for name in names}, None)
    with in_time(), pytest.raises(Refused) as refused:
        match(checkpoint, load_recipe("deepseek-v3"))
    assert len(refused.value.problems) == MOST_PROBLEMS
    assert str(refused.value).endswith("only the first 100,000 problems were looked for")
    assert len(str(refused.value)) < 20_000


def test_long_names_are_refused_at_once() -> None:
    names = [letter * 1_000_000 for letter in map(chr, range(ord("A"), ord("A") + 50))]
    checkpoint = Checkpoint(Path("x"), (), {name: Tensor(name, "BF16", (1, 1), 0, 0, 2) for name in names}, None)
    with in_time(5), pytest.raises(Refused, match="no rule"):
        match(checkpoint, load_recipe("deepseek-v3"))


# --- recipes ---

ROWS = ['["same", "a", "b", "rows"]']
LEAST = 'name="a"\nabout="b"\nleft="c"\nright="d"\nfiles="{rank}-{ranks}.safetensors"\n'


BOMB = "".join(f'sizes.{one} = "{"+".join([other] * 40)}"\n' for one, other in pairwise("abcdefghijklm"))


def recipe_of(rows: list[str], more: str = "") -> str:
    return LEAST + more + "rules = [\n" + ",\n".join(rows) + "\n]\n"


@pytest.mark.parametrize(
    "text",
    [
        pytest.param(recipe_of(['["same", "' + "." * 10_000 + '", "a", "rows"]']), id="a name of 10,000 dots"),
        pytest.param(recipe_of(['["same", "' + "{" * 10_000 + '", "a", "rows"]']), id="10,000 braces"),
        pytest.param(recipe_of(['["same", "' + "{a}" * 10_000 + '", "a", "rows"]']), id="10,000 placeholders"),
        pytest.param(
            recipe_of(['["same", "' + "{a}." * 10_000 + 'x", "a", "rows"]']), id="10,000 placeholders between dots"
        ),
        pytest.param(recipe_of([f'["some", "{number}", "a", "b"]' for number in range(1_000)]), id="1,000 faults"),
        pytest.param("".join(f"k{number} = 1\n" for number in range(2_000)), id="2,000 unknown keys"),
        pytest.param(recipe_of(ROWS, "x = " + "[" * 400 + "]" * 400 + "\n"), id="nested 400 deep"),
        pytest.param("x = " + "[" * 60_000, id="nested 60,000 deep"),
        pytest.param("x." * 3_000 + "x = 1", id="a key of 3,000 parts"),
        pytest.param("x = " + "{x=" * 20_000, id="tables nested 20,000 deep"),
        pytest.param('x = """' + "\n" * 60_000, id="a text that does not end"),
        pytest.param("x = 1" + "0" * 60_000, id="a number of 60,000 digits"),
        pytest.param(recipe_of(ROWS, BOMB), id="sizes that name each other 40 times, twelve deep"),
        pytest.param("\x1b[2J = 1", id="an escape sequence as a key"),
        pytest.param("\0", id="a zero"),
    ],
)
def test_a_hostile_recipe_is_refused_at_once(text: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "r.toml").write_text(text, encoding="utf-8")
    code, said = run(capsys, "recipes", "show", tmp_path / "r.toml")
    assert (code, "wrong recipe" in said) == (2, True)
    assert len(said) < 100_000


def test_a_fault_far_down_a_very_long_recipe_is_named_with_its_line() -> None:
    rows = [f'["same", "a{number}", "b{number}", "rows"]' for number in range(1_000)]
    with in_time(), pytest.raises(Refused) as refused:
        parse_recipe(
            recipe_of([*rows[:50], '["some", "x", "y", "rows"]', *rows[50:], '["none", "z", "z", "rows"]']), "r"
        )
    assert [(problem.subject, problem.found) for problem in refused.value.problems] == [
        ("r:57", "'some'"),
        ("r:1008", "'none'"),
    ]


def test_a_recipe_that_is_too_long_is_not_read(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "r.toml").write_bytes(b"")
    os.truncate(tmp_path / "r.toml", 2**40)
    code, said = run(capsys, "recipes", "show", tmp_path / "r.toml")
    assert (code, "too large" in said) == (2, True)


@pytest.mark.parametrize("files", ["tokenizer{rank}-{ranks}", "{rank}-{ranks}.json", "reshard{rank}{ranks}.partial"])
def test_no_rank_file_can_have_the_name_of_a_side_file(files: str) -> None:
    """A `tokenizer0-2` of the source would take the place of the first rank."""
    with pytest.raises(Refused, match=r"ends in \.safetensors"):
        parse_recipe(recipe_of(ROWS).replace("{rank}-{ranks}.safetensors", files), "r")


# --- manifests and journals ---

RANK = {"name": "a.safetensors", "rank": 0, "size": 88, "tensors": 1, "ranges": f"88 {'0' * 32}"}
SIDE = {"name": "t", "size": 1, "xxh3_128": "0" * 32}


CHANGES: list[dict[str, object]] = [
    {"name": 1}, {"name": "../a"}, {"name": "a" * 256},
    {"name": ""}, {"name": "a\0"}, {"name": "\ud800"}, {"rank": "0"}, {"rank": None},
    {"rank": True}, {"size": -1}, {"size": 1.5}, {"size": 2**64}, {"tensors": []}, {"ranges": []}, {"ranges": ""},
    {"ranges": "x y"}, {"ranges": "88"}, {"ranges": f"87 {'0' * 32}"}, {"ranges": f"-1 {'0' * 32} 89 {'0' * 32}"},
    {"ranges": f"{2**40} {'0' * 32}", "size": 2**40}, {"ranges": f"{10**9 - 1} {'0' * 32}", "size": 10**9 - 1},
    {"ranges": f"\u0668\u0668 {'0' * 32}"}, {"ranges": "88 " + "g" * 32},
]  # fmt: skip
MANIFESTS: list[dict[str, object]] = [
    {}, {"files": []}, {"ranks": 1, "files": None, "side_files": []}, {"ranks": 1, "files": [RANK]},
    {"ranks": "x", "files": [RANK], "side_files": []}, {"ranks": 1, "files": [1], "side_files": []},
    *({"ranks": 1, "files": [{**RANK, **changed}], "side_files": []} for changed in CHANGES),
    *({"ranks": 1, "files": [RANK], "side_files": [wrong]} for wrong in (1, None, {}, {**SIDE, "name": "../t"})),
]  # fmt: skip


@pytest.mark.parametrize("manifest", MANIFESTS)
def test_a_manifest_that_anyone_could_have_signed_is_refused(
    manifest: dict[str, Any], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Its own checksum is right: it guards against damage, not against strangers."""
    target = source_of(tmp_path, RIGHT)
    (target / MANIFEST).write_text(json.dumps({**manifest, "xxh3_128": compute_manifest_checksum(manifest)}))
    code, said = run(capsys, "verify", target)
    assert (code, "wrong manifest" in said) == (2, True)


def test_the_manifests_above_are_wrong_in_one_thing_only(tmp_path: Path) -> None:
    for sides in ([], [SIDE]):
        manifest = {"ranks": 1, "files": [RANK], "side_files": sides}
        text = json.dumps(manifest, sort_keys=True).encode()
        (tmp_path / MANIFEST).write_text(json.dumps({**manifest, "xxh3_128": xxh3_128_hexdigest(text)}))
        assert read_manifest(tmp_path) == manifest


def test_a_manifest_nested_as_deep_as_can_be_read_is_refused(tmp_path: Path) -> None:
    for depth in range(900, 1010):
        (tmp_path / MANIFEST).write_bytes(b'{"files":' + b"[" * depth + b"]" * depth + b"}")
        with pytest.raises(Refused):
            read_manifest(tmp_path)
        # Too deep to be written again, it has no checksum that could be compared: an empty one is none.
        begin = b'{"ranks":1,"files":[],"side_files":[],"xxh3_128":"","other":'
        (tmp_path / MANIFEST).write_bytes(begin + b"[" * depth + b"]" * depth + b"}")
        with pytest.raises(Refused):
            read_manifest(tmp_path)


@pytest.mark.parametrize(
    "line",
    [
        {"files": [".."], "others": []}, {"files": ["../victim"], "others": ["/victim"]}, {}, [], None,
        {"files": ["x" * 300], "others": []}, {"files": ["a\0"], "others": ["\ud800"]}, {"files": 1, "others": []},
        {"files": [1, None, {}], "others": []}, {"files": {"..": 1}, "others": "."},
    ],
)  # fmt: skip
def test_a_journal_names_nothing_outside_its_folder(line: object, tmp_path: Path) -> None:
    (tmp_path / "victim").write_bytes(b"kept")
    target = source_of(tmp_path, {JOURNAL: json.dumps(line).encode() + b"\n"})
    assert list_left_files(target) == set()


# --- the terminal ---


def test_every_letter_that_a_terminal_could_obey_is_escaped() -> None:
    assert not is_raw(escape("".join(map(chr, range(sys.maxunicode + 1)))).replace("\n", "\r"))
    assert escape("\n\x1b\u202e") == r"\n\x1b\u202e"
    assert all(escape(chr(code)) == chr(code) for code in [*range(0x20, 0x7F), 0xE9, 0x4E2D, 0x1F600])


@pytest.mark.parametrize("encoding", ["ascii", "latin-1", "utf-8"])
def test_a_terminal_without_the_letters_of_a_name_gets_them_escaped(encoding: str, tmp_path: Path) -> None:
    source = source_of(tmp_path, {"a.safetensors": save({"\u00e9\U0001f600": np.ones(1)})})
    command = [sys.executable, "-m", "reshard", "inspect", str(source)]
    done = subprocess.run(command, env={**os.environ, "PYTHONIOENCODING": encoding}, capture_output=True, check=False)
    assert (done.returncode, done.stderr) == (0, b"")
    assert (rb"\U0001f600" in done.stdout) == (encoding != "utf-8")


def test_a_long_name_is_cut_for_people_and_whole_for_machines(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    name = "a" * 1_000_000
    source_of(tmp_path, {"a.safetensors": save({name: np.ones(1)})})
    words = ["plan", str(tmp_path / "source"), "--mp", "1", "--recipe", "deepseek-v3"]
    assert f"{'a' * LONGEST_DETAIL}... (1,000,000 characters): no rule" in run(capsys, *words)[1]
    assert f'"subject": "{name}"' in run(capsys, *words, "--json")[1]


# --- what the fuzzer found ---


@pytest.mark.parametrize("path", sorted(fuzz.SEEDS.glob("*/*")), ids=lambda path: f"{path.parent.name} {path.name}")
def test_a_seed_of_the_fuzzer_gives_nothing_but_a_refusal(path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    with in_time():
        fuzz.TARGETS[path.parent.name](path.read_bytes())
    assert capsys.readouterr().err == ""


def test_every_target_of_the_fuzzer_has_seeds() -> None:
    assert {path.name for path in fuzz.SEEDS.iterdir()} == set(fuzz.TARGETS)
    assert all(stat.S_ISREG(path.stat().st_mode) for path in fuzz.SEEDS.glob("*/*"))
