"""Dynamic pruning: each epoch skips at random rows that the student finds easy."""

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from fastprune.base.random_streams import row_keys
from fastprune.base.ranks import Ranks
from fastprune.settings import PruningSettings


def infobatch_weights(
    losses: NDArray[np.float32],
    rows: NDArray[np.int64],
    *,
    skip_probability: float,
    seed: int,
    epoch: int,
) -> NDArray[np.float32]:
    """Choose the rows that an epoch trains on, and weigh their gradients.

    A row whose last loss is below the mean is skipped with a probability r; if it is kept, it
    counts 1 / (1 - r) times, so that the expected gradient equals the gradient of all rows.

    Args:
        losses: (K,) float32, of each row when it was last trained on; NaN if it never was, and such
            a row is always kept.
        rows: (K,) int64, rows of the beton.
        skip_probability: r, in (0, 1).
        seed: of the draw, which is a pure function of (seed, epoch, row).
        epoch: in [0, 2**63).

    Returns:
        (K,) float32: 0 for a row that is skipped, else 1 or 1 / (1 - r).

    Source: Qin et al. 2024, "InfoBatch: Lossless Training Speed Up by Unbiased Dynamic Data
    Pruning".
    """
    seen = losses[~np.isnan(losses)]
    # A loss that is NaN is below no mean.
    is_easy = losses < seen.mean(dtype=np.float64) if len(seen) else np.zeros(len(rows), bool)
    # A key per epoch, so that other rows are skipped each time.
    epoch_seed = int(row_keys(seed, np.array([epoch]))[0])
    # The row's key alone decides, so any number of processes skips the same rows.
    is_unlucky = row_keys(epoch_seed, rows) < np.uint64(int(skip_probability * 2**64))
    # Easy rows that stay also count for the skipped ones, which keeps the gradient unbiased.
    weights = np.where(is_easy, 1 / (1 - skip_probability), 1.0)
    return np.where(is_easy & is_unlucky, 0.0, weights).astype(np.float32)


def is_pruned_epoch(epoch: int, *, epochs: int, full_share: float) -> bool:
    """Whether an epoch may skip rows: the last `full_share` of the epochs train on all rows."""
    return epoch + 1 <= epochs * (1 - full_share)


class InfoBatch:
    """The last loss of every row, and the weights of the current epoch.

    When an epoch begins, all processes hold the same losses, so they choose the same rows. During
    an epoch each process knows the new losses of its own batches only.
    """

    def __init__(
        self,
        settings: PruningSettings,
        rows: NDArray[np.int64],
        *,
        epochs: int,
        seed: int,
        min_rows: int,
        device: torch.device,
        ranks: Ranks | None = None,
    ) -> None:
        """Begin with rows that no epoch has seen.

        Args:
            settings: how many rows are skipped, and when.
            rows: (K,) int64, sorted: the rows that the run trains on.
            epochs: of the run.
            seed: of the draws.
            min_rows: an epoch that would keep fewer trains on all rows.
            device: of the batches.
            ranks: the processes that share an epoch; None for this one alone.
        """
        self._settings = settings
        self._rows = rows
        self._epochs = epochs
        self._seed = seed
        self._min_rows = min_rows
        self._ranks = ranks or Ranks()
        # By row of the beton, so that a batch's rows find their places without a search.
        places = int(rows[-1]) + 1
        self._losses = np.full(places, np.nan, np.float32)
        self._fresh = torch.full((places,), torch.nan, device=device)
        self._weights = torch.ones(places, device=device)

    def begin_epoch(self, epoch: int) -> NDArray[np.int64]:
        """Choose the rows of an epoch, counted from 0, by the losses of earlier epochs.

        Returns:
            The rows to train on: sorted int64, some of the run's.
        """
        weights = np.ones(len(self._rows), np.float32)
        settings = self._settings
        if is_pruned_epoch(epoch, epochs=self._epochs, full_share=settings.full_share):
            drawn = infobatch_weights(
                self._losses[self._rows],
                self._rows,
                skip_probability=settings.skip_probability,
                seed=self._seed,
                epoch=epoch,
            )
            # An epoch without a step would divide the curve by nothing.
            if np.count_nonzero(drawn) >= self._min_rows:
                weights = drawn
        by_row = np.zeros(len(self._losses), np.float32)
        by_row[self._rows] = weights
        self._weights.copy_(torch.from_numpy(by_row))
        return self._rows[weights > 0]

    def weigh(self, losses: Tensor, rows: Tensor) -> Tensor:
        """Record the losses of a batch, and weigh them.

        Args:
            losses: (B,) float32, with a gradient.
            rows: (B,) int64, on the device.

        Returns:
            (B,) float32; the step minimizes its mean.
        """
        # On the device: the host reads it at the end of the epoch.
        self._fresh[rows] = losses.detach()
        return losses * self._weights[rows]

    def end_epoch(self) -> None:
        """Share the losses among processes; rows that were skipped keep the loss they had."""
        fresh = self._shared()
        self._losses = np.where(np.isnan(fresh), self._losses, fresh)
        self._fresh.fill_(torch.nan)

    def state_dict(self) -> dict[str, Tensor]:
        """Return the losses, also during an epoch; a collective."""
        return {
            "losses": torch.from_numpy(self._losses.copy()),
            "fresh": torch.from_numpy(self._shared()),
        }

    def load_state_dict(self, state: dict[str, Tensor]) -> None:
        """Restore from `state_dict`; call `begin_epoch` again for an epoch that was half done."""
        self._losses = state["losses"].numpy().copy()
        # The first process alone holds the sum, so that it is not counted twice.
        if self._ranks.is_first:
            self._fresh.copy_(state["fresh"])

    def _shared(self) -> NDArray[np.float32]:
        """Return the losses that any process recorded in this epoch; NaN where none did."""
        fresh = self._fresh.cpu()
        # NaN cannot be summed: losses and their presence travel separately.
        recorded = torch.stack([fresh.nan_to_num(nan=0.0), (~fresh.isnan()).float()])
        total, count = self._ranks.all_sum(recorded).numpy()
        shared: NDArray[np.float32] = np.where(count > 0, total, np.float32(np.nan))
        return shared
