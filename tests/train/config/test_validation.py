"""Ranges, and parts that do not fit each other or this machine: told all at once, before anything is launched."""

from __future__ import annotations

import dataclasses
import re
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from torch import nn

from dtrain.errors import ConfigError, DataError, DtrainError
from dtrain.train.config import Config, MeshConfig, validate
from dtrain.train.config.validation import AT_LEAST_ONE, NOT_NEGATIVE, warnings

Make = Callable[..., Config]


class Shapeless(nn.Module):
    """Looks at its values while it is made, which the meta device has not."""

    def __init__(self, scale: float = 1.0):
        super().__init__()
        if torch.full((1,), scale).item() > 2:
            raise ValueError("scale is too large")


class NoData:
    """Has neither describe() nor tokens_per_example."""

    def __init__(self, split: str = "train"): ...

    def __len__(self) -> int:
        return 1

    def __getitem__(self, index: int, /) -> dict[str, torch.Tensor]:
        return {"x": torch.zeros(2)}


def made_without_describe(split: str = "train") -> list[int]:
    """A builder of what is no data set."""
    return [1, 2]


class NoTokens(NoData):
    """Does not say how many tokens an example has."""

    def describe(self) -> dict[str, object]:
        return {"root": "here"}


class Data(NoTokens):
    """A data set as it should be."""

    tokens_per_example: object = 2


class TokensInWords(Data):
    """Says it in words."""

    tokens_per_example = "two"


class Raises(Data):
    """Its describe() is left to whoever comes next."""

    def describe(self) -> dict[str, object]:
        raise NotImplementedError("later")


class RaisesAtOnce(Data):
    """Cannot even be made."""

    def __init__(self, split: str = "train"):
        raise RuntimeError("the disk is gone")


class DescribesInWords(Data):
    """Says of itself what nobody can compare."""

    def describe(self) -> dict[str, object]:
        return "some data"  # type: ignore[return-value]  # the user's error


class Numbers(Data):
    """Its examples have no names."""

    def __getitem__(self, index: int, /) -> dict[str, torch.Tensor]:
        return torch.zeros(3)  # type: ignore[return-value]  # the user's error


class Words(Data):
    """Its examples are no tensors."""

    def __getitem__(self, index: int, /) -> dict[str, torch.Tensor]:
        return {"text": "no tensor"}  # type: ignore[dict-item]  # the user's error


class Unspeakable(Data):
    """Says of itself what JSON cannot hold."""

    def describe(self) -> dict[str, object]:
        return {"root": Path()}


class OneSplit(Data):
    """Has no example for validation."""

    def __init__(self, split: str = "train"):
        self.split = split

    def __len__(self) -> int:
        return int(self.split == "train")

    def describe(self) -> dict[str, object]:
        return {"split": self.split}


@pytest.fixture(autouse=True)
def _importable(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, __name__, sys.modules[Shapeless.__module__])


def test_a_valid_configuration_gives_what_the_data_say_of_themselves(make: Make, text: Path) -> None:
    description = validate(make())
    assert description["sha256"] and description["root"] == str(text)


def test_validating_writes_nothing(make: Make, tmp_path: Path) -> None:
    before = sorted(tmp_path.rglob("*"))
    validate(make())
    with pytest.raises(ConfigError):
        validate(make("mesh.shard=3"))
    assert sorted(tmp_path.rglob("*")) == before


@pytest.mark.parametrize("key", AT_LEAST_ONE)
@pytest.mark.parametrize("value", [0, -1])
def test_what_counts_is_at_least_one(key: str, value: int, text: Path) -> None:
    with pytest.raises(ConfigError, match=rf"(?m)^{re.escape(key)} must be at least 1, but is {value}$"):
        validate(changed(key, value))


@pytest.mark.parametrize("key", NOT_NEGATIVE)
def test_what_may_be_off_is_not_negative(key: str, text: Path) -> None:
    with pytest.raises(ConfigError, match=rf"(?m)^{re.escape(key)} must be 0 or more, but is -1$"):
        validate(changed(key, -1))


def changed(key: str, value: object) -> Config:
    """The defaults of the classes with one key changed; ranges are checked before targets."""
    section, name = key.split(".")
    config = dataclasses.replace(Config(), run=dataclasses.replace(Config().run, dir="x"))
    return dataclasses.replace(config, **{section: dataclasses.replace(getattr(config, section), **{name: value})})


@pytest.mark.parametrize(
    ("override", "message"),
    [
        ("engine.bucket_mib=0", "engine.bucket_mib must be more than 0, but is 0.0"),
        ("engine.bucket_mib=inf", "engine.bucket_mib must be more than 0, but is inf"),
        ("engine.bucket_mib=nan", "engine.bucket_mib must be more than 0, but is nan"),
        ("train.clip_norm=nan", "train.clip_norm must be 0 or more, but is nan"),
        ("launcher.grace_seconds=inf", "launcher.grace_seconds must be 0 or more, but is inf"),
        ("optim.inner.lr=inf", "optim.inner.lr must be finite, but is inf"),
        ("optim.inner.betas=[nan,0.9]", "optim.inner.betas must be finite, but is [nan, 0.9]"),
        (
            f"optim.inner.lr=1{'0' * 400}",
            "optim.inner.lr must be a number: an integer has at most 64 bits, but is 1000000000... (401 dig",
        ),
        (f"train.steps=-1{'0' * 30}", "train.steps must be an integer: an integer has at most 64 bits, but is -1000"),
        ("optim.final_lr_fraction=1.5", "optim.final_lr_fraction is a fraction between 0 and 1, but is 1.5"),
        ("engine.name=zero4", "engine.name is zero4; did you mean zero3? (there are ddp, fsdp, zero1, zero2, zero3)"),
        ("engine.precision=fp23", "engine.precision is fp23; did you mean fp32? (there are fp32, bf16)"),
        ("optim.schedule=cosin", "optim.schedule is cosin; did you mean cosine?"),
        ("launcher.name=slurrm", "launcher.name is slurrm"),
        ("train.microbatch_size=3", "a rank's share of the batch is 8 examples; choose a divisor of it, or 0"),
        ("train.batch_size=15", "train.batch_size is 15, which 4 ranks cannot share equally; choose 12 or 16"),
        ("train.batch_size=3", "which 4 ranks cannot share equally; choose 4"),
        ("sync.every_steps=0", "every_steps is 0"),
        ("sync.every_steps={_target_:dtrain.rounds.lengths,each:[5,0]}", "each[1] is 0; every round has a positive"),
        (
            "sync.every_steps={_target_:dtrain.rounds.lengths,each:[5,10]}",
            "Lengths(each=(5, 10)) has rounds for 15 steps, and the run has",
        ),
        (
            "sync.every_steps={_target_:dtrain.rounds.power,steps:99,rounds:14,power:1.5}",
            "less sync.warmup_steps); give rounds for all of them",
        ),
        ("sync.every_steps={_target_:dtrain.rounds.qsr,alpha:0,base:4}", "alpha is 0; give a positive number"),
        ("sync.every_steps={_target_:dtrain.outer.sgd}", "every_steps is Momentum("),
        ("sync.warmup_compress=same", "warmup_compress is same, and there is no warm-up; give warmup_steps"),
        ("sync.compress.bits=9", "bits is 9"),
        ("sync._target_=dtrain.aggregators.mean", "sync"),
        ("optim.inner.lr=-1", "optim.inner: torch.optim.AdamW refused its settings: Invalid learning rate: -1"),
        ("model.dim=0", "model: dtrain.train.models.transformer.Transformer refused its settings: dim is 0"),
        ("model.heads=3", "refused its settings"),
        ("~model.heads", "missing 1 required keyword-only argument: 'heads'"),
        ("data.block=0", "block is 0"),
        ("data.block=1000000", "1000001"),
        ("data.path=/nowhere/at/all", "/nowhere/at/all"),
    ],
)
def test_what_does_not_fit_is_refused_with_its_value(override: str, message: str, make: Make) -> None:
    with pytest.raises(ConfigError, match=re.escape(message)) as refused:
        validate(make(override))
    assert refused.value.exit_code == 2


@pytest.mark.parametrize(
    ("words", "warning"),
    [
        (
            ("train.steps=30", "sync.every_steps={_target_:dtrain.rounds.power,steps:40,rounds:4,power:2}"),
            "sync.every_steps.steps=40 is more than the 30 steps of rounds that there are: the last rounds of the",
        ),
        (
            ("optim.warmup_steps=20", "sync.every_steps={_target_:dtrain.rounds.qsr,alpha:0.01,base:4}"),
            "the learning rate rises for 20 steps of rounds, in which the quadratic rule would make them long; "
            "sync.every_steps.warmup_steps=20 keeps them short there",
        ),
    ],
)
def test_rounds_that_will_hardly_be_as_meant_are_warned_of(words: tuple[str, ...], warning: str, make: Make) -> None:
    config = make(*words)
    validate(config)
    (found,) = warnings(config)
    assert found.startswith(warning)


@pytest.mark.parametrize(
    "words",
    [
        ("sync.every_steps={_target_:dtrain.rounds.power,steps:${train.steps},rounds:140,power:1.5}",),
        ("sync.every_steps={_target_:dtrain.rounds.power,steps:900,rounds:9,power:2}", "sync.warmup_steps=100"),
        ("sync.every_steps={_target_:dtrain.rounds.lengths,each:[500,500]}",),
        ("sync.every_steps={_target_:dtrain.rounds.qsr,alpha:0.01,base:4,warmup_steps:30}",),
        ("sync.warmup_steps=50", "sync.warmup_compress=same"),
        ("sync.warmup_steps=50", "compress@sync.warmup_compress=int8_ef", "compress=int4_ef"),
    ],
)
def test_rounds_and_a_warm_up_that_fit(words: tuple[str, ...], make: Make) -> None:
    config = make("train.steps=1000", *words)
    validate(config)
    assert warnings(config) == []


def test_a_mesh_that_does_not_fit_the_workers_names_both_ways_out(make: Make) -> None:
    with pytest.raises(ConfigError) as refused:
        validate(make("mesh.shard=3"))
    assert str(refused.value) == (
        "the mesh is 2 replicas x 3 shards = 6 ranks, but there are 4 workers; set launcher.workers=6, or choose "
        "mesh.replicate and mesh.shard whose product is 4"
    )


@pytest.mark.parametrize("mesh", [(1, 1), (4, 1), (1, 4), (2, 4)])
def test_every_mesh_whose_product_is_the_number_of_workers_fits(mesh: tuple[int, int], make: Make) -> None:
    config = make(f"launcher.workers={mesh[0] * mesh[1]}", f"mesh.replicate={mesh[0]}", f"mesh.shard={mesh[1]}")
    assert config.mesh == MeshConfig(replicate=mesh[0], shard=mesh[1])
    validate(config)


def test_all_problems_are_told_at_once(make: Make) -> None:
    with pytest.raises(ConfigError) as refused:
        validate(make("train.steps=0", "mesh.shard=3", "optim.schedule=flat", "engine.bucket_mib=-1"))
    assert [line.partition(" ")[0] for line in str(refused.value).splitlines()] == [
        "train.steps", "engine.bucket_mib", "optim.schedule", "the",
    ]  # fmt: skip


def test_zero_without_deepspeed_says_what_to_install(make: Make, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    with pytest.raises(
        ConfigError, match=r"zero2 needs DeepSpeed, which is not installed: pip install 'dtrain\[zero\]'"
    ):
        validate(make("engine=zero2"))


def test_a_run_folder_that_is_a_file_is_refused(make: Make, tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    for path in (tmp_path / "file", tmp_path / "file" / "below" / "it"):
        with pytest.raises(
            ConfigError, match=re.escape(f"{tmp_path / 'file'} is a file, not a folder; choose another")
        ):
            validate(make(f"run.dir={path}"))


def test_a_run_folder_that_cannot_be_written_to_is_refused(
    make: Make, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    # As root, every folder can be written to: the answer of the system is what is tested.
    monkeypatch.setattr("os.access", lambda path, mode: Path(path) != tmp_path)
    with pytest.raises(ConfigError, match=re.escape(f"{tmp_path} cannot be written to; choose another run.dir")):
        validate(make())


def test_an_empty_data_folder_is_refused(make: Make, tmp_path: Path) -> None:
    (tmp_path / "empty").mkdir()
    with pytest.raises(DataError, match="empty") as refused:
        validate(make(f"data.path={tmp_path / 'empty'}"))
    assert refused.value.exit_code == 2


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        (
            ["data=custom", f"data._target_={__name__}.NoData"],
            "makes a NoData without tokens_per_example and describe()",
        ),
        (["data=custom", f"data._target_={__name__}.made_without_describe"], "makes a list without tokens_per_example"),
        (["data=custom", f"data._target_={__name__}.NoTokens"], "makes a NoTokens without tokens_per_example; a data"),
        (
            ["data=custom", f"data._target_={__name__}.TokensInWords"],
            "at least 1, but is 'two' (text); give the number",
        ),
        (["data=custom", f"data._target_={__name__}.Raises"], "describe() failed for"),
        (["data=custom", f"data._target_={__name__}.Raises"], "NotImplementedError: later\n  at "),
        (["data=custom", f"data._target_={__name__}.RaisesAtOnce"], "RuntimeError: the disk is gone\n  at "),
        (["data=custom", f"data._target_={__name__}.DescribesInWords"], "must return a dict, but returned 'some data'"),
        (["data=custom", f"data._target_={__name__}.Numbers"], "is a Tensor; return a dict of tensors by name"),
        (["data=custom", f"data._target_={__name__}.Words"], "'text' in [0] of"),
        (["data=custom", f"data._target_={__name__}.Unspeakable"], "returns what JSON cannot hold"),
        (["data=custom", f"data._target_={__name__}.OneSplit"], "has no example in its validation split"),
        (["optim.inner._target_=torch.optim.lr_scheduler.LambdaLR"], "optim.inner"),
        (["model=custom", "model._target_=builtins.dict"], "model: builtins.dict makes a dict, no torch.nn.Module"),
        (["model=custom", f"model._target_={__name__}.Shapeless", "model.scale=3"], "scale is too large"),
        (["sync._target_=builtins.dict"], "sync: builtins.dict makes a dict, no sync"),
    ],
)
def test_a_target_that_makes_something_else_is_refused(overrides: list[str], message: str, make: Make) -> None:
    from dtrain.train.config import compose

    custom_data = any(override.startswith("data=") for override in overrides)
    with pytest.raises(DtrainError, match=re.escape(message)) as refused:
        validate(compose(["run.dir=x", *overrides]) if custom_data else make(*overrides))
    assert refused.value.exit_code == 2


def test_a_model_that_cannot_be_made_on_the_meta_device_is_made_for_real(make: Make) -> None:
    validate(make("model=custom", f"model._target_={__name__}.Shapeless"))


def test_a_model_of_any_size_is_checked_without_its_memory(make: Make) -> None:
    validate(make("model.dim=1000000", "model.layers=3"))  # 12 terabytes a layer


def test_without_evaluation_no_validation_split_is_needed() -> None:
    from dtrain.train.config import compose

    target = [f"data._target_={__name__}.OneSplit", "model=custom", "model._target_=torch.nn.Identity"]
    config = compose(["run.dir=x", "data=custom", *target, "train.evaluation_examples=0"])
    assert validate(config) == {"split": "train"}
