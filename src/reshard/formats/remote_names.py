"""Addresses and names of hubs and buckets where a path is expected, with the commands that download from there and
upload; and paths that are empty or not there.
"""

import os
import re
import shlex
from contextlib import suppress
from dataclasses import replace
from difflib import get_close_matches
from pathlib import Path
from typing import NamedTuple

from reshard.errors import Refused, refuse
from reshard.paths import AnyPath, RemotePath
from reshard.storage.access_hints import find_endpoint
from reshard.storage.addresses import OPENERS, WRITTEN, open_address, require_plain_addresses
from reshard.text import ADDRESS, hide_secrets, make_path

HUBS = ("huggingface.co", "www.huggingface.co", "hf.co", "hf-mirror.com")

MODELSCOPE = ("modelscope.cn", "www.modelscope.cn")

REPOSITORY = re.compile(
    r"(?:models/)?(?!datasets/|spaces/|models/)([\w-][\w.-]*/[\w-][\w.-]*)(?:@([\w.-]+))?"
    r"(?:/(?:tree|blob|resolve|commit)/([\w.-]+))?(?:[/?#].*)?",
    re.DOTALL,
)
"""A repository with its revision: behind `@` in a path of `hf://`, behind `tree` in the address of a page."""


class Download(NamedTuple):
    """A command that downloads a checkpoint."""

    words: list[str]
    folder: str
    """Where it puts the checkpoint."""

    def __str__(self) -> str:
        return f"download it: {shlex.join(self.words)}; then give {shlex.quote(self.folder)}"


def restore_address(path: AnyPath) -> str:
    """A path as it was given, for messages: `s3://bucket/model` where a path has one slash. Nothing secret is left."""
    found = ADDRESS.fullmatch(str(path))
    if not found:
        return str(path)
    return hide_secrets(f"{found[1]}://{'/' if found[1].lower() == FILE else ''}{found[2]}")


def is_address(path: Path) -> bool:
    """Whether a path is an address."""
    return ADDRESS.fullmatch(str(path)) is not None


def make_full_path(path: Path) -> str:
    """A path that is the same from any folder; an address as it was given."""
    return restore_address(path) if is_address(path) else str(path.absolute())


def require_local_path(given: str | os.PathLike[str]) -> Path:
    """Returns a path as it was given. Raises Refused for an empty string, and for an address."""
    if not os.fspath(given):
        raise refuse("no-source", EMPTY, "no path", "a folder or a file", "is a variable not set?")
    require_plain_addresses("no-source", given)
    path = make_path(os.fspath(given))
    if ADDRESS.fullmatch(str(path)):
        address, remedy = restore_address(path), suggest_download(path)
        raise refuse("no-source", address, "an address", "a folder of this machine", remedy)
    return path


def require_path(given: str | os.PathLike[str]) -> AnyPath:
    """Returns a path as it was given; an address is opened. Raises Refused for an empty string, which would be the
    folder that we are in, and for an address where nothing can be read.
    """
    if not os.fspath(given):
        raise refuse("no-source", EMPTY, "no path", "a folder or a file", "is a variable not set?")
    require_plain_addresses("no-source", given)
    path = make_path(os.fspath(given))
    address = restore_address(path)
    found = ADDRESS.fullmatch(address)
    if found and found[2].partition("/")[0].lower() in HUBS + MODELSCOPE:
        raise refuse("no-source", address, "the address of a page", "hf://ORG/NAME", suggest_for_page(path))
    if found and found[1].lower() not in (*OPENERS, FILE) and not path.exists():
        remedy = suggest_scheme(address, found[1].lower()) or OTHERWISE
        raise refuse("no-source", address, f"an unknown kind of address, {found[1]}://", list_schemes(), remedy)
    try:
        return open_address(os.fspath(given)) or path  # as it was given: a query may have two slashes
    except Refused as refused:
        raise add_download(refused, path) from None


def list_schemes() -> str:
    """The kinds of addresses that are read, as what was expected."""
    return f"a path, or {', '.join(f'{scheme}://' for scheme in sorted(OPENERS))}"


def suggest_scheme(address: str, scheme: str) -> str:
    """The hint for an address of an unknown kind, with a known one; empty if none is like it."""
    near = get_close_matches(scheme, OPENERS, 1, 0.5)
    rest = address[len(scheme) :].replace("...@", "")  # what was hidden
    return f"did you mean {shlex.quote(near[0] + rest)}?" if near else ""


def suggest_for_page(path: Path) -> str:
    """The hint for the address of a page of a hub: the repository on it, as an address that can be read."""
    host, _, rest = restore_address(path).partition("://")[2].partition("/")
    found = REPOSITORY.fullmatch(rest)
    if not found or host not in HUBS:
        return suggest_path(path)
    revision = found[2] or found[3]
    named = f"hf://{found[1]}" + (f"@{revision}" if revision and revision != "main" else "")
    mirror = f", with HF_ENDPOINT=https://{host}" if host not in HUBS[:3] else ""
    return f"give {named}{mirror}; or {suggest_path(path)}"


def add_download(refused: Refused, path: Path) -> Refused:
    """Adds to the refusal of a store that cannot be asked from here how to download from it elsewhere."""
    return add_other_way(refused, str(path), suggest_download(path))


def add_other_way(refused: Refused, address: str, remedy: str) -> Refused:
    """Adds a hint to the refusal of a store that another machine or program may reach. No program reaches a server that
    was named wrongly.
    """
    kinds = ["missing-package"]
    if not find_endpoint(address.partition(":")[0].lower()):
        kinds.append("cannot-read")
    return Refused(
        replace(problem, remedy=f"{problem.remedy}; or {remedy}") if problem.kind in kinds else problem
        for problem in refused.problems
    )


def make_full_location(given: str | os.PathLike[str] | None) -> str:
    """The text of what is given as a path, as it is from any folder; empty for None."""
    return make_full_path(make_path(os.fspath(given))) if given else ""


def read_location(given: str | os.PathLike[str] | None) -> AnyPath | None:
    """The same of what may not be given. Raises Refused."""
    return None if given is None else require_path(given)


def require_target(given: str | os.PathLike[str], *, is_written: bool) -> Path:
    """Returns the path of a target folder on this machine. Raises Refused for an empty string, and for an address: a
    folder of such a name would be made here. `is_written` chooses between the hints: to upload, or to download.
    """
    if not os.fspath(given):
        raise refuse("target-not-folder", EMPTY, "no path", "a folder", "is a variable not set?")
    require_plain_addresses("target-not-folder", given)
    path = Path(given)
    if ADDRESS.fullmatch(str(path)):
        remedy = suggest_upload(path) if is_written else suggest_download(path)
        if not is_written and restore_address(path).partition(":")[0].lower() in WRITTEN:
            remedy += "; or run its convert again with --restart --yes, which writes all of it anew"
        raise refuse("target-not-folder", restore_address(path), "an address", "a folder of this machine", remedy)
    return path


EMPTY = "''"
"""The subject of a refusal of a path without a letter."""

FILE = "file"
"""The scheme of addresses of this machine."""


def suggest_upload(path: Path) -> str:
    """The hint for an address that is to be written."""
    address = restore_address(path)
    scheme, rest = address.split("://", 1)
    host, _, name = rest.partition("/")
    if scheme.lower() == FILE:
        return suggest_download(path)
    command = "your store's own program"
    repository = REPOSITORY.fullmatch(rest if scheme.lower() == "hf" else name)
    if scheme.lower() == "s3":
        command = shlex.join(["aws", "s3", "sync", "FOLDER", address])
    elif scheme.lower() == "gs":
        command = shlex.join(["gcloud", "storage", "rsync", "-r", "FOLDER", address])
    elif repository and (scheme.lower() == "hf" or host in HUBS):
        command = shlex.join(["hf", "upload", repository[1], "FOLDER"])
    return f"convert into a FOLDER, then upload it: {command}"


def suggest_path(path: AnyPath) -> str:
    """The hint for a path that is not there: one like it, what downloads it, or else how to make a small checkpoint."""
    if isinstance(path, RemotePath):
        return "is its name right?"
    return (
        suggest_near(path)
        or suggest_download(path)
        or "is the path right? to try reshard out: reshard demo NEW makes NEW/source"
    )


def suggest_near(path: AnyPath) -> str:
    """The hint for a path that is not there, with one like it; empty if there is none."""
    near = find_near_path(path) if isinstance(path, Path) else None
    return f"did you mean {shlex.quote(str(near))}?" if near else ""


def find_near_path(path: Path) -> Path | None:
    """Finds a folder or safetensors file whose path differs from a missing one in one name, and there little."""
    there = next((above for above in path.parents if above.is_dir()), None)
    if there is None:
        return None
    wanted, *rest = path.relative_to(there).parts
    with suppress(OSError):
        for name in get_close_matches(wanted, [path.name for path in there.iterdir()], 3):
            near = there.joinpath(name, *rest)
            if near.is_dir() or (near.is_file() and near.suffix == ".safetensors"):
                return near
    return None


def suggest_download(path: Path) -> str:
    """The hint for a path that is not there, if it may be an address or the name of a repository; else empty."""
    host, _, rest = str(path).partition("/")
    if address := ADDRESS.fullmatch(restore_address(path)):
        scheme, rest = address[1].lower(), address[2]
        if scheme == FILE:
            return f"give the path /{rest}"
        if scheme in ("s3", "gs"):
            return str(find_bucket_download(scheme, rest) or OTHERWISE)
        if scheme != "hf":
            host, _, rest = rest.partition("/")
        return str(find_hub_download(HUBS[0] if scheme == "hf" else host, rest) or OTHERWISE)
    if host in HUBS + MODELSCOPE:
        return str(find_hub_download(host, rest) or OTHERWISE)
    if not path.parent.exists() and re.fullmatch(r"[\w-][\w.-]*/[\w-][\w.-]*", str(path)):
        return f"if it is a name on the hub, {find_hub_download(HUBS[0], str(path))}"
    return ""


OTHERWISE = "download its files into a folder, and give that folder"


def find_hub_download(host: str, rest: str) -> Download | None:
    """Finds the command that downloads a repository of a hub; None if the address is of another thing."""
    found = REPOSITORY.fullmatch(rest)
    if not found or host not in HUBS + MODELSCOPE:
        return None
    name, revision = found[1], found[2] or found[3] or "main"
    folder = name.partition("/")[2]
    words = ["modelscope", "download", "--model", name] if host in MODELSCOPE else ["hf", "download", name]
    words += ["--revision", revision] if revision not in ("main", "master") else []
    return Download([*words, "--local_dir" if host in MODELSCOPE else "--local-dir", folder], folder)


def find_bucket_download(scheme: str, rest: str) -> Download | None:
    """Finds the command that copies a folder of a bucket; None if the address names none."""
    address, name = f"{scheme}://{rest.rstrip('/')}", rest.rstrip("/").rpartition("/")[2]
    if not name:
        return None
    words = ["aws", "s3", "sync", address, name] if scheme == "s3" else ["gcloud", "storage", "cp", "-r", address, "."]
    return Download(words, name)
