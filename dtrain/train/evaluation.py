"""The loss on the validation split: the same examples on every mesh, whatever the number of ranks."""

from __future__ import annotations

import math
from typing import Protocol

from torch import Tensor

from dtrain.train.data.batches import evaluation_indices, fetch
from dtrain.train.engines import Engine
from dtrain.train.mesh import Mesh
from dtrain.train.votes import Control


class Examples(Protocol):
    """A map-style data set."""

    def __len__(self) -> int: ...

    def __getitem__(self, index: int) -> dict[str, Tensor]: ...


def evaluate(engine: Engine, dataset: Examples, wanted: int, mesh: Mesh, control: Control) -> float:
    """Mean loss over ``wanted`` examples, spread evenly over the data set. Collective over all ranks.

    Every rank runs the same number of forward passes, since a sharded engine communicates in each of them; a rank
    that has run out of examples repeats one and does not count it.
    """
    wanted = min(wanted, len(dataset))
    share = evaluation_indices(len(dataset), wanted, rank=mesh.rank, world=mesh.world)
    size = engine.options.microbatch_size
    passes = math.ceil(math.ceil(wanted / mesh.world) / size)
    total = 0.0
    for number in range(passes):
        indices = share[number * size : (number + 1) * size]
        batch = fetch(dataset, indices or [0])
        loss = engine.evaluate({name: tensor.to(mesh.device) for name, tensor in batch.items()})
        total += float(loss) * len(indices)
    loss_sum, count = control.sums([total, len(share)])
    return loss_sum / count
