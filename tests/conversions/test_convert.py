"""Whole conversions: compared byte for byte with the oracle and the script, and what is left where one fails."""

import json
import os
import re
import runpy
import shutil
import signal
import subprocess
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from random import Random

import checkpoints
import oracle
import pytest
import torch
from jobs import Job, convert_checkpoint, plan_conversion
from safetensors import deserialize, safe_open
from safetensors.torch import load_file, save_file
from torch import Tensor

from reshard.errors import Refused
from reshard.formats.part_manifests import name_part_manifest
from reshard.synthetic import SMALL_V3, write_checkpoint
from reshard.verification.checksums import audit_target

RANKS = [1, 2, 4, 8, 16]
SOURCES = [
    "v2",
    "v2-lite",
    "v3",
    "fp8",
    "without-index",
    "one-file",
    "without-config",
    "shuffled",
    "scales-apart",
]
MTP_LAYER = 11
MANIFEST = "reshard.json"
RUN_CONFIG = "run_config.json"
SIDE_FILES = sorted([*checkpoints.TOKENIZER_FILES, RUN_CONFIG])


@pytest.fixture(scope="session")
def sources(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """One folder for each checkpoint, by name; all from `fp8` on hold the same tensors, an MTP layer among them."""
    root = tmp_path_factory.mktemp("sources")
    found = {name: root / name for name in SOURCES}
    checkpoints.write_deepseek_v2(found["v2"], q_lora=True)
    checkpoints.write_deepseek_v2(found["v2-lite"], q_lora=False)
    checkpoints.write_deepseek_v3(found["v3"])
    checkpoints.quantize(found["v3"], found["fp8"])
    checkpoints.add_mtp(found["fp8"], MTP_LAYER)
    for name in SOURCES[4:]:
        shutil.copytree(found["fp8"], found[name])
    checkpoints.without_index(found["without-index"])
    checkpoints.merge_to_one_file(found["one-file"])
    (found["without-config"] / "config.json").unlink()
    shuffle_files(found["shuffled"])
    move_scales(found["scales-apart"])
    return found


def shuffle_files(folder: Path) -> None:
    """Store the tensors of each file in another order, under a header that safetensors would not write."""
    for number, path in enumerate(sorted(folder.glob("*.safetensors"))):
        content = path.read_bytes()
        start = 8 + int.from_bytes(content[:8], "little")
        header = json.loads(content[8:start])
        metadata = header.pop("__metadata__")
        pieces: list[bytes] = []
        entries = {}
        for name in Random(number).sample(sorted(header), len(header)):
            begin, end = header[name]["data_offsets"]
            place = sum(map(len, pieces))
            pieces.append(content[start + begin : start + end])
            entries[name] = header[name] | {"data_offsets": [place, place + end - begin]}
        # Eight bytes are the alignment of some readers, among them the oracle's; ours needs none.
        text = json.dumps(dict(sorted(entries.items())) | {"__metadata__": metadata}, indent=1).encode()
        text += b" " * (-len(text) % 8)
        path.write_bytes(len(text).to_bytes(8, "little") + text + b"".join(pieces))


def move_scales(folder: Path) -> None:
    """Store every block scale in one file, and every other tensor in another one."""
    tensors = checkpoints.load_checkpoint(folder)
    for path in folder.glob("*.safetensors"):
        path.unlink()
    scales = {name: tensor for name, tensor in tensors.items() if name.endswith("_scale_inv")}
    save_file(scales, folder / "a.safetensors")
    save_file({name: tensor for name, tensor in tensors.items() if name not in scales}, folder / "b.safetensors")
    checkpoints._write_index(folder)


def read_folder(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in folder.iterdir()}


def differences(left: Path, right: Path) -> list[str]:
    """The names of the files that only one folder has, or whose bytes are not equal; what we add apart."""
    ours, theirs = read_folder(left), read_folder(right)
    return sorted(
        name for name in (ours.keys() | theirs.keys()) - {MANIFEST, RUN_CONFIG} if ours.get(name) != theirs.get(name)
    )


# --- the bytes ---


@pytest.mark.parametrize(
    ("name", "ranks"), [(name, ranks) for name in SOURCES for ranks in (RANKS if name in SOURCES[:4] else (1, 8))]
)
def test_every_file_is_the_oracles(name: str, ranks: int, sources: dict[str, Path], tmp_path: Path) -> None:
    convert_checkpoint(Job(sources[name], ranks), tmp_path / "ours")
    oracle.convert(sources[name], tmp_path / "oracle", ranks, mtp_layers=[MTP_LAYER])
    assert differences(tmp_path / "ours", tmp_path / "oracle") == []
    assert len(list((tmp_path / "ours").glob("model*.safetensors"))) == ranks


def test_a_single_file_is_a_source_like_its_folder(sources: dict[str, Path], tmp_path: Path) -> None:
    convert_checkpoint(Job(sources["one-file"] / "model.safetensors", 4), tmp_path / "ours")
    oracle.convert(sources["one-file"], tmp_path / "oracle", 4, mtp_layers=[MTP_LAYER])
    assert differences(tmp_path / "ours", tmp_path / "oracle") == []


def test_whole_files_hold_every_tensor_whole(tmp_path: Path) -> None:
    """Also those behind the first file, and with MTP layers, which a target in the layout of the source keeps."""
    write_checkpoint(tmp_path / "source", SMALL_V3, 3)
    job = Job(tmp_path / "source", 1, to="hf", max_file_size=4_000_000)
    assert len(convert_checkpoint(job, tmp_path / "target").plan.files) > 10
    found = {}
    for path in sorted((tmp_path / "target").glob("*.safetensors")):
        assert path.stat().st_size < 4_100_000
        found.update(tensors_of(path))
    source = {}
    for path in (tmp_path / "source").glob("*.safetensors"):
        source.update(tensors_of(path))
    assert found == source


def tensors_of(path: Path) -> dict[str, tuple[str, tuple[int, ...], bytes]]:
    """Dtype, shape and bytes of each tensor, by the safetensors package."""
    entries = deserialize(path.read_bytes())  # type: ignore[no-untyped-call]
    return {name: (entry["dtype"], tuple(entry["shape"]), bytes(entry["data"])) for name, entry in entries}


def test_side_files_are_those_of_the_checkpoint(sources: dict[str, Path], tmp_path: Path) -> None:
    convert_checkpoint(Job(sources["v2"], 1), tmp_path)
    written = read_folder(tmp_path)
    assert written.keys() == {"model0-mp1.safetensors", MANIFEST, *SIDE_FILES}
    assert {name: written[name] for name in checkpoints.TOKENIZER_FILES} == checkpoints.TOKENIZER_FILES


def test_hidden_files_and_folders_are_no_side_files(sources: dict[str, Path], tmp_path: Path) -> None:
    """The script's `*token*` does not match `.hf_token`, which may well hold a secret."""
    shutil.copytree(sources["v2"], tmp_path / "source")
    (tmp_path / "source" / ".hf_token").write_text("secret")
    (tmp_path / "source" / "tokens").mkdir()
    convert_checkpoint(Job(tmp_path / "source", 1), tmp_path / "ours")
    assert read_folder(tmp_path / "ours").keys() == {
        "model0-mp1.safetensors",
        MANIFEST,
        *SIDE_FILES,
    }


def test_links_to_files_go_along_as_files_and_links_to_folders_do_not(sources: dict[str, Path], tmp_path: Path) -> None:
    shutil.copytree(sources["v2"], tmp_path / "source")
    (tmp_path / "elsewhere").mkdir()
    (tmp_path / "elsewhere" / "blob").write_bytes(b"words")
    (tmp_path / "source" / "my_tokens.txt").symlink_to(tmp_path / "elsewhere" / "blob")
    (tmp_path / "source" / "tokenizers").symlink_to(tmp_path / "elsewhere")
    convert_checkpoint(Job(tmp_path / "source", 1), tmp_path / "ours")
    assert not (tmp_path / "ours" / "my_tokens.txt").is_symlink()
    assert (tmp_path / "ours" / "my_tokens.txt").read_bytes() == b"words"
    assert not (tmp_path / "ours" / "tokenizers").exists()


def test_links_to_nothing_are_refused_all_of_them(sources: dict[str, Path], tmp_path: Path) -> None:
    """The blob of a tokenizer that did not arrive: nobody could use what would come out without it."""
    source = tmp_path / "source"
    shutil.copytree(sources["v2"], source)
    (source / "tokenizer.model").symlink_to("blob that is gone")
    (source / "token_loop").symlink_to("token_loop")
    (source / ".hidden_token").symlink_to("nowhere")
    (source / "readme").symlink_to("nowhere")
    with pytest.raises(Refused) as error:
        convert_checkpoint(Job(source, 1), tmp_path / "ours")
    found = [(problem.kind, problem.subject, problem.found) for problem in error.value.problems]
    lost = [str(source / "token_loop"), str(source / "tokenizer.model")]
    assert found == [("missing-file", path, "a link to nothing") for path in lost]
    assert not (tmp_path / "ours").exists()


def test_weights_are_no_side_files_whatever_their_name(sources: dict[str, Path], tmp_path: Path) -> None:
    shutil.copytree(sources["one-file"], tmp_path / "source")
    (tmp_path / "source" / "model.safetensors").rename(tmp_path / "source" / "tokens.safetensors")
    convert_checkpoint(Job(tmp_path / "source", 1), tmp_path / "ours")
    assert [path.name for path in (tmp_path / "ours").glob("*.safetensors")] == ["model0-mp1.safetensors"]


@pytest.mark.parametrize(("name", "only"), [("fp8", [0]), ("fp8", [3, 1]), ("v2", [2, 3])])
def test_chosen_ranks_are_those_of_a_full_run(
    name: str, only: list[int], sources: dict[str, Path], tmp_path: Path
) -> None:
    convert_checkpoint(Job(sources[name], 4), tmp_path / "all")
    convert_checkpoint(Job(sources[name], 4, ranks=only), tmp_path / "some")
    wanted = {f"model{rank}-mp4.safetensors" for rank in only}
    assert {path.name for path in (tmp_path / "some").glob("*.safetensors")} == wanted
    others = {f"model{rank}-mp4.safetensors" for rank in range(4)} - wanted
    assert differences(tmp_path / "all", tmp_path / "some") == sorted({*others, name_part_manifest(only)})


@pytest.mark.parametrize("only", [[4], [0, -1]])
def test_a_rank_that_there_is_not_is_refused(only: list[int], sources: dict[str, Path], tmp_path: Path) -> None:
    with pytest.raises(Refused, match="ranks from 0 to 3"):
        convert_checkpoint(Job(sources["v2"], 4, ranks=only), tmp_path / "ours")
    assert not (tmp_path / "ours").exists()


@pytest.mark.parametrize("experts", [8, 32])
def test_a_wrong_number_of_experts_is_refused(experts: int, sources: dict[str, Path], tmp_path: Path) -> None:
    with pytest.raises(Refused, match="16, by the names of the tensors"):
        convert_checkpoint(Job(sources["v2"], 4, n_experts=experts), tmp_path / "ours")
    assert not (tmp_path / "ours").exists()
    convert_checkpoint(Job(sources["v2"], 4, n_experts=16), tmp_path / "ours")


def test_tied_embeddings_are_refused_for_want_of_a_head(sources: dict[str, Path], tmp_path: Path) -> None:
    shutil.copytree(sources["v2"], tmp_path / "tied")
    checkpoints.merge_to_one_file(tmp_path / "tied")
    tensors = checkpoints.load_checkpoint(tmp_path / "tied")
    del tensors["lm_head.weight"]
    save_file(tensors, tmp_path / "tied" / "model.safetensors")
    with pytest.raises(Refused) as refused:
        convert_checkpoint(Job(tmp_path / "tied", 2), tmp_path / "ours")
    assert [(problem.kind, problem.subject) for problem in refused.value.problems] == [
        ("missing-tensor", "lm_head.weight")
    ]
    assert not (tmp_path / "ours").exists()


def test_progress_tells_of_every_byte(sources: dict[str, Path], tmp_path: Path) -> None:
    told: list[int] = []

    @contextmanager
    def progress(total: int) -> Iterator[Callable[[int], None]]:
        told.append(-total)
        yield told.append

    convert_checkpoint(Job(sources["fp8"], 4), tmp_path, progress=progress)
    written = [path.stat().st_size for path in tmp_path.iterdir() if path.name != "reshard.json"]
    assert -told[0] == sum(written) > plan_conversion(Job(sources["fp8"], 4)).size
    assert sum(told) == 0
    assert min(told[1:]) >= 0


# --- with the script ---


@pytest.fixture(scope="session")
def reference(request: pytest.FixtureRequest) -> Path:
    """The script given by `--reference PATH`."""
    path = request.config.getoption("--reference", default=None)
    if path is None:
        pytest.skip("needs --reference PATH, a runnable copy of the script that reshard replaces")
    return Path(path)


def require_the_bytes_of_the_script(reference: Path, source: Path, ranks: int, folder: Path) -> None:
    experts = checkpoints.read_config(source)["n_routed_experts"]
    runpy.run_path(str(reference))["main"](str(source), str(folder / "script"), experts, ranks)
    convert_checkpoint(Job(source, ranks), folder / "ours")
    assert differences(folder / "ours", folder / "script") == []


@pytest.mark.parametrize("ranks", RANKS)
@pytest.mark.parametrize("name", ["v2", "v2-lite", "v3"])
def test_every_file_is_the_scripts(
    name: str, ranks: int, sources: dict[str, Path], reference: Path, tmp_path: Path
) -> None:
    require_the_bytes_of_the_script(reference, sources[name], ranks, tmp_path)


@pytest.mark.parametrize("ranks", [1, 2, 4])
def test_every_file_is_the_scripts_for_fp8_and_its_mtp_layer(ranks: int, reference: Path, tmp_path: Path) -> None:
    """With as many layers as DeepSeek-V3, for the script drops layer 61 and no other; all cuts end on a block."""
    sizes = {"hidden_size": 32, "q_lora_rank": 16, "kv_lora_rank": 16, "moe_intermediate_size": 512}
    config = {**SMALL_V3, **sizes, "num_hidden_layers": 61, "n_routed_experts": 4, "vocab_size": 64}
    write_checkpoint(tmp_path / "source", config, 3)
    require_the_bytes_of_the_script(reference, tmp_path / "source", ranks, tmp_path)


# --- the manifest and the modes ---


def test_the_manifest_depends_on_the_content_alone(sources: dict[str, Path], tmp_path: Path) -> None:
    shutil.copytree(sources["fp8"], tmp_path / "elsewhere")
    for number, source in enumerate((sources["fp8"], sources["fp8"], tmp_path / "elsewhere")):
        convert_checkpoint(Job(source, 2), tmp_path / f"ours{number}")
    manifests = {(tmp_path / f"ours{number}" / MANIFEST).read_bytes() for number in range(3)}
    assert len(manifests) == 1
    text = manifests.pop().decode()
    for place in (tmp_path, sources["fp8"].parent, Path.home()):
        assert str(place) not in text
    # As a word: a name as short as `vm` may well stand in a hash or in what is packed.
    assert not re.search(rf"(?<![\w+/]){re.escape(os.uname().nodename)}(?![\w+/])", text)
    assert all(word not in text for word in ("time", "seconds"))


def test_the_manifest_tells_what_lies_beside_it(sources: dict[str, Path], tmp_path: Path) -> None:
    convert_checkpoint(Job(sources["fp8"], 4), tmp_path)
    manifest = json.loads((tmp_path / MANIFEST).read_bytes())
    for rank, file in enumerate(manifest["files"]):
        path = tmp_path / f"model{rank}-mp4.safetensors"
        assert (file["name"], file["rank"], file["size"]) == (path.name, rank, path.stat().st_size)
        with safe_open(path, framework="pt") as opened:
            assert file["tensors"] == len(opened.keys())
    assert len(manifest["files"]) == manifest["ranks"] == 4
    assert [file["name"] for file in manifest["side_files"]] == SIDE_FILES
    assert manifest["counts"] == {"layers": 11, "dense layers": 1, "expert layers": 10, "experts": 16, "MTP layers": 1}
    stored = checkpoints.load_checkpoint(sources["fp8"])
    assert sum(share["tensors"] for share in manifest["coverage"]) == len(stored)
    assert sum(share["bytes"] for share in manifest["coverage"]) == sum(tensor.nbytes for tensor in stored.values())
    dropped = [share for share in manifest["coverage"] if share["use"] == "dropped"]
    assert [share["tensors"] for share in dropped] == [sum(".layers.11." in name for name in stored)]


@contextmanager
def umask(mask: int) -> Iterator[None]:
    before = os.umask(mask)
    try:
        yield
    finally:
        os.umask(before)


@pytest.mark.parametrize(("mask", "mode"), [(0o022, 0o644), (0o027, 0o640), (0o077, 0o600)])
def test_the_mode_of_every_file_follows_the_umask(
    mask: int, mode: int, sources: dict[str, Path], tmp_path: Path
) -> None:
    with umask(mask):
        convert_checkpoint(Job(sources["v2"], 2), tmp_path / "ours")
    assert {path.name: path.stat().st_mode & 0o7777 for path in (tmp_path / "ours").iterdir()} == dict.fromkeys(
        ("model0-mp2.safetensors", "model1-mp2.safetensors", MANIFEST, *SIDE_FILES), mode
    )


# --- what is left where a conversion fails ---


def final_names(folder: Path) -> list[str]:
    """What seems to be there for use: rank files, the tokenizer's files, the manifest."""
    patterns = ("*.safetensors", "*.json", "*token*")
    return sorted({path.name for pattern in patterns for path in folder.glob(pattern) if path.suffix != ".partial"})


def run_python(code: str, *arguments: object) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-c", code, *map(str, arguments)]
    return subprocess.run(command, check=False, capture_output=True, text=True)


def test_a_conversion_leaves_nothing_but_its_files(sources: dict[str, Path], tmp_path: Path) -> None:
    convert_checkpoint(Job(sources["v3"], 2), tmp_path)
    names = {"model0-mp2.safetensors", "model1-mp2.safetensors", MANIFEST, *SIDE_FILES}
    assert {str(path.relative_to(tmp_path)) for path in tmp_path.rglob("*")} == names


def test_a_write_that_fails_leaves_no_final_name(sources: dict[str, Path], tmp_path: Path) -> None:
    """Files may not grow beyond 300,000 bytes, as on a disk that is full."""
    code = """
import resource, sys
from reshard.cli.main import main
resource.setrlimit(resource.RLIMIT_FSIZE, (300_000, resource.RLIM_INFINITY))
sys.exit(main(["convert", sys.argv[1], sys.argv[2], "--mp", "4"]))
"""
    done = run_python(code, sources["fp8"], tmp_path / "ours")
    assert done.returncode == 2, done.stderr
    assert "File too large" in done.stderr
    assert "Traceback" not in done.stderr
    assert not (tmp_path / "ours").exists()
    require_the_oracles_after_all(sources["fp8"], tmp_path)


def require_the_oracles_after_all(source: Path, folder: Path) -> None:
    """The same conversion for 4 ranks into the same folder `ours`, once more, ends well."""
    convert_checkpoint(Job(source, 4), folder / "ours")
    oracle.convert(source, folder / "oracle", 4, mtp_layers=[MTP_LAYER])
    assert differences(folder / "ours", folder / "oracle") == []


@pytest.mark.parametrize("bytes_kept", [0.0, 0.5, 0.999])
def test_a_source_that_shrinks_is_refused(bytes_kept: float, sources: dict[str, Path], tmp_path: Path) -> None:
    shutil.copytree(sources["one-file"], tmp_path / "source")
    weights = tmp_path / "source" / "model.safetensors"

    @contextmanager
    def shrinking(_total: int) -> Iterator[Callable[[int], None]]:
        """Between the plan and the first byte. The last bytes are those of layer 9: a tensor that is kept."""
        os.truncate(weights, int(weights.stat().st_size * bytes_kept))
        yield lambda _: None

    with pytest.raises(Refused) as refused:
        convert_checkpoint(Job(tmp_path / "source", 4), tmp_path / "ours", progress=shrinking)
    assert [problem.kind for problem in refused.value.problems] == ["source-changed"]
    assert "model.safetensors" in refused.value.problems[0].subject
    assert final_names(tmp_path / "ours") == []


def test_a_source_that_vanishes_is_refused(sources: dict[str, Path], tmp_path: Path) -> None:
    shutil.copytree(sources["fp8"], tmp_path / "source")
    third = sorted((tmp_path / "source").glob("*.safetensors"))[2]

    @contextmanager
    def vanishing(_total: int) -> Iterator[Callable[[int], None]]:
        third.unlink()
        yield lambda _: None

    with pytest.raises(Refused, match=re.escape(third.name)):
        convert_checkpoint(Job(tmp_path / "source", 4), tmp_path / "ours", progress=vanishing)
    assert final_names(tmp_path / "ours") == []


def test_an_interrupt_leaves_no_final_name(sources: dict[str, Path], tmp_path: Path) -> None:
    @contextmanager
    def interrupted(total: int) -> Iterator[Callable[[int], None]]:
        done = 0

        def advance(size: int) -> None:
            nonlocal done
            done += size
            if done > total // 2:
                raise KeyboardInterrupt

        yield advance

    with pytest.raises(KeyboardInterrupt):
        convert_checkpoint(Job(sources["fp8"], 4), tmp_path / "ours", progress=interrupted)
    assert not (tmp_path / "ours").exists()  # nothing was durable yet
    require_the_oracles_after_all(sources["fp8"], tmp_path)


def test_a_kill_leaves_no_final_name(sources: dict[str, Path], tmp_path: Path) -> None:
    code = """
import os, signal, sys, reshard
def killed(done, total):
    if done > total // 2:
        os.kill(os.getpid(), signal.SIGKILL)
reshard.convert(sys.argv[1], sys.argv[2], mp=4, progress=killed)
"""
    assert run_python(code, sources["fp8"], tmp_path / "ours").returncode == -signal.SIGKILL
    assert len(list((tmp_path / "ours").iterdir())) >= 4
    assert final_names(tmp_path / "ours") == []
    require_the_oracles_after_all(sources["fp8"], tmp_path)


# --- odd tensors, by a recipe of the user's own ---

ODD_RECIPE = """
name = "odd"
about = "one tensor a row"
left = "one"
right = "other"
files = "part-{rank}-of-{ranks}.safetensors"
rules = [
%s
]
"""
ODD: dict[str, tuple[tuple[int, ...], str]] = {
    "scalar": ((), "replicate"),
    "one": ((1,), "replicate"),
    "line": ((8,), "rows"),
    "table.by-rows": ((4, 3), "rows"),
    "table.by-columns": ((3, 4), "columns"),
    "single-row": ((1, 8), "columns"),
    "cube.by-rows": ((4, 3, 5), "rows"),
    "cube.by-columns": ((3, 4, 5), "columns"),
    "no-rows.by-rows": ((0, 3), "rows"),
    "no-rows.by-columns": ((0, 4), "columns"),
    "no-columns.by-rows": ((4, 0), "rows"),
    "no-columns.by-columns": ((4, 0), "columns"),
    "nothing": ((0,), "replicate"),
    "cube-of-nothing": ((2, 4, 0), "columns"),
}


def write_odd_recipe(path: Path, splits: dict[str, str]) -> str:
    rows = (f'["same", {escaped(name)}, {escaped(f"new.{name}")}, "{split}"],' for name, split in splits.items())
    path.write_text(ODD_RECIPE % "\n".join(rows))
    return str(path)


def escaped(name: str) -> str:
    """A TOML string, each character by its number."""
    return '"' + "".join(f"\\U{ord(character):08X}" for character in name) + '"'


def cut(tensor: Tensor, split: str, ranks: int, rank: int) -> Tensor:
    """By torch, not by the planner."""
    if split == "replicate":
        return tensor
    return tensor.chunk(ranks, ("rows", "columns").index(split))[rank].contiguous()


def require_the_bytes_of_safetensors(tensors: dict[str, Tensor], splits: dict[str, str], folder: Path) -> None:
    """Convert for 2 ranks by a recipe of its own, and compare with what safetensors writes for the shares."""
    (folder / "source").mkdir()
    save_file(tensors, folder / "source" / "odd.safetensors")
    recipe = write_odd_recipe(folder / "odd.toml", splits)
    convert_checkpoint(Job(folder / "source", 2, recipe), folder / "ours")
    (folder / "expected").mkdir()
    for rank in range(2):
        share = {f"new.{name}": cut(tensors[name], split, 2, rank) for name, split in splits.items()}
        save_file(share, folder / "expected" / f"part-{rank}-of-2.safetensors")
    assert differences(folder / "ours", folder / "expected") == []
    assert audit_target(folder / "ours").problems == ()


def values(shape: tuple[int, ...], dtype: torch.dtype, seed: int = 0) -> Tensor:
    """Random bits, seen as a dtype; booleans are 0 or 1."""
    generator = torch.Generator().manual_seed(seed)
    flat = torch.randint(0, 2 if dtype == torch.bool else 256, (*shape, dtype.itemsize), generator=generator)
    return flat.to(torch.uint8).view(dtype).reshape(shape)


@pytest.mark.parametrize(
    "dtype",
    [
        torch.bool,
        torch.uint8,
        torch.int8,
        torch.int16,
        torch.uint16,
        torch.float16,
        torch.bfloat16,
        torch.int32,
        torch.uint32,
        torch.float32,
        torch.complex64,
        torch.float64,
        torch.int64,
        torch.uint64,
    ],
    ids=str,
)
def test_odd_shapes_of_every_dtype_are_those_of_safetensors(dtype: torch.dtype, tmp_path: Path) -> None:
    tensors = {name: values(shape, dtype, seed) for seed, (name, (shape, _)) in enumerate(ODD.items())}
    require_the_bytes_of_safetensors(tensors, {name: split for name, (_, split) in ODD.items()}, tmp_path)


@pytest.mark.parametrize(
    "dtype",
    [
        torch.float8_e4m3fn,
        torch.float8_e5m2,
        torch.float8_e8m0fnu,
        torch.float8_e4m3fnuz,
        torch.float8_e5m2fnuz,
        torch.float4_e2m1fn_x2,
    ],
    ids=str,
)
def test_small_floats_are_converted_by_a_recipe_without_block_scales(dtype: torch.dtype, tmp_path: Path) -> None:
    tensors = {"rows": values((4, 6), dtype, 1), "columns": values((3, 4), dtype, 2), "whole": values((5,), dtype, 3)}
    require_the_bytes_of_safetensors(tensors, {"rows": "rows", "columns": "columns", "whole": "replicate"}, tmp_path)


def test_dtypes_side_by_side_stand_in_the_order_of_safetensors(tmp_path: Path) -> None:
    dtypes = [torch.int64, torch.uint8, torch.float32, torch.bool, torch.bfloat16, torch.float16, torch.int8]
    tensors = {f"{'zyxwvut'[i]}-{i}": values((2, 2), dtype, i) for i, dtype in enumerate(dtypes)}
    require_the_bytes_of_safetensors(tensors, dict.fromkeys(tensors, "rows"), tmp_path)


def test_tensors_larger_than_any_buffer_are_those_of_safetensors(tmp_path: Path) -> None:
    """Contiguous, many short runs, and rows that are longer than a buffer themselves."""
    splits = {"whole": "replicate", "rows": "rows", "short-runs": "columns", "long-runs": "columns"}
    shapes = {"whole": (9_000_001,), "rows": (6, 1_500_001), "short-runs": (40_001, 254), "long-runs": (3, 10_000_002)}
    tensors = {name: values(shape, torch.uint8, seed) for seed, (name, shape) in enumerate(shapes.items())}
    require_the_bytes_of_safetensors(tensors, splits, tmp_path)


def test_packed_rows_that_are_wider_than_their_bands_are_cast(tmp_path: Path) -> None:
    """A row of halves is longer than the stretch of whole blocks that is computed at once."""
    (tmp_path / "source").mkdir()
    weight = values((320, 12288), torch.uint8).view(torch.float8_e4m3fn)
    codes = weight.view(torch.uint8)
    codes[(codes & 0x7F) == 0x7F] = 0
    scale = torch.rand(3, 96)
    save_file({"w.weight": weight, "w.scale": scale}, tmp_path / "source" / "one.safetensors")
    text = write_odd_recipe(tmp_path / "odd.toml", {"w.{p}": "packed rows"})
    scales = 'scales.p = { left = "scale", right = "scale", block = 128 }\nrules'
    recipe = Path(text).read_text().replace(escaped("w.{p}"), '"w.{p}"').replace(escaped("new.w.{p}"), '"new.w.{p}"')
    (tmp_path / "odd.toml").write_text(recipe.replace("rules", scales, 1))
    convert_checkpoint(Job(tmp_path / "source", 2, text, cast="bf16"), tmp_path / "target")
    spread = scale.repeat_interleave(128, 0).repeat_interleave(128, 1)[:320]
    halves = (weight.float() * spread).bfloat16().chunk(2)
    for rank in range(2):
        wanted = torch.cat([half.chunk(2)[rank] for half in halves])
        found = load_file(tmp_path / "target" / f"part-{rank}-of-2.safetensors")["new.w.weight"]
        assert torch.equal(found.view(torch.uint8), wanted.view(torch.uint8))


def test_names_that_json_escapes_are_those_of_safetensors(tmp_path: Path) -> None:
    names = [
        "é",
        "with space",
        "100%s",
        "tab\t",
        "bell\x07",
        "delete\x7f",
        "emoji 🙂",
        "line\u2028",
        'quote"',
        "back\\slash",
    ]
    tensors = {name: values((2, 2), torch.uint8, seed) for seed, name in enumerate(names)}
    require_the_bytes_of_safetensors(tensors, dict.fromkeys(names, "rows"), tmp_path)


def test_two_tensors_of_one_new_name_are_refused(tmp_path: Path) -> None:
    """A file with a name twice is none that safetensors opens."""
    (tmp_path / "source").mkdir()
    save_file({"a.0": torch.zeros(2), "b": torch.ones(2)}, tmp_path / "source" / "odd.safetensors")
    rules = '["same", "a.{i}", "new.{i}", "rows"],\n["same", "b", "new.0", "rows"],'
    (tmp_path / "odd.toml").write_text('placeholders.i = { counts = "things" }\n' + ODD_RECIPE % rules)
    with pytest.raises(Refused, match=r"new\.0"):
        convert_checkpoint(Job(tmp_path / "source", 2, str(tmp_path / "odd.toml")), tmp_path / "ours")
    assert not (tmp_path / "ours").exists()
