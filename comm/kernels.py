"""Kernels that are compiled where it pays, from the definition that also runs eagerly.

A kernel is a function of tensors [rows, blocks, elements] that writes its results into the last of them.
`torch.compile` makes one pass over memory of it, vectorized C++ on CPU and Triton on GPU; both ways give the same bits
(tests/comm/test_kernels.py).

Compiling takes seconds, so small tensors never ask for it, and larger ones only once as many elements have gone through
eagerly as take about that long. It happens in `compile_what_is_due`, on the thread that calls it (a sync does between
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
from collections.abc import Callable, Hashable
from dataclasses import dataclass
from pathlib import Path
from typing import TypeAlias

import torch
from torch import Tensor

Constant: TypeAlias = int | float | bool | None
"""What a kernel is made for, other than tensors."""
SMALLEST = 1 << 16
"""Elements of a first argument from which a compiled kernel is used: below, starting it costs what it saves."""
WORTHWHILE = 1 << 28
"""Elements that go through eagerly before a kernel is compiled: some five seconds of one core, as compiling takes."""
CACHE = "TORCHINDUCTOR_CACHE_DIR"


@dataclass(frozen=True)
class _Like:
    """How an argument lies in memory; enough to make another one."""

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
    """A kernel; call it like the function. Keyword arguments are constants of what is compiled."""

    def __init__(self, function: Callable[..., None]) -> None:
        self.function = function
        self.__name__, self.__doc__ = function.__name__, function.__doc__
        self.compiled: dict[Hashable, Callable[..., None]] = {}
        self._seen: dict[Hashable, int] = {}
        self._due: dict[Hashable, tuple[dict[str, Constant], list[_Like]]] = {}

    def __call__(self, *tensors: Tensor, **constants: Constant) -> None:
        elements, always = tensors[0].numel(), _policy() == "always"
        if elements < SMALLEST and not always:
            self.function(*tensors, **constants)
            return
        shapes = [(tensor.dtype, tensor.shape[0] == 1, tensor.shape[-1]) for tensor in tensors]
        variant = (*constants.items(), *shapes, tensors[0].device)
        if always and variant not in self.compiled:
            self._compile(variant, constants, [_Like.of(tensor) for tensor in tensors])
        found = self.compiled.get(variant)
        if found is not None:
            with torch.no_grad():
                found(*tensors)
            return
        self._seen[variant] = self._seen.get(variant, 0) + elements
        enough = 0 if _policy() == "early" else WORTHWHILE
        if self._seen[variant] >= enough and variant not in self._due:
            self._due[variant] = (constants, [_Like.of(tensor) for tensor in tensors])
        self.function(*tensors, **constants)

    def compile_what_is_due(self) -> None:
        """Compile what has been used enough. Nothing happens where there is no compiler, which is said once."""
        if not self._due or _policy() == "never":
            return
        for variant, (constants, like) in list(self._due.items()):  # flows on other threads add to it meanwhile
            if variant not in self.compiled:
                self._compile(variant, constants, like)

    def _compile(self, variant: Hashable, constants: dict[str, Constant], like: list[_Like]) -> None:
        self.compiled[variant] = _Compiler.compile(self.function, constants, like)


class _Compiler:
    """torch's, until it turns out that there is none."""

    missing = False

    @classmethod
    def compile(
        cls, function: Callable[..., None], constants: dict[str, Constant], like: list[_Like]
    ) -> Callable[..., None]:
        """``function`` with ``constants``, compiled for tensors of any size that lie as ``like``, or as it is."""

        def eager(*tensors: Tensor) -> None:
            function(*tensors, **constants)

        if cls.missing:
            return eager
        # A code object of its own: torch counts compilations by code object, and stops after eight.
        own = types.FunctionType(
            function.__code__.replace(co_name=f"{function.__name__}_{'_'.join(map(str, constants.values()))}"),
            function.__globals__, function.__name__,
        )  # fmt: skip
        own.__kwdefaults__ = dict(constants)
        _keep_cache_private()
        compiled = torch.compile(own, fullgraph=True)
        try:
            with torch.no_grad(), warnings.catch_warnings():
                warnings.simplefilter("ignore")  # torch's own, about itself
                compiled(*(_any_size(each.made()) for each in like))
        except Exception as error:
            cls.missing = True
            warnings.warn(
                f"dtrain's kernels run uncompiled, several times slower, as torch.compile failed: "
                f"{str(error).strip().splitlines()[0]} (DTRAIN_COMPILE=never does not try)",
                RuntimeWarning, stacklevel=2,
            )  # fmt: skip
            return eager
        return compiled


def _keep_cache_private() -> None:
    """Have torch keep compiled code where nobody else writes; its own choice is /tmp/torchinductor_NAME.

    Whoever makes that folder first could have others run what lies in it.
    """
    from torch._inductor.runtime.cache_dir_utils import default_cache_dir

    home = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "dtrain" / "inductor"
    for folder in (Path(os.environ.get(CACHE) or default_cache_dir()), home):
        with contextlib.suppress(OSError):
            folder.mkdir(mode=0o700, parents=True, exist_ok=True)
            about = folder.stat()
            if about.st_uid == os.geteuid() and not about.st_mode & 0o022:
                os.environ[CACHE] = str(folder)
                return
    os.environ[CACHE] = tempfile.mkdtemp(prefix="dtrain-inductor-")


def _any_size(tensor: Tensor) -> Tensor:
    """``tensor``, marked so that what is compiled for it serves other numbers of rows and blocks; not of elements."""
    for dim in range(tensor.dim() - 1):
        torch._dynamo.maybe_mark_dynamic(tensor, dim)
    return tensor


_KERNELS: list[Kernel] = []


def kernel(function: Callable[..., None]) -> Kernel:
    """Make a function of tensors a `Kernel`."""
    made = Kernel(function)
    _KERNELS.append(made)
    return made


def compile_what_is_due() -> None:
    """Compile the kernels that have been used enough. Call it where no other thread traces."""
    for each in _KERNELS:
        each.compile_what_is_due()


def _policy() -> str:
    return os.environ.get("DTRAIN_COMPILE", "auto")
