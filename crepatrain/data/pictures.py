"""Reading image files: stills, and the moving pictures that browsers show."""

from collections.abc import Iterator, Sequence
from pathlib import Path

import numpy as np
from PIL import Image, ImageOps, ImageSequence

from crepatrain.data.clip import Unreadable

IMAGE_SUFFIXES = frozenset({".jpg", ".jpeg", ".jfif", ".png", ".apng", ".webp", ".bmp", ".tif", ".tiff"})

# Formats whose pictures follow each other in time. Those of others are pages, or copies of one picture in several sizes.
_MOVING = frozenset({"PNG", "WEBP", "GIF"})
# What browsers take for a picture that gives no time of its own, in milliseconds.
_UNTIMED = 100


def is_image(path: Path) -> bool:
    """Whether a file is read as an image, by its name."""
    return path.suffix.lower() in IMAGE_SUFFIXES


def shown_pictures(path: Path) -> Iterator[tuple[float, np.ndarray]]:
    """Every picture of an image file in the order of showing: when, in seconds, and [H, W, 3] uint8, on white where transparent.

    Raises:
        Unreadable: it is no image, or is damaged.
        OSError: it can't be read at present.
    """
    try:
        with Image.open(path) as image:
            if image.format == "TIFF" and getattr(image, "n_frames", 1) > 1:
                raise Unreadable("it has several pages: save them as one file each")
            if image.format not in _MOVING:
                yield 0.0, _as_shown(image)
                return
            milliseconds = 0.0
            for number, picture in enumerate(ImageSequence.Iterator(image)):
                if number == 0 and image.info.get("default_image"):  # for programs that show no moving PNG
                    continue
                yield milliseconds / 1000, _as_shown(picture)
                milliseconds += picture.info.get("duration") or _UNTIMED
    except (SyntaxError, ValueError, EOFError, Image.DecompressionBombError) as error:  # SyntaxError: a broken PNG
        raise Unreadable("it is no image, or is cut off") from error
    except OSError as error:
        if error.errno is not None:
            raise
        raise Unreadable("it is no image, or is cut off") from error


def chosen_pictures(path: Path, frames: Sequence[int]) -> Iterator[np.ndarray]:
    """Some pictures of an image file, by their ascending numbers."""
    wanted = set(frames)
    for number, (_, picture) in enumerate(shown_pictures(path)):
        if number in wanted:
            yield picture
        if number == frames[-1]:
            return


def _as_shown(image: Image.Image) -> np.ndarray:
    upright = ImageOps.exif_transpose(image)
    if upright.mode.startswith("I"):  # grey of 16 bits, which Pillow would cut off at 255
        upright = Image.fromarray((np.asarray(upright).astype(np.int64) >> 8).astype(np.uint8))
    upright = upright.convert("RGBA")
    white = Image.new("RGBA", upright.size, "white")
    return np.array(Image.alpha_composite(white, upright).convert("RGB"))
