import numba
import numpy as np

from fastprune.base.random_streams import epoch_stream, mix64, row_keys, view_number

_MASK = 2**64 - 1
_GOLDEN = 0x9E3779B97F4A7C15


def splitmix64(state, count):
    """The published generator, one number at a time."""
    for _ in range(count):
        state = (state + _GOLDEN) & _MASK
        z = state
        z = ((z ^ (z >> 30)) * 0xBF58476D1CE4E5B9) & _MASK
        z = ((z ^ (z >> 27)) * 0x94D049BB133111EB) & _MASK
        yield z ^ (z >> 31)


def test_plain_generator_gives_the_published_numbers():
    assert next(splitmix64(0, 1)) == 0xE220A8397B1DCDAF


def test_keys_are_splitmix64_from_the_mixed_seed():
    for seed in (0, 1, 2**64 - 1):
        expected = list(splitmix64(next(splitmix64(seed, 1)), 20))
        assert row_keys(seed, np.arange(20)).tolist() == expected


def test_key_of_a_row_does_not_depend_on_the_other_rows():
    rows = np.array([2, 5, 900])
    assert np.array_equal(row_keys(3, rows), row_keys(3, np.arange(1000))[rows])


def test_compiled_finalizer_gives_the_bits_of_the_arrays():
    numbers = np.random.default_rng(0).integers(0, 2**64, 1000, np.uint64)
    compiled = numba.njit(mix64)
    assert [compiled(number) for number in numbers] == mix64(numbers).tolist()


def test_finalizer_gives_the_published_numbers():
    states = np.arange(1, 6, dtype=np.uint64) * np.uint64(_GOLDEN)
    assert mix64(states).tolist() == list(splitmix64(0, 5))


def test_streams_of_epochs_and_views_are_fixed_for_all_time():
    first = epoch_stream(3, 1, 3)
    assert first.tolist() == [0xBD76F44AD094DFFC, 0xD92D2F96858FD40B, 0xD039B8AD64C457AB]
    assert np.array_equal(epoch_stream(3, 1, 9)[:3], first)
    assert view_number(3, 5, 1) == 0x33CE355BEEEABEE6
    assert len({view_number(3, row, slot) for row in range(9) for slot in range(9)}) == 81
