"""`LLM`: load a model, generate text."""

from __future__ import annotations

import threading
from collections.abc import Generator, Mapping
from collections.abc import Sequence as List
from contextlib import closing, contextmanager
from itertools import count
from pathlib import Path
from typing import Any

from kuiperllm.config import SamplingParams
from kuiperllm.engine.language_model import LanguageModel, Prompt, as_list
from kuiperllm.engine.loading import Progress
from kuiperllm.engine.output import Chunk, Completion, Delta
from kuiperllm.engine.perplexity import Perplexity, Watch, perplexity
from kuiperllm.engine.request import Request
from kuiperllm.engine.scoring import Scorer
from kuiperllm.errors import UsageError

__all__ = ["LLM", "Prompt"]

_numbers = count()


class LLM(LanguageModel):
    """A language model, ready to generate.

    Args:
        model: a folder or file, a hub id such as `Qwen/Qwen2.5-0.5B-Instruct`, or None for the small model
            that comes with the package.
        tokenizer: a tokenizer file or folder, if not the model's own.
        progress: told of long work as (what, bytes done, bytes in all).
        options: fields of `EngineConfig`: `device`, `dtype`, `quant`, `max_model_len`, `num_threads`, ...

    Raises:
        KuiperError: the model cannot be found, read, or held in memory; the message says what to do.

    Examples:
        >>> llm = LLM()
        >>> llm.generate("ROMEO:", SamplingParams(max_tokens=40, seed=1))[0].text
    """

    def __init__(
        self,
        model: str | Path | None = None,
        *,
        tokenizer: str | Path | None = None,
        progress: Progress | None = None,
        **options: Any,
    ) -> None:
        super().__init__(model, tokenizer=tokenizer, progress=progress, reserve=False, options=options)
        self._lock = threading.Lock()
        self._is_tidy = True

    # --- generating ---------------------------------------------------------------------------------------

    def generate(
        self,
        prompts: Prompt | List[Prompt],
        params: SamplingParams | List[SamplingParams] | None = None,
    ) -> list[Completion]:
        """Continue each prompt; several are worked on together.

        Args:
            prompts: one prompt or several. A text gets the special tokens that the tokenizer adds; what
                looks like a special token inside it is text. Token ids are taken as they are.
            params: how to choose tokens, for all prompts or for each (default: `default_params`).

        Returns:
            The completions in the order of the prompts, `params.n` for each.

        Raises:
            UsageError: there are parameters for more prompts or for fewer.
            ContextLengthError: a prompt leaves no room for output.
            TokenizerError: a token id is out of range.
        """
        texts = as_list(prompts)
        if params is None or isinstance(params, SamplingParams):
            params = [params or self.default_params] * len(texts)
        if len(params) != len(texts):
            raise UsageError(f"there are {len(texts)} prompts, and parameters for {len(params)}")
        pairs = zip(texts, params, strict=True)
        requests = [self._request(prompt, how, streams=False) for prompt, how in pairs]
        finished: dict[tuple[str, int], Completion] = {}
        with closing(self._run(requests)) as deltas:
            for delta in deltas:
                if delta.completion is not None:
                    finished[delta.request_id, delta.index] = delta.completion
        return [finished[r.request_id, index] for r in requests for index in range(r.params.n)]

    def stream(self, prompt: Prompt, params: SamplingParams | None = None) -> Generator[Chunk, None, None]:
        """Continue one prompt; yields text as it is made. Raises like `generate`, at once.

        Closing the generator early ends the generation.

        Raises:
            UsageError: `params` asks for several outputs.
        """
        params = params or self.default_params
        if params.num_outputs > 1:
            raise UsageError("a stream is of one output; use generate for n or best_of above 1")
        return self._chunks(self._request(prompt, params, streams=True))

    def chat(
        self,
        messages: List[Mapping[str, Any]],
        params: SamplingParams | None = None,
        *,
        tools: List[Mapping[str, Any]] | None = None,
        **template_options: Any,
    ) -> Completion:
        """Answer a conversation.

        Args:
            messages: `{"role": "user", "content": "..."}` and so on, as the model's template wants them.
            params: how to choose tokens (default: `default_params`).
            tools: descriptions of functions, for templates that know them.
            template_options: further variables of the template, such as `enable_thinking`.

        Raises:
            ChatTemplateError: the model has no chat template, or it refuses the messages.
            ContextLengthError: the conversation leaves no room for an answer.
        """
        return self.generate([self.apply_chat_template(messages, tools=tools, **template_options)], params)[0]

    def stream_chat(
        self,
        messages: List[Mapping[str, Any]],
        params: SamplingParams | None = None,
        *,
        tools: List[Mapping[str, Any]] | None = None,
        **template_options: Any,
    ) -> Generator[Chunk, None, None]:
        """Like `chat`; yields text as it is made."""
        return self.stream(self.apply_chat_template(messages, tools=tools, **template_options), params)

    # --- scoring ------------------------------------------------------------------------------------------

    def perplexity(
        self,
        text: Prompt | List[Prompt],
        *,
        context: int | None = None,
        stride: int | None = None,
        max_windows: int | None = None,
        progress: Watch | None = None,
    ) -> Perplexity:
        """How well the model predicts a text; docs/accuracy.md says what the figure means.

        Args:
            text: one text, or the ids of its tokens: it is cut into windows, of which a part is scored. Or
                several: each is run from its beginning to its end, and all its tokens but the first count.
            context: tokens in a window (default: 512, or the model's context if that is shorter).
            stride: tokens from one window to the next, of which only these many at its end count then;
                without it, windows stand one behind the other, and of each the second half counts.
            max_windows: the first so many windows, or texts, are enough.
            progress: told of progress as (tokens taken in, tokens in all, perplexity so far).

        Raises:
            UsageError: the text is too short, or a number is not possible.
            ContextLengthError: a window, or one of several texts, does not fit into the model's context.
            CheckpointError: a logit is no finite number.
            TokenizerError: the text cannot be encoded, or a token id is out of range.
        """
        return perplexity(
            self, text, context=context, stride=stride, max_windows=max_windows, progress=progress
        )

    @contextmanager
    def scorer(self) -> Generator[Scorer, None, None]:
        """What gives the logits, or log probabilities, of all tokens of a text, inside the `with` block.

        Raises:
            UsageError: the model is generating.
        """
        with self._exclusively():
            engine = self._engine
            yield Scorer(engine.runner, engine.pool, engine.max_num_batched_tokens)

    # --- one step after the other ---------------------------------------------------------------------------

    def _chunks(self, request: Request) -> Generator[Chunk, None, None]:
        with closing(self._run([request])) as deltas:
            for delta in deltas:
                logprobs = delta.logprobs[0] if delta.logprobs is not None else None
                yield Chunk(delta.text, delta.token_ids[0], logprobs, delta.completion)

    def _run(self, requests: List[Request]) -> Generator[Delta, None, None]:
        with self._exclusively():
            for request in requests:
                self._engine.add(request)
            try:
                while self._engine.has_work:
                    for delta in self._engine.step():
                        if delta.error is not None:
                            raise delta.error
                        yield delta
            except GeneratorExit:
                for request in requests:
                    self._engine.abort(request.request_id)
                while self._engine.has_work:  # what is under way
                    self._engine.step()

    @contextmanager
    def _exclusively(self) -> Generator[None, None, None]:
        """Nobody else uses the engine inside the `with` block; it has nothing to do before and after."""
        if not self._lock.acquire(blocking=False):
            raise UsageError(
                "this LLM is already generating: finish or close that stream first, or use one LLM per thread"
            )
        try:
            self._tidy_up()  # an interrupt may have come while the last run did
            self._is_tidy = False
            yield
            self._is_tidy = True
        finally:
            try:
                self._tidy_up()
            finally:
                self._lock.release()

    def _tidy_up(self) -> None:
        """Take everything back if the last run did not come to its end."""
        if not self._is_tidy:
            self._engine.reset()
            self._is_tidy = True

    def _request(self, prompt: Prompt, params: SamplingParams, *, streams: bool) -> Request:
        request = Request(str(next(_numbers)), self.token_ids(prompt), params, streams=streams)
        self._engine.check(request)
        return request
