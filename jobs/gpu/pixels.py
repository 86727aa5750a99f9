"""Compares images decoded on the GPU with those of DALI's CPU graph and of Pillow, also while the device is busy.

python jobs/gpu/pixels.py OUT.json

Photos, and one of each odd kind: turned by EXIF, grey, CMYK, progressive, without chroma subsampling, PNG with and
without transparency. With --tiny the CPU graph stands for the GPU's.
"""

from __future__ import annotations

import io
from typing import Any

import numpy as np
import torch
from PIL import Image, ImageOps
from torch import Tensor

from harness.bench.gpu import Program
from harness.bench.photos import photos as made_up
from harness.data.decode_dali import ImagePipeline
from harness.data.decode_pillow import ReferencePipeline
from harness.data.preprocess import Parameters, PreprocessSpec, draw_parameters

# Mean and 99.9th percentile of the difference of a kind's images, of 255. The CPU graph stays within half of it of
# Pillow (tests/test_pipeline.py); a wrong window, turn, mirror or colour is beyond it by far.
MEAN, RARE = 1.0, 8.0
ORIENTATION = 0x0112
ROUNDS = 10


def odd(source: bytes) -> dict[str, bytes]:
    """A photo as files of other kinds."""
    image = Image.open(io.BytesIO(source))
    files = {}

    def save(name: str, picture: Image.Image, kind: str = "JPEG", **options: Any) -> None:
        buffer = io.BytesIO()
        picture.save(buffer, kind, **options)
        files[name] = buffer.getvalue()

    for turn in range(2, 9):
        exif = Image.Exif()
        exif[ORIENTATION] = turn
        save(f"EXIF {turn}", image, quality=90, exif=exif)
    save("grey", image.convert("L"), quality=90)
    save("CMYK", image.convert("CMYK"), quality=90)
    save("progressive", image, quality=90, progressive=True)
    save("4:4:4", image, quality=95, subsampling=0)
    save("PNG", image, "PNG", compress_level=1)
    save("PNG, transparent", image.convert("RGBA"), "PNG", compress_level=1)
    return files


def decoded(
    pipeline: ImagePipeline | ReferencePipeline, files: list[bytes], params: Parameters
) -> tuple[Tensor, Tensor]:
    """Images on the CPU and ok, by calls of the pipeline's batch size."""
    images, oks = [], []
    for first in range(0, len(files), pipeline.batch_size):
        part = slice(first, first + pipeline.batch_size)
        found, ok = pipeline.decode(files[part], {name: rows[part] for name, rows in params.items()})
        images.append(found.cpu())
        oks.append(ok)
    return torch.cat(images), torch.cat(oks)


def compare_pixels(
    program: Program, pipelines: dict[str, Any], files: dict[str, list[bytes]], spec: PreprocessSpec
) -> None:
    """A row for each kind of file, mode and other decoder."""
    flat = [data for kind in files.values() for data in kind]
    sizes = [ImageOps.exif_transpose(Image.open(io.BytesIO(data))).size for data in flat]
    widths, heights = np.array(sizes).T
    scale = 255 * torch.tensor(spec.std).view(3, 1, 1)
    for mode in ("train", "eval"):
        params = draw_parameters(spec, 0, 0, np.arange(len(flat)), widths, heights, train=mode == "train")
        found = {name: decoded(pipeline, flat, params) for name, pipeline in pipelines.items()}
        first = 0
        for kind, members in files.items():
            part = slice(first, first + len(members))
            first += len(members)
            images, ok = (both[part] for both in found["device"])
            for other in ("dali cpu", "pillow"):
                away = ((images - found[other][0][part]) * scale).abs().flatten()
                mean, rare = away.mean().item(), away.kthvalue(max(1, int(0.999 * away.numel()))).values.item()
                good = bool(ok.all()) and mean <= MEAN and rare <= RARE
                program.add(
                    mode=mode,
                    kind=kind,
                    beside=other,
                    mean=mean,
                    rare=rare,
                    read=int(ok.sum()),
                    of=len(members),
                    ok=good,
                )


def damaged(program: Program, pipeline: ImagePipeline, photos: list[bytes], params: Parameters) -> None:
    """A file without its pixels costs only itself, and no other pixel."""
    count = min(8, len(photos))
    some = {name: rows[:count] for name, rows in params.items()}
    whole, _ = pipeline.decode(photos[:count], some)
    whole = whole.clone()
    cut = [*photos[:count]]
    cut[1] = cut[1][:300] + b"\xff\xd9"  # with an end, so that it passes for a whole file at first glance
    images, ok = pipeline.decode(cut, some)
    others = [row for row in range(count) if row != 1]
    alike = torch.equal(images[others], whole[others])
    good = alike and bool(ok[others].all()) and not bool(ok[1])
    program.add(what="one file without pixels", noticed=not bool(ok[1]), others_equal=alike, ok=good)


def busy(program: Program, pipeline: ImagePipeline, photos: list[bytes], params: Parameters) -> None:
    """Decodes again while the device has half a second of other work queued: no batch may change before later reads."""
    half = len(photos) // 2
    cut = []
    for part in (slice(0, half), slice(half, 2 * half)):
        cut.append((photos[part], {name: rows[part] for name, rows in params.items()}))
    quiet = [pipeline.decode(*one)[0].clone() for one in cut]
    program.synchronize()
    n = 8192 if program.device.type == "cuda" else 64
    a = torch.randn(n, n, device=program.device, dtype=torch.bfloat16)
    wrong = total = 0
    for _ in range(2 if program.tiny else ROUNDS):
        for _ in range(300 if program.device.type == "cuda" else 1):
            a @ a
        found = [pipeline.decode(*cut[number % 2])[0] for number in range(4)]
        sums = [images.double().sum() for images in found]  # queued behind the other work, on the stream that reads
        program.synchronize()
        total += len(found)
        wrong += sum(
            not torch.equal(images, quiet[number % 2]) or float(sums[number]) != float(quiet[number % 2].double().sum())
            for number, images in enumerate(found)
        )
    program.add(what="batches that differ while the device is busy", wrong=wrong, of=total, ok=not wrong)


def main() -> None:
    """Entry point."""
    program = Program("gpu pixels", "Images decoded on the GPU against two CPU decoders.")
    count, side, threads = (4, 96, 1) if program.tiny else (128, 800, 8)
    photos = made_up(side, count)
    spec = PreprocessSpec(image_size=64 if program.tiny else 224)
    place = ("cpu", 0) if program.tiny else ("mixed", 0)
    pipelines = {
        "device": ImagePipeline(spec, count, threads, *place),
        "dali cpu": ImagePipeline(spec, count, threads),
        "pillow": ReferencePipeline(spec, count, threads),
    }
    files = {"photo": photos} | {kind: [data] for kind, data in odd(photos[0]).items()}
    compare_pixels(program, pipelines, files, spec)
    widths, heights = np.array([Image.open(io.BytesIO(data)).size for data in photos]).T
    params = draw_parameters(spec, 0, 1, np.arange(count), widths, heights, train=True)
    device = pipelines["device"]
    assert isinstance(device, ImagePipeline)
    busy(program, device, photos, params)
    damaged(program, device, photos, params)
    program.exit()


if __name__ == "__main__":
    main()
