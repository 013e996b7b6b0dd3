"""`dtrain train` at Slurm before there is a job: what is refused, in whose words, what that leaves; dry runs."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

from dtrain.cli.main import main
from dtrain.launchers.slurm.launcher import SlurmLauncher
from dtrain.launchers.slurm.refusal import problems, refusal_message, too_many_cpus, unanswered
from dtrain.train.config import load
from dtrain.train.config.run_folder import withdrawn_if_refused

SMALL = [
    "launcher=slurm", "launcher.workers=1", "mesh.replicate=1", "mesh.shard=1", "engine=ddp", "sync=dense",
    "run.dir=run", "data=text", "data.path=text", "train.steps=4", "train.log_every_steps=2", "train.batch_size=2",
    "train.evaluation_examples=0", "model.dim=32", "model.layers=1", "data.block=16", "launcher.snapshot=false",
]  # fmt: skip


SINFO = 'case "$*" in *%c) echo "main*|2|8";; *) echo "main*|2|infinite|up";; esac'


@pytest.fixture(autouse=True)
def commands(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The folder of Slurm's commands, of which there is sinfo: two nodes of 8 CPUs. Faster than FakeSlurm."""
    monkeypatch.setenv("XDG_STATE_HOME", str(tmp_path / "state"))
    monkeypatch.setenv("DTRAIN_CLUSTER", "fake")
    monkeypatch.setenv("SLURM_CONF", "fake")
    monkeypatch.chdir(tmp_path)
    (tmp_path / "text").mkdir()
    for number in range(6):
        (tmp_path / "text" / f"{number}.txt").write_text("\n".join(f"{i} times {number}" for i in range(40)))
    folder = tmp_path / "commands"
    folder.mkdir()
    says(folder / "sinfo", SINFO)
    monkeypatch.setenv("PATH", f"{folder}{os.pathsep}{os.environ['PATH']}")
    return folder


def says(path: Path, script: str) -> None:
    path.write_text(f"#!/bin/sh\n{script}\n")
    path.chmod(0o755)


def refusing(commands: Path, words: str) -> None:
    """From now on sbatch says this of every job."""
    says(commands / "sbatch", f'[ "$1" = --version ] && exit 0\necho "{words}" >&2\nexit 1')


@pytest.mark.parametrize("before", [False, True])
def test_what_sbatch_refuses_is_told_once_with_the_key_and_leaves_nothing(
    before: bool, commands: Path, tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    if before:
        (tmp_path / "run").mkdir()
        (tmp_path / "run" / "mine.txt").write_text("kept")
    refusing(commands, "sbatch: error: Batch job submission failed: Memory specification can not be satisfied")
    assert main(["train", *SMALL, "launcher.memory_gib=5000"]) == 2
    error = capfd.readouterr().err
    assert error.count("Memory specification can not be satisfied") == 1
    assert "launcher.memory_gib=5000 (--mem)" in error and "change it, or leave it out" in error
    assert not (tmp_path / "run" / "config.yaml").exists()
    assert (tmp_path / "run" / "mine.txt").exists() == before
    refusing(commands, "sbatch: error: Unable to contact slurm controller (connect failure)")
    assert main(["train", *SMALL, "model.dim=64"]) == 1  # not "cannot go on like this", and not the user's fault


def test_a_refused_array_leaves_nothing(commands: Path, tmp_path: Path) -> None:
    refusing(commands, "sbatch: error: Invalid feature specification")
    assert main(["train", "-m", *SMALL, "train.seed=1,2", "launcher.constraint=a100"]) == 2
    assert not list(tmp_path.glob("run/*/config.yaml"))


@pytest.mark.parametrize(
    ("said", "how", "key"),
    [
        ("Invalid feature specification", {"constraint": "a100", "memory_gib": 1}, "launcher.constraint=a100"),
        ("Invalid generic resource (gres) specification", {"gpus_per_node": 4}, "launcher.gpus_per_node=4"),
        ("sbatch: unrecognized option '--no-such-directive=3'\nTry \"sbatch --help\" for more information",
         {"sbatch": ("no-such-directive=3",), "memory_gib": 1}, "launcher.sbatch=[no-such-directive=3]"),
        ("Invalid account or account/partition combination specified", {"account": "me"}, "launcher.account=me"),
        ("Invalid qos specification", {"qos": "fast"}, "launcher.qos=fast"),
    ],
)  # fmt: skip
def test_words_of_sbatch_lead_to_the_key(said: str, how: dict[str, object], key: str) -> None:
    text = refusal_message(f"sbatch: error: {said}\nsbatch: error: {said}", SlurmLauncher(**how))  # type: ignore[arg-type]
    assert f"This comes from {key} (--" in text and "Try" not in text and text.count(said.splitlines()[0]) == 1
    assert "launcher.memory_gib" not in text


def test_words_that_name_no_directive_lead_to_all_that_were_given() -> None:
    text = refusal_message(
        "sbatch: error: Requested node configuration is not available", SlurmLauncher(gpus_per_node=4)
    )
    assert "It does not say which" in text and "launcher.gpus_per_node=4" in text and "launcher.nodes=1" in text
    assert unanswered("sbatch: error: Socket timed out on send/recv operation") and not unanswered("Invalid qos")


def test_a_refusal_puts_back_what_was_there(tmp_path: Path) -> None:
    run = tmp_path / "run"
    run.mkdir()
    (run / "config.yaml").write_text("old")

    def submit() -> None:
        os.replace(run / "config.yaml", run / "config-1.yaml")
        (run / "config.yaml").write_text("new")
        raise ValueError("no")

    with pytest.raises(ValueError, match="no"), withdrawn_if_refused(run):
        submit()
    assert [path.name for path in run.iterdir()] == ["config.yaml"]
    assert (run / "config.yaml").read_text() == "old"


# ---- before it is submitted ----------------------------------------------------------------------------------------


def test_more_cpus_than_a_node_has_are_refused_with_those_that_fit() -> None:
    (problem,) = too_many_cpus(SlurmLauncher(nodes=2, workers=4, threads_per_worker=64), {"": [8, 8, 8]})
    assert "launcher.threads_per_worker=64" in problem and "takes 128 CPUs" in problem and "at most 4" in problem
    (problem,) = too_many_cpus(SlurmLauncher(workers=16, partition="gpu"), {"gpu": [8], "": [64]})
    assert "of partition gpu" in problem and "take more launcher.nodes" in problem and "at most" not in problem


@pytest.mark.parametrize(
    "settings",
    [
        SlurmLauncher(nodes=2, workers=2, threads_per_worker=8),
        SlurmLauncher(nodes=1, workers=1, threads_per_worker=64),  # the third node has them
        SlurmLauncher(threads_per_worker=999, partition="unknown"),
        SlurmLauncher(threads_per_worker=999, sbatch=("overcommit",)),
        SlurmLauncher(nodes=2, workers=2, threads_per_worker=8, groups=("nodes=1 workers=1",) * 2),
    ],
)
def test_cpus_that_nodes_have_or_that_nobody_knows_are_left_to_slurm(settings: SlurmLauncher) -> None:
    assert not list(too_many_cpus(settings, {"": [8, 8, 64]}))


def test_the_cpus_of_nodes_are_asked_of_sinfo(commands: Path, tmp_path: Path) -> None:
    wanted = SlurmLauncher(nodes=2, workers=2, threads_per_worker=64)
    (problem,) = problems(wanted, tmp_path, one_machine=True)
    assert "launcher.threads_per_worker=64" in problem and "have more than 8" in problem
    says(commands / "sinfo", 'case "$*" in *%c) exit 1;; *) echo "main*|2|infinite|up";; esac')
    assert problems(wanted, tmp_path, one_machine=True) == []  # nobody knows


# ---- dry runs ------------------------------------------------------------------------------------------------------


def test_a_dry_run_prints_the_script_and_the_configuration(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["train", "--dry-run", *SMALL]) == 0
    out = capsys.readouterr().out
    script, _, config = out.partition("# configuration:\n")
    assert script.startswith("#!/bin/bash\n#SBATCH ") and config.endswith("# starts from step 0\n")
    lines = config.splitlines()[:-1]
    (tmp_path / "again.yaml").write_text("".join(line.removeprefix("# ") + "\n" for line in lines))
    assert load(tmp_path / "again.yaml").train.steps == 4
    assert main(["train", "-m", "--dry-run", *SMALL, "train.seed=1,2"]) == 0
    assert "# ---- element 1: train.seed=2 ----" in capsys.readouterr().out


@pytest.mark.parametrize("dry", [True, False])
def test_without_mpirun_mpi_is_one_error(
    dry: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("PATH", "/nowhere")
    assert main(["train", *(["--dry-run"] if dry else []), *SMALL[1:], "launcher=mpi"]) == 2
    assert "dtrain: error: there is no mpirun on this machine" in capsys.readouterr().err
    assert not (tmp_path / "run").exists()
