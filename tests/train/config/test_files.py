"""Files on a command line: ``@exp.yaml`` says what words say, later words win, and a run's own config.yaml is one."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

from dtrain.errors import ConfigError
from dtrain.launchers.slurm.launcher import SlurmLauncher
from dtrain.train.config import Config, compose, load, to_yaml

EXPERIMENT = """\
sync: streaming_diloco
compress@sync.compress: int8
engine: ddp
train:
  steps: 40
  batch_size: 8
optim.inner.lr: 1e-3
sync.every_steps: 5
launcher: {name: slurm, partition: "main,debug", environment: ["A=1,2"], nodes: 1}
run.dir: runs/a=b
"""


@pytest.fixture(autouse=True)
def _here(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    Path("exp.yaml").write_text(EXPERIMENT)


def test_a_file_says_what_words_say() -> None:
    words = [
        "sync=streaming_diloco", "compress=int8", "engine=ddp", "train.steps=40", "train.batch_size=8",
        "optim.inner.lr=1e-3", "sync.every_steps=5", "launcher.partition=main,debug", 'launcher.environment=["A=1,2"]',
        "launcher.nodes=1", "launcher.name=slurm", "run.dir=runs/a=b",
    ]  # fmt: skip
    assert compose(["@exp.yaml"]) == compose(words)


def test_later_words_win() -> None:
    Path("more.yaml").write_text("train.steps: 50\nsync: {every_steps: 6}\n")
    assert compose(["@exp.yaml", "@more.yaml", "train.batch_size=4"]).train.batch_size == 4
    assert compose(["@exp.yaml", "@more.yaml"]).train.steps == 50
    assert compose(["@more.yaml", "@exp.yaml"]).train.steps == 40
    assert compose(["train.steps=3", "@exp.yaml"]).train.steps == 40
    # Another choice does not keep what the file said for the one before.
    dense = compose(["@exp.yaml", "sync=dense"])
    assert dense.sync == compose(["sync=dense", "run.dir=x"]).sync and dense.train.steps == 40
    assert compose(["@exp.yaml", "optim=sgd"]).optim == compose(["optim=sgd", "run.dir=x"]).optim
    assert compose(["@exp.yaml", "engine=zero2"]).engine.name == "zero2"


@pytest.mark.slow
@pytest.mark.parametrize(
    "words", [[], ["sync=dense"], ["model=small", "optim=sgd", "launcher=slurm", "sync=every_step", "compress=int4_ef"]]
)
def test_the_configuration_of_a_run_is_such_a_file(words: list[str]) -> None:
    config = compose(["run.dir=x", "train.steps=7", *words])
    Path("config.yaml").write_text(to_yaml(config))
    assert compose(["@config.yaml"]) == config
    again = compose(["@config.yaml", "run.dir=y", "sync=diloco", "compress=int4", "sync.every_steps=3"])
    assert again.run.dir == "y" and again.train.steps == 7
    assert again.sync == compose(["run.dir=y", "compress=int4", "sync.every_steps=3"]).sync
    other = compose(["@config.yaml", "compress=sign_ef"]).sync
    assert other == {
        **config.sync,
        "compress": compose(["run.dir=x", "compress=sign_ef"]).sync["compress"],
    }


@pytest.mark.slow
def test_a_folder_of_ones_own_has_choices() -> None:
    Path("mine/sync").mkdir(parents=True)
    Path("mine/sync/rare.yaml").write_text("defaults: [diloco, _self_]\nevery_steps: 500\n")
    Path("mine/launcher").mkdir()
    Path("mine/launcher/site.yaml").write_text("name: slurm\npartition: gpu\nnodes: 2\n")
    for place in ("@mine", "@mine/", f"@{Path('mine').absolute()}"):
        config = compose([place, "sync=rare", "launcher=site", "launcher.nodes=4", "run.dir=x"])
        assert config.sync["every_steps"] == 500 and config.sync["_target_"] == "dtrain.diloco"
        assert config.launcher == SlurmLauncher(workers=4, nodes=4, partition="gpu")
    assert compose(["run.dir=x"]) == compose(["@mine", "run.dir=x"])
    with pytest.raises(ConfigError, match="there is no such choice"):
        compose(["sync=rare"])
    Path("with.yaml").write_text("sync: rare\n")
    assert compose(["@mine", "@with.yaml", "run.dir=x"]).sync["every_steps"] == 500
    Path("mine/sync/dense.yaml").write_text("_target_: dtrain.every_step\n")
    with pytest.raises(ConfigError, match=r"dense\.yaml is called like dtrain's own sync=dense; rename it"):
        compose(["@mine", "sync=rare"])


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ("train: {stepz: 3}", "exp.yaml: there is no key train.stepz; did you mean train.steps?"),
        ("lr: 0.1", "exp.yaml: there is no key lr; did you mean optim.inner.lr?"),
        ("train: {steps: a}", "exp.yaml: train.steps must be an integer, but is 'a' (text)"),
        ("train: 3", "exp.yaml: train must be a section"),
        ("sync: dilocoo", "exp.yaml: sync: dilocoo: there is no such choice; did you mean diloco?"),
        ("sync: {bits: 4}", "exp.yaml: there is no key sync.bits; did you mean sync.compress.bits?"),
        ("launcher: {account: no}", "launcher.account must be text, but is False; put it in quotes"),
        ("launcher: {exclude: 1.10}", "launcher.exclude must be text, but is 1.1; put it in quotes"),
        ("defaults: [{sync: dense}]", "exp.yaml: there is no defaults list; choose a group by its name"),
        ("run: {dir: '${oc.env:HOME}/x'}", "which would be looked up on this machine"),
        ("3: 4", "'3' is no key"),
        ("- 3", "exp.yaml is not a configuration file: it holds a list"),
        ("3", "exp.yaml is not a configuration file"),
        ("a: [", "exp.yaml is not a configuration file"),
        ("a: !!python/object/apply:os.system ['true']", "exp.yaml is not a configuration file"),
        ("a: &a {b: *a}", "it holds itself, by an alias"),
        ("x: " + "[" * 5000, "exp.yaml is not a configuration file"),
        ("x: " + "[" * 5000 + "]" * 5000, "its brackets go too deep"),
        ("optim: {inner: {lr: 1" + "0" * 400 + "}}", "integers have at most 64 bits"),
        ("a: 1\na: 2", "duplicate key"),
        ("# " + "x" * (1 << 20), "it is larger than 1 MiB"),
    ],
    ids=range(21),
)
def test_a_bad_file_is_refused_by_its_name(content: str, message: str) -> None:
    Path("exp.yaml").write_text(content)
    with pytest.raises(ConfigError, match=re.escape(message)):
        compose(["@exp.yaml"])


def test_a_file_that_is_not_there_is_refused() -> None:
    Path("exp.yaml").write_text("a: 1")
    for word, message in (
        ("@nope.yaml", "nope.yaml: No such file"),
        ("@exp.yml", "No such file or directory; did you mean exp.yaml?"),
        ("@", "cannot read the configuration file"),
        ("@\0", "\0"),
    ):
        with pytest.raises(ConfigError, match=re.escape(message)):
            compose([word])
    Path("bad.yaml").write_bytes(b"\xff\xfe")
    with pytest.raises(ConfigError, match="it is no text"):
        compose(["@bad.yaml"])


def bomb(levels: int) -> str:
    lines = ["a0: &a0 [x, x, x, x, x, x, x, x, x]"]
    lines += [f"a{n}: &a{n} [{', '.join([f'*a{n - 1}'] * 9)}]" for n in range(1, levels)]
    return "\n".join(lines)


def test_aliases_that_stand_for_too_much_are_refused_before_anything_is_made_of_them() -> None:
    for path in ("exp.yaml", "config.yaml"):
        Path(path).write_text(bomb(60))  # 9 ** 60 values
    with pytest.raises(ConfigError, match="its aliases stand for more than"):
        compose(["@exp.yaml"])
    with pytest.raises(ConfigError, match="its aliases stand for more than"):
        load("config.yaml")
    Path("exp.yaml").write_text("train: &t {steps: 3}\n")  # a few are what they are for
    assert compose(["@exp.yaml", "run.dir=x"]).train.steps == 3


def test_text_that_looks_like_an_interpolation_is_read_back_as_it_was(tmp_path: Path) -> None:
    for text in ("${x}", "\\${x}", "a\\\\${train.steps}", "${oc.env:HOME}"):
        config = compose(["run.dir=" + re.sub(r"(\\*)\$\{", lambda found: found[1] * 2 + "\\${", text)])
        assert config.run.dir == text
        (tmp_path / "config.yaml").write_text(to_yaml(config))
        assert load(tmp_path / "config.yaml") == config and isinstance(config, Config)
