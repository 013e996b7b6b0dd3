"""Causal language models of transformers under dtrain's contract, and what is refused before anything is launched."""

from __future__ import annotations

import json
import re
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any, cast

import pytest
import torch
import torch.nn.functional as F

from dtrain.errors import ConfigError
from dtrain.train.config import compose, validate
from dtrain.train.models.hf import CausalLM, causal_lm
from dtrain.train.models.lora import LoRA
from tests.hf_models import tiny_gpt2, tiny_llama

transformers = pytest.importorskip("transformers")
peft = pytest.importorskip("peft")
save_file = pytest.importorskip("safetensors.torch").save_file
load_file = pytest.importorskip("safetensors.torch").load_file


@pytest.fixture(scope="module")
def llama(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny_llama(tmp_path_factory.mktemp("llama"))


@pytest.fixture(scope="module")
def gpt2(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny_gpt2(tmp_path_factory.mktemp("gpt2"))


TOKENS = torch.arange(34).reshape(2, 17) * 3
BATCH = {"input": TOKENS[:, :-1], "target": TOKENS[:, 1:]}


def test_the_loss_is_that_of_transformers(llama: Path) -> None:
    model = causal_lm(path=str(llama))
    theirs = transformers.AutoModelForCausalLM.from_pretrained(llama)
    assert torch.equal(model.logits(BATCH["input"]), theirs(input_ids=BATCH["input"]).logits)
    # transformers shifts the labels itself; the last target then has no place.
    expected = theirs(input_ids=TOKENS, labels=TOKENS).loss
    torch.testing.assert_close(model(BATCH), expected)
    torch.testing.assert_close(model({"input_ids": TOKENS, "labels": TOKENS}), expected)
    ignored = {**BATCH, "target": BATCH["target"].masked_fill(BATCH["target"] > 30, -100)}
    logits = theirs(input_ids=BATCH["input"]).logits.flatten(0, 1)
    torch.testing.assert_close(model(ignored), F.cross_entropy(logits, ignored["target"].flatten()))


def test_weights_are_loaded_or_drawn_by_the_seed(llama: Path, gpt2: Path) -> None:
    for folder in (llama, gpt2):
        stored = load_file(folder / "model.safetensors")
        loaded = causal_lm(path=str(folder)).state_dict()
        assert all(torch.equal(loaded[f"lm.{name}"], tensor) for name, tensor in stored.items())
        drawn = []
        for seed in (0, 0, 1):
            torch.manual_seed(seed)
            drawn.append(torch.nn.utils.parameters_to_vector(causal_lm(path=str(folder), weights=False).parameters()))
        assert torch.equal(drawn[0], drawn[1]) and not torch.equal(drawn[0], drawn[2])


def test_on_the_meta_device_nothing_is_read(llama: Path) -> None:
    with torch.device("meta"):
        for model in (causal_lm(path=str(llama)), causal_lm(path=str(llama), lora=LoRA(rank=2))):
            assert {parameter.device.type for parameter in model.parameters()} == {"meta"}


def test_tied_weights_are_one_parameter(llama: Path, gpt2: Path) -> None:
    names = [name for name, _ in causal_lm(path=str(llama)).named_parameters()]
    assert "lm.model.embed_tokens.weight" in names and "lm.lm_head.weight" not in names
    assert "lm.lm_head.weight" not in dict(causal_lm(path=str(gpt2)).named_parameters())


def test_rotary_frequencies_keep_fp32_in_a_model_that_is_cast(llama: Path) -> None:
    model = causal_lm(path=str(llama))
    before = {name: buffer.clone() for name, buffer in model.named_buffers()}
    model.bfloat16()
    assert {parameter.dtype for parameter in model.parameters()} == {torch.bfloat16}
    assert before and all(torch.equal(buffer, before[name]) for name, buffer in model.named_buffers())


def test_adapters_begin_as_the_base_and_are_all_that_is_trained(llama: Path) -> None:
    model = causal_lm(path=str(llama), lora=LoRA(rank=4, targets=["q_proj", "v_proj"]))
    assert torch.equal(model.logits(BATCH["input"]), causal_lm(path=str(llama)).logits(BATCH["input"]))
    trained = {name for name, parameter in model.named_parameters() if parameter.requires_grad}
    assert len(trained) == 2 * 2 * 2 and all(".lora_A." in name or ".lora_B." in name for name in trained)
    settings = cast(Any, model.lm).peft_config["default"]
    assert (settings.r, settings.lora_alpha, settings.target_modules) == (4, 8, {"q_proj", "v_proj"})


def test_the_head_is_left_out_of_all_linear_layers(llama: Path) -> None:
    model = causal_lm(path=str(llama), lora=LoRA(rank=2, targets=["all-linear"]))
    adapted = {name.split(".lora_")[0].rpartition(".")[2] for name, p in model.named_parameters() if p.requires_grad}
    assert adapted == {"q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"}


def test_files_of_frozen_weights_identify_them(llama: Path, tmp_path: Path) -> None:
    assert causal_lm(path=str(llama)).describe() == {}
    moved = shutil.copytree(llama, tmp_path / "moved")
    one, other = (causal_lm(path=str(folder), lora=LoRA(rank=2)).describe() for folder in (llama, moved))
    assert one["sha256"] == other["sha256"]
    stored = load_file(moved / "model.safetensors")
    save_file({name: tensor + 1 for name, tensor in stored.items()}, moved / "model.safetensors", {"format": "pt"})
    assert causal_lm(path=str(moved), lora=LoRA(rank=2)).describe()["sha256"] != one["sha256"]


@pytest.mark.filterwarnings("ignore::FutureWarning")  # peft uses names of transformers that are deprecated
def test_what_is_saved_loads_in_transformers_with_equal_logits(llama: Path, tmp_path: Path) -> None:
    shutil.copytree(llama, tmp_path / "base")
    (tmp_path / "base" / "tokenizer.json").write_text("{}")
    model = causal_lm(path=str(tmp_path / "base"), lora=LoRA(rank=2))
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if ".lora_B." in name:
                parameter.normal_()
    model.eval().save_pretrained(tmp_path / "adapter")
    base = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "base")
    adapted = peft.PeftModel.from_pretrained(base, tmp_path / "adapter")
    assert torch.equal(adapted(input_ids=TOKENS).logits, model.logits(TOKENS))
    assert (tmp_path / "adapter" / "tokenizer.json").exists()
    assert not (tmp_path / "adapter" / "model.safetensors").exists()


def without_config(folder: Path) -> None:
    (folder / "config.json").unlink()


def without_weights(folder: Path) -> None:
    (folder / "model.safetensors").unlink()


def incomplete(folder: Path) -> None:
    stored = load_file(folder / "model.safetensors")
    stored.pop("model.layers.1.mlp.gate_proj.weight")
    save_file(stored, folder / "model.safetensors", {"format": "pt"})


def of_another_size(folder: Path) -> None:
    changed(folder, intermediate_size=96)


def damaged(folder: Path) -> None:
    (folder / "model.safetensors").write_bytes(b"no tensors")


def changed(folder: Path, **values: object) -> None:
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps({**config, **values}))


def a_bert(folder: Path) -> None:
    config = transformers.BertConfig(
        vocab_size=256, hidden_size=32, num_hidden_layers=1, num_attention_heads=2, intermediate_size=32
    )
    transformers.BertForMaskedLM(config).save_pretrained(folder)


def a_t5(folder: Path) -> None:
    shutil.rmtree(folder)
    config = transformers.T5Config(
        vocab_size=256, d_model=16, d_kv=8, d_ff=16, num_layers=1, num_heads=2, architectures=["T5Model"]
    )
    config.save_pretrained(folder)


def with_code(folder: Path) -> None:
    changed(folder, model_type="mine", auto_map={"AutoConfig": "code.Config", "AutoModelForCausalLM": "code.Model"})


Damage = Callable[[Path], object]


@pytest.mark.parametrize(
    ("damage", "words", "said"),
    [
        (without_config, (), "has no config.json; give a folder that save_pretrained wrote (nothing is downloaded)"),
        (shutil.rmtree, (), "is no folder; give a folder that save_pretrained wrote"),
        (without_weights, (), "its weights cannot be read: Error no file named model.safetensors"),
        (incomplete, (), "its weights lack model.layers.1.mlp.gate_proj.weight (1 in all), which LlamaFor"),
        (of_another_size, (), "its weights do not fit its config.json"),
        (damaged, (), "its weights do not fit its config.json"),
        (a_bert, (), "attends to later tokens, so it is no causal language model"),
        (a_bert, ("model.weights=false",), "attends to later tokens, so it is no causal language model"),
        (a_t5, (), "a t5 (config.json says T5Model) is no causal language model of transformers; give"),
        (with_code, (), "its config.json is none of transformers"),
        (lambda folder: changed(folder, quantization_config={"quant_method": "gptq", "bits": 4}), (), "are quantized"),
        (
            lambda folder: changed(folder, vocab_size=100), ("model.weights=false",),
            "has a vocabulary of 100 tokens, the data have 256; tokenize the text with the model's own tokenizer",
        ),
        (
            lambda folder: changed(folder, max_position_embeddings=8), (),
            "has 8 positions, an example of the data has 16 tokens; set data.block=8 or less",
        ),
        (
            None, ("model.lora.rank=4", "model.lora.targets=[qproj]"),
            "no layer of LlamaForCausalLM is called qproj; did you mean q_proj? (there are embed_tokens, q_proj, ",
        ),
        (None, ("model.lora.rank=4", "model.lora.targets=[q_proj,nope]"), "of LlamaForCausalLM is called nope"),
        (None, ("model.lora.targets=[q_proj]",), "model.lora.rank=0 trains all of the model; set model.lora.rank=8"),
        (None, ("model.lora.rank=-1",), "lora.rank is -1; give 1 or more, or 0"),
        (None, ("model.lora.rank=2", "model.lora.alpha=0"), "lora.alpha is 0"),
        (None, ("model.lora.rank=2", "model.lora.dropout=1"), "lora.dropout is 1"),
    ],
)  # fmt: skip
@pytest.mark.filterwarnings("ignore")  # of transformers, while a folder is prepared
def test_what_cannot_be_trained_is_refused_before_anything_is_launched(
    damage: Damage | None, words: tuple[str, ...], said: str, llama: Path, tmp_path: Path
) -> None:
    folder = shutil.copytree(llama, tmp_path / "model")
    if damage is not None:
        damage(folder)
    (tmp_path / "text").mkdir()
    for number in range(3):
        (tmp_path / "text" / f"{number}.txt").write_text("some text " * 40)
    given = ["model=hf", f"model.path={folder}", f"data.path={tmp_path / 'text'}", "data.block=16"]
    with pytest.raises(ConfigError, match=re.escape(said)):
        validate(compose([*given, *words, f"run.dir={tmp_path / 'run'}"]))
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize(
    ("word", "said"),
    [
        ("model.weight=false", "did you mean model.weights?"),
        ("model.lora.r=4", "LoRA takes rank, alpha, targets, dropout"),
        ("model.lora.rank=many", "model.lora.rank must be an integer, but is 'many' (text)"),
        ("model.weights=3", "model.weights must be true or false, but is 3 (an integer)"),
        ("model.lora.targets=q_proj", "model.lora.targets is a list"),
    ],
)
def test_unknown_keys_and_other_types_are_refused(word: str, said: str) -> None:
    with pytest.raises(ConfigError, match=re.escape(said)):
        compose(["model=hf", "model.path=folder", "run.dir=x", word])


def test_a_missing_package_is_named_with_its_extra(llama: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    import importlib.util

    find = importlib.util.find_spec
    for package, lora in (("transformers", None), ("peft", LoRA(rank=2))):
        with monkeypatch.context() as patched:
            patched.setattr(importlib.util, "find_spec", lambda name, p=package: None if name == p else find(name))
            with pytest.raises(ConfigError, match=rf"this needs {package}, .*pip install 'dtrain\[hf\]'"):
                causal_lm(path=str(llama), lora=lora)


def test_a_balancing_loss_of_experts_counts_in_training_only(tmp_path: Path) -> None:
    torch.manual_seed(0)
    config = transformers.MixtralConfig(
        vocab_size=256, hidden_size=32, intermediate_size=32, num_hidden_layers=1, num_attention_heads=2,
        num_key_value_heads=2, num_local_experts=4, output_router_logits=True, router_aux_loss_coef=0.5,
        max_position_embeddings=64,
    )  # fmt: skip
    model = CausalLM(transformers.MixtralForCausalLM(config))
    trained, evaluated = model.train()(BATCH), model.eval()(BATCH)
    balance = model.lm(input_ids=BATCH["input"]).aux_loss
    torch.testing.assert_close(trained, evaluated + 0.5 * balance)
