"""Adapts DistributedDataParallel: gradients are exchanged bucket by bucket, during backward.

The communication hook replaces DDP's own all-reduce: the gradient is averaged over the shard axis (each member gets
its slice of each parameter), the slices go through the sync's exchange with the peers, and the shard axis gathers the
result. With a shard axis of one, the slice is the whole parameter. All of it is cut per FQN, so results stay bitwise
equal when DDP rebuilds its buckets after the first step.
"""

from __future__ import annotations

import time
from collections.abc import Collection, Iterator, Mapping
from contextlib import contextmanager
from functools import partial
from weakref import WeakKeyDictionary, ref

import torch
import torch.distributed as dist
from torch import Tensor
from torch.nn.parallel import DistributedDataParallel
from torch.utils.hooks import RemovableHandle

from dtrain.comm.adapters.module import ModulePieces
from dtrain.comm.adapters.requirements import require_dense
from dtrain.comm.adapters.wrappers import plain_name
from dtrain.comm.aggregators.mean import rank_order_mean
from dtrain.comm.channel import Channel, Handle
from dtrain.comm.layout import Named, to_rows, working
from dtrain.comm.ops import AllToAll, Flow
from dtrain.comm.pieces import Exchange, Repeated
from dtrain.comm.torch_private import GradBucket, backward_id, joins_unevenly, version_of


class DDPPieces(ModulePieces):
    """Pieces of a model in DDP. ``channel`` has both axes; together they span what DDP would average over.

    Raises ``ValueError`` for DDP's mixed precision, which takes the only hook.
    """

    def __init__(self, model: DistributedDataParallel, optimizer: torch.optim.Optimizer, channel: Channel) -> None:
        if model.mixed_precision is not None:
            raise ValueError(
                "this DistributedDataParallel was built with mixed_precision, which takes the only communication hook; "
                "leave it out and run the forward pass in torch.autocast, or train a bf16 model"
            )
        super().__init__(model.module, optimizer, channel)
        self.model = model
        self.names = {id(p): name for name, p in self.trained.parameters.items()}
        self._exchange: Exchange | None = None
        self._earlier: EarlierPasses | None = None
        self._no_sync: NoSyncWatch | None = None
        self._under_way: list[Handle[None]] = []
        self._backward_ended = 0.0
        self._arrived: set[str] = set()  # in this pass through the buckets
        self._received: dict[str, Tensor | None] = {}  # in this step; if some may be unused: whether nonzero

    def set_gradient_exchange(self, exchange: Exchange | None) -> None:
        if exchange is not None or self.shard.size > 1:
            require_dense(self._sparse)
            self._require_reduced()
            self._no_sync = self._no_sync or NoSyncWatch(self.model, self.parameters.values())
        self._exchange = exchange
        # A replica of one rank with local gradients skips DDP's buckets, whose copies cost 4 % of a step. A static
        # graph needs them in its first step.
        self.model.require_backward_grad_sync = not self._keeps_its_own or self.model.static_graph
        slot = _SLOTS.get(self.model)
        if slot is None:
            slot = _SLOTS[self.model] = _Slot(self.model)
        slot.pieces = ref(self)
        if isinstance(exchange, Repeated) and exchange.adds:
            self._earlier = EarlierPasses(self.parameters)

    def finish(self) -> None:
        super().finish()
        self._require_no_join()
        self._require_all_received()
        self._require_exchanged()
        ended = [handle.ended_at for handle in self._under_way]
        for handle in self._under_way:
            handle.result()
            self.channel.meter.wait(max(0.0, max(ended) - self._backward_ended) / len(ended), handle.label)
        self._under_way = []
        self._require_still_there()

    def unused(self) -> set[str]:
        # One whose gradient another optimizer has used and cleared was not unused.
        return {fqn for fqn in super().unused() if not self._was_used(fqn)}

    def step(self) -> None:
        self._step_ends()
        super().step()

    def skip(self) -> None:
        self._step_ends()
        super().skip()

    def _step_ends(self) -> None:
        self._received, self._arrived = {}, set()
        if self._earlier is not None:
            self._earlier.step_ended()
        if self._no_sync is not None:
            self._no_sync.step_ended()

    def detach(self) -> None:
        """DDP cannot remove a hook: from now on it averages over DDP's own group, as DDP does without one."""
        if self.model in _SLOTS:
            _SLOTS[self.model].pieces = None
        self.model.require_backward_grad_sync = True
        if self._earlier is not None:
            self._earlier.remove()
        if self._no_sync is not None:
            self._no_sync.remove()
        super().detach()

    def on_bucket(self, bucket: GradBucket) -> torch.futures.Future[Tensor]:
        """Exchange one bucket's gradients in the background."""
        buffer = bucket.buffer()
        future = _future(buffer)
        if self._keeps_its_own:  # DDP calls the hook nevertheless, as with a static graph in the first step
            future.set_result(buffer)
            return future
        # A parameter that was frozen since DDP was built is still in a bucket, but has no name here.
        names, views = [self.names.get(id(p), "") for p in bucket.parameters()], bucket.gradients()
        if len(names) != len(views):
            raise RuntimeError(f"DDP hands over {len(views)} gradients for {len(names)} parameters: {', '.join(names)}")
        gradients = {name: gradient for name, gradient in zip(names, views, strict=True) if name and gradient.numel()}
        standing_in = backward_id() < 0  # no backward pass: zeros from DDP.join
        before: Named = {}
        if not standing_in:
            self._count(gradients)
            before = self._earlier.take(gradients) if self._earlier is not None else before

        def ended(handle: Handle[None]) -> None:
            future.set_result(buffer)  # after a failure too: DDP cannot read an exception, `finish` raises it

        label = "gradients" if self._exchange is not None else "inner gradients"
        self._under_way.append(self.channel.start(self._average(gradients, before), label, then=ended))
        self._arrived.update(names)
        # In the first step of a static graph no bucket is the last one.
        if bucket.is_last() or self._arrived.issuperset(self.trained.parameters):
            self._arrived = set()
            self._backward_ended = time.perf_counter()
            self.channel.flush()
            self._pass_ended(standing_in)
        return future

    def _pass_ended(self, standing_in: bool) -> None:
        """All gradients of a backward pass, or zeros in their place, have been started."""
        if not standing_in:
            if self._earlier is not None:
                self._earlier.pass_ended()
            if self._no_sync is not None:
                self._no_sync.exchanged()
        elif isinstance(self._exchange, Repeated):
            for handle in self._under_way:
                handle.wait()
            self._under_way = []
            self._exchange.stood_in()

    def _count(self, gradients: Mapping[str, Tensor]) -> None:
        for fqn, gradient in gradients.items():
            self._received[fqn] = gradient.any() if self._may_be_unused else None

    def _was_used(self, fqn: str) -> bool:
        """Whether this rank's backward pass gave a gradient for ``fqn`` in this step, even if it was cleared since."""
        if fqn not in self._received:
            return False
        nonzero = self._received[fqn]
        return nonzero is None or bool(nonzero)

    def _require_reduced(self) -> None:
        """Raise ``ValueError`` for trainable parameters that DDP ignores."""
        ignored = {plain_name(name) for name in self.model.parameters_to_ignore} & self.trained.parameters.keys()
        if ignored:
            raise ValueError(
                f"DistributedDataParallel was told to ignore {', '.join(sorted(ignored))}, so their gradients would "
                "not be averaged; let it have them (_ddp_params_and_buffers_to_ignore, delay_all_reduce_named_params), "
                "freeze them, or train with a local update, each rank a replica"
            )

    def _require_no_join(self) -> None:
        """Raise ``RuntimeError`` for ``model.join()`` under a local update: rounds need equal numbers of steps."""
        if self.trained.differ and joins_unevenly(self.model):
            raise RuntimeError(
                "model.join() lets ranks make different numbers of steps, and the rounds of a local update are counted "
                "in steps: the others would wait for ever. Give all ranks the same number of batches, or end all of "
                "them together: join(throw_on_early_termination=True)"
            )

    def _require_all_received(self) -> None:
        """Raise ``RuntimeError`` if DDP has withheld gradients: it waits for parameters that have none."""
        if self._keeps_its_own or self._may_be_unused:
            return
        missing = [fqn for fqn in self.parameters if fqn not in self._received]
        idle = [fqn for fqn in missing if self.parameters[fqn].grad is None]
        if not missing or len(idle) == len(self.parameters) or not (self._received or idle):
            return  # all of them, or none: no backward pass since the last step, or only under no_sync()
        frozen = [fqn for fqn in missing if not self.parameters[fqn].requires_grad]
        if self._received and not idle:
            raise RuntimeError(
                f"DistributedDataParallel has not handed over the gradients of {len(missing)} parameters, {missing[0]} "
                "the first: they were frozen when it was built (wrap the module in a new one), or had no part in the "
                "last microbatch (find_unused_parameters=True)"
            )
        reason = "were frozen after attach" if frozen else "had no part in the loss"
        raise RuntimeError(
            f"{len(idle)} parameters {reason}, {idle[0]} the first, so DistributedDataParallel has not handed over all "
            "gradients of this step; build it with find_unused_parameters=True (static_graph=True where it is the same "
            "ones in every step)"
        )

    def _require_exchanged(self) -> None:
        """Raise ``RuntimeError`` if local gradients were added after the exchange."""
        if self._no_sync is not None and self._no_sync.pending and self._received:
            raise RuntimeError(
                "the last backward pass of this step ran within no_sync(), so its gradient was not exchanged, and the "
                "replicas would step apart; leave the last microbatch of a step outside of no_sync()"
            )

    def _require_still_there(self) -> None:
        """Raise ``RuntimeError`` if an exchanged gradient was cleared before the optimizer's step."""
        gone = [fqn for fqn in self._received if self.parameters[fqn].grad is None and self._was_used(fqn)]
        outside = set() if self._may_be_unused else set(self.trained.outside)  # their own optimizer stepped and cleared
        self.trained.require_there(fqn for fqn in gone if fqn not in outside)

    @property
    def _may_be_unused(self) -> bool:
        """Whether DDP gives its hook zeros for parameters that no rank used, and leaves their gradients untouched."""
        return bool(self.model.find_unused_parameters or self.model.static_graph)

    @property
    def _keeps_its_own(self) -> bool:
        return self._exchange is None and self.shard.size == 1

    def _average(self, gradients: Mapping[str, Tensor], before: Named) -> Flow[None]:
        """Replace the gradients of one bucket by the combined ones. ``before``: what they held before this pass."""
        slices = {fqn: working(gradient.reshape(-1)) for fqn, gradient in gradients.items()}
        slices |= {fqn: slices[fqn] - earlier for fqn, earlier in before.items()}
        if self.shard.size > 1:
            rows = tuple(to_rows(gradient, self.shard.size) for gradient in slices.values())
            received = yield AllToAll(rows, axis="shard")
            means = {fqn: rank_order_mean(members) for fqn, members in zip(gradients, received, strict=True)}
            slices = {fqn: means[fqn][: self.segments[fqn].numel] for fqn in gradients if fqn in self.segments}
        if self._exchange is not None:
            slices = (yield from self._exchange(slices)).values
        whole = slices
        if self.shard.size > 1:
            whole = yield from self._gather(slices, list(gradients))
        for fqn, gradient in gradients.items():
            combined = before[fqn] + whole[fqn] if fqn in before else whole[fqn]
            gradient.copy_(combined.view(gradient.shape))


class _Slot:
    """The only hook that a DDP model can ever take, and the pieces that it serves; None while none are attached."""

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
    future = _future(buffer)
    future.set_result(buffer.div_(group.size()))
    return future


def _future(buffer: Tensor) -> torch.futures.Future[Tensor]:
    """A future of ``buffer``. On a GPU whoever waits for it waits for the stream that set it, and it refuses tensors of
    devices that it was not told of.
    """
    return torch.futures.Future(devices=[] if buffer.is_cpu else [buffer.device])


class EarlierPasses:
    """The step's combined gradients so far, to which a further backward pass adds its own.

    DDP adds each pass to the gradient and gives its hook the sum. Where feedback compresses each pass alone, the two
    are separated again. Copies are made in steps of several exchanges only.
    """

    def __init__(self, parameters: Mapping[str, Tensor]) -> None:
        self.parameters = parameters
        self._exchanged = False  # in this step
        self._kept: dict[str, Tensor] = {}
        weak_self = ref(self)  # the garbage collector does not see cycles through a parameter's hooks
        self._hooks: list[RemovableHandle] = [
            parameter.register_hook(partial(_keep, weak_self, fqn)) for fqn, parameter in parameters.items()
        ]

    def pass_ended(self) -> None:
        """All gradients of a backward pass have been exchanged: further passes of this step add to the results."""
        self._exchanged = True

    def step_ended(self) -> None:
        self._exchanged, self._kept = False, {}

    def take(self, fqns: Collection[str]) -> dict[str, Tensor]:
        """What the gradients ``fqns`` held before this pass, flat; nothing in a step's first one."""
        earlier = {}
        for fqn in fqns if self._exchanged else ():
            gradient = self._kept.pop(fqn, None)
            if gradient is None and self.parameters[fqn].grad is not None:  # this pass has not reached it
                gradient = self.parameters[fqn].grad
            if gradient is not None:
                earlier[fqn] = working(gradient.detach().clone()).reshape(-1)
        return earlier

    def remove(self) -> None:
        for hook in self._hooks:
            hook.remove()
        self._hooks = []


def _keep(weak_passes: ref[EarlierPasses], fqn: str, incoming: Tensor) -> None:
    passes = weak_passes()
    if passes is None or not passes._exchanged or fqn in passes._kept:
        return
    gradient = passes.parameters[fqn].grad
    if gradient is not None:
        passes._kept[fqn] = gradient.detach().clone()


class NoSyncWatch:
    """Detects a backward pass within ``no_sync()`` that no exchanged one has followed: its gradient is only local.

    Replaces ``model.no_sync`` until `remove`. Within the context nothing is hooked; gradients after it are compared
    with those before it, by their version numbers. ``pending``: local gradients were added since the last exchange.
    """

    def __init__(self, model: DistributedDataParallel, parameters: Collection[Tensor]) -> None:
        self.model, self.parameters = model, parameters
        self.pending, self._exchanges = False, 0
        model.__dict__["no_sync"] = self._no_sync

    def exchanged(self) -> None:
        """A backward pass was exchanged, with all that had been added before."""
        self.pending, self._exchanges = False, self._exchanges + 1

    def step_ended(self) -> None:
        self.pending = False

    def remove(self) -> None:
        self.model.__dict__.pop("no_sync", None)

    @contextmanager
    def _no_sync(self) -> Iterator[None]:
        exchanges, before = self._exchanges, self._versions()
        with DistributedDataParallel.no_sync(self.model):
            yield
        if exchanges == self._exchanges and self._versions() != before:
            self.pending = True

    def _versions(self) -> list[tuple[int, int] | None]:
        gradients = [parameter.grad for parameter in self.parameters]
        return [None if gradient is None else (id(gradient), version_of(gradient)) for gradient in gradients]
