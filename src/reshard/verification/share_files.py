"""The whole files of a share: its index names the files of all shares, and it is compared with the source alone."""

from collections.abc import Iterator, Sequence

from reshard.errors import Problem, Refused
from reshard.formats.manifest import list_rank_files, read_valid_manifest
from reshard.paths import AnyPath
from reshard.verification.index_and_config import check_target_index
from reshard.verification.target_folder import TargetHeader

SHARE_AGAIN_HINT = "make this share again: --restart with its --share"


def check_share_files(target: AnyPath, files: Sequence[TargetHeader]) -> Iterator[Problem]:
    """Reports files that the manifest of a share names and that are not there, and tensors that the index has in
    another file. What lies in no share at all is seen when all of them are joined.
    """
    own = list_rank_files(read_valid_manifest(target))
    for name in sorted(own):
        if not (target / name).exists():
            yield Problem("missing-file", name, "no such file", "a file of this share", SHARE_AGAIN_HINT)
    try:
        yield from check_target_index(target, files, own)
    except Refused as refused:
        yield from refused.problems
