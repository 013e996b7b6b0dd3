"""What a model is made of and what one pass through it costs, without a byte of its parameters.

The model is built under ``FakeTensorMode``: shapes and dtypes are real, memory is not. One forward and one backward
pass are run on one rank, without any engine, and written down as a trace: which module was entered and left, which
gradient was ready when, and how many bytes of activations and temporaries were alive in between. `memory` replays the
trace under each engine; the clock takes its FLOPs and the order of its gradients.

FLOPs: those of matrix products, convolutions and attention, as ``torch.utils.flop_counter`` counts them, two for each
multiply and add; attention counts whole, also where it is causal.
"""

from __future__ import annotations

import contextlib
import gc
from collections import defaultdict
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Literal, TypeAlias, cast

import torch
from torch import Tensor, nn
from torch.utils.flop_counter import flop_registry, sdpa_backward_flop_count, sdpa_flop_count

from dtrain.comm.blocks import blocks_of
from dtrain.comm.torch_private import (
    attention_on_cpu,
    fake_tensors,
    is_persistent,
    packet_of,
    tree_leaves,
    tree_map_only,
)
from dtrain.errors import ModelError
from dtrain.plan.storages import Storages
from dtrain.train.engines.contract import loss_of
from dtrain.train.engines.engine import checkpoint_activations

__all__ = ["Casts", "Description", "Event", "Layer", "Parameter", "TensorSpec", "describe"]

Casts: TypeAlias = Literal["none", "autocast", "model"]
"""How bf16 is reached: not at all, op by op as engine ddp does, or with the whole model in bf16 as fsdp and zero do."""

Kind: TypeAlias = Literal["enter", "leave", "enter backward", "leave backward", "gradient", "work"]


@dataclass(frozen=True)
class TensorSpec:
    """Shape and dtype of an input, ``microbatch`` examples of it."""

    shape: tuple[int, ...]
    dtype: torch.dtype


@dataclass(frozen=True)
class Parameter:
    """``trained``: whether it has a gradient. ``unit``: the block that it belongs to, "" for none."""

    fqn: str
    shape: tuple[int, ...]
    dtype: torch.dtype
    trained: bool
    unit: str

    @property
    def numel(self) -> int:
        """Its elements."""
        return torch.Size(self.shape).numel()

    @property
    def bytes(self) -> int:
        """In its own dtype."""
        return self.numel * self.dtype.itemsize


@dataclass(frozen=True)
class Event:
    """One entry of the trace.

    "enter", "leave": a module's forward pass, also the one that recomputes activations. "enter backward": the gradient
    of its output is there; "leave backward": that of its inputs is. "gradient": that of a parameter, by FQN, which is
    ``bytes`` large, and ``peak`` of these were among the temporaries. "work": in between, activations and temporaries
    took ``peak`` bytes at most and ``bytes`` in the end; gradients of parameters that are ready, parameters and inputs
    are not among them.
    """

    kind: Kind
    name: str = ""
    bytes: int = 0
    peak: int = 0


@dataclass(frozen=True)
class Layer:
    """One unit, a block or "" for what is outside of all blocks, in the order of the forward pass.

    ``activation_bytes``: what its forward pass leaves behind for the backward pass. ``backward_flops`` include what is
    recomputed.
    """

    name: str
    parameters: tuple[Parameter, ...]
    forward_flops: int
    backward_flops: int
    activation_bytes: int


@dataclass(frozen=True)
class Description:
    """One model on one rank, for one size of microbatch.

    ``parameters``: in the order of ``model.named_parameters()``. ``gradients``: FQNs in the order in which backward has
    them ready. ``buffer_bytes``: of the model's buffers; ``input_bytes``: of a microbatch.
    """

    layers: tuple[Layer, ...]
    parameters: tuple[Parameter, ...]
    gradients: tuple[str, ...]
    trace: tuple[Event, ...] = field(repr=False)
    modules: Mapping[str, tuple[str, ...]] = field(repr=False)
    """Module -> FQNs of the parameters that are its own, not those of modules in it; parameters under one name only."""
    casts: Casts
    checkpointed: bool
    microbatch: int
    tokens: int
    buffer_bytes: int
    input_bytes: int

    @property
    def numel(self) -> int:
        """Elements of all parameters."""
        return sum(parameter.numel for parameter in self.parameters)

    @property
    def trained_numel(self) -> int:
        """Elements of those that are trained."""
        return sum(parameter.numel for parameter in self.parameters if parameter.trained)

    @property
    def forward_flops(self) -> int:
        """Of a forward pass through everything."""
        return sum(layer.forward_flops for layer in self.layers)

    @property
    def backward_flops(self) -> int:
        """Of a backward pass, with what it recomputes."""
        return sum(layer.backward_flops for layer in self.layers)

    @property
    def activation_bytes(self) -> int:
        """What a forward pass leaves behind."""
        return sum(layer.activation_bytes for layer in self.layers)


def describe(
    build: Callable[[], nn.Module],
    batch: Mapping[str, TensorSpec],
    *,
    casts: Casts = "none",
    checkpointed: bool = False,
    reentrant: bool = False,
    tokens: int = 0,
) -> Description:
    """Describe the model that ``build`` makes, by one pass over a batch of these shapes.

    Args:
        build: makes the model, on torch's default device; called under ``FakeTensorMode``.
        batch: its inputs by name, the microbatch in front.
        casts: see `Casts`.
        checkpointed: recompute each block's activations in backward.
        reentrant: in the form that zero3 needs.
        tokens: of a microbatch, for rates.

    Raises:
        ModelError: the model needs values of its inputs, which a description has not, or has no scalar loss.
    """
    with fake_tensors(allow_non_fake_inputs=True), torch.device("cpu"):
        model = _built(build)
        if casts == "model":
            _cast(model)
        if checkpointed:
            checkpoint_activations(model, reentrant=reentrant)
        inputs = {name: _input(spec) for name, spec in batch.items()}
        units = {id(block): name for name, block in _named_blocks(model).items()}
        trace = _Trace(model, units)
        try:
            trace.run(inputs, torch.autocast("cpu", torch.bfloat16, enabled=casts == "autocast"))
        except Exception as error:
            if isinstance(error, ModelError):
                raise
            raise ModelError(
                f"{type(model).__name__} could not be run without values, on shapes alone: {type(error).__name__}: "
                f"{_line(error)}; a forward pass that branches on values (.item(), bool(tensor)) cannot be planned"
            ) from error
        first = next(iter(batch.values()), None)
        return Description(
            layers=trace.layers(),
            parameters=tuple(trace.parameters.values()),
            gradients=tuple(event.name for event in trace.events if event.kind == "gradient"),
            trace=tuple(trace.events),
            modules=trace.owned,
            casts=casts,
            checkpointed=checkpointed,
            microbatch=first.shape[0] if first is not None and first.shape else 1,
            tokens=tokens,
            buffer_bytes=_bytes(model.buffers()),
            input_bytes=_bytes(inputs.values()),
        )


def _built(build: Callable[[], nn.Module]) -> nn.Module:
    try:
        return build()
    except Exception as error:
        if type(error).__name__ not in ("DataDependentOutputException", "DynamicOutputShapeException"):
            raise
        raise ModelError(
            f"the model's constructor needs the values of its parameters ({_line(error)}), and a plan has none; keep "
            ".item() and the like out of it"
        ) from error


def _line(error: Exception) -> str:
    return str(error).strip().split("\n", 1)[0][:300]


def _cast(model: nn.Module) -> None:
    """As ``model.bfloat16()``, which swaps tensors and cannot under FakeTensorMode."""
    made: dict[int, nn.Parameter] = {}  # tied parameters stay tied
    for parameter in model.parameters():
        if parameter.is_floating_point():
            half = parameter.detach().bfloat16()
            made[id(parameter)] = nn.Parameter(half, requires_grad=parameter.requires_grad)
    for module in model.modules():
        for name, own in list(module._parameters.items()):
            if own is not None:
                module._parameters[name] = made.get(id(own), own)
        for name, buffer in list(module._buffers.items()):
            if buffer is not None and buffer.is_floating_point() and is_persistent(module, name):
                module._buffers[name] = buffer.bfloat16()


def _input(spec: TensorSpec) -> Tensor:
    return torch.zeros(spec.shape, dtype=spec.dtype)


def _named_blocks(model: nn.Module) -> dict[str, nn.Module]:
    names = {id(module): name for name, module in model.named_modules()}
    return {names[id(block)]: block for block in blocks_of(model)}


def _bytes(tensors: Any) -> int:
    return sum(tensor.numel() * tensor.element_size() for tensor in tensors)


class _Trace:
    """Hooks on every module, and what they and the counter of storages have seen."""

    def __init__(self, model: nn.Module, units: Mapping[int, str]) -> None:
        self.model, self.events = model, list[Event]()
        self.storages = Storages(self._count_flops)
        self.flops: dict[tuple[str, bool], int] = defaultdict(int)
        self.left: dict[str, int] = defaultdict(int)
        self._backward = False
        self._inside, self._entered_at = [""], [0]
        self._names = {id(module): name for name, module in model.named_modules()}
        self._unit_of = _units(model, units)
        self.owned = _owned(model)
        self.parameters = _described(model, self._unit_of)
        self._order: list[str] = []

    def run(self, batch: Mapping[str, Tensor], context: contextlib.AbstractContextManager[Any]) -> None:
        """One forward and one backward pass."""
        self.storages.ignore([*self.model.parameters(), *self.model.buffers(), *batch.values()])
        with self._hooked(), self.storages:
            with context:
                loss = loss_of(self.model, batch)
            self._note("leave", "")
            self._backward, self._inside = True, [""]
            self._note("enter backward", "")
            loss.backward()
            del loss
            gc.collect()
            self._note("leave backward", "")

    def layers(self) -> tuple[Layer, ...]:
        """By unit, in the order in which forward entered them; those that it never entered last."""
        by_unit: dict[str, list[Parameter]] = {name: [] for name in self._order}
        for parameter in self.parameters.values():
            by_unit.setdefault(parameter.unit, []).append(parameter)
        return tuple(
            Layer(name, tuple(own), self.flops[name, False], self.flops[name, True], self.left[name])
            for name, own in by_unit.items()
        )

    # ---- what hooks note -------------------------------------------------------------------------------------------

    @contextlib.contextmanager
    def _hooked(self) -> Iterator[None]:
        handles: list[Any] = []
        for module in self.model.modules():
            handles.append(module.register_forward_pre_hook(self._enter, with_kwargs=True, prepend=True))
            handles.append(module.register_forward_hook(self._leave, with_kwargs=True))
        for fqn, parameter in self.model.named_parameters():
            if parameter.requires_grad:
                handles.append(parameter.register_post_accumulate_grad_hook(self._gradient(fqn)))
        try:
            yield
        finally:
            for handle in handles:
                handle.remove()

    def _note(self, kind: Kind, name: str) -> None:
        self._worked()
        self.events.append(Event(kind, name))

    def _worked(self) -> None:
        self.events.append(Event("work", bytes=self.storages.live, peak=self.storages.peak))
        self.storages.begin()

    def _enter(self, module: nn.Module, args: Any, kwargs: Any) -> tuple[Any, Any] | None:
        name = self._names[id(module)]
        if name == "" and self._backward:
            return None
        self._note("enter", name)
        if name in self._unit_of.values() and name not in self._order:
            self._order.append(name)
        self._inside.append(self._unit_of[id(module)])
        self._entered_at.append(self.storages.live)
        if not torch.is_grad_enabled() or not any(tensor.requires_grad for tensor in _tensors((args, kwargs))):
            return None
        left = _Once(lambda: self._backward_note("leave backward", name))
        mark = cast(Callable[[Tensor, _Once], Tensor], _Mark.apply)
        changed: tuple[Any, Any] = _mapped((args, kwargs), lambda tensor: mark(tensor, left))
        return changed

    def _leave(self, module: nn.Module, args: Any, kwargs: Any, output: Any) -> None:
        name = self._names[id(module)]
        unit, before = self._inside.pop(), self._entered_at.pop()
        if self._inside[-1] != unit and not self._backward:
            grown = self.storages.live - before
            self.left[unit] += grown
            self.left[self._inside[-1]] -= grown
        if name == "" and not self._backward:
            self.left[""] += self.storages.live
        if name != "":
            self._note("leave", name)
        entered = _Once(lambda: self._backward_note("enter backward", name))
        for tensor in _tensors(output):
            if tensor.requires_grad and name != "":
                tensor.register_hook(lambda grad: entered())

    def _backward_note(self, kind: Kind, name: str) -> None:
        if kind == "enter backward":
            self._inside.append(self._unit_of[id(self.model.get_submodule(name))])
        elif len(self._inside) > 1:
            self._inside.pop()
        self._note(kind, name)

    def _gradient(self, fqn: str) -> Callable[[Tensor], None]:
        def ready(parameter: Tensor) -> None:
            assert parameter.grad is not None
            self._worked()
            freed = self.storages.ignore([parameter.grad])
            self.events.append(Event("gradient", fqn, _bytes([parameter.grad]), freed))
            self.storages.begin()

        return ready

    def _count_flops(self, op: Any, args: Sequence[Any], kwargs: Mapping[str, Any], result: Any) -> None:
        count = _FLOPS.get(packet_of(op))
        if count is not None:
            self.flops[self._inside[-1], self._backward] += count(*args, **kwargs, out_val=result)


def _attention(query: Tensor, key: Tensor, value: Tensor, *_: Any, **__: Any) -> int:
    flops: int = sdpa_flop_count(query.shape, key.shape, value.shape)
    return flops


def _attention_backward(grad: Tensor, query: Tensor, key: Tensor, value: Tensor, *_: Any, **__: Any) -> int:
    flops: int = sdpa_backward_flop_count(grad.shape, query.shape, key.shape, value.shape)
    return flops


_FLOPS: dict[Any, Callable[..., int]] = {
    **flop_registry,  # which lacks the processor's kernel of attention
    **dict(zip(attention_on_cpu(), (_attention, _attention_backward), strict=True)),
}


class _Once:
    """Calls ``action`` at its first call only."""

    def __init__(self, action: Callable[[], None]) -> None:
        self._action: Callable[[], None] | None = action

    def __call__(self) -> None:
        action, self._action = self._action, None
        if action is not None:
            action()


class _Mark(torch.autograd.Function):
    """The identity; its backward calls ``reached``, where FSDP2 ends a unit's backward pass."""

    @staticmethod
    def forward(context: Any, tensor: Tensor, reached: Callable[[], None]) -> Tensor:
        context.reached = reached
        return tensor.view_as(tensor)

    @staticmethod
    def backward(context: Any, *gradients: Any) -> Any:
        context.reached()
        return gradients[0], None


def _tensors(value: Any) -> list[Tensor]:
    return [leaf for leaf in tree_leaves(value) if isinstance(leaf, Tensor)]


def _mapped(value: Any, change: Callable[[Tensor], Tensor]) -> Any:
    return tree_map_only(Tensor, lambda tensor: change(tensor) if tensor.requires_grad else tensor, value)


def _units(model: nn.Module, blocks: Mapping[int, str]) -> dict[int, str]:
    """Id of each module -> the unit that it is in."""
    units: dict[int, str] = {}

    def walk(module: nn.Module, unit: str) -> None:
        unit = blocks.get(id(module), unit)
        units.setdefault(id(module), unit)
        for child in module.children():
            walk(child, unit)

    walk(model, "")
    return units


def _owned(model: nn.Module) -> dict[str, tuple[str, ...]]:
    names = {id(parameter): fqn for fqn, parameter in model.named_parameters()}
    owned = {}
    for name, module in model.named_modules():
        own = [names[id(parameter)] for parameter in module.parameters(recurse=False) if id(parameter) in names]
        if own:
            owned[name] = tuple(dict.fromkeys(own))
    return owned


def _described(model: nn.Module, unit_of: Mapping[int, str]) -> dict[str, Parameter]:
    unit: dict[int, str] = {}
    for module in model.modules():
        for parameter in module.parameters(recurse=False):
            unit.setdefault(id(parameter), unit_of[id(module)])
    return {
        fqn: Parameter(fqn, tuple(p.shape), p.dtype, p.requires_grad, unit[id(p)])
        for fqn, p in model.named_parameters()
    }
