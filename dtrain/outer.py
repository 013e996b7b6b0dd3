"""Outer steps of local updates: what turns the mean pseudo-gradient of a round into the next outer parameters.

A sync takes one as ``outer``: ``diloco(every_steps=100, outer=nesterov(lr=0.7, momentum=0.9))``.
"""

from dtrain.comm.methods.fedhyper import fedhyper
from dtrain.comm.outer_optimizers import adam, nesterov, sgd

__all__ = ["adam", "fedhyper", "nesterov", "sgd"]
