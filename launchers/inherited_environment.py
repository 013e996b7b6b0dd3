"""What a job inherits from the environment that launches it, which may be that of another job's rank.

Slurm, mpirun and torchrun give a process its rank by variables, and take their defaults from variables. If inherited,
the former make every rank of the new job rank 0 of 1, and the latter override what the new job asks for.

    inherited   all that is not named below, and of Slurm's own those that locate its cluster (KEPT)
    dropped     the place of a rank: RANK, WORLD_SIZE, ..., TORCHELASTIC_*, OMPI_*, PMI_*, PMIX_*, and dtrain's own;
                SLURM_*, SRUN_*, SALLOC_*, SBATCH_*, SQUEUE_*, SINFO_*, SCONTROL_*; and within a job of Slurm's which
                GPUs that has. OMPI_MCA_* and PMIX_MCA_*, which users set, stay unless mpirun has set some itself
    here        ranks on this machine also keep what describes the job around them (AROUND), which is theirs
    mpirun      keeps the allocation that it shall use, and loses only the place in a job step

sbatch's own defaults are part of the request (`defaults_of_shell`): one with a key of dtrain's applies where that is
not set, and the others are not used, which `unused` reports.
"""

from __future__ import annotations

import contextlib
import os
import re
from collections.abc import Iterator, Mapping, Sequence
from typing import Literal

__all__ = ["DEFAULTS", "KEPT", "Kept", "become", "defaults_of_shell", "handed_on", "replaced", "unused"]

Kept = Literal["job", "cluster", "allocation"]
"""Which of Slurm's own variables stay: those of the job around, for ranks on this machine; only the cluster's, for
sbatch and what asks Slurm; or the allocation's, for mpirun."""

KEPT = ("SLURM_CONF", "SLURM_CLUSTERS", "SLURM_JWT", "SLURM_HOME", "SLURM_ROOT")
AROUND = (
    "SLURM_JOB_ID", "SLURM_JOBID", "SLURM_JOB_NAME", "SLURM_JOB_USER", "SLURM_JOB_ACCOUNT", "SLURM_JOB_PARTITION",
    "SLURM_JOB_QOS", "SLURM_JOB_START_TIME", "SLURM_JOB_END_TIME", "SLURM_CLUSTER_NAME", "SLURM_SUBMIT_DIR",
    "SLURM_SUBMIT_HOST", "SLURM_TMPDIR", "SLURM_ARRAY_JOB_ID", "SLURM_ARRAY_TASK_ID", "SLURM_ARRAY_TASK_COUNT",
)  # fmt: skip

PLACE = re.compile(
    r"(LOCAL_|GROUP_|NODE_|ROLE_)?RANK|(LOCAL_|GROUP_|ROLE_)?WORLD_SIZE|ROLE_NAME|MASTER_(ADDR|PORT)"
    r"|MPI_LOCALN?RANK(ID|S)|TORCHELASTIC_.*|OMPI_(?!MCA_).*|PMI_.*|PMIX_(?!MCA_).*|PRTE_(?!MCA_).*|HYDI_.*"
)
SET_BY_MPIRUN = re.compile(r"(OMPI|PMIX|PRTE)_MCA_.*")
OURS = re.compile(
    r"DTRAIN_(RANKS|ATTEMPT|CODE|LOG|LAUNCHER_PID|HANG_SECONDS|CARRIED_SIGNALS|MPIRUN|RANK_OFFSET|WORLD_SIZE"
    r"|SECONDS_LEFT|LOCKED)"
)
OF_SLURM = re.compile(r"(SLURMD?|SRUN|SALLOC|SBATCH|SQUEUE|SINFO|SCONTROL)_.*")
STEP = re.compile(
    r"SLURM_(PROCID|LOCALID|NODEID|STEP.*|TASK_PID|GTIDS|SRUN_.*|CPU_BIND.*|MEM_BIND.*|GPU_BIND.*|DISTRIBUTION|PTY_.*"
    r"|LAUNCH_NODE_IPADDR|EXPORT_ENV|EXACT|HOSTFILE|MPI_TYPE|OVERLAP)"
)
GPUS = ("CUDA_VISIBLE_DEVICES", "ROCR_VISIBLE_DEVICES", "GPU_DEVICE_ORDINAL", "ZE_AFFINITY_MASK")

DEFAULTS = {
    "SBATCH_ACCOUNT": "account", "SBATCH_PARTITION": "partition", "SBATCH_QOS": "qos",
    "SBATCH_RESERVATION": "reservation", "SBATCH_CONSTRAINT": "constraint",
}  # fmt: skip
"""Variables of sbatch's that apply where launcher.KEY is not set."""
DIRECTIVES = {"SBATCH_EXPORT": "export", "SBATCH_WCKEY": "wckey"}
"""Those that become a directive, where ``launcher.sbatch`` has none of the name."""


def handed_on(variables: Mapping[str, str], kept: Kept, *, ours: bool = True) -> dict[str, str]:
    """The variables without those of another job; see above. ``ours``: also without dtrain's own for its ranks.

    >>> handed_on({"PATH": "/bin", "RANK": "3", "SLURM_PROCID": "3", "SLURM_CONF": "/etc/slurm.conf"}, "cluster")
    {'PATH': '/bin', 'SLURM_CONF': '/etc/slurm.conf'}
    """
    within = "SLURM_JOB_ID" in variables
    launched = any(name.startswith("OMPI_COMM_WORLD") for name in variables)

    def stays(name: str) -> bool:
        if PLACE.fullmatch(name) or (launched and SET_BY_MPIRUN.fullmatch(name)) or (ours and OURS.fullmatch(name)):
            return False
        if kept == "allocation":
            return not STEP.fullmatch(name)
        if OF_SLURM.fullmatch(name):
            return name in KEPT or (kept == "job" and name in AROUND)
        return not (kept == "cluster" and within and name in GPUS)

    left = {name: value for name, value in variables.items() if stays(name)}
    # mpirun starts its daemons by srun, which would wait for the cores that this very step holds.
    return {**left, "SLURM_OVERLAP": "1"} if kept == "allocation" and within else left


@contextlib.contextmanager
def replaced(variables: Mapping[str, str]) -> Iterator[None]:
    """Within the block this process has these variables and no others."""
    before = dict(os.environ)
    try:
        become(variables)
        yield
    finally:
        become(before)


def become(variables: Mapping[str, str]) -> None:
    """Replace the variables of this process by these."""
    for name in [name for name in os.environ if name not in variables]:
        del os.environ[name]
    os.environ.update(variables)


def defaults_of_shell(variables: Mapping[str, str], explicit: Sequence[str]) -> tuple[dict[str, str], list[str]]:
    """The defaults for sbatch that a site's or a user's shell sets: settings by name, and directives.

    ``explicit``: the names of the settings and directives that are set explicitly, and win.
    """
    settings = {key: variables[name] for name, key in DEFAULTS.items() if variables.get(name) and key not in explicit}
    directives = [f"{key}={variables[name]}" for name, key in DIRECTIVES.items() if variables.get(name)]
    return settings, [text for text in directives if text.partition("=")[0] not in explicit]


def unused(variables: Mapping[str, str]) -> list[str]:
    """A warning for each default of sbatch's that the shell sets and no job gets."""
    return [
        f"{name}={value} of this shell is not used: dtrain asks Slurm by launcher.* keys, any further directive by "
        "launcher.sbatch=[...]"
        for name, value in sorted(variables.items())
        if name.startswith("SBATCH_") and name not in DEFAULTS and name not in DIRECTIVES
    ]
