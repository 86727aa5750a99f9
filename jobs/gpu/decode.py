"""Images a second that DALI decodes on the GPU with 2, 8 and 16 threads, beside its CPU graph, and how nvJPEG is found.

python jobs/gpu/decode.py OUT.json
"""

from __future__ import annotations

import importlib.metadata
import io
import os
import statistics

import numpy as np
from PIL import Image

from harness.bench.gpu import Program
from harness.bench.photos import photos as made_up
from harness.data.decode_dali import ImagePipeline
from harness.data.preprocess import PreprocessSpec, draw_parameters

PACKAGES = (
    "nvidia-dali-cuda130",
    "nvidia-dali-cuda120",
    "nvidia-nvimgcodec-cu13",
    "nvidia-nvimgcodec-cu12",
    "nvidia-nvjpeg",
)


def main() -> None:
    """Entry point."""
    program = Program("gpu decode", "Decode rate by threads.")
    count, side, batch, rounds = (8, 64, 8, 2) if program.tiny else (512, 500, 256, 6)
    photos = made_up(side, count)
    found = {}
    for name in PACKAGES:
        try:
            found[name] = importlib.metadata.version(name)
        except importlib.metadata.PackageNotFoundError:
            continue
    program.add(what="packages", **found, LD_LIBRARY_PATH=os.environ.get("LD_LIBRARY_PATH", ""))
    program.add(what="files", kilobytes=sum(map(len, photos)) / count / 1000, long_side=side)
    spec = PreprocessSpec(image_size=32 if program.tiny else 224)
    widths, heights = np.array([Image.open(io.BytesIO(data)).size for data in photos]).T
    params = draw_parameters(spec, 0, 0, np.arange(count), widths, heights, train=True)
    for place, threads in [("cpu", 1)] if program.tiny else [("mixed", 2), ("mixed", 8), ("mixed", 16), ("cpu", 16)]:
        pipeline, rates = ImagePipeline(spec, batch, threads, place, 0), []
        for _ in range(rounds):
            began = program.synchronize()
            for first in range(0, count, batch):
                part = slice(first, first + batch)
                pipeline.decode(photos[part], {name: rows[part] for name, rows in params.items()})
            rates.append(count / (program.synchronize() - began))
        pipeline.close()
        rate = statistics.median(rates[1:])
        program.add(decoder=place, threads=threads, images_per_s=rate, least=min(rates[1:]))
        program.cite(**{f"{place}_{threads}_threads_images_per_s": rate})
    program.exit()


if __name__ == "__main__":
    main()
