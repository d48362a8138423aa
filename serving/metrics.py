"""What Prometheus scrapes. What vLLM has too has its meaning and its name, with `llama_` for `vllm:`."""

from collections.abc import Iterator
from typing import TYPE_CHECKING, Literal, get_args

from fastapi import APIRouter, Request
from fastapi.responses import Response
from prometheus_client import (
    CollectorRegistry,
    Counter,
    Histogram,
    Metric,
    ProcessCollector,
    disable_created_metrics,
)
from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily
from prometheus_client.exposition import choose_encoder
from prometheus_client.registry import Collector

if TYPE_CHECKING:  # a proxy in front of the engine has these figures' names, and no torch
    from engine.engine import Engine

Outcome = Literal["stop", "length", "aborted", "error"]
"""How a request ended that the engine took: complete, cut, left by its client, or failed."""

Reason = Literal[
    "invalid", "too_long", "too_large", "not_found", "key", "key_limit", "queue_full", "draining",
    "engine_dead", "deadline", "too_slow", "internal",
]  # fmt: skip
"""Why a client got an error in place of an answer, or of the rest of one."""

# From a GPU that one user has to himself to a small CPU that many wait for.
# fmt: off
_FIRST_TOKEN = (0.005, 0.01, 0.02, 0.04, 0.08, 0.15, 0.25, 0.5, 1, 2.5, 5, 10, 20, 40, 80, 160, 600)
_NEXT_TOKEN = (0.001, 0.0025, 0.005, 0.0075, 0.01, 0.015, 0.02, 0.03, 0.04, 0.06, 0.08, 0.1, 0.15, 0.25, 0.5,
               1, 2.5, 10)
_WHOLE_ANSWER = (0.05, 0.1, 0.25, 0.5, 1, 2.5, 5, 10, 20, 30, 60, 120, 300, 600)
# fmt: on
_LENGTH = tuple(2**power for power in range(18))

# When each series began: as many series again, which Prometheus does not need.
disable_created_metrics()  # type: ignore[no-untyped-call]

router = APIRouter()


@router.get("/metrics")
def scrape(request: Request) -> Response:
    """The server's figures, in Prometheus' text format or, if that is asked for, OpenMetrics."""
    metrics: Metrics = request.app.state.metrics
    encode, content_type = choose_encoder(request.headers.get("Accept", ""))
    return Response(encode(metrics.registry), headers={"Content-Type": content_type})


class Metrics:
    """The figures of one server. It counts what goes over the wire; the rest is read from the engine."""

    def __init__(self, engine: "Engine") -> None:
        self.registry = registry = CollectorRegistry()
        registry.register(_EngineFigures(engine))
        ProcessCollector(registry=registry)
        self.prompt_tokens = Counter(
            "llama_prompt_tokens", "Tokens of the prompts whose answers have begun.", registry=registry
        )
        self.generation_tokens = Counter(
            "llama_generation_tokens", "Tokens of the answers, as they are made.", registry=registry
        )
        self.finished = Counter(
            "llama_request_finished",
            "Requests that the engine took and that have ended, by how.",
            ["finished_reason"],
            registry=registry,
        )
        self.errors = Counter(
            "llama_request_errors",
            "Requests that were refused, or ended by an error, by why. /health counts for none.",
            ["reason"],
            registry=registry,
        )
        for outcome in get_args(Outcome):
            self.finished.labels(outcome)
        for reason in get_args(Reason):
            self.errors.labels(reason)

        def histogram(name: str, meaning: str, buckets: tuple[float, ...]) -> Histogram:
            return Histogram(f"llama_{name}", meaning, buckets=buckets, registry=registry)

        self.first_token = histogram(
            "time_to_first_token_seconds",
            "From the request's arrival to the first text.",
            _FIRST_TOKEN,
        )
        self.next_token = histogram(
            "inter_token_latency_seconds",
            "Between two pieces of an answer. A piece is a token, or the few that make whole characters.",
            _NEXT_TOKEN,
        )
        self.whole_answer = histogram(
            "e2e_request_latency_seconds", "Of complete answers: how long they took.", _WHOLE_ANSWER
        )
        self.prompt_length = histogram(
            "request_prompt_tokens", "Of complete answers: the tokens of the prompt.", _LENGTH
        )
        self.answer_length = histogram(
            "request_generation_tokens", "Of complete answers: their own tokens.", _LENGTH
        )


class _EngineFigures(Collector):
    """What the engine counts for itself, read when it is asked for: a step pays nothing for it."""

    def __init__(self, engine: "Engine") -> None:
        self._engine = engine

    def collect(self) -> Iterator[Metric]:
        stats = self._engine.stats
        yield GaugeMetricFamily(
            "llama_up", "1 while requests are taken, else 0: as /health.", float(self._engine.failure is None)
        )
        yield GaugeMetricFamily(
            "llama_num_requests_running", "Answers that are being computed.", stats.running
        )
        yield GaugeMetricFamily("llama_num_requests_waiting", "Answers that wait for it.", stats.waiting)
        yield GaugeMetricFamily(
            "llama_kv_cache_usage_perc", "Share of the KV cache in use, from 0 to 1.", stats.kv_cache_usage
        )
        yield CounterMetricFamily(
            "llama_prefix_cache_queries", "Tokens looked for in the cache.", stats.prefix_cache_queries
        )
        yield CounterMetricFamily(
            "llama_prefix_cache_hits", "Tokens found in the cache.", stats.prefix_cache_hits
        )
        yield CounterMetricFamily(
            "llama_num_preemptions", "Answers that gave way, for want of KV cache.", stats.preemptions
        )
        yield CounterMetricFamily(
            "llama_spec_decode_num_draft_tokens", "Tokens guessed and computed.", stats.drafts
        )
        yield CounterMetricFamily(
            "llama_spec_decode_num_accepted_tokens", "Guesses that were right.", stats.right_drafts
        )
