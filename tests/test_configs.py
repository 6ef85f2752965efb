"""The run configurations beside the rank files: what the inference code is told that it would otherwise take wrong."""

import json
from pathlib import Path
from typing import Any

import pytest
from families import write_small

from reshard.configs import run_config
from reshard.convert import Job, plan_conversion


@pytest.mark.parametrize("name", ["deepseek-v4-flash", "deepseek-v4-flash-0731", "deepseek-v4.1-flash"])
@pytest.mark.parametrize(
    ("change", "dtype", "of_experts"),
    [({}, "fp8", "fp4"), ({"expert_dtype": "fp8"}, "fp8", None), ({"cast": "bf16"}, "bf16", None)],
)
def test_the_run_configuration_of_v4_names_the_dtypes_that_are_written(
    name: str, change: dict[str, Any], dtype: str, of_experts: str | None, tmp_path: Path
) -> None:
    """The models of V4 take FP8 for granted: in BF16 they would round every weight while they load it."""
    write_small(tmp_path / "source", name)
    found = json.loads(run_config(plan_conversion(Job(tmp_path / "source", 2, **change))))
    assert (found["dtype"], found.get("expert_dtype")) == (dtype, of_experts)


def test_the_run_configuration_of_glm_has_its_rope_theta(tmp_path: Path) -> None:
    write_small(tmp_path / "source", "glm-5.1")
    assert json.loads(run_config(plan_conversion(Job(tmp_path / "source", 2))))["rope_theta"] == 1_000_000
