"""The level of a job in a store, by parts or by streams: a job stays at the level at which it was begun."""

import os
from collections.abc import Iterator, Mapping
from typing import Any

from reshard.errors import Problem
from reshard.execution.journal import RESTART
from reshard.storage.s3_signing import OTHER_SETTINGS
from reshard.storage.target_store import TargetStore

LEVEL, PARTS, STREAM = "level", "parts", "stream"
"""A key of the job, and its values: whether parts are kept."""


def check_level(job: Mapping[str, Any], store: TargetStore) -> Iterator[Problem]:
    """Reports a job that was begun at another level than that of this run: a stream cannot throw uploads away that were
    noted, and nobody would know of them any more.
    """
    is_of_parts = job.get(LEVEL) != STREAM
    if is_of_parts == store.keeps_parts:
        return
    if is_of_parts:
        found = "an unfinished conversion in parts, begun with keys in the environment or in a profile"
        expected = "one by streams, for this run has no such keys, or a setting that only obstore knows"
        others = [name for name in OTHER_SETTINGS if os.environ.get(name)]
        remedy = "give keys as it was begun (AWS_ACCESS_KEY_ID and AWS_SECRET_ACCESS_KEY, or AWS_PROFILE)"
        remedy = f"run it without {', '.join(others)}, as it was begun" if others else remedy
        remedy += ", to go on or to --restart; or another target"
    else:
        found = "an unfinished conversion by streams, begun with the role of a machine, or one of the settings "
        found += ", ".join(OTHER_SETTINGS)
        expected = "one in parts, for this run has keys in the environment or in a profile, and none of these"
        remedy = f"run it as it was begun; or {RESTART}"
    yield Problem("another-job", store.address, found, expected, remedy)
