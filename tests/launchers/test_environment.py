"""A rank's place, as each launcher tells it: one dictionary per backend."""

from __future__ import annotations

import pytest

from dtrain.launchers.environment import Environment, tasks_on_nodes

SLURM = {
    "SLURM_STEP_ID": "0", "SLURM_PROCID": "5", "SLURM_NTASKS": "7", "SLURM_LOCALID": "1", "SLURM_NODEID": "1",
    "SLURM_NNODES": "2", "SLURM_STEP_TASKS_PER_NODE": "4,3", "SLURM_RESTART_COUNT": "2", "MASTER_ADDR": "n1",
    "MASTER_PORT": "20001",
}  # fmt: skip
TORCHRUN = {
    "TORCHELASTIC_RUN_ID": "x", "RANK": "3", "WORLD_SIZE": "4", "LOCAL_RANK": "1", "LOCAL_WORLD_SIZE": "2",
    "GROUP_RANK": "1", "GROUP_WORLD_SIZE": "2", "TORCHELASTIC_RESTART_COUNT": "1",
}  # fmt: skip
OPENMPI = {
    "OMPI_COMM_WORLD_RANK": "3", "OMPI_COMM_WORLD_SIZE": "4", "OMPI_COMM_WORLD_LOCAL_RANK": "1",
    "OMPI_COMM_WORLD_LOCAL_SIZE": "2",
}  # fmt: skip
MPICH = {"PMI_RANK": "2", "PMI_SIZE": "4", "MPI_LOCALRANKID": "0", "MPI_LOCALNRANKS": "2"}


@pytest.mark.parametrize(
    ("variables", "backend", "place"),
    [
        ({}, "none", (0, 1, 0, 1, 0, 1, 0)),
        (SLURM, "slurm", (5, 7, 1, 3, 1, 2, 2)),
        (TORCHRUN, "torchrun", (3, 4, 1, 2, 1, 2, 1)),
        (OPENMPI, "openmpi", (3, 4, 1, 2, 1, 2, 0)),
        (MPICH, "mpich", (2, 4, 0, 2, 1, 2, 0)),
        ({"RANK": "1", "WORLD_SIZE": "2", "LOCAL_RANK": "1", "LOCAL_WORLD_SIZE": "2"}, "plain", (1, 2, 1, 2, 0, 1, 0)),
        # Within a Slurm job, whoever started the process last counts.
        ({**SLURM, **TORCHRUN}, "torchrun", (3, 4, 1, 2, 1, 2, 1)),
        ({**SLURM, **OPENMPI}, "openmpi", (3, 4, 1, 2, 1, 2, 0)),
        # The batch script itself is no rank.
        ({"SLURM_JOB_ID": "9", "SLURM_PROCID": "0", "SLURM_NTASKS": "4"}, "none", (0, 1, 0, 1, 0, 1, 0)),
        # A job of several steps: this rank is the second of the second one.
        ({**SLURM, "DTRAIN_RANK_OFFSET": "7", "DTRAIN_WORLD_SIZE": "14"}, "slurm", (12, 14, 1, 3, 1, 2, 2)),
    ],
)
def test_the_place_of_a_rank(variables: dict[str, str], backend: str, place: tuple[int, ...]) -> None:
    found = Environment.read(variables)
    assert found.backend == backend
    assert (
        found.rank,
        found.world,
        found.local_rank,
        found.local_world,
        found.node,
        found.nodes,
        found.restart,
    ) == place


def test_the_meeting_point_is_the_launchers() -> None:
    found = Environment.read(SLURM)
    assert (found.address, found.port) == ("n1", 20001)
    assert (Environment.read({}).address, Environment.read({}).port) == ("", 0)


def test_what_is_exported_is_read_back() -> None:
    place = Environment.read(SLURM)
    again = Environment.read(place.export())
    assert (again.rank, again.world, again.local_rank, again.local_world, again.node) == (5, 7, 1, 3, 1)


def test_a_missing_variable_is_named() -> None:
    with pytest.raises(
        ValueError, match="SLURM_STEP_ID says that slurm started this process, but SLURM_PROCID is None"
    ):
        Environment.read({"SLURM_STEP_ID": "0"})


@pytest.mark.parametrize(("text", "counts"), [("4", [4]), ("2(x3)", [2, 2, 2]), ("4(x2),3", [4, 4, 3])])
def test_tasks_on_nodes(text: str, counts: list[int]) -> None:
    assert tasks_on_nodes(text) == counts


def test_a_list_of_tasks_that_cannot_be_read_is_refused() -> None:
    with pytest.raises(ValueError, match="is no list of tasks per node"):
        tasks_on_nodes("4x2")
