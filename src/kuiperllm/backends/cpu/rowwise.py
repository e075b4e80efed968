"""What kernels need to know about a whole row of numbers."""

from __future__ import annotations

from typing import Any

import numpy as np

from kuiperllm.backends.cpu.simd import (
    count_lanes,
    equal,
    first_lane,
    keep_first,
    load,
    load_first,
    max_lanes,
    splat,
    vmax,
)
from kuiperllm.backends.cpu.unroll import inline, registers, unroll

LANES = 16
STEP = 64
NEGATIVE_INFINITY = np.float32(-np.inf)


@inline
def load_or(x: Any, i: int, n: int, fill: Any) -> Any:
    """16 elements from i on, with `fill` in place of those from n on."""
    if i + LANES <= n:
        return load(x, i)
    return keep_first(load_first(x, i, n - i), n - i, fill)


@inline
def largest(x: Any, n: int) -> Any:
    """The largest of n elements; NaN does not count. Minus infinity if there is none."""
    best = registers(4)
    for k in unroll(4):
        best[k] = splat(NEGATIVE_INFINITY)
    blocks = n & -STEP
    for i in range(0, blocks, STEP):
        for k in unroll(4):
            best[k] = vmax(load(x, i + LANES * k), best[k])
    for i in range(blocks, n, LANES):
        best[0] = vmax(load_or(x, i, n, NEGATIVE_INFINITY), best[0])
    return max_lanes(vmax(vmax(best[0], best[1]), vmax(best[2], best[3])))


@inline
def first_equal(x: Any, n: int, value: Any) -> Any:
    """Where the value first occurs among n elements; -1 if nowhere."""
    wanted = splat(value)
    for i in range(0, n & -LANES, LANES):
        found = equal(load(x, i), wanted)
        if count_lanes(found) > 0:
            return i + first_lane(found)
    for i in range(n & -LANES, n):
        if x[i] == value:
            return i
    return -1


@inline
def log(x: float) -> float:
    """The natural logarithm of a positive, finite float64, to about 1e-15.

    x = m 2**e with m between sqrt(1/2) and sqrt(2), and log m = 2 artanh((m - 1) / (m + 1)).
    """
    exponent = 0
    while x > 1.4142135623730951:
        x *= 0.5
        exponent += 1
    while x < 0.7071067811865476:
        x *= 2.0
        exponent -= 1
    s = (x - 1.0) / (x + 1.0)
    square, power, total = s * s, s, 0.0
    for k in range(1, 24, 2):
        total += power / k
        power *= square
    return 2.0 * total + exponent * 0.6931471805599453
