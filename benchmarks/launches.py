"""Measuring programs of benchmarks on the hosts of the cluster that is up."""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Callable, Mapping
from pathlib import Path

from benchmarks.harness import Session, say
from tests.programs.hosts import CLUSTER, ROOT, environment


def on_hosts(session: Session, ranks: int, module: str, asked: Callable[[str], Mapping[str, object]]) -> Path:
    """Run ``python -m module JSON`` with one rank on each host; returns the file that rank 0 was to write.

    ``asked``: from that file's path to what the JSON says. Raises ``RuntimeError`` with what was printed.
    """
    folder = session.folder / f"{module.rpartition('.')[2]}-{next(session.numbers)}"
    folder.mkdir(parents=True)
    given = asked(str(folder / "found.json"))
    launch = [
        "launch", "launcher=slurm", f"launcher.nodes={ranks}", f"launcher.workers={ranks}", "launcher.wait=true",
        f"run.dir={folder / 'run'}", "--", sys.executable, "-m", module,
    ]  # fmt: skip
    say(f"dtrain launch launcher=slurm launcher.nodes={ranks} -- python -m {module} {given}")
    done = subprocess.run(
        [sys.executable, "-m", "dtrain", *launch, json.dumps(given)],
        cwd=ROOT, env=environment(CLUSTER), capture_output=True, text=True, check=False,
    )  # fmt: skip
    if done.returncode:
        raise RuntimeError(f"dtrain {' '.join(launch)} failed: {done.stdout[-3000:]}{done.stderr[-3000:]}")
    return folder / "found.json"
