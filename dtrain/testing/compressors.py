"""A conformance test for compressors: what a compressor declares is tried on inputs that are meant to break it.

    from dtrain.testing import check_compressor

    def test_mine():
        check_compressor(Mine())

It needs neither processes nor pytest. Everything is seeded: a compressor passes always or never.
"""

from __future__ import annotations

import math
from collections.abc import Iterator

import torch
from torch import Tensor

from dtrain.comm.compressors.compressor import Compressor, two_rounds
from dtrain.comm.ops import Payload, payload_bytes
from dtrain.comm.seeds import FIRST_PHASE, Key

WIDTHS = (0, 1, 2, 3, 7, 16, 61, 128, 513, 2049)
DRAWS = 1500  # of a random compressor, for its mean
KEY = Key(seed=1, step=2, rank=3, fqn="w", phase=FIRST_PHASE)


def check_compressor(compressor: Compressor, device: torch.device | str = "cpu") -> None:
    """Raise ``AssertionError``, saying what is wrong, unless ``compressor`` keeps the contract of `Compressor` on rows
    that are on ``device``.

    Checked: declared bytes and shapes, which must not depend on values; rows that are coded independently; the same
    bytes for the same key, and no global random generator touched; inputs left alone; zeros stay zeros; a value that is
    not finite affects no other row, and a contraction does not return it finite; the contraction, the mean, the
    homogeneity and the linearity that it declares; and that it stays on the device.
    """
    assert not isinstance(compressor, type), f"{compressor.__name__} is a class; give one of its instances"
    assert not hasattr(compressor, "feedback") and two_rounds(compressor) is None, (
        f"{compressor} does not code rows: powersgd is a method of its own; of what is under feedback give the "
        "compressor alone"
    )
    members = ("unbiased", "delta", "homogeneous", "linear", "encode", "decode", "row_bytes")
    missing = [name for name in members if not hasattr(compressor, name)]
    assert not missing, f"{compressor!r} lacks {', '.join(missing)}: see dtrain.comm.compressors.compressor"
    assert isinstance(compressor.delta, int | float), f"delta is {compressor.delta!r}; it is a number"
    assert isinstance(compressor.row_bytes(7), int), f"row_bytes gives {compressor.row_bytes(7)!r}; bytes are an int"
    device = torch.empty(0, device=device).device  # with its number
    for width in WIDTHS:
        for name, values in _inputs(width):
            rows = values.to(device)
            _check_coding(compressor, rows, f"{name}, {width} wide")
            _check_contraction(compressor, rows, f"{name}, {width} wide")
    _check_not_finite(compressor, device)
    if compressor.homogeneous:
        _check_homogeneous(compressor, device)
    if compressor.linear:
        _check_linear(compressor, device)
    if compressor.unbiased:
        _check_unbiased(compressor, device)


def _inputs(width: int) -> Iterator[tuple[str, Tensor]]:
    """Rows [3, width] of kinds that compressors fail on."""
    generator = torch.Generator().manual_seed(width)
    normal = torch.randn(3, width, generator=generator)
    yield "normal values", normal
    yield "a constant", torch.full((3, width), 0.1)
    yield "zeros", torch.zeros(3, width)
    single = torch.zeros(3, width)
    single[:, width // 2 : width // 2 + 1] = -3.0
    yield "one element that is not zero", single
    yield "a heavy tail", normal / torch.rand(3, width, generator=generator).clamp(min=1e-6)
    ends = 1e-4 * normal.sign()
    ends[:, :1], ends[:, -1:] = 1.0, -1.0
    yield "small values between two large ones", ends
    yield "large values", normal * 1e15
    yield "small values", normal * 1e-15


def _round_trip(compressor: Compressor, rows: Tensor, key: Key = KEY) -> Tensor:
    return compressor.decode(compressor.encode(rows, key), rows.shape[1], key.shared)


def _check_coding(compressor: Compressor, rows: Tensor, what: str) -> None:
    width, before, generators = rows.shape[1], rows.clone(), _generators(rows.device)
    payload = compressor.encode(rows, KEY)
    assert isinstance(payload, tuple), f"{what}: encode gave a {type(payload).__name__}; give a tuple of tensors"
    assert torch.equal(rows, before), f"{what}: encode wrote into its input"
    sent, declared = payload_bytes(payload), rows.shape[0] * compressor.row_bytes(width)
    assert sent == declared, f"{what}: {sent} bytes were sent, row_bytes declares {declared} for these rows"
    assert all(tensor.shape[:1] == rows.shape[:1] for tensor in payload), f"{what}: a payload tensor has no row per row"
    devices = {tensor.device for tensor in payload}
    assert devices <= {rows.device}, f"{what}: encode made of rows on {rows.device} a payload on {devices}"
    before_decode = tuple(tensor.clone() for tensor in payload)
    decoded = compressor.decode(payload, width, KEY.shared)
    assert decoded.device == rows.device, f"{what}: decode gave rows on {decoded.device}, not on {rows.device}"
    assert decoded.shape == rows.shape, f"{what}: decoded to {tuple(decoded.shape)}, encoded from {tuple(rows.shape)}"
    assert decoded.dtype == torch.float32, f"{what}: decoded to {decoded.dtype}; fp32 is the contract"
    assert _same(payload, before_decode), f"{what}: decode wrote into the payload"
    assert _same(payload, compressor.encode(rows, KEY)), f"{what}: the same key gave other bytes"
    last_row = compressor.decode(tuple(tensor[-1:] for tensor in payload), width, KEY.shared)
    assert torch.equal(last_row[0], _round_trip(compressor, rows)[-1]), f"{what}: a row alone decodes to something else"
    assert torch.equal(_generators(rows.device), generators), f"{what}: the global generator moved; use key.generator()"
    if not bool(rows.any()):
        assert not bool(_round_trip(compressor, rows).any()), f"{what}: zeros did not stay zeros"


def _check_contraction(compressor: Compressor, rows: Tensor, what: str) -> None:
    size = float(rows.double().square().sum())
    if compressor.delta <= 0 or size == 0 or size > 1e30 or size < 1e-25:
        return
    keys = [Key(seed, 2, 3, "w", FIRST_PHASE) for seed in range(200)] if _random(compressor) else [KEY]
    if len(keys) > 1 and rows.shape[1] > 128:
        keys = keys[:40]
    errors = torch.tensor([float((_round_trip(compressor, rows, key) - rows).double().square().sum()) for key in keys])
    spread = float(errors.std()) / math.sqrt(len(keys)) if len(keys) > 1 else 0.0
    error, allowed = float(errors.mean()) / size, 1 - compressor.delta
    assert error <= allowed * (1 + 1e-5) + 4 * spread / size + 1e-12, (
        f"{what}: the error is {error:.4g} of |x|^2, delta = {compressor.delta:.4g} allows {allowed:.4g}"
    )


def _check_not_finite(compressor: Compressor, device: torch.device) -> None:
    for bad in (math.nan, math.inf, -math.inf):
        rows = torch.linspace(-1, 1, 61).repeat(2, 1).to(device)
        rows[0, 40] = bad
        decoded = _round_trip(compressor, rows)
        wrong = bool(torch.isfinite(decoded[0]).all()) and compressor.delta > 0 and not _random(compressor)
        assert not wrong, f"{bad} came back as {float(decoded[0, 40]):g}: nobody would see that the step is broken"
        assert bool(torch.isfinite(decoded[1]).all()), f"{bad} in one row broke another"


def _check_homogeneous(compressor: Compressor, device: torch.device) -> None:
    rows = torch.randn(2, 61, generator=torch.Generator().manual_seed(5)).to(device)
    for factor in (2.0**-20, 4.0, 2.0**30):  # powers of two: nothing is rounded another way
        scaled, plain = _round_trip(compressor, rows * factor), _round_trip(compressor, rows)
        assert torch.allclose(scaled, plain * factor, rtol=1e-5, atol=0), f"not homogeneous: factor {factor:g}"
    for factor in (3.0, 0.7):
        scaled, plain = _round_trip(compressor, rows * factor), _round_trip(compressor, rows) * factor
        differing = int(((scaled - plain).abs() > 1e-4 * plain.abs().amax()).sum())
        assert differing <= rows.numel() // 50, (  # some elements may be rounded to the other neighbour
            f"not homogeneous: factor {factor:g} gives other values for {differing} of {rows.numel()} elements"
        )


def _check_linear(compressor: Compressor, device: torch.device) -> None:
    first, second = torch.randn(2, 3, 61, generator=torch.Generator().manual_seed(6)).to(device)
    keys = [Key(1, 2, rank, "w", FIRST_PHASE) for rank in (0, 1)]
    payloads = [compressor.encode(rows, key) for rows, key in zip((first, second), keys, strict=True)]
    total = tuple(a.float() + b.float() for a, b in zip(*payloads, strict=True))
    apart = sum(_round_trip(compressor, rows, key) for rows, key in zip((first, second), keys, strict=True))
    summed = tuple(t.to(p.dtype) for t, p in zip(total, payloads[0], strict=True))
    together = compressor.decode(summed, 61, keys[0].shared)
    assert torch.allclose(together, torch.as_tensor(apart), rtol=0.02, atol=0.02), "not linear: the sum decodes wrong"


def _check_unbiased(compressor: Compressor, device: torch.device) -> None:
    generator = torch.Generator().manual_seed(7)
    normal = torch.randn(1, 61, generator=generator)
    tailed = normal / torch.rand(1, 61, generator=generator).clamp(min=0.02)
    for rows in (normal.to(device), tailed.to(device)):
        decoded = [_round_trip(compressor, rows, Key(seed, 0, 0, "w", FIRST_PHASE)) for seed in range(DRAWS)]
        draws = torch.cat(decoded).double()
        off = (draws.mean(0) - rows[0].double()).abs()
        # What is rarer than 12 in all draws may not have been seen at all, and moves an element by no more than others.
        unseen = 12 / DRAWS * float((draws - rows.double()).abs().amax())
        allowed = 5.5 * draws.std(0) / math.sqrt(DRAWS) + unseen + 1e-6
        worst = int((off - allowed).argmax())
        assert bool((off <= allowed).all()), (
            f"not unbiased: element {worst} is {float(rows[0, worst]):.6g}, its mean over {DRAWS} draws is off by "
            f"{float(off[worst]):.3g}, where chance explains {float(allowed[worst]):.3g}"
        )


def _random(compressor: Compressor) -> bool:
    rows = torch.randn(1, 61, generator=torch.Generator().manual_seed(8))
    return not torch.equal(
        _round_trip(compressor, rows), _round_trip(compressor, rows, Key(99, 98, 3, "w", FIRST_PHASE))
    )


def _generators(device: torch.device) -> Tensor:
    """The states of torch's global generators."""
    on_device = [torch.cuda.get_rng_state(device)] if device.type == "cuda" else []
    return torch.cat([torch.get_rng_state(), *on_device])


def _same(one: Payload, other: Payload) -> bool:
    return len(one) == len(other) and all(
        a.dtype == b.dtype and torch.equal(a.view(torch.uint8), b.view(torch.uint8))
        for a, b in zip((p.contiguous() for p in one), (p.contiguous() for p in other), strict=True)
    )
