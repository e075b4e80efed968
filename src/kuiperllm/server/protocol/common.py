"""What several endpoints share: how to choose tokens, how to stream, usage, errors."""

from __future__ import annotations

from typing import Annotated, Any, Literal

from pydantic import BaseModel, BeforeValidator, ConfigDict, Field, StringConstraints

MAX_STOPS = 32
MAX_BIASES = 4096


def _whole(value: Any) -> Any:
    """1.0 as 1: to JSON, and to a schema's `integer`, they are the same."""
    return int(value) if isinstance(value, float) and value.is_integer() else value


WHOLE = BeforeValidator(_whole)  # to stand behind a `Field`, whose bounds the schema would lose otherwise
TokenId = Annotated[int, Field(ge=0, lt=1 << 31, json_schema_extra={"x-below": "vocab_size"}), WHOLE]
Text = Annotated[str, StringConstraints(min_length=1)]
StopText = Annotated[str, StringConstraints(min_length=1, max_length=1024)]
BiasKey = Annotated[str, StringConstraints(pattern=r"^[0-9]{1,9}$")]
Bias = Annotated[float, Field(ge=-100, le=100)]
ShortText = Annotated[str, StringConstraints(max_length=512)]


class Request(BaseModel):
    """Anything that is sent to the server."""

    model_config = ConfigDict(strict=True, extra="forbid", allow_inf_nan=False, protected_namespaces=())


class Part(BaseModel):
    """Something inside a request; what is not known there is ignored, as it is by OpenAI."""

    model_config = ConfigDict(strict=True, extra="ignore", allow_inf_nan=False, protected_namespaces=())


class Answer(BaseModel):
    """Anything that the server sends."""

    model_config = ConfigDict(extra="forbid", protected_namespaces=())


class StreamOptions(Request):
    """What a stream says besides the text."""

    include_usage: bool | None = Field(None, description="End with a chunk that holds the usage.")
    continuous_usage_stats: bool | None = Field(None, description="Say the usage so far in every chunk.")
    include_obfuscation: Literal[False] | None = None


class StructuredOutputs(Request):
    """What the output has to look like; exactly one of the fields."""

    model_config = ConfigDict(json_schema_extra={"minProperties": 1, "maxProperties": 1})

    json_schema: dict[str, Any] | None = Field(None, alias="json", description="A JSON schema.")
    regex: Text | None = Field(None, description="A regular expression, in the syntax of Rust's crate regex.")
    choice: Annotated[list[Text], Field(min_length=1, max_length=4096)] | None = None
    grammar: Text | None = Field(None, description="A grammar, in Lark's syntax as llguidance reads it.")


class SamplingFields(Request):
    """How tokens are chosen, and when to stop. What is missing is as the model's files recommend."""

    model: ShortText | None = Field(None, description="The served model's name, which is also the default.")
    temperature: Annotated[float, Field(ge=0, le=100)] | None = None
    top_p: Annotated[float, Field(gt=0, le=1)] | None = None
    top_k: Annotated[int, Field(ge=-1, lt=1 << 31), WHOLE] | None = Field(None, description="0 or -1: all.")
    min_p: Annotated[float, Field(ge=0, le=1)] | None = None
    repetition_penalty: Annotated[float, Field(gt=0, le=100)] | None = None
    presence_penalty: Annotated[float, Field(ge=-2, le=2)] | None = None
    frequency_penalty: Annotated[float, Field(ge=-2, le=2)] | None = None
    logit_bias: (
        Annotated[
            dict[BiasKey, Bias],
            Field(max_length=MAX_BIASES, json_schema_extra={"additionalProperties": False}),
        ]
        | None
    ) = Field(None, description="From token ids to what is added to their logits.")
    seed: Annotated[int, Field(ge=-(1 << 63), lt=1 << 63), WHOLE] | None = None
    n: Annotated[int, Field(ge=1, le=128), WHOLE] | None = None
    stop: StopText | Annotated[list[StopText], Field(max_length=MAX_STOPS)] | None = None
    stop_token_ids: Annotated[list[TokenId], Field(max_length=128)] | None = None
    min_tokens: Annotated[int, Field(ge=0, lt=1 << 31), WHOLE] | None = None
    ignore_eos: bool | None = None
    skip_special_tokens: bool | None = None
    stream: bool | None = None
    stream_options: StreamOptions | None = Field(None, description="Only together with `stream`.")
    structured_outputs: StructuredOutputs | None = None
    priority: Annotated[int, Field(ge=-(1 << 31), lt=1 << 31), WHOLE] | None = Field(
        None, description="Lower goes first."
    )
    cache_salt: ShortText | None = Field(
        None, description="Only requests of the same salt share what is computed for their prompts."
    )
    user: ShortText | None = Field(None, description="Without effect.")


class PromptDetails(Answer):
    """Of the prompt's tokens."""

    cached_tokens: int = Field(description="Those that need not be computed again.")


class CompletionDetails(Answer):
    """Of the output's tokens."""

    reasoning_tokens: int


class Usage(Answer):
    """Tokens taken in and made."""

    prompt_tokens: int
    completion_tokens: int
    total_tokens: int
    prompt_tokens_details: PromptDetails | None = None
    completion_tokens_details: CompletionDetails | None = None


class ErrorBody(Answer):
    """What is wrong."""

    message: str
    type: str
    param: str | None
    code: str | None


class ErrorAnswer(Answer):
    """The body of every answer that is no success."""

    error: ErrorBody
