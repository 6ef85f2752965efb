"""The C library, for what Python has no functions for."""

import ctypes
from functools import cache


@cache
def load_c_library() -> ctypes.CDLL:
    """Loads the C library, with the error number of each call."""
    return ctypes.CDLL(None, use_errno=True)
