"""`--share auto`: the variables as Slurm 22.05, torchrun 2.13, Open MPI, MPICH and Kubernetes set them, and traps."""

from collections.abc import Mapping

import pytest

from reshard.errors import Refused
from reshard.planning.shares import parse_share
from reshard.types import Share


def make_array(number: int, numbers: list[int], step: int = 1) -> dict[str, str]:
    """The variables in the batch script of an array task: SLURM_PROCID is there too, and is always 0."""
    found = {"ID": number, "COUNT": len(numbers), "MIN": min(numbers), "MAX": max(numbers), "STEP": step}
    named = {f"SLURM_ARRAY_TASK_{name}": str(value) for name, value in found.items()}
    return {**named, "SLURM_PROCID": "0", "SLURM_LOCALID": "0"}


def make_step(number: int, count: int) -> dict[str, str]:
    """The variables in a process that srun starts."""
    counts = dict.fromkeys(("SLURM_NTASKS", "SLURM_NPROCS", "SLURM_STEP_NUM_TASKS"), str(count))
    return {"SLURM_PROCID": str(number), **counts, "SLURM_STEP_ID": "0"}


def make_torchrun(number: int, count: int) -> dict[str, str]:
    return {"RANK": str(number), "WORLD_SIZE": str(count), "LOCAL_RANK": "0", "GROUP_RANK": "0"}


PMI = {"PMI_RANK": "2", "PMI_SIZE": "4"}
BATCH = {"SLURM_PROCID": "0", "SLURM_NTASKS": "8", "SLURM_NPROCS": "8", "SLURM_LOCALID": "0"}
"""In a batch script of eight tasks, outside of srun."""
POD = {"JOB_COMPLETION_INDEX": "3"}
FOUR = [0, 1, 2, 3]


@pytest.mark.parametrize(
    ("text", "variables", "expected"),
    [
        ("auto", make_array(2, FOUR), (2, 4)),
        ("auto", make_array(0, [0]), (0, 1)),
        ("auto", {**make_array(2, FOUR), **make_step(0, 1)}, (2, 4)),  # srun in each task of an array
        ("auto", {**make_array(0, [0]), **make_step(3, 4)}, (3, 4)),
        ("auto", make_step(1, 2), (1, 2)),
        ("auto", {**make_step(2, 4), **PMI}, (2, 4)),  # srun --mpi=pmi2
        ("auto", make_torchrun(5, 8), (5, 8)),
        ("auto", {**make_step(0, 1), **make_torchrun(5, 8)}, (5, 8)),
        ("auto", {"OMPI_COMM_WORLD_RANK": "0", "OMPI_COMM_WORLD_SIZE": "3", "PMIX_RANK": "0"}, (0, 3)),
        ("auto", PMI, (2, 4)),
        ("auto", make_step(0, 1), (0, 1)),
        ("auto/8", POD, (3, 8)),
        ("auto/4", {**POD, **make_torchrun(3, 4)}, (3, 4)),
        ("auto/8", make_array(2, [2]), (2, 8)),  # one task that is run again
        ("auto/8", make_array(0, [0]), (0, 8)),
        ("auto/8", {**make_array(0, [0]), **make_step(0, 1)}, (0, 8)),
        ("auto/8", make_array(5, [1, 5]), (5, 8)),
        ("auto/8", make_array(6, [0, 2, 4, 6], 2), (6, 8)),
        ("auto/2", make_step(1, 2), (1, 2)),
    ],
)
def test_share_of_a_launcher(text: str, variables: Mapping[str, str], expected: tuple[int, int]) -> None:
    assert parse_share(text, variables) == Share(*expected)


@pytest.mark.parametrize(
    ("text", "variables", "subject", "words"),
    [
        # An array that is not all of 0 to N - 1 counts no shares: 0 of 4 is not 0 of 2.
        ("auto", make_array(2, [2]), "--share auto", "some tasks only"),
        ("auto", make_array(1, [1, 3]), "--share auto", "--share auto/N"),
        ("auto", make_array(1, [1, 2, 3, 4]), "--share auto", "all tasks from 0 on"),
        ("auto", make_array(0, [0, 2, 4, 6], 2), "--share auto", "SLURM_ARRAY_TASK_STEP 2"),
        ("auto", make_array(0, [0, 1, 3]), "--share auto", "SLURM_ARRAY_TASK_MAX 3"),
        ("auto", {"SLURM_ARRAY_TASK_ID": "1"}, "--share auto", "--share auto/N"),
        # Its first task too: without a share 0 nothing can be joined.
        ("auto/4", make_array(1, [1, 2, 3, 4]), "SLURM_ARRAY_TASK_MAX", "sbatch --array=0-3"),
        ("auto/4", {"SLURM_ARRAY_TASK_ID": "4"}, "SLURM_ARRAY_TASK_ID", "0 to 3"),
        ("auto", BATCH, "--share auto", "was not started by srun"),
        ("auto/8", BATCH, "--share auto", "srun before the command"),
        ("auto", {**BATCH, **make_torchrun(0, 1)}, "--share auto", "srun before the command"),
        ("auto", {}, "--share auto", "none of SLURM_ARRAY_TASK_ID"),
        ("auto", {"RANK": "1"}, "--share auto", "none of"),
        ("auto/4", {}, "--share auto", "--share I/N"),
        ("auto", POD, "--share auto", "completions"),
        ("auto/3", POD, "JOB_COMPLETION_INDEX", "0 to 2"),
        ("auto", {**make_array(1, FOUR), **make_torchrun(1, 8)}, "--share auto", "$RANK/$WORLD_SIZE"),
        ("auto", {**make_step(1, 2), **make_torchrun(9, 16)}, "--share auto", "SLURM_PROCID 1 of 2 and RANK 9 of 16"),
        ("auto", {**make_array(1, FOUR), **make_step(2, 4)}, "--share auto", "SLURM_ARRAY_TASK_ID 1 of 4"),
        ("auto/8", {**make_array(2, [2]), **make_step(1, 8)}, "--share auto", "SLURM_ARRAY_TASK_ID 2 and"),
        ("auto/8", {**POD, **make_torchrun(4, 8)}, "--share auto", "JOB_COMPLETION_INDEX 3"),
        ("auto/8", make_step(1, 4), "SLURM_STEP_NUM_TASKS", "4 8, as"),
        ("auto/8", make_step(0, 1), "SLURM_STEP_NUM_TASKS", "1 8, as"),
        ("auto", make_torchrun(8, 8), "RANK", "less than WORLD_SIZE"),
        ("auto", make_torchrun(0, 0), "RANK", "less than WORLD_SIZE"),
        ("auto", {**make_array(1, FOUR), "SLURM_ARRAY_TASK_ID": "7"}, "SLURM_ARRAY_TASK_ID", "at most"),
        ("auto", {**make_array(1, FOUR), "SLURM_ARRAY_TASK_COUNT": "x"}, "SLURM_ARRAY_TASK_COUNT", "a number"),
        ("auto/4", {"JOB_COMPLETION_INDEX": "-1"}, "JOB_COMPLETION_INDEX", "a number"),
        ("auto", {**make_torchrun(1, 2), "RANK": ""}, "RANK", "a number"),
        ("auto", {**make_torchrun(1, 2), "WORLD_SIZE": "²"}, "WORLD_SIZE", "a number"),
        ("auto/0", make_torchrun(0, 1), "--share", "auto/N"),
        ("auto", make_torchrun(0, 100_000), "--share", "1 to"),
    ],
)
def test_variables_that_tell_no_share(text: str, variables: Mapping[str, str], subject: str, words: str) -> None:
    with pytest.raises(Refused) as refused:
        parse_share(text, variables)
    (problem,) = refused.value.problems
    assert problem.subject == subject
    assert words in f"{problem.found} {problem.expected} {problem.remedy}", problem
