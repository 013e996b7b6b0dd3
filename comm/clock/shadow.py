"""Shadows: tensors of any size without memory, on which methods run as they are.

A shadow has a shape, a dtype and the moment at which it is ready. What torch computes of shadows is a shadow; its shape
comes from torch's meta kernels, once for each function and shapes. A number (0-dim) is a real tensor, of one: it
is finite and positive, so a method that asks whether it may go on, goes on. Real tensors (votes, digests, counters)
stay real, so decisions about them are those of a run. Within `shadows` torch makes shadows where it is asked for large
new tensors.
"""

from __future__ import annotations

from collections.abc import Callable, Hashable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any, ClassVar

import torch
from torch import Tensor
from torch.overrides import TorchFunctionMode

from dtrain.comm.clock.times import NEVER_LATE, Times, latest
from dtrain.comm.torch_private import as_subclass, without_subclasses

LARGEST_REAL = 1 << 16
"""Elements of a new tensor up to which it has values: votes of 65,000 ranks do."""
LARGEST_LIST = 1 << 12
"""Elements of a shadow up to which it may be read, as ones."""

FACTORIES = {
    torch.empty, torch.zeros, torch.ones, torch.full, torch.rand, torch.randn, torch.arange, torch.randperm,
    torch.randint, torch.empty_strided,
}  # fmt: skip
VIEWS = frozenset({
    "view", "view_as", "reshape", "narrow", "split", "chunk", "unbind", "expand", "expand_as", "unsqueeze", "squeeze",
    "flatten", "unflatten", "t", "transpose", "permute", "select", "detach", "diagonal", "contiguous", "movedim", "T",
})  # fmt: skip
"""Functions that move no memory. (Indexing is one if it is by numbers and slices.)"""
READS = frozenset({"item", "__float__", "__int__", "__bool__", "tolist", "numpy", "__array__"})
IN_PLACE = frozenset({
    "__setitem__", "__iadd__", "__isub__", "__imul__", "__itruediv__", "__ior__", "__iand__", "__ixor__",
})  # fmt: skip


class ValuesNeeded(RuntimeError):
    """A method reads values, which a shadow does not have."""


class Moment:
    """When a tensor, and all views of it, are ready."""

    __slots__ = ("ready",)

    def __init__(self, ready: Times) -> None:
        self.ready = ready


class Traffic:
    """Bytes of memory that arithmetic has read and written since they were last asked for."""

    def __init__(self) -> None:
        self.bytes = 0

    def taken(self) -> int:
        """The bytes since the last call."""
        bytes_, self.bytes = self.bytes, 0
        return bytes_


TRAFFIC = Traffic()


class Shadow(Tensor):
    """See the module's docstring. ``like``: a meta tensor of its shape; ``moment``: when it is ready."""

    is_shadow: ClassVar[bool] = True
    like: Tensor
    moment: Moment

    @property
    def shape(self) -> torch.Size:  # type: ignore[override]
        return self.like.shape

    @property
    def dtype(self) -> torch.dtype:  # type: ignore[override]
        return self.like.dtype

    @property
    def device(self) -> torch.device:  # type: ignore[override]
        return CPU

    def numel(self) -> int:
        return self.like.numel()

    def meet(self, tensors: Sequence[Tensor]) -> None:
        """One pass over ``tensors``: all of them are ready when the last of them is."""
        _meet(tensors)

    def __repr__(self, **_: object) -> str:  # type: ignore[override]
        return f"shadow(shape={list(self.shape)}, dtype={self.dtype}, ready={self.moment.ready})"

    @classmethod
    def __torch_function__(
        cls,
        func: Callable[..., Any],
        types: object,
        args: tuple[Any, ...] = (),
        kwargs: Mapping[str, Any] | None = None,
    ) -> Any:
        with without_subclasses():
            return _call(func, args, {} if kwargs is None else kwargs)


CPU = torch.device("cpu")
META = torch.device("meta")


def shadow(numel: int, dtype: torch.dtype = torch.float32, ready: Times = NEVER_LATE) -> Shadow:
    """A flat shadow of ``numel`` elements.

    >>> x = shadow(10**12, ready=2.0)
    >>> (x.view(1000, -1) + 1).sum(0)
    shadow(shape=[1000000000], dtype=torch.float32, ready=2.0)
    """
    like = _FLAT.get((numel, dtype))
    if like is None:
        like = _FLAT[numel, dtype] = torch.empty(numel, dtype=dtype, device=META)
    return _made(like, Moment(ready))


def ready(tensors: Iterable[Tensor]) -> Times:
    """When the last of ``tensors`` is ready."""
    return latest(*(tensor.moment.ready for tensor in tensors if isinstance(tensor, Shadow)))


def delayed(tensors: Sequence[Tensor], moment: Times) -> tuple[Tensor, ...]:
    """``tensors``, ready at ``moment``."""
    return tuple(_made(t.like, Moment(moment)) if isinstance(t, Shadow) else t for t in tensors)


class _Factories(TorchFunctionMode):
    def __torch_function__(
        self, func: Callable[..., Any], types: Sequence[type], args: tuple[Any, ...] = (),
        kwargs: Mapping[str, Any] | None = None,
    ) -> Any:  # fmt: skip
        kwargs = {} if kwargs is None else kwargs
        if func in FACTORIES:
            with without_subclasses():
                made = _factory(func, args, kwargs)
            if made is not None:
                return made
        result = func(*args, **kwargs)
        # A kernel that fills it may run on shadows, and write nothing: what lies there may be NaN, and end a round.
        return result.zero_() if func in (torch.empty, torch.empty_strided, Tensor.new_empty) else result


@contextmanager
def shadows() -> Iterator[None]:
    """A block in which new tensors of more than `LARGEST_REAL` elements are shadows."""
    with _Factories():
        yield


# ---- how they are computed -------------------------------------------------------------------------------------------

_FLAT: dict[tuple[int, torch.dtype], Tensor] = {}
"""Flat meta tensors by size."""
_SHAPES: dict[Hashable, Any] = {}
"""What a function returns for arguments of these shapes: meta tensors, in their containers."""


def _call(func: Callable[..., Any], args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> Any:
    name = func.__name__
    if name in READS:
        return _read(name, args[0])
    if name == "equal":
        return True
    if name == "__iter__":
        return iter(_call(Tensor.unbind, args, {}))
    if name == "cpu":
        return args[0]
    tensors = list(_tensors(args)) + list(_tensors(kwargs.values()))
    if name in IN_PLACE or (name[-1] == "_" and name[-2] != "_"):
        _meet(tensors)
        return None if name == "__setitem__" else args[0]
    key = (func, _key(args), _key(tuple(kwargs.items())) if kwargs else None)
    try:
        template = _SHAPES[key]
    except KeyError:
        template = _SHAPES[key] = _inferred(func, args, kwargs)
    is_view = name in VIEWS or (name == "__getitem__" and not _is_gather(args[1]))
    if is_view and isinstance(args[0], Shadow):
        return _filled(template, args[0].moment, tensors)
    moment = Moment(ready(tensors))
    result = _filled(template, moment, tensors)
    if name != "__get__":
        TRAFFIC.bytes += sum(map(_bytes, tensors)) + sum(map(_bytes, _tensors((result,))))
    return result


def _factory(func: Callable[..., Any], args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> Shadow | None:
    key = (func, _key(args), _key(tuple((k, v) for k, v in kwargs.items() if k != "generator")))
    if key not in _SHAPES:
        _SHAPES[key] = _inferred(func, args, {k: v for k, v in kwargs.items() if k != "generator"} | {"device": META})
    meta = _SHAPES[key]
    return _made(meta, Moment(NEVER_LATE)) if meta.numel() > LARGEST_REAL else None


def _inferred(func: Callable[..., Any], args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> Any:
    """What ``func`` returns for meta tensors in place of shadows and real ones."""
    seen: list[Tensor] = []

    def meta(value: Any) -> Any:
        if isinstance(value, Shadow):
            seen.append(value.like)
            return value.like
        if isinstance(value, Tensor):
            seen.append(torch.empty_strided(value.shape, value.stride(), dtype=value.dtype, device=META))
            return seen[-1]
        if isinstance(value, torch.device):
            return META
        if isinstance(value, list | tuple):
            return type(value)(map(meta, value))
        return value

    with torch.no_grad():
        try:
            result = func(*meta(args), **{name: meta(value) for name, value in kwargs.items()})
        except NotImplementedError as error:
            raise ValuesNeeded(
                f"{func.__name__} of a tensor without values: its result depends on them. The function that calls it "
                "needs a rule, see dtrain.comm.shadowed"
            ) from error
    number = next((number for number, tensor in enumerate(seen) if result is tensor), None)
    return result if number is None else _Argument(number)


class _Argument:
    """A function that returns its own argument: the ``number``-th tensor that it was given."""

    def __init__(self, number: int) -> None:
        self.number = number


def _filled(template: Any, moment: Moment, tensors: list[Tensor]) -> Any:
    """The result of a call from its ``template``."""
    if isinstance(template, Tensor):
        if not template.dim():
            return torch.ones(template.shape, dtype=template.dtype)
        return _made(template, moment)
    if isinstance(template, _Argument):
        return tensors[template.number]
    if isinstance(template, list | tuple) and any(isinstance(item, Tensor) for item in template):
        filled = [_filled(item, moment, tensors) if isinstance(item, Tensor) else item for item in template]
        return type(template)(filled)
    return template


def _made(like: Tensor, moment: Moment) -> Shadow:
    made: Shadow = as_subclass(Shadow, like)
    made.like, made.moment = like, moment
    return made


def _read(name: str, value: Tensor) -> Any:
    if value.numel() > LARGEST_LIST:
        raise ValuesNeeded(
            f"a method reads the values of {list(value.shape)} elements, and in a simulation they have none; the "
            "function that reads them needs a rule, see dtrain.comm.shadowed"
        )
    return getattr(torch.ones(value.shape, dtype=value.dtype), name)()


def _meet(tensors: Sequence[Tensor]) -> None:
    moment = ready(tensors)
    for tensor in tensors:
        if isinstance(tensor, Shadow):
            tensor.moment.ready = moment
    TRAFFIC.bytes += sum(map(_bytes, tensors))


def _bytes(tensor: Tensor) -> int:
    return tensor.numel() * tensor.dtype.itemsize


def _tensors(values: Iterable[Any]) -> Iterator[Tensor]:
    for value in values:
        if isinstance(value, Tensor):
            yield value
        elif isinstance(value, list | tuple):
            yield from _tensors(value)


def _is_gather(index: Any) -> bool:
    """Whether an index copies elements."""
    return any(isinstance(part, Tensor | list) for part in (index if isinstance(index, tuple) else (index,)))


def _key(value: Any) -> Hashable:
    if isinstance(value, Shadow):
        like = value.like
        return like.shape, like.stride(), like.dtype
    if isinstance(value, Tensor):
        return value.shape, value.stride(), value.dtype
    if isinstance(value, list | tuple):
        return tuple(map(_key, value))
    if isinstance(value, slice):
        return "slice", value.start, value.stop, value.step
    return type(value), value
