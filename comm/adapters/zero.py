"""Adapts DeepSpeed ZeRO 1, 2 and 3 (0.19): gradients are exchanged after backward, before DeepSpeed's own step.

ZeRO has no hook during backward, so an every-step exchange is exposed; local updates are not affected. Combined
gradients are written into DeepSpeed's own buffers between ``backward`` and ``step``; parameters are read from and
written to its fp32 master copies. Stages 1 and 2 cut one flat group into partitions that cross parameter borders, stage
3 cuts each parameter; both end with padding. DeepSpeed has no public access to any of it: these are the attributes of
0.19, tested for each stage. Nothing here imports deepspeed.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Collection, Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from dtrain.comm.adapters.forwarding import hyperparameters
from dtrain.comm.adapters.optimizer import (
    StepGuard,
    is_scalar,
    load_hyperparameters,
    require_elementwise,
)
from dtrain.comm.adapters.trained_parameters import Trained
from dtrain.comm.adapters.whole_matrices import require_same_parts, share_matrices, unshare_matrices
from dtrain.comm.adapters.wrappers import named_parameters
from dtrain.comm.channel import Channel
from dtrain.comm.inner_optimizers.chained import states_of
from dtrain.comm.inner_optimizers.muon import MatrixPiece
from dtrain.comm.layout import Named, Segment, copied, is_finite
from dtrain.comm.ops import Flow, Place
from dtrain.comm.pieces import Exchange

MESSAGE_BYTES = 25 * 2**20
"""Gradients are exchanged in groups of about this size, so that one is encoded while another is sent."""


@dataclass(frozen=True)
class _Home:
    """Where a piece of a parameter lives in DeepSpeed: elements [start, start + numel) of flat fp32 group ``group``."""

    parameter: Tensor
    segment: Segment
    group: int
    start: int


class ZeroPieces(ABC):
    """Pieces of a model in a DeepSpeed engine; use `zero_pieces`, which knows the stage."""

    def __init__(self, engine: Any, channel: Channel) -> None:
        self.engine, self.channel = engine, channel
        self.zero = engine.optimizer
        self.base = self.zero.optimizer
        self.optimizer: torch.optim.Optimizer = self.base
        self.homes = {home.segment.fqn: home for home in self._homes()}
        self.segments = {fqn: home.segment for fqn, home in self.homes.items()}
        self.held = self.segments
        self.trained = Trained(engine.module, None)
        named = self.trained.parameters
        self.shapes = {name: tuple(getattr(p, "ds_shape", p.shape)) for name, p in named.items()}
        self._exchange: Exchange | None = None
        self._exchanged = False
        self.guard = StepGuard(self.base)
        share_matrices(self.base, channel, self._matrix_pieces(), whole=False, groups=self._param_groups())
        self.trained.claim()

    @property
    def place(self) -> Place:
        return self.channel.places["replicate"]

    def read(self, fqns: Collection[str] | None = None, *, copy: bool = True) -> dict[str, Tensor]:
        values = {fqn: self._master(home) for fqn, home in self.homes.items() if fqns is None or fqn in fqns}
        return copied(values) if copy else values

    def write(self, values: Named, fqns: Collection[str] | None = None) -> None:
        for fqn, value in values.items():
            self._master(self.homes[fqn]).copy_(value)
        self._publish()

    def set_gradient_exchange(self, exchange: Exchange | None) -> None:
        self._exchange = exchange

    def finish(self) -> None:
        self.trained.require_unchanged()
        if self._exchange is None or self._exchanged:
            return
        if not self.engine.is_gradient_accumulation_boundary():
            raise RuntimeError(
                "gradients are complete only at the last microbatch; call engine.step() on the others and the sync's "
                "step() on the last"
            )
        handles = []
        for fqns in self._messages():
            gradients = {fqn: self._gradient(self.homes[fqn]) for fqn in fqns}
            handles.append(self.channel.start(_fill(self._exchange, gradients), "gradients"))
        for handle in handles:
            handle.wait()
        self._exchanged = True

    def gradients_finite(self) -> bool:
        return is_finite(*(self._gradient(home) for home in self.homes.values()))

    def unused(self) -> set[str]:
        return set()  # every exchanged gradient is used

    def step(self) -> None:
        with self.guard.opened():
            self.engine.step()
        self._exchanged = False

    def skip(self) -> None:
        # DeepSpeed drops a step whose gradient norm is not finite, clean-up included; bf16 stages 1 and 2 only if set.
        for home in self.homes.values():
            self._gradient(home).fill_(float("nan"))
        configured = getattr(self.zero, "check_grad_overflow", None)
        self.zero.check_grad_overflow = True
        try:
            self.step()
        finally:
            self.zero.check_grad_overflow = configured

    def optimizer_state(self) -> dict[str, dict[str, Tensor]]:
        state: dict[str, dict[str, Tensor]] = {}
        for fqn, home in self.homes.items():
            flat = self._flat(home.group)
            for name, value in self.base.state.get(flat, {}).items():
                if value is None:
                    continue
                tensor = value if isinstance(value, Tensor) else torch.tensor(value)
                require_elementwise(tensor, flat, f"the optimizer's {name!r} of the flat group that holds {fqn}")
                piece = tensor if is_scalar(tensor) else tensor[home.start : home.start + home.segment.numel]
                state.setdefault(name, {})[fqn] = piece
        return state

    def restore(self, parameters: Named, optimizer: Mapping[str, Named]) -> None:
        tensors = {fqn: self._flat(home.group) for fqn, home in self.homes.items()}
        groups = self._param_groups()
        require_same_parts(self.base, optimizer, tensors, groups)
        self.base.state.clear()
        for name, pieces in optimizer.items():
            for fqn, value in pieces.items():
                home, flat = self.homes[fqn], tensors[fqn]
                state = states_of(self.base, groups[id(flat)])[flat]
                if is_scalar(value):
                    state[name] = value.clone()
                    continue
                flat_state = state.setdefault(name, torch.zeros_like(flat))
                flat_state[home.start : home.start + home.segment.numel] = value
        self.write(parameters)

    def optimizer_snapshot(self) -> dict[str, Any]:
        return {"state": self.optimizer_state(), "groups": hyperparameters(self.base)}

    def load_optimizer_snapshot(self, snapshot: Mapping[str, Any]) -> None:
        load_hyperparameters(self.base, snapshot["groups"])
        self.restore(self.read(), snapshot["state"])

    def detach(self) -> None:
        self._exchange = None
        self.guard.remove()
        unshare_matrices(self.base)
        self.trained.release()

    def _matrix_pieces(self) -> dict[Tensor, list[MatrixPiece]]:
        """In each flat group, the pieces of its parameters, empty ones included."""
        pieces: dict[Tensor, list[MatrixPiece]] = {}
        for fqn, parameter in self.trained.parameters.items():
            home = self.homes.get(fqn)
            segment, start = (home.segment, home.start) if home else (Segment(fqn, 0, 0), 0)
            group = home.group if home else self._group_of(parameter)
            pieces.setdefault(self._flat(group), []).append(MatrixPiece(self.shapes[fqn], segment, start))
        return pieces

    def _messages(self) -> Iterator[list[str]]:
        message: list[str] = []
        size = 0
        for fqn, segment in self.segments.items():
            message.append(fqn)
            size += 4 * segment.numel
            if size >= MESSAGE_BYTES:
                yield message
                message, size = [], 0
        if message:
            yield message

    def _master(self, home: _Home) -> Tensor:
        master: Tensor = self._flat(home.group).data[home.start : home.start + home.segment.numel]
        return master

    @abstractmethod
    def _homes(self) -> Iterator[_Home]:
        """Every non-empty piece of this rank."""

    @abstractmethod
    def _param_groups(self) -> dict[int, dict[str, Any]]:
        """The base optimizer's parameter group of each flat tensor, by id."""

    @abstractmethod
    def _group_of(self, parameter: Tensor) -> int:
        """The flat group of a parameter of which this rank may hold nothing."""

    @abstractmethod
    def _flat(self, group: int) -> Tensor:
        """The fp32 tensor that the base optimizer steps."""

    @abstractmethod
    def _gradient(self, home: _Home) -> Tensor:
        """The flat gradient piece that DeepSpeed's step will use; written in place. Only between backward and step."""

    @abstractmethod
    def _publish(self) -> None:
        """Refresh what forward sees from the masters. Collective in the shard group."""


class _Stage12(ZeroPieces):
    def _homes(self) -> Iterator[_Home]:
        for fqn, p in named_parameters(self.engine.module):
            mapping = getattr(p, "_hp_mapping", None)
            if mapping is not None and mapping.lp_fragment_address.numel:
                segment = Segment(fqn, mapping.lp_fragment_address.start, mapping.lp_fragment_address.numel)
                yield _Home(p, segment, mapping.param_group_index, mapping.hp_fragment_address.start)

    def _param_groups(self) -> dict[int, dict[str, Any]]:
        return {id(self._flat(number)): group for number, group in enumerate(self.base.param_groups)}

    def _group_of(self, parameter: Tensor) -> int:
        groups: list[list[Tensor]] = self.zero.bit16_groups
        return next(number for number, group in enumerate(groups) if any(parameter is p for p in group))

    def _flat(self, group: int) -> Tensor:
        flat: Tensor = self.zero.single_partition_of_fp32_groups[group]
        return flat

    def _gradient(self, home: _Home) -> Tensor:
        p: Any = home.parameter
        piece: Tensor = p._hp_mapping.get_lp_grad_fragment(p._index_in_param_group)
        return piece.view(-1)

    def _publish(self) -> None:
        self.zero.update_lp_params()


class _Stage3(ZeroPieces):
    def _homes(self) -> Iterator[_Home]:
        rank = self.channel.places["shard"].rank
        for fqn, parameter in named_parameters(self.engine.module):
            p: Any = parameter
            if not p.requires_grad:
                continue
            group, start, width = self.zero.grad_position[self.zero.get_param_id(p)]
            offset = p.partition_numel() * rank
            real = max(0, min(p.ds_numel - offset, int(width)))  # the rest is padding
            if real:
                yield _Home(parameter, Segment(fqn, offset, real), group, int(start))

    def _param_groups(self) -> dict[int, dict[str, Any]]:
        flats = range(len(self.zero.fp32_partitioned_groups_flat))  # several for a group that is large
        return {
            id(self._flat(number)): self.base.param_groups[self.zero.sub_group_to_group_id[number]] for number in flats
        }

    def _group_of(self, parameter: Tensor) -> int:
        return int(self.zero.grad_position[self.zero.get_param_id(parameter)][0])

    def _flat(self, group: int) -> Tensor:
        flat: Tensor = self.zero.fp32_partitioned_groups_flat[group]
        return flat

    def _gradient(self, home: _Home) -> Tensor:
        p: Any = home.parameter
        piece: Tensor = self.zero._DeepSpeedZeroOptimizer_Stage3__param_id_to_grad_partition[p.ds_id]
        return piece[: home.segment.numel]

    def _publish(self) -> None:
        # A parameter that is still gathered, after an evaluation for example, would hide the write below.
        self.zero._partition_all_parameters()
        for group in range(len(self.zero.fp16_groups)):
            self.zero._reassign_or_swap_out_partitioned_parameters(group)
        if self.zero.persistent_parameters:
            self.zero.persistent_parameters[0].all_gather(self.zero.persistent_parameters)


def zero_pieces(engine: Any, channel: Channel) -> ZeroPieces:
    """Pieces of a DeepSpeed engine whose data-parallel group is the channel's shard axis (by ``mpu``).

    Raises ``ValueError`` for stage 0, for offload, and for ZeRO-1's full-size fp32 accumulation in bf16
    (``BF16_Optimizer``), whose gradient norm ignores what is written into its pieces.
    """
    stage = engine.zero_optimization_stage()
    kind = type(engine.optimizer).__name__
    if kind == "BF16_Optimizer":
        raise ValueError(
            "ZeRO-1 in bf16 with data_types.grad_accum_dtype=fp32 keeps whole gradients and clips by a norm that "
            "dtrain cannot correct; use stage 2, or leave grad_accum_dtype out"
        )
    if stage not in (1, 2, 3):
        raise ValueError(f"the DeepSpeed engine runs ZeRO stage {stage}; dtrain attaches to stages 1, 2 and 3")
    if getattr(engine.optimizer, "cpu_offload", False) or getattr(engine.optimizer, "offload_optimizer", False):
        raise ValueError("the DeepSpeed engine offloads its optimizer; dtrain needs its state on the device")
    return _Stage3(engine, channel) if stage == 3 else _Stage12(engine, channel)


def _fill(exchange: Exchange, gradients: Mapping[str, Tensor]) -> Flow[None]:
    combined = (yield from exchange({fqn: flat.float() for fqn, flat in gradients.items()})).values
    for fqn, flat in gradients.items():
        flat.copy_(combined[fqn])
