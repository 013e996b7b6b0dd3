"""Two models that train each other in manual optimization, each with an optimizer and a backward pass of its own."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from lightning import LightningModule
from lightning.pytorch.strategies import DDPStrategy
from torch import Tensor, nn
from torch.nn.functional import softplus
from torch.optim import SGD
from torch.utils.data import DataLoader, TensorDataset

from dtrain import diloco, every_step
from dtrain.integrations.lightning import SyncStrategy
from dtrain.testing import WorkerPool
from tests.integrations.test_lightning import launched, made

pytestmark = [pytest.mark.processes, pytest.mark.timeout(120)]


class Pair(LightningModule):  # type: ignore[misc]
    """A generator and a discriminator, which sees what was generated before either has stepped."""

    def __init__(self, toggles: bool) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.generator, self.discriminator = nn.Linear(4, 3), nn.Linear(3, 1)
        self.automatic_optimization = False
        self.toggles, self.losses, self.reduces = toggles, list[float](), set[bool]()

    def training_step(self, batch: Any) -> None:
        generated = self.generator(batch[0])
        before = generated.detach()
        generators, discriminators = self.optimizers()
        self.stepped(generators, lambda: softplus(-self.discriminator(generated)).mean())
        real, false = batch[0][:, :3], before
        self.stepped(
            discriminators,
            lambda: softplus(self.discriminator(false)).mean() + softplus(-self.discriminator(real)).mean(),
        )

    def stepped(self, optimizer: Any, loss_of: Any) -> None:
        if self.toggles:
            self.toggle_optimizer(optimizer)
        optimizer.zero_grad()
        loss: Tensor = loss_of()
        self.manual_backward(loss)
        optimizer.step()
        if self.toggles:
            self.untoggle_optimizer(optimizer)
        self.losses.append(float(loss.detach()))

    def on_train_batch_end(self, *_: Any) -> None:
        self.reduces.add(self.trainer.strategy.model.require_backward_grad_sync)

    def configure_optimizers(self) -> Any:
        return [SGD(model.parameters(), 0.1) for model in (self.generator, self.discriminator)], []


def trained(toggles: bool) -> list[tuple[list[float], set[bool], int]]:
    """With Lightning's DDP, dense, and local updates without a round, on data that are the same on all ranks."""
    x = torch.randn(40, 4, generator=torch.Generator().manual_seed(1))
    found = []
    for strategy in (
        DDPStrategy(find_unused_parameters=True),
        SyncStrategy(every_step(), find_unused_parameters=True),
        SyncStrategy(diloco(every_steps=100)),
    ):
        with launched():
            module = Pair(toggles)
            trainer = made(strategy, max_steps=16)
            trainer.fit(module, DataLoader(TensorDataset(x), batch_size=4))
            found.append((module.losses, module.reduces, trainer.global_step))
    return found


@pytest.mark.parametrize("toggles", [False, True])
def test_they_train_as_under_lightnings_own_strategy(pool: WorkerPool, toggles: bool) -> None:
    for plain, dense, local in pool.run(trained, toggles, world=2):
        assert dense[0] == pytest.approx(plain[0], abs=1e-6) and local[0] == pytest.approx(plain[0], abs=1e-6)
        assert len(plain[0]) == 16 and {plain[2], dense[2], local[2]} == {16}
        assert (plain[1], dense[1], local[1]) == ({True}, {True}, {False})  # under local updates DDP reduces nothing
