"""An average of the outer parameters, as docs/local_updates/anchor.md makes it: the same on all ranks."""

from __future__ import annotations

import pytest
import torch
import torch.distributed as dist
from torch import Tensor
from torch.nn.parallel import DistributedDataParallel
from torch.optim.swa_utils import AveragedModel, get_ema_multi_avg_fn

from dtrain import attach, diloco, streaming_diloco
from dtrain.comm.runtime.method import Sync
from dtrain.testing import WorkerPool
from tests.comm.adapters.test_attach import backward, flat, small

pytestmark = pytest.mark.processes

SYNCS: dict[str, Sync] = {
    "diloco": diloco(every_steps=3),
    "streaming": streaming_diloco(every_steps=4, overlap_steps=1, layers_per_fragment=0),
}


def averaged(name: str, engine: str) -> tuple[Tensor, Tensor, Tensor, list[int]]:
    """Torch's average, one made by hand of the anchors, the parameters in training, and the rounds that were seen."""
    net = small()
    model = DistributedDataParallel(net) if engine == "ddp" else net
    sync = attach(model, torch.optim.SGD(model.parameters(), lr=0.1), SYNCS[name])
    ema = AveragedModel(net, multi_avg_fn=get_ema_multi_avg_fn(0.9))
    seen, anchors = [0], []
    for step in range(11):
        backward(model, dist.get_rank(), step)
        sync.step()
        if sync.rounds != seen[-1]:
            seen.append(sync.rounds)
            with sync.evaluation():
                ema.update_parameters(net)
                anchors.append(flat(net).clone())
    by_hand = anchors[0]
    for anchor in anchors[1:]:
        by_hand = 0.9 * by_hand + 0.1 * anchor
    live = flat(net)
    sync.close_round()
    sync.detach()
    return flat(ema.module), by_hand, live, seen


@pytest.mark.parametrize("engine", ["plain", "ddp"])
@pytest.mark.parametrize("name", SYNCS)
def test_it_is_equal_on_all_ranks_and_the_average_of_the_anchors(pool: WorkerPool, name: str, engine: str) -> None:
    rows = pool.run(averaged, name, engine, world=2)
    (one, by_hand, live, seen), (other, _, others_live, others_seen) = rows
    assert torch.equal(one, other) and seen == others_seen and len(seen) > 2
    torch.testing.assert_close(one, by_hand)
    assert not torch.equal(live, others_live), "within a round replicas differ, and an average of them would"
