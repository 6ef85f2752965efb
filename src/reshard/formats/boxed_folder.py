"""Recognises torch's distributed checkpoints by the names in a folder, and reads them."""

from pathlib import Path

from reshard.formats.boxes import BoxedCheckpoint
from reshard.formats.dcp_safetensors import is_sliced_folder, read_slices
from reshard.formats.distcp import is_distcp_folder, read_distcp
from reshard.formats.huggingface import is_safetensors_name
from reshard.formats.unfinished_downloads import list_entries


def read_boxed(path: Path) -> BoxedCheckpoint | None:
    """The checkpoint of a folder of `.distcp` files, or of safetensors files that are slices; None if it is neither.

    A folder with safetensors files that are whole is an ordinary checkpoint, whatever else lies in it. Raises Refused.
    """
    if not path.is_dir():
        return None
    names = list_entries(path)
    weights = sorted(filter(is_safetensors_name, names))
    if is_sliced_folder(weights):
        return read_slices(path, weights)
    return read_distcp(path) if not weights and is_distcp_folder(path, names) else None
