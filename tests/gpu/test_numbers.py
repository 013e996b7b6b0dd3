"""Random numbers, digests and steps that are the same on every device."""

from __future__ import annotations

import copy

import pytest
import torch

from dtrain.comm.inner_optimizers.muon import muon
from dtrain.comm.inner_optimizers.newton_schulz import orthogonalized
from dtrain.comm.layout import Segment
from dtrain.comm.runtime.consistency import fingerprint
from dtrain.comm.seeds import Key
from dtrain.comm.shared_seed.digest import partial
from dtrain.comm.shared_seed.philox import Address, SharedRandom
from tests.comm.inner_optimizers.test_muon import Net

RANDOM, AT = SharedRandom(0x5EED), Address("test", 3, 1, 2)


@pytest.mark.parametrize(("start", "numel"), [(0, 1), (5, 1000), (128 * (2**32 + 5) + 7, 4097)])
def test_philox_is_a_function_of_the_address_alone(start: int, numel: int, device: torch.device) -> None:
    for kind in (RANDOM.signs, RANDOM.normal):
        there = kind(AT, "w", numel, start=start, device=device)
        assert there.device == device and torch.equal(there.cpu(), kind(AT, "w", numel, start=start))


def test_digests_and_fingerprints_are_those_of_the_same_bits_elsewhere(device: torch.device) -> None:
    for numel in (1, 7, 4095, 100_003):
        values = torch.randn(numel)
        segment = {"w": Segment("w", 11, numel)}
        assert torch.equal(partial({"w": values.to(device)}, segment), partial({"w": values}, segment))
        for dtype in (torch.float32, torch.bfloat16, torch.uint8):
            assert fingerprint(values.to(dtype).to(device)) == fingerprint(values.to(dtype))


def test_a_key_draws_the_same_again_and_moves_no_global_generator(device: torch.device) -> None:
    key = Key(1, 2, 0, "w", "send")
    one, two = (torch.rand(1000, generator=key.generator(device), device=device) for _ in range(2))
    assert torch.equal(one, two)


@pytest.mark.parametrize("shape", [(5, 8, 24), (3, 64, 16), (1, 1, 7)])
def test_newton_schulz_is_the_cpus_to_round_off(shape: tuple[int, ...], device: torch.device) -> None:
    matrices = torch.randn(shape)
    there = orthogonalized(matrices.to(device), 5, torch.float32).cpu()
    torch.testing.assert_close(there, orthogonalized(matrices, 5, torch.float32), rtol=1e-3, atol=1e-4)
    default = orthogonalized(matrices.to(device), 5)  # bf16 on a card
    singular = torch.linalg.svdvals(default.cpu().float())
    assert default.dtype == torch.float32 and bool(((singular > 0.5) & (singular < 1.4)).all())


def test_muon_steps_as_on_the_cpu_to_the_round_off_of_bf16(device: torch.device) -> None:
    here = Net()
    there = copy.deepcopy(here).to(device)
    for net in (here, there):
        optimizer = muon(net)
        for step in range(3):
            for number, parameter in enumerate(net.parameters()):
                generator = torch.Generator().manual_seed(100 * step + number)
                parameter.grad = torch.randn(parameter.shape, generator=generator).to(parameter.device)
            optimizer.step()
    for one, other in zip(here.parameters(), there.parameters(), strict=True):
        torch.testing.assert_close(other.detach().cpu(), one.detach(), rtol=2e-2, atol=5e-3)
