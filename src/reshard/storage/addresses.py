"""Opens what lies behind an address: a repository on the hub, a bucket, a folder on a web server."""

import re
from collections.abc import Callable, Mapping

from reshard.paths import RemotePath
from reshard.storage.buckets import open_bucket
from reshard.storage.hub import open_hub
from reshard.storage.web_folder import open_web

ADDRESS = re.compile(r"([A-Za-z][A-Za-z0-9+.-]*):/+(.*)", re.DOTALL)
"""An address as a path has it: a path has one slash where the address had two."""

OPENERS: Mapping[str, Callable[[str, str], RemotePath]] = {
    "az": open_bucket,
    "gs": open_bucket,
    "hf": lambda _scheme, rest: open_hub(rest),
    "http": lambda scheme, rest: open_web(f"{scheme}://{rest}"),
    "https": lambda scheme, rest: open_web(f"{scheme}://{rest}"),
    "s3": open_bucket,
}
"""By the scheme of an address in small letters."""


def open_address(address: str) -> RemotePath | None:
    """Opens what lies behind an address, and lists it; None if it is no address, or not one that can be read. Raises
    Refused.
    """
    found = ADDRESS.fullmatch(address)
    opener = OPENERS.get(found[1].lower()) if found else None
    return opener(found[1].lower(), found[2]) if found and opener else None
