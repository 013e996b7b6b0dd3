"""Figures in README.md and docs: each sentence that has one, as a template, and where on the pages its figures are.

``make evidence ARGS=prose`` writes the figures of the pages into the sentences; a test (tests/benchmarks) fails where a
sentence has other figures than its page, and where one beside a link to a page is in no template here. Braces stand for
figures, any white space for white space. A figure that is typed by hand has no place in prose.
"""

from __future__ import annotations

import functools
import json
import math
import re
import statistics
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, TypeAlias

from benchmarks.equal_tokens import SEEDS, WARMUP
from benchmarks.lgreco import PLAIN
from benchmarks.plan_losses import written_losses
from benchmarks.provenance import EVIDENCE, ROOT
from benchmarks.step_timing import Took
from dtrain.report.figures import in_bytes

Figure: TypeAlias = Callable[[], float | str]


class Sentence:
    """``text``: with braces, and what Python's ``format`` makes of each figure, in the order of ``figures``."""

    def __init__(self, file: str, text: str, *figures: Figure) -> None:
        self.file, self.text, self.figures = file, text, figures
        self._fields = re.findall(r"\{(:[^}]*)?\}", text)
        between = [r"\s+".join(map(re.escape, re.split(r"\s+", words))) for words in re.split(r"\{[^}]*\}", text)]
        values = ["([+-]?[0-9][0-9.,]*)" if spec else "([0-9][0-9.,]* [kMGT]?B)" for spec in self._fields]
        self.pattern = re.compile("".join(a + b for a, b in zip(between, [*values, ""], strict=True)))

    def measured(self) -> list[str]:
        """The figures as the pages have them."""
        return [f"{{{spec}}}".format(figure()) for spec, figure in zip(self._fields, self.figures, strict=True)]

    def written_into(self, text: str) -> str:
        """``text`` with the figures of the pages. Raises ``ValueError`` if it does not hold the sentence once."""
        matches = list(self.pattern.finditer(text))
        if len(matches) != 1:
            raise ValueError(f"{self.file} has {len(matches)} times the sentence {self.text!r} of benchmarks/prose.py")
        places = [matches[0].span(number + 1) for number in range(len(self._fields))]
        for (start, end), value in reversed(list(zip(places, self.measured(), strict=True))):
            text = text[:start] + value + text[end:]
        return text


# ---- figures of the pages -------------------------------------------------------------------------------------------


@functools.cache
def page(name: str) -> Mapping[str, Any]:
    """The figures of a page."""
    figures: Mapping[str, Any] = json.loads((ROOT / EVIDENCE / f"{name}.json").read_text())["figures"]
    return figures


def loss(name: str, *runs: str) -> float:
    """Last validation loss, the mean of ``runs``."""
    return statistics.mean(float(page(name)[run]["validation_losses"][-1]) for run in runs)


def above(name: str, run: str, base: str = "dense") -> Figure:
    """Percent that the loss of a run is above another's."""
    return lambda: 100 * (loss(name, run) / loss(name, base) - 1)


def fewer(name: str, run: str, base: str = "") -> Figure:
    """How many times fewer bytes a run sends than ``base``, or than dense gradients would be."""

    def figure() -> float:
        dense = page(name)[base]["sent_bytes_per_rank"] if base else page(name)[run]["dense_bytes_per_rank"]
        return float(dense / page(name)[run]["sent_bytes_per_rank"])

    return figure


def within(*figures: Figure) -> Figure:
    """The largest, upwards to one decimal."""
    return lambda: math.ceil(10 * max(abs(float(figure())) for figure in figures)) / 10


def gap(compress: str) -> Figure:
    """Percent above dense, both at the best of their learning rates."""

    def best(run: str) -> float:
        return min(loss("loss", name) for name in page("loss") if name.startswith(f"{run}, lr x "))

    return lambda: 100 * (best(compress) / best("dense") - 1)


def nearly_lossless(of: Callable[[Sequence[float]], float]) -> Figure:
    """The least or largest percentage above dense of codes of 8 bits and more, without feedback and with EF14."""
    codes = (
        "quantize 8 bits",
        "quantize 8 bits, stochastic",
        "QSGD 8 bits",
        "natural",
        "bf16",
        "fp16",
        "fp8 e4m3",
        "fp8 e5m2",
    )
    runs = [f"{code}, {feedback}" for code in codes for feedback in ("none", "EF14")]
    return lambda: of([float(above("compressors", run, "fp32, none")()) for run in runs if run in page("compressors")])


def saved(what: str) -> Figure:
    """Times fewer bytes by L-GreCo around a uniform setting."""
    return fewer("lgreco", f"{what}, L-GreCo", f"{what}, uniform")


def lost(what: str) -> Figure:
    """Percent of loss that L-GreCo is above a uniform setting."""
    return above("lgreco", f"{what}, L-GreCo", f"{what}, uniform")


def took(name: str, exchange: str) -> Took:
    """Times of steps."""
    return Took(**page(name)[exchange])


def seconds(name: str, exchange: str) -> Figure:
    """A step's median."""
    return lambda: took(name, exchange).median


def times(name: str, exchange: str, base: str) -> Figure:
    """A step over another one, medians."""
    return lambda: took(name, exchange).median / took(name, base).median


def used(exchange: str) -> Figure:
    """Percent of the time that local updates compute."""
    return lambda: 100 * took("local", exchange).utilization


def minutes(exchange: str, warmup: int = 0) -> float:
    """Of 1,000 steps over slow links, ``warmup`` of them by data parallelism."""
    plain, local = took("local", "torch.all_reduce").median, took("local", exchange).median
    return (warmup * plain + (1000 - warmup) * local) / 60


def over_seeds(method: str) -> Figure:
    """Percent that the mean loss of all seeds is above that of data parallelism."""

    def mean(of: str) -> float:
        return loss("equal_tokens", *(f"{of}, seed {seed}" for seed in SEEDS))

    return lambda: 100 * (mean(method) / mean("data parallelism") - 1)


def over_seeds_deviation(method: str) -> Figure:
    """The standard deviation over the seeds of that percentage, each seed beside itself."""

    def by_seed(seed: int) -> float:
        return loss("equal_tokens", f"{method}, seed {seed}") / loss("equal_tokens", f"data parallelism, seed {seed}")

    return lambda: 100 * statistics.stdev(map(by_seed, SEEDS))


def off(run: str) -> Figure:
    """The same of a run of the first seed."""
    return above("equal_tokens", run, "data parallelism, seed 1")


def after_warmup(run: str) -> Figure:
    """How many times fewer bytes than dense gradients a run sends after its warm-up."""

    def figure() -> float:
        summary = page("equal_tokens")[run]
        a_step = summary["dense_bytes_per_rank"] / summary["steps"]
        after = summary["steps"] - WARMUP
        return float(a_step * after / (summary["sent_bytes_per_rank"] - a_step * WARMUP))

    return figure


def compiled(kernel: str) -> Figure:
    """Its speed over a copy's."""
    return lambda: float(page("kernels")[kernel]["compiled"])


def beside_pytorch(of: Callable[[Sequence[float]], float]) -> Figure:
    """The least or the largest ratio of our PowerSGD's step to PyTorch's, over all links."""

    def ratio(rate: str) -> float:
        by = page("powersgd")[rate]
        pairs = zip(by["torch.powersgd"]["seconds"], by["powersgd_ef:all_reduce"]["seconds"], strict=True)
        return statistics.median(float(ours / theirs) for theirs, ours in pairs)

    return lambda: of([ratio(rate) for rate in page("powersgd")])


def beside_pytorch_bytes() -> float:
    """Of the payloads."""
    by = next(iter(page("powersgd").values()))
    return float(by["powersgd_ef:all_reduce"]["payload_bytes"] / by["torch.powersgd"]["payload_bytes"])


# ---- sentences ------------------------------------------------------------------------------------------------------

_CHOOSING, _LOCAL = "docs/compression/choosing.md", "docs/local_updates/choosing.md"
_QUANTIZE, _LOWRANK = "docs/compression/quantize.md", "docs/compression/lowrank.md"
_DILOCO, _STREAMING = "DiLoCo", "Streaming DiLoCo, E3M0"
_DILOCO_STEP, _STREAMING_STEP, _CO2_STEP = "diloco/50:int8", "streaming_diloco/50:e3m0", "co2/12:int8"


def _row_of_savings(label: str, less: Figure, off: Figure, spec: str = ".1f") -> Sentence:
    return Sentence("README.md", f"| {label} | {{:{spec}}}x fewer | {{:+{spec}}} % |", less, off)


def _row_of_loss(label: str, run: str) -> Sentence:
    sent = lambda: in_bytes(page("loss")[run]["sent_bytes_per_rank"])  # noqa: E731
    return Sentence(_CHOOSING, f"| {label} | {{:.3f}} | {{}} |", lambda: loss("loss", run), sent)


def _row_of_seeds(label: str, method: str) -> Sentence:
    less = fewer("equal_tokens", f"{method}, seed 1")
    return Sentence(_LOCAL, f"| {label} | {{:+.1f}} % | {len(SEEDS)} | {{:.1f}}x less |", over_seeds(method), less)


def _row_of_run(label: str, run: str, spec: str = ".1f") -> Sentence:
    text = f"| {label} | {{:+{spec}}} % | 1 | {{:{'.1f' if 'warm-up' in label else '.0f'}}}x less |"
    return Sentence(_LOCAL, text, off(run), fewer("equal_tokens", run))


SENTENCES: tuple[Sentence, ...] = (
    _row_of_savings("`sync=every_step compress=int8_ef`: 8 bits, error feedback", fewer("loss", "int8_ef"),
                    above("loss", "int8_ef")),
    _row_of_savings("`sync=every_step compress=int4_ef`: 4 bits, error feedback", fewer("loss", "int4_ef"),
                    above("loss", "int4_ef")),
    _row_of_savings("`sync=every_step compress=powersgd16_ef`: low rank, error feedback",
                    fewer("loss", "powersgd16_ef"), above("loss", "powersgd16_ef")),
    _row_of_savings("`sync=diloco` in fp32, after 250 steps of data parallelism (warm-up)",
                    fewer("equal_tokens", f"{_DILOCO}, seed 1"), over_seeds(_DILOCO)),
    _row_of_savings("`sync=streaming_diloco` in 4 bits, after the same warm-up",
                    fewer("equal_tokens", f"{_STREAMING}, seed 1"), over_seeds(_STREAMING)),
    _row_of_savings("`sync=diloco` in 8 bits, without warm-up", fewer("quality", "diloco", "dense"),
                    above("quality", "diloco"), ".0f"),
    Sentence(
        "README.md",
        "a dense step of {:.1f} s becomes {:.1f} s (low rank) or {:.1f} s (4 bits); computing alone takes {:.1f} s",
        *(seconds("slow", name) for name in ("torch.all_reduce", "powersgd16_ef", "int4_ef", "nothing")),
    ),
    Sentence(
        "README.md",
        "`diloco` computes {:.0f} % of the time and `streaming_diloco` {:.0f} %, data parallelism in fp32 {:.0f} %",
        used(_DILOCO_STEP), used(_STREAMING_STEP), used("torch.all_reduce"),
    ),
    Sentence(
        "docs/compression/signs.md",
        "`terngrad` ends {:.1f} % above dense, `sign` without feedback {:.0f} %, with EF14 {:.0f} %",
        *(above("compressors", run, "fp32, none") for run in ("terngrad, none", "sign, none", "sign, EF14")),
    ),
    Sentence(
        "docs/compression/sparse.md",
        "`topk(0.01)` ended {:.0f} % above dense without and {:.0f} % with it",
        *(above("compressors", f"top-k 1 %, {feedback}", "fp32, none") for feedback in ("none", "EF14")),
    ),
    Sentence(
        _QUANTIZE,
        "8 bits lose next to nothing: {:.1f} times fewer bytes, the loss of dense training within {:.1f} %",
        fewer("quality", "int8_ef", "dense"), within(above("quality", "int8_ef"), above("loss", "int8_ef")),
    ),
    Sentence(
        _QUANTIZE, "{:.1f} times fewer, off by {:.2f} % after 500 steps", fewer("loss", "int4_ef"),
        above("loss", "int4_ef"),
    ),
    Sentence(
        _QUANTIZE,
        "sends {:.2f} times fewer bytes over 200 steps than 6 bits everywhere, for a loss that differs by {:+.1f} %",
        saved(PLAIN), lost(PLAIN),
    ),
    Sentence(
        _QUANTIZE, "Around 4 bits with feedback it saves {:.2f} times, for a loss that differs by {:+.1f} %",
        saved("quantization, 4 bits"), lost("quantization, 4 bits"),
    ),
    Sentence(
        _QUANTIZE,
        "quantizing runs at {:.2f} of the speed of a copy, with 4 bits and packing at {:.2f}, with feedback at {:.2f}, "
        "decoding four payloads to their mean at {:.2f} ([measured](../evidence/kernels.md)); eagerly at {:.2f}.",
        *(compiled(kernel) for kernel in ("8 bits", "4 bits", "feedback + 8 bits", "decode and mean of four")),
        lambda: float(page("kernels")["8 bits"]["eager"]),
    ),
    Sentence(
        _LOWRANK, "rank 16 ends {:.1f} % above dense, rank 4 {:.0f} % above.", above("loss", "powersgd16_ef"),
        gap("powersgd_ef"),
    ),
    Sentence(
        _LOWRANK,
        "A step takes {:.2f} to {:.2f} times as long as with PyTorch's own hook over the same all-reduce, and sends "
        "{:.3f} times as much",
        beside_pytorch(min), beside_pytorch(max), beside_pytorch_bytes,
    ),
    Sentence(
        _LOWRANK,
        "{:.1f} times fewer bytes on the default model over 200 steps, and a loss that differs by {:+.1f} %",
        saved("PowerSGD rank 32"), lost("PowerSGD rank 32"),
    ),
    Sentence(
        _LOWRANK,
        "rank 16 saves {:.2f} times and ends {:.1f} % above uniform's loss, rank 4 {:.1f} times and {:.1f} %.",
        saved("PowerSGD rank 16"), lost("PowerSGD rank 16"), saved("PowerSGD rank 4"), lost("PowerSGD rank 4"),
    ),
    Sentence(
        _CHOOSING, "a dense step of {:.1f} s becomes {:.1f} s and {:.1f} s, where computing alone takes {:.1f} s;",
        *(seconds("slow", name) for name in ("torch.all_reduce", "powersgd16_ef", "int4_ef", "nothing")),
    ),
    Sentence(
        _CHOOSING,
        "its step was {:.2f} times the one without any communication; with rank 4, which sends a quarter, "
        "{:.2f} times.",
        times("slow", "powersgd16_ef", "nothing"), times("slow", "powersgd_ef", "nothing"),
    ),
    _row_of_loss("dense", "dense"), _row_of_loss("`int8_ef`", "int8_ef"), _row_of_loss("`int4_ef`", "int4_ef"),
    _row_of_loss("`powersgd16_ef`", "powersgd16_ef"),
    _row_of_loss("`local_sgd` every 8 steps, `int4_ef`", "local_sgd, every 8 steps, int4_ef"),
    _row_of_loss("`powersgd_ef` (rank 4)", "powersgd_ef, lr x 1"),
    Sentence(
        _CHOOSING, "The second and the third are within {:.1f} % of the first.",
        within(above("loss", "int8_ef"), above("loss", "int4_ef")),
    ),
    Sentence(
        _CHOOSING, "Top-k of 1 % and signs end {:.0f} % and {:.0f} % above dense at the best", gap("topk_ef"),
        gap("sign_ef"),
    ),
    Sentence(
        _CHOOSING, "`terngrad`, {:.0f} times fewer bytes, ends {:.1f} % above dense there",
        fewer("compressors", "terngrad, none"), above("compressors", "terngrad, none", "fp32, none"),
    ),
    Sentence(
        _CHOOSING, "codes of 8 bits and more ended {:+.1f} to {:+.1f} % off dense", nearly_lossless(min),
        nearly_lossless(max),
    ),
    Sentence(
        _CHOOSING, "`cast(\"bf16\")` alone sends {:.1f} times fewer and ended {:+.1f} % off",
        fewer("compressors", "bf16, none"), above("compressors", "bf16, none", "fp32, none"),
    ),
    Sentence(
        "docs/compression/feedback.md", "EF21-SGDM ended {:.0f} % above dense even around 8 bits",
        above("compressors", "quantize 8 bits, EF21-SGDM", "fp32, none"),
    ),
    Sentence(
        _LOCAL, "standard deviations of {:.1f} % and {:.1f} %", over_seeds_deviation(_DILOCO),
        over_seeds_deviation(_STREAMING),
    ),
    Sentence(
        _LOCAL, "in 40 rounds from scratch `sync.outer.momentum=0.5` ended {:.0f} % lower.",
        lambda: -float(above("equal_tokens", "DiLoCo without warm-up, outer 0.7 / 0.5",
                       "DiLoCo without warm-up, outer 0.7 / 0.9")()),
    ),
    _row_of_seeds("`diloco`, 250 steps of warm-up, outer 0.9 / 0.6", _DILOCO),
    _row_of_seeds("`streaming_diloco`, the same, 4 bits (E3M0)", _STREAMING),
    _row_of_run("`diloco`, 250 steps of warm-up, outer 0.7 / 0.9", "DiLoCo, outer 0.7 / 0.9, the paper's"),
    _row_of_run(
        "`diloco`, 250 steps of warm-up, outer 0.9 / 0.6, rounds of 50, 8 bits", "DiLoCo, 8 bits, rounds of 50"
    ),
    _row_of_run("`diloco`, 250 steps of warm-up, outer 0.7 / 0.5", "DiLoCo, outer 0.7 / 0.5"),
    _row_of_run(
        "`streaming_diloco`, 250 steps of warm-up, outer 0.4 / 0.9, 4 bits",
        "Streaming DiLoCo, E3M0, outer 0.4 / 0.9, the paper's",
    ),
    _row_of_run("`diloco` from scratch, outer 0.7 / 0.5", "DiLoCo without warm-up, outer 0.7 / 0.5"),
    _row_of_run("`diloco` from scratch, outer 0.7 / 0.9", "DiLoCo without warm-up, outer 0.7 / 0.9"),
    _row_of_run("`co2` from scratch, rounds of 12, 8 bits, `sync.lr=0.5`", "CO2 as well, outer lr 0.5", ".0f"),
    _row_of_run("the same with its own outer learning rate of 1", "CO2 without warm-up, 8 bits, rounds of 12", ".0f"),
    _row_of_run(
        "the same without the penalty for staleness (`sync.gap=none`)", "CO2 as well, without its penalty", ".0f"
    ),
    Sentence(
        _LOCAL,
        "after it `diloco` sends {:.0f} times less in fp32, and `streaming_diloco` with its 4 bits {:.0f} times less.",
        after_warmup(f"{_DILOCO}, seed 1"), after_warmup(f"{_STREAMING}, seed 1"),
    ),
    Sentence(_LOCAL, "{:.1f} s of computation in a step", seconds("local", "nothing/50")),
    Sentence(
        _LOCAL,
        "data parallelism takes {:.1f} s a step, `diloco` with rounds of 50 and 8 bits computes {:.0f} % of the time, "
        "`streaming_diloco` with 4 bits {:.0f} %, `co2` with rounds of 12 and 8 bits {:.0f} %.",
        seconds("local", "torch.all_reduce"), used(_DILOCO_STEP), used(_STREAMING_STEP), used(_CO2_STEP),
    ),
    Sentence(
        _LOCAL,
        "So 1,000 steps from scratch take {:.0f} to {:.0f} minutes where data parallelism takes {:.0f}; with 250 steps "
        "of warm-up they take {:.0f}, nearly all of them the warm-up's.",
        lambda: min(minutes(name) for name in (_DILOCO_STEP, _STREAMING_STEP, _CO2_STEP)),
        lambda: max(minutes(name) for name in (_DILOCO_STEP, _STREAMING_STEP, _CO2_STEP)),
        lambda: minutes("torch.all_reduce"),
        lambda: minutes(_STREAMING_STEP, WARMUP),
    ),
    Sentence(
        _LOCAL,
        "at {:.1f} to {:.1f} times the computation; `streaming_diloco` if some {:.0f} % may, at {:.2f} times.",
        times("slow", "powersgd16_ef", "nothing"), times("slow", "int4_ef", "nothing"), over_seeds(_STREAMING),
        lambda: 1 / took("local", _STREAMING_STEP).utilization,
    ),
    # No measurements, but beside a link to some:
    Sentence("docs/compression/sparse.md", "1 % of the elements are payloads 79"),
    Sentence("docs/shared_randomness/README.md", "16 kB, and a round of 200 steps costs 1.6 kB of each machine"),
)  # fmt: skip

# ---- what is beside a link to a page --------------------------------------------------------------------------------

MEASURED = re.compile(r"[0-9][0-9.,]*(?: ?%| times|x less| nats|x faster| s\b| minutes| [kMG]B)")
DATED = ("docs/decisions",)
"""Records of their day."""


def unclaimed(file: str, text: str, sentences: Sequence[Sentence]) -> Iterator[str]:
    """Figures in paragraphs that link to a page, and in none of the sentences."""
    if file.startswith(DATED):
        return
    spans = [match.span() for sentence in sentences for match in sentence.pattern.finditer(text)]
    for paragraph in re.finditer(r"(?:.+\n)+", text):
        if not re.search(r"evidence/\w+\.md", paragraph[0]):
            continue
        for figure in MEASURED.finditer(text, *paragraph.span()):
            if not any(start <= figure.start() < end for start, end in spans):
                yield f"{file}: {figure[0]}"


def written_into_prose(root: Path = ROOT) -> str:
    """Write the figures of the pages into all sentences; says which files are other than they were."""
    changed = []
    for file in sorted({sentence.file for sentence in SENTENCES}):
        before = text = (root / file).read_text()
        for sentence in SENTENCES:
            if sentence.file == file:
                text = sentence.written_into(text)
        if text != before:
            (root / file).write_text(text)
            changed.append(file)
    if written_losses(root):
        changed.append("dtrain/plan/losses.json")
    return "\n".join(changed) or "all figures in README.md and docs are those of the pages"
