"""The `Pieces` of a described model on one rank: shadows, and a program that takes the time that a step takes."""

from __future__ import annotations

from collections.abc import Collection, Mapping
from typing import cast

import torch
from torch import Tensor

from dtrain.comm.channel import Channel
from dtrain.comm.clock.channel import ClockChannel, ClockHandle
from dtrain.comm.clock.layouts import END, Group, Layout
from dtrain.comm.clock.shadow import Shadow, ready, shadow
from dtrain.comm.clock.step import Step, layer_of
from dtrain.comm.clock.times import NEVER_LATE, Times, latest
from dtrain.comm.collectives.two_phase import Combined
from dtrain.comm.layout import Named, Segment, copied, from_rows, to_rows
from dtrain.comm.ops import AllGather, AllToAll, Broadcast, Flow, Place
from dtrain.comm.pieces import Exchange


class ClockPieces:
    """See the module's docstring. Gradients are exchanged as ``layout`` says, from `forward_backward` on."""

    def __init__(self, step: Step, layout: Layout, channel: ClockChannel, optimizer: torch.optim.Optimizer) -> None:
        self.channel, self.optimizer = cast(Channel, channel), optimizer
        self.segments, self.layout, self.machine = layout.segments, layout, channel.machine
        self.held: Mapping[str, Segment] = (
            {fqn: Segment(fqn, 0, numel) for fqn, numel in layout.sizes.items()} if layout.whole else layout.segments
        )
        self.shapes = {parameter.fqn: parameter.shape for parameter in step.parameters}
        self.values: dict[str, Tensor] = {fqn: shadow(segment.numel) for fqn, segment in self.segments.items()}
        self.gradients: dict[str, Tensor] = {}
        self.passes = 0
        self._described, self._clock = step, channel
        self._places = layer_of(step.layers)
        self._exchange: Exchange | None = None
        self._under_way: list[ClockHandle[Combined]] = []
        self._finished = self._agreed = False
        self._remaining: list[Group] = []  # groups that are exchanged after the backward pass

    # ---- a step ------------------------------------------------------------------------------------------------------

    def forward(self) -> None:
        """A forward pass; of a machine that goes by data, each layer once its parameters are ready."""
        for place, layer in enumerate(self._described.layers):
            if self.machine.order == "data":
                self.machine.wait(latest(NEVER_LATE, ready(self._of_layer(place))))
            self.machine.work(layer.forward)

    def forward_backward(self) -> None:
        """A forward and a backward pass, in which gradients are exchanged as they become ready."""
        self.forward()
        groups = list(self.layout.of_step(self.passes))
        self.gradients, self._finished = {}, False
        for place in reversed(range(len(self._described.layers))):
            self.machine.work(self._described.layers[place].backward)
            for fqn in (p.fqn for p in self._described.layers[place].parameters):
                if fqn in self.segments:
                    self.gradients[fqn] = shadow(self.segments[fqn].numel, ready=self._now)
            while groups and groups[0].after != END and groups[0].after >= place:
                self._send(groups.pop(0))
        if self._exchange is not None and self.layout.whole:
            self._clock.flush()
            self._results()  # DDP ends a backward pass with the results of all buckets
        self._remaining = groups
        self.passes += 1

    def finish(self) -> None:
        if self._finished or not self.gradients:
            return
        for group in self._remaining:
            self._send(group)
        self._results()
        self._finished = True

    def step(self) -> None:
        self.machine.work(self._described.optimizer)
        for fqn, gradient in self.gradients.items():
            self._value(fqn).moment.ready = latest(ready([self._value(fqn)]), ready([gradient]))
        self.skip()

    def skip(self) -> None:
        self.gradients, self._finished = {}, False

    def _send(self, group: Group) -> None:
        """Start the exchange of ``group``."""
        if self._exchange is None:
            return
        gradients = {fqn: self.gradients[fqn] for fqn in group.fqns if fqn in self.gradients}
        flow = self._whole(group, gradients) if self.layout.whole else self._exchanged(gradients)
        self._under_way.append(self._clock.start(flow, "gradients"))

    def _results(self) -> None:
        sent = False
        for handle in self._under_way:
            combined = handle.wait()
            sent = sent or combined.present is not None
            self.gradients |= combined.values
        self._under_way = []
        if sent and self.layout.units and not self._agreed:
            self._clock.run(_order(self.layout.units), "set-up")
            self._agreed = True

    def _exchanged(self, gradients: Named) -> Flow[Combined]:
        assert self._exchange is not None
        return (yield from self._exchange(gradients, self.layout.present))

    def _whole(self, group: Group, gradients: Named) -> Flow[Combined]:
        """As DDP's hook: the mean over the replica, this rank's slices to its peers, the results to the replica."""
        shard = self._clock.places["shard"]
        if shard.size > 1:
            rows = tuple(to_rows(shadow(self.held[fqn].numel, ready=self._now), shard.size) for fqn in group.fqns)
            received = yield AllToAll(rows, axis="shard")
            means = dict(zip(group.fqns, (members.mean(0) for members in received), strict=True))
            gradients = {fqn: means[fqn][: self.segments[fqn].numel] for fqn in group.fqns if fqn in self.segments}
        combined = yield from self._exchanged(gradients)
        if shard.size > 1:
            yield from self._gather(combined.values, group.fqns)
        return combined

    def _gather(self, slices: Named, fqns: Collection[str]) -> Flow[None]:
        shard, padded = self._clock.places["shard"], []
        for fqn in fqns:
            width = -(-self.held[fqn].numel // shard.size)
            moment = ready([slices[fqn]]) if fqn in slices else NEVER_LATE
            padded.append(shadow(width, ready=moment))
        gathered = yield AllGather(tuple(padded), axis="shard")
        for fqn, rows in zip(fqns, gathered, strict=True):
            from_rows(rows, self.held[fqn].numel)

    # ---- as every `Pieces` -------------------------------------------------------------------------------------------

    @property
    def place(self) -> Place:
        return self._clock.places["replicate"]

    def read(self, fqns: Collection[str] | None = None, *, copy: bool = True) -> dict[str, Tensor]:
        wanted = self.segments if fqns is None else [fqn for fqn in self.segments if fqn in fqns]
        values = {fqn: self.values[fqn] for fqn in wanted}
        return copied(values) if copy else values

    def write(self, values: Named, fqns: Collection[str] | None = None) -> None:
        if self.layout.whole and self._clock.places["shard"].size > 1:
            names = [fqn for fqn in self.held if fqns is None or fqn in fqns]
            self._clock.run(self._gather(values, names), "write-back")
        for fqn, value in values.items():
            self.values[fqn].copy_(value)

    def set_gradient_exchange(self, exchange: Exchange | None) -> None:
        self._exchange = exchange

    def gradients_finite(self) -> bool:
        return True

    def unused(self) -> set[str]:
        return set()

    def optimizer_state(self) -> dict[str, dict[str, Tensor]]:
        """Adam's moments, where the optimizer is one."""
        if "betas" not in self.optimizer.param_groups[0]:
            return {}
        moments = {name: {f: shadow(s.numel) for f, s in self.segments.items()} for name in ("exp_avg", "exp_avg_sq")}
        steps: dict[str, Tensor] = dict.fromkeys(self.segments, torch.tensor(float(self.passes)))
        return {**moments, "step": steps}  # type: ignore[dict-item]

    def restore(self, parameters: Named, optimizer: Mapping[str, Named]) -> None:
        self.write(parameters)

    def detach(self) -> None: ...

    @property
    def _now(self) -> Times:
        return self.machine.now

    def _of_layer(self, place: int) -> list[Tensor]:
        return [self.values[p.fqn] for p in self._described.layers[place].parameters if p.fqn in self.values]

    def _value(self, fqn: str) -> Shadow:
        return cast(Shadow, self.values[fqn])


def _order(units: int) -> Flow[None]:
    yield Broadcast((torch.arange(units, dtype=torch.int32),), source=0)
