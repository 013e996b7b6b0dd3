"""What stands after the first ``=`` of a word is what its key gets, whatever it is, if the key holds text."""

from __future__ import annotations

import contextlib
import os
import shlex
from pathlib import Path
from typing import cast

import pytest
from hypothesis import assume, example, given, settings
from hypothesis import strategies as st

from dtrain.errors import ConfigError
from dtrain.launchers import registry
from dtrain.train.config import Config, compose, load, to_yaml
from dtrain.train.config.composition import alternatives
from dtrain.train.config.words import read, value_of, written

ANY = st.text(st.characters(exclude_categories=["Cs"]), max_size=20)
SIGNS = st.text("~=,()[]{}'\"\\$ :;&|@+#%!*?aé日\n\t", max_size=12)


def value(config: Config, key: str) -> object:
    found: object = config
    for part in key.split("."):
        found = found[part] if isinstance(found, dict) else getattr(found, part)
    return found


@given(text=ANY | SIGNS)
@example(text="runs/lr=0.1")
@example(text="日本語/ü (1), b")
@example(text="c[3-4]")
@example(text="a100&80gb")
@example(text="main,debug")
@example(text="it's")
@example(text="\\\n")
def test_text_is_taken_as_it_is(text: str) -> None:
    quoted = len(text) > 1 and text[0] in "'\"" and text[0] == text[-1]
    if text != "null" and not quoted:
        assert value_of(read(f"run.dir={text}"), "text", None) == text
    # What dtrain writes to be pasted means the same, also where quotes or a reserved word need quotes around them.
    assert value_of(read(written("run.dir", text)), "text", None) == text


def launcher_of(key: str) -> list[str]:
    """The choice of a launcher that takes the key, where it is one of ``launcher``."""
    section, _, name = key.partition(".")
    return [f"launcher={registry.keys()[name].launchers[0]}"] if section == "launcher" else []


@pytest.mark.parametrize("key", ["run.dir", "launcher.constraint", "data.path"])
@pytest.mark.parametrize(
    "text", ["runs/lr=0.1", "日本語/ü (1), b", "[a", "{a: b}", "'a',b", "a100&80gb", "x\ny", "a:b", "$x"]
)
def test_text_arrives_in_the_configuration(key: str, text: str) -> None:
    assert value(compose(["run.dir=x", *launcher_of(key), f"{key}={text}"]), key) == text


@pytest.mark.parametrize(
    ("word", "expected"),
    [
        ("launcher.partition=main,debug", "main,debug"),
        ("launcher.exclude=c3,c4", "c3,c4"),
        ("launcher.exclude=c[3-4]", "c[3-4]"),
        ("run.weights=runs/sweep/0-sync=dense/export", "runs/sweep/0-sync=dense/export"),
        ("run.dir=~/x", os.path.expanduser("~/x")),
        ("run.dir='~/x y'", os.path.expanduser("~/x y")),
        ("run={dir: '~/x'}", os.path.expanduser("~/x")),
        ("run.dir=./~/x", "./~/x"),
        ("data.path=~/text", os.path.expanduser("~/text")),
        ("launcher.python=~/venv/bin/python", os.path.expanduser("~/venv/bin/python")),
        ("data.path=null", None),
        ("run.dir=runs/${train.seed}", "runs/1"),
        ("run.dir=runs/\\${train.seed}", "runs/${train.seed}"),
        ("data.path=true", "true"),
    ],
)
def test_a_path_or_a_setting_of_slurm_arrives(word: str, expected: object, tmp_path: Path) -> None:
    key = "run.dir" if word.startswith("run={") else word.partition("=")[0]
    config = compose(["run.dir=x", *launcher_of(key), word])
    assert value(config, key) == expected
    (tmp_path / "config.yaml").write_text(to_yaml(config))
    assert load(tmp_path / "config.yaml") == config


@pytest.mark.parametrize(
    ("words", "expected"),
    [
        ('launcher.environment=["NCCL_IB_HCA=mlx5"]', ["NCCL_IB_HCA=mlx5"]),
        ('launcher.sbatch=["exclusive","mail-type=END"]', ["exclusive", "mail-type=END"]),
        ('launcher.srun_args=["--cpu-bind=cores","--mpi=none"]', ["--cpu-bind=cores", "--mpi=none"]),
        ('launcher.setup=["module load cuda"]', ["module load cuda"]),
        (
            'launcher.groups=["nodes=2 workers=8 constraint=a100","nodes=1 workers=4 constraint=h100"]',
            ["nodes=2 workers=8 constraint=a100", "nodes=1 workers=4 constraint=h100"],
        ),
        ("launcher.hosts=[a:4,b:2]", ["a:4", "b:2"]),
        ("launcher.hosts=[c[1,3],d]", ["c[1,3]", "d"]),
        ("launcher.mpi_args=[--mca,btl_tcp_if_include,ib0]", ["--mca", "btl_tcp_if_include", "ib0"]),
        ("'data.suffixes=[.h, \".r,st\"]'", [".h", ".r,st"]),
        ("launcher.setup=[]", []),
    ],
)
def test_a_list_of_text_arrives_whether_the_shell_took_its_quotes_or_not(words: str, expected: list[str]) -> None:
    for word in {words, " ".join(shlex.split(words))}:
        word = word.strip("'")
        key = word.partition("=")[0]
        assert [*cast("list[str]", value(compose(["run.dir=x", *launcher_of(key), word]), key))] == expected


@pytest.mark.parametrize(
    ("word", "message"),
    [
        # Without the quotes that the shell took nobody knows to what the second element belongs.
        ("launcher.environment=[A=1,2,B=3]", """'launcher.environment=["A=1,2"]'"""),
        ("launcher.sbatch=[exclude=c1,c2]", "the shell takes quotes away"),
        ("launcher.environment=[A=1", """single quotes, as the shell takes others away: 'launcher.environment=["""),
        ("launcher.environment=A=1", """is a list, which is written 'launcher.environment=["A=1"]'"""),
        ("launcher.hosts=[a,,b]", "an element is empty"),
        ("run.dir=~no-such-user/x", "there is no such user; for a folder of that name: run.dir=./~no-such-user/x"),
        ("run.dir=a${b", "for the characters themselves"),
        ("run.dir=\udce9", "it is not UTF-8"),
        ("sync=diloco,dense", "dtrain train -m sync=diloco,dense"),
        ("train.seed=1,2", "dtrain train -m"),
        ("sync=int4_ef", "sync=int4_ef: this choice is written sync=every_step compress=int4_ef now"),
        ("sync=bf16", "written sync=every_step compress=bf16 now"),
        ("compress=int9", "compress=int9: there is no such choice; did you mean int8?"),
        ("compress={_target_:dtrain.compress.sign}", "own value: sync.compress={_target_:dtrain.compress.sign}"),
        ("train.steps=a(b", "train.steps must be an integer"),
        ("optim.inner.betas=[0.9", "optim.inner.betas must be a list [a number, a number]"),
        ("", "an override is written key=value"),
        ("'train.steps'=3", "an override is written key=value"),
        # What the key should have been, and not one of that name in another part.
        ("lr=0.1", "did you mean optim.inner.lr?"),
        ("optim.lr=0.1", "did you mean optim.inner.lr?"),
        ("sync.lr=0.1", "did you mean sync.outer.lr?"),
        ("optim.inner.learning_rate=0.1", "did you mean optim.inner.lr?"),
        ("batch=8", "did you mean train.batch_size?"),
        ("gpus=8", "did you mean launcher.gpus_per_node?"),
        ("optim.inner.momentum=0.9", "(torch.optim.AdamW takes params, lr, betas, "),
    ],
)
def test_what_cannot_be_read_is_refused_in_our_words(word: str, message: str) -> None:
    with pytest.raises(ConfigError) as refused:
        compose(["run.dir=x", word])
    assert message in str(refused.value)
    assert not any(jargon in str(refused.value) for jargon in ("viable", "mismatched", "Lexer", "expecting", "EOF"))


@pytest.mark.slow
@settings(max_examples=50)
@given(word=ANY | SIGNS.map(lambda text: f"train.steps={text}") | SIGNS.map(lambda text: f"sync.outer={text}"))
def test_no_word_is_a_traceback(word: str) -> None:
    assume(not word.startswith("@"))
    with contextlib.suppress(ConfigError):
        compose(["run.dir=x", word])


def test_no_suggestion_is_a_key_of_something_else() -> None:
    words = ["data=custom", "data._target_=fractions.Fraction", "data.path=."]
    with pytest.raises(ConfigError, match=r"no key data\.path \(fractions\.Fraction takes numerator, denominator"):
        compose(words)


class Data:
    """A data set of somebody's own, whose keywords say in different ways what they hold."""

    def __init__(self, root: Path, name="x", other=None, many: list[str] | None = None, **more: object) -> None:  # type: ignore[no-untyped-def]
        self.values = (root, name, other, many, more)


def test_keywords_of_ones_own_take_text_where_nothing_says_otherwise() -> None:
    target = ["data=custom", f"data._target_={Data.__module__}.Data"]
    if not Data.__module__.isidentifier() and "." not in Data.__module__:
        pytest.skip("the test module cannot be imported by its name here")
    words = ["data.root=~/a=b", "data.name=é(1),2", "data.other=a=b~", "data.many=[a=1,b=2]", "data.extra=3"]
    data = compose(["run.dir=x", *target, *words]).data
    assert data["root"] == os.path.expanduser("~/a=b") and data["name"] == "é(1),2" and data["other"] == "a=b~"
    assert data["many"] == ["a=1", "b=2"] and data["extra"] == 3


# ---- sweeps --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("word", "expected"),
    [
        ("data.path='/a b',/c", ["data.path='/a b'", "data.path=/c"]),
        ("launcher.exclude=c[3,4],c5", ["launcher.exclude=c[3,4]", "launcher.exclude=c5"]),
        ("launcher.exclude=c[3,4]", ["launcher.exclude=c[3,4]"]),
        ("train.seed=1,2", ["train.seed=1", "train.seed=2"]),
        ("train.seed=range(1,4)", ["train.seed=1", "train.seed=2", "train.seed=3"]),
        ("optim.inner.betas=[0.9,0.95],[0.8,0.9]", ["optim.inner.betas=[0.9,0.95]", "optim.inner.betas=[0.8,0.9]"]),
        ("compress=glob(int*_ef)", ["compress=int2_ef", "compress=int4_ef", "compress=int8_ef"]),
        ("sync=glob(de*,exclude=del*)", ["sync=dense"]),
        ("compress=int8,int4", ["compress=int8", "compress=int4"]),
        ("compress@sync.compress=int8,int4", ["compress@sync.compress=int8", "compress@sync.compress=int4"]),
        ("run.dir=a,b", ["run.dir=a,b"]),
        ("sync.outer.lr=choice(0.5,0.7)", ["sync.outer.lr=0.5", "sync.outer.lr=0.7"]),
    ],
)
def test_a_sweep_has_the_values_that_are_meant(word: str, expected: list[str]) -> None:
    assert alternatives([word]) == [expected]


@pytest.mark.parametrize(
    ("word", "message"),
    [
        ("optim.inner.lr=interval(0.1,0.2)", "optim.inner.lr=0.1,0.2"),
        ("sync=glob(nothing*)", "nothing is called like this"),
        ("train.seed=glob(*)", "nothing is called like this"),
        ("train.seed=shuffle(1,2)", "leave shuffle out"),
        ("train.seed=range(1,1000000000)", "more than 10,000 values"),
        ("train.seed=1,(", "cannot read"),
        ("sync=dense,nope", "there is no such choice"),
    ],
)
def test_a_sweep_without_values_is_refused(word: str, message: str) -> None:
    def composed() -> None:
        for words in alternatives([word]):
            for each in words:
                compose(["run.dir=x", each])

    with pytest.raises(ConfigError) as refused:
        composed()
    assert message in str(refused.value)


def test_a_word_is_taken_apart_at_its_first_equals_sign() -> None:
    word = read("+compress@sync.compress=a=b")
    assert (word.sign, word.key, word.package, word.text) == ("+", "compress", "sync.compress", "a=b")


def test_a_current_folder_that_is_not_utf_8_is_told_before_anything_starts(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = os.fsencode(tmp_path) + b"/caf\xe9"
    os.mkdir(folder)
    monkeypatch.chdir(os.fsdecode(folder))
    with pytest.raises(ConfigError, match=r"run\.dir='.*caf.udce9/x' is not UTF-8"):
        compose(["run.dir=x"])
    assert compose([f"run.dir={tmp_path}/x"]).run.dir == f"{tmp_path}/x"


def test_many_overrides_are_all_applied() -> None:
    words = [f"train.steps={number}" for number in range(1, 400)]
    assert compose(["run.dir=x", *words]).train.steps == 399
