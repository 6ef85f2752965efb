"""How the hub is asked: which one, and with whose token, found as the hub's own programs find them."""

import os
from dataclasses import dataclass, field
from pathlib import Path

from reshard.errors import Refused, refuse
from reshard.storage.range_requests import is_same_server
from reshard.storage.web_addresses import split_address
from reshard.text import hide_secrets

ENDPOINT = "https://huggingface.co"


@dataclass(frozen=True, slots=True)
class HubAccess:
    """The address of a hub, and the token for it."""

    endpoint: str
    token: str = field(repr=False)
    """Empty without one. It is never printed."""

    def make_headers(self, url: str) -> dict[str, str]:
        """The headers of a request: the token goes to the hub itself, and to nobody else."""
        if self.token and is_same_server(url, self.endpoint):
            return {"authorization": f"Bearer {self.token}"}
        return {}

    def refuse_denied(self, subject: str, told: str) -> Refused:
        """The refusal of what the hub does not let us read; it does not tell a private repository from none."""
        if told == "GatedRepo":
            found, remedy = "a gated model", f"accept its terms at {self.endpoint}, and give the token of that account"
        elif self.token:
            found, remedy = "no such repository, or one that the token may not read", "are its name and HF_TOKEN right?"
        else:
            found = "no such repository, or a private one: there is no token"
            remedy = "is its name right? for a private or gated one set HF_TOKEN, or log in: hf auth login"
        return refuse("no-access", subject, f"{found} ({told})", "a repository that we may read", remedy)


def find_hub_access() -> HubAccess:
    """Finds endpoint and token. Raises Refused if the hub's programs are told to stay offline."""
    if os.environ.get("HF_HUB_OFFLINE", "").upper() in ("1", "ON", "YES", "TRUE"):
        found, expected = "it is set: nothing is to be read from the hub", "a hub to read from"
        raise refuse("cannot-read", "HF_HUB_OFFLINE", found, expected, "unset it; or give a folder of this machine")
    endpoint = os.environ.get("HF_ENDPOINT", "").rstrip("/") or ENDPOINT
    try:
        is_address = split_address(endpoint).scheme in ("https", "http")
    except ValueError:
        is_address = False
    if not is_address:
        found, expected = hide_secrets(endpoint), "an address, such as https://huggingface.co"
        raise refuse("cannot-read", "HF_ENDPOINT", found, expected, "correct it")
    token = find_hub_token()
    if not (token.isascii() and token.isprintable()):
        found, expected = "characters that no token has", "a token, such as hf_..."  # never the token itself
        raise refuse("no-access", "HF_TOKEN", found, expected, "copy it anew, or log in: hf auth login")
    return HubAccess(endpoint, token)


def find_hub_token() -> str:
    """The token of the environment, or of the file that `hf auth login` writes; empty without one."""
    for name in ("HF_TOKEN", "HUGGING_FACE_HUB_TOKEN"):
        if token := os.environ.get(name, "").strip():
            return token
    cache = Path(os.environ.get("XDG_CACHE_HOME", "") or "~/.cache").expanduser()
    home = Path(os.environ.get("HF_HOME", "") or cache / "huggingface").expanduser()
    path = Path(os.environ.get("HF_TOKEN_PATH", "") or home / "token").expanduser()
    try:
        return path.read_text(encoding="utf-8").strip()
    except (OSError, UnicodeError):
        return ""
