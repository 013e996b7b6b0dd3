"""The transformer is causal, deterministic, and the same function however an engine runs it."""

from __future__ import annotations

import math
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import MixedPrecisionPolicy, fully_shard
from torch.nn.parallel import DistributedDataParallel
from torch.utils.checkpoint import checkpoint

from dtrain.train.models.transformer import Transformer, rotary, rotate

SIZES = {"vocab_size": 50, "dim": 32, "layers": 2, "heads": 4, "max_length": 16}


def build(seed: int = 0, **changes: int | bool) -> Transformer:
    torch.manual_seed(seed)
    return Transformer(**(SIZES | changes))  # type: ignore[arg-type]


@pytest.fixture(autouse=True)
def _one_thread() -> Iterator[None]:
    """On a busy machine two threads wait for each other after every tiny matrix product: 20 s instead of 1."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


@pytest.fixture
def batch() -> dict[str, Tensor]:
    tokens = torch.randint(0, 50, (3, 17), generator=torch.Generator().manual_seed(5))
    return {"input": tokens[:, :-1], "target": tokens[:, 1:]}


def gradients(model: torch.nn.Module, batch: dict[str, Tensor]) -> dict[str, Tensor]:
    model.zero_grad()
    model(batch).backward()
    return {name: parameter.grad.clone() for name, parameter in model.named_parameters() if parameter.grad is not None}


@pytest.fixture
def one_rank(tmp_path: Path) -> Iterator[None]:
    """A process group of this process alone."""
    dist.init_process_group("gloo", init_method=f"file://{tmp_path}/store", rank=0, world_size=1)
    yield
    dist.destroy_process_group()


def test_the_loss_is_the_mean_cross_entropy_of_the_logits(batch: dict[str, Tensor]) -> None:
    model = build()
    expected = F.cross_entropy(model.logits(batch["input"]).reshape(-1, 50), batch["target"].reshape(-1))
    loss = model(batch)
    assert loss.dtype == torch.float32 and loss.shape == ()
    torch.testing.assert_close(loss, expected)
    assert loss.item() == pytest.approx(math.log(50), abs=0.1)  # nothing is known before training


@pytest.mark.parametrize("place", [0, 7, 15])
def test_a_token_changes_no_earlier_logits(batch: dict[str, Tensor], place: int) -> None:
    model, tokens = build(), batch["input"]
    changed = tokens.clone()
    changed[:, place] = (changed[:, place] + 1) % 50
    before, after = model.logits(tokens), model.logits(changed)
    torch.testing.assert_close(before[:, :place], after[:, :place])
    assert (before[:, place:] != after[:, place:]).any(dim=-1).all()


def test_shorter_texts_give_the_same_logits(batch: dict[str, Tensor]) -> None:
    model, tokens = build(), batch["input"]
    torch.testing.assert_close(model.logits(tokens)[:, :5], model.logits(tokens[:, :5]))


def test_rotated_products_depend_on_distances_alone() -> None:
    cos, sin = rotary(12, 8, torch.device("cpu"))
    generator = torch.Generator().manual_seed(1)
    query, key = torch.randn(8, generator=generator), torch.randn(8, generator=generator)
    queries, keys = rotate(query.expand(12, 8), cos, sin), rotate(key.expand(12, 8), cos, sin)
    products = queries @ keys.T
    for distance in range(-11, 12):
        diagonal = products.diagonal(distance)
        torch.testing.assert_close(diagonal, diagonal[:1].expand_as(diagonal))
    torch.testing.assert_close(queries.norm(dim=-1), query.norm().expand(12))
    assert products[0].unique().numel() == 12


def test_the_seed_fixes_the_parameters() -> None:
    first, again, other = build(3).state_dict(), build(3).state_dict(), build(4).state_dict()
    assert all(first[name].equal(again[name]) for name in first)
    assert not any(first[name].equal(other[name]) for name in first if first[name].dim() == 2)


def test_what_writes_into_the_residual_stream_starts_smaller() -> None:
    model = build(dim=256, layers=8)
    for name, parameter in model.named_parameters():
        if parameter.dim() == 1:
            assert parameter.eq(1).all()
        else:
            writes = name.endswith(("out.weight", "down.weight"))
            assert parameter.std().item() == pytest.approx(0.02 / 4 if writes else 0.02, rel=0.05), name


def test_the_width_of_the_feed_forward() -> None:
    for dim, hidden in [(32, 96), (96, 256), (128, 352), (384, 1024)]:
        assert build(dim=dim).state_dict()["blocks.0.feed_forward.down.weight"].shape == (dim, hidden)
    assert build(hidden=40).state_dict()["blocks.1.feed_forward.down.weight"].shape == (32, 40)


def test_tied_embeddings_are_one_parameter_with_both_gradients(batch: dict[str, Tensor]) -> None:
    tied, untied = build(tied_embeddings=True), build()
    names = set(dict(untied.named_parameters()))
    assert set(dict(tied.named_parameters())) == names - {"head.weight"}
    state = tied.state_dict()
    untied.load_state_dict(state | {"head.weight": state["embedding.weight"]})
    torch.testing.assert_close(tied(batch), untied(batch))
    apart = gradients(untied, batch)
    both = apart["embedding.weight"] + apart["head.weight"]
    torch.testing.assert_close(gradients(tied, batch)["embedding.weight"], both)


def test_every_parameter_has_a_gradient_and_there_are_no_buffers_and_no_biases(batch: dict[str, Tensor]) -> None:
    model = build()
    assert set(gradients(model, batch)) == set(dict(model.named_parameters()))
    assert not list(model.buffers())
    assert not [name for name, _ in model.named_parameters() if "bias" in name]


def test_activation_checkpointing_changes_nothing(batch: dict[str, Tensor]) -> None:
    model = build()
    plain = gradients(model, batch)
    for block in model.blocks:
        forward = block.forward
        block.forward = lambda x, forward=forward: checkpoint(forward, x, use_reentrant=False)
    again = gradients(model, batch)
    assert all(plain[name].equal(again[name]) for name in plain)


def test_the_whole_model_in_bf16_keeps_an_fp32_loss(batch: dict[str, Tensor]) -> None:
    exact = build()(batch)
    model = build().bfloat16()  # as DeepSpeed does
    loss = model(batch)
    assert loss.dtype == torch.float32
    torch.testing.assert_close(loss, exact, rtol=0.01, atol=0.0)
    assert {gradient.dtype for gradient in gradients(model, batch).values()} == {torch.bfloat16}


def test_positions_are_not_rounded_in_bf16() -> None:
    """Angles in bf16 would give positions 256 and 257 the same rotation."""
    seen = []

    class Spy(torch.overrides.TorchFunctionMode):
        def __torch_function__(self, function, types, args=(), kwargs=None):  # type: ignore[no-untyped-def]
            result = function(*args, **(kwargs or {}))
            if function is Tensor.cos:
                seen.append(result)
            return result

    model = build(max_length=258, layers=1).bfloat16()
    with Spy(), torch.no_grad():
        model.logits(torch.zeros(1, 258, dtype=torch.int64))
    assert len(seen) == 1 and seen[0].dtype == torch.float32
    assert not seen[0][256].equal(seen[0][257])


def test_ddp_with_autocast(one_rank: None, batch: dict[str, Tensor]) -> None:
    exact = gradients(build(), batch)
    model = DistributedDataParallel(build())
    with torch.autocast("cpu", dtype=torch.bfloat16):
        found = gradients(model, batch)
    for name, expected in exact.items():
        assert found[f"module.{name}"].dtype == torch.float32
        assert F.cosine_similarity(found[f"module.{name}"].flatten(), expected.flatten(), dim=0) > 0.99, name


@pytest.mark.parametrize("tied", [False, True])
@pytest.mark.parametrize("dtype", [None, torch.bfloat16])
def test_fsdp_block_by_block(one_rank: None, batch: dict[str, Tensor], dtype: torch.dtype | None, tied: bool) -> None:
    exact = gradients(build(tied_embeddings=tied), batch)
    model, mesh = build(tied_embeddings=tied), init_device_mesh("cpu", (1,))
    policy = MixedPrecisionPolicy(param_dtype=dtype, reduce_dtype=torch.float32)
    for block in model.blocks:
        fully_shard(block, mesh=mesh, mp_policy=policy)
    fully_shard(model, mesh=mesh, mp_policy=policy)
    loss = model(batch)
    assert loss.dtype == torch.float32
    loss.backward()
    for name, parameter in model.named_parameters():
        found = parameter.grad.full_tensor()  # type: ignore[union-attr]
        assert found.dtype == torch.float32
        if dtype is None:
            torch.testing.assert_close(found, exact[name])
        assert F.cosine_similarity(found.flatten(), exact[name].flatten(), dim=0) > 0.99, name


def test_it_learns_a_text_by_heart(batch: dict[str, Tensor]) -> None:
    model = build()
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2)
    for _ in range(60):
        optimizer.zero_grad()
        loss = model(batch)
        loss.backward()
        optimizer.step()
    assert loss.item() < 0.2


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"dim": 30}, "dim=30 does not divide into 4 heads .* dim=32 would"),
        ({"dim": 4}, "dim=4 .* dim=8 would"),
        ({"layers": 0}, "layers is 0"),
        ({"heads": 0}, "heads is 0"),
        ({"vocab_size": -1}, "vocab_size is -1"),
        ({"max_length": 0}, "max_length is 0"),
        ({"hidden": -1}, "hidden is -1"),
    ],
)
def test_sizes_that_do_not_fit_are_refused(changes: dict[str, int], said: str) -> None:
    with pytest.raises(ValueError, match=said):
        build(**changes)


def test_a_text_that_is_too_long_is_refused() -> None:
    with pytest.raises(ValueError, match=r"length 17, .* max_length=16"):
        build().logits(torch.zeros(1, 17, dtype=torch.int64))
