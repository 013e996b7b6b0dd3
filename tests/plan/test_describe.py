"""A description counts what a real pass does: FLOPs by a formula, saved bytes by hooks, the order of gradients."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

import pytest
import torch
from torch import Tensor, nn

from dtrain.errors import ModelError
from dtrain.plan.describe import Description, TensorSpec, describe
from dtrain.train.models.hf import causal_lm
from dtrain.train.models.transformer import Transformer
from tests.hf_models import tiny_gpt2, tiny_llama

VOCAB, DIM, LAYERS, LENGTH, BATCH = 96, 32, 3, 16, 2
SPECS = {name: TensorSpec((BATCH, LENGTH), torch.int64) for name in ("input", "target")}


def build() -> Transformer:
    return Transformer(vocab_size=VOCAB, dim=DIM, layers=LAYERS, heads=4, max_length=LENGTH)


@pytest.fixture(scope="module")
def plain() -> Description:
    return describe(build, SPECS, tokens=BATCH * LENGTH)


def test_parameters_are_those_of_the_model_in_its_order(plain: Description) -> None:
    real = {name: tuple(p.shape) for name, p in build().named_parameters()}
    assert {p.fqn: p.shape for p in plain.parameters} == real
    assert [p.fqn for p in plain.parameters] == list(real)
    assert [layer.name for layer in plain.layers] == ["", "blocks.0", "blocks.1", "blocks.2"]
    assert sum(len(layer.parameters) for layer in plain.layers) == len(real)


def test_flops_are_those_of_the_matrix_products(plain: Description) -> None:
    tokens = BATCH * LENGTH
    matrices = sum(p.numel for p in plain.parameters if len(p.shape) == 2 and p.fqn != "embedding.weight")
    attention = LAYERS * 2 * 2 * BATCH * LENGTH * LENGTH * DIM  # scores, and values by them
    assert plain.forward_flops == 2 * tokens * matrices + attention
    assert plain.backward_flops == 4 * tokens * matrices + 5 * attention // 2  # flash attention forms scores again


def saved_bytes(model: nn.Module, batch: Mapping[str, Tensor]) -> int:
    """By torch's own hooks, over storages that are no parameters."""
    own = {p.untyped_storage().data_ptr() for p in model.parameters()}
    own |= {tensor.untyped_storage().data_ptr() for tensor in batch.values()}
    sizes: dict[int, int] = {}
    kept = []

    def pack(tensor: Tensor) -> Tensor:
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in own:
            sizes[storage.data_ptr()] = storage.nbytes()
            kept.append(tensor)
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        model(batch)
    return sum(sizes.values())


def test_activations_are_what_autograd_saves(plain: Description) -> None:
    batch = {name: torch.zeros(spec.shape, dtype=spec.dtype) for name, spec in SPECS.items()}
    saved = saved_bytes(build(), batch)
    assert plain.activation_bytes == pytest.approx(saved, rel=0.02)


def test_checkpointing_keeps_inputs_of_blocks_and_recomputes(plain: Description) -> None:
    short = describe(build, SPECS, checkpointed=True)
    by_name = {layer.name: layer for layer in short.layers}
    assert by_name["blocks.1"].activation_bytes == BATCH * LENGTH * DIM * 4
    assert short.forward_flops == plain.forward_flops
    assert plain.backward_flops < short.backward_flops < plain.backward_flops + plain.forward_flops
    assert short.gradients == plain.gradients


def test_gradients_come_in_the_order_of_a_real_backward_pass(plain: Description) -> None:
    model, order = build(), list[str]()
    for name, parameter in model.named_parameters():
        parameter.register_post_accumulate_grad_hook(lambda p, name=name: order.append(name))
    model({name: torch.zeros(spec.shape, dtype=spec.dtype) for name, spec in SPECS.items()}).backward()
    assert list(plain.gradients) == order


@pytest.mark.parametrize("casts", ["autocast", "model"])
def test_bf16_halves_most_of_the_activations(plain: Description, casts: str) -> None:
    half = describe(build, SPECS, casts=casts)  # type: ignore[arg-type]
    assert half.activation_bytes < plain.activation_bytes
    assert all(p.dtype == (torch.bfloat16 if casts == "model" else torch.float32) for p in half.parameters)


@pytest.mark.parametrize("write", [tiny_llama, tiny_gpt2])
def test_models_of_transformers_from_their_config(tmp_path: Path, write: object) -> None:
    folder = write(tmp_path)  # type: ignore[operator]
    for file in folder.glob("*.safetensors"):
        file.unlink()  # nothing but config.json is read
    found = describe(lambda: causal_lm(path=str(folder), weights=False), SPECS)
    assert len([layer for layer in found.layers if layer.name]) == 2
    assert found.forward_flops > 0
    assert set(found.gradients) == {p.fqn for p in found.parameters if p.trained}


class Branching(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.linear = nn.Linear(4, 1)

    def forward(self, batch: Mapping[str, Tensor]) -> Tensor:
        loss: Tensor = self.linear(batch["x"]).mean()
        return loss if loss.item() > 0 else -loss


def test_a_model_that_needs_values_is_refused_in_words() -> None:
    with pytest.raises(ModelError, match=r"Branching could not be run without values.*cannot be planned"):
        describe(Branching, {"x": TensorSpec((2, 4), torch.float32)})


def test_frozen_parameters_have_no_gradient() -> None:
    def frozen() -> Transformer:
        model = build()
        model.embedding.requires_grad_(False)
        return model

    found = describe(frozen, SPECS)
    assert "embedding.weight" not in found.gradients
    assert found.trained_numel == found.numel - VOCAB * DIM
