"""The CPU kernel of `sample`. It never sorts.

A step that keeps the most likely tokens is a threshold on the logit, found by bisection: each pass over the
row measures how many tokens lie at or above a value and how much weight they have, and finds the logits next
to it, so that the ends of the interval are always logits that occur. As soon as the tokens above the lower
end are few, they are copied to a list, and all that follows, the draw included, is done on the list.

A token that has been dropped has weight 0.
"""

import numpy as np

from kuiperllm.backends.cpu.rowwise import NEGATIVE_INFINITY, first_equal, largest, load_or
from kuiperllm.backends.cpu.simd import (
    add,
    as_i32p,
    at_least,
    both,
    count_lanes,
    equal,
    exp,
    f32p,
    greater,
    i32p,
    i64p,
    load,
    max_lanes,
    min_lanes,
    mul,
    offset,
    splat,
    store,
    sub,
    sum_lanes,
    vmax,
    vmin,
    where,
    zeros,
)
from kuiperllm.backends.cpu.unroll import inline

LANES = 16
BLOCK = 1024  # elements whose weights are summed in float32 before they go to a float64 sum


@inline
def weigh(x, weights, n, best, temperature):
    """Write all weights; how many are above 0, and the lowest logit of those."""
    scale, top = splat(np.float32(1) / temperature), splat(best)
    none, one = zeros(), splat(np.float32(1))
    count, low = 0, top
    for i in range(0, n, LANES):
        v = load_or(x, i, n, NEGATIVE_INFINITY)
        w = where(equal(v, top), one, exp(mul(sub(v, top), scale)))
        w = where(at_least(w, none), w, none)  # NaN
        store(weights, i, w)
        alive = greater(w, none)
        count += count_lanes(alive)
        low = where(alive, vmin(v, low), low)
    return count, min_lanes(low)


@inline
def measure(x, weights, n, value):
    """Of the tokens at or above a logit: number and weight; and the logits next to it, above and below."""
    none, limit = zeros(), splat(value)
    above, below = splat(np.float32(np.inf)), splat(NEGATIVE_INFINITY)
    count, mass = 0, 0.0
    for start in range(0, n, BLOCK):
        total = none
        for i in range(start, min(start + BLOCK, n), LANES):
            v, w = load_or(x, i, n, NEGATIVE_INFINITY), load(weights, i)
            alive = greater(w, none)
            inside = both(at_least(v, limit), alive)
            total = add(total, where(inside, w, none))
            count += count_lanes(inside)
            above = where(inside, vmin(v, above), above)
            below = where(both(greater(limit, v), alive), vmax(v, below), below)
        mass += sum_lanes(total)
    return count, mass, min_lanes(above), max_lanes(below)


@inline
def threshold(x, weights, n, low, high, count, enough, goal, goal_mass):
    """Narrow [low, high] down to the largest logit at or above which there is enough.

    There is enough if the tokens are at least `goal` in number or, where that is 0, `goal_mass` in weight.
    Stops early once at most `enough` tokens lie at or above `low`. `count` says how many that is.
    """
    half = np.float32(0.5)
    while low < high and count > enough:
        middle = low * half + high * half
        if not low < middle <= high:
            middle = high
        found, mass, above, below = measure(x, weights, n, middle)
        if found >= goal if goal > 0 else mass >= goal_mass:
            low, count = above, found
        else:
            high = below
    return low, high, count


@inline
def copy_survivors(x, weights, n, low, keys, key_weights, ids, room):
    """List the tokens at or above a logit; how many there are."""
    none, limit = zeros(), splat(low)
    count = 0
    for i in range(0, n, LANES):
        v, w = load_or(x, i, n, NEGATIVE_INFINITY), load(weights, i)
        if count_lanes(both(at_least(v, limit), greater(w, none))) > 0:
            for j in range(i, min(i + LANES, n)):
                if x[j] >= low and weights[j] > 0 and count < room:
                    keys[count], key_weights[count], ids[count] = x[j], weights[j], j
                    count += 1
    for i in range(count, (count + LANES - 1) & -LANES):
        key_weights[i] = 0
    return count


@inline
def keep(x, weights, n, low, ties):
    """Drop the tokens below a logit, and those equal to it except the first `ties`."""
    none, limit = zeros(), splat(low)
    seen = 0
    for i in range(0, n, LANES):
        v, w = load_or(x, i, n, NEGATIVE_INFINITY), load(weights, i)
        alive = greater(w, none)
        equals = count_lanes(both(equal(v, limit), alive))
        if equals == 0 or seen + equals <= ties:
            store(weights, i, where(at_least(v, limit), w, none))
        elif seen >= ties:
            store(weights, i, where(greater(v, limit), w, none))
        else:
            rest = ties - seen
            for j in range(i, min(i + LANES, n)):
                if x[j] == low and weights[j] > 0:
                    rest -= 1
                    if rest < 0:
                        weights[j] = 0
                elif not x[j] >= low:
                    weights[j] = 0
        seen += equals


@inline
def more_than(x, weights, n, value):
    """Number and weight of the tokens above a logit, and the weight of one that equals it."""
    none, limit = zeros(), splat(value)
    equal_weight = none
    count, mass = 0, 0.0
    for start in range(0, n, BLOCK):
        total = none
        for i in range(start, min(start + BLOCK, n), LANES):
            v, w = load_or(x, i, n, NEGATIVE_INFINITY), load(weights, i)
            inside = both(greater(v, limit), greater(w, none))
            total = add(total, where(inside, w, none))
            count += count_lanes(inside)
            equal_weight = vmax(where(equal(v, limit), w, none), equal_weight)
        mass += sum_lanes(total)
    return count, mass, max_lanes(equal_weight)


@inline
def block_mass(weights, start, n):
    total = zeros()
    for i in range(start, min(start + BLOCK, n), LANES):
        total = add(total, load(weights, i))
    return np.float64(sum_lanes(total))


@inline
def whole_mass(weights, n):
    total = 0.0
    for start in range(0, n, BLOCK):
        total += block_mass(weights, start, n)
    return total


@inline
def drop_light(weights, n, least):
    limit = splat(least)
    for i in range(0, n, LANES):
        w = load(weights, i)
        store(weights, i, where(at_least(w, limit), w, zeros()))


@inline
def draw(weights, n, u):
    """The first index at which the running sum exceeds u times the total; one with a weight in any case."""
    goal = u * whole_mass(weights, n)
    before, chosen = 0.0, 0
    running = 0.0
    for start in range(0, n, BLOCK):
        mass = block_mass(weights, start, n)
        if mass > 0:
            chosen, before = start, running
            running += mass
            if running > goal:
                break
    index = chosen
    for i in range(chosen, min(chosen + BLOCK, n)):
        if weights[i] > 0:
            index = i
            before += weights[i]
            if before > goal:
                break
    return index


@inline
def uniform(seed, position):
    """Philox4x32-10; see philox.py."""
    low = np.uint64(0xFFFFFFFF)
    bits = np.uint64(32)
    c0, c1, c2, c3 = np.uint64(position) & low, np.uint64(0), np.uint64(0), np.uint64(0)
    k0, k1 = np.uint64(seed) & low, np.uint64(seed) >> bits
    for _ in range(10):
        first, second = c0 * np.uint64(0xD2511F53), c2 * np.uint64(0xCD9E8D57)
        c0, c1 = (second >> bits) ^ c1 ^ k0, second & low
        c2, c3 = (first >> bits) ^ c3 ^ k1, first & low
        k0, k1 = (k0 + np.uint64(0x9E3779B9)) & low, (k1 + np.uint64(0xBB67AE85)) & low
    word = ((c0 << bits) | c1) >> np.uint64(11)
    return np.float64(np.int64(word)) * 1.1102230246251565e-16


@inline
def sample_row(x, n, best, temperature, top_k, top_p, min_p, u, weights, keys, key_weights, ids, room):
    count, low = weigh(x, weights, n, best, temperature)
    high = best
    listed = False
    if 0 < top_k < count:
        low, high, count = threshold(x, weights, n, low, high, count, room, top_k, 0.0)
        if count <= room < n:
            n = copy_survivors(x, weights, n, low, keys, key_weights, ids, room)
            x, weights, listed = keys, key_weights, True
        low, high, count = threshold(x, weights, n, low, high, count, 0, top_k, 0.0)
        more, _, _ = more_than(x, weights, n, low)
        keep(x, weights, n, low, top_k - more)
        count, high = top_k, best
    if top_p < 1:
        goal = top_p * whole_mass(weights, n)
        low, high, count = threshold(x, weights, n, low, high, count, room, 0, goal)
        if count <= room < n:
            n = copy_survivors(x, weights, n, low, keys, key_weights, ids, room)
            x, weights, listed = keys, key_weights, True
        low, high, count = threshold(x, weights, n, low, high, count, 0, 0, goal)
        _, mass, one = more_than(x, weights, n, low)
        ratio = min((goal - mass) / one, float(n))
        ties = np.int64(ratio)
        keep(x, weights, n, low, max(1, ties + (ratio > ties)))
    if min_p > 0:
        drop_light(weights, n, min_p)
    chosen = draw(weights, n, u)
    return np.int64(ids[chosen]) if listed else chosen


def sample(
    logits: f32p, temperature: f32p, top_k: i32p, top_p: f32p, min_p: f32p, seeds: i64p, positions: i32p,
    out: i32p, scratch: f32p, vocabulary: int, stride: int, padded: int, room: int, begin, end, thread,
):  # fmt: skip
    for row in range(begin, end):
        x = offset(logits, row * stride)
        weights = offset(scratch, row * (padded + 3 * room))
        keys, key_weights = offset(weights, padded), offset(weights, padded + room)
        ids = as_i32p(offset(weights, padded + 2 * room))
        best = largest(x, vocabulary)
        if best == NEGATIVE_INFINITY:
            out[row] = 0
        elif not temperature[row] > 0:
            out[row] = first_equal(x, vocabulary, best)
        else:
            out[row] = sample_row(
                x, vocabulary, best, temperature[row], np.int64(top_k[row]), top_p[row], min_p[row],
                uniform(seeds[row], positions[row]), weights, keys, key_weights, ids, room,
            )  # fmt: skip
