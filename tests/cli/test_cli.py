"""The command as scripts see it: exit codes, what it prints, and that bad input launches and writes nothing."""

from __future__ import annotations

import dataclasses
import json
import os
import re
import shlex
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
import torch

import dtrain
from dtrain.cli.foreground import follow_run
from dtrain.cli.main import main
from dtrain.comm.layout import Segment
from dtrain.launchers.failure import Ending, Failure
from dtrain.report.summary import Summary
from dtrain.train.checkpoint.state import RankState
from dtrain.train.config import compose, load, run_folder
from tests.fakes.checkpoint_threads import write_together

SUMMARY = Summary(
    run="runs/x", replicas=2, shards=2, engine="fsdp", steps=3, seconds=1.0, skipped_steps=0, loss=1.5,
    validation_loss=1.6, evaluated="parameters", tokens_per_second=10.0, sent_bytes_per_rank=1, dense_bytes_per_rank=4,
    compute_utilization=0.9, exposed_fraction=0.1, parameters_digest="abc",
)  # fmt: skip
FINISHED = Ending("finished", None, 0, ())

Shell = Callable[..., tuple[int, str, str]]


class Launches:
    """Stands for the launcher: keeps what it was asked for, leaves ``outcome`` and ends as ``ending`` says."""

    def __init__(self) -> None:
        self.asked: list[dict[str, object]] = []
        self.ending, self.outcome, self.summary = FINISHED, '{"reason": "finished", "signal": null, "step": 3}', True

    def __call__(self, argv: list[str], **keywords: object) -> Ending:
        self.asked.append({"argv": argv, **keywords})
        folder = Path(argv[-1]).parent
        if self.outcome:
            (folder / "outcome.json").write_text(self.outcome)
        if self.summary:
            SUMMARY.write(folder / "summary.json")
        return self.ending


@pytest.fixture
def launches(monkeypatch: pytest.MonkeyPatch) -> Launches:
    fake = Launches()
    monkeypatch.setattr("dtrain.launchers.elastic_agent.launch", fake)
    return fake


@pytest.fixture(autouse=True)
def _here(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The command runs in an empty folder, and what it does to sys.path is undone."""
    monkeypatch.setattr(sys, "path", list(sys.path))
    (tmp_path / "here").mkdir()
    monkeypatch.chdir(tmp_path / "here")


@pytest.fixture
def text(tmp_path: Path) -> Path:
    folder = tmp_path / "text"
    folder.mkdir()
    for number in range(6):
        (folder / f"{number}.txt").write_text("\n".join(f"{i} times {number} is {i * number}" for i in range(40)))
    return folder


@pytest.fixture
def shell(capsys: pytest.CaptureFixture[str]) -> Shell:
    """shell("train", "engine=ddp", ...): exit code, standard output, standard error."""

    def run(*words: str) -> tuple[int, str, str]:
        try:
            code = main(words)
        except SystemExit as end:  # argparse: --help, --version and its own errors
            code = end.code if isinstance(end.code, int) else 1
        return code, *capsys.readouterr()

    return run


@pytest.fixture
def train(shell: Shell, text: Path) -> Shell:
    """train("engine=ddp", ...): as `shell`, on a little text and into run/."""
    return lambda *words: shell("train", "run.dir=run", f"data.path={text}", "data.block=16", *words)


@pytest.fixture
def nothing_happens(launches: Launches, text: Path, tmp_path: Path) -> Iterator[None]:
    """Nothing is launched and nothing is written."""

    def files() -> dict[Path, bytes]:
        return {path: path.read_bytes() if path.is_file() else b"" for path in tmp_path.rglob("*")}

    before = files()
    yield
    assert launches.asked == [] and files() == before


# ---- bad input -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["train.stepz=3"], "there is no key train.stepz; did you mean train.steps?"),
        (["engine=zero4"], "did you mean zero3?"),
        (["sync=dilocoo"], "did you mean diloco?"),
        (["train.steps=many"], "train.steps must be an integer, but is 'many' (text)"),
        (["sync.compress.bits=nine"], "sync.compress.bits must be an integer"),
        (["train.steps=0"], "train.steps must be at least 1, but is 0"),
        (["train.steps"], "an override is written key=value"),
        (["mesh.shard=3"], "set launcher.workers=6, or choose mesh.replicate and mesh.shard whose product is 4"),
        (["launcher.workers=3"], "set launcher.workers=4, or choose"),
        (["train.batch_size=15"], "choose 12 or 16"),
        (["sync.every_steps=0"], "every_steps is 0"),
        (["model.heads=3"], "model: "),
        (["model._target_=absent.Model"], "there is no absent to import here (is its folder in PYTHONPATH?)"),
        (["optim.inner.lr=-1"], "Invalid learning rate"),
        (["data.path=/nowhere"], "cannot open '/nowhere': No such file or directory"),
        (["data.block=100000"], "100001"),
        (["data=tokens"], "`dtrain data tokenize` writes it"),
        (["run.dir=../text/0.txt"], "0.txt is a file, not a folder; choose another run.dir"),
        (["run.resume=../text"], "has no checkpoint"),
        (["run.resume=atuo"], "auto or never"),
    ],
    ids=lambda value: " ".join(value) if isinstance(value, list) else "",
)
@pytest.mark.usefixtures("nothing_happens")
def test_bad_input_is_one_error_and_exit_code_2(words: list[str], message: str, train: Shell) -> None:
    code, out, error = train(*words)
    assert code == 2 and out == ""
    assert error.startswith("dtrain: error: ") and message in error and "Traceback" not in error


@pytest.mark.parametrize("override", ["engine=zero4", "mesh.shard=3", "data.path=/nowhere", "run.resume=atuo"])
@pytest.mark.usefixtures("nothing_happens")
def test_a_dry_run_refuses_what_a_run_would_refuse(override: str, train: Shell) -> None:
    code, out, error = train("--dry-run", override)
    assert code == 2 and out == "" and error.startswith("dtrain: error: ")


@pytest.mark.usefixtures("nothing_happens")
def test_an_empty_data_folder_is_refused(shell: Shell, tmp_path: Path) -> None:
    code, _, error = shell("train", "run.dir=run", f"data.path={tmp_path / 'here'}")
    assert code == 2 and str(tmp_path / "here") in error


@pytest.mark.parametrize(
    ("words", "message"),
    [
        ([], "the following arguments are required: VERB"),
        (["trian"], "invalid choice: 'trian'"),
        (["data"], "the following arguments are required: VERB"),
        (["train", "--dry"], "unrecognized arguments: --dry"),
        (["train", "engine=ddp", "--steps", "3"], "unrecognized arguments: --steps"),
        (["data", "tokenize", "-x"], "unrecognized arguments: -x"),
        (["train", "--", "python", "x.py"], "only launch and cluster exec take a program after --"),
    ],
)
@pytest.mark.usefixtures("nothing_happens")
def test_words_that_are_no_command_are_refused(words: list[str], message: str, shell: Shell) -> None:
    code, _, error = shell(*words)
    assert code == 2 and message in error and "usage: dtrain" in error


@pytest.mark.parametrize(
    ("resume", "words", "message"),
    [
        ("never", [], "has a run already, and run.resume=never"),
        ("auto", ["train.seed=9"], "train.seed: 1 -> 9"),
        ("auto", ["sync=dense"], "sync._target_: dtrain.diloco -> dtrain.every_step"),
        ("../other", [], "has a run that did not start from run.resume="),
    ],
)
def test_a_run_that_may_not_go_on_is_left_as_it_is(
    resume: str, words: list[str], message: str, train: Shell, launches: Launches, tmp_path: Path
) -> None:
    assert train()[0] == 0 and train("run.dir=../other")[0] == 0
    (tmp_path / "other" / "checkpoints" / "step-0000000003").mkdir(parents=True)
    launches.asked.clear()
    before = {path: path.read_bytes() for path in tmp_path.rglob("*") if path.is_file()}
    code, _, error = train(f"run.resume={resume}", *words)
    assert code == 2 and message in error and launches.asked == []
    assert {path: path.read_bytes() for path in tmp_path.rglob("*") if path.is_file()} == before


def test_changed_data_are_refused(train: Shell, launches: Launches, text: Path) -> None:
    assert train()[0] == 0
    (text / "new.txt").write_text("new words" * 30)
    code, _, error = train()
    assert code == 2 and "the data have changed since" in error and len(launches.asked) == 1


def test_a_folder_that_is_in_use_is_refused(train: Shell, launches: Launches) -> None:
    with run_folder.locked(Path("run")):
        code, _, error = train()
    assert code == 2 and "is in use by another dtrain" in error and launches.asked == []


# ---- good input ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("words", "warning"),
    [
        (("train.steps=9",), "sync.every_steps=20 is more than the 9 steps there are: the replicas train alone"),
        (("train.steps=30", "sync.warmup_steps=30"), "sync.warmup_steps=30 is all of train.steps=30: the run ends in"),
    ],
)
def test_rounds_that_are_longer_than_the_run_are_warned_of(
    train: Shell, launches: Launches, words: tuple[str, ...], warning: str
) -> None:
    code, _, error = train("engine=ddp", *words)
    assert code == 0 and error.startswith(f"dtrain: warning: {warning}") and error.count("\n") == 1


def test_training_writes_the_run_folder_and_launches_the_workers_on_it(
    train: Shell, launches: Launches, tmp_path: Path
) -> None:
    code, out, error = train("engine=ddp", "launcher.max_restarts=7", "train.steps=29")
    folder = tmp_path / "here" / "run"
    (asked,) = launches.asked
    assert code == 0 and error == ""
    assert asked["argv"] == [sys.executable, "-u", "-m", "dtrain.train.worker", str(folder / "config.yaml")]
    assert (asked["workers"], asked["max_restarts"], asked["log_folder"]) == (4, 7, folder / "logs")
    config = load(folder / "config.yaml")
    assert (config.engine.name, config.train.steps, config.run.dir) == ("ddp", 29, str(folder))
    assert json.loads((folder / "data.json").read_text())["sha256"]
    assert f"run {folder} starts: 4 workers, 2 replicas x 2 shards, ddp" in out and "loss 1.500" in out


def test_the_same_command_again_goes_on(train: Shell, launches: Launches) -> None:
    assert train()[0] == 0
    code, out, _ = train("train.steps=600")
    assert code == 0 and len(launches.asked) == 2 and "run goes on from " in out


@pytest.mark.parametrize(
    "order", [["--dry-run", "engine=ddp", "sync=dense"], ["engine=ddp", "--dry-run", "sync=dense"]]
)
@pytest.mark.usefixtures("nothing_happens")
def test_a_dry_run_prints_what_would_be_done(order: list[str], train: Shell, tmp_path: Path) -> None:
    code, out, error = train(*order)
    assert code == 0 and error == ""
    printed = tmp_path / "printed.yaml"
    printed.write_text(out)
    config = load(printed)
    printed.unlink()
    assert (config.engine.name, config.sync["_target_"]) == ("ddp", "dtrain.every_step")
    assert config.run.dir == str(tmp_path / "here" / "run")
    assert "# starts from step 0\n# 4 workers, each: " in out
    assert f"-m dtrain.train.worker {config.run.dir}/config.yaml\n" in out


def test_a_dry_run_says_what_would_go_on(train: Shell, launches: Launches) -> None:
    train()
    assert "# goes on from " in train("--dry-run")[1] and len(launches.asked) == 1


def test_a_module_in_the_current_folder_is_found_as_the_workers_find_it(train: Shell, launches: Launches) -> None:
    Path("mine_for_cli.py").write_text("from torch import nn\nclass Model(nn.Linear):\n    pass\n")
    target = ["model=custom", "model._target_=mine_for_cli.Model", "model.in_features=2", "model.out_features=3"]
    assert train(*target)[0] == 0 and len(launches.asked) == 1


# ---- how it ends ---------------------------------------------------------------------------------------------------


def failure(exit_code: int | None, by_signal: str | None = None) -> Failure:
    return Failure(
        rank=2, exit_code=exit_code, signal=by_signal, message="ValueError: no luck", traceback="", host="here",
        log=Path("logs/rank-2.log"), time=1.0, consequence=False,
    )  # fmt: skip


def signalled(number: int) -> Ending:
    return Ending("signalled", number, 0, ())


def said(reason: str, number: int | None = None) -> str:
    return json.dumps({"reason": reason, "signal": number, "step": 12})


@pytest.mark.parametrize(
    ("ending", "outcome", "code", "words"),
    [
        (FINISHED, said("finished"), 0, "loss 1.500"),
        (FINISHED, said("stopped"), 0, "stopped at step 12 as asked; it goes on with a larger train.stop_after_steps"),
        (signalled(signal.SIGTERM), said("signal", signal.SIGTERM), 75, "SIGTERM: checkpointed at step 12; the same"),
        (signalled(signal.SIGUSR1), said("signal", signal.SIGUSR1), 75, "SIGUSR1: checkpointed at step 12"),
        (signalled(signal.SIGINT), said("signal", signal.SIGINT), 130, "SIGINT: checkpointed at step 12"),
        (signalled(signal.SIGTERM), said("finished"), 0, "loss 1.500"),  # it came too late
        (signalled(signal.SIGINT), "", 130, "ended before it could checkpoint; there is no checkpoint, so the same"),
        (signalled(signal.SIGTERM), "", 1, "the run ended by SIGTERM before it had a checkpoint"),
        (Ending("failed", None, 3, (failure(1),)), "", 1, "rank 2 failed: ValueError: no luck"),
        (Ending("failed", None, 3, (failure(None, "SIGKILL"),)), "", 1, "SIGKILL"),
        (Ending("failed", None, 0, (failure(2),)), "", 2, "rank 2 failed: ValueError: no luck"),
        (Ending("failed", None, 0, (failure(1), failure(2))), "", 1, "rank 2 failed"),
        (Ending("failed", None, 0, (failure(1),)), said("finished"), 1, "rank 2 failed"),
        (FINISHED, "", 1, "ended by an unknown cause"),
        (FINISHED, "{", 1, "outcome.json is damaged"),
    ],
)
def test_the_exit_code_says_how_the_run_ended(
    ending: Ending, outcome: str, code: int, words: str, train: Shell, launches: Launches
) -> None:
    launches.ending, launches.outcome = ending, outcome
    found, out, error = train()
    assert found == code
    assert words in (error if code in (1, 2) else out)


BY_CTRL_C = dataclasses.replace(failure(1), message="KeyboardInterrupt: ")


@pytest.mark.parametrize(("failures", "told"), [((BY_CTRL_C, failure(None, "SIGINT")), False), ((failure(1),), True)])
def test_ctrl_c_while_the_workers_start_is_no_failure(
    failures: tuple[Failure, ...], told: bool, train: Shell, launches: Launches
) -> None:
    launches.ending, launches.outcome = Ending("signalled", signal.SIGINT, 0, failures), ""
    code, _, error = train()
    assert code == 130 and error.startswith("dtrain: error: rank 2 failed: ValueError" if told else "") is True
    assert bool(error) is told


def resuming_line(out: str) -> list[str]:
    (line,) = [line for line in out.splitlines() if line.startswith("  ") and " train " in line]
    words = shlex.split(line)
    assert words[:3] == [sys.executable, "-m", "dtrain"]
    return words[4:]


def test_the_command_that_goes_on_is_whole(shell: Shell, text: Path, launches: Launches) -> None:
    launches.outcome = said("stopped")
    given = [f"data.path={text}", "data.block=16", "optim.inner.betas=[0.8, 0.9]", "train.stop_after_steps=12"]
    code, out, _ = shell("train", *given, "run.resume=never")
    (folder,) = Path("runs").glob("*/*-diloco")
    assert code == 0 and resuming_line(out) == [*given[:3], f"run.dir={folder}"]
    launches.outcome = said("signal", signal.SIGTERM)
    code, out, _ = shell("train", *given, "run.dir='a folder'")
    assert code == 75 and resuming_line(out) == [*given, "run.dir='a folder'"]
    code, out, _ = shell("train", *given[:3], "train={stop_after_steps: 12}", "run={dir: 'b c', resume: never}")
    assert code == 75 and resuming_line(out)[-2:] == ["run.resume=auto", "run.dir='b c'"]


def finished(folder: Path, step: int, *, summed_up: int) -> None:
    """What a run leaves that has come to a step, without ranks: enough to be looked at."""
    part = Segment("w", offset=0, numel=2)
    state = RankState({"w": part}, {"parameters": {"w": torch.ones(2)}}, {"parameters": "replicated"}, {"step": step})
    write_together(folder / "checkpoints", step=step, states=[state], shards=1, shapes={"w": (2,)})
    dataclasses.replace(SUMMARY, steps=summed_up).write(folder / "summary.json")


def everything(folder: Path) -> dict[Path, bytes]:
    return {path: path.read_bytes() for path in folder.rglob("*") if path.is_file()}


@pytest.mark.parametrize(
    ("words", "code", "message"),
    [
        (["train.steps=10"], 0, "already finished: "),
        (
            ["train.steps=10", "mesh.replicate=1", "mesh.shard=2", "launcher.workers=2"],
            0,
            "step 10 of 10; train.steps=",
        ),
        (["train.steps=10", "--dry-run"], 0, "already finished: "),
        (["train.steps=20", "train.stop_after_steps=10"], 0, "already stopped: "),
        (["train.steps=5"], 2, "train.steps=5, but "),
        (["train.steps=5", "--dry-run"], 2, "is at step 10 already: give a larger train.steps"),
        (["train.steps=20", "train.stop_after_steps=5"], 2, "train.stop_after_steps=5, but "),
        (["train.steps=10", "run.dir=new", "run.resume=run"], 2, "is at step 10 already"),
        (["train.steps=5", "run.dir=new", "run.resume=run"], 2, "is at step 10 already"),
    ],
)
def test_a_run_that_is_as_far_as_asked_is_left_as_it_is(
    words: list[str], code: int, message: str, train: Shell, launches: Launches
) -> None:
    train("train.steps=10")
    finished(Path("run"), 10, summed_up=10)
    launches.asked.clear()
    before = everything(Path())
    found, out, error = train(*words)
    assert found == code and message in (error if code else out)
    assert launches.asked == [] and everything(Path()) == before and not Path("new").exists()


@pytest.mark.parametrize(("steps", "summed_up"), [(11, 10), (10, 5)])
def test_a_run_that_has_something_left_is_launched(
    steps: int, summed_up: int, train: Shell, launches: Launches
) -> None:
    # Without its summary a run is not finished: it was killed after its last checkpoint.
    train("train.steps=10")
    finished(Path("run"), 10, summed_up=summed_up)
    assert train(f"train.steps={steps}")[0] == 0 and len(launches.asked) == 2


def test_a_damaged_last_checkpoint_does_not_finish_a_run(train: Shell, launches: Launches) -> None:
    train("train.steps=10")
    for step in (5, 10):
        finished(Path("run"), step, summed_up=10)
    for step, code in ((10, 0), (5, 2)):  # with none left that is intact, nothing is launched
        (data,) = Path(f"run/checkpoints/step-{step:010d}").glob("*.safetensors")
        data.write_bytes(data.read_bytes()[:-1] + b"\x7f")
        ended = train("train.steps=10")
        assert ended[0] == code and len(launches.asked) == 2
    assert "none of them can be used" in ended[2]


def test_ctrl_c_is_answered_at_once(train: Shell, monkeypatch: pytest.MonkeyPatch) -> None:
    def launch(*_: object, **__: object) -> Ending:
        old = signal.signal(signal.SIGINT, lambda number, frame: None)  # as the launcher notes it
        os.kill(os.getpid(), signal.SIGINT)
        time.sleep(0.5)
        signal.signal(signal.SIGINT, old)
        return signalled(signal.SIGINT)

    monkeypatch.setattr("dtrain.launchers.elastic_agent.launch", launch)
    code, out, _ = train()
    (line,) = [line for line in out.splitlines() if "stopping: " in line]
    assert code == 130 and "SIGINT: " in line and "Ctrl-C again ends at once (there is no checkpoint yet)" in line


class Followed:
    """A job of this machine, at which somebody presses Ctrl-C."""

    id, scheduled = "7", False

    def __init__(self, folder: Path, outcome: str) -> None:
        self.folder, self.outcome, self.cancelled = folder, outcome, False

    def state(self) -> str:
        if not self.cancelled:
            raise KeyboardInterrupt
        return "cancelled"

    def cancel(self) -> None:
        self.cancelled = True

    def wait(self) -> None:
        if self.outcome:
            (self.folder / "outcome.json").write_text(self.outcome)


@pytest.mark.parametrize(
    ("outcome", "said_last"),
    [("", "ended before it could checkpoint"), (said("signal", signal.SIGTERM), "checkpointed at step 12")],
)
def test_ctrl_c_at_a_job_that_is_followed(
    outcome: str, said_last: str, capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    config = compose([f"run.dir={tmp_path}", "launcher=mpi"])
    code = follow_run(config, Followed(tmp_path, outcome), ["launcher=mpi"])  # type: ignore[arg-type]  # enough of a job
    out = capsys.readouterr().out
    assert code == 130 and "job 7: stopping: a checkpoint is written" in out and said_last in out


def test_an_interrupt_before_the_launch_is_no_traceback(train: Shell, monkeypatch: pytest.MonkeyPatch) -> None:
    def interrupted(*_: object, **__: object) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr("dtrain.launchers.elastic_agent.launch", interrupted)
    assert train()[0] == 130


# ---- help ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("words", "parts"),
    [
        (["--help"], ["train a model", "prepare data", "dtrain train --dry-run sync=local_sgd"]),
        (["train", "--help"], ["exit codes:", "75 checkpointed after a signal", "--dry-run", "run.resume"]),
        (["data", "--help"], ["tokenize"]),
        (["data", "tokenize", "--help"], ["held_out=0.05", "tokenizer=bytes", "dtrain train data=tokens"]),
        (["--version"], [f"dtrain {dtrain.__version__}"]),
    ],
)
def test_help_names_what_there_is(words: list[str], parts: list[str], shell: Shell) -> None:
    code, out, _ = shell(*words)
    assert code == 0 and all(part in out for part in parts)


def test_the_help_names_every_choice_of_every_group(shell: Shell) -> None:
    from dtrain.train.config.choices import folder

    _, out, _ = shell("train", "--help")
    named = {
        group.partition("@")[0]: set(choices.split(","))
        for group, choices in re.findall(r"([a-z@.]+)=\{([a-z0-9_,]+)\}", out)
    }
    groups = {
        entry.name: {path.stem for path in entry.glob("*.yaml")} for entry in folder().iterdir() if entry.is_dir()
    }
    assert {group: choices for group, choices in groups.items() if len(choices) > 1} == named


@pytest.mark.slow
def test_the_examples_of_the_help_compose(shell: Shell, text: Path, launches: Launches) -> None:
    Path("exp.yaml").write_text("sync: dense\ntrain: {steps: 3}\n")
    for words in (["--help"], ["train", "--help"]):
        _, out, _ = shell(*words)
        examples = re.findall(r"^  dtrain train(.*?)(?:  .*)?$", out, re.MULTILINE)
        assert len(examples) >= 2
        for example in examples:
            overrides = [word for word in example.split() if not word.startswith(("run.resume", "model", "--"))]
            assert shell("train", *overrides, "--dry-run", f"data.path={text}", "data.block=16")[0] == 0
    assert launches.asked == []


@pytest.mark.processes
def test_python_m_dtrain_is_the_command() -> None:
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(sys.path)}
    done = subprocess.run(
        [sys.executable, "-m", "dtrain", "train", "foo"], capture_output=True, text=True, env=environment
    )
    assert done.returncode == 2 and done.stderr.startswith("dtrain: error: cannot read 'foo'")


# ---- data ----------------------------------------------------------------------------------------------------------


def test_text_becomes_a_token_file_that_trains(shell: Shell, text: Path, launches: Launches) -> None:
    code, out, error = shell("data", "tokenize", f"source={text}", "out=tokens", "held_out=0.2")
    assert code == 0 and error == ""
    told = json.loads(out)
    assert told["out"] == "tokens" and told["vocab_size"] == 256 and told["files"] == 6
    assert sum(told["tokens"].values()) == Path("tokens/tokens.bin").stat().st_size
    assert shell("train", "run.dir=run", "data=tokens", "data.path=tokens", "data.block=16")[0] == 0
    assert len(launches.asked) == 1


def test_a_tokenizer_of_ones_own_is_taken(shell: Shell, text: Path) -> None:
    tokenizers = pytest.importorskip("tokenizers")
    tokenizer = tokenizers.Tokenizer(tokenizers.models.WordLevel({"times": 0, "is": 1, "?": 2}, unk_token="?"))
    tokenizer.pre_tokenizer = tokenizers.pre_tokenizers.Whitespace()
    tokenizer.save("tokenizer.json")
    code, out, _ = shell("data", "tokenize", f"source={text}", "out=tokens", "tokenizer=tokenizer.json")
    assert code == 0 and json.loads(out)["vocab_size"] == 3


@pytest.mark.parametrize(
    ("words", "message"),
    [
        ([], "say what source is: dtrain data tokenize source=FOLDER out=FOLDER"),
        (["source=../text"], "say what out is"),
        (["source=", "out=tokens"], "say what source is"),
        (["sourc=../text", "out=tokens"], "sourc=../text: there is no such setting; did you mean source?"),
        (["../text", "tokens"], "../text: there is no such setting (there are source, out, tokenizer, held_out)"),
        (["source=/nowhere", "out=tokens"], "/nowhere"),
        (["source=.", "out=tokens"], "'.'"),
        (["source=../text", "out=../text"], "exists already; remove it or give another out"),
        (["source=../text", "out=../text/0.txt/below"], "cannot write"),
        (["source=../text", "out=tokens", "held_out=some"], "held_out must be a number between 0 and 1, but is 'some'"),
        (["source=../text", "out=tokens", "held_out=1"], "held_out must be"),
        (["source=../text", "out=tokens", "held_out=0"], "held_out"),
        (["source=../text", "out=tokens", "held_out=nan"], "held_out must be"),
        (["source=../text", "out=tokens", "tokenizer=nope.json"], "nope.json"),
        (["source=../text", "out=tokens", "tokenizer=../text/0.txt"], "is no tokenizer.json"),
    ],
    ids=lambda value: " ".join(value) if isinstance(value, list) else "",
)
@pytest.mark.usefixtures("text", "nothing_happens")
def test_bad_settings_are_one_error_and_leave_nothing_behind(words: list[str], message: str, shell: Shell) -> None:
    code, out, error = shell("data", "tokenize", *words)
    assert code == 2 and out == ""
    assert error.startswith("dtrain: error: ") and message in error


@pytest.mark.processes
def test_a_store_for_members_is_served_until_a_signal_and_a_taken_port_is_told(shell: Shell) -> None:
    serving = [sys.executable, "-m", "dtrain", "members", "--port", "0"]
    with subprocess.Popen(serving, stdout=subprocess.PIPE, text=True) as process:
        assert process.stdout is not None
        said = process.stdout.readline()
        port = re.fullmatch(r"replicas meet at \S+:(\d+); Ctrl-C ends it\n", said)[1]  # type: ignore[index]
        code, _, error = shell("members", "--port", port)
        assert code == 1 and f"port {port} cannot be served" in error
        process.terminate()
        assert process.wait(20) == 0
