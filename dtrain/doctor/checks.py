"""Checks of one machine. Each returns its findings, and none takes long."""

from __future__ import annotations

import importlib.metadata
import os
import resource
import shutil
import socket
import time
from collections.abc import Iterator
from pathlib import Path

from dtrain.doctor.finding import Finding

__all__ = ["local_findings", "versions"]

FREE_GB, WRITE_MB, SLOW_MB_PER_S, OPEN_FILES, SHM_MB = 5.0, 64, 20.0, 1024, 64


def local_findings(folder: Path, *, hosts: int = 1) -> list[Finding]:
    """All checks that need no other machine. ``folder``: where runs are to go; it exists.

    ``hosts``: how many there are in all; what is harmless on one machine may be a problem between several.
    """
    host = socket.gethostname()
    return [
        *own_name(host, hosts=hosts),
        *port(host),
        *interfaces(host),
        *disk(host, folder),
        *limits(host),
        *backend(host),
    ]


def own_name(host: str, *, hosts: int = 1) -> Iterator[Finding]:
    """The host's name must resolve to an address that others can reach: gloo publishes it if no interface is set."""
    try:
        addresses = sorted({entry[4][0] for entry in socket.getaddrinfo(host, None, socket.AF_INET)})
    except OSError as error:
        way_out = f"add {host} to /etc/hosts or to DNS, or set launcher.interface and launcher.address"
        yield Finding(host, "own name", "problem", f"{host} does not resolve ({error})", way_out)
        return
    resolved = ", ".join(map(str, addresses))
    if all(str(address).startswith("127.") for address in addresses):
        what = f"{host} is {resolved}, which no other host can reach"
    elif not any(_here(str(address)) for address in addresses):
        what = f"{host} is {resolved}, which is no address of this machine"
    else:
        yield Finding(host, "own name", "ok", f"{host} is {resolved}")
        return
    interface = os.environ.get("GLOO_SOCKET_IFNAME", "")
    if interface:
        yield Finding(host, "own name", "ok", f"{what}, but ranks meet by {interface}")
    elif hosts > 1:
        way_out = "set launcher.interface to the network between the hosts, or mend /etc/hosts: training cannot connect"
        yield Finding(host, "own name", "problem", what, way_out)
    else:
        way_out = "harmless on one machine; between machines set launcher.interface, or mend /etc/hosts"
        yield Finding(host, "own name", "warning", what, way_out)


def _here(address: str) -> bool:
    """Whether it is an address of this machine."""
    try:
        with socket.socket(socket.AF_INET, socket.SOCK_STREAM) as probe:
            probe.bind((address, 0))
    except OSError:
        return False
    return True


def port(host: str) -> Iterator[Finding]:
    """It must be possible to listen at a port."""
    try:
        with socket.create_server(("127.0.0.1", 0)) as listener:
            yield Finding(host, "port", "ok", f"{listener.getsockname()[1]} is free")
    except OSError as error:
        yield Finding(host, "port", "problem", f"no port can be listened on ({error})", "ask whose limits these are")


def interfaces(host: str) -> Iterator[Finding]:
    """The interfaces besides the loopback; several may need a choice."""
    lines = Path("/proc/self/net/dev").read_text().splitlines()[2:]
    names = sorted(name for line in lines if (name := line.partition(":")[0].strip()) != "lo")
    chosen = os.environ.get("GLOO_SOCKET_IFNAME", "")
    if chosen and chosen not in names and chosen != "lo":
        way_out = f"choose one of {', '.join(names)}"
        yield Finding(host, "interface", "problem", f"GLOO_SOCKET_IFNAME={chosen} does not exist", way_out)
    elif len(names) > 1 and not chosen:
        way_out = "if the pairs below are slow, set launcher.interface"
        yield Finding(host, "interface", "ok", f"{', '.join(names)}; gloo takes the one of the host's name", way_out)
    else:
        yield Finding(host, "interface", "ok", chosen or ", ".join(names) or "the loopback alone")


def disk(host: str, folder: Path) -> Iterator[Finding]:
    """Space, and the speed of a durable write of 64 MB."""
    free = shutil.disk_usage(folder).free / 1e9
    yield _unless(free > FREE_GB, host, "disk space", f"{free:.0f} GB free in {folder}", "make room")
    probe = folder / f".doctor-{host}-{os.getpid()}"
    started = time.perf_counter()
    try:
        with probe.open("wb") as file:
            file.write(bytes(WRITE_MB * 1_000_000))
            file.flush()
            os.fsync(file.fileno())
    except OSError as error:
        yield Finding(
            host, "disk write", "problem", f"{folder} cannot be written to ({error})", "choose another run.dir"
        )
        return
    finally:
        probe.unlink(missing_ok=True)
    speed = WRITE_MB / (time.perf_counter() - started)
    way_out = "checkpoints will take long: choose a faster file system for run.dir"
    yield _unless(speed > SLOW_MB_PER_S, host, "disk write", f"{speed:.0f} MB/s, durably", way_out)


def _unless(fine: bool, host: str, check: str, what: str, way_out: str) -> Finding:
    return Finding(host, check, "ok", what) if fine else Finding(host, check, "warning", what, way_out)


def limits(host: str) -> Iterator[Finding]:
    """Open files, which sockets are too, and shared memory for loaders."""
    files = resource.getrlimit(resource.RLIMIT_NOFILE)[0]
    enough = files >= OPEN_FILES or files == resource.RLIM_INFINITY
    yield _unless(enough, host, "open files", f"at most {files}", "ulimit -n 65536")
    shared = shutil.disk_usage("/dev/shm").total / 1e6 if Path("/dev/shm").exists() else 0.0
    way_out = "give the container more (--shm-size), or use loaders without workers"
    yield _unless(shared >= SHM_MB, host, "shared memory", f"/dev/shm has {shared:.0f} MB", way_out)


def backend(host: str) -> Iterator[Finding]:
    """The backend of collectives here."""
    import torch

    if torch.cuda.is_available():
        yield Finding(host, "backend", "ok", f"nccl, {torch.cuda.device_count()} x {torch.cuda.get_device_name(0)}")
    else:
        yield Finding(host, "backend", "ok", f"gloo, no GPU, {os.cpu_count()} cores")


def versions() -> dict[str, str]:
    """What must be equal on all nodes."""
    return {name: importlib.metadata.version(name) for name in ("dtrain", "torch", "numpy")}
