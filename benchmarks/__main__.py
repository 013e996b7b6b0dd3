"""``python -m benchmarks``: makes the reports and writes their files."""

from __future__ import annotations

import argparse
import dataclasses
import datetime
import json
import os
import sys
import tempfile
from collections.abc import Callable, Sequence
from pathlib import Path

from benchmarks.compression import compressors, loss
from benchmarks.elastic import elastic
from benchmarks.equal_tokens import equal_tokens
from benchmarks.fine_tuning import fine_tuning
from benchmarks.harness import Session, say
from benchmarks.kernels import kernels
from benchmarks.leaks import leaks
from benchmarks.lgreco import lgreco
from benchmarks.link_calibration import network
from benchmarks.one_byte import one_byte_on_hosts
from benchmarks.overlap import overlap
from benchmarks.page import Circumstances, Report, page
from benchmarks.shared_seed import shared_seed
from benchmarks.slow_links import local, powersgd, slow
from benchmarks.stopping import stopping
from benchmarks.training import default, fifteen, kill, quality, suite
from benchmarks.vs_torchft import torchft
from dtrain.report import environment
from dtrain.train.checkpoint.folders import write_text_durably

REPORTS: dict[str, Callable[[Session], Report]] = {
    "fifteen": fifteen, "quality": quality, "default": default, "kill": kill, "network": network,
    "stopping": stopping, "kernels": kernels, "compressors": compressors, "loss": loss, "lgreco": lgreco,
    "powersgd": powersgd, "slow": slow, "local": local, "torchft": torchft, "overlap": overlap,
    "equal_tokens": equal_tokens, "elastic": elastic, "one_byte": one_byte_on_hosts,
    "leaks": leaks,
    "shared_seed": shared_seed, "fine_tuning": fine_tuning, "suite": suite,
}  # fmt: skip
LATER = ("suite",)  # only when it is named


def circumstances() -> Circumstances:
    """Of this moment, on this machine."""
    found = environment.record()
    cpu = [line.partition(":")[2].strip() for line in _read("/proc/cpuinfo").splitlines() if line.startswith("model n")]
    git, versions = found["git"], found["versions"]
    revision = "none: not a git repository"
    if isinstance(git, dict):
        revision = f"{git['revision']}{', with changes that are not committed' if git['dirty'] else ''}"
    assert isinstance(versions, dict)
    return Circumstances(
        machine=f"{found['cpu_count']} cores ({cpu[0] if cpu else 'unknown'}), {found['platform']}",
        date=datetime.datetime.now(datetime.UTC).strftime("%Y-%m-%d %H:%M UTC"),
        revision=revision,
        versions=", ".join(f"{name} {versions[name]}" for name in ("python", "torch", "deepspeed") if name in versions),
        load=f"{os.getloadavg()[0]:.1f} at the start",
    )


def write(name: str, report: Report, made: Circumstances, folder: Path) -> None:
    """Both files of a report; each is whole or as it was."""
    folder.mkdir(parents=True, exist_ok=True)
    checks = [dataclasses.asdict(check) for check in report.checks]
    content = {"made": dataclasses.asdict(made), "checks": checks, "figures": dict(report.figures)}
    write_text_durably(folder / f"{name}.json", json.dumps(content, indent=1) + "\n")
    write_text_durably(folder / f"{name}.md", page(report, made))
    say(f"{folder / name}.md")
    for check in report.checks:
        say(f"    {check}")


def main(arguments: Sequence[str] | None = None) -> int:
    """Make the named reports; returns the exit code: 0 if every line is met, 1 if one is missed or a run failed."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks", description="Measure, into docs/evidence/.")
    parser.add_argument("names", nargs="*", metavar="NAME", help=f"{', '.join(REPORTS)}; all but {LATER[0]} by default")
    parser.add_argument("--out", type=Path, default=Path("docs/evidence"), help="the folder (default: %(default)s)")
    parser.add_argument(
        "--cells", type=Path, default=Path("runs/evidence-cells"),
        help="what the sweeps have run is kept there and not run again (default: %(default)s)",
    )  # fmt: skip
    chosen = parser.parse_args(arguments)
    unknown = [name for name in chosen.names if name not in REPORTS]
    if unknown:
        parser.error(f"there is no report {unknown[0]} (there are {', '.join(REPORTS)})")
    missed = False
    with tempfile.TemporaryDirectory(prefix="dtrain-evidence-") as folder:
        session = Session(Path(folder), chosen.cells)
        revision = circumstances().revision  # before this command itself changes files
        for name in chosen.names or [name for name in REPORTS if name not in LATER]:
            made = dataclasses.replace(circumstances(), revision=revision)
            session.reused.clear()
            try:
                report = REPORTS[name](session)
            except RuntimeError as error:
                say(f"{name}: MISSED, as a run failed: {error}")
                missed = True
                continue
            if session.reused:
                kept = f"{len(session.reused)} of its runs were made by earlier commands, at revisions of their time"
                made = dataclasses.replace(made, sweep=kept)
            write(name, report, made, chosen.out)
            missed = missed or not all(check.met for check in report.checks)
    return int(missed)


def _read(path: str) -> str:
    try:
        return Path(path).read_text()
    except OSError:
        return ""


if __name__ == "__main__":
    sys.exit(main())
