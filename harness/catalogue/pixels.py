"""Pixels of an image file: one reading for the check at ingest, training, evaluation, export, search, panels and
thumbnails.

Pillow reads, `upright` says how. DALI may read the files in which it is known to find the same pixels (`plain`); its
backend leaves every other file to Pillow.
"""

from __future__ import annotations

import io
from typing import Literal

import numpy as np
from PIL import Image

Colour = tuple[int, int, int]

# Format by Pillow's name -> suffix. Other readers of Pillow's stay away from foreign bytes.
FORMATS = {
    "JPEG": "jpg",
    "MPO": "jpg",  # a JPEG followed by others, as phones write them
    "PNG": "png",
    "WEBP": "webp",
    "AVIF": "avif",
    "GIF": "gif",
    "BMP": "bmp",
    "TIFF": "tif",
    "JPEG2000": "jp2",
    "PPM": "ppm",
}
_OPENED = [name for name in FORMATS if name != "MPO"]  # Pillow finds MPO in what it opens as JPEG
_CONVERTED = ("1", "L", "LA", "La", "P", "PA", "RGB", "RGBA", "RGBa", "RGBX", "CMYK", "YCbCr")
_ORIENTATION = 0x0112
Image.MAX_IMAGE_PIXELS = None  # Pillow's own limit would warn or raise where --max-pixels decides
_EXIF_BYTES = {1: 1, 2: 1, 3: 2, 4: 4, 5: 8, 6: 1, 7: 1, 8: 2, 9: 4, 10: 8, 11: 4, 12: 8}  # by type
_TURNS = {
    2: Image.Transpose.FLIP_LEFT_RIGHT,
    3: Image.Transpose.ROTATE_180,
    4: Image.Transpose.FLIP_TOP_BOTTOM,
    5: Image.Transpose.TRANSPOSE,
    6: Image.Transpose.ROTATE_270,
    7: Image.Transpose.TRANSVERSE,
    8: Image.Transpose.ROTATE_90,
}
# First bytes -> name of formats that are not read.
_OTHERS = {
    b"8BPS": "PSD",
    b"%PDF": "PDF",
    b"%!PS": "EPS",
    b"\0\0\1\0": "ICO",
    b"icns": "ICNS",
    b"qoif": "QOI",
    b"DDS ": "DDS",
    b"\xff\x0a": "JPEG XL",
    b"\0\0\0\x0cJXL ": "JPEG XL",
    b"FUJIFILM": "camera raw",
    b"\xd7\xcd\xc6\x9a": "WMF",
    b"PK\3\4": "ZIP",
    b"\x1f\x8b": "gzip",
}
_KNOWN = (b"\xff\xd8\xff", b"\x89PNG", b"GIF8", b"II*\0", b"MM\0*")  # first bytes of formats that are read
_HEIF = {b"heic", b"heix", b"hevc", b"hevx", b"heim", b"heis", b"mif1", b"msf1"}


class Unsupported(ValueError):
    """A picture that no rule turns into 8-bit RGB; the message is 'category: detail'."""


def open_picture(data: bytes) -> Image.Image:
    """Opens a file of a known format; no pixel is decoded.

    Raises:
        PIL.UnidentifiedImageError: it has none; other errors: its header is damaged.
    """
    return Image.open(io.BytesIO(data), formats=_OPENED)


def upright(picture: Image.Image) -> Image.Image:
    """All pixels of an opened picture: 8-bit RGB, or RGBA where some are transparent.

    Orientation is EXIF's, else XMP's. Values of 16 bits lose the lower 8. Colour profiles are ignored. CMYK in a JPEG
    counts as inverted, with or without Adobe's marker, as in browsers. Of several frames the first one counts.

    Raises:
        Unsupported: the values have no agreed range or colours.
        Exception: any other, where the bytes are damaged.
    """
    # Pillow cuts a PNG's 16 bits to 8, but not its transparent colour; loading empties the tile.
    deep = picture.mode.startswith("I") or any("16B" in str(tile.args) for tile in picture.tile)
    file_format = picture.format
    picture.load()
    if deep and file_format == "PNG" and "transparency" in picture.info:
        raise Unsupported("unsupported pixels: a transparent colour of 16 bits (save it with an alpha channel)")
    turn = _TURNS.get(_orientation(picture))
    image: Image.Image = picture
    if picture.mode.startswith("I;16") or (picture.mode == "I" and file_format == "PPM"):
        image = Image.fromarray(_eight_bits(picture))
    elif picture.mode not in _CONVERTED:
        kind = {"I": "32-bit or signed integers", "F": "floating point"}.get(picture.mode, picture.mode)
        raise Unsupported(f"unsupported pixels: {kind} (save it with 8 or 16 bits a channel, grey or RGB)")
    if image.has_transparency_data:
        image = image.convert("RGBA")
    if image.mode != "RGB" and (image.mode != "RGBA" or image.getextrema()[3] == (255, 255)):
        image = image.convert("RGB")
    return image if turn is None else image.transpose(turn)


def on_background(image: Image.Image, background: Colour) -> Image.Image:
    """RGB of what `upright` gave; `background` shows through transparent pixels."""
    if image.mode == "RGB":
        return image
    below = Image.new("RGB", image.size, background)
    below.paste(image, mask=image.getchannel("A"))
    return below


def why_unknown(data: bytes) -> str:
    """Why `open_picture` did not know a file, by its first bytes, as 'category: detail'."""
    if data.startswith(_KNOWN) or data[4:11] == b"ftypavi":
        return "truncated or damaged: its header, or of a kind that Pillow does not read"
    if name := _other_format(data):
        return f"{name} files are not read: save them as JPEG, PNG or WebP"
    return f"not an image of a known format: begins with {data[:16]!r}"


def _other_format(data: bytes) -> str:
    """Name of a format that is not read; empty for an unknown one."""
    for start, name in _OTHERS.items():
        if data.startswith(start):
            return name
    if data[4:8] == b"ftyp":
        return "HEIC" if data[8:12] in _HEIF else "MP4"
    text = data[:1024].lstrip(b"\xef\xbb\xbf \t\r\n").lower()
    return "SVG" if text.startswith(b"<svg") or (text.startswith(b"<?xml") and b"<svg" in text) else ""


def plain(data: bytes) -> bool:
    """True where DALI and Pillow find the same pixels: an 8-bit grey or YCbCr JPEG, or an 8-bit PNG without alpha,
    whose orientation is a well-formed EXIF tag (of a JPEG) or none.
    """
    if data[:3] == b"\xff\xd8\xff":
        return _plain_jpeg(data)
    return data[:8] == b"\x89PNG\r\n\x1a\n" and _plain_png(data)


def _orientation(picture: Image.Image) -> int:
    """1..8 of the loaded picture; 1 where its EXIF cannot be read."""
    try:
        found = picture.getexif().get(_ORIENTATION)
    except Exception:  # Pillow's EXIF reader raises all kinds of errors; the pixels are good all the same
        return 1
    return found if found in (2, 3, 4, 5, 6, 7, 8) else 1


def _eight_bits(picture: Image.Image) -> np.ndarray:
    """uint8 [H, W] of 16-bit grey."""
    tags = getattr(picture, "tag_v2", {})
    bits = tags.get(258, (16,))[0]  # BitsPerSample: Pillow leaves 12 bits as they are
    values = (np.asarray(picture).astype(np.int64) >> (bits - 8)).clip(0, 255).astype(np.uint8)
    return 255 - values if tags.get(262) == 0 else values  # WhiteIsZero: Pillow inverts 8 bits only


def _plain_jpeg(data: bytes) -> bool:
    if b"\xff\xd9" not in data[-64:]:  # a glance is cheap; DALI loses a batch to a file that is cut off
        return False
    place, exif, adobe = 2, 0, 1
    seen = xmp = frame = False
    while place + 4 <= len(data) and data[place] == 0xFF:
        marker, length = data[place + 1], int.from_bytes(data[place + 2 : place + 4], "big")
        body = data[place + 4 : place + 2 + length]
        if marker == 0xDA:
            return frame and adobe == 1 and exif >= 0 and (exif > 0 or not xmp)
        if marker in (0xC0, 0xC1, 0xC2):  # baseline, extended, progressive
            frame = body[:1] == b"\x08" and (
                body[5:6] == b"\1" or (body[5:6] == b"\3" and _plain_components(body[6:15]))
            )
        elif marker not in (0xC4, 0xDB, 0xDD, *range(0xE0, 0xF0), 0xFE):  # tables, restarts, APPn, comment
            return False
        elif marker == 0xE1 and body.startswith(b"Exif\0\0"):
            exif, seen = -1 if seen or frame else _exif_orientation(body[6:]), True
        elif marker == 0xE1:
            xmp = xmp or b"Orientation" in body
        elif marker == 0xEE and body.startswith(b"Adobe"):
            adobe = body[11] if len(body) > 11 else -1
        place += 2 + length
    return False


def _plain_components(components: bytes) -> bool:
    """Of a JPEG's three (number, sampling, table): YCbCr as 4:4:4, 4:2:2 or 4:2:0."""
    return components[::3] != b"RGB" and components[1::3] in (b"\x11\x11\x11", b"\x21\x11\x11", b"\x22\x11\x11")


def _exif_orientation(tiff: bytes) -> int:
    """1..8, 0 where there is none, -1 where readers may differ: DALI's dies of a value outside of the block."""
    orders: dict[bytes, Literal["little", "big"]] = {b"II*\0": "little", b"MM\0*": "big"}
    order = orders.get(tiff[:4])
    if order is None:
        return -1

    def number(place: int, size: int) -> int:
        return int.from_bytes(tiff[place : place + size], order)

    start = number(4, 4) + 2
    end = start + 12 * number(start - 2, 2)
    found = 0
    for place in range(start, end, 12):
        tag, kind, count, value = (number(place + i, size) for i, size in ((0, 2), (2, 2), (4, 4), (8, 4)))
        length = count * _EXIF_BYTES.get(kind, len(tiff))
        if place + 12 > len(tiff) or (length > 4 and value + length > len(tiff)):
            return -1
        if tag == _ORIENTATION:
            if found or (kind, count) != (3, 1) or not 1 <= number(place + 8, 2) <= 8:
                return -1
            found = number(place + 8, 2)
    return found


def _plain_png(data: bytes) -> bool:
    if len(data) < 26 or data[24] != 8 or data[25] not in (0, 2, 3):  # grey, RGB, palette
        return False
    place = 8
    while place + 12 <= len(data):
        length, name = int.from_bytes(data[place : place + 4], "big"), data[place + 4 : place + 8]
        if name == b"IEND":
            return True
        if name in (b"tRNS", b"eXIf", b"acTL"):
            return False
        if name in (b"tEXt", b"zTXt", b"iTXt"):
            keyword = data[place + 8 : place + 88]
            if keyword.startswith((b"XML:com.adobe.xmp", b"Raw profile type")):
                return False
        place += 12 + length
    return False
