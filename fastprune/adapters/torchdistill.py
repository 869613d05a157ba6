"""For torchdistill: batches of (images, labels, supplement).

from fastprune.adapters.torchdistill import TorchdistillLoader

fields = ("images", "labels", "rows")
box.train_data_loader = TorchdistillLoader(Loader("train.beton", "subset.npy", fields=fields))
"""

from collections.abc import Iterator
from typing import Any

import torch

from fastprune.base.errors import InvalidValueError
from fastprune.loading.loader import Loader

_FIELDS = ("images", "labels", "rows")


class TorchdistillLoader:
    """A `Loader` with torchdistill's batches; everything else is the loader's own."""

    def __init__(self, loader: Loader):
        """Wrap a loader of images, labels, rows, and teacher_logits to stand in for the teacher."""
        if loader.fields not in (_FIELDS, (*_FIELDS, "teacher_logits")):
            raise InvalidValueError(
                f'torchdistill needs fields=("images", "labels", "rows"), with "teacher_logits" '
                f"behind them or without, not {loader.fields!r}."
            )
        self.loader = loader

    def __getattr__(self, name: str) -> Any:
        # Copying looks attributes up before `loader` is set, which would recurse here.
        if name == "loader":
            raise AttributeError(name)
        return getattr(self.loader, name)

    def __len__(self) -> int:
        """Batches of this rank in an epoch."""
        return len(self.loader)

    def __iter__(self) -> Iterator[tuple[torch.Tensor, torch.Tensor, dict[str, Any]]]:
        """Run the next epoch; the supplement holds "rows", and with a cache "cached_data"."""
        return map(_with_supplement, self.loader)


def _with_supplement(
    batch: tuple[torch.Tensor, ...],
) -> tuple[torch.Tensor, torch.Tensor, dict[str, Any]]:
    images, labels, rows, *cached = batch
    supplement: dict[str, Any] = {"rows": rows}
    for logits in cached:
        # Where torchdistill looks for the output of its teacher; "." is the whole network.
        extracted = {".": {"output": logits}}
        supplement["cached_data"] = {"teacher_outputs": logits, "extracted_outputs": extracted}
    return images, labels, supplement
