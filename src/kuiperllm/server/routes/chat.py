"""`POST /v1/chat/completions`."""

from __future__ import annotations

from typing import Any

from fastapi import APIRouter
from starlette.requests import Request
from starlette.responses import Response

from kuiperllm.config import SamplingParams
from kuiperllm.server.answers import ToolFormat
from kuiperllm.server.answers.reasoning import behind_reasoning
from kuiperllm.server.errors import bad_request
from kuiperllm.server.generation import Generation, Job
from kuiperllm.server.openapi import documented
from kuiperllm.server.protocol.chat import ChatAnswer, ChatChunk, ChatRequest, NamedTool, Tool
from kuiperllm.server.routes.chat_answer import AnswerForm, answer_events, whole_answer
from kuiperllm.server.routes.common import (
    asked_grammar,
    check_stream_options,
    head,
    json_response,
    log_fields,
    request_id,
    state_of,
)
from kuiperllm.server.sampling import sampling_params
from kuiperllm.server.state import ServerState
from kuiperllm.server.streaming import EventStream, unless_client_leaves
from kuiperllm.server.structured import Grammar

router = APIRouter()


@router.post(
    "/v1/chat/completions", tags=["OpenAI"], **documented(ChatAnswer, body=ChatRequest, event=ChatChunk)
)
async def create_chat_completion(request: Request) -> Response:
    """Answer a conversation."""
    state = state_of(request)
    body = await state.read(request, ChatRequest)
    check_stream_options(body)
    job, form = await unless_client_leaves(request, _prepare(state, body))
    log_fields(request, stream=bool(body.stream), prompt_tokens=len(job.prompt_ids))
    generation = Generation(state.llm, [job], request_id(request), state.metrics)
    if body.stream:
        events = answer_events(
            head(state, "chatcmpl", "chat.completion.chunk"), form, generation, body.stream_options
        )
        return EventStream(events, generation.close, state.config.heartbeat_s)
    try:
        (completions,) = await unless_client_leaves(request, generation.completions())
    finally:
        await generation.close()
    return json_response(whole_answer(head(state, "chatcmpl", "chat.completion"), form, completions))


async def _prepare(state: ServerState, body: ChatRequest) -> tuple[Job, AnswerForm]:
    params = _params(state, body)
    tools = _tools(state, body)
    prompt = await state.in_thread(
        state.prompts.make,
        body.messages,
        tools,
        add_generation_prompt=body.add_generation_prompt is not False,
        variables=_variables(body),
    )
    parallel = body.parallel_tool_calls is not False
    form = AnswerForm(
        state.llm.tokenizer,
        prompt.thinking,
        state.prompts.tool_format if tools else None,
        frozenset(tool.function.name for tool in tools),
        parallel,
        isinstance(body.tool_choice, NamedTool),
    )
    grammar = _grammar(body, tools, form.tool_format, parallel)
    make_guide = None
    if grammar is not None:
        grammar = grammar if prompt.thinking is None else behind_reasoning(grammar, prompt.thinking)
        make_guide = await state.compile(grammar)
    job = Job(
        prompt.ids,
        params,
        make_guide,
        priority=body.priority or 0,
        cache_salt=body.cache_salt or "",
        streams=bool(body.stream),
    )
    return job, form


def _params(state: ServerState, body: ChatRequest) -> SamplingParams:
    if body.top_logprobs is not None and not body.logprobs:
        raise bad_request("top_logprobs goes with logprobs=true only", "top_logprobs")
    return sampling_params(
        body,
        state.llm.default_params,
        state.llm.tokenizer.vocab_size,
        max_tokens=body.max_completion_tokens or body.max_tokens,
        logprobs=(body.top_logprobs or 0) if body.logprobs else None,
    )


def _variables(body: ChatRequest) -> dict[str, Any]:
    """Variables of the template."""
    given = dict(body.chat_template_kwargs or {})
    if body.reasoning_effort is not None:
        given.setdefault("reasoning_effort", body.reasoning_effort)
        if body.reasoning_effort == "none":
            given.setdefault("enable_thinking", False)
    return given


# --- tools ------------------------------------------------------------------------------------------------


def _tools(state: ServerState, body: ChatRequest) -> list[Tool]:
    """The functions that the model may call."""
    tools, choice = body.tools or [], body.tool_choice
    if not tools and choice not in (None, "none", "auto"):
        raise bad_request("tool_choice asks for a call, but there are no tools", "tool_choice")
    names = [tool.function.name for tool in tools]
    if len(set(names)) < len(names):
        raise bad_request("tools: two functions have the same name", "tools")
    if isinstance(choice, NamedTool) and choice.function.name not in names:
        raise bad_request(f"tool_choice: there is no function {choice.function.name!r}", "tool_choice")
    if not tools or choice == "none":
        return []
    if state.prompts.template is not None and state.prompts.tool_format is None:
        raise bad_request(
            "the model's chat template has no calls of functions; serve with --tool-format to say how it "
            "writes them",
            "tools",
        )
    return tools


def _grammar(
    body: ChatRequest, tools: list[Tool], tool_format: ToolFormat | None, parallel: bool
) -> Grammar | None:
    """What the answer has to look like; None: anything goes."""
    asked = asked_grammar(body.response_format, body.structured_outputs)
    if tool_format is None:
        return asked
    choice = body.tool_choice
    if isinstance(choice, NamedTool):
        tools = [tool for tool in tools if tool.function.name == choice.function.name]
        parallel = False
    functions = [(tool.function.name, tool.function.parameters) for tool in tools]
    if asked is not None and choice in (None, "auto"):
        calls = tool_format.calls(functions, parallel=parallel)
        return Grammar(f"{calls.start} | {asked.start}", (*calls.rules, *asked.rules), asked.nested)
    if choice in (None, "auto"):
        strict = any(tool.function.strict for tool in tools)
        return tool_format.text_or_calls(functions, parallel=parallel) if strict else None
    return tool_format.calls(functions, parallel=parallel)
