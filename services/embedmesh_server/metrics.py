"""Every metric of the project: names, help, labels, buckets.

The code that measures gets one of these objects through its constructor; the registry
belongs to the process (or the test) that made it. Names and units follow the Prometheus
conventions (base units, `_total` on counters, `_seconds`, `_bytes`, `_ratio`).
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from importlib.metadata import version

from prometheus_client import (
    CollectorRegistry,
    Counter,
    Gauge,
    GCCollector,
    Histogram,
    PlatformCollector,
    ProcessCollector,
)

__all__ = ["KEY_OUTCOMES", "EncoderMetrics", "FileMetrics", "GatewayMetrics", "ServerMetrics", "WorkersMetrics"]

# 0.5 ms (a cache hit) to 60 s (the default deadline), two to three steps a decade.
SECONDS = (0.0005, 0.001, 0.0025, 0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1.0, 2.5, 5.0, 10.0, 30.0, 60.0)
# 1 to 1,024 inputs: powers of two, as batches are thought of.
INPUTS = tuple(float(2**n) for n in range(11))
# 16 to 65,536 tokens, patches or frames.
UNITS = tuple(float(2**n) for n in range(4, 17))
# Of the inputs of a key.
KEY_OUTCOMES = ("admitted", "inputs_per_second", "requests_per_second", "inflight_inputs")


class ServerMetrics:
    """What every process says of its calls and of itself."""

    def __init__(self, registry: CollectorRegistry, role: str) -> None:
        ProcessCollector(registry=registry)
        PlatformCollector(registry=registry)
        GCCollector(registry=registry)
        Gauge(
            "embedmesh_build_info",
            "Version of embedmesh and role of the process.",
            ["version", "role"],
            registry=registry,
        ).labels(version("embedmesh"), role).set(1)
        self.requests = Counter(
            "embedmesh_requests", "Calls finished, by gRPC code.", ["service", "method", "code"], registry=registry
        )
        self.request_seconds = Histogram(
            "embedmesh_request_seconds",
            "Seconds from the arrival of a call to its end.",
            ["service", "method"],
            buckets=SECONDS,
            registry=registry,
        )
        self.in_flight = Gauge(
            "embedmesh_requests_in_flight", "Calls being served now.", ["service", "method"], registry=registry
        )


class FileMetrics:
    """What every process says of the files it follows: tls, upstream_tls, keys, models."""

    def __init__(self, registry: CollectorRegistry) -> None:
        self.reloads = Counter(
            "embedmesh_file_reloads",
            "Files read again after a change, by outcome: ok or failed.",
            ["file", "outcome"],
            registry=registry,
        )
        self.stale = Gauge(
            "embedmesh_file_stale",
            "1 while a file holds something that cannot be used, and what it held before is in use.",
            ["file"],
            registry=registry,
        )


class EncoderMetrics:
    """What an encoder says of its models."""

    def __init__(self, registry: CollectorRegistry) -> None:
        self.stage_seconds = Histogram(
            "embedmesh_encoder_stage_seconds",
            "Seconds in a stage: prepare (a request's inputs), queue (an input), infer (a batch), finish (a response).",
            ["model", "stage"],
            buckets=SECONDS,
            registry=registry,
        )
        self.inputs = Counter(
            "embedmesh_encoder_inputs",
            "Inputs answered, by outcome: ok, or the reason of the error.",
            ["model", "outcome"],
            registry=registry,
        )
        self.batch_inputs = Histogram(
            "embedmesh_batch_inputs", "Inputs in a batch.", ["model"], buckets=INPUTS, registry=registry
        )
        self.batch_cost_units = Histogram(
            "embedmesh_batch_cost_units",
            "Units (tokens, patches, frames) a batch makes the model compute, padding included.",
            ["model"],
            buckets=UNITS,
            registry=registry,
        )
        self.batch_units = Counter(
            "embedmesh_batch_units",
            "Units computed, by kind: real or padding. Padding share = padding / (real + padding).",
            ["model", "kind"],
            registry=registry,
        )
        self.queue_inputs = Gauge(
            "embedmesh_queue_inputs", "Inputs waiting for a batch.", ["model", "priority"], registry=registry
        )
        self.queue_cost_units = Gauge(
            "embedmesh_queue_cost_units", "Units waiting for a batch.", ["model"], registry=registry
        )
        self.refused_inputs = Counter(
            "embedmesh_refused_inputs", "Inputs refused because the queue was full.", ["model"], registry=registry
        )
        self.dropped_inputs = Counter(
            "embedmesh_dropped_inputs",
            "Inputs dropped before inference, by reason: cancelled or expired.",
            ["model", "reason"],
            registry=registry,
        )
        self.truncated_inputs = Counter(
            "embedmesh_truncated_inputs", "Inputs of which a part was not read.", ["model"], registry=registry
        )
        self.nonfinite_vectors = Counter(
            "embedmesh_nonfinite_vectors",
            "Vectors with NaN or infinity, answered with INFERENCE_FAILED.",
            ["model"],
            registry=registry,
        )
        self.model_info = Gauge(
            "embedmesh_model_info",
            "Always 1; the labels describe a model of this node.",
            ["model", "revision", "space", "modality", "backend", "precision"],
            registry=registry,
        )
        self.model_ready = Gauge(
            "embedmesh_model_ready", "1 when the model is loaded and warm.", ["model"], registry=registry
        )
        self._shown: dict[tuple[Gauge, tuple[str, ...]], list[Callable[[], float]]] = {}

    def show(
        self,
        gauge: Gauge,
        labels: tuple[str, ...],
        value: Callable[[], float],
        combine: Callable[[Iterable[float]], float] = sum,
    ) -> Callable[[], None]:
        """Show a value under labels that others may show theirs under: two revisions of a model have one name.

        Args:
            gauge: One of this object's.
            labels: The model's name first.
            value: Gives the value whenever it is looked at, from any thread.
            combine: What becomes of several values.

        Returns:
            What ends it. With the last `model_ready` of a name, nothing of that model is shown any more.
        """
        values = self._shown.setdefault((gauge, labels), [])
        values.append(value)
        gauge.labels(*labels).set_function(lambda: combine(each() for each in values))

        def end() -> None:
            if value not in values:
                return
            values.remove(value)
            if not values:
                del self._shown[gauge, labels]
                gauge.remove(*labels)
                if gauge is self.model_ready:
                    self._forget(labels[0])

        return end

    def _forget(self, model: str) -> None:
        for metric in vars(self).values():
            if isinstance(metric, Counter | Gauge | Histogram):
                metric.remove_by_labels({"model": model})


class GatewayMetrics:
    """What the gateway says of routing and cache."""

    def __init__(self, registry: CollectorRegistry) -> None:
        self.stage_seconds = Histogram(
            "embedmesh_gateway_stage_seconds",
            "Seconds a request spent in a stage: cache_get, upstream, finish, cache_set.",
            ["stage"],
            buckets=SECONDS,
            registry=registry,
        )
        self.inputs = Counter(
            "embedmesh_gateway_inputs",
            "Inputs answered, by outcome: ok, or the reason of the error.",
            ["modality", "outcome"],
            registry=registry,
        )
        self.cache_lookups = Counter(
            "embedmesh_cache_lookups",
            "Look-ups by tier (memory, redis, inflight) and outcome (hit, miss).",
            ["tier", "outcome"],
            registry=registry,
        )
        self.cache_errors = Counter(
            "embedmesh_cache_errors",
            "Cache operations that failed and were treated as a miss, by operation (get, set; topology: of a "
            "Redis Cluster) and kind (timeout, connection, corrupt, response, dropped).",
            ["operation", "kind"],
            registry=registry,
        )
        self.cache_breaker_open = Gauge(
            "embedmesh_cache_breaker_open",
            "1 while Redis, or a server of a cluster, is left alone after failures.",
            registry=registry,
        )
        self.cache_memory_bytes = Gauge(
            "embedmesh_cache_memory_bytes", "Bytes held by the in-process cache.", registry=registry
        )
        self.cache_memory_entries = Gauge(
            "embedmesh_cache_memory_entries", "Vectors held by the in-process cache.", registry=registry
        )
        self.cache_evictions = Counter(
            "embedmesh_cache_evictions", "Vectors pushed out of the in-process cache.", registry=registry
        )
        self.upstream_requests = Counter(
            "embedmesh_upstream_requests", "Calls to encoders, by gRPC code.", ["modality", "code"], registry=registry
        )
        self.upstream_inputs = Counter(
            "embedmesh_upstream_inputs", "Inputs sent to encoders.", ["modality"], registry=registry
        )
        self.refused_inputs = Counter(
            "embedmesh_gateway_refused_inputs",
            "Inputs refused by the gateway itself: it is full, or encoders lately refused most of what was sent.",
            registry=registry,
        )
        self.key_inputs = Counter(
            "embedmesh_key_inputs",
            f"Inputs of the calls of a key, by outcome: {KEY_OUTCOMES[0]}, or the quota that refused them "
            f"({', '.join(KEY_OUTCOMES[1:])}).",
            ["key", "outcome"],
            registry=registry,
        )
        self.key_inputs_in_flight = Gauge(
            "embedmesh_key_inputs_in_flight", "Inputs of a key being served now.", ["key"], registry=registry
        )
        self.truncated_inputs = Counter(
            "embedmesh_gateway_truncated_inputs",
            "Answered inputs of which a part was not read, cached ones included.",
            ["model"],
            registry=registry,
        )
        self.model_info = Gauge(
            "embedmesh_gateway_model_info",
            "Always 1; the labels describe a model behind the gateway.",
            ["model", "revision", "space", "modality", "family"],
            registry=registry,
        )

    def forget_key(self, name: str) -> None:
        """Show no more of a key that is gone."""
        for outcome in KEY_OUTCOMES:
            self.key_inputs.remove(name, outcome)
        self.key_inputs_in_flight.remove(name)


class WorkersMetrics:
    """What a gateway of several processes says of them."""

    def __init__(self, registry: CollectorRegistry) -> None:
        self.restarts = Counter(
            "embedmesh_gateway_worker_restarts",
            "Workers that ended by themselves and were started again.",
            registry=registry,
        )
