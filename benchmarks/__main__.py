"""``python -m benchmarks``: makes the reports and writes their files."""

from __future__ import annotations

import argparse
import sys
import tempfile
from collections.abc import Callable, Sequence
from pathlib import Path

from benchmarks.best_six import best_six, equal_time
from benchmarks.clock_bytes import clock_bytes
from benchmarks.compression import compressors, loss
from benchmarks.elastic import elastic
from benchmarks.equal_tokens import equal_tokens
from benchmarks.evidence import circumstances, write
from benchmarks.few_bytes import all_syncs, few_bytes
from benchmarks.fine_tuning import fine_tuning
from benchmarks.gpu import gpu
from benchmarks.harness import Session, say
from benchmarks.kernels import kernels
from benchmarks.leaks import leaks
from benchmarks.lgreco import lgreco
from benchmarks.link_calibration import network
from benchmarks.muon import muon
from benchmarks.one_byte import one_byte_on_hosts
from benchmarks.overlap import overlap
from benchmarks.page import Report
from benchmarks.plan_memory import plan_memory
from benchmarks.prose import written_into_prose
from benchmarks.provenance import EVIDENCE, DirtyTree, require_clean, stale
from benchmarks.shared_seed import shared_seed
from benchmarks.slow_links import local, powersgd, slow
from benchmarks.sparse_routes import sparse_routes
from benchmarks.stopping import stopping
from benchmarks.time_to_loss import small_model, time_to_loss
from benchmarks.training import default, fifteen, kill, quality, suite
from benchmarks.utilization import utilization
from benchmarks.vs_torchft import torchft

REPORTS: dict[str, Callable[[Session], Report]] = {
    "fifteen": fifteen, "quality": quality, "default": default, "kill": kill, "network": network,
    "stopping": stopping, "kernels": kernels, "compressors": compressors, "loss": loss, "lgreco": lgreco,
    "powersgd": powersgd, "slow": slow, "local": local, "torchft": torchft, "overlap": overlap,
    "equal_tokens": equal_tokens, "elastic": elastic, "one_byte": one_byte_on_hosts,
    "leaks": leaks, "muon": muon, "few_bytes": few_bytes, "all_syncs": all_syncs,
    "best_six": best_six, "equal_time": equal_time, "time_to_loss": time_to_loss, "small_model": small_model,
    "sparse_routes": sparse_routes,
    "shared_seed": shared_seed, "fine_tuning": fine_tuning, "suite": suite,
    "utilization": utilization, "clock_bytes": clock_bytes, "plan_memory": plan_memory, "gpu": gpu,
}  # fmt: skip
LATER = ("suite", "gpu")  # only when it is named
STALE, PROSE = "stale", "prose"


def main(arguments: Sequence[str] | None = None) -> int:
    """Make the named reports; returns the exit code: 0 if every line is met, 1 if one is missed or a run failed, 2 if
    nothing was measured as there are changes that are not committed.
    """
    parser = argparse.ArgumentParser(prog="python -m benchmarks", description="Measure, into docs/evidence/.")
    parser.add_argument(
        "names", nargs="*", metavar="NAME",
        help=f"{', '.join(REPORTS)}; all but {' and '.join(LATER)} by default. {STALE}: list what is out of date. "
        f"{PROSE}: write the figures of the pages into README.md and docs",
    )  # fmt: skip
    parser.add_argument("--out", type=Path, default=Path(EVIDENCE), help="the folder (default: %(default)s)")
    parser.add_argument(
        "--cells", type=Path, default=Path("runs/evidence-cells"),
        help="what the sweeps have run is kept there and not run again (default: %(default)s)",
    )  # fmt: skip
    chosen = parser.parse_args(arguments)
    if chosen.names in ([STALE], [PROSE]):
        say(stale(chosen.out) if chosen.names == [STALE] else written_into_prose())
        return 0
    unknown = [name for name in chosen.names if name not in REPORTS]
    if unknown:
        parser.error(f"there is no report {unknown[0]} (there are {', '.join(REPORTS)})")
    missed = False
    with tempfile.TemporaryDirectory(prefix="dtrain-evidence-") as folder:
        session = Session(Path(folder), chosen.cells)
        for name in chosen.names or [name for name in REPORTS if name not in LATER]:
            try:
                require_clean()
            except DirtyTree as error:
                say(f"{name}: {error}")
                return 2
            made = circumstances()
            session.begin(made.revision)
            try:
                report = REPORTS[name](session)
            except RuntimeError as error:
                say(f"{name}: MISSED, as a run failed: {error}")
                missed = True
                continue
            write(name, report, made, chosen.out, session.kept_runs())
            missed = missed or not all(check.met for check in report.checks)
    return int(missed)


if __name__ == "__main__":
    sys.exit(main())
