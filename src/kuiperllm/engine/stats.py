"""What the engine counts."""

from __future__ import annotations

from dataclasses import dataclass, field


@dataclass(slots=True)
class EngineStats:
    """The engine at one moment, and sums since it began. What concerns one request is in its `Completion`."""

    num_running: int = 0
    """Outputs that are worked on."""
    num_waiting: int = 0
    """Outputs that wait: for their first turn, or preempted."""
    kv_blocks: int = 0
    """Blocks of the key/value cache, at most."""
    kv_blocks_used: int = 0
    """Those that belong to outputs under way; what is only kept for later prompts is not counted."""
    prompt_tokens: int = 0
    """Tokens of all prompts that were begun, cached ones included."""
    generated_tokens: int = 0
    prefix_queries: int = 0
    """Prompt tokens that were looked up in the prefix cache."""
    prefix_hits: int = 0
    """Those that were found."""
    preemptions: int = 0
    """How often an output had to give up its blocks, to be computed anew."""
    steps: int = 0
    """Passes of the model."""
    finished: dict[str, int] = field(default_factory=lambda: {"stop": 0, "length": 0, "abort": 0, "error": 0})
    """Outputs by the way they ended."""

    @property
    def kv_usage(self) -> float:
        """Part of the key/value cache that is in use, 0 to 1."""
        return self.kv_blocks_used / self.kv_blocks if self.kv_blocks else 0.0
