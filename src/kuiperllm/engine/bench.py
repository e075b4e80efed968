"""Measures how fast a model runs: prefill, decode, and what part of the memory's bandwidth decoding uses."""

from __future__ import annotations

import importlib.metadata
import itertools
import platform
import resource
import sys
import time
from dataclasses import asdict, dataclass, field
from datetime import date
from pathlib import Path
from statistics import median
from typing import Any

import numpy as np
from numpy.typing import NDArray

from kuiperllm.checkpoint import Checkpoint
from kuiperllm.checkpoint.random import RandomCheckpoint
from kuiperllm.config import EngineConfig, ModelConfig, SamplingParams
from kuiperllm.core import Device, DType
from kuiperllm.core.memory import out_of_memory
from kuiperllm.engine.block_pool import BlockPool
from kuiperllm.engine.kv_cache import KVCache
from kuiperllm.engine.loading import Progress, load_decoder, open_model
from kuiperllm.engine.loop import StepLoop
from kuiperllm.engine.memory_plan import kv_dtype, max_batched_tokens, packed_weight_bytes
from kuiperllm.engine.runner import Runner
from kuiperllm.engine.sampler import Sampler
from kuiperllm.engine.scheduler import Scheduler
from kuiperllm.engine.sequence import Sequence
from kuiperllm.errors import ContextLengthError, UsageError
from kuiperllm.models import check_model

_GPU_FIRST_BLOCKS = 256  # so that the cache does not grow while decoding is timed
_numbers = itertools.count()  # so that no prompt is found in the prefix cache
_UNTIMED = 3  # tokens before decoding is timed: the prefill's, and two while the step is captured


@dataclass(frozen=True, slots=True)
class BenchResult:
    """Medians over the repeats, and what they were measured on."""

    model: str
    quant: str
    dtype: str
    device: str
    chip: str
    threads: int
    prompt_tokens: int
    gen_tokens: int
    repeats: int
    load_s: float
    prefill_tokens_per_s: float
    decode_tokens_per_s: float
    decode_ms_per_token: float
    bytes_per_token: int
    """Weights read for each decoded token."""
    decode_bytes_per_s: float
    """`bytes_per_token`, and the keys and values of the context, by the time a token takes."""
    read_bandwidth_bytes_per_s: float
    """What all threads together read from memory, measured right after."""
    percent_of_bandwidth: float
    python_ms_per_token: float
    """Of `decode_ms_per_token`, what passes outside kernels."""
    weight_bytes: int
    kv_cache_bytes: int
    peak_memory_bytes: int
    """Highest resident memory of the process."""
    peak_device_bytes: int
    """The most that was held of the device's own memory."""
    date: str
    versions: dict[str, str] = field(default_factory=dict)

    def to_dict(self) -> dict[str, Any]:
        """For JSON."""
        return asdict(self)


class BenchModel:
    """A model whose steps can be timed.

    Args:
        source: a checkpoint, or the shape of a model that gets random weights.
        engine: how to run it.
        progress: told of loading as (what, bytes done, bytes in all).

    Raises:
        OutOfMemoryError: the weights do not fit.
        KuiperError: as `LLM`.
    """

    def __init__(
        self, source: Checkpoint | ModelConfig, engine: EngineConfig, progress: Progress | None = None
    ) -> None:
        device = Device(engine.device)
        if engine.num_threads is not None:
            device.backend.set_num_threads(engine.num_threads)
        if isinstance(source, ModelConfig):
            stored = DType.bfloat16 if engine.dtype == "auto" else DType(engine.dtype)
            source = RandomCheckpoint(source, stored)
            check_model(source.config, source, device)  # a random checkpoint has what was asked of it
        needed, memory = packed_weight_bytes(source, engine), device.memory_info()
        if needed > memory.free_bytes:
            raise out_of_memory(str(device), needed, memory)
        started = time.perf_counter()
        self.decoder = load_decoder(source, engine, device, progress)
        self.load_s = time.perf_counter() - started
        self.config = source.config
        self.cache = KVCache(self.config, engine.block_size, kv_dtype(source, engine), device)
        self._pool = BlockPool(engine.block_size, 1 << 30, 16 if device.is_host else _GPU_FIRST_BLOCKS)
        self._scheduler = Scheduler(
            self._pool, max_num_seqs=1, max_num_batched_tokens=max_batched_tokens(engine, device)
        )
        vocab_size = self.config.vocab_size
        self._runner = Runner(self.decoder, self.cache, 1, self.config.max_position_embeddings, vocab_size)
        self._loop = StepLoop(self._scheduler, self._runner, Sampler())
        self.python_s = 0.0
        """Time that the host did not spend in kernels or waiting for them, in the last `decode`."""

    def prefill(self, num_tokens: int) -> float:
        """Seconds from a prompt of random tokens to the first token chosen."""
        sequence = self._sequence(num_tokens, 1)
        started = time.perf_counter()
        self._generate(sequence, 1)
        return time.perf_counter() - started

    def decode(self, prompt_tokens: int, num_tokens: int) -> float:
        """Seconds for `num_tokens` tokens after a prompt; the prompt and some tokens before are not timed."""
        sequence = self._sequence(prompt_tokens, num_tokens + _UNTIMED)
        self._generate(sequence, _UNTIMED)
        started, device_before = time.perf_counter(), self._runner.device_s
        self._generate(sequence, num_tokens + _UNTIMED)
        taken = time.perf_counter() - started
        self.python_s = taken - (self._runner.device_s - device_before)
        return taken

    def _generate(self, sequence: Sequence, count: int) -> None:
        """Go on until a sequence has so many tokens."""
        while len(sequence.output_ids) < count:
            self._loop.step(self)

    def on_token(self, sequence: Sequence, token_id: int) -> None:
        """End a sequence that has all its tokens."""
        if len(sequence.output_ids) == sequence.max_tokens:
            sequence.finish_reason = "length"
            self._scheduler.finish(sequence)

    def on_embedding(self, sequence: Sequence, hidden: NDArray[np.float32]) -> None:
        """Nothing is embedded here."""

    def on_guide_error(self, sequence: Sequence, error: Exception) -> None:
        """Nothing is guided here."""

    def _sequence(self, num_tokens: int, max_tokens: int) -> Sequence:
        ids = np.random.default_rng(0).integers(0, self.config.vocab_size, num_tokens)
        params = SamplingParams(temperature=0.0, ignore_eos=True)
        sequence = Sequence(
            ids.tolist(), params, seed=0, max_tokens=max_tokens, cache_salt=str(next(_numbers))
        )
        self._scheduler.add(sequence)
        return sequence


def run_bench(
    model: str | Path | None,
    engine: EngineConfig,
    *,
    config: ModelConfig | None = None,
    prompt_tokens: int = 512,
    gen_tokens: int = 64,
    repeats: int = 3,
    progress: Progress | None = None,
) -> BenchResult:
    """Time a model.

    Args:
        model: which one, as for `LLM`.
        engine: how to run it.
        config: the shape of a model of random weights, instead of `model`.
        prompt_tokens: tokens of the prefill, and in front of what is decoded.
        gen_tokens: tokens to decode.
        repeats: how often; medians are reported.
        progress: told of loading as (what, bytes done, bytes in all).

    Raises:
        UsageError: a number is below 1.
        ContextLengthError: the model's context has no room for prompt and output.
        KuiperError: as `LLM`.
    """
    if min(prompt_tokens, gen_tokens, repeats) < 1:
        raise UsageError("prompt_tokens, gen_tokens and repeats must be at least 1")
    bench = _load(model, config, engine, progress)
    if prompt_tokens + gen_tokens + _UNTIMED > bench.config.max_position_embeddings:
        raise ContextLengthError(
            f"{prompt_tokens} tokens of prompt, {gen_tokens} of output and {_UNTIMED} not timed do not fit "
            f"into the model's context of {bench.config.max_position_embeddings}"
        )
    bench.prefill(min(prompt_tokens, 64))  # kernels compiled, pages touched
    bench.decode(8, 2)
    prefill_s, decode_s, python_s = [], [], []
    for _ in range(repeats):
        prefill_s.append(bench.prefill(prompt_tokens))
        decode_s.append(bench.decode(prompt_tokens, gen_tokens) / gen_tokens)
        python_s.append(bench.python_s / gen_tokens)
    token_s = median(decode_s)
    context = prompt_tokens + gen_tokens / 2
    kv_bytes = bench.cache.bytes_per_token * context
    read = bench.decoder.bytes_per_token + kv_bytes
    bandwidth = bench.decoder.device.backend.read_bandwidth()
    return BenchResult(
        model="random" if config is not None else str(model or "demo"),
        quant=engine.quant or "none",
        dtype=str(bench.decoder.lm_head.weight.format),
        device=str(bench.decoder.device),
        chip=str(bench.decoder.device.backend.properties.get("name", platform.processor())),
        threads=bench.decoder.device.backend.num_threads,
        prompt_tokens=prompt_tokens,
        gen_tokens=gen_tokens,
        repeats=repeats,
        load_s=bench.load_s,
        prefill_tokens_per_s=prompt_tokens / median(prefill_s),
        decode_tokens_per_s=1 / token_s,
        decode_ms_per_token=1e3 * token_s,
        bytes_per_token=bench.decoder.bytes_per_token,
        decode_bytes_per_s=read / token_s,
        read_bandwidth_bytes_per_s=bandwidth,
        percent_of_bandwidth=100 * read / token_s / bandwidth,
        python_ms_per_token=1e3 * median(python_s),
        weight_bytes=bench.decoder.weight_bytes,
        kv_cache_bytes=bench.cache.nbytes,
        peak_memory_bytes=peak_memory_bytes(),
        peak_device_bytes=bench.decoder.device.allocator.stats().peak_reserved_bytes,
        date=date.today().isoformat(),
        versions=versions(bench.decoder.device),
    )


def _load(
    model: str | Path | None, config: ModelConfig | None, engine: EngineConfig, progress: Progress | None
) -> BenchModel:
    if config is not None:
        return BenchModel(config, engine, progress)
    with open_model(model) as checkpoint:
        return BenchModel(checkpoint, engine, progress)


def peak_memory_bytes() -> int:
    """Highest resident memory of this process, mapped files included."""
    if sys.platform == "linux":  # getrusage would count what the parent held when it forked
        status = Path("/proc/self/status").read_text().splitlines()
        return next(int(line.split()[1]) for line in status if line.startswith("VmHWM:")) * 1024
    else:
        unit = 1 if sys.platform == "darwin" else 1024
        return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit


def versions(device: Device) -> dict[str, str]:
    """Versions of what a measurement on a device depends on."""
    found = {"python": platform.python_version(), "system": platform.platform(terse=True)}
    packages = ["kuiperllm", "numpy"]
    packages += (
        ["numba", "llvmlite"] if device.is_host else ["cuda-core", "cuda-bindings", "nvidia-cuda-nvrtc"]
    )
    for name in packages:
        try:
            found[name] = importlib.metadata.version(name)
        except importlib.metadata.PackageNotFoundError:  # run from the source tree
            found[name] = "not installed"
    if not device.is_host:
        found["driver"] = str(device.backend.properties["driver"])
    return found
