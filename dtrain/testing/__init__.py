"""What tests of distributed code need, ours and our users': real worker processes without the wait for their start."""

from dtrain.testing.workers import WorkerPool

__all__ = ["WorkerPool"]
