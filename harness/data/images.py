"""Reading and decoding of samples: bytes of a catalogue to pixels."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from itertools import chain
from typing import NamedTuple

import numpy as np
import numpy.typing as npt
import torch
from torch.distributed import ProcessGroup

from harness.catalogue.catalogue import Catalogue, CorruptSample
from harness.data.backends import decoding_threads, open_pipeline
from harness.data.preprocess import Parameters, PreprocessSpec, draw_parameters
from models.comm import gather_shards, share
from models.transfer import send

Ints = npt.NDArray[np.int64]
READS = 16  # concurrent reads of a rank: a parallel file system or a server answers late, but many at a time


class Pixels(NamedTuple):
    """Images float32 [n, 3, S, S] and ok bool [n], False where an image could not be decoded."""

    images: torch.Tensor
    ok: torch.Tensor


class Request(NamedTuple):
    """Samples that are being read.

    Args:
        wanted: number of samples over all ranks that share the reading.
        ids: int64 [n], samples that this rank reads.
        parameters: their preprocessing, n rows.
        encoded: their bytes, as they arrive.
    """

    wanted: int
    ids: Ints
    parameters: Parameters
    encoded: Iterator[bytes]


class ImageReader:
    """Reads and decodes samples of one catalogue; a sample with damaged bytes does not affect the others.

    Args:
        catalogue: source of the bytes.
        spec: preprocessing.
        backend: one of `harness.data.config.BACKENDS`.
        batch_size: most images per call.
        threads: decoding threads; see `DataConfig`.
        device: device that wants the pixels; DALI decodes there too.
        tp: ranks that want the same samples: each reads and decodes a part, `gather` joins the parts. None: this rank
            reads all.

    Attributes:
        line: the decoder in words, for the log.
    """

    def __init__(
        self,
        catalogue: Catalogue,
        spec: PreprocessSpec,
        backend: str,
        batch_size: int,
        threads: int,
        device: torch.device,
        tp: ProcessGroup | None = None,
    ) -> None:
        self.catalogue, self.spec, self.device, self._tp = catalogue, spec, device, tp
        self._rank, self._ranks = (0, 1) if tp is None else (tp.rank(), tp.size())
        most = -(-batch_size // self._ranks)
        self._pipeline = open_pipeline(spec, backend, most, decoding_threads(threads), device)
        self.line = self._pipeline.line
        self._reads = ThreadPoolExecutor(READS, "read")

    def read(self, ids: Ints, parameters: Parameters) -> Pixels:
        """Reads and decodes samples `ids`; collective over tp."""
        request = self.request(ids, parameters)
        return self.gather(self.decode(request), request.wanted)

    def stream(self, blocks: Iterable[Ints]) -> Iterator[Pixels]:
        """Yields each block of samples as evaluation sees it, while the next is being read; collective over tp."""
        requests = (self.request(ids, self.parameters(ids)) for ids in blocks)
        ahead = next(requests, None)
        while ahead is not None:
            request, ahead = ahead, next(requests, None)
            yield self.gather(self.decode(request), request.wanted)

    def request(self, ids: Ints, parameters: Parameters) -> Request:
        """Starts to read this rank's part of samples `ids`."""
        own = self.own(len(ids))
        mine = ids[own.start : own.stop]
        cut = {name: array[own.start : own.stop] for name, array in parameters.items()}
        # A task for each sample would cost as much as a read from memory.
        parts = np.array_split(mine, max(1, min(READS, len(mine))))
        return Request(len(ids), mine, cut, chain.from_iterable(self._reads.map(self._part, parts)))

    def decode(self, request: Request) -> Pixels:
        """Decodes this rank's part of a request; waits for its bytes."""
        return Pixels(*self._pipeline.decode(list(request.encoded), request.parameters))

    def gather(self, own: Pixels, count: int) -> Pixels:
        """Joins the ranks' parts of `count` samples, on the device where ranks share; collective over tp.

        Call it from the training thread only: collectives have one order.
        """
        if self._tp is None or self._ranks == 1 or not count:
            return own
        sizes = [len(share(count, self._ranks, rank)) for rank in range(self._ranks)]
        parts = (send(part, self.device) for part in (own.images, own.ok.to(torch.uint8)))
        images, ok = (gather_shards(part, self._tp, sizes) for part in parts)
        return Pixels(images, ok.bool())

    def own(self, count: int) -> range:
        """Range of `count` samples that this rank reads."""
        return share(count, self._ranks, self._rank)

    def parameters(
        self, ids: Ints, seed: int = 0, epochs: Ints | int = 0, positions: Ints | int = 0, train: bool = False
    ) -> Parameters:
        """Crop windows, flips and colours of samples `ids`; those of evaluation unless `train`."""
        entries = self.catalogue.index[ids]
        return draw_parameters(
            self.spec, seed, epochs, ids, entries["width"], entries["height"], train=train, variant=positions
        )

    def close(self) -> None:
        """Ends the threads that decode and read."""
        self._pipeline.close()
        self._reads.shutdown(cancel_futures=True)

    def _part(self, ids: Ints) -> list[bytes]:
        return [self._bytes(sample_id) for sample_id in ids.tolist()]

    def _bytes(self, sample_id: int) -> bytes:
        try:
            return self.catalogue.read_bytes(sample_id)
        except CorruptSample:
            return b""  # decodes to a neutral image with ok = False
