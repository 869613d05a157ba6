"""A module that Lightning's spawned processes can import."""

import json

import lightning
import torch
from torch import nn


class Module(lightning.LightningModule):
    """Writes the rows that its process was given."""

    def __init__(self, folder):
        super().__init__()
        self.folder = folder
        self.rows = []
        self.network = nn.Sequential(nn.Flatten(), nn.Linear(3 * 32 * 32, 3))

    def training_step(self, batch, number):
        images, labels, rows = batch
        self.rows += rows.tolist()
        return nn.functional.cross_entropy(self.network(images), labels)

    def on_train_end(self):
        (self.folder / f"rows-{self.global_rank}.json").write_text(json.dumps(self.rows))

    def configure_optimizers(self):
        return torch.optim.SGD(self.parameters(), lr=0.01)
