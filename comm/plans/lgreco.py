"""L-GreCo (Alimohammadi et al., arXiv:2210.17357): bits or ranks by layer, at the error of a uniform choice.

    min over choices c of  sum_l bytes_l(c_l)   such that   sum_l error_l(c_l) <= alpha sum_l error_l(uniform)

The errors are squares, |C(x) - x|^2, summed over all ranks: squares of parts add up to the square of the whole, plain
norms do not. x is the gradient without the residual, which depends on the present choice: a layer with few bits would
look as if it needed many, forever. A dynamic program over ``GRID`` steps of the budget
finds the best choice up to rounding; errors are rounded up, so the true constraint holds. The uniform choice always
meets it. For more than ``MANY`` layers, whose rounding would add up, bisection finds one price of error for all of them
instead, and the rest of the budget is spent where it saves most: within one layer's bytes of the best.

Every rank solves the same problem from the same sums, and the choices are compared by a digest. Residuals stay, and
PowerSGD keeps the columns of its basis that the new rank has.
Communication: in a review two small gathers, over the shards and over the replicas. Keeps: one integer per parameter.
"""

from __future__ import annotations

import hashlib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from dtrain.comm.collectives.routes import value_bytes
from dtrain.comm.collectives.two_phase import two_phase_bytes
from dtrain.comm.compressors.cast import cast
from dtrain.comm.compressors.compressor import AnyCompressor, Compressor, TwoRoundCompressor, adjustable
from dtrain.comm.feedback import Compression, as_compression
from dtrain.comm.layout import Matrix, to_rows
from dtrain.comm.ops import AllGather, Axis, Flow
from dtrain.comm.seeds import Key
from dtrain.comm.shadowed import of_values, on_shadows
from dtrain.comm.state import Kind, Numbers, State

GRID = 10_000  # steps into which the budget is divided
MANY = 256  # layers from which rounding each of them up to a step wastes more than a percent of the budget
SAFE = 0.5  # of |x|^2: under feedback, a choice without a guaranteed contraction must not lose more
UNUSABLE = 1e200
FIRST = 10  # exchanges before the first review


@dataclass(frozen=True)
class LGreCo:
    """See `lgreco`."""

    uniform: int
    options: tuple[Compression, ...]
    every: int
    alpha: float
    hysteresis: float

    @property
    def compressions(self) -> tuple[Compression, ...]:
        return self.options

    def of(self, fqn: str, step: int) -> Compression:
        return self.options[self.uniform]

    def begin(self, fqns: Sequence[str]) -> ChoosingLGreCo:
        return ChoosingLGreCo(self, fqns)


class ChoosingLGreCo:
    """L-GreCo at work on one rank: the present choice, and the costs for the next one."""

    settled = False

    def __init__(self, spec: LGreCo, fqns: Sequence[str]) -> None:
        self.spec, self.fqns = spec, list(fqns)
        self.compressions = spec.options
        self.chosen = dict.fromkeys(self.fqns, spec.uniform)
        self.exchanges = 0
        self.changes = 0
        self.kinds: dict[str, Kind] = {}
        self._costs: dict[str, Tensor] = {}  # fqn -> [2, options] fp64: squared errors, bytes
        self._last: Tensor | None = None
        self._world = 1

    def of(self, fqn: str, step: int) -> Compression:
        return self.spec.options[self.chosen[fqn]]

    def accumulate(self, fqn: str, value: Tensor, state: State) -> None:
        """Nothing: it measures single exchanges."""

    def due(self) -> bool:
        number = self.exchanges + 1
        return number == FIRST or number % self.spec.every == 0

    def measure(self, fqn: str, fresh: Tensor, corrected: Tensor, matrix: Matrix, world: int, key: Key) -> None:
        table = costs(fresh, [option.compressor for option in self.spec.options], matrix, world, key)
        size = _square(corrected)
        for number, option in enumerate(self.spec.options):
            risky = option.feedback.kinds and _promises_nothing(option) and number != self.spec.uniform
            if risky and float(costs(corrected, [option.compressor], matrix, world, key)[0, 0]) > SAFE * size:
                table[0, number] = UNUSABLE
        self._costs[fqn], self._world = table, world

    def review(self, state: State, rate: float) -> Flow[None]:
        due, self.exchanges = self.due(), self.exchanges + 1
        if not due:
            return
        empty = torch.zeros(2, len(self.spec.options), dtype=torch.float64)
        total = torch.stack([self._costs.get(fqn, empty) for fqn in self.fqns])
        self._costs = {}
        axes: tuple[Axis, ...] = ("shard", "replicate")
        for axis in axes:
            (rows,) = yield AllGather((total,), axis=axis)
            total = rows.sum(0)
        if not bool(torch.isfinite(total).all()):
            return  # the step that was measured is skipped, too
        errors, sizes = total[:, 0], total[:, 1]
        now = [self.chosen[fqn] for fqn in self.fqns]
        better = solve(errors, sizes, self.spec.uniform, self.spec.alpha)
        if self._pays(errors, sizes, now, better):
            self.chosen = dict(zip(self.fqns, better, strict=True))
            self.changes += 1
        self._last = total
        yield from self._compare()

    def numbers(self) -> Numbers:
        counters = {"plan.exchanges": self.exchanges, "plan.changes": self.changes}
        return {**counters, **{f"plan.of.{fqn}": index for fqn, index in self.chosen.items()}}

    def load_numbers(self, numbers: Mapping[str, float]) -> None:
        self.exchanges, self.changes = int(numbers["plan.exchanges"]), int(numbers["plan.changes"])
        self.chosen = {fqn: int(numbers[f"plan.of.{fqn}"]) for fqn in self.fqns}

    def table(self) -> str:
        head, lines = f"L-GreCo, change {self.changes}", []
        if self._last is not None:
            errors, sizes = self._last[:, 0], self._last[:, 1] / self._world
            rows, now = torch.arange(len(self.fqns)), [self.chosen[fqn] for fqn in self.fqns]
            uniform, error = self.spec.uniform, float(errors[:, self.spec.uniform].sum())
            head += (
                f": {float(sizes[rows, now].sum()) / 1e3:,.1f} kB per replica and exchange instead of "
                f"{float(sizes[:, uniform].sum()) / 1e3:,.1f} kB of {in_words(self.spec.options[uniform])} everywhere, "
                f"at {float(errors[rows, now].sum()) / error if error else 1:.2f} of its squared error"
            )
        for number, fqn in enumerate(self.fqns):
            line = f"{fqn:40} {in_words(self.spec.options[self.chosen[fqn]])}"
            if self._last is not None:
                error, size = self._last[number, :, self.chosen[fqn]].tolist()
                size /= self._world
                if error == 0 and self.of(fqn, 0).two_rounds is not None:
                    line = f"{fqn:40} fp32  "
                line += f"   {size / 1e3:10.1f} kB   squared error {error:.3g}"
            lines.append(line)
        return "\n".join([head, *lines])

    def _pays(self, errors: Tensor, sizes: Tensor, now: list[int], better: list[int]) -> bool:
        """Whether a change, which costs warm starts, saves over ``hysteresis``, or the old choice breaks the budget."""
        rows = torch.arange(len(now))
        budget = self.spec.alpha * float(errors[:, self.spec.uniform].sum())
        broken = float(errors[rows, now].sum()) > budget * (1 + 1e-9)
        saved = 1 - float(sizes[rows, better].sum()) / max(float(sizes[rows, now].sum()), 1.0)
        return broken or saved > self.spec.hysteresis

    def _compare(self) -> Flow[None]:
        text = repr(sorted(self.chosen.items())).encode()
        digest = torch.tensor(list(hashlib.blake2b(text, digest_size=8).digest()), dtype=torch.uint8)
        for axis in ("shard", "replicate"):
            (digests,) = yield AllGather((digest,), axis=axis)
            if not bool((digests == digest).all()):
                raise RuntimeError(
                    f"ranks disagree about the plan (digests {digests.tolist()} over the {axis} axis); they must run "
                    "the same version of torch on the same kind of machine"
                )


def _promises_nothing(option: Compression) -> bool:
    return option.by_row is not None and option.by_row.delta <= 0


def costs(value: Tensor, compressors: Sequence[AnyCompressor], matrix: Matrix, world: int, key: Key) -> Tensor:
    """Squared error and bytes sent of each choice for ``value`` [n]: [2, choices] fp64, on the CPU."""
    rows = to_rows(value.float(), world)
    tails: Tensor | None = None
    table = []
    for compressor in compressors:
        if isinstance(compressor, TwoRoundCompressor):
            if compressor.pays(matrix):
                tails = _tails(matrix.view(value)) if tails is None else tails
                sides = (matrix.rows, matrix.columns)
                size = sum(two_phase_bytes([compressor.rank * side], cast("fp32"), world) for side in sides)
                table.append((float(tails[compressor.rank]), size))
            else:
                table.append((0.0, two_phase_bytes([value.numel()], cast("fp32"), world)))
        else:
            table.append((_error(rows, compressor, key), value_bytes("auto", value.numel(), compressor, world)))
    return torch.tensor(table, dtype=torch.float64).T.contiguous()


NORMAL = 1 << 12
"""Normal values that stand for a tensor without values."""


def _of_normal_values(rows: Tensor, compressor: Compressor, key: Key) -> float:
    """`_error`, of as many normal values."""
    sample = torch.randn(1, min(rows.shape[1], NORMAL), generator=torch.Generator().manual_seed(0))
    return _error(sample, compressor, key) * rows.numel() / max(1, sample.numel())


@on_shadows(_of_normal_values)
def _error(rows: Tensor, compressor: Compressor, key: Key) -> float:
    """The square of what ``compressor`` loses of ``rows`` [m, width]."""
    decoded = compressor.decode(compressor.encode(rows, key), rows.shape[1], key.shared)
    return float((decoded - rows).double().square().sum())


@on_shadows(lambda value: float(value.numel()))
def _square(value: Tensor) -> float:
    return float(value.double().square().sum())


def _of_noise(matrix: Tensor) -> Tensor:
    """`_tails` of as large a matrix of normal values, whose singular values are at most sqrt(rows) + sqrt(columns)."""
    rows, columns = matrix.shape
    removed = torch.arange(min(rows, columns) + 1, dtype=torch.float64) * (rows**0.5 + columns**0.5) ** 2
    tails: Tensor = (matrix.numel() - removed).clamp_(min=0.0)
    return tails


@on_shadows(_of_noise)
def _tails(matrix: Tensor) -> Tensor:
    """tails[r]: the squared error of the best approximation of rank r, by eigenvalues of the smaller Gram matrix."""
    matrix = matrix.double()
    gram = matrix @ matrix.T if matrix.shape[0] < matrix.shape[1] else matrix.T @ matrix
    if not bool(torch.isfinite(gram).all()):
        return torch.full((gram.shape[0] + 1,), torch.nan, dtype=torch.float64)
    squares = torch.linalg.eigvalsh(gram).clamp_(min=0.0)  # ascending
    return torch.cat([squares.new_zeros(1), squares.cumsum(0)]).flip(0)


@of_values
def solve(errors: Tensor, sizes: Tensor, uniform: int, alpha: float = 1.0, grid: int = GRID) -> list[int]:
    """The cheapest choice for each layer whose errors add up to at most ``alpha`` times those of the uniform choice.

    Args:
        errors: [layers, choices], squares, not negative.
        sizes: [layers, choices].
        uniform: the choice that sets the budget; it is the answer where nothing cheaper can be afforded.
        grid: steps into which the budget is divided; finer costs time in proportion. Not used for many layers.

    >>> solve(torch.tensor([[0.0, 9.0], [0.0, 2.0]]), torch.tensor([[8.0, 1.0], [8.0, 1.0]]), uniform=1, alpha=0.5)
    [0, 1]

    Raises ``ValueError`` if even the least errors are more than the budget: possible only for ``alpha`` below 1.
    """
    layers = errors.shape[0]
    budget = alpha * float(errors[:, uniform].sum())
    if float(errors.amin(1).sum()) > budget * (1 + 1e-9):
        raise ValueError(f"no choice keeps the error within alpha = {alpha:g} of the uniform one's; raise alpha")
    if budget <= 0:
        return [int((sizes[row] + torch.where(errors[row] > 0, torch.inf, 0.0)).argmin()) for row in range(layers)]
    answer = _by_price(errors, sizes, budget) if layers > MANY else _by_steps(errors, sizes, budget, grid)
    if answer is None:
        return [uniform] * layers  # rounding up has made all others too expensive
    cost = float(sizes[torch.arange(layers), answer].sum())
    return answer if cost <= float(sizes[:, uniform].sum()) or alpha < 1 else [uniform] * layers


def _by_steps(errors: Tensor, sizes: Tensor, budget: float, grid: int) -> list[int] | None:
    """A dynamic program over ``grid`` steps of ``budget``; None if errors that are rounded up to steps do not fit."""
    layers = errors.shape[0]
    steps = (errors / (budget / grid)).ceil().clamp_(max=grid + 1).long()
    best = torch.zeros(grid + 1, dtype=torch.float64)  # best[j]: least bytes of the layers so far with j steps of error
    choice_of = torch.empty(layers, grid + 1, dtype=torch.int8 if errors.shape[1] < 128 else torch.int64)
    for row in range(layers):
        ways = torch.full((errors.shape[1], grid + 1), torch.inf, dtype=torch.float64)
        for choice in range(errors.shape[1]):
            width = int(steps[row, choice])
            if width <= grid:
                ways[choice, width:] = best[: grid + 1 - width] + float(sizes[row, choice])
        best, choices = ways.min(0)
        choice_of[row] = choices
    spent = int(best.argmin())
    if not bool(torch.isfinite(best[spent])):
        return None
    answer = []
    for row in reversed(range(layers)):
        answer.append(int(choice_of[row, spent]))
        spent -= int(steps[row, answer[-1]])
    answer.reverse()
    return answer


def _by_price(errors: Tensor, sizes: Tensor, budget: float) -> list[int]:
    """The cheapest choice of each layer at one price of error, the lowest that keeps within ``budget``; then the rest.

    Source: Everett's multipliers (Operations Research 11, 1963).
    """
    rows = torch.arange(errors.shape[0])
    sizes = torch.where(errors > budget, torch.inf, sizes)

    def at(price: float) -> Tensor:
        return (sizes + price * errors.clamp(max=2 * budget)).argmin(1)

    def used(chosen: Tensor) -> float:
        return float(errors[rows, chosen].sum())

    chosen = errors.argmin(1)
    low, high = 0.0, max(float(sizes[sizes.isfinite()].max()), 1e-100) / budget * 1e-6
    while used(at(high)) > budget and high < 1e250:
        low, high = high, high * 8
    for _ in range(100):
        if used(priced := at(high)) <= budget:
            chosen = priced
        middle = (low + high) / 2
        if used(at(middle)) <= budget:
            high = middle
        else:
            low = middle
    return _spent(errors, sizes, chosen, budget).tolist()


def _spent(errors: Tensor, sizes: Tensor, chosen: Tensor, budget: float) -> Tensor:
    """``chosen``, with the rest of ``budget`` spent, one layer after the other, where it saves most bytes."""
    rows, chosen = torch.arange(errors.shape[0]), chosen.clone()
    remaining = budget - float(errors[rows, chosen].sum())
    while True:
        saved = sizes[rows, chosen].unsqueeze(1) - sizes
        extra = errors - errors[rows, chosen].unsqueeze(1)
        worth = torch.where((saved > 0) & (extra <= remaining), saved / extra.clamp(min=1e-300), -torch.inf)
        best, choices = worth.max(1)
        moved = False
        for row in best.argsort(descending=True, stable=True).tolist():
            choice = int(choices[row])
            if not float(best[row]) > 0:
                break
            if float(extra[row, choice]) <= remaining:
                remaining -= float(extra[row, choice])
                chosen[row] = choice
                moved = True
        if not moved:
            return chosen


def lgreco(
    compress: AnyCompressor | Compression, *, every: int = 100, alpha: float = 1.0, hysteresis: float = 0.02
) -> LGreCo:
    """L-GreCo around ``compress``: the error of a uniform choice, spent on the layers where it saves most bytes.

    Args:
        compress: PowerSGD (choices: ranks from half of its own to twice), a quantizer (2 to 8 bits), top-k or random-k
            (densities from a quarter of its own to four times), or one of them under feedback.
        every: exchanges between two reviews; the first comes after 10.
        alpha: the error allowed, in units of the uniform choice's.
        hysteresis: the fraction of the bytes that a change must save.

    >>> from dtrain.compress import error_feedback, powersgd
    >>> from dtrain.plans import lgreco
    >>> [option.compressor.rank for option in lgreco(error_feedback(powersgd(4))).options]
    [2, 3, 4, 5, 6, 7, 8]

    Raises ``TypeError`` for a compressor without a parameter to choose, ``ValueError`` for values outside their range.
    """
    base = as_compression(compress)
    choices = _choices(base.compressor)
    if not isinstance(every, int) or isinstance(every, bool) or every < 1:
        raise ValueError(f"every is {every!r}; give a positive number of exchanges, for example 100")
    if not alpha > 0:
        raise ValueError(f"alpha is {alpha!r}; give the error allowed in units of the uniform choice's, for example 1")
    if not 0 <= hysteresis < 1:
        raise ValueError(f"hysteresis is {hysteresis!r}; give a fraction of the bytes, in [0, 1)")
    options = tuple(replace(base, compressor=choice) for choice in choices)
    return LGreCo(choices.index(base.compressor), options, every, float(alpha), float(hysteresis))


def _choices(base: AnyCompressor) -> list[AnyCompressor]:
    compressor = adjustable(base)
    if compressor is None:
        raise TypeError(f"{base} has nothing to choose by layer; lgreco takes powersgd, quantize, topk and randk")
    return list(compressor.alternatives())


def in_words(compression: Compression) -> str:
    """A compression in a few words.

    >>> from dtrain.compress import powersgd
    >>> in_words(as_compression(powersgd(3)))
    'rank 3'
    """
    compressor = adjustable(compression.compressor)
    return f"{compression.compressor}" if compressor is None else compressor.setting
