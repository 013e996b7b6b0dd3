"""Compiled kernels give the bits of the definitions that they are made from, and are made only where that pays."""

from __future__ import annotations

import warnings
from dataclasses import replace

import pytest
import torch
from torch import Tensor

from dtrain.comm import kernels as fused
from dtrain.comm.aggregators.mean import rank_order_mean
from dtrain.comm.collectives.two_phase import two_phase
from dtrain.comm.compressors.quantize import Even, LeastSquares, Powers, Quantize
from dtrain.comm.kernels import Kernel
from dtrain.comm.methods.co2 import co2
from dtrain.comm.ops import Payload, Place
from dtrain.comm.outer_optimizers import InPlace, Round, nesterov
from dtrain.comm.plans.plan import as_plan
from dtrain.comm.seeds import Key
from dtrain.comm.state import State
from dtrain.comm.transports.simulate import simulate
from dtrain.compress import error_feedback, quantize

KEY = Key(1, 2, 0, "w", "send")
BLOCK = 64


def rows(m: int, width: int, seed: int) -> Tensor:
    """Ordinary rows among which some blocks are hard: equal, zero, tiny, denormal, huge."""
    values = torch.randn(m, width, generator=torch.Generator().manual_seed(seed))
    for number, factor in enumerate((0.0, 1e-30, 1e-42, 1e30)):
        values[:, number * BLOCK : (number + 1) * BLOCK] *= factor
    values[:, 4 * BLOCK : 5 * BLOCK] = 3.25
    return values


def everything(compressor: Quantize | Even | Powers | LeastSquares, values: Tensor, others: Tensor) -> list[Tensor]:
    """What all kernels of ``compressor`` make of ``values``."""
    payload: Payload = compressor.encode(values, KEY)
    found = [
        *payload,
        compressor.decode(payload, values.shape[1], KEY),
        compressor.decode_mean(payload, values.shape[1]),
    ]
    mean, answer = compressor.encode_mean(payload, values.shape[1], KEY)
    found += [mean, *answer]
    both = compressor.encode_sum(values, others)
    return found if both is None else [*found, *both[0], both[1]]


@pytest.mark.slow  # a compiler is at work
@pytest.mark.timeout(300)
@pytest.mark.parametrize(
    ("grid", "bits", "rounding"),
    [
        ("max_min", 8, "nearest"), ("max_min", 4, "nearest"), ("max_min", 8, "stochastic"),
        ("e3m0", 4, "nearest"), ("least_squares", 2, "nearest"),
    ],
)  # fmt: skip
def test_compiled_kernels_give_the_same_bits(
    grid: str, bits: int, rounding: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    compressor = quantize(grid, bits=bits, block=BLOCK, rounding=rounding)
    for seed, (m, width) in enumerate([(3, 10 * BLOCK), (3, 37 * BLOCK), (3, 6 * BLOCK)]):
        values, others = rows(m, width, seed), rows(m, width, seed + 100)
        monkeypatch.setenv("DTRAIN_COMPILE", "never")
        expected = everything(compressor, values, others)
        monkeypatch.setenv("DTRAIN_COMPILE", "always")
        assert all(torch.equal(a, b) for a, b in zip(everything(compressor, values, others), expected, strict=True))


@pytest.mark.slow  # a compiler is at work
@pytest.mark.timeout(300)
@pytest.mark.parametrize("rule", [nesterov(), co2().outer], ids=["nesterov", "co2"])
def test_compiled_outer_steps_give_the_same_bits(rule: InPlace, monkeypatch: pytest.MonkeyPatch) -> None:
    found = []
    for policy in ("never", "always"):
        monkeypatch.setenv("DTRAIN_COMPILE", policy)
        state, anchor = State(rule.kinds), rows(1, 4000, 1)[0]
        for step in range(4):
            anchor = rule.step_("w", anchor, rows(1, 4000, 2 + step)[0], state, Round(1e-3 * step, 12))
            state.commit()
        found.append([anchor, *state.tensors["w"].values()])
    assert all(torch.equal(a, b) for a, b in zip(*found, strict=True))


@pytest.mark.parametrize("grid", ["max_min", "symmetric", "qsgd", "e3m0", "natural", "least_squares"])
def test_one_pass_is_two(grid: str) -> None:
    compressor = quantize(grid, bits=None if grid in ("e3m0", "natural") else 4, block=BLOCK)
    values, others = rows(4, 700, 1), rows(4, 700, 2)
    found = compressor.encode_sum(values, others)
    assert found is not None
    payload, left = found
    two = compressor.encode(values + others, KEY)
    assert all(torch.equal(a, b) for a, b in zip(payload, two, strict=True))
    decoded = compressor.decode(two, 700, KEY)
    assert torch.equal(left, values + others - decoded)
    mean = rank_order_mean(decoded)
    assert torch.equal(compressor.decode_mean(two, 700), mean)
    for one in (compressor, replace(compressor, rounding="stochastic")):
        if one.rounding == "stochastic" and grid == "least_squares":
            continue
        chunk, answer = one.encode_mean(two, 700, KEY)
        expected = [mean, *one.encode(mean.unsqueeze(0), KEY)]
        assert all(torch.equal(a, b) for a, b in zip([chunk, *answer], expected, strict=True))
    assert replace(compressor, rounding="stochastic").encode_sum(values, others) is None


class Plain:
    """A compressor of somebody else, who offers no more than he must."""

    def __init__(self, own: Quantize) -> None:
        self.unbiased, self.delta, self.homogeneous, self.linear = own.unbiased, own.delta, own.homogeneous, own.linear
        self.encode, self.decode, self.row_bytes = own.encode, own.decode, own.row_bytes


def test_a_route_takes_one_pass_or_two_with_the_same_bits() -> None:
    own = quantize(bits=8, block=16)
    assert isinstance(own, Quantize)
    results = []
    for compressor in (own, Plain(own)):
        plan = as_plan(error_feedback(compressor))
        states = [State({"residual": "per_worker"}) for _ in range(3)]
        for step in range(3):
            values = [rows(1, 333, 10 * step + rank)[0] for rank in range(3)]
            flows = [
                two_phase({"w": v}, plan, rank_order_mean, Place(rank, 3), Key(0, step, rank), states[rank])
                for rank, v in enumerate(values)
            ]
            combined = simulate(flows)
            for state in states:
                state.commit()
        results.append([combined[0].values["w"], *(state.tensors["w"]["residual"] for state in states)])
    assert all(torch.equal(a, b) for a, b in zip(*results, strict=True))


# ---- when ----------------------------------------------------------------------------------------------------------


def doubled(values: Tensor, out: Tensor) -> None:
    out.copy_(values * 2)


def test_what_is_small_or_rare_is_never_compiled(monkeypatch: pytest.MonkeyPatch) -> None:
    compiled: list[object] = []

    def compile_(function: object, *_: object) -> object:
        compiled.append(function)
        return function

    monkeypatch.setattr(fused._Compiler, "compile", compile_)
    monkeypatch.setattr(fused, "WORTHWHILE", 3 * fused.SMALLEST)
    kernel = Kernel(doubled)
    small, large = torch.ones(1, 1, 8), torch.ones(1, fused.SMALLEST // 64, 64)
    for values, calls in ((small, 100), (large, 2)):
        for _ in range(calls):
            kernel(values, torch.empty_like(values))
        kernel.compile_what_is_due()
    assert not compiled
    kernel(large, torch.empty_like(large))
    assert not compiled  # not in the middle of a flow
    kernel.compile_what_is_due()
    kernel.compile_what_is_due()
    assert len(compiled) == 1
    monkeypatch.setenv("DTRAIN_COMPILE", "early")
    early = Kernel(doubled)
    for values in (small, large):
        early(values, torch.empty_like(values))
        early.compile_what_is_due()
    assert len(compiled) == 2  # what is large, after its first call
    monkeypatch.setenv("DTRAIN_COMPILE", "auto")
    kernel(large, out := torch.empty_like(large))
    assert torch.equal(out, 2 * large)


def test_what_becomes_due_while_others_are_compiled_is_compiled_later(monkeypatch: pytest.MonkeyPatch) -> None:
    """A flow on a channel's thread goes on meanwhile."""
    kernel, compiled = Kernel(doubled), []

    def compile_(function: object, *_: object) -> object:
        compiled.append(function)
        wider = torch.ones(1, fused.SMALLEST // 64, 64 + len(compiled))
        kernel(wider, torch.empty_like(wider))
        return function

    monkeypatch.setattr(fused._Compiler, "compile", compile_)
    monkeypatch.setattr(fused, "WORTHWHILE", fused.SMALLEST)
    values = torch.ones(1, fused.SMALLEST // 64, 64)
    kernel(values, torch.empty_like(values))
    kernel.compile_what_is_due()
    assert len(compiled) == 1
    kernel.compile_what_is_due()
    assert len(compiled) == 2


def test_without_a_compiler_it_is_said_once_and_everything_works(monkeypatch: pytest.MonkeyPatch) -> None:
    def refused(*_: object, **__: object) -> object:
        raise RuntimeError("No working C++ compiler found")

    monkeypatch.setattr(torch, "compile", lambda *_, **__: refused)
    monkeypatch.setattr(fused._Compiler, "missing", False)
    monkeypatch.setenv("DTRAIN_COMPILE", "always")
    values = torch.ones(2, 3, 4)
    with pytest.warns(RuntimeWarning, match=r"No working C\+\+ compiler found"):
        Kernel(doubled)(values, torch.empty_like(values))
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        Kernel(doubled)(values, out := torch.empty_like(values))
    assert torch.equal(out, 2 * values)


def test_on_a_gpu_kernels_are_compiled_to_round_as_eager_code_does_or_not_at_all(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    assert fused._options(torch.device("cpu")) == {}
    assert fused._options(torch.device("cuda")) in (None, dict.fromkeys(fused.AS_EAGER, True))  # None before torch 2.13
    monkeypatch.setattr(fused, "AS_EAGER", ("what_this_torch_does_not_know",))
    assert fused._options(torch.device("cuda")) is None
    monkeypatch.setattr(torch, "compile", lambda *_, **__: pytest.fail("compiled"))
    like = fused._Like((2,), (1,), torch.float32, torch.device("cuda"))
    eager = fused._Compiler.compile(doubled, {}, [like])
    eager(torch.ones(2), out := torch.empty(2))
    assert torch.equal(out, torch.full((2,), 2.0))
