"""Synthetic photos for the benchmarks that decode; needs Pillow only."""

from __future__ import annotations

import io
import os
from concurrent.futures import ProcessPoolExecutor
from itertools import repeat
from multiprocessing import get_context

import numpy as np
from PIL import Image

SHAPES = ((1.0, 1.0), (1.0, 0.75), (0.75, 1.0))  # width and height as shares of the long side, in turn


def photo(long_side: int, number: int) -> bytes:
    """Draws the synthetic photo `number` as JPEG; a pure function of both arguments.

    Random waves, mostly of brightness, whose amplitude falls with frequency somewhat faster than in the average natural
    image (Field 1987, doi:10.1364/JOSAA.4.002379), as in the smoother photos of products: a decoder's work depends on
    the detail that survives compression, here about 1.8 bits a pixel of a file of 800 pixels.
    """
    width, height = (max(1, round(share * long_side)) for share in SHAPES[number % len(SHAPES)])
    frequency = np.hypot(np.fft.fftfreq(height)[:, None], np.fft.rfftfreq(width)[None])
    frequency[0, 0] = np.inf
    draws = np.random.default_rng(number).standard_normal((2, 3, *frequency.shape), dtype=np.float32)
    waves = np.fft.irfft2((draws[0] + 1j * draws[1]) / frequency.astype(np.float32) ** 1.4, s=(height, width))
    pixels = waves[0] + 0.3 * np.stack([waves[1], np.zeros_like(waves[1]), waves[2]])
    pixels = 128 + 50 * pixels / (pixels.std() or 1)
    file = io.BytesIO()
    Image.fromarray(np.clip(pixels, 0, 255).astype(np.uint8).transpose(1, 2, 0)).save(file, "JPEG", quality=85)
    return file.getvalue()


def photos(long_side: int, count: int) -> list[bytes]:
    """Draws the first `count` photos, with a process for each core if they are many."""
    if count < 64:
        return [photo(long_side, number) for number in range(count)]
    with ProcessPoolExecutor(len(os.sched_getaffinity(0)), mp_context=get_context("spawn")) as pool:
        return list(pool.map(photo, repeat(long_side), range(count), chunksize=8))
