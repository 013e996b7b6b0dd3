"""A local update at work on one rank: what `local_update` says, step by step, and what a checkpoint needs of it."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import replace

import torch
from torch import Tensor

from dtrain.comm.aggregators.mean import rank_order_mean
from dtrain.comm.collectives.exchange import exchange
from dtrain.comm.collectives.two_phase import Combined, two_phase
from dtrain.comm.feedback import as_compression
from dtrain.comm.layout import Named, in_messages, is_keepable, messages
from dtrain.comm.methods.local_update import LocalUpdate
from dtrain.comm.ops import Flow
from dtrain.comm.outer_optimizers import InPlace, Looking, Round
from dtrain.comm.pieces import Exchange, Pieces
from dtrain.comm.plans.adaptive import bits_of, number_of
from dtrain.comm.runtime.attached import Attached
from dtrain.comm.runtime.consistency import Held, differences, gauges, kept_by, numbers_of, products
from dtrain.comm.runtime.knobs import Knobs
from dtrain.comm.runtime.measuring import Choosing
from dtrain.comm.runtime.parts import NEVER, Flight, Part, Pinned
from dtrain.comm.seeds import Key
from dtrain.comm.state import Kind, State

RATES = ("rate", "rate_steps", "round_rate", "last_rate")
"""What a checkpoint calls `Part.rates`."""


class AttachedLocalUpdate(Attached):
    """A `LocalUpdate` at work."""

    parameters_kind: Kind = "per_worker"
    counters = (*Attached.counters, "rounds", "cycles", "failed_rounds", "left_out", "repairs", "tokens")
    settings: tuple[str, ...] = (
        "every_steps", "outer", "rule", "fragments", "overlap_steps", "mix", "delay", "warmup_steps", "auto",
    )  # fmt: skip

    _alike_means = "anchor, outer momentum; in a warm-up parameters, optimizer state"
    _from_the_beginning: tuple[str, ...] = ("anchor",)

    def __init__(self, spec: LocalUpdate, pieces: Pieces, seed: int) -> None:
        super().__init__(pieces, State(spec.kinds), spec.plan, seed, spec)
        self.spec = spec
        rates = sorted({float(group["lr"]) for group in pieces.optimizer.param_groups})
        if len(rates) > 1 and getattr(spec.outer, "uses_inner_lr", False):
            raise ValueError(
                f"{spec.outer} counts in units of the inner learning rate, and the parameter groups have {rates}; give "
                "them one, or take another outer step: diloco(outer=sgd(momentum=...)), co2(gap='none')"
            )
        self.parts = [Part(number, fqns) for number, fqns in enumerate(spec.fragments.cut(pieces.shapes))]
        self.rounds = self.cycles = self.failed_rounds = self.left_out = self.repairs = self.tokens = 0
        self.channel = pieces.channel.clone() if spec.overlaps else pieces.channel
        self._choosing = Choosing(spec, pieces) if spec.auto is not None else None
        self._averaged = True
        self._anchor_here()
        pieces.set_gradient_exchange(self._on_gradients())

    def _on_gradients(self) -> Exchange | None:
        """What each step's gradients go through on their way to the optimizer."""
        return self._exchange if self.spec.warmup_steps else None

    def weigh(self, tokens: int) -> None:
        """Say, before `step`, how many tokens this replica's step was made from; without it a step counts as one.

        Replicas that have seen more since the last round count more in the mean.
        """
        self.tokens += tokens - 1

    def _held_alike(self) -> Held:
        if self._together:
            yield from self._parameters_alike()
            yield from kept_by(self.pieces.optimizer)
        yield from super()._held_alike()

    def _alike_in_words(self) -> str:
        return numbers_of(self.pieces.optimizer) if self._together else ""

    def close_round(self) -> bool:
        self._require_live("close_round()")
        self.require_still()
        if self.steps <= self.spec.warmup_steps:
            self._follow()
            return False
        delayed = self.spec.delay != "none"
        landed = not delayed and self._land_all(self.spec.mix)
        open_parts = [part for part in self.parts if part.captured < self.steps]
        fresh = [self._capture(part) for part in open_parts]
        for part, deltas in zip(open_parts, fresh, strict=True):
            if delayed:
                self._go_on(part, self._landed(part) if len(part.flights) > 1 else None, deltas)
        landed = self._land_all(0.0) or landed
        return bool(open_parts) or landed

    def settle(self) -> None:
        self._follow()
        for part in self.parts:
            for flight in part.flights:
                self._end(flight)
                for fqn, value in (flight.values or {}).items():
                    self.state.tensors[fqn]["arrived"] = value

    def _to_evaluate(self) -> dict[str, Tensor] | None:
        return None if self._warming else self._anchor(self.pieces.segments)

    def report(self) -> str:
        line = super().report()
        open_steps = self.steps - min(part.captured for part in self.parts)
        return f"{line}, {open_steps} steps since the last round" if open_steps else line

    def detach(self) -> None:
        if self.channel is not self.pieces.channel:
            self.channel.close(timeout_seconds=2.0)  # what is still under way is lost with this object
        super().detach()

    def integers(self) -> dict[str, int]:
        own: dict[str, int] = {}
        if self.spec.auto is not None:
            chosen, known = self.spec.knobs, self._choosing is None
            own = {
                "knobs.every_steps": chosen.every_steps if known else 0,
                "knobs.overlap_steps": chosen.overlap_steps,
                "knobs.layers": chosen.fragments.layers,
                "knobs.mix": bits_of(chosen.mix),
            }
        for part in self.parts:
            flight, name = part.flights[0] if part.flights else None, f"part.{part.number}"
            own[f"{name}.captured"], own[f"{name}.tokens"] = part.captured, part.tokens
            own[f"{name}.scalar"] = bits_of(part.scalar)
            for key, number in zip(RATES, part.rates, strict=True):
                own[f"{name}.{key}"] = bits_of(float(number))
            own[f"{name}.flight"] = flight.captured if flight else NEVER
            own[f"{name}.arrived"] = int(flight is not None and flight.values is not None)
        return {**super().integers(), **own}

    def load_integers(self, integers: Mapping[str, int]) -> None:
        super().load_integers(integers)
        if integers.get("knobs.every_steps", 0):
            layers = integers["knobs.layers"]
            chosen = Knobs(
                integers["knobs.every_steps"], integers["knobs.overlap_steps"], number_of(integers["knobs.mix"]),
                replace(self.spec.fragments, layers=layers),
            )  # fmt: skip
            self._use(chosen, "")
        for part in self.parts:
            own = {name: integers[f"part.{part.number}.{name}"] for name in ("captured", "tokens", "scalar")}
            part.captured, part.tokens, part.scalar = own["captured"], own["tokens"], number_of(own["scalar"])
            # Checkpoints of earlier revisions have none.
            mean, made, last, before = (number_of(integers.get(f"part.{part.number}.{key}", 0)) for key in RATES)
            part.rates = (mean, int(made), last, before)
            captured, part.flights, values = integers[f"part.{part.number}.flight"], [], None
            if integers[f"part.{part.number}.arrived"]:
                here = [fqn for fqn in part.fqns if fqn in self.pieces.segments]
                values = {fqn: self.state.tensors[fqn]["arrived"] for fqn in here}
            if captured != NEVER:
                part.flights = [Flight(captured, self.state.branch(), [], values)]

    # ---- the loop --------------------------------------------------------------------------------------------------

    def _after_step(self) -> None:
        spec, step = self.spec, self.steps - self.spec.warmup_steps
        self.tokens += 1
        for part in self.parts:
            part.stepped(self._rate)  # also if this replica has skipped the step: all must find the same
        if step <= 0:
            self._stay_together()
            return
        if self._choosing is not None:
            if not self._choosing.step_ended():
                return
            key = Key(self.seed, self.steps, self.pieces.place.rank)
            self._use(*self._choosing.choose(self.plan, self.matrices, key))
            spec = self.spec
        if not spec.overlap_steps:
            self._set_out()
        self._here()
        self._come_down()

    def _due(self, ahead: int = 0) -> list[int]:
        """Numbers of the fragments that set out at this step, or so many later."""
        step = self.steps + ahead - self.spec.warmup_steps
        return self.spec.fragments.due(step, len(self.parts), self.spec.every_steps)

    def _set_out(self) -> list[tuple[Part, dict[str, Tensor]]]:
        """Send off what is due at this step."""
        return [(self.parts[number], self._capture(self.parts[number])) for number in self._due()]

    def _landing(self, ahead: int = 0) -> list[Part]:
        """What is to be applied at this step, or so many later as far as it has set out."""
        captured = self.steps + ahead - self.spec.overlap_steps
        return [part for part in self.parts if part.flights and part.flights[0].captured == captured]

    def _here(self) -> None:
        """What is to be applied at this step has arrived, or is waited for one by one."""

    def _come_down(self) -> None:
        """Apply what is to be applied at this step, and send off what is due behind the next ones."""
        spec, due = self.spec, self._due()
        arrived = [(part, self._landed(part)) for part in self._landing()]
        if spec.overlap_steps:
            fresh = self._set_out()
            if fresh:
                self.channel.flush()  # so that it goes on by itself, to its end
            if spec.delay != "none":
                for part, deltas in fresh:
                    self._go_on(part, next((values for one, values in arrived if one is part), None), deltas)
                arrived = []
        for part, values in arrived:
            self._apply(part, values, spec.mix)
        if len(self.parts) - 1 in due:
            self.cycles += 1
            self._review()
            if spec.verify_every and self.cycles % spec.verify_every == 0:
                self.verify()

    def _use(self, chosen: Knobs, why: str) -> None:
        """From now on with these knobs; no round has begun."""
        self._choosing, self.spec = None, replace(self.spec, **vars(chosen))
        before, cut = self.parts[0], chosen.fragments.cut(self.pieces.shapes)
        self.parts = [
            Part(number, fqns, before.captured, before.tokens, rates=before.rates) for number, fqns in enumerate(cut)
        ]
        if why:
            self.decisions.append(why)

    @property
    def _together(self) -> bool:
        """Whether the last step was one of the warm-up, in which the replicas are equal."""
        return 0 < self.steps <= self.spec.warmup_steps

    @property
    def _warming(self) -> bool:
        return 0 < self.steps < self.spec.warmup_steps

    def _follow(self) -> None:
        """In the warm-up, where the replicas are equal, the anchor is brought to them when somebody wants it."""
        if self._warming:
            self._anchor_here()

    def _stay_together(self) -> None:
        """A step of the warm-up has ended: the replicas are equal, and the anchor moves with them at its end."""
        every, last = self.spec.verify_every * self.spec.every_steps, self.steps == self.spec.warmup_steps
        if every and (last or self.steps % every == 0):
            self.verify()
        if self.steps == self.spec.warmup_steps:
            self._anchor_here()
        for part in self.parts:
            part.sets_out(self.steps, self.tokens, self._rate)

    def _exchange(self, gradients: Named, present: bool | None = None) -> Flow[Combined]:
        """In the warm-up the mean of all replicas' gradients; afterwards each keeps its own."""
        if self.steps >= self.spec.warmup_steps:
            return Combined(dict(gradients), finite=True, present=None)
        key = Key(self.seed, self.steps, self.pieces.place.rank)
        plain, place = as_compression(None), self.pieces.place
        combined = yield from two_phase(gradients, plain, rank_order_mean, place, key, State({}), present=present)
        self._averaged = self._averaged and combined.finite
        return combined

    def _gradients_ok(self) -> bool:
        if self.steps == 0:
            self._require_anchor()
        ok, self._averaged = self._averaged, True
        return ok

    def _capture(self, part: Part) -> dict[str, Tensor]:
        """Send off what this replica has learned of ``part``, and return it."""
        now = self.pieces.read(part.fqns, copy=False)
        deltas, moved = differences({fqn: self.state.get(fqn, "anchor", x) for fqn, x in now.items()}, now)
        weight = float(self.tokens - part.tokens) if self.spec.weighs else None
        sent = deltas
        if not self._agree(is_keepable(*deltas.values(), norms=[moved.sqrt()])):
            deltas = {fqn: torch.zeros_like(delta) for fqn, delta in deltas.items()}
            moved = torch.zeros_like(moved)
            if self.spec.weighs:
                sent, weight = deltas, 0.0
                self.left_out += 1
            else:  # all have to be in: the round fails
                sent = {fqn: torch.full_like(delta, torch.nan) for fqn, delta in deltas.items()}
            self._merge(part, 0.0)
        key = Key(self.seed, self.steps, self.pieces.place.rank)
        self._measure(deltas, key)
        part.sets_out(self.steps, self.tokens, self._rate)
        flight = Flight(self.steps, self.state.branch(), [], sent=sent, weight=weight, products=[moved])
        part.flights.append(self._launched(part, flight))
        return deltas

    def _launched(self, part: Part, flight: Flight) -> Flight:
        """``flight``, on its way."""
        sent, key = flight.sent or {}, Key(self.seed, flight.captured, self.pieces.place.rank)
        plan = Pinned({fqn: self.plan.of(fqn, key.step) for fqn in sent})
        rule, place, lies = self.spec.rule, self.pieces.place, self.matrices
        flows = [
            exchange(
                some, plan, rule, place, key, flight.branch, matrices=lies, route=self.spec.route, weight=flight.weight
            )
            for some in messages(sent)
        ]
        flight.handles = [self.channel.start(flow, self._label(part)) for flow in flows]
        return flight

    def _label(self, part: Part) -> str:
        return "round" if len(self.parts) == 1 else f"fragment {part.number}"

    def _end(self, flight: Flight) -> None:
        """Wait for it, and agree on what it brought."""
        if not flight.handles:
            return
        arrived = []
        del flight.products[1:]  # of what was under way before replicas came or went
        for handle in flight.handles:
            arrived.append(message := handle.wait())
            if flight.sent is not None:  # while the next message travels
                flight.products.append(products(flight.sent, message.values))
        flight.handles = []
        if self._agree(all(message.finite for message in arrived)):
            flight.branch.commit()
            flight.values = {fqn: value for message in arrived for fqn, value in message.values.items()}
        else:
            flight.branch.rollback()

    def _landed(self, part: Part) -> dict[str, Tensor] | None:
        """What the oldest flight of ``part`` brought; None if it failed."""
        flight = part.flights.pop(0)
        self._end(flight)
        for fqn in part.fqns:
            self.state.drop(fqn, "arrived")
        if flight.values is None:
            self.failed_rounds += 1
        elif flight.products:
            moved, *others = flight.products
            found = torch.cat([moved.view(1), torch.stack(others).sum(0)])
            self.gauges |= gauges(self._over_shards(found, "gauges"))
        label = self._label(part)
        self.gauges |= {"staleness": self.steps - flight.captured, f"sent_bytes.{label}": self.meter.sent_as(label)}
        return flight.values

    def _land_all(self, mix: float) -> bool:
        """Wait for everything that is under way, and apply it; with ``mix`` where there were steps since it set out."""
        self._here()
        under_way = [part for part in self.parts if part.flights]
        for part in under_way:
            values = self._landed(part)
            if self.spec.delay == "eager":
                nothing = {fqn: torch.zeros_like(anchor) for fqn, anchor in self._anchor(part.fqns).items()}
                values = self._blended(values, nothing)
            self._apply(part, values, mix if part.captured < self.steps else 0.0)
        return bool(under_way)

    def _go_on(self, part: Part, arrived: Named | None, fresh: Named) -> None:
        """Begin the next round of a delayed method: from the anchor, with what has arrived, without waiting."""
        values = self._blended(arrived, fresh) if self.spec.delay == "eager" else arrived
        self._apply(part, values, 0.0)

    def _blended(self, arrived: Named | None, fresh: Named) -> dict[str, Tensor]:
        """The last round's mean with this replica's own part in it brought up to date."""
        world, blended = self.pieces.place.size, {}
        for fqn, own in fresh.items():
            others = (
                own.new_zeros(()) if arrived is None else arrived[fqn] - self.state.get(fqn, "own_delta", own) / world
            )
            blended[fqn] = others + own / world
            self.state.stage(fqn, "own_delta", own)
        return blended

    def _apply(self, part: Part, values: Named | None, mix: float) -> None:
        """The outer step, then the merge; without ``values`` nobody moves the anchor."""
        if values is not None:
            self.rounds += 1
            now = self._round_of(part)
            if isinstance(self.spec.outer, Looking):
                part.scalar = self._chosen(self.spec.outer, values, part.scalar)
                now = replace(now, scalar=part.scalar)
            outer = self.spec.outer
            step = outer.step_ if isinstance(outer, InPlace) else outer.step
            for fqn, delta in values.items():
                anchor = self.state.get(fqn, "anchor", delta)
                self.state.stage(fqn, "anchor", step(fqn, anchor, delta, self.state, now))
                self.state.commit()  # one by one, so that the next one takes the memory of the last
        self._merge(part, mix)

    @property
    def _rate(self) -> float:
        return float(self.pieces.optimizer.param_groups[0]["lr"])

    def _round_of(self, part: Part) -> Round:
        return Round(part.rates[2], self.spec.every_steps, last_lr=part.rates[3])

    def _chosen(self, outer: Looking, values: Named, scalar: float) -> float:
        found = [outer.look(fqn, delta, self.state) for fqn, delta in values.items()]
        local = torch.stack(found).sum(0) if found else outer.look("", torch.zeros(0), State(outer.kinds))
        return outer.choose(self._over_shards(local, "outer"), scalar)

    def _merge(self, part: Part, mix: float, anchor: Named | None = None) -> None:
        merged = self._anchor(part.fqns) if anchor is None else dict(anchor)
        if mix:
            live = self.pieces.read(part.fqns, copy=False)
            merged = {fqn: mix * live[fqn] + (1 - mix) * anchor for fqn, anchor in merged.items()}
        self.pieces.write(merged, part.fqns)

    def _anchor(self, fqns: Iterable[str]) -> dict[str, Tensor]:
        return {fqn: self.state.tensors[fqn]["anchor"] for fqn in fqns if fqn in self.state.tensors}

    def _anchor_here(self) -> None:
        """At the live parameters."""
        for names in in_messages(self.pieces.shapes):  # of a sharded anchor only a part is kept
            self._anchor_at(self.pieces.read(names))

    def _anchor_at(self, values: Named) -> None:
        for fqn, value in values.items():
            self.state.stage(fqn, "anchor", value)
        self.state.commit()

    def _require_anchor(self) -> None:
        """Raise ``RuntimeError`` if somebody has loaded other weights since the anchor was taken."""
        live = self.pieces.read(copy=False)
        known = {fqn: anchor for fqn, anchor in self._anchor(live).items() if fqn not in self.stepped_elsewhere}
        if any(not torch.equal(anchor, live[fqn]) for fqn, anchor in known.items()):
            raise RuntimeError(
                "the model was changed after attach, whose anchor is what it held then: load weights to start from "
                "before attach; when resuming, load the sync's state too, last. If it was an optimizer: one that steps "
                "within backward() does so before sync.step() can see a gradient, so give attach one that does not"
            )
