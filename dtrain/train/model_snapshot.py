"""Capture a run's state from engine and sync for a checkpoint, and restore it.

parameters, optimizer.NAME   replicated or per worker, as the sync declares for the live parameters
sync.NAME                    as the sync declares for each name
numbers, rng, buffers        the sync's counters; each rank's generators; each replica's buffers
opaque, NAME of FQN          sync state of another shape than the parameter
"""

from __future__ import annotations

import math

import torch
from torch import Tensor, nn

from dtrain.comm.layout import Segment
from dtrain.comm.pieces import Pieces
from dtrain.comm.runtime.attached import Attached
from dtrain.errors import ResumeError
from dtrain.train import rng
from dtrain.train.checkpoint.state import Kind, RankState

PARAMETERS, OPTIMIZER, SYNC = "parameters", "optimizer.", "sync."


def capture(attached: Attached, model: nn.Module) -> RankState:
    """This rank's state, after a whole step. Tensors are copies or are not written to before the next step."""
    attached.method.settle()
    pieces = attached.pieces
    live = _kind(PARAMETERS, attached.parameters_kind)
    sections: dict[str, dict[str, Tensor]] = {PARAMETERS: pieces.read()}
    kinds: dict[str, Kind] = {PARAMETERS: live}
    for name, tensors in pieces.optimizer_state().items():
        sections[OPTIMIZER + name], kinds[OPTIMIZER + name] = tensors, live
    elementwise = _elementwise(attached)
    opaque: dict[str, Tensor] = {}
    for fqn, named in attached.state.tensors.items():
        for name, tensor in named.items():
            if name in elementwise:
                sections.setdefault(SYNC + name, {})[fqn] = tensor
            else:
                opaque[f"{name} of {fqn}"] = tensor
    for name in elementwise:
        sections.setdefault(SYNC + name, {})
        kinds[SYNC + name] = _kind(name, attached.state.kinds[name])
    return RankState(
        segments=_with_empty(pieces, dict(pieces.segments)),
        sections=sections,
        kinds=kinds,
        numbers=attached.numbers,
        rng=rng.capture(),
        buffers={name: buffer.detach().cpu() for name, buffer in _buffers(model).items()},
        opaque=opaque,
    )


def wanted(pieces: Pieces) -> dict[str, Segment]:
    """The segments to load: all that the engine holds, which on DDP is more than it owns."""
    return _with_empty(pieces, dict(pieces.held))


def put_back(state: RankState, attached: Attached, model: nn.Module) -> None:
    """Undo `capture`. ``state`` was loaded along `wanted`, for this mesh.

    Raises ResumeError if the stored sync kept other tensors than this one.
    """
    pieces = attached.pieces
    stored = {name.removeprefix(SYNC) for name in state.sections if name.startswith(SYNC)}
    if stored | set(attached.plan.kinds) != _elementwise(attached):  # what a plan sums up may begin anew
        raise ResumeError(
            f"the checkpoint holds {sorted(stored) or 'no'} state of its sync, the sync of this run keeps "
            f"{sorted(_elementwise(attached)) or 'none'}; resume with the sync that wrote it"
        )
    optimizer: dict[str, dict[str, Tensor]] = {}
    sync_state: dict[str, dict[str, Tensor]] = {}
    for section, tensors in state.sections.items():
        if section.startswith(OPTIMIZER):
            optimizer[section.removeprefix(OPTIMIZER)] = {f: t for f, t in tensors.items() if f in pieces.held}
        elif section.startswith(SYNC):
            for fqn, segment in pieces.segments.items():
                if fqn in tensors:
                    start = segment.offset - pieces.held[fqn].offset
                    name = section.removeprefix(SYNC)
                    sync_state.setdefault(fqn, {})[name] = tensors[fqn][start : start + segment.numel]
    for entry, tensor in state.opaque.items():
        name, _, fqn = entry.partition(" of ")
        sync_state.setdefault(fqn, {})[name] = tensor.to(_device(pieces))
    parameters = {fqn: tensor for fqn, tensor in state.sections[PARAMETERS].items() if fqn in pieces.held}
    pieces.restore(parameters, optimizer)
    attached.load_state_dict({"tensors": sync_state, "numbers": state.numbers})
    with torch.no_grad():
        for name, buffer in _buffers(model).items():
            if name in state.buffers:
                buffer.copy_(state.buffers[name])


def _elementwise(attached: Attached) -> set[str]:
    return {name for name, kind in attached.state.kinds.items() if kind != "opaque"}


def _device(pieces: Pieces) -> torch.device:
    return next(iter(pieces.read(copy=False).values()), torch.empty(0)).device


def _kind(name: str, kind: str) -> Kind:
    if kind == "replicated":
        return "replicated"
    if kind == "per_worker":
        return "per_worker"
    raise ValueError(f"state {name!r} is {kind}, which checkpoints do not know")


def _with_empty(pieces: Pieces, segments: dict[str, Segment]) -> dict[str, Segment]:
    """A checkpoint names every parameter, also those of which this rank holds nothing."""
    for fqn, shape in pieces.shapes.items():
        segments.setdefault(fqn, Segment(fqn, math.prod(shape), 0))
    return segments


def _buffers(model: nn.Module) -> dict[str, Tensor]:
    """Buffers that a state dict would hold (the persistent ones): whole on every rank of a replica."""
    names = set(model.state_dict(keep_vars=True)) if any(True for _ in model.buffers()) else set()
    return {name: buffer for name, buffer in model.named_buffers() if name in names}
