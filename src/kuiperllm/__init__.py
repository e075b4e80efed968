"""KuiperLLM: a large-language-model inference framework, written from scratch in Python.

Everything public is imported on first use (PEP 562), so that `import kuiperllm` costs next to nothing.

Example:
    >>> from kuiperllm import LLM, SamplingParams
    >>> LLM().generate("ROMEO:", SamplingParams(max_tokens=40, seed=1))[0].text
"""

from __future__ import annotations

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from kuiperllm.config import EngineConfig, ModelConfig, SamplingParams
    from kuiperllm.core import Device, DType, Tensor
    from kuiperllm.engine.async_llm import AsyncLLM, Deltas
    from kuiperllm.engine.comparison import Comparison, compare
    from kuiperllm.engine.export import ExportReport, export
    from kuiperllm.engine.llm import LLM
    from kuiperllm.engine.output import Chunk, Completion, Delta
    from kuiperllm.engine.perplexity import Perplexity
    from kuiperllm.engine.request import Guide
    from kuiperllm.engine.sequence import TokenLogprobs
    from kuiperllm.engine.stats import EngineStats
    from kuiperllm.errors import (
        ChatTemplateError,
        CheckpointError,
        ConfigError,
        ContextLengthError,
        DeviceError,
        DLPackError,
        DownloadError,
        DTypeError,
        EngineStoppedError,
        ExportError,
        KernelError,
        KuiperError,
        MemoryLifetimeError,
        OutOfMemoryError,
        QueueFullError,
        SamplingError,
        ShapeError,
        TokenizerError,
        UnsupportedError,
        UsageError,
    )

    __version__: str

__all__ = [
    "LLM",
    "AsyncLLM",
    "ChatTemplateError",
    "CheckpointError",
    "Chunk",
    "Comparison",
    "Completion",
    "ConfigError",
    "ContextLengthError",
    "DLPackError",
    "DType",
    "DTypeError",
    "Delta",
    "Deltas",
    "Device",
    "DeviceError",
    "DownloadError",
    "EngineConfig",
    "EngineStats",
    "EngineStoppedError",
    "ExportError",
    "ExportReport",
    "Guide",
    "KernelError",
    "KuiperError",
    "MemoryLifetimeError",
    "ModelConfig",
    "OutOfMemoryError",
    "Perplexity",
    "QueueFullError",
    "SamplingError",
    "SamplingParams",
    "ShapeError",
    "Tensor",
    "TokenLogprobs",
    "TokenizerError",
    "UnsupportedError",
    "UsageError",
    "__version__",
    "compare",
    "export",
]

_MODULE_OF = {
    "EngineConfig": "kuiperllm.config",
    "ModelConfig": "kuiperllm.config",
    "SamplingParams": "kuiperllm.config",
    "DType": "kuiperllm.core",
    "Device": "kuiperllm.core",
    "Tensor": "kuiperllm.core",
    "Comparison": "kuiperllm.engine.comparison",
    "compare": "kuiperllm.engine.comparison",
    "AsyncLLM": "kuiperllm.engine.async_llm",
    "Deltas": "kuiperllm.engine.async_llm",
    "ExportReport": "kuiperllm.engine.export",
    "LLM": "kuiperllm.engine.llm",
    "Chunk": "kuiperllm.engine.output",
    "Completion": "kuiperllm.engine.output",
    "Delta": "kuiperllm.engine.output",
    "Perplexity": "kuiperllm.engine.perplexity",
    "Guide": "kuiperllm.engine.request",
    "TokenLogprobs": "kuiperllm.engine.sequence",
    "EngineStats": "kuiperllm.engine.stats",
    "export": "kuiperllm.engine.export",
}
"""Where a name is defined; the exceptions are all in `kuiperllm.errors`."""


def __getattr__(name: str) -> object:
    if name == "__version__":
        from importlib.metadata import version

        value: object = version("kuiperllm")
    elif name in __all__:
        from importlib import import_module

        value = getattr(import_module(_MODULE_OF.get(name, "kuiperllm.errors")), name)
    else:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
