"""Launches the CUDA kernels of `logprobs`: sorted chunks of rows, then one block a row that merges them."""

from __future__ import annotations

from pathlib import Path

from kuiperllm.backends.cuda.launch import Kernel, launch
from kuiperllm.core import DType, Tensor
from kuiperllm.ops.logits import ROW_THREADS, row_vectors

_SOURCE = Path(__file__).with_name("cuda.cu")
_CHUNKS, _MERGE = Kernel(_SOURCE, "logprobs_chunks"), Kernel(_SOURCE, "logprobs_merge")


def logprobs(logits: Tensor, token_ids: Tensor, chosen: Tensor, top_ids: Tensor, top_values: Tensor) -> None:
    """Log probabilities of rows of logits [S, V] to chosen [S] and top_values [S, k]."""
    (rows, width), k, device = logits.shape, top_ids.shape[1], logits.device
    if not rows:
        return
    chunks = -(-row_vectors(width) // ROW_THREADS)
    kept = min(k, 4 * ROW_THREADS)
    lists = Tensor.empty((rows, chunks, kept), DType.int64, device)
    parts = Tensor.empty((rows, chunks, 2), DType.float32, device)
    sizes = width, logits.strides[0], chunks, kept
    launch(_CHUNKS, rows * chunks, ROW_THREADS, logits, lists, parts, *sizes)
    launch(
        _MERGE, rows, ROW_THREADS,
        logits, token_ids, lists, parts, chosen, top_ids, top_values, *sizes, k,
        shared=4 * chunks,
    )  # fmt: skip
