"""The report on one CUDA card: coding at the card's memory bandwidth, a step under a hook, NCCL between two ranks.

``python -m benchmarks.gpu`` measures and prints the figures as JSON; without a card it says so and ends with 77. It
needs no git: where the card's machine has none, ``python -m benchmarks.gpu --page FIGURES`` makes the page of what was
printed in a checkout of the same code.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import os
import statistics
import subprocess
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, cast

from benchmarks.evidence import circumstances, write
from benchmarks.harness import Session, say
from benchmarks.page import Report, at_most, table
from benchmarks.provenance import EVIDENCE, MEASURES, require_clean
from tests.gpu.card import NO_CARD, why_not
from tests.programs.hosts import ROOT

if TYPE_CHECKING:
    import torch

    from dtrain.comm.compressors.compressor import Compressor

Figures = Mapping[str, Any]

ELEMENTS = 1 << 24
ROWS = 2  # as between two replicas
REPEATS, WARM_UP = 20, 5
EXAMPLES, LENGTH = 32, 128
MEGABYTES = (1, 16, 64)


def gpu(session: Session) -> Report:
    """On the card of this machine, in a process of its own."""
    say("python -m benchmarks.gpu")
    done = subprocess.run(
        [sys.executable, "-m", "benchmarks.gpu"], cwd=ROOT, stdout=subprocess.PIPE, text=True, check=False
    )
    if done.returncode:
        raise RuntimeError(f"it ended with exit code {done.returncode}")
    return gpu_report(json.loads(done.stdout.splitlines()[-1]))


def measured_elsewhere(path: Path) -> Report:
    """The report on figures that `main` has printed. Raises ``RuntimeError`` for those of other code."""
    figures = json.loads(path.read_text().splitlines()[-1])
    if figures["code"] != code():
        raise RuntimeError(f"{path} was measured with other code than what is checked out here")
    return gpu_report(figures)


def gpu_report(figures: Figures) -> Report:
    """``figures``: those of `measure`."""
    about, coders, steps, nccl = (figures[name] for name in ("about", "coders", "steps", "nccl"))
    copied, elements = figures["copy_ms"], figures["elements"]
    body = "\n\n".join([
        f"{about['card']}, torch {about['torch']}, CUDA {about['cuda']}, NCCL {about['nccl']}, "
        f"Python {about['python']}. Times are medians of {REPEATS} repeats after {WARM_UP}, between CUDA events; where "
        "a call waits for the card, that is in its time.",
        f"## Coding {elements:,} elements\n\nfp32 in {ROWS} rows. A copy of them on the card takes {copied:.3f} ms. "
        "Eager: before a kernel is compiled. Other bits: elements of what is decoded that differ from what the CPU "
        "decodes of the same bytes, and those of compiled kernels that differ from eager ones.\n\n"
        + table(
            ["compressor", "bytes", "encode ms", "eager", "decode ms", "eager", "other bits", "compiled"],
            [
                [name, f"{row['bytes']:,}", *(f"{row[key]:.3f}" for key in TIMES), f"{row['wrong_decoded']}",
                 f"{row['wrong_compiled']}"]
                for name, row in coders.items()
            ],
        ),
        f"## A step of the default model\n\n{EXAMPLES} examples of {LENGTH} bytes in fp32, AdamW, DDP with one rank: "
        "what the hook costs, without a link.\n\n"
        + table(["hook", "step ms"], [[name, f"{ms:.3f}"] for name, ms in steps.items()]),
        "## NCCL between two ranks on the one card\n\nEach is told another `NCCL_HOSTID`, so that their sockets are "
        "between them.\n\n" + (nccl["why_not"] or table(
            ["all-reduce, MB", "ms"], [[size, f"{ms:.1f}"] for size, ms in nccl["ms"].items()]
        )),
    ])  # fmt: skip
    wrong = sum(row["wrong_compiled"] for row in coders.values())
    checks = (
        at_most("elements that Triton gives other bits than eager code", wrong, 0),
        at_most(
            "elements of int8 that the card decodes to other bits than the CPU", coders["int8"]["wrong_decoded"], 0
        ),
    )
    return Report("One GPU", body, ("make gpu",), checks, figures)


TIMES = ("encode_ms", "encode_eager_ms", "decode_ms", "decode_eager_ms")


def code() -> str:
    """A digest of the Python files that are measured."""
    digest = hashlib.sha256()
    files = [file for path in MEASURES["gpu"] for file in (ROOT / path, *(ROOT / path).rglob("*.py")) if file.is_file()]
    for file in sorted(files):
        digest.update(f"{file.relative_to(ROOT)}\0".encode() + file.read_bytes())
    return digest.hexdigest()


def measure(device: str, elements: int = ELEMENTS, repeats: int = REPEATS) -> dict[str, object]:
    """In this process, but for what is between two ranks."""
    import torch

    values = torch.randn(ROWS, elements // ROWS, generator=torch.Generator().manual_seed(0)).to(device)
    room = torch.empty_like(values)
    return {
        "about": _about(device),
        "code": code(),
        "elements": elements,
        "copy_ms": _milliseconds(lambda: room.copy_(values), device, repeats),
        "coders": {name: _coder(coder, values, repeats) for name, coder in _coders().items()},
        "steps": _steps(device, repeats),
    }


def between_two_ranks(repeats: int = REPEATS) -> dict[str, object]:
    """Medians by megabytes of an all-reduce of NCCL's, in milliseconds, or why there are none."""
    from dtrain.testing import WorkerPool
    from tests.gpu.jobs import between_ranks, on_card, seconds_of_all_reduce

    with WorkerPool(2) as workers:
        reason = between_ranks(workers, 2)
        if reason:
            return {"why_not": f"It does not work here: {reason}", "ms": {}}
        ms = {}
        for megabytes in MEGABYTES:
            ranks = workers.run(on_card, "nccl", seconds_of_all_reduce, megabytes, repeats, seconds=240)
            ms[str(megabytes)] = 1e3 * statistics.median(max(pair) for pair in zip(*ranks, strict=True))
    return {"why_not": "", "ms": ms}


def _about(device: str) -> dict[str, str]:
    import torch

    cuda = device == "cuda"
    nccl = ".".join(map(str, cast("tuple[int, ...]", torch.cuda.nccl.version()))) if cuda else "none"
    return {
        "card": torch.cuda.get_device_name(0) if cuda else "no card", "torch": torch.__version__,
        "cuda": str(torch.version.cuda), "nccl": nccl, "python": sys.version.split()[0],
    }  # fmt: skip


def _coders() -> dict[str, Compressor]:
    from dtrain.compress import cast, compeft, projection, quantize, randk, sign, terngrad, topk

    return {
        "bf16": cast("bf16"), "e4m3": cast("fp8_e4m3"), "int8": quantize(bits=8), "int4": quantize(bits=4),
        "int8 stochastic": quantize(bits=8, rounding="stochastic"), "e3m0": quantize("e3m0"),
        "2 bits, least squares": quantize("least_squares"), "sign": sign(), "terngrad": terngrad(),
        "compeft": compeft(), "top-k, 1 %": topk(0.01), "random-k, 1 %": randk(0.01), "projection": projection(),
    }  # fmt: skip


def _coder(coder: Compressor, values: torch.Tensor, repeats: int) -> dict[str, float]:
    """Times of one compressor, and how many elements have other bits."""
    from dtrain.comm.seeds import Key

    key, width, device = Key(0, 0, 0, "w", "send"), values.shape[1], values.device.type
    row: dict[str, float] = {"bytes": values.shape[0] * coder.row_bytes(width)}
    decoded: dict[str, torch.Tensor] = {}
    for policy, suffix in (("never", "_eager_ms"), ("always", "_ms")):
        os.environ["DTRAIN_COMPILE"] = policy
        payload = coder.encode(values, key)
        decoded[policy] = coder.decode(payload, width, key.shared)
        row[f"encode{suffix}"] = _milliseconds(lambda: coder.encode(values, key), device, repeats)
        row[f"decode{suffix}"] = _milliseconds(lambda: coder.decode(payload, width, key.shared), device, repeats)  # noqa: B023
    row["wrong_compiled"] = _differing(decoded["always"], decoded["never"])
    os.environ["DTRAIN_COMPILE"] = "never"
    on_cpu = coder.decode(tuple(tensor.cpu() for tensor in payload), width, key.shared)
    row["wrong_decoded"] = _differing(coder.decode(payload, width, key.shared).cpu(), on_cpu)
    return row


def _differing(one: torch.Tensor, other: torch.Tensor) -> int:
    import torch

    return int((one.view(torch.int32) != other.view(torch.int32)).sum())


def _steps(device: str, repeats: int) -> dict[str, float]:
    """Milliseconds of a step by hook."""
    import torch
    from torch.nn.parallel import DistributedDataParallel

    import dtrain
    from dtrain.compress import error_feedback, quantize
    from dtrain.train.models.transformer import Transformer
    from dtrain.train.process_group import joined

    tokens = torch.randint(0, 256, (EXAMPLES, LENGTH), generator=torch.Generator().manual_seed(0)).to(device)
    batch = {"input": tokens, "target": tokens}
    os.environ["DTRAIN_COMPILE"] = "early"
    found = {}
    with joined():
        for name, compress in (("DDP's own", None), ("fp32", None), ("int8", error_feedback(quantize(bits=8)))):
            torch.manual_seed(0)
            plain = Transformer(vocab_size=256, dim=128, layers=4, heads=4, max_length=LENGTH).to(device)
            model = DistributedDataParallel(plain, gradient_as_bucket_view=True)
            optimizer = torch.optim.AdamW(model.parameters(), lr=1e-4)
            own = name == "DDP's own"
            sync = None if own else dtrain.attach(model, optimizer, dtrain.every_step(compress=compress))

            def step() -> None:
                model(batch).backward()  # noqa: B023
                if sync is not None:  # noqa: B023
                    sync.step()  # noqa: B023
                else:
                    optimizer.step()  # noqa: B023
                    optimizer.zero_grad()  # noqa: B023

            found[name] = _milliseconds(step, device, repeats)
            if sync is not None:
                sync.detach()
    return found


def _milliseconds(call: Callable[[], object], device: str, repeats: int) -> float:
    """The median of ``repeats``: between events of the card, or on the clock where there is none."""
    import torch

    for _ in range(WARM_UP):
        call()
    times = []
    for _ in range(repeats):
        if device != "cuda":
            began = time.perf_counter()
            call()
            times.append(1e3 * (time.perf_counter() - began))
            continue
        begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        begin.record()
        call()
        end.record()
        end.synchronize()
        times.append(float(begin.elapsed_time(end)))
    return statistics.median(times)


def main(arguments: Sequence[str] | None = None) -> int:
    """Print the figures, or write the page of printed ones; returns the exit code."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.gpu", description="Measure one CUDA card.")
    parser.add_argument("--page", type=Path, metavar="FIGURES", help="write the page of what this command has printed")
    chosen = parser.parse_args(arguments)
    if chosen.page is not None:
        require_clean()
        report = measured_elsewhere(chosen.page)
        made = replace(circumstances(), machine="another one, see above", versions="see above", load="unknown")
        write("gpu", report, made, ROOT / EVIDENCE)
        return int(not all(check.met for check in report.checks))
    reason = why_not()
    if reason:
        print(reason, file=sys.stderr)
        return NO_CARD
    found = measure("cuda") | {"nccl": between_two_ranks()}
    print(json.dumps(found))
    return 0


if __name__ == "__main__":
    sys.exit(main())
