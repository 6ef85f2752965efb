"""Reads the checkpoint of any folder that is no folder of rank files: of whole tensors, or of tensors in boxes."""

from dataclasses import replace

from reshard.errors import refuse
from reshard.formats.folder import Folder, read_folder, read_whole_files
from reshard.paths import AnyPath
from reshard.sources.boxes import assemble_boxes
from reshard.types import COMPARE, Checkpoint, Note


def read_checkpoint(path: AnyPath, *, ignore_extra_files: bool = False, replicas: str = COMPARE) -> Checkpoint:
    """Reads the checkpoint in a folder, or in a single safetensors file, under the names in its files. Of boxes that
    are stored several times, `replicas` says what is read. Raises Refused with every fault.
    """
    return read_folder_checkpoint(read_folder(path), ignore_extra_files=ignore_extra_files, replicas=replicas)


def read_folder_checkpoint(found: Folder, *, ignore_extra_files: bool = False, replicas: str = COMPARE) -> Checkpoint:
    """The same, of a folder that was read already."""
    if found.boxed:
        checkpoint = replace(assemble_boxes(found.boxed, replicas=replicas), config=found.config)
        if found.config is None:
            text = "no config.json, which loaders of whole files need; --config FOLDER takes that of the model"
            checkpoint = replace(checkpoint, notes=(*checkpoint.notes, Note("no-config", text)))
    else:
        checkpoint = read_whole_files(found, ignore_extra_files=ignore_extra_files)
    return replace(checkpoint, beside=found.beside)


def require_config_of_slices(found: Folder) -> None:
    """Raises Refused for slices in safetensors without a config: no file tells how many there are, and without the last
    one tensors are only shorter. The shapes by the config show it.
    """
    if found.boxed and not found.boxed.shapes and found.config is None:
        text = (
            f"{len(found.boxed.files)} files of slices and no config.json: no file tells whether the last one is there"
        )
        remedy = "name the folder that has it with --config"
        raise refuse("no-config", str(found.path), text, "the model's config.json, whose sizes tell", remedy)
