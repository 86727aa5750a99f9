"""Metrics in Prometheus's text format, in a registry of their own."""

from __future__ import annotations

from collections.abc import Callable, Iterator

from prometheus_client import (
    CONTENT_TYPE_LATEST,
    CollectorRegistry,
    Counter,
    Histogram,
    ProcessCollector,
    generate_latest,
)
from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily, Metric
from prometheus_client.registry import Collector

from harness.serve.swap import Shelf

SECONDS = (0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1.0, 2.5, 5.0, 10.0, 30.0)
SIZES = (1, 2, 4, 8, 16, 32, 64, 128)


class _Now(Collector):
    """Metrics that are read when they are asked for: queue, artefact, replacements."""

    def __init__(self, shelf: Shelf, queue: Callable[[], int]) -> None:
        self._shelf, self._queue = shelf, queue

    def collect(self) -> Iterator[Metric]:
        """As the base class."""
        yield GaugeMetricFamily("shelfmark_queue", "Requests being read, decoded or embedded.", self._queue())
        current = self._shelf.current
        meta = current.artefact.meta
        labels = {"artefact": current.id, **{name: str(meta[name]) for name in ("method", "run", "checkpoint")}}
        info = GaugeMetricFamily("shelfmark_artefact_documents", "Documents of the artefact in use.", labels=[*labels])
        info.add_metric([*labels.values()], len(current.artefact.documents))
        yield info
        swaps = CounterMetricFamily("shelfmark_swaps", "Artefacts taken into use, or refused.", labels=["result"])
        swaps.add_metric(["done"], self._shelf.swaps)
        swaps.add_metric(["refused"], self._shelf.failures)
        yield swaps


class Metrics:
    """Counters of one service.

    Args:
        shelf: the artefact in use.
        queue: places of the queue that are taken.
    """

    def __init__(self, shelf: Shelf, queue: Callable[[], int]) -> None:
        self._registry = CollectorRegistry()
        ProcessCollector(registry=self._registry)  # memory, processor time, open files
        self._registry.register(_Now(shelf, queue))
        self._requests = Counter(
            "shelfmark_requests", "Answered requests.", ["route", "status"], registry=self._registry
        )
        self._seconds = Histogram(
            "shelfmark_request_seconds",
            "From the headers of a request to the end of its answer.",
            ["route"],
            buckets=SECONDS,
            registry=self._registry,
        )
        self._batches = Histogram(
            "shelfmark_batch_size", "Queries embedded together.", buckets=SIZES, registry=self._registry
        )
        self._work = Histogram(
            "shelfmark_batch_seconds", "Embedding and search of a batch.", buckets=SECONDS, registry=self._registry
        )

    def request(self, route: str, status: int, seconds: float) -> None:
        """Counts an answered request."""
        self._requests.labels(route, str(status)).inc()
        self._seconds.labels(route).observe(seconds)

    def batch(self, size: int, seconds: float) -> None:
        """Counts a batch."""
        self._batches.observe(size)
        self._work.observe(seconds)

    def text(self) -> tuple[bytes, str]:
        """All metrics, and their content type."""
        return generate_latest(self._registry), CONTENT_TYPE_LATEST
