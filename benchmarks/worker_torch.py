"""PyTorch in bfloat16 behind the worker protocol: prefill by the model that Transformers makes of a config.

Timed: one call of the model with the whole prompt, with logits of the last token only and keys and values
kept, and argmax over the logits. Attention is `scaled_dot_product_attention`; nothing is compiled. Not timed:
making the random weights.

Runs in an environment that has torch and transformers; see `--torch` of `compare_llama_cpp.py`.
"""

from __future__ import annotations

from time import perf_counter
from typing import Any

import torch
import transformers

from worker_protocol import serve


class Torch:
    """One model of random weights at a time."""

    def __init__(self) -> None:
        self.model: Any = None

    def info(self) -> dict[str, str]:
        """Versions, and the instructions that its kernels may use."""
        return {
            "name": "torch",
            "torch": torch.__version__,
            "transformers": transformers.__version__,
            "cpu_capability": torch.backends.cpu.get_cpu_capability(),
        }

    def load(self, *, config: dict[str, Any], threads: int) -> None:
        """Make a model of this shape."""
        self.unload()
        torch.set_num_threads(threads)
        shape = transformers.AutoConfig.for_model(**config)
        self.model = transformers.AutoModelForCausalLM.from_config(
            shape, dtype=torch.bfloat16, attn_implementation="sdpa"
        ).eval()

    def prefill(self, *, tokens: int) -> float:
        """Seconds from a prompt to its first token, with an empty KV cache."""
        if self.model is None:
            raise RuntimeError("no model is loaded")
        ids = torch.randint(0, self.model.config.vocab_size, (1, tokens))
        started = perf_counter()
        with torch.inference_mode():
            self.model(ids, use_cache=True, logits_to_keep=1).logits[0, -1].argmax().item()
        return perf_counter() - started

    def unload(self) -> None:
        """Let go of the model."""
        self.model = None


if __name__ == "__main__":
    serve(Torch())
