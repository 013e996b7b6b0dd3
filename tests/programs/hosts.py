"""Programs on the hosts of a `dtrain cluster`: the store where members meet, and a Slurm job for each of them."""

from __future__ import annotations

import contextlib
import dataclasses
import json
import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Protocol

from dtrain.slurm.devcluster import login_command

ROOT = Path(__file__).resolve().parents[2]
CLUSTER = "evidence"
"""Where nothing else is said."""
PATIENCE_SECONDS = 600.0


class Named(Protocol):
    """What a program of one process is asked: among other things, where what it finds goes, under which name."""

    @property
    def out(self) -> str: ...

    @property
    def name(self) -> str: ...


def environment(cluster: str = "") -> dict[str, str]:
    """Of a command about ``cluster``; programs of the checkout are found on its hosts, too.

    Without ``cluster``: about the one that ``DTRAIN_CLUSTER`` names, or `CLUSTER`.
    """
    paths = [str(ROOT), *filter(None, [os.environ.get("PYTHONPATH")])]
    chosen = cluster or os.environ.get("DTRAIN_CLUSTER") or CLUSTER
    return {**os.environ, "PYTHONPATH": os.pathsep.join(paths), "DTRAIN_CLUSTER": chosen}


@contextlib.contextmanager
def store(cluster: str = CLUSTER) -> Iterator[str]:
    """``dtrain members`` on the login host; its address."""
    serve = [sys.executable, "-P", "-m", "dtrain", "members", "--port", "29400", "--host", "0.0.0.0"]
    command, variables = login_command(serve, cluster)
    variables = {**environment(cluster), **variables}
    with subprocess.Popen(command, env=variables, stdout=subprocess.PIPE, text=True) as process:
        try:
            assert process.stdout is not None
            yield process.stdout.readline().split()[3].rstrip(";")
        finally:
            process.terminate()


def submit(module: str, asked: Named) -> None:
    """``python -m module JSON`` as a Slurm job of one node, which Slurm does not start again.

    ``asked``: a dataclass, the JSON.
    """
    run = Path(asked.out) / f"run-{asked.name}"
    launch = ["launch", "launcher=slurm", "launcher.nodes=1", "launcher.workers=1", "launcher.max_restarts=0"]
    program = [sys.executable, "-m", module, json.dumps(dataclasses.asdict(asked))]  # type: ignore[call-overload]
    subprocess.run(
        [sys.executable, "-m", "dtrain", *launch, f"run.dir={run}", "--", *program],
        cwd=ROOT, env=environment(), check=True, capture_output=True,
    )  # fmt: skip
