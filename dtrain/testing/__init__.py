"""What tests of distributed code need, ours and our users': worker processes that stay, Slurm without Slurm, laws."""

from dtrain.testing.compressors import check_compressor
from dtrain.testing.fake_slurm import FakeSlurm
from dtrain.testing.workers import WorkerPool

__all__ = ["FakeSlurm", "WorkerPool", "check_compressor"]
