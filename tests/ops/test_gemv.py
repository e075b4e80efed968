"""Products with few rows on CUDA: every way to cut them up, merged attention, kernels for odd shapes."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import numpy as np
import pytest
from numpy.typing import NDArray

from kuiperllm.backends.cuda.launch import chip
from kuiperllm.core import Device, DType, Tensor
from kuiperllm.ops.cases import ROUNDING
from kuiperllm.ops.linear import LinearWeight, WeightFormat, gemv_codes_plan
from kuiperllm.ops.linear.gemv import gemv, gemv_merge, run, suits_gemv
from kuiperllm.ops.linear.gemv_plan import candidates, make_plan, plan
from kuiperllm.ops.linear.gemv_problem import MAX_GEMV_ROWS, Problem
from kuiperllm.quant import QuantTensor, Scheme, q4, q8
from kuiperllm.quant.scheme import Coding
from kuiperllm.quant.synthetic import random_tensor

EPS = 1e-5
FLOAT_TYPES = (DType.float32, DType.float16, DType.bfloat16)
H200 = {"multiprocessors": 132, "max_shared_bytes": 232_448, "shared_bytes_per_multiprocessor": 233_472}


def make_rows(rng: np.random.Generator, n: int, k: int, format: str | Scheme) -> Any:
    if isinstance(format, Scheme):
        return random_tensor(rng, format, n, k)
    return (rng.standard_normal((n, k), np.float32) / np.float32(np.sqrt(k))).astype(DType(format).numpy)


def dense(rows: Any) -> NDArray[np.float64]:
    return (rows.dequantize() if isinstance(rows, QuantTensor) else rows).astype(np.float64)


def on(device: Device, array: NDArray[Any], dtype: DType = DType.float32) -> Tensor:
    return Tensor.from_numpy(np.ascontiguousarray(array.astype(dtype.numpy)), copy=True).to(device)


def assert_close(found: Tensor, expected: NDArray[Any], dtype: DType) -> None:
    rtol = 1e-5 if dtype is DType.float32 else ROUNDING[dtype]
    size = float(np.sqrt(np.mean(np.square(expected))))
    np.testing.assert_allclose(found.numpy().astype(np.float64), expected, rtol=rtol, atol=3 * rtol * size)


def normed(x: NDArray[Any], weight: NDArray[Any]) -> NDArray[np.float64]:
    wide = x.astype(np.float64)
    return wide / np.sqrt(np.mean(wide * wide, -1, keepdims=True) + EPS) * weight


def silu_mul(y: NDArray[np.float64]) -> NDArray[np.float64]:
    gate, up = np.split(y, 2, axis=-1)
    return gate / (1 + np.exp(-gate)) * up


WAYS = [
    ("vector", "float32", DType.float32, 1, 460),
    ("vector", "float32", DType.float32, 5, 460),
    ("vector", "bfloat16", DType.bfloat16, 1, 912),
    ("vector", "float16", DType.float16, 2, 520),
    ("vector", "bfloat16", DType.float32, 3, 520),
    ("tensor", "bfloat16", DType.bfloat16, 1, 912),
    ("tensor", "bfloat16", DType.bfloat16, 8, 520),
    ("tensor", "float16", DType.float16, 5, 584),
]


@pytest.mark.parametrize("chunks", [1, 4])
@pytest.mark.parametrize(("method", "format", "dtype", "rows", "k"), WAYS)
def test_every_way_of_cutting_up(
    method: Any, format: str, dtype: DType, rows: int, k: int, chunks: int, cuda: Device
) -> None:
    """The ring goes round several times, and blocks have unequal shares."""
    rng = np.random.default_rng(chunks)
    outputs = chip(cuda).multiprocessors * (35 if chunks == 1 else 11) + 3
    matrix = make_rows(rng, outputs, k, format)
    bias = rng.standard_normal(outputs).astype(np.float32)
    weight = LinearWeight.pack(matrix, bias, device=cuda)
    x = rng.standard_normal((rows, k)).astype(dtype.numpy)
    before = rng.standard_normal((rows, outputs)).astype(dtype.numpy)
    out = on(cuda, before, dtype)
    problem = Problem(rows, outputs, k, weight.format, dtype, dtype, True, "PLAIN", "ADD")
    found = make_plan(chip(cuda), problem, method, chunks, stages=2)
    if found is None:
        assert method == "tensor"
        assert k < chunks * 128
        return
    run(found, problem, on(cuda, x, dtype), weight, out)
    assert_close(out, before.astype(np.float64) + x.astype(np.float64) @ dense(matrix).T + bias, dtype)


@pytest.mark.parametrize("chunks", [2, 8])
@pytest.mark.parametrize(("method", "format", "dtype", "rows", "k"), WAYS)
def test_every_way_of_a_gated_product(
    method: Any, format: str, dtype: DType, rows: int, k: int, chunks: int, cuda: Device
) -> None:
    rng = np.random.default_rng(chunks)
    outputs = chip(cuda).multiprocessors * 9 + 3
    matrix = make_rows(rng, 2 * outputs, k, format)
    weight = LinearWeight.pack(matrix, device=cuda)
    x = rng.standard_normal((rows, k)).astype(dtype.numpy)
    norm = rng.uniform(0.5, 1.5, k).astype(np.float32)
    out = Tensor.empty((rows, outputs), dtype, cuda)
    problem = Problem(rows, outputs, k, weight.format, dtype, dtype, False, "NORM", "SWIGLU")
    found = make_plan(chip(cuda), problem, method, chunks, stages=3)
    if found is None:
        assert method == "tensor"
        assert k < chunks * 128
        return
    run(found, problem, on(cuda, x, dtype), weight, out, norm_weight=on(cuda, norm), eps=EPS)
    assert_close(out, silu_mul(normed(x, norm) @ dense(matrix).T), dtype)


CODINGS: tuple[Coding, ...] = ("middle", "zeros", "minimum")
K_QUANT_GROUPS = {2: 16, 3: 16, 4: 32, 5: 32, 6: 16}
SCHEMES = [
    *(Scheme(bits, 32, DType.float16, coding) for bits in (2, 3, 4, 5, 6, 8) for coding in CODINGS),
    *(Scheme(4, group) for group in (16, 64, 128, 256)),
    *(Scheme(8, group, DType.float32) for group in (16, 64, 128, 256)),
    *(Scheme(bits, K_QUANT_GROUPS[bits], DType.int8, "minimum") for bits in (2, 4, 5)),
    *(Scheme(bits, K_QUANT_GROUPS[bits], DType.int8) for bits in (3, 6)),
    *(Scheme(4, group, DType.float16, "zeros") for group in (64, 128)),
    *(Scheme(8, group, DType.float32, "e4m3") for group in (32, 128)),
]


def codes_problem(
    scheme: Scheme, rows: int, outputs: int, k: int, dtype: DType, prologue: str, epilogue: str
) -> Problem:
    return Problem(rows, outputs, k, scheme, dtype, dtype, False, prologue, epilogue)


@pytest.mark.parametrize(("chunks", "units", "rows"), [(8, 2, 1), (2, 1, 8), (4, 4, 3)])
@pytest.mark.parametrize("scheme", SCHEMES, ids=repr)
def test_codes_of_every_scheme(scheme: Scheme, rows: int, chunks: int, units: int, cuda: Device) -> None:
    """Gated, normalized; the ring goes round several times, blocks have unequal shares."""
    rng = np.random.default_rng(rows)
    unit, units = 64 if scheme.bits == 8 else 128, min(units, gemv_codes_plan.max_units(scheme))
    k = max(1024, chunks * units * unit) + (256 if rows == 3 else 0)
    outputs = chip(cuda).multiprocessors * 17 + 3
    dtype = DType.float16 if rows == 3 else DType.bfloat16
    matrix = random_tensor(rng, scheme, 2 * outputs, k)
    weight = LinearWeight.pack(matrix, device=cuda)
    x = (rng.standard_normal((rows, k)) * 3 + 0.5).astype(dtype.numpy)
    norm = rng.uniform(0.5, 1.5, k).astype(np.float32)
    out = Tensor.empty((rows, outputs), dtype, cuda)
    problem = codes_problem(scheme, rows, outputs, k, dtype, "NORM", "SWIGLU")
    found = gemv_codes_plan.make_plan(chip(cuda), problem, chunks, units, stages=2)
    assert found is not None
    run(found, problem, on(cuda, x, dtype), weight, out, norm_weight=on(cuda, norm), eps=EPS)
    assert_close(out, silu_mul(normed(x, norm) @ dense(matrix).T), dtype)


@pytest.mark.parametrize("stages", [2, 3])
@pytest.mark.parametrize(("chunks", "units"), [(1, 1), (2, 4), (4, 2), (8, 1)])
@pytest.mark.parametrize(
    ("scheme", "rows", "k"),
    [
        (q4(32), 1, 1120),  # rows that end within a unit
        (q4(32), 7, 1312),
        (q8(32), 2, 1056),
        (q8(16), 8, 1072),
        (Scheme(6, 32), 3, 1056),
        (Scheme(3, 32, DType.float32, "minimum"), 4, 1056),
        (Scheme(5, 32, DType.float16, "zeros"), 1, 1056),
        (Scheme(4, 16, DType.int8, "minimum"), 5, 1280),
    ],
)
def test_every_way_of_cutting_codes_up(
    scheme: Scheme, rows: int, k: int, chunks: int, units: int, stages: int, cuda: Device
) -> None:
    rng = np.random.default_rng(stages)
    outputs = chip(cuda).multiprocessors * (37 if chunks == 1 else 18) + 3
    matrix = random_tensor(rng, scheme, outputs, k)
    bias = rng.standard_normal(outputs).astype(np.float32)
    weight = LinearWeight.pack(matrix, bias, device=cuda)
    x = rng.standard_normal((rows, k)).astype(DType.bfloat16.numpy)
    before = rng.standard_normal((rows, outputs)).astype(DType.bfloat16.numpy)
    out = on(cuda, before, DType.bfloat16)
    problem = codes_problem(scheme, rows, outputs, k, DType.bfloat16, "PLAIN", "ADD")._replace(bias=True)
    found = gemv_codes_plan.make_plan(chip(cuda), problem, chunks, units, stages)
    if found is None:
        is_too_wide = chunks * units * (64 if scheme.bits == 8 else 128) > k
        assert stages == 3 or is_too_wide or units == max(gemv_codes_plan.UNITS)
        return
    run(replace(found, launch_after=stages - 2), problem, on(cuda, x, DType.bfloat16), weight, out)
    expected = before.astype(np.float64) + x.astype(np.float64) @ dense(matrix).T + bias
    assert_close(out, expected, DType.bfloat16)


def test_codes_times_numbers_far_apart(cuda: Device) -> None:
    """Numbers beyond the range of float16, large and small."""
    rng = np.random.default_rng(0)
    for scheme in (
        q4(32),
        q8(64),
        Scheme(4, 32, DType.int8, "minimum"),
        Scheme(8, 128, DType.float32, "e4m3"),
    ):
        matrix = random_tensor(rng, scheme, 40, 512)
        weight = LinearWeight.pack(matrix, device=cuda)
        for size in (1e9, 1e-9, 0.0):
            x = (rng.standard_normal((2, 512)) * size).astype(DType.bfloat16.numpy)
            x[0, 7] *= 1000
            out = Tensor.empty((2, 40), DType.float32, cuda)
            gemv(on(cuda, x, DType.bfloat16), weight, out)
            expected = x.astype(np.float64) @ dense(matrix).T
            np.testing.assert_allclose(out.numpy(), expected, rtol=1e-3, atol=1e-4 * np.abs(expected).max())


@pytest.mark.parametrize("dtype", [DType.float32, DType.bfloat16], ids=str)
@pytest.mark.parametrize("scheme", SCHEMES[::4], ids=repr)
def test_codes_for_odd_alignment(scheme: Scheme, dtype: DType, cuda: Device) -> None:
    rng = np.random.default_rng(0)
    k = 256
    wide = rng.standard_normal((2, k + 11)).astype(dtype.numpy)
    matrix = random_tensor(rng, scheme, 33, k)
    norm = rng.uniform(0.5, 1.5, k).astype(np.float32)
    out = Tensor.empty((2, 33), dtype, cuda)
    x = wide[:, 3 : k + 3]
    gemv(
        on(cuda, wide, dtype)[:, 3 : k + 3], LinearWeight.pack(matrix, device=cuda), out,
        norm_weight=on(cuda, norm), eps=EPS,
    )  # fmt: skip
    assert_close(out, normed(x, norm) @ dense(matrix).T, dtype)


@pytest.mark.parametrize("normalize", [False, True])
def test_columns_in_another_order(normalize: bool, cuda: Device) -> None:
    rng = np.random.default_rng(0)
    matrix = random_tensor(rng, Scheme(4, 128, DType.float16, "zeros"), 40, 384, shuffled=True)
    x = rng.standard_normal((3, 384)).astype(DType.bfloat16.numpy)
    norm = rng.uniform(0.5, 1.5, 384).astype(np.float32)
    out = Tensor.empty((3, 40), DType.bfloat16, cuda)
    gemv(
        on(cuda, x, DType.bfloat16), LinearWeight.pack(matrix, device=cuda), out,
        norm_weight=on(cuda, norm) if normalize else None, eps=EPS,
    )  # fmt: skip
    wide = normed(x, norm) if normalize else x.astype(np.float64)
    assert_close(out, wide @ dense(matrix).T, DType.bfloat16)


def merged(partial: NDArray[Any], stats: NDArray[Any]) -> NDArray[np.float64]:
    """Softmax-weighted mean of the splits that hold anything."""
    rows, splits, heads, _ = stats.shape
    wide = partial.astype(np.float64).reshape(rows, splits, heads, -1)
    weight = np.exp2(stats[..., 0].astype(np.float64) - stats[..., 0].max(1, keepdims=True)) * stats[..., 1]
    wide = np.where(weight[..., None] > 0, wide, 0)
    return ((wide * weight[..., None]).sum(1) / weight.sum(1)[..., None]).reshape(rows, -1)


@pytest.mark.parametrize("dtype", FLOAT_TYPES, ids=str)
@pytest.mark.parametrize(
    ("rows", "splits", "heads", "head_dim", "scheme"),
    [
        (1, 1, 4, 64, None),
        (1, 4, 8, 64, None),
        (1, 8, 3, 128, None),
        (2, 3, 5, 80, None),
        (8, 4, 4, 64, None),
        (5, 2, 6, 64, q8(64)),
        (1, 2, 2, 96, q8(32)),
        (1, 4, 8, 64, q4(64)),
        (6, 2, 8, 64, q4(32)),
        (2, 3, 8, 60, q4(16)),
        (3, 3, 3, 20, None),
    ],
)
def test_merged_attention(
    rows: int, splits: int, heads: int, head_dim: int, scheme: Scheme | None, dtype: DType, cuda: Device
) -> None:
    rng = np.random.default_rng(splits)
    width, hidden = heads * head_dim, 45
    partial = rng.standard_normal((rows, splits, width)).astype(dtype.numpy)
    stats = np.stack(
        [rng.uniform(-20, 20, (rows, splits, heads)), rng.uniform(1, 9, (rows, splits, heads))], -1
    ).astype(np.float32)
    if splits > 1:  # an empty split: of one row, and only for some
        stats[0, splits - 1] = (-1e30, 0)
        partial[0, splits - 1] = np.nan
    matrix = make_rows(rng, hidden, width, scheme or dtype.value)
    weight = LinearWeight.pack(matrix, device=cuda)
    before = rng.standard_normal((rows, hidden)).astype(dtype.numpy)
    residual = on(cuda, before, dtype)
    gemv_merge(on(cuda, partial, dtype), on(cuda, stats), weight, residual)
    expected = before.astype(np.float64) + merged(partial, stats) @ dense(matrix).T
    assert_close(residual, expected, dtype)


@pytest.mark.parametrize("rows", [1, 3])
@pytest.mark.parametrize("format", ["bfloat16", q8(32), q4(32)], ids=str)
def test_float32_results_are_not_rounded(rows: int, format: str | Scheme, cuda: Device) -> None:
    rng = np.random.default_rng(0)
    matrix = make_rows(rng, 70, 256, format)
    x = np.sign(rng.standard_normal((rows, 256))).astype(DType.bfloat16.numpy)
    out = Tensor.empty((rows, 70), DType.float32, cuda)
    gemv(on(cuda, x, DType.bfloat16), LinearWeight.pack(matrix, device=cuda), out)
    assert_close(out, x.astype(np.float64) @ dense(matrix).T, DType.float32)


def test_float16_squares_and_products_beyond_its_range(cuda: Device) -> None:
    """What is normalized has no reason to be small."""
    rng = np.random.default_rng(0)
    x = (rng.standard_normal((4, 256)) * 9000).astype(np.float16)
    norm = np.full(256, 30, np.float32)
    matrix = make_rows(rng, 40, 256, "float16")
    for rows in (1, 4):
        out = Tensor.empty((rows, 40), DType.float16, cuda)
        gemv(
            on(cuda, x[:rows], DType.float16), LinearWeight.pack(matrix, device=cuda), out,
            norm_weight=on(cuda, norm), eps=EPS,
        )  # fmt: skip
        assert_close(out, normed(x[:rows], norm) @ dense(matrix).T, DType.float16)


@pytest.mark.parametrize("normalize", [False, True])
def test_unaligned_rows(normalize: bool, cuda: Device) -> None:
    rng = np.random.default_rng(0)
    wide = rng.standard_normal((3, 70)).astype(DType.bfloat16.numpy)
    matrix = make_rows(rng, 33, 64, "bfloat16")
    norm = rng.uniform(0.5, 1.5, 64).astype(np.float32)
    out = Tensor.empty((3, 33), DType.bfloat16, cuda)
    gemv(
        on(cuda, wide, DType.bfloat16)[:, 3:67], LinearWeight.pack(matrix, device=cuda), out,
        norm_weight=on(cuda, norm) if normalize else None, eps=EPS,
    )  # fmt: skip
    x = wide[:, 3:67]
    expected = (normed(x, norm) if normalize else x.astype(np.float64)) @ dense(matrix).T
    assert_close(out, expected, DType.bfloat16)


def test_rows_that_do_not_fit_together(cuda: Device) -> None:
    rng = np.random.default_rng(0)
    matrix = make_rows(rng, 12, 8192, "float32")
    x = rng.standard_normal((8, 8192), np.float32)
    problem = Problem(8, 12, 8192, DType.float32, DType.float32, DType.float32, False, "PLAIN", "STORE")
    assert plan(chip(cuda), problem) is None
    out = Tensor.empty((8, 12), DType.float32, cuda)
    gemv(on(cuda, x), LinearWeight.pack(matrix, device=cuda), out)
    assert_close(out, x.astype(np.float64) @ dense(matrix).T, DType.float32)


# --- plans ------------------------------------------------------------------------------------------------

BF16 = (DType.bfloat16, DType.bfloat16, DType.bfloat16, False)


@pytest.mark.parametrize(
    ("outputs", "k", "prologue", "epilogue", "chunks", "slots"),
    [
        (3072, 2048, "NORM", "STORE", 2, 4),  # part of what there is to fetch
        (2048, 2048, "MERGE", "ADD", 2, 4),
        (1152, 896, "NORM", "STORE", 2, 4),
        (4864, 896, "NORM", "SWIGLU", 1, 6),
        (896, 4864, "PLAIN", "ADD", 4, 4),
        (4096, 1024, "NORM", "STORE", 1, 4),
        (1024, 2048, "MERGE", "ADD", 2, 4),
        (1024, 3072, "PLAIN", "ADD", 4, 4),
        (8192, 2048, "NORM", "SWIGLU", 2, 10),
        (2048, 8192, "PLAIN", "ADD", 8, 10),
        (6144, 4096, "NORM", "STORE", 4, 10),
        (14336, 4096, "NORM", "SWIGLU", 4, 10),
        (4096, 14336, "PLAIN", "ADD", 8, 6),
        (128256, 4096, "NORM", "STORE", 4, 10),
    ],
)
def test_plans_are_those_that_were_measured(
    outputs: int, k: int, prologue: str, epilogue: str, chunks: int, slots: int, cuda: Device
) -> None:
    h200 = replace(chip(cuda), **H200)
    found = plan(h200, Problem(1, outputs, k, *BF16, prologue, epilogue, 1, 64))
    assert found is not None
    assert (found.method, found.chunks, 2 * found.stages, found.grid) == ("vector", chunks, slots, 132)


SMALL = {"multiprocessors": 82, "max_shared_bytes": 101_376, "shared_bytes_per_multiprocessor": 102_400}


@pytest.mark.parametrize(
    ("format", "most"),
    [(DType.bfloat16, 4), (DType.float16, 4), (DType.float32, 8), (q8(64), 8), (q4(32), 8)],
)
def test_how_many_rows_are_few(format: WeightFormat, most: int, cuda: Device) -> None:
    weight = LinearWeight.empty(format, 16, 64, device=cuda)
    assert [rows for rows in range(1, 20) if suits_gemv(rows, weight)] == list(range(1, most + 1))


@pytest.mark.parametrize("facts", [H200, SMALL], ids=["228-KiB", "100-KiB"])
@pytest.mark.parametrize("rows", [1, 2, MAX_GEMV_ROWS])
@pytest.mark.parametrize(
    "k", [896, 1024, 1536, 2048, 3072, 3584, 4096, 5120, 8192, 8960, 14336, 18944, 28672]
)
def test_plans_fit_the_chip(k: int, rows: int, facts: dict[str, int], cuda: Device) -> None:
    made = replace(chip(cuda), **facts)
    for outputs, epilogue in ((896, "ADD"), (151936, "STORE"), (9, "SWIGLU")):
        problem = Problem(rows, outputs, k, *BF16, "PLAIN", epilogue)
        found = plan(made, problem)
        assert found is not None
        assert found.shared + 1024 <= made.shared_bytes_per_multiprocessor
        assert found.shared + 1024 > made.shared_bytes_per_multiprocessor // 2  # alone on a multiprocessor
        assert found.grid * found.share + found.extra == outputs
        assert found.grid <= outputs
        assert found.extra < found.grid
        assert all(other.stages >= 2 for _, other in candidates(made, problem, found.method))


@pytest.mark.parametrize("facts", [H200, SMALL], ids=["228-KiB", "100-KiB"])
@pytest.mark.parametrize("k", [1024, 2048, 4096, 5120, 8192, 14336, 18944, 28672])
@pytest.mark.parametrize("scheme", [q4(32), q4(64), q8(32), SCHEMES[-4], SCHEMES[-8]], ids=repr)
def test_plans_of_codes_fit_the_chip(scheme: Scheme, k: int, facts: dict[str, int], cuda: Device) -> None:
    made = replace(chip(cuda), **facts)
    for rows, outputs, prologue, epilogue in (
        (1, 896, "PLAIN", "ADD"),
        (1, 151936, "NORM", "STORE"),
        (2, 9, "PLAIN", "SWIGLU"),
        (MAX_GEMV_ROWS, 4096, "PLAIN", "STORE"),
    ):
        problem = codes_problem(scheme, rows, outputs, k, DType.bfloat16, prologue, epilogue)
        ways = candidates(made, problem, "codes")
        _, found = min(ways, key=lambda way: way[0], default=(0.0, None))
        if found is None:  # each row of x needs room
            assert rows * k >= 32768 or (k > 8192 and prologue == "NORM")
            continue
        assert found.shared + 1024 <= made.shared_bytes_per_multiprocessor
        assert found.shared + 1024 > made.shared_bytes_per_multiprocessor // 2  # alone on a multiprocessor
        assert found.grid * found.share + found.extra == outputs
        assert found.extra < found.grid <= outputs
        for _, other in candidates(made, problem, "codes"):
            assert other.stages >= 2
            beside = gemv_codes_plan.make_plan(made, problem, other.chunks, other.units, beside=True)
            assert beside is not None
            two = 2 * (beside.shared + 1024) <= made.shared_bytes_per_multiprocessor
            assert two or 2 * beside.shared > made.shared_bytes_per_multiprocessor - 2048
