"""For training loops around Accelerate: a loader that marks the end of its epoch.

    from fastprune.adapters.accelerate import AccelerateLoader

    loader = AccelerateLoader(Loader("train.beton", "subset.npy"))
    model, optimizer, loader = accelerator.prepare(model, optimizer, loader)

Accelerate does not wrap a loader other than a DataLoader. Unless the loader marks the end of its
epoch, `accelerator.accumulate` carries the last gradients of an epoch into the next one.
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
    """A `Loader` with the attributes that `accumulate` and `gather_for_metrics` read.

    Everything else is the loader's own. To continue within an epoch use `load_state_dict` in place
    of Accelerate's `skip_first_batches`, which makes a DataLoader.

    Attributes:
        loader: the wrapped loader.
        end_of_dataloader: whether the last batch yielded ends its epoch.
        remainder: rows of all ranks' last batches together, without repeated ones; 0 if full.
    """

    def __init__(self, loader: Loader):
        """Raise InvalidValueError if the ranks' last batches differ in size."""
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
        # Copying looks attributes up before `loader` is set, which would recurse here.
        if name == "loader":
            raise AttributeError(name)
        return getattr(self.loader, name)

    def __len__(self) -> int:
        """Batches of this rank in an epoch."""
        return len(self.loader)

    def __iter__(self) -> Iterator[tuple[Any, ...]]:
        """Run the loader's next epoch, registered with Accelerate; see `Loader`."""
        loader, state = self.loader, GradientState()
        num_batches = len(loader)
        self.end_of_dataloader = False
        self.remainder = (
            0 if loader.drop_last else len(loader.rows) % (loader.batch_size * loader.world)
        )
        # As Accelerate's own DataLoaders do: it reads both attributes from the active loader.
        state._add_dataloader(self)
        try:
            for batch in loader:
                self.end_of_dataloader = loader.position[1] == num_batches
                yield batch
        finally:
            state._remove_dataloader(self)
