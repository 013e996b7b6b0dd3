"""A sync in Lightning's Trainer with FSDP2: two replicas of two ranks each.

Run: torchrun --standalone --nproc-per-node=4 examples/lightning_fsdp2.py FOLDER [--sync streaming]

Lines that end in `# dtrain` are what the sync takes.
"""

import sys

import lightning.pytorch as pl
import torch
from lightning.pytorch.callbacks import ModelCheckpoint
from lightning.pytorch.loggers import CSVLogger
from methods import chosen  # dtrain
from torch.distributed.fsdp import fully_shard
from torch.utils.data import DataLoader, TensorDataset

from dtrain.integrations.lightning import ShardedSyncStrategy  # dtrain


class Regression(pl.LightningModule):
    """The sum of 64 numbers."""

    def __init__(self) -> None:
        super().__init__()
        self.net = torch.nn.Sequential(torch.nn.Linear(64, 256), torch.nn.Tanh(), torch.nn.Linear(256, 1))

    def configure_model(self) -> None:
        for layer in (self.net[0], self.net[2], self.net):
            fully_shard(layer, mesh=self.device_mesh)

    def training_step(self, batch: list[torch.Tensor]) -> torch.Tensor:
        loss = (self.net(batch[0]) - batch[1]).square().mean()
        self.log("loss", loss)
        return loss

    def validation_step(self, batch: list[torch.Tensor]) -> None:
        self.log("val_loss", (self.net(batch[0]) - batch[1]).square().mean(), sync_dist=True)

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return torch.optim.AdamW(self.net.parameters(), lr=5e-3)


torch.manual_seed(0)
x = torch.randn(3200, 64)
data = TensorDataset(x, x.sum(1, keepdim=True))
strategy = ShardedSyncStrategy(chosen(), 2)  # dtrain, in place of: strategy = pl.strategies.ModelParallelStrategy()
trainer = pl.Trainer(
    accelerator="auto" if torch.cuda.is_available() else "cpu",
    devices=4,
    max_epochs=2,
    log_every_n_steps=10,
    logger=CSVLogger(sys.argv[1], name="", version=""),
    callbacks=[ModelCheckpoint(sys.argv[1], monitor="val_loss")],
    enable_progress_bar=False,
    strategy=strategy,
)
trainer.fit(Regression(), DataLoader(data, batch_size=16, shuffle=True), DataLoader(data, batch_size=320))
trainer.print(
    f"val_loss {trainer.callback_metrics['val_loss']:.3f}, best {trainer.checkpoint_callback.best_model_path}"
)
