"""Images decoded on a GPU: against the CPU's graph, and while the device is busy. Skipped elsewhere; run it with
--noconftest.

Needs DALI beside torch and pytest.
"""

from __future__ import annotations

import io
from collections.abc import Iterator
from contextlib import closing

import numpy as np
import pytest
import torch
from PIL import Image

from harness.bench.photos import photo
from harness.data.decode_dali import ImagePipeline
from harness.data.preprocess import Parameters, PreprocessSpec, draw_parameters

pytestmark = pytest.mark.skipif(not torch.cuda.is_available(), reason="no GPU here")
SPEC, COUNT = PreprocessSpec(image_size=224, mean=(0.0, 0.0, 0.0), std=(1.0, 1.0, 1.0)), 64
STREAMS = ["default", "own"]


@pytest.fixture(scope="module")
def photos() -> list[bytes]:
    return [turned(photo(600, number), number % 9) for number in range(COUNT)]


def turned(encoded: bytes, orientation: int) -> bytes:
    """The photo with an EXIF orientation; 0: as it is."""
    if not orientation:
        return encoded
    exif, file = Image.Exif(), io.BytesIO()
    exif[0x0112] = orientation
    Image.open(io.BytesIO(encoded)).save(file, "JPEG", quality=90, exif=exif)
    return file.getvalue()


@pytest.fixture(scope="module")
def pipeline() -> Iterator[ImagePipeline]:
    with closing(ImagePipeline(SPEC, COUNT, 8, "mixed", torch.cuda.current_device())) as made:
        yield made


def parameters(photos: list[bytes], train: bool) -> Parameters:
    sizes = [Image.open(io.BytesIO(data)) for data in photos]
    turn = [image.getexif().get(0x0112, 1) > 4 for image in sizes]
    width, height = np.array([i.size[::-1] if t else i.size for i, t in zip(sizes, turn, strict=True)]).T
    return draw_parameters(SPEC, 0, 0, np.arange(len(photos)), width, height, train)


@pytest.mark.parametrize("train", [True, False])
def test_a_gpu_decodes_what_a_cpu_does(photos: list[bytes], pipeline: ImagePipeline, train: bool) -> None:
    """In units of 255; chroma and the discrete cosine transform are rounded otherwise, windows and orientations are the
    same.
    """
    params = parameters(photos, train)
    with closing(ImagePipeline(SPEC, COUNT, 8)) as cpu:
        wanted, _ = cpu.decode(photos, params)
    images, ok = pipeline.decode(photos, params)
    assert ok.all() and images.is_cuda
    off = (images.cpu() - wanted).abs().mul(255).flatten(1)
    assert off.mean() <= 0.5 and off.mean(1).max() <= 1.5 and off.flatten()[::7].quantile(0.999) <= 6


@pytest.mark.parametrize("stream", STREAMS)
def test_a_busy_device_changes_no_image(photos: list[bytes], pipeline: ImagePipeline, stream: str) -> None:
    """40 decodings one after another behind some 0.5 s of queued products, bit for bit those of an idle device."""
    params, half = parameters(photos, True), COUNT // 2
    parts = [(photos[s], {k: v[s] for k, v in params.items()}) for s in (slice(half), slice(half, COUNT))]
    with torch.cuda.stream(torch.cuda.Stream() if stream == "own" else None):
        quiet = [pipeline.decode(*part)[0].clone() for part in parts]
        torch.cuda.synchronize()
        a = torch.randn(8192, 8192, device="cuda", dtype=torch.bfloat16)
        for _ in range(10):
            for _ in range(400):
                a @ a
            found = [pipeline.decode(*parts[number % 2])[0] for number in range(4)]
            torch.cuda.synchronize()
            assert all(torch.equal(images, quiet[number % 2]) for number, images in enumerate(found))


def test_a_bad_image_costs_itself_alone_on_a_gpu(photos: list[bytes], pipeline: ImagePipeline) -> None:
    params = {name: array[:8] for name, array in parameters(photos, True).items()}
    whole, _ = pipeline.decode(photos[:8], params)
    some = [*photos[:3], photos[3][: len(photos[3]) // 2], *photos[4:8]]
    images, ok = pipeline.decode(some, params)
    assert ok.tolist() == [number != 3 for number in range(8)] and not images[3].any()
    assert torch.equal(images[ok.cuda()], whole[ok.cuda()])
