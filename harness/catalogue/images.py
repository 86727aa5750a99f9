"""Check of an image file: decoded once, completely, as training decodes it."""

from __future__ import annotations

import io
import os
import stat
from pathlib import Path
from typing import NamedTuple

import xxhash
from PIL import Image

from harness.catalogue.pixels import FORMATS, Unsupported, open_picture, upright, why_unknown

MOST_PIXELS, MOST_BYTES = 64_000_000, 64 * 2**20  # of an image, where nothing else is asked for
# Of a JPEG. One bit for each 8 x 8 block of each colour, the least there can be, makes a third.
MOST_PIXELS_PER_BYTE = 1024


class Rejected(Exception):
    """Why a row goes to the quarantine, as 'category' or 'category: detail'."""


class LoadedImage(NamedTuple):
    """A checked image file; width and height in pixels, upright; halved: `data` is the photo at half of both."""

    data: bytes
    extension: str
    checksum: int
    width: int
    height: int
    halved: bool


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


def check_image(data: bytes, max_pixels: int, halve: bool = True) -> LoadedImage:
    """Decodes the bytes of an image file completely, as training does (see harness.catalogue.pixels).

    Args:
        data: the file.
        max_pixels: more are refused.
        halve: a JPEG of up to four times as many is decoded, and kept, at half its width and height.

    Raises:
        Rejected: they are damaged, too large, of pixels without a rule, or no image of a known format.
    """
    halved = False
    try:
        with open_picture(data) as picture:
            extension = FORMATS[picture.format or ""]
            width, height = picture.size
            if extension == "jpg" and width * height > MOST_PIXELS_PER_BYTE * len(data):
                raise Rejected(f"truncated or damaged: {len(data):,} bytes cannot hold {width} x {height} pixels")
            if width * height > max_pixels:
                halved = halve and extension == "jpg" and _halve(picture, max_pixels)
                if not halved:
                    raise Rejected(f"too many pixels: {width} x {height}")
            image = upright(picture)
        if extension == "png":
            with open_picture(data) as picture:
                picture.verify()  # the checksums, which decoding leaves out
    except Image.UnidentifiedImageError:
        raise Rejected(why_unknown(data)) from None
    except Unsupported as reason:
        raise Rejected(str(reason)) from None
    except Rejected:
        raise
    except Exception as error:  # a decoder may raise anything on foreign bytes, and one file must not end the run
        raise Rejected(f"truncated or damaged: {error}") from None
    if halved:
        file = io.BytesIO()
        image.save(file, "JPEG", quality=95)
        data = file.getvalue()
    return LoadedImage(data, extension, xxhash.xxh3_64_intdigest(data), image.width, image.height, halved)


def _halve(picture: Image.Image, max_pixels: int) -> bool:
    """Lets a JPEG be decoded at half its width and height, where that is enough; False where it is not."""
    width, height = picture.size
    if min(width, height) < 2:
        return False
    picture.draft(picture.mode, (width // 2, height // 2))
    return picture.size != (width, height) and picture.width * picture.height <= max_pixels
