"""Loading a model for a command."""

from __future__ import annotations

from typing import TYPE_CHECKING

from kuiperllm.cli.interrupts import import_engine
from kuiperllm.cli.options import EngineOptions, ModelOptions
from kuiperllm.cli.progress import Reporter

if TYPE_CHECKING:
    from kuiperllm.engine.llm import LLM


def load(model: ModelOptions, engine: EngineOptions, reporter: Reporter) -> LLM:
    """The model that the options name, ready to generate.

    Raises:
        KuiperError: it cannot be found, read, or held in memory.
    """
    engine.config()  # refuses impossible values before anything heavy is imported
    import_engine()
    from kuiperllm.engine.llm import LLM

    return LLM(model.model, tokenizer=model.tokenizer, progress=reporter.advance, **engine.as_fields())


def reported_name(model: ModelOptions) -> str:
    """What to call the model that the options name."""
    return model.model or "demo"
