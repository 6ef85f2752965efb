"""Reads a pickle without running it: no class is looked up, nothing is called. What it would call comes out as a value.

Python's own unpickler is not used, not even with a `find_class` that refuses: a few bytes make it reserve gigabytes
(LONG_BINPUT), hash a nest of tuples until the stack or the week ends, or change what it is given (BUILD on a class).
The machine here knows only the opcodes that torch's checkpoints need, and takes no more than a bounded number of steps.
Each step makes at most one small value, so that memory is bounded too. Values may be nested as deeply as the pickle
likes, or hold themselves: whoever reads them looks at a known depth, and never walks, compares, hashes or prints them.
"""

import pickle
import pickletools
from collections.abc import Callable, Collection, Mapping, Sequence
from struct import unpack
from typing import Any

from reshard.errors import refuse
from reshard.formats.pickle_machine import PLAIN, DamagedPickle, Global, HostilePickle, Inert, Machine, Persistent

MOST_STEPS = 250_000_000
"""Of one pickle. The metadata of a checkpoint take about seventy for each part of a tensor: enough for 3.5 million."""

MOST_MARKS = 1000
"""Open at a time. torch's checkpoints have six."""

MOST_INTEGER_SIZE = 9
"""In bytes: up to 2**64, and a sign."""

NOT_RUN = "nothing of it was run; do not load it with other programs either, unless you know who made it"

MAKE_AGAIN = "copy the file again from where it was saved"

KEYS = frozenset({str, int, Inert})
"""Types of the keys of a dict. The hash of a text is bounded by its length, that of an Inert is its place in memory; a
tuple may hold others and be hashed for ever."""

OPCODES = {ord(opcode.code): opcode.name for opcode in pickletools.opcodes}
"""The names of all opcodes, by their bytes."""

MEMOIZE = pickle.MEMOIZE[0]

Step = Callable[[Machine], None]


def read_pickle(data: bytes, allowed: Collection[str], name: str) -> Any:
    """The value of a pickle of the file `name`, in which the allowed classes and functions are named only.

    Dicts, lists, tuples, numbers and texts are as they are in Python; `torch.Size` is a tuple, `OrderedDict` a dict;
    the rest is Global, Inert and Persistent. `allowed` are dotted names. Raises Refused.
    """
    machine = Machine(data, allowed)
    try:
        return run_machine(machine)
    except HostilePickle as error:
        expected = "only what torch's own checkpoints hold"
        raise refuse("hostile-pickle", name, f"a pickle with {error}", expected, NOT_RUN) from None
    except (DamagedPickle, IndexError, KeyError, UnicodeDecodeError) as error:
        what = str(error) if isinstance(error, DamagedPickle) else "a step without the value that it needs"
        found = f"{what}, before byte {machine.at:,}"
        raise refuse("damaged-pickle", name, found, "a whole pickle", MAKE_AGAIN) from None


def run_machine(machine: Machine) -> Any:
    """The value that a pickle ends with. Raises HostilePickle, DamagedPickle and what reading past an end raises."""
    steps, data, memo, far = STEPS, machine.data, machine.memo, machine.far
    for _ in range(MOST_STEPS):
        code = data[machine.at]
        machine.at += 1
        if code == MEMOIZE:  # a quarter of all steps
            if far:  # which number comes next would be a guess
                raise HostilePickle("values stored both under numbers and in order")
            memo.append(machine.stack[-1])
            continue
        step = steps[code]
        if step is not None:
            step(machine)
        elif code == pickle.STOP[0]:
            return machine.stack.pop()
        else:
            raise explain_opcode(code)
    raise HostilePickle(f"more than {MOST_STEPS:,} steps")


def explain_opcode(code: int) -> ValueError:
    """The fault of a byte that no step is known for."""
    known = OPCODES.get(code)
    if known is None:
        return DamagedPickle(f"the byte {code:#04x}, which means nothing in a pickle")
    return HostilePickle(f"the opcode {known}")


# Numbers, texts and constants.


def add_small(machine: Machine) -> None:
    """BININT1."""
    machine.stack.append(machine.data[machine.at])
    machine.at += 1


def add_short(machine: Machine) -> None:
    """BININT2."""
    machine.stack.append(int.from_bytes(machine.take(2), "little"))


def add_signed(machine: Machine) -> None:
    """BININT."""
    machine.stack.append(int.from_bytes(machine.take(4), "little", signed=True))


def add_long(machine: Machine) -> None:
    """LONG1."""
    size = machine.take(1)[0]
    if size > MOST_INTEGER_SIZE:
        raise HostilePickle(f"a number of {size} bytes")
    machine.stack.append(int.from_bytes(machine.take(size), "little", signed=True))


def add_float(machine: Machine) -> None:
    """BINFLOAT."""
    machine.stack.append(unpack(">d", machine.take(8))[0])


def add_short_text(machine: Machine) -> None:
    """SHORT_BINUNICODE."""
    machine.stack.append(machine.take(machine.take(1)[0]).decode("utf-8", "surrogatepass"))


def add_text(machine: Machine) -> None:
    """BINUNICODE."""
    size = int.from_bytes(machine.take(4), "little")
    machine.stack.append(machine.take(size).decode("utf-8", "surrogatepass"))


def add_none(machine: Machine) -> None:
    """NONE."""
    machine.stack.append(None)


def add_true(machine: Machine) -> None:
    """NEWTRUE."""
    machine.stack.append(True)


def add_false(machine: Machine) -> None:
    """NEWFALSE."""
    machine.stack.append(False)


# Containers.


def open_mark(machine: Machine) -> None:
    """MARK."""
    if len(machine.marks) >= MOST_MARKS:
        raise HostilePickle(f"more than {MOST_MARKS:,} values open in each other")
    machine.marks.append(machine.stack)
    machine.stack = []


def add_empty_tuple(machine: Machine) -> None:
    """EMPTY_TUPLE."""
    machine.stack.append(())


def pack_one(machine: Machine) -> None:
    """TUPLE1."""
    machine.stack[-1] = (machine.stack[-1],)


def pack_two(machine: Machine) -> None:
    """TUPLE2."""
    last = machine.stack.pop()
    machine.stack[-1] = (machine.stack[-1], last)


def pack_three(machine: Machine) -> None:
    """TUPLE3."""
    last, middle = machine.stack.pop(), machine.stack.pop()
    machine.stack[-1] = (machine.stack[-1], middle, last)


def pack_marked(machine: Machine) -> None:
    """TUPLE."""
    values = machine.pop_mark()
    machine.stack.append(tuple(values))


def add_list(machine: Machine) -> None:
    """EMPTY_LIST."""
    machine.stack.append([])


def append_one(machine: Machine) -> None:
    """APPEND."""
    value = machine.stack.pop()
    require_type(machine, list).append(value)


def append_marked(machine: Machine) -> None:
    """APPENDS."""
    values = machine.pop_mark()
    require_type(machine, list).extend(values)


def add_dict(machine: Machine) -> None:
    """EMPTY_DICT."""
    machine.stack.append({})


def set_one(machine: Machine) -> None:
    """SETITEM."""
    value, key = machine.stack.pop(), machine.stack.pop()
    set_items(require_type(machine, dict), [key], [value])


def set_marked(machine: Machine) -> None:
    """SETITEMS."""
    values = machine.pop_mark()
    if len(values) % 2:
        raise DamagedPickle("a key without a value")
    set_items(require_type(machine, dict), values[::2], values[1::2])


def set_items(target: dict[Any, Any], keys: Sequence[Any], values: Sequence[Any]) -> None:
    """Sets items that the dict does not have. Raises HostilePickle."""
    if not KEYS.issuperset(map(type, keys)):
        raise HostilePickle("a key of a dict that is neither a text nor a number")
    wanted = len(target) + len(keys)
    target.update(zip(keys, values, strict=True))
    if len(target) != wanted:
        raise HostilePickle("a dict with the same key twice")


def require_type(machine: Machine, kind: type[Any]) -> Any:
    """The last value, if it is of this type itself. Raises HostilePickle."""
    target = machine.stack[-1]
    if type(target) is not kind:
        raise HostilePickle(f"a step for a {kind.__name__} that is done to another thing")
    return target


# The memo.


def store_at_byte(machine: Machine) -> None:
    """BINPUT."""
    machine.store(machine.take(1)[0])


def store_at_number(machine: Machine) -> None:
    """LONG_BINPUT."""
    machine.store(int.from_bytes(machine.take(4), "little"))


def repeat_at_byte(machine: Machine) -> None:
    """BINGET."""
    machine.stack.append(machine.recall(machine.data[machine.at]))
    machine.at += 1


def repeat_at_number(machine: Machine) -> None:
    """LONG_BINGET."""
    machine.stack.append(machine.recall(int.from_bytes(machine.take(4), "little")))


# What Python would look up, call or change.


def name_global(machine: Machine) -> None:
    """GLOBAL: two lines of text."""
    words = []
    for _ in range(2):
        end = machine.data.find(b"\n", machine.at, machine.at + 1000)
        if end < 0:
            raise DamagedPickle("a name without an end")
        words.append(machine.take(end - machine.at).decode())
        machine.at += 1
    machine.stack.append(machine.find_global(*words))


def name_from_stack(machine: Machine) -> None:
    """STACK_GLOBAL."""
    name, module = machine.stack.pop(), machine.stack.pop()
    machine.stack.append(machine.find_global(module, name))


def make_inert(machine: Machine) -> None:
    """REDUCE and NEWOBJ, which would call something."""
    arguments, called = machine.stack.pop(), machine.stack.pop()
    if type(called) is not Global or type(arguments) is not tuple:
        raise HostilePickle("a call of what is no class of torch")
    make = PLAIN.get(called.name)
    machine.stack.append(make(arguments) if make else Inert(called.name, arguments))


def set_state(machine: Machine) -> None:
    """BUILD: once for each value, and never on a class."""
    state = machine.stack.pop()
    target = require_type(machine, Inert)
    if target.state is not None:
        raise HostilePickle("a value whose state is set twice")
    target.state = state


def name_persistent(machine: Machine) -> None:
    """BINPERSID."""
    machine.stack.append(Persistent(machine.stack.pop()))


def skip_protocol(machine: Machine) -> None:
    """PROTO."""
    machine.take(1)


def skip_frame(machine: Machine) -> None:
    """FRAME, which says how much to read ahead: all of it is in memory."""
    machine.take(8)


STEPS_BY_NAME: Mapping[str, Step] = {
    "PROTO": skip_protocol, "FRAME": skip_frame, "MARK": open_mark,
    "BINPUT": store_at_byte, "LONG_BINPUT": store_at_number,
    "BINGET": repeat_at_byte, "LONG_BINGET": repeat_at_number,
    "NONE": add_none, "NEWTRUE": add_true, "NEWFALSE": add_false,
    "BININT": add_signed, "BININT1": add_small, "BININT2": add_short, "LONG1": add_long, "BINFLOAT": add_float,
    "SHORT_BINUNICODE": add_short_text, "BINUNICODE": add_text,
    "EMPTY_TUPLE": add_empty_tuple, "TUPLE1": pack_one, "TUPLE2": pack_two, "TUPLE3": pack_three, "TUPLE": pack_marked,
    "EMPTY_LIST": add_list, "APPEND": append_one, "APPENDS": append_marked,
    "EMPTY_DICT": add_dict, "SETITEM": set_one, "SETITEMS": set_marked,
    "GLOBAL": name_global, "STACK_GLOBAL": name_from_stack, "NEWOBJ": make_inert, "REDUCE": make_inert,
    "BUILD": set_state, "BINPERSID": name_persistent,
}  # fmt: skip
"""By the name of the opcode. Left out are those that look up by a number (EXT) or call in one step (INST, OBJ), read
numbers as decimals of any length, name things outside by text, and all that a checkpoint has no use for."""

STEPS: Sequence[Step | None] = [STEPS_BY_NAME.get(OPCODES.get(code, "")) for code in range(256)]
"""By the byte of the opcode."""
