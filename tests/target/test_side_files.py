"""The files beside the tensors: which go along, which stay behind and are said, and how large ones are copied."""

import json
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
from refusals import TINY
from xxhash import xxh3_128_hexdigest

from reshard import api
from reshard.cli.main import main
from reshard.errors import Refused
from reshard.execution.execute import Settings
from reshard.execution.side_writer import LARGEST_READ, SideFile, read_side_file
from reshard.formats.target_names import list_names
from reshard.planning.plan import Plan
from reshard.recipes.recipe import FAMILIES_FOLDER
from reshard.storage.counting import WorkCounter
from reshard.synthetic import write_checkpoint
from reshard.target.preflight import look_at_target
from reshard.target.writing import write_target

LEFT_ENDINGS = [
    *("pytorch_model-00001-of-00002.bin", "pytorch_model.bin.index.json", "consolidated.00.pth", "model.PT"),
    *("last.ckpt", "model-Q4_K_M.gguf", "model.ggml", "tf_model.h5", "tf_model.h5.index.json", "flax_model.msgpack"),
    *("flax_model.msgpack.index.json", "model.onnx", "model.onnx_data", "rust_model.ot", "model.tflite"),
    *("model.mlmodel", "weights.npz", "model.nemo", "__0_0.distcp", "state.pkl", "state.pickle", "optimizer.pt"),
    *("scheduler.pt", "rng_state.pth", "training_args.bin", "pytorch_model.bin.index.fp16.json"),
]
ALIKE = [
    *("tokenizer.model", "vocab.pt.json", "README.bin.md", "bin", "model_index.json", "gguf.txt", "convert_to_onnx.py"),
    *("index.json", "LICENSE.1", "notes.old", "ckpt.yaml"),
]


@pytest.fixture(scope="module")
def origin(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("origin") / "source"
    write_checkpoint(folder, TINY, 1)
    return folder


@pytest.fixture
def source(origin: Path, tmp_path: Path) -> Path:
    shutil.copytree(origin, tmp_path / "source")
    return tmp_path / "source"


def read_texts(plan: Plan) -> list[str]:
    return [note.text for note in plan.notes if note.kind == "left-behind"]


@pytest.mark.parametrize("name", LEFT_ENDINGS)
def test_other_formats_stay_behind_and_are_said(name: str, source: Path, tmp_path: Path) -> None:
    (source / name).write_bytes(bytes(5))
    done = api.convert(source, tmp_path / "target", to="hf", cast="bf16")
    assert not (tmp_path / "target" / name).exists()
    assert read_texts(done.plan) == [f"left behind: 1 file in other formats ({name}), 5 bytes"]
    assert f"\nnote: left behind: 1 file in other formats ({name}), 5 bytes\n" in f"{done}\n"


def test_names_that_only_look_like_them_go_along(source: Path, tmp_path: Path) -> None:
    for name in ALIKE:
        (source / name).write_text(f'"{name}"', encoding="utf-8")
    done = api.convert(source, tmp_path / "target", to="hf")
    assert [name for name in ALIKE if (tmp_path / "target" / name).read_text(encoding="utf-8") != f'"{name}"'] == []
    assert done.plan.notes == ()


def test_they_are_said_in_one_line_with_a_count_and_their_size(
    source: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    names = [f"pytorch_model-000{number:02}-of-00020.bin" for number in range(1, 21)]
    for name in names:
        (source / name).write_bytes(bytes(1 << 10))
    (source / "vocab.txt.xltd").write_bytes(bytes(7))
    (source / "model.safetensors.bak").write_bytes(bytes(9))
    for name in ("original", "inference", ".git", ".cache"):
        (source / name).mkdir()
    wanted = [
        "left behind: 1 file of weights put aside (model.safetensors.bak), 9 bytes",
        f"left behind: 20 files in other formats ({', '.join(names[:3])} and 17 more), 20.00 KiB",
        "left behind: 1 file not wholly downloaded (vocab.txt.xltd), 7 bytes",
        "left behind: 2 folders (inference, original)",
    ]
    assert main(["plan", str(source), "--to", "hf"]) == 0
    shown = capsys.readouterr().out.splitlines()
    assert [line for line in shown if line.startswith("note: ")] == [f"note: {text}" for text in wanted]
    assert main(["convert", str(source), str(tmp_path / "target"), "--to", "hf", "--json"]) == 0
    notes = json.loads(capsys.readouterr().out)["notes"]
    assert notes == [{"kind": "left-behind", "text": text} for text in wanted]
    written = {path.name for path in (tmp_path / "target").iterdir()}
    assert written == {"model.safetensors", "reshard.json", "config.json", "tokenizer.json", "tokenizer_config.json"}


def test_what_lies_beside_a_single_file_is_not_counted_as_its_folders(source: Path) -> None:
    (source / "pictures").mkdir()
    (file,) = source.glob("*.safetensors")
    assert read_texts(api.plan(file, to="hf")) == []
    assert read_texts(api.plan(source, to="hf")) == ["left behind: 1 folder (pictures)"]


def test_ranks_and_chosen_tensors_take_only_what_was_asked_for(source: Path) -> None:
    (source / "pytorch_model.bin").write_bytes(bytes(5))
    (source / "original").mkdir()
    assert read_texts(api.plan(source, mp=2)) == []
    assert read_texts(api.plan(source, to="hf", only=["*norm*"])) == []


@pytest.mark.parametrize(("carry", "goes"), [('["*token*"]', False), ('["tokenizer.bin", "*.json"]', True)])
@pytest.mark.parametrize("layout", [{"mp": 1}, {"to": "hf"}])
def test_a_recipe_that_names_the_ending_takes_it_along(
    carry: str,
    goes: bool,  # noqa: FBT001
    layout: dict[str, object],
    source: Path,
    tmp_path: Path,
) -> None:
    text = (FAMILIES_FOLDER / "deepseek-v3.toml").read_text(encoding="utf-8")
    (tmp_path / "mine.toml").write_text(text.replace('["*token*"]', carry), encoding="utf-8")
    (source / "tokenizer.bin").write_bytes(b"words")
    done = api.convert(source, tmp_path / "target", **layout, recipe=str(tmp_path / "mine.toml"))  # type: ignore[arg-type]
    assert (tmp_path / "target" / "tokenizer.bin").exists() is goes
    said = [] if goes else ["left behind: 1 file in other formats (tokenizer.bin), 5 bytes"]
    assert read_texts(done.plan) == said


@pytest.mark.parametrize("size", [0, 1, LARGEST_READ - 1, LARGEST_READ, 3 * LARGEST_READ + 5])
def test_files_of_any_size_are_copied_checked_and_written_again(size: int, source: Path, tmp_path: Path) -> None:
    content = bytes(range(251)) * (size // 251 + 1)
    content, target = content[:size], tmp_path / "target"
    (source / "tokens.dat").write_bytes(content)
    api.convert(source, target, 2)
    assert (target / "tokens.dat").read_bytes() == content
    entries = json.loads((target / "reshard.json").read_text(encoding="utf-8"))["side_files"]
    (entry,) = [entry for entry in entries if entry["name"] == "tokens.dat"]
    assert entry == {"name": "tokens.dat", "size": size, "xxh3_128": xxh3_128_hexdigest(content)}
    assert api.verify(target).is_proven
    (target / "tokens.dat").unlink()
    assert api.convert(source, target, 2).mended == ["tokens.dat"]
    assert (target / "tokens.dat").read_bytes() == content
    if size:
        (target / "tokens.dat").write_bytes(content[:-1] + bytes([content[-1] ^ 1]))
        assert [problem.subject for problem in api.verify(target).problems] == ["tokens.dat"]


PAGE = b"\n<!DOCTYPE html>\n<html><head><title>Sign in</title></head></html>"
POINTER = b"version https://git-lfs.github.com/spec/v1\noid sha256:1\nsize 5\n"


@pytest.mark.parametrize(
    ("name", "content", "kind", "found"),
    [
        ("tokenizer.json", PAGE, "wrong-download", "a web page: Sign in"),
        ("tokenizer.json", b"\xef\xbb\xbf" + PAGE, "wrong-download", "a web page: Sign in"),
        ("tokenizer_config.json", b"Entry not found", "wrong-download", "a text: Entry not found"),
        (
            "tokenizer.json",
            b'{"error": "Repository not found"}',
            "wrong-download",
            "an error of the server: Repository",
        ),
        ("tokenizer.json", POINTER, "lfs-pointer", "a git-lfs pointer"),
        ("tokenizer.json", bytes(5000), "unfinished-download", "zeros only"),
        ("tokenizer.model", PAGE, "wrong-download", "a web page: Sign in"),
        ("tokenizer.model", POINTER, "lfs-pointer", "a git-lfs pointer"),
    ],
)
def test_another_thing_under_the_name_of_a_side_file_is_refused(
    name: str, content: bytes, kind: str, found: str, source: Path, tmp_path: Path
) -> None:
    (source / name).write_bytes(content)
    for layout in ({"mp": 1}, {"to": "hf"}):
        with pytest.raises(Refused) as refused:
            api.convert(source, tmp_path / "target", **layout)
        (problem,) = refused.value.problems
        assert (problem.kind, problem.subject) == (kind, str(source / name))
        assert problem.found.startswith(found)
    assert not (tmp_path / "target").exists()


@pytest.mark.parametrize(
    ("name", "content"),
    [
        ("tokenizer.model", b"\n\x0e\n\x05<unk>\x15\0\0\0\0\x18\x02"),
        ("tokens.html", PAGE),
        ("tokenizer.tiktoken", b"IQ== 0\nIg== 1\n"),
        ("token.json", b'"a text"'),
        ("token.json", b"7"),
        ("token.json", b"// said above\n{}"),
        ("token.json", b'[{"error": 1}]'),
        ("token.json", b'{"message": "m", "added_tokens": []}'),
        ("token.json", b'\xef\xbb\xbf {"a": "' + b"long" * 2000 + b'"}'),
        ("token.json", b""),
    ],
)
def test_what_may_be_what_its_name_says_goes_along(name: str, content: bytes, source: Path, tmp_path: Path) -> None:
    (source / name).write_bytes(content)
    api.convert(source, tmp_path / "target", 1)
    assert (tmp_path / "target" / name).read_bytes() == content


def append(path: Path) -> None:
    with path.open("ab") as file:
        file.write(b"more")


def replace_by_a_folder(path: Path) -> None:
    path.unlink()
    path.mkdir()


@pytest.mark.parametrize(
    ("change", "kind"), [(append, "source-changed"), (Path.unlink, "cannot-read"), (replace_by_a_folder, "cannot-read")]
)
def test_one_that_changes_before_it_is_copied_is_refused(
    change: Callable[[Path], None], kind: str, source: Path, tmp_path: Path
) -> None:
    state = look_at_target(api.plan(source, 2), tmp_path / "target")
    change(source / "tokenizer.json")
    with pytest.raises(Refused) as error:
        write_target(state, WorkCounter(None, 0, writes=True), Settings())
    assert [(problem.kind, problem.subject) for problem in error.value.problems] == [
        (kind, str(source / "tokenizer.json"))
    ]
    assert not (tmp_path / "target").exists()
    assert api.convert(source, tmp_path / "target", 2).done


def test_one_that_grows_while_it_is_copied_is_refused_and_not_read_on(tmp_path: Path) -> None:
    path = tmp_path / "log"
    path.write_bytes(bytes(2 * LARGEST_READ))
    parts = read_side_file(SideFile(path, 2 * LARGEST_READ, path.stat().st_mtime_ns))
    sizes = [len(next(parts))]
    append(path)
    with pytest.raises(Refused) as error:
        sizes.extend(map(len, parts))
    assert error.value.problems[0].kind == "source-changed"
    assert sizes == [LARGEST_READ, LARGEST_READ]


def test_there_must_be_room_for_large_ones_and_they_are_said(source: Path, tmp_path: Path) -> None:
    size = shutil.disk_usage(tmp_path).total  # not what is free now: others remove files meanwhile
    with (source / "film.mkv").open("wb") as file:
        file.truncate(min(size, 15 << 40))
    notes = [note for note in api.plan(source, to="hf").notes if note.kind == "large-side-files"]
    assert [note.text.split(",")[0] for note in notes] == ["copied along: 4 files beside the tensors (film.mkv"]
    with pytest.raises(Refused) as error:
        api.convert(source, tmp_path / "target", to="hf")
    assert error.value.problems[0].kind == "no-space"
    assert not (tmp_path / "target").exists()


@pytest.mark.parametrize("name", ["convert", "plan"])
def test_a_source_is_looked_at_once(name: str, source: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """On a network file system each list of a large folder takes its time, and two may differ."""
    looked: list[Path] = []

    def list_and_count(folder: Path) -> list[str]:
        looked.append(folder)
        return list_names(folder)

    monkeypatch.setattr("reshard.target.side_files.list_names", list_and_count)
    getattr(api, name)(source, mp=2, target=tmp_path / "target")
    assert looked == [source]
