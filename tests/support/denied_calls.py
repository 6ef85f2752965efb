"""Makes the kernel refuse a system call to this process, with any error number: a seccomp filter, which stays."""

import ctypes
import errno
import os
import platform
import struct
import subprocess
import sys
from pathlib import Path
from typing import Final

import pytest

NUMBERS: Final = {
    ("x86_64", "sync_file_range"): 277,
    ("aarch64", "sync_file_range"): 84,
    ("x86_64", "fadvise64"): 221,
    ("aarch64", "fadvise64"): 223,
    ("x86_64", "fsync"): 74,
    ("aarch64", "fsync"): 82,
}
LOAD, EQUAL, RETURN = 0x20, 0x15, 0x06
ALLOW, FAIL = 0x7FFF0000, 0x00050000
FIRST_ARGUMENT, EVERY = 16, -1
NO_NEW_PRIVILEGES, SECCOMP, FILTER = 38, 22, 2


class Program(ctypes.Structure):
    """A filter, as the kernel takes it."""

    _fields_ = (("length", ctypes.c_ushort), ("instructions", ctypes.c_char_p))


def deny_call(name: str, code: int, argument: int = EVERY, value: int = 0) -> None:
    """From now on a call fails with an error number in this thread and all that it starts; with an `argument`, only
    where that one has a value.
    """
    number = NUMBERS[platform.machine(), name]
    tests = [(0, number)] if argument == EVERY else [(0, number), (FIRST_ARGUMENT + 8 * argument, value)]
    instructions = b""
    for place, (offset, wanted) in enumerate(tests):
        skipped = 2 * (len(tests) - 1 - place)
        instructions += struct.pack("=HBBI", LOAD, 0, 0, offset)
        instructions += struct.pack("=HBBI", EQUAL, 0, skipped + 1, wanted)
    instructions += struct.pack("=HBBI", RETURN, 0, 0, FAIL | code)
    instructions += struct.pack("=HBBI", RETURN, 0, 0, ALLOW)
    library = ctypes.CDLL(None, use_errno=True)
    filtered = Program(len(instructions) // 8, instructions)
    if library.prctl(NO_NEW_PRIVILEGES, 1, 0, 0, 0) or library.prctl(SECCOMP, FILTER, ctypes.byref(filtered), 0, 0):
        raise OSError(ctypes.get_errno(), os.strerror(ctypes.get_errno()))


def make_denial(name: str, code: str, argument: int = EVERY, value: int = 0) -> str:
    """A line of Python that does so in a process of its own; `code` is a name, as `EIO`. Skips the test where no filter
    can be made.
    """
    if (platform.machine(), name) not in NUMBERS:
        pytest.skip("the number of the system call is not known here")
    text = f"import sys; sys.path.insert(0, {str(Path(__file__).parent)!r}); from denied_calls import deny_call\n"
    call = f"deny_call({name!r}, {getattr(errno, code)}, {argument}, {value})\n"
    if subprocess.run([sys.executable, "-c", text + call], check=False, capture_output=True).returncode:
        pytest.skip("no system call can be denied here")
    return text + call
