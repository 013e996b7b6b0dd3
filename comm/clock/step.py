"""A training step, described: seconds of each layer, and the parameters that it holds."""

from __future__ import annotations

import math
import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass

import torch


@dataclass(frozen=True)
class Parameter:
    """A trained parameter, unsharded."""

    fqn: str
    shape: tuple[int, ...]
    dtype: torch.dtype = torch.float32

    @property
    def numel(self) -> int:
        return math.prod(self.shape)

    @property
    def block(self) -> tuple[str, int] | None:
        """The repeated block that it is in, by the first number in its name; None outside of all."""
        numbered = re.match(r"(?:(.*?)\.)?(\d+)\.", self.fqn)
        return (numbered[1] or "", int(numbered[2])) if numbered else None


@dataclass(frozen=True)
class Layer:
    """A part of the model whose backward pass gives its gradients at one moment. ``forward``, ``backward``: seconds."""

    parameters: tuple[Parameter, ...]
    forward: float
    backward: float


@dataclass(frozen=True)
class Step:
    """A step of one rank. ``layers``: in forward order. ``optimizer``: seconds of its step.

    >>> step = Step.even({"layers.0.w": (8, 8), "layers.1.w": (8, 8)}, seconds=0.3)
    >>> len(step.layers), round(step.seconds, 3)
    (2, 0.3)

    Raises ``ValueError`` for no parameter, a parameter twice, and seconds that are negative or not finite.
    """

    layers: tuple[Layer, ...]
    optimizer: float = 0.0

    def __post_init__(self) -> None:
        fqns = [parameter.fqn for parameter in self.parameters]
        if not fqns:
            raise ValueError("a step without parameters exchanges nothing; give the model's trained parameters")
        if twice := [fqn for fqn in dict.fromkeys(fqns) if fqns.count(fqn) > 1][:1] if len({*fqns}) < len(fqns) else []:
            raise ValueError(f"{twice[0]} is in two layers; a parameter that is used twice belongs to its first use")
        for seconds in (self.optimizer, *(s for layer in self.layers for s in (layer.forward, layer.backward))):
            if not 0 <= seconds < math.inf:
                raise ValueError(f"a part of a step takes {seconds!r} s; give 0 or more seconds")

    @staticmethod
    def even(
        shapes: Mapping[str, tuple[int, ...]], seconds: float, *, backward: float = 2 / 3, optimizer: float = 0.0
    ) -> Step:
        """A layer for each block of the parameters, and one for each run of others between; all take equally long.

        ``backward``: the share of the backward pass in ``seconds``, which do not contain the ``optimizer``'s.
        """
        layers: list[list[Parameter]] = []
        for fqn, shape in shapes.items():
            parameter = Parameter(fqn, tuple(shape))
            if layers and layers[-1][0].block == parameter.block:
                layers[-1].append(parameter)
            else:
                layers.append([parameter])
        each = seconds / max(1, len(layers))
        return Step(
            tuple(Layer(tuple(members), each * (1 - backward), each * backward) for members in layers), optimizer
        )

    @property
    def parameters(self) -> Iterator[Parameter]:
        """In forward order."""
        return (parameter for layer in self.layers for parameter in layer.parameters)

    @property
    def seconds(self) -> float:
        """Without communication."""
        return sum(layer.forward + layer.backward for layer in self.layers) + self.optimizer


def layer_of(layers: Sequence[Layer]) -> dict[str, int]:
    """The layer of each parameter, by its place in the forward pass."""
    return {parameter.fqn: place for place, layer in enumerate(layers) for parameter in layer.parameters}
