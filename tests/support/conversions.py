"""What the tests of whole conversions share: the oracle of each family, its numbers of ranks, and how to compare."""

import filecmp
from collections.abc import Callable, Mapping
from pathlib import Path

import oracle_families as oracles

Oracle = Callable[[Path, Path, int], None]

ORACLES: Mapping[str, Oracle] = {
    "deepseek-v3": oracles.convert_v3,
    "deepseek-v3-for-32": oracles.convert_v3,
    "deepseek-v3.2-exp": oracles.convert_v32,
    "deepseek-v3.2": oracles.convert_v32,
    "kimi-k2": oracles.convert_kimi_k2,
    "glm-5.1": oracles.convert_glm51,
    "glm-5.1-fp8": oracles.convert_glm51,
    "glm-5.2-fp8": oracles.convert_glm51,
    "deepseek-v4-flash": oracles.convert_v4,
    "deepseek-v4-flash-0731": oracles.convert_v4_0731,
    "deepseek-v4-flash-vision": oracles.convert_v4_vision,
    "deepseek-v4-pro": oracles.convert_v4,
    "deepseek-v4.1-flash": oracles.convert_v41,
}
LEGAL: Mapping[str, tuple[int, ...]] = {
    **dict.fromkeys(ORACLES, (1, 2, 4, 8)),
    "deepseek-v3-for-32": (1, 2, 4, 8, 16),
    "deepseek-v4-flash": (1, 2, 4),
    "deepseek-v4-pro": (1, 2, 4, 8, 16),
}
"""The numbers of ranks that the small checkpoint of each family can be cut for, all of them."""


def require_equal(wanted: Path, found: Path) -> None:
    """The rank files and what else the oracle writes are there, byte for byte, and no other rank file is."""
    names = sorted(path.name for path in wanted.iterdir())
    assert [name for name in names if not filecmp.cmp(wanted / name, found / name, shallow=False)] == []
    ranks = {path.name for path in found.glob("*.safetensors")}
    assert ranks == {name for name in names if name.endswith(".safetensors")}
