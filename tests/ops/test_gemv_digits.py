"""One row of x times codes of 4 or 8 bits on integer tensor cores, on CUDA."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import numpy as np
import pytest
from test_gemv import EPS, H200, SMALL, assert_close, codes_problem, dense, normed, on, silu_mul

from kuiperllm.backends.cuda.launch import chip
from kuiperllm.core import Device, DType, Tensor
from kuiperllm.ops.linear import LinearWeight
from kuiperllm.ops.linear.gemv import gemv, run
from kuiperllm.ops.linear.gemv_digits_plan import make_plan
from kuiperllm.ops.linear.gemv_plan import candidates, plan
from kuiperllm.quant import Scheme, q4, q8
from kuiperllm.quant.synthetic import random_tensor

SCHEMES = [make(group) for make in (q4, q8) for group in (32, 64, 128)]


@pytest.mark.parametrize(("chunks", "units"), [(1, 4), (2, 8), (4, 2), (8, 4)])
@pytest.mark.parametrize("scheme", SCHEMES, ids=repr)
def test_every_way_of_a_gated_product(scheme: Scheme, chunks: int, units: int, cuda: Device) -> None:
    """Normalized; the ring goes round several times, blocks have unequal shares."""
    rng = np.random.default_rng(chunks)
    outputs = chip(cuda).multiprocessors * 17 + 3
    k, dtype = 1024 if chunks < 8 else 2048, DType.bfloat16 if chunks % 4 else DType.float16
    matrix = random_tensor(rng, scheme, 2 * outputs, k)
    x = (rng.standard_normal((1, k)) * 3 + 0.5).astype(dtype.numpy)
    norm = rng.uniform(0.5, 1.5, k).astype(np.float32)
    out = Tensor.empty((1, outputs), dtype, cuda)
    problem = codes_problem(scheme, 1, outputs, k, dtype, "NORM", "SWIGLU")
    found = make_plan(chip(cuda), problem, chunks, units, stages=2)
    if found is None:  # records that no copy brings
        groups = units * (256 // scheme.bits) // scheme.group_size
        assert groups not in (2, 4, 8)
        return
    weight = LinearWeight.pack(matrix, device=cuda)
    run(found, problem, on(cuda, x, dtype), weight, out, norm_weight=on(cuda, norm), eps=EPS)
    assert_close(out, silu_mul(normed(x, norm) @ dense(matrix).T), dtype)


@pytest.mark.parametrize("beside", [False, True])
@pytest.mark.parametrize(("scheme", "k"), [(q4(64), 896), (q8(64), 896), (q8(32), 1088), (q4(32), 4864)])
@pytest.mark.parametrize("stages", [2, 3])
def test_sizes_with_few_common_divisors(
    scheme: Scheme, k: int, stages: int, beside: bool, cuda: Device
) -> None:
    rng = np.random.default_rng(stages)
    outputs = chip(cuda).multiprocessors * 18 + 3
    matrix = random_tensor(rng, scheme, outputs, k)
    bias = rng.standard_normal(outputs).astype(np.float32)
    weight = LinearWeight.pack(matrix, bias, device=cuda)
    x = rng.standard_normal((1, k)).astype(DType.bfloat16.numpy)
    before = rng.standard_normal((1, outputs)).astype(DType.bfloat16.numpy)
    out = on(cuda, before, DType.bfloat16)
    problem = codes_problem(scheme, 1, outputs, k, DType.bfloat16, "PLAIN", "ADD")._replace(bias=True)
    units = 4 if scheme == q8(64) else 2
    found = make_plan(chip(cuda), problem, 4, units, stages, beside=beside)
    assert found is not None
    run(replace(found, launch_after=stages - 2), problem, on(cuda, x, DType.bfloat16), weight, out)
    expected = before.astype(np.float64) + x.astype(np.float64) @ dense(matrix).T + bias
    assert_close(out, expected, DType.bfloat16)


def test_numbers_far_apart(cuda: Device) -> None:
    """x is rounded to a millionth of its largest number."""
    rng = np.random.default_rng(0)
    for scheme in (q4(32), q8(64)):
        matrix = random_tensor(rng, scheme, 40, 512)
        weight = LinearWeight.pack(matrix, device=cuda)
        for size in (1e30, 1.0, 1e-20, 0.0):
            x = (rng.standard_normal((1, 512)) * size).astype(DType.bfloat16.numpy)
            x[0, 7] *= 1000
            out = Tensor.empty((1, 40), DType.float32, cuda)
            gemv(on(cuda, x, DType.bfloat16), weight, out)
            expected = x.astype(np.float64) @ dense(matrix).T
            np.testing.assert_allclose(out.numpy(), expected, rtol=1e-5, atol=1e-6 * np.abs(expected).max())


@pytest.mark.parametrize("value", [np.inf, -np.inf, np.nan])
def test_what_is_not_finite_is_not_hidden(value: float, cuda: Device) -> None:
    rng = np.random.default_rng(0)
    weight = LinearWeight.pack(random_tensor(rng, q8(64), 40, 512), device=cuda)
    x = rng.standard_normal((1, 512)).astype(DType.bfloat16.numpy)
    x[0, 99] = value
    out = Tensor.empty((1, 40), DType.float32, cuda)
    gemv(on(cuda, x, DType.bfloat16), weight, out)
    assert not np.isfinite(out.numpy()).any()


@pytest.mark.parametrize(
    ("scheme", "rows", "k"),
    [
        (q4(64), 2, 2048),
        (q4(16), 1, 2048),
        (q8(64), 1, 2080),
        (Scheme(4, 64, DType.float16, "zeros"), 1, 2048),
    ],
)
def test_other_products_have_another_way(scheme: Scheme, rows: int, k: int, cuda: Device) -> None:
    problem = codes_problem(scheme, rows, 512, k, DType.bfloat16, "PLAIN", "STORE")
    assert not list(candidates(chip(cuda), problem, "digits"))


@pytest.mark.parametrize("facts", [H200, SMALL], ids=["228-KiB", "100-KiB"])
@pytest.mark.parametrize("scheme", SCHEMES, ids=repr)
@pytest.mark.parametrize(("d", "f"), [(1024, 3072), (2048, 8192), (4096, 14336), (8192, 28672)])
def test_plans_fit_the_chip(d: int, f: int, scheme: Scheme, facts: dict[str, Any], cuda: Device) -> None:
    made = replace(chip(cuda), **facts)
    whole = made.shared_bytes_per_multiprocessor
    for outputs, k, prologue, epilogue, is_alone in (
        (3 * d // 2, d, "NORM", "STORE", True),
        (d, d, "MERGE", "ADD", True),
        (f, d, "NORM", "SWIGLU", False),
        (d, f, "PLAIN", "ADD", False),
        (128256, d, "NORM", "STORE", True),
    ):
        problem = codes_problem(scheme, 1, outputs, k, DType.bfloat16, prologue, epilogue)
        found = plan(made, problem._replace(head_dim=128))
        assert found is not None
        if found.method == "codes":  # x has no room in registers, or the ring in shared memory
            assert k > 14336 or facts is SMALL
            continue
        assert found.shared + 1024 <= whole
        assert found.grid * found.share + found.extra == outputs
        assert found.extra < found.grid <= outputs
        assert found.stages >= 2
        # Two blocks of one kernel never share a multiprocessor with one of another: three do not fit.
        assert 3 * (found.shared + 1024) > whole
        if is_alone:
            assert 2 * (found.shared + 1024) > whole


@pytest.mark.parametrize("scheme", [q4(64), q8(64)], ids=repr)
@pytest.mark.parametrize(("d", "f", "stages"), [(2048, 8192, (3, 2, 3)), (4096, 14336, (2, 3, 3))])
def test_plans_are_those_that_were_measured(
    d: int, f: int, stages: tuple[int, int, int], scheme: Scheme, cuda: Device
) -> None:
    """Of the gated product and the one behind it in 8 bits, and of both in 4 bits."""
    h200 = replace(chip(cuda), **H200)
    for i, (outputs, k, prologue, epilogue) in enumerate(((f, d, "NORM", "SWIGLU"), (d, f, "PLAIN", "ADD"))):
        found = plan(h200, codes_problem(scheme, 1, outputs, k, DType.bfloat16, prologue, epilogue))
        assert found is not None
        assert (found.method, found.chunks, found.units) == ("digits", 8, scheme.bits)
        assert found.stages == (stages[i] if scheme.bits == 8 else stages[2])
        is_alone = 2 * (found.shared + 1024) > h200.shared_bytes_per_multiprocessor
        assert is_alone == (scheme.bits == 8 and k == 14336)
