"""What a chat completion answers: whole, or as a stream of chunks."""

from __future__ import annotations

import secrets
from collections.abc import AsyncGenerator, Iterable
from dataclasses import dataclass
from typing import Any

from kuiperllm.engine.output import Completion, Delta
from kuiperllm.server.answers import (
    AnswerParser,
    Arguments,
    Call,
    Content,
    Piece,
    Reasoning,
    Thinking,
    ThinkingState,
    ToolFormat,
)
from kuiperllm.server.answers.counting import reasoning_tokens
from kuiperllm.server.generation import Generation
from kuiperllm.server.logprobs import chat_logprobs
from kuiperllm.server.protocol.common import StreamOptions
from kuiperllm.server.routes.common import usage, usage_of
from kuiperllm.server.streaming import DONE, event
from kuiperllm.text import Tokenizer


@dataclass(frozen=True, slots=True)
class AnswerForm:
    """What an answer may be made of."""

    tokenizer: Tokenizer
    thinking: ThinkingState | None
    tool_format: ToolFormat | None = None
    """How calls are written, if there are functions to call."""
    names: frozenset[str] = frozenset()
    parallel: bool = True
    """Whether there may be more than one call."""
    function_was_named: bool = False
    """Whether the request says which function to call."""

    def parser(self) -> AnswerParser:
        """Takes one answer apart."""
        calls = None if self.tool_format is None else self.tool_format.parser(self.names)
        return AnswerParser(None if self.thinking is None else Thinking(self.thinking), calls)

    def pieces(self, found: Iterable[Piece]) -> list[Piece]:
        """Those that are wanted: without `parallel`, only the first call."""
        if self.parallel:
            return list(found)
        return [piece for piece in found if not (isinstance(piece, Call | Arguments) and piece.index)]

    def finish_reason(self, completion: Completion, *, has_calls: bool) -> str:
        """Why an answer ended."""
        if has_calls and completion.finish_reason == "stop" and not self.function_was_named:
            return "tool_calls"
        return completion.finish_reason

    def reasoning(self, completions: Iterable[Completion]) -> int | None:
        """Tokens of reasoning in some outputs; None if there is no such thing."""
        if self.thinking is None:
            return None
        return sum(reasoning_tokens(self.tokenizer, one.token_ids, self.thinking) for one in completions)


# --- whole ------------------------------------------------------------------------------------------------


def whole_answer(head: dict[str, Any], form: AnswerForm, completions: list[Completion]) -> dict[str, Any]:
    """The answer to a request that does not stream."""
    choices = [_choice(form, completion) for completion in completions]
    return head | {"choices": choices, "usage": usage_of([completions], form.reasoning(completions))}


def _choice(form: AnswerForm, completion: Completion) -> dict[str, Any]:
    parser = form.parser()
    pieces = form.pieces(parser.push(completion.text) + parser.finish())
    text = "".join(piece.text for piece in pieces if isinstance(piece, Content))
    thought = "".join(piece.text for piece in pieces if isinstance(piece, Reasoning))
    calls = [piece for piece in pieces if isinstance(piece, Call)]
    message: dict[str, Any] = {"role": "assistant", "content": text or (None if calls or thought else "")}
    if form.thinking is not None:
        message["reasoning_content"] = thought or None
    message["refusal"] = None
    if calls:
        message["tool_calls"] = [_whole_call(call, pieces) for call in calls]
    return {
        "index": completion.index,
        "message": message,
        "logprobs": _logprobs(form, completion.logprobs),
        "finish_reason": form.finish_reason(completion, has_calls=bool(calls)),
        "stop_reason": completion.stop_reason,
    }


def _whole_call(call: Call, pieces: list[Piece]) -> dict[str, Any]:
    parts = (p.text for p in pieces if isinstance(p, Arguments) and p.index == call.index)
    return {
        "id": _new_call_id(),
        "type": "function",
        "function": {"name": call.name, "arguments": "".join(parts)},
    }


def _logprobs(form: AnswerForm, entries: Any) -> dict[str, Any] | None:
    return None if entries is None else chat_logprobs(entries, form.tokenizer)


def _new_call_id() -> str:
    return f"call_{secrets.token_hex(12)}"


# --- streamed ---------------------------------------------------------------------------------------------


async def answer_events(
    head: dict[str, Any], form: AnswerForm, generation: Generation, options: StreamOptions | None
) -> AsyncGenerator[bytes, None]:
    """The events of a stream, to its end. Raises like `Generation.deltas`."""
    outputs: dict[int, _Output] = {}
    finished: list[Completion] = []
    with_usage = options is not None and bool(options.include_usage)
    continuous = options is not None and bool(options.continuous_usage_stats)
    async for _, delta in generation.deltas():
        output = outputs.get(delta.index)
        if output is None:
            output = outputs[delta.index] = _Output(form)
        choice = output.choice(delta)
        if delta.completion is not None:
            finished.append(delta.completion)
        if choice is None:
            continue
        chunk = head | {"choices": [choice]}
        if continuous:
            chunk["usage"] = usage(generation.prompt_tokens, sum(each.tokens for each in outputs.values()))
        elif with_usage:
            chunk["usage"] = None
        yield event(chunk)
    if with_usage:
        yield event(head | {"choices": [], "usage": usage_of([finished], form.reasoning(finished))})
    yield DONE


class _Output:
    """One of the outputs of a stream."""

    def __init__(self, form: AnswerForm) -> None:
        self.tokens = 0
        self._form = form
        self._parser = form.parser()
        self._has_begun = self._has_calls = False

    def choice(self, delta: Delta) -> dict[str, Any] | None:
        """What is new, for a chunk; None if there is nothing."""
        self.tokens += len(delta.token_ids)
        pieces = self._parser.push(delta.text)
        completion = delta.completion
        if completion is not None:
            pieces += self._parser.finish()
        pieces = self._form.pieces(pieces)
        self._has_calls = self._has_calls or any(isinstance(piece, Call) for piece in pieces)
        if self._has_begun and not pieces and not delta.logprobs and completion is None:
            return None
        new = _merged(pieces)
        if not self._has_begun:
            self._has_begun = True
            new = {"role": "assistant", "content": "" if not new else None} | new
        choice = {"index": delta.index, "delta": new, "logprobs": _logprobs(self._form, delta.logprobs)}
        if completion is None:
            return choice | {"finish_reason": None}
        reason = self._form.finish_reason(completion, has_calls=self._has_calls)
        return choice | {"finish_reason": reason, "stop_reason": completion.stop_reason}


def _merged(pieces: list[Piece]) -> dict[str, Any]:
    """The `delta` of a chunk: each field once."""
    new: dict[str, Any] = {}
    calls: dict[int, dict[str, Any]] = {}
    for piece in pieces:
        match piece:
            case Reasoning(text):
                new["reasoning_content"] = new.get("reasoning_content", "") + text
            case Content(text):
                new["content"] = new.get("content", "") + text
            case Call(index, name):
                function = {"name": name, "arguments": ""}
                calls[index] = {
                    "index": index,
                    "id": _new_call_id(),
                    "type": "function",
                    "function": function,
                }
            case Arguments(index, text):
                call = calls.setdefault(index, {"index": index, "function": {"arguments": ""}})
                call["function"]["arguments"] += text
    if calls:
        new["tool_calls"] = list(calls.values())
    return new
