"""Compressors, and the feedback that keeps what they leave out.

A sync takes one as ``compress``: ``every_step(compress=error_feedback(topk(density=0.01)))``.
"""

from dtrain.comm.compressors.cast import cast
from dtrain.comm.compressors.lowrank import powersgd
from dtrain.comm.compressors.projection import projection
from dtrain.comm.compressors.quantize import quantize
from dtrain.comm.compressors.sign import sign
from dtrain.comm.compressors.sparse import randk, topk
from dtrain.comm.compressors.ternary import compeft, terngrad
from dtrain.comm.feedback import econtrol, ef21, error_feedback

__all__ = [
    "cast",
    "compeft",
    "econtrol",
    "ef21",
    "error_feedback",
    "powersgd",
    "projection",
    "quantize",
    "randk",
    "sign",
    "terngrad",
    "topk",
]
