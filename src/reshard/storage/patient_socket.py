"""A socket that sends and receives in short steps, so that an interrupt is heard."""

import io
import socket
from time import monotonic
from typing import Any

from reshard.storage.resources import WAKE_SECONDS, wait_unless_stopped

LOOK_SECONDS = WAKE_SECONDS
"""So often a thread that waits for bytes looks whether it is to end."""

SILENT_SECONDS = 30.0
"""In seconds: a server that sends nothing for so long is asked again."""

SEND_SIZE = 64 << 10
"""In bytes: so much of a body is sent at a time. A slow line sends it within the silence that is allowed."""


class PatientSocket:
    """What `http.client` needs of a socket. It waits for bytes in short steps, so that an interrupt is heard."""

    def __init__(self, connected: socket.socket) -> None:
        self._socket = connected
        self._users = 1
        self.silent_seconds = SILENT_SECONDS

    def makefile(self, _mode: str) -> io.BufferedReader:
        """The stream of what comes. Large reads of it go past its buffer."""
        self._users += 1
        return io.BufferedReader(PatientStream(self), 64 << 10)

    def sendall(self, data: bytes | memoryview) -> None:
        """Sends a request. Raises TimeoutError if nothing was taken for long, and Stopped."""
        rest, since = memoryview(data).cast("B"), monotonic()
        self._socket.settimeout(LOOK_SECONDS)
        while rest:
            wait_unless_stopped()
            try:
                sent = self._socket.send(rest[:SEND_SIZE])
            except TimeoutError:  # TLS wants the same bytes again then
                if monotonic() > since + SILENT_SECONDS:
                    raise TimeoutError(f"nothing was taken for {SILENT_SECONDS:.0f} s") from None
            else:
                rest, since = rest[sent:], monotonic()

    def receive(self, buffer: Any) -> int:
        """Fills a part of a buffer. Raises TimeoutError if nothing has come for long, and Stopped."""
        since = monotonic()
        self._socket.settimeout(LOOK_SECONDS)
        while True:
            try:
                return self._socket.recv_into(buffer)
            except TimeoutError:
                wait_unless_stopped()
                if monotonic() > since + self.silent_seconds:
                    raise TimeoutError(f"nothing came for {self.silent_seconds:.0f} s") from None

    def close(self) -> None:
        """Ends one use: the last one closes the connection. An answer is read after its connection was given up."""
        self._users -= 1
        if not self._users:
            self._socket.close()


class PatientStream(io.RawIOBase):
    """The bytes that come from a socket."""

    def __init__(self, connected: PatientSocket) -> None:
        super().__init__()
        self._socket = connected

    def readable(self) -> bool:
        """Whether it can be read: always."""
        return True

    def readinto(self, buffer: Any, /) -> int:
        """Fills a part of the buffer. Raises TimeoutError, and Stopped."""
        return self._socket.receive(buffer)

    def close(self) -> None:
        """Ends the use of the socket."""
        if not self.closed:
            self._socket.close()
        super().close()
