"""A sync of LoRA adapters: two replicas adapt a small Llama with PEFT; only the adapters are exchanged.

Run: torchrun --standalone --nproc-per-node=2 examples/hf_lora.py FOLDER [--sync streaming]

Lines that end in `# dtrain` are what the sync takes.
"""

import argparse
import sys
from pathlib import Path

import torch
from methods import chosen  # dtrain
from peft import LoraConfig, get_peft_model
from transformers import LlamaConfig, LlamaForCausalLM, Trainer, TrainingArguments

from dtrain.integrations.hf import sync_with  # dtrain

text = torch.tensor(list(Path(argparse.__file__).read_bytes()[: 64 * 500]))  # bytes are tokens
blocks = [{"input_ids": block, "labels": block} for block in text.view(-1, 64)]
config = LlamaConfig(
    vocab_size=256, hidden_size=64, intermediate_size=128, num_hidden_layers=2, num_attention_heads=4, use_cache=False
)
torch.manual_seed(0)
adapters = LoraConfig(r=8, target_modules="all-linear", modules_to_save=["lm_head"])
trainer = Trainer(
    get_peft_model(LlamaForCausalLM(config), adapters),
    TrainingArguments(
        sys.argv[1],
        max_steps=30,
        learning_rate=2e-2,
        per_device_train_batch_size=8,
        logging_steps=10,
        eval_strategy="steps",
        eval_steps=10,
        save_steps=10,
        report_to="none",
        disable_tqdm=True,
        use_cpu=True,
    ),
    train_dataset=blocks[:-16],
    eval_dataset=blocks[-16:],
)
sync_with(trainer, chosen())  # dtrain
trainer.train()
trainer.save_model()
