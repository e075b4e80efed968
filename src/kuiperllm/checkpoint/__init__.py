"""Checkpoints: safetensors, GGUF, llama2.c and Meta's files as named tensors with one kind of configuration.

Names, row orders and configurations are translated to Hugging Face's while loading, so nothing above this
package knows where a tensor came from.
"""

from kuiperllm.checkpoint.base import Checkpoint, Progress, TensorInfo, Weight
from kuiperllm.checkpoint.opening import open_checkpoint

__all__ = ["Checkpoint", "Progress", "TensorInfo", "Weight", "open_checkpoint"]
