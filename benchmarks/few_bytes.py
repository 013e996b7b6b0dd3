"""The report on loss at few bytes: MuLoCo beside data parallelism, and every sync. Functions in ``_report`` are pure.

    tuning      seeds 101 and 102, the validation windows of "tuning": each of `CANDIDATES` with the first seed, the two
                best of them with the second; the lowest mean of both wins
    reported    seeds 1 to 5, the other windows, the settings that won; the first complete run
    all         every sync at its defaults with seed 4, on the other windows, AdamW and Muon inside

Some days of work: with ``--cells docs/evidence/cells`` every run is kept where it is committed, and made once.
"""

from __future__ import annotations

import statistics
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from benchmarks.compression import FOUR_REPLICAS
from benchmarks.harness import Run, Session, as_figures
from benchmarks.page import Check, Report, at_least, at_most, table
from dtrain.report.figures import in_bytes

STEPS = 1000
COMMON = (
    *FOUR_REPLICAS, f"train.steps={STEPS}", "train.evaluate_every_steps=0", "train.evaluation_examples=1024",
    "train.checkpoint_every_steps=0", "data=custom", "data._target_=benchmarks.halved_text.HalvedText",
    "data.block=128",
)  # fmt: skip
TUNING, SEEDS, ONE_SEED = (101, 102), (1, 2, 3, 4, 5), 4
ADAMW, MUON = "AdamW data parallelism", "Muon data parallelism"
RATES = (0.0015, 0.003, 0.0045, 0.006)

Words = tuple[str, ...]
Tried = dict[Words, list[float]]
"""Losses by candidate."""


def lr(rate: float) -> str:
    """The peak of the inner learning rate."""
    return f"optim.inner.lr={rate:g}"


def power(rounds: int, exponent: float) -> str:
    """Rounds that are short at first: the i-th of ``rounds`` ends at step STEPS (i / rounds)^exponent."""
    return f"sync.every_steps={{_target_:dtrain.rounds.power,steps:{STEPS},rounds:{rounds},power:{exponent:g}}}"


def outer(rate: float, momentum: float) -> Words:
    """The outer Nesterov step."""
    return f"sync.outer.lr={rate:g}", f"sync.outer.momentum={momentum:g}"


FIXED: Mapping[str, Words] = {
    ADAMW: ("optim=adamw", "sync=dense"),
    MUON: ("optim=muon", "sync=dense"),
    "MuLoCo, 100x": ("optim=muon", "sync=muloco"),
    "MuLoCo, 400x": ("optim=muon", "sync=muloco"),
    "MuLoCo, 1,000x": ("optim=muon", "sync=muloco"),
}
CANDIDATES: Mapping[str, Sequence[Words]] = {
    ADAMW: [(lr(rate),) for rate in RATES],
    MUON: [(lr(rate),) for rate in RATES],
    "MuLoCo, 100x": [
        (power(148, 1.5), *outer(0.8, 0.6), lr(0.003)),
        (power(148, 1.5), *outer(0.8, 0.6), lr(0.0045)),
        (power(148, 2.0), *outer(1.0, 0.5), lr(0.0045)),
        ("sync.every_steps=7", *outer(1.0, 0.5), lr(0.0045)),
    ],
    "MuLoCo, 400x": [
        ("sync.every_steps=27", *outer(0.8, 0.6), lr(0.003)),
        ("sync.every_steps=27", *outer(0.8, 0.6), lr(0.0045)),
        (power(37, 1.5), *outer(1.0, 0.5), lr(0.0045)),
        (power(37, 1.5), *outer(1.0, 0.5), lr(0.003)),
    ],
    "MuLoCo, 1,000x": [
        (power(15, 1.4), *outer(1.0, 0.7), lr(0.003)),
        (power(15, 1.4), *outer(1.0, 0.7), lr(0.0045)),
        (power(15, 1.4), *outer(0.8, 0.6), lr(0.003)),
        (power(15, 1.7), *outer(1.0, 0.6), lr(0.0045)),
    ],
}  # fmt: skip
"""What tuning chooses from, as many for each."""


@dataclass(frozen=True)
class Line:
    """``less``: at least so many times fewer bytes. The others: at most so many per cent above a baseline."""

    less: float
    adamw: float
    muon: float | None


LINES: Mapping[str, Line] = {
    "MuLoCo, 100x": Line(100, -5.0, 1.5),
    "MuLoCo, 400x": Line(400, -3.5, None),
    "MuLoCo, 1,000x": Line(1000, 0.0, None),
}
EVERY_STEP = ("bf16", "int8_ef", "int4_ef", "int2_ef", "sign_ef", "powersgd_ef", "topk_ef")
LOCAL = (
    "local_sgd", "post_local_sgd", "slowmo", "diloco", "streaming_diloco", "delayed_diloco", "eager_diloco", "co2",
    "sparta",
)  # fmt: skip
EVERY_SYNC: Mapping[str, Words] = {
    "dense": ("sync=dense",),
    **{f"every_step, {name}": ("sync=every_step", f"compress={name}") for name in EVERY_STEP},
    **{name: (f"sync={name}",) for name in LOCAL},
}
ALONE = {"AdamW": {"onebit_adam": ("sync=onebit_adam",)}, "Muon": {"muloco": ("sync=muloco",)}}
"""Those that need one inner optimizer. `dgc`, `fedavg_m` and `scaffold_m` need plain SGD, and are in neither."""


def few_bytes(session: Session) -> Report:
    """Loss at a hundred to a thousand times fewer bytes, tuned and over five seeds."""
    trials, chosen = tuned(session)
    runs: dict[str, list[Run]] = {}
    for name, words in settings(chosen).items():
        runs[name] = [cell(session, words, seed, "reported") for seed in SEEDS]
    return few_bytes_report(trials, chosen, runs)


def all_syncs(session: Session) -> Report:
    """Every sync at its defaults with one seed, AdamW and Muon inside."""
    return all_syncs_report(measured_syncs(session))


def measured_syncs(session: Session) -> dict[tuple[str, str], Run]:
    """By name of the sync and inner optimizer."""
    return {
        (name, inside): cell(session, at_defaults(name, inside), ONE_SEED, "reported")
        for inside in ALONE
        for name in (*EVERY_SYNC, *ALONE[inside])
    }


def at_defaults(name: str, inside: str) -> Words:
    """A row of the table of all."""
    return f"optim={inside.lower()}", *{**EVERY_SYNC, **ALONE[inside]}[name]


def cell(session: Session, words: Words, seed: int, part: str) -> Run:
    """A run, unless it was made before. ``part``: of the validation windows."""
    return session.cell(*COMMON, f"data.part={part}", *words, f"train.seed={seed}")


def tuned(session: Session) -> tuple[dict[str, Tried], dict[str, Words]]:
    """The trials of every row, and the candidate that won."""
    trials = {name: tuned_row(session, FIXED[name], candidates) for name, candidates in CANDIDATES.items()}
    return trials, {name: best(tried) for name, tried in trials.items()}


def tuned_row(session: Session, fixed: Words, candidates: Sequence[Words]) -> Tried:
    """The losses of each candidate, in the order of `TUNING`: all with the first seed, the two best with the second."""
    first, second = TUNING
    tried = {words: [_loss(session, (*fixed, *words), first)] for words in candidates}
    for words in sorted(tried, key=lambda words: tried[words])[:2]:
        tried[words].append(_loss(session, (*fixed, *words), second))
    return tried


def _loss(session: Session, words: Words, seed: int) -> float:
    return cell(session, words, seed, "tuning").validation


def best(tried: Mapping[Words, Sequence[float]]) -> Words:
    """The lowest mean among those that ran with every seed.

    >>> best({("a",): [3.0], ("b",): [1.0, 2.5], ("c",): [2.0, 1.0]})
    ('c',)
    """
    return min((words for words in tried if len(tried[words]) == len(TUNING)), key=lambda w: statistics.mean(tried[w]))


def settings(chosen: Mapping[str, Words]) -> dict[str, Words]:
    """What is reported: the rows as tuned, data parallelism in bf16, and MuLoCo's rows with AdamW inside."""
    reported = {name: (*FIXED[name], *words) for name, words in chosen.items()}
    for name, optimizer in ((ADAMW, "adamw"), (MUON, "muon")):
        reported[f"{name}, bf16"] = (f"optim={optimizer}", "sync=every_step", "compress=bf16", *chosen[name])
    rate = chosen[ADAMW][0]
    for name in LINES:
        rounds = [word for word in chosen[name] if not word.startswith("optim.")]
        inside = ("optim=adamw", "sync=diloco", "compress=int2_ef", *rounds, rate)
        reported[name.replace("MuLoCo", "DiLoCo, 2 bits, AdamW inside")] = inside
    return reported


def few_bytes_report(
    trials: Mapping[str, Mapping[Words, Sequence[float]]], chosen: Mapping[str, Words],
    runs: Mapping[str, Sequence[Run]],
) -> Report:  # fmt: skip
    """``trials``: by row and candidate. ``chosen``: what won. ``runs``: by row, one for each of `SEEDS`."""
    rows = []
    for name, by_seed in runs.items():
        losses = [run.validation for run in by_seed]
        rows.append([name, f"{statistics.mean(losses):.4f} ± {statistics.stdev(losses):.4f}",
                     *(paired(by_seed, runs[base]) for base in (ADAMW, MUON)), *sent(by_seed[0])])  # fmt: skip
    checks: list[Check] = []
    for name, line in LINES.items():
        summary = runs[name][0].summary
        less = summary.dense_bytes_per_rank / summary.sent_bytes_per_rank
        checks.append(at_least(f"{name}: bytes of data parallelism over its bytes", less, line.less, "x"))
        for base, limit in ((ADAMW, line.adamw), (MUON, line.muon)):
            if limit is not None:
                off = statistics.mean(differences(runs[name], runs[base]))
                checks.append(at_most(f"{name}: loss above that of {base}", off, limit, " %"))
    number = sum(map(len, next(iter(trials.values())).values()))
    body = (
        f"{STEPS} steps on the default text and model, DDP, four replicas, equal batches: equal tokens. Bytes are "
        "those of the whole run, on the replicate axis, control messages included, beside fp32 data parallelism. "
        "Losses in nats per byte over 1,024 validation windows; mean and standard deviation over seeds "
        f"{SEEDS[0]} to {SEEDS[-1]}. Against the baselines: mean and standard deviation of the differences seed by "
        "seed.\n\n"
        + table(["", "loss", "AdamW DP", "Muon DP", "sent per rank", "less"], rows)
        + f"\n\n**Tuning.** {number} runs for each row: every candidate with seed {TUNING[0]}, the two best with seed "
        f"{TUNING[1]} too, on other validation windows. bf16 and the rows with AdamW inside take what was chosen for "
        "the row that they belong to, and the learning rate of AdamW data parallelism.\n\n"
        + tuning_table(trials, chosen)
    )
    kept = {f"{name}, seed {seed}": run for name, by in runs.items() for seed, run in zip(SEEDS, by, strict=True)}
    figures: dict[str, object] = {name: as_figures(run) for name, run in kept.items()}
    figures["tuning"] = tuning_figures(trials)
    commands = tuple(dict.fromkeys(run.command for run in kept.values()))
    return Report("Loss at few bytes", body, commands, tuple(checks), figures)


def tuning_table(trials: Mapping[str, Mapping[Words, Sequence[float]]], chosen: Mapping[str, Words]) -> str:
    """What was tried, by row and candidate."""
    rows = [
        [name, " ".join(words), *(f"{loss:.4f}" for loss in losses), *["-"] * (len(TUNING) - len(losses)),
         "chosen" if words == chosen[name] else ""]
        for name, tried in trials.items() for words, losses in tried.items()
    ]  # fmt: skip
    return table(["row", "candidate", *(f"seed {seed}" for seed in TUNING), ""], rows)


def tuning_figures(trials: Mapping[str, Mapping[Words, Sequence[float]]]) -> dict[str, dict[str, list[float]]]:
    """The same as plain JSON."""
    return {name: {" ".join(words): list(its) for words, its in tried.items()} for name, tried in trials.items()}


def all_syncs_report(runs: Mapping[tuple[str, str], Run]) -> Report:
    """``runs``: by name of the sync and inner optimizer."""
    names = list(dict.fromkeys(name for name, _ in runs))
    base = {inside: runs["dense", inside].validation for inside in ("AdamW", "Muon")}
    rows = []
    for name in names:
        row, some = [name], None
        for inside in ("AdamW", "Muon"):
            run = runs.get((name, inside))
            some = some or run
            row += ["-"] if run is None else [f"{run.validation:.4f} ({run.validation / base[inside] - 1:+.1%})"]
        assert some is not None
        rows.append([*row, *sent(some), f"{some.summary.exposed_fraction or 0:.0%}"])
    body = (
        "Every sync of `configs/sync` at its defaults, those of shared randomness and those for plain SGD aside: "
        f"{STEPS} steps on the default text and model, DDP, four replicas, seed {ONE_SEED}, with each inner optimizer "
        "at its default learning rate. In parentheses against data parallelism with the same optimizer. One seed: "
        "differences of a percent are noise. Exposed: the share of the run's time in which training stood still for "
        "communication, over the loopback of one machine.\n\n"
        + table(["sync", "AdamW inside", "Muon inside", "sent per rank", "less", "exposed"], rows)
    )
    figures = {f"{name}, {inside}": as_figures(run) for (name, inside), run in runs.items()}
    commands = tuple(run.command for run in runs.values())
    return Report("Every sync at equal tokens", body, commands, (), figures)


def differences(runs: Sequence[Run], base: Sequence[Run]) -> list[float]:
    """Seed by seed, in per cent of ``base``."""
    return [100 * (run.validation / its.validation - 1) for run, its in zip(runs, base, strict=True)]


def paired(runs: Sequence[Run], base: Sequence[Run]) -> str:
    """Mean and standard deviation of `differences`."""
    if runs is base:
        return "-"
    off = differences(runs, base)
    return f"{statistics.mean(off):+.2f} % ± {statistics.stdev(off):.2f}"


def sent(run: Run) -> list[str]:
    """Bytes, and how many times fewer than fp32 data parallelism sends."""
    summary = run.summary
    return [
        in_bytes(summary.sent_bytes_per_rank),
        f"{summary.dense_bytes_per_rank / summary.sent_bytes_per_rank:,.0f}x",
    ]
