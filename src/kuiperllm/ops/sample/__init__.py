"""The next token, drawn from logits on the device."""

from __future__ import annotations

from typing import Any

import numpy as np
from numpy.typing import NDArray

from kuiperllm.core import DType, Tensor
from kuiperllm.errors import ShapeError
from kuiperllm.ops.cases import Case
from kuiperllm.ops.contract import Contract
from kuiperllm.ops.dispatch import implementation
from kuiperllm.ops.sample.philox import uniform

CONTRACT = Contract(
    "sample",
    logits="S V",
    temperature="S",
    top_k="S : int32",
    top_p="S",
    min_p="S",
    seeds="S : int64",
    positions="S : int32",
    out="S : int32",
)

_LOWEST_EXPONENT = -87.3  # e to less than this is no normal float32; such tokens are never drawn


def sample(
    logits: Tensor,
    temperature: Tensor,
    top_k: Tensor,
    top_p: Tensor,
    min_p: Tensor,
    seeds: Tensor,
    positions: Tensor,
    *,
    out: Tensor | None = None,
) -> Tensor:
    """Draw one token for each row of logits; parameters as in `SamplingParams`, one for each row.

    A temperature of 0 takes the most likely token. Otherwise the probability of a token is proportional to
    w = e**((logit - largest logit) / temperature), and of the tokens there remain

    1. the `top_k` most likely ones (0 or less: all),
    2. of these, the fewest most likely ones whose w add up to at least `top_p` times the sum of all of them
       (1 or more: all),
    3. of these, the ones with w >= `min_p`.

    "Most likely" goes by the logit; of equal logits, the lower token comes first. The draw takes the first
    token, in order of ids, at which the running sum of w exceeds u times the total, where u is
    `philox.uniform(seed, position)`: seed and position fix the draw, whatever else is in the batch.

    NaN counts as minus infinity. Several logits of plus infinity are equally likely. A row without any
    number above minus infinity gives token 0.

    Args:
        logits: float32 [S, V] with V at least 1; rows may be strided.
        temperature: float32 [S].
        top_k: int32 [S].
        top_p: float32 [S].
        min_p: float32 [S].
        seeds: int64 [S], read as 64 bits without a sign.
        positions: int32 [S], where in its text each token will stand.
        out: int32 [S], where the tokens go (default: a new tensor).

    Raises:
        ShapeError: the shapes contradict the contract, or V is 0.
        DTypeError: a tensor has another type than stated.
        DeviceError: the tensors live on different devices.
    """
    CONTRACT.check(logits, temperature, top_k, top_p, min_p, seeds, positions, out)
    if logits.shape[1] == 0:
        raise ShapeError(f"sample: logits has shape {list(logits.shape)}: there is no token to draw")
    if out is None:
        out = Tensor.empty(logits.shape[:1], DType.int32, logits.device)
    kernels = implementation("sample", logits.device)
    kernels.sample(logits, temperature, top_k, top_p, min_p, seeds, positions, out)
    return out


def reference(
    logits: NDArray[Any],
    temperature: NDArray[Any],
    top_k: NDArray[Any],
    top_p: NDArray[Any],
    min_p: NDArray[Any],
    seeds: NDArray[Any],
    positions: NDArray[Any],
) -> NDArray[np.int32]:
    """The steps one after the other, on sorted tokens, in float64."""
    tokens = np.zeros(len(logits), np.int32)
    rows = zip(logits, temperature, top_k, top_p, min_p, uniform(seeds, positions), strict=True)
    for i, (row, heat, k, p, least, u) in enumerate(rows):
        x = np.where(np.isnan(row), -np.inf, row).astype(np.float64)
        if x.max() == -np.inf:
            continue
        if not heat > 0:
            tokens[i] = x.argmax()
            continue
        running = kept_weights(x, heat, k, p, least).cumsum()
        tokens[i] = np.searchsorted(running, u * running[-1], side="right")
    return tokens


def kept_weights(
    x: NDArray[np.float64], temperature: float, top_k: int, top_p: float, min_p: float
) -> NDArray[np.float64]:
    """w of each token that remains of one row, and 0 for the others."""
    with np.errstate(invalid="ignore", over="ignore"):
        exponent = np.where(x == x.max(), 0.0, (x - x.max()) / np.float64(temperature))
    weights = np.where(exponent >= _LOWEST_EXPONENT, np.exp(exponent), 0.0)
    order = np.argsort(-x, kind="stable")
    if top_k > 0:
        weights[order[top_k:]] = 0
    if top_p < 1:
        running = weights[order].cumsum()
        weights[order[np.searchsorted(running, top_p * running[-1]) + 1 :]] = 0
    weights[weights < min_p] = 0
    return weights


def _inputs(
    rows: int, vocabulary: int, *, heat: float = 1.0, k: int = 0, p: float = 1.0, least: float = 0.0,
    values: int = 0, padding: int = 0,
) -> Any:  # fmt: skip
    """`values`: how many different logits there are (0: as many as tokens)."""

    def make(rng: np.random.Generator) -> dict[str, Any]:
        logits = rng.standard_normal((rows, vocabulary + padding), np.float32) * np.float32(3)
        if values:
            logits = rng.integers(0, values, logits.shape).astype(np.float32)
        return {
            "logits": logits[:, :vocabulary],
            "temperature": np.full(rows, heat, np.float32),
            "top_k": np.full(rows, k, np.int32),
            "top_p": np.full(rows, p, np.float32),
            "min_p": np.full(rows, least, np.float32),
            "seeds": rng.integers(-(2**63), 2**63, rows, np.int64),
            "positions": rng.integers(0, 2**31, rows, np.int32),
        }

    return make


_V = 151_936

CASES = [
    Case("one", sample, reference, _inputs(1, 1)),
    Case("all", sample, reference, _inputs(300, 37)),
    Case("strided", sample, reference, _inputs(300, 70, padding=5)),
    Case("greedy", sample, reference, _inputs(30, 100, heat=0.0)),
    Case("top-k", sample, reference, _inputs(300, 50, k=7, heat=5.0)),
    Case("top-p", sample, reference, _inputs(300, 50, p=0.7, heat=2.0)),
    Case("min-p", sample, reference, _inputs(300, 50, least=0.05)),
    Case("all-steps", sample, reference, _inputs(300, 100, heat=3.0, k=20, p=0.9, least=0.1)),
    Case("ties", sample, reference, _inputs(300, 61, values=4, k=13, p=0.8)),
    Case("equal-logits", sample, reference, _inputs(300, 5003, values=1, k=4001, p=0.3)),
    Case("tied-top-p", sample, reference, _inputs(100, 3001, values=5, p=0.55, heat=3.0)),
    Case("flat-top-p", sample, reference, _inputs(40, 9001, p=0.6, heat=50.0)),
    Case("long-rows", sample, reference, _inputs(20, 40_001, k=20_000, p=0.95, heat=4.0)),
    Case("greedy-vocabulary", sample, reference, _inputs(1, _V, heat=0.0), benchmark=True),
    Case("all-vocabulary", sample, reference, _inputs(1, _V), benchmark=True),
    Case("top-k-50-vocabulary", sample, reference, _inputs(1, _V, k=50), benchmark=True),
    Case("top-p-vocabulary", sample, reference, _inputs(1, _V, p=0.9), benchmark=True),
    Case("flat-top-p-vocabulary", sample, reference, _inputs(1, _V, p=0.9, heat=50.0), benchmark=True),
    Case("usual-vocabulary", sample, reference, _inputs(1, _V, heat=0.7, k=20, p=0.8), benchmark=True),
]
