"""A checkpoint's folder, read once: the names of its safetensors files, its config and its manifest."""

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from reshard.errors import Refused
from reshard.formats.huggingface import find_folder, list_safetensors_files, read_config, read_index, read_whole
from reshard.formats.manifest import read_manifest
from reshard.types import Checkpoint


@dataclass(frozen=True, slots=True)
class Folder:
    """The names and small files at a path. For a single safetensors file: that name, and the config beside it."""

    path: Path
    """As it was given: a folder, or one safetensors file."""
    names: tuple[str, ...]
    """Of the safetensors files, sorted."""
    config: Mapping[str, Any] | None
    manifest: Mapping[str, Any]
    """As reshard wrote it; empty without one, and if it is damaged."""
    manifest_fault: Refused | None
    """The refusal of a damaged manifest; None if it is as reshard wrote it, or if there is none."""

    @property
    def folder(self) -> Path:
        """The folder that holds the files."""
        return find_folder(self.path)

    @property
    def subset(self) -> Mapping[str, Any]:
        """The part of a larger checkpoint that lies here, by the manifest; empty if it is whole or not known."""
        subset: Mapping[str, Any] = self.manifest.get("subset", {})
        return subset


def read_folder(path: Path) -> Folder:
    """Lists a folder, or takes a single safetensors file, and reads the JSON files beside the weights.

    Raises Refused if nothing lies there, or if the config is not JSON. A damaged manifest is only
    noted: not everyone who reads a folder needs it.
    """
    names = tuple(list_safetensors_files(path))
    manifest: Mapping[str, Any] = {}
    fault = None
    if path.is_dir():
        try:
            manifest = read_manifest(path)
        except Refused as refused:
            fault = refused
    return Folder(path, names, read_config(find_folder(path)), manifest, fault)


def read_checkpoint(path: Path, *, ignore_extra_files: bool = False) -> Checkpoint:
    """The checkpoint in a folder of safetensors files, or in a single such file; see `read_whole`. Raises Refused."""
    return read_folder_checkpoint(read_folder(path), ignore_extra_files=ignore_extra_files)


def read_folder_checkpoint(found: Folder, *, ignore_extra_files: bool = False) -> Checkpoint:
    """The same, of a folder that was read already. The index is read here: nobody else needs its 100,000 names."""
    weight_map = read_index(found.path)
    return read_whole(found.path, found.names, weight_map, found.config, ignore_extra_files=ignore_extra_files)
