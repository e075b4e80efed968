"""RMSNorm of heads of 64 elements, four of them in a warp."""

from pathlib import Path

from kuiperllm.backends.cuda.launch import Kernel, launch
from kuiperllm.core import Tensor

SOURCE = Path(__file__).parents[1] / "kernels" / "norm_heads.cu"
THREADS = 128


def norm_heads(x: Tensor, weight: Tensor, eps: float) -> Tensor:
    """rms_norm of each row of x [rows, 64], float32."""
    out = Tensor.empty(x.shape, x.dtype, x.device)
    blocks = -(-x.shape[0] * 8 // THREADS)
    launch(Kernel(SOURCE, "norm_heads"), blocks, THREADS, x, weight, out, x.shape[0], eps)
    return out
