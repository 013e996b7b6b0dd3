"""One replica's unsharded parameters in fp32: for a file that any program can load, and for a digest that tests
compare.

Exported is the anchor ("sync.anchor") of each parameter that has one, else the parameter itself, of replica 0.
"""

from __future__ import annotations

import hashlib
import json
import math
from collections.abc import Mapping
from pathlib import Path

import torch
from torch import Tensor

from dtrain.comm.layout import Segment
from dtrain.errors import CheckpointError
from dtrain.train.checkpoint import folders, tensors
from dtrain.train.checkpoint.manifest import read_manifest
from dtrain.train.checkpoint.read import Files, assemble
from dtrain.train.checkpoint.state import BUFFERS

PARAMETERS = "parameters"
ANCHOR = "sync.anchor"


def full_parameters(path: Path, section: str | None = None) -> dict[str, Tensor]:
    """Map fqn -> fp32 tensor in its unsharded shape, FQN-sorted, from step folder ``path``.

    Without ``section``: "sync.anchor" where a parameter is in it, else "parameters". A tied parameter appears once.

    Raises CheckpointError for damage, or if a parameter is in none of the sections.
    """
    manifest = read_manifest(path)
    wanted = {fqn: Segment(fqn, 0, math.prod(shape)) for fqn, shape in sorted(manifest.shapes.items())}
    with Files(path, manifest) as files:
        flat: dict[str, Tensor] = {}
        for name in (ANCHOR, PARAMETERS) if section is None else (section,):
            left = {fqn: segment for fqn, segment in wanted.items() if fqn not in flat}
            flat |= assemble(files, name, left, replica=0)
    if flat.keys() != wanted.keys():
        lost = sorted(wanted.keys() - flat.keys())
        raise CheckpointError(f"{path}: no values of {lost[:5]} in section {section or PARAMETERS!r}")
    return {fqn: flat[fqn].float().reshape(shape) for fqn, shape in sorted(manifest.shapes.items())}


def full_buffers(path: Path) -> dict[str, Tensor]:
    """The persistent buffers of replica 0 in step folder ``path``, in their own dtype."""
    manifest = read_manifest(path)
    first = manifest.files[0]
    with Files(path, manifest) as files:
        return {name: files.whole(first.rank, BUFFERS, name) for name in first.sections.get(BUFFERS, {})}


def digest(named_tensors: Mapping[str, Tensor]) -> str:
    """SHA-256 (hex) of named tensors in fp32: equal digests mean bitwise equal parameters.

    The hashed bytes are, for each tensor in the order of its name (by code point): the name in UTF-8, a NUL byte, the
    shape as decimal numbers joined by "x" (nothing for a 0-dim tensor), a NUL byte, the elements as little-endian
    fp32 in row-major order.

    >>> by_hand = b"w" + bytes([0]) + b"2x1" + bytes([0]) + bytes(8)
    >>> digest({"w": torch.zeros(2, 1)}) == hashlib.sha256(by_hand).hexdigest()
    True
    """
    sha = hashlib.sha256()
    for fqn, tensor in sorted(named_tensors.items()):
        shape = "x".join(str(length) for length in tensor.shape)
        sha.update(f"{fqn}\0{shape}\0".encode())
        flat = tensor.detach().to("cpu", torch.float32).reshape(-1).contiguous()
        sha.update(flat.numpy().astype("<f4", copy=False).data)
    return sha.hexdigest()


def export(path: Path, out: Path) -> str:
    """Write the parameters of step folder ``path`` to the safetensors file ``out``; returns their `digest`.

    The file appears atomically. Buffers (replica 0's) are in it too, in their own dtype, so that it loads as a state
    dict; they are not part of the digest. Its metadata hold the step, the digest, that of all tensors, and the model's
    ``meta``.

    Raises CheckpointError as `full_parameters`, or if a buffer has a parameter's name.
    """
    manifest = read_manifest(path)
    parameters, buffers = full_parameters(path), full_buffers(path)
    if both := sorted(parameters.keys() & buffers.keys()):
        raise CheckpointError(f"{path}: these are parameters and buffers: {both[:5]}")
    parameters_digest = digest(parameters)
    out.parent.mkdir(parents=True, exist_ok=True)
    partial = out.with_name(out.name + ".partial")
    values = {name: tensor.contiguous() for name, tensor in {**parameters, **buffers}.items()}
    metadata = {
        "format": "pt",
        "step": str(manifest.step),
        tensors.PARAMETERS_DIGEST: parameters_digest,
        tensors.DIGEST: tensors.tensors_digest(values),
        tensors.META: json.dumps(manifest.meta),
    }
    tensors.save(partial, values, metadata)
    partial.rename(out)
    folders.sync_folder(out.parent)
    return parameters_digest
