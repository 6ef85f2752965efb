"""The program `reshard`: `main` in a process of its own, with its standard streams, its signals and its end."""

import gc
import os
import signal
import sys
from io import BufferedWriter, FileIO, TextIOWrapper
from typing import Any, NoReturn

from reshard.cli.main import main
from reshard.cli.terminal import CLOSED_PIPE, INTERNAL, INTERRUPTED, REFUSED, print_aside

STREAMS = {"stdin": "r", "stdout": "w", "stderr": "w"}
"""In the order of their numbers."""

SIGNALS = (signal.SIGINT, signal.SIGTERM)


class OutputFailed(Exception):
    """Standard output does not take what was printed; its cause says why."""


class CheckedOutput(FileIO):
    """Standard output. Its errors are of their own kind, for as an OSError they could be those of any file or pipe."""

    def write(self, data: Any, /) -> int:
        """As any other file, but for its errors."""
        try:
            return super().write(data)
        except OSError as error:
            raise OutputFailed(error.strerror) from error


def entry() -> NoReturn:
    """Runs the command line of this process, and ends it."""
    # A plan is a million small values without a circle: looking for circles took a third of its time.
    gc.disable()
    prepare_streams()
    try:
        heed_signals()
        code = run_main()
        ignore_signals()
    except KeyboardInterrupt:
        # It came while `main` was already at something else that went wrong, or behind it.
        print_aside("reshard: interrupted")
        code = INTERRUPTED
    # All is written and closed: taking the plan apart, value by value, would only keep the caller waiting.
    os._exit(code)


def run_main() -> int:
    """The exit code, once all that was printed is written or cannot be."""
    try:
        try:
            code = main()
        except SystemExit as ended:  # argparse's, behind a help or wrong options
            code = int(ended.code or 0)
        if code != INTERRUPTED:  # else a reader who has stopped reading could hold us, and no signal would help
            sys.stdout.flush()
    except OutputFailed as error:
        if isinstance(error.__cause__, BrokenPipeError):
            return CLOSED_PIPE  # whoever read us has seen enough
        print_aside(f"reshard: cannot write standard output: {error}")
        return REFUSED
    except Exception:  # noqa: BLE001
        sys.excepthook(*sys.exc_info())
        return INTERNAL
    return code


def prepare_streams() -> None:
    """Gives standard output its own errors, and /dev/null the place of each stream that is closed."""
    stream = sys.stdout
    if isinstance(stream, TextIOWrapper):
        raw = CheckedOutput(stream.fileno(), "w", closefd=False)
        sys.stdout = TextIOWrapper(
            raw if stream.write_through else BufferedWriter(raw),
            stream.encoding,
            # A name may have letters that a terminal without UTF-8 has not. Standard error does so by itself.
            "backslashreplace",
            line_buffering=stream.line_buffering,
            write_through=stream.write_through,
        )
    for name, mode in STREAMS.items():
        if getattr(sys, name) is None:
            # It gets the lowest free number, which is that of the stream. Else the next file would get it, and with
            # it what others print there.
            setattr(sys, name, open(os.devnull, mode, encoding="utf-8", errors="backslashreplace"))  # noqa: PTH123, SIM115


def heed_signals() -> None:
    """But for what whoever started us ignores, as a script does Ctrl-C for what it runs in the background."""
    for number in SIGNALS:
        if signal.getsignal(number) is not signal.SIG_IGN:
            signal.signal(number, interrupt)


def interrupt(*_: object) -> NoReturn:
    """A SIGTERM ends the program as Ctrl-C does. Whatever comes behind the first changes nothing any more."""
    ignore_signals()
    raise KeyboardInterrupt


def ignore_signals() -> None:
    """By a function: where Python finds SIG_IGN for a signal that has come already, it prints a complaint."""
    for number in SIGNALS:
        signal.signal(number, lambda *_: None)
