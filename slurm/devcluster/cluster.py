"""A cluster's life: up, exec, status, shape, cut, heal, down."""

from __future__ import annotations

import contextlib
import dataclasses
import os
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Iterator, Sequence
from pathlib import Path

from dtrain.launchers.environment import CLUSTER
from dtrain.slurm.devcluster import daemons, hosts, links, state
from dtrain.slurm.devcluster.state import BadRequest, ClusterError, Facts, Rate, explained

__all__ = ["cut", "devcluster", "down", "host_command", "login_command", "shape", "up"]

NETWORK = "10.66.0"
LOGIN_NUMBER = 254
MOST_HOSTS = 64
MOST_KILL_WAIT = 65533
CUBIC = "allowed-congestion-control"
OWNER = "owner"
ENDING_SECONDS = 5.0


def up(
    *, nodes: int = 4, bandwidth: str = "1gbit", latency: str = "none", name: str = "dev", cpus_per_node: int = 8,
    kill_wait: int = 5, bound: bool = False,
) -> Facts:  # fmt: skip
    """Start a cluster and return when Slurm reports all its hosts idle. A partial start is taken down again.

    Args:
        nodes: hosts that compute, c1 to cN; the login host comes on top.
        bandwidth: of every host's link, in both directions: "100mbit", "1gbit", "none".
        latency: one way, between any two hosts: "10ms", or "none" (the links are then bridged by the kernel).
        kill_wait: seconds between SIGTERM and SIGKILL, as Slurm's KillWait.
        bound: to the calling process: if that has ended without taking the cluster down, the next ``up`` of that name
        does so first. Otherwise a cluster outlives the process that started it.

    Raises:
        BadRequest: the machine lacks something, the name is taken, or a value makes no sense. Nothing was made.
        ClusterError: something failed, a daemon did not start. What was made has been removed, or the message says what
            is left.
    """
    rate, seconds = state.parse_rate(bandwidth), state.parse_latency(latency)
    if not state.NAME.fullmatch(name):
        raise BadRequest(f"{name!r} is no name for a cluster: at most 8 letters and digits, a letter first")
    if not 1 <= nodes <= MOST_HOSTS:
        raise BadRequest(f"--nodes {nodes}: a cluster has 1 to {MOST_HOSTS} hosts")
    if cpus_per_node < 1:
        raise BadRequest(f"--cpus-per-node {cpus_per_node}: a host has 1 at least")
    if not 0 <= kill_wait <= MOST_KILL_WAIT:
        raise BadRequest(f"--kill-wait {kill_wait}: Slurm takes 0 to {MOST_KILL_WAIT} seconds")
    daemons.check_machine(tun=seconds > 0)
    if _inherit(name):
        down(name)
    _take(name, bound=bound)
    computing = tuple(f"c{number}" for number in range(1, nodes + 1))
    addresses = {host: f"{NETWORK}.{number}" for number, host in enumerate(computing, 1)}
    addresses["login"] = f"{NETWORK}.{LOGIN_NUMBER}"
    rates: dict[str, int | None] = {**dict.fromkeys(computing, rate.bits), "login": None}
    facts = Facts(name, computing, addresses, {}, rates, latency_seconds=seconds)
    try:
        with explained(f"cluster {name} did not start"):
            return _start(facts, cpus=cpus_per_node, kill_wait=kill_wait)
    except BaseException as error:
        try:
            down(name)
        except ClusterError as second:
            raise ClusterError(
                f"{error or type(error).__name__}. What it had made is not all gone: {second}"
            ) from error
        raise


def _inherit(name: str) -> bool:
    """Whether a process that has ended left a cluster of that name; it is then bound to this process."""
    owner = state.ROOT / name / OWNER
    if not owner.exists():
        return False
    with explained(f"cannot see whose cluster {name} is"), state.locked():
        # Checked again under the lock: of two processes that find it at once, one inherits, and the other finds that
        # one alive.
        if not owner.exists() or state.alive(owner.read_text()):
            return False
        owner.write_text(state.this_process())
        return True


def _take(name: str, *, bound: bool = False) -> None:
    """Make the cluster's folder. The process that makes it owns the name: two at once must not take each other down."""
    folder = state.ROOT / name
    # Under the lock, as a cluster that ends at the same time would restore the old value of the kernel's setting.
    with explained(f"cannot begin cluster {name}"), state.locked():
        if links.namespaces(name) or folder.exists():
            raise BadRequest(f"cluster {name} is up, or left something behind: dtrain cluster down --name {name}")
        folder.mkdir()
        try:
            if bound:
                (folder / OWNER).write_text(state.this_process())
            links.allow_cubic(state.ROOT / CUBIC)
        except BaseException:
            shutil.rmtree(folder)
            raise


def _start(facts: Facts, *, cpus: int, kill_wait: int) -> Facts:
    name, folder, addresses = facts.name, facts.folder, facts.addresses
    _prepare(folder, addresses)
    conf = daemons.slurm_conf(name, folder, addresses, cpus=cpus, kill_wait=kill_wait)
    facts.slurm_conf.write_text(conf)
    links.create([links.namespace(name, host) for host in (*addresses, "switch")])
    facts.write()
    facts = _switch(facts) if facts.latency_seconds else _bridge(facts)
    pids = {host: hosts.hold(links.namespace(name, host), host, folder) for host in addresses}
    facts = dataclasses.replace(facts, pids=pids)
    facts.write()
    daemons.start(folder, pids, facts.hosts)
    daemons.wait_until_idle(folder, pids["login"], len(facts.hosts))
    return facts


def _prepare(folder: Path, addresses: dict[str, str]) -> None:
    for subfolder in ("munge", "spool"):
        (folder / subfolder).mkdir(parents=True)
    (folder / "munge").chmod(0o755)
    (folder / "hosts").write_text(hosts.hosts_file(addresses))
    (folder / "nsswitch.conf").write_text("passwd: files\ngroup: files\nshadow: files\nhosts: files\n")
    (folder / "resolv.conf").write_text("")


def _bridge(facts: Facts) -> Facts:
    switch = links.namespace(facts.name, "switch")
    links.bridge(switch)
    for host, address in facts.addresses.items():
        inside = links.namespace(facts.name, host)
        links.connect(switch, inside, host, address)
        links.shape(switch, inside, host, Rate(facts.rates[host]))
    return facts


def _switch(facts: Facts) -> Facts:
    """The links of a cluster with latency: TUN devices of one process, which lives in the switch's namespace."""
    ready, log = facts.folder / "switch.ready", facts.folder / "switch.log"
    inside = f"--net=/run/netns/{links.namespace(facts.name, 'switch')}"
    program = [sys.executable, "-P", "-m", "dtrain.slurm.devcluster.switch", str(facts.folder)]
    hosts.spawn(["nsenter", inside, *program], log)
    hosts.wait_for(ready, log, "the switch")
    for host, address in facts.addresses.items():
        links.address(links.namespace(facts.name, host), address)
    facts = dataclasses.replace(facts, switch_pid=int(ready.read_text()))
    facts.write()
    return facts


def host_command(facts: Facts, argv: Sequence[str], host: str = "login") -> tuple[list[str], dict[str, str]]:
    """The command line that runs ``argv`` on a host, and the variables to set for it."""
    if host not in facts.pids:
        raise BadRequest(f"cluster {facts.name} has no host {host} (there are {', '.join(facts.pids)})")
    variables = {"SLURM_CONF": str(facts.slurm_conf), CLUSTER: facts.name}
    return hosts.enter(facts.pids[host], argv), variables


def login_command(argv: Sequence[str], name: str | None = None) -> tuple[list[str], dict[str, str]]:
    """`host_command` on the login host of the only cluster that is up. Raises ``ClusterError`` if there is not one."""
    return host_command(state.named(name), argv)


def shape(facts: Facts, bandwidth: str, only: Sequence[str] = ()) -> Facts:
    """Change the rate of every link, or of those of the hosts ``only``, while they are in use."""
    rate = state.parse_rate(bandwidth)
    chosen = _known(facts, only) or facts.hosts
    facts = dataclasses.replace(facts, rates={**facts.rates, **dict.fromkeys(chosen, rate.bits)})
    facts.write()
    if facts.switch_pid:
        _tell_switch(facts)
        return facts
    with explained(f"cannot shape the links of cluster {facts.name}"):
        for host in chosen:
            links.shape(links.namespace(facts.name, "switch"), links.namespace(facts.name, host), host, rate)
    return facts


def cut(facts: Facts, only: Sequence[str], *, heal: bool = False) -> Facts:
    """Take the links of hosts down, or up again."""
    chosen = _known(facts, only)
    cut_hosts = set(facts.cut) - set(chosen) if heal else set(facts.cut) | set(chosen)
    facts = dataclasses.replace(facts, cut=tuple(sorted(cut_hosts)))
    facts.write()
    if facts.switch_pid:
        _tell_switch(facts)
        return facts
    with explained(f"cannot {'heal' if heal else 'cut'} the links of cluster {facts.name}"):
        for host in chosen:
            links.cut(links.namespace(facts.name, "switch"), host, up=heal)
    return facts


def _tell_switch(facts: Facts) -> None:
    """Have the switch read the facts again. Raises ``ClusterError`` if it has ended, even if its pid is reused."""
    try:
        words = Path(f"/proc/{facts.switch_pid}/cmdline").read_bytes().decode().split("\0")
    except OSError:
        words = []
    if str(facts.folder) not in words:
        raise ClusterError(
            f"the switch of cluster {facts.name} has ended; see {facts.folder}/switch.log, then take it down"
        )
    os.kill(facts.switch_pid, signal.SIGHUP)


def _known(facts: Facts, chosen: Sequence[str]) -> tuple[str, ...]:
    for host in chosen:
        if host not in facts.addresses:
            names = ", ".join(facts.addresses)
            raise BadRequest(f"cluster {facts.name} has no host {host} (there are {names})")
    return tuple(chosen)


def down(name: str) -> None:
    """End a cluster and leave nothing of it behind, whatever state it is in; nothing happens if there is none.

    Raises ``ClusterError`` with what could not be ended or removed.
    """
    with explained(f"cannot take cluster {name} down"):
        _end(name)


def _end(name: str) -> None:
    names = links.namespaces(name)
    for number in (signal.SIGTERM, signal.SIGKILL):
        deadline = time.monotonic() + ENDING_SECONDS
        while (alive := _alive(names)) and time.monotonic() < deadline:
            for pid in alive:
                with contextlib.suppress(ProcessLookupError):
                    os.kill(pid, number)
            time.sleep(0.1)
    left = _alive(names)
    if left:
        raise ClusterError(f"processes {left} of cluster {name} cannot be ended; look at them, then run this again")
    links.remove(name)
    if not state.ROOT.is_dir():
        return
    with state.locked():
        if (state.ROOT / name).is_dir():
            shutil.rmtree(state.ROOT / name)
        if not any(path.is_dir() for path in state.ROOT.iterdir()):
            links.restore_cubic(state.ROOT / CUBIC)
            state.ROOT.rmdir()


def _alive(names: Sequence[str]) -> list[int]:
    """Processes of the cluster, without zombies, whose parent may be any process."""
    pids = []
    for pid in links.processes(names):
        with contextlib.suppress(OSError):
            if Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] not in "ZX":
                pids.append(pid)
    return [pid for pid in pids if pid != os.getpid()]


def left_behind() -> list[str]:
    """Names of clusters that are up, and of those that left a folder or a namespace."""
    daemons.check_library()
    from pyroute2 import netns

    folders = [path.name for path in state.ROOT.iterdir() if path.is_dir()] if state.ROOT.is_dir() else []
    spaces = [name.split("-")[1] for name in netns.listnetns() if name.startswith(f"{links.PREFIX}-")]
    return sorted({*folders, *spaces})


@dataclasses.dataclass
class Cluster:
    """A cluster in a test or a program."""

    facts: Facts

    def run(
        self, argv: Sequence[str], *, host: str = "login", seconds: float = 60.0, check: bool = True
    ) -> subprocess.CompletedProcess[str]:
        """Run a command on a host; raises ``subprocess.CalledProcessError`` unless ``check`` is off."""
        command, variables = host_command(self.facts, argv, host)
        return subprocess.run(
            command, env={**os.environ, **variables}, stdin=subprocess.DEVNULL, capture_output=True, text=True,
            timeout=seconds, check=check,
        )  # fmt: skip

    def shape(self, bandwidth: str, *only: str) -> None:
        self.facts = shape(self.facts, bandwidth, only)

    def cut(self, *only: str) -> None:
        self.facts = cut(self.facts, only)

    def heal(self, *only: str) -> None:
        self.facts = cut(self.facts, only, heal=True)


@contextlib.contextmanager
def devcluster(
    *, nodes: int = 4, bandwidth: str = "1gbit", latency: str = "none", name: str = "dev", kill_wait: int = 5
) -> Iterator[Cluster]:
    """A cluster that is up within the block. If this process is killed, the next cluster of that name clears it away.

    with devcluster(nodes=2, bandwidth="100mbit") as cluster:
        print(cluster.run(["srun", "-N2", "hostname"]).stdout)
    """
    facts = up(nodes=nodes, bandwidth=bandwidth, latency=latency, name=name, kill_wait=kill_wait, bound=True)
    try:
        yield Cluster(facts)
    finally:
        down(name)
