"""Signs requests to S3 (Signature Version 4), where the keys are in the environment or in a profile."""

import hashlib
import hmac
import os
from collections.abc import Mapping
from dataclasses import dataclass, field
from time import gmtime, strftime
from typing import NamedTuple
from urllib.parse import quote, urlsplit

from reshard.storage.aws_profile import ENDPOINTS, read_aws_profile

DEFAULT_REGION = "us-east-1"
"""That of obstore too."""

PLAIN = "/-_.~"
"""What stands for itself in a signed path, beside letters and digits."""

OTHER_SETTINGS = (
    "AWS_CHECKSUM_ALGORITHM",
    "AWS_REQUEST_PAYER",
    "AWS_S3_EXPRESS",
    "AWS_SERVER_SIDE_ENCRYPTION",
    "AWS_SKIP_SIGNATURE",
    "AWS_SSE_CUSTOMER_KEY_BASE64",
    "AWS_SSE_KMS_KEY_ID",
)
"""Variables of the environment that change what obstore sends. Where one is set, only obstore writes."""

EQUAL_PARTS = (".r2.cloudflarestorage.com",)
"""Endings of servers that want all parts of an upload but the last to be equally long."""


@dataclass(frozen=True, slots=True)
class S3Access:
    """Where a bucket is asked, and the keys to it."""

    address: str
    """Of the bucket: `https://s3.us-east-1.amazonaws.com/models`."""
    region: str
    key: str = field(repr=False)
    secret: str = field(repr=False)
    token: str = field(repr=False)
    """Of a session; empty without one."""


def find_s3_access(bucket: str) -> S3Access | None:
    """Finds where and with which keys obstore asks a bucket; None if that is not known here, such as the keys of a
    role, or if what is sent is to be changed.
    """
    if any(os.environ.get(name) for name in OTHER_SETTINGS):
        return None
    found = read_aws_profile()
    if key := os.environ.get("AWS_ACCESS_KEY_ID"):
        token = get_first_variable("AWS_SESSION_TOKEN", "AWS_TOKEN")
        keys = key, os.environ.get("AWS_SECRET_ACCESS_KEY", ""), token
    else:
        keys = found.get("access_key_id", ""), found.get("secret_access_key", ""), found.get("session_token", "")
    region = get_first_variable("AWS_REGION", "AWS_DEFAULT_REGION") or found.get("region") or DEFAULT_REGION
    endpoint = get_first_variable(*(name for name, _ in ENDPOINTS)) or found.get("endpoint", "")
    address = make_bucket_address(bucket, region, endpoint)
    place = urlsplit(address)
    if not all(keys[:2]) or place.scheme not in ("http", "https") or (place.hostname or "").endswith(EQUAL_PARTS):
        return None
    return S3Access(address, region, *keys)


def get_first_variable(*names: str) -> str:
    """The first variable of the environment that is set; empty if none is."""
    return next(filter(None, map(os.environ.get, names)), "")


def make_bucket_address(bucket: str, region: str, endpoint: str) -> str:
    """The address of a bucket, as obstore makes it: an endpoint of virtual hosts is that of the bucket."""
    is_virtual = os.environ.get("AWS_VIRTUAL_HOSTED_STYLE_REQUEST", "").lower() in ("1", "true", "on", "yes", "y")
    if endpoint:
        return endpoint.rstrip("/") if is_virtual else f"{endpoint.rstrip('/')}/{bucket}"
    host = f"s3.{region}.amazonaws.com"
    return f"https://{bucket}.{host}" if is_virtual else f"https://{host}/{bucket}"


class SignedRequest(NamedTuple):
    """What is sent."""

    url: str
    headers: Mapping[str, str]


def sign_request(
    access: S3Access, method: str, key: str, query: Mapping[str, str], payload: str, now: float | None = None
) -> SignedRequest:
    """Signs a request for the object of a key. `payload` is the SHA-256 of its body, in hexadecimal digits, which the
    store compares with what it receives. `now` is in seconds since 1970.
    """
    place, time = urlsplit(access.address), strftime("%Y%m%dT%H%M%SZ", gmtime(now))
    path = quote(f"{place.path}/{key}", PLAIN)
    pairs = sorted((quote(name, ""), quote(value, "")) for name, value in query.items())
    asked = "&".join(f"{name}={value}" for name, value in pairs)
    headers = {"host": place.netloc.rpartition("@")[2], "x-amz-content-sha256": payload, "x-amz-date": time}
    if access.token:
        headers["x-amz-security-token"] = access.token
    names = ";".join(headers)  # in the order of the alphabet
    lines = "".join(f"{name}:{value}\n" for name, value in headers.items())
    scope = f"{time[:8]}/{access.region}/s3/aws4_request"
    canonical = hashlib.sha256(f"{method}\n{path}\n{asked}\n{lines}\n{names}\n{payload}".encode()).hexdigest()
    signing = f"AWS4{access.secret}".encode()
    for part in (*scope.split("/"), f"AWS4-HMAC-SHA256\n{time}\n{scope}\n{canonical}"):
        signing = hmac.digest(signing, part.encode(), "sha256")
    credential = f"Credential={access.key}/{scope}, SignedHeaders={names}, Signature={signing.hex()}"
    headers["authorization"] = f"AWS4-HMAC-SHA256 {credential}"
    return SignedRequest(f"{place.scheme}://{place.netloc}{path}" + (f"?{asked}" if asked else ""), headers)
