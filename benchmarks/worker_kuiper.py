"""KuiperLLM behind the worker protocol: a thin adapter over `kuiperllm.engine.bench`.

Timed by `BenchModel`: scheduling, the whole forward pass from token ids to the logits of the last token, and
greedy sampling, in Python's time too. Not timed: making the random weights, compiling kernels, the prompt in
front of a decode.
"""

from __future__ import annotations

from typing import Any

from kuiperllm.checkpoint import open_checkpoint
from kuiperllm.config import EngineConfig, ModelConfig
from kuiperllm.core import Device
from kuiperllm.engine.bench import BenchModel, versions
from worker_protocol import serve


class Kuiper:
    """One model of random weights at a time."""

    def __init__(self) -> None:
        self.model: BenchModel | None = None

    def info(self) -> dict[str, str]:
        """Versions of what does the work."""
        return {"name": "KuiperLLM"} | versions(Device("cpu"))

    def load(
        self,
        *,
        config: dict[str, Any],
        path: str | None,
        quant: str | None,
        group_size: int,
        dtype: str,
        threads: int,
    ) -> dict[str, int]:
        """Load a file, or make a model of random weights; tells how many bytes of them a token reads."""
        self.unload()
        engine = EngineConfig(
            device="cpu", quant=quant, group_size=group_size, dtype=dtype, num_threads=threads
        )
        if path is None:
            self.model = BenchModel(ModelConfig.from_hf(config), engine)
        else:
            with open_checkpoint(path) as checkpoint:
                self.model = BenchModel(checkpoint, engine)
        return {"bytes_per_token": self.model.decoder.bytes_per_token}

    def prefill(self, *, tokens: int) -> float:
        """Seconds from a prompt to its first token, with an empty KV cache."""
        return self._loaded().prefill(tokens)

    def decode(self, *, prompt: int, tokens: int) -> float:
        """Seconds for greedy tokens after a prompt that is not timed."""
        return self._loaded().decode(prompt, tokens)

    def unload(self) -> None:
        """Let go of the model."""
        self.model = None

    def _loaded(self) -> BenchModel:
        if self.model is None:
            raise RuntimeError("no model is loaded")
        return self.model


if __name__ == "__main__":
    serve(Kuiper())
