"""Figures of a server in the text format of Prometheus."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

from jaxldm.serving.embeddings import Embeddings
from jaxldm.serving.service import Service

SECONDS = (0.05, 0.1, 0.25, 0.5, 1, 2.5, 5, 10, 30, 60, 120)


class Figures:
    """Counters of requests, and what the engine and its queue hold; nothing by prompt or client."""

    def __init__(self, service: Service, embeddings: Embeddings | None = None):
        import prometheus_client

        self._registry = prometheus_client.CollectorRegistry()
        self.requests = prometheus_client.Counter(
            "jaxldm_requests", "Answers.", ["path", "code"], registry=self._registry
        )
        self.seconds = prometheus_client.Histogram(
            "jaxldm_request_seconds",
            "From a request of images to its last byte.",
            buckets=SECONDS,
            registry=self._registry,
        )
        self._service, self._embeddings = service, embeddings
        self._registry.register(self)

    def collect(self) -> Iterator[Any]:
        """What Prometheus asks a collector."""
        from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily

        service, engine = self._service, self._service.engine
        gauges = {
            "jaxldm_ready": ("Whether requests are accepted.", service.ready),
            "jaxldm_queue_depth": ("Requests that wait for slots.", service.waiting),
            "jaxldm_orders_open": ("Requests that were accepted and are not done.", service.open_orders),
            "jaxldm_slots_busy": ("Images in slots.", engine.busy),
            "jaxldm_slots": ("Slots.", sum(table.size for table in engine.tables)),
        }
        counters = {
            "jaxldm_images": ("Images drawn.", service.counters["images"]),
            "jaxldm_steps": ("Steps of the engine.", service.counters["steps"]),
            "jaxldm_cancelled": ("Requests that were cancelled.", service.counters["cancelled"]),
        }
        if self._embeddings is not None:
            hits = self._embeddings.hits
            gauges["jaxldm_embedding_cache_bytes"] = ("Kept embeddings.", self._embeddings.num_bytes)
            counters["jaxldm_embedding_cache_hits"] = ("Texts that were encoded before.", hits)
        for name, (text, value) in gauges.items():
            yield GaugeMetricFamily(name, text, value=float(value))
        for name, (text, value) in counters.items():
            yield CounterMetricFamily(name, text, value=float(value))
        refused = CounterMetricFamily("jaxldm_refused", "Requests that were refused.", labels=["type"])
        for name, value in list(service.counters.items()):
            if name.startswith("refused_"):
                refused.add_metric([name.removeprefix("refused_")], value)
        yield refused

    def text(self) -> tuple[bytes, str]:
        """(the page, its content type)."""
        from prometheus_client import CONTENT_TYPE_LATEST, generate_latest

        return generate_latest(self._registry), CONTENT_TYPE_LATEST
