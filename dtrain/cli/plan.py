"""``dtrain plan``: what fits, what each sync costs, and the command of the best; starts nothing."""

from __future__ import annotations

import argparse
import json
import math
from typing import TYPE_CHECKING, Any

from dtrain.cli import add_config_dir, add_verb, words_of
from dtrain.extras import OF_TRAINING, require

if TYPE_CHECKING:
    from rich.table import Table

    from dtrain.cli import Verbs
    from dtrain.plan.fits import Fit
    from dtrain.plan.planner import Answer

EPILOG = """\
what is planned:
  the words of dtrain train: model=, data=, engine=, mesh., optim=, train.batch_size=, ... A model is described on its
  shapes alone, and no byte of it is allocated; model=hf model.path=FOLDER needs the folder's config.json only.

where:
  gpu=h100          a GPU by name; here (the default): measured on this machine
  memory=80GB peak=300tflops bandwidth=2TB efficiency=40%     instead of, or in addition to, what gpu= says
  link=100mbit,40ms sites=2 nodes=4     links between replicas: RATE[,LATENCY one way], and how many there are;
                    node_link=, rank_link= for those further in, ranks= for replicas of a node
  measured=FOLDER   links as dtrain bench collectives has measured them
  shards=1,8        ranks of a replica that are tried; by default 1, 2, 4, 8

what for:
  loss_budget=2%    what a sync may cost in loss, by the measured table; a sync that was not measured is never picked
  utilization=95%   of the compute: the link that it needs

examples:
  dtrain plan model=hf model.path=llama/ model.weights=false gpu=a100 mesh.shard=8 train.batch_size=64
  dtrain plan model=small link=100mbit,40ms sites=2 nodes=4 gpu=h100 train.batch_size=64
"""
GB = 1e9


def add(verbs: Verbs) -> None:
    """Add ``plan``."""
    verb = add_verb(verbs, "plan", does="say what fits, what each sync costs, and what to run", epilog=EPILOG)
    verb.add_argument("--json", action="store_true", help="print all of it as JSON")
    add_config_dir(verb)
    verb.add_argument("words", nargs="*", metavar="WORD", help="words of dtrain train, and of the machine and links")
    verb.set_defaults(run=_plan)


def _plan(chosen: argparse.Namespace) -> int:
    require(OF_TRAINING)
    from dtrain.plan.machine import machine
    from dtrain.plan.planner import answer
    from dtrain.plan.question import asked

    question, words = asked(words_of(chosen))
    found = answer(words, question, machine(question.machine))
    if chosen.json:
        print(json.dumps(as_json(found), indent=2))
        return 0
    _print(found, question.utilization)
    return 0


def as_json(found: Answer) -> dict[str, Any]:
    """The answer as plain JSON: bytes, seconds, shares."""
    model = found.model
    return {
        "machine": {
            "name": found.machine.name, "usable_bytes": found.machine.usable_bytes, "peak": dict(found.machine.peak),
            "efficiency": found.machine.efficiency, "source": found.machine.source,
        },
        "model": {
            "parameters": model.numel, "trained": model.trained_numel, "forward_flops": model.forward_flops,
            "backward_flops": model.backward_flops, "activation_bytes": model.activation_bytes,
            "microbatch": model.microbatch,
        },
        "fits": [
            {
                "engine": row.layout.engine, "replicas": row.layout.replicas, "shards": row.layout.shards,
                "activation_checkpointing": row.layout.checkpointed, "peak_bytes": row.memory.peak,
                "during": row.memory.during, "terms": {k: v for k, v in row.memory.terms.items() if v},
                "missing_bytes": row.missing, "broke": row.broke if row.missing else "", "reason": row.reason,
            }
            for row in found.fits
        ],
        "syncs": [
            {
                "name": row.name, "words": list(row.words), "loss": row.loss, "refused": row.refused,
                "peak_bytes": row.memory,
                **({} if row.timed is None else {
                    "step_seconds": row.timed.seconds, "bytes_per_step": row.timed.bytes,
                    "utilization": row.timed.utilization,
                }),
            }
            for row in found.choices
        ],
        "chosen": found.chosen.name if found.chosen else None,
        "links_bytes_per_second": found.links,
        "tensor_and_pipeline_outside_of_dtrain": [vars(row) for row in found.degrees],
        "notes": list(found.notes),
        "command": found.command,
    }  # fmt: skip


def _print(found: Answer, utilization: float) -> None:
    from rich.console import Console

    console = Console(highlight=False)
    model, machine = found.model, found.machine
    peaks = ", ".join(f"{name} {value / 1e12:.3g} TFLOP/s" for name, value in machine.peak.items())
    console.print(
        f"{model.numel:,} parameters; a microbatch of {model.microbatch}: "
        f"{model.forward_flops / 1e12:.3g} TFLOP forward, {model.backward_flops / 1e12:.3g} backward"
    )
    console.print(
        f"{machine.name} ({machine.source}): {machine.usable_bytes / GB:.2f} GB usable, peak {peaks}, of which "
        f"{machine.efficiency:.0%} is assumed to be reached"
    )
    console.print(_fits_table(found))
    if found.choices:
        console.print(_syncs_table(found))
    for name, rate in found.links.items():
        needed = "no link is enough" if rate is None else f"a link of {_rate(rate)}"
        console.print(f"for {utilization:.0%} utilization {name} needs: {needed}")
    if found.degrees:
        console.print(_degrees_table(found))
    for note in found.notes:
        console.print(f"note: {note}")
    console.print(
        found.command or "no sync meets the loss budget: raise loss_budget=, or measure more of them", soft_wrap=True
    )


def _table(title: str, *columns: str) -> Table:
    from rich.table import Table

    table = Table(title=title, title_justify="left", box=None, pad_edge=False)
    for number, column in enumerate(columns):
        words = column in ("", "largest terms")
        table.add_column(column, justify="left" if number == 0 or words else "right", no_wrap=not words)
    return table


def _fits_table(found: Answer) -> Table:
    table = _table("memory of a rank", "engine", "mesh", "recompute", "peak", "in", "largest terms", "")
    for row in _worth_showing(found):
        layout, terms = row.layout, sorted(row.memory.terms.items(), key=lambda item: -item[1])[:3]
        table.add_row(
            layout.engine, f"{layout.replicas} x {layout.shards}", "yes" if layout.checkpointed else "no",
            _size(row.memory.peak), row.memory.during,
            ", ".join(f"{name} {_size(size)}" for name, size in terms if size),
            row.reason or ("chosen" if row is found.picked else "fits"),
        )  # fmt: skip
    return table


def _syncs_table(found: Answer) -> Table:
    table = _table("syncs", "sync", "step", "sent per step", "utilization", "peak", "loss", "")
    for row in sorted(found.choices, key=lambda row: row.timed.seconds if row.timed else math.inf):
        loss = "?" if row.loss is None else f"{row.loss:+.1%}"
        if row.timed is None:
            table.add_row(row.name, "-", "-", "-", "-", loss, row.refused)
            continue
        table.add_row(
            row.name, f"{row.timed.seconds:.3g} s", _size(row.timed.bytes),
            f"{row.timed.utilization:.1%}", _size(row.memory), loss,
            "chosen" if row is found.chosen else row.refused,
        )  # fmt: skip
    return table


def _degrees_table(found: Answer) -> Table:
    table = _table(
        "tensor and pipeline parallelism, which dtrain does not run (arXiv:2312.12705)",
        "tensor", "pipeline", "copies", "of a rank", "bubble",
    )  # fmt: skip
    for row in found.degrees:
        cells = (row.tensor, row.pipeline, row.copies)
        table.add_row(*map(str, cells), _size(row.bytes), f"{row.bubble:.0%}")
    return table


def _worth_showing(found: Answer) -> list[Fit]:
    """All that is rejected, and what fits with the least recomputation: a layout that fits needs none."""
    plain = {
        (row.layout.engine, row.layout.shards) for row in found.fits if not (row.missing or row.layout.checkpointed)
    }
    return [
        row
        for row in found.fits
        if row.missing or row is found.picked or not row.layout.checkpointed
        or (row.layout.engine, row.layout.shards) not in plain
    ]  # fmt: skip


def _size(size: float) -> str:
    return f"{size / GB:.2f} GB" if size >= GB else f"{size / 1e6:.3g} MB"


def _rate(rate: float) -> str:
    bits = 8 * rate
    for unit, size in (("Tbit/s", 1e12), ("Gbit/s", 1e9), ("Mbit/s", 1e6)):
        if bits >= size:
            return f"{bits / size:.3g} {unit}"
    return f"{bits / 1e3:.3g} kbit/s"
