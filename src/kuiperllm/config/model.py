"""The shape of a network, in the names of Hugging Face configs."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, fields
from reprlib import repr as brief
from typing import Any, Literal

from kuiperllm.config.reader import FieldReader
from kuiperllm.errors import ConfigError, UnsupportedError

# Bounds on what a config.json may ask for: far above any real model, low enough that no product of two of
# them overflows or makes a loop endless.
MAX_LAYERS = 4096
MAX_DIMENSION = 1 << 24

ROPE_TYPES = ("default", "linear", "llama3", "yarn")


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
        read = FieldReader(raw, f"{where}: rope_scaling")
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
        read = FieldReader(raw, where)
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
            rope_theta=FieldReader(theta_from, where).number("rope_theta", default=10000.0, low=1.0),
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


def _first(ids: Sequence[int]) -> int | None:
    return ids[0] if ids else None


def _dtype_name(value: object) -> str | None:
    return value.removeprefix("torch.") if isinstance(value, str) else None


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
        read = FieldReader(raw, where)

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
