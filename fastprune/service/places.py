"""Views in the slab: where each lies, which are spare, and how sizes share the memory."""

from collections import Counter, defaultdict

from fastprune.service.demand import Client, Entry, Images, Stream
from fastprune.service.slab import EXTENT_BYTES, Slab
from fastprune.service.wire import MOST_WANTED


class Places:
    """The places of a slab and what lies in them.

    A view is spare when nobody wants it and no ask holds it.

    Attributes:
        slab: where views lie.
        entries: every view in it, by its offset.
        sizes: clients, by the size of a place of their views in bytes.
    """

    def __init__(self, slab: Slab):
        self.slab = slab
        self.entries: dict[int, Entry] = {}
        self.sizes: Counter[int] = Counter()
        self._spare: defaultdict[int, dict[Entry, None]] = defaultdict(dict)  # oldest first

    def extents_needed(self, size: int) -> int:
        """Extents that would hold an ask of each client and of one more with places of a size."""
        numbers = self.sizes + Counter([size])
        return sum(-(-n * MOST_WANTED // (EXTENT_BYTES // s)) for s, n in numbers.items())

    def capacity(self, images: Images) -> int:
        """Views of these images that the slab could hold beside those of other sizes."""
        num_sizes = len(self.sizes) + (images.place_bytes not in self.sizes)
        return len(self.slab.extents) * (EXTENT_BYTES // images.place_bytes) // num_sizes

    def num_left(self, size: int) -> int:
        """Places of a size that are free, or hold what is spare."""
        return len(self._spare[size]) + self.slab.num_free(size)

    def oldest_spare(self, size: int) -> Entry | None:
        """The spare view that was unused for longest."""
        return next(iter(self._spare[size]), None)

    def take(self, size: int) -> int | None:
        """Give out a free place of a size; None while there is none."""
        self._cut_for(size)
        return self.slab.take(size)

    def put(self, offset: int, key: bytes, row: int, stream: Stream, client: Client) -> Entry:
        """Note a view that is to be decoded to a place."""
        images, generation = client.images, self.slab.generation(offset)
        entry = Entry(images, key, row, stream, client, offset, generation)
        images.memo[key] = self.entries[offset] = entry
        return entry

    def hold(self, entry: Entry) -> None:
        """Keep a view that was spare, perhaps."""
        self._spare[entry.images.place_bytes].pop(entry, None)

    def settle(self, entry: Entry) -> None:
        """Move a view to the spare ones if nobody wants it and no ask holds it."""
        if not entry.is_decoded:
            return
        if not entry.stream.wanted[entry.row]:
            entry.stream.kept.pop(entry, None)
        if entry.num_lent == 0:
            if self.slab.extent_at(entry.offset).is_retiring:
                self.evict(entry)
            elif entry not in entry.stream.kept:
                self._spare[entry.images.place_bytes][entry] = None

    def evict(self, entry: Entry) -> None:
        """Forget a view and give its place back."""
        assert entry.num_lent == 0
        assert entry.is_decoded
        del entry.images.memo[entry.key], self.entries[entry.offset]
        entry.stream.kept.pop(entry, None)
        self._spare[entry.images.place_bytes].pop(entry, None)
        self.slab.give_back(entry.offset)

    def _cut_for(self, size: int) -> None:
        """Begin to empty an extent of another size if this size has fewer than its share."""
        have = self.slab.num_extents
        share = len(self.slab.extents) // len(self.sizes)
        if have[size] >= share or self.slab.num_retiring or self.slab.num_free(size):
            return
        rich = [s for s in have if s != size and have[s] > (share if s in self.sizes else 0)]
        if not rich:
            return
        richest = max(rich, key=have.__getitem__)
        oldest = self.oldest_spare(richest)
        if oldest is not None:
            extent = self.slab.extent_at(oldest.offset)
        else:
            extent = next(e for e in self.slab.extents if e.place_bytes == richest)
        self.slab.retire(extent)
        for entry in [self.entries[o] for o in extent.offsets if o in self.entries]:
            if entry.is_decoded and entry.num_lent == 0:
                self.evict(entry)
