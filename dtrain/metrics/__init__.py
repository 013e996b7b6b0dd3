"""The rows that a run writes while it trains: metrics.jsonl and TensorBoard."""

from dtrain.metrics.rows import cut, read
from dtrain.metrics.writer import MetricsWriter

__all__ = ["MetricsWriter", "cut", "read"]
