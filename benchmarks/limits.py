"""What limits a copy on this machine: a bare loop of reads and writes, and the disk itself.

    python benchmarks/limits.py copy FOLDER TARGET     copies the files of a folder, two threads, 1 MiB at a time
    python benchmarks/limits.py write FOLDER BYTES     writes a new file past the page cache, four threads; its rate

Both wait until the bytes are on the disk.
"""

import mmap
import os
import sys
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

STEP = 1 << 20
BLOCK = 8 << 20


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
        done += count
    os.fsync(out)
    os.close(source)
    os.close(out)


def measure_disk(folder: Path, size: int) -> float:
    """Writes `size` bytes of random data with O_DIRECT; returns the rate in bytes a second."""
    path = folder / "disk-rate"
    buffer = memoryview(mmap.mmap(-1, BLOCK))
    for start in range(0, BLOCK, STEP):
        buffer[start : start + STEP] = os.urandom(STEP)
    out = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_DIRECT, 0o666)
    os.posix_fallocate(out, 0, size)
    started = time.perf_counter()
    with ThreadPoolExecutor(4) as pool:
        list(pool.map(lambda offset: os.pwritev(out, [buffer], offset), range(0, size - BLOCK + 1, BLOCK)))
    os.fsync(out)
    seconds = time.perf_counter() - started
    os.close(out)
    path.unlink()
    return size // BLOCK * BLOCK / seconds


if __name__ == "__main__":
    what, folder, last = sys.argv[1:]
    if what == "copy":
        copy_folder(Path(folder), Path(last))
    else:
        print(measure_disk(Path(folder), int(last)))
