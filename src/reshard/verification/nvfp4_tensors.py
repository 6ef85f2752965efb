"""Finds in a target, by their names, the tensors that NVFP4 has of weights of MXFP4.

    X.weight_packed, X.weight_scale    of the source: U8 codes, and F8_E8M0 as U8
    X.weight_packed                    of the target: the same bytes
    X.weight_scale                     for each 16 columns, F8_E4M3
    X.weight_global_scale              the factor, F32: any power of two that suits the scales

What they should hold is computed in `nvfp4_scales.py`.
"""

from collections.abc import Iterator, Mapping, Sequence

from reshard.errors import Problem
from reshard.formats.safetensors import BITS
from reshard.types import Packed
from reshard.verification.chunks import CastWeight
from reshard.verification.expected import NVFP4, TargetTensor
from reshard.verification.expected_boxes import make_expected_box
from reshard.verification.nvfp4_scales import NEW_GROUP, OLD_GROUP
from reshard.verification.provenance import Provenance, WantedPart, add_parts, make_kept_tensor
from reshard.verification.target_folder import CONVERT_AGAIN_HINT, TargetHeader

CODES, SCALES, FACTOR = ".weight_packed", ".weight_scale", ".weight_global_scale"

PLAIN = ".weight"


def take_nvfp4_tensors(
    trace: Provenance, files: Sequence[TargetHeader]
) -> tuple[list[Problem], Sequence[TargetHeader]]:
    """Traces what a target has in NVFP4. Returns what is wrong with it, and the files without it."""
    weights = {
        name.removesuffix(PLAIN): packed
        for name, tensor in trace.source.tensors.items()
        if (packed := trace.source.find_packed(tensor)) and packed.packing == "mxfp4"
    }
    found = {
        tensor.name: TargetTensor(file.number, tensor)
        for file in files
        for tensor in file.tensors
        if tensor.name.endswith((CODES, SCALES, FACTOR)) and tensor.name.rpartition(".")[0] in weights
    }
    if not any(name.endswith(FACTOR) for name in found):
        return [], files
    problems = [problem for name, packed in weights.items() for problem in trace_weight(trace, name, packed, found)]
    return problems, [leave_out(file, found) for file in files]


def leave_out(file: TargetHeader, found: Mapping[str, TargetTensor]) -> TargetHeader:
    """A file without the tensors that are traced; a second one of a name stays, to be reported."""
    kept = [one for one in file.tensors if found.get(one.name) != TargetTensor(file.number, one)]
    return file._replace(tensors=kept)


def trace_weight(trace: Provenance, name: str, packed: Packed, found: Mapping[str, TargetTensor]) -> Iterator[Problem]:
    """Adds what the target should have of a weight to what is compared. Yields what is missing, or of a wrong shape. A
    share may have some of it; scales without their factor are not compared then.
    """
    rows, columns = packed.result.shape
    codes, scales = packed.codes._replace(dtype="I8"), packed.scales._replace(dtype="F8_E8M0")
    kept = trace.kept[codes.name] = make_kept_tensor(codes, 1, is_scale=False)
    shape, dtypes = (rows, columns), ("F32", "F8_E4M3")
    recast = CastWeight(NVFP4, codes, scales, shape, (1, OLD_GROUP), (1, NEW_GROUP), dtypes, ([], []))
    for end, dtype, wanted, parts in (
        (CODES, "U8", codes.shape, kept.parts),
        (SCALES, dtypes[1], (rows, -(-columns // NEW_GROUP)), recast.parts[1]),
        (FACTOR, dtypes[0], (1,), recast.parts[0]),
    ):
        if seen := found.get(name + end):
            trace.present[name + PLAIN][0] = seen
            box = make_expected_box(wanted, BITS[dtype], None, range(0), 1)
            yield from add_parts(trace, WantedPart(seen, dtype, [box], parts, name + PLAIN))
        elif not trace.folder.is_share:
            beside = f"one, beside the others of {name}"
            yield Problem("missing-tensor", name + end, "in none of these files", beside, CONVERT_AGAIN_HINT)
    if recast.parts[0] and recast.parts[1]:
        trace.casts[name + PLAIN, NVFP4] = recast
