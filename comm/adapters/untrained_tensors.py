"""Frozen parameters and buffers, made equal on all replicas at attach.

DistributedDataParallel does so when it is built; FSDP2 and plain modules do not, and random features drawn by each rank
would silently make every replica another model, for good.
Communication: 16 bytes of each replica. Where they differ also a hash of each tensor, and a broadcast of those that do.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterator

import torch
from torch import Tensor, nn

from dtrain.comm.ops import AllGather, Broadcast, Flow, Place
from dtrain.comm.runtime.consistency import TENSOR_BYTES, fingerprint, plain

DIGEST_BYTES = 16


def untrained(model: nn.Module) -> Iterator[tuple[str, Tensor]]:
    """This rank's frozen parameters and buffers, in the model's own memory."""
    for name, parameter in model.named_parameters():
        if not parameter.requires_grad:
            yield from _here(name, getattr(parameter, "ds_tensor", parameter))  # this rank's partition under ZeRO 3
    for name, buffer in model.named_buffers():
        yield from _here(name, buffer)


def equalized(model: nn.Module, place: Place) -> Flow[list[str]]:
    """Copy replica 0's tensors to all replicas; returns the names of those that differed.

    Raises ``ValueError`` if they do not have the same frozen parameters and buffers.
    """
    tensors = list(untrained(model))
    hashes = [fingerprint(tensor) for _, tensor in tensors]
    layout = "\n".join(f"{name}: {tensor.dtype} {list(tensor.shape)}" for name, tensor in tensors).encode()
    rows = yield from _gathered(hashlib.blake2b(layout + b"".join(hashes), digest_size=DIGEST_BYTES).digest())
    if len(set(rows)) == 1:
        return []
    layouts = yield from _gathered(hashlib.blake2b(layout, digest_size=DIGEST_BYTES).digest())
    others = [rank for rank, row in enumerate(layouts) if row != layouts[place.rank]]
    if others:
        raise ValueError(
            f"replicas {others} have other frozen parameters or buffers than this one, which has {len(tensors)}; give "
            "all ranks the same model"
        )
    all_hashes = yield from _gathered(b"".join(hashes))
    differ = []
    for number, (name, tensor) in enumerate(tensors):
        digest = slice(number * TENSOR_BYTES, (number + 1) * TENSOR_BYTES)
        if len({row[digest] for row in all_hashes}) > 1:
            differ.append(name)
            raw = tensor.contiguous().reshape(-1).view(torch.uint8)
            (correct,) = yield Broadcast((raw,), 0)
            with torch.no_grad():
                tensor.copy_(correct.view(tensor.dtype).view(tensor.shape))
    return differ


def _here(name: str, tensor: Tensor) -> Iterator[tuple[str, Tensor]]:
    for inner, local in plain(name, tensor):
        if local.device.type != "meta" and local.layout == torch.strided and local.numel():
            yield inner, local


def _gathered(data: bytes) -> Flow[list[bytes]]:
    (rows,) = yield AllGather((torch.frombuffer(bytearray(data), dtype=torch.uint8),))
    return [bytes(row) for row in rows.tolist()]
