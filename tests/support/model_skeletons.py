"""The skeleton of the model of each family, and what each model takes for granted where its configuration is silent."""

from collections.abc import Callable, Mapping
from typing import Any

import skeletons
from conversions import ORACLES
from skeletons import Parameters
from skeletons_v4 import v4_0731_parameters, v4_parameters, v4_vision_parameters, v41_parameters

TAKEN_FOR_GRANTED: Mapping[str, Mapping[str, Any]] = {
    "v3": {"dtype": "bf16", "q_lora_rank": 0},
    "v4": {"dtype": "fp8", "expert_dtype": None, "n_mtp_layers": 1, "n_hash_layers": 0},
    "v4.1": {"dtype": "fp8", "expert_dtype": "fp4"},
}
"""By the models, where the configuration is silent."""

Skeleton = Callable[[Mapping[str, Any], int, int], Parameters]


def with_bias(skeleton: Callable[..., Parameters]) -> Skeleton:
    """These models have the bias of a gate only if they are as wide as V3, which no small one is."""
    return lambda args, ranks, rank: skeleton(args, ranks, rank, gate_bias=True)


MODELS: Mapping[str, tuple[str, Skeleton]] = {
    **dict.fromkeys(ORACLES, ("v3", with_bias(skeletons.v3_parameters))),
    **dict.fromkeys(
        ("deepseek-v3.2-exp", "deepseek-v3.2", "glm-5.1", "glm-5.1-fp8", "glm-5.2-fp8"),
        ("v3", with_bias(skeletons.v32_parameters)),
    ),
    "deepseek-v4-flash": ("v4", v4_parameters),
    "deepseek-v4-pro": ("v4", v4_parameters),
    "deepseek-v4-flash-0731": ("v4", v4_0731_parameters),
    "deepseek-v4-flash-vision": ("v4", v4_vision_parameters),
    "deepseek-v4-pro-0813": ("v4", v4_0731_parameters),
    "deepseek-v4.1-flash": ("v4.1", v41_parameters),
}
