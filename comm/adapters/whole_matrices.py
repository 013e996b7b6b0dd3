"""Optimizers that need whole matrices, on engines that cut them: see `dtrain.comm.inner_optimizers`."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, TypeAlias

import torch
from torch import Tensor, nn
from torch.distributed.tensor import DTensor

from dtrain.comm.channel import Channel
from dtrain.comm.inner_optimizers.chained import muons
from dtrain.comm.inner_optimizers.muon import MatrixPiece, WholeMatrices
from dtrain.comm.layout import Named, Segment
from dtrain.comm.ops import AllGather, Flow

LABEL = "inner optimizer"
"""Of its traffic in the meter, all on the shard axis."""

Laid: TypeAlias = Mapping[Tensor, Sequence[MatrixPiece]] | Mapping[nn.Parameter, Sequence[MatrixPiece]]
"""In each tensor that an optimizer steps, this rank's piece of every parameter."""

Groups: TypeAlias = Mapping[int, Mapping[str, Any]]
"""The parameter group of each tensor, by id."""


def groups_of(optimizer: torch.optim.Optimizer) -> Groups:
    """The parameter group of each tensor, by id."""
    return {id(p): group for group in optimizer.param_groups for p in group["params"]}


def share_matrices(
    optimizer: torch.optim.Optimizer, channel: Channel, pieces: Laid, *, whole: bool, groups: Groups | None = None
) -> None:
    """Let ``optimizer`` share its work on matrices among the ranks of a replica, if it has any. Collective there.

    ``pieces``: in each tensor that the optimizer steps, this rank's piece of every parameter, empty ones included; the
    same parameters in the same order on all ranks. ``whole``: every rank holds all of them. ``groups``: the parameter
    group of each tensor, by id, where the engine takes tensors out of them between steps.
    """
    if not whole:
        _require_sharing(optimizer)
    if not isinstance(optimizer, WholeMatrices):
        return
    group_of = groups_of(optimizer) if groups is None else groups
    matrices = {
        tensor: some
        for tensor, some in pieces.items()
        if id(tensor) in group_of and optimizer.steps_matrices(group_of[id(tensor)])
    }
    segments = {piece.segment.fqn: piece.segment for some in matrices.values() for piece in some}
    place = channel.places["shard"]
    alone = whole or place.size == 1
    held = [segments] * place.size if alone else channel.run(_gathered(segments, _device(pieces)), LABEL)
    optimizer.share(matrices, held, place, lambda flow: channel.run(flow, LABEL), whole=whole)


def unshare_matrices(optimizer: torch.optim.Optimizer) -> None:
    """Undo `share_matrices`."""
    if isinstance(optimizer, WholeMatrices):
        optimizer.share_no_more()


def require_same_parts(
    optimizer: torch.optim.Optimizer, state: Mapping[str, Named], tensors: Mapping[str, Tensor],
    groups: Groups | None = None,
) -> None:  # fmt: skip
    """Raise ``ValueError`` for state of a parameter that is now stepped by another part of the optimizer.

    ``tensors``: what the optimizer steps in place of each parameter, by FQN. ``groups``: see `share_matrices`.
    """
    if not isinstance(optimizer, WholeMatrices):
        return
    group_of = groups_of(optimizer) if groups is None else groups
    for name, values in state.items():
        for fqn in values:
            group = group_of.get(id(tensors[fqn]))
            names = None if group is None else optimizer.state_names(group)
            if names is not None and name not in names:
                kept = ", ".join(sorted(names))
                raise ValueError(
                    f"the state to load has {name!r} of {fqn}, for which this optimizer keeps {kept}: Muon steps it in "
                    "one of the two runs and AdamW in the other; choose the same matrices as in the run that saved it"
                )


def _gathered(segments: Mapping[str, Segment], device: torch.device) -> Flow[list[dict[str, Segment]]]:
    """The segments of every rank of the replica."""
    rows = [[segment.offset, segment.numel] for segment in segments.values()]
    (tables,) = yield AllGather((torch.tensor(rows, dtype=torch.int64, device=device),), axis="shard")
    return [{fqn: Segment(fqn, *row) for fqn, row in zip(segments, table.tolist(), strict=True)} for table in tables]


def _device(pieces: Laid) -> torch.device:
    return next((tensor.device for tensor in pieces), torch.device("cpu"))


def _require_sharing(optimizer: torch.optim.Optimizer) -> None:
    """Raise ``ValueError`` for a Muon that would take this rank's rows for a matrix.

    torch's own steps DTensors, of which products and norms are those of the whole matrix.
    """
    for muon in muons(optimizer):
        of_torch = type(muon).__module__.split(".")[:2] == ["torch", "optim"]
        cut_as_dtensors = all(isinstance(p, DTensor) for group in muon.param_groups for p in group["params"])
        if not (isinstance(muon, WholeMatrices) or (of_torch and cut_as_dtensors)):
            raise ValueError(
                f"{type(muon).__module__}.{type(muon).__name__} orthogonalizes whole matrices, and this engine cuts "
                "them over the ranks of a replica; give dtrain.inner.muon(model), which assembles each on one rank, or "
                "use DistributedDataParallel"
            )
