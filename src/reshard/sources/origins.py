"""Finds what is known of the original checkpoint of a source: in the manifest, in config and index of its folder."""

from collections.abc import Mapping
from dataclasses import replace

from reshard.errors import refuse, require_none
from reshard.formats.folder import Folder
from reshard.formats.huggingface import CONFIG, INDEX, FolderHeaders
from reshard.formats.index import read_index
from reshard.formats.manifest import Origin, read_origin
from reshard.formats.part_manifests import is_of_slices, is_of_whole_files
from reshard.formats.target_names import MANIFEST
from reshard.sources.changed_files import check_changed_files
from reshard.sources.rank_names import RankNames
from reshard.types import WHOLE, Checkpoint, OriginalFile, Tensor


def find_origin(folder: Folder, names: RankNames) -> Origin:
    """Finds the facts about the original checkpoint: in the manifest, else in config and index of the folder."""
    origin, weight_map = read_origin(folder.manifest), read_index(folder.path)
    if weight_map and not {*names.wanted, *names.extra}.isdisjoint(weight_map.values()):
        weight_map = None  # an index of the rank files themselves: it tells nothing of the original files
    if folder.beside and origin.config not in (None, folder.config):
        found = f"{folder.beside / CONFIG}, which says other things than {MANIFEST}"
        raise refuse("wrong-option", "--config", found, "the config of these rank files", "leave it out")
    names_here = [name for name, value in ((CONFIG, folder.config), (INDEX, weight_map)) if value is not None]
    places = {CONFIG: folder.beside or folder.path, INDEX: folder.path}
    texts = {name: (places[name] / name).read_bytes() for name in names_here}
    return replace(
        origin,
        config=folder.config if origin.config is None else origin.config,
        forms=origin.forms or make_forms(weight_map or {}),
        texts=texts if origin.texts is None else {**texts, **origin.texts},
    )


def find_altered_origin(folder: Folder, stored: Checkpoint, *, is_stacked: bool) -> Origin | None:
    """Finds what is known of the original of a checkpoint with stacked experts, or of slices: all, if reshard has made
    it. None of any other checkpoint. Raises Refused if its files were changed since.
    """
    is_sliced = folder.boxed is not None and is_of_slices(folder.manifest)
    is_made = is_of_whole_files(folder.manifest) and folder.manifest["layout"].get("to") != WHOLE
    if not (is_sliced or (is_stacked and is_made)):
        return Origin(is_altered=True) if is_stacked else None
    if not is_sliced:  # of slices that was seen before their boxes were put together
        require_none(check_changed_files(FolderHeaders(stored.folder, stored.files, ()), folder.manifest))
    return replace(read_origin(folder.manifest), is_altered=True)


def make_forms(weight_map: Mapping[str, str]) -> tuple[OriginalFile, ...]:
    """Makes the original files from an index, which gives only the tensor names of each file."""
    names: dict[str, list[str]] = {}
    for name, file in weight_map.items():
        names.setdefault(file, []).append(name)
    return tuple(
        OriginalFile(file, b"", {name: Tensor(name, "", (), 0, 0, 0) for name in names[file]}) for file in sorted(names)
    )
