"""Prometheus metrics, under the names that vLLM's dashboards use."""

from __future__ import annotations

from typing import Any

from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram
from prometheus_client.exposition import CONTENT_TYPE_LATEST, generate_latest

from infer.batching.job import Job
from infer.batching.worker import Worker
from infer.engine.answer import Completion

_BUCKETS = (  # seconds
    0.001, 0.005, 0.01, 0.02, 0.04, 0.06, 0.08, 0.1, 0.15, 0.25, 0.5, 0.75, 1, 2.5, 5, 10, 20, 40,
    80, 160, 320, 640,
)  # fmt: skip


class Metrics:
    """The metrics of one server, in a registry of their own."""

    content_type = CONTENT_TYPE_LATEST

    def __init__(self, model: str, worker: Worker):
        self._registry = registry = CollectorRegistry()

        def make(kind: Any, name: str, text: str, *labels: str) -> Any:
            names = ("model_name", *labels)
            options: dict[str, Any] = {"buckets": _BUCKETS} if kind is Histogram else {}
            metric = kind(f"vllm:{name}", text, names, registry=registry, **options)
            return metric if labels else metric.labels(model)

        self._model = model
        running = make(Gauge, "num_requests_running", "Requests in a slot.")
        running.set_function(lambda: worker.status.running)
        waiting = make(Gauge, "num_requests_waiting", "Requests in the queue.")
        waiting.set_function(lambda: worker.status.waiting)
        self._first = make(Histogram, "time_to_first_token_seconds", "From request to first token.")
        self._between = make(
            Histogram, "inter_token_latency_seconds", "Between two tokens of a request."
        )
        self._total = make(Histogram, "e2e_request_latency_seconds", "From request to last token.")
        self._prompt = make(Counter, "prompt_tokens", "Prompt tokens.")
        self._generated = make(Counter, "generation_tokens", "Generated tokens.")
        self._queries = make(Counter, "prefix_cache_queries", "Prompt tokens looked up.")
        self._hits = make(Counter, "prefix_cache_hits", "Prompt tokens found in a slot.")
        self._ended = make(
            Counter, "request_success", "Requests with a complete answer.", "finished_reason"
        )

    def text(self) -> bytes:
        """Return all metrics as Prometheus reads them."""
        return generate_latest(self._registry)

    def first_token(self, job: Job, seconds: float) -> None:
        """Record the first event of a job, so many seconds after it was submitted."""
        self._first.observe(seconds)
        self._prompt.inc(len(job.row.ids))
        self._queries.inc(len(job.row.ids))
        self._hits.inc(job.row.stats.reused_tokens)
        self._generated.inc()

    def next_token(self, seconds: float) -> None:
        """Record a later event of a job, so many seconds after the one before."""
        self._between.observe(seconds)
        self._generated.inc()

    def ended(self, completion: Completion, seconds: float) -> None:
        """Record the last event of a job, so many seconds after it was submitted."""
        self._total.observe(seconds)
        self._ended.labels(self._model, completion.finish_reason).inc()
