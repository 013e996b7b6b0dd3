"""Data sets that come with dtrain, and the stateless order in which examples are visited.

A data set is map-style: ``len(data)``, ``data[i] -> dict[str, Tensor]``, ``tokens_per_example``, ``vocab_size`` and
``describe()``. The order is a pure function of the seed and the global sample position, so a resumed run sees exactly
the same examples, also with another number of ranks.
"""
