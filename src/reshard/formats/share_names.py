"""The folders of shares, the parts of a conversion that several processes make at the same time: `.share-1-of-4`."""

import re
from pathlib import Path

from reshard.errors import refuse
from reshard.formats.target_names import JOURNAL, MANIFEST, list_names
from reshard.paths import AnyPath
from reshard.types import Share

SHARE_FOLDER = re.compile(r"\.share-(0|[1-9]\d{0,3})-of-([1-9]\d{0,3})", re.ASCII)


def name_share_folder(share: Share) -> str:
    """Names the folder of a share in its target. It is hidden: what lies there is not yet the target's."""
    return f".share-{share.number}-of-{share.shares}"


def parse_share_folder(name: str) -> Share | None:
    """Parses the name of a share's folder; None if it is no such name."""
    found = SHARE_FOLDER.fullmatch(name)
    share = Share(int(found[1]), int(found[2])) if found else None
    return share if share and share.number < share.shares else None


def is_share_manifest(name: str) -> bool:
    """Whether a name in a target is that of the manifest of a share."""
    folder, _, file = name.rpartition("/")
    return file == MANIFEST and parse_share_folder(folder) is not None


def list_share_folders(folder: AnyPath) -> dict[str, Share]:
    """Lists the shares that are finished or begun in a target, by the names of their folders, in their order."""
    found = {name: share for name in list_names(folder) if (share := parse_share_folder(name))}
    try:
        begun = {
            name: share
            for name, share in found.items()
            if any((folder / name / one).is_file() for one in (MANIFEST, JOURNAL))
        }
    except PermissionError as error:
        raise refuse("no-permission", str(error.filename), "not ours to read", "a share that we may join") from None
    return dict(sorted(begun.items(), key=lambda item: (item[1].shares, item[1].number)))


def find_share_of_folder(folder: AnyPath) -> Share | None:
    """Finds the share that a folder is of, by its name; None of any other folder."""
    return parse_share_folder(folder.resolve().name if isinstance(folder, Path) else folder.name)
