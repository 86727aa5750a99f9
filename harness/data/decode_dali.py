"""The image pipeline in NVIDIA DALI: encoded bytes and random parameters in, normalised batches out.

One graph serves CPU and GPU: decode the window only -> antialiased linear resize -> mirror, to planes -> colour,
normalise. Nothing in it is random; every choice comes in with the call (see `harness/data/preprocess.py`). The colour
step runs in torch, element by element: DALI has no fast operator for a matrix per sample (its coord_transform halves
the rate), and a batched matrix product may round differently in another batch.
"""

from __future__ import annotations

from collections import deque
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import numpy as np
import torch
from nvidia.dali import Pipeline, fn, types

from harness.catalogue.pixels import Colour, plain
from harness.data.decode_pillow import decode_rgb
from harness.data.nvjpeg import require_nvjpeg
from harness.data.preprocess import Parameters, PreprocessSpec

_BLANK = b"P6 1 1 255\n\0\0\0"
_BLANK_WINDOW = {
    "anchor": np.zeros((1, 2), np.int32),
    "shape": np.ones((1, 2), np.int32),
    "flip": np.zeros(1, np.int32),
}


class ImagePipeline:
    """Decodes and preprocesses batches of encoded images.

    Args:
        spec: size, mean and standard deviation of the result.
        batch_size: the most images per call.
        num_threads: DALI's threads for decoding.
        device: 'cpu', or 'mixed' to decode on the GPU.
        device_id: the GPU; not used on 'cpu'.

    Attributes:
        line: what decodes, in words, for the log.

    Raises:
        UserError: 'mixed' with an nvJPEG that would leave the work to the CPU (see `harness/data/nvjpeg.py`).
    """

    def __init__(
        self, spec: PreprocessSpec, batch_size: int, num_threads: int = 1, device: str = "cpu", device_id: int = 0
    ) -> None:
        if device not in ("cpu", "mixed"):
            raise ValueError(f"device is 'cpu' or 'mixed', not {device!r}")
        self.spec = spec
        self.batch_size = batch_size
        self._pipeline: Any = _build(spec.image_size, batch_size, num_threads, device, device_id)
        target = torch.device("cpu") if device == "cpu" else torch.device("cuda", device_id)
        self.line = f"DALI on {target}, {num_threads} thread(s)"
        if device == "mixed":
            self.line += f", nvJPEG {require_nvjpeg()}"
        self._mixed = device == "mixed"
        self._num_threads = num_threads
        # DALI's buffers that this call reads, and those of the call before with the event after which nothing reads
        # them.
        self._lent: list[torch.Tensor] = []
        self._held: deque[tuple[torch.cuda.Event, list[torch.Tensor]]] = deque()
        self._mean = torch.tensor(spec.mean, device=target).view(1, 3, 1, 1)
        self._std = torch.tensor(spec.std, device=target).view(1, 3, 1, 1)

    def decode(self, encoded: list[bytes], params: Parameters) -> tuple[torch.Tensor, torch.Tensor]:
        """Decode, cut, resize, mirror, colour and normalise.

        On a GPU the result is queued on the calling thread's current stream, as any of torch's; another stream that
        reads it must wait for it. A bad image costs itself alone. The result of an image does not depend on the others
        of the call.

        Args:
            encoded: n <= batch_size files as bytes; 8-bit JPEG and PNG are fastest; Pillow reads all others.
            params: arrays of n rows from `draw_parameters`.

        Returns:
            images: float32 [n, 3, image_size, image_size] on the pipeline's device; zeros (the mean colour) where bad.
            ok: bool [n] on the CPU, False where the bytes are no image or the window leaves it.
        """
        if len(encoded) > self.batch_size:
            raise ValueError(f"{len(encoded)} images in a pipeline of at most {self.batch_size}")
        if not encoded:
            size = self.spec.image_size
            return torch.zeros((0, 3, size, size), device=self._mean.device), torch.zeros(0, dtype=torch.bool)
        safe = self._safe(encoded)
        windows = {name: np.array(params[name], np.int32, order="C") for name in _BLANK_WINDOW}
        hopeless = [row for row, data in enumerate(safe) if data is None]
        for name, blank in _BLANK_WINDOW.items():
            windows[name][hopeless] = blank
        planes, readable = self._planes([_BLANK if data is None else data for data in safe], windows)
        ok = torch.from_numpy(readable)
        ok[hopeless] = False
        images = self._colour(planes, params)
        if not ok.all():
            images[~ok.to(images.device)] = 0
        self._give_back()
        return images, ok

    def close(self) -> None:
        """Releases DALI's threads and memory; the pipeline is of no use afterwards."""
        self._give_back(held=0)
        self._pipeline = None

    def _safe(self, encoded: list[bytes]) -> list[bytes | None]:
        """Each file as it is where DALI finds Pillow's pixels in it, else as Pillow reads it; None where it cannot."""
        safe: list[bytes | None] = [data if plain(data) else None for data in encoded]
        others = [row for row, data in enumerate(safe) if data is None]
        if others:
            with ThreadPoolExecutor(self._num_threads) as threads:
                bitmaps = threads.map(lambda row: _bitmap(encoded[row], self.spec.background), others)
                for row, bitmap in zip(others, bitmaps, strict=True):
                    safe[row] = bitmap
        return safe

    def _planes(self, encoded: list[bytes], windows: Parameters) -> tuple[torch.Tensor, np.ndarray]:
        """Float32 [n, 3, S, S] in 0..1 and which rows were readable. DALI loses a whole batch to one bad image, but the
        dynamic executor lives on: halving the batch finds the culprits in a few runs."""
        try:
            return self._run(encoded, windows), np.ones(len(encoded), dtype=bool)
        except RuntimeError:
            if len(encoded) == 1:
                return self._one(encoded[0], windows)
        middle = len(encoded) // 2
        halves = [
            self._planes(encoded[part], {name: array[part] for name, array in windows.items()})
            for part in (slice(0, middle), slice(middle, None))
        ]
        return torch.cat([planes for planes, _ in halves]), np.concatenate([readable for _, readable in halves])

    def _one(self, encoded: bytes, windows: Parameters) -> tuple[torch.Tensor, np.ndarray]:
        """As `_planes`, of an image that DALI has refused. What Pillow reads is good in both backends."""
        bitmap = None if encoded.startswith(b"P6") else _bitmap(encoded, self.spec.background)
        if bitmap is not None:
            try:
                return self._run([bitmap], windows), np.ones(1, dtype=bool)
            except RuntimeError:
                pass
        # Raises if the device is broken, which must not pass for a bad image.
        return self._run([_BLANK], _BLANK_WINDOW), np.zeros(1, dtype=bool)

    def _run(self, encoded: list[bytes], windows: Parameters) -> torch.Tensor:
        stream = [torch.cuda.current_stream(self._mean.device)] if self._mixed else []  # else run waits for its result
        (batch,) = self._pipeline.run(*stream, encoded=[np.frombuffer(data, np.uint8) for data in encoded], **windows)
        # No copy: the dynamic executor gives its outputs away, and _colour makes a new tensor anyway.
        planes = torch.from_dlpack(batch.as_tensor())
        self._lent.append(planes)
        return planes

    def _give_back(self, held: int = 1) -> None:
        """Lets DALI have its buffers again once they have been read. DALI orders their next use behind its own stream
        only: what torch has queued to read them may not have run when this call returns. At most the `held` newest
        calls' buffers are kept.
        """
        lent, self._lent = self._lent, []
        if not self._mixed:
            return
        read = torch.cuda.Event()
        read.record(torch.cuda.current_stream(self._mean.device))
        self._held.append((read, lent))
        while len(self._held) > held:
            self._held[0][0].synchronize()
            self._held.popleft()

    def _colour(self, planes: torch.Tensor, params: Parameters) -> torch.Tensor:
        matrix, offset = (
            torch.from_numpy(np.ascontiguousarray(params[name], np.float32)).to(planes.device, non_blocking=True)
            for name in ("matrix", "offset")
        )
        columns = matrix.unsqueeze(-1).unsqueeze(-1)
        images = columns[:, :, 0] * planes[:, 0:1]
        images.addcmul_(columns[:, :, 1], planes[:, 1:2]).addcmul_(columns[:, :, 2], planes[:, 2:3])
        return images.add_(offset[:, :, None, None]).clamp_(0, 1).sub_(self._mean).div_(self._std)


def _build(size: int, batch_size: int, num_threads: int, device: str, device_id: int) -> Pipeline:
    # exec_dynamic: only this executor survives a bad image, and its outputs are not overwritten by the next run.
    # Depth 1: each call feeds its own inputs; the reader above reads ahead.
    pipeline = Pipeline(
        batch_size=batch_size,
        num_threads=num_threads,
        device_id=None if device == "cpu" else device_id,
        exec_dynamic=True,
        prefetch_queue_depth=1,
    )

    def source(name: str, dtype: Any, ndim: int) -> Any:
        return fn.external_source(name=name, dtype=dtype, ndim=ndim, batch=True)

    with pipeline:
        windows = fn.decoders.image_slice(
            source("encoded", types.UINT8, 1),
            source("anchor", types.INT32, 1),
            source("shape", types.INT32, 1),
            axis_names="WH",
            device=device,
            output_type=types.RGB,
            jpeg_fancy_upsampling=True,  # the GPU upsamples chroma as the CPU does
            affine=False,  # several ranks on a node must not pin their threads to the same cores
        )
        squares = fn.resize(windows, size=(size, size), interp_type=types.INTERP_LINEAR, antialias=True)
        planes = fn.crop_mirror_normalize(
            squares,
            mirror=source("flip", types.INT32, 0),
            mean=[0.0],
            std=[255.0],
            dtype=types.FLOAT,
            output_layout="CHW",
        )
        pipeline.set_outputs(planes)
    pipeline.build()
    return pipeline


def _bitmap(encoded: bytes, background: Colour) -> bytes | None:
    """Image that Pillow reads, as a file that DALI reads; None where Pillow gives up."""
    try:
        image = decode_rgb(encoded, background)
    except ValueError:
        return None
    return b"P6 %d %d 255\n" % image.size + image.tobytes()
