"""What a `_target_` mapping may say, and what it says where it does not fit."""

from __future__ import annotations

import datetime
import re
import sys
from fractions import Fraction
from pathlib import Path
from typing import Literal

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import nn

from dtrain.comm.outer_optimizers import OuterOptimizer
from dtrain.comm.runtime.round_lengths import EverySteps
from dtrain.errors import ConfigError, DataError
from dtrain.train.config import build_model, instantiate
from dtrain.train.config.targets import admits, check, closest, expected, hint, locate


class Made:
    """Keeps what it was called with."""

    def __init__(self, *, count: int = 0, rate: float | None = None, mode: Literal["a", "b"] = "a", inner: object = 0):
        self.count, self.rate, self.mode, self.inner = count, rate, mode, inner


def takes_all(**keywords: object) -> dict[str, object]:
    return keywords


def without_annotations(width=4, name="x", rate=0.5):  # type: ignore[no-untyped-def]  # as a user may write it
    raise TypeError("unpacking failed")


def refuses(what: str) -> None:
    errors: dict[str, Exception] = {
        "value": ValueError("no good"),
        "data": DataError("empty"),
        "bug": ZeroDivisionError("bug"),
        "key": KeyError("k"),
    }
    raise errors[what]


MADE, TAKES_ALL, REFUSES = (f"{__name__}.{name}" for name in ("Made", "takes_all", "refuses"))


@pytest.fixture(autouse=True)
def _importable(monkeypatch: pytest.MonkeyPatch) -> None:
    # pytest imports test files without putting them in sys.modules under a name that `import` finds.
    monkeypatch.setitem(sys.modules, __name__, sys.modules[Made.__module__])


def test_mappings_within_mappings_are_made_first() -> None:
    inner = {"_target_": "fractions.Fraction", "numerator": 1, "denominator": 3}
    made = instantiate({"_target_": MADE, "count": 2, "inner": [inner, {"deep": inner}]}, "place")
    assert isinstance(made, Made) and (made.count, made.inner) == (2, [Fraction(1, 3), {"deep": Fraction(1, 3)}])


def test_keywords_of_the_caller_win_and_are_passed_on_untouched() -> None:
    parameters = [nn.Parameter(torch.ones(2))]
    made = instantiate({"_target_": TAKES_ALL, "params": 1, "lr": 0.5}, params=parameters)
    assert isinstance(made, dict) and made["params"] is parameters and made["lr"] == 0.5


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({}, "place has no _target_: name the callable that makes it, or choose a group: place=NAME"),
        ({"_target_": None}, "place._target_ must be the path of a callable, as in torch.optim.AdamW, not None"),
        ({"_target_": "a-b"}, "must be the path of a callable"),
        ({"_target_": "nope.x"}, "there is no nope to import here (is its folder in PYTHONPATH?)"),
        ({"_target_": "fractions.Fractoin"}, "there is no Fractoin in fractions; did you mean Fraction?"),
        ({"_target_": "torch.optim.AdamWW"}, "there is no AdamWW in torch.optim; did you mean AdamW?"),
        ({"_target_": "math.pi"}, "math.pi is a float, which cannot be called"),
        ({"_target_": MADE, "cuont": 1}, "takes no cuont; did you mean count? (it takes count, rate, mode, inner)"),
        ({"_target_": MADE, "count": "1"}, "place.count must be an integer, but is '1' (text)"),
        ({"_target_": MADE, "count": True}, "place.count must be an integer, but is True (a truth value)"),
        ({"_target_": MADE, "rate": "x"}, "place.rate must be a number or null, but is 'x' (text)"),
        ({"_target_": MADE, "mode": "c"}, "place.mode must be one of a, b, but is 'c' (text)"),
        ({"_target_": MADE, "inner": [{"_target_": MADE, "x": 1}]}, "place.inner.0.x: "),
        ({"_target_": REFUSES, "what": "value"}, "refused its settings: no good"),
        ({"_target_": REFUSES, "what": "key"}, "refused its settings: 'k'"),
        ({"_target_": REFUSES}, "missing 1 required positional argument: 'what'"),
        ({"_target_": MADE, "inner": {"_target_": REFUSES, "what": "value"}}, "no good"),
    ],
)
def test_settings_that_do_not_fit_are_refused(settings: dict[str, object], message: str) -> None:
    with pytest.raises(ConfigError, match=re.escape(message)):
        instantiate(settings, "place")


def test_a_keyword_without_annotation_is_judged_by_its_default_once_the_target_has_failed() -> None:
    settings = {"_target_": f"{__name__}.without_annotations", "width": "abc", "rate": 1}
    message = "refused its settings: unpacking failed (place.width is 'abc' (text), its default is 4 (an integer))"
    with pytest.raises(ConfigError, match=re.escape(message) + "$"):
        instantiate(settings, "place")


def test_errors_of_ours_pass_through_and_bugs_keep_their_type() -> None:
    with pytest.raises(DataError, match=r"^empty$"):
        instantiate({"_target_": REFUSES, "what": "data"}, "place")
    with pytest.raises(DataError, match=r"^empty$"):
        instantiate({"_target_": MADE, "inner": {"_target_": REFUSES, "what": "data"}}, "place")
    with pytest.raises(ZeroDivisionError):
        instantiate({"_target_": REFUSES, "what": "bug"}, "place")


def test_a_module_that_fails_while_it_is_imported_says_why(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.syspath_prepend(tmp_path)
    (tmp_path / "broken_target.py").write_text("import not_installed_anywhere\n")
    (tmp_path / "raising_target.py").write_text("raise OSError('disk on fire')\n")
    with pytest.raises(ConfigError, match=r"importing broken_target\.X needs not_installed_anywhere, which is missing"):
        locate("broken_target.X", "model")
    with pytest.raises(ConfigError, match=r"importing raising_target\.X failed: OSError: disk on fire"):
        locate("raising_target.X", "model")


def test_checking_calls_nothing() -> None:
    check({"_target_": REFUSES, "what": "bug"}, "place")


@given(st.text(), st.lists(st.text(), max_size=5))
def test_a_hint_is_one_of_the_candidates_or_nothing(name: str, candidates: list[str]) -> None:
    near = closest(name, candidates)
    assert near is None or near in candidates
    assert (name in candidates) <= (near == name or not name)
    assert hint(near) == (f"; did you mean {near}?" if near else "")


@pytest.mark.parametrize(
    ("annotation", "good", "bad", "words"),
    [
        (int, [0, -3], [1.0, "1", True, None, []], "an integer"),
        (float, [0, 1.5], ["1", False, None], "a number"),
        (bool, [True, False], [0, 1, "true"], "true or false"),
        (str, ["", "a"], [1, None], "text"),
        (str | None, ["a", None], [1], "text or null"),
        (Literal["a", 2], ["a", 2], ["b", 3], "one of a, 2"),
        (int | Literal["all"], [3, "all"], ["x", 1.5], "an integer or one of all"),
        (float | torch.Tensor, [1, 0.5], ["abc", None], "a number"),  # AdamW's lr; no configuration holds a tensor
        (torch.Tensor | datetime.date, ["anything"], [], None),
        (
            EverySteps,
            [3, "auto"],
            ["often", [5, 10], None],
            "an integer or one of auto",
        ),  # a Protocol comes by _target_
        (OuterOptimizer | None, ["anything", None], [], None),  # left to the target, which says what it takes
        (
            tuple[float, int | torch.Tensor],
            [[0.5, 1]],
            ["ab", [1], [1, 2, 3], [1, "x"]],
            "a list [a number, an integer]",
        ),
        (tuple[int, ...], ["anything", 3], [], None),
        (list[int], ["anything", 3], [], None),  # not simple: left to the target
        (datetime.date, ["anything"], [], None),
    ],
)
def test_simple_annotations_are_checked(
    annotation: object, good: list[object], bad: list[object], words: str | None
) -> None:
    assert all(admits(annotation, value) for value in good)
    assert not any(admits(annotation, value) for value in bad)
    assert expected(annotation) == words


# ---- models --------------------------------------------------------------------------------------------------------


class Sized(nn.Module):
    """Takes what only the data know."""

    def __init__(self, vocab_size: int, width: int = 2, max_length: int = 0):
        super().__init__()
        self.sizes = (vocab_size, width, max_length)


class Text:
    """Knows them."""

    vocab_size, tokens_per_example = 11, 7


def sizes(settings: dict[str, object], data: object) -> tuple[int, ...]:
    model = build_model(settings, data)
    assert isinstance(model, Sized)
    return model.sizes


def test_a_model_gets_what_only_the_data_know_where_it_asks_for_it() -> None:
    target = f"{__name__}.Sized"
    assert sizes({"_target_": target}, Text()) == (11, 2, 7)
    assert sizes({"_target_": target, "vocab_size": 50, "width": 3}, Text()) == (50, 3, 7)
    assert isinstance(build_model({"_target_": "torch.nn.Identity"}, Text()), nn.Identity)
    with pytest.raises(ConfigError, match="missing 1 required positional argument: 'vocab_size'"):
        build_model({"_target_": target}, object())


@pytest.mark.parametrize("settings", [{"_target_": MADE}, {"_target_": "builtins.dict"}])
def test_what_is_no_module_is_no_model(settings: dict[str, object]) -> None:
    with pytest.raises(ConfigError, match=r"no torch\.nn\.Module"):
        build_model(settings, Text())
