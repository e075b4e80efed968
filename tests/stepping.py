"""Takes a sequence through a runner by hand, without scheduler, tokenizer or sampling."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np

from kuiperllm.checkpoint import open_checkpoint
from kuiperllm.config import EngineConfig, SamplingParams
from kuiperllm.core import Device
from kuiperllm.engine.kv_cache import KVCache
from kuiperllm.engine.loading import load_decoder
from kuiperllm.engine.memory_plan import kv_dtype
from kuiperllm.engine.runner import Runner
from kuiperllm.engine.scheduler import Step
from kuiperllm.engine.sequence import Sequence


class Stepper:
    """A decoder, and a text that it reads.

    Args:
        folder: of the checkpoint.
        tokens: the text.
        device: where to run.
        max_model_len: the longest text, a multiple of the block size.
        options: of `EngineConfig`.
    """

    def __init__(
        self, folder: Path, tokens: list[int], device: Device, max_model_len: int, **options: Any
    ) -> None:
        engine = EngineConfig(device=str(device), **options)
        with open_checkpoint(folder) as checkpoint:
            decoder = load_decoder(checkpoint, engine, device)
            dtype = kv_dtype(checkpoint, engine)
        self.cache = KVCache(decoder.config, engine.block_size, dtype, device)
        self.runner = Runner(decoder, self.cache, 1, max_model_len)
        self.tokens = tokens
        self.sequence = Sequence(tokens[:1], SamplingParams(), seed=0, max_tokens=max_model_len, row=0)
        # blocks in an order of their own, so that one taken for another shows
        self.sequence.blocks = list(range(max_model_len // engine.block_size))[::-1]

    def prefill(self, last: int) -> np.ndarray[Any, Any]:
        """Logits after the tokens of the text up to `last`, those that are new taken in at once."""
        self.sequence.prompt_ids = self.tokens[:last]
        return self._run(last - self.sequence.num_computed)

    def decode(self, token: int | None = None) -> np.ndarray[Any, Any]:
        """Logits after the next token of the text, or another one."""
        self.sequence.output_ids.append(self.tokens[self.sequence.num_tokens] if token is None else token)
        return self._run(1)

    def _run(self, count: int) -> np.ndarray[Any, Any]:
        sequence = self.sequence
        sequence.num_tokens = len(sequence.prompt_ids) + len(sequence.output_ids)
        step = Step([sequence], [count], [sequence.num_computed], int(count == 1), 1, [sequence])
        sequence.num_computed += count
        launched = self.runner.launch(step, len(sequence.blocks), chooses=False)
        assert launched.logits is not None
        logits: np.ndarray[Any, Any] = launched.logits.numpy()[0].copy()
        self.runner.choose(launched)
        return logits
