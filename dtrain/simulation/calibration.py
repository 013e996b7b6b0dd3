"""What `dtrain bench` has measured, as a network and a rate of arithmetic, with the errors of the model.

Each op of the sweep of collectives gives a latency of a hop and a rate (`dtrain.bench.fit`); ops that were not swept
have the medians of those. The error is how far the model is off its own rows: nine of ten are within it.
"""

from __future__ import annotations

import json
import statistics
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import torch

from dtrain.bench.fit import fit
from dtrain.bench.hook_rows import HookRow
from dtrain.bench.rows import Row, read_as
from dtrain.comm.clock.channel import Machine
from dtrain.comm.clock.clock import Clock
from dtrain.comm.clock.network import HOPS, Level, Link, Network
from dtrain.comm.clock.step import Step
from dtrain.comm.clock.wire import Wire
from dtrain.comm.ops import AllGather, AllReduce, AllToAll, Op
from dtrain.errors import ConfigError
from dtrain.report.environment import record
from dtrain.simulation.syncs import sync_of

__all__ = ["Calibration", "calibrated", "fitted", "read"]

OPS: Mapping[str, type[AllReduce | AllGather | AllToAll]] = {
    "all_reduce": AllReduce,
    "all_gather": AllGather,
    "all_to_all": AllToAll,
}
WITHIN = 0.9
"""The share of the rows that the error covers."""


@dataclass(frozen=True)
class Calibration:
    """``links``: by op, and ``link`` for others. ``world``: ranks that were measured. ``error``: relative.

    ``memory_rate``: bytes per second of arithmetic, by hook; empty where only collectives were measured. ``said``: what
    its reader should know.
    """

    link: Link
    links: Mapping[str, Link]
    world: int
    error: float
    memory_rate: Mapping[str, float]
    said: tuple[str, ...] = ()

    def rate_of(self, compress: str) -> float:
        """Of arithmetic of one compressor, or the median of all that were measured; infinite where none was."""
        if not self.memory_rate:
            return float("inf")
        return self.memory_rate.get(compress, statistics.median(self.memory_rate.values()))


def read(folder: Path) -> Calibration:
    """The calibration from the folder of a `dtrain bench collectives`, and of a `dtrain bench hooks` in ``hooks``
    below it.

    Raises ``ConfigError`` for a folder without rows, and for rows that are invalid.
    """
    path = folder / "rows.jsonl" if folder.is_dir() else folder
    try:
        rows = read_as(path, Row)
        hooks = read_as(path.parent / "hooks" / "rows.jsonl", HookRow)
    except ValueError as error:
        raise ConfigError(f"calibrate={folder}: {error}; give the folder of a dtrain bench collectives") from error
    if not rows:
        raise ConfigError(f"calibrate={folder} has no rows; give the folder of a finished dtrain bench collectives")
    return calibrated(rows, hooks, said=_elsewhere(path.parent / "environment.json"))


def calibrated(rows: Sequence[Row], hooks: Sequence[HookRow] = (), *, said: Sequence[str] = ()) -> Calibration:
    """From rows of one number of ranks. Raises ``ConfigError`` for rows that are invalid, or say nothing."""
    invalid = next((row for row in (*rows, *hooks) if row.invalid), None)
    if invalid is not None:
        raise ConfigError(
            f"calibrate: the row of {invalid.op}, {invalid.bytes:,} bytes, is invalid ({invalid.invalid}), and so is "
            "what follows from it; free the machine and measure again"
        )
    worlds = sorted({row.world for row in rows})
    if len(worlds) > 1 or worlds[0] < 2:
        raise ConfigError(f"calibrate: the rows are of {worlds} ranks; give a sweep of one number of them, 2 or more")
    sweeps = _sweeps(rows)
    if not sweeps:
        raise ConfigError(
            f"calibrate: no op of {', '.join(OPS)} has three sizes; sweep more with dtrain bench collectives"
        )
    link, links, error = fitted(sweeps, worlds[0])
    backends = {row.backend for row in rows} - {"gloo"}
    notes = [f"{', '.join(backends)} was measured, and hops are gloo's: give backend=ring"] if backends else []
    rates = {
        row.op: _memory_rate(row) for row in hooks if row.encode + row.decode > 0 and not row.op.startswith("torch")
    }
    return Calibration(link, links, worlds[0], error, rates, (*said, *notes))


def fitted(sweeps: Mapping[str, Mapping[int, float]], world: int) -> tuple[Link, dict[str, Link], float]:
    """Links from median seconds by op and size: of any op, and by op; and the relative error of `WITHIN` of them."""
    fits = [fit(op, world, seconds, steps=HOPS["gloo"][OPS[op]](world)) for op, seconds in sweeps.items()]
    alpha = statistics.median(max(0.0, found.alpha) for found in fits)
    beta = statistics.median(found.beta for found in fits)
    if not beta > 0:
        raise ConfigError("calibrate: larger messages took no longer, so the links have no rate; sweep larger ones")
    link = Link(1 / beta, 1 / beta, alpha, alpha)
    links = {
        OPS[found.op].__name__: Link(1 / found.beta, 1 / found.beta, max(0.0, found.alpha), max(0.0, found.alpha))
        for found in fits
        if found.beta > 0
    }
    wire = Wire(Network((Level("nodes", world, link),), measured=links))
    errors = []
    for op, seconds in sweeps.items():
        for size, measured in seconds.items():
            wire.busy.clear()
            errors.append(abs(wire.carry(_op(op, size, world), world, 0.0) / measured - 1))
    errors.sort()
    return link, links, errors[min(len(errors) - 1, int(WITHIN * len(errors)))]


def _sweeps(rows: Sequence[Row]) -> dict[str, dict[int, float]]:
    """Median seconds by op and size, those of dtrain's own ops where there are any."""
    found: dict[str, dict[int, float]] = {}
    for name in OPS:
        ours, theirs = ([row for row in rows if row.op == op] for op in (f"comm.{name}", name))
        chosen = {row.bytes: row.p50_ms / 1e3 for row in (ours or theirs)}
        if len(chosen) >= 3:
            found[name] = chosen
    return found


def _op(name: str, size: int, world: int) -> Op:
    """``size``: of the whole buffer, as `dtrain bench` counts it."""
    kind, elements = OPS[name], max(1, size // (1 if name == "all_reduce" else world))
    payload = torch.empty(world, elements, dtype=torch.uint8) if name == "all_to_all" else torch.empty(
        elements, dtype=torch.uint8
    )  # fmt: skip
    return kind((payload,))


def _memory_rate(row: HookRow) -> float:
    """Bytes per second that the arithmetic of a hook passes: what it touches over what it took."""
    columns = 2 ** max(1, (row.bytes // 4).bit_length() // 2)
    name, _, route = row.op.partition(":")
    sync = sync_of(("sync=every_step", f"compress={name}", *([f"sync.route={route}"] if route else [])))
    step = Step.even({"weight": (max(1, row.bytes // 4 // columns), columns)}, 0.0)
    network = Network((Level("nodes", row.world, Link()),), "ring")
    touched = Clock(sync, step, network, machine=Machine(bytes_per_second=1.0)).train(3).step_seconds
    return touched / (row.p50_ms / 1e3 * (row.encode + row.decode))


def _elsewhere(path: Path) -> list[str]:
    """A sentence where it was measured on another machine than this one."""
    try:
        then = json.loads(path.read_text())
    except (OSError, ValueError):
        return ["where the calibration was made is not known: its folder has no environment.json"]
    now = record()
    differ = [name for name in ("platform", "cpu_count", "devices") if then.get(name) != now.get(name)]
    if not differ:
        return []
    return [
        f"the calibration is from another machine ({', '.join(f'{name} {then.get(name)}' for name in differ)}): it "
        "says what to expect there; measure here with dtrain bench collectives"
    ]


def slower_and_faster(network: Network, error: float) -> tuple[Network, Network]:
    """``network`` with all links worse, and better, by ``error``."""

    def scaled(factor: float) -> Network:
        def changed(link: Link) -> Link:
            return Link(link.up / factor, link.down / factor, link.latency_up * factor, link.latency_down * factor)

        levels = tuple(replace(level, link=changed(level.link)) for level in network.levels)
        measured = {op: changed(link) for op, link in network.measured.items()}
        return replace(network, levels=levels, measured=measured)

    return scaled(1 + error), scaled(max(1e-9, 1 - error))
