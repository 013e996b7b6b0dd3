"""Which run goes on, whether it may, and what is written down before the workers start."""

from __future__ import annotations

import dataclasses
import json
import re
from collections.abc import Callable
from pathlib import Path

import pytest

from dtrain.errors import ConfigError, DtrainError, ResumeError
from dtrain.train.config import Config, check_resume, compose, differences, load, run_folder, to_yaml
from dtrain.train.config.compatibility import ABSENT, MAY_CHANGE_AT_RESUME

Make = Callable[..., Config]
DATA: dict[str, object] = {"root": "text", "sha256": "abc"}


def begun(config: Config, *steps: int) -> Path:
    """A run folder as it is after the steps."""
    run_folder.write(config, DATA)
    for step in steps:
        (Path(config.run.dir) / "checkpoints" / f"step-{step:010d}").mkdir(parents=True)
    return Path(config.run.dir)


# ---- what may change -----------------------------------------------------------------------------------------------


def test_differences_name_every_key_with_both_values(make: Make) -> None:
    old = make()
    new = make("train.steps=7", "optim.inner.lr=0.5", "sync=dense", "model.hidden=8")
    found = {difference.key: (difference.old, difference.new) for difference in differences(old, new)}
    assert found["train.steps"] == (300, 7) and found["optim.inner.lr"][1] == 0.5
    assert found["sync._target_"] == ("dtrain.diloco", "dtrain.every_step")
    assert found["sync.every_steps"][1] == ABSENT and found["model.hidden"] == (ABSENT, 8)
    assert str(differences(old, make("train.steps=7"))[0]) == "train.steps: 300 -> 7"
    assert differences(old, old) == []


@pytest.mark.parametrize(
    "override",
    [
        "train.steps=600", "train.stop_after_steps=3", "train.checkpoint_every_steps=1", "train.keep_checkpoints=3",
        "train.evaluate_every_steps=1", "train.evaluation_examples=8", "train.log_every_steps=1",
        "train.agree_every_steps=1", "train.max_skipped_steps=0", "train.microbatch_size=1", "engine=zero3",
        "engine.precision=bf16", "launcher.max_restarts=0", "run.resume=never", "mesh={replicate: 4, shard: 1}",
    ],
)  # fmt: skip
def test_what_has_no_part_in_what_is_computed_may_change(override: str, make: Make) -> None:
    check_resume(make(), make(override))


@pytest.mark.parametrize(
    ("override", "line"),
    [
        ("train.seed=2", "train.seed: 1 -> 2"),
        ("train.batch_size=8", "train.batch_size: 32 -> 8"),
        ("train.clip_norm=0", "train.clip_norm: 1.0 -> 0.0"),
        ("optim.inner.lr=0.5", "optim.inner.lr: 0.003 -> 0.5"),
        ("optim.schedule=linear", "optim.schedule: cosine -> linear"),
        ("sync.every_steps=3", "sync.every_steps: 20 -> 3"),
        ("sync.compress=null", "sync.compress: dtrain.compress.quantize -> null"),
        ("model.layers=2", "model.layers: 4 -> 2"),
        ("data.block=8", "data.block: 16 -> 8"),
    ],
)
def test_anything_else_is_refused_with_the_difference(override: str, line: str, make: Make) -> None:
    with pytest.raises(ResumeError, match=re.escape(f"\n    {line}\n")) as refused:
        check_resume(make(), make(override, "train.steps=7"))
    assert "train.steps" not in str(refused.value) and refused.value.exit_code == 2


def test_the_advice_can_be_followed(make: Make) -> None:
    old = make("run.dir=runs/x")
    with pytest.raises(ResumeError) as refused:
        check_resume(old, make("run.dir=runs/y", "run.resume=runs/x", "train.seed=2", "data.block=8", "sync=dense"))
    assert str(refused.value) == (
        "runs/x cannot go on like this: what these keys say may not change at a resume (then -> now):\n"
        "    data.block: 16 -> 8\n"
        "    sync._target_: dtrain.diloco -> dtrain.every_step\n"
        "    train.seed: 1 -> 2\n"
        "go on with what was: data.block=16 train.seed=1, and the choices of runs/x/config.yaml\n"
        "or begin at step 0 with its weights and all else anew: a run.dir that has no run yet, without run.resume, and "
        "run.weights=runs/x\n"
        "or start from step 0: a run.dir that has no run yet, without run.resume"
    )
    check_resume(old, make("run.dir=runs/y", "run.resume=runs/x", "data.block=16", "train.seed=1"))


def test_every_pattern_of_what_may_change_is_of_keys_that_exist() -> None:
    from fnmatch import filter as matching

    keys = [difference.key for difference in differences(Config(), compose(["run.dir=x"]))]
    keys += [f"sync.{key}" for key in compose(["sync=one_byte"]).sync] + ["metrics"]
    keys += [
        f"{s.name}.{f.name}"
        for s in dataclasses.fields(Config)
        if dataclasses.is_dataclass(v := getattr(Config(), s.name))
        for f in dataclasses.fields(v)
    ]
    assert all(matching(keys, pattern) and reason for pattern, reason in MAY_CHANGE_AT_RESUME.items())


# ---- which run goes on ---------------------------------------------------------------------------------------------


def test_auto_starts_in_an_empty_folder_and_goes_on_in_its_own(make: Make) -> None:
    config = make()
    assert run_folder.previous(config) is None
    folder = begun(config)
    assert run_folder.previous(config) == folder  # config.yaml alone: it was killed before its first checkpoint
    begun(config, 10)
    assert run_folder.previous(config) == folder


def test_never_refuses_a_folder_that_has_a_run(make: Make) -> None:
    config = make("run.resume=never")
    assert run_folder.previous(config) is None
    begun(config)
    with pytest.raises(ResumeError, match=r"has a run already, and run\.resume=never: choose another run\.dir"):
        run_folder.previous(config)


def test_a_path_names_a_run_or_one_of_its_checkpoints(make: Make, tmp_path: Path) -> None:
    other = begun(make(f"run.dir={tmp_path / 'other'}"), 10, 20)
    for path in (other, other / "checkpoints" / "step-0000000010"):
        assert run_folder.previous(make(f"run.resume={path}")) == other
    for path in (tmp_path / "nowhere", tmp_path / "text", other / "checkpoints" / "step-0000000030"):
        with pytest.raises(ResumeError, match=re.escape(f"run.resume={path} has no checkpoint: give a run folder")):
            run_folder.previous(make(f"run.resume={path}"))


def test_a_word_that_is_neither_auto_nor_never_is_a_path(make: Make) -> None:
    with pytest.raises(ResumeError, match=r"atuo has no checkpoint: .*auto or never"):
        run_folder.previous(run_folder.absolute(make("run.resume=atuo")))


def test_the_same_command_again_goes_on_with_its_own_run_not_at_the_path(make: Make, tmp_path: Path) -> None:
    other = begun(make(f"run.dir={tmp_path / 'other'}"), 10)
    config = make(f"run.resume={other}")
    mine = begun(config, 20)
    assert run_folder.previous(config) == mine


def test_another_run_in_the_folder_is_refused(make: Make, tmp_path: Path) -> None:
    other = begun(make(f"run.dir={tmp_path / 'other'}"), 10)
    begun(make(), 20)
    with pytest.raises(ResumeError, match=r"has a run that did not start from run\.resume="):
        run_folder.previous(make(f"run.resume={other}"))


def test_paths_mean_the_same_wherever_a_worker_starts(
    make: Make, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.chdir(tmp_path)
    run = run_folder.absolute(make("run.dir=runs/x", "run.resume=../y")).run
    assert run.dir == str(tmp_path / "runs/x") and Path(run.resume).is_absolute()
    assert run_folder.absolute(make()).run.resume == "auto"


# ---- whether it may ------------------------------------------------------------------------------------------------


def test_the_same_run_may_go_on_and_another_configuration_may_not(make: Make) -> None:
    folder = begun(make(), 10)
    run_folder.check(make("train.steps=7"), DATA, folder)
    with pytest.raises(ResumeError, match=r"train\.seed: 1 -> 5"):
        run_folder.check(make("train.seed=5"), DATA, folder)


@pytest.mark.parametrize("changed", [{"sha256": "xyz"}, {"digest": "xyz"}, {}])
def test_other_data_are_refused_whatever_their_path_says(changed: dict[str, object], make: Make) -> None:
    folder = begun(make(), 10)
    run_folder.check(make(), {**DATA, "root": "moved"}, folder)
    with pytest.raises(
        ResumeError, match=r"the data have changed since .*: the digest was abc and is .*data\.json lists"
    ):
        run_folder.check(make(), changed, folder)


def test_the_same_data_may_lie_elsewhere(make: Make, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    folder = begun(make("data.path=here"), 10)
    run_folder.check(make("data.path=there"), {**DATA, "root": "there"}, folder)
    with pytest.raises(ResumeError, match=r"data\.path: .*here -> .*there"):
        run_folder.check(make("data.path=there"), {"sha256": "xyz"}, folder)
    (folder / "data.json").unlink()
    with pytest.raises(ResumeError, match=r"data\.path: .*here -> .*there"):
        run_folder.check(make("data.path=there"), DATA, folder)  # nothing says that they are the same
    (tmp_path / "moved").mkdir()
    monkeypatch.chdir(tmp_path)
    assert run_folder.absolute(make("data.path=moved")).data["path"] == str(tmp_path / "moved")
    assert run_folder.absolute(make("data.path=user/dataset")).data["path"] == "user/dataset"  # nothing here


@pytest.mark.parametrize("name", ["vocab_size", "held_out", "count"])
def test_data_that_are_cut_in_another_way_are_others(name: str, make: Make) -> None:
    config, described = make(), {**DATA, "vocab_size": 256, "held_out": [[4, 8]], "count": 9}
    folder = begun(config, 10)
    run_folder.write(config, described)
    run_folder.check(make(), {**described, "held_out": ((4, 8),)}, folder)
    with pytest.raises(ResumeError, match=f"the data have changed since .*the {name} was "):
        run_folder.check(make(), {**described, name: 7}, folder)


@pytest.mark.parametrize("text", ["[]", "3", "{", "\xff", "[" * 100_000, '{"sha256": NaN}'])
def test_a_damaged_record_of_the_data_is_told(text: str, make: Make) -> None:
    folder = begun(make(), 10)
    (folder / "data.json").write_bytes(text.encode("latin-1"))
    with pytest.raises(ResumeError, match=r"data\.json is damaged"):
        run_folder.check(make(), DATA, folder)


@pytest.mark.parametrize("text", ["", "{}", "model: {_target_: x}\n", "run: {dir: x}\ntrain: {}\n"])
def test_a_configuration_that_lacks_sections_is_damaged_and_not_one_of_defaults(text: str, make: Make) -> None:
    folder = begun(make(), 10)
    (folder / "config.yaml").write_text(text)
    with pytest.raises(ConfigError, match=r"config\.yaml is damaged: it lacks .*sync"):
        run_folder.check(make(), DATA, folder)


def test_what_a_stored_configuration_would_look_up_is_not_looked_up(
    make: Make, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("SECRET", "5")
    folder = begun(make(), 10)
    text = (folder / "config.yaml").read_text()
    for key, value in (("seed", "${oc.env:SECRET}"), ("seed", "${train.steps}"), ("name", "a${oc.env:SECRET}")):
        (folder / "config.yaml").write_text(re.sub(rf"(\n  {key}: ).*", rf"\g<1>{value}", text, count=1))
        with pytest.raises(ConfigError, match=r"would be looked up here"):
            load(folder / "config.yaml")


def test_checkpoints_without_a_configuration_are_refused(make: Make, tmp_path: Path) -> None:
    (tmp_path / "run" / "checkpoints" / "step-0000000001").mkdir(parents=True)
    folder = run_folder.previous(make())
    assert folder is not None
    with pytest.raises(ResumeError, match=r"has checkpoints but no config\.yaml"):
        run_folder.check(make(), DATA, folder)


def test_a_stored_description_that_is_damaged_is_refused(make: Make) -> None:
    folder = begun(make(), 10)
    (folder / "data.json").write_text("{")
    with pytest.raises(DtrainError, match=re.escape(str(folder / "data.json"))):
        run_folder.check(make(), DATA, folder)


# ---- what is written -----------------------------------------------------------------------------------------------


def test_a_run_folder_says_with_what_the_run_was_made(make: Make) -> None:
    config = make()
    path = run_folder.write(config, DATA)
    assert load(path) == config and json.loads((path.parent / "data.json").read_text()) == DATA
    assert json.loads((path.parent / "environment.json").read_text())["versions"]["torch"]
    assert sorted(entry.name for entry in path.parent.iterdir()) == ["config.yaml", "data.json", "environment.json"]


def test_configurations_that_were_replaced_stay(make: Make) -> None:
    texts = []
    for steps in (3, 3, 5, 7):
        config = make(f"train.steps={steps}")
        path = run_folder.write(config, DATA)
        texts.append(to_yaml(config))
    assert [entry.name for entry in sorted(path.parent.glob("config*"))] == [
        "config-1.yaml",
        "config-2.yaml",
        "config.yaml",
    ]
    kept = [(path.parent / name).read_text() for name in ("config-1.yaml", "config-2.yaml", "config.yaml")]
    assert kept == texts[1:]


def test_the_outcome_of_an_earlier_launch_is_forgotten(make: Make) -> None:
    folder = begun(make())
    assert run_folder.outcome(folder) is None
    (folder / "outcome.json").write_text('{"reason": "finished", "signal": null, "step": 3}')
    assert run_folder.outcome(folder) == {"reason": "finished", "signal": None, "step": 3}
    run_folder.write(make(), DATA)
    assert run_folder.outcome(folder) is None


def test_a_damaged_outcome_is_an_error(make: Make) -> None:
    folder = begun(make())
    (folder / "outcome.json").write_text("{")
    with pytest.raises(DtrainError, match=r"outcome\.json is damaged"):
        run_folder.outcome(folder)


def test_a_file_in_the_place_of_the_folder_is_refused(make: Make, tmp_path: Path) -> None:
    (tmp_path / "run").write_text("")
    with pytest.raises(ConfigError, match=r"cannot be written to: .*; choose another run\.dir"):
        run_folder.write(make(), DATA)
    with (
        pytest.raises(ConfigError, match=r"cannot be written to: .*; choose another run\.dir"),
        run_folder.locked(tmp_path / "run"),
    ):
        pass
    assert (tmp_path / "run").read_text() == ""


def _lock(folder: Path) -> str:
    try:
        with run_folder.locked(folder):
            return "locked"
    except ConfigError as error:
        return str(error)


def test_a_run_folder_belongs_to_one_command_at_a_time(tmp_path: Path) -> None:
    folder = tmp_path / "deep" / "run"
    with run_folder.locked(folder):
        assert "is in use by another dtrain: wait, or choose another" in _lock(folder)
    assert _lock(folder) == "locked"
