"""Each cell of a sweep, walked by the clock: rows of plain numbers."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

from dtrain.comm.clock.channel import Machine
from dtrain.comm.clock.clock import Clock, Engine, Walked
from dtrain.comm.clock.layouts import layout
from dtrain.comm.clock.network import Level, Network
from dtrain.comm.ops import Place
from dtrain.comm.runtime.method import Sync
from dtrain.errors import ConfigError
from dtrain.simulation.calibration import Calibration, read, slower_and_faster
from dtrain.simulation.syncs import sync_of
from dtrain.simulation.words import Cell, cells

__all__ = ["Row", "simulated", "walked_steps"]

LEAST_STEPS, MOST_STEPS = 12, 20_000
FAILURES = 20
"""Expected in a cell whose steps are not given."""
HOUR = 3600.0


@dataclass(frozen=True, kw_only=True)
class Row:
    """One cell. ``swept``: its words among those that differ. Seconds and shares are of the steady state.

    ``utilization_low``, ``utilization_high``, ``step_seconds_low`` ...: within the calibration's error, equal to the
    value where nothing was calibrated. ``sent_bytes``: per step, by one rank. ``exposed``: the share of the time in
    which training waited. ``goodput``: the share of all replicas' time in work that was kept. ``hours``: to the budget
    of tokens, 0 without one. ``extrapolated``: why the figures are beyond what was measured, empty if they are not.
    """

    swept: dict[str, str]
    sync: str
    replicas: int
    ranks: int
    steps: int
    step_seconds: float
    step_seconds_low: float
    step_seconds_high: float
    utilization: float
    utilization_low: float
    utilization_high: float
    exposed: float
    sent_bytes: float
    failures: int
    goodput: float
    tokens_per_second: float
    hours: float
    hours_low: float
    hours_high: float
    extrapolated: str = ""


def simulated(words: Sequence[str]) -> tuple[Iterator[Row], int, tuple[str, ...]]:
    """The rows of all cells, how many there will be, and what is to be known of the calibration.

    Raises ``ConfigError`` for words that say nothing, before the first cell is walked.
    """
    asked = cells(words)
    folders = {cell.asked.calibrate for cell in asked}
    calibrations = {folder: read(Path(folder)) if folder else None for folder in folders}
    for cell in asked:
        _require_one_link(cell, words)
        cell.asked.step()
        cell.asked.failures()
        cell.asked.speeds()
        sync_of(cell.configured)
    said = tuple(sentence for found in calibrations.values() if found is not None for sentence in found.said)
    return (_row(cell, calibrations[cell.asked.calibrate]) for cell in asked), len(asked), said


def walked_steps(sync: Sync, cell: Cell) -> tuple[int, int]:
    """Steps before and within what is measured: whole rounds, and enough time for failures."""
    period = _period(sync)
    warmup = int(getattr(sync, "warmup_steps", 0))
    before = warmup + (period if period > 1 else 2)
    if cell.asked.steps:
        return (min(before, cell.asked.steps), cell.asked.steps)
    steps = period * max(2, math.ceil(LEAST_STEPS / period))
    if cell.asked.failures_per_hour:
        wanted = FAILURES * HOUR / cell.asked.failures_per_hour / cell.asked.step_seconds
        steps = max(steps, min(MOST_STEPS, period * math.ceil(wanted / period)))
    return before, steps


def _period(sync: Sync) -> int:
    every: object = getattr(sync, "every_steps", 1)
    return every if isinstance(every, int) and every > 0 else 1


def _row(cell: Cell, calibration: Calibration | None) -> Row:
    network, error = cell.network, 0.0
    if calibration is not None:
        first, error = network.levels[0], calibration.error
        levels = (Level(first.name, first.count, calibration.link), *network.levels[1:])
        network = replace(network, levels=levels, measured=calibration.links)
    expected = _walked(cell, network, calibration)
    worse, better = expected, expected
    if error:
        worse, better = (_walked(cell, end, calibration) for end in slower_and_faster(network, error))
    asked, replicas = cell.asked, network.size
    hours, hours_low, hours_high = (_hours(cell, walked, replicas) for walked in (expected, better, worse))
    return Row(
        swept=dict(cell.swept), sync=" ".join(cell.configured) or "sync=default", replicas=replicas,
        ranks=replicas * asked.shards, steps=expected.steps, step_seconds=expected.step_seconds,
        step_seconds_low=better.step_seconds, step_seconds_high=worse.step_seconds,
        utilization=expected.utilization, utilization_low=worse.utilization, utilization_high=better.utilization,
        exposed=expected.exposed_seconds / expected.seconds if expected.seconds else 0.0,
        sent_bytes=expected.sent_bytes / max(1, expected.steps), failures=expected.failures, goodput=expected.goodput,
        tokens_per_second=asked.tokens_per_step * replicas / expected.step_seconds * _present(expected),
        hours=hours, hours_low=hours_low, hours_high=hours_high, extrapolated=_beyond(replicas, calibration),
    )  # fmt: skip


def _walked(cell: Cell, network: Network, calibration: Calibration | None) -> Walked:
    asked, sync, step = cell.asked, sync_of(cell.configured), cell.asked.step()
    held = [layout(asked.engine, step, Place(shard, asked.shards), asked.bucket_mib) for shard in range(asked.shards)]
    elements = [sum(segment.numel for segment in part.segments.values()) for part in held]
    largest = elements.index(max(elements))  # it sets the pace
    rate = asked.memory_rate or math.inf
    if calibration is not None and not asked.memory_rate:
        compress = next((w.partition("=")[2] for w in cell.configured if w.startswith("compress=")), "none")
        rate = calibration.rate_of(compress)
    try:
        clock = Clock(
            sync, step, network, engine=Engine(asked.engine, asked.shards, (0, largest), asked.bucket_mib),
            machine=Machine(asked.data_order, rate, bool(asked.one_core)), speeds=asked.speeds(),
            failures=asked.failures(),
        )  # fmt: skip
    except ValueError as error:
        raise ConfigError(f"{' '.join(cell.configured)}: {error}") from error
    before, steps = walked_steps(sync, cell)
    clock.train(before)
    return clock.train(steps)


def _present(walked: Walked) -> float:
    """The share of the replicas that were there, on average."""
    return walked.goodput / walked.utilization if walked.utilization else 1.0


def _hours(cell: Cell, walked: Walked, replicas: int) -> float:
    asked = cell.asked
    if not asked.tokens:
        return 0.0
    if not asked.tokens_per_step:
        raise ConfigError("how long do the tokens last? Give tokens_per_step=..., those of a replica's step")
    rate = asked.tokens_per_step * replicas / walked.step_seconds * _present(walked)
    return asked.tokens / rate / HOUR


def _beyond(replicas: int, calibration: Calibration | None) -> str:
    if calibration is None or replicas <= calibration.world:
        return ""
    return f"extrapolated from {calibration.world} ranks"


def _require_one_link(cell: Cell, words: Sequence[str]) -> None:
    """Raise ``ConfigError`` for a link that is described and measured, or neither."""
    described = any(word.startswith("link=") for word in words)
    if cell.asked.calibrate and described:
        raise ConfigError("calibrate= says what the links are, and so does link=; leave one of them out")
    if not cell.asked.calibrate and not described:
        raise ConfigError(
            "what are the links? Give link=100mbit,40ms, or calibrate=FOLDER, of a dtrain bench collectives"
        )


def plain(row: Row) -> dict[str, object]:
    """A row as JSON has it."""
    return dataclasses.asdict(row)
