"""HTTP requests on connections that are kept: with proxies, without redirects, and with an end when a job is stopped.

By the standard library, whose `readinto` puts a body where it is wanted without another copy.
"""

import asyncio
import os
import socket
import ssl
from base64 import b64encode
from collections import defaultdict
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from functools import cached_property
from http.client import HTTPConnection, HTTPException, HTTPResponse
from threading import Lock
from time import monotonic
from typing import Any
from urllib.parse import SplitResult, unquote, urlsplit
from urllib.request import getproxies, proxy_bypass
from weakref import finalize

from reshard.errors import refuse
from reshard.storage.background_loop import run_unless_stopped
from reshard.storage.patient_socket import LOOK_SECONDS, SILENT_SECONDS, PatientSocket
from reshard.storage.remote_store import Failed
from reshard.storage.resources import wait_unless_stopped

CONNECT_SECONDS = 10.0

DEFAULT_PORTS = {"http": 80, "https": 443}

MOST_IDLE = 64
"""So many connections to a server are kept open."""

AGENT = "reshard"


@dataclass(frozen=True, slots=True)
class Answer:
    """The answer of a server: its body is read once, while the request is open."""

    status: int
    headers: Mapping[str, str]
    """By name in small letters."""
    body: HTTPResponse

    def read(self, most: int = 64 << 20) -> bytes:
        """All of the body. Raises Failed if it is cut off, or longer."""
        content = self.body.read(most + 1)
        if len(content) > most:
            raise Failed(f"an answer of more than {most:,} bytes", is_misanswered=True)
        if self.body.length:
            raise Failed("the answer was cut off")
        return content

    def read_into(self, buffer: memoryview) -> int:
        """Fills the buffer as far as the body goes. Returns the number of bytes; raises Failed if none has come."""
        done = 0
        try:
            while done < len(buffer) and (count := self.body.readinto(buffer[done:])):
                done += count
        except (OSError, HTTPException) as error:
            if not done:
                raise Failed(describe_error(error)) from None
        return done


IdleConnections = defaultdict[tuple[str, str], list[HTTPConnection]]
"""Connections that may be used again, by scheme and server."""


def close_connections(idle: IdleConnections) -> None:
    """Closes connections that nobody uses."""
    for connection in (connection for several in idle.values() for connection in several):
        connection.close()


class WebClient:
    """Sends requests, from any number of threads. Connections are used again."""

    def __init__(self) -> None:
        self._idle: IdleConnections = defaultdict(list)
        self._lock = Lock()
        finalize(self, close_connections, self._idle)

    @cached_property
    def _context(self) -> ssl.SSLContext:
        """The certificates that are trusted: those of the system or of `SSL_CERT_FILE`, and those that other programs
        take from the environment.
        """
        context = ssl.create_default_context()
        for name in ("REQUESTS_CA_BUNDLE", "CURL_CA_BUNDLE"):
            if (path := os.environ.get(name)) and os.path.isfile(path):  # noqa: PTH113 - no path of ours
                context.load_verify_locations(path)
        return context

    @contextmanager
    def request(
        self,
        method: str,
        url: str,
        headers: Mapping[str, str] | None = None,
        body: bytes | memoryview = b"",
        silent_seconds: float = SILENT_SECONDS,
    ) -> Iterator[Answer]:
        """A context in which an answer is read. A redirect is an answer like any other. `silent_seconds`: so long the
        server may take to answer. Raises Failed if no answer comes, and Refused for a server that has no certificate to
        be trusted.
        """
        place, sent = urlsplit(url), {"user-agent": AGENT, **(headers or {})}
        connection, response = self._send(method, place, sent, body, silent_seconds)
        try:
            yield Answer(response.status, {name.lower(): value for name, value in response.getheaders()}, response)
        except (OSError, HTTPException) as error:
            raise Failed(describe_error(error)) from None
        finally:
            self._give_back(place, connection, response)

    def _give_back(self, place: SplitResult, connection: HTTPConnection, response: HTTPResponse) -> None:
        """Keeps a connection whose answer was read to its end; closes any other."""
        with self._lock:
            idle = self._idle[place.scheme, place.netloc]
            if response.isclosed() and not response.will_close and len(idle) < MOST_IDLE:
                idle.append(connection)
                return
        response.close()
        connection.close()

    def _send(
        self, method: str, place: SplitResult, headers: dict[str, str], body: bytes | memoryview, silent_seconds: float
    ) -> tuple[HTTPConnection, HTTPResponse]:
        """Sends a request on a connection that is idle, else on a new one. One that was idle for long may be closed by
        now: that is no failure.
        """
        while True:
            with self._lock:
                idle = self._idle[place.scheme, place.netloc]
                connection = idle.pop() if idle else None
            is_new = connection is None
            try:
                connection = connection or self._connect(place)
                connected: Any = connection.sock
                connected.silent_seconds = silent_seconds
                return connection, exchange(connection, method, make_request_target(place, connection), headers, body)
            except ssl.SSLCertVerificationError as error:
                found, remedy = error.verify_message, "SSL_CERT_FILE names a file of certificates to trust"
                raise refuse("cannot-read", name_server(place), found, "a certificate to be trusted", remedy) from None
            except (OSError, HTTPException) as error:
                if connection:
                    connection.close()
                if is_new:
                    raise Failed(describe_error(error, place)) from None
            except BaseException:
                if connection:
                    connection.close()
                raise

    def _connect(self, place: SplitResult) -> HTTPConnection:
        """Connects to a server, or to the proxy that the environment names for it."""
        host, port = place.hostname or "", place.port or DEFAULT_PORTS[place.scheme]
        proxy = find_proxy(place)
        via = (proxy.hostname or "", proxy.port or DEFAULT_PORTS["http"]) if proxy else (host, port)
        made = HTTPConnection(*via, timeout=CONNECT_SECONDS)
        made.default_port = DEFAULT_PORTS[place.scheme]  # it is not named to the server
        if proxy and place.scheme == "https":
            made.set_tunnel(host, port, headers=make_proxy_headers(proxy))
        made._create_connection = connect_patiently  # type: ignore[attr-defined] # noqa: SLF001 - else Ctrl-C waits
        made.connect()
        connected: socket.socket = made.sock
        if place.scheme == "https":
            connected = begin_tls(self._context, connected, host)
        made.sock = PatientSocket(connected)
        return made


def exchange(
    connection: HTTPConnection, method: str, target: str, headers: Mapping[str, str], body: bytes | memoryview
) -> HTTPResponse:
    """Sends a request and receives the beginning of the answer. Raises OSError, HTTPException, and Stopped."""
    try:
        connection.request(method, target, body or None, dict(headers))
    except (BrokenPipeError, ConnectionResetError):
        if not body:
            raise
        # A server may refuse a body before it has taken all of it. The reason is in its answer, if that has come.
        response = connection.getresponse()
        response.will_close = True
        return response
    return connection.getresponse()


def connect_patiently(address: tuple[str, int], seconds: float, _source: object = None) -> socket.socket:
    """Connects to a server. Raises OSError, and Stopped."""

    async def connect() -> socket.socket:
        loop, errors = asyncio.get_running_loop(), list[OSError]()
        for family, kind, protocol, _, place in await loop.getaddrinfo(*address, type=socket.SOCK_STREAM):
            made = socket.socket(family, kind, protocol)
            made.setblocking(False)  # noqa: FBT003
            try:
                await asyncio.wait_for(loop.sock_connect(made, place), seconds)
            except BaseException as error:
                made.close()
                if not isinstance(error, OSError):
                    raise
                errors.append(error)
            else:
                return made
        raise errors[0] if errors else OSError("no address")

    made = run_unless_stopped(connect())
    made.settimeout(seconds)
    return made


def begin_tls(context: ssl.SSLContext, connected: socket.socket, host: str) -> ssl.SSLSocket:
    """Begins TLS with a server. Raises OSError, also for a certificate that is not trusted, and Stopped."""
    since = monotonic()
    made = context.wrap_socket(connected, server_hostname=host, do_handshake_on_connect=False)
    made.settimeout(LOOK_SECONDS)
    try:
        while True:
            try:
                made.do_handshake()
            except TimeoutError:
                wait_unless_stopped()
                if monotonic() > since + CONNECT_SECONDS:
                    raise
            else:
                return made
    except BaseException:
        made.close()
        raise


def find_proxy(place: SplitResult) -> SplitResult | None:
    """The proxy that the environment names for an address, as other programs find it; None without one. Raises Refused
    for one that does not speak HTTP.
    """
    proxies: dict[str, str] = getproxies()
    address = proxies.get(place.scheme) or proxies.get("all")
    if not address or proxy_bypass(place.netloc.rpartition("@")[2]):
        return None
    found = urlsplit(address if "://" in address else f"http://{address}")
    if found.scheme != "http":
        expected, remedy = "a proxy of http:", f"NO_PROXY={place.hostname} goes without it"
        raise refuse("cannot-read", name_server(found), f"a proxy of {found.scheme}:", expected, remedy)
    return found


def make_proxy_headers(proxy: SplitResult) -> dict[str, str]:
    """The headers that a proxy asks for, with the name and the password of its address."""
    if not proxy.username:
        return {}
    pair = f"{unquote(proxy.username)}:{unquote(proxy.password or '')}"
    return {"Proxy-Authorization": f"Basic {b64encode(pair.encode()).decode()}"}


def make_request_target(place: SplitResult, connection: HTTPConnection) -> str:
    """What stands in the first line of a request: the path, and to a proxy without a tunnel the whole address."""
    path = (place.path or "/") + (f"?{place.query}" if place.query else "")
    is_direct = place.scheme == "https" or connection.host == place.hostname
    return path if is_direct else f"{place.scheme}://{place.netloc.rpartition('@')[2]}{path}"


def name_server(place: SplitResult) -> str:
    """The server of an address, without anything secret."""
    with suppress(ValueError):
        return f"{place.scheme}://{place.hostname}" + (f":{place.port}" if place.port else "")
    return f"{place.scheme}://{place.hostname}"


def describe_error(error: Exception, place: SplitResult | None = None) -> str:
    """Describes why no answer came, or only a part of one."""
    number = getattr(error, "errno", None) or 0  # below 0: of a name that is not known
    text = os.strerror(number) if number > 0 else str(getattr(error, "strerror", None) or error) or type(error).__name__
    return f"{name_server(place)}: {text}" if place else text
