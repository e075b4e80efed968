"""`LLM`: load a model, generate text."""

from __future__ import annotations

import operator
import secrets
import threading
import time
from collections.abc import Generator, Mapping
from collections.abc import Sequence as List
from contextlib import closing, contextmanager
from dataclasses import fields
from numbers import Integral
from pathlib import Path
from typing import Any

from kuiperllm.config import EngineConfig, SamplingParams
from kuiperllm.core import Device
from kuiperllm.engine.block_pool import BlockPool
from kuiperllm.engine.kv_cache import KVCache
from kuiperllm.engine.loading import LoadedModel, Progress, load_model, max_batched_tokens
from kuiperllm.engine.loop import StepLoop
from kuiperllm.engine.output import Chunk, Completion, OutputStream
from kuiperllm.engine.perplexity import Perplexity, Watch, perplexity
from kuiperllm.engine.runner import Runner
from kuiperllm.engine.sampler import Sampler
from kuiperllm.engine.scheduler import Scheduler
from kuiperllm.engine.scoring import Scorer
from kuiperllm.engine.sequence import Sequence
from kuiperllm.errors import ChatTemplateError, ContextLengthError, TokenizerError, UsageError

Prompt = str | List[int]
"""Text, or token ids."""


class LLM:
    """A language model, ready to generate.

    Args:
        model: a folder or file, a hub id such as `Qwen/Qwen2.5-0.5B-Instruct`, or None for the small model
            that comes with the package.
        tokenizer: a tokenizer file or folder, if not the model's own.
        progress: told of long work as (what, bytes done, bytes in all).
        options: fields of `EngineConfig`: `device`, `dtype`, `quant`, `max_model_len`, `num_threads`, ...

    Raises:
        KuiperError: the model cannot be found, read, or held in memory; the message says what to do.

    Example:
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
        known = [field.name for field in fields(EngineConfig)]
        for name in options:
            if name not in known:
                raise UsageError(f"LLM has no option {name!r}; there are {', '.join(known)}")
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
        engine, decoder = self.engine_config, self.loaded.decoder
        cache = KVCache(self.config, engine.block_size, self.loaded.kv_dtype, decoder.device)
        plan, size = self.loaded.plan, engine.block_size
        self._pool = BlockPool(size, plan.max_blocks(size), plan.first_blocks(size, decoder.device))
        self._scheduler = Scheduler(
            self._pool,
            max_num_seqs=engine.max_num_seqs,
            max_num_batched_tokens=max_batched_tokens(engine, decoder.device),
        )
        vocab_size = min(self.config.vocab_size, self.tokenizer.vocab_size)
        self._runner = Runner(decoder, cache, self.max_model_len, vocab_size)
        self._stop_ids = frozenset(
            (*self.config.eos_token_ids, *self.loaded.generation.eos_token_ids, *self.tokenizer.eos_token_ids)
        )
        self._loop = StepLoop(self._scheduler, self._runner, Sampler(vocab_size), self._stop_ids)
        self._lock = threading.Lock()

    # --- generating ---------------------------------------------------------------------------------------

    def generate(
        self, prompts: Prompt | List[Prompt], params: SamplingParams | None = None
    ) -> list[Completion]:
        """Continue each prompt; several are worked on together.

        Args:
            prompts: one prompt or several. A text gets the special tokens that the tokenizer adds; what
                looks like a special token inside it is text. Token ids are taken as they are.
            params: how to choose tokens (default: `default_params`).

        Raises:
            ContextLengthError: a prompt leaves no room for output.
            TokenizerError: a token id is out of range.
        """
        params = params or self.default_params
        sequences = [self._sequence(prompt, params) for prompt in _as_list(prompts)]
        finished: dict[int, Completion] = {}
        with closing(self._run(sequences)) as chunks:
            for index, chunk in chunks:
                if chunk.completion is not None:
                    finished[index] = chunk.completion
        return [finished[index] for index in range(len(sequences))]

    def stream(self, prompt: Prompt, params: SamplingParams | None = None) -> Generator[Chunk, None, None]:
        """Continue one prompt; yields text as it is made. Raises like `generate`, at once.

        Closing the generator early ends the generation.
        """
        sequence = self._sequence(prompt, params or self.default_params)
        return self._chunks(sequence)

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

    def apply_chat_template(
        self,
        messages: List[Mapping[str, Any]],
        *,
        tools: List[Mapping[str, Any]] | None = None,
        **template_options: Any,
    ) -> list[int]:
        """The token ids of a conversation, up to where the answer begins. Raises like `chat`."""
        template = self.loaded.chat_template
        if template is None:
            raise ChatTemplateError(
                f"{self.loaded.name} has no chat template: it is no chat model; use generate"
            )
        text = template.render(messages, tools=tools, **template_options)
        return self.tokenizer.encode(text, add_special_tokens=False, parse_special=True)

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
            engine, device = self.engine_config, self.loaded.decoder.device
            yield Scorer(self._runner, self._pool, max_batched_tokens(engine, device))

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

    # --- one step after the other ---------------------------------------------------------------------------

    def _chunks(self, sequence: Sequence) -> Generator[Chunk, None, None]:
        with closing(self._run([sequence])) as chunks:
            for _, chunk in chunks:
                yield chunk

    def _run(self, sequences: List[Sequence]) -> Generator[tuple[int, Chunk], None, None]:
        """(index of the sequence, chunk) as they are made."""
        streams: dict[int, OutputStream] = {}
        with self._exclusively():
            for index, sequence in enumerate(sequences):
                streams[sequence.number] = OutputStream(index, sequence, self.tokenizer, time.perf_counter())
                self._scheduler.add(sequence)
            with closing(self._loop.run()) as tokens:
                for sequence in tokens:
                    stream = streams[sequence.number]
                    token_id = sequence.output_ids[-1]
                    chunk = stream.push(token_id, is_stop=self._is_stop(sequence, token_id))
                    if sequence.finish_reason is not None:
                        self._scheduler.finish(sequence)
                    yield stream.index, chunk

    @contextmanager
    def _exclusively(self) -> Generator[None, None, None]:
        """Nobody else uses the model inside the `with` block; all cache blocks are free before and after."""
        if not self._lock.acquire(blocking=False):
            raise UsageError(
                "this LLM is already generating: finish or close that stream first, or use one LLM per thread"
            )
        try:
            self._forget()  # an interrupt may have come while the last run did
            yield
        finally:
            try:
                self._forget()
            finally:
                self._lock.release()

    def _forget(self) -> None:
        """Take all blocks back: those that the cache has, if memory ran out while it grew."""
        self._scheduler.clear(self._runner.cache.num_blocks)

    def _sequence(self, prompt: Prompt, params: SamplingParams) -> Sequence:
        ids = self.token_ids(prompt)
        if not ids:
            raise UsageError("the prompt is empty, and the tokenizer has no token to begin a text with")
        room = self.max_model_len - len(ids)
        if room < 1:
            raise ContextLengthError(
                f"the prompt has {len(ids)} tokens, and the context of {self.max_model_len} must hold one "
                "more at least; shorten the prompt or raise max_model_len"
            )
        return Sequence(
            prompt_ids=ids,
            params=params,
            seed=secrets.randbits(63) if params.seed is None else params.seed,
            max_tokens=room if params.max_tokens is None else min(room, params.max_tokens),
        )

    def _is_stop(self, sequence: Sequence, token_id: int) -> bool:
        params = sequence.params
        return token_id in params.stop_token_ids or (token_id in self._stop_ids and not params.ignore_eos)


def _as_list(prompts: Prompt | List[Prompt]) -> list[Prompt]:
    if isinstance(prompts, str):
        return [prompts]
    items: list[Any] = list(prompts)
    return [items] if items and all(isinstance(item, Integral) for item in items) else items


def _as_ids(prompt: List[int]) -> list[int]:
    try:
        return [operator.index(token_id) for token_id in prompt]
    except TypeError:
        raise UsageError("a prompt is a text or a list of token ids, which are whole numbers") from None
