"""How much memory there is: what the system could give out, less what the limits of a container leave of it."""

from collections.abc import Iterator
from pathlib import Path

PLENTY = 1 << 62
"""Where the system does not tell."""


def available_memory() -> int:
    """What this process could get now without swapping, in bytes; a huge number where nothing tells."""
    return min(system_memory(), *(limit - used for limit, used in container_limits()), PLENTY)


def system_memory() -> int:
    try:
        text = Path("/proc/meminfo").read_text(encoding="ascii")
        return int(text.split("MemAvailable:")[1].split()[0]) << 10
    except (OSError, IndexError, ValueError):
        return PLENTY


def container_limits() -> Iterator[tuple[int, int]]:
    """For each control group that limits us: its limit, and what of it is used for good, in bytes."""
    for folder, limit, used, cache in control_groups():
        try:
            most = int((folder / limit).read_text(encoding="ascii"))
            now = int((folder / used).read_text(encoding="ascii"))
            fields = dict(line.split() for line in (folder / "memory.stat").read_text(encoding="ascii").splitlines())
            yield most, max(0, now - int(fields[cache]))
        except (OSError, ValueError, KeyError):  # no such group, or `max`: no limit
            continue


def control_groups() -> Iterator[tuple[Path, str, str, str]]:
    """The folders that may tell of our limits, and the names in them, of both versions of control groups.

    Inside a container the group that we are told to be in may be the root of what is mounted.
    """
    try:
        lines = Path("/proc/self/cgroup").read_text(encoding="ascii").splitlines()
    except OSError:
        return
    for line in lines:
        _, controllers, path = line.split(":", 2)
        if not controllers:
            root, names = Path("/sys/fs/cgroup"), ("memory.max", "memory.current", "file")
        elif "memory" in controllers.split(","):
            root, names = Path("/sys/fs/cgroup/memory"), ("memory.limit_in_bytes", "memory.usage_in_bytes", "cache")
        else:
            continue
        yield from ((folder, *names) for folder in {root / path.lstrip("/"), root})
