"""The reports on compression. Functions that end in ``_report`` are pure; the others run cells with a `Session`.

Every cell is kept as soon as it has ended, so that a command that was cut off goes on with the next one.
"""

from __future__ import annotations

import math
from collections.abc import Mapping

from benchmarks.harness import Run, Session, as_figures
from benchmarks.page import Check, Report, at_least, at_most, table
from benchmarks.training import ENGINES, TWO_BY_TWO
from dtrain.report.figures import in_bytes

FOUR_REPLICAS = ("engine=ddp", "mesh.replicate=4", "mesh.shard=1", "launcher.workers=4")
LESS_NOISE = ("train.evaluate_every_steps=0", "train.evaluation_examples=512", "train.checkpoint_every_steps=0")
STEPS, LONG_STEPS, RESUMED_AT = 200, 500, 100

FEEDBACKS = {
    "EF14": "dtrain.compress.error_feedback",
    "EF21-SGDM": "dtrain.compress.ef21,eta:0.1",
    "EControl": "dtrain.compress.econtrol,eta:0.1",
}
BIASED = {
    "quantize 8 bits": "_target_:dtrain.compress.quantize,bits:8",
    "quantize 4 bits": "_target_:dtrain.compress.quantize,bits:4,block:128",
    "symmetric 4 bits": "_target_:dtrain.compress.quantize,grid:symmetric,bits:4,block:128",
    "e3m0": "_target_:dtrain.compress.quantize,grid:e3m0,block:128",
    "top-k 1 %": "_target_:dtrain.compress.topk,density:0.01",
    "random-k 1 %": "_target_:dtrain.compress.randk,density:0.01",
    "sign": "_target_:dtrain.compress.sign",
    "compeft 10 %": "_target_:dtrain.compress.compeft,density:0.1",
    "PowerSGD rank 4": "_target_:dtrain.compress.powersgd,rank:4",
}
"""With every feedback."""
NEARLY_EXACT = {
    "bf16": "_target_:dtrain.compress.cast,dtype:bf16",
    "fp8 e4m3": "_target_:dtrain.compress.cast,dtype:fp8_e4m3",
    "fp8 e5m2": "_target_:dtrain.compress.cast,dtype:fp8_e5m2",
}
"""With EF14 and without: what is left over is too small for more."""
WITHOUT = {
    "fp16": "_target_:dtrain.compress.cast,dtype:fp16",
    "quantize 8 bits, stochastic": "_target_:dtrain.compress.quantize,bits:8,rounding:stochastic",
    "quantize 4 bits, stochastic": "_target_:dtrain.compress.quantize,bits:4,block:128,rounding:stochastic",
    "QSGD 8 bits": "_target_:dtrain.compress.quantize,grid:qsgd,bits:8,rounding:stochastic",
    "natural": "_target_:dtrain.compress.quantize,grid:natural,rounding:stochastic",
    "random-k 1 %, scaled": "_target_:dtrain.compress.randk,density:0.01,scaled:true",
    "terngrad": "_target_:dtrain.compress.terngrad",
}
"""Unbiased, or nearly, or of a type that overflows: what feedback cannot help."""
METHODS = {
    ("L-GreCo, quantize", "EF14"): ("sync=every_step", "compress=lgreco_quantize"),
    ("L-GreCo, PowerSGD", "EF14"): ("sync=every_step", "compress=lgreco_powersgd"),
    ("1-bit Adam", "EF14"): ("sync=onebit_adam", "sync.warmup_steps=50"),
    ("DGC 1 %, SGD", "its own"): (
        "sync=dgc", "sync.density=0.01", "sync.warmup_steps=50",
        "optim=sgd", "optim.inner.momentum=0", "optim.inner.lr=0.1",
    ),
}  # fmt: skip
ON_ALL_ENGINES = ("int4_ef", "topk_ef21", "topk_econtrol", "sign_ef", "powersgd_ef", "lgreco_powersgd")
EXACT_ENOUGH = {"int8_ef": "8 bits", "int4_ef": "4 bits"}
CANDIDATES = {
    "powersgd16_ef": ("sync=every_step", "compress=powersgd16_ef"),
    "local_sgd, every 8 steps, int4_ef": (
        "sync=local_sgd", "sync.every_steps=8", "compress=int4_ef",
    ),
}  # fmt: skip
"""Strong enough for a slow network, and perhaps near enough to dense: see the report "slow"."""
GAPS = {"powersgd_ef": "PowerSGD rank 4", "topk_ef": "top-k 1 %", "sign_ef": "sign"}
FACTORS = (0.3, 1.0, 3.0)
"""Of the learning rate."""
BASE_RATE = 0.003
COLUMNS = ("validation loss", "against dense", "sent per rank", "less than dense")


def compressors(session: Session) -> Report:
    """Every compressor with every feedback that means something, and six of them on all engines."""
    chosen = (*FOUR_REPLICAS, f"train.steps={STEPS}", *LESS_NOISE)
    one = {key: session.cell(*chosen, *words) for key, words in cells().items()}
    five = {
        (name, engine): session.resumed_cell(
            RESUMED_AT, f"engine={engine}", *TWO_BY_TWO, f"train.steps={STEPS}", *LESS_NOISE[:2],
            "sync=every_step", f"compress={name}",
        )
        for name in ON_ALL_ENGINES
        for engine in ENGINES
    }  # fmt: skip
    return compressors_report(one, five)


def loss(session: Session) -> Report:
    """What a run of 500 steps loses; for strong compression at the best of three learning rates."""
    chosen = (*FOUR_REPLICAS, f"train.steps={LONG_STEPS}", *LESS_NOISE)
    dense = (*chosen, "sync=every_step")
    runs = {"dense": session.cell(*dense)}
    for name in EXACT_ENOUGH:
        runs[name] = session.cell(*dense, f"compress={name}")
    for name, words in CANDIDATES.items():
        runs[name] = session.cell(*chosen, *words)
    swept = {
        (name, factor): session.cell(*dense, *(() if name == "dense" else (f"compress={name}",)), *_rate(factor))
        for name in ("dense", *GAPS)
        for factor in FACTORS
    }
    return loss_report(runs, swept)


def cells() -> dict[tuple[str, str], tuple[str, ...]]:
    """The command line of each (compressor, feedback)."""
    commands: dict[tuple[str, str], tuple[str, ...]] = {("fp32", "none"): ("sync=dense",)}
    for names, feedbacks in ((WITHOUT, ()), (NEARLY_EXACT, ("EF14",)), (BIASED, tuple(FEEDBACKS))):
        for name, compressor in names.items():
            commands[name, "none"] = ("sync=every_step", f"sync.compress={{{compressor}}}")
            for feedback in feedbacks:
                words = f"{{_target_:{FEEDBACKS[feedback]},compressor:{{{compressor}}}}}"
                commands[name, feedback] = ("sync=every_step", f"sync.compress={words}")
    return {**commands, **METHODS}


def _rate(factor: float) -> tuple[str, ...]:
    return () if factor == 1 else (f"optim.inner.lr={BASE_RATE * factor:g}",)


# ---- from what was measured -----------------------------------------------------------------------------------------


def compressors_report(one: Mapping[tuple[str, str], Run], five: Mapping[tuple[str, str], tuple[Run, Run]]) -> Report:
    """``one``: by compressor and feedback, on one engine. ``five``: by name and engine, undisturbed and resumed."""
    dense = one["fp32", "none"]
    rows = [[*key, *_figures(run, dense)] for key, run in one.items()]
    names = list(dict.fromkeys(name for name, _ in five))
    engines = list(dict.fromkeys(engine for _, engine in five))
    table_of_five = [[name, *(f"{five[name, engine][0].validation:.4f}" for engine in engines)] for name in names]
    sent = [
        [name, *(in_bytes(five[name, engine][0].summary.sent_bytes_per_rank) for engine in engines)] for name in names
    ]
    same = sum(whole.summary.parameters_digest == again.summary.parameters_digest for whole, again in five.values())
    body = (
        f"{dense.summary.steps} steps on the default text, model and learning rate; the mean of the gradients at every "
        f"step. One seed, {LESS_NOISE[1].partition('=')[2]} examples of validation; losses in nats per byte.\n\n"
        "## Each compressor with each feedback\n\n4 replicas, DDP.\n\n"
        + table(
            ["compressor", "feedback", "validation loss", "against dense", "sent per rank", "less than dense"], rows
        )
        + "\n\nEF21-SGDM puts a momentum (eta = 0.1) in front of AdamW's own; unbiased compressors have no use for "
        "feedback. 1-bit Adam spends its first 50 steps in fp32.\n\n## Six on five engines\n\n2 replicas x 2 shards. "
        "Validation loss:\n\n"
        + table(["compress", *engines], table_of_five)
        + "\n\nSent per rank:\n\n"
        + table(["compress", *engines], sent)
        + f"\n\nEach of these was also gone on with from its checkpoint of step {RESUMED_AT}, in new processes."
    )
    worse = [key for key, run in one.items() if not math.isfinite(run.validation)]
    checks = (
        Check("cells that ended without a finite loss", f"{len(worse)}", "none", not worse),
        at_least("runs that ended with bitwise the same parameters after a resume", same, len(five)),
    )
    figures = {
        **{f"{name}, {feedback}": as_figures(run) for (name, feedback), run in one.items()},
        **{f"{name} {engine}": as_figures(whole) for (name, engine), (whole, _) in five.items()},
    }
    commands = [run.command for run in one.values()] + [r.command for pair in five.values() for r in pair]
    return Report("Compressors and feedbacks", body, tuple(commands), checks, figures)


def loss_report(runs: Mapping[str, Run], swept: Mapping[tuple[str, float], Run]) -> Report:
    """``runs``: dense and what must equal it. ``swept``: by name and factor of the learning rate, dense too."""
    dense = runs["dense"]
    rows = [[name, *_figures(run, dense)] for name, run in runs.items()]
    best = {name: min(_of(swept, name), key=lambda factor: swept[name, factor].validation) for name, _ in swept}
    gap_rows = [
        [
            GAPS.get(name, name),
            *(f"{swept[name, factor].validation:.4f}" for factor in _of(swept, name)),
            f"{swept[name, best[name]].validation / swept['dense', best['dense']].validation - 1:+.1%}",
        ]
        for name in best
    ]
    body = (
        f"{dense.summary.steps} steps on the default text and model, DDP, 4 replicas, the mean of the gradients at "
        "every step; one seed; losses in nats per byte.\n\n"
        + table(["sync", *COLUMNS], rows)
        + "\n\nStrong compression, EF14, at three learning rates (factors of the default one). Nothing else is tuned; "
        "the gap is that of the best to the best of dense.\n\n"
        + table(["", *(f"lr x {factor:g}" for factor in _of(swept, "dense")), "gap at the best"], gap_rows)
    )
    checks = tuple(
        at_most(f"validation loss of {EXACT_ENOUGH[name]}, off dense", 100 * abs(run.validation / dense.validation - 1),
                1, " %")
        for name, run in runs.items() if name in EXACT_ENOUGH
    )  # fmt: skip
    figures = {name: as_figures(run) for name, run in runs.items()}
    figures |= {f"{name}, lr x {factor:g}": as_figures(run) for (name, factor), run in swept.items()}
    commands = dict.fromkeys(run.command for run in (*runs.values(), *swept.values()))
    return Report("What compression costs in loss", body, tuple(commands), checks, figures)


def _figures(run: Run, dense: Run) -> list[str]:
    """Validation loss, off dense, bytes, times less than dense."""
    sent = run.summary.sent_bytes_per_rank
    off = 100 * (run.validation / dense.validation - 1)
    return [f"{run.validation:.4f}", f"{off:+.2f} %", in_bytes(sent), f"{run.summary.dense_bytes_per_rank / sent:.1f}x"]


def _of(swept: Mapping[tuple[str, float], Run], name: str) -> list[float]:
    return [factor for method, factor in swept if method == name]
