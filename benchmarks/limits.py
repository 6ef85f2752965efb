"""What limits a copy on this machine: a bare loop of reads and writes, and the disk itself.

    python benchmarks/limits.py copy FOLDER TARGET     copies the files of a folder, two threads, 1 MiB at a time
    python benchmarks/limits.py write FOLDER BYTES     writes a new file from memory; the best rate of two ways to do it

In both the disk works from the first byte on, and both wait until the bytes are on it.
"""

import mmap
import os
import sys
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

from reshard.storage.local import start_writeback

STEP = 1 << 20
BLOCK = 8 << 20

DISCARD_SECONDS = 4
"""A disk that is told of every freed block is busy with them for so long after some GB were removed."""


def copy_folder(folder: Path, target: Path) -> None:
    """Copies every file, and waits for the disk: nothing is planned, checked or recorded."""
    target.mkdir()
    files = sorted(folder.iterdir(), key=lambda path: -path.stat().st_size)
    with ThreadPoolExecutor(2) as pool:
        list(pool.map(lambda path: copy_file(path, target / path.name), files))


def copy_file(path: Path, target: Path) -> None:
    buffer = memoryview(mmap.mmap(-1, STEP))
    source = os.open(path, os.O_RDONLY)
    out = os.open(target, os.O_WRONLY | os.O_CREAT, 0o666)
    done, size = 0, os.fstat(source).st_size
    if size:
        os.posix_fallocate(out, 0, size)
    while done < size:
        count = os.preadv(source, [buffer], done)
        os.pwritev(out, [buffer[:count]], done)
        start_writeback(out, done, count)
        done += count
    os.fsync(out)
    os.close(source)
    os.close(out)


def measure_disk(folder: Path, size: int) -> float:
    """The better rate, in bytes a second, of a file of `size` bytes past the page cache and one through it. The second
    is not begun before the disk has done with the blocks of the first.
    """
    direct = write_file(folder, size, os.O_DIRECT, BLOCK)
    os.sync()
    time.sleep(DISCARD_SECONDS)
    return max(direct, write_file(folder, size, 0, STEP))


def write_file(folder: Path, size: int, flags: int, block: int) -> float:
    """Writes random data in four threads and waits for the disk, which also works from the first byte on."""
    path, buffer = folder / "disk-rate", memoryview(mmap.mmap(-1, block))
    for start in range(0, block, STEP):
        buffer[start : start + STEP] = os.urandom(STEP)
    out = os.open(path, os.O_WRONLY | os.O_CREAT | flags, 0o666)
    os.posix_fallocate(out, 0, size)

    def write(offset: int) -> None:
        os.pwritev(out, [buffer], offset)
        if not flags:
            start_writeback(out, offset, block)

    started = time.perf_counter()
    with ThreadPoolExecutor(4) as pool:
        list(pool.map(write, range(0, size - block + 1, block)))
    os.fsync(out)
    seconds = time.perf_counter() - started
    os.close(out)
    path.unlink()
    return size // block * block / seconds


if __name__ == "__main__":
    what, folder, last = sys.argv[1:]
    if what == "copy":
        copy_folder(Path(folder), Path(last))
    else:
        print(measure_disk(Path(folder), int(last)))
