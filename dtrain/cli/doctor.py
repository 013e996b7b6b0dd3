"""``dtrain doctor``: is this machine, or every node of an allocation, fit for training?"""

from __future__ import annotations

import argparse
import dataclasses
import json
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from dtrain.cli import LAUNCHER_WORDS, add_config_dir, add_verb, words_of
from dtrain.cli.login_host import enter_launcher
from dtrain.cli.submit import refusals, require_sound, warn
from dtrain.errors import ConfigError, DtrainError
from dtrain.extras import OF_LAUNCHING, require

if TYPE_CHECKING:
    from dtrain.cli import Verbs
    from dtrain.doctor.verdict import Report

EPILOG = """\
Names both ways, ports, interfaces, clocks, disk, backend and versions, and bandwidth and latency of every pair of
nodes; the slow node is named. It ends with exit code 1 if there is a problem.

examples:
  dtrain doctor
  dtrain doctor launcher=slurm launcher.nodes=4 run.dir=doctor/today
"""
SECONDS = 600.0


def add(verbs: Verbs) -> None:
    """Add ``doctor``."""
    doctor = add_verb(verbs, "doctor", does="check this machine, or every node of an allocation", epilog=EPILOG)
    doctor.add_argument("--json", action="store_true", help="print the findings as JSON")
    add_config_dir(doctor)
    doctor.add_argument("words", nargs="*", metavar="OVERRIDE", help="launcher=..., launcher.KEY=..., run.dir=FOLDER")
    doctor.set_defaults(run=_doctor)


def _doctor(chosen: argparse.Namespace) -> int:
    require(OF_LAUNCHING)
    from dtrain.doctor import verdict
    from dtrain.train.config import run_folder
    from dtrain.train.config.composition import compose_named

    for word in chosen.words:
        if not word.lstrip("+").startswith(LAUNCHER_WORDS):
            raise ConfigError(f"{word}: doctor takes launcher=..., launcher.KEY=..., run.dir=FOLDER and @FILE")
    config, named = compose_named(words_of(chosen), name="doctor")
    # One rank per node: more would share what is measured.
    launcher = config.launcher.replaced(workers=config.launcher.nodes, max_restarts=0)
    enter_launcher(launcher, sys.argv[1:])
    folder = Path(config.run.dir).absolute()
    require_sound(launcher)
    warn(launcher.warnings())
    with refusals():
        launcher.check([folder])
        if not named:
            folder = run_folder.made(folder)
        with run_folder.locked(folder):
            for stale in (folder / "doctor").glob("*"):
                stale.unlink()
            job = launcher.start(["python", "-m", "dtrain.doctor.worker", str(folder)], folder=folder, name="doctor")
        job.wait(SECONDS)
    reports = read(folder)
    if not reports:
        raise DtrainError(f"no node has reported anything:\n{job.why()}")
    findings = verdict.findings(reports, launcher.workers)
    if chosen.json:
        print(json.dumps([dataclasses.asdict(finding) for finding in findings], indent=1))
    else:
        print(verdict.render(findings, reports))
    return int(any(finding.level == "problem" for finding in findings))


@dataclass(frozen=True)
class _StoredReport:
    """A rank's report, its lists not yet checked."""

    host: str
    versions: dict[str, str]
    findings: list[object]
    exchanges: list[object]


def read(folder: Path) -> list[Report]:
    """The ranks' reports, in rank order."""
    from dtrain.doctor.finding import Finding
    from dtrain.doctor.pairs import Exchange
    from dtrain.doctor.verdict import Report
    from dtrain.launchers.strict_json import Damaged, json_in, number_in, shaped

    reports = []
    for path in (folder / "doctor").glob("rank-*.json"):
        rank, content = number_in(path.name, "rank-{}.json"), json_in(path)
        if rank is None or not isinstance(content, dict):
            continue  # a rank without a report is a finding
        try:
            stored = shaped(_StoredReport, content)
            findings = tuple(shaped(Finding, finding) for finding in stored.findings)
            exchanges = tuple(shaped(Exchange, entry) for entry in stored.exchanges)
        except Damaged:
            continue
        reports.append(Report(rank, stored.host, stored.versions, findings, exchanges))
    return sorted(reports, key=lambda report: report.rank)
