"""Which tensor type each matrix of a GGUF file gets: the mixtures that people download by name.

Matrices differ in how much is lost by rounding them, so that most mixtures keep the output projection, the
value projection and the down projection of some layers in more bits. The choices are those of llama.cpp's
llama-quantize, so that a name means here what it means there.
"""

from __future__ import annotations

import re
from collections.abc import Callable
from dataclasses import dataclass

from kuiperllm.config import ModelConfig
from kuiperllm.errors import UsageError

_LAYER = re.compile(r"model\.layers\.(\d+)\.(?:self_attn|mlp)\.(\w+)_proj\.weight", re.ASCII)
_FALLBACK = {"Q2_K": "Q4_0", "Q3_K": "Q4_0", "Q4_K": "Q5_0", "Q5_K": "Q5_1", "Q6_K": "Q8_0"}
"""What stands in for types in blocks of 256 where these do not divide the rows."""


@dataclass(frozen=True, slots=True)
class Matrix:
    """Where in a network a matrix is."""

    part: str
    """q, k, v, o, gate, up or down; `embedding` or `output`."""
    layer: int
    layers: int
    heads_per_kv: int

    @property
    def more_bits(self) -> bool:
        """Whether mixtures of size M spend more on this layer: the first and last eighth, and every third."""
        eighth = self.layers // 8
        return self.layer < eighth or self.layer >= 7 * self.layers // 8 or (self.layer - eighth) % 3 == 2

    @property
    def is_70b(self) -> bool:
        """Whether this is a network of the shape of Llama 2 70B, whose value projections are small."""
        return self.layers == 80 and self.heads_per_kv > 1

    def before(self, share: int) -> bool:
        """Whether this is one of the first layers: less than one in `share`."""
        return self.layer < self.layers // share


Choice = Callable[[Matrix], str | None]
"""The type of a matrix; None for the mixture's usual one."""


@dataclass(frozen=True, slots=True)
class Mixture:
    """A way of quantizing a whole model."""

    number: int
    """`general.file_type`."""
    usual: str
    """The type of all matrices for which `choice` has none."""
    choice: Choice = lambda matrix: None


def _q2_k(matrix: Matrix) -> str | None:
    if matrix.part == "v":
        return "Q4_K" if matrix.heads_per_kv >= 4 else "Q3_K"
    return "Q3_K" if matrix.part in ("o", "down") else None


def _q3_k_m(matrix: Matrix) -> str | None:
    if matrix.part == "v":
        return "Q5_K" if matrix.layer < 2 else "Q4_K"
    if matrix.part == "down":
        return "Q5_K" if matrix.before(16) else "Q4_K"
    return "Q4_K" if matrix.part == "o" else None


def _q3_k_l(matrix: Matrix) -> str | None:
    return "Q5_K" if matrix.part in ("v", "o", "down") else None


def _q4_k_s(matrix: Matrix) -> str | None:
    if (matrix.part == "v" and matrix.layer < 4) or (matrix.part == "down" and matrix.before(8)):
        return "Q5_K"
    return None


def _medium(matrix: Matrix) -> str | None:
    return "Q6_K" if matrix.part in ("v", "down") and matrix.more_bits else None


MIXTURES = {
    "q8_0": Mixture(7, "Q8_0"),
    "q4_0": Mixture(2, "Q4_0"),
    "q4_1": Mixture(3, "Q4_1"),
    "q5_0": Mixture(8, "Q5_0"),
    "q5_1": Mixture(9, "Q5_1"),
    "q2_k": Mixture(10, "Q2_K", _q2_k),
    "q3_k_s": Mixture(11, "Q3_K"),
    "q3_k_m": Mixture(12, "Q3_K", _q3_k_m),
    "q3_k_l": Mixture(13, "Q3_K", _q3_k_l),
    "q4_k_s": Mixture(14, "Q4_K", _q4_k_s),
    "q4_k_m": Mixture(15, "Q4_K", _medium),
    "q5_k_s": Mixture(16, "Q5_K"),
    "q5_k_m": Mixture(17, "Q5_K", _medium),
    "q6_k": Mixture(18, "Q6_K"),
}
"""By the name that `--quant` takes."""
_FLOAT_FILES = {"F32": 0, "F16": 1, "BF16": 32}


def tensor_type(mixture: Mixture, name: str, shape: tuple[int, ...], config: ModelConfig) -> str | None:
    """ggml's name for the type of a matrix; None where no type has blocks that divide its rows."""
    part, layer = _place(name, tied=config.tie_word_embeddings)
    matrix = Matrix(
        part, layer, config.num_hidden_layers, config.num_attention_heads // config.num_key_value_heads
    )
    kind = mixture.usual
    if part == "output":
        kind = kind if kind == "Q8_0" else "Q6_K"
    elif (chosen := mixture.choice(matrix)) is not None:
        kind = chosen
    if part == "v" and matrix.is_70b and kind in ("Q3_K", "Q4_K"):
        kind = "Q5_K"
    if kind in _FALLBACK and shape[1] % 256:
        kind = _FALLBACK[kind]
    return kind if shape[1] % 32 == 0 else None


def _place(name: str, *, tied: bool) -> tuple[str, int]:
    """Part and layer. A tied embedding is the output projection."""
    if (match := _LAYER.fullmatch(name)) is not None:
        return match[2], int(match[1])
    return ("output" if name.startswith("lm_head.") or tied else "embedding"), 0


def find_mixture(name: str) -> Mixture:
    """The mixture that `--quant` names.

    Raises:
        UsageError: there is none.
    """
    mixture = MIXTURES.get({"q8": "q8_0", "q4": "q4_0"}.get(name, name))
    if mixture is None:
        raise UsageError(
            f"quant {name!r} is unknown in GGUF; choose none, keep, q8, q4 or {', '.join(MIXTURES)}"
        )
    return mixture


def file_type_of(type_name: str) -> int:
    """`general.file_type` of a file most of whose weights are of this type."""
    if type_name in _FLOAT_FILES:
        return _FLOAT_FILES[type_name]
    return next(mixture.number for mixture in MIXTURES.values() if mixture.usual == type_name)
