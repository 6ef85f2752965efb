"""What is in the page cache is read from there, and nothing is added to it by a way past it. The oracle is mincore."""

import mmap
import os
import subprocess
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path
from time import monotonic, sleep

import numpy as np
import pytest
from cached_pages import drop, find_cached_pages, find_file_system, mount, mount_ext2

import reshard.storage.page_cache
import reshard.storage.residency
from reshard.storage.local import (
    PAGE,
    RWF_DONTCACHE,
    WRITTEN_BY_SYNC,
    Ways,
    allocate_aligned,
    open_to_read,
    prefetch_range,
    read_local_range,
)
from reshard.storage.page_cache import find_ways_past_cache, is_mostly_cached
from reshard.storage.residency import is_range_cached

SIZE = (4 << 20) + 1234
NO_SYSTEM_CALL = 9999


@pytest.fixture
def path(tmp_path: Path) -> Path:
    """A file that is not in the page cache."""
    path = tmp_path / "file"
    path.write_bytes(np.random.default_rng(1).bytes(SIZE))
    drop(path)
    if find_cached_pages(path):
        pytest.skip("this file system keeps files in memory")
    if find_file_system(path) in WRITTEN_BY_SYNC:
        pytest.skip("this file system does not tell what of its files is in the page cache")
    return path


@contextmanager
def opened(path: Path) -> Iterator[int]:
    descriptor = os.open(path, os.O_RDONLY)
    try:
        yield descriptor
    finally:
        os.close(descriptor)


def test_a_range_counts_as_cached_if_all_of_its_pages_are(path: Path) -> None:
    first, last = 100 * mmap.PAGESIZE, 200 * mmap.PAGESIZE
    with opened(path) as descriptor:
        os.posix_fadvise(descriptor, 0, 0, os.POSIX_FADV_RANDOM)
        assert len(os.pread(descriptor, last - first, first)) == last - first
        cached = find_cached_pages(path)
        assert (cached[0], cached[-1]) == (100, 199)
        assert is_range_cached(descriptor, first, last - first)
        assert is_range_cached(descriptor, first + 5, 1)
        assert is_range_cached(descriptor, last - 1, 1)
        assert not is_range_cached(descriptor, first - 1, last - first)
        assert not is_range_cached(descriptor, first, last - first + 1)
        assert not is_range_cached(descriptor, last, 1)


def test_the_end_of_a_file_and_no_bytes_at_all_are_told(path: Path) -> None:
    with opened(path) as descriptor:
        assert not is_range_cached(descriptor, SIZE - 1, 1)
        assert is_range_cached(descriptor, SIZE, 0)
        os.pread(descriptor, SIZE, 0)
        assert is_range_cached(descriptor, 0, SIZE)
        assert is_range_cached(descriptor, SIZE - 1, 1)


def test_without_the_system_call_places_are_tried_and_looks_do_not_add_up(
    path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A look may bring the page that it tries into the cache: were it the same page again, a few looks would do."""
    monkeypatch.setattr(reshard.storage.residency, "CACHESTAT", NO_SYSTEM_CALL)
    with opened(path) as descriptor:
        os.posix_fadvise(descriptor, 0, 0, os.POSIX_FADV_RANDOM)
        for _ in range(6):
            assert not is_range_cached(descriptor, 0, SIZE)
            sleep(0.02)  # the disk may be bringing the page
        os.pread(descriptor, SIZE, 0)
        assert is_range_cached(descriptor, 0, SIZE)
        assert is_mostly_cached([path])


def test_a_second_look_at_a_file_does_not_find_what_the_first_has_brought(
    path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(reshard.storage.residency, "CACHESTAT", NO_SYSTEM_CALL)
    monkeypatch.setattr(reshard.storage.page_cache, "CACHE_PROBES", 4)
    for _ in range(3):
        assert not is_mostly_cached([path])
        sleep(0.1)


def require_supported(path: Path, way: str) -> None:
    flags = {"direct": (os.O_DIRECT, 0), "uncached": (0, RWF_DONTCACHE), "dropped": (0, 0)}[way]
    try:
        descriptor = os.open(path, os.O_RDONLY | flags[0])
        os.preadv(descriptor, [allocate_aligned(PAGE)], 0, flags[1])
        os.close(descriptor)
    except OSError:
        pytest.skip(f"{way} is not supported here")
    drop(path)


RANGES = [(0, SIZE), (1, 10), (PAGE - 1, 2), (PAGE, PAGE), (12345, 1 << 20), (SIZE - 1, 1), (SIZE - 5000, 5000)]


@pytest.mark.parametrize("way", ["direct", "uncached", "dropped"])
def test_a_way_past_the_cache_adds_nothing_to_it_and_takes_nothing_from_it(way: str, path: Path) -> None:
    require_supported(path, way)
    wanted, buffer = path.read_bytes(), allocate_aligned(SIZE + 2 * PAGE)
    drop(path)
    with ExitStack() as stack:
        file = open_to_read(stack, path, Ways(way, "cached"))
        os.posix_fadvise(file.descriptor, 0, 0, os.POSIX_FADV_RANDOM)
        for offset, size in RANGES:
            assert read_local_range(file, offset, size, buffer) == wanted[offset : offset + size]
            # The kernel drops whole pages only.
            assert len(find_cached_pages(path)) <= 2 * RANGES.index((offset, size)) + 2
        assert path.read_bytes() == wanted
        whole = find_cached_pages(path)
        assert len(whole) == -(-SIZE // mmap.PAGESIZE)
        for offset, size in RANGES:
            assert file.is_read_from_cache(offset, size)
            assert read_local_range(file, offset, size, buffer) == wanted[offset : offset + size]
        assert find_cached_pages(path) == whole
        drop(path, 1 << 20, 1 << 20)
        for offset, size in RANGES:
            assert read_local_range(file, offset, size, buffer) == wanted[offset : offset + size], (
                "in the cache in part"
            )


def require_brought_at_once(path: Path) -> None:
    with ExitStack() as stack:
        file = open_to_read(stack, path, Ways("cached", "cached"))
        os.posix_fadvise(file.descriptor, 0, 0, os.POSIX_FADV_RANDOM)
        prefetch_range(file, 1 << 20, 2 << 20)
        wanted, deadline = set(range((1 << 20) // PAGE, (3 << 20) // PAGE)), monotonic() + 60
        while not wanted.issubset(find_cached_pages(path)):
            assert monotonic() < deadline, "the disk did not bring it"
            sleep(0.01)


def test_a_range_that_will_be_read_through_the_cache_is_brought_there_at_once(path: Path) -> None:
    require_brought_at_once(path)


def test_the_kernel_is_asked_in_steps_of_what_it_brings_at_least(path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    asked = list[tuple[int, int]]()
    with ExitStack() as stack:
        file = open_to_read(stack, path, Ways("cached", "cached"))

        def advise(descriptor: int, offset: int, size: int, advice: int) -> None:
            assert (descriptor, advice) == (file.descriptor, os.POSIX_FADV_WILLNEED)
            asked.append((offset, offset + size))

        monkeypatch.setattr(os, "posix_fadvise", advise)
        prefetch_range(file, 1000, 300_000)
    assert asked == [(1000, 132_072), (132_072, 263_144), (263_144, 301_000)]


@contextmanager
def slow_disk(disk: Path) -> Iterator[None]:
    """128 KiB of reading ahead, and no larger commands: usual for disks. A loop device keeps that for its next user."""
    place = f"{os.major(disk.stat().st_dev)}:{os.minor(disk.stat().st_dev)}"
    with ExitStack() as stack:
        for name in ("queue/max_sectors_kb", "queue/read_ahead_kb"):
            setting = Path("/sys/dev/block", place, name)
            try:
                before = setting.read_text(encoding="ascii")
                setting.write_text("128", encoding="ascii")
            except OSError:
                pytest.skip("the disk cannot be set here")
            stack.callback(setting.write_text, before, encoding="ascii")
        yield


def test_so_it_is_where_the_kernel_brings_little_for_one_request(tmp_path: Path) -> None:
    with mount_ext2(tmp_path, 16 << 20) as disk, slow_disk(disk), ExitStack() as stack:
        path = disk / "file"
        path.write_bytes(np.random.default_rng(1).bytes(SIZE))
        drop(path)
        require_brought_at_once(path)
        file = open_to_read(stack, path, Ways("cached", "cached"))
        assert read_local_range(file, 0, SIZE, allocate_aligned(SIZE + 2 * PAGE)) == path.read_bytes()


def test_a_few_small_files_do_not_speak_for_a_large_one(path: Path) -> None:
    """The index and configs were read a moment ago; the weights were not."""
    small = [path.with_name(f"small-{number}") for number in range(40)]
    for one in small:
        one.write_bytes(bytes(1000))
    assert is_mostly_cached(small)
    assert not is_mostly_cached([*small, path])
    path.read_bytes()
    for one in small:
        drop(one)
    assert is_mostly_cached([*small, path])


def test_a_file_that_lies_elsewhere_than_the_first_is_read_in_its_own_way(path: Path) -> None:
    device, own = path.stat().st_dev, find_ways_past_cache(path).read
    with ExitStack() as stack:
        assert open_to_read(stack, path, Ways("dropped", "cached", device)).way == "dropped"
        assert open_to_read(stack, path, Ways("dropped", "cached", device + 1)).way == own


def test_a_file_of_another_file_system_is_read_in_the_way_of_that(path: Path, tmp_path: Path) -> None:
    """One that knows no way past the page cache, and one that may."""
    memory = mount(tmp_path / "memory", "-t", "ramfs", "ramfs")
    try:
        (memory / "file").write_bytes(path.read_bytes())
        ours, theirs = path.stat().st_dev, memory.stat().st_dev
        with ExitStack() as stack:

            def find_way(opened: Path, way: str, device: int | None) -> str:
                file = open_to_read(stack, opened, Ways(way, "cached", device))
                assert read_local_range(file, 5, 100_000, allocate_aligned(120_000)) == path.read_bytes()[5:100_005]
                return file.way

            assert find_way(memory / "file", "uncached", ours) == "dropped"
            assert find_way(memory / "file", "direct", None) == "dropped"
            assert find_way(path, "dropped", theirs) == find_ways_past_cache(path).read
            assert find_way(path, "dropped", ours) == "dropped"
    finally:
        subprocess.run(["umount", str(memory)], check=True)
