"""The state of a machine that reads pickles: its stack, its memo, and the inert values that it makes."""

from collections.abc import Callable, Collection, Mapping
from typing import Any, Final

MOST_DIMENSIONS = 64


class Inert:
    """A value that a pickle would make by a call: the name of what it calls, the arguments, and the state set on it."""

    __slots__ = ("arguments", "name", "state")

    def __init__(self, name: str, arguments: Any) -> None:
        self.name: Final = name
        """Of the class or function, with its module: `torch.Size`."""
        self.arguments: Final = arguments
        self.state: Any = None
        """As BUILD sets it, once; None before."""


class Global:
    """A class or function that a pickle names. Nothing can be done with it but name it."""

    __slots__ = ("name",)

    def __init__(self, name: str) -> None:
        self.name: Final = name


class Persistent:
    """What a pickle says of a value outside it: in a file of `torch.save`, the bytes of a tensor."""

    __slots__ = ("key",)

    def __init__(self, key: Any) -> None:
        self.key: Final = key


class HostilePickle(ValueError):
    """A pickle that wants more than a checkpoint needs."""


class DamagedPickle(ValueError):
    """Bytes that are no whole pickle."""


class Machine:
    """Carries out the opcodes of one pickle."""

    __slots__ = ("allowed", "at", "data", "far", "marks", "memo", "stack")

    def __init__(self, data: bytes, allowed: Collection[str]) -> None:
        self.data = data
        self.at = 0
        """Place of the next byte to be read."""
        self.allowed = {name: Global(name) for name in allowed}
        self.stack: list[Any] = []
        """The values since the last mark."""
        self.marks: list[list[Any]] = []
        """For each open mark, the values before it."""
        self.memo: list[Any] = []
        """Values by their numbers. A list: the metadata of a large checkpoint have millions, numbered in order."""
        self.far: dict[int, Any] = {}
        """Values whose numbers leave a gap, so that a large number needs no large memory. Those of `memo` are newer."""

    def take(self, size: int) -> bytes:
        """The next bytes. Raises DamagedPickle if there are not so many."""
        begin, end = self.at, self.at + size
        if end > len(self.data):
            raise DamagedPickle("it ends too early")
        self.at = end
        return self.data[begin:end]

    def pop_mark(self) -> list[Any]:
        """The values since the last mark, which is closed."""
        values, self.stack = self.stack, self.marks.pop()
        return values

    def store(self, number: int) -> None:
        """Stores the last value under a number. Raises IndexError without one."""
        value, count = self.stack[-1], len(self.memo)
        if number < count:
            self.memo[number] = value
        elif number > count:
            self.far[number] = value
        else:
            self.memo.append(value)

    def recall(self, number: int) -> Any:
        """The value that is stored under a number. Raises KeyError if there is none."""
        return self.memo[number] if number < len(self.memo) else self.far[number]

    def find_global(self, module: Any, name: Any) -> Global:
        """The allowed class or function of that name. Raises HostilePickle."""
        if type(module) is not str or type(name) is not str:
            raise HostilePickle("a class whose name is no text")
        found = self.allowed.get(f"{module}.{name}")
        if found is None:
            raise HostilePickle(f"{module[:100]}.{name[:100]}")
        return found


def make_shape(arguments: tuple[Any, ...]) -> tuple[int, ...]:
    """A `torch.Size` of whole numbers. Raises HostilePickle."""
    shape = arguments[0] if len(arguments) == 1 else None
    # A long one could be checked again and again.
    if type(shape) is tuple and len(shape) <= MOST_DIMENSIONS and all(type(size) is int for size in shape):
        return shape
    raise HostilePickle("a torch.Size that is no list of whole numbers")


def make_dict(arguments: tuple[Any, ...]) -> dict[Any, Any]:
    """An empty dict. Raises HostilePickle."""
    if arguments:
        raise HostilePickle("an OrderedDict made of another thing")
    return {}


def make_member(arguments: tuple[Any, ...]) -> Inert:
    """A member of an enumeration of memory formats: Python 3.11.0 to 3.11.3 saves one as a call of `getattr`. Raises
    HostilePickle for all else.
    """
    if len(arguments) == 2 and type(arguments[0]) is Global and type(arguments[1]) is str:
        kind, name = arguments[0].name, arguments[1]
        if kind.endswith("MEM_FORMAT_ENCODING") and name.startswith("TORCH_"):
            return Inert(kind, (name,))
    raise HostilePickle("builtins.getattr")


PLAIN: Mapping[str, Callable[[tuple[Any, ...]], Any]] = {
    "torch.Size": make_shape,
    "collections.OrderedDict": make_dict,
    "builtins.getattr": make_member,
}
"""Classes whose values are plain ones here."""
