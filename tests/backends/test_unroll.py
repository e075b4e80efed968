"""Template parameters, unrolled loops and register tiles: rewritten functions run as plain Python here."""

from __future__ import annotations

import ast
import inspect

import pytest

from kuiperllm.backends.cpu.unroll import inline, registers, specialize, unroll
from kuiperllm.errors import KernelError

ROWS = 2
COLS = 3
SIGNED = False


def tile_of_sums(x):
    acc = registers(ROWS, COLS)
    for r in unroll(ROWS):
        for c in unroll(COLS):
            acc[r, c] = 10 * r + c
    for i in range(len(x)):
        for r in unroll(ROWS):
            for c in unroll(COLS):
                acc[r, c] += x[i] * (r + 1)
    total = []
    for r in unroll(ROWS):
        for c in unroll(COLS):
            total.append(acc[r, c])
    return total


def two_tiles():
    a, b = registers(2), registers(2)
    for k in unroll(2):
        a[k], b[k] = k, 10 * k
    return a[0] + a[1] + b[0] + b[1]


def neighbours(x):
    acc = registers(4)
    for k in unroll(4):
        acc[k] = x[k]
    for k in unroll(2):
        acc[k] = acc[k] + acc[k + 2]
    return acc[0] + acc[1]


def static_branches(x):
    if SIGNED:
        sign = -1
    elif ROWS > 2:
        sign = undefined_name  # noqa: F821 - must have been removed
    else:
        sign = 1
    if COLS == 3 and not SIGNED:
        x += 100
    if x < 0:
        x = 0
    return sign * x * (2 if ROWS == 2 else 3)


def triangle():
    pairs = []
    for i in unroll(4):
        for j in unroll(i):
            pairs.append((i, j))
    return pairs


def unknown_count(n):
    total = 0
    for k in unroll(n):
        total += k
    return total


def unknown_index(n):
    acc = registers(2)
    acc[n] = 0
    return acc[n]


def empty_branch(x):
    if SIGNED:
        x = -x
    return x


@inline
def helper(x):
    return x * ROWS


@pytest.mark.parametrize(("rows", "cols"), [(2, 3), (1, 1), (4, 2)])
def test_tiles_spread_into_variables(rows: int, cols: int) -> None:
    function = specialize(tile_of_sums, {"ROWS": rows, "COLS": cols})
    assert function([5, 6]) == [10 * r + c + 11 * (r + 1) for r in range(rows) for c in range(cols)]
    assert "acc_0_0" in function.__code__.co_varnames
    assert "acc" not in function.__code__.co_varnames


def test_several_tiles_in_one_statement() -> None:
    assert specialize(two_tiles, {})() == 11


def test_indices_may_be_expressions() -> None:
    assert specialize(neighbours, {})([1, 2, 3, 4]) == 10


def test_static_branches_are_decided() -> None:
    assert specialize(static_branches, {})(1) == 202
    assert specialize(static_branches, {"SIGNED": True})(1) == -2
    assert specialize(static_branches, {})(-500) == 0
    assert "undefined_name" not in specialize(static_branches, {}).__code__.co_names
    assert specialize(empty_branch, {})(3) == 3


def test_inner_counts_may_depend_on_outer_variables() -> None:
    assert specialize(triangle, {})() == [(i, j) for i in range(4) for j in range(i)]


def test_line_numbers_stay() -> None:
    first = inspect.getsourcelines(neighbours)[1]
    lines = {line for _, _, line in specialize(neighbours, {}).__code__.co_lines() if line is not None}
    assert lines <= set(range(first, first + 8))


def test_source_is_left_alone() -> None:
    before = ast.dump(ast.parse(inspect.getsource(tile_of_sums)))
    specialize(tile_of_sums, {"ROWS": 3})
    assert ast.dump(ast.parse(inspect.getsource(tile_of_sums))) == before
    assert ROWS == 2


def test_errors_name_the_kernel_and_what_is_wrong() -> None:
    with pytest.raises(KernelError, match=r"^tile_of_sums has no template parameter DEPTH$"):
        specialize(tile_of_sums, {"DEPTH": 1})
    with pytest.raises(KernelError, match=r"^kernel unknown_count: n must be known at compile time$"):
        specialize(unknown_count, {})
    with pytest.raises(KernelError, match=r"^kernel unknown_index: n must be known at compile time$"):
        specialize(unknown_index, {})


def test_words_refuse_to_work_outside_kernels() -> None:
    assert list(unroll(3)) == [0, 1, 2]
    with pytest.raises(KernelError, match=r"^registers\(2, 3\) can only be used in a kernel$"):
        registers(2, 3)
    with pytest.raises(KernelError, match=r"^helper can only be called from a kernel$"):
        helper(1)
