"""Kernels: functions of rows that are cut into blocks, compiled where it pays.

A kernel is a function of tensors [rows, blocks, elements] that writes its results into the last of them (`by_blocks`
cuts flat rows into such views). The eager function is readable, and the reference: `torch.compile` makes of it one pass
over memory, vectorized C++ on CPU and Triton on GPU, with the same bits (tests/comm/test_kernels.py, tests/gpu). Triton
by itself fuses multiplications with additions and approximates quotients, so that inductor is told to round as eager
code does (`AS_EAGER`); on a GPU, a torch that cannot be told runs them eagerly.

Compiling takes seconds, so small tensors never cause it, and larger ones only after eager calls have taken about as
long. It happens in `compile_what_is_due`, on the thread that calls it (a sync does between
two steps): torch traces with state that all threads share, and the main thread may be in a compiled model elsewhere.
``DTRAIN_COMPILE``: "auto", "never", "early" (as "auto", but after the first step), or "always" (at the first call, of
any size).
"""

from __future__ import annotations

import contextlib
import os
import tempfile
import types
import warnings
from collections.abc import Callable, Hashable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TypeAlias

import torch
import torch.nn.functional as F
from torch import Tensor

from dtrain.comm.shadowed import shadow_among
from dtrain.comm.torch_private import compiles_with, default_cache_folder, mark_any_size

Constant: TypeAlias = int | float | bool | str | None
"""A keyword argument of a kernel."""
SMALLEST = 1 << 16
"""Elements of the first argument from which a compiled kernel is used: below, calling it costs what it saves."""
WORTHWHILE = 1 << 28
"""Elements that go through eagerly before a kernel is compiled: about five seconds of one core, as compiling takes."""
CACHE = "TORCHINDUCTOR_CACHE_DIR"
AS_EAGER = ("emulate_precision_casts", "eager_numerics.division_rounding")
"""Settings of inductor by which Triton rounds every operation (the first also switches fusing off), and divides
exactly."""


@dataclass(frozen=True)
class _Like:
    """The layout of an argument; enough to make another one."""

    shape: tuple[int, ...]
    stride: tuple[int, ...]
    dtype: torch.dtype
    device: torch.device

    @classmethod
    def of(cls, tensor: Tensor) -> _Like:
        return cls(tuple(tensor.shape), tensor.stride(), tensor.dtype, tensor.device)

    def made(self) -> Tensor:
        return torch.empty_strided(self.shape, self.stride, dtype=self.dtype, device=self.device).zero_()


class Kernel:
    """A function of tensors, compiled where that pays. Call it like the function; keyword arguments are compiled in."""

    def __init__(self, function: Callable[..., None]) -> None:
        self.function = function
        self.__name__, self.__doc__ = function.__name__, function.__doc__
        self.compiled: dict[Hashable, Callable[..., None]] = {}
        self._seen: dict[Hashable, int] = {}
        self._due: dict[Hashable, tuple[dict[str, Constant], list[_Like]]] = {}

    def __call__(self, *tensors: Tensor, **constants: Constant) -> None:
        if (shadow := shadow_among(tensors)) is not None:
            shadow.meet(tensors)
            return
        elements, always = tensors[0].numel(), _policy() == "always"
        if elements < SMALLEST and not always:
            self.function(*tensors, **constants)
            return
        shapes = [(tensor.dtype, tensor.shape[0] == 1, tensor.shape[-1]) for tensor in tensors]
        variant = (*constants.items(), *shapes, tensors[0].device)
        if always and variant not in self.compiled:
            self._compile(variant, constants, [_Like.of(tensor) for tensor in tensors])
        compiled = self.compiled.get(variant)
        if compiled is not None:
            with torch.no_grad():
                compiled(*tensors)
            return
        self._seen[variant] = self._seen.get(variant, 0) + elements
        enough = 0 if _policy() == "early" else WORTHWHILE
        if self._seen[variant] >= enough and variant not in self._due:
            self._due[variant] = (constants, [_Like.of(tensor) for tensor in tensors])
        self.function(*tensors, **constants)

    def compile_what_is_due(self) -> None:
        """Compile the variants that have been used enough. Without a compiler it warns once, and they run eagerly."""
        if not self._due or _policy() == "never":
            return
        for variant, (constants, like) in list(self._due.items()):  # flows on other threads add to it meanwhile
            if variant not in self.compiled:
                self._compile(variant, constants, like)

    def _compile(self, variant: Hashable, constants: dict[str, Constant], like: list[_Like]) -> None:
        self.compiled[variant] = _Compiler.compile(self.function, constants, like)


class _Compiler:
    """torch.compile, or eager if no compiler is found."""

    missing = False

    @classmethod
    def compile(
        cls, function: Callable[..., None], constants: dict[str, Constant], like: list[_Like]
    ) -> Callable[..., None]:
        """``function`` with ``constants``, compiled for tensors of any size with layouts ``like``, or as it is."""

        def eager(*tensors: Tensor) -> None:
            function(*tensors, **constants)

        options = _options(like[0].device)
        if cls.missing or options is None:
            return eager
        # A code object of its own: torch counts compilations by code object, and stops after eight.
        copy = types.FunctionType(
            function.__code__.replace(co_name=f"{function.__name__}_{'_'.join(map(str, constants.values()))}"),
            function.__globals__, function.__name__,
        )  # fmt: skip
        copy.__kwdefaults__ = dict(constants)
        _keep_cache_private()
        compiled = torch.compile(copy, fullgraph=True, options=options)
        try:
            with torch.no_grad(), warnings.catch_warnings():
                warnings.simplefilter("ignore")  # torch's own, about itself
                compiled(*(_any_size(tensor.made()) for tensor in like))
        except Exception as error:
            cls.missing = True
            warnings.warn(
                f"dtrain's kernels run uncompiled, several times slower, as torch.compile failed: "
                f"{' '.join(str(error).split()[:40])} (DTRAIN_COMPILE=never does not try)",
                RuntimeWarning, stacklevel=2,
            )  # fmt: skip
            return eager
        return compiled


def _options(device: torch.device) -> dict[str, str | int | bool | Callable[..., object]] | None:
    """Inductor's for ``device``; None where what it compiles would have other bits than eager code."""
    if device.type == "cpu":
        return {}
    return dict.fromkeys(AS_EAGER, True) if compiles_with(AS_EAGER) else None


def _keep_cache_private() -> None:
    """Have torch cache compiled code where no other user writes; its own choice is /tmp/torchinductor_NAME.

    Another user who makes that folder first could have this one run code that lies in it.
    """
    home = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "dtrain" / "inductor"
    for folder in (Path(os.environ.get(CACHE) or default_cache_folder()), home):
        with contextlib.suppress(OSError):
            folder.mkdir(mode=0o700, parents=True, exist_ok=True)
            status = folder.stat()
            if status.st_uid == os.geteuid() and not status.st_mode & 0o022:
                os.environ[CACHE] = str(folder)
                return
    os.environ[CACHE] = tempfile.mkdtemp(prefix="dtrain-inductor-")


def _any_size(tensor: Tensor) -> Tensor:
    """``tensor``, marked so that code compiled for it serves any number of rows and blocks, but not of elements."""
    for dim in range(tensor.dim() - 1):
        mark_any_size(tensor, dim)
    return tensor


_KERNELS: list[Kernel] = []


def kernel(function: Callable[..., None]) -> Kernel:
    """Make a function of tensors a `Kernel`."""
    wrapped = Kernel(function)
    _KERNELS.append(wrapped)
    return wrapped


def compile_what_is_due() -> None:
    """Compile the kernels that have been used enough. Call it where no other thread traces."""
    for registered in _KERNELS:
        registered.compile_what_is_due()


def _policy() -> str:
    return os.environ.get("DTRAIN_COMPILE", "auto")


# ---- rows in blocks, codes in bytes ----------------------------------------------------------------------------------


def checked_block(block: int) -> int:
    """``block``, or ``ValueError`` where it is not a positive number of elements."""
    if not isinstance(block, int) or isinstance(block, bool) or block < 1:
        raise ValueError(f"block is {block!r}; give a positive number of elements, for example 512")
    return block


def to_blocks(rows: Tensor, block: int) -> Tensor:
    """``rows`` [m, width] as [m, blocks, block]; the last block is padded with zeros. A view where it fits."""
    missing = -rows.shape[1] % block
    padded = F.pad(rows, (0, missing)) if missing else rows
    return padded.reshape(rows.shape[0], padded.shape[1] // block, block)


def scaled(blocks: Tensor, scale: Tensor) -> Tensor:
    """``blocks / scale``; a block of scale zero stays zero instead of becoming NaN, and NaN stays NaN."""
    return blocks / torch.where(scale == 0, 1.0, scale)


def pack_bits(codes: Tensor, bits: int) -> Tensor:
    """``codes`` [..., width] uint8 below 2^bits as [..., ceil(width * bits / 8)] bytes.

    1, 2 and 4 bits: the row is cut into 8 / bits planes of one size, the first in the lowest bits of each byte, which
    needs no gather. Other widths: eight codes one after the other, the first code lowest.
    """
    if bits == 8:
        return codes
    width = codes.shape[-1]
    if 8 % bits == 0:
        planes = 8 // bits
        size = -(-width // planes)
        padded = F.pad(codes, (0, planes * size - width)) if width % planes else codes
        packed = padded[..., :size]
        for plane in range(1, planes):
            packed = packed | (padded[..., plane * size : (plane + 1) * size] << (bits * plane))
        return packed
    groups = F.pad(codes, (0, -width % 8)).unflatten(-1, (-(-width // 8), 8))  # 8 codes fill `bits` bytes
    shifts = torch.arange(0, 8 * bits, bits, device=codes.device)
    words = (groups.to(torch.int64) << shifts).sum(-1)
    octets: Tensor = (words.unsqueeze(-1) >> torch.arange(0, 8 * bits, 8, device=codes.device)) & 0xFF
    return octets.to(torch.uint8).flatten(-2)[..., : -(-width * bits // 8)]


def unpack_bits(packed: Tensor, bits: int, width: int) -> Tensor:
    """Undo `pack_bits`: ``codes`` [..., width] uint8."""
    if bits == 8:
        return packed
    if 8 % bits == 0:
        planes = [(packed >> (bits * plane)) & (2**bits - 1) for plane in range(8 // bits)]
        return torch.cat(planes, dim=-1)[..., :width]
    groups = -(-width // 8)
    octets = F.pad(packed, (0, groups * bits - packed.shape[-1])).unflatten(-1, (groups, bits))
    shifts = torch.arange(0, 8 * bits, 8, device=packed.device)
    words = (octets.to(torch.int64) << shifts).sum(-1)
    codes: Tensor = (words.unsqueeze(-1) >> torch.arange(0, 8 * bits, bits, device=packed.device)) & (2**bits - 1)
    return codes.to(torch.uint8).flatten(-2)[..., :width]


def pack_blocks(codes: Tensor, bits: int, block: int) -> Tensor:
    """`pack_bits` block by block, then of the rest, so that all of a block's bytes lie together.

    Compiled code then goes over a block once, from its scale to its bytes.
    """
    packed = codes.new_empty(codes.shape[0], packed_bytes(codes.shape[1], bits, block))

    def run(codes: Tensor, packed: Tensor) -> None:
        packed.copy_(pack_bits(codes, bits))

    by_blocks(run, [(codes, 1, 1), (packed, bits, 8)], codes.shape[1], block)
    return packed


def unpack_blocks(packed: Tensor, bits: int, block: int, width: int) -> Tensor:
    """Undo `pack_blocks`: ``codes`` [m, width] uint8."""
    codes = packed.new_empty(packed.shape[0], width)

    def run(packed: Tensor, codes: Tensor) -> None:
        codes.copy_(unpack_bits(packed, bits, codes.shape[-1]))

    by_blocks(run, [(packed, bits, 8), (codes, 1, 1)], width, block)
    return codes


def packed_bytes(width: int, bits: int, block: int) -> int:
    """Bytes of a row of ``width`` codes that `pack_blocks` packed; each block begins at a byte.

    >>> packed_bytes(1000, bits=4, block=512), packed_bytes(10, bits=3, block=4)
    (500, 5)
    """
    return width // block * bytes_of(block, bits, 8) + bytes_of(width % block, bits, 8)


def bytes_of(elements: int, numerator: int, denominator: int) -> int:
    """``elements * numerator / denominator``, rounded up."""
    return -(-elements * numerator // denominator)


Laid: TypeAlias = tuple[Tensor, int, int]
"""A tensor of rows, and how many of its elements belong to one element of a block: a fraction; (0, n) for n a block."""


def by_blocks(run: Callable[..., None], tensors: Sequence[Laid], width: int, block: int) -> None:
    """Call ``run`` on rows of ``width`` elements cut into blocks: first on all whole blocks, then on the rest.

    It gets views [m, blocks, elements of one], in the order of ``tensors``, and writes into some of them.
    """
    offsets = [0] * len(tensors)
    for count, size in ((width // block, block), (1, width % block)):
        if not count or not size:
            continue
        views = []
        for number, (tensor, numerator, denominator) in enumerate(tensors):
            elements = bytes_of(size, numerator, denominator) if numerator else denominator
            view = tensor.narrow(1, offsets[number], count * elements)
            offsets[number] += count * elements
            views.append(view.view(-1, count, elements))
        run(*views)
