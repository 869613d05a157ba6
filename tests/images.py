"""Small pictures with real content (gradients, shapes, noise), made on the spot."""

import io
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image, ImageDraw


def picture(seed: int, *, width: int = 64, height: int = 48, mode: str = "RGB") -> Image.Image:
    """A gradient with a disc, a letter and some noise; the same for the same seed."""
    generator = np.random.default_rng(seed)
    y, x = np.mgrid[0:height, 0:width]
    weights = generator.uniform(-1, 1, size=(3, 2))
    pixels = 128 + 100 * (
        weights[:, 0] * x[..., None] / width + weights[:, 1] * y[..., None] / height
    )
    pixels += generator.normal(0, 6, size=pixels.shape)
    image = Image.fromarray(np.clip(pixels, 0, 255).astype(np.uint8))
    draw = ImageDraw.Draw(image)
    color = tuple(int(c) for c in generator.integers(0, 256, 3))
    draw.ellipse((width // 4, height // 4, width // 2, height // 2), fill=color)
    draw.text((width // 2, height // 3), chr(65 + seed % 26), fill=color[::-1])
    return image.convert(mode)


def jpeg_bytes(seed: int, *, quality: int = 90, **kwargs: Any) -> bytes:
    """A baseline JPEG of `picture(seed)`; further arguments go to `picture`."""
    buffer = io.BytesIO()
    picture(seed, **kwargs).save(buffer, "JPEG", quality=quality)
    return buffer.getvalue()


def write_image_folder(
    root: Path, *, classes: int = 3, per_class: int = 4, same_size: bool = False
) -> Path:
    """An ImageFolder tree root/class_00/000.jpg ...; sizes differ between images unless told."""
    for label in range(classes):
        folder = root / f"class_{label:02d}"
        folder.mkdir(parents=True)
        for number in range(per_class):
            seed = label * 1000 + number
            size = {} if same_size else {"width": 40 + 7 * number, "height": 36 + 5 * label}
            (folder / f"{number:03d}.jpg").write_bytes(jpeg_bytes(seed, **size))
    return root
