"""LoRA on a causal language model from a folder: train the adapters, measure, continue a text, export them.

    python examples/lora.py [FOLDER OF A MODEL]      without one, a tiny Llama is trained first

The same on the command line:

    dtrain train model=hf model.path=MODEL model.lora.rank=8 data.path=TEXTS run.dir=runs/lora
    dtrain eval runs/lora
    dtrain generate runs/lora "def "
    dtrain export runs/lora --hf adapter/
"""

import sys
import tempfile
from pathlib import Path

import torch

import dtrain
from dtrain.cli.main import main

work = Path(tempfile.mkdtemp())
settings = {
    "data": {"block": 64},  # bytes of Python's standard library; a model's own tokenizer: `dtrain data tokenize`
    "engine": "fsdp",
    "sync": "diloco",
    "optim": {"inner": {"lr": 0.01}, "warmup_steps": 5},
    "train": {"steps": 60, "batch_size": 16, "log_every_steps": 10, "evaluation_examples": 64},
}
if len(sys.argv) > 1:
    base = Path(sys.argv[1])
else:
    from transformers import LlamaConfig, LlamaForCausalLM

    torch.manual_seed(0)
    sizes = {"hidden_size": 64, "intermediate_size": 128, "num_hidden_layers": 2, "num_attention_heads": 4}
    llama = LlamaForCausalLM(LlamaConfig(vocab_size=256, max_position_embeddings=128, **sizes))
    dtrain.Trainer(model=llama, run={"dir": work / "base-run"}, **settings).train()
    base = work / "base"
    llama.save_pretrained(base)  # the object has been trained

results = dtrain.Trainer(
    "model=hf",
    f"model.path={base}",
    "model.lora.rank=8",
    "model.lora.targets=[all-linear]",
    run={"dir": work / "run"},
    **settings,
).train()
first, *_, last = (row["validation_loss"] for row in results.rows if "validation_loss" in row)
print(f"validation loss {first:.3f} to {last:.3f}")

model = dtrain.load(results.folder)
trained = sum(parameter.numel() for parameter in model.parameters() if parameter.requires_grad)
print(f"{trained:,} of {sum(parameter.numel() for parameter in model.parameters()):,} parameters are trained")
main(["eval", str(results.folder), "examples=64"])
main(["generate", str(results.folder), "def ", "max_tokens=20", "temperature=0.7"])
main(["export", str(results.folder), "--hf", str(work / "adapter")])
