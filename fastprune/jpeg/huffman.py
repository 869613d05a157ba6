"""The best Huffman table for given symbol counts, in JPEG's limits."""

import heapq
from collections.abc import Sequence

_LONGEST_CODE = 16
_RESERVED = 256  # takes the code of all ones, which JPEG forbids


def best_table(counts: Sequence[int]) -> tuple[list[int], list[int]]:
    """Counts of code lengths and the symbols in order of their codes: a DHT segment's content.

    Args:
        counts: (256,), how often each symbol occurs; those of 0 get no code.

    Returns:
        (16,) how many codes have 1, 2, ... 16 bits, and the symbols, shortest code first.

    Source: ITU-T T.81, K.2.
    """
    lengths = _code_lengths(counts)
    histogram = [0] * 64
    for length in lengths.values():
        histogram[length] += 1
    _shorten(histogram)
    # The code of all ones is the last of the longest.
    longest = max(length for length in range(64) if histogram[length])
    histogram[longest] -= 1
    symbols = sorted(
        (symbol for symbol in lengths if symbol != _RESERVED), key=lambda s: (lengths[s], s)
    )
    return histogram[1 : _LONGEST_CODE + 1], symbols


def _code_lengths(counts: Sequence[int]) -> dict[int, int]:
    """Depth of each symbol that occurs, and of the reserved one, in the Huffman tree."""
    weights = {symbol: int(count) for symbol, count in enumerate(counts) if count}
    # The rarest symbol is the deepest, so the reserved one is at the end of the longest codes.
    weights[_RESERVED] = 0
    heap: list[tuple[int, int, tuple[int, ...]]] = [
        (weight, -symbol, (symbol,)) for symbol, weight in weights.items()
    ]
    heapq.heapify(heap)
    lengths = dict.fromkeys(weights, 0)
    while len(heap) > 1:
        first, second = heapq.heappop(heap), heapq.heappop(heap)
        merged = first[2] + second[2]
        for symbol in merged:
            lengths[symbol] += 1
        heapq.heappush(heap, (first[0] + second[0], min(first[1], second[1]), merged))
    return {symbol: max(length, 1) for symbol, length in lengths.items()}


def _shorten(histogram: list[int]) -> None:
    """Make codes of more than 16 bits shorter, at the cost of others (T.81, figure K.3)."""
    for length in range(len(histogram) - 1, _LONGEST_CODE, -1):
        while histogram[length]:
            donor = length - 2
            while not histogram[donor]:
                donor -= 1
            histogram[length] -= 2
            histogram[length - 1] += 1
            histogram[donor + 1] += 2
            histogram[donor] -= 1
