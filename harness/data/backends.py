"""Choice of the decoder: DALI on the GPU, DALI on the CPU, or Pillow."""

from __future__ import annotations

import os
from typing import Protocol

import torch

from harness.core.errors import UserError
from harness.data.decode_pillow import ReferencePipeline
from harness.data.preprocess import Parameters, PreprocessSpec


class Pipeline(Protocol):
    """Decoder from encoded images to the model's input; the backends differ in speed only.

    Attributes:
        line: the decoder in words, for the log.
    """

    line: str

    def decode(self, encoded: list[bytes], params: Parameters) -> tuple[torch.Tensor, torch.Tensor]:
        """Images float32 [n, 3, S, S], zeros where unreadable, and ok bool [n]."""
        ...

    def close(self) -> None:
        """Ends its threads."""
        ...


def open_pipeline(spec: PreprocessSpec, backend: str, batch_size: int, threads: int, device: torch.device) -> Pipeline:
    """Opens the decoder that `backend` names.

    Args:
        spec: preprocessing.
        backend: one of `harness.data.config.BACKENDS`.
        batch_size: most images per call.
        threads: decoding threads.
        device: device that wants the pixels; dali decodes there.

    Raises:
        UserError: DALI does not import, or its nvJPEG is too old for a GPU.
    """
    if backend == "reference":
        return ReferencePipeline(spec, batch_size, threads)
    try:
        from harness.data.decode_dali import ImagePipeline  # here: `reference` must run where DALI has no wheel
    except ImportError as error:
        raise UserError(
            f"DALI does not import ({error})",
            "Install shelfmark[cu13] or shelfmark[cu12], as the GPUs' driver has it, or choose the backend 'reference'",
        ) from error
    mixed = device.type == "cuda" and backend == "dali"
    return ImagePipeline(spec, batch_size, threads, "mixed" if mixed else "cpu", device.index or 0)


def decoding_threads(threads: int) -> int:
    """Returns `threads`, or for 0 this rank's share of the cores less two: one computes, one reads ahead."""
    ranks = int(os.environ.get("LOCAL_WORLD_SIZE", "1"))
    return threads or max(1, len(os.sched_getaffinity(0)) // ranks - 2)
