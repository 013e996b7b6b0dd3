"""Every compressor and kernel on tensors of the card: its contract there, the CPU's bits where they are promised.

Promised are the bits of what is decoded, as ranks must agree, and of what is encoded by arithmetic that every device
rounds alike. Not promised: sums over blocks, which a GPU adds up in another order; quotients by a constant, for which
it multiplies by the reciprocal; draws from a generator of the device's own.
"""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from dtrain.comm import kernels
from dtrain.comm.methods.co2 import co2
from dtrain.comm.outer_optimizers import InPlace, Round, nesterov
from dtrain.comm.plans.plan import as_plan
from dtrain.comm.seeds import Key
from dtrain.comm.state import State
from dtrain.compress import error_feedback, quantize
from dtrain.testing import check_compressor
from tests.comm.test_kernels import BLOCK, everything, rows
from tests.comm.zoo import COMPRESSORS, VALUES, bits, draw, exchange, fresh_states

KEY = Key(0, 0, 1, "w", "send")
SUMS = {"qsgd", "sign", "compeft", "compeft, sparse", "projection", "projection, unbiased"}
QUOTIENTS = {"e4m3", "e5m2"}
OWN_DRAWS = {"int3 stochastic", "qsgd", "natural", "terngrad"}
DECODED_BY_QUOTIENTS = {"symmetric", "qsgd"}


@pytest.mark.parametrize("name", COMPRESSORS)
def test_it_keeps_what_it_declares_on_the_card(name: str, device: torch.device) -> None:
    check_compressor(COMPRESSORS[name], device)


@pytest.mark.parametrize("kind", VALUES)
@pytest.mark.parametrize("name", sorted(COMPRESSORS.keys() - SUMS - QUOTIENTS - OWN_DRAWS))
def test_it_encodes_to_the_bits_of_the_cpu(name: str, kind: str, device: torch.device) -> None:
    if "top-k" in name and kind in ("constant", "zeros", "sparse", "two large"):
        pytest.skip("which of equal magnitudes are kept is up to the device")
    values = torch.stack([draw(seed, 2049, kind) for seed in range(3)])
    there, here = (COMPRESSORS[name].encode(v, KEY) for v in (values.to(device), values))
    assert all(torch.equal(bits(one.cpu()), bits(other)) for one, other in zip(there, here, strict=True))


@pytest.mark.parametrize("name", sorted((SUMS | QUOTIENTS) - OWN_DRAWS))
def test_others_encode_to_what_decodes_to_nearly_the_same(name: str, device: torch.device) -> None:
    compressor, values = COMPRESSORS[name], torch.stack([draw(seed, 2049) for seed in range(3)])
    there, here = (
        compressor.decode(compressor.encode(v, KEY), 2049, KEY.shared).cpu() for v in (values.to(device), values)
    )
    off = (there - here).abs() > 1e-5 * here.abs().amax()
    assert int(off.sum()) <= 0.002 * off.numel()  # an element in the middle of two codes may take the other one


@pytest.mark.parametrize("name", COMPRESSORS)
def test_it_decodes_to_the_bits_of_the_cpu(name: str, device: torch.device) -> None:
    compressor, values = COMPRESSORS[name], torch.stack([draw(seed, 2049, "heavy") for seed in range(3)])
    payload = compressor.encode(values, KEY)
    here = compressor.decode(payload, 2049, KEY.shared)
    there = compressor.decode(tuple(tensor.to(device) for tensor in payload), 2049, KEY.shared).cpu()
    if name in DECODED_BY_QUOTIENTS:
        torch.testing.assert_close(there, here, rtol=1e-6, atol=0)
    else:
        assert torch.equal(bits(there), bits(here))


@pytest.mark.parametrize("name", [n for n, c in COMPRESSORS.items() if hasattr(c, "encode_sum") and n != "qsgd"])
def test_one_pass_is_two_there_too(name: str, device: torch.device) -> None:
    compressor, one, other = COMPRESSORS[name], rows(3, 700, 1).to(device), rows(3, 700, 2).to(device)
    both = compressor.encode_sum(one, other)  # type: ignore[attr-defined]
    payload = compressor.encode(one + other, KEY)
    if both is not None:
        left = one + other - compressor.decode(payload, 700, KEY)
        assert all(torch.equal(bits(a), bits(b)) for a, b in zip((*both[0], both[1]), (*payload, left), strict=True))
    mean, answer = compressor.encode_mean(payload, 700, KEY)  # type: ignore[attr-defined]
    again = compressor.encode(mean.unsqueeze(0), KEY)
    assert all(torch.equal(bits(a), bits(b)) for a, b in zip(answer, again, strict=True))


@pytest.mark.parametrize(
    ("grid", "width", "rounding"),
    [("max_min", 8, "nearest"), ("max_min", 8, "stochastic"), ("e3m0", 4, "nearest"), ("least_squares", 2, "nearest")],
)
def test_triton_gives_the_bits_of_eager_code(
    grid: str, width: int, rounding: str, device: torch.device, monkeypatch: pytest.MonkeyPatch
) -> None:
    compressor = quantize(grid, bits=width, block=BLOCK, rounding=rounding)
    values, others = rows(3, 37 * BLOCK, 1).to(device), rows(3, 37 * BLOCK, 101).to(device)
    monkeypatch.setenv("DTRAIN_COMPILE", "never")
    expected = everything(compressor, values, others)
    monkeypatch.setenv("DTRAIN_COMPILE", "always")
    found = everything(compressor, values, others)
    assert not kernels._Compiler.missing
    assert all(torch.equal(bits(a), bits(b)) for a, b in zip(found, expected, strict=True))


@pytest.mark.parametrize("rule", [nesterov(), co2().outer], ids=["nesterov", "co2"])
def test_outer_steps_are_the_cpus_to_round_off(rule: InPlace, device: torch.device) -> None:
    found: list[list[Tensor]] = []
    for place in (device, torch.device("cpu")):
        state, anchor = State(rule.kinds), rows(1, 4000, 1)[0].to(place)
        for step in range(4):
            anchor = rule.step_("w", anchor, rows(1, 4000, 2 + step)[0].to(place), state, Round(1e-3 * step, 12))
            state.commit()
        found.append([anchor.cpu(), *(tensor.cpu() for tensor in state.tensors["w"].values())])
    for there, here in zip(*found, strict=True):
        torch.testing.assert_close(there, here, rtol=1e-5, atol=1e-30)


@pytest.mark.parametrize("name", COMPRESSORS)
def test_all_ranks_decode_the_same_bits_and_feedback_loses_nothing(name: str, device: torch.device) -> None:
    compressor = COMPRESSORS[name]
    plan = as_plan(error_feedback(compressor) if compressor.delta > 0 and not compressor.unbiased else compressor)
    states, sent, given = fresh_states(plan, 3), torch.zeros(513, device=device), torch.zeros(513, device=device)
    for step in range(4):
        values = [{"w": draw(10 * step + rank, 513).to(device)} for rank in range(3)]
        combined = exchange(values, plan, states, step=step)
        assert combined[0].finite and combined[0].values["w"].device == device
        assert all(torch.equal(one.values["w"], combined[0].values["w"]) for one in combined)
        for state in states:
            state.commit()
        sent += combined[0].values["w"]
        given += torch.stack([value["w"] for value in values]).mean(0)
    if plan.compressions[0].feedback.feeds_back:
        kept = torch.stack([state.tensors["w"]["residual"] for state in states]).mean(0)
        torch.testing.assert_close(sent + kept, given, rtol=1e-4, atol=1e-4)
