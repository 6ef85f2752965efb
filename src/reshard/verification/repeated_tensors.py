"""Compares two tensors of one checkpoint that must have the same bytes: a tied head in slices, and its embedding."""

from contextlib import ExitStack
from dataclasses import replace

from reshard.errors import Problem
from reshard.storage.local import PAGE, allocate_aligned
from reshard.types import Checkpoint, Tensor
from reshard.verification.chunks import BAND_SIZE
from reshard.verification.compared_files import make_compared_files, open_compared_files
from reshard.verification.report import Report
from reshard.verification.target_folder import CONVERT_AGAIN_HINT


def add_repeated_tensor(
    report: Report, checkpoint: Checkpoint, repeated: tuple[str, Tensor | None, Tensor] | None
) -> Report:
    """Adds to a report that a tensor, by its name, is missing or differs from another one. Raises Refused."""
    if repeated is None:
        return report
    name, one, other = repeated
    if one and has_same_bytes(checkpoint, one, other):
        return report
    expected = f"those of {other.name}, to which the model ties it"
    problem = Problem("differs", name, "other bytes, or another shape or dtype", expected, CONVERT_AGAIN_HINT)
    if one is None:
        expected = f"the bytes of {other.name}, to which the model ties it"
        problem = Problem("missing-tensor", name, "in none of these files", expected, CONVERT_AGAIN_HINT)
    return replace(report, problems=(*report.problems, problem))


def has_same_bytes(checkpoint: Checkpoint, one: Tensor, other: Tensor) -> bool:
    """Whether two tensors of a checkpoint are equal. Raises Refused."""
    if (one.dtype, one.shape) != (other.dtype, other.shape):
        return False
    files, _ = make_compared_files(checkpoint.folder, {}, checkpoint)
    buffers = [allocate_aligned(BAND_SIZE + 2 * PAGE) for _ in range(2)]
    with ExitStack() as stack:
        opened = open_compared_files(stack, files, is_random=False)
        for start in range(0, one.size, BAND_SIZE):
            size = min(BAND_SIZE, one.size - start)
            first, second = (
                opened.read(tensor.file, tensor.offset + start, size, buffer)
                for tensor, buffer in zip((one, other), buffers, strict=True)
            )
            if first.tobytes() != second.tobytes():
                return False
    return True
