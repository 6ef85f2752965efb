"""The scales and factors that NVFP4 should have for the codes of MXFP4. Shares no code with `casts`."""

import numpy as np
from numpy.typing import NDArray

from reshard.verification.reference_casts import CastTile, TileBytes, compute_fp8_values

OLD_GROUP, NEW_GROUP = 32, 16
"""In elements: the columns that share a scale before and after."""

IN_BYTE = 2
"""Codes."""

NAN_CODE = 255
"""In F8_E8M0."""


def compute_nvfp4_tile(weight: TileBytes, scale: TileBytes | None, factor: TileBytes) -> CastTile:
    """Computes what a tile should have: the bytes of the factor, and the scales [rows, groups].

    `weight` and `scale` are the bytes of a tile of the source, which begins with a group; `factor` are those of the
    target [1, 4]. They are right if they are those of a power of two by which the scales can be divided to give those
    of the source. Of groups without any number but zeros, a scale that does not fit is the nearest power of two.
    """
    if scale is None:
        raise ValueError("a weight of MXFP4 has scales")
    number = float(factor.copy().view(np.float32)[0, 0])
    is_power = np.isfinite(number) and number > 0 and np.frexp(number)[0] == 0.5
    codes, fits = tabulate_nvfp4_scales(number if is_power else 1.0)
    misfits = ~fits[scale]
    if np.any(misfits):
        half = OLD_GROUP // IN_BYTE
        padded = np.zeros((len(weight), scale.shape[1] * half), np.uint8)
        padded[:, : weight.shape[1]] = weight & 0x77  # without signs
        misfits &= padded.reshape(*scale.shape, half).any(axis=2) | (scale == NAN_CODE)
    wanted = factor if is_power and not np.any(misfits) else ~factor
    groups = -(-weight.shape[1] * IN_BYTE // NEW_GROUP)
    return CastTile(wanted, np.repeat(codes[scale], OLD_GROUP // NEW_GROUP, axis=1)[:, :groups], 0)


def tabulate_nvfp4_scales(factor: float) -> tuple[TileBytes, NDArray[np.bool_]]:
    """By E8M0 code [256]: the F8_E4M3 code of its number times a factor, and whether there is one. Where there is none:
    that of the smallest or the largest power of two.
    """
    values = compute_fp8_values()[:127].astype(np.float64)
    powers = {float(value): code for code, value in enumerate(values) if value and np.frexp(value)[0] == 0.5}
    products = [np.ldexp(factor, code - 127) for code in range(255)] + [0.0]
    least, most = min(powers), max(powers)
    codes = [powers[min(max(float(product), least), most)] for product in products]
    return np.array(codes, np.uint8), np.array([product in powers for product in products])
