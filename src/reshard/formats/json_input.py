"""JSON that strangers wrote: of bounded size, without duplicate keys, with plain file names."""

import json
from collections import Counter
from collections.abc import Callable
from typing import Any, TypeGuard

from reshard.errors import refuse
from reshard.formats.file_content import LOOKED_AT, require_json_content, require_no_answer
from reshard.formats.unfinished_downloads import require_finished_download
from reshard.paths import AnyPath
from reshard.storage.opened import measure_open_file, open_regular_file

MAX_HEADER_SIZE = 100_000_000

MAX_INTEGER = 2**63 - 1


def refuse_duplicate_keys(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    found = dict(pairs)
    if len(found) != len(pairs):
        twice, _ = Counter(key for key, _ in pairs).most_common(1)[0]
        raise ValueError(f"the key {twice!r} stands twice")
    return found


def is_plain(name: str) -> bool:
    """Whether a file name stays in its folder."""
    return bool(name) and not set(name) & set("/\\\0") and name not in {".", ".."}


def is_text(value: Any) -> TypeGuard[str]:
    """Whether a value is a string that UTF-8 can write: JSON can spell half of a surrogate pair."""
    try:
        return isinstance(value, str) and value.encode() is not None
    except UnicodeEncodeError:
        return False


def is_size(value: Any) -> bool:
    return type(value) is int and 0 <= value <= MAX_INTEGER


def shorten_json(value: Any) -> str:
    text = json.dumps(value)
    return text if len(text) <= 80 else text[:77] + "..."


DOWNLOAD_AGAIN = "download or copy it again"

POINTER = b"version https://git-lfs"
"""So begins what git has in the place of a large file until git-lfs fetches that."""


def require_no_pointer(path: AnyPath, beginning: bytes) -> None:
    """Raises Refused."""
    if beginning.startswith(POINTER):
        expected, remedy = "the file that it stands for", "git lfs pull, in the folder that was cloned"
        raise refuse("lfs-pointer", str(path), "a git-lfs pointer", expected, remedy)


def read_object(
    path: AnyPath, most: int = MAX_HEADER_SIZE, parse: Callable[[bytes], Any] = json.loads
) -> dict[str, Any] | None:
    """The JSON object in a file of at most so many bytes, or None if there is no such file. Raises Refused if it holds
    anything else.
    """
    text = b""
    try:
        require_finished_download(path)
        with open_regular_file(path) as file:
            size, _ = measure_open_file(file)
            if size > most:
                raise refuse("too-large", str(path), f"{size:,} bytes", f"at most {most:,} bytes", DOWNLOAD_AGAIN)
            text = file.read(size)
        require_no_pointer(path, text)
        value = parse(text)
    except (FileNotFoundError, NotADirectoryError):
        return None
    except OSError as error:
        raise refuse("cannot-read", str(path), error.strerror or str(error), "a readable file") from None
    except (ValueError, RecursionError) as error:
        require_json_content(path, text[:LOOKED_AT])
        found = f"{type(error).__name__}: {error}" if text else "an empty file"
        raise refuse("not-json", str(path), found, "JSON", DOWNLOAD_AGAIN) from None
    if not isinstance(value, dict):
        raise refuse("not-json", str(path), f"a JSON {type(value).__name__}", "a JSON object", DOWNLOAD_AGAIN)
    require_no_answer(path, value)
    return value
