"""A sync in TRL's SFTTrainer: two replicas fine-tune a small Llama on bytes, and exchange as the method says.

Run: torchrun --standalone --nproc-per-node=2 examples/trl_sft.py FOLDER [--sync streaming]

Lines that end in `# dtrain` are what the sync takes.
"""

import argparse
import sys
from pathlib import Path

import torch
from datasets import Dataset
from methods import chosen  # dtrain
from tokenizers import Tokenizer
from tokenizers.models import WordLevel
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast
from trl import SFTConfig, SFTTrainer

from dtrain.integrations.hf import sync_with  # dtrain

text = Path(argparse.__file__).read_bytes()[: 64 * 500]
blocks = Dataset.from_dict({"input_ids": [list(text[begin : begin + 64]) for begin in range(0, len(text), 64)]})
words = {chr(0x100 + byte): byte for byte in range(256)} | {"<pad>": 256}  # bytes are tokens
tokenizer = PreTrainedTokenizerFast(
    tokenizer_object=Tokenizer(WordLevel(words, unk_token="<pad>")), eos_token="<pad>", pad_token="<pad>"
)
config = LlamaConfig(
    vocab_size=257, hidden_size=64, intermediate_size=128, num_hidden_layers=2, num_attention_heads=4, use_cache=False
)
torch.manual_seed(0)
trainer = SFTTrainer(
    LlamaForCausalLM(config),
    SFTConfig(
        sys.argv[1],
        max_steps=30,
        learning_rate=1e-2,
        per_device_train_batch_size=8,
        max_length=64,
        logging_steps=10,
        eval_strategy="steps",
        eval_steps=10,
        save_steps=10,
        report_to="none",
        disable_tqdm=True,
        use_cpu=not torch.cuda.is_available(),
        bf16=torch.cuda.is_available(),
        dataset_kwargs={"skip_prepare_dataset": True},
    ),
    train_dataset=blocks.select(range(484)),
    eval_dataset=blocks.select(range(484, 500)),
    processing_class=tokenizer,
)
sync_with(trainer, chosen())  # dtrain
trainer.train()
trainer.save_model()
