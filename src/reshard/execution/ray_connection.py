"""The connection of this process to a Ray cluster; Ray is needed, and imported, only here."""

import logging
import os
import signal
import socket
import threading
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from typing import Any

from reshard.errors import Refused, refuse

RAY = "ray"

ANSWER_SECONDS = 10.0
"""So long the port of a head node may take to answer."""

TRIES = "RAY_NUM_REDIS_GET_RETRIES"
"""So often Ray tries to reach a head node where something else listens: by default for a quarter of an hour."""


def parse_ray(on: str) -> str | None:
    """Parses the value of `--on`; returns the address of a cluster, None for the one that Ray finds. Raises Refused."""
    name, sign, address = on.partition("=")
    if name != RAY or (sign and not address):
        raise refuse("wrong-option", "--on", repr(on), "ray, or ray=ADDRESS, such as ray=HEAD:6379")
    return address or None


@dataclass
class RayConnection:
    """What this process has of a cluster. There is one for all of its threads: who ends last, ends it."""

    users: int = 0
    is_ours: bool = False
    """Whether it was made here, and not by the program that calls."""
    lock: threading.Lock = field(default_factory=threading.Lock)


CONNECTION = RayConnection()


@contextmanager
def open_connection(address: str | None) -> Iterator[Any]:
    """Connects to the cluster at an address, as `ray.init` takes it, and gives the package. Without an address: that of
    RAY_ADDRESS, one that runs on this machine, or a new one of this machine alone, which is ended again. A Ray that
    this Python is connected to is used as it is. Raises Refused.
    """
    known = address or os.environ.get("RAY_ADDRESS")
    with CONNECTION.lock:
        ray = load_ray(is_patient=not known)
        if ray.is_initialized():
            require_cluster(ray, address)
        else:
            require_answer(known)
            begin_connection(ray, address)
            CONNECTION.is_ours = True
        CONNECTION.users += 1
    try:
        yield ray
    finally:
        with CONNECTION.lock:
            CONNECTION.users -= 1
            if CONNECTION.is_ours and not CONNECTION.users:
                CONNECTION.is_ours = False
                ray.shutdown()


def load_ray(*, is_patient: bool = True) -> Any:
    """Loads the package. Without patience it tries once to reach a head node, 45 seconds, in the place of 20 times.
    Raises Refused if it is not installed.
    """
    before = os.environ.get(TRIES)
    if not is_patient:
        os.environ.setdefault(TRIES, "1")  # Ray reads it when it is loaded
    try:
        import ray  # noqa: PLC0415 - heavy, and not there for everybody
    except ImportError as error:  # also of one that is broken
        remedy = "pip install 'reshard[ray]'"
        raise refuse("missing-package", "--on ray", str(error), "the package ray", remedy) from None
    finally:
        if before is None:
            os.environ.pop(TRIES, None)
    return ray


def begin_connection(ray: Any, address: str | None) -> None:
    """Connects to Ray, and leaves the signals to those who handled them before. Raises Refused."""
    before = signal.getsignal(signal.SIGTERM)
    try:
        # What workers print stays in Ray's logs: what matters comes back as a value.
        ray.init(address=address, log_to_driver=False, logging_level=logging.ERROR)
    except (ConnectionError, RuntimeError, ValueError, TimeoutError, ImportError) as error:
        raise refuse_cluster(address or "a cluster of this machine", str(error)) from None
    except (SystemExit, KeyboardInterrupt):  # the first is how Ray ends a process at SIGTERM while it connects
        ray.shutdown()
        raise KeyboardInterrupt from None
    finally:
        if threading.current_thread() is threading.main_thread() and before is not None:
            signal.signal(signal.SIGTERM, before)


def require_answer(address: str | None) -> None:
    """Raises Refused if nothing listens at the address of a head node."""
    host, port = split_head_address((address or "").removeprefix("ray://"))
    if not host:
        return
    try:
        socket.create_connection((host, port), ANSWER_SECONDS).close()
    except (OSError, OverflowError) as error:
        raise refuse_cluster(str(address), getattr(error, "strerror", None) or str(error)) from None


def require_cluster(ray: Any, address: str | None) -> None:
    """Raises Refused if this Python is connected to another cluster than the one at an address."""
    (host, port), known = split_head_address(address or ""), str(ray.get_runtime_context().gcs_address)
    if not host or (host, port) == split_head_address(known):
        return
    with suppress(OSError):
        here, there = (socket.gethostbyname(one) for one in (host, split_head_address(known)[0]))
        # A head node on this machine is known by another address than its loopback one.
        if port == split_head_address(known)[1] and (here == there or here.startswith("127.")):
            return
    remedy = "--on ray without an address, or ray.shutdown() before"
    raise refuse("no-cluster", str(address), f"connected to {known}", "one cluster in a process", remedy)


def split_head_address(address: str) -> tuple[str, int]:
    """The host and the port of a head node; no host if it is `auto`, `local`, a `ray://` or the like."""
    host, _, port = address.partition("?")[0].rpartition(":")
    return (host.strip("[]"), int(port)) if port.isdecimal() and "/" not in host else ("", 0)


def refuse_cluster(address: str, found: str) -> Refused:
    """Makes the refusal of a cluster that does not answer."""
    remedy = "is it running? `ray start --head --port=6379` starts one, whose address is HEAD:6379"
    return refuse("no-cluster", address, found.partition("\n")[0], "a Ray cluster that answers", remedy)
