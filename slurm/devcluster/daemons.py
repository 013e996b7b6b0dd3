"""munged, slurmctld and slurmd of a cluster, and the one configuration that they share."""

from __future__ import annotations

import os
import secrets
import shutil
import subprocess
import time
from collections.abc import Mapping, Sequence
from pathlib import Path

from dtrain.slurm.devcluster.hosts import enter
from dtrain.slurm.devcluster.state import BadRequest, ClusterError

__all__ = ["check_library", "check_machine", "slurm_conf", "start", "wait_until_idle"]

TEMPLATES = Path(__file__).resolve().parents[1]
NEEDED = {"slurmctld": "slurm-wlm", "slurmd": "slurm-wlm", "munged": "munge", "nsenter": "util-linux"}
SECONDS = 30.0
TUN = Path("/dev/net/tun")


def check_machine(*, tun: bool = False) -> None:
    """Raise ``BadRequest`` naming what a cluster needs and this machine lacks. ``tun``: it has links with latency."""
    if os.geteuid() != 0:
        raise BadRequest(
            "a cluster needs root: it makes network namespaces, and Slurm's daemons insist on setgroups; run "
            "`sudo .venv/bin/dtrain cluster up`. Without root, `dtrain train` and `dtrain bench` work on this machine "
            "as it is"
        )
    missing = {package for command, package in NEEDED.items() if shutil.which(command) is None}
    if missing:
        raise BadRequest(f"a cluster needs {', '.join(NEEDED)}; run: apt-get install -y {' '.join(sorted(missing))}")
    check_library()
    if tun:
        try:
            TUN.open("rb").close()
        except OSError as error:
            raise BadRequest(
                f"links with latency need {TUN}, which cannot be opened ({error.strerror}); run: modprobe tun (in a "
                f"container: --device {TUN}), or leave out --latency"
            ) from error


def check_library() -> None:
    """Raise ``BadRequest`` if pyroute2, which makes links, is not installed."""
    try:
        import pyroute2  # noqa: F401
    except ImportError as error:
        raise BadRequest("a cluster needs pyroute2; run: pip install 'dtrain[cluster]'") from error


def slurm_conf(
    name: str, folder: Path, addresses: Mapping[str, str], *, cpus: int = 8, memory: int = 16000, kill_wait: int = 5
) -> str:
    """The text of slurm.conf for the hosts of ``addresses`` other than login. ``memory`` in MiB."""
    import jinja2

    loader = jinja2.FileSystemLoader(TEMPLATES)
    environment = jinja2.Environment(
        loader=loader, undefined=jinja2.StrictUndefined, trim_blocks=True, keep_trailing_newline=True
    )
    nodes = [host for host in addresses if host != "login"]
    return environment.get_template("slurm.conf.j2").render(
        name=name, folder=folder, addresses=addresses, nodes=nodes, cpus=cpus, memory=memory, kill_wait=kill_wait
    )


def start(folder: Path, pids: Mapping[str, int], nodes: Sequence[str]) -> None:
    """Start the daemons; they fork into the background once they are ready."""
    key = folder / "munge.key"
    key.touch(mode=0o600)
    key.write_bytes(secrets.token_bytes(1024))
    key.chmod(0o400)
    munge = folder / "munge"
    _daemon(
        pids["login"], folder, "munged",
        ["munged", "--force", f"--key-file={key}", f"--socket={munge}/munge.socket.2",
         f"--pid-file={folder}/munged.pid", f"--log-file={folder}/munged.log", f"--seed-file={folder}/munge.seed"],
    )  # fmt: skip
    (folder / "state").mkdir()
    _daemon(pids["login"], folder, "slurmctld", ["slurmctld", "-c", "-f", str(folder / "slurm.conf")])
    for node in nodes:
        (folder / "spool" / node).mkdir(parents=True)
        _daemon(pids[node], folder, f"slurmd-{node}", ["slurmd", "-N", node, "-f", str(folder / "slurm.conf")])


def _daemon(pid: int, folder: Path, name: str, argv: Sequence[str]) -> None:
    try:
        done = subprocess.run(
            enter(pid, argv, directory="/"), stdin=subprocess.DEVNULL, capture_output=True, text=True, timeout=SECONDS,
            check=False,
        )  # fmt: skip
    except subprocess.TimeoutExpired as error:
        raise ClusterError(f"{name} was not ready after {SECONDS:g} s {_last(folder, name)}".rstrip()) from error
    if done.returncode:
        raise ClusterError(f"{name} did not start: {done.stderr.strip() or done.stdout.strip()} {_last(folder, name)}")


def wait_until_idle(folder: Path, login: int, nodes: int) -> None:
    """Return when Slurm reports every node idle. Raises ``ClusterError`` with the daemons' last errors."""
    deadline = time.monotonic() + SECONDS
    environment = {**os.environ, "SLURM_CONF": str(folder / "slurm.conf")}
    command = enter(login, ["sinfo", "--noheader", "--partition=main", "--Node", "--format=%N %t"], directory="/")
    while True:
        done = subprocess.run(
            command, env=environment, stdin=subprocess.DEVNULL, capture_output=True, text=True, check=False,
            timeout=SECONDS,
        )  # fmt: skip
        states = [line.split()[1] for line in done.stdout.splitlines() if line.count(" ") == 1]
        if len(states) == nodes and all(state == "idle" for state in states):
            return
        if time.monotonic() > deadline:
            logs = " ".join(_last(folder, path.stem) for path in sorted(folder.glob("slurm*.log")))
            raise ClusterError(f"after {SECONDS:g} s the nodes are {states or done.stderr.strip()}: {logs}")
        time.sleep(0.2)


def _last(folder: Path, name: str) -> str:
    """The last error in a daemon's log, which shows the cause."""
    path = folder / f"{name}.log"
    lines = path.read_text(errors="replace").splitlines() if path.exists() else []
    errors = [line for line in lines if "error" in line.lower() or "fatal" in line.lower()]
    return f"({name}: {(errors or lines)[-1]})" if lines else ""
