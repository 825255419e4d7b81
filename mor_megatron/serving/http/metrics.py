"""What Prometheus reads at /metrics."""

from __future__ import annotations

import time
from collections.abc import Iterator

from prometheus_client import CollectorRegistry, Counter, Histogram, ProcessCollector, Summary
from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily, Metric

from mor_megatron.serving.engine import Engine
from mor_megatron.serving.request import Event

_SECONDS = (0.001, 0.0025, 0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1.0, 2.5, 5.0, 10.0, 30.0, 60.0)


class Metrics:
    """Counts events, and asks the engine for its state when it is read.

    Args:
        engine: whose state is shown.
    """

    def __init__(self, engine: Engine):
        self.registry = CollectorRegistry()
        self.registry.register(_State(engine))
        ProcessCollector(registry=self.registry)  # memory, processor time, open files

        def histogram(name: str, text: str) -> Histogram:
            return Histogram(f"mor_{name}_seconds", text, buckets=_SECONDS, registry=self.registry)

        self.first = histogram("time_to_first_token", "From the arrival of a request to its first token")
        self.between = histogram("inter_token_latency", "Between two tokens of a request")
        self.each = histogram("time_per_output_token", "Mean of a request, after its first token")
        self.depth = Summary("mor_request_depth", "Mean recursions of a request's tokens", registry=self.registry)
        self.ended = Counter("mor_requests", "Requests that have ended", ["finish_reason"], registry=self.registry)
        self.tokens = Counter("mor_generated_tokens", "Tokens generated", registry=self.registry)

    def observer(self) -> Clock:
        """For a request that arrives now."""
        return Clock(self)


class Clock:
    """Times one request. Called in the engine's thread for each of its events."""

    def __init__(self, metrics: Metrics):
        self.metrics, self.arrival = metrics, time.monotonic()
        self.first = self.last = 0.0
        """When the first token came, and the last one."""
        self.count = 0

    def __call__(self, event: Event) -> None:
        metrics = self.metrics
        if event.token is not None:
            now = time.monotonic()
            if self.count == 0:
                self.first = now
                metrics.first.observe(now - self.arrival)
            else:
                metrics.between.observe(now - self.last)
            self.last = now
            self.count += 1
            metrics.tokens.inc()
        if event.finish_reason is not None:
            if self.count > 1:
                metrics.each.observe((self.last - self.first) / (self.count - 1))
            if event.request.depths:
                metrics.depth.observe(event.request.mean_depth)
            metrics.ended.labels(event.finish_reason).inc()


class _State:
    """The engine's state as metrics."""

    def __init__(self, engine: Engine):
        self.engine = engine

    def describe(self) -> list[Metric]:
        return []

    def collect(self) -> Iterator[Metric]:
        status = self.engine.status()
        yield GaugeMetricFamily("mor_requests_running", "Requests that have a lane", status.running)
        yield GaugeMetricFamily("mor_requests_waiting", "Requests that wait for one", status.waiting)
        yield GaugeMetricFamily(
            "mor_kv_tokens", "Tokens that the pages have room for, at planned depths", self.engine.kv_tokens
        )
        yield GaugeMetricFamily("mor_kv_use", "Fraction of keys' and values' memory that requests have", status.kv_use)
        rows = GaugeMetricFamily("mor_rows", "Rows inside the shared block by recursion", labels=["recursion"])
        for recursion, count in enumerate(status.rows):
            rows.add_metric([str(recursion)], count)
        yield rows
        yield CounterMetricFamily("mor_prompt_tokens", "Tokens of admitted prompts", status.prompt_tokens)
        yield CounterMetricFamily("mor_cached_tokens", "Those that the prefix cache had", status.cached_tokens)
        yield CounterMetricFamily("mor_preemptions", "Requests computed again for want of pages", status.preemptions)
        yield CounterMetricFamily("mor_passes", "Passes of the shared block", status.passes)
        yield CounterMetricFamily("mor_turns", "Turns of the layers around it", status.turns)
