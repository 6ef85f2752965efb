import numpy as np
from reshard.casts.rounding import round_floats


def _f(scales, dt):
    if dt == "BF16":
        return (scales.astype(np.uint32) << 16).view(np.float32)
    if dt == "F16":
        return scales.view(np.float16).astype(np.float32)
    return scales.view(np.float32)


def _toB(v):
    o = np.empty(v.shape, np.uint16)
    round_floats(np.ascontiguousarray(v), o)
    return o


def dequantize_integers(codes, bits, scales, scale_dtype, zeros, groups, out):
    if bits == 4:
        q = np.stack([codes & 15, codes >> 4], -1).reshape(codes.shape[0], -1)[:, : len(groups)].astype(np.int32)
    else:
        q = codes[:, : len(groups)].astype(np.int32)
    z = (1 << bits - 1) if zeros is None else zeros.astype(np.int32)[:, groups]
    with np.errstate(all="ignore"):
        p = (q - z).astype(np.float32) * _f(scales, scale_dtype)[:, groups]
        if scale_dtype == "F16":
            p = p.astype(np.float16).astype(np.float32)
    out[:] = _toB(p)


V = np.array([0, 0.5, 1, 1.5, 2, 3, 4, 6, -0.0, -0.5, -1, -1.5, -2, -3, -4, -6], np.float32)


def dequantize_nvfp4(codes, scales, factor, groups, out, *, divides):
    from reshard.casts.code_tables import make_fp8_values

    q = V[np.stack([codes & 15, codes >> 4], -1).reshape(codes.shape[0], -1)[:, : len(groups)]]
    s = make_fp8_values()[scales]
    s = s / np.float32(factor) if divides else s * np.float32(factor)
    out[:] = _toB(q * s[:, groups])


def dequantize_experts(codes, scales, out):
    q = V[np.stack([codes & 15, codes >> 4], -1).reshape(codes.shape[0], -1)]
    s = np.exp2(scales.astype(np.float32) - 127)
    out[:] = _toB(q * np.repeat(s, 32, 1)).T


ORDER = [0, 4, 1, 5, 2, 6, 3, 7]


def _nib(words, bits=4):
    w = words.view(np.uint32)
    return np.stack([(w >> np.uint32(bits * j)) & ((1 << bits) - 1) for j in range(32 // bits)], -1).astype(np.uint8)


def _awq(words):
    return _nib(words)[..., ORDER].reshape(len(words), -1)


def spread_awq(words, out):
    c = _awq(words).T
    out[:] = (c[:, ::2] | c[:, 1::2] << 4)[: len(out)]


def spread_gptq(words, bits, out):
    c = _nib(words, bits).transpose(0, 2, 1).reshape(-1, words.shape[1]).T
    out[:] = c[: len(out)] if bits == 8 else c[:, ::2] | c[:, 1::2] << 4


def spread_zeros_awq(words):
    return np.ascontiguousarray(_awq(words).T)


def spread_zeros_gptq(words, bits, *, is_v2):
    z = _nib(words, bits).reshape(len(words), -1).T
    return np.ascontiguousarray(z if is_v2 else z + 1)
