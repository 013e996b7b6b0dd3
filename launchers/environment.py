"""A rank's place in its job, read from whatever started it: torchrun, Open MPI, MPICH, Slurm, or plain variables.

A `Backend` names the variables that hold it. Training scripts read the usual names (RANK, WORLD_SIZE,
LOCAL_RANK, LOCAL_WORLD_SIZE, GROUP_RANK), which `Environment.export` writes for all of them.
"""

from __future__ import annotations

import os
import re
from collections.abc import Mapping
from dataclasses import dataclass

__all__ = ["BACKENDS", "Environment", "tasks_on_nodes"]

CLUSTER = "DTRAIN_CLUSTER"
"""Set on the hosts of a cluster of `dtrain cluster`: its name. Outside it selects one."""
ALLOCATED = "DTRAIN_ALLOCATED"
"""Set where the command has asked Slurm for the nodes around this process, and so has used the keys for that."""
SECONDS_LEFT = "DTRAIN_SECONDS_LEFT"
"""Set as the ranks start: until the time limit. In seconds, not a time of day, as the clocks of machines differ."""
RANK_OFFSET, WORLD = "DTRAIN_RANK_OFFSET", "DTRAIN_WORLD_SIZE"
"""Set where a job consists of several steps (``launcher.isolate=replica``): a rank's place among all steps."""

_USUAL = {
    "rank": "RANK", "world": "WORLD_SIZE", "local_rank": "LOCAL_RANK", "local_world": "LOCAL_WORLD_SIZE",
    "node": "GROUP_RANK",
}  # fmt: skip


@dataclass(frozen=True)
class Backend:
    """What starts ranks. ``variables``: field of `Environment` -> the variable that holds it; ``here``: the variable
    that identifies the backend.

    ``signals_all``: it signals every process of a rank, so that forwarding a signal would deliver it twice. ``mpi``: it
    is an mpirun.
    """

    variables: Mapping[str, str]
    signals_all: bool = False
    mpi: bool = False


BACKENDS = {
    "torchrun": Backend({
        **_USUAL, "nodes": "GROUP_WORLD_SIZE", "restart": "TORCHELASTIC_RESTART_COUNT", "here": "TORCHELASTIC_RUN_ID",
    }),
    "openmpi": Backend({
        "rank": "OMPI_COMM_WORLD_RANK", "world": "OMPI_COMM_WORLD_SIZE", "local_rank": "OMPI_COMM_WORLD_LOCAL_RANK",
        "local_world": "OMPI_COMM_WORLD_LOCAL_SIZE", "here": "OMPI_COMM_WORLD_RANK",
    }, signals_all=True, mpi=True),
    "mpich": Backend({
        "rank": "PMI_RANK", "world": "PMI_SIZE", "local_rank": "MPI_LOCALRANKID", "local_world": "MPI_LOCALNRANKS",
        "here": "MPI_LOCALRANKID",
    }, signals_all=True, mpi=True),
    "slurm": Backend({
        "rank": "SLURM_PROCID", "world": "SLURM_NTASKS", "local_rank": "SLURM_LOCALID", "node": "SLURM_NODEID",
        "nodes": "SLURM_NNODES", "tasks": "SLURM_STEP_TASKS_PER_NODE", "restart": "SLURM_RESTART_COUNT",
        "here": "SLURM_STEP_ID",
    }, signals_all=True),
    "plain": Backend({**_USUAL, "here": "RANK"}),
}  # fmt: skip
"""In the order in which they are looked for: the innermost counts, and mpirun and torchrun are started within a Slurm
job, not the other way round."""
NOBODY = Backend({})
"""For a process without a launcher."""


@dataclass(frozen=True)
class Environment:
    """A rank's place. ``node``: the index of its machine; ``restart``: how often the job was started again.

    ``address`` and ``port``: where rank 0 waits for the others; empty and 0 where the launcher has set none.
    """

    backend: str
    rank: int
    world: int
    local_rank: int
    local_world: int
    node: int
    nodes: int
    restart: int
    address: str = ""
    port: int = 0

    @classmethod
    def read(cls, variables: Mapping[str, str] = os.environ) -> Environment:
        """From environment variables; a process without a launcher is rank 0 of 1.

        Raises ``ValueError`` naming a variable that is missing or is no number.

        >>> Environment.read({"SLURM_STEP_ID": "0", "SLURM_PROCID": "3", "SLURM_NTASKS": "4", "SLURM_LOCALID": "1",
        ...     "SLURM_NODEID": "1", "SLURM_NNODES": "2", "SLURM_STEP_TASKS_PER_NODE": "2(x2)"}).local_world
        2
        """
        backend = next((name for name, candidate in BACKENDS.items() if candidate.variables["here"] in variables), None)
        if backend is None:
            return cls("none", 0, 1, 0, 1, 0, 1, 0)
        names = BACKENDS[backend].variables

        def number(field: str, default: int | None) -> int:
            name = names.get(field)
            value = variables.get(name) if name else None
            if value is None and default is not None:
                return default
            try:
                return int(value or "")
            except ValueError as error:
                raise ValueError(
                    f"{names['here']} says that {backend} started this process, but {name} is {value!r} and must be a "
                    f"number; start it with {backend}, or unset {names['here']}"
                ) from error

        rank, world = number("rank", None), number("world", None)
        offset = int(variables.get(RANK_OFFSET, 0))
        local_rank, node = number("local_rank", 0 if world == 1 else None), number("node", 0)
        if "tasks" in names:
            local_world = tasks_on_nodes(variables.get(names["tasks"], str(world)))[node]
        else:
            local_world = number("local_world", world)
        nodes = number("nodes", max(1, world // max(1, local_world)))
        if "node" not in names:
            node = (rank - local_rank) // max(1, local_world)  # right where every node has as many ranks
        total = int(variables.get(WORLD, world))
        restart, port = number("restart", 0), variables.get("MASTER_PORT", "0")
        return cls(
            backend, rank + offset, total, local_rank, local_world, node, nodes, restart,
            variables.get("MASTER_ADDR", ""), int(port) if port.isdecimal() and len(port) < 6 else 0,
        )  # fmt: skip

    @property
    def started_by(self) -> Backend:
        """What started this rank."""
        return BACKENDS.get(self.backend, NOBODY)

    def export(self) -> dict[str, str]:
        """The usual variables, as torchrun writes them. MASTER_ADDR and MASTER_PORT come from the launcher."""
        return {
            "RANK": str(self.rank),
            "WORLD_SIZE": str(self.world),
            "LOCAL_RANK": str(self.local_rank),
            "LOCAL_WORLD_SIZE": str(self.local_world),
            "GROUP_RANK": str(self.node),
            "GROUP_WORLD_SIZE": str(self.nodes),
        }


def tasks_on_nodes(text: str) -> list[int]:
    """Expand Slurm's short form of a list.

    >>> tasks_on_nodes("4(x2),3")
    [4, 4, 3]
    """
    counts: list[int] = []
    for word in text.split(","):
        match = re.fullmatch(r"(\d+)(?:\(x(\d+)\))?", word)
        if match is None:
            raise ValueError(f"{text!r} is no list of tasks per node such as 4(x2),3")
        counts += [int(match[1])] * int(match[2] or 1)
    return counts
