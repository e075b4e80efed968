"""A pickle machine that makes plain data, and calls nothing.

Source: the opcodes' descriptions in Python's `pickletools`. Python's own machine imports and calls whatever a
pickle names. This one knows the opcodes with which dictionaries of tensors are written, by protocols 2 to 5,
and no others. What a pickle may name is decided by the caller; any other name is refused. It is bounded:
every opcode makes at most one small object, there are `MAX_OPCODES` at most, and a memo is a dictionary.
"""

from __future__ import annotations

import re
import struct
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from kuiperllm.checkpoint.base import brief

MAX_PICKLE_BYTES = 8 << 20
MAX_OPCODES = 500_000  # a tensor takes about 50
MAX_KEY = 1 << 31

_PLAIN_NAME = re.compile(r"[\w.]{1,100}", re.ASCII)


class RefusedError(ValueError):
    """A pickle asks for something that is more than data."""


@dataclass(frozen=True, slots=True)
class Constructor:
    """What a global stands for if it may be called: a function of ours."""

    name: str
    make: Callable[[tuple[Any, ...]], Any]


def shown(value: object) -> str:
    """An untrusted value for messages: a text or number itself; of others, which may be nested, the kind."""
    return brief(value) if isinstance(value, str | int | float) else f"a {type(value).__name__}"


def unpickle(
    data: bytes,
    find_global: Callable[[str, str], object | None],
    load_persistent: Callable[[Any], object],
) -> Any:
    """The object that a pickle describes: of dict, list, tuple, str, int, float, bool, None, and whatever the
    two functions make.

    Args:
        data: the pickle.
        find_global: what stands for a module's name; None refuses it. Only a `Constructor` is ever called.
        load_persistent: what a persistent id stands for. It may raise `ValueError`.

    Raises:
        RefusedError: it asks for a global that is not allowed, or uses an opcode that data does not need.
        ValueError: it is corrupt or too large. Constructors may raise it as well.
    """
    if len(data) > MAX_PICKLE_BYTES:
        raise ValueError(f"a pickle of {len(data)} bytes; at most {MAX_PICKLE_BYTES} are read")
    return _Machine(data, find_global, load_persistent).run()


class _Machine:
    def __init__(
        self,
        data: bytes,
        find_global: Callable[[str, str], object | None],
        load_persistent: Callable[[Any], object],
    ) -> None:
        self._data = data
        self._at = 0
        self._find_global = find_global
        self._load_persistent = load_persistent
        self._stack: list[Any] = []
        self._marks: list[int] = []  # heights of the stack
        self._memo: dict[int, Any] = {}

    def run(self) -> Any:
        for _ in range(MAX_OPCODES):
            at = self._at
            code = self._take(1)
            if code == b".":
                return self._pop()
            step = _OPCODES.get(code)
            if step is None:
                raise RefusedError(
                    f"uses opcode {code.hex()} at byte {at} of its pickle, which makes no data"
                )
            step(self)
        raise ValueError(f"a pickle of more than {MAX_OPCODES} opcodes")

    # --- bytes of the pickle ------------------------------------------------------------------------------

    def _take(self, count: int) -> bytes:
        taken = self._data[self._at : self._at + count]
        if len(taken) < count:
            raise ValueError(f"its pickle ends within {count} bytes from byte {self._at} on")
        self._at += count
        return taken

    def _number(self, form: str) -> Any:
        return struct.unpack(form, self._take(struct.calcsize(form)))[0]

    def _text(self, count: int) -> str:
        try:
            return self._take(count).decode("utf-8", "surrogatepass")
        except UnicodeDecodeError:
            raise ValueError(f"a text of its pickle is not UTF-8, before byte {self._at}") from None

    def _line(self) -> str:
        end = self._data.find(b"\n", self._at)
        if end < 0:
            raise ValueError(f"its pickle ends within a name from byte {self._at} on")
        line = self._text(end - self._at)
        self._at = end + 1
        return line

    # --- the stack ----------------------------------------------------------------------------------------

    def push(self, value: Any) -> None:
        self._stack.append(value)

    def _pop(self) -> Any:
        if len(self._stack) <= (self._marks[-1] if self._marks else 0):
            raise ValueError(f"its pickle takes a value that is not there, before byte {self._at}")
        return self._stack.pop()

    def _pop_to_mark(self) -> list[Any]:
        if not self._marks:
            raise ValueError(f"its pickle takes a mark that is not there, before byte {self._at}")
        height = self._marks.pop()
        values = self._stack[height:]
        del self._stack[height:]
        return values

    def _top(self, kind: type) -> Any:
        """The value on top, which stays there and must be of this very type."""
        value = self._pop()
        if type(value) is not kind:
            raise ValueError(f"its pickle treats {shown(value)} as a {kind.__name__}, before byte {self._at}")
        self._stack.append(value)
        return value

    # --- opcodes ------------------------------------------------------------------------------------------

    def protocol(self) -> None:
        if (version := self._number("<B")) > 5:
            raise ValueError(f"pickle protocol {version}, which does not exist")

    def frame(self) -> None:
        self._take(8)  # a hint for readers of streams

    def mark(self) -> None:
        self._marks.append(len(self._stack))

    def number(self, form: str) -> None:
        self.push(self._number(form))

    def long(self) -> None:
        self.push(int.from_bytes(self._take(self._number("<B")), "little", signed=True))

    def text(self, form: str) -> None:
        self.push(self._text(self._number(form)))

    def tuple_of(self, count: int) -> None:
        values = [self._pop() for _ in range(count)]
        self.push(tuple(reversed(values)))

    def tuple_to_mark(self) -> None:
        self.push(tuple(self._pop_to_mark()))

    def append(self) -> None:
        value = self._pop()
        self._top(list).append(value)

    def append_to_mark(self) -> None:
        values = self._pop_to_mark()
        self._top(list).extend(values)

    def set_item(self) -> None:
        value, key = self._pop(), self._pop()
        self._set(self._top(dict), [key, value])

    def set_items_to_mark(self) -> None:
        values = self._pop_to_mark()
        self._set(self._top(dict), values)

    @staticmethod
    def _set(target: dict[Any, Any], values: list[Any]) -> None:
        if len(values) % 2:
            raise ValueError("its pickle has a key without a value")
        for key, value in zip(values[::2], values[1::2], strict=True):
            # Nothing else, as hashing a tuple may take forever, and large integers collide at will.
            if type(key) is not str and not (type(key) is int and abs(key) <= MAX_KEY):
                raise ValueError(f"its pickle has the key {shown(key)}, which is neither a text nor a number")
            if key in target:
                raise ValueError(f"key {brief(key)} appears twice")
            target[key] = value

    def put(self, form: str) -> None:
        self._remember(self._number(form))

    def memoize(self) -> None:
        self._remember(len(self._memo))

    def _remember(self, number: int) -> None:
        value = self._pop()
        self.push(value)
        self._memo[number] = value

    def get(self, form: str) -> None:
        number = self._number(form)
        if number not in self._memo:
            raise ValueError(f"its pickle recalls value {number}, which it has not stored")
        self.push(self._memo[number])

    def global_by_lines(self) -> None:
        module, name = self._line(), self._line()
        self._push_global(module, name)

    def global_by_stack(self) -> None:
        name, module = self._pop(), self._pop()
        if type(name) is not str or type(module) is not str:
            raise ValueError(f"its pickle names a global with {shown(name)} of {shown(module)}")
        self._push_global(module, name)

    def instance(self) -> None:
        module, name = self._line(), self._line()
        raise RefusedError(f"makes an object of {_full_name(module, name)}, which is no tensor; refused")

    def _push_global(self, module: str, name: str) -> None:
        found = self._find_global(module, name)
        if found is None:
            raise RefusedError(f"asks for {_full_name(module, name)}, which is no tensor; refused")
        self.push(found)

    def persistent(self) -> None:
        self.push(self._load_persistent(self._pop()))

    def reduce(self) -> None:
        arguments, called = self._pop(), self._pop()
        if not isinstance(called, Constructor) or type(arguments) is not tuple:
            raise RefusedError(f"calls {shown(called)}, which makes no tensor; refused")
        self.push(called.make(arguments))

    def build(self) -> None:
        """Attributes of the dictionary on top, such as a state's `_metadata`: nobody needs them."""
        self._pop()
        self._top(dict)


def _full_name(module: str, name: str) -> str:
    full = f"{module}.{name}"
    return full if _PLAIN_NAME.fullmatch(full) else brief(full)


_OPCODES: dict[bytes, Callable[[_Machine], None]] = {
    b"\x80": _Machine.protocol,
    b"\x95": _Machine.frame,
    b"(": _Machine.mark,
    b"N": lambda machine: machine.push(None),
    b"\x88": lambda machine: machine.push(True),
    b"\x89": lambda machine: machine.push(False),
    b"J": lambda machine: machine.number("<i"),
    b"K": lambda machine: machine.number("<B"),
    b"M": lambda machine: machine.number("<H"),
    b"G": lambda machine: machine.number(">d"),
    b"\x8a": _Machine.long,
    b"X": lambda machine: machine.text("<I"),
    b"\x8c": lambda machine: machine.text("<B"),
    b")": lambda machine: machine.push(()),
    b"]": lambda machine: machine.push([]),
    b"}": lambda machine: machine.push({}),
    b"\x85": lambda machine: machine.tuple_of(1),
    b"\x86": lambda machine: machine.tuple_of(2),
    b"\x87": lambda machine: machine.tuple_of(3),
    b"t": _Machine.tuple_to_mark,
    b"a": _Machine.append,
    b"e": _Machine.append_to_mark,
    b"s": _Machine.set_item,
    b"u": _Machine.set_items_to_mark,
    b"q": lambda machine: machine.put("<B"),
    b"r": lambda machine: machine.put("<I"),
    b"\x94": _Machine.memoize,
    b"h": lambda machine: machine.get("<B"),
    b"j": lambda machine: machine.get("<I"),
    b"c": _Machine.global_by_lines,
    b"\x93": _Machine.global_by_stack,
    b"i": _Machine.instance,
    b"Q": _Machine.persistent,
    b"R": _Machine.reduce,
    b"b": _Machine.build,
}
