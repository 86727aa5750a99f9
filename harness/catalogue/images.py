"""Check of an image file: decoded once, completely, by the readers that training has too."""

from __future__ import annotations

import io
import os
import stat
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import NamedTuple

import xxhash
from PIL import Image

# Only what the training decoder reads too; it also keeps Pillow's rarer, riskier readers away from foreign bytes.
FORMATS = {"JPEG": "jpg", "PNG": "png", "WEBP": "webp", "BMP": "bmp", "TIFF": "tif", "JPEG2000": "jp2", "PPM": "ppm"}
EXTENSIONS = {**FORMATS, "MPO": "jpg"}  # Pillow's name for a JPEG followed by others, as phones write them
ORIENTATION_TAG = 0x0112
TURNED_ORIENTATIONS = (5, 6, 7, 8)  # those that swap width and height
MOST_PIXELS, MOST_BYTES = 64_000_000, 64 * 2**20  # of an image, where nothing else is asked for
# Of a JPEG. One bit for each 8 x 8 block of each colour, the least there can be, makes a third.
MOST_PIXELS_PER_BYTE = 1024


class Rejected(Exception):
    """Why a row goes to the quarantine, as 'category' or 'category: detail'."""


class LoadedImage(NamedTuple):
    """A checked image file; width and height in pixels, upright."""

    data: bytes
    extension: str
    checksum: int
    width: int
    height: int


def load_image(root: Path, image: str, max_bytes: int, max_pixels: int) -> LoadedImage:
    """Reads the file `image` under `root` and decodes it completely.

    A link inside `root` is followed wherever it leads: the folder is the user's own, the manifest may not be.

    Raises:
        Rejected: the path leads out of `root`, or the file is missing, empty, too large, damaged or no image.
    """
    path = os.path.normpath(root / image)
    if not Path(path).is_relative_to(root):
        raise Rejected("path leads out of the image folder")
    try:
        status = os.stat(path)
        if not stat.S_ISREG(status.st_mode):
            raise Rejected("not a file")
        if status.st_size > max_bytes:
            raise Rejected(f"too many bytes: {status.st_size:,}")
        data = Path(path).read_bytes()
    except (FileNotFoundError, NotADirectoryError):
        raise Rejected("missing file") from None
    except (OSError, ValueError) as error:
        raise Rejected(f"cannot be read: {getattr(error, 'strerror', None) or error}") from None
    if not data:
        raise Rejected("empty file")
    return check_image(data, max_pixels)


def check_image(data: bytes, max_pixels: int) -> LoadedImage:
    """Decodes the bytes of an image file completely.

    Raises:
        Rejected: they are damaged, too large, or no image of a known format.
    """
    try:
        with Image.open(io.BytesIO(data), formats=tuple(FORMATS)) as picture:
            width, height = picture.size
            if width * height > max_pixels:
                raise Rejected(f"too many pixels: {width} x {height}")
            if EXTENSIONS[picture.format or ""] == "jpg" and width * height > MOST_PIXELS_PER_BYTE * len(data):
                raise Rejected(f"truncated or damaged: {len(data):,} bytes cannot hold {width} x {height} pixels")
            picture.load()
            width, height = picture.size  # after load: Pillow turns a TIFF upright while it decodes
            if picture.getexif().get(ORIENTATION_TAG) in TURNED_ORIENTATIONS:
                width, height = height, width
            extension = EXTENSIONS[picture.format or ""]
    except Image.UnidentifiedImageError:
        raise Rejected(f"not an image of a known format: begins with {data[:16]!r}") from None
    except Rejected:
        raise
    except Exception as error:  # a decoder may raise anything on foreign bytes, and one file must not end the run
        raise Rejected(f"truncated or damaged: {error}") from None
    return LoadedImage(data, extension, xxhash.xxh3_64_intdigest(data), width, height)


@contextmanager
def own_pixel_limit() -> Iterator[None]:
    """Lifts Pillow's own limit, which would warn or raise where --max-pixels decides."""
    limit, Image.MAX_IMAGE_PIXELS = Image.MAX_IMAGE_PIXELS, None
    try:
        yield
    finally:
        Image.MAX_IMAGE_PIXELS = limit
