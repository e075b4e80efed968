"""The CPU kernel of `logprobs`."""

import numpy as np

from kuiperllm.backends.cpu.rowwise import NEGATIVE_INFINITY, largest, load_or, log
from kuiperllm.backends.cpu.simd import (
    add,
    count_lanes,
    exp,
    f32p,
    greater,
    i32p,
    offset,
    splat,
    sub,
    sum_lanes,
    zeros,
)
from kuiperllm.backends.cpu.unroll import inline

LANES = 16
BLOCK = 1024  # elements that are summed in float32 before they go to a float64 sum


@inline
def log_of_sum(x, n, best):
    """log(sum of e**(x - best)); NaN passes."""
    top = splat(best)
    mass = 0.0
    for start in range(0, n, BLOCK):
        total = zeros()
        for i in range(start, min(start + BLOCK, n), LANES):
            total = add(total, exp(sub(load_or(x, i, n, NEGATIVE_INFINITY), top)))
        mass += sum_lanes(total)
    return log(mass) if mass < np.inf else mass


@inline
def select_top(x, n, ids, values, k):
    """The k largest elements in descending order, by insertion into a sorted list."""
    for slot in range(k):
        ids[slot], values[slot] = -1, NEGATIVE_INFINITY
    for i in range(0, n, LANES):
        worst = splat(values[k - 1])
        if count_lanes(greater(load_or(x, i, n, NEGATIVE_INFINITY), worst)) > 0:
            for j in range(i, min(i + LANES, n)):
                insert(x[j], j, ids, values, k)


@inline
def insert(value, index, ids, values, k):
    if not value > values[k - 1]:
        return
    slot = k - 1
    while slot > 0 and value > values[slot - 1]:
        ids[slot], values[slot] = ids[slot - 1], values[slot - 1]
        slot -= 1
    ids[slot], values[slot] = index, value


def logprobs(
    logits: f32p, token_ids: i32p, chosen: f32p, top_ids: i32p, top_values: f32p,
    vocabulary: int, stride: int, k: int, begin, end, thread,
):  # fmt: skip
    for row in range(begin, end):
        x = offset(logits, row * stride)
        best = largest(x, vocabulary)
        rest = log_of_sum(x, vocabulary, best)
        token = token_ids[row]
        if 0 <= token < vocabulary:
            chosen[row] = np.float64(x[token]) - best - rest
        else:
            chosen[row] = NEGATIVE_INFINITY
        if k > 0:
            ids, values = offset(top_ids, row * k), offset(top_values, row * k)
            select_top(x, vocabulary, ids, values, k)
            for slot in range(k):
                values[slot] = np.float64(values[slot]) - best - rest
