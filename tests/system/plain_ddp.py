"""A training script that knows nothing of dtrain. Its argument says what goes wrong on rank 2 at step 3."""

from __future__ import annotations

import os
import sys
import time

import torch
import torch.distributed as dist


def load_batch(step: int, trouble: str) -> torch.Tensor:
    if step == 3 and dist.get_rank() == 2:
        if trouble == "raise":
            raise KeyError("no example 7")
        if trouble == "hang":
            time.sleep(600)
    return torch.ones(2, 4)


def main(trouble: str) -> None:
    dist.init_process_group("gloo")
    model = torch.nn.parallel.DistributedDataParallel(torch.nn.Linear(4, 4))
    for step in range(5):
        model(load_batch(step, trouble)).sum().backward()
    total = torch.tensor([float(dist.get_rank())])
    dist.all_reduce(total)
    host = os.uname().nodename
    print(f"rank {dist.get_rank()} of {dist.get_world_size()} on {host}: sum {total.item():g}", flush=True)
    dist.destroy_process_group()


if __name__ == "__main__":
    main(sys.argv[1] if len(sys.argv) > 1 else "")
