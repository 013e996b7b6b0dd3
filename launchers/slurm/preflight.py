"""What Slurm would refuse, or accept and never start, found out before anything is submitted."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

from dtrain.launchers.slurm.client import Partition, partitions
from dtrain.launchers.slurm.settings import SlurmSettings

__all__ = ["problems"]

LOCAL_FILE_SYSTEMS = ("tmpfs", "ramfs", "devtmpfs")
LOCAL_FOLDERS = ("/tmp", "/var/tmp", "/dev/shm", "/scratch/local", "/local")


def problems(settings: SlurmSettings, folder: Path, *, one_machine: bool = False) -> list[str]:
    """Everything that speaks against the job, each with the value and the way out; empty if nothing does.

    ``one_machine``: all nodes are hosts of this machine (`dtrain cluster`), which share all of its disks.

    Raises ``SlurmError`` where Slurm is missing or silent.
    """
    known = partitions()
    return [*settings.problems(), *_partition(settings, known), *([] if one_machine else _folder(folder))]


def _partition(settings: SlurmSettings, known: list[Partition]) -> Iterator[str]:
    wanted = [group.partition or settings.partition for group in settings.groups] or [settings.partition]
    nodes = [group.nodes for group in settings.groups] or [settings.nodes]
    names = ", ".join(partition.name for partition in known) or "none"
    for name, count in zip(wanted, nodes, strict=True):
        chosen = [partition for partition in known if (partition.name == name if name else partition.default)]
        if not chosen:
            what = f"there is no partition {name}" if name else "the cluster has no default partition"
            yield f"{what} (there are {names}); set launcher.partition"
            continue
        partition = chosen[0]
        if not partition.up:
            yield f"partition {partition.name} is not up; choose another (there are {names})"
        if count > partition.nodes:
            yield (
                f"launcher.nodes={count}, but partition {partition.name} has {partition.nodes} nodes, so the job would "
                "wait for ever; take fewer, or another partition"
            )
        if partition.minutes is not None and settings.minutes > partition.minutes:
            yield (
                f"launcher.minutes={settings.minutes} is more than partition {partition.name} allows, which is "
                f"{partition.minutes}; the job goes on after each limit, so set launcher.minutes={partition.minutes}"
            )


def _folder(folder: Path) -> Iterator[str]:
    """A folder of a node's own disk is another one on every node, and lost with the node."""
    existing = folder.absolute()
    while not existing.exists():
        existing = existing.parent
    real = existing.resolve()
    kind = _file_system(real)
    if kind in LOCAL_FILE_SYSTEMS or any(real.is_relative_to(local) for local in LOCAL_FOLDERS):
        yield (
            f"{folder} is on a disk of this machine alone ({kind} at {real}), which the nodes of the job do not see; "
            "choose run.dir on a file system that all nodes share"
        )


def _file_system(path: Path) -> str:
    """The type of the file system that holds ``path``."""
    best, kind = "", "unknown"
    try:
        lines = Path("/proc/mounts").read_text().splitlines()
    except OSError:
        return kind
    for line in lines:
        _, mount, found, *_ = line.split()
        mount = mount.replace("\\040", " ")
        if len(mount) >= len(best) and (path == Path(mount) or path.is_relative_to(mount)):
            best, kind = mount, found
    return kind
