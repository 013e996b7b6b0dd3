"""The line for mpirun, and what mpirun, hosts and Slurm allocations it is for."""

from __future__ import annotations

import signal
import socket
from pathlib import Path

import pytest

from dtrain.launchers import mpi
from dtrain.launchers.mpi import (
    Mpirun,
    NoMpirun,
    Ranks,
    carried,
    complete,
    find_mpirun,
    identify,
    line,
    nodes_of_slurm,
    placed,
)

OPENMPI = Mpirun("/opt/openmpi/bin/mpirun", "openmpi", "5.0.11")
MPICH = Mpirun("/opt/mpich/bin/mpirun", "mpich", "5.0.2")
PROGRAM = ["python", "train.py", "a b"]
PASSED = "SIGUSR1,SIGUSR2,SIGURG,SIGPWR"
NODES = ("node1", "node2", "node3", "node4")

LINES: dict[str, tuple[str, Mpirun, Ranks, tuple[str, ...], bool]] = {
    "one machine, Open MPI": (
        "/opt/openmpi/bin/mpirun -n 4 --map-by slot:OVERSUBSCRIBE --bind-to none "
        f"--mca ess_base_forward_signals {PASSED} python train.py",
        OPENMPI, Ranks(4), (), False,
    ),
    "one machine, MPICH": ("/opt/mpich/bin/mpirun -n 4 python train.py", MPICH, Ranks(4), (), False),
    "root, Open MPI": (
        "/opt/openmpi/bin/mpirun --allow-run-as-root -n 1 --map-by slot:OVERSUBSCRIBE --bind-to none "
        f"--mca ess_base_forward_signals {PASSED} python train.py",
        OPENMPI, Ranks(1), (), True,
    ),
    "root, MPICH": ("/opt/mpich/bin/mpirun -n 1 python train.py", MPICH, Ranks(1), (), True),
    "hosts by ssh, Open MPI": (
        "/opt/openmpi/bin/mpirun -n 5 --host a:3,b:2 --map-by slot:OVERSUBSCRIBE --bind-to none "
        f"--mca ess_base_forward_signals {PASSED} -x COLOUR -x OMP_NUM_THREADS --mca btl tcp,self python train.py",
        OPENMPI,
        Ranks(5, ("a:3", "b:2"), {"OMP_NUM_THREADS": "1", "COLOUR": "blue"}, ("--mca", "btl", "tcp,self")), (), False,
    ),
    "hosts by ssh, MPICH": (
        "/opt/mpich/bin/mpirun -launcher ssh -hosts a:3,b:2 -n 5 -iface ib0 python train.py",
        MPICH, Ranks(5, ("a:3", "b:2"), {"COLOUR": "blue, red"}, ("-iface", "ib0")), (), False,
    ),
    "Slurm, Open MPI": (
        "/opt/openmpi/bin/mpirun -n 8 --host node1:2,node2:2,node3:2,node4:2 --map-by slot:OVERSUBSCRIBE "
        f"--bind-to none --mca ess_base_forward_signals {PASSED} python train.py",
        OPENMPI, Ranks(8), NODES, False,
    ),
    "Slurm, MPICH": (
        "/opt/mpich/bin/mpirun -launcher slurm -hosts node1:2,node2:2,node3:2,node4:2 -n 8 python train.py",
        MPICH, Ranks(8), NODES, False,
    ),
    "some nodes of the allocation": (
        "/opt/mpich/bin/mpirun -launcher slurm -hosts node3:1,node1:1 -n 2 python train.py",
        MPICH, Ranks(2, ("node3", "node1")), NODES, False,
    ),
}  # fmt: skip


@pytest.mark.parametrize("name", LINES)
def test_the_line(name: str) -> None:
    expected, mpirun, ranks, nodes, root = LINES[name]
    assert line(mpirun, PROGRAM, ranks, nodes=nodes, root=root) == [*expected.split(), "a b"]


@pytest.mark.parametrize(
    ("told", "kind", "version"),
    [
        ("mpirun (Open MPI) 5.0.11\n\nReport bugs to https://www.open-mpi.org/community/help/\n", "openmpi", "5.0.11"),
        ("HYDRA build details:\n    Version:           5.0.2\n    Release Date:  Fri\n", "mpich", "5.0.2"),
        ("Intel(R) MPI Library for Linux* OS, Version 2021.9 Build 20230306 (id: d82b3071db)\n", "mpich", "2021.9"),
    ],
)
def test_an_mpirun_is_known_by_what_it_says_of_itself(told: str, kind: str, version: str) -> None:
    assert identify("/x/mpirun", told) == Mpirun("/x/mpirun", kind, version)  # type: ignore[arg-type]


def test_without_an_mpirun_those_of_make_setup_are_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PATH", "/nowhere")
    monkeypatch.setattr("sys.prefix", str(tmp_path))
    there = tmp_path / "mpi" / "mpich" / "bin" / "mpirun"
    for named in (False, True):
        with pytest.raises(NoMpirun, match="there is no mpirun on this machine") as error:
            find_mpirun()
        assert (f"launcher.mpirun={there}." in str(error.value)) == named and "openmpi/bin" not in str(error.value)
        there.parent.mkdir(parents=True, exist_ok=True)
        there.touch()


def test_an_unknown_mpirun_is_refused_with_its_own_words() -> None:
    with pytest.raises(NoMpirun, match=r"/x/mpirun is neither .* it says: LAM 7"):
        identify("/x/mpirun", "LAM 7\n")


def test_no_mpirun_is_an_error_with_the_way_out(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("PATH", str(tmp_path))
    with pytest.raises(NoMpirun, match=r"no mpirun on this machine.*module load.*launcher\.mpirun="):
        mpi.find_mpirun()


def test_an_mpirun_that_cannot_say_its_version_is_an_error(tmp_path: Path) -> None:
    script = tmp_path / "mpirun"
    script.write_text("#!/no/such/interpreter\n")
    script.chmod(0o755)
    with pytest.raises(NoMpirun, match="--version failed"):
        mpi.find_mpirun(str(script))


@pytest.mark.parametrize(
    ("text", "nodes"),
    [
        ("", ()),
        ("login", ("login",)),
        ("node[1-4]", NODES),
        ("gpu[008-010,12],cpu,x[7]", ("gpu008", "gpu009", "gpu010", "gpu12", "cpu", "x7")),
        ("rack[1-2]n[1-2]-ib", ("rack1n1-ib", "rack1n2-ib", "rack2n1-ib", "rack2n2-ib")),
    ],
)
def test_the_nodes_of_an_allocation(text: str, nodes: tuple[str, ...]) -> None:
    assert nodes_of_slurm({"SLURM_JOB_NODELIST": text}) == nodes


def test_a_list_of_too_many_nodes_is_refused_before_it_is_made() -> None:
    with pytest.raises(ValueError, match="is no list of nodes"):
        nodes_of_slurm({"SLURM_JOB_NODELIST": "x" + "[1-999]" * 40})


@pytest.mark.parametrize(
    ("ranks", "nodes", "expected"),
    [
        (Ranks(4), (), []),
        (Ranks(4), NODES, [(name, 1) for name in NODES]),
        (Ranks(5), NODES[:2], [("node1", 3), ("node2", 2)]),
        (Ranks(2), NODES, [("node1", 1), ("node2", 1)]),  # a node without a rank is no host
        (Ranks(4, ("a:1", "b:8")), (), [("a", 1), ("b", 3)]),
    ],
)
def test_ranks_fill_one_host_after_the_other(
    ranks: Ranks, nodes: tuple[str, ...], expected: list[tuple[str, int]]
) -> None:
    assert placed(ranks, nodes) == expected


@pytest.mark.parametrize(
    ("ranks", "nodes", "said"),
    [
        (Ranks(0), (), "workers=0"),
        (Ranks(4, ("a:1", "b:2")), (), "4 ranks do not fit: the hosts have 3 places"),
        (Ranks(2, ("node1", "other")), NODES, "other are not in this Slurm allocation, which has node1, node2"),
        (Ranks(2, ("a:many",)), (), "'a:many' is not of the form"),
        (Ranks(2, ("a:0",)), (), "'a:0' is not of the form"),
    ],
)
def test_ranks_that_cannot_be_placed(ranks: Ranks, nodes: tuple[str, ...], said: str) -> None:
    with pytest.raises(ValueError, match=said):
        placed(ranks, nodes)


def test_ranks_are_told_where_to_meet_and_what_signals_mean() -> None:
    here = complete(OPENMPI, Ranks(2, environment={"COLOUR": "blue"}), inherited={}).environment
    assert here["MASTER_ADDR"] == "127.0.0.1" and int(here["MASTER_PORT"]) in mpi.PORTS and here["COLOUR"] == "blue"
    assert carried(here) == {signal.SIGURG: signal.SIGTERM, signal.SIGPWR: signal.SIGINT}
    assert carried(complete(MPICH, Ranks(2), inherited={}).environment) == {signal.SIGQUIT: signal.SIGUSR2}
    assert carried({}) == {}
    assert complete(MPICH, Ranks(4), nodes=NODES, inherited={}).environment["MASTER_ADDR"] == "node1"
    chosen = complete(MPICH, Ranks(4, address="10.0.0.1", port=29500), nodes=NODES, inherited={}).environment
    assert (chosen["MASTER_ADDR"], chosen["MASTER_PORT"]) == ("10.0.0.1", "29500")


def test_the_library_is_the_one_that_belongs_to_the_mpirun(tmp_path: Path) -> None:
    mpirun = Mpirun(str(tmp_path / "bin" / "mpirun"), "mpich", "5.0.2")
    assert "MPI4PY_LIBMPI" not in complete(mpirun, Ranks(1), inherited={}).environment
    (tmp_path / "lib").mkdir()
    (tmp_path / "lib" / "libmpi.so.12").touch()
    assert complete(mpirun, Ranks(1), inherited={}).environment["MPI4PY_LIBMPI"] == str(tmp_path / "lib")
    for own in ("MPI4PY_LIBMPI", "MPI4PY_MPIABI"):
        assert "MPI4PY_LIBMPI" not in complete(mpirun, Ranks(1), inherited={own: "mine"}).environment


def test_a_port_that_is_taken_is_refused() -> None:
    with socket.socket() as other:
        other.bind(("", 0))
        port = other.getsockname()[1]
        with pytest.raises(ValueError, match=rf"port {port} is taken on .*launcher\.port="):
            complete(OPENMPI, Ranks(2, port=port))
    assert complete(OPENMPI, Ranks(2, port=port)).environment["MASTER_PORT"] == str(port)


@pytest.mark.parametrize(("code", "leaves"), [(0, 0), (75, 0), (130, 0), (1, 1), (2, 2), (143, 143)])
def test_a_rank_leaves_open_mpi_with_its_code_only_if_the_others_are_to_end(code: int, leaves: int) -> None:
    with pytest.raises(SystemExit) as left:
        mpi.leave(code, "openmpi")
    assert left.value.code == leaves
