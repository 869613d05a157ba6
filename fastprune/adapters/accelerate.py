"""For training loops around Accelerate: a loader that tells it where an epoch ends.

    from fastprune.adapters.accelerate import AccelerateLoader

    loader = AccelerateLoader(Loader("train.beton", "subset.npy"))
    model, optimizer, loader = accelerator.prepare(model, optimizer, loader)

Accelerate does not wrap a loader other than a DataLoader, and without being told the end of the
epoch `accelerator.accumulate` carries the last gradients of an epoch into the next one.
"""

from collections.abc import Iterator
from typing import Any

from fastprune.base.errors import InvalidValueError, MissingDependencyError
from fastprune.loading.loader import Loader

try:
    from accelerate.state import GradientState
except ImportError as error:
    raise MissingDependencyError(
        f"this needs the package accelerate ({error}). Install it with: pip install accelerate"
    ) from error


class AccelerateLoader:
    """A `Loader` with what `accumulate` and `gather_for_metrics` ask of a DataLoader.

    Everything else is the loader's own. To continue in the midst of an epoch use `load_state_dict`
    in place of Accelerate's `skip_first_batches`, which makes a DataLoader.

    Attributes:
        loader: the loader.
        end_of_dataloader: whether the batch that was given last ends its epoch.
        remainder: rows of the last batches of all ranks together that are not repetitions; 0 where
            those batches are full.
    """

    def __init__(self, loader: Loader):
        """Wrap a loader.

        Raises:
            InvalidValueError: its last batches are uneven over several ranks, which
                `gather_for_metrics` would wait for without end.
        """
        self.loader = loader
        self.end_of_dataloader = False
        self.remainder = 0
        if loader.tail == "exact" and loader.world > 1:
            raise InvalidValueError(
                'with tail="exact", ranks have last batches of different sizes, and '
                'gather_for_metrics would hang. Use tail="pad": Accelerate leaves the repeated '
                "rows out again."
            )

    def __getattr__(self, name: str) -> Any:
        # Not asked for before there is a loader, as copying does.
        if name == "loader":
            raise AttributeError(name)
        return getattr(self.loader, name)

    def __len__(self) -> int:
        """Batches of this rank in an epoch."""
        return len(self.loader)

    def __iter__(self) -> Iterator[tuple[Any, ...]]:
        """Run the loader's next epoch, known to Accelerate; see `Loader`."""
        loader, state = self.loader, GradientState()
        num_batches = len(loader)
        self.end_of_dataloader = False
        self.remainder = (
            0 if loader.drop_last else len(loader.rows) % (loader.batch_size * loader.world)
        )
        state._add_dataloader(self)
        try:
            for batch in loader:
                self.end_of_dataloader = loader.position[1] == num_batches
                yield batch
        finally:
            state._remove_dataloader(self)
