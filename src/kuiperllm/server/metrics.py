"""Numbers for Prometheus: under vLLM's names, which dashboards and routers read, and some of our own.

Sums and states of the engine are read when somebody asks; what concerns a request is added at its end.
"""

from __future__ import annotations

import time
from bisect import bisect_left
from collections.abc import Callable, Iterator
from itertools import accumulate
from typing import Any

from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram, ProcessCollector, generate_latest
from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily, HistogramMetricFamily, Metric
from prometheus_client.utils import floatToGoString

from kuiperllm.config import SamplingParams
from kuiperllm.engine.output import Completion
from kuiperllm.engine.stats import EngineStats

CONTENT_TYPE = "text/plain; version=0.0.4; charset=utf-8"

_FIRST_S = (
    0.001,
    0.005,
    0.01,
    0.02,
    0.04,
    0.06,
    0.08,
    0.1,
    0.25,
    0.5,
    0.75,
    1,
    2.5,
    5,
    7.5,
    10,
    20,
    40,
    80,
    160,
)
_TOKEN_S = (0.001, 0.0025, 0.005, 0.01, 0.025, 0.05, 0.075, 0.1, 0.15, 0.2, 0.3, 0.4, 0.5, 0.75, 1, 2.5, 5)
_WHOLE_S = (0.05, 0.1, 0.3, 0.5, 0.8, 1, 1.5, 2, 2.5, 5, 10, 15, 20, 30, 40, 50, 60, 120, 240, 480, 960)
_TOKENS = (1, 2, 5, 10, 20, 50, 100, 200, 500, 1000, 2000, 5000, 10000, 20000, 50000, 100000, 200000)
_COUNTS = (1, 2, 5, 10, 20, 50, 100)
_COMPILE_S = (0.0005, 0.001, 0.005, 0.01, 0.05, 0.1, 0.25, 0.5, 1, 2.5, 5, 10)


class Metrics:
    """All of the server's numbers.

    Args:
        model: what requests call the model: the label `model_name`.
        stats: gives the engine's counters and gauges.
        limits: what the engine can hold, for the labels of `vllm:cache_config_info`.
    """

    def __init__(self, model: str, stats: Callable[[], EngineStats], limits: dict[str, Any]) -> None:
        self._registry = CollectorRegistry()
        self._registry.register(_EngineNumbers(model, stats))
        ProcessCollector(registry=self._registry)

        def histogram(name: str, about: str, buckets: tuple[float, ...]) -> Histogram:
            made = Histogram(f"vllm:{name}", about, ("model_name",), buckets=buckets, registry=self._registry)
            return made.labels(model)

        self._first = histogram("time_to_first_token_seconds", "From arrival to the first token.", _FIRST_S)
        self._between = _TokenTimes(model)
        self._registry.register(self._between)
        self._per_token = histogram(
            "request_time_per_output_token_seconds", "Mean time between tokens of an output.", _TOKEN_S
        )
        self._whole = histogram("e2e_request_latency_seconds", "From arrival to the last token.", _WHOLE_S)
        self._queued = histogram("request_queue_time_seconds", "From arrival until work began.", _WHOLE_S)
        self._inference = histogram("request_inference_time_seconds", "From begin to end of work.", _WHOLE_S)
        self._prefill = histogram(
            "request_prefill_time_seconds", "From begin of work to the first token.", _WHOLE_S
        )
        self._decode = histogram("request_decode_time_seconds", "From the first token to the last.", _WHOLE_S)
        self._prompt = histogram("request_prompt_tokens", "Tokens of a prompt.", _TOKENS)
        self._generated = histogram("request_generation_tokens", "Tokens of an output.", _TOKENS)
        self._most = histogram("request_params_max_tokens", "Most tokens that were asked for.", _TOKENS)
        self._n = histogram("request_params_n", "Outputs that were asked for.", _COUNTS)

        self.http_requests = Counter(
            "kuiper:http_requests", "Answers.", ("route", "method", "status"), registry=self._registry
        )
        self.http_in_flight = Gauge(
            "kuiper:http_requests_in_flight", "Requests that are being answered.", registry=self._registry
        )
        self.client_gone = Counter(
            "kuiper:client_disconnects", "Requests whose client went away.", registry=self._registry
        )
        self.guide_compile = Histogram(
            "kuiper:grammar_compile_seconds",
            "Making a token mask of a schema, regex or grammar.",
            buckets=_COMPILE_S,
            registry=self._registry,
        )
        started = Gauge("kuiper:start_time_seconds", "When serving began.", registry=self._registry)
        started.set(time.time())
        names = (*limits, "model_name")
        info = Gauge("vllm:cache_config_info", "What the cache can hold.", names, registry=self._registry)
        info.labels(*map(str, limits.values()), model).set(1)

    def tokens(self, seconds: float, count: int) -> None:
        """So many tokens of an output came so long after those before them."""
        self._between.add(seconds, count)

    def finished(self, completion: Completion, params: SamplingParams) -> None:
        """An output ended."""
        made = len(completion.token_ids)
        self._whole.observe(completion.total_s)
        self._queued.observe(completion.queue_s)
        self._prompt.observe(len(completion.prompt_token_ids))
        self._generated.observe(made)
        self._inference.observe(max(0.0, completion.total_s - completion.queue_s))
        if made:
            self._first.observe(completion.time_to_first_token_s)
            self._prefill.observe(max(0.0, completion.time_to_first_token_s - completion.queue_s))
            self._decode.observe(max(0.0, completion.total_s - completion.time_to_first_token_s))
        if completion.decode_tokens_per_s > 0:
            self._per_token.observe(1 / completion.decode_tokens_per_s)
        if completion.index == 0:
            self._n.observe(params.n)
            if params.max_tokens is not None:
                self._most.observe(params.max_tokens)

    def text(self) -> bytes:
        """Everything, in Prometheus's text format."""
        return generate_latest(self._registry)


class _TokenTimes:
    """A histogram of the times between tokens, many of them at once; under its new and its old name."""

    def __init__(self, model: str) -> None:
        self._model = model
        self._counts = [0] * (len(_TOKEN_S) + 1)
        self._sum = 0.0

    def add(self, seconds: float, count: int) -> None:
        """So many tokens took so long together."""
        if count > 0:
            self._counts[bisect_left(_TOKEN_S, seconds / count)] += count
            self._sum += seconds

    def collect(self) -> Iterator[Metric]:
        """The numbers of this moment."""
        bounds = [*map(floatToGoString, _TOKEN_S), "+Inf"]
        buckets = list(zip(bounds, accumulate(self._counts), strict=True))
        for name in ("inter_token_latency_seconds", "time_per_output_token_seconds"):
            family = HistogramMetricFamily(
                f"vllm:{name}", "Between two tokens of an output.", labels=("model_name",)
            )
            family.add_metric((self._model,), buckets, self._sum)
            yield family


class _EngineNumbers:
    """What the engine counts itself, read when it is asked for."""

    def __init__(self, model: str, stats: Callable[[], EngineStats]) -> None:
        self._model = model
        self._stats = stats

    def collect(self) -> Iterator[Metric]:
        """The numbers of this moment."""
        stats = self._stats()
        gauges = {
            "vllm:num_requests_running": ("Outputs that are worked on.", stats.num_running),
            "vllm:num_requests_waiting": ("Outputs that wait.", stats.num_waiting),
            "vllm:kv_cache_usage_perc": ("Part of the key/value cache in use, 0 to 1.", stats.kv_usage),
            "vllm:gpu_cache_usage_perc": ("An older name of vllm:kv_cache_usage_perc.", stats.kv_usage),
            "kuiper:kv_blocks": ("Blocks of the key/value cache.", stats.kv_blocks),
            "kuiper:kv_blocks_used": ("Blocks that belong to outputs under way.", stats.kv_blocks_used),
        }
        counters = {
            "vllm:prompt_tokens": ("Tokens of prompts.", stats.prompt_tokens),
            "vllm:generation_tokens": ("Tokens of outputs.", stats.generated_tokens),
            "vllm:num_preemptions": ("Outputs that gave up their blocks for others.", stats.preemptions),
            "vllm:prefix_cache_queries": ("Prompt tokens looked up in the cache.", stats.prefix_queries),
            "vllm:prefix_cache_hits": ("Prompt tokens found in the cache.", stats.prefix_hits),
            "kuiper:engine_steps": ("Passes of the model.", stats.steps),
        }
        for name, (about, value) in gauges.items():
            gauge = GaugeMetricFamily(name, about, labels=("model_name",))
            gauge.add_metric((self._model,), value)
            yield gauge
        for name, (about, value) in counters.items():
            counter = CounterMetricFamily(name, about, labels=("model_name",))
            counter.add_metric((self._model,), value)
            yield counter
        ended = CounterMetricFamily(
            "vllm:request_success", "Outputs by the way they ended.", labels=("model_name", "finished_reason")
        )
        for reason, count in stats.finished.items():
            ended.add_metric((self._model, reason), count)
        yield ended
