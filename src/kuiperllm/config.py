"""What a user or a checkpoint may set, read once into frozen dataclasses.

`ModelConfig` is the shape of a network in Hugging Face's names, `EngineConfig` says how to run it,
`SamplingParams` how to choose tokens, and `Settings` holds the `KUIPER_*` environment variables, which no
other module reads.
"""

from __future__ import annotations

import os
import sys
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field, fields, replace
from functools import lru_cache
from numbers import Integral, Real
from pathlib import Path
from reprlib import repr as brief
from typing import Any, Literal

from kuiperllm.errors import ConfigError, SamplingError, UnsupportedError, UsageError

# Bounds on what a config.json may ask for: far above any real model, low enough that no product of two of
# them overflows or makes a loop endless.
MAX_LAYERS = 4096
MAX_DIMENSION = 1 << 24
MAX_NUMBER = 1e300

ROPE_TYPES = ("default", "linear", "llama3", "yarn")


# --- the environment --------------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class Settings:
    """The `KUIPER_*` environment variables."""

    cache_dir: Path
    """KUIPER_CACHE_DIR: where compiled kernels are kept (default: kuiperllm in the user's cache folder)."""
    cpu_level: str | None
    """KUIPER_CPU_LEVEL: use kernels of at most this level (generic, avx2, avx512, amx)."""
    num_threads: int | None
    """KUIPER_NUM_THREADS: threads of the CPU back end (default: the physical cores it may use)."""


@lru_cache(maxsize=1)
def settings() -> Settings:
    """Read the environment; once per process (`settings.cache_clear()` makes it read again)."""
    env = os.environ
    if (cache := env.get("KUIPER_CACHE_DIR")) is not None:
        cache_dir = Path(cache).expanduser()
    elif sys.platform == "darwin":
        cache_dir = Path.home() / "Library" / "Caches" / "kuiperllm"
    else:
        cache_dir = Path(env.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "kuiperllm"
    threads = env.get("KUIPER_NUM_THREADS")
    if threads is not None and not (threads.isdecimal() and int(threads) > 0):
        raise UsageError(f"KUIPER_NUM_THREADS={threads!r}: set it to a whole number above 0")
    return Settings(
        cache_dir=cache_dir,
        cpu_level=env.get("KUIPER_CPU_LEVEL") or None,
        num_threads=int(threads) if threads else None,
    )


# --- the model --------------------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class RopeScaling:
    """How rotary frequencies are stretched for long contexts; field names as in Hugging Face configs.

    `linear`: Chen et al. 2023 (position interpolation); `llama3`: the smooth-factor rule of Llama 3.1;
    `yarn`: Peng et al. 2023. Fields that a type does not use keep their defaults.
    """

    rope_type: Literal["default", "linear", "llama3", "yarn"] = "default"
    factor: float = 1.0
    original_max_position_embeddings: int = 0
    low_freq_factor: float = 1.0
    high_freq_factor: float = 4.0
    beta_fast: float = 32.0
    beta_slow: float = 1.0
    attention_factor: float | None = None
    freq_factors: tuple[float, ...] | None = None
    """Only with `llama3`: head_dim / 2 divisors, one per frequency, that replace the rule and its factors.
    GGUF files hold the result of the rule (tensor `rope_freqs.weight`) and not its parameters."""

    @classmethod
    def from_hf(cls, raw: object, *, max_position_embeddings: int, where: str) -> RopeScaling:
        """Read a `rope_scaling` (or `rope_parameters`) object.

        Raises:
            ConfigError: a field is missing or out of range.
            UnsupportedError: the scaling type is not one of `ROPE_TYPES`.
        """
        if raw is None:
            return cls()
        if not isinstance(raw, Mapping):
            raise ConfigError(f"{where}: rope_scaling must be an object, not {brief(raw)}")
        kind = raw.get("rope_type", raw.get("type", "default"))
        if kind not in ROPE_TYPES:
            raise UnsupportedError(
                f"{where}: rope scaling {brief(kind)} is not supported; supported: {', '.join(ROPE_TYPES)}"
            )
        if kind == "default":
            return cls()
        read = _Reader(raw, f"{where}: rope_scaling")
        factor = read.number("factor", low=1.0)
        original = read.integer("original_max_position_embeddings", default=max_position_embeddings, low=1)
        attention_factor = raw.get("attention_factor")
        scaling = cls(
            rope_type=kind,
            factor=factor,
            original_max_position_embeddings=original,
            low_freq_factor=read.number("low_freq_factor", default=1.0, low=1e-6),
            high_freq_factor=read.number("high_freq_factor", default=4.0, low=1e-6),
            beta_fast=read.number("beta_fast", default=32.0, low=1e-6),
            beta_slow=read.number("beta_slow", default=1.0, low=1e-6),
            attention_factor=None if attention_factor is None else read.number("attention_factor", low=0.0),
            freq_factors=read.divisors("freq_factors"),
        )
        if kind == "llama3" and scaling.high_freq_factor <= scaling.low_freq_factor:
            raise ConfigError(f"{where}: rope_scaling.high_freq_factor must be above low_freq_factor")
        return scaling


@dataclass(frozen=True, slots=True)
class ModelConfig:
    """The shape of a decoder, in Hugging Face's names. Every loader translates to this."""

    model_type: str
    vocab_size: int
    hidden_size: int
    intermediate_size: int
    num_hidden_layers: int
    num_attention_heads: int
    num_key_value_heads: int
    head_dim: int
    max_position_embeddings: int
    rms_norm_eps: float = 1e-6
    rope_theta: float = 10000.0
    rope_scaling: RopeScaling = RopeScaling()
    tie_word_embeddings: bool = False
    attention_bias: bool | None = None
    """None: the config does not say, the model family decides (Qwen2 has biases on q, k and v)."""
    mlp_bias: bool = False
    bos_token_id: int | None = None
    eos_token_ids: tuple[int, ...] = ()
    dtype: str | None = None
    """The data type that the checkpoint says it was saved in, or None."""

    @property
    def q_size(self) -> int:
        """Columns of the query projection: heads times head_dim."""
        return self.num_attention_heads * self.head_dim

    @property
    def kv_size(self) -> int:
        """Columns of the key (or value) projection."""
        return self.num_key_value_heads * self.head_dim

    @classmethod
    def from_hf(cls, raw: object, *, where: str = "config.json") -> ModelConfig:
        """Read the contents of a Hugging Face `config.json`. `where` names the file in messages.

        Raises:
            ConfigError: a field is missing, of the wrong type, or contradicts another.
            UnsupportedError: the network needs something that is not implemented.
        """
        if not isinstance(raw, Mapping):
            raise ConfigError(f"{where}: must hold a JSON object")
        read = _Reader(raw, where)
        model_type = raw.get("model_type")
        if not isinstance(model_type, str) or not model_type:
            raise ConfigError(f"{where}: model_type is missing")
        if (act := raw.get("hidden_act", "silu")) not in ("silu", "swish"):
            raise UnsupportedError(f"{where}: hidden_act {brief(act)} is not supported; supported: silu")
        if raw.get("use_sliding_window"):
            raise UnsupportedError(f"{where}: use_sliding_window=true is not supported; full attention is")
        if (pretraining_tp := raw.get("pretraining_tp", 1)) not in (0, 1, None):
            raise UnsupportedError(
                f"{where}: pretraining_tp={brief(pretraining_tp)} is not supported; only 1 is"
            )
        hidden_size = read.integer("hidden_size", low=1, high=MAX_DIMENSION)
        heads = read.integer("num_attention_heads", low=1, high=65536)
        max_positions = read.integer("max_position_embeddings", default=2048, low=1, high=1 << 30)
        # transformers 5 writes rope_parameters {rope_type, rope_theta, ...}, before: rope_theta, rope_scaling
        rope = raw.get("rope_parameters") or raw.get("rope_scaling")
        theta_from = rope if isinstance(rope, Mapping) and "rope_theta" in rope else raw
        config = cls(
            model_type=model_type,
            vocab_size=read.integer("vocab_size", low=1, high=MAX_DIMENSION),
            hidden_size=hidden_size,
            intermediate_size=read.integer("intermediate_size", low=1, high=MAX_DIMENSION),
            num_hidden_layers=read.integer("num_hidden_layers", low=1, high=MAX_LAYERS),
            num_attention_heads=heads,
            num_key_value_heads=read.integer("num_key_value_heads", default=heads, low=1, high=heads),
            head_dim=read.integer("head_dim", default=max(1, hidden_size // heads), low=1, high=65536),
            max_position_embeddings=max_positions,
            rms_norm_eps=read.number("rms_norm_eps", default=1e-6, low=0.0),
            rope_theta=_Reader(theta_from, where).number("rope_theta", default=10000.0, low=1.0),
            rope_scaling=RopeScaling.from_hf(rope, max_position_embeddings=max_positions, where=where),
            tie_word_embeddings=read.boolean("tie_word_embeddings", default=False),
            attention_bias=None if raw.get("attention_bias") is None else read.boolean("attention_bias"),
            mlp_bias=read.boolean("mlp_bias", default=False),
            bos_token_id=_first(read.token_ids("bos_token_id")),
            eos_token_ids=read.token_ids("eos_token_id"),
            dtype=_dtype_name(raw.get("dtype") or raw.get("torch_dtype")),
        )
        config.check(where)
        return config

    def check(self, where: str) -> None:
        """Raise `ConfigError` if the fields contradict each other."""
        if self.num_attention_heads % self.num_key_value_heads:
            raise ConfigError(
                f"{where}: num_attention_heads={self.num_attention_heads} is not a multiple of "
                f"num_key_value_heads={self.num_key_value_heads}"
            )
        if self.head_dim % 2:
            raise ConfigError(f"{where}: head_dim={self.head_dim} is odd; rotary embedding needs pairs")

    def to_hf(self) -> dict[str, Any]:
        """The contents of a Hugging Face `config.json` that `from_hf` reads back equal."""
        raw: dict[str, Any] = {
            f.name: getattr(self, f.name)
            for f in fields(self)
            if f.name not in ("rope_scaling", "eos_token_ids", "dtype", "attention_bias", "bos_token_id")
        }
        raw["hidden_act"] = "silu"
        if self.attention_bias is not None:
            raw["attention_bias"] = self.attention_bias
        if self.bos_token_id is not None:
            raw["bos_token_id"] = self.bos_token_id
        if self.eos_token_ids:
            raw["eos_token_id"] = list(self.eos_token_ids)
        if self.dtype is not None:
            raw["torch_dtype"] = self.dtype
        if self.rope_scaling.rope_type != "default":
            scaling = {f.name: getattr(self.rope_scaling, f.name) for f in fields(self.rope_scaling)}
            raw["rope_scaling"] = {k: v for k, v in scaling.items() if v is not None}
        return raw


class _Reader:
    """Typed access to a JSON object, with errors that name the file and the field."""

    def __init__(self, raw: Mapping[str, Any], where: str) -> None:
        self.raw = raw
        self.where = where

    def integer(self, name: str, *, default: int | None = None, low: int, high: int = 1 << 62) -> int:
        value = self.raw.get(name)
        if value is None:
            if default is None:
                raise ConfigError(f"{self.where}: {name} is missing")
            return default
        fraction = isinstance(value, float) and not value.is_integer()  # infinity and NaN are fractions here
        if isinstance(value, bool) or not isinstance(value, int | float) or fraction:
            raise ConfigError(f"{self.where}: {name} must be a whole number, not {brief(value)}")
        if not low <= value <= high:
            raise ConfigError(f"{self.where}: {name}={brief(value)} is outside {low} to {high}")
        return int(value)

    def number(self, name: str, *, default: float | None = None, low: float) -> float:
        value = self.raw.get(name)
        if value is None:
            if default is None:
                raise ConfigError(f"{self.where}: {name} is missing")
            return default
        known = isinstance(value, int | float) and not isinstance(value, bool)
        if not known or not -MAX_NUMBER <= value <= MAX_NUMBER:  # also refuses NaN
            raise ConfigError(f"{self.where}: {name} must be a finite number, not {brief(value)}")
        if value < low:
            raise ConfigError(f"{self.where}: {name}={value} is below {low}")
        return float(value)

    def boolean(self, name: str, *, default: bool | None = None) -> bool:
        value = self.raw.get(name, default)
        if not isinstance(value, bool):
            raise ConfigError(f"{self.where}: {name} must be true or false, not {brief(value)}")
        return value

    def divisors(self, name: str) -> tuple[float, ...] | None:
        value = self.raw.get(name)
        if value is None:
            return None
        if not isinstance(value, list | tuple) or not all(
            isinstance(v, int | float) and 0 < v <= MAX_NUMBER for v in value
        ):
            raise ConfigError(f"{self.where}: {name} must be a list of numbers above 0, not {brief(value)}")
        return tuple(float(v) for v in value)

    def token_ids(self, name: str) -> tuple[int, ...]:
        value = self.raw.get(name)
        ids = [] if value is None else value if isinstance(value, list) else [value]
        if not all(isinstance(i, int) and not isinstance(i, bool) for i in ids):
            raise ConfigError(
                f"{self.where}: {name} must be a token id or a list of them, not {brief(value)}"
            )
        return tuple(i for i in ids if i >= 0)


def _first(ids: Sequence[int]) -> int | None:
    return ids[0] if ids else None


def _dtype_name(value: object) -> str | None:
    return value.removeprefix("torch.") if isinstance(value, str) else None


# --- running ----------------------------------------------------------------------------------------------

DTYPES = ("auto", "float32", "float16", "bfloat16")
QUANTS = ("none", "q8")

_PENALTIES = ("repetition_penalty", "presence_penalty", "frequency_penalty")


def _is_whole(value: object) -> bool:
    return isinstance(value, Integral) and not isinstance(value, bool)


@dataclass(frozen=True, slots=True)
class EngineConfig:
    """How a model is run.

    Raises:
        UsageError: a value is unknown or out of range.
    """

    device: str = "auto"
    """`auto`, `cpu` or `cuda:N`."""
    dtype: str = "auto"
    """Data type that weights are kept in; `auto` keeps the checkpoint's. One of `DTYPES`."""
    quant: str | None = None
    """Quantize linear layers while loading: `q8`, or None to keep what the checkpoint holds."""
    group_size: int = 64
    """Weights that share a scale when `quant` is set, along the input dimension."""
    max_model_len: int | None = None
    """Longest prompt plus output, in tokens; None: what the model was made for."""
    max_num_seqs: int = 8
    """Most prompts that are worked on at once."""
    max_num_batched_tokens: int = 512
    """Most tokens of a prompt that one pass takes in."""
    block_size: int = 32
    """Tokens in a block of the key/value cache; a multiple of 16."""
    kv_cache_dtype: str = "auto"
    """Data type of keys and values; `auto`: the weights', float16 for quantized ones. One of `DTYPES`."""
    num_threads: int | None = None
    """Threads of the CPU back end; None: `KUIPER_NUM_THREADS`, else the physical cores."""

    def __post_init__(self) -> None:
        for name in ("max_model_len", "max_num_seqs", "max_num_batched_tokens", "block_size", "num_threads"):
            value = getattr(self, name)
            if not _is_whole(value) and not (value is None and name in ("max_model_len", "num_threads")):
                raise UsageError(f"{name} must be a whole number, not {value!r}")
        if self.dtype not in DTYPES:
            raise UsageError(f"dtype {self.dtype!r} is unknown; choose one of {', '.join(DTYPES)}")
        if self.quant is not None and self.quant not in QUANTS:
            raise UsageError(f"quant {self.quant!r} is unknown; choose one of {', '.join(QUANTS)}")
        if self.group_size not in (32, 64, 128):
            raise UsageError(f"group_size {self.group_size} is not possible; choose 32, 64 or 128")
        if self.max_model_len is not None and self.max_model_len < 1:
            raise UsageError(f"max_model_len must be at least 1, not {self.max_model_len}")
        if self.kv_cache_dtype not in DTYPES:
            raise UsageError(
                f"kv_cache_dtype {self.kv_cache_dtype!r} is unknown; choose one of {', '.join(DTYPES)}"
            )
        if self.max_num_seqs < 1 or self.max_num_batched_tokens < 1:
            raise UsageError("max_num_seqs and max_num_batched_tokens must be at least 1")
        if self.block_size < 16 or self.block_size % 16:
            raise UsageError(f"block_size must be a multiple of 16, not {self.block_size}")
        if self.num_threads is not None and not 1 <= self.num_threads <= 1024:
            raise UsageError(f"threads must be 1 to 1024, not {self.num_threads}")


@dataclass(frozen=True, slots=True)
class SamplingParams:
    """How tokens are chosen and when to stop; names and meanings as in vLLM and the OpenAI API.

    The order of the steps is: penalties, temperature, top-k, top-p, min-p, then a draw. A temperature of 0
    takes the most likely token.

    Raises:
        SamplingError: a value is outside its range.
    """

    temperature: float = 1.0
    top_k: int = 0
    """Keep the k most likely tokens; 0 keeps all."""
    top_p: float = 1.0
    """Keep the smallest set of most likely tokens whose probabilities sum to at least this."""
    min_p: float = 0.0
    """Drop tokens less likely than this fraction of the most likely one."""
    repetition_penalty: float = 1.0
    """Divide positive (multiply negative) logits of tokens seen in prompt or output by this."""
    presence_penalty: float = 0.0
    """Subtract from the logits of tokens that were generated."""
    frequency_penalty: float = 0.0
    """Subtract this times the number of times that the token was generated."""
    seed: int | None = None
    """The same seed, prompt and parameters give the same text; None draws a seed."""
    max_tokens: int | None = None
    """Most tokens to generate; None: until the model stops or the context is full."""
    min_tokens: int = 0
    """End-of-text and stop tokens are suppressed before this many."""
    stop: tuple[str, ...] | str = ()
    """Texts that end the output; they are not part of it."""
    stop_token_ids: tuple[int, ...] = ()
    """Token ids that end the output, besides the model's own end-of-text ids."""
    ignore_eos: bool = False
    """Go on after the model's end-of-text token."""
    logprobs: int | None = None
    """Report the log probability of each token and of this many most likely ones."""
    skip_special_tokens: bool = True
    """Leave special tokens out of the text."""

    def __post_init__(self) -> None:
        if isinstance(self.stop, str):
            object.__setattr__(self, "stop", (self.stop,))
        for name in ("stop", "stop_token_ids"):
            self._require(name, isinstance(getattr(self, name), Iterable), "a list")
            object.__setattr__(self, name, tuple(getattr(self, name)))
        for name in ("temperature", "top_p", "min_p", *_PENALTIES):
            self._require(name, isinstance(getattr(self, name), Real), "a number")
        for name in ("top_k", "min_tokens", "seed", "max_tokens", "logprobs"):
            value = getattr(self, name)
            may_be_none = name in ("seed", "max_tokens", "logprobs")
            self._require(name, _is_whole(value) or (may_be_none and value is None), "a whole number")
        self._require("temperature", 0.0 <= self.temperature <= 100.0, "0 to 100")
        self._require("top_k", self.top_k >= 0, "0 (all) or above")
        self._require("top_p", 0.0 < self.top_p <= 1.0, "above 0, up to 1")
        self._require("min_p", 0.0 <= self.min_p <= 1.0, "0 to 1")
        self._require("repetition_penalty", 0.0 < self.repetition_penalty <= 100.0, "above 0, up to 100")
        self._require("presence_penalty", -2.0 <= self.presence_penalty <= 2.0, "-2 to 2")
        self._require("frequency_penalty", -2.0 <= self.frequency_penalty <= 2.0, "-2 to 2")
        self._require("seed", self.seed is None or 0 <= self.seed < 1 << 64, "0 to 2**64 - 1")
        self._require("max_tokens", self.max_tokens is None or self.max_tokens >= 1, "at least 1")
        self._require("min_tokens", self.min_tokens >= 0, "0 or above")
        self._require("logprobs", self.logprobs is None or 0 <= self.logprobs <= 100, "0 to 100")
        self._require("stop", all(isinstance(s, str) and s for s in self.stop), "non-empty strings")
        self._require(
            "stop_token_ids", all(_is_whole(i) and i >= 0 for i in self.stop_token_ids), "token ids"
        )
        if self.max_tokens is not None and self.min_tokens > self.max_tokens:
            raise SamplingError(f"min_tokens={self.min_tokens} is above max_tokens={self.max_tokens}")

    def _require(self, name: str, condition: bool, allowed: str) -> None:
        if not condition:  # also refuses NaN, which fails every comparison
            raise SamplingError(f"{name}={getattr(self, name)!r} is not possible; allowed: {allowed}")

    @property
    def greedy(self) -> bool:
        """Whether the most likely token is always taken."""
        return self.temperature == 0.0

    def with_defaults(self, **changes: Any) -> SamplingParams:
        """A copy with some fields replaced."""
        return replace(self, **changes)


@dataclass(frozen=True, slots=True)
class GenerationDefaults:
    """What a checkpoint's `generation_config.json` recommends; None where it says nothing."""

    temperature: float | None = None
    top_k: int | None = None
    top_p: float | None = None
    repetition_penalty: float | None = None
    eos_token_ids: tuple[int, ...] = field(default=())

    @classmethod
    def from_hf(cls, raw: object, *, where: str = "generation_config.json") -> GenerationDefaults:
        """Read the contents of a `generation_config.json`.

        Raises:
            ConfigError: a field has the wrong type.
        """
        if not isinstance(raw, Mapping):
            raise ConfigError(f"{where}: must hold a JSON object")
        read = _Reader(raw, where)

        def optional(name: str) -> float | None:
            return None if raw.get(name) is None else read.number(name, low=0.0)

        top_k = optional("top_k")
        return cls(
            temperature=0.0 if raw.get("do_sample") is False else optional("temperature"),
            top_k=None if top_k is None else int(top_k),
            top_p=optional("top_p"),
            repetition_penalty=optional("repetition_penalty"),
            eos_token_ids=read.token_ids("eos_token_id"),
        )
