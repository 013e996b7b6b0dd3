"""Adapts DistributedDataParallel: gradients are handed over bucket by bucket, while backward goes on.

The communication hook replaces DDP's own all-reduce: the gradient is averaged over the shard axis (each member gets
its slice of each parameter), the slices go through the sync's exchange with the peers, and the shard axis gathers the
result. With a shard axis of one, the slice is the whole parameter. All of it is cut per FQN, so DDP may rebuild its
buckets after the first step without moving a bit.
"""

from __future__ import annotations

import time
from collections.abc import Mapping
from weakref import WeakKeyDictionary, ref

import torch
import torch.distributed as dist
from torch import Tensor
from torch._C._distributed_c10d import GradBucket
from torch.nn.parallel import DistributedDataParallel

from dtrain.comm.aggregators.mean import rank_order_mean
from dtrain.comm.attach.module import ModulePieces
from dtrain.comm.drivers.run import Channel, Handle
from dtrain.comm.layout import to_rows, working
from dtrain.comm.ops import AllToAll, Flow
from dtrain.comm.pieces import Exchange


class DDPPieces(ModulePieces):
    """Pieces of a model in DDP. ``channel`` has both axes; together they span what DDP would average over.

    Raises ``ValueError`` for DDP's mixed precision, which keeps the only slot for a hook to itself.
    """

    def __init__(self, model: DistributedDataParallel, optimizer: torch.optim.Optimizer, channel: Channel) -> None:
        if model.mixed_precision is not None:
            raise ValueError(
                "this DistributedDataParallel was built with mixed_precision, which takes the only communication hook; "
                "leave it out and run the forward pass in torch.autocast, or train a bf16 model"
            )
        super().__init__(model.module, optimizer, channel)
        self.model = model
        self.names = {id(p): name for name, p in self.parameters.items()}
        self._exchange: Exchange | None = None
        self._under_way: list[Handle[None]] = []
        self._backward_ended = 0.0

    def hand_over(self, exchange: Exchange | None) -> None:
        self._exchange = exchange
        # A replica of one rank that keeps its own gradients: without DDP's buckets, whose copies cost 4 % of a step.
        self.model.require_backward_grad_sync = not self._keeps_its_own
        slot = _SLOTS.get(self.model)
        if slot is None:
            slot = _SLOTS[self.model] = _Slot(self.model)
        slot.pieces = ref(self)

    def finish(self) -> None:
        ended = [handle.ended_at for handle in self._under_way]
        for handle in self._under_way:
            handle.result()
            self.channel.meter.wait(max(0.0, max(ended) - self._backward_ended) / len(ended), handle.label)
        self._under_way = []

    def detach(self) -> None:
        """DDP has no way to take a hook out: from now on it averages over its own group, as it did without one."""
        if self.model in _SLOTS:
            _SLOTS[self.model].pieces = None
        self.model.require_backward_grad_sync = True
        super().detach()

    def on_bucket(self, bucket: GradBucket) -> torch.futures.Future[Tensor]:
        """Exchange one bucket's gradients in the background."""
        buffer = bucket.buffer()
        future: torch.futures.Future[Tensor] = torch.futures.Future()
        if self._keeps_its_own:  # DDP hands them over nevertheless, as with a static graph in the first step
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

    @property
    def _keeps_its_own(self) -> bool:
        return self._exchange is None and self.shard.size == 1

    def _average(self, gradients: Mapping[str, Tensor]) -> Flow[None]:
        """Replace the gradients of one bucket by what the optimizer shall see."""
        slices = {fqn: working(gradient.reshape(-1)) for fqn, gradient in gradients.items()}
        if self.shard.size > 1:
            rows = tuple(to_rows(each, self.shard.size) for each in slices.values())
            arrived = yield AllToAll(rows, axis="shard")
            means = {fqn: rank_order_mean(r) for fqn, r in zip(gradients, arrived, strict=True)}
            slices = {fqn: means[fqn][: self.segments[fqn].numel] for fqn in gradients if fqn in self.segments}
        if self._exchange is not None:
            slices = (yield from self._exchange(slices)).values
        whole = yield from self._gather(slices, list(gradients))
        for fqn, gradient in gradients.items():
            gradient.copy_(whole[fqn].view(gradient.shape))


class _Slot:
    """The one hook that a DDP model takes in its life, and who answers to it now: nobody while nothing is attached."""

    def __init__(self, model: DistributedDataParallel) -> None:
        self.pieces: ref[DDPPieces] | None = None  # DDP's C++ holds the hook, where no garbage collector looks
        group = model.process_group  # not the model itself: its hook must not keep it alive

        # DDP inspects the hook's name and annotations, which `from __future__ import annotations` turns into strings.
        def hook(state, bucket):  # type: ignore[no-untyped-def]
            pieces = None if self.pieces is None else self.pieces()
            return _averaged(bucket, group) if pieces is None else pieces.on_bucket(bucket)

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
