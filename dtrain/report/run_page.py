"""The page of a run, and of several runs beside each other: from `RunFigures` to a `Page`, without drawing it."""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Iterator, Mapping, Sequence

from dtrain.report.comparing import differing, shown
from dtrain.report.figures import in_bytes, in_time
from dtrain.report.page import Facts, Notes, Page, Part, Table
from dtrain.report.plots import Bars, Curve, Lines, Style
from dtrain.report.run_figures import Point, RunFigures

__all__ = ["page_of_run", "page_of_runs"]

MOST_RANKS, MOST_DECISIONS = 32, 30
SMALL = 0.01
"""What is less than this share of a rank's bytes is one part of a bar."""
WIDE = 20
"""Bytes of runs that differ by more than this factor are shown on a logarithmic axis."""
BYTE_UNITS = ((1e12, "TB"), (1e9, "GB"), (1e6, "MB"), (1e3, "kB"), (1, "bytes"))
TIME_UNITS = ((3600.0, "hours"), (60.0, "minutes"), (1.0, "seconds"))
LEAST_UNITS = 0.5  # of the largest value, in the unit that is chosen


def page_of_run(run: RunFigures) -> Page:
    """Loss against steps, bytes and hours, where the time went, what was sent, and what was chosen and why."""
    parts: list[Part] = [
        Facts(list(_facts(run))),
        *_choice(run),
        *_loss_plots([run]),
        *_time_plots([run]),
        *_sent(run),
        *_decisions(run),
        _all_settings(run),
    ]
    return Page(run.name, _lead(run), parts, table=_table([run], []))


def page_of_runs(runs: Sequence[RunFigures], *, title: str = "", notes: Sequence[str] = ()) -> Page:
    """Several runs on the same axes, with the settings in which they differ. ``notes``: of those that are left out."""
    keys = differing([run.settings for run in runs])
    table = _table(runs, keys)
    parts: list[Part] = [
        table,
        *_loss_plots(runs),
        *_time_plots(runs),
        _sent_of_runs(runs),
    ]
    for run in runs:
        parts += _choice(run)
    count = f"{len(runs)} runs: {', '.join(run.name for run in runs[:4])}{', ...' if len(runs) > 4 else ''}"
    return Page(title or "runs compared", count, parts, table=table, warnings=[*notes, *_unlike(runs)])


# ---- the beginning -------------------------------------------------------------------------------------------------


def _lead(run: RunFigures) -> str:
    words = [shown(run.settings.get("sync._target_")), "on", str(run.settings.get("engine.name", "-"))]
    mesh = f"{run.settings.get('mesh.replicate', '?')} replicas x {run.settings.get('mesh.shard', '?')} shards"
    return f"{' '.join(words)}, {mesh}{'' if run.summary else ', not at its end yet'}"


def _facts(run: RunFigures) -> Iterator[tuple[str, str, str]]:
    last, summary = run.last, run.summary
    of = f"at step {run.validation[-1][0]:,.0f}" if run.validation else "none was measured"
    of += f", {summary.evaluated}" if summary is not None and run.validation else ""
    yield "validation loss", _loss(run.validation_loss), of
    yield "training loss", _loss(last.loss), f"at step {last.step:,.0f}, {in_time(last.seconds)} of training"
    less = ""
    if summary is not None and last.sent_bytes and summary.dense_bytes_per_rank:
        less = f"dense in fp32: {in_bytes(summary.dense_bytes_per_rank)}"
    yield "sent per rank", in_bytes(last.sent_bytes), less
    rate = last.tokens / last.seconds if last.seconds else math.nan
    yield "tokens per second", f"{rate:,.0f}" if math.isfinite(rate) else "-", "over all ranks"
    share = last.exposed_seconds / last.seconds if last.seconds else math.nan
    yield "exposed communication", f"{100 * share:.1f} %" if math.isfinite(share) else "-", "of the time"


def _table(runs: Sequence[RunFigures], keys: Sequence[str]) -> Table:
    """A row for each run; the lowest validation loss is set bold, if there are several."""
    head = [
        "run", *(key.removesuffix("._target_") for key in keys),
        "steps", "loss", "validation loss", "time", "tokens/s", "sent per rank", "exposed", "computing",
    ]  # fmt: skip
    losses = [math.inf if run.validation_loss is None else run.validation_loss for run in runs]
    best = [losses.index(min(losses))] if len(runs) > 1 and math.isfinite(min(losses)) else []
    return Table(head, [_row(run, keys) for run in runs], best=best)


def _row(run: RunFigures, keys: Sequence[str]) -> list[str]:
    last = run.last
    return [
        run.name,
        *(shown(run.settings.get(key)) for key in keys),
        f"{last.step:,.0f}",
        _loss(last.loss),
        _loss(run.validation_loss),
        in_time(last.seconds),
        f"{last.tokens / last.seconds:,.0f}" if last.seconds else "-",
        in_bytes(last.sent_bytes),
        _percent(last.exposed_seconds, last.seconds),
        _percent(last.computing_seconds, last.seconds),
    ]


def _unlike(runs: Sequence[RunFigures]) -> Iterator[str]:
    """Why a comparison of these runs may mislead."""
    if len({run.data for run in runs}) > 1 or len(_of(runs, "data.")) > 1:
        yield "the runs were trained on other data, so that their losses are not of the same thing"
    if len(_of(runs, "model.")) > 1:
        yield "the runs have other models"
    if len({run.settings.get("train.batch_size") for run in runs}) > 1:
        yield "the batch sizes differ: after as many steps the runs have not seen as many tokens"
    lengths = {run.last.step for run in runs}
    if len(lengths) > 1:
        yield f"the runs are not equally long: {min(lengths):,.0f} to {max(lengths):,.0f} steps"
    evaluated = {run.settings.get("train.evaluation_examples") for run in runs}
    if len(evaluated) > 1:
        yield "the validation losses are means over other numbers of examples"


def _of(runs: Sequence[RunFigures], section: str) -> set[str]:
    """The different values of a section, where the data lie apart."""
    return {
        repr(sorted((key, repr(value)) for key, value in run.settings.items() if _counts(key, section)))
        for run in runs
    }  # fmt: skip


def _counts(key: str, section: str) -> bool:
    return key.startswith(section) and not key.endswith((".path", ".root", ".folder", ".dir", ".file"))


# ---- loss ----------------------------------------------------------------------------------------------------------


def _loss_plots(runs: Sequence[RunFigures]) -> Iterator[Part]:
    """Three plots of the same losses."""
    most_bytes, bytes_name = _unit(max(run.last.sent_bytes for run in runs), BYTE_UNITS)
    most_time, time_name = _unit(max(run.last.seconds for run in runs), TIME_UNITS)
    sent = [run.last.sent_bytes for run in runs if run.last.sent_bytes > 0]
    wide = len(sent) > 1 and max(sent) > WIDE * min(sent)
    least = min(sent) / 1000 if wide else 0.0  # what control messages send before the first exchange would stretch it
    yield Lines(title="Loss against steps", x="step", y="loss (nats)", curves=_losses(runs, lambda p: p.step))
    yield Lines(
        title="Loss against bytes", x=f"{bytes_name} sent per rank", y="loss (nats)", log="x" if wide else "",
        curves=_losses(runs, lambda p: p.sent_bytes / most_bytes if p.sent_bytes >= least else math.nan),
    )  # fmt: skip
    yield Lines(
        title="Loss against time", x=f"{time_name} of training", y="loss (nats)",
        curves=_losses(runs, lambda p: p.seconds / most_time),
        note="without evaluations and checkpoints",
    )  # fmt: skip


def _losses(runs: Sequence[RunFigures], x: Callable[[Point], float]) -> list[Curve]:
    """For each run its training loss, faint, and its validation losses at the last row before each."""
    curves = []
    for color, run in enumerate(runs):
        one = len(runs) == 1
        name = "training" if one else run.name if not run.validation else f"{run.name}, training"
        style: Style = "faint" if run.validation else "line"
        curves.append(Curve(name, [x(p) for p in run.points], [p.loss for p in run.points], style=style, color=color))
        placed = [(run.at(step), loss) for step, loss in run.validation]
        pairs = [(x(point), loss) for point, loss in placed if point is not None]
        if pairs:
            name = "validation" if one else run.name
            curves.append(Curve(name, [p[0] for p in pairs], [p[1] for p in pairs], style="points", color=color))
    return curves


# ---- time ----------------------------------------------------------------------------------------------------------


def _time_plots(runs: Sequence[RunFigures]) -> Iterator[Part]:
    """Where the steps of the training thread went, and beside it those of the thread that communicates."""
    yield Lines(
        title="Time of a step", x="step", y="ms", curves=[_step_times(run, color) for color, run in enumerate(runs)]
    )
    names = [run.name for run in runs]
    steps = [_steps(run) for run in runs]
    ends = [run.last for run in runs]
    if any(math.isfinite(p.computing_seconds) for p in ends):
        computing = [_ms(p.computing_seconds, n) for p, n in zip(ends, steps, strict=True)]
        exposed = [_ms(p.exposed_seconds, n) for p, n in zip(ends, steps, strict=True)]
        whole = [_ms(p.seconds, n) for p, n in zip(ends, steps, strict=True)]
        rest = [max(0.0, w - c - e) for w, c, e in zip(whole, computing, exposed, strict=True)]
        yield Bars(
            title="A step of training", x="ms per step, rank 0", rows=names,
            parts=[("computing", computing), ("exposed communication", exposed), ("data and the rest", rest)],
            note="exposed: training stood still for what crosses the slow links",
        )  # fmt: skip
    if any(math.isfinite(p.exchange_seconds) for p in ends):
        parts = [
            (what, [_ms(getattr(p, f"{what}_seconds"), n) for p, n in zip(ends, steps, strict=True)])
            for what in ("encode", "exchange", "decode")
        ]
        yield Bars(
            title="Communication beside it", x="ms per step, rank 0", rows=names, parts=parts,
            note="the thread that communicates: it overlaps computing, but for what is exposed; an exchange counts "
            "until its result is asked for",
        )  # fmt: skip


def _steps(run: RunFigures) -> float:
    return run.last.step or math.nan


def _ms(seconds: float, steps: float) -> float:
    """0 where it was not measured: a bar has a length."""
    value = 1e3 * seconds / steps
    return max(0.0, value) if math.isfinite(value) else 0.0


def _step_times(run: RunFigures, color: int) -> Curve:
    """Between one row and the next."""
    pairs = [(a, b) for a, b in zip(run.points, run.points[1:], strict=False) if b.step > a.step]
    times = [1e3 * (b.seconds - a.seconds) / (b.step - a.step) for a, b in pairs]
    return Curve(run.name, [b.step for _, b in pairs], times, color=color)


# ---- bytes ---------------------------------------------------------------------------------------------------------


def _sent(run: RunFigures) -> Iterator[Part]:
    """What each rank sent, as what: a plot over the ranks, and rank 0's in a table with its messages."""
    if not run.traffic:
        return
    most = max((sum(rank.bytes_as.values()) for rank in run.traffic), default=0)
    by, unit = _unit(most, BYTE_UNITS)
    ranks = run.traffic[:MOST_RANKS]
    labels = list(dict.fromkeys(label for rank in ranks for label in rank.bytes_as))
    small = [label for label in labels if all(rank.bytes_as.get(label, 0) < SMALL * most for rank in ranks)]
    parts = [(label, [rank.bytes_as.get(label, 0) / by for rank in ranks]) for label in labels if label not in small]
    if small:
        rest = [sum(rank.bytes_as.get(label, 0) for label in small) / by for rank in ranks]
        parts.append((", ".join(small), rest))
    left = len(run.traffic) - len(ranks)
    yield Bars(
        title="Sent by whom", x=f"{unit} across the replicate axis",
        rows=[f"rank {rank.rank} on {rank.host}" for rank in ranks],
        parts=parts,
        note=f"{left} more ranks are not shown" if left else "",
    )  # fmt: skip
    first = ranks[0]
    rows = [
        [label, op or "-", f"{count[0]:,}", f"{count[1]:,}", f"{first.waited.get(label, 0.0):.2f} s"]
        for label, by_op in first.sent.items()
        for op, count in by_op.items()
        if len(count) == 2
    ]
    head = ["sent as", "by", "bytes", "messages", "waited for"]
    note = "before: what was sent before the run resumed" if "before" in first.sent else ""
    yield Table(head, rows, title=f"What rank {first.rank} sent", note=note)


def _sent_of_runs(runs: Sequence[RunFigures]) -> Bars:
    by, unit = _unit(max(run.last.sent_bytes for run in runs), BYTE_UNITS)
    values = [run.last.sent_bytes / by if math.isfinite(run.last.sent_bytes) else 0.0 for run in runs]
    return Bars(title="Sent per rank", x=f"{unit}, rank 0", rows=[run.name for run in runs], parts=[("sent", values)])


# ---- choice, decisions, settings -----------------------------------------------------------------------------------


def _choice(run: RunFigures) -> Iterator[Part]:
    """choice.json: texts and numbers as notes, lists of objects as tables, whatever else as JSON."""
    lines = []
    for name, value in run.choice.items():
        if _rows(value):
            continue
        lines.append(f"{name.replace('_', ' ')}: {value if isinstance(value, str) else json.dumps(value)}")
    if lines:
        yield Notes(lines, f"What was chosen{'' if run.choice.get('run') else f' for {run.name}'}, and why")
    for name, value in run.choice.items():
        if rows := _rows(value):
            head = list(dict.fromkeys(key for row in rows for key in row))
            cells = [[_cell(row.get(key)) for key in head] for row in rows]
            yield Table([key.replace("_", " ") for key in head], cells, title=name.replace("_", " "))


def _rows(value: object) -> list[Mapping[str, object]]:
    """A list of objects; empty for anything else."""
    listed = value if isinstance(value, list) else []
    return listed if listed and all(isinstance(row, Mapping) for row in listed) else []


def _cell(value: object) -> str:
    if isinstance(value, float):
        return f"{value:,.4g}" if abs(value) < 1e4 else f"{value:,.0f}"
    return "-" if value is None else str(value)


def _decisions(run: RunFigures) -> Iterator[Part]:
    lines = [f"step {step:,}: {text}" for step, text in run.decisions[-MOST_DECISIONS:]]
    if len(run.decisions) > MOST_DECISIONS:
        lines.insert(0, f"the last {MOST_DECISIONS} of {len(run.decisions):,}; metrics.jsonl has all")
    if lines:
        yield Notes(lines, "Decided while it ran")


def _all_settings(run: RunFigures) -> Table:
    rows = [[key, str(value)] for key, value in run.settings.items() if not key.startswith("launcher.environment")]
    return Table(["key", "value"], rows, title="Settings")


# ---- figures -------------------------------------------------------------------------------------------------------


def _unit(most: float, units: Sequence[tuple[float, str]]) -> tuple[float, str]:
    """The largest unit of which ``most`` is at least a half, else the smallest.

    >>> _unit(2_500_000, BYTE_UNITS), _unit(100.0, TIME_UNITS)
    ((1000000.0, 'MB'), (60.0, 'minutes'))
    """
    return next((pair for pair in units if most >= LEAST_UNITS * pair[0]), units[-1])


def _loss(value: float | None) -> str:
    return f"{value:.4f}" if value is not None and math.isfinite(value) else "-"


def _percent(part: float, whole: float) -> str:
    return f"{100 * part / whole:.1f} %" if whole and math.isfinite(part) else "-"
