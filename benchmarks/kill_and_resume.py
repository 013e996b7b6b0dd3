"""``make kill``: 100 runs that are killed at random, into docs/evidence/kill_and_resume.md."""

from __future__ import annotations

import argparse
import os
import shutil
import sys
import tempfile
from collections import Counter
from collections.abc import Sequence
from pathlib import Path

from benchmarks.evidence import circumstances, write
from benchmarks.harness import say
from benchmarks.page import Check, Report, at_least, table
from benchmarks.provenance import EVIDENCE, DirtyTree, require_clean
from tests.kill.runs import Result, Setting, disturbed, plan, undisturbed, write_text

COUNT = 3


def report(results: Sequence[Result], command: str) -> Report:
    """The page."""
    rows = [
        [str(result.setting), "; ".join(result.attempts.history), "equal" if result.equal else "**DIFFERENT**"]
        for result in results
    ]
    equal, struck = sum(result.equal for result in results), sum(result.attempts.disturbances for result in results)
    kinds = Counter(
        line.split()[0] for result in results for line in result.attempts.history if not line.startswith("attempt")
    )
    said = ", ".join(f"{kinds[kind]} {kind}" for kind in sorted(kinds))
    body = (
        f"Each run is started, disturbed up to {COUNT} times and started again until it ends; then the digest of its "
        "parameters is compared with that of a run of the same settings that nobody touched. One, first, all: SIGKILL "
        "of one rank, of rank 0, of all. Writing: SIGKILL of a rank while a checkpoint is written. Term: SIGTERM to "
        "all, at which they checkpoint. Stop: SIGSTOP of one rank for up to two seconds. The step is that of the "
        f"newest checkpoint. {struck} disturbances: {said}.\n\n"
        + table(["engine, sync, replicas x shards", "what happened, and the exit codes", "digest"], rows)
    )
    checks = (
        Check("runs whose digest is equal", f"{equal}", f"all {len(results)}", equal == len(results)),
        at_least("disturbances for each run", min(result.attempts.disturbances for result in results), 1),
    )
    figures = {"runs": len(results), "equal": equal, "disturbances": dict(kinds)}
    return Report("Killed at random, and resumed", body, (command,), checks, figures)


def main(arguments: Sequence[str] | None = None) -> int:
    """Returns 0 if all digests are equal. Raises `DirtyTree` before anything runs, if a page would be written."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.kill_and_resume", description=__doc__)
    parser.add_argument("words", nargs="*", metavar="WORD", help="only settings that contain one, as zero3 or diloco")
    parser.add_argument("--runs", type=int, default=100)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--out", type=Path, help="where the page goes (default: docs/evidence, if all are tried)")
    chosen = parser.parse_args(arguments)
    os.environ.setdefault("OMP_NUM_THREADS", "1")
    import torch

    import dtrain.testing._loaded  # noqa: F401  # what ranks need is imported once, before they are forked

    torch.set_num_threads(1)
    out = chosen.out or (Path(EVIDENCE) if not chosen.words else None)
    if out is not None:
        require_clean()
    made = circumstances()
    settings = [s for s in plan(chosen.runs) if not chosen.words or any(word in str(s) for word in chosen.words)]
    results: list[Result] = []
    digests: dict[Setting, str] = {}
    with tempfile.TemporaryDirectory(prefix="dtrain-kill-") as name:
        base = Path(name)
        text = write_text(base / "text")
        for number, setting in enumerate(settings):
            if setting not in digests:
                digests[setting] = undisturbed(base / f"{number}-undisturbed", setting, text)
            folder = base / f"{number}-disturbed"
            seed = f"{chosen.seed} {number} {setting}"
            result = disturbed(folder, setting, text, expected=digests[setting], seed=seed, count=COUNT)
            say(f"{number} {setting}: {'equal' if result.equal else 'DIFFERENT'} {result.attempts.history}")
            results.append(result)
            if result.equal:
                shutil.rmtree(folder)
            else:
                say((folder / "rank-0.out").read_text(errors="replace")[-3000:])
    made_report = report(results, "make kill")
    if out is not None:
        write("kill_and_resume", made_report, made, out)
    return int(not all(check.met for check in made_report.checks))


if __name__ == "__main__":
    try:
        sys.exit(main())
    except DirtyTree as error:
        sys.exit(str(error))
