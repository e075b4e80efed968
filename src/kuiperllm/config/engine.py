"""How a model is run."""

from __future__ import annotations

from dataclasses import dataclass
from numbers import Integral

from kuiperllm.errors import UsageError

DTYPES = ("auto", "float32", "float16", "bfloat16")
QUANTS = ("none", "q8", "q4")


_COUNTS = ("max_model_len", "max_num_seqs", "max_num_batched_tokens", "kv_cache_tokens")


def is_whole(value: object) -> bool:
    """Whether a value is an integer; True and False are not."""
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
    """Quantize linear layers while loading: `q8`, `q4`, or None to keep what the checkpoint holds."""
    group_size: int = 64
    """Weights that share a scale when `quant` is set, along the input dimension."""
    max_model_len: int | None = None
    """Longest prompt plus output, in tokens; None: what the model was made for."""
    max_num_seqs: int | None = None
    """Most outputs that are worked on at once; None: 8 on a CPU, 256 on a GPU."""
    max_num_batched_tokens: int | None = None
    """Most tokens that one pass takes in; None: 512 on a CPU, 2048 or 8192 on a GPU."""
    block_size: int = 32
    """Tokens in a block of the key/value cache; a multiple of 16."""
    kv_cache_tokens: int | None = None
    """Tokens that the key/value cache holds; None: as many as are needed, as far as memory goes."""
    kv_cache_dtype: str = "auto"
    """Data type of keys and values; `auto`: the weights', float16 for quantized ones. One of `DTYPES`."""
    prefix_caching: bool = True
    """Keep keys and values of finished sequences for prompts that begin in the same way."""
    num_threads: int | None = None
    """Threads of the CPU back end; None: `KUIPER_NUM_THREADS`, else the physical cores."""

    @property
    def quantizes(self) -> bool:
        """Whether weights are quantized while they are loaded."""
        return self.quant not in (None, "none")

    def __post_init__(self) -> None:
        for name in (*_COUNTS, "block_size", "num_threads"):
            value = getattr(self, name)
            if not is_whole(value) and not (value is None and name != "block_size"):
                raise UsageError(f"{name} must be a whole number, not {value!r}")
            if name in _COUNTS and value is not None and value < 1:
                raise UsageError(f"{name} must be at least 1, not {value}")
        if self.dtype not in DTYPES:
            raise UsageError(f"dtype {self.dtype!r} is unknown; choose one of {', '.join(DTYPES)}")
        if self.quant is not None and self.quant not in QUANTS:
            raise UsageError(f"quant {self.quant!r} is unknown; choose one of {', '.join(QUANTS)}")
        if self.group_size not in (32, 64, 128):
            raise UsageError(f"group_size {self.group_size} is not possible; choose 32, 64 or 128")
        if self.kv_cache_dtype not in DTYPES:
            raise UsageError(
                f"kv_cache_dtype {self.kv_cache_dtype!r} is unknown; choose one of {', '.join(DTYPES)}"
            )
        if self.block_size < 16 or self.block_size % 16:
            raise UsageError(f"block_size must be a multiple of 16, not {self.block_size}")
        cached, longest = self.kv_cache_tokens, self.max_model_len
        if cached is not None and longest is not None and cached < longest:
            raise UsageError(f"kv_cache_tokens={cached} has no room for max_model_len={longest}")
        if self.num_threads is not None and not 1 <= self.num_threads <= 1024:
            raise UsageError(f"threads must be 1 to 1024, not {self.num_threads}")
