"""The best Huffman table for given symbol counts, in JPEG's limits."""

import heapq
from collections.abc import Sequence

_LONGEST_CODE = 16
_RESERVED = 256  # takes the code of all ones, which JPEG forbids


def best_table(counts: Sequence[int]) -> tuple[list[int], list[int]]:
    """Counts of code lengths and the symbols in order of their codes: a DHT segment's content.

    Args:
        counts: (n,), how often each symbol occurs, n <= 256; where that is 0, it gets no code.

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
    symbols = [symbol for symbol, count in enumerate(counts) if count] + [_RESERVED]
    # Of equal weights the larger symbol is merged first. The reserved one weighs nothing: it is the
    # deepest, at the end of the longest codes.
    heap = [(int(counts[s]) if s < _RESERVED else 0, -s, node) for node, s in enumerate(symbols)]
    heapq.heapify(heap)
    parents = [0] * (2 * len(symbols) - 1)
    for node in range(len(symbols), len(parents)):
        weight, rank, child = heapq.heappop(heap)
        other_weight, other_rank, other = heap[0]
        heapq.heapreplace(heap, (weight + other_weight, min(rank, other_rank), node))
        parents[child] = parents[other] = node
    # A node is older than its parent, so from the root, the last, down each finds it done.
    depths = [0] * len(parents)
    for node in reversed(range(len(parents) - 1)):
        depths[node] = depths[parents[node]] + 1
    return {symbol: max(depths[node], 1) for node, symbol in enumerate(symbols)}


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
