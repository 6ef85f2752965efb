"""Tells whether the block scales of quantized weights are powers of two."""

from collections.abc import Sequence

import numpy as np

from reshard.paths import AnyPath
from reshard.storage.opened import open_regular_file
from reshard.verification.expected import QUANTIZE, WeightUnit, infer_conversion
from reshard.verification.provenance import Provenance
from reshard.verification.reference_casts import find_powers_of_two
from reshard.verification.slices import find_stored_tensor

MOST_PROBED_SCALES = 64
"""At most so many block scale tensors, and so many bytes of each, decide whether scales are powers of two."""

PROBED_SCALE_SIZE = 64 << 10


def has_power_of_two_scales(target: AnyPath, units: Sequence[WeightUnit], trace: Provenance) -> bool:
    """Whether most scales of quantized weights are powers of two: then all should be."""
    tensors, folder = trace.source.tensors, trace.folder
    powers, others, asked = 0, 0, 0
    for unit in units:
        weight, scale = tensors.get(unit.place.weight), tensors.get(unit.place.scale)
        if asked == MOST_PROBED_SCALES:
            break
        if not (weight and unit.scale and infer_conversion(unit, weight, scale, is_whole=folder.is_whole) == QUANTIZE):
            continue
        seen = find_stored_tensor(unit.scale, trace.slices)
        with open_regular_file(target / folder.names[seen.number]) as file:
            file.seek(seen.tensor.offset)
            data = np.frombuffer(file.read(min(seen.tensor.size // 4 * 4, PROBED_SCALE_SIZE)), np.float32)
        asked += 1
        data = data[data != 1]  # such as those of zeros
        count = int(np.count_nonzero(find_powers_of_two(data)))
        powers, others = powers + count, others + len(data) - count
    return powers > others
