"""Names of checkpoints on a hub or in a bucket, where a path is expected, and the commands that download them."""

import re
import shlex
from pathlib import Path
from typing import NamedTuple

ADDRESS = re.compile(r"([a-z][a-z0-9+.-]*):/+(.*)", re.DOTALL)
"""An address as a path has it: a path has one slash where the address had two."""

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


def restore_address(path: Path) -> str:
    """A path as it was given: `s3://bucket/model` where a path has one slash."""
    found = ADDRESS.fullmatch(str(path))
    return f"{found[1]}://{found[2]}" if found else str(path)


def suggest_download(path: Path) -> str:
    """The hint for a path that is not there, if it may be an address or the name of a repository; else empty."""
    host, _, rest = str(path).partition("/")
    if address := ADDRESS.fullmatch(str(path)):
        scheme, rest = address.groups()
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
