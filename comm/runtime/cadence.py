"""The cadence of a local update: which fragments are captured at a step, and which results are applied.

Every fragment is captured once in each cycle of ``every_steps``. Where rounds differ in length, a cycle is as long as
`RoundLengths` says when its first step was made, with that step's learning rate; fragments have their turns within it.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace

from dtrain.comm.runtime.autotune import Choosing
from dtrain.comm.runtime.context import Context
from dtrain.comm.runtime.knobs import Knobs
from dtrain.comm.runtime.loop_spec import LoopSpec
from dtrain.comm.runtime.round_lengths import RoundLengths
from dtrain.comm.runtime.rounds import Fragment
from dtrain.comm.state import Numbers

ENDLESS = 1 << 31
"""A round of as many steps would never end."""
CYCLE = ("cycle.begun", "cycle.steps")
"""What a checkpoint calls `Cadence.cycle`."""


class Cadence:
    """What is due when. ``knobs``: those in use; where some are "auto" they are chosen once, see `measured`.

    ``fragments``: the model, cut. ``cycles``: how often the last of them has been captured. ``cycle``: the present one
    where rounds differ in length: the step after which it began, not counting the warm-up, and its steps (0: none yet).

    Raises ``ValueError`` for more fragments than the shortest round has turns for.
    """

    def __init__(self, spec: LoopSpec, context: Context) -> None:
        self._context, self._spec = context, spec
        self.knobs: Knobs = spec.knobs
        self.fragments = self._cut(0, 0, (0.0, 0, 0.0, 0.0))
        self.cycles = 0
        self.cycle = (0, 0)
        self._choosing = Choosing(spec, context.pieces) if spec.auto is not None else None
        if spec.lengths is not None and spec.fragments.staggered and len(self.fragments) > spec.every_steps:
            raise ValueError(
                f"{len(self.fragments)} fragments take turns in a round, and the shortest of {spec.lengths} has "
                f"{spec.every_steps} steps; give at_least={len(self.fragments)} or longer rounds, fewer fragments, or "
                "staggered=False"
            )

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

    def step_ended(self) -> None:
        """Begin the next cycle if a step of it was made. Every rank must call it after each step of rounds."""
        begun, length = self.cycle
        if self._spec.lengths is not None and self._context.steps - self._spec.warmup_steps > begun + length:
            self.cycle = (begun + length, self._agreed_length(self._spec.lengths, begun + length))

    def due(self, ahead: int = 0) -> list[Fragment]:
        """The fragments that are captured ``ahead`` steps from now; in the next cycle, as if it were as long."""
        step, every_steps = self._context.steps + ahead - self._spec.warmup_steps, self.knobs.every_steps
        if step < 1:
            return []
        begun = (step - 1) // every_steps * every_steps
        if self._spec.lengths is not None:
            begun, every_steps = self.cycle
            begun += every_steps if step > begun + every_steps else 0
        numbers = self.knobs.fragments.due(step - begun, len(self.fragments), every_steps, first=not begun)
        return [self.fragments[number] for number in numbers]

    def arriving(self, ahead: int = 0) -> list[Fragment]:
        """The fragments whose mean is applied ``ahead`` steps from now, as far as they were captured."""
        if self._spec.delay != "none":  # at the end of the round that followed
            return [fragment for fragment in self.due(ahead) if fragment.reductions]
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
        if self._spec.lengths is not None:
            values |= zip(CYCLE, self.cycle, strict=True)
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
        if self._spec.lengths is not None:
            self.cycle = self._loaded_cycle(numbers)
        for fragment in self.fragments:
            fragment.load_numbers(numbers, self._context.state, self._context.pieces.segments)

    def _agreed_length(self, lengths: RoundLengths, step: int) -> int:
        """The steps of the cycle that begins after ``step``, the same on all ranks.

        Raises ``ValueError`` on all ranks where it is no length.
        """
        asked: object = lengths.length(step, self._context.rate)
        length = asked if isinstance(asked, int) and not isinstance(asked, bool) and asked < ENDLESS else 0
        asked_by = self._context.membership.gather_number(length)[0] if lengths.follows_rate else [length]
        if min(asked_by) < self._spec.every_steps:
            raise ValueError(
                f"after step {step} {lengths} asked for a round of {asked!r} steps (all replicas: {asked_by}); a round "
                f"has a positive whole number of steps, here at least {self._spec.every_steps}, its ``shortest``"
            )
        return max(asked_by)

    def _loaded_cycle(self, numbers: Mapping[str, float]) -> tuple[int, int]:
        """The cycle of a state; without one, as after rounds of another kind, a new one begins.

        Raises ``ValueError`` for one that does not contain the state's step.
        """
        step = max(0, self._context.steps - self._spec.warmup_steps)
        begun, length = (int(numbers.get(name, otherwise)) for name, otherwise in zip(CYCLE, (step, 0), strict=True))
        if not 0 <= begun <= step <= begun + length:
            raise ValueError(
                f"the state to load is of step {step} of rounds, and says that its round began after step {begun} and "
                f"has {length} steps; load the state as a whole, as it was given"
            )
        return begun, length

    def _use(self, knobs: Knobs) -> None:
        """Use ``knobs`` from now on, before the first round."""
        self._choosing, self.knobs = None, knobs
        before = self.fragments[0]
        self.fragments = self._cut(before.begun, before.tokens, before.rates)

    def _cut(self, begun: int, tokens: int, rates: tuple[float, int, float, float]) -> list[Fragment]:
        pieces = self.knobs.fragments.cut(self._context.pieces.shapes)
        cut = [Fragment(number, fqns, begun, tokens, rates=rates) for number, fqns in enumerate(pieces)]
        for fragment in cut:
            fragment.steps = self.knobs.every_steps
        return cut
