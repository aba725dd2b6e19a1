"""What the service counts, for Prometheus."""

from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram, ProcessCollector

_BATCH_BUCKETS = (1, 2, 4, 8, 16, 32, 64, 128)
_TIME_BUCKETS = (0.001, 0.0025, 0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1, 2.5, 5, 10, 30)


class Metrics:
    """Counters of one application, in a registry of its own.

    Attributes:
        active: Requests whose answer is not complete.
    """

    def __init__(self) -> None:
        self.active = 0
        self.registry = registry = CollectorRegistry()
        ProcessCollector(registry=registry)
        self.requests = Counter(
            "clever_zoo_requests",
            "Requests answered; status 499: the client hung up.",
            ["handler", "status"],
            registry=registry,
        )
        self.images = Counter("clever_zoo_images", "Images run.", registry=registry)
        self.batch_images = Histogram(
            "clever_zoo_batch_images",
            "Images per batch.",
            buckets=_BATCH_BUCKETS,
            registry=registry,
        )
        self.queued_images = Gauge(
            "clever_zoo_queued_images", "Images waiting for a batch.", registry=registry
        )
        self.decoding_files = Gauge(
            "clever_zoo_decoding_files",
            "Files that are decoded or wait for it.",
            registry=registry,
        )
        self.queue_s = Histogram(
            "clever_zoo_queue_seconds",
            "Time from the queue to the start of a batch.",
            buckets=_TIME_BUCKETS,
            registry=registry,
        )
        self.inference_s = Histogram(
            "clever_zoo_inference_seconds",
            "Time of one batch in the network.",
            buckets=_TIME_BUCKETS,
            registry=registry,
        )
