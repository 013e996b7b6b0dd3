"""The report on what can be learned where next to nothing is sent. Functions that end in ``_report`` are pure.

A cell is one training of `digits` with one seed. Learning rates are chosen on the second split, four or more for each
method, with a seed that is not reported; then five seeds count on the third.
"""

from __future__ import annotations

import dataclasses
import hashlib
import json
import math
import statistics
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import ProcessPoolExecutor
from functools import partial
from pathlib import Path

import torch

from benchmarks import digits
from benchmarks.digits import PARAMETERS, Zeroth
from benchmarks.harness import Session, say
from benchmarks.page import Check, Report, at_least, at_most, table
from dtrain import fedkseed, ferret, local_sgd
from dtrain.comm.layout import Segment
from dtrain.comm.methods.fedkseed import Sampling
from dtrain.comm.runtime.method import Sync
from dtrain.comm.seeds import Key
from dtrain.comm.shared_seed.directions import Step, Walk, walk_on
from dtrain.comm.shared_seed.philox import Address, SharedRandom
from dtrain.compress import projection
from dtrain.outer import sgd

SEEDS, TUNING = (1, 2, 3, 4, 5), 0
CLIENTS, EVERY = 5, 60
Curve = dict[str, list[float]]
FIRST_ORDER = ("SGD, by gradients", (0.05, 0.2, 0.8, 1.6))

ONE_BYTE: dict[str, tuple[Zeroth, tuple[float, ...]]] = {
    "1 machine": (Zeroth(1, 0), (1e-3, 2e-3, 4e-3, 8e-3)),
    "4 machines": (Zeroth(4, 0), (4e-3, 8e-3, 16e-3, 32e-3)),
    "16 machines": (Zeroth(16, 0), (1e-2, 2e-2, 4e-2, 8e-2)),
    "16 machines, the rate of one": (Zeroth(16, 0), (2e-3,)),
    "1 machine, as many samples as 4": (Zeroth(1, 0, steps=6000), (1e-3, 2e-3, 4e-3, 8e-3)),
    "4 machines, numbers in fp32": (Zeroth(4, 0, code="fp32"), (4e-3, 8e-3, 16e-3, 32e-3)),
    "4 machines, 9 bits as the reference's": (
        Zeroth(4, 0, code="9 bits, as the reference's"),
        (4e-3, 8e-3, 16e-3, 32e-3),
    ),
    "4 machines, one bit": (Zeroth(4, 0, code="one bit"), (1e-3, 2e-3, 4e-3, 8e-3)),
    "4 machines, normal directions": (Zeroth(4, 0, noise="normal"), (4e-3, 8e-3, 16e-3, 32e-3)),
    "4 machines, the rate of normal directions": (Zeroth(4, 0), (32e-3,)),
}
KINDS = ((False, "alike"), (True, "two classes each"))
POOLS = (8, 64, 512, 4096)
SHARES = (0.01, 0.05, 0.2)
ROUNDS_COLUMNS = ["", *(f"data {kind} (lr)" for _, kind in KINDS), "rounds to 0.8", "bytes per round, to each peer"]
FEDAVG, DRAWN_POOLS = "averages (FedAvg)", ("FedKSeed, K = 4096", "FedKSeed, K = 64")


@dataclasses.dataclass(frozen=True)
class Rounds:
    """``method``: "fedavg", "fedkseed", "pro" or "ferret"; ``size``: directions."""

    method: str
    size: int
    lr: float
    outer: float
    skewed: bool = False

    def sync(self) -> Sync:
        if self.method == "fedavg":
            return local_sgd(every_steps=EVERY)
        if self.method == "ferret":
            block = max(1, min(PARAMETERS, PARAMETERS * 200 // self.size))
            return ferret(every_steps=EVERY, directions=self.size, block=block, outer=sgd(lr=self.outer))
        sampling: Sampling = "pro" if self.method == "pro" else "uniform"
        return fedkseed(every_steps=EVERY, directions=self.size, eps=digits.EPS, sampling=sampling)


def one_of(cell: tuple[object, int]) -> Curve:
    """What a cell finds, in a process of its own."""
    torch.set_num_threads(1)
    asked, seed = cell
    if isinstance(asked, Zeroth):
        return digits.zeroth(asked, seed)
    if isinstance(asked, Rounds):
        return digits.rounds(asked.sync(), lr=asked.lr, seed=seed, clients=CLIENTS, skewed=asked.skewed, every=EVERY)
    assert isinstance(asked, float)
    return digits.first_order(asked, seed)


class _Cells:
    """Runs what is asked for, two at a time; what has been run is kept, with the revision that ran it."""

    def __init__(self, session: Session) -> None:
        self._session = session

    def all(self, cells: Sequence[tuple[object, int]]) -> list[Curve]:
        missing = [cell for cell in dict.fromkeys(cells) if not self._session.has(self._path(cell))]
        self._session.kept.mkdir(parents=True, exist_ok=True)
        with ProcessPoolExecutor(2) as pool:
            for cell, curve in zip(missing, pool.map(one_of, missing), strict=True):
                self._path(cell).write_text(json.dumps({"revision": self._session.revision, "curve": curve}))
                say(f"{cell}: {curve['test'][-1]:.3f}")
        return [json.loads(self._path(cell).read_text())["curve"] for cell in cells]

    def _path(self, cell: tuple[object, int]) -> Path:
        return self._session.kept / f"digits-{hashlib.sha256(repr(cell).encode()).hexdigest()[:20]}.json"


@dataclasses.dataclass(frozen=True)
class Tuned:
    """A method at its best rate: curves of five seeds."""

    rate: str
    curves: list[Curve]

    @property
    def ends(self) -> list[float]:
        return [curve["test"][-1] for curve in self.curves]

    @property
    def shown(self) -> str:
        return f"{statistics.mean(self.ends):.3f} ± {statistics.stdev(self.ends):.3f}"

    def mean_curve(self) -> list[float]:
        return [statistics.mean(column) for column in zip(*(curve["test"] for curve in self.curves), strict=True)]


def _tuned(cells: _Cells, of_rate: Callable[[float], object], rates: Sequence[float], shown: str = "{:g}") -> Tuned:
    """The best of ``rates``; while the largest one is, one that is larger by the same factor is tried too."""
    tried = list(rates)
    best = tried[0]
    while len(rates) > 1:
        accuracies = [curve["choose"][-1] for curve in cells.all([(of_rate(rate), TUNING) for rate in tried])]
        best = tried[accuracies.index(max(accuracies))]
        if best != tried[-1]:
            break
        tried.append(best * round(best / tried[-2]))
    return Tuned(shown.format(best), cells.all([(of_rate(best), seed) for seed in SEEDS]))


def shared_seed(session: Session) -> Report:
    """E1 to E3 and E6 to E9 of the plan, on two cores; E4 and E5 need machines: `one_byte`."""
    cells = _Cells(session)
    by_gradients = _tuned(cells, float, FIRST_ORDER[1])
    tried = {name: _tuned(cells, partial(_at_rate, asked), rates) for name, (asked, rates) in ONE_BYTE.items()}
    federated = {}
    for skewed, kind in KINDS:
        averages = Rounds("fedavg", 0, 0.0, 1.0, skewed)
        federated[FEDAVG, kind] = _tuned(cells, partial(_at_rate, averages), (0.05, 0.2, 0.8, 1.6))
    for skewed, kind in KINDS:
        for method, called in (("fedkseed", "FedKSeed"), ("pro", "FedKSeed, pro")):
            for size in POOLS:
                asked = Rounds(method, size, 0.0, 1.0, skewed)
                tuned = _tuned(cells, partial(_at_rate, asked), (2e-3, 4e-3, 8e-3, 16e-3))
                federated[f"{called}, K = {size}", kind] = tuned
    for share in SHARES:
        size = round(share * PARAMETERS)
        outer = partial(_at_outer, Rounds("ferret", size, 0.2, 1.0))
        federated[f"Ferret, K / d = {share:.0%}", "alike"] = _tuned(
            cells, outer, (1.0, 3.0, 10.0, 30.0), "0.2, outer {:g}"
        )
    drifts = {str(kind).removeprefix("torch."): digits.drift(kind, 1000) for kind in (torch.float32, torch.bfloat16)}
    return shared_seed_report(by_gradients, tried, federated, drifts, projections(), replays(), signs_beside_randn())


def _at_rate(asked: Zeroth | Rounds, rate: float) -> Zeroth | Rounds:
    return dataclasses.replace(asked, lr=rate)


def _at_outer(asked: Rounds, rate: float) -> Rounds:
    return dataclasses.replace(asked, outer=rate)


def projections() -> list[dict[str, float]]:
    """Cosine and norm by directions, and the slope of the mean of 2,000 draws."""
    x = torch.randn(PARAMETERS, generator=torch.Generator().manual_seed(1))
    rows = []
    for count in (16, 64, 256, 1024):
        unbiased = projection(count, block=PARAMETERS, scaled=True)
        draws = 2000 if count == 64 else 100
        mean, cosines, norms = torch.zeros_like(x), [], []
        for number in range(draws):
            key = Key(1, number, 0, "x")
            y = unbiased.decode(unbiased.encode(x.view(1, -1), key), PARAMETERS, key.shared)[0]
            cosines.append(float(y @ x / (y.norm() * x.norm())))
            norms.append(float(y.norm() / x.norm()))
            mean += y / draws
        rows.append({
            "directions": count, "draws": draws, "cosine": statistics.mean(cosines), "norm": statistics.mean(norms),
            "slope": float(mean @ x / (x @ x)),
        })  # fmt: skip
    return rows


def replays() -> dict[int, float]:
    """Seconds to walk along so many records of 4 machines, over a million parameters."""
    size, walk, seconds = 1_000_000, Walk(1), {}
    values, segments = {"w": torch.zeros(size)}, {"w": Segment("w", 0, size)}
    for count in (25, 50, 100, 200):
        started = time.perf_counter()
        for number in range(count):
            walk_on(values, segments, walk, Step(number, 0, (0, 1, 2, 3), 1e-3, 0.0, bytes([90, 200, 70, 199])))
        seconds[count] = time.perf_counter() - started
    return seconds


def signs_beside_randn(count: int = 10_000_000) -> float:
    """Processor time of so many signs over that of torch.randn of as many, in turn on one core: the median."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    random, ratios = SharedRandom(7), []
    for step in range(15):
        started = time.process_time()
        random.signs(Address("direction", step), "w", count)
        between = time.process_time()
        torch.randn(count)
        ratios.append((between - started) / (time.process_time() - between))
    torch.set_num_threads(threads)
    return statistics.median(ratios)


def shared_seed_report(
    by_gradients: Tuned,
    tried: Mapping[str, Tuned],
    federated: Mapping[tuple[str, str], Tuned],
    drifts: Mapping[str, Mapping[int, float]],
    projected: Sequence[Mapping[str, float]],
    replayed: Mapping[int, float],
    signs: float,
) -> Report:
    """By method; ``federated``: by method and how the data lie."""
    both = {FIRST_ORDER[0]: by_gradients, **tried}
    places = [str(300 * (n + 1)) for n in range(5)]
    ends = [statistics.mean(tried[name].ends) for name in ("1 machine", "16 machines")]
    checks = [
        *_projection_checks(projected),
        at_least("accuracy of 16 machines over that of 1", ends[1] / ends[0], 1.0),
        at_most("10 million signs over torch.randn of as many, processor time", signs, 1.0),
    ]
    parts = [
        f"Handwritten digits, a network of {PARAMETERS:,} parameters, batches of {digits.BATCH}; accuracy on 397 "
        f"images after the last step, mean and standard deviation of {len(SEEDS)} seeds. The rate of each method is "
        "the best of four or more (larger ones, while the largest was best), chosen on other images with another seed. "
        "All machines in one process: what they would do alike is done once; that real ones are equal to the bit is "
        "shown in [one_byte.md](one_byte.md).",
        "## One byte a machine and step",
        table(
            ["", "lr", "accuracy", "steps", "after 300"],
            [[n, t.rate, t.shown, f"{300 * len(t.mean_curve())}", f"{t.mean_curve()[0]:.3f}"] for n, t in both.items()],
        ),
        _plot(
            "Accuracy by step: gradients (above), 16, 4 and 1 machines",
            places,
            [both[n].mean_curve()[:5] for n in (FIRST_ORDER[0], "16 machines", "4 machines", "1 machine")],
        ),
        f"## Rounds of {EVERY} steps, {CLIENTS} machines, 25 rounds",
        table(ROUNDS_COLUMNS, _rounds_rows(federated)),
        _plot(
            "Accuracy by round, data alike: FedAvg, Ferret 20 %, FedKSeed 4096 and 64",
            [str(n + 1) for n in range(0, 25, 4)],
            [federated[n, "alike"].mean_curve()[::4] for n in (FEDAVG, "Ferret, K / d = 20%", *DRAWN_POOLS)],
        ),
        "The line by gradients is FedAvg's. Where *pro* is not better than *uniform* by more than the spread, it is "
        "not better.",
        "## What a projection keeps",
        _projection_table(projected),
        "## Weights that are moved and moved back",
        "Rms error of weights of size 0.02 that are perturbed in place by eps = 1e-3 there and back, as the reference "
        "does; here there is none, as a copy is moved.",
        table(["step", *drifts], [[str(n), *(f"{d[n]:.1e}" for d in drifts.values())] for n in (1, 10, 100, 1000)]),
        "## Replaying a log",
        table(["records", "seconds"], [[str(n), f"{seconds:.2f}"] for n, seconds in replayed.items()]),
        _replay_text((replayed[200] - replayed[25]) / 175),
    ]
    figures: dict[str, object] = {
        "one byte": {name: dataclasses.asdict(tuned) for name, tuned in both.items()},
        "rounds": {f"{name}, {kind}": dataclasses.asdict(tuned) for (name, kind), tuned in federated.items()},
        "drift": {name: {str(n): error for n, error in errors.items()} for name, errors in drifts.items()},
        "projections": list(projected), "replays": {str(n): seconds for n, seconds in replayed.items()}, "signs": signs,
    }  # fmt: skip
    commands = ("python -m benchmarks shared_seed",)
    return Report("Learning where next to nothing is sent", "\n\n".join(parts), commands, tuple(checks), figures)


def _rounds_rows(federated: Mapping[tuple[str, str], Tuned]) -> list[list[str]]:
    rows = []
    for name in dict.fromkeys(name for name, _ in federated):
        tuned = [federated.get((name, kind)) for _, kind in KINDS]
        sent = next(one for one in tuned if one is not None).curves[0]["sent"][0]
        reached = _rounds_to(tuned[0].mean_curve(), 0.8) if tuned[0] is not None else "-"
        rows.append([name, *(f"{e.shown} ({e.rate})" if e else "-" for e in tuned), reached, f"{sent:,.0f}"])
    return rows


def _projection_checks(projected: Sequence[Mapping[str, float]]) -> Iterator[Check]:
    for row in projected:
        k, d = row["directions"], PARAMETERS
        for what, ideal in (("cosine", math.sqrt(k / (k + d))), ("norm", math.sqrt((k + d) / k))):
            off = abs(row[what] / ideal - 1)
            yield at_most(f"{what} of {k:.0f} of {d} directions, off the formula", off, 0.1)
        if row["draws"] == 2000:
            yield at_most("slope of the mean of 2,000 draws, off 1", abs(row["slope"] - 1), 0.02)


def _projection_table(projected: Sequence[Mapping[str, float]]) -> str:
    rows = []
    for row in projected:
        k = row["directions"]
        kept = k / (k + PARAMETERS)
        rows.append([
            f"{k:.0f}", f"{row['cosine']:.3f}", f"{math.sqrt(kept):.3f}", f"{row['norm']:.2f}",
            f"{1 / math.sqrt(kept):.2f}", f"{row['slope']:.3f}",
        ])  # fmt: skip
    return table(["directions", "cosine", "sqrt(K / (K + d))", "norm", "sqrt((K + d) / K)", "slope of the mean"], rows)


def _replay_text(per_record: float) -> str:
    return (
        f"Of 4 machines over a million parameters: {1e3 * per_record:.0f} ms a record. Copying the weights over 10 "
        f"Mbit/s takes 3.2 s: as long as {3.2 / per_record:.0f} records."
    )


def _rounds_to(curve: Sequence[float], line: float) -> str:
    return next((str(number + 1) for number, value in enumerate(curve) if value >= line), "-")


def _plot(title: str, places: Sequence[str], lines: Sequence[Sequence[float]]) -> str:
    """As a Mermaid chart."""
    drawn = [f"    line [{', '.join(f'{value:.3f}' for value in line)}]" for line in lines]
    axis = ", ".join(f'"{place}"' for place in places)
    head = ["```mermaid", "xychart-beta", f'    title "{title}"', f"    x-axis [{axis}]"]
    return "\n".join([*head, '    y-axis "accuracy" 0 --> 1', *drawn, "```"])
