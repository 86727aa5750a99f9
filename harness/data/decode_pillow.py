"""The image pipeline in Pillow and numpy: the specification of `harness/data/decode_dali.py`, and its stand-in."""

from __future__ import annotations

from concurrent.futures import ThreadPoolExecutor

import numpy as np
import numpy.typing as npt
import torch
from PIL import Image

from harness.catalogue.pixels import Colour, on_background, open_picture, upright
from harness.data.preprocess import WHITE, Parameters, PreprocessSpec


def decode_rgb(encoded: bytes, background: Colour = WHITE) -> Image.Image:
    """The whole image, upright, in 8-bit RGB (see `harness.catalogue.pixels.upright`).

    Args:
        encoded: an image file.
        background: what shows through transparent pixels.

    Raises:
        ValueError: the bytes are no image that Pillow reads to its end.
    """
    try:
        with open_picture(encoded) as picture:
            return on_background(upright(picture), background)
    except Exception as error:  # Pillow's readers raise all kinds of errors on hostile bytes
        raise ValueError(f"not a readable image: {error}") from error


class ReferencePipeline:
    """Decodes and preprocesses batches of encoded images on the CPU.

    Args:
        spec: size, mean and standard deviation of the result.
        batch_size: the most images per call.
        num_threads: images decoded at once.
    """

    def __init__(self, spec: PreprocessSpec, batch_size: int, num_threads: int = 1) -> None:
        self.spec = spec
        self.batch_size = batch_size
        self._mean = np.asarray(spec.mean, dtype=np.float32)
        self._std = np.asarray(spec.std, dtype=np.float32)
        self.line = f"Pillow, {num_threads} thread(s)"
        self._threads = ThreadPoolExecutor(num_threads)

    def decode(self, encoded: list[bytes], params: Parameters) -> tuple[torch.Tensor, torch.Tensor]:
        """As `ImagePipeline.decode`."""
        if len(encoded) > self.batch_size:
            raise ValueError(f"{len(encoded)} images in a pipeline of at most {self.batch_size}")
        size = self.spec.image_size
        images = np.zeros((len(encoded), 3, size, size), dtype=np.float32)
        ok = np.ones(len(encoded), dtype=bool)

        def fill(row: int) -> None:
            try:
                images[row] = self._one(encoded[row], {name: array[row] for name, array in params.items()})
            except ValueError:
                ok[row] = False

        list(self._threads.map(fill, range(len(encoded))))
        return torch.from_numpy(images), torch.from_numpy(ok)

    def close(self) -> None:
        """Ends the threads; the pipeline is of no use afterwards."""
        self._threads.shutdown()

    def _one(self, encoded: bytes, params: Parameters) -> npt.NDArray[np.float32]:
        image = decode_rgb(encoded, self.spec.background)
        (x, y), (width, height) = params["anchor"].tolist(), params["shape"].tolist()
        if x < 0 or y < 0 or x + width > image.width or y + height > image.height:
            raise ValueError(f"window {width} x {height} at {x}, {y} leaves the image {image.width} x {image.height}")
        pixels = np.asarray(_resize(image.crop((x, y, x + width, y + height)), self.spec.image_size), dtype=np.float32)
        if params["flip"]:
            pixels = pixels[:, ::-1]
        colour = pixels / np.float32(255) @ params["matrix"].T + params["offset"]
        return ((np.clip(colour, 0, 1) - self._mean) / self._std).transpose(2, 0, 1)


def _resize(window: Image.Image, size: int) -> Image.Image:
    """Antialiased linear resize that repeats the border's pixels outside the window, as DALI does.

    Pillow alone shortens its filter at the border, which differs visibly where a large photo becomes a small input.
    """
    pad_x, pad_y = (-(-length // size) if length > size else 0 for length in window.size)
    padded = Image.fromarray(np.pad(np.asarray(window), ((pad_y, pad_y), (pad_x, pad_x), (0, 0)), mode="edge"))
    box = (pad_x, pad_y, pad_x + window.width, pad_y + window.height)
    return padded.resize((size, size), Image.Resampling.BILINEAR, box=box)
