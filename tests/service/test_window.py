"""The window alone: what is decoded, kept, displaced and waited for."""

import numpy as np
import pytest

from fastprune.base.errors import InvalidValueError
from fastprune.service.demand import Images
from fastprune.service.slab import EXTENT_BYTES, Slab
from fastprune.service.window import MOST_TOGETHER, SILENT_SECONDS, Window
from fastprune.service.wire import WANTED, ServiceError, ServiceRefusedError

NUM_ROWS = 2000
STREAM = b"0" * 16
NEXT_STREAM = b"1" * 16


class Trainer:
    """A client that asks for given rows in order, 16 at a time."""

    def __init__(self, window, images, rows, *, stream=STREAM, side=10):
        self.window, self.images, self.side = window, images, side
        self.client = window.join("trainer", images, 0.0)
        self.announce(stream, rows)

    def announce(self, stream, rows, now=0.0):
        self.rows, self.num_asked, self.num_taken = np.asarray(rows), 0, 0
        counts = np.bincount(self.rows, minlength=NUM_ROWS).astype(np.uint8)
        self.window.announce(self.client, stream, counts, now)

    @property
    def is_done(self):
        return self.num_taken == len(self.rows)

    def step(self, now=0.0):
        """Take what is there, in order, and ask for more; whether anything was taken."""
        while self.num_asked < len(self.rows) and len(self.client.open) < 2:
            wanted = wanted_views(self.rows[self.num_asked : self.num_asked + 16], self.side)
            self.window.ask(self.client, self.num_asked, wanted, now)
            self.num_asked += len(wanted) // WANTED.itemsize
        ask = self.client.open.get(self.num_taken)
        if ask is None or not ask.is_assigned or ask.num_pending:
            return False
        self.window.take(self.client, self.num_taken, now)
        self.num_taken += ask.num_views
        return True


def wanted_views(rows, side):
    wanted = np.zeros(len(rows), WANTED)
    wanted["row"] = rows
    wanted["view"][:, 2:4] = side
    return wanted.tobytes()


def make_images(image_size=224):
    sides = np.full(NUM_ROWS, 50, np.uint16)
    return Images("train.beton", 0, sides, sides, image_size)


def make_window(num_views=1000, pace="auto"):
    per_extent = EXTENT_BYTES // make_images().place_bytes
    return Window(Slab(-(-num_views // per_extent) * EXTENT_BYTES), pace=pace)


def decode(window, num_threads=2):
    """Decode what the window wants; the number of views."""
    tasks = window.advance(num_threads)
    assert len(tasks) <= num_threads
    for task in tasks:
        assert len(task.entries) <= MOST_TOGETHER
        window.finish(task, {}, 0.0)
    window.advance(0)
    window.answers.clear()
    return sum(len(task.entries) for task in tasks)


def run(window, trainers, chances=None):
    """Let trainers take turns, each with its chance of a step, until all are done."""
    generator = np.random.default_rng(0)
    for _ in range(100_000):
        for trainer, chance in zip(trainers, chances or [1.0] * len(trainers), strict=True):
            if generator.random() < chance:
                trainer.step()
        decode(window)
        if all(trainer.is_done for trainer in trainers):
            return
    raise AssertionError("somebody starved")


def nested(*shares):
    """Rows of nested subsets in the order of the whole beton."""
    order = np.random.default_rng(1).permutation(NUM_ROWS)
    rank = np.random.default_rng(2).permutation(NUM_ROWS)
    return [order[rank[order] < share * NUM_ROWS] for share in shares]


@pytest.mark.parametrize("pace", ["auto", "together", "free"])
def test_equal_trainers_decode_each_view_once(pace):
    window, images = make_window(pace=pace), make_images()
    run(window, [Trainer(window, images, np.arange(NUM_ROWS)) for _ in range(3)])
    assert window.num_decoded == NUM_ROWS
    assert window.num_served == 3 * NUM_ROWS


def test_nested_subsets_decode_their_union_once():
    window, images = make_window(), make_images()
    run(window, [Trainer(window, images, rows) for rows in nested(0.3, 0.5, 0.7)])
    assert window.num_decoded == 0.7 * NUM_ROWS


def test_together_leaders_wait_for_slow_trainers_and_no_view_is_decoded_twice():
    window, images = make_window(300, pace="together"), make_images()
    trainers = [Trainer(window, images, rows) for rows in nested(0.3, 0.5, 0.7)]
    run(window, trainers, chances=[1.0, 0.3, 0.1])
    assert window.num_decoded == 0.7 * NUM_ROWS


def test_free_leaders_do_not_wait():
    window, images = make_window(300, pace="free"), make_images()
    fast, slow = (Trainer(window, images, np.arange(NUM_ROWS)) for _ in range(2))
    run(window, [fast])
    assert slow.num_taken == 0
    run(window, [slow])
    assert NUM_ROWS < window.num_decoded <= 2 * NUM_ROWS


def test_together_an_epochs_first_trainer_waits_for_those_who_still_are_in_the_last():
    window, images = make_window(300, pace="together"), make_images()
    first, second = (Trainer(window, images, np.arange(NUM_ROWS)) for _ in range(2))
    run(window, [first, second])
    first.announce(NEXT_STREAM, np.arange(NUM_ROWS))
    for _ in range(1000):
        first.step()
        decode(window)
    assert 0 < first.num_taken < 300
    second.announce(NEXT_STREAM, np.arange(NUM_ROWS))
    run(window, [first, second])
    assert window.num_decoded == 2 * NUM_ROWS


def test_a_trainer_that_leaves_is_waited_for_no_more():
    window, images = make_window(300, pace="together"), make_images()
    fast, gone = (Trainer(window, images, np.arange(NUM_ROWS)) for _ in range(2))
    gone.step()
    decode(window)
    window.leave(gone.client)
    run(window, [fast])
    assert window.num_decoded == NUM_ROWS


def test_a_silent_trainer_is_detached_and_takes_part_again_when_it_speaks():
    window, images = make_window(300, pace="together"), make_images()
    fast, silent = (Trainer(window, images, np.arange(NUM_ROWS)) for _ in range(2))
    silent.step()
    for _ in range(500):
        fast.step()
        decode(window)
    assert not fast.is_done
    assert fast.client.num_unanswered
    detached = window.detach_silent(SILENT_SECONDS + 1)
    assert detached == [silent.client]
    assert silent.client.is_silent
    run(window, [fast])
    # What it had been given was taken back; it asks again.
    assert not silent.client.open
    silent.num_asked = silent.num_taken
    run(window, [silent])


def test_a_trainer_that_waits_for_us_is_not_silent():
    window, images = make_window(), make_images()
    trainer = Trainer(window, images, np.arange(NUM_ROWS))
    trainer.step()
    assert window.detach_silent(1000.0) == []


def test_a_late_trainer_makes_nobody_wait_until_the_next_epoch():
    window, images = make_window(300, pace="together"), make_images()
    early = Trainer(window, images, np.arange(NUM_ROWS))
    while early.num_taken < 1000:
        early.step()
        decode(window)
    late = Trainer(window, images, np.arange(NUM_ROWS))
    assert late.client.is_late
    run(window, [early])
    run(window, [late])
    early.announce(NEXT_STREAM, np.arange(NUM_ROWS))
    late.announce(NEXT_STREAM, np.arange(NUM_ROWS))
    assert not late.client.is_late
    before = window.num_decoded
    run(window, [early, late])
    assert window.num_decoded - before == NUM_ROWS


def test_the_same_views_again_are_another_epoch():
    window, images = make_window(300, pace="together"), make_images()
    trainers = [Trainer(window, images, np.arange(NUM_ROWS)) for _ in range(2)]
    for _ in range(3):
        run(window, trainers, chances=[1.0, 0.2])
        for trainer in trainers:
            trainer.announce(STREAM, np.arange(NUM_ROWS))
            assert not trainer.client.is_late
    # Views of the epoch before may still be there.
    assert window.num_decoded <= 3 * NUM_ROWS


def test_two_views_of_a_row_are_kept_until_both_are_taken():
    window, images = make_window(), make_images()
    trainers = [Trainer(window, images, np.repeat(np.arange(500), 2)) for _ in range(2)]
    run(window, trainers)
    assert not any(stream.kept for stream in window._streams.values())


@pytest.mark.parametrize("pace", ["auto", "together", "free"])
def test_different_sizes_share_the_memory_and_nobody_starves(pace):
    window = make_window(300, pace=pace)
    large = Trainer(window, make_images(224), np.arange(NUM_ROWS))
    run(window, [large])
    large.announce(NEXT_STREAM, np.arange(NUM_ROWS))
    small = Trainer(window, make_images(96), np.arange(NUM_ROWS))
    run(window, [large, small])
    assert window.num_decoded == 3 * NUM_ROWS
    assert window.num_bytes <= window._places.slab.num_bytes


def test_unrelated_trainers_take_turns():
    window, images = make_window(), make_images()
    ahead = Trainer(window, images, np.arange(NUM_ROWS))
    while ahead.num_taken < 1000:
        ahead.step()
        decode(window)
    other = Trainer(window, images, np.arange(NUM_ROWS), stream=NEXT_STREAM, side=20)
    for _ in range(20):
        ahead.step()
        other.step()
        decode(window, num_threads=1)
    assert 100 <= other.num_taken <= ahead.num_taken - 1000 + 32


def test_a_view_that_cannot_be_decoded_has_a_reason_and_no_place():
    window, images = make_window(), make_images()
    trainer = Trainer(window, images, np.arange(16))
    trainer.step()
    (task,) = window.advance(1)
    window.finish(task, {3: "its bytes are damaged"}, 0.0)
    (ask,) = window.answers
    assert ask.reasons == {3: "its bytes are damaged"}
    assert ask.entries[3] is None
    assert window.num_views == 15
    assert trainer.step()
    assert trainer.client.num_lent == 0


def test_a_client_that_leaves_while_its_views_are_decoded_leaves_nothing_held():
    window, images = make_window(), make_images()
    trainer = Trainer(window, images, np.arange(64))
    trainer.step()
    tasks = window.advance(2)
    window.leave(trainer.client)
    for task in tasks:
        window.finish(task, {0: "damaged"}, 0.0)
    assert all(entry.num_lent == 0 for entry in window._places.entries.values())
    assert not window.answers


@pytest.mark.parametrize(
    ("row", "view", "fault"),
    [
        (NUM_ROWS, [0, 0, 10, 10, 0, 0, 0], "row 2000 is outside train.beton, of 2,000 rows"),
        (-1, [0, 0, 10, 10, 0, 0, 0], "row -1 is outside"),
        (0, [41, 0, 10, 10, 0, 0, 0], "does not lie inside row 0"),
        (0, [0, 2**31 - 1, 10, 10, 0, 0, 0], "does not lie inside"),
        (0, [0, 0, 0, 10, 0, 0, 0], "does not lie inside"),
        (0, [-1, 0, 10, 10, 0, 0, 0], "does not lie inside"),
        (0, [0, 0, 10, 10, 225, 0, 0], "does not lie inside"),
        (0, [0, 0, 10, 10, 0, 0, 2], "does not lie inside"),
    ],
)
def test_views_outside_the_images_are_refused_before_anything_is_kept(row, view, fault):
    window, images = make_window(), make_images()
    trainer = Trainer(window, images, np.arange(16))
    wanted = np.zeros(1, WANTED)
    wanted["row"], wanted["view"] = row, view
    with pytest.raises(ServiceError, match=fault):
        window.ask(trainer.client, 0, wanted.tobytes(), 0.0)
    assert not trainer.client.open
    assert window.advance(2) == []


def test_more_clients_than_the_memory_can_serve_are_refused():
    window, images = make_window(128), make_images()
    Trainer(window, images, np.arange(16))
    Trainer(window, images, np.arange(16))
    with pytest.raises(ServiceRefusedError, match=r"too small for 3 clients; start it with --mem"):
        window.join("third", images, 0.0)


def test_a_memory_without_room_is_refused():
    with pytest.raises(InvalidValueError, match="memory must be at least"):
        Slab(1000)
