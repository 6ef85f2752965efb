"""Writes what remains of a plan into its target: the one place that chooses between a disk and a store."""

from pathlib import Path

from reshard.execution.execute import Settings, execute_plan
from reshard.execution.store_target import execute_plan_to_store
from reshard.execution.times import RunResult
from reshard.storage.counting import WorkCounter
from reshard.target.preflight import describe_others
from reshard.target.state import TargetState


def write_target(state: TargetState, counter: WorkCounter, settings: Settings) -> RunResult:
    """Writes the files of a plan, side files and manifest. Raises Refused."""
    others = describe_others(state, settings)
    if isinstance(state.place, Path):
        return execute_plan(state.plan, state.place, others, counter, settings)
    return execute_plan_to_store(state.plan, state.place.store, others, counter, settings)
