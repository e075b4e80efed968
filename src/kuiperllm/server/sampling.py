"""From a request's fields to `SamplingParams`."""

from __future__ import annotations

from typing import Any

from kuiperllm.config import SamplingParams
from kuiperllm.server.errors import bad_request
from kuiperllm.server.protocol.common import SamplingFields

_SAME = (
    "temperature",
    "top_p",
    "min_p",
    "repetition_penalty",
    "presence_penalty",
    "frequency_penalty",
    "stop",
    "stop_token_ids",
    "min_tokens",
    "ignore_eos",
    "skip_special_tokens",
    "n",
)


def sampling_params(
    request: SamplingFields, defaults: SamplingParams, vocab_size: int, **more: Any
) -> SamplingParams:
    """What a request says, over the model's defaults.

    Args:
        request: the request.
        defaults: for what it does not say.
        vocab_size: every token id is below this.
        more: further fields of `SamplingParams`; None: as in the defaults.

    Raises:
        SamplingError: two values contradict each other.
        ApiError: there is no such token.
    """
    given = {name: getattr(request, name) for name in _SAME} | more
    if request.top_k is not None:
        given["top_k"] = max(0, request.top_k)
    if request.seed is not None:
        given["seed"] = request.seed % (1 << 64)
    if request.logit_bias is not None:
        biases = {int(token): bias for token, bias in request.logit_bias.items()}
        if max(biases, default=0) >= vocab_size:
            raise bad_request(f"logit_bias: there is no token {max(biases)}", "logit_bias")
        given["logit_bias"] = biases
    return defaults.with_changes(**{name: value for name, value in given.items() if value is not None})
