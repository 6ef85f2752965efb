"""The dtypes and storages of torch, as its pickles name them, and the dtypes of safetensors that they are."""

from collections.abc import Mapping

TORCH_DTYPES: Mapping[str, str] = {
    "torch.bool": "BOOL",
    "torch.uint8": "U8",
    "torch.int8": "I8",
    "torch.float8_e5m2": "F8_E5M2",
    "torch.float8_e4m3fn": "F8_E4M3",
    "torch.float8_e8m0fnu": "F8_E8M0",
    "torch.float8_e4m3fnuz": "F8_E4M3FNUZ",
    "torch.float8_e5m2fnuz": "F8_E5M2FNUZ",
    "torch.int16": "I16",
    "torch.uint16": "U16",
    "torch.float16": "F16",
    "torch.bfloat16": "BF16",
    "torch.int32": "I32",
    "torch.uint32": "U32",
    "torch.float32": "F32",
    "torch.complex64": "C64",
    "torch.float64": "F64",
    "torch.int64": "I64",
    "torch.uint64": "U64",
}
"""Whole bytes an element only: torch counts the two FP4 values of a byte as one, safetensors as two."""

UNREAD_DTYPES = (
    *("torch.float4_e2m1fn_x2", "torch.complex32", "torch.complex128"),
    *("torch.qint8", "torch.quint8", "torch.qint32", "torch.quint4x2", "torch.quint2x4"),
    *(f"torch.{sign}int{bits}" for sign in ("", "u") for bits in range(1, 8)),
    *(f"torch.bits{form}" for form in ("1x8", "2x4", "4x2", "8", "16")),
)
"""Dtypes of torch that are refused by name where a weight has one."""

STORAGE_DTYPES: Mapping[str, str] = {
    "torch.BoolStorage": "BOOL",
    "torch.ByteStorage": "U8",
    "torch.CharStorage": "I8",
    "torch.ShortStorage": "I16",
    "torch.HalfStorage": "F16",
    "torch.BFloat16Storage": "BF16",
    "torch.IntStorage": "I32",
    "torch.FloatStorage": "F32",
    "torch.ComplexFloatStorage": "C64",
    "torch.DoubleStorage": "F64",
    "torch.LongStorage": "I64",
}
"""Classes that name the dtype of a tensor's bytes; newer dtypes have none."""

UNTYPED_STORAGE = "torch.storage.UntypedStorage"
"""Bytes whose dtype stands beside them."""
