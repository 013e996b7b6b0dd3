"""The report on L-GreCo: the bytes it saves at the error of a uniform setting, what that costs, and what looking costs.

Functions that end in ``_report`` are pure.
"""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable, Mapping

from benchmarks.compression import FOUR_REPLICAS, LESS_NOISE, STEPS
from benchmarks.harness import Run, Session, as_figures, say
from benchmarks.page import Report, at_least, at_most, table
from dtrain.report.figures import in_bytes

PLAIN = "quantization, 6 bits, blocks of 512, no feedback"


def _plain(*more: str) -> tuple[tuple[str, ...], tuple[str, ...]]:
    codes = "{_target_:dtrain.compress.quantize,bits:6,block:512}"
    planned = f"{{_target_:dtrain.plans.lgreco,every:100,alpha:1.0,compress:{codes}}}"
    return (f"sync.compress={codes}", *more), (f"sync.compress={planned}", *more)


SETTINGS = {
    **{
        f"PowerSGD rank {rank}": (
            ("compress=powersgd_ef", f"sync.compress.compressor.rank={rank}"),
            ("compress=lgreco_powersgd", f"sync.compress.compress.compressor.rank={rank}"),
        )
        for rank in (4, 16, 32)
    },
    "quantization, 4 bits": (("compress=int4_ef",), ("compress=lgreco_quantize",)),
    "quantization, 5 bits, blocks of 512": (
        ("compress=int4_ef", "sync.compress.compressor.bits=5", "sync.compress.compressor.block=512"),
        (
            "compress=lgreco_quantize", "sync.compress.compress.compressor.bits=5",
            "sync.compress.compress.compressor.block=512",
        ),
    ),
    f"{PLAIN}, seed 2": _plain("train.seed=2"),
    PLAIN: _plain(),
}  # fmt: skip
"""Uniform, and L-GreCo around it."""
LINES = {"PowerSGD rank 32": 1.4, PLAIN: 1.3}
LOOKS_EVERY, ROUNDS = 100, 15


def lgreco(session: Session) -> Report:
    """Uniform settings and L-GreCo around them, on one engine."""
    chosen = (*FOUR_REPLICAS, f"train.steps={STEPS}", *LESS_NOISE, "sync=every_step")
    pairs = {what: (session.cell(*chosen, *uniform), session.cell(*chosen, *planned))
             for what, (uniform, planned) in SETTINGS.items()}  # fmt: skip
    say("solving, and statistics of the default model")
    return lgreco_report(pairs, solving_seconds(), statistics_seconds())


def lgreco_report(pairs: Mapping[str, tuple[Run, Run]], solving: float, looking: Mapping[str, float]) -> Report:
    """``pairs``: the uniform run and that of L-GreCo, by what is compressed. ``solving``: seconds for 100 layers of 8
    choices. ``looking``: seconds of one look at the default model, by what is compressed.
    """
    rows, checks = [], []
    for what, (uniform, planned) in pairs.items():
        fewer = uniform.summary.sent_bytes_per_rank / planned.summary.sent_bytes_per_rank
        off = planned.validation / uniform.validation - 1
        sent = [in_bytes(run.summary.sent_bytes_per_rank) for run in (uniform, planned)]
        losses = [f"{uniform.validation:.4f}", f"{planned.validation:.4f}", f"{off:+.1%}"]
        rows.append([what, *losses, *sent, f"{fewer:.2f}x"])
        if what in LINES:
            checks.append(at_least(f"bytes of uniform {what} over those of L-GreCo", fewer, LINES[what], "x"))
            checks.append(at_most(f"validation loss with {what}, above uniform's", 100 * off, 1, " %"))
    checks.append(at_most("solving 100 layers of 8 choices", 1000 * solving, 50, " ms"))
    for what, seconds in looking.items():
        run = pairs[what][1]
        share = seconds / LOOKS_EVERY / (run.summary.seconds / run.summary.steps)
        checks.append(at_most(f"statistics of {what}, of the time of a step", 100 * share, 0.5, " %"))
    body = (
        f"{next(iter(pairs.values()))[0].summary.steps} steps on the default text and model, DDP, 4 replicas, EF14 "
        "where nothing else is said. L-GreCo may lose as much in all as the uniform setting does, and looks again "
        "after 10 steps and then after every 100. Bytes are those of whole runs: of the first steps, which have no "
        "plan yet, of the statistics, and of the control messages. One seed, whose noise is some percent of the loss; "
        "only the rows named under Lines are held to one.\n\n"
        + table(["", "loss, uniform", "L-GreCo", "off", "sent, uniform", "L-GreCo", "fewer bytes"], rows)
        + "\n\nThe errors that it keeps are sums of squares over all layers, which is what SGD cares about. AdamW "
        "scales each layer by itself, so what a layer with small gradients loses is felt all the same, the more the "
        "coarser the uniform setting is: with few bits, and with low ranks, equal errors are no equal losses. Feedback "
        "narrows the choice besides, since a residual must not grow; and as training goes on the layers' gradients "
        "become more alike, which leaves less to gain.\n\n"
        "Statistics: seconds of one look at all layers, on one thread, over 100 steps of the run above."
    )
    figures: dict[str, object] = {f"{what}, {how}": as_figures(run) for what, pair in pairs.items()
               for how, run in zip(("uniform", "L-GreCo"), pair, strict=True)}  # fmt: skip
    figures |= {"solving_seconds": solving, "statistics_seconds": dict(looking)}
    commands = tuple(run.command for pair in pairs.values() for run in pair)
    return Report("L-GreCo", body, commands, tuple(checks), figures)


def solving_seconds() -> float:
    """The median time of `solve` for 100 layers of 8 choices, in this process."""
    import torch

    from dtrain.comm.plans.lgreco import solve

    torch.set_num_threads(1)
    errors = torch.rand(100, 8, dtype=torch.float64).sort(dim=1, descending=True).values
    sizes = torch.rand(100, 8, dtype=torch.float64).sort(dim=1).values
    return _median_seconds(lambda: solve(errors, sizes, 4))


def statistics_seconds() -> dict[str, float]:
    """The median time of one look at gradients as large as those of the default model, by setting."""
    import torch

    from dtrain.comm.layout import Segment, matrices
    from dtrain.comm.plans import lgreco as plans
    from dtrain.comm.seeds import Key
    from dtrain.compress import error_feedback, powersgd, quantize
    from dtrain.train.models.transformer import Transformer

    torch.set_num_threads(1)
    model = Transformer(dim=128, layers=4, heads=4, tied_embeddings=False, vocab_size=256, max_length=128)
    shapes = {fqn: tuple(parameter.shape) for fqn, parameter in model.named_parameters()}
    gradients = {fqn: torch.randn(shape).reshape(-1) for fqn, shape in shapes.items()}
    lie = matrices({fqn: Segment(fqn, 0, g.numel()) for fqn, g in gradients.items()}, shapes)
    seconds = {}
    bases = {
        "PowerSGD rank 32": error_feedback(powersgd(32)),
        "quantization, 4 bits": error_feedback(quantize(bits=4, block=128)),
        PLAIN: quantize(bits=6, block=512),
    }
    for what, base in bases.items():
        plan = plans.lgreco(base).begin(list(shapes))

        def look(plan: plans.ChoosingLGreCo = plan) -> None:
            for fqn, gradient in gradients.items():
                plan.measure(fqn, gradient, gradient, lie[fqn], 4, Key(0, 0, 0, fqn))

        seconds[what] = _median_seconds(look)
    return seconds


def _median_seconds(call: Callable[[], object]) -> float:
    """Of several calls, after one that is not counted."""
    call()
    taken = []
    for _ in range(ROUNDS):
        started = time.perf_counter()
        call()
        taken.append(time.perf_counter() - started)
    return statistics.median(taken)
