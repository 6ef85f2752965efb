"""Reads the checkpoint of any folder that is no folder of rank files: of whole tensors, or of tensors in boxes."""

from collections.abc import Iterator
from dataclasses import replace

from reshard.errors import Problem, refuse, require_none
from reshard.formats.boxed_folder import note_distcp_beside
from reshard.formats.folder import Folder, read_folder, read_whole_files
from reshard.formats.huggingface import FolderHeaders
from reshard.formats.manifest import list_rank_files
from reshard.formats.part_manifests import is_of_slices, require_shares_joined
from reshard.formats.slice_names import name_slices
from reshard.formats.target_names import MANIFEST
from reshard.paths import AnyPath
from reshard.sources.boxes import assemble_boxes
from reshard.sources.changed_files import COPY_SLICES, check_changed_files
from reshard.types import COMPARE, MOST_RANKS, Checkpoint, Note

COPY_PART = "copy it there with its manifest from where it was made; or convert again without --ranks"


def read_checkpoint(
    path: AnyPath, *, ignore_extra_files: bool = False, replicas: str = COMPARE, config_folder: AnyPath | None = None
) -> Checkpoint:
    """Reads the checkpoint in a folder, or in a single safetensors file, under the names in its files. Of boxes that
    are stored several times, `replicas` says what is read. The config may lie in a folder of its own. Raises Refused
    with every fault.
    """
    require_shares_joined(path)
    folder = read_folder(path, config_folder)
    return read_folder_checkpoint(folder, ignore_extra_files=ignore_extra_files, replicas=replicas)


def read_folder_checkpoint(
    found: Folder, *, ignore_extra_files: bool = False, replicas: str = COMPARE, is_verified: bool = False
) -> Checkpoint:
    """The same, of a folder that was read already. Slices that are not those of their manifest are refused, unless
    they are what a verification tells of (`is_verified`).
    """
    if found.boxed:
        if not is_verified:
            require_own_slices(found)
        checkpoint = replace(assemble_boxes(found.boxed, replicas=replicas), config=found.config)
        if is_of_slices(found.manifest):  # which names all files
            notes = tuple(note for note in checkpoint.notes if note.kind != "numbering")
            checkpoint = replace(checkpoint, notes=notes)
        if found.config is None:
            text = "no config.json, which loaders of whole files need; --config FOLDER takes that of the model"
            checkpoint = replace(checkpoint, notes=(*checkpoint.notes, Note("no-config", text)))
    else:
        checkpoint = read_whole_files(found, ignore_extra_files=ignore_extra_files)
        checkpoint = replace(checkpoint, notes=(*checkpoint.notes, *note_distcp_beside(found.path)))
    return replace(checkpoint, beside=found.beside)


def require_own_slices(found: Folder) -> None:
    """Raises Refused for slices that are not those of the manifest beside them: missing ones, those of another
    conversion, and any if it is damaged. Places and shapes alone let the slices of two models pass for one.
    """
    if found.manifest_fault:
        raise found.manifest_fault
    require_none(check_named_slices(found))
    if found.boxed and is_of_slices(found.manifest):
        require_none(check_changed_files(FolderHeaders(found.folder, found.boxed.files, ()), found.manifest))


def check_named_slices(found: Folder) -> Iterator[Problem]:
    """Reports slices that are not there, by the manifest beside them: for the last ones no file name calls."""
    if found.boxed is None or not is_of_slices(found.manifest):
        return
    here, named = {file.name for file in found.boxed.files}, list_rank_files(found.manifest)
    for name in name_slices(min(found.manifest["ranks"], MOST_RANKS)):
        if name not in here:
            expected = f"one of {found.manifest['ranks']:,} files, by {MANIFEST}"
            yield Problem("missing-file", name, "no such file", expected, COPY_SLICES if name in named else COPY_PART)


def require_config_of_slices(found: Folder) -> None:
    """Raises Refused for slices in safetensors without a config: no file tells how many there are, and without the last
    one tensors are only shorter. The shapes by the config show it.
    """
    is_told = is_of_slices(found.manifest)
    if found.boxed and not found.boxed.shapes and found.config is None and not is_told:
        text = (
            f"{len(found.boxed.files)} files of slices and no config.json: no file tells whether the last one is there"
        )
        remedy = "name the folder that has it with --config"
        raise refuse("no-config", str(found.path), text, "the model's config.json, whose sizes tell", remedy)
