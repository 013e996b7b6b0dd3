"""every_step: what it is made of, and what it refuses."""

from __future__ import annotations

import re

import pytest
import torch
from torch import Tensor

from dtrain import every_step
from dtrain.comm.aggregators.mean import rank_order_mean
from dtrain.comm.compressors.cast import cast
from dtrain.comm.compressors.compressor import Compressor
from dtrain.comm.feedback import Compression, NoFeedback
from dtrain.comm.methods.every_step import EveryStep
from dtrain.compress import error_feedback, powersgd, quantize, randk, topk
from dtrain.plans import by_layer
from dtrain.testing.replicas import Replicas

IDENTITY = Compression(cast("fp32"), NoFeedback())


def median(rows: Tensor) -> Tensor:
    return rows.median(0).values


def test_what_it_is_made_of() -> None:
    assert every_step() == EveryStep(IDENTITY, rank_order_mean, "auto")
    compressed = every_step(compress=quantize(bits=4, block=64))
    assert compressed.plan == Compression(quantize(bits=4, block=64), NoFeedback())
    wrapped = error_feedback(quantize(bits=8))
    assert every_step(compress=wrapped).plan is wrapped
    assert every_step(combine=median).rule is median
    assert every_step(compress=cast("bf16"), route="all_reduce").route == "all_reduce"
    assert every_step() == every_step() and hash(every_step()) == hash(every_step())


@pytest.mark.parametrize("compressor", [quantize(bits=8), quantize(bits=4, rounding="stochastic")])
def test_an_all_reduce_cannot_sum_codes(compressor: Compressor) -> None:
    message = f"{compressor} is not linear, so an all-reduce cannot sum its payloads; use route='two_phase'"
    with pytest.raises(ValueError, match=re.escape(message)):
        every_step(compress=compressor, route="all_reduce")


def test_an_all_reduce_feeds_back_only_what_it_sums_exactly() -> None:
    with pytest.raises(ValueError, match="rounds sums where no feedback sees it; use route='two_phase'"):
        every_step(compress=error_feedback(cast("bf16")), route="all_reduce")
    for compressor in (randk(0.1), powersgd(4)):
        assert every_step(compress=error_feedback(compressor), route="all_reduce").route == "all_reduce"


def test_an_all_reduce_has_only_the_mean() -> None:
    with pytest.raises(
        ValueError, match="an all-reduce has only the mean to offer; use route='two_phase' with another"
    ):
        every_step(combine=median, route="all_reduce")
    assert every_step(combine=rank_order_mean, route="all_reduce").rule is rank_order_mean


@pytest.mark.parametrize("route", ["ring", "", "TWO_PHASE", None])
def test_an_unknown_route(route: object) -> None:
    said = f"route is {route!r}; choose 'auto', 'two_phase', 'all_gather', 'sparse_all_reduce' or 'all_reduce'"
    with pytest.raises(ValueError, match=re.escape(said)):
        every_step(route=route)  # type: ignore[arg-type]


def test_the_sparse_all_reduce_needs_something_sparse() -> None:
    said = (
        "is for sparse compressors such as topk, not for Quantize(bits=8, block=512, rounding='nearest'); leave route"
    )
    with pytest.raises(ValueError, match=re.escape(said)):
        every_step(compress=quantize(bits=8), route="sparse_all_reduce")
    plan = by_layer({"*norm*": None}, default=error_feedback(topk(0.01)))
    assert every_step(compress=plan, route="sparse_all_reduce").route == "sparse_all_reduce"


@pytest.mark.parametrize("compress", ["int8", 8, quantize, torch.zeros(1)])
def test_something_that_is_no_compressor(compress: object) -> None:
    with pytest.raises(TypeError, match=r"give a compressor, as quantize\(bits=8\), or error_feedback"):
        every_step(compress=compress)  # type: ignore[arg-type]


def test_it_says_why_replicas_cannot_weigh() -> None:
    attached = Replicas(every_step(), 2).attached[0]
    with pytest.raises(RuntimeError, match=r"counts all replicas alike; multiply each replica's loss by its tokens"):
        attached.weigh(3)
