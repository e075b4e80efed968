"""The engine: requests in, tokens out, one step at a time."""

from __future__ import annotations

import math
import secrets
from dataclasses import dataclass, field, replace

import numpy as np
from numpy.typing import NDArray

from kuiperllm.config import EngineConfig
from kuiperllm.engine.block_pool import BlockPool
from kuiperllm.engine.kv_cache import KVCache
from kuiperllm.engine.loading import LoadedModel
from kuiperllm.engine.loop import StepLoop
from kuiperllm.engine.memory_plan import max_batched_tokens
from kuiperllm.engine.output import Completion, Delta
from kuiperllm.engine.output_stream import OutputStream
from kuiperllm.engine.request import Request
from kuiperllm.engine.runner import Runner
from kuiperllm.engine.sampler import Sampler
from kuiperllm.engine.scheduler import Scheduler
from kuiperllm.engine.sequence import Sequence
from kuiperllm.engine.stats import EngineStats
from kuiperllm.errors import ContextLengthError, KuiperError, UsageError


@dataclass(slots=True, eq=False)
class _Outputs:
    """The outputs of a request."""

    request: Request
    streams: list[OutputStream]
    last: list[Delta] = field(default_factory=list)
    """The last deltas of those that have ended."""


class Engine:
    """Works on many requests at once; knows no threads and no text that comes in.

    All methods are to be called from one thread at a time.

    Args:
        loaded: the model.
        config: how to run it.
        reserve: take the memory of the whole key/value cache with the first step, instead of growing with
            the need; so it is as well if `kv_cache_tokens` says how large it is to be.
    """

    def __init__(self, loaded: LoadedModel, config: EngineConfig, *, reserve: bool = False) -> None:
        self.tokenizer = loaded.tokenizer
        self.max_model_len = loaded.plan.max_model_len
        self.max_num_batched_tokens = max_batched_tokens(config, loaded.decoder.device)
        self.stop_ids = loaded.stop_ids
        plan, size, device = loaded.plan, config.block_size, loaded.decoder.device
        first = plan.max_blocks if reserve or config.kv_cache_tokens else plan.first_blocks(device)
        self.pool = BlockPool(size, plan.max_blocks, first)
        self.scheduler = Scheduler(
            self.pool, max_num_seqs=plan.max_num_seqs, max_num_batched_tokens=self.max_num_batched_tokens
        )
        cache = KVCache(loaded.config, size, loaded.kv_dtype, device)
        vocab_size = min(loaded.config.vocab_size, loaded.tokenizer.vocab_size)
        self.runner = Runner(loaded.decoder, cache, plan.max_num_seqs, self.max_model_len, vocab_size)
        self._shares_prefixes = config.prefix_caching
        self._outputs: dict[str, _Outputs] = {}
        self._streams: dict[int, OutputStream] = {}  # by the number of the sequence
        self._deltas: list[Delta] = []
        self._stats = EngineStats(kv_blocks=plan.max_blocks)
        self._loop = StepLoop(self.scheduler, self.runner, Sampler(self.stop_ids))

    @property
    def has_work(self) -> bool:
        """Whether `step` has anything to do."""
        return self._loop.has_work or bool(self._deltas)

    def add(self, request: Request) -> None:
        """Queue a request.

        Raises:
            UsageError: the prompt is empty, or the id is in use.
            ContextLengthError: the prompt leaves no room for output.
        """
        self.check(request)
        params, ids = request.params, request.prompt_token_ids
        room = 1 if request.embeds else self.max_model_len - len(ids)
        count = 1 if request.embeds else params.num_outputs
        ranks = count > params.n
        asked = params.logprobs if params.logprobs is not None or not ranks else 0
        # Without the prefix cache, only the outputs of one request share blocks.
        salt = request.cache_salt if self._shares_prefixes else f"{request.cache_salt}\0{request.request_id}"
        seed = secrets.randbits(63) if params.seed is None else params.seed
        streams = []
        for index in range(count):
            sequence = Sequence(
                prompt_ids=ids,
                params=params,
                seed=(seed + index) % (1 << 64),
                max_tokens=room if params.max_tokens is None else min(room, params.max_tokens),
                priority=request.priority,
                cache_salt=salt,
                num_logprobs=asked,
                embeds=request.embeds,
                guide=None if request.make_guide is None else request.make_guide(),
            )
            stream = OutputStream(
                request, index, sequence, self.tokenizer, self.stop_ids, streams=request.streams and not ranks
            )
            streams.append(stream)
        self._outputs[request.request_id] = _Outputs(request, streams)
        for stream in streams:
            self._streams[stream.sequence.number] = stream
            self.scheduler.add(stream.sequence)
        self._stats.prompt_tokens += len(ids)

    def check(self, request: Request) -> None:
        """Raises like `add`, and does nothing else."""
        length = len(request.prompt_token_ids)
        if request.request_id in self._outputs:
            raise UsageError(f"the request id {request.request_id!r} is in use; choose another one")
        if not length:
            raise UsageError("the prompt is empty, and the tokenizer has no token to begin a text with")
        if length >= self.max_model_len:
            raise ContextLengthError(
                f"the prompt has {length} tokens, and the context of {self.max_model_len} must hold one "
                "more at least; shorten the prompt or raise max_model_len"
            )

    def abort(self, request_id: str) -> list[Delta]:
        """Give a request up, whatever its state. Unknown ids, and those of finished requests, are ignored.

        Returns:
            The last deltas of its outputs; nothing more comes from it.
        """
        outputs = self._outputs.pop(request_id, None)
        if outputs is None:
            return []
        live = [stream for stream in outputs.streams if stream.sequence.finish_reason is None]
        deltas = [stream.abort() for stream in live]
        for stream in live:
            self._forget(stream, "abort")
        params = outputs.request.params
        return deltas if params.n == params.num_outputs else _best([*outputs.last, *deltas], params.n)

    def step(self) -> list[Delta]:
        """Run the model once, and give what became certain.

        Where the device works on its own, the next pass is queued before this returns. What goes wrong with
        one request comes back as its `Delta.error`.

        Raises:
            KuiperError: the engine cannot go on; all requests are lost. `reset` makes it usable again.
        """
        self._loop.step(self)
        deltas, self._deltas = self._deltas, []
        return deltas

    def reset(self) -> None:
        """Give up all requests and take all blocks back; also after an exception at any place."""
        self._outputs.clear()
        self._streams.clear()
        self._deltas.clear()
        self._loop.reset()

    def warm_up(self) -> None:
        """Compile the kernels and record the graphs of all batch sizes, so that no request waits for them."""
        if self.pool.num_blocks == 0:
            self.pool.reset(self.pool.first_blocks)
        self.runner.warm_up(self.pool.num_blocks, self.max_num_batched_tokens)

    def stats(self) -> EngineStats:
        """Counters and gauges; a copy."""
        scheduler = self.scheduler
        under_way = sum(len(stream.sequence.output_ids) for stream in list(self._streams.values()))
        return replace(
            self._stats,
            num_running=len(scheduler.running),
            num_waiting=scheduler.num_waiting,
            kv_blocks_used=self.pool.num_used,
            prefix_queries=scheduler.num_queried,
            prefix_hits=scheduler.num_found,
            generated_tokens=self._stats.generated_tokens + under_way,
            preemptions=scheduler.num_preemptions,
            steps=self._loop.num_steps,
            finished=dict(self._stats.finished),
        )

    # --- what the loop tells ------------------------------------------------------------------------------

    def on_token(self, sequence: Sequence, token_id: int) -> None:
        """Turn a token into text, and see whether the output ends with it."""
        stream = self._streams[sequence.number]
        try:
            delta = stream.push(token_id)
        except Exception as error:  # a guide's, as a rule; it concerns this request alone
            self.on_guide_error(sequence, error)
            return
        if delta is not None:
            self._hand_out(stream, delta)

    def on_embedding(self, sequence: Sequence, hidden: NDArray[np.float32]) -> None:
        """End a request for an embedding."""
        stream = self._streams[sequence.number]
        self._hand_out(stream, stream.embed(hidden))

    def on_guide_error(self, sequence: Sequence, error: Exception) -> None:
        """End a sequence's whole request with an error."""
        request_id = self._streams[sequence.number].request.request_id
        for stream in self._outputs.pop(request_id).streams:
            if stream.sequence.finish_reason is None:
                stream.abort()
                self._forget(stream, "error")
        if isinstance(error, KuiperError):
            told = error
        else:
            told = KuiperError(f"what guides the output failed: {type(error).__name__}: {error}")
            told.__cause__ = error
        self._deltas.append(Delta(request_id, 0, "", [], None, error=told))

    def _hand_out(self, stream: OutputStream, delta: Delta) -> None:
        """Pass a delta on; at the end of an output, forget it, and the request with its last output."""
        if delta.completion is None:
            self._deltas.append(delta)
            return
        request_id, params = delta.request_id, stream.request.params
        outputs = self._outputs[request_id]
        outputs.last.append(delta)
        self._forget(stream, delta.completion.finish_reason)
        if params.num_outputs == params.n:
            self._deltas.append(delta)
        elif len(outputs.last) == len(outputs.streams):
            self._deltas += _best(outputs.last, params.n)
        if len(outputs.last) == len(outputs.streams):
            del self._outputs[request_id]

    def _forget(self, stream: OutputStream, ending: str) -> None:
        """Drop a sequence that has ended, in one of the ways that are counted, and take its blocks back."""
        sequence = stream.sequence
        self._stats.generated_tokens += len(sequence.output_ids)
        self.scheduler.finish(sequence)
        del self._streams[sequence.number]
        self._stats.finished[ending] += 1


def _best(last: list[Delta], count: int) -> list[Delta]:
    """The last deltas of the outputs whose tokens have the highest mean log probability, numbered anew."""

    def score(completion: Completion | None) -> float:
        assert completion is not None
        return -math.inf if completion.mean_logprob is None else completion.mean_logprob

    ranked = sorted(last, key=lambda delta: score(delta.completion), reverse=True)[:count]
    return [
        replace(delta, index=index, completion=replace(delta.completion, index=index))
        for index, delta in enumerate(ranked)
        if delta.completion is not None
    ]
