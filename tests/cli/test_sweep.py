"""Sweeps: their folders have plain names, an interrupt ends all of it, and their table is there from the beginning."""

from __future__ import annotations

import json
import re
import sys
from collections.abc import Callable
from pathlib import Path

import pytest

from dtrain.cli.main import main
from dtrain.launchers.failure import Ending
from dtrain.train.config import compose, load

Sweep = Callable[..., tuple[int, str, str]]


class Runs:
    """Stands for the launcher of each run: what ``ends`` says of its number, finished otherwise."""

    def __init__(self) -> None:
        self.folders: list[Path] = []
        self.ends: dict[int, str] = {}
        self.tables: list[str] = []

    def __call__(self, argv: list[str], **_: object) -> Ending:
        folder = Path(argv[-1]).parent
        self.folders.append(folder)
        self.tables.append((folder.parent / "sweep.json").read_text())
        outcome = self.ends.get(len(self.folders) - 1, '{"reason": "finished", "signal": null, "step": 3}')
        (folder / "outcome.json").write_text(outcome)
        if "finished" in outcome:
            (folder / "summary.json").write_text('{"loss": 1.5, "sent_bytes_per_rank": 7}')
        return Ending("finished", None, 0, ())


@pytest.fixture
def runs(monkeypatch: pytest.MonkeyPatch) -> Runs:
    fake = Runs()
    monkeypatch.setattr("dtrain.launchers.elastic_agent.launch", fake)
    monkeypatch.setattr("dtrain.report.summary.read", lambda path: None)
    monkeypatch.setattr("dtrain.report.summary.render", lambda summary: "")
    return fake


@pytest.fixture
def sweep(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> Sweep:
    """sweep("train.seed=1,2"): `train -m` on a little text, into sw/; exit code, standard output and error."""
    monkeypatch.setattr(sys, "path", list(sys.path))
    monkeypatch.setenv("XDG_STATE_HOME", str(tmp_path / "state"))
    monkeypatch.setattr("dtrain.cli.jobs.enter_login_host", lambda arguments: None)  # whoever has a cluster up
    monkeypatch.chdir(tmp_path)
    for name in ("text", "a b"):
        (tmp_path / name).mkdir()
        (tmp_path / name / "some.txt").write_text("\n".join(f"{i} times {name} is {i}" for i in range(200)))

    def run(*words: str) -> tuple[int, str, str]:
        given = [] if any(word.startswith("data.path") for word in words) else [f"data.path={tmp_path / 'text'}"]
        code = main(["train", "-m", "run.dir=sw", "data.block=16", *given, *words])
        return code, *capsys.readouterr()

    return run


def rows(capsys: pytest.CaptureFixture[str], folder: str = "sw") -> list[list[str]]:
    assert main(["jobs", "table", folder]) == 0
    return [re.split(r" {2,}", line.strip()) for line in capsys.readouterr().out.splitlines()[1:]]


def test_folders_have_plain_names_whatever_the_values_are(sweep: Sweep, runs: Runs, tmp_path: Path) -> None:
    assert sweep("data.path='a b',text,../" + tmp_path.name + "/text")[0] == 0
    names = [folder.name for folder in runs.folders]
    assert len(set(names)) == 3 and all(re.fullmatch(r"[A-Za-z0-9][A-Za-z0-9._+-]*", name) for name in names)
    assert {folder.parent for folder in runs.folders} == {tmp_path / "sw"}
    assert load(runs.folders[0] / "config.yaml").data["path"] == str(tmp_path / "a b")
    # What dtrain names can be named: here, and in sweeps of before, whose folders held an equals sign.
    for folder in (runs.folders[0], tmp_path / "sw/0-data.path='a b',sync=dense"):
        assert compose([f"run.weights={folder}", f"run.dir={folder}"]).run.weights == str(folder)


def test_a_dry_run_writes_nothing(sweep: Sweep, runs: Runs) -> None:
    code, out, _ = sweep("train.seed=1,2", "--dry-run")
    assert code == 0 and runs.folders == [] and not Path("sw").exists()
    assert "seed: 1" in out and "seed: 2" in out


@pytest.mark.slow
def test_an_interrupt_ends_the_sweep_and_the_same_command_goes_on(
    sweep: Sweep, runs: Runs, capsys: pytest.CaptureFixture[str]
) -> None:
    runs.ends[1] = '{"reason": "signal", "signal": 2, "step": 3}'
    code, out, _ = sweep("train.seed=1,2,3")
    assert code == 130 and len(runs.folders) == 2
    assert "the sweep ends here" in out and "goes on with train.seed=2, 1 to come" in out
    assert [row[0] for row in rows(capsys)] == ["train.seed=1", "train.seed=2", "train.seed=3"]
    assert rows(capsys)[0][1] == "finished" and rows(capsys)[2][1] == "not started"
    assert sweep("train.seed=1,2,3")[0] == 0
    assert runs.folders[-2:] == [Path.cwd() / "sw/1-train.seed-2", Path.cwd() / "sw/2-train.seed-3"]


@pytest.mark.parametrize(("signal", "code"), [(15, 75), (2, 130)])
def test_a_signal_to_any_run_ends_the_sweep(signal: int, code: int, sweep: Sweep, runs: Runs) -> None:
    runs.ends[0] = f'{{"reason": "signal", "signal": {signal}, "step": 3}}'
    assert sweep("train.seed=1,2,3")[0] == code and len(runs.folders) == 1


def test_the_table_is_there_before_the_first_run_starts(sweep: Sweep, runs: Runs) -> None:
    sweep("train.seed=1,2")
    assert [entry["values"] for entry in json.loads(runs.tables[0])] == ["train.seed=1", "train.seed=2"]


@pytest.mark.slow
def test_a_sweep_with_other_values_keeps_what_there_was(
    sweep: Sweep, runs: Runs, capsys: pytest.CaptureFixture[str]
) -> None:
    sweep("train.seed=1,2,3")
    sweep("train.seed=3,4")  # fewer, and in another place
    values = [row[0] for row in rows(capsys)]
    assert values == [f"train.seed={seed}" for seed in (1, 2, 3, 4)]
    assert runs.folders[3:] == [Path.cwd() / "sw/2-train.seed-3", Path.cwd() / "sw/1-train.seed-4"]
    Path("sw").rename("moved")
    assert [row[1] for row in rows(capsys, "moved")] == ["finished"] * 4


@pytest.mark.parametrize("content", ["{", "[3]", "{}", '[{"values": 3, "folder": "x"}]', "[" * 5000, "\0"])
def test_a_damaged_table_is_said(content: str, sweep: Sweep, runs: Runs, capsys: pytest.CaptureFixture[str]) -> None:
    Path("sw").mkdir()
    Path("sw/sweep.json").write_text(content)
    assert main(["jobs", "table", "sw"]) == 2
    assert "sweep.json is damaged; delete it" in capsys.readouterr().err
    assert sweep("train.seed=1,2")[0] == 2 and runs.folders == []


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["sync=glob(nothing*)"], "nothing is called like this"),
        (["optim.inner.lr=interval(0.1,0.2)"], "an interval has no end of values"),
        (["train.seed=range(0,200)", "train.steps=range(1,200)"], "39,800 combinations"),
        (["train.seed=1"], "train -m needs a key with several values"),
        (["train.seeds=1,2"], "did you mean train.seed?"),
    ],
)
def test_what_is_no_sweep_is_one_error(words: list[str], message: str, sweep: Sweep, runs: Runs) -> None:
    code, _, err = sweep(*words)
    assert code == 2 and message in err and runs.folders == [] and not Path("sw").exists()


@pytest.mark.slow
def test_a_glob_is_all_choices_of_its_name(sweep: Sweep, runs: Runs) -> None:
    assert sweep("compress=glob(int?_ef)", "train.steps=3")[0] == 0
    assert [folder.name for folder in runs.folders] == [
        "0-compress-int2_ef",
        "1-compress-int4_ef",
        "2-compress-int8_ef",
    ]


@pytest.mark.parametrize("folder", ["{}/victim", "{}/sw/../victim", "../victim"])
def test_a_table_that_names_folders_elsewhere_leads_nowhere(
    folder: str, sweep: Sweep, runs: Runs, tmp_path: Path
) -> None:
    victim = tmp_path / "victim"
    for made in (victim, tmp_path / "sw"):
        made.mkdir()
    table = [{"values": f"train.seed={seed}", "folder": folder.format(tmp_path)} for seed in (1, 2)]
    (tmp_path / "sw" / "sweep.json").write_text(json.dumps(table[:1]))
    sweep("train.seed=1,2")
    assert list(victim.iterdir()) == [] and victim not in runs.folders


@pytest.mark.parametrize("folder", ["", ".", "..", "/", "sw/.."])
def test_a_folder_without_a_name_of_its_own_is_damage(folder: str, sweep: Sweep, runs: Runs, tmp_path: Path) -> None:
    (tmp_path / "sw").mkdir()
    (tmp_path / "sw" / "sweep.json").write_text(json.dumps([{"values": "train.seed=1", "folder": folder}]))
    assert sweep("train.seed=1,2")[0] == 2 and runs.folders == []
