"""The header, held against the safetensors package: malformed files as byte literals, written ones byte for byte."""

import json
import re
from collections.abc import Mapping, Sequence
from math import prod

import numpy as np
import pytest
import torch
from header_faults import FAULTS, whole_file
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors import SafetensorError, TensorSpec, deserialize, serialize
from safetensors.torch import save

from reshard.errors import Refused
from reshard.formats.safetensors import (
    BITS,
    format_entry,
    format_header,
    make_order_key,
    parse_header,
    read_header_length,
)
from reshard.types import Tensor

NAME = "x.safetensors"

ELEMENT_BITS = [
    ("BOOL", 8), ("F4", 4), ("F6_E2M3", 6), ("F6_E3M2", 6), ("U8", 8), ("I8", 8), ("F8_E5M2", 8), ("F8_E4M3", 8),
    ("F8_E8M0", 8), ("F8_E4M3FNUZ", 8), ("F8_E5M2FNUZ", 8), ("I16", 16), ("U16", 16), ("F16", 16), ("BF16", 16),
    ("I32", 32), ("U32", 32), ("F32", 32), ("C64", 64), ("F64", 64), ("I64", 64), ("U64", 64),
]  # fmt: skip

STORED_BYTES = {
    "bool": 1, "float4_e2m1fn_x2": 1, "uint8": 1, "int8": 1, "float8_e5m2": 1, "float8_e4m3fn": 1,
    "float8_e8m0fnu": 1, "float8_e4m3fnuz": 1, "float8_e5m2fnuz": 1, "int16": 2, "uint16": 2, "float16": 2,
    "bfloat16": 2, "int32": 4, "uint32": 4, "float32": 4, "complex64": 8, "float64": 8, "int64": 8, "uint64": 8,
}  # fmt: skip
"""What safetensors calls the dtypes when it writes: all but F6, for which no framework has a name."""


def parse(text: bytes, data_size: int) -> list[Tensor]:
    return parse_header(text, 5, 8 + len(text) + data_size, NAME)


def refusal(text: bytes, data_size: int) -> Refused:
    with pytest.raises(Refused) as caught:
        parse(text, data_size)
    return caught.value


def by_safetensors(text: bytes, data_size: int) -> dict[str, tuple[str, tuple[int, ...], int]]:
    """Name -> dtype, shape and size in bytes, as the package reads the file."""
    found = deserialize(whole_file(text, data_size))  # type: ignore[no-untyped-call]
    return {name: (entry["dtype"], tuple(entry["shape"]), len(entry["data"])) for name, entry in found}


def test_the_dtypes_and_their_order_are_those_of_safetensors() -> None:
    with pytest.raises(SafetensorError) as caught:
        by_safetensors(b'{"a":{"dtype":"X","shape":[],"data_offsets":[0,0]}}', 0)
    known = re.findall("`([A-Z0-9_]+)`", str(caught.value))[1:]
    assert list(BITS) == known == [dtype for dtype, _ in ELEMENT_BITS]


@pytest.mark.parametrize(("dtype", "bits"), ELEMENT_BITS)
def test_every_dtype_has_its_bits(dtype: str, bits: int) -> None:
    text = f'{{"a":{{"dtype":"{dtype}","shape":[2,4],"data_offsets":[0,{bits}]}}}}'.encode()
    assert parse(text, bits) == [Tensor("a", dtype, (2, 4), 5, 8 + len(text), bits)]
    assert by_safetensors(text, bits) == {"a": (dtype, (2, 4), bits)}


@pytest.mark.parametrize(
    ("text", "data_size", "expected"),
    [
        pytest.param(b"{}", 0, [], id="no tensor"),
        pytest.param(b"{}      ", 0, [], id="padded with spaces"),
        pytest.param(b'{"__metadata__":{"format":"pt","":"\\u0000"}}', 0, [], id="metadata alone"),
        pytest.param(
            b'{"__metadata__":{"format":"pt"},"a":{"dtype":"U8","shape":[2],"data_offsets":[0,2]}}',
            2, [("a", "U8", (2,), 0, 2)], id="metadata and a tensor",
        ),
        pytest.param(
            b'{"a":{"dtype":"F64","shape":[],"data_offsets":[0,8]}}', 8, [("a", "F64", (), 0, 8)], id="a scalar"
        ),
        pytest.param(
            b'{"e":{"dtype":"F32","shape":[0,7],"data_offsets":[0,0]}}',
            0, [("e", "F32", (0, 7), 0, 0)], id="an empty tensor alone",
        ),
        pytest.param(
            b'{"z":{"dtype":"F32","shape":[7,0],"data_offsets":[4,4]},"b":{"dtype":"F32","shape":[1],'
            b'"data_offsets":[0,4]},"a":{"dtype":"F32","shape":[0],"data_offsets":[0,0]}}',
            4, [("a", "F32", (0,), 0, 0), ("b", "F32", (1,), 0, 4), ("z", "F32", (7, 0), 4, 0)],
            id="empty tensors before and behind another",
        ),
        pytest.param(
            b'{"b":{"dtype":"U8","shape":[3],"data_offsets":[2,5]},"a":{"dtype":"I16","shape":[1],'
            b'"data_offsets":[0,2]}}',
            5, [("a", "I16", (1,), 0, 2), ("b", "U8", (3,), 2, 3)], id="in another order than the data",
        ),
        pytest.param(
            b'{"a":{"data_offsets":[0,2],"shape":[1],"dtype":"F16"}}',
            2, [("a", "F16", (1,), 0, 2)], id="fields in another order",
        ),
        pytest.param(
            b' \t\r\n{ "a" : { "dtype" : "U8" , "shape" : [ 1 , 1 ] , "data_offsets" : [ 0 , 1 ] } } ',
            1, [("a", "U8", (1, 1), 0, 1)], id="white space everywhere",
        ),
        pytest.param(
            b'{"":{"dtype":"U8","shape":[],"data_offsets":[0,1]}}', 1, [("", "U8", (), 0, 1)], id="an empty name"
        ),
        pytest.param(
            b'{"\\ud83d\\ude00\\/\\u0000\\"":{"dtype":"U8","shape":[],"data_offsets":[0,1]}}',
            1, [('\U0001f600/\0"', "U8", (), 0, 1)], id="escapes in a name",
        ),
        pytest.param(
            b'{"\xc3\xa9":{"dtype":"U8","shape":[],"data_offsets":[0,1]}}',
            1, [("\u00e9", "U8", (), 0, 1)], id="UTF-8 in a name",
        ),
        pytest.param(
            b'{"a":{"dtype":"F4","shape":[3,2],"data_offsets":[0,3]},"b":{"dtype":"F6_E3M2","shape":[4],'
            b'"data_offsets":[3,6]}}',
            6, [("a", "F4", (3, 2), 0, 3), ("b", "F6_E3M2", (4,), 3, 3)], id="elements of less than a byte",
        ),
        pytest.param(
            b'{"a":{"dtype":"U8","shape":[' + b"1," * 63 + b'1],"data_offsets":[0,1]}}',
            1, [("a", "U8", (1,) * 64, 0, 1)], id="64 dimensions",
        ),
    ],
)  # fmt: skip
def test_a_valid_header_is_read(
    text: bytes, data_size: int, expected: Sequence[tuple[str, str, tuple[int, ...], int, int]]
) -> None:
    start = 8 + len(text)
    assert parse(text, data_size) == [
        Tensor(name, dtype, shape, 5, start + begin, size) for name, dtype, shape, begin, size in expected
    ]
    assert by_safetensors(text, data_size) == {name: (dtype, shape, size) for name, dtype, shape, _, size in expected}


@pytest.mark.parametrize(("text", "data_size", "kind", "word"), FAULTS)
def test_a_faulty_header_is_refused_as_by_safetensors(text: bytes, data_size: int, kind: str, word: str) -> None:
    with pytest.raises(SafetensorError):
        by_safetensors(text, data_size)
    refused = refusal(text, data_size)
    assert kind in {problem.kind for problem in refused.problems}
    assert word in str(refused)
    assert all(problem.subject.startswith(NAME) for problem in refused.problems)


@pytest.mark.parametrize(
    ("text", "data_size", "kind", "word"),
    [
        pytest.param(
            b'{"a":{"dtype":"U8","shape":[1],"data_offsets":[0,1]},"a":{"dtype":"U8","shape":[1],"data_offsets":[0,1]}}',
            1, "header-not-json", "'a' stands twice", id="a name twice",
        ),
        pytest.param(b'{"__metadata__":{"a":"1","a":"2"}}', 0, "header-not-json", "'a' stands twice",
                     id="a key of the metadata twice"),
        pytest.param(b'{"a":{"dtype":"U8","shape":[1],"data_offsets":[0,1],"scale":1}}', 1, "wrong-entry", "scale",
                     id="one more field"),
        pytest.param(b'{"__metadata__":null}', 0, "wrong-metadata", "strings", id="null as metadata"),
        pytest.param(b'{"a":{"dtype":"U8","shape":[9223372036854775808,0],"data_offsets":[0,0]}}', 0, "wrong-shape",
                     "9223372036854775808", id="an empty shape with 2^63"),
        pytest.param(b'{"a":{"dtype":"U8","shape":[' + b"1," * 64 + b'1],"data_offsets":[0,1]}}', 1, "wrong-shape",
                     "64", id="65 dimensions"),
    ],
)  # fmt: skip
def test_what_safetensors_takes_and_we_do_not(text: bytes, data_size: int, kind: str, word: str) -> None:
    by_safetensors(text, data_size)
    refused = refusal(text, data_size)
    assert [problem.kind for problem in refused.problems] == [kind]
    assert word in str(refused)


@pytest.mark.parametrize(
    ("name", "fields", "kind"),
    [
        ("b", '"dtype":"U8","shape":[1],"data_offsets":[1,2],"more":1', "wrong-entry"),
        ("b", '"dtype":"U8","shape":[1],"data_offsets":[1,2],"dtype":"U8"', "header-not-json"),
        ("a", '"dtype":"U8","shape":[1],"data_offsets":[1,2]', "header-not-json"),
        ("\\ud800", '"dtype":"U8","shape":[1],"data_offsets":[1,2]', "wrong-name"),
        ("b", '"dtype":"U8","shape":[true],"data_offsets":[1,2]', "wrong-shape"),
        ("b", '"dtype":"U8","shape":[1],"data_offsets":[true,2]', "wrong-offsets"),
        ("b", '"dtype":"U8","shape":[1.0],"data_offsets":[1,2]', "header-not-json"),
        ("b", '"dtype":"U8","shape":{"1":1},"data_offsets":[1,2]', "wrong-shape"),
        ("b", '"dtype":"U8","shape":[1],"data_offsets":[1,3]', "wrong-offsets"),
        ("b", '"dtype":"U8","shape":[1],"data_offsets":[2,1]', "wrong-offsets"),
        ("b", '"dtype":"U8","shape":[1],"data_offsets":[-1,0]', "wrong-offsets"),
        ("b", '"dtype":"U8","shape":[1],"data_offsets":[1,2,3]', "wrong-entry"),
        ("b", '"dtype":"U8","shape":[1]', "wrong-entry"),
        ("b", '"shape":[1],"data_offsets":[1,2]', "wrong-entry"),
    ],
)
def test_a_fault_is_found_behind_a_good_tensor_of_that_shape_too(name: str, fields: str, kind: str) -> None:
    first = '"a":{"dtype":"U8","shape":[1],"data_offsets":[0,1]}'
    parse(f"{{{first}}}".encode(), 1)
    assert kind in {problem.kind for problem in refusal(f'{{{first},"{name}":{{{fields}}}}}'.encode(), 2).problems}


def test_every_faulty_entry_is_named() -> None:
    refused = refusal(
        b'{"a":{"dtype":"X","shape":[1],"data_offsets":[0,1]},"b":{"dtype":"U8","shape":[1],"data_offsets":[0,1]},'
        b'"c":{"dtype":"U8","shape":[2],"data_offsets":[1,2]},"__metadata__":[]}',
        2,
    )
    assert [(problem.kind, problem.subject) for problem in refused.problems] == [
        ("wrong-metadata", f"{NAME}: __metadata__"),
        ("unknown-dtype", f"{NAME}: a"),
        ("wrong-offsets", f"{NAME}: c"),
    ]


@pytest.mark.parametrize("depth", [500, 900, 950, 975, 985, 990, 995])
def test_a_value_nested_almost_too_deep_is_refused_too(depth: int) -> None:
    nested = b"[" * depth + b"]" * depth
    refused = refusal(b'{"a":{"dtype":"U8","shape":' + nested + b',"data_offsets":[0,1]}}', 1)
    assert {problem.kind for problem in refused.problems} <= {"wrong-shape", "header-not-json"}


@pytest.mark.parametrize(
    ("first_bytes", "file_size", "length"),
    [
        (b"\2\0\0\0\0\0\0\0", 10, 2),
        (b"\0\0\0\0\0\0\0\0", 8, 0),
        (b"\0\xe1\xf5\x05\0\0\0\0", 100_000_008, 100_000_000),
    ],
)
def test_a_header_length_is_read(first_bytes: bytes, file_size: int, length: int) -> None:
    assert read_header_length(first_bytes, file_size, NAME) == length


@pytest.mark.parametrize(
    ("first_bytes", "file_size", "kind", "word"),
    [
        pytest.param(b"", 0, "truncated-file", "0 bytes", id="an empty file"),
        pytest.param(b"\2\0\0\0\0\0\0", 7, "truncated-file", "7 bytes", id="seven bytes"),
        pytest.param(b"\3\0\0\0\0\0\0\0", 10, "truncated-file", "3 bytes in a file of 10", id="a header cut off"),
        pytest.param(b"\1\xe1\xf5\x05\0\0\0\0", 2**40, "header-too-long", "100,000,001", id="a byte too long"),
        pytest.param(b"\xff" * 8, 2**40, "header-too-long", "18,446,744,073,709,551,615", id="all bits set"),
        pytest.param(b"\x80\2c\0\0\0\0\x80", 2**40, "header-too-long", "is it safetensors", id="the top bit set"),
    ],
)
def test_a_wrong_header_length_is_refused(first_bytes: bytes, file_size: int, kind: str, word: str) -> None:
    with pytest.raises(Refused) as caught:
        read_header_length(first_bytes, file_size, NAME)
    assert [(problem.kind, problem.subject) for problem in caught.value.problems] == [(kind, NAME)]
    assert word in str(caught.value)


Fields = list[tuple[str, str]]
"""The fields of an entry, each as its key and the text of its value."""


@st.composite
def almost_headers(draw: st.DrawFn) -> tuple[bytes, int]:
    """A header of a few tensors with up to two mistakes, and the size of the data."""
    entries: list[tuple[str, Fields]] = []
    end = 0
    for name in draw(st.lists(st.sampled_from(["a", "b", "c", "d"]), max_size=4, unique=True)):
        dtype, size = draw(st.sampled_from([("U8", 1), ("F16", 2)]))
        length = draw(st.integers(0, 3))
        offsets = f"[{end},{end + size * length}]"
        entries.append((name, [("dtype", f'"{dtype}"'), ("shape", f"[{length}]"), ("data_offsets", offsets)]))
        end += size * length
    metadata = draw(st.sampled_from([[], ['"__metadata__":{"k":"v"}'], ['"__metadata__":{"k":"v","k":"v"}']]))
    for _ in range(draw(st.integers(0, 2)) if entries else 0):
        number = draw(st.integers(0, len(entries) - 1))
        name, fields = entries[number]
        place = draw(st.integers(0, 2))
        key, value = fields[place] if place < len(fields) else ("dtype", '"U8"')
        mistake = draw(st.sampled_from(["again", "renamed", "field again", "field left out", "field more", "value"]))
        if mistake == "again":
            entries.append((name, fields))
        elif mistake == "renamed":
            entries[number] = (draw(st.sampled_from(["a", "", "\\ud800", "\\u0061", "__metadata__"])), fields)
        elif mistake == "value":
            wrong = ["true", "1.0", "null", '"U8"', '"X"', "[0,1]", "[true,1]", "[1]", "[-1]", "[9223372036854775808]"]
            fields = [*fields[:place], (key, draw(st.sampled_from(wrong))), *fields[place + 1 :]]
            entries[number] = (name, fields)
        else:
            added = {
                "field again": [(key, value)] * 2,
                "field left out": [],
                "field more": [(key, value), ("k", '"v"')],
            }
            entries[number] = (name, [*fields[:place], *added[mistake], *fields[place + 1 :]])
    texts = [f'"{name}":{{{",".join(f"{json.dumps(k)}:{v}" for k, v in fields)}}}' for name, fields in entries]
    return ("{" + ",".join([*metadata, *texts]) + "}").encode(), end


@settings(max_examples=250, deadline=None)
@given(almost_headers())
def test_what_we_read_is_what_safetensors_reads(header: tuple[bytes, int]) -> None:
    text, data_size = header
    try:
        found = parse(text, data_size)
    except Refused:
        return
    assert {tensor.name: (tensor.dtype, tensor.shape, tensor.size) for tensor in found} == by_safetensors(*header)
    assert len({tensor.name for tensor in found}) == text.count(b'"shape"')


def written_by_us(entries: Mapping[str, tuple[str, Sequence[int], int]]) -> bytes:
    """The header for tensors given as name -> dtype, shape and size in bytes."""
    texts, begin = [], 0
    for name in sorted(entries, key=lambda name: make_order_key(name, entries[name][0])):
        dtype, shape, size = entries[name]
        texts.append(f"{format_entry(name, dtype, shape)}{begin},{begin + size}]}}")
        begin += size
    return format_header(texts)


names = st.one_of(
    st.text(st.characters(exclude_categories=["Cs"]), max_size=12),
    st.text('"\\/\b\f\n\r\t\0\x1b\x7f\x80\u2028\ufeff\U0001f600.09aZ', max_size=12),
).filter(lambda name: name != "__metadata__")
stored_tensors = st.tuples(st.sampled_from(sorted(STORED_BYTES)), st.lists(st.integers(0, 3), min_size=1, max_size=4))


@settings(max_examples=150, deadline=None)
@given(st.dictionaries(names, stored_tensors, max_size=6))
def test_our_header_is_that_of_the_safetensors_package(tensors: dict[str, tuple[str, list[int]]]) -> None:
    data = np.zeros(8 * 3**4, np.uint8)
    specs = {
        name: TensorSpec(
            dtype=dtype, shape=shape, data_ptr=data.ctypes.data, data_len=prod(shape) * STORED_BYTES[dtype]
        )
        for name, (dtype, shape) in tensors.items()
    }
    header = written_by_us({name: (spec.dtype, spec.shape, spec.data_len) for name, spec in specs.items()})
    data_size = sum(spec.data_len for spec in specs.values())
    assert header + bytes(data_size) == serialize(specs)
    assert {
        tensor.name: (tensor.dtype, list(tensor.shape), tensor.size)
        for tensor in parse(header[8:], data_size)
    } == {name: (spec.dtype, spec.shape, spec.data_len) for name, spec in specs.items()}  # fmt: skip


def test_our_header_is_that_of_save() -> None:
    tensors = {
        "model.layers.2.b": torch.ones(3, 5, dtype=torch.bfloat16),
        "model.layers.10.b": torch.ones(5, dtype=torch.bfloat16),
        "scale": torch.ones(2, 2),
        "codes": torch.ones(4, 3).to(torch.float8_e4m3fn),
        "flags": torch.ones(7, dtype=torch.bool),
        "counter": torch.tensor(7),
        "empty": torch.zeros(0, 4, dtype=torch.float16),
    }
    dtypes = {
        torch.bfloat16: "BF16", torch.float32: "F32", torch.float8_e4m3fn: "F8_E4M3", torch.bool: "BOOL",
        torch.int64: "I64", torch.float16: "F16",
    }  # fmt: skip
    header = written_by_us({
        name: (dtypes[tensor.dtype], tuple(tensor.shape), tensor.nbytes) for name, tensor in tensors.items()
    })  # fmt: skip
    saved = save(tensors)
    assert saved[: len(header)] == header
    assert len(saved) == len(header) + sum(tensor.nbytes for tensor in tensors.values())
