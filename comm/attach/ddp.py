"""Adapts DistributedDataParallel: gradients are handed over bucket by bucket, while backward goes on.

The communication hook replaces DDP's own all-reduce: the gradient is averaged over the shard axis (each member gets
its slice of each parameter), the slices go through the sync's exchange with the peers, and the shard axis gathers the
result. With a shard axis of one, the slice is the whole parameter. All of it is cut per FQN, so DDP may rebuild its
buckets after the first step without moving a bit.
"""

from __future__ import annotations

import time
from collections.abc import Collection, Mapping
from weakref import WeakKeyDictionary

import torch
import torch.distributed as dist
from torch import Tensor
from torch._C._distributed_c10d import GradBucket
from torch.nn.parallel import DistributedDataParallel

from dtrain.comm.aggregators.mean import rank_order_mean
from dtrain.comm.attach.optimizer import StepGuard, elementwise_state, is_scalar, load_elementwise_state
from dtrain.comm.drivers.run import Channel, Handle
from dtrain.comm.layout import Named, Segment, even_slice, from_rows, is_finite, to_rows, working
from dtrain.comm.ops import AllGather, AllToAll, Flow, Place
from dtrain.comm.pieces import Exchange


class DDPPieces:
    """Pieces of a model in DDP. ``channel`` has both axes; together they span what DDP would average over.

    Raises ``ValueError`` for DDP's mixed precision, which keeps the only slot for a hook to itself.
    """

    def __init__(self, model: DistributedDataParallel, optimizer: torch.optim.Optimizer, channel: Channel) -> None:
        if model.mixed_precision is not None:
            raise ValueError(
                "this DistributedDataParallel was built with mixed_precision, which takes the only communication hook; "
                "leave it out and run the forward pass in torch.autocast, or train a bf16 model"
            )
        self.model, self.optimizer, self.channel = model, optimizer, channel
        self.shard = channel.places["shard"]
        named = {name: p for name, p in model.module.named_parameters() if p.requires_grad}
        self.parameters = {name: p for name, p in named.items() if p.numel()}
        self.names = {id(p): name for name, p in self.parameters.items()}
        self.shapes = {name: tuple(p.shape) for name, p in named.items()}
        self.held = {name: Segment(name, 0, p.numel()) for name, p in self.parameters.items()}
        rank, size = self.shard.rank, self.shard.size
        slices = (even_slice(name, p.numel(), part=rank, parts=size) for name, p in self.parameters.items())
        self.segments = {segment.fqn: segment for segment in slices if segment.numel}
        self._exchange: Exchange | None = None
        self._under_way: list[Handle[None]] = []
        self._backward_ended = 0.0
        self._guard = StepGuard(optimizer)

    @property
    def place(self) -> Place:
        return self.channel.places["replicate"]

    def read(self, fqns: Collection[str] | None = None) -> dict[str, Tensor]:
        wanted = [fqn for fqn in self.segments if fqns is None or fqn in fqns]
        return {fqn: self._own_slice(fqn, self.parameters[fqn].detach()).clone() for fqn in wanted}

    def write(self, values: Named, fqns: Collection[str] | None = None) -> None:
        wanted = [fqn for fqn in self.parameters if fqns is None or fqn in fqns]
        whole = self.channel.run(self._gather(dict(values), wanted), "write-back")
        with torch.no_grad():
            for fqn, value in whole.items():
                self.parameters[fqn].copy_(value.view(self.shapes[fqn]))

    def hand_over(self, exchange: Exchange | None) -> None:
        self._exchange = exchange

        slot = _SLOTS.get(self.model)
        if slot is None:
            slot = _SLOTS[self.model] = _Slot(self.model)
        slot.pieces = self

    def finish(self) -> None:
        ended = [handle.ended_at for handle in self._under_way]
        for handle in self._under_way:
            handle.result()
            self.channel.meter.wait(max(0.0, max(ended) - self._backward_ended) / len(ended), handle.label)
        self._under_way = []

    def gradients_finite(self) -> bool:
        return all(p.grad is None or is_finite(p.grad) for p in self.parameters.values())

    def unused(self) -> set[str]:
        return {fqn for fqn in self.segments if self.parameters[fqn].grad is None}

    def step(self) -> None:
        with self._guard.opened():
            self.optimizer.step()
        self.optimizer.zero_grad()

    def skip(self) -> None:
        self.optimizer.zero_grad()

    def optimizer_state(self) -> dict[str, dict[str, Tensor]]:
        whole = elementwise_state(self.optimizer, self.parameters, lambda tensor: tensor)
        owned: dict[str, dict[str, Tensor]] = {}
        for name, tensors in whole.items():
            mine = {fqn: tensor for fqn, tensor in tensors.items() if fqn in self.segments}
            owned[name] = {fqn: t if is_scalar(t) else self._own_slice(fqn, t) for fqn, t in mine.items()}
        return owned

    def restore(self, parameters: Named, optimizer: Mapping[str, Named]) -> None:
        with torch.no_grad():
            for fqn, value in parameters.items():
                self.parameters[fqn].copy_(value.view(self.shapes[fqn]))
        load_elementwise_state(self.optimizer, self.parameters, optimizer, lambda value, p: value.view(p.shape))

    def detach(self) -> None:
        """DDP has no way to take a hook out: from now on it averages over its own group, as it did without one."""
        if self.model in _SLOTS:
            _SLOTS[self.model].pieces = None
        self._guard.remove()

    def on_bucket(self, bucket: GradBucket) -> torch.futures.Future[Tensor]:
        """Exchange one bucket's gradients in the background."""
        buffer = bucket.buffer()
        future: torch.futures.Future[Tensor] = torch.futures.Future()
        if self._exchange is None and self.shard.size == 1:  # a replica of one rank that keeps its own gradients
            future.set_result(buffer)
            return future
        pairs = zip(bucket.parameters(), bucket.gradients(), strict=True)
        gradients = {self.names[id(p)]: gradient for p, gradient in pairs if p.numel()}

        def ended(handle: Handle[None]) -> None:
            try:
                handle.result()
                future.set_result(buffer)
            except BaseException as error:  # without it backward would wait for ever
                future.set_exception(error)  # type: ignore[arg-type]

        label = "gradients" if self._exchange is not None else "inner gradients"
        self._under_way.append(self.channel.start(self._average(gradients), label, then=ended))
        if bucket.is_last():
            self._backward_ended = time.perf_counter()
            self.channel.flush()
        return future

    def _average(self, gradients: Mapping[str, Tensor]) -> Flow[None]:
        """Replace the gradients of one bucket by what the optimizer shall see."""
        slices = {fqn: working(gradient.reshape(-1)) for fqn, gradient in gradients.items()}
        if self.shard.size > 1:
            rows = tuple(to_rows(each, self.shard.size) for each in slices.values())
            arrived = yield AllToAll(rows, axis="shard")
            means = {fqn: rank_order_mean(r) for fqn, r in zip(gradients, arrived, strict=True)}
            slices = {fqn: means[fqn][: self.segments[fqn].numel] for fqn in gradients if fqn in self.segments}
        if self._exchange is not None:
            slices = yield from self._exchange(slices)
        whole = yield from self._gather(slices, list(gradients))
        for fqn, gradient in gradients.items():
            gradient.copy_(whole[fqn].view(gradient.shape))

    def _gather(self, slices: Mapping[str, Tensor], fqns: list[str]) -> Flow[dict[str, Tensor]]:
        """Whole flat tensors of ``fqns`` from every member's slices, across the shard axis."""
        if self.shard.size == 1:
            return {fqn: slices[fqn] for fqn in fqns}
        padded = []
        for fqn in fqns:
            width = -(-self.held[fqn].numel // self.shard.size)
            row = working(self.parameters[fqn].detach().new_zeros(width))
            if fqn in slices:
                row[: slices[fqn].numel()] = slices[fqn]
            padded.append(row)
        gathered = yield AllGather(tuple(padded), axis="shard")
        return {fqn: from_rows(rows, self.held[fqn].numel) for fqn, rows in zip(fqns, gathered, strict=True)}

    def _own_slice(self, fqn: str, tensor: Tensor) -> Tensor:
        segment = self.segments[fqn]
        return working(tensor.reshape(-1)[segment.offset : segment.stop])


class _Slot:
    """The one hook that a DDP model takes in its life, and who answers to it now: nobody while nothing is attached."""

    def __init__(self, model: DistributedDataParallel) -> None:
        self.pieces: DDPPieces | None = None
        group = model.process_group  # not the model itself: its hook must not keep it alive

        # DDP inspects the hook's name and annotations, which `from __future__ import annotations` turns into strings.
        def hook(state, bucket):  # type: ignore[no-untyped-def]
            return _averaged(bucket, group) if self.pieces is None else self.pieces.on_bucket(bucket)

        try:
            model.register_comm_hook(None, hook)
        except RuntimeError as error:
            raise RuntimeError(
                f"this DistributedDataParallel has a communication hook already ({error}); DDP takes one for life, so "
                "wrap the module in a new DistributedDataParallel"
            ) from error


_SLOTS: WeakKeyDictionary[DistributedDataParallel, _Slot] = WeakKeyDictionary()


def _averaged(bucket: GradBucket, group: dist.ProcessGroup) -> torch.futures.Future[Tensor]:
    """What DDP does without a hook."""
    buffer = bucket.buffer()
    dist.all_reduce(buffer, group=group)
    future: torch.futures.Future[Tensor] = torch.futures.Future()
    future.set_result(buffer.div_(group.size()))
    return future
