"""Matrix products on CUDA: every kernel, tiling and epilogue against NumPy, and the choice of a tiling."""

from __future__ import annotations

from collections.abc import Callable
from functools import cache
from typing import Any

import numpy as np
import pytest
from packed_weights import packed

from kuiperllm.backends.cuda.launch import chip, compile_all
from kuiperllm.core import Device, DType, Tensor
from kuiperllm.errors import KernelError
from kuiperllm.ops.linear import LinearWeight, codes_tiling, expand, gemm_codes, gemm_hopper
from kuiperllm.ops.linear.expand import expanded, gemm_expanded
from kuiperllm.ops.linear.gemm import MMA_TILES, SIMT_TILES, gemm, gemm_16_bits, gemm_mma, gemm_simt
from kuiperllm.ops.linear.gemm_tiling import (
    ACCUMULATE,
    PLAIN,
    ROWS,
    SWIGLU,
    Tiling,
    all_tilings,
    candidates,
    choose,
    measured,
    table,
)
from kuiperllm.quant import QuantTensor, Scheme
from kuiperllm.quant.synthetic import random_tensor

BF16, F16, F32, I8 = DType.bfloat16, DType.float16, DType.float32, DType.int8
TOLERANCE = {F32: 2e-5, F16: 5e-3, BF16: 3e-2}
"""Of results in this type, relative to the root mean square of all."""

Rows = np.ndarray[Any, Any] | QuantTensor


class Product:
    """A product with its operands on the device, x and out inside of wider matrices, and its truth."""

    def __init__(
        self,
        device: Device,
        m: int,
        n: int,
        k: int,
        dtype: DType,
        *,
        format: str | Scheme = "",
        shuffled: bool = False,
        bias: bool = False,
        epilogue: int = PLAIN,
        out_dtype: DType | None = None,
        margin: int = 0,
    ) -> None:
        rng = np.random.default_rng(m * 7 + n * 3 + k)
        self.epilogue, self.width = epilogue, n // 2 if epilogue == SWIGLU else n
        self.dtype = out_dtype or dtype
        rows: Rows
        if isinstance(format, Scheme):
            rows = random_tensor(rng, format, n, k, shuffled=shuffled)
        else:
            w = rng.standard_normal((n, k), np.float32) / np.float32(np.sqrt(k))
            rows = w.astype(DType(format or dtype).numpy)
        added = rng.standard_normal(n, np.float32) if bias else None
        x = rng.standard_normal((m, k + margin), np.float32).astype(dtype.numpy)
        self.before = rng.standard_normal((m, self.width + margin), np.float32).astype(self.dtype.numpy)
        if isinstance(rows, QuantTensor):
            self.weight = packed(rows, added, device)
        else:
            self.weight = LinearWeight.pack(rows, added, device=device)
        self.x = Tensor.from_numpy(x).to(device)[:, :k]
        self.device = device
        self.exact = rows.dequantize() if isinstance(rows, QuantTensor) else rows.astype(np.float32)
        self.terms = x[:, :k].astype(np.float32), added
        self._expected: dict[DType | None, np.ndarray[Any, Any]] = {}

    @property
    def is_direct(self) -> bool:
        return self.dtype is not self.x.dtype

    def fits(self, tiling: Tiling) -> bool:
        m, k = self.x.shape
        multiprocessors = chip(self.device).multiprocessors
        return tiling.fits(m, self.weight.out_features, k, self.epilogue, self.is_direct, multiprocessors)

    def expected(self, rounding: DType | None = None) -> np.ndarray[Any, Any]:
        if rounding not in self._expected:
            self._expected[rounding] = self._compute(rounding)
        return self._expected[rounding]

    def _compute(self, rounding: DType | None) -> np.ndarray[Any, Any]:
        x, bias = self.terms
        w = self.exact if rounding is None else self.exact.astype(rounding.numpy).astype(np.float32)
        product = x @ w.T
        if bias is not None:
            product += bias
        if self.epilogue == ACCUMULATE:
            product += self.before[:, : self.width].astype(np.float32)
        if self.epilogue == SWIGLU:
            gate, up = product[:, : self.width], product[:, self.width :]
            return gate / (1 + np.exp(-gate)) * up
        return product

    def run(self, call: Callable[[Tensor, LinearWeight, Tensor], None]) -> np.ndarray[Any, Any]:
        """What the call leaves in `out`; poisoned where nothing has to be added to."""
        before = self.before.copy()
        if self.epilogue != ACCUMULATE:
            before[:, : self.width] = np.nan
        whole = Tensor.from_numpy(before).to(self.device)
        call(self.x, self.weight, whole[:, : self.width])
        found = whole.numpy()
        np.testing.assert_array_equal(found[:, self.width :], before[:, self.width :])
        return found[:, : self.width].astype(np.float32)

    def check(
        self, call: Callable[[Tensor, LinearWeight, Tensor], None], rounding: DType | None = None
    ) -> np.ndarray[Any, Any]:
        found, expected = self.run(call), self.expected(rounding)
        scale = float(np.sqrt(np.mean(np.square(expected))))
        tolerance = TOLERANCE[self.dtype]
        if self.dtype is F32 and self.x.dtype is not F32:
            tolerance = 2e-4  # tensor cores do not round sums to nearest
            if self.weight.scheme is not None:
                tolerance = TOLERANCE[self.x.dtype]  # scales and weights are rounded to x's type
        np.testing.assert_allclose(found, expected, rtol=tolerance, atol=tolerance * max(scale, 1.0))
        error = float(np.sqrt(np.mean(np.square(found - expected)))) / scale
        assert error < tolerance / 4, f"relative error {error}"
        return found


# --- mma.sync ---------------------------------------------------------------------------------------------

EPILOGUES = {"plain": PLAIN, "accumulate": ACCUMULATE, "swiglu": SWIGLU}


@pytest.mark.parametrize("tile", MMA_TILES, ids=lambda tile: f"{tile.m}x{tile.n}")
@pytest.mark.parametrize("epilogue", EPILOGUES)
def test_mma(tile: Any, epilogue: str, cuda: Device) -> None:
    kind = EPILOGUES[epilogue]
    odd = Product(cuda, tile.m + 3, tile.n + 22, 328, BF16, bias=True, epilogue=kind, margin=8)
    odd.check(lambda x, w, out: gemm_mma(x, w, out, kind, tile))
    small = Product(cuda, 9, 26, 40, F16, epilogue=kind, out_dtype=F32)
    small.check(lambda x, w, out: gemm_mma(x, w, out, kind, tile))


SCHEMES = [
    Scheme(8, 32),
    Scheme(8, 64, F32),
    Scheme(8, 128),
    Scheme(8, 16),
    Scheme(8, 64, F16, "zeros"),
    Scheme(8, 32, F32, "minimum"),
    Scheme(8, 128, F32, "e4m3"),
    Scheme(4, 32),
    Scheme(4, 128),
    Scheme(4, 64, F16, "zeros"),
    Scheme(4, 32, F16, "minimum"),
    Scheme(4, 32, I8, "minimum"),
    Scheme(5, 32),
    Scheme(5, 32, F16, "minimum"),
    Scheme(5, 32, I8, "minimum"),
    Scheme(6, 16, I8),
    Scheme(3, 16, I8),
    Scheme(3, 32, F16, "zeros"),
    Scheme(2, 16, I8, "minimum"),
]


def scheme_id(scheme: Scheme) -> str:
    return f"{scheme.name}-{scheme.group_size}-{scheme.scale}-{scheme.coding}"


def some_columns(scheme: Scheme, steps: int = 3) -> int:
    """Few columns, not a multiple of what kernels take at a time where that can be."""
    unit = max(32, scheme.columns_unit)
    return unit * (steps if unit < 128 else 2)


@pytest.mark.parametrize("tile", MMA_TILES, ids=lambda tile: f"{tile.m}x{tile.n}")
@pytest.mark.parametrize("scheme", SCHEMES, ids=scheme_id)
def test_mma_of_codes(tile: Any, scheme: Scheme, cuda: Device) -> None:
    k = some_columns(scheme, 3 if tile.m > 32 else 11)
    odd = Product(cuda, tile.m - 5, tile.n + 10, k, BF16, format=scheme, out_dtype=F32)
    odd.check(lambda x, w, out: gemm_mma(x, w, out, PLAIN, tile))
    wide = Product(cuda, 10, 46, k, F16, format=scheme, bias=True, epilogue=SWIGLU)
    wide.check(lambda x, w, out: gemm_mma(x, w, out, SWIGLU, tile))


def test_mma_repeats_itself(cuda: Device) -> None:
    product = Product(cuda, 40, 72, 512, BF16)
    first, second = (product.run(lambda x, w, out: gemm_mma(x, w, out, PLAIN, MMA_TILES[-1])) for _ in "ab")
    np.testing.assert_array_equal(first, second)


# --- any operands -----------------------------------------------------------------------------------------


@pytest.mark.parametrize("tile", SIMT_TILES)
@pytest.mark.parametrize("epilogue", EPILOGUES)
@pytest.mark.parametrize(
    ("dtype", "format", "k", "margin"),
    [
        (F32, "float32", 64, 0),
        (F32, "float32", 33, 1),
        (F32, "bfloat16", 36, 4),
        (BF16, "float32", 40, 0),
        (F16, "bfloat16", 17, 0),
        (F32, Scheme(8, 16), 48, 0),
        (BF16, Scheme(8, 16), 48, 2),
    ],
    ids=str,
)
def test_simt(
    tile: int, epilogue: str, dtype: DType, format: str | Scheme, k: int, margin: int, cuda: Device
) -> None:
    kind = EPILOGUES[epilogue]
    product = Product(cuda, 21, tile + 26, k, dtype, format=format, bias=True, epilogue=kind, margin=margin)
    product.check(lambda x, w, out: gemm_simt(x, w, out, kind, tile))


@pytest.mark.parametrize("scheme", [*SCHEMES, Scheme(4, 96), Scheme(2, 96, F32, "zeros")], ids=scheme_id)
def test_simt_of_codes(scheme: Scheme, cuda: Device) -> None:
    """Weights exactly as they are."""
    k = some_columns(scheme)
    for margin, epilogue in ((0, PLAIN), (3, SWIGLU)):
        product = Product(cuda, 9, 74, k, F32, format=scheme, epilogue=epilogue, margin=margin)
        product.check(lambda x, w, out, kind=epilogue: gemm_simt(x, w, out, kind))


# --- expanded weights -------------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", [BF16, F16])
@pytest.mark.parametrize("scheme", [*SCHEMES, Scheme(4, 96), Scheme(3, 96, F32)], ids=scheme_id)
def test_expanded_weights(scheme: Scheme, dtype: DType, cuda: Device) -> None:
    """Some rows, and as many others behind them, each weight rounded once."""
    k = some_columns(scheme)
    rows = random_tensor(np.random.default_rng(1), scheme, 40, k)
    weight = packed(rows, None, cuda)
    exact = rows.dequantize().astype(dtype.numpy)
    for second in (None, 20):
        found = expanded(weight, dtype, 5, 11, second)
        expected = np.concatenate([exact[5:16], exact[20:31] if second else exact[:0]])
        assert (found.format, found.out_features, found.in_features) == (dtype, len(expected), k)
        weights = found.data.numpy().view(dtype.numpy).reshape(expected.shape)
        np.testing.assert_array_equal(weights.astype(np.float32), expected.astype(np.float32))


@pytest.mark.parametrize("epilogue", EPILOGUES)
@pytest.mark.parametrize("bias", [False, True])
def test_products_of_expanded_weights(
    epilogue: str, bias: bool, cuda: Device, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A piece of the rows at a time."""
    monkeypatch.setattr(expand, "PIECE_BYTES", 300_000)
    kind = EPILOGUES[epilogue]
    product = Product(cuda, 11, 1060, 288, BF16, format=Scheme(4, 96), bias=bias, epilogue=kind, margin=8)
    product.check(lambda x, w, out: gemm_expanded(x, w, out, kind, gemm_16_bits))


# --- the choice of a kernel -------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", [BF16, F16, F32])
def test_gemm(dtype: DType, cuda: Device) -> None:
    """Whatever the alignment: operands that tensor cores cannot take go elsewhere."""
    Product(cuda, 9, 64, 128, dtype, epilogue=SWIGLU).check(lambda x, w, out: gemm(x, w, out, swiglu=True))
    Product(cuda, 12, 30, 64, dtype, epilogue=ACCUMULATE, margin=3).check(
        lambda x, w, out: gemm(x, w, out, accumulate=True)
    )
    for scheme in (Scheme(8, 16), Scheme(4, 32), Scheme(4, 96), Scheme(6, 16, I8)):
        k = some_columns(scheme)
        Product(cuda, 30, 50, k, dtype, format=scheme, out_dtype=F32).check(lambda x, w, out: gemm(x, w, out))
    Product(cuda, 1, 34, 77, dtype, bias=True).check(lambda x, w, out: gemm(x, w, out))


@pytest.mark.parametrize("dtype", [BF16, F32])
def test_columns_in_another_order(dtype: DType, cuda: Device) -> None:
    scheme = Scheme(4, 128, F16, "zeros")
    product = Product(cuda, 12, 40, 512, dtype, format=scheme, shuffled=True, epilogue=SWIGLU, margin=3)
    product.check(lambda x, w, out: gemm(x, w, out, swiglu=True))


def test_no_rows(cuda: Device) -> None:
    weight = LinearWeight.pack(np.ones((4, 8), np.float32), device=cuda)
    gemm(Tensor.empty((0, 8), F32, cuda), weight, Tensor.empty((0, 4), F32, cuda))


# --- tilings ----------------------------------------------------------------------------------------------


def test_names() -> None:
    for tiling in all_tilings():
        assert Tiling.parse(str(tiling)) == tiling
        for direct in (False, True):
            assert 3 <= tiling.stages(direct) <= 20
            limit = 227 << 10 if tiling.resident == 1 else 113 << 10
            assert limit - 50_000 < tiling.shared_bytes(direct) <= limit or tiling.stages(direct) == 20
    assert len({str(tiling) for tiling in all_tilings()}) == len(all_tilings())
    with pytest.raises(
        KernelError, match=r"^linear: 'n64' names no tiling of a matrix product; s64x32c4d does$"
    ):
        Tiling.parse("n64")


@pytest.mark.parametrize(
    "shape", [(6144, 4096), (128256, 2048), (896, 4864), (64, 64), (16, 8), (28672, 4096)]
)
def test_every_product_has_a_tiling(shape: tuple[int, int]) -> None:
    n, k = shape
    for m in (1, 9, 33, 100, 700, 40_000):
        for epilogue in EPILOGUES.values():
            for direct in (False, True):
                tiling = choose(m, n, k, epilogue, direct, 132)
                assert tiling.fits(m, n, k, epilogue, direct, 132)
                assert tiling.clusters(m, n, k, 132) >= 1


def test_estimates_prefer_what_is_known_to_be_fast() -> None:
    """Large tiles for many rows of x; for few, enough blocks to keep the memory busy."""
    assert str(candidates(8192, 28672, 4096, 132)[0]).startswith("n128x256c2")
    few = candidates(16, 2048, 2048, 132)[0]
    assert few.swap
    assert few.tile_q == 16
    assert few.clusters(16, 2048, 2048, 132) * few.cluster >= 64


def test_the_nearest_measured_shape_counts() -> None:
    first, second = Tiling.parse("n128x256c2"), Tiling.parse("s64x16c4d")
    known = {(4096, 4096): {16: (second,), 1024: (first,)}, (16384, 2048): {64: (first, second)}}
    assert measured(9, 4096, 4096, known) == (second,)
    assert measured(17, 5000, 4000, known) == (first,)
    assert measured(5000, 4096, 4096, known) == (first,)
    assert measured(16, 14000, 2048, known) == (first, second)
    assert measured(16, 512, 512, known) == ()
    assert measured(16, 512, 512, {}) == ()


def test_the_table_is_sound() -> None:
    for by_rows in table().values():
        assert set(by_rows) <= set(ROWS)
        assert all(by_rows.values())


def test_tilings_of_codes() -> None:
    for tiling in codes_tiling.all_tilings():
        assert Tiling.parse(str(tiling)) == tiling
        assert tiling.swap
        for scheme in SCHEMES:
            for direct in (False, True):
                for step in {64, codes_tiling.step_columns(tiling, 4096)}:
                    limit = 227 << 10 if tiling.resident == 1 else 113 << 10
                    stages = codes_tiling.stages(tiling, scheme, step, direct)
                    taken = codes_tiling.shared_bytes(tiling, scheme, step, direct)
                    assert stages == 20 or limit - 90_000 < taken <= limit
    assert len({str(tiling) for tiling in codes_tiling.all_tilings()}) == len(codes_tiling.all_tilings())


@pytest.mark.parametrize("scheme", SCHEMES, ids=scheme_id)
def test_every_product_of_codes_has_a_tiling(scheme: Scheme) -> None:
    """Or is one of expanded weights."""
    for n, k in ((6144, 4096), (128256, 2048), (896, 4864), (64, 256), (16, 1024), (28672, 4096)):
        for m in (9, 33, 100, 700):
            for epilogue in EPILOGUES.values():
                for direct in (False, True):
                    tiling = codes_tiling.choose(m, n, k, scheme, epilogue, direct, 132)
                    if tiling is not None:
                        assert codes_tiling.fits(tiling, m, n, k, scheme, epilogue, direct, 132)
        promising = codes_tiling.candidates(64, n, k, scheme, 132)
        assert len(promising) > 10


def test_estimates_of_codes_prefer_what_should_be_fast(monkeypatch: pytest.MonkeyPatch) -> None:
    """Tiles of as many rows of x as there are, and enough blocks; large tiles for many rows."""
    scheme = Scheme(4, 64)
    monkeypatch.setattr(codes_tiling, "table", dict)
    codes_tiling.choose.cache_clear()
    for m in (16, 32, 64):
        few = codes_tiling.candidates(m, 4096, 4096, scheme, 132)[0]
        assert few.tile_q == m
        assert few.clusters(m, 4096, 4096, 132) * few.cluster > 60
    assert codes_tiling.candidates(1024, 28672, 4096, scheme, 132)[0].tile_q >= 192
    assert codes_tiling.choose(40_000, 28672, 4096, scheme, PLAIN, False, 132) is None
    codes_tiling.choose.cache_clear()


def test_measured_tilings_of_codes(monkeypatch: pytest.MonkeyPatch) -> None:
    """Those of the nearest number of bits; None stands for expanded weights."""
    first, second = Tiling.parse("s128x128"), Tiling.parse("s64x64")
    known = {4: {(4096, 4096): {64: (second,), 1024: (None,)}}, 8: {(4096, 4096): {64: (first,)}}}
    monkeypatch.setattr(codes_tiling, "table", lambda: known)
    codes_tiling.choose.cache_clear()
    for bits, m, expected in ((4, 60, second), (5, 64, second), (3, 900, None), (8, 9, first)):
        scheme = Scheme(bits, 32)
        assert codes_tiling.choose(m, 4096, 4096, scheme, PLAIN, False, 132) == expected
    codes_tiling.choose.cache_clear()


def test_the_table_of_codes_is_sound() -> None:
    for shapes in codes_tiling.table().values():
        for by_rows in shapes.values():
            assert set(by_rows) <= set(ROWS)
            assert all(by_rows.values())


# --- wgmma ------------------------------------------------------------------------------------------------

AWKWARD = [
    (1, 256, 512),
    (13, 1152, 1024),
    (100, 3072, 576),
    (257, 832, 576),
    (515, 4160, 1024),
    (100, 832, 8192),
]


# Epilogue, type of the operands, type of the result, and how many of the shapes.
VARIANTS = [(kind, BF16, BF16, len(AWKWARD)) for kind in EPILOGUES.values()]
VARIANTS += [(PLAIN, BF16, F32, 3), (ACCUMULATE, BF16, F32, 2), (SWIGLU, F16, F16, 2)]


@pytest.fixture
def hopper(cuda: Device) -> Device:
    """A Hopper GPU."""
    if not chip(cuda).is_hopper:
        pytest.skip("not a Hopper GPU")
    return cuda


@cache
def awkward(device: Device) -> list[Product]:
    """Products that no tile divides, the truth about them known; with bias if M is odd."""
    products = [
        Product(device, m, n, k, dtype, bias=m % 2 > 0, epilogue=kind, out_dtype=out)
        for kind, dtype, out, count in VARIANTS
        for m, n, k in AWKWARD[:count]
    ]
    kernels = [
        gemm_hopper.kernel(t, p.x.dtype, p.dtype, p.epilogue, p.is_direct, p.weight.bias is not None)
        for t in all_tilings()
        for p in products
        if p.fits(t)
    ]
    compile_all(kernels, device)
    return products


@pytest.mark.gpu
@pytest.mark.parametrize("name", [str(tiling) for tiling in all_tilings()])
def test_wgmma(name: str, hopper: Device) -> None:
    """Each tiling with each epilogue; what it leaves does not depend on timing."""
    tiling = Tiling.parse(name)
    for product in awkward(hopper):
        if product.fits(tiling):

            def call(x: Tensor, w: LinearWeight, out: Tensor, epilogue: int = product.epilogue) -> None:
                gemm_hopper.gemm(x, w, out, epilogue, tiling)

            np.testing.assert_array_equal(product.check(call), product.run(call))


@pytest.mark.gpu
def test_wgmma_in_a_graph(hopper: Device) -> None:
    """Counters of evenly split tiles are zero after each replay, also if they were made while recording."""
    tiling = Tiling.parse("n128x128e")
    product = Product(hopper, 200, 640, 2048, BF16)
    gemm_hopper.gemm(product.x, product.weight, Tensor.empty((200, 640), BF16, hopper), PLAIN, tiling)
    gemm_hopper.workspace.cache_clear()
    out = Tensor.zeros((200, 640), BF16, hopper)
    with hopper.capture() as graph:
        gemm_hopper.gemm(product.x, product.weight, out, PLAIN, tiling)
    for _ in range(3):
        out.buffer.fill(0xFF)
        graph.replay()
        np.testing.assert_allclose(out.numpy().astype(np.float32), product.expected(), rtol=0.02, atol=0.05)
    assert not gemm_hopper.workspace(hopper)[1].numpy().any()


# --- wgmma with codes -------------------------------------------------------------------------------------

TYPICAL = [Scheme(4, 64), Scheme(8, 128), Scheme(4, 32, I8, "minimum"), Scheme(6, 16, I8)]
"""What each tiling is tried with; the others with a few."""

AWKWARD_FOR_CODES = [(13, 1152, 1024), (100, 3072, 768), (257, 832, 512), (515, 4160, 1024), (33, 832, 8192)]

VARIANTS_OF_CODES = [(kind, BF16, BF16, 5) for kind in EPILOGUES.values()]
VARIANTS_OF_CODES += [(PLAIN, BF16, F32, 3), (ACCUMULATE, BF16, F32, 2), (SWIGLU, F16, F16, 2)]


@cache
def products_of_codes(device: Device, scheme: Scheme, variants: int) -> list[Product]:
    """Products that no tile divides, the truth about them known; with bias if M is odd."""
    return [
        Product(device, m, n, k, dtype, format=scheme, bias=m % 2 > 0, epilogue=kind, out_dtype=out)
        for kind, dtype, out, count in VARIANTS_OF_CODES[:variants]
        for m, n, k in AWKWARD_FOR_CODES[:count]
    ]


def check_tiling_of_codes(tiling: Tiling, products: list[Product]) -> None:
    """Results are right, and do not depend on timing."""
    tried = [product for product in products if _takes_codes(product, tiling)]
    assert tried
    compile_all([_kernel_of_codes(product, tiling) for product in tried], tried[0].device)
    for product in tried:

        def call(x: Tensor, w: LinearWeight, out: Tensor, epilogue: int = product.epilogue) -> None:
            gemm_codes.gemm(x, w, out, epilogue, tiling)

        np.testing.assert_array_equal(product.check(call), product.run(call))


def _takes_codes(product: Product, tiling: Tiling) -> bool:
    (m, k), n, scheme = product.x.shape, product.weight.out_features, product.weight.scheme
    assert scheme is not None
    assert gemm_codes.can_take(product.x, product.weight, product.epilogue)
    return codes_tiling.fits(tiling, m, n, k, scheme, product.epilogue, product.is_direct, 132)


def _kernel_of_codes(product: Product, tiling: Tiling) -> Any:
    scheme = product.weight.scheme
    assert scheme is not None
    return gemm_codes.kernel(
        tiling, scheme, codes_tiling.step_columns(tiling, product.x.shape[1]), product.x.dtype,
        product.dtype, product.epilogue, product.is_direct, product.weight.bias is not None,
    )  # fmt: skip


@pytest.mark.gpu
@pytest.mark.parametrize("scheme", SCHEMES, ids=scheme_id)
def test_wgmma_of_codes(scheme: Scheme, hopper: Device) -> None:
    """Each scheme, with tiles of each kind and steps of 128 columns and of 64."""
    for name in ("s64x16", "s64x64r2", "s128x128c2", "s128x256", "s64x32c2d"):
        check_tiling_of_codes(Tiling.parse(name), products_of_codes(hopper, scheme, 6))


@pytest.mark.gpu
@pytest.mark.parametrize("name", [str(tiling) for tiling in codes_tiling.all_tilings()])
def test_wgmma_tilings_of_codes(name: str, hopper: Device) -> None:
    tiling = Tiling.parse(name)
    for scheme in TYPICAL:
        products = products_of_codes(hopper, scheme, 3)
        if any(_takes_codes(product, tiling) for product in products):
            check_tiling_of_codes(tiling, products)


@pytest.mark.gpu
def test_odd_columns_of_codes(hopper: Device) -> None:
    """Rows of 64 columns more than a multiple of 128."""
    for k in (320, 576):
        for scheme in (Scheme(4, 64), Scheme(8, 32), Scheme(4, 32, F16, "minimum")):
            product = Product(hopper, 50, 200, k, BF16, format=scheme, bias=True)
            for name in ("s64x16", "s128x64c2", "s128x128e", "s128x256c2"):
                check_tiling_of_codes(Tiling.parse(name), [product])


@pytest.mark.gpu
@pytest.mark.parametrize("epilogue", EPILOGUES)
def test_products_of_expanded_weights_on_hopper(
    epilogue: str, hopper: Device, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The product waits for the weights that the kernel in front of it writes, piece after piece."""
    kind = EPILOGUES[epilogue]
    product = Product(hopper, 2100, 6144, 4096, BF16, format=Scheme(4, 64), epilogue=kind)
    monkeypatch.setattr(expand, "PIECE_BYTES", 8 << 20)
    for _ in range(3):
        product.check(lambda x, w, out: gemm_expanded(x, w, out, kind, gemm_16_bits))
