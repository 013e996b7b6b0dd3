"""Tools for tests of distributed code, ours and our users': persistent worker processes, laws for compressors, replicas
without models.
"""

from dtrain.testing.compressors import check_compressor
from dtrain.testing.replicas import Replicas
from dtrain.testing.workers import WorkerPool

__all__ = ["Replicas", "WorkerPool", "check_compressor"]
