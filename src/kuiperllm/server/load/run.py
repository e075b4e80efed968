"""Requests at a rate, or so many at a time; how long each takes, and how much is answered."""

from __future__ import annotations

import asyncio
import math
import random
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass, field
from statistics import mean
from typing import Any

from kuiperllm.errors import KuiperError, UsageError
from kuiperllm.server.load.client import AnswerError, Target

_WORDS = (
    "the sea is wide and the night was long so they went on along the shore with what little they had "
    "until somebody asked where the road would end and nobody knew an answer to that"
)


@dataclass(frozen=True, slots=True)
class LoadConfig:
    """What is asked of a server.

    Raises:
        UsageError: a number is not possible.
    """

    num_requests: int = 64
    rate: float = math.inf
    """Requests a second, at random times (a Poisson process); infinite: as soon as there is room."""
    concurrency: int | None = None
    """Most requests under way; None: no limit."""
    prompt_tokens: int = 128
    gen_tokens: int = 64
    spread: float = 0.0
    """Lengths are drawn from so much below to so much above, as a part: 0.5 is half to one and a half."""
    temperature: float = 0.0
    seed: int = 0

    def __post_init__(self) -> None:
        if min(self.num_requests, self.prompt_tokens, self.gen_tokens) < 1:
            raise UsageError("requests, prompt tokens and tokens to generate must be at least 1")
        if not self.rate > 0:
            raise UsageError(f"the rate must be above 0, not {self.rate}")
        if self.concurrency is not None and self.concurrency < 1:
            raise UsageError(f"the concurrency must be at least 1, not {self.concurrency}")
        if not 0 <= self.spread < 1:
            raise UsageError(f"the spread must be 0 to below 1, not {self.spread}")


@dataclass(slots=True)
class Sample:
    """One request."""

    begun_s: float
    """Since the first one."""
    first_token_s: float = 0.0
    """From its own begin."""
    total_s: float = 0.0
    tokens: int = 0
    token_times_s: list[float] = field(default_factory=list)
    """When tokens came, since the first request's begin: (an entry for each)."""
    error: str | None = None

    @property
    def per_token_s(self) -> float | None:
        """Mean time of a token after the first; None if there was only one."""
        return (self.total_s - self.first_token_s) / (self.tokens - 1) if self.tokens > 1 else None


@dataclass(frozen=True, slots=True)
class LoadResult:
    """All requests together."""

    model: str
    config: LoadConfig
    samples: list[Sample]
    duration_s: float
    prompt_tokens: int
    """Of the requests that were answered."""

    def to_dict(self) -> dict[str, Any]:
        """For JSON: figures, without the samples."""
        good = [sample for sample in self.samples if sample.error is None]
        made = sum(sample.tokens for sample in good)
        errors: dict[str, int] = {}
        for sample in self.samples:
            if sample.error is not None:
                errors[sample.error] = errors.get(sample.error, 0) + 1
        config = asdict(self.config)
        return {
            "model": self.model,
            "config": config | {"rate": None if math.isinf(self.config.rate) else self.config.rate},
            "requests": len(self.samples),
            "answered": len(good),
            "errors": errors,
            "duration_s": self.duration_s,
            "requests_per_s": len(good) / self.duration_s,
            "prompt_tokens": self.prompt_tokens,
            "output_tokens": made,
            "output_tokens_per_s": made / self.duration_s,
            "total_tokens_per_s": (made + self.prompt_tokens) / self.duration_s,
            "ttft_ms": summary([1e3 * sample.first_token_s for sample in good]),
            "tpot_ms": summary([1e3 * s.per_token_s for s in good if s.per_token_s is not None]),
            "e2e_ms": summary([1e3 * sample.total_s for sample in good]),
        }


def summary(values: list[float]) -> dict[str, float] | None:
    """Mean and percentiles; None of nothing."""
    if not values:
        return None
    ordered = sorted(values)
    return {"mean": mean(ordered)} | {f"p{part}": percentile(ordered, part) for part in (50, 90, 95, 99)}


def percentile(ordered: list[float], part: float) -> float:
    """The value that `part` percent of values in ascending order are not above, interpolated."""
    place = (len(ordered) - 1) * part / 100
    low = math.floor(place)
    high = min(low + 1, len(ordered) - 1)
    return ordered[low] + (ordered[high] - ordered[low]) * (place - low)


async def run_load(
    target: Target,
    config: LoadConfig,
    model: str | None = None,
    progress: Callable[[int, int], None] | None = None,
) -> LoadResult:
    """Put load on a server.

    Args:
        target: the server.
        config: how much.
        model: which of its models; None: the first.
        progress: told how many requests have ended, of how many.

    Raises:
        AnswerError: the server does not say what it serves.
        KuiperError: not one request was answered.
        OSError: there is no connection.
    """
    card = (await target.get("/v1/models"))["data"][0]
    name = model or str(card["id"])
    vocabulary = (await target.post("/tokenize", {"model": name, "prompt": _WORDS}))["tokens"][1:]
    rng = random.Random(config.seed)
    bodies = [_body(name, config, vocabulary, rng) for _ in range(config.num_requests)]
    room = asyncio.Semaphore(config.concurrency or config.num_requests)
    samples: list[Sample] = []
    started = time.perf_counter()

    async def ask(body: dict[str, Any]) -> None:
        async with room:
            sample = Sample(begun_s=time.perf_counter() - started)
            samples.append(sample)
            await _ask(target, body, sample, started)
        if progress is not None:
            progress(sum(1 for one in samples if one.total_s or one.error), config.num_requests)

    async with asyncio.TaskGroup() as tasks:
        due = started
        for body in bodies:
            if not math.isinf(config.rate):
                due += rng.expovariate(config.rate)
                await asyncio.sleep(max(0.0, due - time.perf_counter()))
            tasks.create_task(ask(body))
    duration = time.perf_counter() - started
    good = [sample for sample in samples if sample.error is None]
    if not good:
        raise KuiperError(f"no request was answered; the first failed with: {samples[0].error}")
    asked = sum(len(body["prompt"]) for body in bodies) * len(good) // len(bodies)
    return LoadResult(name, config, samples, duration, asked)


def _body(name: str, config: LoadConfig, vocabulary: list[int], rng: random.Random) -> dict[str, Any]:
    """A prompt of words in random order, so that no two begin alike for long."""

    def length(around: int) -> int:
        return max(1, round(around * rng.uniform(1 - config.spread, 1 + config.spread)))

    return {
        "model": name,
        "prompt": rng.choices(vocabulary, k=length(config.prompt_tokens)),
        "max_tokens": length(config.gen_tokens),
        "temperature": config.temperature,
        "seed": rng.getrandbits(31),
        "ignore_eos": True,
        "stream": True,
        "stream_options": {"include_usage": True, "continuous_usage_stats": True},
    }


async def _ask(target: Target, body: dict[str, Any], sample: Sample, started: float) -> None:
    begun = sample.begun_s + started
    try:
        async for now, event in target.stream("/v1/completions", body):
            made = int((event.get("usage") or {}).get("completion_tokens", sample.tokens))
            if made > sample.tokens:
                sample.first_token_s = sample.first_token_s or now - begun
                sample.token_times_s += [now - started] * (made - sample.tokens)
                sample.tokens, sample.total_s = made, now - begun
        if not sample.tokens:
            sample.error = "no tokens"
    except AnswerError as error:
        sample.error = f"status {error.status}" if error.status else str(error)
    except (OSError, ValueError) as error:
        sample.error = type(error).__name__
