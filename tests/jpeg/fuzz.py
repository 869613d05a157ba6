"""Decode damaged JPEGs and tell how it went; run by test_fuzz.py in a process of its own.

python -m tests.jpeg.fuzz NUM_INPUTS SEED prints a JSON object: how often each code came back, and
digests of all codes and of all views that came out.
"""

import hashlib
import json
import sys
from collections import Counter

import numpy as np

from fastprune.base.errors import JpegError
from fastprune.jpeg.decode import read_box
from fastprune.jpeg.native import OK, kernel
from fastprune.jpeg.rewrite import to_restart_rows
from fastprune.jpeg.workspace import make_workspace
from tests.jpeg.samples import known_kinds

_SIZE = (20, 27)


def main(num_inputs: int, seed: int) -> None:
    generator = np.random.default_rng(seed)
    kinds = [np.frombuffer(jpeg, np.uint8) for jpeg in known_kinds().values()]
    views = hashlib.blake2b(digest_size=16)
    for jpeg in kinds:
        code, pixels = decode(jpeg, (3, 5, 30, 37))
        assert code == OK
        views.update(pixels.tobytes())
    codes = []
    for number in range(num_inputs):
        damaged = damage(kinds[number % len(kinds)], generator)
        top, left = (int(n) for n in generator.integers(0, 40, 2))
        height, width = (int(n) for n in generator.integers(1, 44, 2))
        code, pixels = decode(damaged, (top, left, height, width))
        codes.append(code)
        if code == OK:
            views.update(pixels.tobytes())
        if number % 4 == 0:
            check_rewrite(damaged, (top, left, height, width))
    report = {
        "bounds_checked": bounds_are_checked(),
        "codes": {str(code): count for code, count in sorted(Counter(codes).items())},
        "codes_digest": hashlib.blake2b(bytes(codes), digest_size=16).hexdigest(),
        "views_digest": views.hexdigest(),
    }
    print(json.dumps(report))


def check_rewrite(damaged, box):
    """If a damaged file can be rewritten, its views stay what they are."""
    try:
        rewritten = to_restart_rows(damaged.tobytes())
    except JpegError:
        return
    if rewritten is not None:
        before = decode(damaged, box)
        after = decode(np.frombuffer(rewritten, np.uint8), box)
        assert before[0] == after[0], (before[0], after[0])
        assert (before[1] == after[1]).all()


@kernel
def read_item(array, index):
    return array[index]


def bounds_are_checked():
    """Whether compiled code of our kind notices a step out of bounds."""
    try:
        read_item(np.zeros(8, np.uint8)[:4], 4)
    except IndexError:
        return True
    return False


def decode(jpeg, box):
    """Decode with a workspace that fits exactly, so that any step beyond it is out of bounds."""
    work = make_workspace(
        file_bytes=len(jpeg),
        width=box[3],
        height=box[2],
        output_height=_SIZE[0],
        output_width=_SIZE[1],
    )
    pixels = np.zeros((*_SIZE, 3), np.uint8)
    jpeg = np.frombuffer(jpeg.tobytes(), np.uint8)
    return read_box(jpeg, work, np.array(box, np.int64), False, pixels), pixels


def damage(jpeg, generator):
    """Change, drop, repeat or cut a few bytes anywhere, every fifth time in the headers."""
    changed = bytearray(jpeg.tobytes())
    for _ in range(generator.integers(1, 4)):
        reach = 700 if generator.random() < 0.2 else len(changed)
        at = int(generator.integers(2, max(3, min(reach, len(changed)))))
        kind = generator.integers(0, 6)
        if kind < 3:
            changed[at : at + 1] = bytes([generator.integers(0, 256)])
        elif kind == 3:
            del changed[at : at + int(generator.integers(1, 20))]
        elif kind == 4:
            changed[at:at] = bytes([0xFF, generator.integers(0, 256)])
        else:
            del changed[max(at, 4) :]
    return np.frombuffer(bytes(changed), np.uint8)


if __name__ == "__main__":
    main(int(sys.argv[1]), int(sys.argv[2]))
