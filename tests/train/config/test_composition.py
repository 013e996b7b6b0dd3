"""From a command line to one frozen configuration; what is misspelt or ill-typed is refused with the way out."""

from __future__ import annotations

import dataclasses
import re
from pathlib import Path
from typing import cast

import pytest
from hypothesis import assume, given
from hypothesis import strategies as st

from dtrain.comm.runtime.method import Sync
from dtrain.errors import ConfigError
from dtrain.train.config import Config, EngineConfig, compose, differences, instantiate, load, to_yaml, validate
from dtrain.train.config.choices import folder
from dtrain.train.config.composition import OPEN, dotted_keys

CHOICES = sorted((path.parent.name, path.stem) for path in folder().glob("*/*.yaml"))
NEEDS = {
    ("model", "custom"): ["model._target_=torch.nn.Identity"],
    ("model", "hf"): ["model.path=folder"],
    ("data", "custom"): ["data._target_=dtrain.train.data.text.ByteText"],
    ("data", "tokens"): ["data.path=tokens"],
}
BAD_OVERRIDES = [
    # A key that does not exist: the nearest one is named.
    ("train.stepz=3", "there is no key train.stepz; did you mean train.steps?"),
    ("trian.steps=3", "there is no key trian.steps; did you mean train.steps?"),
    ("steps=3", "there is no key steps; did you mean train.steps?"),
    ("train.warmup_steps=3", "did you mean optim.warmup_steps?"),
    ("engin=zero2", "there is no key engin; did you mean engine?"),
    ("sync.every_step=3", "did you mean sync.every_steps?"),
    ("sync.compress.bit=4", "did you mean sync.compress.bits?"),
    ("sync.outer.mommentum=0", "did you mean sync.outer.momentum?"),
    ("model.dims=3", "did you mean model.dim?"),
    ("model.tied_embedding=true", "did you mean model.tied_embeddings?"),
    ("optim.inner.bettas=[0.9,0.9]", "did you mean optim.inner.betas?"),
    ("++train.foo=4", "there is no key train.foo (there are train.steps, train.seed, "),
    ("foo=4", "there is no key foo (there are run, mesh, launcher, engine, model, data, sync, optim, train, metrics)"),
    ("=3", "there is no key without a name"),
    ("hydra.verbose=true", "there is no key hydra.verbose (there are run, "),
    ("train={stepz: 3}", "there is no key train.stepz; did you mean steps?"),
    ("train.steps.more=3", "there is no key train.steps.more"),
    # A choice or a group that does not exist.
    ("engine=zero4", "engine=zero4: there is no such choice; did you mean zero3? (there are ddp, fsdp, zero1, "),
    ("sync=dilocoo", "did you mean diloco? (there are co2, delayed_diloco, dense, dgc, "),
    ("sync=null", "there is no such choice"),
    ("sync=[dense,int8]", "there is no such choice"),
    ("compress@sync.compress=int9", "did you mean int8?"),
    ("compres@sync.compress=int8", "there is no group compres; did you mean compress?"),
    ("compress@nowhere=int8", "compress@sync.compress"),
    # A value of another type.
    ("train.steps=abc", "train.steps must be an integer, but is 'abc' (text)"),
    ("train.steps=1.5", "train.steps must be an integer, but is 1.5 (a number)"),
    ("train.steps=true", "train.steps must be an integer, but is True (a truth value)"),
    ("train.steps=null", "train.steps must be an integer, but is null"),
    ("train.steps=", "train.steps must be an integer, but is '' (text)"),
    ("train.steps=[1]", "train.steps must be an integer, but is [1] (a list)"),
    ("train.clip_norm=abc", "train.clip_norm must be a number, but is 'abc' (text)"),
    ("run.dir=null", "run.dir must be text, but is null"),
    ("engine.activation_checkpointing=maybe", "engine.activation_checkpointing must be true or false, but is 'maybe'"),
    ("mesh=3", "mesh must be a section with keys of its own, but is 3 (an integer)"),
    ("train={steps: a}", "train.steps must be an integer, but is 'a' (text)"),
    ("sync.every_steps=a", "sync.every_steps must be an integer or one of auto, but is 'a' (text)"),
    ("sync.compress.bits=nine", "sync.compress.bits must be an integer or null, but is 'nine' (text)"),
    ("sync.outer.lr=abc", "sync.outer.lr must be a number, but is 'abc' (text)"),
    ("optim.inner.lr=abc", "optim.inner.lr must be a number, but is 'abc' (text)"),
    ("optim.inner.betas=[0.9]", "optim.inner.betas must be a list [a number, a number], but is [0.9] (a list)"),
    ("optim.inner.betas=[0.9,x]", "optim.inner.betas must be a list [a number, a number], but is [0.9, 'x'] (a list)"),
    ("model.dim=abc", "model.dim must be an integer, but is 'abc' (text)"),
    ("optim.inner.betas.0=0.8", "a list is set as a whole, as in optim.inner.betas=[0.9,0.95]"),
    ("optim.inner=null", "optim.inner must be a mapping with _target_, but is null"),
    # A target that does not exist, or is none.
    ("model._target_=dtrain.train.models.transformer.Transformr", "did you mean Transformer?"),
    ("model._target_=nope.Model", "there is no nope to import here (is its folder in PYTHONPATH?)"),
    ("model._target_=3", "model._target_ must be the path of a callable, as in torch.optim.AdamW, not 3"),
    ("model._target_=dtrain.errors.FAILED", "dtrain.errors.FAILED is a int, which cannot be called"),
    ("sync.outer._target_=dtrain.nestrov", "sync.outer._target_: dtrain.nestrov: there is no nestrov in dtrain; did"),
    # Values that have to be given.
    ("model=custom", "model._target_ has no default: set it, as in model._target_=VALUE"),
    ("data=tokens", "data.path has no default: set it, as in data.path=VALUE"),
    # What cannot be removed, and what cannot be read.
    ("~train.steps", "train.steps cannot be removed; give it another value: train.steps=VALUE"),
    ("~sync", "sync cannot be removed"),
    ("foo", "cannot read 'foo' (an override is written key=value)"),
    ("a=b=c", "there is no key a (there are run, mesh, "),
    ("train.steps=b=c", "cannot read 'train.steps=b=c': train.steps must be an integer"),
    ("train.steps=1,2", "a key has one value; a list is written train.steps=[...]"),
    ("train.steps=${nope}", "train.steps: Interpolation key 'nope' not found"),
]


@pytest.mark.parametrize(("override", "message"), BAD_OVERRIDES, ids=[override for override, _ in BAD_OVERRIDES])
def test_an_override_that_cannot_be_is_refused_with_the_way_out(override: str, message: str) -> None:
    with pytest.raises(ConfigError, match=re.escape(message)) as refused:
        compose([override])
    assert refused.value.exit_code == 2


def test_the_default_is_two_replicas_of_two_shards_with_diloco_in_int8() -> None:
    config = compose(["run.dir=x"])
    assert (config.mesh.replicate, config.mesh.shard, config.launcher.workers) == (2, 2, 4)
    assert config.engine.name == "fsdp"
    assert config.sync["_target_"] == "dtrain.diloco"
    assert config.sync["compress"] == {
        "_target_": "dtrain.compress.quantize",
        "bits": 8,
        "block": 512,
        "rounding": "nearest",
    }
    assert validate(config)["sha256"]


def test_the_defaults_of_the_classes_are_those_of_the_files() -> None:
    config = compose(["run.dir=x"])
    for section in ("mesh", "launcher", "engine", "train"):
        assert getattr(config, section) == getattr(Config(), section)


@pytest.mark.parametrize(
    ("override", "expected"),
    [
        ("train.steps=7", 7),
        ("+train.steps=7", 7),
        ("train={steps: 7}", 7),
        ("train.steps=${train.batch_size}", 32),
        ("train.clip_norm=1", 1.0),
        ("engine.activation_checkpointing=true", True),
        ("run.resume=a b", "a b"),
        ("data.path='a/b=c'", "a/b=c"),
        ("data.path=3", "3"),  # a folder may have any name
        ("data.held_out=0.25", 0.25),
        ("model.heads=2", 2),
        ("model.hidden=8", 8),  # a keyword of the target that its YAML file does not list
        ("optim.inner.eps=1e-9", 1e-9),
        ("optim.inner.betas=[0.8,0.9]", [0.8, 0.9]),
        ("sync.compress.bits=4", 4),
        ("sync.compress=null", None),
    ],
)
def test_an_override_sets_its_key_and_no_other(override: str, expected: object) -> None:
    config, before = compose(["run.dir=x", override]), compose(["run.dir=x"])
    key = override.lstrip("+").partition("=")[0]
    key = "train.steps" if key == "train" else key
    found: object = dataclasses.asdict(config)
    for part in key.split("."):
        assert isinstance(found, dict)
        found = found[part]
    assert found == expected and type(found) is type(expected)
    assert all(difference.key.startswith(key) for difference in differences(before, config))


def test_a_compressor_may_be_chosen_for_the_warm_up_too() -> None:
    config = compose(["run.dir=x", "compress=int4", "compress@sync.warmup_compress=int8_ef"])
    warmup = config.sync["warmup_compress"]
    assert isinstance(warmup, dict) and warmup["_target_"] == "dtrain.compress.error_feedback"
    assert compose(["run.dir=x", "compress=int4"]).sync == {
        key: value for key, value in config.sync.items() if key != "warmup_compress"
    }


def test_the_last_override_of_a_key_counts() -> None:
    assert compose(["train.steps=3", "engine=ddp", "train.steps=4", "engine=zero1"]).train.steps == 4
    assert compose(["engine=ddp", "engine=zero1"]).engine.name == "zero1"


@pytest.mark.parametrize(("group", "choice"), CHOICES, ids=["=".join(pair) for pair in CHOICES])
def test_every_choice_of_every_group_composes(group: str, choice: str) -> None:
    config = compose(["run.dir=x", f"{group}={choice}", *NEEDS.get((group, choice), [])])
    assert callable(cast(Sync, instantiate(config.sync, "sync")).bind)


@pytest.mark.slow
def test_every_sync_takes_every_compressor() -> None:
    def composed(override: str) -> dict[str, object]:
        return compose(["run.dir=x", override]).sync

    # DGC is a compressor and its feedback already, SPARTA sends parameters as they are, those of shared randomness
    # a few numbers of their own; 1-bit Adam begins after a warm-up, which no plan that learns can; SCAFFOLD's variates
    # cannot wait for an estimate that lags.
    without = ("dgc", "sparta", "one_byte", "fedkseed", "ferret")
    syncs = [composed(f"sync={choice}") for group, choice in CHOICES if group == "sync" and choice not in without]
    compressors = [composed(f"compress={c}")["compress"] for group, c in CHOICES if group == "compress"]
    assert len(syncs) > 5 and compressors.count(None) == 1
    for sync in syncs:
        for compress in compressors:
            learns = isinstance(compress, dict) and compress["_target_"] in (
                "dtrain.plans.lgreco",
                "dtrain.plans.accordion",
            )
            if learns and sync["_target_"] == "dtrain.onebit_adam":
                with pytest.raises(ConfigError, match="learns from what it compresses"):
                    instantiate({**sync, "compress": compress}, "sync")
                continue
            lags = isinstance(compress, dict) and compress["_target_"] in (
                "dtrain.compress.ef21",
                "dtrain.compress.econtrol",
            )
            if lags and sync["_target_"] == "dtrain.scaffold_m":
                with pytest.raises(ConfigError, match="diverges where a running estimate"):
                    instantiate({**sync, "compress": compress}, "sync")
                continue
            assert callable(cast(Sync, instantiate({**sync, "compress": compress}, "sync")).bind)


def test_a_compressor_that_is_null_has_no_settings() -> None:
    with pytest.raises(ConfigError, match=r"sync\.compress is null, so it has no bits; choose a sync\.compress first"):
        compose(["sync=dense", "sync.compress.bits=4"])
    config = compose(
        ["run.dir=x", "sync=dense", "sync.compress._target_=dtrain.compress.quantize", "sync.compress.bits=4"]
    )
    assert config.sync["compress"] == {"_target_": "dtrain.compress.quantize", "bits": 4}


def test_another_target_takes_its_own_keywords() -> None:
    config = compose(["run.dir=x", "model=custom", "model.out_features=3", "model._target_=torch.nn.Linear"])
    assert config.model == {"_target_": "torch.nn.Linear", "out_features": 3}
    with pytest.raises(ConfigError, match=r"did you mean model\.out_features\?"):
        compose(["model=custom", "model._target_=torch.nn.Linear", "model.out_feature=3"])
    with pytest.raises(ConfigError, match=r"sync\.outer\.lr: dtrain\.simulate takes no lr"):
        compose(["sync.outer._target_=dtrain.simulate"])


@pytest.mark.parametrize("sync", ["dense", "diloco"])
def test_a_run_without_a_folder_gets_one_of_its_own(sync: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    folders = set()
    for _ in range(3):  # within the same second
        path = Path(compose([f"sync={sync}"]).run.dir)
        assert re.fullmatch(rf"runs/\d{{4}}-\d\d-\d\d/\d\d-\d\d-\d\d-{sync}(-\d)?", str(path))
        assert not path.exists()
        path.mkdir(parents=True)
        folders.add(path)
    assert len(folders) == 3


def test_a_configuration_is_frozen() -> None:
    config = compose(["run.dir=x"])
    for owner, name in ((config, "train"), (config.train, "steps"), (config.mesh, "shard")):
        with pytest.raises(dataclasses.FrozenInstanceError):
            setattr(owner, name, 1)
    with pytest.raises(TypeError):
        EngineConfig("ddp")  # type: ignore[call-arg]  # keywords only: positions say nothing


def test_composing_leaves_nothing_behind() -> None:
    from hydra.core.global_hydra import GlobalHydra

    compose(["run.dir=x", "engine=ddp"])
    with pytest.raises(ConfigError):
        compose(["engine=nope"])
    assert not GlobalHydra.instance().is_initialized()
    assert compose(["run.dir=x"]) == compose(["run.dir=x"])


def test_every_key_can_be_set_from_the_command_line() -> None:
    config = compose(["run.dir=x", "launcher=slurm"])
    overrides = []
    for key in dotted_keys(config):
        value: object = dataclasses.asdict(config)
        for part in key.split("."):
            assert isinstance(value, dict)
            value = value[part]
        if not isinstance(value, dict | list | tuple):
            text = "null" if value is None else repr(value).lower() if isinstance(value, bool) else str(value)
            overrides.append(f"{key}={text}")
    assert len(overrides) > 40 and compose(overrides) == config
    assert {section.partition(".")[0] for section in OPEN} <= set(dotted_keys(config))


# ---- YAML ----------------------------------------------------------------------------------------------------------

# Text that YAML could take for something else comes first to mind: "no", "1e3", "~", "1_000", "0o7", ": x", dates.
WORDS = st.one_of(
    st.text(st.characters(exclude_categories=["Cs", "Cc"]), max_size=12),
    st.sampled_from([
        "no", "on", "1e3", "1.", ".5", "~", "null", "1_000", "0o7", "0x1F", "2026-11-20", "12:30:45", " a ", ".inf",
        ": x", "- a", "#", "'", '"', "\\", "é", "\t", "a\nb", "=", "!", "&a", "*a", "{", "[", "true", ".nan",
    ]),
)  # fmt: skip
VALUES = st.recursive(
    st.one_of(st.none(), st.booleans(), st.integers(-(2**63), 2**63 - 1), st.floats(allow_nan=False), WORDS),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.from_regex(r"[a-z_]{1,6}", fullmatch=True), inner),
    max_leaves=6,
)


@given(values=st.dictionaries(st.from_regex(r"[a-z]{1,6}", fullmatch=True), VALUES, max_size=4), name=WORDS)
def test_what_is_written_is_read_back_as_it_was(
    values: dict[str, object], name: str, tmp_path_factory: pytest.TempPathFactory
) -> None:
    assume("${" not in repr((values, name)) and "???" not in repr((values, name)))
    path = tmp_path_factory.mktemp("yaml") / "config.yaml"
    base = Config()
    config = dataclasses.replace(
        base, model={"_target_": "mine.Model", **values}, run=dataclasses.replace(base.run, dir=name)
    )
    path.write_text(to_yaml(config))
    assert load(path) == config


@pytest.mark.parametrize(
    "overrides", [[], ["sync=dense"], ["sync=every_step", "compress=int4_ef", "optim=sgd", "optim.inner.nesterov=true"]]
)
def test_what_is_composed_is_loaded_back(overrides: list[str], tmp_path: Path) -> None:
    config = compose(["run.dir=x", *overrides])
    (tmp_path / "config.yaml").write_text(to_yaml(config))
    assert load(tmp_path / "config.yaml") == config


def test_a_mapping_with_a_target_replaces_what_was_there() -> None:
    inner = {"_target_": "dtrain.compress.sign", "block": 64}
    for sync in (("sync=dense",), ("sync=every_step", "compress=topk_ef")):
        for plus in ("", "+"):
            words = [*sync, f"{plus}sync.compress={{_target_:dtrain.compress.sign,block:64}}"]
            assert compose(words).sync["compress"] == inner
    words = ["sync=every_step", "compress=topk_ef", "sync.compress.compressor={_target_:dtrain.compress.sign,block:64}"]
    assert compose(words).sync["compress"] == {
        "_target_": "dtrain.compress.error_feedback", "compressor": inner,
    }  # fmt: skip


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ("train: {stepz: 3}", "config.yaml"),
        ("train: {steps: a}", "train.steps must be an integer, but is 'a' (text)"),
        ("train: {steps: null}", "train.steps must be an integer, but is null"),
        ("train: 3", "config.yaml"),
        ("model:\n  _target_: ???", "model._target_ has no default"),
        ("a: [", "is not a configuration"),
        ("3", "is not a configuration"),
        ("- 3", "is not a configuration"),
        ("\x00", "is not a configuration"),
    ],
)
def test_a_file_that_is_no_configuration_is_refused(content: str, message: str, tmp_path: Path) -> None:
    path = tmp_path / "config.yaml"
    path.write_text(content)
    with pytest.raises(ConfigError, match=re.escape(message)):
        load(path)


def test_a_file_that_cannot_be_read_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="No such file or directory"):
        load(tmp_path / "config.yaml")
    with pytest.raises(ConfigError, match="Is a directory"):
        load(tmp_path)
    (tmp_path / "binary.yaml").write_bytes(b"\xff\xfe\xff")
    with pytest.raises(ConfigError, match="is not a configuration"):
        load(tmp_path / "binary.yaml")
