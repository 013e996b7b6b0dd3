"""Inner optimizers that torch has none of, for every engine: `muon`; and `chain`, of several over one model."""

from dtrain.comm.inner_optimizers.chained import chain
from dtrain.comm.inner_optimizers.muon import muon

__all__ = ["chain", "muon"]
