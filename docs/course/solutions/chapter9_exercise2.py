"""A product whose second operand lies in memory as [K, N]."""

from pathlib import Path

from kuiperllm.backends.cuda.launch import Kernel, launch
from kuiperllm.core import DType, Tensor

SOURCE = Path(__file__).parents[1] / "kernels" / "product_kn.cu"


def product_kn(a: Tensor, w: Tensor) -> Tensor:
    """The float32 product of a [16, 16] and w [16, 8], both bfloat16."""
    c = Tensor.empty((16, 8), DType.float32, a.device)
    launch(Kernel(SOURCE, "product_kn"), 1, 32, a, w, c, shared=768)
    return c
