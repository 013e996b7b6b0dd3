"""The sbatch text: a pure function of the request, so that `--dry-run` prints it and golden files hold it."""

from __future__ import annotations

import shlex
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING

from dtrain.launchers.code_copy import Snapshot
from dtrain.launchers.environment import RANK_OFFSET, WORLD
from dtrain.launchers.probe import HANG_SECONDS
from dtrain.launchers.rank import RANK, sent
from dtrain.launchers.rendezvous import INTERFACES
from dtrain.launchers.slurm.group import Group

if TYPE_CHECKING:
    from dtrain.launchers.slurm.launcher import SlurmLauncher

__all__ = ["Work", "render"]

# In a checkout and in an installed wheel alike, slurm/ lies beside launchers/.
TEMPLATES = Path(__file__).resolve().parents[2] / "slurm"


@dataclass(frozen=True)
class Work:
    """What the job runs: ``program``, once per rank, in ``directory``, with its files in ``folder``.

    ``folders``: more than one makes a job array, an element each; "{folder}" in ``program`` stands for its folder, but
    not in a ``literal`` one. ``lists``: where the script reads the folders of an array from. ``replicas``: of its mesh.
    ``code``: the copy of the code that it runs; ``given``: the program outside of that.
    ``python``: an interpreter that has dtrain, outside of any container.
    """

    name: str
    program: tuple[str, ...]
    folders: tuple[Path, ...]
    directory: Path
    lists: Path
    environment: Mapping[str, str] = field(default_factory=dict)
    literal: bool = False
    replicas: int = 1
    code: Snapshot | None = None
    given: tuple[str, ...] = ()
    python: str = ""

    @property
    def array(self) -> bool:
        """Whether it is a job array."""
        return len(self.folders) > 1


def render(work: Work, settings: SlurmLauncher) -> str:
    """The text for sbatch. Reads only the template."""
    import jinja2

    environment = jinja2.Environment(
        loader=jinja2.FileSystemLoader(TEMPLATES), undefined=jinja2.StrictUndefined, trim_blocks=True,
        lstrip_blocks=True, keep_trailing_newline=True,
    )  # fmt: skip
    return environment.get_template("job.sbatch.j2").render(
        directives=list(_directives(work, settings)),
        array=work.array,
        folder=shlex.quote(str(work.folders[0])),
        folders=shlex.quote(str(work.lists)),
        directory=shlex.quote(str(work.directory)),
        workers=settings.all_workers,
        max_restarts=settings.max_restarts,
        address=shlex.quote(settings.address) if settings.address else "",
        port=settings.port,
        python=shlex.quote(_interpreter(work, settings)),
        environment=[(name, shlex.quote(value)) for name, value in sorted(_variables(work, settings).items())],
        setup=settings.setup,
        steps=list(_steps(work, settings)),
    )


def _interpreter(work: Work, settings: SlurmLauncher) -> str:
    """The batch script's interpreter: the ranks' own, or where that is in their container, the submitter's."""
    return (work.python if settings.container else settings.python) or "python3"


def _directives(work: Work, settings: SlurmLauncher) -> list[str]:
    folder = str(work.lists.parent if work.array else work.folders[0]).replace("%", "%%")  # Slurm's placeholders
    log = f"{folder}/batch-%a.log" if work.array else f"{folder}/logs/batch.log"
    first, *others = settings.components or [_whole(settings)]
    lines = {
        "job-name": work.name,
        "time": str(settings.minutes),
        "account": settings.account,
        "qos": settings.qos,
        "exclude": settings.exclude,
        "reservation": settings.reservation,
        **_resources(first, settings),
        "output": log,
        "open-mode": "append",
        "signal": f"USR2@{settings.signal_seconds}" if settings.signal_seconds else "",
        "array": _array(work, settings),
    }
    text = [f"--{name}={shlex.quote(value)}" for name, value in lines.items() if value]
    text.append("--requeue")
    text += [f"--{directive.lstrip('-')}" for directive in settings.sbatch]
    for group in others:
        text.append("hetjob")
        text += [f"--{name}={shlex.quote(value)}" for name, value in _resources(group, settings).items() if value]
    return text


def _whole(settings: SlurmLauncher) -> Group:
    return Group(
        nodes=settings.nodes, workers=settings.workers, partition=settings.partition, constraint=settings.constraint,
        gpus_per_node=settings.gpus_per_node,
    )  # fmt: skip


def _resources(group: Group, settings: SlurmLauncher) -> dict[str, str]:
    per_node = group.workers // group.nodes
    torchrun = settings.per_node == "torchrun"
    return {
        "nodes": str(group.nodes),
        "ntasks-per-node": "1" if torchrun else str(per_node),
        "cpus-per-task": str(settings.threads_per_worker * (per_node if torchrun else 1)),
        "gpus-per-node": str(group.gpus_per_node or settings.gpus_per_node or ""),
        "mem": f"{settings.memory_gib}G" if settings.memory_gib else "",
        "partition": group.partition or settings.partition,
        "constraint": group.constraint or settings.constraint,
    }


def _array(work: Work, settings: SlurmLauncher) -> str:
    if not work.array:
        return ""
    cap = f"%{settings.array_parallel}" if settings.array_parallel else ""
    return f"0-{len(work.folders) - 1}{cap}"


def _variables(work: Work, settings: SlurmLauncher) -> dict[str, str]:
    variables = {
        "PYTHONUNBUFFERED": "1",
        "OMP_NUM_THREADS": str(settings.threads_per_worker),
        # Since 22.05 srun no longer takes --cpus-per-task over from sbatch.
        "SRUN_CPUS_PER_TASK": str(settings.threads_per_worker),
        HANG_SECONDS: f"{settings.hang_seconds:g}",
    }
    if settings.interface:
        variables |= dict.fromkeys(INTERFACES, settings.interface)
    if settings.per_node == "torchrun":  # one task for all ranks of a node
        per_node = settings.all_workers // settings.all_nodes
        variables["SRUN_CPUS_PER_TASK"] = str(settings.threads_per_worker * per_node)
    return {**variables, **work.environment}


@dataclass(frozen=True)
class _Step:
    """One srun. ``variables``: assignments in front of it."""

    variables: str
    srun: str
    command: str


def _steps(work: Work, settings: SlurmLauncher) -> list[_Step]:
    # The environment of the script, even where a site's SBATCH_EXPORT=NONE has kept that of the shell out of it.
    ours = ["--export=ALL"] if not _names(settings.srun_args, "export") else []
    # Ranks fill one node after the other. Slurm would deal them out in turn where there are as many nodes as ranks, or
    # SLURM_DISTRIBUTION says so.
    if not _names((*settings.srun_args, *settings.sbatch), "distribution", "m"):
        ours.append("--distribution=block")
    kept = ["--kill-on-bad-exit=1", "--wait=60", "--unbuffered"]
    whole = [*kept, *ours, *_container(work, settings), *settings.srun_args]
    command = _command(work, settings)

    def step(offset: int, *more: str, alone: bool) -> _Step:
        variables = "" if alone else f"{RANK_OFFSET}={offset} {WORLD}={settings.all_workers}"
        return _Step(variables, shlex.join([*whole, *more]), command)

    if settings.groups:
        steps, offset = [], 0
        for number, group in enumerate(settings.components):
            steps.append(step(offset, f"--het-group={number}", f"--ntasks={group.workers}", alone=False))
            offset += group.workers
        return steps
    replicas = work.replicas if settings.same_replicas else 1
    if replicas > 1:
        shards = settings.workers // replicas
        steps = []
        for replica in range(replicas):
            # At given nodes: Slurm would spread the steps in its own order, and ranks must follow the nodes.
            nodes, first = max(1, settings.nodes // replicas), replica * settings.nodes // replicas
            where = [f"--ntasks={shards}", "--exact", f"--nodes={nodes}", f"--relative={first}"]
            steps.append(step(replica * shards, *where, alone=False))
        return steps
    if settings.per_node == "torchrun":
        return [step(0, f"--nodes={settings.nodes}", "--ntasks-per-node=1", alone=True)]
    tasks = [f"--nodes={settings.nodes}", f"--ntasks={settings.workers}"]
    return [step(0, *tasks, alone=True)]


def _command(work: Work, settings: SlurmLauncher) -> str:
    """The command line of one task, for bash: one rank, or the torchrun of one node."""
    python = settings.python or "python3"
    folder, program = '"$folder"', sent(work.program)
    if settings.per_node == "torchrun":
        # Its agent substitutes "${local_rank}" in arguments, so a dollar sign must be doubled to arrive as one.
        folder, program = '"${folder//\\$/\\$\\$}"', [word.replace("$", "$$") for word in program]
    words = [shlex.quote(word) if work.literal else _word(word, folder) for word in program]
    one = f"{shlex.join([python, *RANK])} {folder} -- {' '.join(words)}"
    prefix = ""
    if settings.container and settings.container_runtime == "apptainer":
        prefix = shlex.join(["apptainer", "exec", *settings.container_args, settings.container]) + " "
    if settings.per_node == "srun":
        return prefix + one
    # Every process of a step gets the scheduler's signals, the ranks too. torchrun would die of some and leave its
    # ranks behind; it inherits that they are ignored, and its ranks set them back.
    per_node = settings.all_workers // settings.all_nodes
    agent = [
        python, "-P", "-m", "torch.distributed.run", f"--nnodes={settings.all_nodes}", f"--nproc-per-node={per_node}",
        "--rdzv-backend=static", "--max-restarts=0", "--signals-to-handle=SIGQUIT", "--no-python",
    ]  # fmt: skip
    # With the static rendezvous node 0 is the host, whatever names it has, and ranks follow Slurm's order of nodes.
    where = '--node-rank="$SLURM_NODEID" --master-addr="$MASTER_ADDR" --master-port="$MASTER_PORT"'
    inner = f"trap '' TERM INT HUP USR1 USR2; exec {prefix}{shlex.join(agent)} {where} {one}"
    return f'env folder="$folder" bash -c {shlex.quote(inner)}'


def _names(options: Sequence[str], *names: str) -> bool:
    """Whether one of these options of Slurm's is among ``options``."""
    return any(option.lstrip("-").partition("=")[0] in names for option in options)


def _word(text: str, folder: str) -> str:
    """One word for bash; "{folder}" stands for the job's ``folder``."""
    return folder.join(shlex.quote(piece) if piece else "" for piece in text.split("{folder}")) or "''"


def _container(work: Work, settings: SlurmLauncher) -> Sequence[str]:
    if not settings.container or settings.container_runtime != "pyxis":
        return []
    mounts = sorted({str(path) for path in (*work.folders, work.directory)})
    shared = ",".join(f"{path}:{path}" for path in mounts)
    image, workdir = f"--container-image={settings.container}", f"--container-workdir={work.directory}"
    return [image, f"--container-mounts={shared}", workdir, *settings.container_args]
