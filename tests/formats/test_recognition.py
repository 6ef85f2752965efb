"""What lies at a path that is no checkpoint, or not yet: every refusal says what it is, and what to do."""

import json
import shutil
from collections.abc import Mapping
from pathlib import Path
from time import monotonic

import numpy as np
import pytest
from huggingface_hub._local_folder import get_local_download_paths
from refusals import TINY
from safetensors.numpy import save

import reshard
from reshard.cli.main import main
from reshard.errors import Problem, Refused
from reshard.formats.file_content import SIGNATURES, identify_content
from reshard.formats.unfinished_downloads import find_unfinished
from reshard.sources.checkpoints import read_checkpoint
from reshard.sources.source import read_source
from reshard.synthetic import write_checkpoint

ONE = save({"w": np.ones((2, 2), np.float32)})
SLICE = save(
    {"w": np.ones((2, 2), np.float32)}, {"DCP_VERSION": "1.0", "DCP_SHARDING_INFO": '{"w": {"saved_offsets": [2, 0]}}'}
)
FIRST_SLICE = save({"w": np.ones((2, 2), np.float32)}, {"DCP_SHARDING_INFO": '{"w": {"saved_offsets": [0, 0]}}'})
LORA = save({f"base_model.model.x.lora_{part}.weight": np.ones(2, np.float32) for part in "AB"})
PEFT = json.dumps({"peft_type": "LORA", "base_model_name_or_path": "meta/Base\x1b[2J"}).encode()
OLD, NEW = "a" * 40, "b" * 40
CACHED = {f"models--o--n/snapshots/{revision}/model.safetensors": ONE for revision in (OLD, NEW)}
MAIN = {"models--o--n/refs/main": NEW.encode(), "models--o--n/blobs/1234": ONE}
INDEX = "model.safetensors.index.json"


@pytest.fixture(scope="module")
def pristine(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("recognition") / "pristine"
    write_checkpoint(folder, TINY, 3)
    return folder


@pytest.fixture
def source(pristine: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(pristine, tmp_path / "source"))


def lay(folder: Path, files: Mapping[str, bytes]) -> Path:
    for name, content in files.items():
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_bytes(content)
    return folder


def refusal(path: Path, recipe: str | None = None) -> Problem:
    with pytest.raises(Refused) as caught:
        read_source(path, recipe)
    (problem,) = caught.value.problems
    return problem


@pytest.mark.parametrize(
    ("files", "kind", "found", "remedy"),
    [
        ({"pytorch_model-00001-of-00002.bin": b"PK"}, "other-format", "pickles of PyTorch (.bin)", "save_pretrained("),
        ({"pytorch_model.bin": b"", "1_Dense/model.safetensors": ONE}, "other-format", "pickles", "@/1_Dense"),
        ({"pytorch_model.bin": b"", "global_step9/x": b""}, "other-format", "pickles of PyTorch", "@"),
        ({"consolidated.00.pth": b"PK"}, "other-format", "pickles", "Hugging Face"),
        ({"original/consolidated.00.pth": b"PK"}, "other-format", "original/consolidated.00.pth", "Hugging Face"),
        ({"weights.pt": b"PK", "optimizer.pt": b"PK"}, "other-format", "pickles", "torch.load"),
        ({"optimizer.pt": b"PK", "training_args.bin": b"PK"}, "other-format", "state of a training", "the model"),
        ({"M-Q4_K_M.gguf": b"GGUF"}, "other-format", "GGUF", "original checkpoint"),
        ({"save/__0_0.distcp": b"", "save/.metadata": b""}, "empty-source", "(DCP) in 1 folder", "name it: @/save"),
        ({"save/__0_0.distcp": b""}, "empty-source", "(DCP) without .metadata", "copy .metadata too"),
        ({"pytorch_model_fsdp_0/__0_0.distcp": b""}, "other-format", "FSDP", "the weights: @/pytorch_model_fsdp_0"),
        ({"global_step9/mp_rank_00_model_states.pt": b""}, "other-format", "DeepSpeed", "zero_to_fp32.py"),
        ({"iter_0000001/mp_rank_00/model_optim_rng.pt": b""}, "other-format", "Megatron", "export"),
        ({"model_world_size_2_rank_0.pt": b""}, "other-format", "verl", "verl.model_merger"),
        ({"x.nemo": b""}, "other-format", "NeMo", "export"),
        ({"tf_model.h5": b""}, "other-format", "TensorFlow", "safetensors"),
        ({"flax_model.msgpack": b""}, "other-format", "Flax", "safetensors"),
        ({"model.onnx": b""}, "other-format", "ONNX", "made from"),
        ({"rank0.engine": b""}, "other-format", "TensorRT", "made from"),
        ({"x.npz": b""}, "other-format", "numpy", "save_file"),
        ({"x.tar.gz": b""}, "other-format", "archive", "unpack"),
        ({"model_index.json": b"{}", "unet/x.safetensors": ONE}, "other-format", "diffusion", "@/unet"),
        ({"adapter_model.bin": b"", "adapter_config.json": PEFT}, "adapter", "adapter (LORA)", "merge_and_unload"),
        ({**CACHED, **MAIN}, "hub-cache", "cache of the hub", f"@/models--o--n/snapshots/{NEW}"),
        ({"hub/models--o--n/blobs/1": b""}, "hub-cache", "without a snapshot", "download it again"),
        ({"checkpoint-10/x.safetensors": ONE, "checkpoint-9/x.safetensors": ONE, "training_args.bin": b""},
         "empty-source", "sub-folders", "@/checkpoint-9, @/checkpoint-10"),
        ({"org/model/x.safetensors": ONE}, "empty-source", "sub-folders", "@/org/model"),
        ({"model.safetensors.part": b""}, "unfinished-download", "only model.safetensors.part", "finish"),
        ({".cache/huggingface/download/x.y.incomplete": b""}, "unfinished-download", "in .cache/hugg", "finish"),
        ({"config.json": b"{}"}, "empty-source", "no file that ends in .safetensors", "right folder?"),
        ({"model-rank-0-part-0.safetensors": ONE, "model-rank-0-part-1.safetensors": ONE},
         "other-format", "vLLM", "made from"),
        ({"model-pp-0-tp-0-part-0.safetensors": ONE, INDEX: b"{}"}, "other-format", "vLLM", "made from"),
    ],
)  # fmt: skip
def test_a_folder_without_a_checkpoint_is_named(
    files: dict[str, bytes], kind: str, found: str, remedy: str, tmp_path: Path
) -> None:
    problem = refusal(lay(tmp_path / "s", files))
    assert (problem.kind, problem.subject) == (kind, str(tmp_path / "s"))
    assert found in problem.found
    assert remedy.replace("@", str(tmp_path / "s")) in problem.remedy


@pytest.mark.parametrize(
    ("name", "content", "kind", "found"),
    [
        ("pytorch_model.bin", b"PK\3\4", "other-format", "pickles of PyTorch"),
        ("x.gguf", b"GGUF", "other-format", "GGUF"),
        ("config.json", b"{}", "other-format", "JSON"),
        ("x.safetensors.crdownload", ONE, "unfinished-download", "beginning of x.safetensors"),
        ("adapter_model.safetensors", ONE, "adapter", "an adapter"),
        ("x.safetensors", LORA, "adapter", "an adapter"),
        ("model-rank-0-part-1.safetensors", ONE, "other-format", "vLLM"),
        ("x.safetensors", SLICE, "other-format", "(DCP)"),
        ("__0_0.distcp", b"PK\3\4", "other-format", "(DCP)"),
    ],
)
def test_a_single_file_is_named(name: str, content: bytes, kind: str, found: str, tmp_path: Path) -> None:
    problem = refusal(lay(tmp_path / "s", {name: content}) / name)
    assert (problem.kind, problem.subject) == (kind, str(tmp_path / "s" / name))
    assert found in problem.found


def test_ranks_of_vllm_are_not_taken_for_whole_files(tmp_path: Path) -> None:
    files = {f"model-rank-{rank}-part-0.safetensors": ONE for rank in range(2)}
    problem = refusal(lay(tmp_path / "s", files), "llama")
    assert (problem.kind, problem.subject) == ("other-format", str(tmp_path / "s"))
    assert "recipes for vLLM" in problem.remedy


def test_a_file_of_safetensors_may_have_any_name(tmp_path: Path) -> None:
    """The blobs of a hub cache are named by their checksums."""
    for name in ("0" * 64, "pytorch_model.bin"):
        assert list(read_checkpoint(lay(tmp_path, {name: ONE}) / name).tensors) == ["w"]


def test_whole_tensors_that_torch_saved_are_a_checkpoint(tmp_path: Path) -> None:
    """torch writes the key of slices beside whole tensors too."""
    torch = pytest.importorskip("torch")
    storage = pytest.importorskip("torch.distributed.checkpoint")
    tensors = {f"w{number}": torch.ones(3, 2, dtype=torch.bfloat16) for number in range(4)}
    files = {name: 1 + number % 2 for number, name in enumerate(tensors)}
    writer = storage.HuggingFaceStorageWriter(str(tmp_path), fqn_to_index_mapping=files, save_distributed=False)
    storage.save(tensors, storage_writer=writer, no_dist=True)
    assert any(b"DCP_SHARDING_INFO" in path.read_bytes() for path in tmp_path.glob("*.safetensors"))
    assert read_checkpoint(tmp_path).tensors.keys() == tensors.keys()


def test_slices_are_a_source_and_no_target(pristine: Path, tmp_path: Path) -> None:
    """All files of a folder, or none: a file beside them must be named like a slice."""
    names = [f"shard-0000{number}-model-00001-of-00001.safetensors" for number in (1, 2)]
    folder = lay(tmp_path / "s", {names[0]: ONE, names[1]: SLICE})
    assert refusal(folder).kind == "wrong-metadata"  # the first says nothing of its places
    lay(folder, {names[0]: FIRST_SLICE})
    assert read_checkpoint(folder).tensors["w"].shape == (4, 2)
    assert not reshard.verify(folder, pristine).is_proven
    lay(folder, {"other.safetensors": ONE})
    with pytest.raises(Refused) as refused:
        reshard.plan(folder, 1)
    found = {(problem.kind, problem.subject) for problem in refused.value.problems}
    assert found == {("other-format", str(folder / name)) for name in names}
    assert "all its safetensors files must have the names" in str(refused.value)
    assert refusal(folder / names[0]).kind == "other-format"  # its slices begin at 0, as whole tensors do


def test_a_name_on_the_hub_is_to_be_downloaded(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    said = refusal(Path("deepseek-ai/DeepSeek-V3")).remedy
    assert "hf download deepseek-ai/DeepSeek-V3 --local-dir DeepSeek-V3" in said
    (tmp_path / "deepseek-ai").mkdir()
    for path in ("deepseek-ai/DeepSeek-V3", "models", "../models", "/models/x"):
        assert "hf download" not in refusal(Path(path)).remedy


@pytest.mark.parametrize("place", ["", "/snapshots", "/blobs", "/refs"])
def test_the_snapshot_of_the_branch_main_is_named(place: str, tmp_path: Path) -> None:
    lay(tmp_path, {**CACHED, **MAIN})
    problem = refusal(Path(f"{tmp_path}/models--o--n{place}"))
    assert problem.kind == "hub-cache"
    assert problem.remedy == f"name the snapshot: {tmp_path}/models--o--n/snapshots/{NEW}"
    lay(tmp_path, {"models--o--n/refs/main": b"../../etc"})
    assert all(f"snapshots/{name}" in refusal(tmp_path / "models--o--n").remedy for name in (OLD, NEW))


@pytest.mark.parametrize("recipe", [None, "llama"])
def test_an_adapter_is_named_with_its_base(
    recipe: str | None, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    folder = lay(tmp_path / "s", {"adapter_model.safetensors": LORA, "adapter_config.json": PEFT})
    problem = refusal(folder, recipe)
    assert problem.kind == "adapter"
    assert "meta/Base" in problem.found
    assert "meta/Base" in problem.remedy
    assert main(["inspect", str(folder)]) == 0
    said = capsys.readouterr().out
    assert "merge_and_unload" in said
    assert "\x1b" not in said
    lay(folder, {"adapter_config.json": b"[" * 100_000})
    assert refusal(folder).found == "an adapter: changes to a model, not a model"


@pytest.mark.parametrize("name", ["lora_A" * 200_000, "lora_A." * 150_000 + "\n", "_lora_B!" * 150_000 + "\n"])
def test_a_long_name_is_told_in_time(name: str, tmp_path: Path) -> None:
    """It begins like the tensors of adapters again and again."""
    folder = lay(tmp_path, {"x.safetensors": save({name: np.ones(1)})})
    started = monotonic()
    assert refusal(folder).kind == ("adapter" if "." in name else "no-recipe")
    assert monotonic() - started < 20


def test_other_formats_beside_a_checkpoint_are_no_reason(source: Path) -> None:
    others = [
        "pytorch_model.bin", "x.gguf", "original/consolidated.00.pth", "adapter_config.json", "model_index.json",
        "models--a--b/snapshots/x", "x.safetensors.md", "shard-00001-model-00001-of-00001.safetensors.txt",
    ]  # fmt: skip
    lay(source, dict.fromkeys(others, b"{}"))
    assert read_source(source).recipe.name == "deepseek-v3"


# Downloads.

BESIDE = [".aria2", ".incomplete", ".part", ".crdownload", ".download", ".opdownload", ".!ut", ".filepart", ".PART"]


@pytest.mark.parametrize("ending", BESIDE)
@pytest.mark.parametrize("name", ["model-00002-of-00003.safetensors", INDEX, "config.json"])
def test_an_unfinished_download_is_seen_by_the_file_beside(ending: str, name: str, source: Path) -> None:
    beside = name + ending
    lay(source, {beside: b""})
    problem = refusal(source)
    assert (problem.kind, problem.subject) == ("unfinished-download", str(source / name))
    assert f"{beside} lies beside" in problem.found
    assert "finish the download" in problem.remedy
    (source / name).unlink()
    if name.endswith(".json"):
        assert refusal(source).found == f"only {beside}"


def test_a_download_beside_a_file_that_is_not_read_is_no_reason(source: Path) -> None:
    lay(source, {"pytorch_model.bin.aria2": b"", "pytorch_model.bin": b"", "consolidated.safetensors.part": b""})
    assert read_source(source).recipe.name == "deepseek-v3"


def test_every_command_refuses_an_unfinished_download(
    source: Path, pristine: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    ranks, out = tmp_path / "ranks", tmp_path / "out"
    reshard.convert(pristine, ranks, mp=2)
    lay(source, {"model-00002-of-00003.safetensors.aria2": b""})
    lay(tmp_path, {"ranks/model1-mp2.safetensors.part": b""})
    for here in (source, ranks):
        for words in (["convert", here, out, "--mp", 1], ["plan", here, "--mp", 1], ["inspect", here],
                      ["diff", here, pristine], ["verify", ranks, "--source", source]):  # fmt: skip
            assert main([str(word) for word in words]) == 2, words
            assert "unfinished download" in capsys.readouterr().err
    with pytest.raises(Refused, match="unfinished download"):
        reshard.load(source, mp=2, rank=0, framework="numpy")
    assert not out.exists()


def test_a_side_file_that_is_not_downloaded_yet_does_not_go_along(source: Path, tmp_path: Path) -> None:
    lay(source, {"tokenizer.json": b"{}", "tokenizer.json.part": b"", "unread.bin.part": b"", "unread.bin": b""})
    with pytest.raises(Refused, match=r"tokenizer.json: unfinished download"):
        reshard.convert(source, tmp_path / "out", mp=2)
    assert not (tmp_path / "out").exists()
    (source / "tokenizer.json").unlink()  # nothing that would go along: it is only said
    notes = reshard.convert(source, tmp_path / "out", to="hf").plan.notes
    assert any("not wholly downloaded (tokenizer.json.part, unread.bin.part)" in note.text for note in notes)


def test_the_beginning_of_a_missing_file_is_found(tmp_path: Path) -> None:
    name = "model-00001-of-00002.safetensors"
    assert find_unfinished(tmp_path, name) is None
    # The name that huggingface_hub 2.4 gives it: the SHA-1 of `NAME.metadata`.
    hashed = ".cache/huggingface/download/aoe4E07IMh7reFyUkVoVk040mQk=.abc.incomplete"
    newer = hashed.replace("abc", "abc.0123abcd")
    older = f".cache/huggingface/download/{name}.abc.incomplete"
    for number, place in enumerate((f"._____temp/{name}", hashed, newer, older, f"{name}.Part")):
        for inner in ("", "deep/er/"):
            records, slash, last = place.rpartition("/")
            folder = lay(tmp_path / f"{number}{inner[:1]}", {f"{records}{slash}{inner}{last}": b""})
            shown = records or inner + last  # no name of a hundred characters
            assert find_unfinished(folder, inner + name) == f"an unfinished download: {shown} has its beginning"
            assert find_unfinished(folder, f"{inner}x{name}") is None
            assert find_unfinished(folder, f"other/{name}") is None


def test_the_beginning_of_another_file_is_not_taken_for_it(tmp_path: Path) -> None:
    records = ".cache/huggingface/download"
    lay(tmp_path, {f"{records}/{INDEX}.abc.incomplete": b"", f"{records}/None": b"", f"{records}/x.lock": b""})
    assert find_unfinished(tmp_path, "model.safetensors") is None
    assert find_unfinished(tmp_path, "None") is None
    assert find_unfinished(tmp_path, "x" * 5000) is None


def test_the_beginning_of_a_missing_file_is_found_in_a_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    name = "model-00001-of-00002.safetensors"
    snapshot = lay(tmp_path, {"m/blobs/abc.incomplete": b"", f"m/snapshots/{OLD}/x": b""}) / "m/snapshots" / OLD
    assert find_unfinished(snapshot, name) == "../../blobs has 1 unfinished download"
    lay(tmp_path, {"m/blobs/def.0123abcd.incomplete": b"", "m/blobs/def.01234567.incomplete": b""})
    monkeypatch.chdir(snapshot)
    assert find_unfinished(Path(), name) == "../../blobs has 2 unfinished downloads"
    lay(tmp_path, {"m/blobs/def": b""})  # another try has finished it
    assert find_unfinished(Path(), name) == "../../blobs has 1 unfinished download"
    (snapshot / name).symlink_to("../../blobs/abc")
    assert find_unfinished(snapshot, name) == "an unfinished download: ../../blobs has its beginning"
    (snapshot / name).unlink()
    (snapshot / name).symlink_to("../../blobs/123")
    assert find_unfinished(snapshot, name) is None


@pytest.mark.parametrize("digits", ["", ".0123abcd"])
def test_a_plan_says_that_a_missing_shard_was_begun(digits: str, source: Path) -> None:
    name = "model-00002-of-00003.safetensors"
    (source / name).unlink()
    paths = get_local_download_paths(source, name)
    begun = paths.incomplete_path("a" * 64)
    begun.with_name(begun.name.replace(".incomplete", f"{digits}.incomplete")).touch()
    problem = refusal(source)
    assert (problem.kind, problem.subject) == ("missing-file", name)
    assert problem.found == "no such file, but an unfinished download: .cache/huggingface/download has its beginning"
    assert "until it ends" in problem.remedy


@pytest.mark.parametrize(
    ("content", "kind", "found"),
    [
        (b"<!doctype html>\n<html class=''>" + b" " * 5000, "wrong-download", "a web page"),
        (b"\xef\xbb\xbf \n<HTML><title>Sign  in\n</title>\x1b\xff", "wrong-download", "a web page: Sign in"),
        (b"Entry not found", "wrong-download", "a text: Entry not found"),
        (b"Invalid username or password.", "wrong-download", "a text: Invalid username"),
        (b'{"error":"Access to model x is restricted"}', "wrong-download", "Access to model x"),
        ("缺".encode() * 2000, "wrong-download", "a text: 缺"),
        (bytes(4096) + b"\1", "unfinished-download", "zeros only"),
        (b"PK\3\4\x14\0\0\0\x08\0", "other-format", "torch.save"),
        (b"\x80\2}q\0(X\1\0\0\0", "other-format", "a pickle"),
        (b"GGUF\3\0\0\0\0\0\0\0\0", "other-format", "GGUF"),
        (b"\x1f\x8b\x08\0\0\0\0\0\0\3", "other-format", "gzip"),
    ],
)  # fmt: skip
def test_another_thing_under_the_name_of_a_shard_is_named(content: bytes, kind: str, found: str, source: Path) -> None:
    name = "model-00002-of-00003.safetensors"
    lay(source, {name: content})
    problem = refusal(source)
    assert (problem.kind, problem.subject) == (kind, str(source / name))
    assert found in problem.found
    assert "download" in problem.remedy


@pytest.mark.parametrize("name", ["config.json", INDEX])
@pytest.mark.parametrize(
    ("content", "found"),
    [
        (b"<!DOCTYPE html><html>", "a web page"),
        (b"Entry not found", "a text: Entry not found"),
        (b'{"error":"Repository not found"}', "an error of the server: Repository not found"),
        (b'{"Code":1,"Message":"no such file","RequestId":"x","Success":false}', "the server: no such file"),
    ],
)
def test_an_answer_of_a_server_is_no_json_of_ours(name: str, content: bytes, found: str, source: Path) -> None:
    lay(source, {name: content})
    problem = refusal(source)
    assert (problem.kind, problem.subject) == ("wrong-download", str(source / name))
    assert found in problem.found
    assert "download it again" in problem.remedy


def test_a_cut_file_says_how_much_is_missing(source: Path) -> None:
    name = "model-00002-of-00003.safetensors"
    lay(source, {name: (source / name).read_bytes()[:-1234]})
    problem = refusal(source)
    assert (problem.kind, problem.subject) == ("truncated-file", name)
    assert "1,234 are missing" in problem.found
    assert "download" in problem.remedy


def test_no_safetensors_file_is_taken_for_another_thing() -> None:
    """Lengths of headers whose bytes are those of a signature."""
    for signature in SIGNATURES:
        if len(signature) <= 4:
            header = signature.ljust(8, b"\0") + b'{"a":'
            assert identify_content(header) is None
            assert identify_content(header.replace(b"{", b"\1")) is not None


def make_own_layout(layers: int = 2) -> bytes:
    """A model under the names that Mistral gives it."""
    names = [
        "tok_embeddings",
        "norm",
        "output",
        *(f"layers.{n}.attention.{part}" for n in range(layers) for part in ("wq", "wk")),
    ]
    return save({f"{name}.weight": np.ones((2, 2), np.float32) for name in names})


@pytest.mark.parametrize("config", [None, b'{"model_type": "llama"}', b'{"model_type": "new"}'])
def test_the_makers_own_layout_as_safetensors_is_one_problem(config: bytes | None, tmp_path: Path) -> None:
    files = {"consolidated.safetensors": make_own_layout(), "params.json": b"{}"}
    problem = refusal(lay(tmp_path, files | ({"config.json": config} if config else {})))
    assert (problem.kind, problem.subject) == ("other-format", str(tmp_path / "consolidated.safetensors"))
    assert "own layout" in problem.found
    assert "layers.0.attention.wq.weight" in problem.found
    assert "Hugging Face" in problem.remedy
    assert refusal(tmp_path, "llama").kind == "other-format"


def test_the_makers_own_layout_beside_the_files_of_hugging_face(source: Path) -> None:
    (source / INDEX).unlink(missing_ok=True)
    for number, path in enumerate(sorted(source.glob("*.safetensors")), 1):
        path.rename(source / f"model-{number:05}-of-00003.safetensors")
    lay(source, {"consolidated.safetensors": make_own_layout()})
    problem = refusal(source)
    assert (problem.kind, problem.subject) == ("other-format", str(source / "consolidated.safetensors"))
    assert "--ignore-extra-files" in problem.remedy
    assert read_source(source, ignore_extra_files=True).matched.families
