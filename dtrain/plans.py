"""Plans: which compression each parameter gets, and from which step on.

A sync takes one where it takes a compressor: ``every_step(compress=lgreco(error_feedback(powersgd(rank=4))))``.
"""

from dtrain.comm.plans.accordion import accordion
from dtrain.comm.plans.ef21w import ef21w
from dtrain.comm.plans.lgreco import lgreco
from dtrain.comm.plans.plan import after, by_layer

__all__ = ["accordion", "after", "by_layer", "ef21w", "lgreco"]
