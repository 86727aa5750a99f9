"""This rank's part of every training step: positions -> samples -> bytes -> pixels and tokens.

The loader has no state: the content of step k is a function of (order, k), and its cut over ranks and micro-batches a
function of their numbers. Only which documents a mosaic shows beside its own depends on the cut.
"""

from __future__ import annotations

import time
from collections.abc import Iterator, Sequence
from dataclasses import replace
from itertools import chain, pairwise
from typing import NamedTuple

import numpy as np
import numpy.typing as npt
import torch
from torch.distributed import ProcessGroup

from harness.catalogue.catalogue import Catalogue
from harness.catalogue.pairs import Pairs
from harness.data.collate import CONTENTS, Photos, Sources
from harness.data.config import DataConfig
from harness.data.images import ImageReader, Pixels, Request
from harness.data.mosaic import Mosaics, draw_mosaics, with_mosaics
from harness.data.order import ClassOrder, Draw, ledger
from harness.data.preprocess import PreprocessSpec
from harness.data.read_ahead import ReadAhead
from harness.data.step_data import StepData, TextTokens
from harness.text.product_queries import ProductQueries
from harness.text.tokenizer import Tokenizer, TokenStore
from models.batch import Reads
from models.comm import share

Ints = npt.NDArray[np.int64]
_LEDGER_KEY = 0x5348_4C46
_POSITIONS_AT_ONCE = 1 << 18  # bounds the memory of `StepLoader.ledgers`


class Stretch(NamedTuple):
    """Steps of one content and image size: from `first` to the next stretch, or the last step.

    Args:
        first: step, the first stretch's is 0.
        reads: content of the method's batches.
        image_size: side of the images in pixels.
    """

    first: int
    reads: Reads
    image_size: int


class StepLoader:
    """Steps of training data, in order, read ahead by one thread.

    Args:
        config: sources and sizes.
        seed: seed of order and augmentation.
        reads: content of the method's batches.
        rank: this rank's place among those that bring different samples (dp).
        world_size: number of those ranks.
        device: device that wants the images.
        tp: ranks that bring the same samples and share their reading; None: this rank reads them all.
        stretches: in order; by default one of `reads` and config.preprocess.

    Attributes:
        images: reader of the present stretch, that of the steps read last.
        first_step: step at position 0 of the order; 0 until it is set.
    """

    def __init__(
        self,
        config: DataConfig,
        seed: int,
        reads: Reads,
        rank: int,
        world_size: int,
        device: torch.device,
        tp: ProcessGroup | None = None,
        stretches: Sequence[Stretch] = (),
    ) -> None:
        self.config, self.seed, self.reads = config, seed, reads
        self.stretches = stretches or [Stretch(0, reads, config.preprocess.image_size)]
        self.rank, self.world_size, self.first_step = rank, world_size, 0
        self.catalogue = Catalogue(config.catalogue)
        self.order = ClassOrder.open(config.catalogue, seed)
        self.tokens = TokenStore.open(config.catalogue)
        self.products = ProductQueries(self.catalogue) if reads.kind == "texts" else None
        self.tokenizer = Tokenizer.load(config.catalogue)
        self._contents: dict[Reads, Photos] = {}
        for read in {stretch.reads for stretch in self.stretches}:
            judged = Pairs.open(config.catalogue) if read.kind == "pairs" else None
            sources = Sources(config, seed, read, self.order, self.tokens, self.tokenizer, self.products, judged)
            self._contents[read] = CONTENTS[read.kind](sources)
        self._pieces = world_size * config.micro_batches
        self._device, self._tp = device, tp
        self._present = self.stretches[0]
        self.images = self._reader()
        self._stream = torch.cuda.Stream(device) if device.type == "cuda" else None
        self._ahead: ReadAhead[list[_Planned], _Decoded] | None = None

    @property
    def step_bytes(self) -> int:
        """Bytes of the images of one step that this rank decodes, the same in all steps of the present stretch."""
        images = 0
        for piece in range(self.rank, self._pieces, self.world_size):
            sizes = self.samples(self._present.first)
            images += len(self.images.own(sum(len(share(size, self._pieces, piece)) for size in sizes)))
        return images * 3 * self._present.image_size**2 * torch.float32.itemsize

    @property
    def depth(self) -> int:
        """Steps of the present stretch that `steps` reads ahead, the one being decoded among them."""
        return max(1, min(self.config.read_ahead, self.config.read_ahead_bytes // max(1, self.step_bytes)))

    def samples(self, step: int) -> tuple[int, int]:
        """Query photos and documents of `step`, over all ranks."""
        return self._at(step).reads.samples(self.config.queries_per_step, self.config.documents_per_step)

    def spec(self, step: int) -> PreprocessSpec:
        """Preprocessing of `step`."""
        return replace(self.config.preprocess, image_size=self._at(step).image_size)

    def load(self, step: int) -> StepData:
        """Reads this rank's part of `step`, the same at every call; collective over tp.

        Not while `steps` reads ahead: there is one decoder, and it serves one thread.
        """
        self._enter(step)
        return self._whole(self._decode(self._plan(step)))

    def steps(self, first: int, end: int) -> Iterator[StepData]:
        """Yields steps first .. end - 1 in order, read ahead within a stretch; collective over tp."""
        begins = [stretch.first for stretch in self.stretches if first < stretch.first < end]
        for begin, stop in pairwise([first, *begins, end]):
            self._enter(begin)
            self._ahead = ReadAhead(self._plan, self._decode, self.depth, self._stream)
            for decoded, ready in self._ahead.steps(begin, stop):
                yield replace(self._whole(decoded), ready=ready)

    def sample_ids(self, step: int) -> list[int]:
        """Ids of this rank's samples in `step`, from the order only."""
        found: list[int] = []
        for piece in range(self.rank, self._pieces, self.world_size):
            for draw in self._contents[self._at(step).reads].draw(*self._piece(step, piece)):
                found += draw.sample_ids.tolist()
        return found

    def ledgers(self, first: int, end: int) -> list[int]:
        """Ledgers of the steps first .. end - 1 over all ranks, from the order only: no sample is read."""
        begins = [stretch.first for stretch in self.stretches if first < stretch.first < end]
        return list(chain.from_iterable(self._ledgers(*part) for part in pairwise([first, *begins, end])))

    def _ledgers(self, first: int, end: int) -> list[int]:
        """`ledgers` of steps of one stretch."""
        sizes, content = self.samples(first), self._contents[self._at(first).reads]
        at_once = max(1, _POSITIONS_AT_ONCE // max(sizes))
        found = []
        for start in range(first - self.first_step, end - self.first_step, at_once):
            stop = min(end - self.first_step, start + at_once)
            queries, documents = (np.arange(start * size, stop * size, dtype=np.int64) for size in sizes)
            q, d = content.draw(queries, documents)
            columns = zip((queries, q.sample_ids, documents, d.sample_ids), np.repeat(sizes, 2), strict=True)
            by_step = [column.reshape(stop - start, size) for column, size in columns]
            found += [_ledger(*of_step) for of_step in zip(*by_step, strict=True)]
        return found

    def close(self) -> None:
        """Ends the threads and closes the catalogue's files."""
        if self._ahead is not None:
            self._ahead.close()
            self._ahead = None  # it holds this loader: a cycle that would keep the catalogue's files open
        self.images.close()
        self.catalogue.close()

    def _at(self, step: int) -> Stretch:
        """The stretch of `step`."""
        return next(stretch for stretch in reversed(self.stretches) if stretch.first <= step)

    def _enter(self, step: int) -> None:
        """Makes the stretch of `step` the present one."""
        self._present = self._at(step)
        if self.images.spec != self.spec(step):
            self.images.close()
            self.images = self._reader()

    def _reader(self) -> ImageReader:
        """A reader of the present stretch's images."""
        config, spec = self.config, self.spec(self._present.first)
        counts = [self.samples(stretch.first) for stretch in self.stretches]
        most = max(-(-photos // self._pieces) + -(-documents // self._pieces) for photos, documents in counts)
        return ImageReader(self.catalogue, spec, config.backend, most, config.threads, self._device, self._tp)

    def _plan(self, step: int) -> list[_Planned]:
        """Draws the micro-batches of a step and starts to read their samples."""
        planned, content, photos = [], self._contents[self._present.reads], self.samples(step)[0]
        answers = content.answers(_positions(step - self.first_step, photos, 1, 0))
        for piece in range(self.rank, self._pieces, self.world_size):
            queries, documents = self._piece(step, piece)
            q, d = content.draw(queries, documents)
            ids = np.concatenate([q.sample_ids, d.sample_ids])
            parameters = self.images.parameters(
                ids, self.seed, np.concatenate([q.epochs, d.epochs]), np.concatenate([queries, documents]), train=True
            )
            own = answers[share(photos, self._pieces, piece)]
            mosaics = None
            if self.config.mosaic:
                mosaics = draw_mosaics(self.config.mosaic, self.seed, d.epochs, d.sample_ids, documents)
            planned.append(_Planned(queries, documents, q, d, own, self.images.request(ids, parameters), mosaics))
        return planned

    def _piece(self, step: int, piece: int) -> tuple[Ints, Ints]:
        """Positions of the queries and documents of one micro-batch."""
        photos, documents = self.samples(step)
        step -= self.first_step
        return _positions(step, photos, self._pieces, piece), _positions(step, documents, self._pieces, piece)

    def _decode(self, planned: list[_Planned]) -> _Decoded:
        """Decodes this rank's share of a step and makes its batches without pixels."""
        batches, pixels, total, bad = [], [], 0, []
        read, seconds, texts = 0, 0.0, TextTokens()
        for micro, (queries, documents, q, d, answers, request, _) in enumerate(planned):
            started = time.perf_counter()
            own = self.images.decode(request)
            seconds += time.perf_counter() - started
            batch = self._contents[self._present.reads].batch(q, d, answers, self._sizes(micro))
            batches.append(batch)
            pixels.append(own)
            texts = texts.plus(TextTokens.of(batch.document_lengths, batch.query_lengths))
            total += _ledger(queries, q.sample_ids, documents, d.sample_ids)
            read += len(request.ids)
            bad += request.ids[~own.ok.numpy()].tolist()
        event = None if self._stream is None else torch.cuda.current_stream().record_event()
        wanted, mosaics = [micro.request.wanted for micro in planned], [micro.mosaics for micro in planned]
        return _Decoded(StepData(batches, total % 2**64, bad, read, seconds, texts), pixels, wanted, mosaics, event)

    def _whole(self, decoded: _Decoded) -> StepData:
        """Adds the pixels, also those that other ranks read, and lays the mosaics, safe for this thread's stream;
        collective over tp.
        """
        if decoded.event is not None:
            stream = torch.cuda.current_stream()
            stream.wait_event(decoded.event)
            for own in decoded.pixels:
                if own.images.is_cuda:  # else the next decoding may have their memory while they are read
                    own.images.record_stream(stream)
        batches = []
        content = self._contents[self._present.reads]
        for batch, own, wanted, mosaics in zip(
            decoded.data.batches, decoded.pixels, decoded.wanted, decoded.mosaics, strict=True
        ):
            whole = content.with_pixels(batch, self.images.gather(own, wanted))
            batches.append(whole if mosaics is None else with_mosaics(whole, mosaics))
        return replace(decoded.data, batches=batches)

    def _sizes(self, micro: int) -> dict[str, list[int]]:
        """Queries and documents of every rank in a micro-batch, as in `Batch.sizes`."""
        places = range(micro * self.world_size, (micro + 1) * self.world_size)
        rows = self._present.reads.rows(self.config.queries_per_step, self.config.documents_per_step)
        return {side: [len(share(count, self._pieces, place)) for place in places] for side, count in rows.items()}


class _Planned(NamedTuple):
    """A micro-batch that is being read: positions and draws of its queries and documents, answers of its queries."""

    queries: Ints
    documents: Ints
    q: Draw
    d: Draw
    answers: Ints
    request: Request
    mosaics: Mosaics | None


class _Decoded(NamedTuple):
    """A step without pixels and weights; for each micro-batch this rank's share of these, the number of samples over
    all ranks that share the reading, and the mosaics, if there are any; the event after which the pixels are ready.
    """

    data: StepData
    pixels: list[Pixels]
    wanted: list[int]
    mosaics: list[Mosaics | None]
    event: torch.cuda.Event | None


def _positions(step: int, per_step: int, pieces: int, piece: int) -> Ints:
    """Positions of one piece of a step, counted from position 0, int64."""
    part = share(per_step, pieces, piece)
    return step * per_step + np.arange(part.start, part.stop, dtype=np.int64)


def _ledger(queries: Ints, query_ids: Ints, documents: Ints, document_ids: Ints) -> int:
    """Ledger of queries and documents together, modulo 2**64."""
    both = ledger(queries, query_ids, "query", _LEDGER_KEY) + ledger(documents, document_ids, "document", _LEDGER_KEY)
    return both % 2**64
