"""`.distcp` checkpoints that torch saved, read without it: every box against the whole tensor; every refusal."""

import pickle
import zipfile
from collections.abc import Callable
from contextlib import suppress
from dataclasses import replace
from io import BytesIO
from pathlib import Path
from typing import Any

import pytest
import torch
from boxed_reads import compare_boxes, copy_folder, read, refused
from distributed_saves import make_weights, save_all
from torch.distributed.checkpoint._extension import StreamTransformExtension
from torch.distributed.checkpoint.filesystem import FileSystemWriter
from torch.distributed.checkpoint.metadata import ChunkStorageMetadata, Metadata, MetadataIndex, TensorProperties
from torch.distributed.checkpoint.state_dict_loader import load as load_state
from torch.distributed.checkpoint.state_dict_saver import save as save_state

from reshard.errors import Refused
from reshard.formats.boxed_folder import read_boxed
from reshard.formats.distcp_metadata import ALLOWED_CLASSES
from reshard.formats.inert_pickle import read_pickle

MOMENT = "optim.state.model.b.weight.exp_avg"
Edit = Callable[[Metadata], object]


@pytest.fixture(scope="module")
def saved(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("saved")
    save_all(folder)
    return folder


def test_a_grid_of_processes_within_a_model_mapping(saved: Path) -> None:
    boxed = read(saved / "grid")
    compare_boxes(boxed, make_weights(), "model.")
    assert [note.text for note in boxed.notes] == [
        f"left aside: 1 tensor beside the weights, such as the state of an optimizer: {MOMENT}",
        "left aside: 2 entries that are no tensors: lr, step",
    ]


def test_rows_over_four_processes_some_without_any_and_three_threads(saved: Path) -> None:
    boxed = read(saved / "line")
    compare_boxes(boxed, make_weights())
    assert [file.name for file in boxed.files] == [
        f"__{rank}_{thread}.distcp" for rank in range(4) for thread in range(3)
    ]
    assert {file.header_size for file in boxed.files} == {0}
    assert len({file.header_hash for file in boxed.files}) == 1
    assert [part.shape for part, _ in boxed.boxes["model.n"]] == [(1,), (1,), (1,), (0,)]
    assert "optimizer.state.model.a.weight.exp_avg" in boxed.notes[0].text


def test_fsdp_with_the_state_of_its_optimizer(saved: Path) -> None:
    boxed = read(saved / "fsdp")
    compare_boxes(boxed, torch.load(saved / "fsdp.pt"), "app.model.")
    assert boxed.notes[0].text.startswith("left aside: 9 tensors beside the weights")


def test_torch_loads_the_same(saved: Path) -> None:
    """The oracle above is what the processes had; torch reads it back alike."""
    loaded = {name: torch.empty_like(tensor) for name, tensor in make_weights().items()}
    load_state({"model": loaded}, checkpoint_id=saved / "grid", no_dist=True)
    compare_boxes(read(saved / "grid"), loaded, "model.")


# --- single processes ---


def save(folder: Path, state: dict[str, Any], **options: Any) -> None:
    save_state(state, storage_writer=FileSystemWriter(folder, **options), no_dist=True)


def test_a_file_for_each_tensor(tmp_path: Path) -> None:
    state = {f"w{number}": torch.full((3,), number) for number in range(12)}
    save(tmp_path, state, single_file_per_rank=False)
    boxed = read(tmp_path)
    compare_boxes(boxed, state)
    assert [file.name for file in boxed.files] == [f"__0_{number}.distcp" for number in range(12)]


def test_a_config_beside_it_is_read(tmp_path: Path) -> None:
    save(tmp_path, {"w": torch.ones(3)})
    (tmp_path / "config.json").write_text('{"model_type": "x"}')
    assert read(tmp_path).config == {"model_type": "x"}


@pytest.mark.parametrize("size", [0, 1, 300, 5000])
def test_archives_shorter_and_longer_than_a_read(tmp_path: Path, size: int) -> None:
    state = {"a": torch.arange(size), "b": torch.arange(size) + 1, "c": torch.ones(())}
    save(tmp_path, state)
    compare_boxes(read(tmp_path), state)


@pytest.mark.parametrize(
    ("names", "kept"),
    [
        (["model.norm", "lm_head", "optimizer.state.x.exp_avg", "train_state.step"], ["model.norm", "lm_head"]),
        (["decoder.w", "chained_0.optimizer.state.exp_avg", "rng_state.a"], ["decoder.w"]),
        (["w", "optimizer_0.state.w", "optim.w", "lr_scheduler.last"], ["w"]),
        (["optimal.weight", "schedulers_note"], ["optimal.weight", "schedulers_note"]),
    ],
)
def test_the_state_of_a_training_is_left_aside_by_its_names(tmp_path: Path, names: list[str], kept: list[str]) -> None:
    save(tmp_path, {name: torch.ones(1) for name in names})
    assert sorted(read(tmp_path).boxes) == sorted(kept)


@pytest.mark.parametrize(
    ("state", "kept"),
    [
        ({"model": {"a": 1}, "ema": {"a": 1}, "lm_head": 1}, ["model.a"]),
        ({"state": {"model": {"a": 1}, "optimizers": {"Adam": {"a": 1}}}}, ["state.model.a"]),
        ({"state_dict": {"a": 1}, "optimizer_0": {"a": 1}}, ["state_dict.a"]),
        ({"model": 1, "lm_head": 1}, ["lm_head", "model"]),
        ({"model": {"optimizer.scale": 1}, "x": 1}, ["model.optimizer.scale"]),
    ],
)
def test_the_mapping_that_is_the_model_is_taken(tmp_path: Path, state: dict[str, Any], kept: list[str]) -> None:
    def fill(value: Any) -> Any:
        return {key: fill(one) for key, one in value.items()} if isinstance(value, dict) else torch.ones(2)

    save(tmp_path, fill(state))
    assert sorted(read(tmp_path).boxes) == kept


def test_other_folders_are_none(tmp_path: Path) -> None:
    assert read_boxed(tmp_path) is None
    assert read_boxed(tmp_path / "nothing") is None
    (tmp_path / ".metadata").write_bytes(b"of another program")
    assert read_boxed(tmp_path) is None
    (tmp_path / "__0_0.distcp").write_bytes(b"")
    (tmp_path / "model.safetensors").write_bytes(b"")
    assert read_boxed(tmp_path) is None


# --- refusals ---


def edit_metadata(folder: Path, edit: Edit) -> None:
    path = folder / ".metadata"
    metadata = pickle.loads(path.read_bytes())  # noqa: S301 - written by this test
    path.write_bytes(pickle.dumps(edit(metadata) or metadata))


@pytest.mark.parametrize("rank", range(4))
def test_a_missing_file_is_named(saved: Path, tmp_path: Path, rank: int) -> None:
    folder = copy_folder(saved / "grid", tmp_path)
    (folder / f"__{rank}_0.distcp").unlink()
    ((kind, subject, text),) = refused(folder)
    assert (kind, subject) == ("missing-file", f"__{rank}_0.distcp")
    assert "model.model.a.weight" in text


@pytest.mark.parametrize("rank", range(4))
def test_a_truncated_file_is_named(saved: Path, tmp_path: Path, rank: int) -> None:
    folder = copy_folder(saved / "grid", tmp_path)
    path = folder / f"__{rank}_0.distcp"
    path.write_bytes(path.read_bytes()[:-4000])
    ((kind, subject, text),) = refused(folder)
    assert (kind, subject) == ("truncated-file", path.name)
    assert "cut off: " in text


def test_exchanged_files_are_named(saved: Path, tmp_path: Path) -> None:
    folder = copy_folder(saved / "grid", tmp_path)
    first, last = folder / "__0_0.distcp", folder / "__3_0.distcp"
    first.rename(tmp_path / "x")
    last.rename(first)
    (tmp_path / "x").rename(last)
    found = refused(folder)
    assert {kind for kind, _, _ in found} <= {"truncated-file", "wrong-shape", "wrong-archive"}
    assert {subject.partition(":")[0] for _, subject, _ in found} == {"__0_0.distcp", "__3_0.distcp"}


def test_the_metadata_of_another_save_are_refused(saved: Path, tmp_path: Path) -> None:
    folder = copy_folder(saved / "grid", tmp_path)
    (folder / ".metadata").write_bytes((saved / "line" / ".metadata").read_bytes())
    assert {kind for kind, _, _ in refused(folder)} & {"missing-file", "wrong-archive"}


def test_no_metadata(saved: Path, tmp_path: Path) -> None:
    folder = copy_folder(saved / "grid", tmp_path)
    (folder / ".metadata").rename(folder / ".metadata.tmp")
    ((kind, subject, text),) = refused(folder)
    assert (kind, subject) == ("missing-file", str(folder / ".metadata"))
    assert "the save did not end" in text
    (folder / "__0.metadata").write_bytes(b"")
    assert "use_collectives" in refused(folder)[0][2]
    (folder / "__0.metadata").unlink()
    (folder / ".metadata.tmp").unlink()
    assert "begins with a dot" in refused(folder)[0][2]


def first_place(metadata: Metadata) -> Any:
    return next(iter(metadata.storage_data.values()))


def resize(metadata: Metadata, shape: tuple[int, ...]) -> None:
    metadata.state_dict_metadata["w"].size = torch.Size(shape)  # type: ignore[union-attr]


def rename_file(name: str) -> Edit:
    return lambda metadata: setattr(first_place(metadata), "relative_path", name)


def move(**changes: int) -> Edit:
    return lambda metadata: metadata.storage_data.update(
        {key: replace(place, **changes) for key, place in metadata.storage_data.items()}
    )


def add_parts(*parts: tuple[tuple[int, ...], tuple[int, ...]]) -> Edit:
    chunks = [ChunkStorageMetadata(torch.Size(offsets), torch.Size(sizes)) for offsets, sizes in parts]
    return lambda metadata: metadata.state_dict_metadata["w"].chunks.extend(chunks)  # type: ignore[union-attr]


def set_dtype(dtype: torch.dtype) -> Edit:
    return lambda metadata: setattr(metadata.state_dict_metadata["w"], "properties", TensorProperties(dtype))


FAULTS: list[tuple[str, Edit, str, str, str]] = [
    ("a path above", rename_file("../x.distcp"), "unsafe-file-name", ".metadata: w", "../x.distcp"),
    ("a full path", rename_file("/etc/passwd"), "unsafe-file-name", ".metadata: w", "/etc/passwd"),
    ("no text for a name", rename_file(3), "wrong-metadata", ".metadata: w", "no place"),  # type: ignore[arg-type]
    ("an offset below nothing", move(offset=-1), "wrong-metadata", ".metadata: w", "no place of the part at [0, 0]"),
    ("a length below nothing", move(length=-1), "wrong-metadata", ".metadata: w", "no place"),
    ("behind the end", move(offset=10**6), "truncated-file", "__0_0.distcp", "cut off: 1 part"),
    ("far behind the end", move(offset=2**63 - 1), "truncated-file", "__0_0.distcp", "cut off"),
    ("an offset too large", move(offset=2**63), "wrong-metadata", ".metadata: w", "no place"),
    ("a length too short", move(length=100), "wrong-archive", "__0_0.distcp: w at [0, 0]", "does not end as a zip"),
    ("a length of nothing", move(length=0), "wrong-archive", "__0_0.distcp: w at [0, 0]", "too short"),
    ("an offset inside", move(offset=1, length=1200), "wrong-archive", "__0_0.distcp: w at [0, 0]", "zip"),
    ("compressed", lambda metadata: setattr(first_place(metadata), "transform_descriptors", ["zstd"]),
     "other-format", ".metadata: w", "compressed"),
    ("no place", lambda metadata: metadata.storage_data.clear(), "wrong-metadata", ".metadata: w", "no place"),
    ("a smaller shape", lambda metadata: resize(metadata, (1, 3)), "wrong-metadata", ".metadata: w",
     "[2, 3] at [0, 0]"),
    ("fewer dimensions", lambda metadata: resize(metadata, (6,)), "wrong-metadata", ".metadata: w", "each dimension"),
    ("a shape below nothing", lambda metadata: resize(metadata, (-2, 3)), "wrong-metadata", ".metadata: w", "no shape"),
    ("a shape too large", lambda metadata: resize(metadata, (2**40, 2**40)), "wrong-metadata", ".metadata: w", "shape"),
    ("two parts in one place", add_parts(((0, 0), (1, 3))), "wrong-metadata", ".metadata: w", "different shapes"),
    ("a part without a place", add_parts(((1, 0), (1, 3))), "wrong-metadata", ".metadata: w", "the part at [1, 0]"),
    ("another dtype", set_dtype(torch.int32), "wrong-shape", "__0_0.distcp: w at [0, 0]", "F32 [2, 3]; I32 [2, 3]"),
    ("an unread dtype", set_dtype(torch.complex128), "unknown-dtype", ".metadata: w", "torch.complex128"),
    ("no dtype", set_dtype("float"), "wrong-metadata", ".metadata: w", "no dtype"),  # type: ignore[arg-type]
    ("not a list of parts", lambda metadata: setattr(metadata.state_dict_metadata["w"], "chunks", {}),
     "wrong-metadata", ".metadata: w", "no list of parts"),
    ("another thing in it", lambda _: {"a": 1}, "wrong-metadata", ".metadata", "another thing"),
    ("parts of two tensors", lambda metadata: metadata.state_dict_metadata.update(x=metadata.state_dict_metadata["w"]),
     "wrong-metadata", ".metadata: x", "the list of parts of another tensor"),
    ("a number for a name", lambda metadata: metadata.state_dict_metadata.update({1: None}),  # type: ignore[dict-item]
     "wrong-metadata", ".metadata", "whose name is no text"),
]  # fmt: skip


@pytest.mark.parametrize(
    ("edit", "kind", "subject", "text"), [row[1:] for row in FAULTS], ids=[row[0] for row in FAULTS]
)
def test_faults_of_the_metadata(tmp_path: Path, edit: Edit, kind: str, subject: str, text: str) -> None:
    save(tmp_path, {"w": torch.ones(2, 3)})
    edit_metadata(tmp_path, edit)
    ((found_kind, found_subject, said),) = refused(tmp_path)
    assert (found_kind, found_subject) == (kind, subject)
    assert text in said


def test_two_places_of_one_part(tmp_path: Path) -> None:
    """Torch's own index cannot hold them; a pickle can."""
    save(tmp_path, {"w": torch.ones(2, 3)})

    class Loose:
        """An index that is equal to no other."""

        def __reduce__(self) -> Any:
            return MetadataIndex.__new__, (MetadataIndex,), {"fqn": "w", "offset": torch.Size((0, 0)), "index": 0}

    edit_metadata(tmp_path, lambda metadata: metadata.storage_data.update({Loose(): first_place(metadata)}))
    assert refused(tmp_path)[0][0] in {"wrong-metadata", "hostile-pickle"}


class Extension(StreamTransformExtension):
    """As those that compress, but it leaves the bytes as they are: `.metadata` names it."""

    @staticmethod
    def from_descriptor(version: str) -> "Extension":
        raise AssertionError(version)

    @staticmethod
    def registry_name() -> str:
        return "test"

    def get_descriptor(self) -> str:
        return "test/1"

    def transform_to(self, output: Any) -> Any:
        return output

    def transform_from(self, input: Any) -> Any:  # noqa: A002 - torch calls it so
        return input


def test_a_compressed_save_is_refused_by_name(tmp_path: Path) -> None:
    save(tmp_path, {"w": torch.ones(2, 3)}, _extensions=[Extension()])
    ((kind, subject, text),) = refused(tmp_path)
    assert (kind, subject) == ("other-format", ".metadata: w")
    assert "compressed or transformed" in text


def replace_archive(folder: Path, value: object, change: Callable[[bytes], bytes] = bytes) -> None:
    """Puts another thing in the place of the only tensor."""
    stream = BytesIO()
    torch.save(value, stream)
    content = change(stream.getvalue())
    (folder / "__0_0.distcp").write_bytes(content)
    edit_metadata(folder, move(length=len(content)))


ARCHIVES: list[tuple[str, Any, str, str]] = [
    ("transposed", torch.ones(3, 2).T, "not-contiguous", "strides [1, 2] for shape [2, 3]"),
    ("columns of a wider one", torch.ones(2, 4)[:, :3], "not-contiguous", "strides [4, 1]"),
    ("a repeated row", torch.ones(1, 3).expand(2, 3), "not-contiguous", "strides [0, 1]"),
    ("another shape", torch.ones(3, 2), "wrong-shape", "F32 [3, 2]; F32 [2, 3]"),
    ("another dtype", torch.ones(2, 3).double(), "wrong-shape", "F64 [2, 3]"),
    ("a parameter", torch.nn.Parameter(torch.ones(2, 3)), "hostile-pickle", "torch._utils._rebuild_parameter"),
    ("a dict", {"w": torch.ones(2, 3)}, "wrong-archive", "another thing than a tensor"),
    ("a number", 3, "wrong-archive", "another thing than a tensor"),
    ("a sparse one", torch.ones(2, 3).to_sparse(), "hostile-pickle", "sparse"),
    (
        "conjugated",
        torch.ones(2, 3, dtype=torch.complex64).conj(),
        "wrong-archive",
        "another thing than a plain tensor",
    ),
]


@pytest.mark.parametrize(("value", "kind", "text"), [row[1:] for row in ARCHIVES], ids=[row[0] for row in ARCHIVES])
def test_other_values_in_the_place_of_a_part(tmp_path: Path, value: Any, kind: str, text: str) -> None:
    save(tmp_path, {"w": torch.ones(2, 3)})
    replace_archive(tmp_path, value)
    ((found, subject, said),) = refused(tmp_path)
    assert (found, subject) == (kind, "__0_0.distcp: w at [0, 0]")
    assert text in said


@pytest.mark.parametrize("dtype", [torch.float32, torch.uint16, torch.float8_e4m3fn])
def test_a_view_into_a_larger_storage(tmp_path: Path, dtype: torch.dtype) -> None:
    rows = torch.arange(24).to(dtype).reshape(8, 3)
    state = {"w": rows[2:4]}
    save(tmp_path, {"w": rows[:2].clone()})
    replace_archive(tmp_path, rows[2:4])
    compare_boxes(read(tmp_path), state)


def test_a_dimension_of_one_may_have_any_stride(tmp_path: Path) -> None:
    whole = torch.arange(12.0).reshape(4, 3)
    save(tmp_path, {"w": torch.ones(1, 3)})
    replace_archive(tmp_path, whole.as_strided((1, 3), (77, 1), 3))
    compare_boxes(read(tmp_path), {"w": whole[1:2]})


def rewrite(change: Callable[[zipfile.ZipFile, zipfile.ZipInfo, bytes], None]) -> Callable[[bytes], bytes]:
    def edit(content: bytes) -> bytes:
        stream = BytesIO()
        with zipfile.ZipFile(BytesIO(content)) as old, zipfile.ZipFile(stream, "w") as new:
            for entry in old.infolist():
                change(new, zipfile.ZipInfo(entry.filename), old.read(entry))
        return stream.getvalue()

    return edit


def compress(new: zipfile.ZipFile, entry: zipfile.ZipInfo, content: bytes) -> None:
    new.writestr(entry, content, compress_type=zipfile.ZIP_DEFLATED)


def turn_byte_order(new: zipfile.ZipFile, entry: zipfile.ZipInfo, content: bytes) -> None:
    new.writestr(entry, b"big" if entry.filename.endswith("byteorder") else content)


def leave_out_data(new: zipfile.ZipFile, entry: zipfile.ZipInfo, content: bytes) -> None:
    if not entry.filename.endswith("data/0"):
        new.writestr(entry, content)


def shorten_data(new: zipfile.ZipFile, entry: zipfile.ZipInfo, content: bytes) -> None:
    new.writestr(entry, content[:-1] if entry.filename.endswith("data/0") else content)


def write_twice(new: zipfile.ZipFile, entry: zipfile.ZipInfo, content: bytes) -> None:
    new.writestr(entry, content)
    new.writestr(entry, content)


def keep(new: zipfile.ZipFile, entry: zipfile.ZipInfo, content: bytes) -> None:
    new.writestr(entry, content)


def leave_out_new_entries(new: zipfile.ZipFile, entry: zipfile.ZipInfo, content: bytes) -> None:
    """As torch wrote before it told the byte order."""
    if entry.filename.endswith(("data.pkl", "data/0", "version")):
        new.writestr(entry, content)


def widen(new: zipfile.ZipFile, entry: zipfile.ZipInfo, content: bytes) -> None:
    with new.open(entry, "w", force_zip64=True) as file:
        file.write(content)


@pytest.mark.parametrize("change", [keep, leave_out_new_entries, widen])
def test_zips_of_other_writers(tmp_path: Path, change: Any) -> None:
    save(tmp_path, {"w": torch.ones(2, 3)})
    replace_archive(tmp_path, torch.arange(6.0).reshape(2, 3), rewrite(change))
    compare_boxes(read(tmp_path), {"w": torch.arange(6.0).reshape(2, 3)})


@pytest.mark.filterwarnings("ignore:Duplicate name")
@pytest.mark.parametrize(
    ("change", "text"),
    [
        (compress, "compressed or encrypted"),
        (turn_byte_order, "byte order"),
        (leave_out_data, "an entry of the zip is missing"),
        (shorten_data, "too few for its shape"),
        (write_twice, "stands twice"),
    ],
)
def test_damaged_zips(tmp_path: Path, change: Any, text: str) -> None:
    save(tmp_path, {"w": torch.ones(2, 3)})
    replace_archive(tmp_path, torch.ones(2, 3), rewrite(change))
    ((kind, _, said),) = refused(tmp_path)
    assert kind == "wrong-archive"
    assert text in said


@pytest.mark.parametrize("more", [1, 8, 24, 100])
def test_a_header_that_leads_to_other_bytes(tmp_path: Path, more: int) -> None:
    """The length of the padding before a tensor stands in its own header only."""
    save(tmp_path, {"w": torch.arange(6.0).reshape(2, 3)})
    path = tmp_path / "__0_0.distcp"
    content = bytearray(path.read_bytes())
    content[content.index(b"archive/data/0") - 2] += more
    path.write_bytes(content)
    ((kind, _, text),) = refused(tmp_path)
    assert kind == "wrong-archive"
    assert "does not end where its directory says" in text


def test_every_byte_of_an_archive_may_be_damaged(tmp_path: Path) -> None:
    """Either it is refused, or its bytes are still found where they are."""
    save(tmp_path, {"w": torch.arange(6.0).reshape(2, 3)})
    path = tmp_path / "__0_0.distcp"
    content = path.read_bytes()
    begin = read(tmp_path).boxes["w"][0].part.offset
    kinds = set[str]()
    for place in range(0, len(content), 3):
        path.write_bytes(content[:place] + bytes([content[place] ^ 0xFF]) + content[place + 1 :])
        try:
            ((part, _),) = read(tmp_path).boxes["w"]
        except Refused as caught:
            kinds.update(problem.kind for problem in caught.problems)
        else:
            assert (part.offset, part.size) == (begin, 24), place
    assert {"wrong-archive", "wrong-shape", "hostile-pickle", "damaged-pickle"} <= kinds


def test_every_byte_of_the_metadata_may_be_damaged(tmp_path: Path) -> None:
    save(tmp_path, {"w": torch.arange(6.0).reshape(2, 3)})
    path = tmp_path / ".metadata"
    content = path.read_bytes()
    for place in range(0, len(content), 5):
        path.write_bytes(content[:place] + bytes([content[place] ^ 1]) + content[place + 1 :])
        with suppress(Refused):
            read(tmp_path)
        path.write_bytes(content[:place])
        with pytest.raises(Refused):
            read(tmp_path)


def test_other_classes_in_the_metadata(tmp_path: Path) -> None:
    """Nothing of them is looked up: there is no such module."""
    save(tmp_path, {"w": torch.ones(2)})
    path = tmp_path / ".metadata"
    name = b"torch.distributed.checkpoint.metadata"
    path.write_bytes(path.read_bytes().replace(name, b"torch_distributed.checkpoint.metadata"))
    ((kind, subject, text),) = refused(tmp_path)
    assert (kind, subject) == ("hostile-pickle", ".metadata")
    assert "torch_distributed.checkpoint.metadata.Metadata" in text


def test_only_whole_names_are_allowed() -> None:
    value = read_pickle(b"ctorch\nfloat32\n.", ALLOWED_CLASSES, "x")
    assert value.name == "torch.float32"


def test_a_folder_of_an_optimizer_has_no_weights(tmp_path: Path) -> None:
    save(tmp_path, {"optimizer": {"exp_avg": torch.ones(2)}})
    ((kind, subject, said),) = refused(tmp_path)
    assert (kind, subject) == ("empty-source", str(tmp_path))
    assert "optimizer.exp_avg" in said


def test_weights_beside_the_model_are_told_apart_from_an_optimizer(tmp_path: Path) -> None:
    save(tmp_path, {"model": {"w": torch.ones(2)}, "optim": {"m": torch.ones(2)}, "head": {"w": torch.ones(2)}})
    known, unknown = (note.text for note in read(tmp_path).notes)
    assert "optim.m" in known
    assert "head.w" in unknown
    assert "may be weights" in unknown
