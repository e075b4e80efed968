"""What each word of the vector vocabulary must do, checked against NumPy at the level of this process."""

from __future__ import annotations

import ml_dtypes
import numpy as np

from kuiperllm.backends.cpu.jit import Kernel
from kuiperllm.backends.cpu.team import launch
from kuiperllm.core import DType, Tensor

ALL_HALVES = np.arange(1 << 16, dtype=np.uint16)


def on_all(name: str, source: np.ndarray, dtype: DType) -> np.ndarray:
    """Run a kernel of `simd_kernels` that turns 16 elements into 16."""
    padded = np.concatenate([source, np.zeros(-len(source) % 16, source.dtype)])
    as_signed = padded.view(ml_dtypes.bfloat16) if padded.dtype == np.uint16 else padded
    out = Tensor.empty(padded.shape, dtype)
    launch(Kernel("simd_kernels", name), Tensor.from_numpy(as_signed), out, items=len(padded) // 16)
    return out.numpy()[: len(source)]


def equal_or_both_nan(found: np.ndarray, expected: np.ndarray) -> None:
    """Bit for bit, except that one NaN is as good as another."""
    np.testing.assert_array_equal(np.isnan(found), np.isnan(expected))
    numbers = ~np.isnan(expected)
    np.testing.assert_array_equal(found[numbers], expected[numbers])
    np.testing.assert_array_equal(np.signbit(found[numbers]), np.signbit(expected[numbers]))


def between_halves(halves: np.ndarray) -> np.ndarray:
    """The values half way between neighbours, and the float32 just below and above those."""
    ordered = np.unique(halves[np.isfinite(halves)].astype(np.float64))
    middle = ((ordered[1:] + ordered[:-1]) / 2).astype(np.float32)
    around = [middle, np.nextafter(middle, np.float32(-np.inf)), np.nextafter(middle, np.float32(np.inf))]
    extremes = np.array(
        [np.inf, -np.inf, np.nan, 1e-45, 3.4e38, -3.4e38, 65519.99, 65520, 0, -0.0], np.float32
    )
    return np.concatenate([*around, extremes])


def check_half_to_float() -> None:
    equal_or_both_nan(
        on_all("widen_f16", ALL_HALVES, DType.float32), ALL_HALVES.view(np.float16).astype("f4")
    )
    bfloat = ALL_HALVES.view(ml_dtypes.bfloat16)
    equal_or_both_nan(on_all("widen_bf16", ALL_HALVES, DType.float32), bfloat.astype(np.float32))


def check_float_to_half() -> None:
    for kind, name in ((np.dtype(np.float16), "narrow_f16"), (np.dtype(ml_dtypes.bfloat16), "narrow_bf16")):
        halves = ALL_HALVES.view(kind).astype(np.float32)
        for values in (halves, between_halves(halves)):
            with np.errstate(over="ignore", invalid="ignore"):
                expected = values.astype(kind).astype(np.float32)
            found = on_all(name, values, DType.bfloat16).view(np.uint16).view(kind)
            equal_or_both_nan(found.astype(np.float32), expected)


def check_exp() -> None:
    x = np.linspace(-87.2, 88.2, 2_000_003).astype(np.float32)
    found, truth = on_all("exponential", x, DType.float32).astype(np.float64), np.exp(x.astype(np.float64))
    ulp = np.spacing(truth.astype(np.float32)).astype(np.float64)
    assert np.abs((found - truth) / ulp).max() <= 1.5, np.abs((found - truth) / ulp).max()
    special = np.array([0, -0.0, -87.4, -1e30, -np.inf, np.nan], np.float32)
    np.testing.assert_array_equal(on_all("exponential", special, DType.float32), [1, 1, 0, 0, 0, np.nan])
    large = np.array([88.3, 100, np.inf], np.float32)
    np.testing.assert_allclose(
        on_all("exponential", large, DType.float32), np.exp(np.float32(88.3)), rtol=1e-5
    )


def check_masked_memory() -> None:
    source = np.arange(1, 17, dtype=np.float32)
    for count in range(17):
        out = Tensor.full((20,), -1.0)
        launch(Kernel("simd_kernels", "copy_first"), Tensor.from_numpy(source), out, count, items=1)
        np.testing.assert_array_equal(out.numpy()[:count], source[:count])
        np.testing.assert_array_equal(out.numpy()[count:], -1)


def check_comparisons() -> None:
    rng = np.random.default_rng(0)
    x, y = (rng.integers(0, 3, (50, 16)).astype(np.float32) for _ in range(2))
    x[7, 3], y[8, 4], x[9, 5], y[9, 5] = np.nan, np.nan, np.nan, np.nan
    x[10], y[10] = 0, 1
    out = Tensor.empty((50, 4), DType.int64)
    launch(Kernel("simd_kernels", "compare"), Tensor.from_numpy(x), Tensor.from_numpy(y), out, items=50)
    same = x == y
    first = np.where(same.any(1), same.argmax(1), 16)
    expected = np.stack([(x > y).sum(1), (x >= y).sum(1), same.sum(1), first], axis=1)
    np.testing.assert_array_equal(out.numpy(), expected)


def check_rows() -> None:
    rng = np.random.default_rng(1)
    for n in (16, 17, 63, 64, 65, 200):
        x = rng.uniform(0.1, 1e6, n).astype(np.float32)
        x[n // 2] = np.nan
        out, place = Tensor.empty((4,)), Tensor.empty((1,), DType.int64)
        launch(Kernel("simd_kernels", "facts"), Tensor.from_numpy(x), n, out, place, items=1)
        least = np.fmin.reduce(x[:16])
        expected = [np.nanmax(x), least, np.sqrt(x[0]), np.float32(np.log(np.float64(x[0])))]
        found = out.numpy().copy()
        if n > 33:  # min_lanes says nothing about NaN, which is beyond the first 16 here
            np.testing.assert_array_equal(found[1], expected[1])
        np.testing.assert_array_equal(found[[0, 2, 3]], np.array(expected, np.float32)[[0, 2, 3]])
        assert place.item() == np.nanargmax(x)


def check_gather_and_integers() -> None:
    rng = np.random.default_rng(3)
    source, places = rng.standard_normal(50, np.float32), rng.integers(0, 50, 32, np.int32)
    found = Tensor.empty((32,), DType.float32)
    arguments = Tensor.from_numpy(source), Tensor.from_numpy(places), found
    launch(Kernel("simd_kernels", "gathered"), *arguments, items=2)
    np.testing.assert_array_equal(found.numpy(), source[places])
    x, y = rng.integers(-(1 << 31), 1 << 31, (2, 32), np.int64).astype(np.int32)
    product = Tensor.empty((32,), DType.int32)
    launch(Kernel("simd_kernels", "products"), Tensor.from_numpy(x), Tensor.from_numpy(y), product, items=2)
    np.testing.assert_array_equal(product.numpy(), x * y)
    data = rng.integers(0, 256, 64, np.uint8)
    words = Tensor.empty((10,), DType.int64)
    launch(Kernel("simd_kernels", "eights"), Tensor.from_numpy(data), words, items=10)
    expected = [int.from_bytes(data[3 * i : 3 * i + 8].tobytes(), "little", signed=True) for i in range(10)]
    assert words.numpy().tolist() == expected


def check_what_is_stored_through_another_pointer() -> None:
    out = Tensor.from_numpy(np.arange(16, dtype=np.float32))
    launch(Kernel("simd_kernels", "powers"), out, items=10, grain=10)
    np.testing.assert_array_equal(out.numpy(), np.arange(16) * np.float32(1024))


def check_small_integers() -> None:
    rng = np.random.default_rng(4)
    x, y = rng.integers(-(1 << 15), 1 << 15, (2, 3, 16, 2)).astype(np.int16)
    start = rng.integers(-1000, 1000, (3, 16), np.int32)
    expected = start + (x.astype(np.int64) * y).sum(-1)
    sums = Tensor.from_numpy(start.copy())
    pairs = [Tensor.from_numpy(v.view(np.int32)) for v in (x, y)]
    launch(Kernel("simd_kernels", "pairs_summed"), *pairs, sums, items=3)
    np.testing.assert_array_equal(sums.numpy(), expected.astype(np.int32))
    source = rng.integers(-128, 128, (2, 4, 4), np.int32)
    apart = Tensor.zeros((8, 12), DType.int8)
    launch(Kernel("simd_kernels", "quads"), Tensor.from_numpy(source), apart, 12, items=2)
    np.testing.assert_array_equal(apart.numpy()[:, :4], source.reshape(8, 4))
    assert (apart.numpy()[:, 4:] == 0).all()


CHECKS = (
    check_gather_and_integers,
    check_small_integers,
    check_what_is_stored_through_another_pointer,
    check_half_to_float,
    check_float_to_half,
    check_exp,
    check_masked_memory,
    check_comparisons,
    check_rows,
)
