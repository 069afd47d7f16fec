"""The server's metrics for Prometheus: HTTP requests, latencies of answers, the engine's figures."""

import time
from collections.abc import Iterator
from typing import Any

import prometheus_client
import torch
from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram, Metric, ProcessCollector
from prometheus_client.registry import Collector

from ram.decoding.requests import Request
from ram.decoding.scheduler import Ticket
from ram.serving.loop import Done, EngineThread, Listener, Piece

CONTENT_TYPE = prometheus_client.CONTENT_TYPE_PLAIN_0_0_4
COUNTERS = {  # figures of the engine that only grow
    "requests",
    "finished",
    "by_aligner",
    "prompt_tokens",
    "completion_tokens",
    "rounds",
    "prefix_hits",
}
SECONDS = (0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1.0, 2.5, 5.0, 10.0, 30.0, 60.0, 300.0)
TOKEN_SECONDS = (0.001, 0.0025, 0.005, 0.01, 0.02, 0.03, 0.05, 0.075, 0.1, 0.25, 0.5, 1.0)
QUEUE_LENGTHS = (0, 1, 2, 4, 8, 16, 32, 64, 128, 256)

prometheus_client.disable_created_metrics()  # one more series for each of ours, which no one reads


class Metrics:
    """Counts of HTTP requests and histograms of latencies, with the engine's figures beside them."""

    def __init__(self) -> None:
        self.registry = CollectorRegistry()
        self.requests = Counter(
            "ram_http_requests", "HTTP requests answered", ["route", "code"], registry=self.registry
        )
        self.request_seconds = Histogram(
            "ram_http_request_seconds",
            "seconds from an HTTP request to the end of its answer",
            ["route"],
            buckets=SECONDS,
            registry=self.registry,
        )
        self.running = Gauge("ram_http_running", "HTTP requests being answered", registry=self.registry)
        self.first_token_seconds = Histogram(
            "ram_first_token_seconds",
            "seconds from submitting an answer to its first token, waiting included",
            buckets=SECONDS,
            registry=self.registry,
        )
        self.token_seconds = Histogram(
            "ram_token_seconds",
            "seconds per token after the first, mean over an answer",
            buckets=TOKEN_SECONDS,
            registry=self.registry,
        )
        self.queue_length = Histogram(
            "ram_queue_length",
            "answers that already wait when one is submitted",
            buckets=QUEUE_LENGTHS,
            registry=self.registry,
        )
        ProcessCollector(registry=self.registry)

    def count(self, route: str, code: int, seconds: float) -> None:
        """Record an answered HTTP request."""
        self.requests.labels(route, str(code)).inc()
        self.request_seconds.labels(route).observe(seconds)

    def watch(self, engine: EngineThread) -> None:
        """Include an engine's figures from now on."""
        self.registry.register(EngineFigures(engine))

    def text(self) -> str:
        """All metrics in Prometheus' text format, version 0.0.4."""
        return prometheus_client.generate_latest(self.registry).decode()


class EngineFigures(Collector):
    """The figures of an engine, read whenever the metrics are."""

    def __init__(self, engine: EngineThread) -> None:
        self.engine = engine

    def collect(self) -> Iterator[Metric]:
        for key, value in self.engine.figures().items():
            if samples := list(labelled_numbers(value)):
                kind = "counter" if key in COUNTERS else "gauge"
                name = f"ram_{key}_total" if key in COUNTERS else f"ram_{key}"
                metric = Metric(f"ram_{key}", f"the engine's {key.replace('_', ' ')}", kind)
                for labels, number in samples:
                    metric.add_sample(name, labels, number)
                yield metric
        if torch.cuda.is_available():
            memory = Metric("ram_device_memory_bytes", "memory that tensors take", "gauge")
            for device in range(torch.cuda.device_count()):
                used = torch.cuda.memory_allocated(device)
                memory.add_sample("ram_device_memory_bytes", {"device": str(device)}, used)
            yield memory


class TimedEngine:
    """An engine's `submit` and `cancel` that also record the latencies of each answer."""

    def __init__(self, engine: EngineThread, metrics: Metrics) -> None:
        self.engine, self.metrics = engine, metrics

    def submit(self, request: Request, listener: Listener) -> Ticket:
        n_waiting = self.engine.figures()["waiting"]
        ticket = self.engine.submit(request, self._timed(listener))
        self.metrics.queue_length.observe(n_waiting)
        return ticket

    def cancel(self, ticket: Ticket) -> None:
        self.engine.cancel(ticket)

    def _timed(self, listener: Listener) -> Listener:
        begin, first = time.monotonic(), None
        n_first = 0  # tokens of the first piece, which came together

        def listen(event: Piece | Done) -> None:
            nonlocal first, n_first
            now = time.monotonic()
            if isinstance(event, Piece) and first is None:
                first, n_first = now, len(event.token_ids)
                self.metrics.first_token_seconds.observe(now - begin)
            if isinstance(event, Done) and first is not None and event.n_completion > n_first:
                self.metrics.token_seconds.observe((now - first) / (event.n_completion - n_first))
            listener(event)

        return listen


def labelled_numbers(value: Any, labels: dict[str, str] | None = None) -> Iterator[tuple[dict, float]]:
    """The numbers of a figure with their labels: `kind`, and `name` below it."""
    labels = labels or {}
    if isinstance(value, int | float):
        yield labels, float(value)
    elif isinstance(value, dict):
        level = "name" if labels else "kind"
        for key, inner in value.items():
            yield from labelled_numbers(inner, {**labels, level: key})
