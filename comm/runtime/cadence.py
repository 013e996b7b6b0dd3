"""The cadence of a local update: which fragments are captured at a step, and which results are applied."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace

from dtrain.comm.runtime.autotune import Choosing
from dtrain.comm.runtime.context import Context
from dtrain.comm.runtime.knobs import Knobs
from dtrain.comm.runtime.loop_spec import LoopSpec
from dtrain.comm.runtime.rounds import Fragment
from dtrain.comm.state import Numbers


class Cadence:
    """What is due when. ``knobs``: those in use; where some are "auto" they are chosen once, see `measured`.

    ``fragments``: the model, cut. ``cycles``: how often the last of them has been captured.
    """

    def __init__(self, spec: LoopSpec, context: Context) -> None:
        self._context, self._spec = context, spec
        self.knobs: Knobs = spec.knobs
        self.fragments = self._cut(0, 0, (0.0, 0, 0.0, 0.0))
        self.cycles = 0
        self._choosing = Choosing(spec, context.pieces) if spec.auto is not None else None

    @property
    def together(self) -> bool:
        """Whether the last step was one of the warm-up, in which the replicas are equal."""
        return 0 < self._context.steps <= self._spec.warmup_steps

    @property
    def warming(self) -> bool:
        """Whether the warm-up has begun and not ended."""
        return 0 < self._context.steps < self._spec.warmup_steps

    def measured(self) -> bool:
        """Whether the knobs are chosen; until then this measures the step, and chooses after the last that it needs.

        Every rank must call it after each step.
        """
        if self._choosing is None:
            return True
        if not self._choosing.step_ended():
            return False
        knobs, why = self._choosing.choose(self._context.plan, self._context.matrices, self._context.key())
        self._use(knobs)
        if why:
            self._context.decisions.append(why)
        return True

    def due(self, ahead: int = 0) -> list[Fragment]:
        """The fragments that are captured ``ahead`` steps from now."""
        step = self._context.steps + ahead - self._spec.warmup_steps
        numbers = self.knobs.fragments.due(step, len(self.fragments), self.knobs.every_steps)
        return [self.fragments[number] for number in numbers]

    def arriving(self, ahead: int = 0) -> list[Fragment]:
        """The fragments whose mean is applied ``ahead`` steps from now, as far as they were captured."""
        captured = self._context.steps + ahead - self.knobs.overlap_steps
        return [f for f in self.fragments if f.reductions and f.reductions[0].captured == captured]

    def ends_cycle(self, due: list[Fragment]) -> bool:
        """Whether every fragment has been captured once more; counts the cycle."""
        ended = self.fragments[-1] in due
        self.cycles += ended
        return ended

    def label(self, fragment: Fragment) -> str:
        """The label of its traffic in the meter."""
        return "round" if len(self.fragments) == 1 else f"fragment {fragment.number}"

    def numbers(self) -> Numbers:
        values: Numbers = {}
        if self._spec.auto is not None:
            values = {
                "knobs.every_steps": self.knobs.every_steps if self._choosing is None else 0,
                "knobs.overlap_steps": self.knobs.overlap_steps,
                "knobs.layers": self.knobs.fragments.layers,
                "knobs.mix": float(self.knobs.mix),
            }
        for fragment in self.fragments:
            values |= fragment.numbers()
        return {"cycles": self.cycles, **values}

    def load_numbers(self, numbers: Mapping[str, float]) -> None:
        """Undo `numbers`, once the context's state was loaded."""
        self.cycles = int(numbers["cycles"])
        if numbers.get("knobs.every_steps", 0):
            cut = replace(self.knobs.fragments, layers=int(numbers["knobs.layers"]))
            every_steps, overlap_steps = int(numbers["knobs.every_steps"]), int(numbers["knobs.overlap_steps"])
            self._use(Knobs(every_steps, overlap_steps, float(numbers["knobs.mix"]), cut))
        for fragment in self.fragments:
            fragment.load_numbers(numbers, self._context.state, self._context.pieces.segments)

    def _use(self, knobs: Knobs) -> None:
        """Use ``knobs`` from now on, before the first round."""
        self._choosing, self.knobs = None, knobs
        before = self.fragments[0]
        self.fragments = self._cut(before.captured, before.tokens, before.rates)

    def _cut(self, captured: int, tokens: int, rates: tuple[float, int, float, float]) -> list[Fragment]:
        pieces = self.knobs.fragments.cut(self._context.pieces.shapes)
        return [Fragment(number, fqns, captured, tokens, rates=rates) for number, fqns in enumerate(pieces)]
