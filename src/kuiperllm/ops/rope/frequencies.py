"""How fast each pair of a head turns, and the table of cosines and sines that `rope` reads.

Without scaling, pair i of a head of d elements turns by theta**(-2i / d) per position. To reach beyond the
context that a model was trained on, its frequencies are lowered:

* `linear`: all by one factor (Chen et al. 2023, arXiv:2306.15595);
* `yarn`: only those that make few turns within the original context, with a ramp between `beta_fast` and
  `beta_slow` turns; cosines and sines are multiplied by an attention factor (Peng et al. 2023,
  arXiv:2309.00071);
* `llama3`: those with long wavelengths, with a smooth passage between `low_freq_factor` and
  `high_freq_factor` turns within the original context (Llama 3.1's model card).

The definitions agree with those of Hugging Face's transformers, whose config files these parameters are from.
"""

from __future__ import annotations

import math

import numpy as np
from numpy.typing import NDArray

from kuiperllm.config import RopeScaling
from kuiperllm.errors import ConfigError

Frequencies = NDArray[np.float64]


def inverse_frequencies(
    head_dim: int, theta: float, scaling: RopeScaling | None = None
) -> tuple[NDArray[np.float32], float]:
    """Radians per position of each pair, float32 [d / 2], and what cosines and sines are multiplied by.

    Args:
        head_dim: d, even.
        theta: the base, at least 1.
        scaling: how the frequencies are stretched (default: not at all).

    Raises:
        ConfigError: the scaling does not fit the head, or yarn is asked for without a base above 1.
    """
    frequencies, attention_factor = _scaled(head_dim, theta, scaling or RopeScaling())
    return frequencies.astype(np.float32), attention_factor


def frequency_divisors(head_dim: int, theta: float, scaling: RopeScaling) -> NDArray[np.float32]:
    """What a scaling without attention factor divides each pair's frequency by, float32 [d / 2].

    Raises:
        ConfigError: as `inverse_frequencies`.
    """
    if scaling.freq_factors is not None:
        return np.array(scaling.freq_factors, np.float32)
    plain, _ = _scaled(head_dim, theta, RopeScaling())
    scaled, _ = _scaled(head_dim, theta, scaling)
    return (plain / scaled).astype(np.float32)


def cos_sin_table(
    head_dim: int, theta: float, max_positions: int, scaling: RopeScaling | None = None
) -> NDArray[np.float32]:
    """Cosines and sines of all angles: float32 [max_positions, d], d / 2 cosines first, then d / 2 sines.

    Angles are computed in float64: in float32 an angle at position 100 000 would be off by up to 0.004.

    Raises:
        ConfigError: as `inverse_frequencies`.
    """
    frequencies, attention_factor = _scaled(head_dim, theta, scaling or RopeScaling())
    table = np.empty((max_positions, head_dim), np.float32)
    half = head_dim // 2
    for start in range(0, max_positions, 4096):  # a table of 128k positions needs no gigabytes beside it
        positions = np.arange(start, min(start + 4096, max_positions), dtype=np.float64)
        angles = np.outer(positions, frequencies)
        table[start : start + 4096, :half] = np.cos(angles) * attention_factor
        table[start : start + 4096, half:] = np.sin(angles) * attention_factor
    return table


def _scaled(head_dim: int, theta: float, scaling: RopeScaling) -> tuple[Frequencies, float]:
    plain: Frequencies = theta ** (-np.arange(0, head_dim, 2, dtype=np.float64) / head_dim)
    if scaling.rope_type == "linear":
        linear: Frequencies = plain / scaling.factor
        return linear, 1.0
    if scaling.rope_type == "llama3":
        return _llama3(plain, scaling), 1.0
    if scaling.rope_type == "yarn":
        return _yarn(plain, head_dim, theta, scaling)
    return plain, 1.0


def _llama3(plain: Frequencies, scaling: RopeScaling) -> Frequencies:
    if scaling.freq_factors is not None:
        if len(scaling.freq_factors) != len(plain):
            raise ConfigError(
                f"rope_scaling.freq_factors has {len(scaling.freq_factors)} divisors; a head of "
                f"{2 * len(plain)} elements needs {len(plain)}"
            )
        divided: Frequencies = plain / np.array(scaling.freq_factors)
        return divided
    turns = scaling.original_max_position_embeddings * plain / (2 * math.pi)
    smooth = (turns - scaling.low_freq_factor) / (scaling.high_freq_factor - scaling.low_freq_factor)
    smooth = np.clip(smooth, 0, 1)
    result: Frequencies = (1 - smooth) * plain / scaling.factor + smooth * plain
    return result


def _yarn(plain: Frequencies, head_dim: int, theta: float, scaling: RopeScaling) -> tuple[Frequencies, float]:
    if theta <= 1:
        raise ConfigError(f"rope_theta={theta}: yarn needs a base above 1")

    def pair_that_turns(turns: float) -> float:
        """The index of the pair that makes this many turns within the original context."""
        context = scaling.original_max_position_embeddings
        return head_dim * math.log(context / (turns * 2 * math.pi)) / (2 * math.log(theta))

    first = max(math.floor(pair_that_turns(scaling.beta_fast)), 0)
    last: float = min(math.ceil(pair_that_turns(scaling.beta_slow)), head_dim - 1)
    if first == last:
        last += 0.001
    ramp = np.clip((np.arange(len(plain)) - first) / (last - first), 0, 1)
    frequencies: Frequencies = plain / scaling.factor * ramp + plain * (1 - ramp)
    attention_factor = scaling.attention_factor
    if attention_factor is None:
        attention_factor = 0.1 * math.log(scaling.factor) + 1.0 if scaling.factor > 1 else 1.0
    return frequencies, attention_factor
