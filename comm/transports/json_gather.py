"""All-gather of small values as JSON: torch's object collectives would unpickle whatever arrives.

Communication: an all-gather of 8 bytes, and one of the longest text.
"""

from __future__ import annotations

import json
from typing import TypeVar

import torch
import torch.distributed as dist

from dtrain.comm.torch_private import device_of_objects

T = TypeVar("T")

MOST_BYTES = 1 << 24


def gather_json(value: T, group: dist.ProcessGroup | None = None) -> list[T]:
    """The ``value`` of each rank of ``group``, in rank order: text, numbers, None, lists and dictionaries of them.

    All ranks call it, with values of one kind. Raises ``TypeError`` for a value that JSON cannot hold, ``RuntimeError``
    for one that is longer than 16 MiB or arrives as invalid JSON.
    """
    text = json.dumps(value).encode()
    device = device_of_objects(group)
    if device.type == "cuda":
        device = torch.device("cuda", torch.cuda.current_device())
    world = dist.get_world_size(group)
    length = torch.tensor([len(text)], device=device)
    lengths = torch.zeros(world, 1, dtype=length.dtype, device=device)
    dist.all_gather(list(lengths.unbind()), length, group=group)
    sizes = lengths.flatten().tolist()
    if not all(0 < size <= MOST_BYTES for size in sizes):
        raise RuntimeError(f"ranks say that their texts have {sizes} bytes; at most {MOST_BYTES} are taken")
    sent = torch.zeros(max(sizes), dtype=torch.uint8)
    sent[: len(text)] = torch.frombuffer(bytearray(text), dtype=torch.uint8)
    rows = torch.zeros(world, max(sizes), dtype=torch.uint8, device=device)
    dist.all_gather(list(rows.unbind()), sent.to(device), group=group)
    received = [row[:size].numpy().tobytes() for row, size in zip(rows.cpu(), sizes, strict=True)]
    try:
        return [json.loads(data) for data in received]
    except (ValueError, RecursionError) as error:
        raise RuntimeError(f"a rank has sent what is no JSON ({error})") from error
