"""The machine of one rank: its memory, its peak by precision, and the part of it that training reaches.

Described by the name of a GPU, by words, or measured here. Published figures are those of the vendors' data sheets,
dense (without sparsity): NVIDIA V100 (2020), T4 (2019), A10 (2021), A100 (2021), L4 (2023), L40S (2023), RTX 3090 and
4090 (the Ampere GA102 and Ada architecture papers), H100 and H200 SXM (2024), B200 (2025); AMD MI250X (2021, one of its
two dies) and MI300X (2023).
"""

from __future__ import annotations

import math
import re
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace

import torch

from dtrain.comm.clock.step import Layer, Parameter, Step
from dtrain.errors import ConfigError
from dtrain.nearest import closest, hint
from dtrain.plan.describe import Description
from dtrain.plan.describe import Layer as Part

GB, TERA = 10**9, 10**12
EFFICIENCY = 0.4
"""Of a published peak: what well-tuned training of dense transformers reaches (arXiv:2312.12705: 0.32 to 0.38)."""
RESERVED = 0.08
"""Of the memory: fragmentation."""
CONTEXT_BYTES = int(1.5 * GB)
"""What a GPU's context and NCCL take."""
BYTES_PER_STEP = 28
"""What an AdamW step moves for each element: parameter, gradient and two moments read, three of them written."""


@dataclass(frozen=True)
class Machine:
    """``peak``: FLOP/s by precision, "fp32" or "bf16". ``bandwidth``: bytes/s of its memory. ``efficiency``: the part
    of the peak that a step reaches. ``context_bytes``: taken before training begins. ``source``: where that is from.

    Raises ``ConfigError`` for values that cannot be.
    """

    name: str
    memory_bytes: int
    peak: Mapping[str, float]
    bandwidth: float
    efficiency: float = EFFICIENCY
    context_bytes: int = 0
    source: str = ""

    def __post_init__(self) -> None:
        for what, value in (("memory", self.memory_bytes), ("bandwidth", self.bandwidth), *self.peak.items()):
            if not 0 < value < math.inf:
                raise ConfigError(f"machine {self.name}: {what} is {value:g}; give more than 0")
        if not 0 < self.efficiency <= 1:
            raise ConfigError(f"efficiency={self.efficiency:g}: a step reaches more than 0 and at most 1 of the peak")
        if self.usable_bytes <= 0:
            raise ConfigError(
                f"machine {self.name}: of {self.memory_bytes / GB:.2f} GB nothing is left after {RESERVED:.0%} for "
                f"fragmentation and {self.context_bytes / GB:.2f} GB for the GPU's context"
            )

    @property
    def is_gpu(self) -> bool:
        """Whether it has a context of its own, as GPUs do."""
        return self.context_bytes > 0

    @property
    def usable_bytes(self) -> int:
        """What a plan may fill."""
        return int(self.memory_bytes * (1 - RESERVED)) - self.context_bytes

    def rate(self, precision: str) -> float:
        """FLOP/s that a step reaches. Raises ``ConfigError`` for a precision that the machine has no figure for."""
        if precision not in self.peak:
            raise ConfigError(
                f"machine {self.name} has no peak for {precision}, only for {', '.join(self.peak)}; give one: "
                f"peak=100tflops"
            )
        return self.peak[precision] * self.efficiency

    def step(self, model: Description, precision: str, *, microbatches: int = 1, stepped: int = 0) -> Step:
        """``model``'s step here, for the clock. ``stepped``: elements that the optimizer steps on this rank."""
        rate = self.rate(precision)
        layers = [
            Layer(
                tuple(Parameter(p.fqn, p.shape) for p in part.parameters if p.trained),
                microbatches * part.forward_flops / rate,
                microbatches * part.backward_flops / rate,
            )
            for part in in_order(model)
        ]
        return Step(tuple(layers), BYTES_PER_STEP * stepped / self.bandwidth)


def in_order(model: Description) -> list[Part]:
    """The layers of ``model`` with what is outside of all blocks cut in two: before the first block, and after it."""
    blocks = [layer for layer in model.layers if layer.name]
    root = next((layer for layer in model.layers if not layer.name), None)
    if root is None or not blocks:
        return list(model.layers)
    inside = {parameter.fqn for layer in blocks for parameter in layer.parameters}
    place = {fqn: number for number, fqn in enumerate(model.gradients)}
    first = min((place[fqn] for fqn in inside if fqn in place), default=len(place))
    late = tuple(p for p in root.parameters if place.get(p.fqn, len(place)) < first)
    early = tuple(p for p in root.parameters if p not in late)
    head = replace(root, name="(after the blocks)", parameters=late)
    entry = Part("(before the blocks)", early, 0, 0, 0)
    return [entry, *blocks, head]


def _gpu(name: str, gb: float, fp32: float, bf16: float, bandwidth_gb: float) -> Machine:
    peak = {"fp32": fp32 * TERA, "bf16": bf16 * TERA}
    return Machine(name, int(gb * GB), peak, bandwidth_gb * GB, EFFICIENCY, CONTEXT_BYTES, "data sheet")


GPUS: Mapping[str, Machine] = {
    machine.name: machine
    for machine in (
        _gpu("v100", 32, 15.7, 125, 900), _gpu("t4", 16, 8.1, 65, 320), _gpu("a10", 24, 31.2, 125, 600),
        _gpu("a100-40", 40, 19.5, 312, 1555), _gpu("a100", 80, 19.5, 312, 2039), _gpu("l4", 24, 30.3, 121, 300),
        _gpu("l40s", 48, 91.6, 362, 864), _gpu("rtx3090", 24, 35.6, 71, 936), _gpu("rtx4090", 24, 82.6, 165, 1008),
        _gpu("h100", 80, 67, 989, 3350), _gpu("h200", 141, 67, 989, 4800), _gpu("b200", 180, 80, 2250, 8000),
        _gpu("mi250x", 64, 23.9, 191.5, 1638), _gpu("mi300x", 192, 163.4, 1307, 5300),
    )
}  # fmt: skip
"""Of each its memory in 10^9 bytes, fp32 and bf16 (V100 and T4: fp16) in TFLOP/s, and GB/s. fp32 is without TF32."""


def machine(words: Mapping[str, str]) -> Machine:
    """The machine that ``words`` describe; without any, this one, measured.

    Args:
        words: ``gpu`` (a name of `GPUS`, or "here"), ``memory`` (80GB, 16GiB), ``peak`` (300tflops), ``bandwidth``
            (2TB, per second), ``efficiency`` (0.4, 40%); later ones change what ``gpu`` says.

    >>> machine({"gpu": "h100", "memory": "40GB"}).memory_bytes
    40000000000

    Raises ``ConfigError`` for another key, an unknown name, and what is no quantity.
    """
    if unknown := [name for name in words if name not in ("gpu", "memory", "peak", "bandwidth", "efficiency")]:
        raise ConfigError(f"{unknown[0]}= is no word of a machine; there are gpu, memory, peak, bandwidth, efficiency")
    name = words.get("gpu", "here").lower()
    if name != "here" and name not in GPUS:
        raise ConfigError(
            f"gpu={name} is not known{hint(closest(name, list(GPUS)))} (there are {', '.join(GPUS)}); describe another "
            "one: gpu=h100 memory=96GB peak=800tflops bandwidth=3TB"
        )
    found = measured_here() if name == "here" else GPUS[name]
    if "memory" in words:
        found = replace(found, memory_bytes=int(quantity(words["memory"], BYTES, "memory", "80GB")))
    if "peak" in words:
        peak = quantity(words["peak"], FLOPS, "peak", "300tflops")
        found = replace(found, peak=dict.fromkeys(found.peak, peak), source="as described")
    if "bandwidth" in words:
        found = replace(found, bandwidth=quantity(words["bandwidth"], BYTES, "bandwidth", "2TB"))
    if "efficiency" in words:
        found = replace(found, efficiency=share(words["efficiency"], "efficiency"))
    return found


BYTES = {"kb": 1e3, "mb": 1e6, "gb": 1e9, "tb": 1e12, "kib": 2**10, "mib": 2**20, "gib": 2**30, "tib": 2**40, "b": 1}
FLOPS = {"gflops": 1e9, "tflops": 1e12, "pflops": 1e15}


def quantity(text: str, units: Mapping[str, float], what: str, example: str) -> float:
    """A positive number with a unit. Raises ``ConfigError``."""
    match = re.fullmatch(r"(\d+(?:\.\d+)?)\s*([a-z]+)", text.strip().lower())
    if match is None or match[2] not in units or not float(match[1]) > 0:
        raise ConfigError(f"{what}={text} is no quantity; write {example} (units: {', '.join(units)})")
    return float(match[1]) * units[match[2]]


def share(text: str, what: str) -> float:
    """A fraction, as 0.4 or 40%. Raises ``ConfigError`` for what is no number; its range is the caller's.

    >>> share("2%", "loss_budget")
    0.02
    """
    match = re.fullmatch(r"(\d+(?:\.\d+)?)(%?)", text.strip())
    if match is None:
        raise ConfigError(f"{what}={text} is no fraction; write 0.4 or 40%")
    return float(match[1]) / (100 if match[2] else 1)


def measured_here(seconds: float = 0.3) -> Machine:
    """This machine: the GPU of this process, or the processor. Its peak is what large matrix products reach."""
    cuda = torch.cuda.is_available()
    device = torch.device("cuda", torch.cuda.current_device()) if cuda else torch.device("cpu")
    memory = torch.cuda.get_device_properties(device).total_memory if cuda else _memory_of_host()
    size = 8192 if cuda else 768
    peak = {name: _products(dtype, size, device, seconds) for name, dtype in _DTYPES.items()}
    name = torch.cuda.get_device_name(device) if cuda else f"this machine, {torch.get_num_threads()} threads"
    # A step is not all matrix products; the figure is measured there, so more of it is reached than of a data sheet's.
    return Machine(name, memory, peak, _copies(device), 0.7, CONTEXT_BYTES if cuda else 0, "measured here")


_DTYPES: Mapping[str, torch.dtype] = {"fp32": torch.float32, "bf16": torch.bfloat16}


def _memory_of_host() -> int:
    with open("/proc/meminfo", encoding="ascii") as lines:
        return int(next(line for line in lines if line.startswith("MemTotal")).split()[1]) * 1024


def _products(dtype: torch.dtype, size: int, device: torch.device, seconds: float) -> float:
    one = torch.randn(size, size, device=device).to(dtype)
    return 2 * size**3 * _per_second(lambda: one @ one, device, seconds)


def _copies(device: torch.device) -> float:
    one = torch.zeros(2**26 if device.type == "cuda" else 2**23, device=device)
    other = torch.empty_like(one)
    return 2 * one.nbytes * _per_second(lambda: other.copy_(one), device, 0.1)


def _per_second(run: Callable[[], object], device: torch.device, seconds: float) -> float:
    best, until = math.inf, time.perf_counter() + seconds
    run()
    while True:
        if device.type == "cuda":
            torch.cuda.synchronize()
        started = time.perf_counter()
        run()
        if device.type == "cuda":
            torch.cuda.synchronize()
        ended = time.perf_counter()
        best = min(best, ended - started)
        if ended > until:
            return 1 / best
