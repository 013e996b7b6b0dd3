"""What the laws of comm are tried on: shapes, values, compressors, and short ways to run flows on all ranks."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from hypothesis import strategies as st
from torch import Tensor

from dtrain.comm.aggregators.mean import rank_order_mean
from dtrain.comm.collectives import exchange as collective
from dtrain.comm.collectives.routes import Route
from dtrain.comm.collectives.two_phase import Combined
from dtrain.comm.compressors.cast import cast
from dtrain.comm.compressors.compressor import Compressor
from dtrain.comm.compressors.projection import projection
from dtrain.comm.compressors.quantize import quantize
from dtrain.comm.compressors.sign import sign
from dtrain.comm.compressors.sparse import randk, topk
from dtrain.comm.compressors.ternary import compeft, terngrad
from dtrain.comm.feedback import Compression, NoFeedback
from dtrain.comm.layout import Matrix
from dtrain.comm.ops import Flow, Op, Payload, Place
from dtrain.comm.plans.plan import Plan, kinds_of
from dtrain.comm.seeds import Key
from dtrain.comm.state import State
from dtrain.comm.transports.simulate import simulate

NUMELS = (0, 1, 2, 3, 5, 7, 16, 61, 97, 128, 131)
"""Empty, single, below the world, primes, and on and beside the edges of blocks."""

DTYPES = (
    torch.uint8,
    torch.bool,
    torch.int16,
    torch.int64,
    torch.float16,
    torch.bfloat16,
    torch.float32,
    torch.float64,
)
SHAPES: tuple[tuple[int, ...], ...] = ((), (0,), (1,), (3,), (7,), (2, 3), (5, 1, 3), (4, 0), (1, 1, 1))
VALUES = ("normal", "constant", "zeros", "sparse", "heavy", "two large")

COMPRESSORS: dict[str, Compressor] = {
    "fp32": cast("fp32"),
    "bf16": cast("bf16"),
    "fp16": cast("fp16"),
    "int8": quantize(bits=8),
    "int8 in blocks": quantize(bits=8, block=16),
    "int4": quantize(bits=4, block=16),
    "int3 stochastic": quantize(bits=3, block=7, rounding="stochastic"),
    "int5, prime block": quantize(bits=5, block=13),
    "e4m3": cast("fp8_e4m3", block=64),
    "e5m2": cast("fp8_e5m2", block=7),
    "symmetric": quantize("symmetric", bits=5, block=16),
    "qsgd": quantize("qsgd", bits=4, block=13, rounding="stochastic"),
    "e3m0": quantize("e3m0", block=16),
    "natural": quantize("natural", block=31, rounding="stochastic"),
    "least squares, 1 bit": quantize("least_squares", bits=1, block=16),
    "least squares, 2 bits": quantize("least_squares", bits=2, block=31),
    "least squares, 4 bits": quantize("least_squares", bits=4, block=16),
    "top-k": topk(0.2),
    "top-k, 8-bit values": topk(0.2, values=quantize(bits=8)),
    "random-k": randk(0.3),
    "random-k, unbiased": randk(0.6, scaled=True),
    "sign": sign(block=16),
    "terngrad": terngrad(block=16),
    "compeft": compeft(block=16, density=0.3),
    "compeft, sparse": compeft(block=96, density=0.05),
    "projection": projection(3, block=16),
    "projection, unbiased": projection(5, block=16, scaled=True),
}

worlds = st.integers(1, 5)
seeds = st.integers(0, 2**31)
numels = st.lists(st.sampled_from(NUMELS), min_size=1, max_size=4)
kinds_of_values = st.sampled_from(VALUES)
DETERMINISTIC: tuple[Route, ...] = ("auto", "two_phase", "all_gather", "sparse_all_reduce")
"""Routes on which every rank has the same bits, whatever the transport."""
routes = st.sampled_from(DETERMINISTIC)
compressors = st.sampled_from(sorted(COMPRESSORS)).map(COMPRESSORS.__getitem__)


def draw(seed: int, numel: int, kind: str = "normal") -> Tensor:
    """``numel`` fp32 values of one kind; the same ones for the same arguments."""
    generator = torch.Generator().manual_seed(seed)
    normal = torch.randn(numel, generator=generator)
    match kind:
        case "constant":
            return torch.full((numel,), float(torch.randn((), generator=generator)))
        case "zeros":
            return torch.zeros(numel)
        case "sparse":  # one element that is not zero
            hot = torch.arange(numel) == int(torch.randint(max(numel, 1), (), generator=generator))
            return torch.where(hot, normal, 0.0)
        case "heavy":
            return normal / torch.rand(numel, generator=generator).clamp(min=1e-6)
        case "two large":  # and many small ones between them: half-way between two codes of any grid from -1 to 1
            values = 1e-4 * normal.sign()
            values[:1], values[-1:] = 1.0, -1.0
            return values
        case _:
            return normal


def named(seed: int, sizes: Sequence[int], kind: str = "normal") -> dict[str, Tensor]:
    """One rank's flat pieces by FQN."""
    return {f"layers.{i}.weight": draw(1000 * seed + i, numel, kind) for i, numel in enumerate(sizes)}


def per_rank(seed: int, sizes: Sequence[int], world: int, kind: str = "normal") -> list[dict[str, Tensor]]:
    """Other pieces on each rank."""
    return [named(seed * 31 + rank, sizes, kind) for rank in range(world)]


def plain(compressor: Compressor) -> Compression:
    return Compression(compressor, NoFeedback())


def fresh_states(plan: Plan, world: int) -> list[State]:
    return [State(kinds_of(plan)) for _ in range(world)]


def square(values: dict[str, Tensor]) -> dict[str, Matrix]:
    """Pieces as matrices that are about square, whose first row a shard boundary has cut."""
    columns = {fqn: max(1, int(value.numel() ** 0.5)) for fqn, value in values.items()}
    return {fqn: Matrix(value.numel(), columns[fqn], columns[fqn] // 2) for fqn, value in values.items()}


def exchange(
    values: Sequence[dict[str, Tensor]],
    plan: Plan,
    states: Sequence[State] | None = None,
    *,
    step: int = 0,
    seed: int = 0,
    route: Route = "auto",
) -> list[Combined]:
    """One exchange between all ranks; nothing is committed."""
    world = len(values)
    states = fresh_states(plan, world) if states is None else states
    lies = square(values[0])
    flows = [
        collective.exchange(
            values[r], plan, rank_order_mean, Place(r, world), Key(seed, step, r), states[r], matrices=lies,
            route=route,
        )
        for r in range(world)
    ]  # fmt: skip
    return simulate(flows)


def once(op: Op) -> Flow[Payload]:
    """A flow of one op that returns the reply."""
    return (yield op)


def same(one: Payload, other: Payload) -> bool:
    """Whether two payloads are equal in shapes, dtypes and every bit."""
    return len(one) == len(other) and all(
        a.dtype == b.dtype and a.shape == b.shape and torch.equal(bits(a), bits(b))
        for a, b in zip(one, other, strict=True)
    )


def bits(tensor: Tensor) -> Tensor:
    """The bytes of a tensor, flat: a NaN equals itself, and 0 differs from -0."""
    return tensor.clone(memory_format=torch.contiguous_format).view(-1).view(torch.uint8)
