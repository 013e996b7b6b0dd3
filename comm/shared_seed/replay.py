"""Weights from a log: from the first ones, or later ones whose digest is in the log, to those of any later step."""

from __future__ import annotations

import math
from collections.abc import Mapping

from torch import Tensor

from dtrain.comm.layout import Segment
from dtrain.comm.shared_seed.digest import partial, unsigned
from dtrain.comm.shared_seed.directions import walk_on
from dtrain.comm.shared_seed.update_log import Contents, LogError


def replay(
    log: Contents, weights: Mapping[str, Tensor], steps: int | None = None
) -> tuple[dict[str, Tensor], int, int]:
    """``weights`` by FQN, unsharded, after the steps of the log up to ``steps`` (or all of them).

    Returns (the weights, fp32; the step that they began at; the number of steps that they have now).

    Their digest gives their step: before step 0, or after the step whose record has it. The digest of each record that
    has one is compared. Raises `LogError` for weights that the log does not know or another model's, for
    records that are missing, and at the first step after which weights differ from what the run had.
    """
    shapes = {fqn: tuple(shape) for fqn, shape in log.header.shapes.items()}
    weight_shapes = {fqn: tuple(tensor.shape) for fqn, tensor in weights.items()}
    if weight_shapes != shapes:
        differ = sorted(fqn for fqn in {*shapes, *weight_shapes} if shapes.get(fqn) != weight_shapes.get(fqn))
        fqn = differ[0]
        raise LogError(
            f"these are weights of another model: {fqn} is {weight_shapes.get(fqn, 'missing')} here and "
            f"{shapes.get(fqn, 'not there')} in the log ({len(differ)} parameters differ)"
        )
    segments = {fqn: Segment(fqn, 0, math.prod(shape)) for fqn, shape in shapes.items()}
    values = {fqn: weights[fqn].detach().float().reshape(-1).clone() for fqn in shapes}
    first = _step_of(log, unsigned(partial(values, segments)))
    next_step = first
    if missing := [
        f"{start} to {stop}" for start, stop in log.gaps() if start >= first and (steps is None or start < steps)
    ]:
        raise LogError(f"the records of steps {', '.join(missing)} are missing in the log; take another copy of it")
    for record in log.records:
        if record.step.number < first or (steps is not None and record.step.number >= steps):
            continue
        walk_on(values, segments, log.header.walk, record.step)
        digest = unsigned(partial(values, segments)) if record.digest else 0
        if digest != record.digest:
            raise LogError(
                f"after step {record.step.number} the weights are not those of the run (digest {digest:016x}, in the "
                f"log {record.digest:016x})"
            )
        next_step = record.step.number + 1
    return {fqn: value.view(shapes[fqn]) for fqn, value in values.items()}, first, next_step


def _step_of(log: Contents, digest: int) -> int:
    """The step that comes next for weights of this digest."""
    before = log.records[0].step.number if log.records and log.header.start else 0
    start = log.header.start or log.header.first
    if digest == start:
        return before
    for record in log.records:
        if record.digest == digest:
            return record.step.number + 1
    raise LogError(
        f"the log knows no weights with the digest {digest:016x}; give those before step {before}, with which it "
        f"begins ({start:016x}), or those of a checkpoint of the same run after that"
    )
