"""The file that an image path of a manifest means, whatever system wrote it."""

from __future__ import annotations

import os
import re
import unicodedata
from collections.abc import Iterator
from pathlib import Path
from urllib.parse import unquote

from harness.catalogue.images import Rejected

_BLANKS = " \t\r\n\f\v\u00a0\u200b\ufeff"
_URL = re.compile(r"[A-Za-z][A-Za-z0-9+.-]+://")


def find_image(root: Path, image: str) -> str:
    """`image`, or the first other spelling of it under which there is something in `root`.

    Raises:
        Rejected: it is a URL.
    """
    if os.path.exists(root / image):
        return image
    if _URL.match(image.strip(_BLANKS)):
        raise Rejected("image URL")
    return next((other for other in _spellings(image) if os.path.exists(root / other)), image)


def _spellings(image: str) -> Iterator[str]:
    """Without spaces at the ends, then with / for \\, then with its %20 decoded; each also in both Unicode forms."""
    text = image.strip(_BLANKS)
    slashed = text.replace("\\", "/")
    for spelling in (text, slashed, unquote(slashed)):
        yield spelling
        yield unicodedata.normalize("NFC", spelling)
        yield unicodedata.normalize("NFD", spelling)
