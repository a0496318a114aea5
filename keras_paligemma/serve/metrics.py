"""The metrics that Prometheus scrapes."""

from prometheus_client import CollectorRegistry
from prometheus_client import Counter
from prometheus_client import Gauge
from prometheus_client import Histogram


class Metrics:
    """The counters of a server."""

    def __init__(self):
        self.registry = CollectorRegistry()
        prefix = "keras_paligemma_"
        self.requests = Counter(
            prefix + "requests",
            "Requests by path and status.",
            ["path", "status"],
            registry=self.registry,
        )
        self.latency = Histogram(
            prefix + "request_seconds",
            "Seconds from a request to the end of its reply.",
            ["path"],
            registry=self.registry,
        )
        self.queue = Gauge(
            prefix + "queue", "Requests that wait.", registry=self.registry
        )
        self.batch_size = Histogram(
            prefix + "batch_size",
            "Requests answered together.",
            buckets=(1, 2, 4, 8, 16, 32, 64),
            registry=self.registry,
        )
        self.tokens = Counter(
            prefix + "tokens", "Tokens answered.", registry=self.registry
        )
