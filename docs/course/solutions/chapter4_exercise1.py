"""Scales for rows that are to be quantized to int8."""

from pathlib import Path

from kuiperllm.backends.cuda.launch import Kernel, launch
from kuiperllm.core import DType, Tensor

SOURCE = Path(__file__).parents[1] / "kernels" / "row_scales.cu"
WARPS = 4


def row_scales(x: Tensor) -> Tensor:
    """The largest absolute value of each row of x [rows, width], over 127."""
    rows, width = x.shape
    scales = Tensor.empty((rows,), DType.float32, x.device)
    launch(Kernel(SOURCE, "row_scales", WARPS=WARPS), rows, 32 * WARPS, x, scales, width)
    return scales
