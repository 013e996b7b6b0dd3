"""Muon (Keller Jordan et al. 2024, https://kellerjordan.github.io/posts/muon/) for matrices, AdamW for the rest.

    m = mu m + (1 - mu) g;   u = mu m + (1 - mu) g with nesterov, else m;   O = orthogonalized(u)
    W = (1 - lr wd) W - lr 0.2 sqrt(max(rows, columns)) O

The factor gives a step the root mean square that AdamW's usually has, about 0.2, so that one learning rate and one
weight decay serve both (Liu et al., arXiv:2502.16982). A convolution's weight [out, in, h, w] counts as the matrix
[out, in h w]. Keeps one fp32 number for each element of a matrix, where AdamW keeps two.

In a replica of several ranks each matrix is orthogonalized by one of them, see `owners`; `attach` and the engines of
``dtrain train`` arrange that. Communication: on the shard axis only.
"""

from __future__ import annotations

import fnmatch
import math
import os
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Protocol, TypeAlias, cast, overload, runtime_checkable

import torch
from torch import Tensor, nn
from torch.optim.adamw import adamw

from dtrain.comm.blocks import blocks_of
from dtrain.comm.inner_optimizers.newton_schulz import flops, orthogonalized_by_shape, workspace_bytes
from dtrain.comm.inner_optimizers.owners import Replica
from dtrain.comm.layout import Segment
from dtrain.comm.ops import Flow, Place

RMS = 0.2
MATRIX_STATE, OTHER_STATE = frozenset({"momentum_buffer"}), frozenset({"step", "exp_avg", "exp_avg_sq"})


@dataclass(frozen=True)
class MatrixPiece:
    """A rank's ``segment`` of a matrix, from element ``start`` of a tensor that the optimizer steps, made flat.

    ``shape``: of the whole parameter. A segment may be empty.
    """

    shape: tuple[int, ...]
    segment: Segment
    start: int = 0

    @property
    def fqn(self) -> str:
        return self.segment.fqn

    def of(self, flat: Tensor) -> Tensor:
        """The elements of the piece, a view into ``flat``."""
        return flat[self.start : self.start + self.segment.numel]


Run: TypeAlias = Callable[[Flow[Mapping[str, Tensor]]], Mapping[str, Tensor]]


@runtime_checkable
class WholeMatrices(Protocol):
    """An optimizer whose step needs whole matrices, and that can share the work among the ranks of a replica."""

    def steps_matrices(self, group: Mapping[str, Any]) -> bool:
        """Whether it steps the parameters of one of its ``param_groups`` as matrices."""

    def share(
        self, pieces: Mapping[Tensor, Sequence[MatrixPiece]], held: Sequence[Mapping[str, Segment]], place: Place,
        run: Run, *, whole: bool,
    ) -> None:  # fmt: skip
        """Share the work from now on. ``pieces``: those in each tensor that it steps as matrices; ``held``: the
        segments of every rank of the replica; ``run``: performs a flow; ``whole``: every rank holds all of them.
        """

    def share_no_more(self) -> None:
        """Undo `share`."""

    def state_names(self, group: Mapping[str, Any]) -> frozenset[str] | None:
        """The names of the state that it keeps for parameters of ``group``; None where it cannot tell."""


@dataclass(frozen=True)
class Settings:
    """Of a parameter group; see `muon`. Raises ``ValueError`` for numbers outside their range."""

    lr: float
    momentum: float = 0.95
    nesterov: bool = True
    ns_steps: int = 5
    weight_decay: float = 0.1
    betas: tuple[float, float] = (0.9, 0.95)
    eps: float = 1e-8

    def __post_init__(self) -> None:
        if not _within(self.lr, 0, math.inf):
            raise ValueError(f"lr is {self.lr!r}; a learning rate is 0 or more")
        if not _within(self.momentum, 0, 1):
            raise ValueError(f"momentum is {self.momentum!r}; it lies in [0, 1)")
        if not isinstance(self.ns_steps, int) or isinstance(self.ns_steps, bool) or self.ns_steps < 1:
            raise ValueError(f"ns_steps is {self.ns_steps!r}; give 1 or more Newton-Schulz steps, as a rule 5")
        if not _within(self.weight_decay, 0, math.inf):
            raise ValueError(f"weight_decay is {self.weight_decay!r}; it is 0 or more")
        betas: object = self.betas
        if not isinstance(betas, tuple) or len(betas) != 2 or not all(_within(beta, 0, 1) for beta in betas):
            raise ValueError(f"betas is {betas!r}; give AdamW's two, which lie in [0, 1)")
        if not _within(self.eps, 0, math.inf) or self.eps == 0:
            raise ValueError(f"eps is {self.eps!r}; it is positive and small")


class Muon(torch.optim.Optimizer):
    """See the module's docstring; made by `muon`. Groups with ``matrices`` are stepped by Muon, others by AdamW.

    ``ns_dtype``: of the iterations; see `orthogonalized`.
    """

    _pieces: dict[int, Sequence[MatrixPiece]]  # by id of the tensor
    _shared: tuple[Replica, Run] | None

    def __init__(self, params: Iterable[Any], settings: Settings, *, ns_dtype: torch.dtype | None = None) -> None:
        self._ns_dtype = ns_dtype
        self.share_no_more()
        super().__init__(params, {**vars(settings), "matrices": True})

    def __getstate__(self) -> dict[str, Any]:
        return {**super().__getstate__(), "_ns_dtype": self._ns_dtype}

    def __setstate__(self, state: dict[str, Any]) -> None:
        super().__setstate__(state)
        if "_pieces" not in vars(self):  # a copy, which has tensors of its own; load_state_dict calls this, too
            self.share_no_more()

    def steps_matrices(self, group: Mapping[str, Any]) -> bool:
        return bool(group["matrices"])

    def state_names(self, group: Mapping[str, Any]) -> frozenset[str]:
        return MATRIX_STATE if self.steps_matrices(group) else OTHER_STATE

    def share(
        self, pieces: Mapping[Tensor, Sequence[MatrixPiece]], held: Sequence[Mapping[str, Segment]], place: Place,
        run: Run, *, whole: bool,
    ) -> None:  # fmt: skip
        self._pieces = {id(tensor): tensors_pieces for tensor, tensors_pieces in pieces.items()}
        self._shared = Replica(held, place, whole), run

    def share_no_more(self) -> None:
        self._pieces, self._shared = {}, None

    @overload
    def step(self, closure: None = None) -> None: ...

    @overload
    def step(self, closure: Callable[[], float]) -> float: ...

    @torch.no_grad()
    def step(self, closure: Callable[[], float] | None = None) -> float | None:
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        groups = [
            {**group, "params": [p for p in group["params"] if p.grad is not None]} for group in self.param_groups
        ]
        self._step_matrices([group for group in groups if group["matrices"]])
        for group in groups:
            if not group["matrices"] and group["params"]:
                self._step_others(group)
        return loss

    def _step_matrices(self, groups: list[dict[str, Any]]) -> None:
        updates = {id(p): self._update(p, group) for group in groups for p in group["params"]}
        for steps in sorted({group["ns_steps"] for group in groups if group["params"]}):
            stepped = [(p, group) for group in groups if group["ns_steps"] == steps for p in group["params"]]
            directions = self._directions([p for p, _ in stepped], updates, steps)
            for p, group in stepped:
                _local(p).mul_(1 - group["lr"] * group["weight_decay"])
                _local(p).add_(directions[id(p)].to(p.dtype), alpha=-group["lr"])

    def _update(self, p: Tensor, group: dict[str, Any]) -> Tensor:
        """What is to be orthogonalized, of this rank's part of ``p``; the momentum takes the gradient in."""
        state, gradient, momentum = self.state[p], _local(p.grad), group["momentum"]
        if "momentum_buffer" not in state:
            state["momentum_buffer"] = torch.zeros_like(p)
        buffer = _local(state["momentum_buffer"])
        buffer.lerp_(gradient, 1 - momentum)
        return gradient.lerp(buffer, momentum) if group["nesterov"] else buffer

    def _directions(self, tensors: list[Tensor], updates: Mapping[int, Tensor], steps: int) -> dict[int, Tensor]:
        """The scaled orthogonal directions of ``tensors``, by id, of the shapes that this rank has of them."""
        pieces_of = {id(p): self._pieces_of(p, number) for number, p in enumerate(tensors)}
        values, shapes = {}, {}
        for key, pieces in pieces_of.items():
            flat = updates[key].reshape(-1).float()
            for piece in pieces:
                values[piece.fqn], shapes[piece.fqn] = piece.of(flat), _as_matrix(piece.shape)

        def work(wholes: Mapping[str, Tensor]) -> dict[str, Tensor]:
            matrices = {fqn: whole.view(shapes[fqn]) for fqn, whole in wholes.items()}
            results = orthogonalized_by_shape(matrices, steps, self._ns_dtype)
            return {fqn: (RMS * math.sqrt(max(shapes[fqn])) * x).reshape(-1) for fqn, x in results.items()}

        if self._shared is None:
            directions: Mapping[str, Tensor] = work(values)
        else:
            replica, run = self._shared
            directions = run(replica.work(values, work, {fqn: flops(*shape, steps) for fqn, shape in shapes.items()}))
        results = {}
        for key, pieces in pieces_of.items():
            flat = torch.zeros(updates[key].numel(), dtype=torch.float32, device=updates[key].device)
            for piece in pieces:
                piece.of(flat).copy_(directions[piece.fqn])
            results[key] = flat.view(updates[key].shape)
        return results

    def _pieces_of(self, p: Tensor, number: int) -> Sequence[MatrixPiece]:
        if id(p) in self._pieces:
            return self._pieces[id(p)]
        if hasattr(p, "to_local") or p.dim() < 2:
            kind = "sharded" if hasattr(p, "to_local") else "flat"
            raise RuntimeError(
                f"Muon has a {kind} tensor of shape {tuple(p.shape)} and needs whole matrices; attach a sync to the "
                "model, which gathers them: attach(model, optimizer, ...)"
            )
        return [MatrixPiece(tuple(p.shape), Segment(str(number), 0, p.numel()))]

    def _step_others(self, group: dict[str, Any]) -> None:
        for p in group["params"]:
            state = self.state[p]
            if not state:
                state["step"] = torch.tensor(0.0)
                state["exp_avg"], state["exp_avg_sq"] = torch.zeros_like(p), torch.zeros_like(p)
        states = [self.state[p] for p in group["params"]]
        adamw(
            group["params"], [p.grad for p in group["params"]], [s["exp_avg"] for s in states],
            [s["exp_avg_sq"] for s in states], [], [s["step"] for s in states], amsgrad=False, beta1=group["betas"][0],
            beta2=group["betas"][1], lr=group["lr"], weight_decay=group["weight_decay"], eps=group["eps"],
            maximize=False,
        )  # fmt: skip


def muon(
    model: nn.Module,
    lr: float = 0.003,
    *,
    momentum: float = 0.95,
    nesterov: bool = True,
    ns_steps: int = 5,
    weight_decay: float = 0.1,
    betas: tuple[float, float] = (0.9, 0.95),
    eps: float = 1e-8,
    matrices: Sequence[str] = (),
) -> Muon:
    """Muon for the matrices of ``model``'s blocks, AdamW for all other parameters, in one optimizer.

    Args:
        model: as it is trained: in DDP, after ``fully_shard``, or before ``deepspeed.initialize``.
        lr: the learning rate of both; what suits AdamW suits Muon.
        momentum, nesterov, ns_steps: of Muon; Newton-Schulz steps.
        weight_decay: of what has two or more dimensions and is no embedding; others have none.
        betas, eps: of AdamW.
        matrices: shell patterns over names of the parameters that Muon steps. By default the matrices, and weights of
            2-D convolutions, in the members of the outermost ``nn.ModuleList``s, without embeddings: heads and input
            layers lie outside.

    >>> model = nn.ModuleList([nn.Linear(4, 8)])
    >>> [(group["matrices"], len(group["params"])) for group in muon(model).param_groups]
    [(True, 1), (False, 1)]

    Raises ``ValueError`` if there is no such matrix, for a pattern that names none, for a matrix that is too large for
    the memory of its device, and for numbers outside their range. Source: the module's docstring.
    """
    two = cast(tuple[float, float], tuple(betas) if isinstance(betas, Sequence) else betas)
    settings = Settings(lr, momentum, nesterov, ns_steps, weight_decay, two, eps)
    named = {name: p for name, p in model.named_parameters(remove_duplicate=False) if p.requires_grad}
    tables = {id(p) for m in model.modules() if isinstance(m, nn.Embedding) for p in m.parameters(recurse=False)}
    chosen = _chosen(named, matrices) if matrices else _block_matrices(model, named, tables)
    if not chosen:
        raise ValueError(
            f"{type(model).__name__} has no matrix in the members of an nn.ModuleList, and Muon is for matrices; name "
            "them with matrices=[...], shell patterns over parameter names, or take AdamW"
        )
    _require_memory({name: named[name] for name in chosen})
    parameters = [p for p in model.parameters() if p.requires_grad]
    stepped = {id(named[name]) for name in chosen}
    muons = [p for p in parameters if id(p) in stepped]
    others = [p for p in parameters if id(p) not in stepped]
    decayed = [p for p in others if p.dim() >= 2 and id(p) not in tables]
    plain = [p for p in others if p.dim() < 2 or id(p) in tables]
    groups = [
        {"params": muons, "matrices": True},
        {"params": decayed, "matrices": False},
        {"params": plain, "matrices": False, "weight_decay": 0.0},
    ]
    return Muon([group for group in groups if group["params"]], settings)


def _block_matrices(model: nn.Module, named: Mapping[str, Tensor], tables: set[int]) -> set[str]:
    inside = {id(p) for block in blocks_of(model) for p in block.parameters()} - tables
    return {name for name, p in named.items() if id(p) in inside and p.dim() in (2, 4)}


def _chosen(named: Mapping[str, Tensor], patterns: Sequence[str]) -> set[str]:
    if isinstance(patterns, str):
        raise ValueError(f"matrices is {patterns!r}; give a list of patterns: [{patterns!r}]")
    chosen: set[str] = set()
    for pattern in patterns:
        fitting = {name for name in named if fnmatch.fnmatchcase(name, pattern)}
        if not fitting:
            raise ValueError(f"matrices: {pattern!r} names no parameter; there are {', '.join(list(named)[:5])}, ...")
        for name in sorted(fitting):
            if named[name].dim() not in (2, 4):
                raise ValueError(
                    f"matrices: {pattern!r} names {name} of shape {tuple(named[name].shape)}; Muon steps matrices, and "
                    "weights of 2-D convolutions"
                )
        chosen |= fitting
    return chosen


def _within(number: object, least: float, end: float) -> bool:
    """Whether it is a number of [``least``, ``end``)."""
    return isinstance(number, int | float | Tensor) and not isinstance(number, bool) and bool(least <= number < end)


def _as_matrix(shape: tuple[int, ...]) -> tuple[int, int]:
    return shape[0], math.prod(shape[1:])


def _require_memory(matrices: Mapping[str, Tensor]) -> None:
    for name, p in matrices.items():
        needed, there = workspace_bytes(*_as_matrix(tuple(p.shape))), _memory_of(p.device)
        if there is not None and needed > there:
            raise ValueError(
                f"{name} is a matrix of {' x '.join(map(str, _as_matrix(tuple(p.shape))))}: to orthogonalize it takes "
                f"{needed / 1e9:.1f} GB on one rank, and {p.device} has {there / 1e9:.1f} GB; leave it to AdamW: "
                "matrices=[...] without it"
            )


def _memory_of(device: torch.device) -> int | None:
    """Bytes of memory that the device has; None where there is no such figure."""
    if device.type == "cuda":
        return int(torch.cuda.get_device_properties(device).total_memory)
    if device.type == "cpu":
        return os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    return None


def _local(tensor: Tensor | None) -> Tensor:
    """This rank's part of a DTensor."""
    assert tensor is not None
    local: Tensor = tensor.to_local() if hasattr(tensor, "to_local") else tensor
    return local
