"""Procedural pictures for the demo: ten classes, easy and hard ones among them.

A picture is a shape of random color, size, position and rotation on a textured ground. Three pairs
of classes look alike (circle and egg, square and slab, horizontal and diagonal stripes). Harder
pictures have less contrast and more noise, and a bar may cover part of the shape. A few training
pictures carry the wrong label.
"""

import math
from collections.abc import Callable
from pathlib import Path

import numpy as np
from numpy.typing import NDArray
from PIL import Image, ImageDraw

from fastprune.base.progress import track

CLASS_NAMES = (
    "circle",
    "cross",
    "diagonal_stripes",
    "egg",
    "horizontal_stripes",
    "ring",
    "slab",
    "square",
    "star",
    "triangle",
)
WRONG_LABEL_SHARE = 0.03

_SIDE = 64
# Drawn at twice the side and shrunk: PIL's polygons have hard edges.
_SUPERSAMPLING = 2
_JPEG_QUALITY = 92

Points = list[tuple[float, float]]


def write_demo_images(root: Path, *, train_per_class: int, val_per_class: int, seed: int) -> None:
    """Write root/train/<class>/*.jpg and root/val/<class>/*.jpg, 64×64 pixels.

    About 3% of the training pictures have a wrong label. The same seed gives the same pixels.
    """
    jobs = [
        (split, label, number)
        for split, count in (("train", train_per_class), ("val", val_per_class))
        for label in range(len(CLASS_NAMES))
        for number in range(count)
    ]
    for split in ("train", "val"):
        for name in CLASS_NAMES:
            (root / split / name).mkdir(parents=True, exist_ok=True)
    for split, label, number in track(jobs, description="draw", total=len(jobs), unit="pictures"):
        # A generator per picture, so that the number of pictures does not change the pixels.
        generator = np.random.default_rng([seed, split == "val", label, number])
        drawn = label
        if split == "train" and generator.random() < WRONG_LABEL_SHARE:
            drawn = (label + int(generator.integers(1, len(CLASS_NAMES)))) % len(CLASS_NAMES)
        path = root / split / CLASS_NAMES[label] / f"{number:05d}.jpg"
        draw_picture(drawn, generator).save(path, quality=_JPEG_QUALITY)


def draw_picture(label: int, generator: np.random.Generator) -> Image.Image:
    """Draw one 64×64 RGB picture of a class; the generator decides how hard it is."""
    # Most pictures are easy, some hard: the mean of this distribution is 0.375.
    hardness = generator.beta(1.2, 2.0)
    side = _SIDE * _SUPERSAMPLING
    ground = _texture(generator, side)
    tone = generator.uniform(0, 1, 3)
    contrast = 0.75 - 0.5 * hardness
    # The ink moves away from the ground's tone, toward whichever end has room.
    ink = tone + contrast * np.where(tone > 0.5, -1.0, 1.0)
    shape = _mask(CLASS_NAMES[label], generator, side)[..., None]
    pixels = (tone + 0.35 * (ground - 0.5)) * (1 - shape) + ink * shape
    picture = Image.fromarray((np.clip(pixels, 0, 1) * 255).astype(np.uint8))
    if generator.random() < hardness:
        _cover(picture, generator)
    # Noise comes after the shrinking, which would average it away.
    picture = picture.resize((_SIDE, _SIDE), Image.Resampling.BOX)
    noise = generator.normal(0, 4 + 40 * hardness, (_SIDE, _SIDE, 3))
    return Image.fromarray(np.clip(np.asarray(picture) + noise, 0, 255).astype(np.uint8))


def _texture(generator: np.random.Generator, side: int) -> NDArray[np.float64]:
    """Draw smooth random blobs, (side, side, 3) in [0, 1]."""
    coarse = generator.integers(0, 256, (6, 6, 3)).astype(np.uint8)
    smooth = Image.fromarray(coarse).resize((side, side), Image.Resampling.BICUBIC)
    return np.asarray(smooth, dtype=np.float64) / 255


def _cover(picture: Image.Image, generator: np.random.Generator) -> None:
    """Draw a bar of one color across the picture."""
    side = picture.width
    x, y = generator.uniform(0.25, 0.75, 2) * side
    angle = generator.uniform(0, math.pi)
    dx, dy = math.cos(angle) * side, math.sin(angle) * side
    color = tuple(int(value) for value in generator.integers(0, 256, 3))
    width = int(side * generator.uniform(0.12, 0.3))
    ImageDraw.Draw(picture).line((x - dx, y - dy, x + dx, y + dy), fill=color, width=width)


def _mask(name: str, generator: np.random.Generator, side: int) -> NDArray[np.float64]:
    """Draw the shape of a class: (side, side), 1 inside and 0 outside."""
    radius = side * generator.uniform(0.2, 0.38)
    center = side / 2 + generator.uniform(-0.12, 0.12, 2) * side
    turn = generator.uniform(0, 2 * math.pi)
    image = Image.new("L", (side, side), 0)
    draw = ImageDraw.Draw(image)
    if name in _STRIPES:
        _draw_stripes(draw, center, radius, _STRIPES[name] + generator.normal(0, 0.08))
    else:
        for points, fill in _OUTLINES[name]():
            draw.polygon(_transformed(points, center, radius, turn), fill=fill)
    return np.asarray(image, dtype=np.float64) / 255


def _transformed(points: Points, center: NDArray[np.float64], radius: float, turn: float) -> Points:
    """Rotate, scale and move an outline given in the unit circle."""
    cosine, sine = math.cos(turn), math.sin(turn)
    return [
        (
            center[0] + radius * (x * cosine - y * sine),
            center[1] + radius * (x * sine + y * cosine),
        )
        for x, y in points
    ]


def _draw_stripes(
    draw: ImageDraw.ImageDraw, center: NDArray[np.float64], radius: float, angle: float
) -> None:
    """Draw three parallel bars at an angle to the horizontal."""
    for offset in (-0.75, 0.0, 0.75):
        bar = [(-1.0, offset - 0.2), (1.0, offset - 0.2), (1.0, offset + 0.2), (-1.0, offset + 0.2)]
        draw.polygon(_transformed(bar, center, radius, angle), fill=255)


def _ellipse(width: float, height: float) -> Points:
    """A closed curve of 40 corners."""
    angles = [2 * math.pi * step / 40 for step in range(40)]
    return [(width * math.cos(angle), height * math.sin(angle)) for angle in angles]


def _rectangle(width: float, height: float) -> Points:
    """Four corners around the origin."""
    return [(-width, -height), (width, -height), (width, height), (-width, height)]


def _spokes(corners: int, inner: float) -> Points:
    """A star with as many points as corners; with inner = cos(pi / corners) a regular polygon."""
    radii = (1.0, inner)
    angles = [math.pi * step / corners for step in range(2 * corners)]
    return [
        (radii[step % 2] * math.cos(angle), radii[step % 2] * math.sin(angle))
        for step, angle in enumerate(angles)
    ]


_STRIPES = {"horizontal_stripes": 0.0, "diagonal_stripes": math.pi / 6}
_OUTLINES: dict[str, Callable[[], list[tuple[Points, int]]]] = {
    "circle": lambda: [(_ellipse(0.9, 0.9), 255)],
    "cross": lambda: [(_rectangle(1.0, 0.3), 255), (_rectangle(0.3, 1.0), 255)],
    "egg": lambda: [(_ellipse(1.0, 0.78), 255)],
    "ring": lambda: [(_ellipse(0.95, 0.95), 255), (_ellipse(0.5, 0.5), 0)],
    "slab": lambda: [(_rectangle(0.95, 0.68), 255)],
    "square": lambda: [(_rectangle(0.8, 0.8), 255)],
    "star": lambda: [(_spokes(5, 0.45), 255)],
    "triangle": lambda: [(_spokes(3, 0.5), 255)],
}
