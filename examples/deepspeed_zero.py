"""Compressed gradients between DeepSpeed ZeRO-2 replicas: ZeRO shards inside a replica, dtrain syncs the replicas.

Run: torchrun --standalone --nproc-per-node=4 examples/deepspeed_zero.py

Lines that end in `# dtrain` are what the sync takes beside the groups of ranks, which DeepSpeed has to be told.
"""

import deepspeed
import deepspeed.ops
import torch
import torch.distributed as dist

from dtrain import attach, every_step  # dtrain
from dtrain.compress import error_feedback, quantize  # dtrain

# On CPU this op takes a minute to compile, and small collectives would bypass gloo.
deepspeed.ops.__compatible_ops__["deepspeed_shm_comm"] = False


class ReplicaOnly:
    """Tells DeepSpeed that its data-parallel world is one replica: this rank's shard group."""

    def __init__(self, replica, alone):
        self.get_data_parallel_group = lambda: replica
        self.get_data_parallel_group_ranks = lambda: dist.get_process_group_ranks(replica)
        self.get_data_parallel_world_size = replica.size
        self.get_data_parallel_rank = replica.rank
        self.get_model_parallel_group = self.get_tensor_model_parallel_group = lambda: alone
        self.get_model_parallel_world_size = self.get_tensor_model_parallel_world_size = lambda: 1
        self.get_model_parallel_rank = self.get_tensor_model_parallel_rank = lambda: 0


dist.init_process_group("gloo")
replica, _ = dist.new_subgroups_by_enumeration([[0, 1], [2, 3]])
peers, _ = dist.new_subgroups_by_enumeration([[0, 2], [1, 3]])
alone, _ = dist.new_subgroups_by_enumeration([[0], [1], [2], [3]])
torch.manual_seed(0)
model = torch.nn.Sequential(torch.nn.Linear(64, 256), torch.nn.Tanh(), torch.nn.Linear(256, 1))
engine, *_ = deepspeed.initialize(
    model=model,
    optimizer=torch.optim.AdamW(model.parameters(), lr=1e-3),
    mpu=ReplicaOnly(replica, alone),
    dist_init_required=False,
    config={
        "train_micro_batch_size_per_gpu": 32,
        "zero_allow_untested_optimizer": True,
        "zero_optimization": {"stage": 2, "overlap_comm": False},
    },
)
method = every_step(compress=error_feedback(quantize(bits=8)))  # dtrain
sync = attach(engine, None, method, replicate_group=peers)  # dtrain

torch.manual_seed(1 + dist.get_rank())
for step in range(100):
    x = torch.randn(32, 64)
    loss = (engine(x) - x.sum(1, keepdim=True)).square().mean()
    engine.backward(loss)
    sync.step()  # dtrain, in place of: engine.step()
    if dist.get_rank() == 0 and step % 33 == 0:
        print(f"step {step}: loss {loss.item():.2f}")

dist.destroy_process_group()
