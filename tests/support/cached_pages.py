"""Which pages of files are in the page cache, by mincore, and files that are not in it."""

import ctypes
import mmap
import os
import shutil
import subprocess
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest


def find_cached_pages(path: Path) -> list[int]:
    """The numbers of the pages that are in the page cache."""
    if not path.stat().st_size:
        return []
    library = ctypes.CDLL(None, use_errno=True)
    with path.open("r+b") as file, mmap.mmap(file.fileno(), 0) as memory:
        found = (ctypes.c_ubyte * -(-len(memory) // mmap.PAGESIZE))()
        address = (ctypes.c_char * len(memory)).from_buffer(memory)
        assert library.mincore(ctypes.c_void_p(ctypes.addressof(address)), ctypes.c_size_t(len(memory)), found) == 0
        del address
    return [number for number, state in enumerate(found) if state & 1]


def drop(path: Path, offset: int = 0, size: int = 0) -> None:
    """Drops a range of a file from the page cache. What is not on the disk yet would stay there: so it is synced."""
    with path.open("rb") as file:
        os.fsync(file.fileno())
        os.posix_fadvise(file.fileno(), offset, size, os.POSIX_FADV_DONTNEED)


def drop_files(folder: Path) -> None:
    """Drops the files of a folder from the page cache; skips the test where they are in memory only."""
    for path in folder.iterdir():
        drop(path)
        if find_cached_pages(path):
            pytest.skip("this file system keeps files in memory")


def mount(folder: Path, *options: str) -> Path:
    """Mounts a file system on a folder, which is made; skips the test where that is not allowed."""
    folder.mkdir(exist_ok=True)
    if subprocess.run(["mount", *options, str(folder)], check=False, capture_output=True).returncode:
        pytest.skip("no file system can be mounted here")
    return folder


@contextmanager
def mount_ext2(folder: Path, size: int) -> Iterator[Path]:
    """A disk of `size` bytes in a file of a folder, while the context lasts."""
    image = folder / "image"
    with image.open("wb") as file:
        file.truncate(size)
    command = shutil.which("mkfs.ext2", path=f"{os.environ['PATH']}:/sbin:/usr/sbin")
    if not command:
        pytest.skip("mkfs.ext2 is not installed")
    subprocess.run([command, "-q", "-F", "-m", "0", str(image)], check=True)
    mounted = mount(folder / "disk", "-o", "loop", str(image))
    try:
        yield mounted
    finally:
        subprocess.run(["umount", str(mounted)], check=True)
