"""A model object trained cell by cell, as in a notebook: `dtrain.Trainer`. The cells are marked by `# %%`.

    python examples/notebook.py                                                      one process
    torchrun --standalone --nproc-per-node=2 examples/notebook.py runs/notebook      two replicas of the same cells

An argument names the run folder: called again, it resumes there, or shows what has been trained.
"""

# %% a model that returns its loss, and data sets that are lists of dicts
import sys
import tempfile

import torch
import torch.nn.functional as F
from torch import Tensor, nn

import dtrain


class Net(nn.Module):
    """The class of a point by two layers."""

    def __init__(self) -> None:
        super().__init__()
        self.layers = nn.Sequential(nn.Linear(8, 64), nn.ReLU(), nn.Linear(64, 4))

    def forward(self, batch: dict[str, Tensor]) -> Tensor:
        return F.cross_entropy(self.layers(batch["point"]), batch["label"])


torch.manual_seed(0)
points = torch.randn(2048, 8)
labels = points[:, :4].argmax(dim=1)
examples = [{"point": point, "label": label} for point, label in zip(points, labels, strict=True)]

# %% the settings are those of `dtrain train`, as words or as keywords
model = Net()
trainer = dtrain.Trainer(
    "engine=ddp",
    "optim.schedule=constant",
    model=model,
    data=examples[:1920],
    validation=examples[1920:],
    sync="diloco",
    train={"steps": 200, "batch_size": 64, "log_every_steps": 50, "evaluation_examples": 128},
    run={"dir": sys.argv[1] if len(sys.argv) > 1 else tempfile.mkdtemp()},
)

# %% Ctrl-C in this cell writes a checkpoint; the cell, called again, resumes there
results = trainer.train()

# %% the object has been trained, and what there is to plot are rows
correct = (model.layers(points[1920:]).argmax(dim=1) == labels[1920:]).float().mean()
print(f"{results.reason} at step {results.step}: validation loss {results.validation_loss:.3f}, {correct:.0%} correct")
print("losses", [round(row["loss"], 3) for row in results.rows if "loss" in row])

# %% later, or elsewhere: the same weights into a new object
again = dtrain.load(results.folder, model=Net())
print("loaded", torch.equal(again.layers[0].weight, model.layers[0].weight))
