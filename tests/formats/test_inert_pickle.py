"""A pickle is read and nothing of it is run: attacks are refused by name, at once, in little memory."""

import copyreg
import os
import pickle
import pickletools
import struct
import subprocess
import sys
import tracemalloc
from collections import OrderedDict
from typing import Any, Self

import numpy as np
import pytest

from reshard.errors import Refused
from reshard.formats import inert_pickle
from reshard.formats.distcp_metadata import ALLOWED_CLASSES
from reshard.formats.inert_pickle import STEPS_BY_NAME, read_pickle
from reshard.formats.pickle_machine import Global, Inert, Persistent

ALLOWED = {"torch.Size", "torch.float32", "collections.OrderedDict", "test_inert_pickle.Plain", "torch.f"}
SIZE = b"ctorch\nSize\n"
PLAIN = b"ctest_inert_pickle\nPlain\n"


class Plain:
    """A class that would notice if it were made or changed."""

    made = 0

    def __new__(cls) -> Self:
        cls.made += 1
        return super().__new__(cls)

    def __setstate__(self, state: Any) -> None:
        type(self).made += 1


def read(data: bytes) -> Any:
    return read_pickle(data, ALLOWED, "x")


@pytest.mark.parametrize("protocol", [2, 3, 4, 5])
@pytest.mark.parametrize(
    "value",
    [
        {"a": [1, 255, 65535, 65536, 2**31, -1, 2**63 - 1, -(2**63), 1.5, None, True, False, "\u00e9", ()]},
        [(1,), (1, 2), (1, 2, 3), (1, 2, 3, 4), {}, [], {1: "x"}, "x" * 300, ["y"], {"a": 1}],
        {f"name{number}": (number, f"{number}.weight") for number in range(5000)},
        list(range(3000)),
    ],
)
def test_plain_values_are_as_python_reads_them(value: Any, protocol: int) -> None:
    assert read(pickle.dumps(value, protocol)) == value


def test_classes_are_named_only() -> None:
    before = Plain.made
    plain = Plain()
    plain.__dict__["a"] = 1
    for protocol in (2, 4):
        value = read(pickle.dumps(plain, protocol).replace(__name__.encode(), b"test_inert_pickle"))
        assert type(value) is Inert
        assert (value.name, value.arguments, value.state) == ("test_inert_pickle.Plain", (), {"a": 1})
    assert Plain.made == before + 1


def test_the_classes_with_plain_values() -> None:
    assert read(SIZE + b"(K\x02K\x03t\x85R.") == (2, 3)
    assert read(pickle.dumps(OrderedDict({"a": 1}), 2)) == {"a": 1}
    assert type(read(b"ctorch\nfloat32\n.")) is Global
    found = read(b"(X\x01\x00\x00\x000K\x01tQ.")
    assert type(found) is Persistent
    assert found.key == ("0", 1)


class Calls:
    """Pickles as a call."""

    def __init__(self, called: Any, *arguments: Any) -> None:
        self.called, self.arguments = called, arguments

    def __reduce__(self) -> Any:
        return self.called, self.arguments


def text(value: str) -> bytes:
    return b"X" + struct.pack("<I", len(value)) + value.encode()


HOSTILE: list[tuple[str, bytes, str]] = [
    ("a command", pickle.dumps(Calls(os.system, "false")), "posix.system"),
    ("a command, as old pickles", pickle.dumps(Calls(os.system, "false"), 0), "posix.system"),
    ("a program", pickle.dumps(Calls(subprocess.Popen, ["false"])), "subprocess.Popen"),
    ("eval", pickle.dumps(Calls(eval, "1 + 1")), "builtins.eval"),
    ("getattr", pickle.dumps(Calls(getattr, "x", "upper")), "builtins.getattr"),
    ("a file", pickle.dumps(Calls(open, "/etc/passwd")), "open"),
    ("bytes by a codec", pickle.dumps(b"\xff", 2), "_codecs.encode"),
    ("a scalar of numpy", pickle.dumps(np.float64(1)), "numpy"),
    ("an array of numpy", pickle.dumps(np.ones(2)), "numpy"),
    ("an object by copyreg", pickle.dumps(Calls(vars(copyreg)["_reconstructor"], object, object, None)),
     "copyreg._reconstructor"),
    ("an attribute of an allowed class", b"\x80\x04" + text("torch") + text("Size.__new__") + b"\x93.",
     "torch.Size.__new__"),
    ("a module in an allowed one", b"\x80\x04" + text("torch.os") + text("system") + b"\x93.", "torch.os.system"),
    ("a class in old code", b"(iposix\nsystem\n.", "INST"),
    ("a call in old code", b"(" + SIZE + b"o.", "OBJ"),
    ("a class by number", b"\x82\x01.", "EXT1"),
    ("a class by long number", b"\x84\x01\x00\x00\x00.", "EXT4"),
    ("a persistent name by text", b"Px\n.", "PERSID"),
    ("keyword arguments", SIZE + b")}\x92.", "NEWOBJ_EX"),
    ("a decimal of any length", b"I" + b"9" * 10_000 + b"\n.", "INT"),
    ("a long decimal", b"L" + b"9" * 10_000 + b"L\n.", "LONG"),
    ("a long number", b"\x8a\xff" + b"\x01" * 255 + b".", "a number of 255 bytes"),
    ("a longer number", b"\x8b" + struct.pack("<i", 10) + b"\x01" * 10 + b".", "LONG4"),
    ("gigabytes of bytes", b"\x96" + struct.pack("<Q", 1 << 40) + b".", "BYTEARRAY8"),
    ("gigabytes of text", b"\x8d" + struct.pack("<Q", 1 << 40) + b".", "BINUNICODE8"),
    ("a set", b"\x8f.", "EMPTY_SET"),
    ("a tuple as a key", b"}(K\x01\x85K\x02u.", "neither a text nor a number"),
    ("a list as a key", b"}(]K\x02u.", "neither a text nor a number"),
    ("a class as a key", b"}(" + SIZE + b"K\x02u.", "neither a text nor a number"),
    ("a key twice", b"}(K\x01K\x02K\x01K\x03u.", "same key twice"),
    ("a key twice, in two steps", b"}K\x01K\x02sK\x01K\x03s.", "same key twice"),
    ("a state for a class", PLAIN + b"}" + text("made") + b"K\x01sb.", "done to another thing"),
    ("a state for a dict", b"}}b.", "done to another thing"),
    ("a state twice", PLAIN + b")\x81}b}b.", "set twice"),
    ("a call of a value", PLAIN + b")\x81)R.", "a call of what is no class"),
    ("a call of a text", text("x") + b")R.", "a call of what is no class"),
    ("arguments that are a list", SIZE + b"]R.", "a call of what is no class"),
    ("items for a list", b"](K\x01K\x02u.", "done to another thing"),
    ("items for a value", PLAIN + b")\x81(K\x01K\x02u.", "done to another thing"),
    ("elements for a dict", b"}(K\x01e.", "done to another thing"),
    ("a name that is no text", b"K\x01K\x02\x93.", "whose name is no text"),
    ("a shape of texts", SIZE + text("a") + b"\x85\x85R.", "no list of whole numbers"),
    ("a shape of many dimensions", SIZE + b"(" + b"K\x01" * 65 + b"t\x85R.", "no list of whole numbers"),
    ("a dict of pairs", b"ccollections\nOrderedDict\n]\x85R.", "OrderedDict"),
    ("marks without end", b"(" * 5000 + b".", "open in each other"),
    ("a number that is taken twice", b"Nq\x05K\x01\x94h\x05.", "both under numbers and in order"),
]  # fmt: skip


@pytest.mark.parametrize(("data", "words"), [row[1:] for row in HOSTILE], ids=[row[0] for row in HOSTILE])
def test_hostile_pickles_are_refused_by_name(data: bytes, words: str) -> None:
    with pytest.raises(Refused) as caught:
        read(data)
    (problem,) = caught.value.problems
    assert (problem.kind, problem.subject) == ("hostile-pickle", "x")
    assert words in problem.found
    assert "nothing of it was run" in problem.remedy
    assert Plain.made <= 1


DAMAGED: list[tuple[str, bytes]] = [
    ("nothing", b""),
    ("no end", b"N"),
    ("an end without a value", b"."),
    ("a text that is cut off", b"X\xff\x00\x00\x00abc"),
    ("a text that is no UTF-8", b"X\x01\x00\x00\x00\xff."),
    ("a number that is cut off", b"M\x01"),
    ("a byte that is cut off", b"K"),
    ("a name without an end", b"ctorch"),
    ("a name that is no text", b"c\xff\nSize\n."),
    ("an unknown memo", b"h\x00."),
    ("an unknown long memo", b"j\xff\xff\xff\xff."),
    ("a memo of nothing", b"\x94."),
    ("no mark", b"t."),
    ("no mark for a list", b"]e."),
    ("a key without a value", b"}(K\x01u."),
    ("no such opcode", b"\xff."),
    ("a tuple of nothing", b"\x85."),
    ("a call of nothing", b"R."),
    ("a web page", b"<html>"),
]


@pytest.mark.parametrize("data", [row[1] for row in DAMAGED], ids=[row[0] for row in DAMAGED])
def test_damaged_pickles_are_refused(data: bytes) -> None:
    with pytest.raises(Refused) as caught:
        read(data)
    assert [problem.kind for problem in caught.value.problems] == ["damaged-pickle"]


def test_every_cut_of_a_pickle_is_refused() -> None:
    whole = pickle.dumps({f"name{number}": (number, [None, 1.5]) for number in range(20)})
    for size in range(len(whole)):
        with pytest.raises(Refused):
            read(whole[:size])


def test_a_large_memo_number_takes_no_memory() -> None:
    """The C unpickler of Python reserves room for four billion values."""
    tracemalloc.start()
    assert read(b"Nr\xff\xff\xff\xff.") is None
    assert tracemalloc.get_traced_memory()[1] < 1 << 20
    tracemalloc.stop()


@pytest.mark.parametrize("protocol", [2, 4])
def test_values_are_repeated_by_their_numbers_with_gaps_too(protocol: int) -> None:
    words = [f"word {number}" for number in range(400)]
    value = [words, {word: [word, (word, 7)] for word in reversed(words)}]
    data = pickle.dumps(value, protocol)
    assert read(data) == value
    assert read(pickletools.optimize(data)) == value


def test_values_may_be_stored_in_any_order() -> None:
    stored = b"".join(b"K%cq%c" % (number + 10, number) for number in (3, 1, 0, 2, 1))
    data = b"(" + stored + b"".join(b"h%c" % number for number in range(4)) + b"t."
    assert read(data) == pickle.loads(data) == (13, 11, 10, 12, 11, 10, 11, 12, 13)  # noqa: S301
    with pytest.raises(Refused, match="without the value"):
        read(b"K\x01q\x02h\x01.")


NESTS: list[tuple[str, bytes]] = [
    ("tuples", b")" + b"\x85" * 1_000_000 + b"."),
    ("lists", b"]" * 300_000 + b"a" * 299_999 + b"."),
    ("a list in itself", b"]q\x00h\x00a."),
    ("a dict in itself", b"}q\x00K\x01h\x00s."),
    ("a value in itself", PLAIN + b")\x81q\x00h\x00b."),
    ("a billion laughs", b")" + b"q\x00h\x00\x86" * 200 + b"."),
]


@pytest.mark.parametrize("data", [row[1] for row in NESTS], ids=[row[0] for row in NESTS])
def test_nests_are_read_and_let_go(data: bytes) -> None:
    """In a process of its own, which a deep recursion would end."""
    code = (
        "import sys; from reshard.formats.inert_pickle import read_pickle\n"
        "read_pickle(sys.stdin.buffer.read(), {'test_inert_pickle.Plain'}, 'x')"
    )
    path = os.pathsep.join(filter(None, sys.path))
    ran = subprocess.run(
        [sys.executable, "-c", code], input=data, env={"PYTHONPATH": path}, capture_output=True, timeout=60, check=False
    )
    assert not ran.returncode, ran.stderr


def test_a_nest_as_the_key_of_a_dict_is_not_hashed() -> None:
    """Its hash would take 2**200 steps."""
    laughs = b")" + b"q\x00h\x00\x86" * 200
    with pytest.raises(Refused):
        read(b"}" + laughs + b"K\x01s.")


def test_steps_are_bounded(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(inert_pickle, "MOST_STEPS", 100)
    assert read(b"N" * 99 + b".") is None
    with pytest.raises(Refused, match="more than 100 steps"):
        read(b"N" * 100 + b".")


def test_the_steps_are_opcodes() -> None:
    assert STEPS_BY_NAME.keys() <= {opcode.name for opcode in pickletools.opcodes}


def test_members_of_the_memory_formats_are_read_as_early_python_311_saves_them() -> None:
    def call(kind: str, member: str) -> bytes:
        text = member.encode()
        return b"cbuiltins\ngetattr\n(c" + kind.encode() + b"\nX" + len(text).to_bytes(4, "little") + text + b"tR."

    encoding = "torch.distributed.checkpoint.metadata\n_MEM_FORMAT_ENCODING"
    found = read_pickle(call(encoding, "TORCH_CONTIGUOUS_FORMAT"), ALLOWED_CLASSES, "x")
    assert (found.name, found.arguments) == (encoding.replace("\n", "."), ("TORCH_CONTIGUOUS_FORMAT",))
    for kind, member in ((encoding, "__class__"), ("torch\nSize", "TORCH_X"), ("builtins\ngetattr", "TORCH_X")):
        with pytest.raises(Refused, match=r"builtins\.getattr"):
            read_pickle(call(kind, member), ALLOWED_CLASSES, "x")
