"""`POST /v1/completions`."""

from __future__ import annotations

from collections.abc import AsyncGenerator
from typing import Any

from fastapi import APIRouter
from starlette.requests import Request
from starlette.responses import Response

from kuiperllm.config import SamplingParams
from kuiperllm.engine.output import Completion, Delta
from kuiperllm.engine.sequence import TokenLogprobs
from kuiperllm.server.errors import bad_request
from kuiperllm.server.generation import Generation, Job
from kuiperllm.server.logprobs import TextLogprobs
from kuiperllm.server.openapi import documented
from kuiperllm.server.protocol.completions import CompletionAnswer, CompletionRequest
from kuiperllm.server.routes.common import (
    as_prompts,
    asked_grammar,
    check_stream_options,
    head,
    json_response,
    log_fields,
    request_id,
    state_of,
    usage,
    usage_of,
)
from kuiperllm.server.sampling import sampling_params
from kuiperllm.server.state import ServerState
from kuiperllm.server.streaming import DONE, EventStream, event, unless_client_leaves
from kuiperllm.text import Tokenizer

router = APIRouter()

_MAX_TOKENS = 16
"""OpenAI's default."""


@router.post(
    "/v1/completions",
    tags=["OpenAI"],
    **documented(CompletionAnswer, body=CompletionRequest, event=CompletionAnswer),
)
async def create_completion(request: Request) -> Response:
    """Continue texts."""
    state = state_of(request)
    body = await state.read(request, CompletionRequest)
    check_stream_options(body)
    jobs, texts = await unless_client_leaves(request, _prepare(state, body))
    log_fields(
        request,
        stream=bool(body.stream),
        prompts=len(jobs),
        prompt_tokens=sum(len(j.prompt_ids) for j in jobs),
    )
    generation = Generation(state.llm, jobs, request_id(request), state.metrics)
    answer = _Answer(body, state.llm.tokenizer, head(state, "cmpl", "text_completion"), jobs, texts)
    if body.stream:
        return EventStream(answer.events(generation), generation.close, state.config.heartbeat_s)
    try:
        completions = await unless_client_leaves(request, generation.completions())
    finally:
        await generation.close()
    return json_response(answer.whole(completions))


async def _prepare(state: ServerState, body: CompletionRequest) -> tuple[list[Job], list[str]]:
    """The jobs, and the texts of their prompts if they are to be given back."""
    prompts = as_prompts(body.prompt)
    params = _params(state, body)
    if len(prompts) > state.config.max_prompts:
        raise bad_request(
            f"{len(prompts)} prompts are too many; {state.config.max_prompts} are possible", "prompt"
        )
    if len(prompts) * params.num_outputs > state.config.max_outputs:
        raise bad_request(
            f"{len(prompts)} prompts with {params.num_outputs} outputs each are too many; "
            f"{state.config.max_outputs} outputs are possible",
            "n",
        )
    grammar = asked_grammar(body.response_format, body.structured_outputs)
    ids = await state.encode(prompts)
    make_guide = None if grammar is None else await state.compile(grammar)
    decode = state.llm.tokenizer.decode
    texts = [
        prompt if isinstance(prompt, str) else decode(prompt, skip_special_tokens=False)
        for prompt in (prompts if body.echo else ())
    ]
    jobs = [
        Job(
            prompt_ids,
            params,
            make_guide,
            priority=body.priority or 0,
            cache_salt=body.cache_salt or "",
            streams=bool(body.stream),
        )
        for prompt_ids in ids
    ]
    return jobs, texts


def _params(state: ServerState, body: CompletionRequest) -> SamplingParams:
    outputs = body.n or 1
    if body.best_of is not None and body.best_of < outputs:
        raise bad_request(f"best_of={body.best_of} is below n={outputs}", "best_of")
    if body.stream and body.best_of is not None and body.best_of > outputs:
        raise bad_request("a stream cannot choose the best of several outputs", "best_of")
    max_tokens = _MAX_TOKENS if body.max_tokens is None else body.max_tokens
    return sampling_params(
        body,
        state.llm.default_params,
        state.llm.tokenizer.vocab_size,
        max_tokens=max(1, max_tokens, 0 if body.max_tokens is not None else body.min_tokens or 0),
        logprobs=body.logprobs,
        prompt_logprobs=body.logprobs if body.echo else None,
        best_of=body.best_of,
    )


class _Answer:
    """Makes the answer to a request; choices are numbered over all prompts.

    With `max_tokens` 0, one token is made all the same, and left out: the engine has no other
    way to look at a prompt.
    """

    def __init__(
        self,
        body: CompletionRequest,
        tokenizer: Tokenizer,
        head: dict[str, Any],
        jobs: list[Job],
        texts: list[str],
    ) -> None:
        self._body = body
        self._tokenizer = tokenizer
        self._head = head
        self._jobs = jobs
        self._texts = texts
        self._is_empty = body.max_tokens == 0

    # --- whole --------------------------------------------------------------------------------------------

    def whole(self, completions: list[list[Completion]]) -> dict[str, Any]:
        """All outputs."""
        choices = [
            self._whole_choice(number, completion)
            for number, outputs in enumerate(completions)
            for completion in outputs
        ]
        return self._head | {"choices": choices, "usage": self._usage(completions)}

    def _whole_choice(self, number: int, completion: Completion) -> dict[str, Any]:
        ids = [] if self._is_empty else completion.token_ids
        text = "" if self._is_empty else completion.text
        prompt = self._texts[number] if self._texts else ""
        logprobs = None
        if completion.logprobs is not None:
            entries: list[TokenLogprobs | None] = [] if self._is_empty else [*completion.logprobs]
            if completion.prompt_logprobs is not None:
                ids, entries = completion.prompt_token_ids + ids, completion.prompt_logprobs + entries
            logprobs = TextLogprobs(self._tokenizer).take(ids, entries, self._body.logprobs or 0)
        return self._choice(number, completion.index, prompt + text, logprobs, completion)

    def _choice(
        self,
        number: int,
        index: int,
        text: str,
        logprobs: dict[str, Any] | None,
        completion: Completion | None,
    ) -> dict[str, Any]:
        reason = None if completion is None else "length" if self._is_empty else completion.finish_reason
        return {
            "index": number * (self._body.n or 1) + index,
            "text": text,
            "logprobs": logprobs,
            "finish_reason": reason,
            "stop_reason": None if completion is None or self._is_empty else completion.stop_reason,
        }

    def _usage(self, completions: list[list[Completion]]) -> dict[str, Any]:
        found = usage_of(completions)
        if self._is_empty:
            cached = found["prompt_tokens_details"]["cached_tokens"]
            return usage(found["prompt_tokens"], 0, cached)
        return found

    # --- streamed -----------------------------------------------------------------------------------------

    async def events(self, generation: Generation) -> AsyncGenerator[bytes, None]:
        """The events of a stream, to its end. Raises like `Generation.deltas`."""
        options = self._body.stream_options
        with_usage = options is not None and bool(options.include_usage)
        continuous = options is not None and bool(options.continuous_usage_stats)
        logprobs: dict[tuple[int, int], TextLogprobs] = {}
        finished: list[list[Completion]] = [[] for _ in self._jobs]
        made = 0
        async for number, delta in generation.deltas():
            key = (number, delta.index)
            is_first = key not in logprobs
            where = logprobs.setdefault(key, TextLogprobs(self._tokenizer))
            made += 0 if self._is_empty else len(delta.token_ids)
            if delta.completion is not None:
                finished[number].append(delta.completion)
            choice = self._new_choice(number, delta, where, is_first)
            if choice is None:
                continue
            chunk = self._head | {"choices": [choice]}
            if continuous:
                chunk["usage"] = usage(generation.prompt_tokens, made)
            elif with_usage:
                chunk["usage"] = None
            yield event(chunk)
        if with_usage:
            yield event(self._head | {"choices": [], "usage": self._usage(finished)})
        yield DONE

    def _new_choice(
        self, number: int, delta: Delta, where: TextLogprobs, is_first: bool
    ) -> dict[str, Any] | None:
        """What is new in an output; None if there is nothing."""
        text = "" if self._is_empty else delta.text
        ids = [] if self._is_empty else delta.token_ids
        entries: list[TokenLogprobs | None] | None = None
        if delta.logprobs is not None:
            entries = [] if self._is_empty else [*delta.logprobs]
        if is_first and self._texts:
            text = self._texts[number] + text
            if entries is not None and delta.prompt_logprobs is not None:
                ids, entries = self._jobs[number].prompt_ids + ids, delta.prompt_logprobs + entries
        if not text and not ids and delta.completion is None:
            return None
        if not text and not entries and delta.completion is None:
            return None
        logprobs = None if entries is None else where.take(ids, entries, self._body.logprobs or 0)
        return self._choice(number, delta.index, text, logprobs, delta.completion)
