"""Near duplicates of pictures: fingerprints, and pairs of them at a cost that grows as n log n."""

from __future__ import annotations

import numpy as np
from PIL import Image

from harness.catalogue.pixels import on_background, open_picture, upright

SIDE, LOW = 32, 8  # pixels of the small grey picture, and lowest frequencies of it that are kept each way
BITS = 6  # that may differ in the hashes of near duplicates
FAINT = 64.0  # frequencies are compared in steps of a quarter of a level: in a flat picture the rest is noise
COLOUR = 2.5  # levels of 255 by which their 8 x 8 colours may differ in the mean: a copy saved again stays below
BANDS, BAND = 4, 16  # parts of a hash, and bits of each
NEIGHBOURS = 32  # pictures that each is compared with in its bucket, at most

_n, _k = np.arange(SIDE), np.arange(LOW)[:, None]
_COSINES = np.cos(np.pi * (_n + 0.5) * _k / SIDE)  # [LOW, SIDE], the first rows of the DCT-II


def fingerprint(encoded: bytes) -> tuple[int, np.ndarray]:
    """64-bit pHash and colours of an image file.

    The hash has a bit for each of the 8 x 8 lowest frequencies of the discrete cosine transform of the picture, 32 x 32
    in grey: whether it is above their median (Zauner 2010, "Implementation and benchmarking of perceptual image hash
    functions"). Pictures of one shape in two colours share it, hence the colours: uint8 [192], 8 x 8 RGB.

    Raises:
        Exception: any, where the bytes cannot be decoded.
    """
    with open_picture(encoded) as picture:
        if picture.format == "JPEG":
            picture.draft(picture.mode, (2 * SIDE, 2 * SIDE))  # decodes at an eighth of the size where that is enough
        image = on_background(upright(picture), (255, 255, 255))
    small = image.resize((SIDE, SIDE), Image.Resampling.BOX)
    waves = np.round(_COSINES @ np.asarray(small.convert("L"), np.float64) @ _COSINES.T / FAINT)
    above = (waves > np.median(waves)).ravel()
    colours = np.asarray(small.resize((LOW, LOW), Image.Resampling.BOX)).ravel()
    return int.from_bytes(np.packbits(above).tobytes(), "big"), colours


def near_pairs(hashes: np.ndarray, colours: np.ndarray) -> np.ndarray:
    """Pairs of near duplicates, int64 [m, 2], the lower number first.

    Pictures that share one of four 16-bit parts of their hashes lie in one bucket, sorted by hash; each is compared
    with the next 32 there, so that a bucket of many like pictures costs no square. A pair that differs in all four
    parts, or lies further apart in each bucket, is missed; pictures of equal hash lie side by side.

    Args:
        hashes: [n] uint64.
        colours: [n, 192] uint8.
    """
    found = [np.empty((0, 2), np.int64)]
    for band in range(BANDS):
        key = (hashes >> np.uint64(band * BAND)) & np.uint64((1 << BAND) - 1)
        order = np.lexsort((hashes, key))
        for step in range(1, min(NEIGHBOURS, len(order) - 1) + 1):
            a, b = order[:-step], order[step:]
            near = (key[a] == key[b]) & (np.bitwise_count(hashes[a] ^ hashes[b]) <= BITS)
            a, b = a[near], b[near]
            alike = np.abs(colours[a].astype(np.int16) - colours[b]).mean(1) <= COLOUR
            found.append(np.sort(np.stack([a[alike], b[alike]], 1), 1))
    return np.unique(np.concatenate(found), axis=0)


def groups(pairs: np.ndarray, count: int) -> np.ndarray:
    """int64 [count]: number of the group of each, joined by `pairs` [m, 2] directly or through others."""
    from scipy.sparse import coo_matrix  # type: ignore[import-untyped]
    from scipy.sparse.csgraph import connected_components  # type: ignore[import-untyped]

    edges = coo_matrix((np.ones(len(pairs), np.int8), (pairs[:, 0], pairs[:, 1])), (count, count))
    labels: np.ndarray = connected_components(edges, directed=False)[1]
    return labels.astype(np.int64)
