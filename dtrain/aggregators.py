"""Aggregators: rules that combine the values of all replicas.

A sync takes one as ``combine``: ``every_step(combine=mean())``, which is the default.
"""

from dtrain.comm.aggregators.mean import mean

__all__ = ["mean"]
