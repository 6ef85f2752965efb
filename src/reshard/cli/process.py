"""Runs `main` as a process: standard streams, limits, signals, exit code, and the end of the process."""

import gc
import os
import resource
import signal
import sys
from contextlib import suppress
from io import BufferedWriter, FileIO, TextIOWrapper
from typing import Any, NoReturn

from reshard.cli.main import main
from reshard.cli.outcome import CLOSED_PIPE, INTERNAL, INTERRUPTED, REFUSED, ask_for_status, print_aside

STREAMS = {"stdin": "r", "stdout": "w", "stderr": "w"}
"""Standard streams and their modes, in the order of their file descriptors."""

SIGNALS = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)
"""Signals that interrupt the program. SIGHUP comes when the terminal or the connection to it goes away."""


INTERRUPTS: list[int] = []
"""The signal that has interrupted the program, once it has come."""


class OutputFailed(Exception):
    """Raised if standard output cannot be written; the cause is the OSError."""


class CheckedOutput(FileIO):
    """Standard output that raises its own exception: an OSError could come from any other file or pipe."""

    def write(self, data: Any, /) -> int:
        """Writes bytes and returns their number. Raises the exception of standard output instead of OSError."""
        try:
            return super().write(data)
        except OSError as error:
            raise OutputFailed(error.strerror) from error


def entry() -> NoReturn:
    """Runs the command line of this process, and ends the process."""
    # A plan has a million small values without reference cycles: searching for cycles took a third of its time.
    gc.disable()
    prepare_streams()
    raise_file_limit()
    try:
        heed_signals()
        code = run_main()
        ignore_signals()
    except KeyboardInterrupt:
        # It came while `main` handled another exception, or after `main` returned.
        print_aside("reshard: interrupted")
        code = INTERRUPTED
    # All is written and closed: freeing the plan, value by value, would only keep the caller waiting.
    os._exit(code)


def run_main() -> int:
    """Runs `main` and flushes standard output. Returns the exit code."""
    try:
        try:
            code = main()
        except SystemExit as ended:  # raised by argparse, after a help or wrong options
            code = int(ended.code or 0)
        if code != INTERRUPTED:  # a flush could block forever if the reader has stopped, and signals are ignored now
            sys.stdout.flush()
    except OutputFailed as error:
        if isinstance(error.__cause__, BrokenPipeError):
            return CLOSED_PIPE  # the reader, such as `head`, has ended
        print_aside(f"reshard: cannot write standard output: {error}")
        return REFUSED
    except Exception:  # noqa: BLE001
        if INTERRUPTS:  # a C extension that is being imported makes an ImportError of an interrupt
            raise KeyboardInterrupt from None
        sys.excepthook(*sys.exc_info())
        return INTERNAL
    return code


def prepare_streams() -> None:
    """Replaces standard output by one with its own exception, and each closed stream by /dev/null."""
    stream = sys.stdout
    if isinstance(stream, TextIOWrapper):
        raw = CheckedOutput(stream.fileno(), "w", closefd=False)
        sys.stdout = TextIOWrapper(
            raw if stream.write_through else BufferedWriter(raw),
            stream.encoding,
            # A name may have characters that a terminal without UTF-8 lacks. Standard error escapes them by itself.
            "backslashreplace",
            line_buffering=stream.line_buffering,
            write_through=stream.write_through,
        )
    for name, mode in STREAMS.items():
        if getattr(sys, name) is None:
            # /dev/null gets the lowest free descriptor, which is the stream's. Otherwise the next opened file would get
            # it, and text printed by other code would end up in that file.
            setattr(sys, name, open(os.devnull, mode, encoding="utf-8", errors="backslashreplace"))  # noqa: PTH123, SIM115


def raise_file_limit() -> None:
    """Allows as many open files as the system lets us have: a source may have 500, and each may be opened twice."""
    _, most = resource.getrlimit(resource.RLIMIT_NOFILE)
    with suppress(OSError, ValueError):  # some systems allow less than they say
        resource.setrlimit(resource.RLIMIT_NOFILE, (most, most))


def heed_signals() -> None:
    """Handles the signals that the parent process does not ignore. A shell script ignores Ctrl-C for its background
    commands, and nohup ignores SIGHUP.
    """
    for number in (*SIGNALS, signal.SIGUSR1):
        if signal.getsignal(number) is not signal.SIG_IGN:
            signal.signal(number, show_status if number == signal.SIGUSR1 else interrupt)


def show_status(*_: object) -> None:
    """Has a line printed that says how far the job is."""
    ask_for_status()


def interrupt(number: int, _: object) -> NoReturn:
    """Raises KeyboardInterrupt, for SIGTERM and SIGHUP too. Further signals are ignored."""
    ignore_signals()
    INTERRUPTS.append(number)
    raise KeyboardInterrupt


def ignore_signals() -> None:
    """Ignores further signals, with a handler: with SIG_IGN, Python prints a warning for a signal already received."""
    for number in SIGNALS:
        signal.signal(number, lambda *_: None)
