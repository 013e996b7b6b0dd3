"""What tests of distributed code need, ours and our users': worker processes that stay, and laws for compressors."""

from dtrain.testing.compressors import check_compressor
from dtrain.testing.workers import WorkerPool

__all__ = ["WorkerPool", "check_compressor"]
