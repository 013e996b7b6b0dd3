"""The rows that a run writes while it trains: metrics.jsonl and TensorBoard."""

from dtrain.train.metrics.rows import Row, cut, read
from dtrain.train.metrics.writer import MetricsWriter

__all__ = ["MetricsWriter", "Row", "cut", "read"]
