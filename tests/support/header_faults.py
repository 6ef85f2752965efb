"""Headers of safetensors files that are to be refused, as byte literals, and a whole file with such a header."""

import pytest


def whole_file(text: bytes, data_size: int) -> bytes:
    return len(text).to_bytes(8, "little") + text + bytes(data_size)


FAULTS = [
    # Where the data lie.
    pytest.param(
        b'{"a":{"dtype":"U8","shape":[2],"data_offsets":[0,2]},"b":{"dtype":"U8","shape":[2],"data_offsets":[1,3]}}',
        3, "overlap", ": b", id="two tensors overlap",
    ),
    pytest.param(
        b'{"a":{"dtype":"U8","shape":[2],"data_offsets":[0,2]},"b":{"dtype":"U8","shape":[2],"data_offsets":[0,2]}}',
        2, "overlap", ": b", id="two tensors share their data",
    ),
    pytest.param(
        b'{"a":{"dtype":"U8","shape":[4],"data_offsets":[0,4]},"b":{"dtype":"U8","shape":[0],"data_offsets":[2,2]}}',
        4, "overlap", ": b", id="an empty tensor inside another",
    ),
    pytest.param(
        b'{"a":{"dtype":"U8","shape":[1],"data_offsets":[0,1]},"b":{"dtype":"U8","shape":[1],"data_offsets":[2,3]}}',
        3, "gap", ": b", id="a gap between tensors",
    ),
    pytest.param(
        b'{"a":{"dtype":"U8","shape":[1],"data_offsets":[1,2]}}', 2, "gap", ": a", id="a gap before the first"
    ),
    pytest.param(
        b'{"a":{"dtype":"U8","shape":[0],"data_offsets":[9,9]}}', 0, "gap", ": a", id="an empty tensor out of bounds"
    ),
    pytest.param(
        b'{"a":{"dtype":"U8","shape":[9],"data_offsets":[0,9]}}', 8, "truncated-file", "as its header says",
        id="the data end early",
    ),
    pytest.param(
        b'{"a":{"dtype":"U8","shape":[9],"data_offsets":[0,9]}}', 10, "wrong-size", "as its header says",
        id="a byte behind the last tensor",
    ),
    pytest.param(b"{}", 1, "wrong-size", "as its header says", id="a byte and no tensor"),
    # What is no JSON object.
    pytest.param(b"", 0, "header-not-json", "JSON", id="no text"),
    pytest.param(b'{"a":}', 0, "header-not-json", "JSON", id="not JSON"),
    pytest.param(b"{}{}", 0, "header-not-json", "Extra data", id="two JSON values"),
    pytest.param(b"{}\0", 0, "header-not-json", "Extra data", id="padded with a zero byte"),
    pytest.param(b"[]", 0, "header-not-json", "a JSON object", id="a JSON array"),
    pytest.param(b'"text"', 0, "header-not-json", "a JSON object", id="a JSON string"),
    pytest.param(b"null", 0, "header-not-json", "a JSON object", id="a JSON null"),
    pytest.param(b"\xef\xbb\xbf{}", 0, "header-not-json", "BOM", id="a byte order mark"),
    pytest.param(
        b'{"\xff":{"dtype":"U8","shape":[1],"data_offsets":[0,1]}}', 1, "header-not-json", "utf-8", id="not UTF-8"
    ),
    pytest.param(
        b'{"\n":{"dtype":"U8","shape":[1],"data_offsets":[0,1]}}', 1, "header-not-json", "control character",
        id="a raw line break in a name",
    ),
    pytest.param(
        b'{"a":{"dtype":"U8","dtype":"U8","shape":[1],"data_offsets":[0,1]}}', 1, "header-not-json", "'dtype'",
        id="a field twice",
    ),
    pytest.param(
        b'{"__metadata__":{},"__metadata__":{}}', 0, "header-not-json", "'__metadata__'", id="metadata twice"
    ),
    pytest.param(b'{"a":' + b"[" * 100_000 + b"]" * 100_000 + b"}", 0, "header-not-json", "Recursion",
                 id="nested 100,000 deep"),
    pytest.param(b'{"a":' * 100_000 + b"1" + b"}" * 100_000, 0, "header-not-json", "Recursion",
                 id="objects nested 100,000 deep"),
    # Numbers.
    pytest.param(
        b'{"a":{"dtype":"U8","shape":[NaN],"data_offsets":[0,1]}}', 1, "header-not-json", "NaN", id="NaN in a shape"
    ),
    pytest.param(
        b'{"a":{"dtype":"U8","shape":[1],"data_offsets":[0,Infinity]}}', 1, "header-not-json", "Infinity",
        id="Infinity as an offset",
    ),
    pytest.param(
        b'{"a":{"dtype":"U8","shape":[1],"data_offsets":[0,1.0]}}', 1, "header-not-json", "1.0", id="a float offset"
    ),
    pytest.param(
        b'{"a":{"dtype":"U8","shape":[1e0],"data_offsets":[0,1]}}', 1, "header-not-json", "1e0", id="a float shape"
    ),
    pytest.param(
        b'{"a":{"dtype":"U8","shape":[' + b"9" * 5000 + b'],"data_offsets":[0,1]}}', 1, "header-not-json", "digits",
        id="a number of 5,000 digits",
    ),
    pytest.param(
        b'{"a":{"dtype":"U8","shape":[' + b"9" * 4000 + b'],"data_offsets":[0,1]}}', 1, "wrong-shape", "999",
        id="a number of 4,000 digits",
    ),
    pytest.param(
        b'{"a":{"dtype":"U8","shape":[-1],"data_offsets":[0,1]}}', 1, "wrong-shape", "-1", id="a negative shape"
    ),
    pytest.param(
        b'{"a":{"dtype":"U8","shape":[-1,-1],"data_offsets":[0,1]}}', 1, "wrong-shape", "-1",
        id="negative sizes whose product is right",
    ),
    pytest.param(
        b'{"a":{"dtype":"U8","shape":[9223372036854775808],"data_offsets":[0,9223372036854775808]}}', 1,
        "wrong-offsets", "9223372036854775808", id="a shape and an offset of 2^63",
    ),
    pytest.param(
        b'{"a":{"dtype":"U8","shape":[4294967296,4294967297],"data_offsets":[0,4294967296]}}', 1,
        "wrong-shape", "4294967297", id="a shape whose product needs 65 bits",
    ),
    pytest.param(
        b'{"a":{"dtype":"U8","shape":[9223372036854775807,9223372036854775807,0],"data_offsets":[0,0]}}', 0,
        "wrong-shape", "9223372036854775807", id="an empty shape whose product overflows on the way",
    ),
    pytest.param(
        b'{"a":{"dtype":"U8","shape":[1],"data_offsets":[-1,0]}}', 1, "wrong-offsets", "-1", id="a negative offset"
    ),
    pytest.param(
        b'{"a":{"dtype":"U8","shape":[1],"data_offsets":[1,0]}}', 1, "wrong-offsets", "[1, 0]",
        id="an end before the begin",
    ),
    pytest.param(
        b'{"a":{"dtype":"U8","shape":[1],"data_offsets":[false,true]}}', 1, "wrong-offsets", "[false, true]",
        id="booleans as offsets",
    ),
    pytest.param(
        b'{"a":{"dtype":"U8","shape":[true],"data_offsets":[0,1]}}', 1, "wrong-shape", "[true]",
        id="a boolean in a shape",
    ),
    pytest.param(
        b'{"a":{"dtype":"U8","shape":["1"],"data_offsets":[0,1]}}', 1, "wrong-shape", "1", id="a string in a shape"
    ),
    # Sizes that do not suit the shape.
    pytest.param(
        b'{"a":{"dtype":"F32","shape":[2],"data_offsets":[0,4]}}', 4, "wrong-offsets", "64 bits", id="too few bytes"
    ),
    pytest.param(
        b'{"a":{"dtype":"F32","shape":[],"data_offsets":[0,8]}}', 8, "wrong-offsets", "32 bits", id="too many bytes"
    ),
    pytest.param(
        b'{"a":{"dtype":"F4","shape":[3],"data_offsets":[0,2]}}', 2, "wrong-offsets", "12 bits",
        id="half a byte at the end",
    ),
    pytest.param(
        b'{"a":{"dtype":"F6_E2M3","shape":[2],"data_offsets":[0,2]}}', 2, "wrong-offsets", "12 bits",
        id="a quarter of a byte at the end",
    ),
    # Entries that are none.
    pytest.param(
        b'{"a":{"dtype":"F128","shape":[1],"data_offsets":[0,16]}}', 16, "unknown-dtype", "F128", id="an unknown dtype"
    ),
    pytest.param(
        b'{"a":{"dtype":"f32","shape":[1],"data_offsets":[0,4]}}', 4, "unknown-dtype", "f32", id="a dtype in lower case"
    ),
    pytest.param(b'{"a":{"dtype":["U8"],"shape":[1],"data_offsets":[0,1]}}', 1, "wrong-entry", "U8",
                 id="a list as dtype"),
    pytest.param(b'{"a":{"shape":[1],"data_offsets":[0,1]}}', 1, "wrong-entry", "dtype", id="no dtype"),
    pytest.param(b'{"a":{"dtype":"U8","data_offsets":[0,1]}}', 1, "wrong-entry", "shape", id="no shape"),
    pytest.param(b'{"a":{"dtype":"U8","shape":[1]}}', 1, "wrong-entry", "data_offsets", id="no offsets"),
    pytest.param(b'{"a":{"dtype":"U8","shape":[1],"data_offsets":[0]}}', 1, "wrong-entry", "[0]", id="one offset"),
    pytest.param(
        b'{"a":{"dtype":"U8","shape":[1],"data_offsets":[0,1,1]}}', 1, "wrong-entry", "[0, 1, 1]", id="three offsets"
    ),
    pytest.param(b'{"a":{"dtype":"U8","shape":[1],"data_offsets":"01"}}', 1, "wrong-offsets", "01",
                 id="a string as offsets"),
    pytest.param(b'{"a":{"dtype":"U8","shape":1,"data_offsets":[0,1]}}', 1, "wrong-shape", "1", id="a number as shape"),
    pytest.param(b'{"a":null}', 0, "wrong-entry", "null", id="null as an entry"),
    pytest.param(b'{"a":{}}', 0, "wrong-entry", "{}", id="an empty entry"),
    pytest.param(b'{"__metadata__":{"a":1}}', 0, "wrong-metadata", "strings", id="a number in the metadata"),
    pytest.param(b'{"__metadata__":{"a":{"b":"c"}}}', 0, "wrong-metadata", "strings", id="an object in the metadata"),
    pytest.param(b'{"__metadata__":["a"]}', 0, "wrong-metadata", "strings", id="an array as metadata"),
    # Text that is no Unicode.
    pytest.param(
        b'{"\\ud800":{"dtype":"U8","shape":[1],"data_offsets":[0,1]}}', 1, "wrong-name", "surrogate",
        id="a lone surrogate in a name",
    ),
    pytest.param(b'{"__metadata__":{"a":"\\udc00"}}', 0, "wrong-metadata", "", id="a lone surrogate in the metadata"),
]  # fmt: skip
