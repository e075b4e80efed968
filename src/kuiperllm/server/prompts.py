"""From conversations to token ids, by way of the model's chat template."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from kuiperllm.errors import ChatTemplateError
from kuiperllm.server.answers import TOOL_FORMATS, ThinkingState, ToolFormat, detect_tool_format
from kuiperllm.server.answers.reasoning import OPEN, state_after
from kuiperllm.server.config import ServerConfig
from kuiperllm.server.errors import bad_request
from kuiperllm.server.protocol.chat import AssistantMessage, Content, Message, Tool, ToolMessage
from kuiperllm.text import ChatTemplate, Tokenizer


@dataclass(frozen=True, slots=True)
class ChatPrompt:
    """A conversation, ready for the model."""

    ids: list[int]
    thinking: ThinkingState | None
    """Whether the prompt ends inside, before or behind reasoning; None if the model's answers have none."""


class ChatPrompts:
    """Turns conversations into prompts.

    Args:
        template: the model's; None if it has none.
        tokenizer: the model's.
        config: says how the model writes calls and reasoning.
    """

    def __init__(self, template: ChatTemplate | None, tokenizer: Tokenizer, config: ServerConfig) -> None:
        self.template = template
        self._tokenizer = tokenizer
        source = "" if template is None else template.source
        if config.tool_format == "auto":
            self.tool_format: ToolFormat | None = detect_tool_format(source)
        else:
            self.tool_format = TOOL_FORMATS.get(config.tool_format)
        thinks = OPEN in source or "enable_thinking" in source
        self._thinks = config.reasoning_format == "think" or (thinks and config.reasoning_format == "auto")

    def make(
        self,
        messages: Sequence[Message],
        tools: Sequence[Tool] | None = None,
        *,
        add_generation_prompt: bool = True,
        variables: dict[str, Any] | None = None,
    ) -> ChatPrompt:
        """The prompt for a conversation; takes a while, and belongs into a thread.

        Raises:
            ChatTemplateError: there is no template, or it refuses the messages or fails on them.
            ApiError: something in the messages is not as it must be.
        """
        if self.template is None:
            raise ChatTemplateError(
                "the model has no chat template: it is no chat model; use /v1/completions"
            )
        text = self.template.render(
            [_as_template_wants_it(message, index) for index, message in enumerate(messages)],
            tools=[tool.model_dump(exclude_none=True) for tool in tools] if tools else None,
            add_generation_prompt=add_generation_prompt,
            **_allowed(variables or {}),
        )
        ids = self._tokenizer.encode(text, add_special_tokens=False, parse_special=True)
        return ChatPrompt(ids, state_after(text) if self._thinks else None)


def _allowed(variables: dict[str, Any]) -> dict[str, Any]:
    for name in ("messages", "tools", "add_generation_prompt", "bos_token", "eos_token"):
        if name in variables:
            raise bad_request(f"chat_template_kwargs: {name} cannot be set there", "chat_template_kwargs")
    return variables


def _as_template_wants_it(message: Message, index: int) -> dict[str, Any]:
    """A message as templates expect it: text as one string, arguments as objects, no empty fields."""
    made: dict[str, Any] = {"role": "system" if message.role == "developer" else message.role}
    made["content"] = _text(message.content)
    if message.name is not None:
        made["name"] = message.name
    if isinstance(message, AssistantMessage):
        if message.reasoning_content is not None:
            made["reasoning_content"] = message.reasoning_content
        if message.tool_calls:
            made["tool_calls"] = _calls(message, index)
    if isinstance(message, ToolMessage) and message.tool_call_id is not None:
        made["tool_call_id"] = message.tool_call_id
    return made


def _calls(message: AssistantMessage, index: int) -> list[dict[str, Any]]:
    made = []
    for number, call in enumerate(message.tool_calls or ()):
        try:
            arguments = json.loads(call.function.arguments or "{}")
        except (ValueError, RecursionError):
            where = f"messages.{index}.tool_calls.{number}.function.arguments"
            raise bad_request(f"{where}: must be JSON", where) from None
        function = {"name": call.function.name, "arguments": arguments}
        made.append({"id": call.id, "type": "function", "function": function})
    return made


def _text(content: Content | None) -> str:
    if content is None or isinstance(content, str):
        return content or ""
    return "\n".join(part.text for part in content)
