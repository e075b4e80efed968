"""KuiperLLM behind the worker protocol: a thin adapter over `kuiperllm.engine.bench`.

Timed by `BenchModel`: the whole forward pass from token ids to the logits of the last token, and their
argmax. Not timed: making the random weights, compiling kernels, the prompt in front of a decode.
"""

from __future__ import annotations

from importlib.metadata import version
from typing import Any

from kuiperllm.engine.bench import BenchModel

from kuiperllm.config import ModelConfig
from worker_protocol import serve


class Kuiper:
    """One model of random weights at a time."""

    def __init__(self) -> None:
        self.model: BenchModel | None = None

    def info(self) -> dict[str, str]:
        """Versions of what does the work."""
        packages = ("kuiperllm", "numba", "llvmlite", "numpy")
        return {"name": "KuiperLLM"} | {name: version(name) for name in packages}

    def load(
        self, *, config: dict[str, Any], quant: str | None, group_size: int, dtype: str, threads: int
    ) -> dict[str, Any]:
        """Make a model of random weights."""
        self.unload()
        self.model = BenchModel(
            ModelConfig.from_hf(config),
            quant=quant,
            group_size=group_size,
            dtype=dtype,
            num_threads=threads,
        )
        return {}

    def prefill(self, *, tokens: int) -> float:
        """Seconds from a prompt to its first token, with an empty KV cache."""
        return self._loaded().prefill(tokens)

    def decode(self, *, prompt: int, tokens: int) -> list[float]:
        """Seconds of each greedy token after a prompt that is not timed."""
        return list(self._loaded().decode(prompt, tokens))

    def unload(self) -> None:
        """Let go of the model."""
        self.model = None

    def _loaded(self) -> BenchModel:
        if self.model is None:
            raise RuntimeError("no model is loaded")
        return self.model


if __name__ == "__main__":
    serve(Kuiper())
