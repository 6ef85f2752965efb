"""Small downloads with the records of the hub, which the hub's own downloader writes; and their damage."""

import hashlib
import json
import os
from collections.abc import Iterable
from pathlib import Path

import numpy as np
from huggingface_hub._local_folder import get_local_download_paths, write_download_metadata
from huggingface_hub.file_download import _create_symlink, repo_folder_name
from safetensors.numpy import save_file

COMMIT, OTHER_COMMIT = "11c5a3d5811f50298f278a704980280950aedb10", "77f50298f278a704980280950aedb1011c5a3d58"
SHARDS = tuple(f"model-0000{number}-of-00003.safetensors" for number in (1, 2, 3))
INDEX, CONFIG, DEEP = "model.safetensors.index.json", "config.json", "original/tokenizer/merges.txt"
NAMES = sorted([*SHARDS, INDEX, CONFIG, DEEP, ".gitattributes", "empty.txt"])


def write_files(folder: Path) -> None:
    """Three shards of different sizes with an index, and small files."""
    folder.mkdir(parents=True)
    random = np.random.default_rng(5)
    weight_map: dict[str, str] = {}
    for number, name in enumerate(SHARDS):
        tensors = {f"t{number}.{one}": random.random(40_000 * (number + 1), np.float32) for one in range(3)}
        save_file(tensors, folder / name)
        weight_map |= dict.fromkeys(tensors, name)
    (folder / INDEX).write_text(json.dumps({"metadata": {}, "weight_map": weight_map}))
    (folder / CONFIG).write_text('{"model_type": "none"}\n')
    (folder / ".gitattributes").write_text("*.safetensors filter=lfs\n")
    (folder / "empty.txt").touch()
    (folder / DEEP).parent.mkdir(parents=True)
    (folder / DEEP).write_text("a b\n")


def hub_hash(path: Path) -> str:
    """The ETag that the hub has of a file: large ones are in LFS, others in git."""
    content = path.read_bytes()
    if path.suffix == ".safetensors":
        return hashlib.sha256(content).hexdigest()
    return hashlib.sha1(b"blob %d\0%s" % (len(content), content), usedforsecurity=False).hexdigest()


def record(folder: Path, names: Iterable[str] = NAMES, commit: str = COMMIT) -> None:
    for name in names:
        write_download_metadata(folder, name, commit, hub_hash(folder / name))


def record_path(folder: Path, name: str) -> Path:
    path: Path = get_local_download_paths(folder, name).metadata_path
    return path


def begin_download(folder: Path, name: str, content: bytes, size: int, digits: str = "") -> Path:
    """As an interrupted download leaves a file: its first bytes, under a name of the downloader's; newer versions put
    eight digits into it, so that no two processes write to the same file.
    """
    path: Path = get_local_download_paths(folder, name).incomplete_path(hashlib.sha256(content).hexdigest())
    if digits:
        path = path.with_name(f"{path.stem}.{digits}.incomplete")
    path.write_bytes(content[:size])
    return path


def write_cache(cache: Path) -> Path:
    """A snapshot in the hub's cache: links to blobs."""
    root = cache / repo_folder_name(repo_id="org/some-model", repo_type="model")
    snapshot = root / "snapshots" / COMMIT
    write_files(root / "new")
    (root / "blobs").mkdir()
    (root / "refs").mkdir()
    (root / "refs" / "main").write_text(COMMIT)
    for name in NAMES:
        blob, link = root / "blobs" / hub_hash(root / "new" / name), snapshot / name
        link.parent.mkdir(parents=True, exist_ok=True)
        (root / "new" / name).replace(blob)
        _create_symlink(str(blob), str(link), new_blob=True)
        assert link.is_symlink()
    return snapshot


def flip(path: Path, place: int) -> None:
    with path.open("r+b") as file:
        file.seek(place, os.SEEK_END if place < 0 else os.SEEK_SET)
        byte = file.read(1)[0]
        file.seek(-1, os.SEEK_CUR)
        file.write(bytes([byte ^ 1]))
