"""How the files of a plan are uploaded to a store: said by `plan` before anything is written."""

from typing import NamedTuple

from reshard.execution.execute import Settings
from reshard.execution.store_target import choose_part_size, measure_memory_of_job
from reshard.planning.plan import Plan
from reshard.storage.target_store import TargetStore
from reshard.text import format_size


class UploadPlan(NamedTuple):
    """How the files of a plan are uploaded to a store."""

    part_size: int
    """Of a part at least, in bytes, but for the last of a file."""
    keeps_parts: bool
    """Whether a part that was put need not be put again after an interruption."""
    memory: int
    """That each job takes, in bytes."""


def plan_upload(plan: Plan, store: TargetStore) -> UploadPlan:
    """Plans the upload of files, with the default of `--max-memory`. Raises Refused if that is too little."""
    part_size = choose_part_size(plan, store, Settings())
    return UploadPlan(part_size, store.keeps_parts, measure_memory_of_job(plan, store, part_size))


def describe_upload(upload: UploadPlan) -> str:
    """Describes an upload for people."""
    again = "those that were put are not put again" if upload.keeps_parts else "a file that is not whole begins anew"
    return f"uploads parts of {format_size(upload.part_size)} or more; after an interruption {again}"
