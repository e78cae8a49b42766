"""From a file to an RGB image of 8 bits a channel: the one place where images are decoded.

Pillow makes most images RGB as anybody expects: grey, palettes and CMYK are converted, an alpha channel is dropped. It
clips grey levels of more than 8 bits at 255, though, which leaves white or black. Those are scaled instead:

- 16 bits: by the range of their type, 0..65535. PNG and PGM files hold no wider whole numbers, also where Pillow has
  them as 32 bits.
- 32 bits, whole numbers or floats: their types' range says nothing. Floats that all lie in 0..1 are scaled from there;
  all others from the image's own least value to its greatest, infinite ones aside, and what is no number is black.
"""

from __future__ import annotations

import struct
from typing import IO

import numpy as np
from PIL import Image, UnidentifiedImageError

# What Pillow raises for files that are missing, cut short, damaged or no images at all.
UNREADABLE = (
    *(OSError, EOFError, SyntaxError, ValueError, LookupError, TypeError, RuntimeError, MemoryError),
    *(struct.error, Image.DecompressionBombError),
)
# Formats that Pillow writes and does not read, or recognises and does not decode.
NOT_DECODED = {"PALM", "PDF", "BUFR", "GRIB", "HDF5", "MPEG"}
# Formats whose whole numbers have 16 bits at most, also where Pillow has them in 32 (mode I).
SIXTEEN_BITS = {"PNG", "PPM"}


class UnreadableImage(Exception):
    """An image that cannot be decoded; its text is the file's name and the reason, in one line."""


def image_suffixes() -> frozenset[str]:
    """Returns the endings of files that Pillow reads, in lower case, with those of plugins that were imported."""
    Image.preinit()  # the common formats first: they stay the first that a file is tried as
    registered = Image.registered_extensions()
    return frozenset(suffix for suffix, name in registered.items() if name not in NOT_DECODED)


def decode(content: str | IO[bytes] | Image.Image, name: str) -> Image.Image:
    """Returns the RGB image of a path, an open file, or an image that was opened already.

    Raises:
        UnreadableImage: it cannot be decoded; `name` stands for it.
    """
    try:
        if isinstance(content, Image.Image):
            return to_rgb(content)
        with Image.open(content) as image:
            return to_rgb(image)
    except UNREADABLE as error:
        raise UnreadableImage(f"{name}: {reason_of(error)}") from error


def reason_of(error: BaseException) -> str:
    """Returns why an image cannot be read, in one line."""
    if isinstance(error, UnidentifiedImageError):
        return "not an image"
    return " ".join(str(error).split()) or type(error).__name__


def to_rgb(image: Image.Image) -> Image.Image:
    """Returns the image as RGB, with grey levels of more than 8 bits scaled (see the module's docstring)."""
    sixteen_bits = image.mode.startswith("I;16") or (image.mode == "I" and image.format in SIXTEEN_BITS)
    if not sixteen_bits and image.mode not in ("I", "F"):
        return image.convert("RGB")
    values = np.asarray(image).astype(np.float64)
    least, greatest = (0.0, 65535.0) if sixteen_bits else _range_of(values, image.mode)
    span = greatest - least or 1.0
    values = np.nan_to_num(values, nan=least, posinf=greatest, neginf=least)
    levels = np.rint((values - least) / span * 255).clip(0, 255)
    return Image.fromarray(levels.astype(np.uint8)).convert("RGB")


def _range_of(values: np.ndarray, mode: str) -> tuple[float, float]:
    """Returns the values of an image of 32 bits that become black and white."""
    finite = values[np.isfinite(values)]
    if not finite.size:
        return 0.0, 1.0
    least, greatest = float(finite.min()), float(finite.max())
    if mode == "F" and least >= 0 and greatest <= 1:
        return 0.0, 1.0
    return least, greatest
