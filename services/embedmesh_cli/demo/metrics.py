"""Reads /metrics as Prometheus would."""

from __future__ import annotations

import urllib.request
from typing import TypeAlias

from prometheus_client.parser import text_string_to_metric_families

__all__ = ["Samples", "read", "value"]

Samples: TypeAlias = dict[tuple[str, tuple[tuple[str, str], ...]], float]


def read(http_address: str) -> Samples:
    """Scrape a node: values by name and sorted labels."""
    with urllib.request.urlopen(f"http://{http_address}/metrics", timeout=10) as answer:
        families = text_string_to_metric_families(answer.read().decode())
    return {
        (sample.name, tuple(sorted(sample.labels.items()))): sample.value
        for family in families
        for sample in family.samples
    }


def value(samples: Samples, name: str, **labels: str) -> float:
    """Sum of the samples of `name` that carry `labels`."""
    wanted = set(labels.items())
    return sum(value for (sample, has), value in samples.items() if sample == name and wanted <= set(has))
