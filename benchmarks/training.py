"""The reports on training runs. Functions that end in ``_report`` are pure; the others measure with a `Session`."""

from __future__ import annotations

import os
import signal
import subprocess
import time
from collections.abc import Mapping

from benchmarks.harness import Run, Session, as_figures, say
from benchmarks.page import Check, Report, at_least, at_most, table
from dtrain.report.figures import in_bytes, in_time
from dtrain.train import engine_registry
from tests.sync_words import sync_words

ENGINES = engine_registry.names()
SYNCS = ("dense", "int8_ef", "diloco")
TWO_BY_TWO = ("mesh.replicate=2", "mesh.shard=2", "launcher.workers=4")
FIFTEEN_STEPS, QUALITY_STEPS = 60, 300


def fifteen(session: Session) -> Report:
    """Every engine with every sync."""
    steps = f"train.steps={FIFTEEN_STEPS}"
    runs = {
        (engine, sync): session.train(f"engine={engine}", *sync_words(sync), steps, *TWO_BY_TWO)
        for engine in ENGINES
        for sync in SYNCS
    }
    return fifteen_report(runs)


def quality(session: Session) -> Report:
    """Validation loss against bytes."""
    dense, int8_ef, diloco = (session.train(*sync_words(sync), f"train.steps={QUALITY_STEPS}") for sync in SYNCS)
    return quality_report(dense, int8_ef, diloco)


def default(session: Session) -> Report:
    """``dtrain train`` as it comes."""
    return default_report(session.train())


def kill(session: Session) -> Report:
    """The default run, undisturbed and with a worker killed in the middle."""
    undisturbed = session.train()
    with session.training() as running:
        step = running.wait_for_step(undisturbed.summary.steps // 2)
        victim = running.workers()[-1]
        say(f"    kill -9 of worker {victim} at step {step}")
        os.kill(victim, signal.SIGKILL)
    return kill_report(undisturbed, running.finished(), step)


def suite(session: Session) -> Report:
    """The wall-clock of ``make test``."""
    say("make test")
    started = time.monotonic()
    done = subprocess.run(["make", "test"], stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)
    lines = done.stdout.rstrip().splitlines() or [""]
    if done.returncode:
        say("\n".join(lines[-200:]))
    return suite_report(time.monotonic() - started, done.returncode, lines[-1], os.cpu_count() or 1)


# ---- from what was measured -----------------------------------------------------------------------------------------


def fifteen_report(runs: Mapping[tuple[str, str], Run]) -> Report:
    """Every engine with every sync, by (engine, sync)."""
    rows = [[engine, sync, *_columns(run)] for (engine, sync), run in runs.items()]
    fell = sum(run.validation < run.validations[0] for run in runs.values())
    losses = [run.validation for (_, sync), run in runs.items() if sync == "dense"]
    spread = (max(losses) - min(losses)) / min(losses) if losses else 0.0
    steps = ", ".join(sorted({f"{run.summary.steps}" for run in runs.values()}))
    body = (
        f"Each engine with each sync, {steps} steps on the default model and data, 4 workers as 2 replicas x 2 shards. "
        "Losses are in nats per token (a byte, by default). Sent: by one rank over the slow links, control messages "
        "included; beside it how many times less than dense fp32 gradients would have been.\n\n"
        + table(["engine", "sync", "loss", "validation before", "after", "sent per rank", "less than dense"], rows)
        + f"\n\nWith dense communication the validation losses of the engines differ by {spread:.1e} (relative)."
    )
    return Report(
        "Five engines, three syncs",
        body,
        tuple(run.command for run in runs.values()),
        (at_least("combinations whose validation loss fell", fell, len(runs)),),
        {f"{engine} {sync}": as_figures(run) for (engine, sync), run in runs.items()},
    )


def quality_report(dense: Run, int8_ef: Run, diloco: Run) -> Report:
    """What compression and local updates do to the loss, and what they save."""
    runs = {"dense": dense, "int8_ef": int8_ef, "diloco": diloco}
    differences = {name: run.validation / dense.validation - 1 for name, run in runs.items()}
    ratios = {name: dense.summary.sent_bytes_per_rank / run.summary.sent_bytes_per_rank for name, run in runs.items()}
    rows = [
        [name, *_columns(run)[:4], f"{100 * differences[name]:+.2f} %", f"{ratios[name]:.3f}x"]
        for name, run in runs.items()
    ]
    body = (
        f"{dense.summary.steps} steps on the default model and data with the engine {dense.summary.engine}. dense and "
        "int8_ef send gradients on the same two-phase route; the bytes are what the meter counted in the runs, their "
        "control messages included, which makes the ratio a little smaller than that of the gradients alone.\n\n"
        + table(["sync", "loss", "validation before", "after", "sent per rank", "against dense", "fewer bytes"], rows)
    )
    checks = (
        at_most("validation loss of int8_ef, off dense", 100 * abs(differences["int8_ef"]), 1, " %"),
        at_least("bytes of dense over those of int8_ef", ratios["int8_ef"], 3.9, "x"),
    )
    figures = {name: as_figures(run) for name, run in runs.items()}
    return Report(
        "Quality against bytes", body, tuple(r.command for r in runs.values()), checks, {**figures, "ratios": ratios}
    )


def default_report(run: Run) -> Report:
    """What a newcomer sees."""
    ratio = run.validation / run.validations[0]
    body = (
        f"`dtrain train` as it comes: validation loss {run.validations[0]:.4f} before, {run.validation:.4f} after "
        f"{run.summary.steps} steps; {in_time(run.seconds)} in all, of which {in_time(run.summary.seconds)} in steps. "
        f"The default data are bytes, so the loss is in nats per byte.\n\n```\n{closing_text(run)}\n```"
    )
    checks = (
        at_most("last validation loss over the first", ratio, 0.8),
        at_most("validation loss", run.validation, 2.2, " nats per byte"),
    )
    return Report("The default run", body, (run.command,), checks, as_figures(run))


def kill_report(undisturbed: Run, killed: Run, step: int) -> Report:
    """A run of which a worker died after ``step``, beside one that nobody touched."""
    runs = {"undisturbed": undisturbed, f"a worker killed after step {step}": killed}
    rows = [
        [name, f"{run.validation:.6f}", f"`{run.summary.parameters_digest}`", in_time(run.seconds)]
        for name, run in runs.items()
    ]
    said = "\n".join(line for line in killed.printed.splitlines() if "SIGKILL" in line or line.startswith("restart "))
    body = (
        f"The same command twice; in the second run one of the workers got SIGKILL at step {step} of "
        f"{killed.summary.steps}. What the command said of it:\n\n```\n{said}\n```\n\n"
        + table(["run", "validation loss", "SHA-256 of the parameters", "wall-clock"], rows)
    )
    equal = undisturbed.summary.parameters_digest == killed.summary.parameters_digest
    checks = (
        Check("restarts", f"{said.count('restart ')}", "at least 1", "restart " in said),
        Check("digests of the parameters", "equal" if equal else "different", "equal", equal),
    )
    return Report(
        "kill -9",
        body,
        (undisturbed.command, f"{killed.command}    # kill -9 of a worker at step {step}"),
        checks,
        {"undisturbed": as_figures(undisturbed), "killed": as_figures(killed), "killed_at_step": step},
    )


def suite_report(seconds: float, exit_code: int, last_line: str, cores: int) -> Report:
    """How long the tests take."""
    body = f"The whole suite on {cores} cores: {in_time(seconds)}.\n\n```\n{last_line}\n```"
    checks = (
        at_most("exit code", exit_code, 0),
        at_most("minutes", seconds / 60, 15),
    )
    figures = {"seconds": seconds, "exit_code": exit_code, "cores": cores}
    return Report("The suite", body, ("make test",), checks, figures)


def closing_text(run: Run) -> str:
    """The last lines that the command printed, from the one that names the run."""
    lines = run.printed.rstrip().splitlines()
    first = max((number for number, line in enumerate(lines) if line.startswith("run ")), default=0)
    return "\n".join(lines[first:])


def _columns(run: Run) -> list[str]:
    """loss, first and last validation loss, bytes, times less than dense."""
    sent, dense = run.summary.sent_bytes_per_rank, run.summary.dense_bytes_per_rank
    loss = "not finite" if run.summary.loss is None else f"{run.summary.loss:.4f}"
    return [loss, f"{run.validations[0]:.4f}", f"{run.validation:.4f}", in_bytes(sent), f"{dense / sent:.2f}x"]
