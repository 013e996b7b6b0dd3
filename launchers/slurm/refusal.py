"""What Slurm would refuse, or accept and never start, found before the submission; and what sbatch refuses.

Both are reported with the keys of dtrain that made the directives, the values, and the way out.
"""

from __future__ import annotations

import os
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from dtrain.launchers.slurm.client import Partition, SlurmError, ask, count_of, partitions
from dtrain.launchers.slurm.group import Group

if TYPE_CHECKING:
    from dtrain.launchers.slurm.launcher import SlurmLauncher

__all__ = ["problems", "refusal_message", "too_many_cpus", "unanswered"]

LOCAL_FILE_SYSTEMS = ("tmpfs", "ramfs", "devtmpfs")
MOST_NODES = 1 << 16
OVERCOMMITTED = ("overcommit", "O")
LOCAL_FOLDERS = ("/tmp", "/var/tmp", "/dev/shm", "/scratch/local", "/local")


def problems(settings: SlurmLauncher, folder: Path, *, one_machine: bool = False) -> list[str]:
    """All objections of Slurm to the job, each with the value and the way out; empty if there are none.

    ``one_machine``: all nodes are hosts of this machine (`dtrain cluster`), which share all of its disks.

    Raises ``SlurmError`` where Slurm is missing or silent.
    """
    known = partitions()
    objections = [*_partition(settings, known), *([] if one_machine else _folder(folder))]
    alone = settings.all_workers <= settings.all_nodes and settings.threads_per_worker == 1 and not settings.groups
    if objections or alone:  # every node has one CPU
        return objections
    return list(too_many_cpus(settings, _cpus_of_nodes()))


def _partition(settings: SlurmLauncher, known: list[Partition]) -> Iterator[str]:
    wanted = [group.partition or settings.partition for group in settings.components] or [settings.partition]
    nodes = [group.nodes for group in settings.components] or [settings.nodes]
    names = ", ".join(partition.name for partition in known) or "none"
    for name, count in zip(wanted, nodes, strict=True):
        if not name and not any(partition.default for partition in known):
            yield f"the cluster has no default partition (there are {names}); set launcher.partition"
            continue
        missing = [one for one in name.split(",") if name and one not in {partition.name for partition in known}]
        if missing:
            shell = os.environ.get("SBATCH_PARTITION") == name
            whence = ", which SBATCH_PARTITION of this shell names" if shell else ""
            yield f"there is no partition {', '.join(missing)}{whence} (there are {names}); set launcher.partition"
            continue
        # Of several the job takes the one that lets it start first, so one valid one is enough.
        of_each = [
            list(_of_partition(settings, count, partition, names))
            for partition in known
            if (partition.name in name.split(",") if name else partition.default)
        ]
        if all(of_each):
            yield from dict.fromkeys(problem for of_one in of_each for problem in of_one)


def _of_partition(settings: SlurmLauncher, nodes: int, partition: Partition, names: str) -> Iterator[str]:
    if not partition.up:
        yield f"partition {partition.name} is not up; choose another (there are {names})"
    if partition.nodes is not None and nodes > partition.nodes:
        yield (
            f"launcher.nodes={nodes}, but partition {partition.name} has {partition.nodes} nodes, so the job would "
            "wait for ever; take fewer, or another partition"
        )
    if partition.minutes is not None and settings.minutes > partition.minutes:
        yield (
            f"launcher.minutes={settings.minutes} is more than partition {partition.name} allows, which is "
            f"{partition.minutes}; the job goes on after each limit, so set launcher.minutes={partition.minutes}"
        )


def _cpus_of_nodes() -> dict[str, list[int]]:
    """Of each partition, the CPUs of each of its nodes; the default one is also called "".

    Empty without an answer; without partitions of which a line cannot be read, which Slurm has to judge.
    """
    try:
        answer = ask("sinfo", "--noheader", "--exact", "--format", "%P|%D|%c")
    except SlurmError:  # the check is optional: Slurm decides
        return {}
    cpus_of: dict[str, list[int]] = {}
    unread: set[str] = set()
    for line in answer.splitlines():
        name, _, rest = line.strip().partition("|")
        nodes, _, cpus = rest.partition("|")
        many, count = count_of(nodes), count_of(cpus)
        names = {name.strip().rstrip("*"), *([""] if name.strip().endswith("*") else [])}
        if many is None or count is None or many > MOST_NODES:
            unread |= names
            continue
        for partition in names:
            cpus_of.setdefault(partition, []).extend([count] * many)
    return {name: cpus for name, cpus in cpus_of.items() if name not in unread}


def too_many_cpus(settings: SlurmLauncher, known: Mapping[str, Sequence[int]]) -> Iterator[str]:
    """Ranks whose CPUs no node has. ``known``: of each partition, the CPUs of each of its nodes; "": of the default.

    >>> from dtrain.launchers.slurm.launcher import SlurmLauncher
    >>> list(too_many_cpus(SlurmLauncher(threads_per_worker=64), {"": [8, 64]}))
    []
    """
    if any(directive.lstrip("-").split("=")[0] in OVERCOMMITTED for directive in settings.sbatch):
        return
    whole = Group(nodes=settings.nodes, workers=settings.workers, partition=settings.partition)
    for group in settings.components or (whole,):
        name = group.partition or settings.partition
        # Of several partitions the job takes one: the nodes of that which has the most will do.
        nodes = max((known.get(one, ()) for one in name.split(",")), key=lambda cpus: max(cpus, default=0))
        ranks = -(-group.workers // group.nodes)
        wanted = ranks * settings.threads_per_worker
        if not nodes or sum(cpus >= wanted for cpus in nodes) >= group.nodes:
            continue
        most = sorted(nodes, reverse=True)[min(group.nodes, len(nodes)) - 1]
        where = f"of partition {name}" if name else "of the default partition"
        fits = most // ranks
        way = f"set launcher.threads_per_worker to at most {fits}, or " if fits else ""
        yield (
            f"launcher.threads_per_worker={settings.threads_per_worker} with {ranks} workers on each node takes "
            f"{wanted} CPUs there, but of the {len(nodes)} nodes {where} too few have more than {most}, so the job "
            f"would wait for ever; {way}take more launcher.nodes, fewer launcher.workers, or another launcher.partition"
        )


def _folder(folder: Path) -> Iterator[str]:
    """A folder on a node's own disk differs on every node, and is lost with the node."""
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
        _, mount, file_system, *_ = line.split()
        mount = mount.replace("\\040", " ")
        if len(mount) >= len(best) and (path == Path(mount) or path.is_relative_to(mount)):
            best, kind = mount, file_system
    return kind


# ---- what sbatch says ----------------------------------------------------------------------------------------------

SILENCE = ("Unable to contact slurm controller", "Connection refused", "timed out", "munge")

WORDS = {
    "memory": ("memory",),
    "constraint": ("feature", "constraint"),
    "gpus": ("gres", "gpu", "tres"),
    "partition": ("partition",),
    "account": ("account", "association"),
    "qos": ("qos",),
    "reservation": ("reservation",),
    "exclude": ("node name", "exclude"),
    "time": ("time limit", "time specification"),
    "cpus": ("cpu",),
    "nodes": ("node count", "more processors"),
    "array": ("array",),
    "sbatch": ("unrecognized option", "invalid option", "unknown option", "ambiguous", "requires an argument"),
}
"""What sbatch's errors call a directive that they do not name."""


def unanswered(output: str) -> bool:
    """Whether no controller answered: then the same command may be accepted later."""
    return any(word.lower() in output.lower() for word in SILENCE)


def refusal_message(output: str, settings: SlurmLauncher) -> str:
    """The error message: each of sbatch's lines once, the keys that it may mean, and the way out.

    >>> from dtrain.launchers.slurm.launcher import SlurmLauncher
    >>> print(refusal_message("sbatch: error: Batch job submission failed: Invalid feature specification",
    ...                       SlurmLauncher(constraint="a100")))
    sbatch refused the job: Batch job submission failed: Invalid feature specification
    This comes from launcher.constraint=a100 (--constraint): change it, or leave it out; ...
    """
    lines = dict.fromkeys(_bare(line) for line in output.splitlines() if line.strip())
    words = "; ".join(line for line in lines if not line.startswith('Try "sbatch')) or "it said nothing"
    directives = _settings_of(settings)
    speaks = [topic for topic, names in WORDS.items() if any(name in words.lower() for name in names)]
    meant = [setting for topic, setting in directives if topic in speaks]
    surely = bool(meant)
    # "Requested node configuration is not available" may mean any of them.
    meant = meant or [setting for _, setting in directives]
    whence = "This comes from" if surely else "It does not say which directive; those of this job come from"
    return (
        f"sbatch refused the job: {words}\n{whence} {', '.join(meant)}: change it, or leave it out; `sinfo` and "
        "`scontrol show node` tell what the cluster has"
    )


def _bare(line: str) -> str:
    return line.strip().removeprefix("sbatch: ").removeprefix("error: ")


def _settings_of(settings: SlurmLauncher) -> list[tuple[str, str]]:
    """The topic of each directive that the job was given, and the key and value that made it."""
    return list(_keys(settings))


def _keys(settings: SlurmLauncher) -> Iterator[tuple[str, str]]:
    named = (
        ("memory", "memory_gib", "mem", settings.memory_gib),
        ("constraint", "constraint", "constraint", settings.constraint),
        ("gpus", "gpus_per_node", "gpus-per-node", settings.gpus_per_node),
        ("partition", "partition", "partition", settings.partition),
        ("account", "account", "account", settings.account),
        ("qos", "qos", "qos", settings.qos),
        ("reservation", "reservation", "reservation", settings.reservation),
        ("exclude", "exclude", "exclude", settings.exclude),
        ("array", "array_parallel", "array", settings.array_parallel),
    )
    for topic, key, directive, value in named:
        if value:
            yield topic, f"launcher.{key}={value} (--{directive})"
    for group in settings.groups:
        yield from ((topic, f"launcher.groups ({group})") for topic in ("constraint", "gpus", "partition"))
    for directive in settings.sbatch:
        name = directive.lstrip("-").partition("=")[0]
        topic = next((topic for topic, key, known, _ in named if known == name), "sbatch")
        yield topic, f"launcher.sbatch=[{directive}] (--{name})"
    for topic, key, directive, number in (
        ("time", "minutes", "time", settings.minutes),
        ("cpus", "threads_per_worker", "cpus-per-task", settings.threads_per_worker),
        ("nodes", "nodes", "nodes", settings.all_nodes),
        ("nodes", "workers", "ntasks-per-node", settings.all_workers),
    ):
        yield topic, f"launcher.{key}={number} (--{directive})"
