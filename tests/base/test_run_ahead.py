import threading
import time
import weakref

import pytest

from fastprune.base.errors import ConversionError
from fastprune.base.run_ahead import ordered_ahead, run_ahead
from fastprune.base.threads import ThreadDiedError, WorkerThreads


@pytest.fixture
def pool():
    threads = WorkerThreads(3, name="test")
    yield threads
    threads.close()


def test_results_come_in_the_order_of_the_items(pool):
    def slow_if_even(i):
        time.sleep(0.01 * (i % 2 == 0))
        return i * i

    assert list(ordered_ahead(pool, slow_if_even, range(20), 4)) == [i * i for i in range(20)]
    assert list(ordered_ahead(pool, slow_if_even, [], 4)) == []
    assert list(ordered_ahead(pool, slow_if_even, range(3), 0)) == [0, 1, 4]


def test_items_are_started_as_far_ahead_as_asked_and_no_farther():
    started = []

    def start(item):
        started.append(item)
        return item

    results = run_ahead(iter(range(100)), start, lambda item: item, 3)
    assert next(results) == 0
    assert started == [0, 1, 2, 3]
    assert next(results) == 1
    assert started == [0, 1, 2, 3, 4]


def test_exception_arrives_where_its_result_would_have_come(pool):
    def fail_at_two(i):
        if i == 2:
            raise ValueError("two")
        return i

    results = ordered_ahead(pool, fail_at_two, range(10), 4)
    assert [next(results), next(results)] == [0, 1]
    with pytest.raises(ValueError, match="two"):
        next(results)


def test_closing_cancels_calls_that_have_not_begun():
    begun, go = [], threading.Event()

    def wait(i):
        begun.append(i)
        if i:
            go.wait()

    pool = WorkerThreads(1, name="test")
    results = ordered_ahead(pool, wait, range(10), 5)
    next(results)
    results.close()
    go.set()
    assert pool.wait(pool.submit(lambda: "free")) == "free"
    assert begun in ([0], [0, 1])
    pool.close()


def test_suspended_generator_keeps_no_result(pool):
    class Batch:
        pass

    results = ordered_ahead(pool, lambda _: Batch(), range(5), 2)
    batch = weakref.ref(next(results))
    assert batch() is None


def test_death_of_a_thread_is_noticed(pool):
    def die(i):
        if i == 1:
            raise SystemExit
        return i

    threading.excepthook, hook = lambda _: None, threading.excepthook
    try:
        results = ordered_ahead(pool, die, range(5), 2)
        assert next(results) == 0
        with pytest.raises(ThreadDiedError):
            next(results)
    finally:
        threading.excepthook = hook


def test_threads_that_cannot_be_started_are_named_and_none_is_left(monkeypatch):
    before, start = threading.active_count(), threading.Thread.start

    def refuse_the_third(thread):
        if thread.name == "test-2":
            raise RuntimeError("can't start new thread")
        start(thread)

    monkeypatch.setattr(threading.Thread, "start", refuse_the_third)
    with pytest.raises(ConversionError, match=r"only 2 of 4 threads could be started .*fewer"):
        WorkerThreads(4, name="test", error=ConversionError)
    assert threading.active_count() == before
