"""Template parameters, unrolled loops and register tiles for kernels, by rewriting their syntax tree.

Numba has no way to say "unroll this loop and keep these vectors in registers", which is what a matrix kernel
is about. Three words provide it, and the result reads like the loop nest that it is:

    acc = registers(ROWS, COLS)            # ROWS x COLS local variables
    for r in unroll(ROWS):                 # the body is repeated, r is a constant in each copy
        for c in unroll(COLS):
            acc[r, c] = fma(x[r], w[c], acc[r, c])
    if GROUP == 32: ...                    # decided before compilation if only parameters occur in it

Template parameters are upper-case constants of the kernel's module; `specialize` gives them other values.
Functions marked `@inline`, in the same module or imported, are specialized along with the kernel that calls
them; template parameters of their modules are parameters of the kernel as well.
"""

from __future__ import annotations

import ast
import inspect
import textwrap
from collections.abc import Callable, Mapping
from typing import Any

from kuiperllm.errors import KernelError


class Inline:
    """A function of a kernel module that is specialized into each kernel that calls it."""

    def __init__(self, function: Callable[..., Any]) -> None:
        self.function = function
        self.__doc__ = function.__doc__

    def __call__(self, *args: Any) -> Any:
        """Refuse: there is nothing to run outside a kernel."""
        raise KernelError(f"{self.function.__name__} can only be called from a kernel")


def inline(function: Callable[..., Any]) -> Any:
    """Mark a function as part of the kernels that call it."""
    return Inline(function)


def unroll(count: int) -> range:
    """`range`, repeated at compile time. Meant for kernels; outside one it is `range`."""
    return range(count)


def registers(*shape: int) -> Any:
    """A tile of local variables, indexed by constants. Meant for kernels only."""
    raise KernelError(f"registers{shape} can only be used in a kernel")


def specialize(function: Callable[..., Any], parameters: Mapping[str, int | bool]) -> Callable[..., Any]:
    """A copy of a kernel with template parameters filled in, loops unrolled and register tiles spread out.

    Raises:
        KernelError: a parameter is not a constant of the kernel's module or of one that its helpers are from,
            or a bound is not constant.
    """
    module = function.__globals__
    helpers = [value.function.__globals__ for value in module.values() if isinstance(value, Inline)]
    for name in parameters:
        if not any(name in names for names in (module, *helpers)):
            raise KernelError(f"{function.__name__} has no template parameter {name}")
    scope = dict(module)
    scope.update(parameters)
    return _specialize(function, scope, {})


def _specialize(
    function: Callable[..., Any], scope: dict[str, Any], done: dict[Callable[..., Any], Any]
) -> Callable[..., Any]:
    tree = ast.parse(textwrap.dedent(inspect.getsource(function)))
    definition = tree.body[0]
    assert isinstance(definition, ast.FunctionDef)
    definition.decorator_list = []
    definition.returns = None
    for argument in definition.args.args:
        argument.annotation = None
    constants = {k: v for k, v in scope.items() if k.isupper() and isinstance(v, int | bool)}
    tree = ast.fix_missing_locations(_Rewriter(constants, function.__name__).visit(tree))
    ast.increment_lineno(tree, function.__code__.co_firstlineno - 1)
    local = dict(scope)
    for name in function.__code__.co_names:
        helper = scope.get(name)
        if isinstance(helper, Inline):
            if helper.function not in done:
                from numba import njit

                own = {**helper.function.__globals__, **{k: scope[k] for k in constants}}
                done[helper.function] = njit(nogil=True, forceinline=True, **_HELPER_OPTIONS)(
                    _specialize(helper.function, own, done)
                )
            local[name] = done[helper.function]
    exec(compile(tree, inspect.getfile(function), "exec"), local)
    result: Callable[..., Any] = local[function.__name__]
    return result


_HELPER_OPTIONS: dict[str, Any] = {
    "fastmath": {"contract", "reassoc", "nsz"},
    "boundscheck": False,
    "error_model": "numpy",
    "no_cpython_wrapper": True,
    "no_cfunc_wrapper": True,
}


class _Rewriter(ast.NodeTransformer):
    def __init__(self, constants: dict[str, Any], where: str) -> None:
        self.constants = constants
        self.where = where
        self.tiles: set[str] = set()

    def visit_Name(self, node: ast.Name) -> ast.expr:
        if isinstance(node.ctx, ast.Load) and node.id in self.constants:
            return ast.copy_location(ast.Constant(self.constants[node.id]), node)
        return node

    def visit_Assign(self, node: ast.Assign) -> ast.stmt | None:
        pairs = [(node.targets[0], node.value)]
        if isinstance(node.targets[0], ast.Tuple) and isinstance(node.value, ast.Tuple):
            pairs = list(zip(node.targets[0].elts, node.value.elts, strict=True))
        if all(_is_call(value, "registers") for _, value in pairs):
            self.tiles.update(target.id for target, _ in pairs if isinstance(target, ast.Name))
            return None
        self.generic_visit(node)
        return node

    def visit_Subscript(self, node: ast.Subscript) -> ast.expr:
        if isinstance(node.value, ast.Name) and node.value.id in self.tiles:
            index = self._evaluate(node.slice)
            parts = index if isinstance(index, tuple) else (index,)
            name = node.value.id + "".join(f"_{part}" for part in parts)
            return ast.copy_location(ast.Name(name, node.ctx), node)
        self.generic_visit(node)
        return node

    def visit_For(self, node: ast.For) -> ast.stmt | list[ast.stmt]:
        if not _is_call(node.iter, "unroll"):
            self.generic_visit(node)
            return node
        assert isinstance(node.iter, ast.Call)
        assert isinstance(node.target, ast.Name)
        count = self._evaluate(node.iter.args[0])
        outer, copies = self.constants, []
        for value in range(count):
            self.constants = {**outer, node.target.id: value}
            for statement in node.body:
                result = self.visit(_clone(statement))
                copies.extend(result if isinstance(result, list) else [result] if result else [])
        self.constants = outer
        return copies

    def visit_If(self, node: ast.If) -> ast.stmt | list[ast.stmt]:
        if not self._is_static(node.test):
            self.generic_visit(node)
            return node
        chosen = node.body if self._evaluate(node.test) else node.orelse
        statements = []
        for statement in chosen:
            result = self.visit(statement)
            statements.extend(result if isinstance(result, list) else [result] if result else [])
        return statements or [ast.copy_location(ast.Pass(), node)]

    def visit_IfExp(self, node: ast.IfExp) -> ast.expr:
        if self._is_static(node.test):
            chosen: ast.expr = self.visit(node.body if self._evaluate(node.test) else node.orelse)
            return chosen
        self.generic_visit(node)
        return node

    def _is_static(self, node: ast.expr) -> bool:
        names = [n for n in ast.walk(node) if isinstance(n, ast.Name)]
        calls = any(isinstance(n, ast.Call | ast.Subscript | ast.Attribute) for n in ast.walk(node))
        return not calls and all(n.id in self.constants for n in names)

    def _evaluate(self, node: ast.expr) -> Any:
        if not self._is_static(node):
            raise KernelError(f"kernel {self.where}: {ast.unparse(node)} must be known at compile time")
        expression = ast.fix_missing_locations(ast.Expression(_clone(node)))
        return eval(compile(expression, self.where, "eval"), {}, dict(self.constants))


def _is_call(node: ast.expr, name: str) -> bool:
    return isinstance(node, ast.Call) and isinstance(node.func, ast.Name) and node.func.id == name


def _clone(node: Any) -> Any:
    """A deep copy: a loop body is visited once for each value of the loop variable."""
    if isinstance(node, ast.AST):
        copy = type(node)(**{field: _clone(value) for field, value in ast.iter_fields(node)})
        return ast.copy_location(copy, node) if hasattr(node, "lineno") else copy
    if isinstance(node, list):
        return [_clone(item) for item in node]
    return node
