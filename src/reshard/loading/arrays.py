"""Views bytes as numpy arrays or torch tensors of any safetensors dtype. Imports torch only when it is asked for."""

from collections.abc import Iterable, Iterator
from typing import Any

import numpy as np
from numpy.typing import NDArray

from reshard.errors import Problem, refuse
from reshard.types import Tensor

FlatBytes = NDArray[np.uint8]

FRAMEWORKS = ("torch", "numpy")

NUMPY_DTYPES = {
    "BOOL": "bool", "U8": "u1", "I8": "i1", "U16": "<u2", "I16": "<i2", "F16": "<f2", "U32": "<u4", "I32": "<i4",
    "F32": "<f4", "U64": "<u8", "I64": "<i8", "F64": "<f8", "C64": "<c8",
    # Dtypes that numpy lacks, as unsigned integers of the same width; two values of F4 share a byte.
    "BF16": "<u2", "F8_E4M3": "u1", "F8_E5M2": "u1", "F8_E8M0": "u1", "F8_E4M3FNUZ": "u1", "F8_E5M2FNUZ": "u1",
    "F4": "u1",
}  # fmt: skip

TORCH_DTYPES = {
    "BOOL": "bool", "U8": "uint8", "I8": "int8", "U16": "uint16", "I16": "int16", "F16": "float16", "U32": "uint32",
    "I32": "int32", "F32": "float32", "U64": "uint64", "I64": "int64", "F64": "float64", "C64": "complex64",
    "BF16": "bfloat16", "F8_E4M3": "float8_e4m3fn", "F8_E5M2": "float8_e5m2", "F8_E8M0": "float8_e8m0fnu",
    "F8_E4M3FNUZ": "float8_e4m3fnuz", "F8_E5M2FNUZ": "float8_e5m2fnuz", "F4": "float4_e2m1fn_x2",
}  # fmt: skip


def require_framework(framework: str, device: Any = "cpu") -> None:
    """Raises Refused if the framework is unknown or not installed, or has no such device."""
    if framework not in FRAMEWORKS:
        raise refuse("wrong-option", "framework", repr(framework), " or ".join(map(repr, FRAMEWORKS)))
    if framework == "numpy":
        if str(device) != "cpu":
            raise refuse("wrong-option", "device", repr(device), "device='cpu', for numpy", "framework='torch'")
        return
    try:
        import torch  # noqa: PLC0415 - half a second, and not installed everywhere

        torch.empty(0, device=device)
    except ImportError as error:
        remedy = "pip install 'reshard[torch]', or framework='numpy'"
        raise refuse("wrong-option", "framework", f"torch: {error}", "torch, to be imported", remedy) from None
    except (RuntimeError, AssertionError, TypeError, ValueError) as error:
        found = f"{device!r}: {str(error).splitlines()[0]}"
        raise refuse("wrong-option", "device", found, "a device of torch that is there") from None


def check_array_dtypes(tensors: Iterable[Tensor], framework: str) -> Iterator[Problem]:
    """Problems of tensors for which the framework has no dtype."""
    for tensor in tensors:
        if not has_dtype(tensor.dtype, framework):
            yield Problem("unknown-dtype", tensor.name, tensor.dtype, f"a dtype of {framework}")
        elif tensor.dtype == "F4" and (not tensor.shape or tensor.shape[-1] % 2):
            yield Problem("wrong-shape", tensor.name, f"F4 {list(tensor.shape)}", "whole bytes in each row")


def has_dtype(dtype: str, framework: str) -> bool:
    """Whether a framework has a dtype, or for numpy a stand-in."""
    if framework == "numpy":
        return dtype in NUMPY_DTYPES
    import torch  # noqa: PLC0415

    return dtype in TORCH_DTYPES and hasattr(torch, TORCH_DTYPES[dtype])


def get_array_shape(tensor: Tensor) -> tuple[int, ...]:
    """The shape of a tensor's array: two F4 values are one element, as in torch and in the safetensors package."""
    return (*tensor.shape[:-1], tensor.shape[-1] // 2) if tensor.dtype == "F4" else tensor.shape


def view_as_array(data: Any, dtype: str, shape: tuple[int, ...], framework: str) -> Any:
    """Views bytes, a flat uint8 array of numpy or torch, as an array of a dtype and shape. Copies nothing."""
    if framework == "numpy":
        return data.view(NUMPY_DTYPES[dtype]).reshape(shape)
    import torch  # noqa: PLC0415

    kind = getattr(torch, TORCH_DTYPES[dtype])
    found = torch.from_numpy(data) if isinstance(data, np.ndarray) else data
    if not found.numel():  # torch does not view an empty tensor as another dtype
        return torch.empty(shape, dtype=kind, device=found.device)
    return found.view(kind).reshape(shape)
