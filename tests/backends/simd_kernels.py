"""Kernels that tests of the tool box run."""

import numpy as np

from kuiperllm.backends.cpu.rowwise import first_equal, largest, log
from kuiperllm.backends.cpu.simd import (
    add,
    at_least,
    count_lanes,
    dot2_i16,
    equal,
    exp,
    f32p,
    first_lane,
    gather,
    greater,
    i8p,
    i32p,
    i64p,
    load,
    load_8bytes,
    load_bf16,
    load_f16,
    load_first,
    load_i32,
    min_lanes,
    mul_i32,
    sqrt,
    store,
    store_bf16,
    store_f16,
    store_first,
    store_i32,
    store_quads,
    u8p,
    u16p,
    unrelated,
)

FACTOR = 2


def widen_bf16(source: u16p, out: f32p, begin, end, thread):
    for i in range(begin, end):
        store(out, 16 * i, load_bf16(source, 16 * i))


def widen_f16(source: u16p, out: f32p, begin, end, thread):
    for i in range(begin, end):
        store(out, 16 * i, load_f16(source, 16 * i))


def narrow_bf16(source: f32p, out: u16p, begin, end, thread):
    for i in range(begin, end):
        store_bf16(out, 16 * i, load(source, 16 * i))


def narrow_f16(source: f32p, out: u16p, begin, end, thread):
    for i in range(begin, end):
        store_f16(out, 16 * i, load(source, 16 * i))


def exponential(source: f32p, out: f32p, begin, end, thread):
    for i in range(begin, end):
        store(out, 16 * i, exp(load(source, 16 * i)))


def copy_first(source: f32p, out: f32p, count: int, begin, end, thread):
    for _ in range(begin, end):
        store_first(out, 0, load_first(source, 0, count), count)


def gathered(source: f32p, places: i32p, out: f32p, begin, end, thread):
    for i in range(begin, end):
        store(out, 16 * i, gather(source, load_i32(places, 16 * i)))


def products(x: i32p, y: i32p, out: i32p, begin, end, thread):
    for i in range(begin, end):
        store_i32(out, 16 * i, mul_i32(load_i32(x, 16 * i), load_i32(y, 16 * i)))


def pairs_summed(x: i32p, y: i32p, out: i32p, begin, end, thread):
    for i in range(begin, end):
        store_i32(out, 16 * i, dot2_i16(load_i32(out, 16 * i), load_i32(x, 16 * i), load_i32(y, 16 * i)))


def quads(source: i32p, out: i8p, distance: int, begin, end, thread):
    for i in range(begin, end):
        store_quads(out, 4 * distance * i, load_i32(source, 16 * i), distance)


def eights(source: u8p, out: i64p, begin, end, thread):
    for i in range(begin, end):
        out[i] = load_8bytes(source, 3 * i)


def powers(out: f32p, begin, end, thread):
    other = unrelated(out)
    for _ in range(begin, end):
        store(other, 0, add(load(out, 0), load(out, 0)))


def compare(x: f32p, y: f32p, out: i64p, begin, end, thread):
    for i in range(begin, end):
        a, b = load(x, 16 * i), load(y, 16 * i)
        out[4 * i] = count_lanes(greater(a, b))
        out[4 * i + 1] = count_lanes(at_least(a, b))
        out[4 * i + 2] = count_lanes(equal(a, b))
        out[4 * i + 3] = first_lane(equal(a, b))


def facts(x: f32p, n: int, out: f32p, place: i64p, begin, end, thread):
    for _ in range(begin, end):
        out[0] = largest(x, n)
        out[1] = min_lanes(load(x, 0))
        out[2] = sqrt(x[0])
        out[3] = log(np.float64(x[0]))
        place[0] = first_equal(x, n, out[0])


def count_items(out: i64p, begin, end, thread):
    for i in range(begin, end):
        out[i] += FACTOR


def wants_a_library(x: f32p, begin, end, thread):
    x[0] = np.sin(x[0])


def lacks_a_type(x, begin, end, thread):
    x[0] = 0


def lacks_items(x: f32p):
    x[0] = 0


def adds_text(x: f32p, begin, end, thread):
    x[0] = x[0] + "1"
