"""What every front end of the engine has: a model, its tokenizer, and prompts that become requests."""

from __future__ import annotations

import operator
from collections.abc import Mapping
from collections.abc import Sequence as List
from dataclasses import fields
from numbers import Integral
from pathlib import Path
from typing import Any

from kuiperllm.config import EngineConfig, SamplingParams
from kuiperllm.core import Device
from kuiperllm.engine.core import Engine
from kuiperllm.engine.loading import LoadedModel, Progress, load_model
from kuiperllm.errors import ChatTemplateError, TokenizerError, UsageError

Prompt = str | List[int]
"""Text, or token ids."""


class LanguageModel:
    """A model in memory, and an engine that runs it.

    Args:
        model: a folder or file, a hub id such as `Qwen/Qwen2.5-0.5B-Instruct`, or None for the small model
            that comes with the package.
        tokenizer: a tokenizer file or folder, if not the model's own.
        progress: told of long work as (what, bytes done, bytes in all).
        reserve: see `Engine`.
        options: fields of `EngineConfig`: `device`, `dtype`, `quant`, `max_model_len`, `num_threads`, ...

    Raises:
        KuiperError: the model cannot be found, read, or held in memory; the message says what to do.
    """

    def __init__(
        self,
        model: str | Path | None,
        *,
        tokenizer: str | Path | None,
        progress: Progress | None,
        reserve: bool,
        options: Mapping[str, Any],
    ) -> None:
        known = [field.name for field in fields(EngineConfig)]
        for name in options:
            if name not in known:
                raise UsageError(
                    f"{type(self).__name__} has no option {name!r}; there are {', '.join(known)}"
                )
        self.engine_config = EngineConfig(**options)
        device = Device(self.engine_config.device)
        if self.engine_config.num_threads is not None:
            device.backend.set_num_threads(self.engine_config.num_threads)
        self.loaded: LoadedModel = load_model(
            model, self.engine_config, tokenizer=tokenizer, progress=progress
        )
        self.tokenizer = self.loaded.tokenizer
        self.config = self.loaded.config
        self.max_model_len = self.loaded.plan.max_model_len
        self._engine = Engine(self.loaded, self.engine_config, reserve=reserve)

    @property
    def default_params(self) -> SamplingParams:
        """What the checkpoint recommends, and otherwise the defaults of `SamplingParams`."""
        said = self.loaded.generation
        found = {
            "temperature": said.temperature,
            "top_k": said.top_k,
            "top_p": said.top_p,
            "repetition_penalty": said.repetition_penalty,
        }
        return SamplingParams(**{k: v for k, v in found.items() if v is not None})  # type: ignore[arg-type]

    def token_ids(self, prompt: Prompt) -> list[int]:
        """The tokens of a text, with those that the tokenizer adds; ids are checked and stay as they are.

        Raises:
            TokenizerError: the text cannot be encoded, or a token id is out of range.
        """
        ids = self.tokenizer.encode(prompt) if isinstance(prompt, str) else _as_ids(prompt)
        for token_id in ids:
            if not 0 <= token_id < self.config.vocab_size:
                raise TokenizerError(
                    f"token id {token_id} is outside the model's vocabulary of {self.config.vocab_size}"
                )
        return ids

    def apply_chat_template(
        self,
        messages: List[Mapping[str, Any]],
        *,
        tools: List[Mapping[str, Any]] | None = None,
        **template_options: Any,
    ) -> list[int]:
        """The token ids of a conversation, up to where the answer begins.

        Args:
            messages: `{"role": "user", "content": "..."}` and so on, as the model's template wants them.
            tools: descriptions of functions, for templates that know them.
            template_options: further variables of the template, such as `enable_thinking`.

        Raises:
            ChatTemplateError: the model has no chat template, or it refuses the messages.
        """
        template = self.loaded.chat_template
        if template is None:
            raise ChatTemplateError(
                f"{self.loaded.name} has no chat template: it is no chat model; use generate"
            )
        text = template.render(messages, tools=tools, **template_options)
        return self.tokenizer.encode(text, add_special_tokens=False, parse_special=True)


def as_list(prompts: Prompt | List[Prompt]) -> list[Prompt]:
    """One prompt or several, as a list of prompts."""
    if isinstance(prompts, str):
        return [prompts]
    items: list[Any] = list(prompts)
    return [items] if items and all(isinstance(item, Integral) for item in items) else items


def _as_ids(prompt: List[int]) -> list[int]:
    try:
        return [operator.index(token_id) for token_id in prompt]
    except TypeError:
        raise UsageError("a prompt is a text or a list of token ids, which are whole numbers") from None
