"""Samples read per second and rank: Shelfmark's reader beside a torch DataLoader with Pillow and beside bare DALI."""

from __future__ import annotations

import statistics
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import closing
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
from nvidia.dali import Pipeline, fn, types
from PIL import Image, ImageOps
from torch.utils.data import DataLoader, Dataset, Sampler
from tqdm import tqdm

from harness.bench.photos import photo
from harness.bench.report import bench_main, finish, spread
from harness.catalogue.catalogue import Catalogue
from harness.commands.ingest import IngestConfig
from harness.commands.ingest import run as ingest
from harness.data.decode_pillow import decode_rgb
from harness.data.images import ImageReader
from harness.data.preprocess import PreprocessSpec, draw_parameters
from models.ranges import PositiveInt

MODULE = "harness.bench.loader"
EXAMPLE = f"python -m {MODULE} --images 192 --threads 2 --json loader.json"
BATCH = 32
FIGURES = {"shelfmark": "shelfmark_images_per_s", "pillow": "pillow_images_per_s", "dali": "bare_dali_images_per_s"}
RATIOS = {"speedup_vs_pillow": "pillow", "fraction_of_bare_dali": "dali"}


@dataclass(frozen=True, kw_only=True)
class LoaderConfig:
    """Reads the same JPEG files from disk with three readers in turn, after one warm-up round.

    Shelfmark: catalogue, checksums, random parameters, DALI. Pillow: a torch DataLoader, a worker for each thread,
    the same windows, flips and colours. Bare DALI: its own file reader, random crops and flips, without the colours.

    Args:
        images: number of different JPEG files, drawn into a temporary folder.
        image_size: side of the resulting square, in pixels.
        source_size: long side of the files, in pixels.
        threads: decoding threads of Shelfmark and of DALI, workers of the DataLoader.
        pairs: timed rounds; each reader reads all files once a round.
    """

    images: PositiveInt = 192
    image_size: PositiveInt = 224
    source_size: PositiveInt = 820
    threads: PositiveInt = 2
    pairs: PositiveInt = 5


def run(config: LoaderConfig) -> dict[str, Any]:
    """Measures, prints and returns the report (see `harness/bench/report.py`).

    Headline: median images per second of each reader; `speedup_vs_pillow` and `fraction_of_bare_dali`, medians over the
    rounds of Shelfmark's rate divided by theirs, with least and largest; mean size of a file in kB.
    """
    spec = PreprocessSpec(image_size=config.image_size)
    torch_threads = torch.get_num_threads()
    with tempfile.TemporaryDirectory(prefix="shelfmark-bench-") as name:
        files = _draw(Path(name), config)
        kilobytes = sum(file.stat().st_size for file in files) / len(files) / 1000
        catalogue = Catalogue(_ingest(Path(name), files))
        batch = min(BATCH, config.images)
        reader = ImageReader(catalogue, spec, "dali", batch, config.threads, torch.device("cpu"))
        with closing(catalogue), closing(reader):
            sizes = np.stack([catalogue.index["width"], catalogue.index["height"]])
            ways: dict[str, Callable[[int], float]] = {
                "shelfmark": partial(_shelfmark, reader, config.images, batch),
                "pillow": partial(_pillow, _loader(spec, files, sizes, batch, config.threads)),
                "dali": partial(_dali, _bare_dali(spec, files, batch, config.threads), config.images, batch),
            }
            rows: list[dict[str, Any]] = []
            try:
                torch.set_num_threads(config.threads)  # the last step of Shelfmark's pipeline runs in torch
                for number in tqdm(range(config.pairs + 1), desc="read", unit=" rounds"):
                    # The first reader alternates, so that a machine that slows down favours none.
                    turn = list(ways) if number % 2 else reversed(ways)
                    rate = {way: config.images / ways[way](number) for way in turn}
                    if number > 0:
                        figures = {FIGURES[way]: rate[way] for way in ways}
                        ours = {key: rate["shelfmark"] / rate[other] for key, other in RATIOS.items()}
                        rows.append({"pair": number, **figures, **ours})
            finally:
                torch.set_num_threads(torch_threads)
    headline = {key: statistics.median(row[key] for row in rows) for key in FIGURES.values()}
    for key in RATIOS:
        headline |= spread(key, [row[key] for row in rows])
    headline["source_kilobytes"] = kilobytes
    return finish(MODULE, config, headline, rows)


def _draw(folder: Path, config: LoaderConfig) -> list[Path]:
    files = [folder / f"{number:06d}.jpg" for number in range(config.images)]
    for number, file in enumerate(tqdm(files, desc="photos", unit=" photos")):
        file.write_bytes(photo(config.source_size, number))
    return files


def _ingest(folder: Path, files: list[Path]) -> Path:
    """Ingests the files in their order; returns the catalogue."""
    manifest, out = folder / "manifest.tsv", folder / "catalogue"
    lines = [f"{file.stem}\tdocument\t{file.name}" for file in files]
    manifest.write_text("\n".join(["id\tkind\timage", *lines]) + "\n")
    ingest(IngestConfig(manifest=manifest, images=folder, out=out))
    return out


def _shelfmark(reader: ImageReader, images: int, batch: int, epoch: int) -> float:
    start = time.perf_counter()
    for ids in np.split(np.arange(images), range(batch, images, batch)):
        _, ok = reader.read(ids, reader.parameters(ids, epochs=epoch, train=True))
        if not ok.all():
            raise RuntimeError("an image failed to decode: its time would flatter the rate")
    return time.perf_counter() - start


class _Photos(Dataset[torch.Tensor]):
    """Images float32 [3, S, S] as in training; item epoch * images + i is file i in that epoch."""

    def __init__(self, spec: PreprocessSpec, files: list[Path], sizes: np.ndarray) -> None:
        self.spec, self.files, self.sizes = spec, files, sizes
        self.mean, self.std = (np.asarray(values, dtype=np.float32) for values in (spec.mean, spec.std))

    def __getitems__(self, items: list[int]) -> list[torch.Tensor]:
        epochs, ids = np.divmod(items, len(self.files))
        widths, heights = self.sizes[:, ids]
        params = draw_parameters(self.spec, 0, epochs, ids, widths, heights, train=True)
        return [self._one(self.files[i], {key: a[row] for key, a in params.items()}) for row, i in enumerate(ids)]

    def _one(self, file: Path, params: dict[str, np.ndarray]) -> torch.Tensor:
        (x, y), (width, height), side = *(params[key].tolist() for key in ("anchor", "shape")), self.spec.image_size
        window = decode_rgb(file.read_bytes()).crop((x, y, x + width, y + height))
        square = window.resize((side, side), Image.Resampling.BILINEAR)  # Pillow's is antialiased
        pixels = np.asarray(ImageOps.mirror(square) if params["flip"] else square, dtype=np.float32)
        colour = pixels / np.float32(255) @ params["matrix"].T + params["offset"]
        return torch.from_numpy(((np.clip(colour, 0, 1) - self.mean) / self.std).transpose(2, 0, 1).copy())


class _Epoch(Sampler[int]):
    """The items of one epoch in order."""

    def __init__(self, images: int) -> None:
        self.images, self.epoch = images, 0

    def __iter__(self) -> Iterator[int]:
        return iter(range(self.epoch * self.images, (self.epoch + 1) * self.images))

    def __len__(self) -> int:
        return self.images


def _loader(
    spec: PreprocessSpec, files: list[Path], sizes: np.ndarray, batch: int, workers: int
) -> DataLoader[torch.Tensor]:
    return DataLoader(
        _Photos(spec, files, sizes),
        batch,
        sampler=_Epoch(len(files)),
        num_workers=workers,
        persistent_workers=True,
        multiprocessing_context="forkserver",  # DALI's threads would not survive a fork
    )


def _pillow(loader: DataLoader[torch.Tensor], epoch: int) -> float:
    sampler: Any = loader.sampler
    sampler.epoch = epoch
    start = time.perf_counter()
    count = sum(len(images) for images in loader)
    seconds = time.perf_counter() - start
    if count != sampler.images:
        raise RuntimeError(f"{count} images of {sampler.images}")
    return seconds


def _bare_dali(spec: PreprocessSpec, files: list[Path], batch: int, threads: int) -> Pipeline:
    """DALI's usual pipeline for training, with its default prefetching."""
    pipeline = Pipeline(batch_size=batch, num_threads=threads, device_id=None, exec_dynamic=True, seed=0)
    with pipeline:
        encoded, _ = fn.readers.file(files=[str(file) for file in files])
        windows = fn.decoders.image_random_crop(
            encoded,
            device="cpu",
            output_type=types.RGB,
            random_area=list(spec.crop_scale),
            random_aspect_ratio=list(spec.crop_ratio),
            affine=False,  # as in harness/data/decode_dali.py
        )
        squares = fn.resize(
            windows, size=(spec.image_size, spec.image_size), interp_type=types.INTERP_LINEAR, antialias=True
        )
        images = fn.crop_mirror_normalize(
            squares,
            mirror=fn.random.coin_flip(probability=spec.flip),
            mean=[255 * value for value in spec.mean],
            std=[255 * value for value in spec.std],
            dtype=types.FLOAT,
            output_layout="CHW",
        )
        pipeline.set_outputs(images)
    pipeline.build()
    return pipeline


def _dali(pipeline: Pipeline, images: int, batch: int, _: int) -> float:
    pipeline.run()  # not timed: DALI prefetched it while the others ran
    start = time.perf_counter()
    for _ in range(images // batch):
        pipeline.run()
    return (time.perf_counter() - start) * images / (images // batch * batch)


def main() -> int:
    """Entry point of `python -m harness.bench.loader`."""
    return bench_main(
        MODULE, LoaderConfig, run, "Reading rate beside a torch DataLoader and beside bare DALI.", EXAMPLE
    )


if __name__ == "__main__":
    sys.exit(main())
