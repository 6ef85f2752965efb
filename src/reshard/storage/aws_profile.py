"""Keys, region and endpoint for S3, as the files of AWS's own programs have them. The environment goes before them."""

import os
from configparser import ConfigParser
from configparser import Error as ConfigError
from pathlib import Path

KEYS = {
    "aws_access_key_id": "access_key_id",
    "aws_secret_access_key": "secret_access_key",
    "aws_session_token": "session_token",
    "region": "region",
    "endpoint_url": "endpoint",
}
"""In these files -> as options of the store."""


def read_aws_profile() -> dict[str, str]:
    """Reads the profile that `AWS_PROFILE` names, or the default one. Empty without one."""
    name = os.environ.get("AWS_PROFILE") or "default"
    found: dict[str, str] = {}
    for variable, file, section in (
        ("AWS_CONFIG_FILE", "config", name if name == "default" else f"profile {name}"),
        ("AWS_SHARED_CREDENTIALS_FILE", "credentials", name),
    ):
        path = Path(os.environ.get(variable) or f"~/.aws/{file}").expanduser()
        parser = ConfigParser(interpolation=None)
        try:
            parser.read(path, encoding="utf-8")
        except (ConfigError, UnicodeError, OSError):
            continue
        if parser.has_section(section):
            found |= {KEYS[key]: value for key, value in parser.items(section) if key in KEYS}
    if os.environ.get("AWS_ACCESS_KEY_ID"):  # keys belong together
        found = {key: found[key] for key in ("region", "endpoint") if key in found}
    for variable, key in (("AWS_REGION", "region"), ("AWS_DEFAULT_REGION", "region"), *ENDPOINTS):
        if os.environ.get(variable):
            found.pop(key, None)
    return found


ENDPOINTS = (("AWS_ENDPOINT_URL_S3", "endpoint"), ("AWS_ENDPOINT_URL", "endpoint"), ("AWS_ENDPOINT", "endpoint"))
