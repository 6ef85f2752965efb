"""Addresses of servers, and the proxies that the environment names for them."""

from base64 import b64encode
from http.client import HTTPConnection
from urllib.parse import SplitResult, quote, unquote, urlsplit
from urllib.request import getproxies, proxy_bypass

from reshard.errors import refuse

DEFAULT_PORTS = {"http": 80, "https": 443}

UNQUOTED = "%/?:@!$&'()*+,;=~[]|"
"""What an address may have as it is: what was quoted before stays so."""


def split_address(address: str) -> SplitResult:
    """Splits an address with a host. Raises ValueError for any other."""
    place = urlsplit(address)
    if not place.hostname or place.port == 0:  # asking for the port looks at it
        raise ValueError("no host, or no port")
    return place


def name_server(place: SplitResult) -> str:
    """The server of an address, without anything secret."""
    return f"{place.scheme}://{place.hostname}" + (f":{place.port}" if place.port else "")


def find_proxy(place: SplitResult) -> SplitResult | None:
    """The proxy that the environment names for an address, as other programs find it; None without one. Raises Refused
    for one that does not speak HTTP.
    """
    proxies: dict[str, str] = getproxies()
    address = proxies.get(place.scheme) or proxies.get("all")
    if not address or proxy_bypass(place.netloc.rpartition("@")[2]):
        return None
    expected, remedy = "a proxy of http:", f"NO_PROXY={place.hostname} goes without it"
    try:
        found = split_address(address if "://" in address else f"http://{address}")
    except ValueError:
        raise refuse("cannot-read", f"{place.scheme.upper()}_PROXY", "no address", expected, remedy) from None
    if found.scheme != "http":
        raise refuse("cannot-read", name_server(found), f"a proxy of {found.scheme}:", expected, remedy)
    return found


def make_proxy_headers(proxy: SplitResult | None) -> dict[str, str]:
    """The headers that a proxy asks for, with the name and the password of its address."""
    if not proxy or not proxy.username:
        return {}
    pair = f"{unquote(proxy.username)}:{unquote(proxy.password or '')}"
    return {"Proxy-Authorization": f"Basic {b64encode(pair.encode()).decode()}"}


def make_request_target(place: SplitResult, connection: HTTPConnection) -> str:
    """What stands in the first line of a request: the path, and to a proxy without a tunnel the whole address."""
    path = quote((place.path or "/") + (f"?{place.query}" if place.query else ""), safe=UNQUOTED)
    port = place.port or DEFAULT_PORTS[place.scheme]
    is_direct = place.scheme == "https" or (connection.host, connection.port) == (place.hostname, port)
    return path if is_direct else f"{place.scheme}://{place.netloc.rpartition('@')[2]}{path}"
