"""The run configurations beside the rank files: what the inference code is told that it would otherwise take wrong."""

import hashlib
import json
from pathlib import Path
from typing import Any

import pytest
from families import write_full, write_small

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


@pytest.mark.parametrize(
    ("name", "digest"),
    [
        ("deepseek-v4-flash", "6cc6f816ca73a8d38750194e330398e4f6955b4b45f674f7d29c96da14ccb733"),
        ("deepseek-v4-pro", "a6aded1806a2dbacbbab89bae2380d0422a6d0dcc55c946b421c7f5e06ef6094"),
    ],
)
def test_the_run_configuration_of_v4_is_the_published_file(name: str, digest: str, tmp_path: Path) -> None:
    """SHA-256 of inference/config.json: as published for Pro; for Flash, of the text whose git blob is 692cf97a8f71."""
    write_full(tmp_path / "source", name)
    text = run_config(plan_conversion(Job(tmp_path / "source", 8))).encode()
    assert hashlib.sha256(text).hexdigest() == digest
