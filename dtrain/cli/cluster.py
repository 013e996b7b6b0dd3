"""``dtrain cluster``: a real Slurm cluster of several hosts on this machine, with links of a given speed."""

from __future__ import annotations

import argparse
import contextlib
import os
import subprocess
from collections.abc import Iterator
from typing import TYPE_CHECKING

from dtrain.cli import add_verb
from dtrain.errors import ConfigError, DtrainError
from dtrain.launchers.environment import CLUSTER

if TYPE_CHECKING:
    from dtrain.cli import Verbs
    from dtrain.slurm.devcluster import Facts

EPILOG = """\
While a cluster is up, `dtrain train launcher=slurm` and the other launcher commands run on its login host
automatically.

examples:
  dtrain cluster up --nodes 4 --bandwidth 100mbit
  dtrain cluster up --nodes 2 --bandwidth 50mbit --latency 10ms
  dtrain cluster exec -- srun -N4 hostname          dtrain cluster exec --host c2 -- ip address
  dtrain cluster shape --bandwidth 20mbit           dtrain cluster cut c2          dtrain cluster heal c2
  dtrain cluster down
"""


def add(verbs: Verbs) -> None:
    """Add ``cluster`` and its verbs."""
    below = add_verb(verbs, "cluster", does="rehearse on a Slurm cluster on one machine", epilog=EPILOG).add_subparsers(
        required=True, metavar="VERB"
    )
    up = add_verb(below, "up", does="start a cluster; it returns when all hosts are idle")
    up.add_argument("--nodes", type=int, default=4, help="hosts that compute (default: %(default)s)")
    up.add_argument("--bandwidth", default="1gbit", help="of each host's link: 50mbit, 1gbit, none (default: 1gbit)")
    up.add_argument("--latency", default="none", help="one way between two hosts: 10ms (default: none)")
    up.add_argument("--cpus-per-node", type=int, default=8, help="that each host claims (default: %(default)s)")
    up.add_argument("--kill-wait", type=int, default=5, help="Slurm's KillWait in seconds (default: %(default)s)")
    up.add_argument("--name", default=os.environ.get(CLUSTER, "dev"), help="(default: dev)")
    up.set_defaults(run=_up)
    for name, does, handler in (
        ("exec", "run a command on the login host, or on another", _exec),
        ("status", "hosts, links, nodes and jobs", _status),
        ("shape", "change the bandwidth of links that are in use", _shape),
        ("cut", "take hosts' links down", _cut),
        ("heal", "take hosts' links up again", _heal),
        ("down", "end a cluster; nothing of it is left, whatever state it is in", _down),
    ):
        verb = add_verb(below, name, does=does)
        verb.add_argument("--name", default=os.environ.get(CLUSTER), help="which cluster, if several are up")
        verb.set_defaults(run=handler, takes_program=name == "exec")
        if name in ("exec", "shape"):
            verb.add_argument("--host", help="this host (default: the login host to exec, all hosts to shape)")
        if name == "shape":
            verb.add_argument("--bandwidth", required=True, help="50mbit, 1gbit, none")
        if name in ("cut", "heal"):
            verb.add_argument("hosts", nargs="+", metavar="HOST")
        if name == "down":
            verb.add_argument("--all", action="store_true", help="every cluster on this machine")


@contextlib.contextmanager
def cluster_errors() -> Iterator[None]:
    """Translate a cluster's errors: a bad request is a `ConfigError` (exit code 2), a failure a `DtrainError` (1)."""
    from dtrain.slurm.devcluster import BadRequest, ClusterError

    try:
        yield
    except BadRequest as error:
        raise ConfigError(str(error)) from error
    except ClusterError as error:
        raise DtrainError(str(error)) from error


def _cluster(chosen: argparse.Namespace) -> Facts:
    from dtrain.slurm.devcluster import named

    _no_words(chosen)
    with cluster_errors():
        return named(chosen.name)


def _no_words(chosen: argparse.Namespace) -> None:
    if chosen.words:
        raise ConfigError(f"{' '.join(chosen.words)}: not understood; see dtrain cluster --help")


def _up(chosen: argparse.Namespace) -> int:
    from dtrain.slurm.devcluster import up

    _no_words(chosen)
    with cluster_errors():
        facts = up(
            nodes=chosen.nodes, bandwidth=chosen.bandwidth, latency=chosen.latency, name=chosen.name,
            cpus_per_node=chosen.cpus_per_node, kill_wait=chosen.kill_wait,
        )  # fmt: skip
    delay = f", latency {chosen.latency} one way" if facts.latency_seconds else ""
    print(f"cluster {facts.name} is up: {len(facts.hosts)} hosts, {chosen.bandwidth} each{delay}")
    print("  dtrain cluster exec -- srun -N2 hostname     dtrain train launcher=slurm launcher.nodes=4 ...")
    return 0


def _exec(chosen: argparse.Namespace) -> int:
    from dtrain.slurm.devcluster import host_command

    facts = _cluster(chosen)
    if not chosen.program:
        raise ConfigError("say what to run, after --: dtrain cluster exec -- sinfo")
    with cluster_errors():
        command, variables = host_command(facts, chosen.program, chosen.host or "login")
    os.execvpe(command[0], command, {**os.environ, **variables})


def _status(chosen: argparse.Namespace) -> int:
    from dtrain.slurm.devcluster import host_command
    from dtrain.slurm.devcluster.state import Rate

    facts = _cluster(chosen)
    delay = f"{facts.latency_seconds * 1000:g} ms one way" if facts.latency_seconds else "the kernel's own"
    print(f"cluster {facts.name}: {len(facts.hosts)} hosts and a login host, latency {delay}")
    for host, address in facts.addresses.items():
        link = "cut off" if host in facts.cut else str(Rate(facts.rates[host])).replace("none", "no limit")
        print(f"  {host:6} {address:15} {link}")
    code = 0
    for question in (["sinfo", "--Node", "--partition=main"], ["squeue"]):
        command, variables = host_command(facts, question)
        print(flush=True)
        code = subprocess.run(command, env={**os.environ, **variables}, check=False).returncode or code
    return code


def _shape(chosen: argparse.Namespace) -> int:
    from dtrain.slurm.devcluster import shape

    facts = _cluster(chosen)
    with cluster_errors():
        shape(facts, chosen.bandwidth, [chosen.host] if chosen.host else [])
    print(f"{chosen.host or 'every host'}: {chosen.bandwidth}")
    return 0


def _cut(chosen: argparse.Namespace) -> int:
    return _links(chosen, heal=False)


def _heal(chosen: argparse.Namespace) -> int:
    return _links(chosen, heal=True)


def _links(chosen: argparse.Namespace, *, heal: bool) -> int:
    from dtrain.slurm.devcluster import cut

    facts = _cluster(chosen)
    with cluster_errors():
        cut(facts, chosen.hosts, heal=heal)
    print(f"{', '.join(chosen.hosts)}: {'joined again' if heal else 'cut off'}")
    return 0


def _down(chosen: argparse.Namespace) -> int:
    from dtrain.slurm.devcluster import down
    from dtrain.slurm.devcluster.cluster import left_behind

    _no_words(chosen)
    with cluster_errors():
        existing = left_behind()
    if chosen.name is None and len(existing) > 1 and not chosen.all:
        raise ConfigError(f"several clusters are here ({', '.join(existing)}): say which, with --name NAME, or --all")
    names = existing if chosen.all or chosen.name is None else [chosen.name]
    unknown = [name for name in names if name not in existing]
    if unknown or not names:
        raise ConfigError(
            f"there is no cluster {' '.join(unknown)}".rstrip() + f" (there are {', '.join(existing) or 'none'})"
        )
    for name in names:
        with cluster_errors():
            down(name)
        print(f"cluster {name} is down; nothing of it is left")
    return 0
