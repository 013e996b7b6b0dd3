"""How combined: rules that make one value of all replicas' values.

A sync takes one as ``combine``: ``every_step(combine=mean())``, which is the default.
"""

from dtrain.comm.aggregators.mean import mean

__all__ = ["mean"]
