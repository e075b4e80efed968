"""A Jinja environment for templates that nobody has read: sandboxed, and bounded in time and memory.

Jinja's own sandbox keeps a template away from Python's internals, but not from `'a' * 10**10` or from six
nested loops. Here everything that can make a text or list longer is charged to a `Budget` before or as it
happens (operators, calls, filters, literals, slices, joined output), and every loop step and call looks at
the clock.

This module imports Jinja; import it only where a template is about to be used.
"""

from __future__ import annotations

import json
import re
import time
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from functools import update_wrapper
from types import BuiltinMethodType
from typing import Any

from jinja2 import nodes
from jinja2.compiler import CodeGenerator, Frame
from jinja2.exceptions import SecurityError
from jinja2.ext import Extension
from jinja2.filters import FILTERS
from jinja2.parser import Parser
from jinja2.runtime import Context, str_join
from jinja2.sandbox import ImmutableSandboxedEnvironment
from jinja2.utils import Namespace

MAX_INTEGER_BITS = 4096


class BudgetError(SecurityError):
    """A template used up its time or memory."""


class Budget:
    """What one rendering may still spend.

    Args:
        characters: how many characters and list entries all values together may have.
        seconds: how long it may take.
    """

    def __init__(self, characters: int, seconds: float) -> None:
        self._left = self._limit = characters
        self._seconds = seconds
        self._deadline = time.monotonic() + seconds

    def tick(self) -> None:
        """Raise `BudgetError` if the time is over."""
        if time.monotonic() > self._deadline:
            raise BudgetError(f"the template ran for more than {self._seconds:g} s")

    def spend(self, amount: int) -> None:
        """Raise `BudgetError` if more is asked for than is left."""
        self.tick()
        self._left -= max(1, amount)
        if self._left < 0:
            raise BudgetError(f"the template produced more than {self._limit} characters")

    def charge(self, value: Any) -> Any:
        """Spend the size of a value, counting what it contains as often as it occurs; return the value."""
        pending = [value]
        while pending:
            item = pending.pop()
            if isinstance(item, str | bytes):
                self.spend(len(item))
            elif isinstance(item, list | tuple):
                self.spend(len(item))
                pending.extend(item)
            elif isinstance(item, dict):
                self.spend(len(item))
                pending.extend(item)
                pending.extend(item.values())
        return value


_active: ContextVar[Budget] = ContextVar("kuiperllm_template_budget")


@contextmanager
def spending(budget: Budget) -> Iterator[None]:
    """Charge what templates do inside this block to `budget`."""
    token = _active.set(budget)
    try:
        yield
    finally:
        _active.reset(token)


# --- the environment --------------------------------------------------------------------------------------


class _OpaqueNamespace(Namespace):
    """A namespace that does not print its contents, which may contain themselves many times over."""

    def __repr__(self) -> str:
        return "<namespace>"


class _Generation(Extension):
    """`{% generation %}…{% endgeneration %}`: marks what training learns; here its body alone counts."""

    tags = {"generation"}  # noqa: RUF012 (declared so by Jinja)

    def parse(self, parser: Parser) -> list[nodes.Node]:
        next(parser.stream)
        return parser.parse_statements(("name:endgeneration",), drop_needle=True)


class _ChargingGenerator(CodeGenerator):
    """Compiles what makes or copies values, and has no hook in the sandbox, into calls of the environment."""

    def visit_For(self, node: nodes.For, frame: Frame) -> None:
        tick = nodes.Call(nodes.EnvironmentAttribute("tick"), [], [], None, None, lineno=node.lineno)
        node.body.insert(0, nodes.ExprStmt(tick, lineno=node.lineno))
        super().visit_For(node, frame)

    def visit_Concat(self, node: nodes.Concat, frame: Frame) -> None:
        self.write("environment.joined(")
        super().visit_Tuple(nodes.Tuple(node.nodes, "load"), frame)
        self.write(")")

    def visit_List(self, node: nodes.List, frame: Frame) -> None:
        self._charged(super().visit_List, node, frame)

    def visit_Dict(self, node: nodes.Dict, frame: Frame) -> None:
        self._charged(super().visit_Dict, node, frame)

    def visit_Tuple(self, node: nodes.Tuple, frame: Frame) -> None:
        if node.ctx == "load":
            self._charged(super().visit_Tuple, node, frame)
        else:
            super().visit_Tuple(node, frame)

    def visit_Getitem(self, node: nodes.Getitem, frame: Frame) -> None:
        if isinstance(node.arg, nodes.Slice):
            self._charged(super().visit_Getitem, node, frame)
        else:
            super().visit_Getitem(node, frame)

    def _charged(self, visit: Callable[[Any, Frame], None], node: nodes.Node, frame: Frame) -> None:
        self.write("environment.charged(")
        visit(node, frame)
        self.write(")")


class BoundedEnvironment(ImmutableSandboxedEnvironment):
    """Jinja as chat templates expect it (see `chat_template`), within the active `Budget`."""

    code_generator_class = _ChargingGenerator
    intercepted_binops = frozenset({"+", "*", "**", "%"})

    def __init__(self) -> None:
        super().__init__(
            trim_blocks=True,
            lstrip_blocks=True,
            optimized=False,  # nothing is computed while compiling
            extensions=[_Generation, "jinja2.ext.loopcontrols"],
        )
        self.filters = {name: _charging(FILTERS[name]) for name in _PLAIN_FILTERS}
        self.filters |= {
            "tojson": _tojson,
            "replace": lambda text, *args, **kw: self.charged(_replace(str(text), *args, **kw)),
            "join": _charging(update_wrapper(_join, FILTERS["join"])),
            "indent": _charging(FILTERS["indent"], before=_padding_cost),
            "center": _charging(FILTERS["center"], before=_padding_cost),
            "batch": _charging(FILTERS["batch"], before=_padding_cost),
            "slice": _charging(FILTERS["slice"], before=_padding_cost),
        }
        self.globals = {
            "range": self.globals["range"],
            "dict": dict,
            "namespace": _OpaqueNamespace,
            "joiner": self.globals["joiner"],
            "cycler": self.globals["cycler"],
        }

    @staticmethod
    def concat(parts: Iterable[str]) -> str:
        """Join pieces of output, once it is known that they fit."""
        pieces = list(parts)
        _active.get().spend(sum(map(len, pieces)))
        return "".join(pieces)

    def tick(self) -> None:
        """Called in each step of a loop."""
        _active.get().tick()

    def charged(self, value: Any) -> Any:
        """Charge a new value to the budget."""
        return _active.get().charge(value)

    def joined(self, parts: tuple[Any, ...]) -> str:
        """The `~` operator."""
        self.charged(parts)
        return self.charged(str_join(parts))  # type: ignore[no-any-return]

    def call_binop(self, context: Context, operator: str, left: Any, right: Any) -> Any:
        """An arithmetic operator, refused if its result would be enormous."""
        if isinstance(left, int) and isinstance(right, int):
            _check_integers(operator, left, right)
        elif operator == "*":
            for sequence, times in ((left, right), (right, left)):
                if isinstance(sequence, str | bytes | list | tuple) and isinstance(times, int):
                    _active.get().spend(len(sequence) * times)
        elif operator == "+" and isinstance(left, str) and isinstance(right, str):
            _active.get().spend(len(left) + len(right))
        elif operator == "%" and isinstance(left, str | bytes):
            _check_format(left)
        return self.charged(super().call_binop(context, operator, left, right))

    def call(__self, __context: Context, __obj: Any, *args: Any, **kwargs: Any) -> Any:
        """A call; methods of strings are charged before they run."""
        budget = _active.get()
        budget.tick()
        for arg in args:
            if isinstance(arg, str):
                budget.spend(len(arg))
        method = getattr(__obj, "__wrapped__", __obj)
        if isinstance(method, BuiltinMethodType) and isinstance(method.__self__, str | bytes | int):
            if method.__name__ == "join" and args:
                args = (list(args[0]), *args[1:])
            _check_method(method.__self__, method.__name__, args, kwargs)
        result = super().call(__context, __obj, *args, **kwargs)
        return budget.charge(result)


def _check_integers(operator: str, left: int, right: int) -> None:
    bits = left.bit_length() + right.bit_length()
    if operator == "**":
        bits = left.bit_length() * max(0, right)
    if bits > MAX_INTEGER_BITS:
        raise BudgetError("the template computes an enormous number")


def _check_format(pattern: str | bytes) -> None:
    """Refuse format strings with widths that are large or computed."""
    text = pattern.decode("latin-1") if isinstance(pattern, bytes) else pattern
    if re.search(r"[0-9]{5}|%[^%a-zA-Z]*\*|\{[^{}]*:[^{}]*\{", text):
        raise BudgetError("the template pads text to an enormous width")


def _check_method(owner: str | bytes | int, name: str, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
    """Charge what a method of a built-in type will make, as far as that is more than its input."""
    if isinstance(owner, int) or name in ("translate", "maketrans"):
        raise SecurityError(f"{type(owner).__name__}.{name} is not available in chat templates")
    if name in ("format", "format_map"):
        _check_format(owner)
        _active.get().charge([*args, *kwargs.values()])
    elif name == "replace" and len(args) >= 2:
        _replace_cost(owner, args[0], args[1])
    elif name == "join" and args:
        _active.get().spend(len(args[0]) * len(owner))
        _active.get().charge(args[0])
    else:
        numbers = [abs(value) for value in (*args, *kwargs.values()) if isinstance(value, int)]
        if name in ("center", "ljust", "rjust", "zfill"):
            _active.get().spend(len(owner) + max(numbers, default=0))
        elif name == "expandtabs":
            _active.get().spend(len(owner) * (8 + max(numbers, default=0)))


# --- filters ----------------------------------------------------------------------------------------------

# Jinja's filters that never make more than a small multiple of what they are given.
_PLAIN_FILTERS = """
    abs attr capitalize count d default dictsort e escape first float forceescape groupby int items last
    length list lower map max min reject rejectattr reverse round safe select selectattr sort string title
    trim truncate unique upper wordcount
""".split()  # noqa: SIM905


def _charging(plain: Callable[..., Any], before: Callable[..., None] | None = None) -> Callable[..., Any]:
    """A filter that charges its result; `update_wrapper` keeps the mark of filters that take a context."""

    def filtered(*args: Any, **kwargs: Any) -> Any:
        budget = _active.get()
        budget.tick()
        if before is not None:
            before(*args, **kwargs)
        result = plain(*args, **kwargs)
        # Lazy results are charged when something collects them.
        return budget.charge(result)

    return update_wrapper(filtered, plain)


def _tojson(
    value: Any,
    ensure_ascii: bool = False,
    indent: int | None = None,
    separators: tuple[str, str] | None = None,
    sort_keys: bool = False,
) -> str:
    """JSON as chat templates expect it: no HTML escapes, and non-ASCII characters as they are."""
    if isinstance(indent, str) or (indent is not None and not 0 <= indent <= 16):
        raise BudgetError("the template asks for an impossible indentation of JSON")
    budget = _active.get()
    budget.charge(value)
    text = json.dumps(
        value, ensure_ascii=ensure_ascii, indent=indent, separators=separators, sort_keys=sort_keys
    )
    budget.spend(len(text))
    return text


def _replace(text: str, old: Any, new: Any, count: int | None = None) -> str:
    _replace_cost(text, str(old), str(new))
    return text.replace(str(old), str(new), -1 if count is None else count)


def _replace_cost(text: str | bytes, old: Any, new: Any) -> None:
    if isinstance(old, type(text)) and isinstance(new, type(text)):
        _active.get().spend(len(text) + text.count(old) * len(new))  # type: ignore[arg-type]


def _join(context: Any, value: Iterable[Any], d: Any = "", attribute: Any = None) -> str:
    parts = list(value)
    _active.get().spend(len(parts) * len(str(d)))
    _active.get().charge(parts)
    return FILTERS["join"](context, parts, d, attribute)  # type: ignore[no-any-return]


def _padding_cost(value: Any, *args: Any, **kwargs: Any) -> None:
    """Bound filters that put something of a given width in front of each part of a value."""
    width = 1
    for argument in (*args, *kwargs.values()):
        if isinstance(argument, int):
            width = max(width, abs(argument))
        elif isinstance(argument, str):
            width = max(width, len(argument))
    parts = value.count("\n") + 1 if isinstance(value, str) else 1
    _active.get().spend(parts * width)
