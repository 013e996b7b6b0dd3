"""What tests of distributed code need, ours and our users': worker processes that stay, and Slurm without Slurm."""

from dtrain.testing.fake_slurm import FakeSlurm
from dtrain.testing.workers import WorkerPool

__all__ = ["FakeSlurm", "WorkerPool"]
