"""From a configuration of `dtrain train` to what a plan is made of: the model described, its optimizer and its sync."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cache
from typing import Any, cast

import torch
from torch import Tensor, nn

from dtrain.comm.clock.step import Step
from dtrain.comm.runtime.method import Sync
from dtrain.comm.torch_private import fake_tensors
from dtrain.errors import ConfigError
from dtrain.plan.describe import Casts, Description, TensorSpec, describe
from dtrain.plan.fits import Fit, Layout, fit
from dtrain.plan.machine import Machine, in_order
from dtrain.plan.memory import OptimizerMemory, optimizer_memory, stepped
from dtrain.plan.sync_memory import SyncMemory, sync_memory
from dtrain.train.config import Config, instantiate
from dtrain.train.config.model_factory import build_model
from dtrain.train.config.optimizer_factory import inner_optimizer, takes_model
from dtrain.train.data.batches import fetch


@dataclass(frozen=True)
class Planned:
    """A configuration, its data's attributes and the shapes of one microbatch. ``on_gpu``: where it will run."""

    config: Config
    data: object
    batch: Mapping[str, TensorSpec]
    tokens_per_example: int
    on_gpu: bool = False

    @classmethod
    def of(cls, config: Config, *, on_gpu: bool = False) -> Planned:
        """Reads one example of the data. Raises ``ConfigError`` for a batch that does not divide among the ranks, and
        what data sets raise.
        """
        data: Any = instantiate(config.data, "data", split="train")
        size = microbatch_size(config)
        example = fetch(data, [0])
        batch = {name: TensorSpec((size, *value.shape[1:]), value.dtype) for name, value in example.items()}
        return cls(config, data, batch, int(data.tokens_per_example), on_gpu)

    @property
    def microbatch(self) -> int:
        """Examples of one forward pass on one rank."""
        return microbatch_size(self.config)

    @property
    def microbatches(self) -> int:
        """Of one step on one rank."""
        return share(self.config) // self.microbatch

    def build(self) -> nn.Module:
        """The model, drawn at random; weights of a folder are not read."""
        settings = dict(self.config.model)
        if "weights" in settings:
            settings["weights"] = False
        return build_model(settings, self.data)

    def describe(self, casts: Casts, checkpointed: bool, reentrant: bool) -> Description:
        """The model, see `dtrain.plan.describe`."""
        return describe(
            self.build, self.batch, casts=casts, checkpointed=checkpointed, reentrant=reentrant,
            tokens=self.microbatch * self.tokens_per_example,
        )  # fmt: skip

    def optimizer(self, shapes: Sequence[tuple[int, ...]]) -> OptimizerMemory:
        """Of ``optim.inner`` over parameters of these shapes.

        One that is made from the model is run over the whole model, and its cost divided in proportion to elements.
        """
        settings = self.config.optim.inner
        if not takes_model(settings):
            factory = cast(Any, lambda parameters: instantiate(settings, "optim.inner", params=parameters))
            return optimizer_memory(factory, shapes, together=self.on_gpu)
        numel, whole = sum(torch.Size(shape).numel() for shape in shapes), self._whole_optimizer()
        part = numel / max(1, whole[1])
        return OptimizerMemory(int(whole[0].state * part), int(whole[0].temporaries * part))

    def _whole_optimizer(self) -> tuple[OptimizerMemory, int]:
        with fake_tensors(allow_non_fake_inputs=True), torch.device("cpu"):
            model = self.build()
            parameters: list[Tensor] = [p for p in model.parameters() if p.requires_grad]
            optimizer = inner_optimizer(self.config.optim.inner, model)
            return stepped(optimizer, parameters, together=self.on_gpu), sum(p.numel() for p in parameters)

    def sync(self) -> Sync:
        """That of the configuration."""
        return cast(Sync, instantiate(self.config.sync, "sync"))

    def layout(self) -> Layout:
        """That of the configuration."""
        engine = self.config.engine
        return Layout(
            engine=engine.name, replicas=self.config.mesh.replicate, shards=self.config.mesh.shard,
            checkpointed=engine.activation_checkpointing, bf16=engine.precision == "bf16",
            microbatches=self.microbatches, bucket_mib=engine.bucket_mib,
        )  # fmt: skip

    def sync_memory(self, sync: Sync, layout: Layout, model: Description) -> SyncMemory:
        """What ``sync`` keeps in ``layout``."""
        return sync_memory(
            sync, untimed(model), engine=layout.runs, replicas=layout.replicas, shards=layout.shards,
            bucket_mib=layout.bucket_mib,
        )  # fmt: skip

    def fit(self, machine: Machine) -> Fit:
        """The configuration itself on ``machine``."""
        layout = self.layout()
        model = self.describe(layout.casts, layout.checkpointed, layout.checkpointed and layout.engine == "zero3")
        return fit(layout, model, machine, cache_of(self), self.sync_memory(self.sync(), layout, model))

    def with_(self, **changes: Any) -> Planned:
        """With other settings of ``config``."""
        return replace(self, config=replace(self.config, **changes))


def cache_of(planned: Planned) -> Any:
    """`Planned.optimizer`, asked once for each list of shapes."""
    known = cache(lambda shapes: planned.optimizer(list(shapes)))
    return lambda shapes: known(tuple(shapes))


def untimed(model: Description) -> Step:
    """``model``'s parameters by layer, for the clock, in no time."""
    from dtrain.comm.clock.step import Layer, Parameter

    return Step(
        tuple(
            Layer(tuple(Parameter(p.fqn, p.shape) for p in part.parameters if p.trained), 0.0, 0.0)
            for part in in_order(model)
        )
    )


def share(config: Config) -> int:
    """Examples of a step on one rank. Raises ``ConfigError`` where they do not divide."""
    world = config.mesh.replicate * config.mesh.shard
    if config.train.batch_size % world:
        nearest = -(-config.train.batch_size // world) * world
        raise ConfigError(
            f"train.batch_size={config.train.batch_size} does not divide among {world} ranks (mesh.replicate="
            f"{config.mesh.replicate} x mesh.shard={config.mesh.shard}); train.batch_size={nearest} does"
        )
    return config.train.batch_size // world


def microbatch_size(config: Config) -> int:
    """Examples of one forward pass on one rank. Raises ``ConfigError`` where a step is not a multiple of them."""
    size, own = config.train.microbatch_size or share(config), share(config)
    if own % size:
        raise ConfigError(f"train.microbatch_size={size} does not divide a rank's {own} examples of a step")
    return size
