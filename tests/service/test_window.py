"""The window alone: which views are decoded, kept and displaced."""

import numpy as np
import pytest

from fastprune.service.slab import Slab, slot_bytes
from fastprune.service.streams import Images
from fastprune.service.window import (
    MAX_TASK_VIEWS,
    SILENT_SECONDS,
    Counts,
    Window,
    require_room,
)
from fastprune.service.wire import REQUESTED, ServiceError, ServiceRefusedError

NUM_ROWS = 2000
STREAM = b"0" * 16
NEXT_STREAM = b"1" * 16


class Trainer:
    """A client that requests given rows in order, 16 at a time."""

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
        """Release what is there, in order, and request more; False if nothing was there."""
        while self.num_asked < len(self.rows) and len(self.client.requests) < 2:
            wanted = wanted_views(self.rows[self.num_asked : self.num_asked + 16], self.side)
            self.window.request(self.client, self.num_asked, wanted, now)
            self.num_asked += len(wanted) // REQUESTED.itemsize
        request = self.client.requests.get(self.num_taken)
        if request is None or not request.is_answered:
            return False
        self.window.release(self.client, self.num_taken, now)
        self.num_taken += request.num_views
        return True


def wanted_views(rows, side):
    wanted = np.zeros(len(rows), REQUESTED)
    wanted["row"] = rows
    wanted["view"][:, 2:4] = side
    return wanted.tobytes()


def make_images():
    sides = np.full(NUM_ROWS, 50, np.uint16)
    return Images("train.beton", 0, sides, sides, 224)


def make_window(num_views=1000):
    return Window(Slab(num_views * slot_bytes(224), 224), Counts())


def decode(window, num_threads=2):
    """Decode what the window wants; the number of views."""
    tasks = window.advance(num_threads)
    assert len(tasks) <= num_threads
    for task in tasks:
        assert len(task.views) <= MAX_TASK_VIEWS
        window.finish(task, {}, 0.0)
    window.advance(0)
    window.answered.clear()
    return sum(len(task.views) for task in tasks)


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
    raise AssertionError("a trainer starved")


def nested(*shares):
    """Rows of nested subsets in the order of the whole beton."""
    order = np.random.default_rng(1).permutation(NUM_ROWS)
    rank = np.random.default_rng(2).permutation(NUM_ROWS)
    return [order[rank[order] < share * NUM_ROWS] for share in shares]


def test_equal_trainers_decode_each_view_once():
    window, images = make_window(), make_images()
    run(window, [Trainer(window, images, np.arange(NUM_ROWS)) for _ in range(3)])
    assert window.counts.decoded == NUM_ROWS
    assert window.counts.served == 3 * NUM_ROWS


def test_nested_subsets_decode_their_union_once():
    window, images = make_window(), make_images()
    run(window, [Trainer(window, images, rows) for rows in nested(0.3, 0.5, 0.7)])
    assert window.counts.decoded == 0.7 * NUM_ROWS


def test_leaders_do_not_wait():
    window, images = make_window(300), make_images()
    fast, slow = (Trainer(window, images, np.arange(NUM_ROWS)) for _ in range(2))
    run(window, [fast])
    assert slow.num_taken == 0
    run(window, [slow])
    assert NUM_ROWS < window.counts.decoded <= 2 * NUM_ROWS


def test_a_trainer_that_leaves_is_waited_for_no_more():
    window, images = make_window(300), make_images()
    fast, gone = (Trainer(window, images, np.arange(NUM_ROWS)) for _ in range(2))
    gone.step()
    decode(window)
    window.leave(gone.client)
    run(window, [fast])
    assert window.counts.decoded == NUM_ROWS


def test_a_silent_trainer_is_detached_and_takes_part_again_when_it_sends():
    window, images = make_window(300), make_images()
    fast, silent = (Trainer(window, images, np.arange(NUM_ROWS)) for _ in range(2))
    silent.step()
    decode(window)
    run(window, [fast])
    # What it requested is held for it, and much of what it announced is kept.
    assert any(view.num_holders for view in window.views.values())
    assert silent.client.stream.kept
    detached = window.detach_silent(SILENT_SECONDS + 1)
    assert silent.client in detached
    assert silent.client.is_silent
    assert not silent.client.requests
    assert not silent.client.stream.kept
    # It requests again what was taken back.
    silent.num_asked = silent.num_taken
    run(window, [silent])
    assert not silent.client.is_silent


def test_a_trainer_that_waits_for_us_is_not_silent():
    window, images = make_window(), make_images()
    trainer = Trainer(window, images, np.arange(NUM_ROWS))
    trainer.step()
    assert window.detach_silent(1000.0) == []


def test_a_late_trainer_makes_nobody_wait_until_the_next_epoch():
    window, images = make_window(300), make_images()
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
    before = window.counts.decoded
    run(window, [early, late])
    assert window.counts.decoded - before == NUM_ROWS


def test_the_same_views_again_are_another_epoch():
    window, images = make_window(300), make_images()
    trainers = [Trainer(window, images, np.arange(NUM_ROWS)) for _ in range(2)]
    for _ in range(3):
        run(window, trainers)
        for trainer in trainers:
            trainer.announce(STREAM, np.arange(NUM_ROWS))
            assert not trainer.client.is_late
    # Views of the epoch before may still be there.
    assert window.counts.decoded <= 3 * NUM_ROWS


def test_two_views_of_a_row_are_kept_until_both_are_taken():
    window, images = make_window(), make_images()
    trainers = [Trainer(window, images, np.repeat(np.arange(500), 2)) for _ in range(2)]
    run(window, trainers)
    assert not any(stream.kept for stream in window._streams.values())


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


def test_a_view_that_cannot_be_decoded_has_a_reason_and_no_slot():
    window, images = make_window(), make_images()
    trainer = Trainer(window, images, np.arange(16))
    trainer.step()
    (task,) = window.advance(1)
    window.finish(task, {3: "its bytes are damaged"}, 0.0)
    (request,) = window.answered
    assert request.reasons == {3: "its bytes are damaged"}
    assert request.views[3] is None
    assert len(window.views) == 15
    assert trainer.step()
    assert trainer.client.num_held == 0


def test_a_client_that_leaves_while_its_views_are_decoded_leaves_nothing_held():
    window, images = make_window(), make_images()
    trainer = Trainer(window, images, np.arange(64))
    trainer.step()
    tasks = window.advance(2)
    window.leave(trainer.client)
    for task in tasks:
        window.finish(task, {0: "damaged"}, 0.0)
    assert all(view.num_holders == 0 for view in window.views.values())
    assert not window.answered


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
    wanted = np.zeros(1, REQUESTED)
    wanted["row"], wanted["view"] = row, view
    with pytest.raises(ServiceError, match=fault):
        window.request(trainer.client, 0, wanted.tobytes(), 0.0)
    assert not trainer.client.requests
    assert window.advance(2) == []


@pytest.mark.parametrize(("num_clients", "is_enough"), [(2, True), (3, False)])
def test_more_clients_than_the_memory_can_serve_are_refused(num_clients, is_enough):
    memory_bytes = 128 * slot_bytes(224)
    if is_enough:
        require_room(memory_bytes, 224, num_clients)
    else:
        with pytest.raises(ServiceRefusedError, match=r"too small for 3 clients.* larger --memory"):
            require_room(memory_bytes, 224, num_clients)


def test_views_of_an_epoch_are_kept_for_trainers_still_in_the_last():
    window, images = make_window(), make_images()
    first, second = (Trainer(window, images, np.arange(500)) for _ in range(2))
    run(window, [first, second])
    first.side = second.side = 20
    first.announce(NEXT_STREAM, np.arange(500))
    while first.num_taken < 100:
        first.step()
        decode(window)
    assert len(first.client.stream.kept) >= 100
    second.announce(NEXT_STREAM, np.arange(500))
    run(window, [first, second])
    assert window.counts.decoded == 1000
