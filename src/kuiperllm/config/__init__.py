"""What a user or a checkpoint may set, read once into frozen dataclasses.

`ModelConfig` is the shape of a network in Hugging Face's names, `EngineConfig` says how to run it,
`SamplingParams` how to choose tokens, and `Settings` holds the `KUIPER_*` environment variables.
"""

from kuiperllm.config.engine import DTYPES, QUANTS, EngineConfig
from kuiperllm.config.model import (
    MAX_DIMENSION,
    MAX_LAYERS,
    ROPE_TYPES,
    GenerationDefaults,
    ModelConfig,
    RopeScaling,
)
from kuiperllm.config.sampling import SamplingParams
from kuiperllm.config.settings import Settings, settings

__all__ = [
    "DTYPES",
    "MAX_DIMENSION",
    "MAX_LAYERS",
    "QUANTS",
    "ROPE_TYPES",
    "EngineConfig",
    "GenerationDefaults",
    "ModelConfig",
    "RopeScaling",
    "SamplingParams",
    "Settings",
    "settings",
]
