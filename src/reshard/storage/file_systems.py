"""Tells kinds of file systems: which lie on a network, and which write only when synced."""

import ctypes
import os
from pathlib import Path

from reshard.storage.c_library import load_c_library

OVERLAYFS, ZFS, FUSE = 0x794C7630, 0x2FC12FC1, 0x65735546
"""Kinds of file systems, as `statfs` tells them."""

LOCAL = {
    "ext2, ext3, ext4": 0xEF53,
    "xfs": 0x58465342,
    "btrfs": 0x9123683E,
    "bcachefs": 0xCA451A4E,
    "f2fs": 0xF2F52010,
    "jfs": 0x3153464A,
    "nilfs2": 0x3434,
    "zfs": ZFS,
    "overlay": OVERLAYFS,
    "tmpfs": 0x01021994,
    "ramfs": 0x858458F6,
    "vfat": 0x4D44,
    "exfat": 0x2011BAB0,
    "ntfs3": 0x7366746E,
}
"""Those that one machine mounts at a time, so that its kernel knows of every lock. All others count as lying on a
network, unknown ones and FUSE too, behind which anything may be: a lock by a file holds everywhere, and costs no more
than a write every few seconds; trust in a lock that only one machine sees may cost the target.
"""


def find_kind(place: int | Path) -> int:
    """Finds the kind of the file system of an open file or a path; 0 if the system does not tell."""
    told = (ctypes.c_long * 64)()  # larger than the structure, which begins with the kind
    library = load_c_library()
    if isinstance(place, int):
        library.fstatfs(ctypes.c_int(place), told)
    else:
        library.statfs(ctypes.c_char_p(os.fsencode(place)), told)
    return int(told[0])


def is_on_network(folder: Path) -> bool:
    """Whether other machines may write to a folder too, and know nothing of the locks of this one's kernel."""
    return find_kind(folder) not in LOCAL.values()
