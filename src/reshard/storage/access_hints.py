"""Hints for buckets that do not let us in: where its keys stand, what they must be allowed, what server is asked."""

import os
import re
from collections.abc import Mapping

from reshard.storage.aws_profile import ENDPOINTS, read_aws_profile
from reshard.storage.web_addresses import name_server, split_address

KEYS_OF = {
    "s3": "AWS_ACCESS_KEY_ID and AWS_SECRET_ACCESS_KEY, or AWS_PROFILE",
    "gs": "GOOGLE_APPLICATION_CREDENTIALS",
    "az": "AZURE_STORAGE_ACCOUNT_NAME and AZURE_STORAGE_ACCOUNT_KEY, or AZURE_STORAGE_SAS_TOKEN",
}
"""By scheme: the variables of the environment that give access."""

PUBLIC = {
    "s3": "; for a public bucket AWS_SKIP_SIGNATURE=true",
    "gs": "; for a public bucket GOOGLE_SKIP_SIGNATURE=true",
}
"""By scheme: how a bucket is read without keys. It is not written so."""

ROLES = {"s3": "s3:PutObject", "gs": "roles/storage.objectUser", "az": "the role Storage Blob Data Contributor"}
"""By scheme: what lets keys write."""

NO_KEYS = "no keys were found"

WRONG_KEYS = re.compile(
    r"no keys|\(ExpiredToken\)|SignatureDoesNotMatch|InvalidAccessKeyId|InvalidToken|AuthenticationFailed|clock|region"
)
"""In the reason of a denial: it is not that the keys may not do it."""

ENDPOINTS_OF: Mapping[str, tuple[str, ...]] = {
    "s3": tuple(name for name, _ in ENDPOINTS),
    "az": ("AZURE_STORAGE_ENDPOINT", "AZURE_ENDPOINT"),
}
"""By scheme: the variables of the environment that name another server."""

OTHER_SERVER = {"s3": "AWS_ENDPOINT_URL", "az": "AZURE_STORAGE_ENDPOINT"}
"""Those that most programs know."""


def suggest_keys(scheme: str, reason: str) -> str:
    """The hint for a bucket that we may not list or read: no keys, or others."""
    if reason == NO_KEYS:
        return f"give keys: {KEYS_OF[scheme]}{PUBLIC.get(scheme, '')}"
    may = "" if WRONG_KEYS.search(reason) else ", and may they list and read this bucket"
    return f"are the keys right{may}? {KEYS_OF[scheme]}{PUBLIC.get(scheme, '')}"


def suggest_rights(scheme: str, reason: str) -> str:
    """The hint for a bucket that we have listed, and may not write to."""
    if WRONG_KEYS.search(reason):
        return f"are the keys right? {KEYS_OF[scheme]}"
    more = f"a target needs {ROLES[scheme]}, and what docs/stores.md#permissions lists"
    return f"these keys may list this bucket, but not write to it: {more}"


def find_endpoint(scheme: str) -> str:
    """The server that is asked in the place of the store's own, as it was named, without anything secret: `NAME=URL`.
    Empty if none was named.
    """
    variables = ((name, os.environ.get(name, "")) for name in ENDPOINTS_OF.get(scheme, ()))
    profile = read_aws_profile().get("endpoint", "") if scheme == "s3" else ""
    for name, value in (*variables, ("endpoint_url in ~/.aws", profile)):
        if value:
            try:
                return f"{name}={name_server(split_address(value))}"
            except ValueError:
                return name
    return ""


def suggest_server(scheme: str) -> str:
    """The hint for a bucket whose server is not there, or is none of its kind."""
    if found := find_endpoint(scheme):
        return f"is {found} the server that you mean, and does it run? HTTPS_PROXY and HTTP_PROXY name a proxy"
    other = f", {OTHER_SERVER[scheme]} a server of your own" if scheme in OTHER_SERVER else ""
    return f"is the address right, and this machine online? HTTPS_PROXY names a proxy{other}"
