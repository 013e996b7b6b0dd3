"""The report on what Muon's step costs on the default model, and how two shards share it."""

from __future__ import annotations

import json
import statistics
import subprocess
import sys
import time
from collections.abc import Callable, Mapping
from typing import TYPE_CHECKING

from benchmarks.harness import Session, say
from benchmarks.page import Report, at_most, table
from tests.programs.hosts import ROOT, environment

if TYPE_CHECKING:
    from dtrain.train.models.transformer import Transformer

ROUNDS, EXAMPLES, LENGTH = 30, 8, 128
SHARDS = (2, 4)


def muon(session: Session) -> Report:
    """Steps of both optimizers beside forward and backward, in one process on one core."""
    say("python -m benchmarks.muon")
    done = subprocess.run(
        ["taskset", "-c", "0", sys.executable, "-m", "benchmarks.muon"], cwd=ROOT,
        env={**environment(), "OMP_NUM_THREADS": "1"}, stdout=subprocess.PIPE, text=True, check=False,
    )  # fmt: skip
    if done.returncode:
        raise RuntimeError(f"Muon ended with exit code {done.returncode}")
    return muon_report(json.loads(done.stdout.splitlines()[-1]), {shards: largest_share(shards) for shards in SHARDS})


def muon_report(ratios: Mapping[str, float], shares: Mapping[int, float]) -> Report:
    """``ratios``: of an optimizer's step to forward and backward. ``shares``: of the work, by shards, see below."""
    body = (
        f"The default model, {EXAMPLES} examples of {LENGTH} bytes, what one of four workers has in a step of the "
        f"default run, in fp32 on one core. {ROUNDS} rounds of forward and backward, a step of Muon (with AdamW for "
        "what is no matrix) and a step of AdamW for everything; the medians of the ratios within a round.\n\n"
        + table(["optimizer", "step, beside forward and backward"], [[name, f"{r:.1%}"] for name, r in ratios.items()])
        + "\n\nIn a replica of several shards each matrix is orthogonalized by one of them. The largest share of "
        "Newton-Schulz's operations that one shard has:\n\n"
        + table(["shards", "largest share"], [[str(shards), f"{share:.1%}"] for shards, share in shares.items()])
    )
    checks = (
        at_most("Muon's step, beside forward and backward", 100 * ratios["Muon"], 40, " %"),
        at_most("the work of one of two shards", 100 * shares[2], 60, " %"),
    )
    figures = {"step": dict(ratios), "share": {str(shards): share for shards, share in shares.items()}}
    return Report("The cost of Muon", body, ("python -m benchmarks muon",), checks, figures)


def largest_share(shards: int) -> float:
    """Of the shard that has most to do, on the default model."""
    from dtrain.comm.inner_optimizers.muon import muon
    from dtrain.comm.inner_optimizers.newton_schulz import flops
    from dtrain.comm.inner_optimizers.owners import balanced

    group = muon(_model()).param_groups[0]
    costs = {str(number): flops(p.shape[0], p.shape[1], steps=5) for number, p in enumerate(group["params"])}
    owners = balanced(costs, shards)
    loads = [sum(costs[name] for name in costs if owners[name] == shard) for shard in range(shards)]
    return max(loads) / sum(costs.values())


def _model() -> Transformer:
    from dtrain.train.models.transformer import Transformer

    return Transformer(vocab_size=256, dim=128, layers=4, heads=4, max_length=LENGTH)


def measure() -> dict[str, float]:
    """In this process."""
    import torch

    from dtrain.comm.inner_optimizers.muon import muon

    torch.set_num_threads(1)
    torch.manual_seed(1)
    model = _model()
    tokens = torch.randint(0, 256, (EXAMPLES, LENGTH))
    optimizers = {
        "Muon": muon(model, lr=1e-6),
        "AdamW": torch.optim.AdamW(model.parameters(), lr=1e-6),
    }

    def forward_backward() -> None:
        model.zero_grad()
        model({"input": tokens, "target": tokens}).backward()

    def seconds(function: Callable[[], object]) -> float:
        begun = time.perf_counter()
        function()
        return time.perf_counter() - begun

    rounds: dict[str, list[float]] = {name: [] for name in optimizers}
    for number in range(ROUNDS + 3):
        before = seconds(forward_backward)
        for name, optimizer in optimizers.items():
            ratio = seconds(optimizer.step) / before
            if number >= 3:  # the first ones make the state
                rounds[name].append(ratio)
    return {name: statistics.median(ratios) for name, ratios in rounds.items()}


if __name__ == "__main__":
    print(json.dumps(measure()))
