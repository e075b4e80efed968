"""Packed codes in registers of a GPU: what they become, against the codes themselves."""

from __future__ import annotations

from pathlib import Path

import ml_dtypes
import numpy as np
import pytest
from plain_layout import planes

from kuiperllm.backends.cuda.launch import Kernel, launch
from kuiperllm.core import Device, DType, Tensor

SOURCE = """
#include "ops/linear/codes.cuh"

// A thread for each 32 columns of 8 rows of `width` columns.
extern "C" __global__ void __launch_bounds__(32)
pairs(const unsigned* data, int width, unsigned* raw, unsigned* centred, float* single) {
    launch_next();
    wait_for_previous();
    const int index = blockIdx.x * 32 + threadIdx.x;
    if (index >= 8 * width / 32) return;
    unsigned words[BITS];
    const unsigned* plane = data;
    int word = 0;
#pragma unroll
    for (int bits = BITS == 8 ? 8 : 4; bits; bits /= 2) {
        if (!(BITS & bits)) continue;
#pragma unroll
        for (int i = 0; i < bits; i++) words[word++] = plane[index * bits + i];
        plane += 8 * width / 32 * bits;
    }
#pragma unroll
    for (int pair = 0; pair < 16; pair++) {
        if constexpr (BITS < 8 || CODING == E4M3 || Raw<V>::BITS_BELOW > 7)
            raw[index * 16 + pair] = raw_pair<V, BITS, CODING>(words, pair);
        centred[index * 16 + pair] = centred_pair<V, BITS, CODING>(words, pair);
    }
    for (int i = 0; i < 32; i++) {
        const int column = index * 32 + i;
        const unsigned char* bytes = (const unsigned char*)data;
        single[column] = centred_code<BITS, CODING>(bytes, 8, width, column / width, column % width);
    }
}

// How far each pair of raw lanes is from the codes: raw = bias + unit * code.
extern "C" __global__ void __launch_bounds__(32) describe(float* bias, float* unit) {
    launch_next();
    wait_for_previous();
    *bias = raw_bias<V>(CODING);
#pragma unroll
    for (int pair = 0; pair < 16; pair++) unit[pair] = raw_unit<V>(BITS, CODING, pair);
}

extern "C" __global__ void __launch_bounds__(32)
groups(const SCALE* records, const f16* super_records, float* out, int per_super) {
    launch_next();
    wait_for_previous();
    const int index = threadIdx.x;
    const Group group = load_group<BITS, CODING>(records, index, super_records, index / per_super);
    out[2 * index] = group.factor, out[2 * index + 1] = group.offset;
}
"""

WIDTH, ROWS = 96, 8
SCHEMES = [
    *((bits, coding) for bits in (2, 3, 4, 5, 6, 8) for coding in ("MIDDLE", "ZEROS", "MINIMUM")),
    (8, "E4M3"),
]


@pytest.mark.parametrize("dtype", [DType.bfloat16, DType.float16], ids=str)
@pytest.mark.parametrize(("bits", "coding"), SCHEMES)
def test_codes_become_numbers(bits: int, coding: str, dtype: DType, cuda: Device, tmp_path: Path) -> None:
    source = tmp_path / "codes.cu"
    source.write_text(SOURCE)
    rng = np.random.default_rng(bits)
    codes = rng.integers(0, 1 << bits, (ROWS, WIDTH)).astype(np.uint8)
    codes.reshape(-1)[: 1 << bits] = np.arange(1 << bits)
    if coding == "E4M3":
        codes[codes & 0x7F == 0x7F] = 0x7E  # NaN
    data = Tensor.from_numpy(planes(codes, bits, signed=coding == "MIDDLE")).to(cuda)
    raw, centred = (Tensor.zeros((ROWS, WIDTH), dtype, cuda) for _ in range(2))
    single = Tensor.zeros((ROWS, WIDTH), DType.float32, cuda)
    bias, unit = Tensor.zeros((1,), DType.float32, cuda), Tensor.zeros((16,), DType.float32, cuda)
    parameters = {"BITS": bits, "CODING": coding, "V": dtype, "SCALE": DType.float16}
    launch(Kernel(source, "pairs", **parameters), 1, 32, data, WIDTH, raw, centred, single)
    launch(Kernel(source, "describe", **parameters), 1, 32, bias, unit)
    if coding == "E4M3":
        numbers = expected = codes.view(ml_dtypes.float8_e4m3fn).astype(np.float32)
    else:
        numbers, expected = codes.astype(np.float32), codes.astype(np.float32) - (1 << (bits - 1))
    np.testing.assert_array_equal(centred.numpy().astype(np.float32), expected)
    np.testing.assert_array_equal(single.numpy(), expected)
    if bits < 8 or coding == "E4M3" or dtype is DType.float16:
        of_column = np.tile(np.repeat(unit.numpy(), 2), WIDTH // 32)
        np.testing.assert_array_equal(raw.numpy().astype(np.float32), bias.numpy() + of_column * numbers)


@pytest.mark.parametrize(
    ("coding", "scale"),
    [
        *((coding, DType.float16) for coding in ("MIDDLE", "ZEROS", "MINIMUM")),
        *((coding, DType.float32) for coding in ("MIDDLE", "ZEROS", "MINIMUM", "E4M3")),
        *((coding, DType.int8) for coding in ("MIDDLE", "MINIMUM")),
    ],
)
def test_records_of_groups(coding: str, scale: DType, cuda: Device, tmp_path: Path) -> None:
    source = tmp_path / "codes.cu"
    source.write_text(SOURCE)
    rng, each = np.random.default_rng(0), 2 if coding in ("ZEROS", "MINIMUM") else 1
    bits = 8 if coding == "E4M3" else 5
    records = (rng.integers(1, 60, (32, each))).astype(scale.numpy)
    supers = rng.uniform(0.5, 2, (4, each)).astype(np.float16)
    out = Tensor.zeros((32, 2), DType.float32, cuda)
    kernel = Kernel(source, "groups", BITS=bits, CODING=coding, SCALE=scale, V=DType.float16)
    launch(kernel, 1, 32, Tensor.from_numpy(records).to(cuda), Tensor.from_numpy(supers).to(cuda), out, 8)
    factors = records.astype(np.float32)
    if scale is DType.int8:
        factors = factors * np.repeat(supers.astype(np.float32), 8, axis=0)
    s, z = factors[:, 0], factors[:, -1]
    offset = {"ZEROS": s * (16 - z), "MINIMUM": s * 16 - z}.get(coding, 0 * s)
    np.testing.assert_allclose(out.numpy(), np.stack([s, offset], 1), rtol=1e-6)
