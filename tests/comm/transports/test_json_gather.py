"""What ranks tell each other is text: nothing of it is code."""

from __future__ import annotations

import os
import pickle

import pytest
import torch
import torch.distributed as dist

from dtrain.comm.transports.json_gather import gather_json
from dtrain.testing import WorkerPool

pytestmark = pytest.mark.processes


def test_everybody_hears_everybody(pool: WorkerPool) -> None:
    expected = [{"rank": 0, "text": "", "list": []}, {"rank": 1, "text": "ü" * 1000, "list": [None, 1.5]}]
    assert pool.run(_told, expected, world=2) == [expected, expected]


def test_a_pickle_is_refused_and_not_loaded(pool: WorkerPool) -> None:
    """Torch's object collectives, as they were used here, run what a peer sends."""
    outcomes = pool.run(_sent_a_pickle, world=2)
    assert "is no JSON" in outcomes[1] and "PICKLE_RAN" not in outcomes[1]


def _told(values: list[object]) -> list[object]:
    return gather_json(values[dist.get_rank()])


class _Evil:
    def __reduce__(self) -> tuple[object, tuple[str, str]]:
        return os.putenv, ("PICKLE_RAN", "1")


def _sent_a_pickle() -> str:
    if dist.get_rank() == 1:
        try:
            gather_json("honest")
        except RuntimeError as error:
            return f"{error} {os.popen('env | grep PICKLE').read()}"
        return "nothing was refused"
    bomb = torch.frombuffer(bytearray(pickle.dumps(_Evil())), dtype=torch.uint8)
    lengths = [torch.zeros(1, dtype=torch.int64) for _ in range(2)]
    dist.all_gather(lengths, torch.tensor([bomb.numel()]))
    row = torch.zeros(int(max(lengths)), dtype=torch.uint8)
    row[: bomb.numel()] = bomb
    dist.all_gather([torch.empty_like(row) for _ in range(2)], row)
    return "sent"
