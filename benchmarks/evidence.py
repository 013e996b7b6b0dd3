"""The files of docs/evidence: a page for people and its figures as JSON, and the circumstances that both name."""

from __future__ import annotations

import dataclasses
import datetime
import json
import os
from collections.abc import Mapping
from pathlib import Path

from benchmarks.harness import say
from benchmarks.page import Circumstances, Report, page
from benchmarks.provenance import MEASURES, revision
from dtrain.report import environment
from dtrain.train.checkpoint.folders import write_text_durably


def circumstances() -> Circumstances:
    """Of this moment, on this machine."""
    record = environment.record()
    cpu = [line.partition(":")[2].strip() for line in _read("/proc/cpuinfo").splitlines() if line.startswith("model n")]
    versions = record["versions"]
    assert isinstance(versions, dict)
    return Circumstances(
        machine=f"{record['cpu_count']} cores ({cpu[0] if cpu else 'unknown'}), {record['platform']}",
        date=datetime.datetime.now(datetime.UTC).strftime("%Y-%m-%d %H:%M UTC"),
        revision=revision(),
        versions=", ".join(f"{name} {versions[name]}" for name in ("python", "torch", "deepspeed") if name in versions),
        load=f"{os.getloadavg()[0]:.1f} at the start",
    )


def write(name: str, report: Report, made: Circumstances, folder: Path, kept_runs: Mapping[str, int] = {}) -> None:
    """Both files of a report; each is whole or as it was.

    ``kept_runs``: how many of its runs earlier commands have made, by revision.
    """
    folder.mkdir(parents=True, exist_ok=True)
    if kept_runs:
        said = ", ".join(f"{count} at {revision}" for revision, count in kept_runs.items())
        made = dataclasses.replace(made, sweep=f"{sum(kept_runs.values())} of its runs, made before: {said}")
    made = dataclasses.replace(made, measures=", ".join(MEASURES[name]))
    checks = [dataclasses.asdict(check) for check in report.checks]
    content = {
        "made": dataclasses.asdict(made), "checks": checks, "kept_runs": dict(kept_runs),
        "figures": dict(report.figures),
    }  # fmt: skip
    write_text_durably(folder / f"{name}.json", json.dumps(content, indent=1) + "\n")
    write_text_durably(folder / f"{name}.md", page(report, made))
    say(f"{folder / name}.md")
    for check in report.checks:
        say(f"    {check}")


def _read(path: str) -> str:
    try:
        return Path(path).read_text()
    except OSError:
        return ""
