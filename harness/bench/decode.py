"""Images decoded per second: the DALI pipeline beside its Pillow twin, on the same files with the same parameters."""

from __future__ import annotations

import io
import statistics
import sys
import time
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from PIL import Image
from tqdm import tqdm

from harness.bench.photos import photo
from harness.bench.report import bench_main, finish, spread
from harness.data.decode_dali import ImagePipeline
from harness.data.decode_pillow import ReferencePipeline
from harness.data.preprocess import Parameters, PreprocessSpec, draw_parameters
from models.ranges import PositiveInt

MODULE = "harness.bench.decode"
EXAMPLE = f"python -m {MODULE} --images 256 --threads 2 --json decode.json"
BATCH = 64


@dataclass(frozen=True, kw_only=True)
class DecodeConfig:
    """Decodes the same JPEG files with both pipelines in turn, in pairs, after one warm-up pair.

    Args:
        images: number of different JPEG files.
        image_size: side of the resulting square, in pixels.
        source_size: long side of the files, in pixels.
        threads: decoding threads of each pipeline.
        pairs: timed passes of each pipeline over all files.
    """

    images: PositiveInt = 256
    image_size: PositiveInt = 224
    source_size: PositiveInt = 800
    threads: PositiveInt = 2
    pairs: PositiveInt = 5


def run(config: DecodeConfig) -> dict[str, Any]:
    """Measures, prints and returns the report (see `harness/bench/report.py`).

    Headline: median images per second of both pipelines; median, least and largest ratio over the pairs; mean size of a
    file in kB.
    """
    spec = PreprocessSpec(image_size=config.image_size)
    numbers = tqdm(range(config.images), desc="photos", unit=" photos")
    photos = [photo(config.source_size, number) for number in numbers]
    widths, heights = np.array([Image.open(io.BytesIO(data)).size for data in photos]).T
    batch_size = min(BATCH, config.images)
    torch_threads = torch.get_num_threads()
    pipelines: dict[str, ImagePipeline | ReferencePipeline] = {
        "dali": ImagePipeline(spec, batch_size, config.threads),
        "pillow": ReferencePipeline(spec, batch_size, config.threads),
    }
    rows = []
    try:
        torch.set_num_threads(config.threads)  # the DALI pipeline's last step runs in torch
        for pair in tqdm(range(config.pairs + 1), desc="decode", unit=" pairs"):
            params = draw_parameters(spec, 0, pair, np.arange(config.images), widths, heights, train=True)
            # The first pipeline alternates, so that a machine that slows down favours neither.
            names = list(pipelines) if pair % 2 else reversed(pipelines)
            rate = {name: _images_per_second(pipelines[name], photos, params) for name in names}
            if pair > 0:
                ratio = rate["dali"] / rate["pillow"]
                figures = {"dali_images_per_s": rate["dali"], "pillow_images_per_s": rate["pillow"]}
                rows.append({"pair": pair, **figures, "dali_vs_pillow": ratio})
    finally:
        torch.set_num_threads(torch_threads)
        for pipeline in pipelines.values():
            pipeline.close()
    headline = {
        "dali_images_per_s": statistics.median(row["dali_images_per_s"] for row in rows),
        "pillow_images_per_s": statistics.median(row["pillow_images_per_s"] for row in rows),
        **spread("dali_vs_pillow", [row["dali_vs_pillow"] for row in rows]),
        "source_kilobytes": sum(map(len, photos)) / len(photos) / 1000,
    }
    return finish(MODULE, config, headline, rows)


def _images_per_second(pipeline: ImagePipeline | ReferencePipeline, photos: list[bytes], params: Parameters) -> float:
    start = time.perf_counter()
    for first in range(0, len(photos), pipeline.batch_size):
        part = slice(first, first + pipeline.batch_size)
        _, ok = pipeline.decode(photos[part], {name: array[part] for name, array in params.items()})
        if not ok.all():
            raise RuntimeError("an image failed to decode: its time would flatter the rate")
    return len(photos) / (time.perf_counter() - start)


def main() -> int:
    """Entry point of `python -m harness.bench.decode`."""
    return bench_main(MODULE, DecodeConfig, run, "Decode rate of DALI beside Pillow.", EXAMPLE)


if __name__ == "__main__":
    sys.exit(main())
