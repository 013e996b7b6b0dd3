"""What error feedback keeps on this rank, for those who change the scale of gradients or want residuals to be equal."""

from __future__ import annotations

import math

from dtrain.comm.collectives.exchange import consolidate
from dtrain.comm.runtime.context import Context


class KeptByFeedback:
    """Residuals and their like, of one sync."""

    def __init__(self, context: Context) -> None:
        self._context = context

    def consolidate(self) -> None:
        """Replace feedback's state on every replica by its mean: applied values change by round-off only.

        It bounds the residuals of low rank where the replicas' data differ. Costs one exchange in full precision.
        Every rank must call it, between two steps.
        """
        context = self._context
        context.pieces.channel.run(consolidate(context.state, context.place, context.key()), "consolidate")

    def rescale(self, factor: float) -> None:
        """Multiply feedback's state, when the scale of the gradients changes by ``factor``.

        Call it on every rank: when a loss scale changes, with new / old; with error_feedback also when the learning
        rate changes, with old / new, if residuals shall move the parameters as much as before.

        Raises ``ValueError`` for a factor that is not positive and finite.
        """
        if not 0 < factor < math.inf:
            raise ValueError(f"factor is {factor!r}; give the new scale over the old one, a positive finite number")
        context, kinds = self._context, self._context.state.kinds
        context.state.scale({name for name in context.fed_back if kinds.get(name) != "opaque"}, factor)
