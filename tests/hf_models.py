"""Tiny models of transformers, in folders as `save_pretrained` writes them."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch


def tiny_llama(folder: Path) -> Path:
    """A Llama with tied embeddings, 256 tokens and 64 positions; skips the test where transformers is missing."""
    transformers = pytest.importorskip("transformers")
    torch.manual_seed(3)
    config = transformers.LlamaConfig(
        vocab_size=256, hidden_size=32, intermediate_size=64, num_hidden_layers=2, num_attention_heads=4,
        num_key_value_heads=2, max_position_embeddings=64, tie_word_embeddings=True, bos_token_id=None,
        eos_token_id=None,
    )  # fmt: skip
    transformers.LlamaForCausalLM(config).save_pretrained(folder)
    return folder


def tiny_gpt2(folder: Path) -> Path:
    """A GPT-2 with dropout, 256 tokens and 64 positions."""
    transformers = pytest.importorskip("transformers")
    torch.manual_seed(4)
    config = transformers.GPT2Config(
        vocab_size=256, n_positions=64, n_embd=32, n_layer=2, n_head=4, bos_token_id=None, eos_token_id=None
    )
    transformers.GPT2LMHeadModel(config).save_pretrained(folder)
    return folder
