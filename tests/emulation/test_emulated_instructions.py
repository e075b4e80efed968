"""The twins of the PTX instructions, against the layouts and roundings that the PTX ISA documents."""

from __future__ import annotations

from typing import Any

import ml_dtypes
import numpy as np
import pytest

LANES = range(32)
KINDS = {"bf16": ml_dtypes.bfloat16, "f16": np.float16}


def _register(low: np.ndarray[Any, Any], high: np.ndarray[Any, Any]) -> np.ndarray[Any, Any]:
    return (low.view(np.uint16).astype(np.uint32) | high.view(np.uint16).astype(np.uint32) << 16).view(
        np.int32
    )


# PTX ISA, "Matrix fragments for mma.m16n8k16 with floating point type": element i of a fragment, with
# groupID = lane >> 2 and threadID_in_group = lane % 4.


def _place_in_a(lane: int, i: int) -> tuple[int, int]:
    row = lane >> 2 if 0 <= i < 2 or 4 <= i < 6 else (lane >> 2) + 8
    column = lane % 4 * 2 + (i & 1) if i < 4 else lane % 4 * 2 + (i & 1) + 8
    return row, column


def _place_in_b(lane: int, i: int) -> tuple[int, int]:
    row = lane % 4 * 2 + (i & 1) if i < 2 else lane % 4 * 2 + (i & 1) + 8
    return row, lane >> 2


def _place_in_c(lane: int, i: int) -> tuple[int, int]:
    return (lane >> 2 if i < 2 else (lane >> 2) + 8), lane % 4 * 2 + (i & 1)


@pytest.mark.parametrize("seed", [0, 1])
@pytest.mark.parametrize("kind", KINDS)
def test_mma_16x8x16(run: Any, emulator: Any, kind: str, seed: int) -> None:
    emulator.seed = seed
    random = np.random.default_rng(1)
    a = random.integers(-8, 9, (16, 16)).astype(KINDS[kind])
    b = random.integers(-8, 9, (16, 8)).astype(KINDS[kind])
    c = random.integers(-100, 100, (16, 8)).astype(np.float32)
    fragments_a = np.array([[a[_place_in_a(lane, i)] for i in range(8)] for lane in LANES])
    fragments_b = np.array([[b[_place_in_b(lane, i)] for i in range(4)] for lane in LANES])
    fragments_c = np.array([[c[_place_in_c(lane, i)] for i in range(4)] for lane in LANES])
    body = f"""
    int t = threadIdx.x;
    unsigned x[4];
    for (int i = 0; i < 4; i++) x[i] = a[t * 4 + i];
    float z[4];
    for (int i = 0; i < 4; i++) z[i] = c[t * 4 + i];
    mma_16x8x16<{kind}>(z, x, b[t * 2], b[t * 2 + 1]);
    for (int i = 0; i < 4; i++) c[t * 4 + i] = z[i];
    """
    *_, found = run(
        body, 32,
        _register(fragments_a[:, 0::2], fragments_a[:, 1::2]).ravel(),
        _register(fragments_b[:, 0::2], fragments_b[:, 1::2]).ravel(),
        fragments_c.ravel(),
    )  # fmt: skip
    product = c + a.astype(np.float32) @ b.astype(np.float32)
    expected = [[product[_place_in_c(lane, i)] for i in range(4)] for lane in LANES]
    np.testing.assert_array_equal(found.reshape(32, 4), expected)


@pytest.mark.parametrize("transposed", [False, True])
def test_load_matrices(run: Any, transposed: bool) -> None:
    """Lanes 8i to 8i + 7 give the rows of matrix i; lane l gets row l / 4, elements 2 (l % 4) and on."""
    elements = np.arange(32 * 8, dtype=np.uint16).reshape(4, 8, 8)
    call = "load_matrices_transposed" if transposed else "load_matrices"
    body = f"""
    int t = threadIdx.x;
    uint4* rows = (uint4*)shared_memory;
    rows[(t * 5) % 32] = ((const uint4*)a)[t];  // rows lie anywhere
    __syncwarp();
    unsigned r[4];
    {call}(r, rows + (t * 5) % 32);
    for (int i = 0; i < 4; i++) b[t * 4 + i] = r[i];
    """
    _, found = run(body, 32, elements.reshape(-1).view(np.int32), np.zeros(128, np.int32), shared=512)
    halves = found.view(np.uint16).reshape(32, 4, 2)
    for lane in LANES:
        for matrix in range(4):
            source = elements[matrix].T if transposed else elements[matrix]
            column = 2 * (lane % 4)
            assert tuple(halves[lane, matrix]) == tuple(source[lane // 4, column : column + 2])


def _floats() -> np.ndarray[Any, Any]:
    """Floats of every size, ties and their neighbours among them, infinities and NaNs."""
    every = np.arange(1 << 16, dtype=np.uint32)
    bits = [every << 16]
    for kind in (ml_dtypes.bfloat16, np.float16):
        exact = every.astype(np.uint16).view(kind).astype(np.float32).view(np.uint32)
        for step in (0x0FFF, 0x1000, 0x1001, 0x7FFF, 0x8000, 0x8001, 1):
            bits.append(exact[::7] + np.uint32(step))
    subnormal = np.random.default_rng(0).uniform(0, 2.0**-13, 4096).astype(np.float32).view(np.uint32)
    return np.concatenate([*bits, subnormal]).view(np.float32)


@pytest.mark.parametrize("kind", KINDS)
def test_rounding_to_16_bits(run: Any, kind: str) -> None:
    x = _floats()
    body = f"""
    for (int i = threadIdx.x; i < c; i += 256) {{
        unsigned pair = pack2<{kind}>(a[i], -a[i]);
        b[i] = from_float<{kind}>(a[i]).bits;
        if ((pair & 0xffff) != b[i] || pair >> 16 != from_float<{kind}>(-a[i]).bits) b[i] = -1;
    }}
    """
    _, found = run(body, 256, x, np.zeros(x.size, np.int32), int(x.size))
    with np.errstate(over="ignore", invalid="ignore"):
        expected = x.astype(KINDS[kind])
    nan = np.isnan(x)
    np.testing.assert_array_equal(found[~nan], expected[~nan].view(np.uint16))
    np.testing.assert_array_equal(found[nan], 0x7FFF)


@pytest.mark.parametrize("kind", KINDS)
def test_widening_from_16_bits(run: Any, kind: str) -> None:
    body = f"""
    for (int i = threadIdx.x; i < 65536; i += 256) {{
        a[i] = to_float({kind}{{(unsigned short)i}});
        float2 pair = unpack2<{kind}>(i | (65535u - i) << 16);
        if (__float_as_uint(pair.x) != __float_as_uint(a[i])) a[i] = -1.25f;
        b[65535 - i] = pair.y;
    }}
    """
    found = run(body, 256, np.zeros(65536, np.float32), np.zeros(65536, np.float32))
    expected = np.arange(65536, dtype=np.uint16).view(KINDS[kind]).astype(np.float32)
    for values in found:
        np.testing.assert_array_equal(values, expected)


@pytest.mark.parametrize("kind", KINDS)
def test_pairs_multiplied_and_added(run: Any, kind: str) -> None:
    """Rounded once: x y - x y, rounded, is what rounding the product loses."""
    rng = np.random.default_rng(3)
    x, y, z = (rng.standard_normal(128).astype(KINDS[kind]) for _ in "xyz")
    z[:64] = -(x[:64].astype(np.float32) * y[:64].astype(np.float32)).astype(KINDS[kind])
    body = f"for (int i = threadIdx.x; i < 64; i += 32) c[i] = fma2<{kind}>(a[i], b[i], c[i]);"
    *_, found = run(body, 32, *(_register(v[::2], v[1::2]) for v in (x, y, z)))
    expected = (x.astype(np.float64) * y.astype(np.float64) + z.astype(np.float64)).astype(KINDS[kind])
    np.testing.assert_array_equal(found.view(KINDS[kind]), expected)


def test_bits(run: Any) -> None:
    words = np.random.default_rng(2).integers(-(1 << 31), 1 << 31, 64).astype(np.int32)
    body = """
    unsigned x = a[threadIdx.x], y = a[63 - threadIdx.x];
    b[threadIdx.x] = __byte_perm(x, y, 0x7632);
    b[64 + threadIdx.x] = __popc(x) * 1000 + __clz(x);
    b[128 + threadIdx.x] = __umulhi(x, y);
    b[192 + threadIdx.x] = __dp4a((int)x, (int)y, 100);
    b[256 + threadIdx.x] = __float2int_rn(__int2float_rn((int)x % 1000) * 0.5f);
    b[320 + threadIdx.x] = and_or(x, y, x * 3);
    b[384 + threadIdx.x] = and_xor(x, y, x * 3);
    """
    _, found = run(body, 64, words, np.zeros(448, np.int32))
    x = words.view(np.uint32)
    y = x[::-1]
    rows = found.view(np.uint32).reshape(7, 64)
    np.testing.assert_array_equal(rows[0], x >> 16 | y & 0xFFFF0000)
    counts = [bin(v).count("1") * 1000 + 32 - int(v).bit_length() for v in x]
    np.testing.assert_array_equal(rows[1], counts)
    np.testing.assert_array_equal(rows[2], x.astype(np.uint64) * y >> np.uint64(32))
    dots = words.view(np.int8).reshape(64, 4).astype(int) * words[::-1].copy().view(np.int8).reshape(64, 4)
    np.testing.assert_array_equal(found[192:256], 100 + dots.sum(1))
    np.testing.assert_array_equal(found[256:320], np.rint(np.fmod(words, 1000) * 0.5))
    np.testing.assert_array_equal(rows[5], x & y | x * np.uint32(3))
    np.testing.assert_array_equal(rows[6], x & y ^ x * np.uint32(3))
