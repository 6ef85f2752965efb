"""A folder, read once: its safetensors files, config and manifest; and which of the files are the checkpoint."""

from collections.abc import Iterator, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass
from typing import Any

from reshard.errors import Problem, Refused, refuse, require_none
from reshard.formats.boxed_folder import read_boxed
from reshard.formats.boxes import BoxedCheckpoint
from reshard.formats.huggingface import (
    CONFIG,
    INDEX,
    SINGLE,
    FolderHeaders,
    find_folder,
    list_safetensors_files,
    read_config,
    read_header,
    read_headers,
)
from reshard.formats.index import (
    check_index,
    choose_indexed_files,
    guess_header_sizes,
    note_left_tensors,
    read_index,
    sort_by_index,
)
from reshard.formats.numbering import check_numbering, choose_numbered_set, note_unnamed_numbers
from reshard.formats.part_manifests import is_of_slices, read_joined_manifest, require_target_of_shares
from reshard.formats.unfinished_downloads import name_begun_downloads
from reshard.paths import AnyPath
from reshard.storage.remote_store import fetch_heads
from reshard.text import format_list
from reshard.types import Checkpoint, Note, Tensor


@dataclass(frozen=True, slots=True)
class Folder:
    """The names and small files at a path. For a single safetensors file: that name, and the config beside it."""

    path: AnyPath
    """As it was given: a folder, or one safetensors file."""
    names: tuple[str, ...]
    """Of the safetensors files, sorted; none if they hold boxes."""
    config: Mapping[str, Any] | None
    manifest: Mapping[str, Any]
    """As reshard wrote it, joined with those of other parts; empty without one, and if it is damaged."""
    manifest_fault: Refused | None
    """The refusal of a damaged manifest; None if it is as reshard wrote it, or if there is none."""
    boxed: BoxedCheckpoint | None = None
    """The checkpoint, if its tensors are stored in boxes. Nothing is proven of them yet."""
    beside: AnyPath | None = None
    """The folder of the config and the other side files, if they do not lie in this one."""

    @property
    def folder(self) -> AnyPath:
        """The folder that holds the files."""
        return find_folder(self.path)

    @property
    def subset(self) -> Mapping[str, Any]:
        """The part of a larger checkpoint that lies here, by the manifest; empty if it is whole or not known."""
        subset: Mapping[str, Any] = self.manifest.get("subset", {})
        return subset


def read_folder(path: AnyPath, config_folder: AnyPath | None = None) -> Folder:
    """Lists a folder, or takes a single safetensors file, and reads the JSON files beside the weights. The config may
    lie in a folder of its own.

    Raises Refused if nothing lies there, or if the config is not JSON. A damaged manifest is only
    noted: not everyone who reads a folder needs it.
    """
    manifest: Mapping[str, Any] = {}
    fault = None
    require_target_of_shares(path)
    if path.is_dir():
        try:
            manifest = read_joined_manifest(path)
        except Refused as refused:
            fault = refused
    boxed = read_boxed(path, is_told=fault is not None or is_of_slices(manifest))
    names = () if boxed else tuple(list_safetensors_files(path))
    config = read_config(find_folder(path))
    if config_folder is None:
        return Folder(path, names, config, manifest, fault, boxed)
    other = read_other_config(find_folder(path), config, config_folder)
    return Folder(path, names, other, manifest, fault, boxed, beside=config_folder)


def read_other_config(folder: AnyPath, own: Mapping[str, Any] | None, config_folder: AnyPath) -> Mapping[str, Any]:
    """Reads the config of another folder than that of the weights. Raises Refused if it has none, or if the weights
    have another one themselves.
    """
    other = read_config(config_folder)
    if other is None:
        found = f"no {CONFIG}" if config_folder.is_dir() else "no such folder"
        remedy = "correct the path"
        if config_folder.is_file():
            found, remedy = "a file", f"name its folder: {config_folder.parent}"
        expected = f"a folder with the {CONFIG} of the model, and its tokenizer"
        raise refuse("wrong-option", "--config", f"{found}: {config_folder}", expected, remedy)
    if own is not None and own != other:
        found = f"{config_folder / CONFIG}, which says other things than {folder / CONFIG}"
        remedy = "leave --config out to take the one beside the weights; or correct that one"
        raise refuse("wrong-option", "--config", found, "the config of these weights", remedy)
    return other


def read_whole_files(found: Folder, *, ignore_extra_files: bool = False) -> Checkpoint:
    """The checkpoint in a folder of safetensors files with whole tensors, or in a single such file. The index is read
    here: nobody else needs its 100,000 names. Raises Refused with every fault.
    """
    weight_map = read_index(found.path)
    if weight_map is None:
        return read_without_index(found, ignore_extra_files=ignore_extra_files)
    return read_indexed(found, weight_map, ignore_extra_files=ignore_extra_files)


def read_indexed(found: Folder, weight_map: Mapping[str, str], *, ignore_extra_files: bool) -> Checkpoint:
    """The checkpoint that an index describes. Each file and tensor that it names must be there.

    Other files are refused, unless they are to be ignored. Other tensors in its files are left aside: `unnamed`, and
    further copies of a tensor. Raises Refused with every fault found.
    """
    names = choose_indexed_files(found.path, found.names, weight_map, ignore_extra_files=ignore_extra_files)
    fetch_heads(found.folder, names, guess_header_sizes(weight_map))
    stored = read_headers(found.folder, names)
    sorted_out = sort_by_index(stored, weight_map)
    require_none(check_index(sorted_out, weight_map))
    notes = [
        *note_left_files(INDEX + " does not name them", found.names, names),
        *note_unnamed_numbers(names),
        *note_left_tensors(sorted_out, weight_map),
    ]
    return Checkpoint(
        stored.folder,
        stored.files,
        sorted_out.tensors,
        found.config,
        notes=tuple(notes),
        unnamed=sorted_out.unnamed,
    )


def read_without_index(found: Folder, *, ignore_extra_files: bool) -> Checkpoint:
    """The checkpoint in a folder without an index: `model.safetensors`, else all files, or with `ignore_extra_files`
    one numbered set. Raises Refused with every fault found.
    """
    names, reason, may_be_extra = found.names, "", frozenset[str]()
    numbered = choose_numbered_set(names)
    if SINGLE in names:
        names, reason = (SINGLE,), f"without an index, {SINGLE} is the checkpoint"
    elif ignore_extra_files and numbered:
        names, reason = numbered.names, f"{numbered.pattern} is taken as the checkpoint"
    elif ignore_extra_files and len(names) > 1:
        raise refuse_unknown_extra(names)
    elif numbered:
        may_be_extra = frozenset(names).difference(numbered.names)
    require_none(name_begun_downloads(found.folder, check_numbering(names, may_be_extra)))
    stored = read_headers(found.folder, names)
    tensors: dict[str, Tensor] = {}
    problems = list(collect_tensors(stored, tensors, may_be_extra))
    if not tensors and not problems:
        problems.append(Problem("empty-source", str(found.path), "files without a tensor", "a checkpoint"))
    require_none(problems)
    left = [] if ignore_extra_files else sorted(set(found.names).difference(names))
    return Checkpoint(
        stored.folder,
        stored.files,
        tensors,
        found.config,
        notes=tuple(note_left_files(reason, found.names, names)),
        unnamed=find_left_tensors(found.folder, left, tensors),
        may_be_extra=may_be_extra,
    )


def find_left_tensors(folder: AnyPath, names: Sequence[str], tensors: Mapping[str, Tensor]) -> dict[str, str]:
    """Finds the tensors that only files which are left aside have: tensor name -> file name. A file that is no
    safetensors file has none.
    """
    found: dict[str, str] = {}
    for name in names:
        with suppress(Refused):
            found |= {tensor.name: name for tensor in read_header(folder / name, 0)[1] if tensor.name not in tensors}
    return found


def note_left_files(reason: str, names: Sequence[str], taken: Sequence[str]) -> Iterator[Note]:
    """Notes the files that are not read, and the reason."""
    if left := sorted(set(names).difference(taken)):
        yield Note("left-aside", f"left aside: {format_list(left)}; {reason}")


def refuse_unknown_extra(names: Sequence[str]) -> Refused:
    """The refusal of `--ignore-extra-files` in a folder where nothing tells which files are extra."""
    found = f"{len(names)} files, and nothing tells which of them are extra: {format_list(names)}"
    expected = f"{INDEX}, model.safetensors, or one set of numbered files"
    remedy = "leave the option out to read all files as one checkpoint; or move those elsewhere that are not part of it"
    return refuse("wrong-option", "--ignore-extra-files", found, expected, remedy)


def collect_tensors(
    stored: FolderHeaders, tensors: dict[str, Tensor], may_be_extra: frozenset[str]
) -> Iterator[Problem]:
    """Fills `tensors` by name; yields those that stand in two files."""
    for tensor in stored.tensors:
        first = tensors.setdefault(tensor.name, tensor)
        if first is not tensor:
            names = [stored.files[place].name for place in (first.file, tensor.file)]
            remedy = f"move one of the two out of the folder, or name the right one in {INDEX}"
            if extra := may_be_extra.intersection(names):
                remedy = f"--ignore-extra-files leaves out {format_list(sorted(extra))}; or {remedy}"
            yield Problem("tensor-twice", tensor.name, f"in {names[0]} and in {names[1]}", "one file", remedy)
