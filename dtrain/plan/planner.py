"""The answer of `dtrain plan`: what fits, what each sync costs in time, bytes and loss, and the command to run."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from functools import cache

from dtrain.comm.clock.network import Network
from dtrain.comm.clock.step import Step
from dtrain.comm.runtime.method import Sync
from dtrain.errors import ConfigError
from dtrain.plan.describe import Description
from dtrain.plan.fits import Fit, NothingFits, fit, fits, layouts
from dtrain.plan.frontier import Degrees, degrees
from dtrain.plan.losses import EXACT, Losses
from dtrain.plan.machine import Machine
from dtrain.plan.planned import Planned, cache_of
from dtrain.plan.question import Question
from dtrain.plan.sync_memory import SyncMemory
from dtrain.plan.timing import Timed, needed_link, timed
from dtrain.train.config import Config, compose, instantiate
from dtrain.train.config.choices import folder

SYNCS = (
    "dense", "bf16", "int8_ef", "int4_ef", "powersgd_ef", "topk_int4_ef", "local_sgd", "diloco", "streaming_diloco",
    "co2", "sparta",
)  # fmt: skip
"""Choices of ``sync``, or of ``compress`` at every step, that are compared; what runs with any inner optimizer."""
DEGREES = 5
"""Rows of tensor and pipeline degrees."""


@dataclass(frozen=True)
class Choice:
    """One sync. ``words``: of its configuration. ``loss``: relative to dense, None where it was not measured.
    ``refused``: why it cannot be chosen; empty where it can.
    """

    name: str
    words: tuple[str, ...]
    timed: Timed | None
    memory: int
    loss: float | None
    refused: str


@dataclass(frozen=True)
class Answer:
    """``fits``: all layouts; ``picked``: that of the command. ``links``: bytes per second that the utilization needs,
    of dense and of the chosen sync. ``notes``: what the reader has to know. ``command``: empty where nothing fits.
    """

    machine: Machine
    model: Description
    fits: Sequence[Fit]
    picked: Fit | None
    choices: Sequence[Choice]
    chosen: Choice | None
    links: dict[str, float | None]
    degrees: Sequence[Degrees]
    losses: Losses
    notes: Sequence[str]
    command: str


def answer(words: Sequence[str], question: Question, machine: Machine) -> Answer:
    """Plan the run that ``words`` configure.

    Raises ``ConfigError``: what cannot be, a model that fits nowhere (with the nearest layout, and what is missing).
    """
    config = compose(words)
    network = question.links(config.mesh.replicate)
    config = _on_network(config, network)
    planned = Planned.of(config, on_gpu=machine.is_gpu)
    exchanges = config.sync["_target_"] == "dtrain.every_step"
    ranks = config.mesh.replicate * config.mesh.shard
    tried = question.shards or _shards(ranks, config.mesh.shard)
    candidates = layouts(
        ranks=ranks, shards=tried, bf16=config.engine.precision == "bf16", microbatches=planned.microbatches,
        exchanges=exchanges, bucket_mib=config.engine.bucket_mib,
    )  # fmt: skip
    describe, sync = cache(planned.describe), planned.sync()
    kept = cache(lambda runs, replicas, shards: _kept(planned, sync, describe, (runs, replicas, shards)))
    try:
        found = fits(
            list(candidates), describe, machine, cache_of(planned),
            lambda layout: kept(layout.runs, layout.replicas, layout.shards),
        )  # fmt: skip
    except NothingFits as error:
        raise ConfigError(str(error)) from error
    picked = _picked(found, config)
    layout = picked.layout
    model = describe(layout.casts, layout.checkpointed, layout.checkpointed and layout.engine == "zero3")
    losses = Losses.read()
    notes = _notes(config, picked, losses, network)
    if network is None or layout.replicas < 2:
        return Answer(
            machine, model, found, picked, (), None, {}, _degrees(model, machine, ranks, planned), losses, notes,
            command(words, picked, None),
        )  # fmt: skip
    network = _among(network, layout.replicas)
    step = machine.step(
        model, config.engine.precision, microbatches=planned.microbatches,
        stepped=model.trained_numel // (1 if layout.engine == "ddp" else layout.shards),
    )  # fmt: skip
    choices = [_choice(name, planned, picked, model, step, network, machine, losses, question) for name in SYNCS]
    chosen = _cheapest(choices)
    links = {
        choice.name: needed_link(_sync(choice.words), step, network, layout, question.utilization, machine.bandwidth)
        for choice in choices
        if choice.timed is not None and (choice is chosen or choice.name == EXACT)
    }
    return Answer(
        machine, model, found, picked, choices, chosen, links, _degrees(model, machine, ranks, planned), losses, notes,
        command(words, picked, chosen, choices),
    )  # fmt: skip


def command(words: Sequence[str], picked: Fit, chosen: Choice | None, choices: Sequence[Choice] = ()) -> str:
    """`dtrain train` with what was chosen: words that the choice replaces are left out. Empty where no sync was."""
    if choices and chosen is None:
        return ""
    layout = picked.layout
    own = [
        f"engine={layout.runs}", f"mesh.replicate={layout.replicas}", f"mesh.shard={layout.shards}",
        f"engine.activation_checkpointing={str(layout.checkpointed).lower()}",
        f"launcher.workers={layout.replicas * layout.shards}",
    ]  # fmt: skip
    taken = {word.partition("=")[0] for word in own}
    kept = [word for word in words if word.partition("=")[0] not in taken]
    if chosen is not None:
        kept = [word for word in kept if not word.startswith(("sync=", "sync.", "compress="))]
        own += chosen.words
    launched = any(word.partition("=")[0] in ("launcher", "launcher.nodes") for word in words)
    own = [word for word in own if not (launched and word.startswith("launcher."))]
    return " ".join(["dtrain", "train", *kept, *own])


def _kept(
    planned: Planned, sync: Sync, describe: Callable[..., Description], where: tuple[str, int, int]
) -> SyncMemory:  # fmt: skip
    """What the configured sync keeps; its sizes do not depend on how the model computes."""
    engine, replicas, shards = where
    layout = replace(planned.layout(), engine=engine, replicas=replicas, shards=shards)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            return planned.sync_memory(sync, layout, describe("none", False, False))
    except ValueError as error:
        raise ConfigError(f"sync: {error}") from error


def _on_network(config: Config, network: Network | None) -> Config:
    """With a replica for each unit of the network, and a batch that divides."""
    if network is None or network.size == config.mesh.replicate:
        return config
    return replace(config, mesh=replace(config.mesh, replicate=network.size))


def _among(network: Network, replicas: int) -> Network:
    """The network of fewer, larger replicas: they fill whole units of the innermost levels."""
    levels, left = list(network.levels), network.size // replicas
    while left > 1 and levels:
        last = levels.pop()
        if last.count > left:
            levels.append(replace(last, count=last.count // left))
            left = 1
        else:
            left //= last.count
    return replace(network, levels=tuple(levels)) if levels else network


def _shards(ranks: int, configured: int) -> tuple[int, ...]:
    """Numbers of shards that are tried: those up to 8, and the configured one."""
    return tuple(sorted({shard for shard in (1, 2, 4, 8, configured) if ranks % shard == 0}))


def _picked(found: Sequence[Fit], config: Config) -> Fit:
    """The layout of the configuration where it fits, else the first that does: without recomputation, fewest shards."""
    engine, mesh = config.engine, config.mesh
    for row in found:
        layout = row.layout
        same = (layout.runs, layout.replicas, layout.shards) == (engine.name, mesh.replicate, mesh.shard)
        if same and layout.checkpointed == engine.activation_checkpointing and not row.missing:
            return row
    return next(row for row in found if not row.missing)


def _sync(words: Sequence[str]) -> Sync:
    sync: Sync = instantiate(compose([*words, "run.dir=plan"]).sync, "sync")  # type: ignore[assignment]
    return sync


def words_of(name: str) -> tuple[str, ...]:
    """The words of `dtrain train` for one of `SYNCS`."""
    if (folder() / "sync" / f"{name}.yaml").exists():
        return (f"sync={name}",)
    return "sync=every_step", f"compress={name}"


def _choice(
    name: str, planned: Planned, picked: Fit, model: Description, step: Step, network: Network, machine: Machine,
    losses: Losses, question: Question,
) -> Choice:  # fmt: skip
    words, layout, loss = words_of(name), picked.layout, losses.of(name)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            sync = _sync(words)
            kept = planned.sync_memory(sync, layout, model)
            placed = fit(layout, model, machine, cache_of(planned), kept)
            seconds = timed(sync, step, network, layout, machine.bandwidth)
    except (ValueError, ConfigError) as error:
        return Choice(name, words, None, 0, loss, str(error).split("\n")[0])
    refused = placed.reason
    if not refused and loss is None:
        refused = "loss not measured"
    if not refused and loss is not None and loss > question.loss_budget:
        refused = f"costs {loss:+.1%} in loss, the budget is {question.loss_budget:.1%}"
    return Choice(name, words, seconds, placed.memory.peak, loss, refused)


def _cheapest(choices: Sequence[Choice]) -> Choice | None:
    """The fastest that may be chosen."""
    able = [(choice.timed.seconds, choice) for choice in choices if choice.timed is not None and not choice.refused]
    return min(able, key=lambda pair: pair[0])[1] if able else None


def _degrees(model: Description, machine: Machine, ranks: int, planned: Planned) -> list[Degrees]:
    whole = planned.microbatches * ranks
    return degrees(model, machine, ranks=ranks, microbatches=whole)[:DEGREES]


def _notes(config: Config, picked: Fit, losses: Losses, network: Network | None) -> list[str]:
    notes = []
    layout = picked.layout
    asked = (config.engine.name, config.mesh.replicate, config.mesh.shard)
    if (layout.runs, layout.replicas, layout.shards) != asked:
        notes.append(
            f"engine={asked[0]} on {asked[1]} x {asked[2]} does not fit; planned with engine={layout.runs} on "
            f"{layout.replicas} x {layout.shards}"
        )
    if network is None:
        notes.append("no link was described: link=100mbit,40ms nodes=4 tells what each sync costs in time")
    elif not losses.rows:
        notes.append(
            "no sync's loss has been measured yet but that of dense (docs/evidence/all_syncs.json is not there), so "
            "none is picked within a loss budget"
        )
    return notes
