"""Chooses the next token of each sequence from its logits."""

from __future__ import annotations

from kuiperllm.core import Tensor
from kuiperllm.engine.sequence import Sequence
from kuiperllm.ops.argmax import argmax


class Sampler:
    def __init__(self, vocab_size: int) -> None:
        self.vocab_size = vocab_size

    def sample(self, logits: Tensor, sequences: list[Sequence], stop_ids: frozenset[int]) -> list[int]:
        return [int(i) for i in argmax(logits[:, : self.vocab_size]).numpy()]
