"""Frozen parameters, as under LoRA adapters, and buffers: on all engines alike."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from dtrain.testing import WorkerPool
from dtrain.train.models.transformer import Transformer
from tests.laws.jobs import ENGINES, run

pytestmark = [pytest.mark.processes, pytest.mark.timeout(120)]


class Adapted(nn.Module):
    """A frozen model, an adapter of rank 2 on its head, and a buffer that counts."""

    def __init__(self, vocab_size: int, max_length: int, **_: object) -> None:
        super().__init__()
        self.model = Transformer(dim=32, layers=1, heads=2, vocab_size=vocab_size, max_length=max_length)
        for parameter in self.model.parameters():
            parameter.requires_grad_(False)
        self.down = nn.Linear(vocab_size, 2, bias=False)
        self.up = nn.Linear(2, vocab_size, bias=False)
        self.register_buffer("seen", torch.zeros(()))

    def forward(self, batch: dict[str, Tensor]) -> Tensor:
        assert isinstance(self.seen, Tensor)
        self.seen += 1
        logits = self.model.logits(batch["input"])
        logits = logits + self.up(self.down(logits))
        return F.cross_entropy(logits.flatten(0, 1), batch["target"].flatten())


def test_only_adapters_are_trained_and_sent_on_every_engine(pool: WorkerPool, text: Path, tmp_path: Path) -> None:
    model = [f"model._target_={__name__}.Adapted", "train.steps=6", "train.evaluation_examples=0"]
    runs = {engine: run(pool, tmp_path / engine, text, engine, "int8_ef", *model) for engine in ENGINES}
    reference = runs["ddp"]
    trained = 2 * 2 * 257  # the vocabulary of bytes
    assert reference.losses[6] < reference.losses[1]
    for found in runs.values():
        assert found.losses == pytest.approx(reference.losses, rel=1e-3)
        assert int(found.summary["dense_bytes_per_rank"]) < 6 * 4 * trained
