"""Slurm's commands without Slurm: jobs are processes of this machine, whatever nodes they believe to be on.

For tests of what submits, watches and cancels jobs. It knows the commands and options that dtrain's launcher uses, and
refuses all others. What it does not do: schedule, limit time or memory, or keep nodes apart.

    with FakeSlurm(nodes=2):
        job = SlurmLauncher(nodes=2, workers=2).submit(["python", "train.py"], folder=folder)
"""

from __future__ import annotations

import contextlib
import fcntl
import json
import os
import re
import shlex
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

__all__ = ["FakeSlurm"]

COMMANDS = ("sbatch", "srun", "squeue", "scontrol", "scancel", "sinfo")
FOLDER, CLUSTER = "DTRAIN_FAKE_SLURM", "DTRAIN_CLUSTER"
PROGRAM = (sys.executable, "-I", "-S", str(Path(__file__).resolve()))  # by its path: the package would import torch
Job = dict[str, Any]


class FakeSlurm:
    """Context manager: while it is open, Slurm's commands on PATH are these. ``nodes``: n1 to nN."""

    def __init__(self, nodes: int = 2) -> None:
        self.nodes = nodes

    def __enter__(self) -> FakeSlurm:
        self.folder = Path(tempfile.mkdtemp(prefix="dtrain-fake-slurm-"))
        (self.folder / "bin").mkdir()
        (self.folder / "jobs").mkdir()
        (self.folder / "nodes").write_text(str(self.nodes))
        for name in COMMANDS:
            path = self.folder / "bin" / name
            path.write_text(f'#!/bin/sh\nexec {shlex.join(PROGRAM)} {name} "$@"\n')
            path.chmod(0o755)
        (self.folder / "slurm.conf").write_text("ClusterName=fake\n")
        self._old = {name: os.environ.get(name) for name in ("PATH", FOLDER, "SLURM_CONF")}
        os.environ["SLURM_CONF"] = str(self.folder / "slurm.conf")
        os.environ["PATH"] = f"{self.folder / 'bin'}{os.pathsep}{os.environ['PATH']}"
        os.environ[FOLDER] = str(self.folder)
        return self

    def __exit__(self, *_: object) -> None:
        for path in (self.folder / "jobs").glob("*.json"):
            _signal(json.loads(path.read_text()), signal.SIGKILL, script=True)
        for name, value in self._old.items():
            if value is None:
                os.environ.pop(name, None)
            else:
                os.environ[name] = value
        shutil.rmtree(self.folder, ignore_errors=True)


# ---- jobs ----------------------------------------------------------------------------------------------------------


def _folder() -> Path:
    return Path(os.environ[FOLDER])


@contextlib.contextmanager
def _job(number: str) -> Iterator[Job]:
    """A job's record, to be changed within the block. Raises what Slurm says of a job that there is not."""
    path = _folder() / "jobs" / f"{number}.json"
    if not path.exists():
        raise SystemExit("slurm_load_jobs error: Invalid job id specified")
    with path.open("r+") as file:
        fcntl.flock(file, fcntl.LOCK_EX)
        job: Job = json.loads(file.read())
        yield job
        file.seek(0)
        file.write(json.dumps(job))
        file.truncate()


def _signal(job: Job, number: int, *, script: bool) -> None:
    """To every rank; to the batch script too where Slurm would."""
    for pid in [*job["tasks"], *([job["script_pid"]] if script else [])]:
        with contextlib.suppress(ProcessLookupError, PermissionError):
            os.kill(pid, number)


def _sbatch(arguments: Sequence[str]) -> int:
    if arguments == ["--version"]:
        print("slurm 22.05.8")
        return 0
    (script,) = arguments
    options: dict[str, str] = {}
    for line in Path(script).read_text().splitlines():
        if line.startswith("#SBATCH --"):
            name, _, value = line.removeprefix("#SBATCH --").partition("=")
            options.setdefault(name, "".join(shlex.split(value)))
    nodes = int(options.get("nodes", "1"))
    if nodes > int((_folder() / "nodes").read_text()):
        print(
            "sbatch: error: Batch job submission failed: Requested node configuration is not available", file=sys.stderr
        )
        return 1
    number = str(1 + len(list((_folder() / "jobs").glob("*.json"))))
    elements = _elements(options.get("array", ""))
    for element in elements:
        name = number if element is None else f"{number}_{element}"
        copy = _folder() / "jobs" / f"{name}.sh"
        shutil.copy(script, copy)
        job: Job = {
            "id": name, "script": str(copy), "state": "PENDING", "restarts": 0, "tasks": [], "script_pid": 0,
            "steps": {}, "per_node": int(options.get("ntasks-per-node", "1")),
            "nodes": [f"n{node}" for node in range(1, nodes + 1)],
            "output": options.get("output", "/dev/null").replace("%a", str(element)).replace("%%", "%"), "again": False,
            "started": time.time(), "minutes": int(options.get("time", "60")), "directory": os.getcwd(),
            "name": options.get("job-name", "sbatch"),
        }  # fmt: skip
        (_folder() / "jobs" / f"{name}.json").write_text(json.dumps(job))
        subprocess.Popen(
            [*PROGRAM, "slurmd", name], start_new_session=True,
            stdin=subprocess.DEVNULL, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL,
        )  # fmt: skip
    print(f"Submitted batch job {number}")
    return 0


def _elements(array: str) -> list[int | None]:
    found = re.match(r"(\d+)-(\d+)", array)
    return list(range(int(found[1]), int(found[2]) + 1)) if found else [None]


def _slurmd(arguments: Sequence[str]) -> int:
    """Run a job's script, again as often as it is requeued."""
    (name,) = arguments
    while True:
        with _job(name) as job:
            job |= {"state": "RUNNING", "again": False, "tasks": [], "steps": {}, "started": time.time()}
            nodes, array = job["nodes"], name.partition("_")
            environment = {
                **os.environ, "SLURM_JOB_ID": name.replace("_", "00"), "SLURM_JOB_NODELIST": ",".join(nodes),
                "SLURM_NNODES": str(len(nodes)), "SLURM_NTASKS": str(len(nodes) * job["per_node"]),
                "DTRAIN_FAKE_JOB": name,
            }  # fmt: skip
            if job["restarts"]:
                environment["SLURM_RESTART_COUNT"] = str(job["restarts"])
            if array[1]:
                environment |= {"SLURM_ARRAY_JOB_ID": array[0], "SLURM_ARRAY_TASK_ID": array[2]}
            with open(job["output"], "ab") as output:
                script = subprocess.Popen(
                    ["bash", job["script"]], env=environment, cwd=job["directory"], stdin=subprocess.DEVNULL,
                    stdout=output, stderr=output,
                )  # fmt: skip
            job["script_pid"] = script.pid
        code = script.wait()
        with _job(name) as job:
            if not job["again"]:
                if job["state"] != "CANCELLED":
                    job["state"] = "COMPLETED" if code == 0 else "FAILED"
                return 0
            job["restarts"] += 1


# ---- the other commands --------------------------------------------------------------------------------------------


def _srun(arguments: Sequence[str]) -> int:
    """Start the tasks of a step and end them all when one fails."""
    options: dict[str, str] = {}
    words = list(arguments)
    while words and words[0].startswith("--"):
        name, _, value = words.pop(0).removeprefix("--").partition("=")
        options[name] = value
    name = os.environ["DTRAIN_FAKE_JOB"]
    with _job(name) as job:
        if job["again"] or job["state"] != "RUNNING":
            raise SystemExit("srun: error: Unable to create step for job: Job/step already completing or completed")
        nodes, per_node = job["nodes"], int(options.get("ntasks-per-node", job["per_node"]))
        count = int(options.get("ntasks", len(nodes) * per_node))
        step, tasks = str(len(job["steps"])), []
        for rank in range(count):
            place = {
                "SLURM_STEP_ID": step, "SLURM_PROCID": rank, "SLURM_LOCALID": rank % per_node,
                "SLURM_NODEID": rank // per_node, "SLURM_NTASKS": count, "SLURM_NNODES": len(nodes),
                "SLURM_STEP_TASKS_PER_NODE": f"{per_node}(x{-(-count // per_node)})",
            }  # fmt: skip
            environment = {**os.environ, **{key: str(value) for key, value in place.items()}}
            tasks.append(subprocess.Popen(words, env=environment, start_new_session=True))
        job["tasks"] += [task.pid for task in tasks]
        job["steps"][step] = [task.pid for task in tasks]
    worst, failed = 0, False
    while None in [task.poll() for task in tasks]:  # all of them: who has failed is read below
        if not failed and any(task.returncode for task in tasks):
            failed = True
            for task in tasks:
                if task.poll() is None:
                    os.killpg(task.pid, signal.SIGTERM)
        time.sleep(0.05)
    for task in tasks:
        worst = max(worst, task.returncode if task.returncode >= 0 else 128 - task.returncode)
    return worst


def _squeue(arguments: Sequence[str]) -> int:
    options = _options(arguments, ("jobs", "format"))
    with _job(_name(options["jobs"])) as job:
        if "steps" in options:
            steps = [step for step, tasks in job["steps"].items() if any(_alive(task) for task in tasks)]
            print("\n".join(f"{options['jobs']}.{step}" for step in ("batch", *steps)))
        elif job["state"] in ("PENDING", "RUNNING"):
            left = max(0, int(60 * job["minutes"] - (time.time() - job["started"])))
            print({"%T": job["state"], "%L": f"{left // 60}:{left % 60:02d}"}[options["format"]])
    return 0


def _alive(pid: int) -> bool:
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] not in "ZX"
    except OSError:
        return False


def _scontrol(arguments: Sequence[str]) -> int:
    match list(arguments):
        case ["show", "hostnames", nodes]:
            print("\n".join(nodes.split(",")))
        case ["show", "job", "--oneliner", number]:
            with _job(_name(number)) as job:
                nodes = ",".join(job["nodes"])
                reason = "Resources" if job["state"] == "PENDING" else "None"
                print(
                    f"JobId={job['id']} JobName={job['name']} JobState={job['state']} Reason={reason} "
                    f"Restarts={job['restarts']} NodeList={nodes} StdOut={job['output']} "
                )
        case ["show", "config"]:
            print(f"Configuration data as of now\nClusterName             = {os.environ.get(CLUSTER, 'fake')}")
        case ["show", "node", "--oneliner", node]:
            print(f"NodeName={node} NodeAddr=127.0.0.1 State=IDLE")
        case ["requeue", number]:
            with _job(_name(number)) as job:
                job["again"] = True
                _signal(job, signal.SIGTERM, script=True)
        case _:
            raise SystemExit(f"FakeSlurm knows no scontrol {shlex.join(arguments)}")
    return 0


def _scancel(arguments: Sequence[str]) -> int:
    number, _, step = arguments[-1].partition(".")
    with _job(_name(number)) as job:
        if step:
            for task in job["steps"][step]:
                with contextlib.suppress(ProcessLookupError):
                    os.killpg(task, signal.SIGKILL)
        elif len(arguments) == 2 and arguments[0].startswith("--signal="):
            _signal(
                job, signal.Signals[f"SIG{arguments[0].removeprefix('--signal=').removeprefix('SIG')}"], script=False
            )
        else:
            job["state"] = "CANCELLED"
            _signal(job, signal.SIGTERM, script=True)
    return 0


def _sinfo(arguments: Sequence[str]) -> int:
    if _options(arguments, ("format",))["format"] != "%P|%D|%l|%a":
        raise SystemExit(f"FakeSlurm knows no sinfo {shlex.join(arguments)}")
    print(f"main*|{(_folder() / 'nodes').read_text()}|infinite|up")
    return 0


def _options(arguments: Sequence[str], with_value: Sequence[str]) -> dict[str, str]:
    found, words = {}, iter(arguments)
    for word in words:
        name, equals, value = word.removeprefix("--").partition("=")
        found[name] = value if equals or name not in with_value else next(words)
    return found


def _name(number: str) -> str:
    """The record of a job by the number that its script knows."""
    return number.replace("00", "_") if "00" in number else number


PROGRAMS: dict[str, Callable[[Sequence[str]], int]] = {
    "sbatch": _sbatch, "slurmd": _slurmd, "srun": _srun, "squeue": _squeue, "scontrol": _scontrol,
    "scancel": _scancel, "sinfo": _sinfo,
}  # fmt: skip

if __name__ == "__main__":
    sys.exit(PROGRAMS[sys.argv[1]](sys.argv[2:]))
