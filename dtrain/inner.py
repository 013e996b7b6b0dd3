"""Inner optimizers that torch has none of, for every engine: `muon`; and `together`, of several over one model."""

from dtrain.comm.inner_optimizers.muon import muon
from dtrain.comm.inner_optimizers.together import together

__all__ = ["muon", "together"]
