"""The loader: batches of a beton's kept rows, ready to train on."""

import logging
from collections.abc import Iterator, Sequence
from dataclasses import asdict, replace
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from fastprune.base.checks import require_at_least
from fastprune.base.cpus import cpus_per_rank
from fastprune.base.errors import InvalidValueError
from fastprune.beton.beton import Beton, RowsLike, kept_rows, rows_of
from fastprune.beton.opening import open_beton
from fastprune.decoding.decoder import decoder_identity
from fastprune.decoding.faults import RowFaults
from fastprune.loading.backend import make_decoder
from fastprune.loading.batch import Batch, Collate, Given, Normalizer, Transform, choose_device
from fastprune.loading.crops import CropPolicy, warn_of_enlarging
from fastprune.loading.sampler import EpochSampler, KeptImages, NextEpoch, this_rank
from fastprune.loading.state import make_state, read_state, require_same_batches
from fastprune.rows.teacher_cache import TeacherCache
from fastprune.settings import LoaderSettings, takes_settings

_LOG = logging.getLogger(__name__)


class Loader:
    """Batches of the kept rows of a beton.

    Each iterator is one epoch: the next one, or the one named by `set_epoch`. What an epoch holds,
    and how each image is cropped, depends on (seed, epoch, subset) alone: not on the number of
    workers or ranks, and not on where a run was resumed. Batches belong to the caller, and
    iterators may be left at any time.

    Attributes:
        beton: the open beton.
        dataset: labels and class names of the kept rows, for code that asks for `loader.dataset`.
        batch_size: rows per batch and rank.
        device: where batches are delivered.
        num_workers: decoding threads.
        num_views: K, after which views recur; None for new views in every epoch.
        collate_fn: None; batches come whole.
        mixup_enabled: False; timm sets it where it mixes images itself.
    """

    collate_fn = None
    mixup_enabled = False

    @takes_settings(LoaderSettings)
    def __init__(  # noqa: D417 - `takes_settings` puts the fields in their place
        self,
        beton: str | Path | Beton,
        subset: RowsLike = None,
        *,
        settings: LoaderSettings,
        teacher_cache: str | Path | TeacherCache | None = None,
        transform: Transform | None = None,
        distributed: str | tuple[int, int] | None = "auto",
    ):
        """Check the subset against the beton, and make the decoder.

        Args:
            beton: an open beton; or what `open_beton` takes, opened with its defaults: a file, the
                folder of a sharded beton, or the URL of a beton at a loading service.
            subset: the kept rows: a file, a `Subset`, an array of rows, or None for all rows.
            **settings: of `LoaderSettings`.
            teacher_cache: the teacher's logits on these views, a folder or an open cache, for the
                field "teacher_logits"; all of them must be there (`fastprune cache fill`).
            transform: further augmentation of each (3, S, S) uint8 image on the device, such as
                torchvision's v2.RandAugment(), seeded by (seed, slot, row); of the second images
                alone if that field is asked for.
            distributed: "auto" shares the epoch among torch.distributed's ranks if there is a
                process group; (rank, world) names them; None gives this process all rows.

        Raises:
            BetonError: the beton is missing or damaged.
            LoadingError: no loading service has the beton.
            ArtifactMismatch: the subset or the teacher cache was made from other images, or the
                cache from other views.
            InvalidValueError: an argument is outside its domain, or no batch can be filled.
            MissingDependencyError: the backend's package is not installed.
        """
        self.beton = beton if isinstance(beton, Beton) else open_beton(beton)
        self._settings = settings
        self._distributed = distributed
        self.batch_size = settings.batch_size
        self.num_views = settings.num_views
        self.device = choose_device(settings.device)
        self.num_workers = settings.num_workers or cpus_per_rank(
            world=this_rank(distributed)[1], gpus=torch.cuda.device_count()
        )
        self._unranked = EpochSampler(
            rows=np.empty(0, np.int64),
            num_rows=self.beton.num_rows,
            pages=self.beton.offsets // self.beton.page_bytes,
            batch_size=settings.batch_size,
            order=settings.order or ("random" if settings.train else "sequential"),
            seed=settings.seed,
            tail=settings.tail or ("drop" if settings.train else "exact"),
            open_pages=settings.open_pages,
        )
        warn_of_enlarging(self.beton, settings.image_size)
        self._policy = CropPolicy.make(
            settings.augment, image_size=settings.image_size, train=settings.train
        )
        dtype = getattr(torch, settings.dtype)
        self._collate = Collate(
            fields=settings.fields,
            labels=self.beton.labels,
            normalize=Normalizer(self.device, settings.mean, settings.std, dtype),
            seed=settings.seed,
            transform=transform,
        )
        # (epoch, batches consumed): where the next iterator begins, and where the last one was.
        self._next = self._position = (0, 0)
        self._rows_changed = False
        skip = settings.on_error == "skip"
        self._faults = RowFaults(self.beton, skip=skip, verify_crc=settings.verify_crc)
        self._decoder = make_decoder(
            settings.backend,
            self.beton,
            image_size=settings.image_size,
            num_workers=self.num_workers,
            device=self.device,
            faults=self._faults,
        )
        if teacher_cache is not None or "teacher_logits" in settings.fields:
            cache = self._open_cache(teacher_cache)
            self.num_views, self._collate = cache.num_views, replace(self._collate, cache=cache)
        self._use(kept_rows(self.beton, subset))

    @property
    def rows(self) -> NDArray[np.int64]:
        """The kept rows: (K,) int64, sorted and unique."""
        return self._unranked.rows

    @property
    def backend(self) -> str:
        """The decoder at work: "cpu" or "dali"."""
        return self._decoder.name

    @property
    def fields(self) -> tuple[str, ...]:
        """The fields of a batch, in their order."""
        return self._collate.fields

    @property
    def num_classes(self) -> int:
        """Classes in the beton, also those without kept rows."""
        return self.beton.num_classes

    @property
    def class_names(self) -> tuple[str, ...] | None:
        """Name of every class; None where the beton has no manifest with names."""
        return self.beton.class_names

    @property
    def sampler(self) -> NextEpoch:
        """For code that calls `loader.sampler.set_epoch`."""
        return self.batch_sampler.sampler

    @property
    def batch_sampler(self) -> NextEpoch:
        """For code that calls `loader.batch_sampler.sampler.set_epoch`."""
        return NextEpoch(
            current=self._sampler,
            next_epoch=lambda: self._next[0],
            set_epoch=self.set_epoch,
            as_batches=True,
        )

    @property
    def tail(self) -> str:
        """How rows that fill no batch are treated: "drop", "pad" or "exact"."""
        return self._unranked.tail

    @property
    def drop_last(self) -> bool:
        """Whether rows that fill no batch are left out."""
        return self.tail == "drop"

    @property
    def world(self) -> int:
        """Ranks that share an epoch, as many as there are now."""
        return this_rank(self._distributed)[1]

    @property
    def position(self) -> tuple[int, int]:
        """Epoch, and batches given of it, of the iterator that gave a batch last."""
        return self._position

    @property
    def num_repeated(self) -> int:
        """Rows that an epoch repeats over all ranks to fill its batches; 0 but for tail="pad"."""
        return self._sampler().num_repeated()

    @property
    def num_decoded_whole(self) -> int:
        """Views so far of JPEGs that the view decoder does not know, and Pillow decodes whole.

        Progressive JPEGs above all; a line in the log counts them once for each loader.
        """
        return self._faults.num_decoded_whole

    @property
    def num_skipped(self) -> int:
        """Rows left out so far because they could not be decoded; 0 but for on_error="skip"."""
        return self._faults.num_skipped

    def __getstate__(self) -> dict[str, Any]:
        # As it was made: maps, threads and decoders are useless to another process. The rows and
        # not their file, which would be read and warned of again.
        cache = self._collate.cache
        arguments = {
            "beton": self.beton,
            "subset": None if len(self.rows) == self.beton.num_rows else self.rows,
            "teacher_cache": None if cache is None else cache.path,
            "transform": self._collate.transform,
            "distributed": self._distributed,
            **self._settings.model_dump(),
        }
        return {"arguments": arguments, "next": self._next, "rows_changed": self._rows_changed}

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.__init__(**state["arguments"])  # type: ignore[misc]
        self._next = self._position = state["next"]
        self._rows_changed = state["rows_changed"]

    def __len__(self) -> int:
        """Batches of this rank in an epoch."""
        return self._sampler().num_batches()

    def __iter__(self) -> Iterator[tuple[torch.Tensor, ...]]:
        """Run the next epoch, or the one named by `set_epoch`; it begins with the first batch.

        Yields:
            A tuple of the asked `fields` on the device; images are channels_last.

        Raises:
            LoadingError: a row cannot be decoded, a decoding thread died, or the file changed.
        """
        if self.mixup_enabled and self._collate.cache is not None:
            raise InvalidValueError(
                "cached logits are of images that mixup and cutmix have not mixed. Train without "
                "these, or without teacher_cache."
            )
        # An iterator that is never advanced takes no epoch: Lightning makes one before the first.
        epoch, consumed = self._position = self._next
        self._next = (epoch + 1, 0)
        batches = self._sampler().batches(epoch)[consumed:]
        run = self._run(batches, epoch=epoch, first=consumed + 1, num_workers=self.num_workers)
        yield from map(partial(self._give, epoch), run)
        self._position = (epoch + 1, 0)

    def _run(
        self, batches: Sequence[NDArray[np.int64]], *, epoch: int, first: int, num_workers: int
    ) -> Iterator[Given]:
        """Chain the stages: rows, views, pixels, the other columns, the device, the fields."""
        collate, slot = self._collate, self.slot_of(epoch)
        views = partial(self._views_in_batch, slot=slot)
        tiled = [np.tile(rows, collate.views_per_row) for rows in batches]
        pixels = self._decoder.decode(tiled, views)
        columns = collate.columns(
            batches, pixels, epoch=epoch, first=first, num_workers=num_workers
        )
        return collate.finished(filter(self._has_rows, columns), slot=slot)

    def _has_rows(self, batch: Batch) -> bool:
        """Pass over a batch all of whose rows were left out."""
        if len(batch.rows) == 0:
            self._faults.require_no_peers(self.world)
        return len(batch.rows) > 0

    def _give(self, epoch: int, batch: Given) -> tuple[torch.Tensor, ...]:
        """Give a batch to the caller: from now on the loader's position is behind it."""
        self._position = (epoch, batch.number)
        return batch.values

    def slot_of(self, epoch: int) -> int:
        """Return the slot of an epoch: its own number, or that number modulo K."""
        return epoch if self.num_views is None else epoch % self.num_views

    def views(self, rows: NDArray[np.int64], *, slot: int, k: int = 0) -> NDArray[np.int32]:
        """Return which part of each image a slot shows; `slot_of` gives an epoch's.

        Args:
            rows: (n,) int64, in the beton.
            slot: in [0, 2**63).
            k: which view of the row within the slot.

        Returns:
            (n, 7) int32, see `crops.CropPolicy.views`.
        """
        return self._policy.views(
            rows,
            self.beton.widths[rows].astype(np.int64),
            self.beton.heights[rows].astype(np.int64),
            seed=self._settings.seed,
            slot=slot,
            k=k,
        )

    def view_identity(self) -> dict[str, Any]:
        """Return what decides the pixels of a view, besides its row and slot, as JSON values.

        Order, rows, batch size and ranks do not matter.
        """
        view = self._collate.view_identity() | {
            "augment": asdict(self._policy),
            "image_size": self._settings.image_size,
            "seed": self._settings.seed,
        }
        decoder = decoder_identity(self.backend, self.device)
        return {"images": self.beton.fingerprint.to_dict(), "view": view, "decoder": decoder}

    def set_epoch(self, epoch: int) -> None:
        """Name the epoch that the next iterator runs.

        An epoch that `load_state_dict` left half done continues where it was, if it is named.

        Raises:
            InvalidValueError: the epoch is outside [0, 2**63).
        """
        require_at_least("epoch", epoch, 0)
        if epoch != self._next[0]:
            self._next = (epoch, 0)
        self._position = self._next

    def set_rows(self, rows: RowsLike) -> None:
        """Change the kept rows from the next epoch on; iterators that run keep theirs.

        Args:
            rows: as `subset`.

        Raises:
            InvalidValueError: the rows cannot index the beton, or fill no batch.
            ArtifactMismatch: the subset was made from other images.
        """
        self._use(kept_rows(self.beton, rows))
        self._rows_changed = True
        self._position = self._next

    def state_dict(self) -> dict[str, Any]:
        """Return where the loader is: what `load_state_dict` needs to continue with the next batch.

        Returns:
            Plain numbers and strings, and the kept rows (K,) int64 if `set_rows` changed them. The
            position is of the iterator that gave a batch last.
        """
        rows = self.rows if self._rows_changed else None
        return make_state(self._position, rows, self._terms(self.rows))

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Continue where another loader was: the batches that follow are equal to the bit.

        The next iterator gives the rest of the epoch, which is empty if all of its batches were
        consumed.

        Args:
            state: what `state_dict` returned.

        Raises:
            InvalidValueError: this loader would give other batches than the saved one, or the
                state is not a loader's, or of an earlier version.
        """
        position, changed = read_state(state, self._terms(self.rows))
        rows = self.rows if changed is None else rows_of(self.beton, changed)
        num_batches = replace(self._sampler(), rows=rows).num_batches()
        require_same_batches(state, self._terms(rows), num_batches=num_batches)
        if changed is not None:
            self.set_rows(changed)
        self._next = self._position = position

    def warm_up(self) -> None:
        """Compile, and decode a batch that is not given, so that no clock counts this later."""
        # Repeated to a full batch, whose memory is then the size that training needs.
        sampler = replace(
            self._sampler(),
            rows=self.rows[: self.batch_size],
            order="sequential",
            tail="pad",
            rank=0,
            world=1,
        )
        next(self._run(sampler.batches(0)[:1], epoch=0, first=1, num_workers=1), None)

    def _use(self, rows: NDArray[np.int64]) -> None:
        """Make these the kept rows, or change nothing."""
        collate = self._collate.keeping(rows, num_negatives=self._settings.num_negatives)
        unranked = replace(self._unranked, rows=rows)
        num_repeated = unranked.shared(self._distributed, self.beton.path).num_repeated()
        if num_repeated:
            _LOG.info(
                "%s: each epoch repeats %d rows to fill its batches", self.beton.path, num_repeated
            )
        self._unranked, self._collate = unranked, collate
        self.dataset = KeptImages.of(self.beton, rows)

    def _sampler(self) -> EpochSampler:
        """Return the epochs of this rank, among as many ranks as there are now."""
        # Asked each time: a loader may be made before the process group is.
        return self._unranked.shared(self._distributed, self.beton.path)

    def _terms(self, rows: NDArray[np.int64]) -> dict[str, Any]:
        """Return what besides the position decides which batches of these rows come."""
        return replace(self._sampler(), rows=rows).terms() | {
            "augment": self._policy.kind,
            "image_size": self._settings.image_size,
            "decoder": decoder_identity(self.backend, self.device),
            "num_views": self.num_views,
            "images": self.beton.fingerprint.structure,
        }

    def _views_in_batch(self, rows: NDArray[np.int64], *, slot: int) -> NDArray[np.int32]:
        """Return the views of rows that come once for each view."""
        parts = np.split(rows, self._collate.views_per_row)
        return np.concatenate([self.views(part, slot=slot, k=k) for k, part in enumerate(parts)])

    def _open_cache(self, cache: str | Path | TeacherCache | None) -> TeacherCache:
        """Open the teacher cache, and refuse one of other images or views.

        Raises:
            InvalidValueError: the field "teacher_logits" has no cache, or the cache no field.
            ArtifactMismatch: it was made from other images or views; the difference is named.
            ArtifactError: the cache is missing or damaged.
        """
        if cache is None:
            raise InvalidValueError(
                'the field "teacher_logits" needs teacher_cache, the folder of the teacher\'s '
                "logits. Fill one: fastprune cache fill."
            )
        if "teacher_logits" not in self.fields:
            raise InvalidValueError(
                f'teacher_cache is for the field "teacher_logits", but fields are {self.fields!r}.'
            )
        identity = self.view_identity()
        if self.num_views is not None:
            identity |= {"num_views": self.num_views}
        if not isinstance(cache, TeacherCache):
            return TeacherCache.open(cache, identity=identity)
        cache.require(identity)
        return cache
