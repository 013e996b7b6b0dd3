"""The loop of all local updates: capture, encode, reduce, apply, merge; see `dtrain.comm.methods.local_update`.

It is composed of independent parts: a `Cadence` (what is due), an `OuterStore` (where the outer parameters are, and the
outer step), a `Reducer` (encode and reduce), `StepSource` or a subclass (the inner steps), and a `Meeting` (where
replicas wait for each other).
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from dtrain.comm.collectives.exchange import exchange
from dtrain.comm.collectives.two_phase import Combined
from dtrain.comm.layout import Named, in_messages, is_keepable, messages
from dtrain.comm.outer_optimizers import Round
from dtrain.comm.runtime.cadence import Cadence
from dtrain.comm.runtime.consistency import Held, kept_by, numbers_of
from dtrain.comm.runtime.gauges import gauges, products
from dtrain.comm.runtime.gradient_steps import GradientSteps
from dtrain.comm.runtime.guard import Guard, parameters_held, take_over
from dtrain.comm.runtime.meeting import Meeting, Peers
from dtrain.comm.runtime.outer_store.store import OuterStore, Reducer
from dtrain.comm.runtime.rounds import Fragment, Pinned, Reduction
from dtrain.comm.runtime.step_source import StepSource
from dtrain.comm.seeds import Key
from dtrain.comm.state import Numbers

if TYPE_CHECKING:
    from dtrain.comm.ops import Flow
    from dtrain.comm.pieces import Exchange
    from dtrain.comm.runtime.context import Context
    from dtrain.comm.runtime.loop_spec import LoopSpec

COUNTED = ("rounds", "failed_rounds", "left_out", "tokens")
MEANS = "anchor, outer momentum; in a warm-up parameters, optimizer state"


@dataclass
class Parts:
    """The parts of a loop."""

    store: OuterStore
    reduce: Reducer
    source: StepSource = field(default_factory=StepSource)
    meeting: Meeting = field(default_factory=Peers)


class Deltas:
    """A `Reducer` of pseudo-gradients, compressed with feedback by the plan and combined by the rule."""

    def __init__(self, spec: LoopSpec, context: Context) -> None:
        self._spec, self._context = spec, context

    def __call__(self, reduction: Reduction, fragment: Fragment, now: Round) -> list[Flow[Combined]]:
        context, spec, sent = self._context, self._spec, reduction.sent or {}
        key = Key(context.seed, reduction.captured, context.place.rank)
        plan = Pinned({fqn: context.plan.of(fqn, key.step) for fqn in sent})
        return [
            exchange(
                message, plan, spec.rule, context.place, key, reduction.branch,
                matrices=context.matrices, route=spec.route, weight=reduction.weight,
                lossless=spec.lossless,
            )
            for message in messages(sent)
        ]  # fmt: skip


class LocalUpdateLoop(GradientSteps):
    """A `LoopSpec` at work on one rank.

    ``rounds``, ``failed_rounds``: fragments' rounds that were applied, and those that failed on a value that was not
    finite. ``left_out``: rounds in which this replica had weight 0 for that reason. ``tokens``: seen by this replica.
    """

    always = ("anchor",)
    counters = (*COUNTED, "cycles", "repairs")

    def __init__(self, spec: LoopSpec, context: Context, parts: Parts) -> None:
        super().__init__(context)
        self.spec, self.store, self.source = spec, parts.store, parts.source
        self._reducer, self.meeting = parts.reduce, parts.meeting
        self.cadence = Cadence(spec, context)
        self.rounds = self.failed_rounds = self.left_out = self.tokens = 0
        self.channel = context.pieces.channel.clone() if spec.overlaps else context.pieces.channel
        self._guard = Guard(context, spec.tie, MEANS, self._held, words=self._words, replace=self._take_over)
        self._set_anchor()

    # ---- the step ----------------------------------------------------------------------------------------------------

    @property
    def exchange(self) -> Exchange | None:
        return self.source.exchange

    def exchanged(self) -> bool:
        if self.context.steps == 0:
            self._require_anchor()
        return self.source.exchanged()

    def weigh(self, tokens: int) -> None:
        self.tokens += tokens - 1

    def after_step(self) -> None:
        self._end_step()
        while self.meeting.leaves_out():
            self.context.steps += 1
            self.tokens -= 1
            self._end_step()

    def _end_step(self) -> None:
        self.source.stepped()
        self.tokens += 1
        for fragment in self.cadence.fragments:
            fragment.stepped(self.context.rate)  # skipped steps count too: rates must be equal on all replicas
        if self.context.steps <= self.spec.warmup_steps:
            self._end_warmup_step()
        else:
            self.cadence.step_ended()
            if self.cadence.measured():
                self._end_step_of_rounds()
        self.store.rest()
        soon = [*self.cadence.due(ahead=1), *self.cadence.arriving(ahead=1)]
        for fragment in soon:
            self.store.ahead(fragment.fqns)

    def _end_step_of_rounds(self) -> None:
        """Capture what is due; wait for the results to apply, and apply them."""
        if not self.cadence.knobs.overlap_steps:
            self._capture_all(self.cadence.due())
        self.meeting.wait(self)
        self.end_rounds()

    def end_rounds(self) -> None:
        """Apply the results of this step; with overlap, capture what is due."""
        cadence, spec = self.cadence, self.spec
        due = cadence.due()
        results = [(fragment, self._reduced(fragment)) for fragment in cadence.arriving()]
        if cadence.knobs.overlap_steps:
            fresh = self._capture_all(due)
            if fresh:
                self.channel.flush()  # so that it ends without waiting for later flows
            if spec.delay != "none":
                for fragment, deltas in fresh:
                    mean = next((mean for reduced, mean in results if reduced is fragment), None)
                    self._begin_next_round(fragment, mean, deltas)
                results = []
        for fragment, mean in results:
            self._apply(fragment, mean, cadence.knobs.mix)
        if cadence.ends_cycle(due):
            self.context.review()
            if spec.verify_every and cadence.cycles % spec.verify_every == 0:
                self.verify()

    def close_round(self) -> bool:
        self.context.require_still()
        if self.context.steps <= self.spec.warmup_steps:
            self._refresh_anchor()
            return False
        delayed = self.spec.delay != "none"
        applied = not delayed and self._apply_all(self.cadence.knobs.mix)
        open_ones = [fragment for fragment in self.cadence.fragments if fragment.begun < self.context.steps]
        for fragment, deltas in self._capture_all(open_ones):
            if delayed:
                mean = self._reduced(fragment) if len(fragment.reductions) > 1 else None
                self._begin_next_round(fragment, mean, deltas)
        applied = self._apply_all(0.0) or applied
        self.store.rest()
        return bool(open_ones) or applied

    # ---- capture, encode, reduce -------------------------------------------------------------------------------------

    def _capture_all(self, fragments: Iterable[Fragment]) -> list[tuple[Fragment, dict[str, Tensor]]]:
        return [(fragment, self._capture(fragment)) for fragment in fragments]

    def _capture(self, fragment: Fragment) -> dict[str, Tensor]:
        """Capture this replica's ``fragment``, start its reduction, and return what was captured."""
        context, weighs = self.context, self.spec.weighs
        pseudo_gradients = self.store.pseudo_gradients(fragment.fqns)
        deltas, square = pseudo_gradients.values, pseudo_gradients.square
        weight = float(self.tokens - fragment.tokens) if weighs else None
        sent, norms = deltas, None if square is None else [square.sqrt()]
        if not context.agree_in_replica(is_keepable(*deltas.values(), norms=norms)):
            deltas = {fqn: torch.zeros_like(delta) for fqn, delta in deltas.items()}
            square = None if square is None else torch.zeros_like(square)
            if weighs:
                sent, weight = deltas, 0.0
                self.left_out += 1
            else:  # no replica may be left out: the round fails
                sent = {fqn: torch.full_like(delta, torch.nan) for fqn, delta in deltas.items()}
            if self.store.whole:
                self._merge(fragment, 0.0)
        context.measure(deltas, context.key())
        context.state.commit()  # what the plan keeps of them: the step has been made
        self.source.captured(deltas)
        fragment.begin_round(context.steps, self.tokens, context.rate)
        reduction = Reduction(context.steps, self.store.branch(), [], sent=sent, weight=weight)
        reduction.products = [] if square is None else [square]
        self.reduce(fragment, reduction)
        fragment.reductions.append(reduction)
        return deltas

    def reduce(self, fragment: Fragment, reduction: Reduction) -> None:
        """Start the exchange of ``reduction``, or start it again."""
        flows = self._reducer(reduction, fragment, self._round_of(fragment))
        label = self.cadence.label(fragment)
        reduction.handles = [self.channel.start(flow, label) for flow in flows]

    def _finish(self, reduction: Reduction) -> None:
        """Wait for its messages; commit its state if all are finite on all ranks, else roll it back."""
        if not reduction.handles:
            return
        messages = []
        del reduction.products[1:]  # from an exchange that was broken off as members changed
        for handle in reduction.handles:
            messages.append(message := handle.wait())
            if reduction.products:  # while the next message is on the wire
                reduction.products.append(products(reduction.sent or {}, message.values))
        reduction.handles = []
        if self.context.agree_in_replica(all(message.finite for message in messages)):
            reduction.branch.commit()
            reduction.values = {fqn: value for message in messages for fqn, value in message.values.items()}
        else:
            reduction.branch.rollback()

    def _reduced(self, fragment: Fragment) -> dict[str, Tensor] | None:
        """The mean from the oldest reduction of ``fragment``; None if it failed."""
        context, reduction = self.context, fragment.reductions.pop(0)
        self._finish(reduction)
        for fqn in fragment.fqns:
            context.state.drop(fqn, "arrived")
        if reduction.values is None:
            self.failed_rounds += 1
        elif reduction.products:
            square, *by_message = reduction.products
            sums = torch.cat([square.view(1), torch.stack(by_message).sum(0)])
            context.gauges |= gauges(context.over_shards(sums, "gauges"))
        label = self.cadence.label(fragment)
        sent = context.meter.sent_as(label)
        context.gauges |= {"staleness": context.steps - reduction.captured, f"sent_bytes.{label}": sent}
        return reduction.values

    # ---- apply, merge ------------------------------------------------------------------------------------------------

    def _apply_all(self, mix: float) -> bool:
        """Wait for all reductions and apply them; with ``mix`` where steps were made since the capture."""
        self.meeting.wait(self, closing=True)
        under_way = self.under_way()
        for fragment in under_way:
            mean = self._reduced(fragment)
            if self.spec.delay == "eager":
                anchors = self.store.anchor(fragment.fqns)
                mean = self._blended(mean, {fqn: torch.zeros_like(anchor) for fqn, anchor in anchors.items()})
            self._apply(fragment, mean, mix if fragment.begun < self.context.steps else 0.0)
        return bool(under_way)

    def _begin_next_round(self, fragment: Fragment, mean: Named | None, deltas: Named) -> None:
        """For delayed methods: apply the mean that has arrived, restart from the anchor; ``deltas`` come later."""
        self._apply(fragment, self._blended(mean, deltas) if self.spec.delay == "eager" else mean, 0.0)

    def _blended(self, mean: Named | None, deltas: Named) -> dict[str, Tensor]:
        """The last round's mean, with this replica's share replaced by its present delta."""
        world, state, blended = self.context.place.size, self.context.state, {}
        for fqn, delta in deltas.items():
            others = delta.new_zeros(()) if mean is None else mean[fqn] - state.get(fqn, "own_delta", delta) / world
            blended[fqn] = others + delta / world
            state.stage(fqn, "own_delta", delta)
        return blended

    def _apply(self, fragment: Fragment, mean: Named | None, mix: float) -> None:
        """The outer step, then the merge; without ``mean`` the anchor stays."""
        self.source.applying(fragment, mean)
        anchor = None
        if mean is not None:
            self.rounds += 1
            anchor = self.store.apply(fragment, mean, self._round_of(fragment))
        self._merge(fragment, mix, anchor)

    def _merge(self, fragment: Fragment, mix: float, anchor: Named | None = None) -> None:
        """Set the live parameters to mix * live + (1 - mix) * anchor."""
        pieces = self.context.pieces
        merged = self.store.anchor(fragment.fqns) if anchor is None else dict(anchor)
        if mix:
            live = pieces.read(fragment.fqns, copy=False)
            merged = {fqn: mix * live[fqn] + (1 - mix) * value for fqn, value in merged.items()}
        pieces.write(merged, fragment.fqns)

    def _round_of(self, fragment: Fragment) -> Round:
        return Round(fragment.rates[2], fragment.steps, last_lr=fragment.rates[3])

    # ---- the warm-up, and the anchor ---------------------------------------------------------------------------------

    def _end_warmup_step(self) -> None:
        """End a step of the warm-up, in which the replicas are equal; after its last one set the anchor."""
        every, last = self.spec.verify_every * self.spec.every_steps, self.context.steps == self.spec.warmup_steps
        if every and (last or self.context.steps % every == 0):
            self.verify()
        if last:
            self._set_anchor()
        for fragment in self.cadence.fragments:
            fragment.begin_round(self.context.steps, self.tokens, self.context.rate)

    def _refresh_anchor(self) -> None:
        """Set the anchor within the warm-up, where it is otherwise set only at the end."""
        if self.cadence.warming:
            self._set_anchor()

    def _set_anchor(self) -> None:
        """Set the anchor to the live parameters."""
        for names in in_messages(self.context.pieces.shapes):  # in groups, as a sharded store keeps only its chunks
            self.store.set_anchor(self.context.pieces.read(names))

    def _require_anchor(self) -> None:
        """Raise ``RuntimeError`` if the model was changed since the anchor was set."""
        live, elsewhere = self.context.pieces.read(copy=False), self.context.stepped_elsewhere
        anchors = {fqn: anchor for fqn, anchor in self.store.anchor(live).items() if fqn not in elsewhere}
        if any(not torch.equal(anchor, live[fqn]) for fqn, anchor in anchors.items()):
            raise RuntimeError(
                "the model was changed after attach, whose anchor is what it held then: load weights to start from "
                "before attach; when resuming, load the sync's state too, last. If it was an optimizer: one that steps "
                "within backward() does so before sync.step() can see a gradient, so give attach one that does not"
            )

    # ---- for evaluation, comparison and checkpoints ------------------------------------------------------------------

    @property
    def quiet(self) -> bool:
        return not self.under_way()

    @property
    def in_round(self) -> bool:
        steps = self.context.steps
        open_ones = any(fragment.begun < steps for fragment in self.cadence.fragments)
        return steps > self.spec.warmup_steps and (open_ones or not self.quiet)

    def under_way(self) -> list[Fragment]:
        """The fragments that are being reduced."""
        return [fragment for fragment in self.cadence.fragments if fragment.reductions]

    def to_evaluate(self) -> dict[str, Tensor] | None:
        return None if self.cadence.warming else self.store.anchor(self.context.pieces.segments)

    def verify(self) -> bool:
        return self._guard.verify()

    def _held(self) -> Held:
        together = self.cadence.together
        if together:
            yield from parameters_held(self.context)
            yield from kept_by(self.context.pieces.optimizer)
        at_anchor = (f for f in self.cadence.fragments if f.begun == self.context.steps and not self.cadence.knobs.mix)
        yield from self.store.held({fqn for fragment in at_anchor for fqn in fragment.fqns}, together=together)

    def _words(self) -> str:
        return numbers_of(self.context.pieces.optimizer) if self.cadence.together else ""

    def _take_over(self, values: Mapping[str, Tensor]) -> None:
        take_over(self.context, self._held, values)
        self.store.rest()

    def settle(self) -> None:
        self.meeting.require_quiet(self)
        self._refresh_anchor()
        for fragment in self.under_way():
            for reduction in fragment.reductions:
                self._finish(reduction)
                for fqn, value in (reduction.values or {}).items():
                    self.context.state.put(fqn, "arrived", value)
        self.store.settle()

    def numbers(self) -> Numbers:
        counted = {name: getattr(self, name) for name in COUNTED}
        repairs = {"repairs": self.context.repairs}
        return {**counted, **repairs, **self.cadence.numbers(), **self.source.numbers()}

    def load_numbers(self, numbers: Mapping[str, float]) -> None:
        for name in COUNTED:
            setattr(self, name, int(numbers[name]))
        self.context.repairs = int(numbers["repairs"])
        self.cadence.load_numbers(numbers)
        self.source.load_numbers(numbers)
        self.store.loaded()

    def report(self) -> str:
        open_steps = self.context.steps - min(fragment.begun for fragment in self.cadence.fragments)
        return f", {open_steps} steps since the last round" if open_steps else ""

    def detach(self) -> None:
        if self.channel is not self.context.pieces.channel:
            self.channel.close(timeout_seconds=2.0)  # drops what is still under way
