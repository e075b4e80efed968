"""`/v1/chat/completions`."""

from __future__ import annotations

from typing import Annotated, Any, Literal

from pydantic import Field, StringConstraints

from kuiperllm.server.protocol.common import WHOLE, Answer, Part, SamplingFields, ShortText, Usage

FunctionName = Annotated[str, StringConstraints(pattern=r"^[a-zA-Z0-9_.-]{1,64}$")]
MaxTokens = Annotated[int, Field(ge=1, lt=1 << 31), WHOLE]


# --- messages ---------------------------------------------------------------------------------------------


class TextPart(Part):
    """A piece of a message. Images, sound and files are not supported."""

    type: Literal["text"]
    text: str


class CalledFunction(Part):
    """A function that the model called."""

    name: FunctionName
    arguments: str = Field(description="A JSON object, as text.")


class ToolCall(Part):
    """A call that the model made."""

    id: ShortText
    type: Literal["function"] = "function"
    function: CalledFunction


Content = str | list[TextPart]


class SystemMessage(Part):
    """Instructions; `developer` is another word for it."""

    role: Literal["system", "developer"]
    content: Content
    name: ShortText | None = None


class UserMessage(Part):
    """What a person says."""

    role: Literal["user"]
    content: Content
    name: ShortText | None = None


class AssistantMessage(Part):
    """What the model said."""

    role: Literal["assistant"]
    content: Content | None = None
    reasoning_content: str | None = None
    tool_calls: list[ToolCall] | None = None
    name: ShortText | None = None


class ToolMessage(Part):
    """What a function that the model called returned."""

    role: Literal["tool"]
    content: Content
    tool_call_id: ShortText | None = None
    name: ShortText | None = None


Message = Annotated[SystemMessage | UserMessage | AssistantMessage | ToolMessage, Field(discriminator="role")]


# --- tools and formats ------------------------------------------------------------------------------------


class Function(Part):
    """A function that the model may call."""

    name: FunctionName
    description: str | None = None
    parameters: dict[str, Any] | None = Field(None, description="A JSON schema of an object.")
    strict: bool | None = Field(None, description="Whether arguments must match the schema.")


class Tool(Part):
    """Something that the model may use."""

    type: Literal["function"]
    function: Function


class NamedFunction(Part):
    """The function to call."""

    name: FunctionName


class NamedTool(Part):
    """The tool to use."""

    type: Literal["function"]
    function: NamedFunction


class TextFormat(Part):
    """Anything goes."""

    type: Literal["text"]


class JsonObjectFormat(Part):
    """Some JSON object."""

    type: Literal["json_object"]


class NamedSchema(Part):
    """A JSON schema with a name."""

    name: ShortText | None = None
    description: str | None = None
    schema_: dict[str, Any] = Field(alias="schema")
    strict: bool | None = Field(None, description="Without effect: the output always matches the schema.")


class JsonSchemaFormat(Part):
    """What matches a JSON schema."""

    type: Literal["json_schema"]
    json_schema: NamedSchema


ResponseFormat = Annotated[TextFormat | JsonObjectFormat | JsonSchemaFormat, Field(discriminator="type")]


# --- the request ------------------------------------------------------------------------------------------


class ChatRequest(SamplingFields):
    """A conversation that is to go on."""

    messages: Annotated[list[Message], Field(min_length=1)]
    max_tokens: MaxTokens | None = Field(None, description="An older name of `max_completion_tokens`.")
    max_completion_tokens: MaxTokens | None = Field(
        None, description="Most tokens to make. Default: until the model stops or the context is full."
    )
    logprobs: bool | None = None
    top_logprobs: Annotated[int, Field(ge=0, le=20), WHOLE] | None = Field(
        None, description="Only together with `logprobs`."
    )
    response_format: ResponseFormat | None = None
    tools: Annotated[list[Tool], Field(max_length=128)] | None = None
    tool_choice: Literal["none", "auto", "required"] | NamedTool | None = None
    parallel_tool_calls: bool | None = None
    reasoning_effort: Literal["none", "minimal", "low", "medium", "high", "xhigh"] | None = Field(
        None, description="`none` asks templates that can do so to go without reasoning."
    )
    add_generation_prompt: bool | None = Field(None, description="False: do not begin an answer.")
    chat_template_kwargs: dict[str, Any] | None = Field(
        None, description="Further variables of the chat template, such as `enable_thinking`."
    )
    modalities: list[Literal["text"]] | None = None
    metadata: dict[str, str] | None = Field(None, description="Without effect.")
    store: bool | None = Field(None, description="Without effect: nothing is stored.")
    service_tier: ShortText | None = Field(None, description="Without effect.")
    safety_identifier: ShortText | None = Field(None, description="Without effect.")
    prompt_cache_key: ShortText | None = Field(None, description="Without effect.")
    prompt_cache_retention: ShortText | None = Field(None, description="Without effect.")
    verbosity: Literal["low", "medium", "high"] | None = Field(None, description="Without effect.")


# --- the answer -------------------------------------------------------------------------------------------


class TokenProbability(Answer):
    """A token and how likely it was."""

    token: str
    logprob: float
    bytes: list[int]


class ChosenToken(TokenProbability):
    """A token of the output, and what might have been in its place."""

    top_logprobs: list[TokenProbability]


class ChatLogprobs(Answer):
    """One entry for each token."""

    content: list[ChosenToken]
    refusal: None = None


class AnsweredFunction(Answer):
    """The function that the model calls."""

    name: str
    arguments: str


class AnsweredToolCall(Answer):
    """A call that the model makes."""

    id: str
    type: Literal["function"]
    function: AnsweredFunction


class AnswerMessage(Answer):
    """What the model says."""

    role: Literal["assistant"]
    content: str | None
    reasoning_content: str | None = None
    refusal: None = None
    tool_calls: list[AnsweredToolCall] | None = None


FinishReason = Literal["stop", "length", "tool_calls", "abort"]


class ChatChoice(Answer):
    """One of the outputs."""

    index: int
    message: AnswerMessage
    logprobs: ChatLogprobs | None
    finish_reason: FinishReason
    stop_reason: str | int | None = None


class ChatAnswer(Answer):
    """A whole answer."""

    id: str
    object: Literal["chat.completion"]
    created: int
    model: str
    system_fingerprint: str
    choices: list[ChatChoice]
    usage: Usage


class DeltaFunction(Answer):
    """More of a function's name or arguments."""

    name: str | None = None
    arguments: str | None = None


class DeltaToolCall(Answer):
    """More of a call."""

    index: int
    id: str | None = None
    type: Literal["function"] | None = None
    function: DeltaFunction


class ChatDelta(Answer):
    """What is new."""

    role: Literal["assistant"] | None = None
    content: str | None = None
    reasoning_content: str | None = None
    tool_calls: list[DeltaToolCall] | None = None


class ChatChunkChoice(Answer):
    """What is new in one of the outputs."""

    index: int
    delta: ChatDelta
    logprobs: ChatLogprobs | None
    finish_reason: FinishReason | None
    stop_reason: str | int | None = None


class ChatChunk(Answer):
    """One event of a stream."""

    id: str
    object: Literal["chat.completion.chunk"]
    created: int
    model: str
    system_fingerprint: str
    choices: list[ChatChunkChoice]
    usage: Usage | None = None
