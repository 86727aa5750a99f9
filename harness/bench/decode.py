"""Images decoded per second: the DALI pipeline beside its Pillow twin, on the same files and with the same parameters."""

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
from harness.bench.report import bench_main, command_line, make_report, print_report
from harness.core.errors import UserError
from harness.data.decode_dali import ImagePipeline
from harness.data.decode_pillow import ReferencePipeline
from harness.data.preprocess import Parameters, PreprocessSpec, draw_parameters

MODULE = "harness.bench.decode"
EXAMPLE = f"python -m {MODULE} --images 256 --threads 2 --json decode.json"
BATCH = 64


@dataclass(frozen=True, kw_only=True)
class DecodeConfig:
    """Decodes the same JPEG files with both pipelines in turn, in pairs, after one warm-up pair that does not count.

    Args:
        images: number of different JPEG files, made for the purpose.
        image_size: side of the square that comes out, in pixels.
        source_size: long side of the files, in pixels.
        threads: decoding threads of each pipeline.
        pairs: timed passes of each pipeline over all files.
    """

    images: int = 256
    image_size: int = 224
    source_size: int = 800
    threads: int = 2
    pairs: int = 5

    def __post_init__(self) -> None:
        for name in ("images", "image_size", "source_size", "threads", "pairs"):
            if getattr(self, name) < 1:
                raise UserError(f"--{name.replace('_', '-')} is {getattr(self, name)}", "It must be at least 1")


def run(config: DecodeConfig) -> dict[str, Any]:
    """Measures, prints and returns the report (see `harness/bench/report.py`).

    Headline: median images per second of both pipelines, median, least and largest ratio over the pairs, and the mean
    size of a file in kB.
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
            # The first of a pair alternates, so that a machine that slows down favours neither.
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
    ratios = [row["dali_vs_pillow"] for row in rows]
    headline = {
        "dali_images_per_s": statistics.median(row["dali_images_per_s"] for row in rows),
        "pillow_images_per_s": statistics.median(row["pillow_images_per_s"] for row in rows),
        "dali_vs_pillow": statistics.median(ratios),
        "dali_vs_pillow_min": min(ratios),
        "dali_vs_pillow_max": max(ratios),
        "source_kilobytes": sum(map(len, photos)) / len(photos) / 1000,
    }
    report = make_report("decode", command_line(MODULE, config), headline, rows)
    print_report(report)
    return report


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
