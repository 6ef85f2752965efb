"""Finds which share a process is to make by the variables that Slurm, torchrun, MPI and Kubernetes set."""

import re
from collections.abc import Iterator, Mapping, Sequence
from typing import NamedTuple

from reshard.errors import Refused, refuse
from reshard.types import Share

ARRAY = "SLURM_ARRAY_TASK_ID"
PODS = "JOB_COMPLETION_INDEX"
"""Of an Indexed Job of Kubernetes, which tells no pod how many there are."""
TASKS = "SLURM_NTASKS"
PAIRS = {
    "SLURM_PROCID": "SLURM_STEP_NUM_TASKS",
    "RANK": "WORLD_SIZE",
    "OMPI_COMM_WORLD_RANK": "OMPI_COMM_WORLD_SIZE",
    "PMI_RANK": "PMI_SIZE",
}
"""The variables of launchers that number their processes, and those that count them: Slurm's steps, torchrun, Open MPI,
MPICH and its kin. One without the other tells nothing: in a batch script, outside of srun, SLURM_PROCID is always 0.
"""
NUMBER = re.compile(r"\d{1,6}", re.ASCII)


class Told(NamedTuple):
    """What the variables of one launcher tell of a process."""

    variable: str
    number: int
    processes: int | None
    """How many there are; None if they do not tell it, or not for sure."""


def find_share(variables: Mapping[str, str], count: int | None) -> Share:
    """Finds the number of a share and, unless it is given, the number of shares. Raises Refused."""
    told = [*list_told(variables, count)]
    # A launcher of one process tells nothing beside one of several, as srun in each task of an array.
    several = [one for one in told if (one.number, one.processes) != (0, 1)]
    if not several and (count is None or not told):
        require_launcher(variables, is_told=bool(told))
    chosen = several or told[:1]
    require_agreement(chosen)
    for one in chosen:
        if count is None and one.processes is None:
            raise refuse_without_count(one.variable, variables)
        if count is not None and one.processes != count and one.variable in PAIRS:
            found, expected = str(one.processes), f"{count}, as --share auto/{count} says"
            raise refuse("wrong-option", PAIRS[one.variable], found, expected)
        if count is not None and one.number >= count:
            raise refuse("wrong-option", one.variable, str(one.number), f"0 to {count - 1}, for --share auto/{count}")
    return Share(chosen[0].number, count or chosen[0].processes or 1)


def list_told(variables: Mapping[str, str], count: int | None) -> Iterator[Told]:
    """Lists what each launcher tells of this process. Raises Refused."""
    if ARRAY in variables:
        yield read_array(variables, count)
    for variable, counting in PAIRS.items():
        if variable in variables and counting in variables:
            number, processes = read_number(variables, variable), read_number(variables, counting)
            if number >= processes:
                raise refuse("wrong-option", variable, str(number), f"less than {counting}, {processes}")
            yield Told(variable, number, processes)
    if PODS in variables:
        yield Told(PODS, read_number(variables, PODS), None)


def read_array(variables: Mapping[str, str], count: int | None) -> Told:
    """Reads the variables of an array. It counts shares only if it has all tasks from 0 on: one of the task 2 alone may
    be that of several that is run again. Raises Refused.
    """
    number = read_number(variables, ARRAY)
    tasks, first, last, step = (
        read_number(variables, name) if (name := f"SLURM_ARRAY_TASK_{word}") in variables else None
        for word in ("COUNT", "MIN", "MAX", "STEP")
    )
    if last is not None and number > last:
        raise refuse("wrong-option", ARRAY, str(number), f"at most SLURM_ARRAY_TASK_MAX, {last}")
    # In each task, not in the last only: one that begins at 1 would leave share 0 unmade.
    if count is not None and last is not None and last >= count:
        expected, remedy = f"0 to {count - 1}, for --share auto/{count}", f"sbatch --array=0-{count - 1}"
        raise refuse("wrong-option", "SLURM_ARRAY_TASK_MAX", str(last), expected, remedy)
    is_whole = tasks is not None and (first, last, step) == (0, tasks - 1, 1)
    return Told(ARRAY, number, tasks if is_whole else None)


def read_number(variables: Mapping[str, str], name: str) -> int:
    """Reads the value of a variable. Raises Refused."""
    if not NUMBER.fullmatch(variables[name]):
        raise refuse("wrong-option", name, repr(variables[name]), "a number from 0 on, for --share auto")
    return int(variables[name])


def require_launcher(variables: Mapping[str, str], *, is_told: bool) -> None:
    """Raises Refused if nothing tells which of several processes this is. One alone may be told by its launcher."""
    tasks = read_number(variables, TASKS) if TASKS in variables else 1
    if tasks > 1:
        found = f"{TASKS} is {tasks}, and this process was not started by srun"
        remedy = "srun before the command, or an array: sbatch --array"
        raise refuse("wrong-option", "--share auto", found, "a process for each task", remedy)
    if not is_told:
        names = ", ".join([ARRAY, *(f"{name} and {count}" for name, count in PAIRS.items()), PODS])
        raise refuse("wrong-option", "--share auto", f"none of {names}", "the variables of a launcher", "--share I/N")


def require_agreement(told: Sequence[Told]) -> None:
    """Raises Refused if two launchers number this process, and not alike, as torchrun in the tasks of an array."""
    numbers, counts = {one.number for one in told}, {one.processes for one in told if one.processes is not None}
    if len(numbers) > 1 or len(counts) > 1:
        found = " and ".join(
            f"{one.variable} {one.number}{f' of {one.processes}' if one.processes else ''}" for one in told
        )
        pairs = [one.variable for one in told if one.variable in PAIRS]
        such = f", such as --share ${pairs[-1]}/${PAIRS[pairs[-1]]}" if pairs else ""
        raise refuse(
            "wrong-option", "--share auto", found, "one of them", f"--share I/N with the variables of one{such}"
        )


def refuse_without_count(variable: str, variables: Mapping[str, str]) -> Refused:
    """Makes the refusal of a launcher that does not tell how many shares there are."""
    found, expected = f"{variable} is {variables[variable]}, and nothing tells of how many", "the number of shares"
    remedy = "--share auto/N, where N is the number of shares: completions of the Job"
    if variable == ARRAY:
        tasks = ", ".join(
            f"{name} {variables[name]}"
            for word in ("COUNT", "MIN", "MAX", "STEP")
            if (name := f"SLURM_ARRAY_TASK_{word}") in variables
        )
        found, expected = f"an array of some tasks only: {tasks or ARRAY}", "all tasks from 0 on, as sbatch --array=0-7"
        remedy = "--share auto/N, where N is the number of shares; the number of the task is that of its share"
    return refuse("wrong-option", "--share auto", found, expected, remedy)
