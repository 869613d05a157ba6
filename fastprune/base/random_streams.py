"""All random numbers that decide what a batch is: pure functions of seed, epoch, row and slot.

Two generators with published constants: SplitMix64's finalizer, also for Numba kernels, and
Philox4x64-10 by NumPy. Only their raw streams are used: NumPy may change what `permutation` or
`integers` make of a stream, but not the stream.
"""

from typing import Any

import numpy as np
from numpy.typing import NDArray

# Steele et al. 2014, "Fast Splittable Pseudorandom Number Generators": the odd integer nearest to
# 2**64 / golden ratio, by which the generator's state advances. uint64 and no Python integers, so
# that Numba's typing of the constants gives the same wrap-around as NumPy's arrays.
GOLDEN = np.uint64(0x9E3779B97F4A7C15)


def mix64(z: Any) -> Any:
    """Scramble 64-bit numbers so that each bit of the result depends on all bits of `z`.

    A bijection of the 64-bit numbers. Numba can compile it (`njit(mix64)`) and gives the same bits.

    `z` is a uint64 array of any shape, in compiled code a uint64; so is the result.

    Source: Steele et al. 2014, "Fast Splittable Pseudorandom Number Generators"; with
    the constants of Stafford's Mix13, as in the published SplitMix64.
    """
    z = (z ^ (z >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    z = (z ^ (z >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    return z ^ (z >> np.uint64(31))


def row_keys(seed: int, rows: NDArray[np.int64]) -> NDArray[np.uint64]:
    """Draw one uniform 64-bit number per row, from the seed and the row alone.

    Sorting rows by their keys shuffles them, the same way on every machine and in every version;
    a row's key does not depend on which other rows there are.

    `seed` may be any integer; it is taken modulo 2**64.
    """
    # The generator's output number `row` after one that starts from the mixed seed: seeds that
    # differ by one must not give the same keys one row apart.
    start = mix64(np.array([seed % 2**64], np.uint64) + GOLDEN)
    keys: NDArray[np.uint64] = mix64(start + (rows.astype(np.uint64) + np.uint64(1)) * GOLDEN)
    return keys


def epoch_stream(seed: int, epoch: int, count: int) -> NDArray[np.uint64]:
    """Draw numbers from the stream of one epoch, which no other (seed, epoch) shares.

    `seed` and `epoch` lie in [0, 2**63). A longer draw begins with the same numbers.

    Returns:
        (count,) uint64, uniform.
    """
    return np.random.Philox(key=np.array([seed, epoch], np.uint64)).random_raw(count)


def view_number(seed: int, row: int, slot: int) -> int:
    """Draw one uniform number in [0, 2**63) per (seed, row, slot), each in [0, 2**63)."""
    # The last word of the counter keeps it apart from the streams of epochs, which start at 0.
    counter = np.array([0, 0, slot, 1], np.uint64)
    key = np.array([seed, row], np.uint64)
    return int(np.random.Philox(key=key, counter=counter).random_raw(1)[0] >> np.uint64(1))
