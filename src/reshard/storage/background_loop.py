"""Asynchronous work for threads that are not: in one background thread, and given up when the job is stopped."""

import asyncio
import os
from collections.abc import Coroutine
from concurrent.futures import wait
from functools import cache
from threading import Thread
from typing import Any, TypeVar

from reshard.storage.resources import WAKE_SECONDS, wait_unless_stopped

Made = TypeVar("Made")


@cache
def start_loop() -> asyncio.AbstractEventLoop:
    """Starts the background thread, once. It ends with the process."""
    loop = asyncio.new_event_loop()
    Thread(target=loop.run_forever, name="reshard-loop", daemon=True).start()
    return loop


os.register_at_fork(after_in_child=start_loop.cache_clear)  # a thread stays in the process that has started it


def run_unless_stopped(work: Coroutine[Any, Any, Made]) -> Made:
    """Runs a coroutine to its end. Raises what it raises, and Stopped as soon as this thread is to end."""
    future = asyncio.run_coroutine_threadsafe(work, start_loop())
    try:
        while not wait([future], WAKE_SECONDS).done:
            wait_unless_stopped()
        return future.result()
    finally:
        future.cancel()
