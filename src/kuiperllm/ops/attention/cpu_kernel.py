"""CPU kernels of `attention`.

A block of keys is stored transposed, [d][block_size], so that 16 lanes are 16 tokens and a score is a sum
over d without any sum across lanes; a block of values is [block_size][d], so that 16 lanes are 16 output
columns. Queries that share a key/value head (the heads of a group, and the tokens of a prefill) are rows of
one matrix: row = token * REPEATS + head of the group.
"""

import numpy as np

from kuiperllm.backends.cpu.simd import (
    add,
    as_f32p,
    as_u16p,
    broadcast,
    exp,
    f32p,
    fma,
    i32p,
    i64p,
    keep_first,
    load,
    load_bf16,
    load_f16,
    load_first,
    max_lanes,
    mul,
    offset,
    prefetch,
    splat,
    store,
    store_bf16,
    store_f16,
    store_first,
    sub,
    sum_lanes,
    u8p,
    vmax,
    zeros,
)
from kuiperllm.backends.cpu.unroll import inline, registers, unroll

# Template parameters.
FORMAT = 0  # of the cache
ROWS = 6  # query rows in a register tile
VECTORS = 2  # vectors of 16 keys in a register tile of scores
COLUMNS = 4  # vectors of 16 columns in a register tile of outputs
SPLIT = False  # leave partial results for merge_splits
FETCH = False  # the cache is read once: have the next block fetched while one is worked on

FLOAT32, FLOAT16, BFLOAT16 = 0, 1, 2
TILE = 24  # query rows that share a pass over the keys
SPAN = 4  # blocks of keys between two looks at the maximum
LOWEST = -1e30  # score of a key that must not be seen; its weight becomes 0


@inline
def load_cached(cache, index):
    if FORMAT == FLOAT32:
        return load(as_f32p(cache), index)
    if FORMAT == FLOAT16:
        return load_f16(as_u16p(cache), index)
    return load_bf16(as_u16p(cache), index)


@inline
def block_of(cache, table, index, head, kv_heads, nbytes):
    """A head's keys or values of one block of a sequence."""
    return offset(cache, (np.int64(table[index]) * kv_heads + head) * nbytes)


@inline
def fetch(ahead, index):
    """Have the cache line of element `index` of another block fetched."""
    prefetch(ahead, index * (4 if FORMAT == FLOAT32 else 2))


@inline
def scalar_exp(x):
    return max_lanes(exp(splat(x)))


@inline
def multiply_keys(query, keys, ahead, scores, rows, d, size, stride):
    """scores[row, key] = query[row] . keys[:, key] for one block; `ahead` is what will be read next."""
    for row in range(0, rows, ROWS):
        for key in range(0, size, 16 * VECTORS):
            acc, at = registers(ROWS, VECTORS), registers(ROWS)
            for r in unroll(ROWS):
                at[r] = min(row + r, rows - 1) * d
                for c in unroll(VECTORS):
                    acc[r, c] = zeros()
            for i in range(d):
                column = registers(VECTORS)
                for c in unroll(VECTORS):
                    if FETCH and (FORMAT == FLOAT32 or c % 2 == 0):
                        fetch(ahead, i * size + key + 16 * c)
                    column[c] = load_cached(keys, i * size + key + 16 * c)
                for r in unroll(ROWS):
                    x = broadcast(query, at[r] + i)
                    for c in unroll(VECTORS):
                        acc[r, c] = fma(x, column[c], acc[r, c])
            for r in unroll(ROWS):
                if row + r < rows:
                    for c in unroll(VECTORS):
                        if key + 16 * c < size:
                            store(scores, (row + r) * stride + key + 16 * c, acc[r, c])


@inline
def add_values(scores, values, ahead, sums, rows, keys, dp, stride):
    """sums[row] += scores[row, :keys] times the values of one block; `ahead` is what will be read next."""
    for row in range(0, rows, ROWS):
        for column in range(0, dp, 16 * COLUMNS):
            acc, at = registers(ROWS, COLUMNS), registers(ROWS)
            for r in unroll(ROWS):
                at[r] = min(row + r, rows - 1)
                for c in unroll(COLUMNS):
                    acc[r, c] = load(sums, at[r] * dp + min(column + 16 * c, dp - 16))
            for j in range(keys):
                value = registers(COLUMNS)
                for c in unroll(COLUMNS):
                    if FETCH and (FORMAT == FLOAT32 or c % 2 == 0):
                        fetch(ahead, j * dp + column + 16 * c)
                    value[c] = load_cached(values, j * dp + min(column + 16 * c, dp - 16))
                for r in unroll(ROWS):
                    p = broadcast(scores, at[r] * stride + j)
                    for c in unroll(COLUMNS):
                        acc[r, c] = fma(p, value[c], acc[r, c])
            for r in unroll(ROWS):
                if row + r < rows:
                    for c in unroll(COLUMNS):
                        if column + 16 * c < dp:
                            store(sums, at[r] * dp + column + 16 * c, acc[r, c])


@inline
def weigh(scores, row, seen, top, total, sums, dp, width):
    """Turn a row of scores into weights exp(score - maximum); rescale what was summed if the maximum grew."""
    largest = splat(np.float32(LOWEST))
    for key in range(0, width, 16):
        score = load(scores, key)
        if key + 16 > seen:
            score = keep_first(score, seen - key, np.float32(LOWEST))
            store(scores, key, score)
        largest = vmax(largest, score)
    before, highest = top[row], max(top[row], max_lanes(largest))
    weight = zeros()
    for key in range(0, width, 16):
        p = exp(sub(load(scores, key), splat(highest)))
        store(scores, key, p)
        weight = add(weight, p)
    if highest > before:
        shrink = scalar_exp(before - highest)
        total[row] = total[row] * shrink
        for column in range(0, dp, 16):
            store(sums, row * dp + column, mul(load(sums, row * dp + column), splat(shrink)))
        top[row] = highest
    total[row] = total[row] + sum_lanes(weight)


def attend(
    q: f32p, keys: u8p, values: u8p, block_table: i32p, query_start: i32p, seq_lens: i32p, out: f32p,
    scratch: f32p, partial: f32p, kv_heads: int, repeats: int, d: int, dp: int, size: int, tiles: int,
    splits: int, table_width: int, q_token: int, q_head: int, out_token: int, out_head: int,
    scratch_stride: int, partial_stride: int, scale: float, begin, end, thread,
):  # fmt: skip
    query = offset(scratch, thread * scratch_stride)
    scores = offset(query, TILE * d)
    sums = offset(scores, TILE * SPAN * size)
    top = offset(sums, TILE * dp)
    total = offset(top, TILE)
    item_bytes = 4 if FORMAT == FLOAT32 else 2
    key_bytes, value_bytes = d * size * item_bytes, dp * size * item_bytes
    for item in range(begin, end):
        split, rest = item % splits, item // splits
        tile, rest = rest % tiles, rest // tiles
        head, sequence = rest % kv_heads, rest // kv_heads
        start = np.int64(query_start[sequence])
        query_len = np.int64(query_start[sequence + 1]) - start
        context = np.int64(seq_lens[sequence]) - query_len
        row0 = tile * TILE
        rows = min(query_len * repeats - row0, TILE)
        if rows <= 0:
            continue
        for row in range(rows):
            token, member = (row0 + row) // repeats, (row0 + row) % repeats
            source = offset(q, (start + token) * q_token + (head * repeats + member) * q_head)
            for i in range(d):
                query[row * d + i] = source[i] * scale
            top[row] = np.float32(LOWEST)
            total[row] = np.float32(0)
            for i in range(0, dp, 16):
                store(sums, row * dp + i, zeros())
        limit = context + (row0 + rows - 1) // repeats + 1
        blocks = (limit + size - 1) // size
        share = (blocks + splits - 1) // splits
        after = min(split * share + share, blocks)
        table = offset(block_table, sequence * table_width)
        for first in range(split * share, after, SPAN):
            span = min(SPAN, after - first)
            for index in range(span):
                here = block_of(keys, table, first + index, head, kv_heads, key_bytes)
                if index + 1 < span:
                    ahead = block_of(keys, table, first + index + 1, head, kv_heads, key_bytes)
                else:
                    ahead = block_of(values, table, first, head, kv_heads, value_bytes)
                multiply_keys(query, here, ahead, offset(scores, index * size), rows, d, size, SPAN * size)
            for row in range(rows):
                seen = context + (row0 + row) // repeats + 1 - first * size
                weigh(offset(scores, row * SPAN * size), row, seen, top, total, sums, dp, span * size)
            for index in range(span):
                here = block_of(values, table, first + index, head, kv_heads, value_bytes)
                ahead = here
                if index + 1 < span:
                    ahead = block_of(values, table, first + index + 1, head, kv_heads, value_bytes)
                elif first + span < after:
                    ahead = block_of(keys, table, first + span, head, kv_heads, key_bytes)
                seen = min(limit - (first + index) * size, size)
                add_values(offset(scores, index * size), here, ahead, sums, rows, seen, dp, SPAN * size)
        if SPLIT:
            mine = offset(partial, item * partial_stride)
            for row in range(rows):
                for i in range(0, dp, 16):
                    store(mine, row * (dp + 2) + i, load(sums, row * dp + i))
                mine[row * (dp + 2) + dp] = top[row]
                mine[row * (dp + 2) + dp + 1] = total[row]
        else:
            for row in range(rows):
                token, member = (row0 + row) // repeats, (row0 + row) % repeats
                to = offset(out, (start + token) * out_token + (head * repeats + member) * out_head)
                inverse = splat(np.float32(1) / total[row])
                for i in range(0, d, 16):
                    store_first(to, i, mul(load(sums, row * dp + i), inverse), d - i)


def merge_splits(
    partial: f32p, out: f32p, kv_heads: int, repeats: int, d: int, dp: int, splits: int,
    out_token: int, out_head: int, stride: int, begin, end, thread,
):  # fmt: skip
    """Combine the pieces of a context: weights relative to the highest maximum. One token per sequence."""
    for item in range(begin, end):
        head, sequence = item % kv_heads, item // kv_heads
        for row in range(repeats):
            highest = np.float32(LOWEST)
            for split in range(splits):
                part = offset(partial, (item * splits + split) * stride + row * (dp + 2))
                highest = max(highest, part[dp])
            total = np.float32(0)
            for split in range(splits):
                part = offset(partial, (item * splits + split) * stride + row * (dp + 2))
                total += part[dp + 1] * scalar_exp(part[dp] - highest)
            to = offset(out, sequence * out_token + (head * repeats + row) * out_head)
            for i in range(0, d, 16):
                result = zeros()
                for split in range(splits):
                    part = offset(partial, (item * splits + split) * stride + row * (dp + 2))
                    weight = scalar_exp(part[dp] - highest) / total
                    result = fma(load(part, i), splat(weight), result)
                store_first(to, i, result, d - i)


def write_kv(
    k: f32p, v: f32p, slots: i64p, keys: u8p, values: u8p, scratch: u8p, tokens: int, heads: int, d: int,
    dp: int, size: int, k_token: int, k_head: int, v_token: int, v_head: int, begin, end, thread,
):  # fmt: skip
    """Items go through the tokens of one head first: threads then seldom write to the same cache lines."""
    for item in range(begin, end):
        head, token = item // tokens, item % tokens
        slot = slots[token]
        if slot < 0:
            continue
        block, place = slot // size * heads + head, slot % size
        key, value = offset(k, token * k_token + head * k_head), offset(v, token * v_token + head * v_head)
        if FORMAT == FLOAT32:
            to = offset(as_f32p(keys), block * d * size + place)
            for i in range(d):
                to[i * size] = key[i]
            row = offset(as_f32p(values), (block * size + place) * dp)
            for i in range(0, d, 16):
                store(row, i, load_first(value, i, d - i))
        else:
            halves = offset(as_u16p(scratch), thread * dp)
            row16 = offset(as_u16p(values), (block * size + place) * dp)
            for i in range(0, d, 16):
                if FORMAT == FLOAT16:
                    store_f16(halves, i, load_first(key, i, d - i))
                    store_f16(row16, i, load_first(value, i, d - i))
                else:
                    store_bf16(halves, i, load_first(key, i, d - i))
                    store_bf16(row16, i, load_first(value, i, d - i))
            to16 = offset(as_u16p(keys), block * d * size + place)
            for i in range(d):
                to16[i * size] = halves[i]
