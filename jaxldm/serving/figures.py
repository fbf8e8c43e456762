"""Figures of a server in the text format of Prometheus."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

from jaxldm.serving.service import Service

SECONDS = (0.05, 0.1, 0.25, 0.5, 1, 2.5, 5, 10, 30, 60, 120)


class Figures:
    """Counters of requests, and what the engine and its queue hold; nothing by prompt or client."""

    def __init__(self, service: Service):
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
        self._service = service
        self._registry.register(self)

    def collect(self) -> Iterator[Any]:
        """What Prometheus asks a collector."""
        from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily

        service = self._service
        beats = [station.beat for station in service.stations]
        gauges = {
            "jaxldm_ready": ("Whether requests are accepted.", service.ready),
            "jaxldm_queue_depth": ("Requests that wait for slots.", service.waiting),
            "jaxldm_orders_open": ("Requests that were accepted and are not done.", service.open_orders),
            "jaxldm_slots_busy": ("Images in slots.", sum(beat.busy for beat in beats)),
            "jaxldm_slots": ("Slots.", sum(beat.slots for beat in beats)),
            "jaxldm_workers_ready": ("Workers.", sum(station.ready for station in service.stations)),
            "jaxldm_embedding_cache_bytes": ("Kept embeddings.", sum(beat.cache_bytes for beat in beats)),
        }
        counters = {
            "jaxldm_images": ("Images drawn.", service.counters["images"]),
            "jaxldm_steps": ("Steps of the engine.", service.counters["steps"]),
            "jaxldm_cancelled": ("Requests that were cancelled.", service.counters["cancelled"]),
            "jaxldm_worker_restarts": ("Workers that were started again.", service.counters["restarts"]),
            "jaxldm_embedding_cache_hits": (
                "Texts that were encoded before.",
                sum(beat.cache_hits for beat in beats),
            ),
        }
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
