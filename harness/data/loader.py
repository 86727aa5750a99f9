"""This rank's part of every step: positions -> samples -> bytes -> pixels and tokens, read ahead by one thread.

Nothing here has a state: what step k holds is a function of (order, k), and how it is cut over ranks and micro-batches
a function of their numbers.
"""

from __future__ import annotations

import os
import queue
import threading
import time
from collections.abc import Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field, replace
from itertools import chain
from pathlib import Path
from typing import Any, Literal, NamedTuple, Protocol, get_args

import numpy as np
import numpy.typing as npt
import torch
from torch.distributed import ProcessGroup

from harness.catalogue.catalogue import Catalogue, CorruptSample
from harness.core.errors import UserError
from harness.data.decode_pillow import ReferencePipeline
from harness.data.masking import MaskConfig, draw_masks, other_titles
from harness.data.order import ClassOrder, Draw, ledger
from harness.data.preprocess import Parameters, PreprocessSpec, draw_parameters
from harness.text.product_queries import ProductQueries
from harness.text.tokenizer import Tokenizer, TokenStore
from models.batch import Batch, Reads
from models.comm import gather_shards
from models.ranges import ClosedUnitInterval, NonNegativeInt, PositiveInt
from models.transfer import send

Ints = npt.NDArray[np.int64]
READS = 16  # of a rank under way at once: a parallel file system or a server answers late, but many at a time
Backend = Literal["dali", "dali_cpu", "reference"]
BACKENDS = get_args(Backend)
_LEDGER_KEY = 0x5348_4C46
_POSITIONS_AT_ONCE = 1 << 18  # bounds the memory of `StepLoader.ledgers`


@dataclass(frozen=True, kw_only=True)
class DataConfig:
    """Configuration of a run's data.

    Args:
        catalogue: folder made by `shelfmark ingest`, with classes (`govern`) and a tokenizer (`tokenizer`).
        queries_per_step: query photos in one optimizer step, over all ranks; without effect for a method that trains on
            documents.
        documents_per_step: documents in one optimizer step, over all ranks; without effect where every query photo
            brings its own.
        micro_batches: pieces into which a rank cuts its part of the step, to save memory.
        backend: dali (decodes on the GPU where there is one), dali_cpu (never there), or reference (Pillow and numpy,
            where DALI has no wheel).
        threads: decoding threads of each rank; 0: the process's cores by the ranks of its node, less two, at least 1.
            Results do not depend on it.
        read_ahead: steps that are read ahead at most.
        read_ahead_bytes: bytes of decoded images that a rank reads ahead at most, on the device that decodes; one step
            in any case.
        max_bad_fraction: the run stops at a line of log where more than this share of the samples that it has read
            since it was started was damaged; not before 1,000 were read. Damaged samples have weight 0.
        preprocess: from an image to the model's input.
        query_attributes: fewest and most attributes in a text query that is made of attributes.
        masking: what masked modelling hides.
    """

    catalogue: Path = Path("catalogue")
    queries_per_step: PositiveInt = 64
    documents_per_step: PositiveInt = 64
    micro_batches: PositiveInt = 1
    backend: Backend = "dali"
    threads: NonNegativeInt = 0
    read_ahead: PositiveInt = 3
    read_ahead_bytes: PositiveInt = 1 << 30
    max_bad_fraction: ClosedUnitInterval = 0.01
    preprocess: PreprocessSpec = field(default_factory=PreprocessSpec)
    query_attributes: tuple[PositiveInt, PositiveInt] = (1, 4)
    masking: MaskConfig = field(default_factory=MaskConfig)

    def errors(self) -> list[str]:
        """Errors for values that do not fit together; each names its key."""
        errors = self.preprocess.errors("data.preprocess") + self.masking.errors("data.masking")
        fewest, most = self.query_attributes
        if fewest > most:
            errors.append(f"data.query_attributes is {self.query_attributes}; the first must not be above the second")
        return errors


class TextTokens(NamedTuple):
    """Sums over texts: of their tokens, and of the squares of these, which attention costs; of documents and of text
    queries.
    """

    documents: int = 0
    documents_squared: int = 0
    queries: int = 0
    queries_squared: int = 0

    @classmethod
    def of(cls, documents: torch.Tensor, queries: torch.Tensor) -> TextTokens:
        """Of the texts' lengths, int64 [n]."""
        return cls(*(int((length**power).sum()) for length in (documents, queries) for power in (1, 2)))


@dataclass(frozen=True)
class StepData:
    """One rank's part of a step: its micro-batches and the ledger of its (position, id) pairs.

    bad_ids: of what this rank read of it, the ids that could not be decoded (tensor-parallel ranks share the reading);
    images: how many it read; read_seconds: what waiting for their bytes and decoding them took; texts: its documents'
    texts and text queries, padding left out; ready: share of the read-ahead that was ready when this step was asked
    for.
    """

    batches: list[Batch]
    ledger: int
    bad_ids: list[int]
    images: int
    read_seconds: float
    texts: TextTokens = field(default_factory=TextTokens)
    ready: float = 0.0


class Pipeline(Protocol):
    """Encoded images to the model's input: DALI's and Pillow's, told apart by nothing but speed. `line` says what
    decodes, in words.
    """

    line: str

    def decode(self, encoded: list[bytes], params: Parameters) -> tuple[torch.Tensor, torch.Tensor]:
        """Images float32 [n, 3, S, S], zeros where unreadable, and ok bool [n]."""
        ...

    def close(self) -> None:
        """Ends its threads."""
        ...


def open_pipeline(spec: PreprocessSpec, backend: str, batch_size: int, threads: int, device: torch.device) -> Pipeline:
    """The decoder that `backend` names; see `ImageReader`.

    Raises:
        UserError: DALI is asked for and does not import, or its nvJPEG is too old for a GPU.
    """
    if backend == "reference":
        return ReferencePipeline(spec, batch_size, threads)
    try:
        from harness.data.decode_dali import ImagePipeline  # here, so that `reference` runs where DALI has no wheel
    except ImportError as error:
        raise UserError(
            f"DALI does not import ({error})",
            "Install shelfmark[cu13] or shelfmark[cu12], as the GPUs' driver has it, or choose the backend 'reference'",
        ) from error
    mixed = device.type == "cuda" and backend == "dali"
    return ImagePipeline(spec, batch_size, threads, "mixed" if mixed else "cpu", device.index or 0)


def decoding_threads(threads: int) -> int:
    """`threads`; of 0 this rank's share of the cores that its node gives the process, less two: one computes, one reads
    ahead.
    """
    ranks = int(os.environ.get("LOCAL_WORLD_SIZE", "1"))
    return threads or max(1, len(os.sched_getaffinity(0)) // ranks - 2)


class Pixels(NamedTuple):
    """Images [n, 3, S, S] and ok bool [n]."""

    images: torch.Tensor
    ok: torch.Tensor


class Request(NamedTuple):
    """Samples that are being read: all that are wanted, and of those that this rank reads their ids, parameters and
    bytes to come.
    """

    wanted: int
    ids: Ints
    parameters: Parameters
    encoded: Iterator[bytes]


class ImageReader:
    """Reads and decodes samples of one catalogue; a sample whose bytes are damaged costs itself alone.

    Args:
        catalogue: where the bytes lie.
        spec: preprocessing.
        backend: one of BACKENDS.
        batch_size: the most images per call.
        threads: decoding threads; see `DataConfig`.
        device: where the pixels are wanted; DALI decodes there too.
        tp: ranks that all want the same samples: each reads and decodes a part, `gather` brings the parts together.
            None: every rank for itself.

    Attributes:
        line: what decodes, in words.
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
        """Samples `ids`; collective over tp."""
        request = self.request(ids, parameters)
        return self.gather(self.decode(request), request.wanted)

    def stream(self, blocks: Iterable[Ints]) -> Iterator[Pixels]:
        """Each block of samples as evaluation sees them; the bytes of the next are read meanwhile; collective over tp."""
        requests = (self.request(ids, self.parameters(ids)) for ids in blocks)
        ahead = next(requests, None)
        while ahead is not None:
            request, ahead = ahead, next(requests, None)
            yield self.gather(self.decode(request), request.wanted)

    def request(self, ids: Ints, parameters: Parameters) -> Request:
        """Begins to read this rank's part of samples `ids`."""
        own = self.own(len(ids))
        mine = ids[own.start : own.stop]
        cut = {name: array[own.start : own.stop] for name, array in parameters.items()}
        parts = np.array_split(
            mine, max(1, min(READS, len(mine)))
        )  # a task for each sample would cost as much as a read from memory
        return Request(len(ids), mine, cut, chain.from_iterable(self._reads.map(self._part, parts)))

    def decode(self, request: Request) -> Pixels:
        """This rank's part of what was requested, once it has been read."""
        return Pixels(*self._pipeline.decode(list(request.encoded), request.parameters))

    def gather(self, own: Pixels, count: int) -> Pixels:
        """All `count` samples from the parts of the ranks, on the device where they share; collective over tp.

        Not to be called from a thread beside the training thread: collectives have one order.
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
        """Crop windows, flips and colours of samples `ids`; evaluation's unless `train`."""
        entries = self.catalogue.index[ids]
        return draw_parameters(
            self.spec, seed, epochs, ids, entries["width"], entries["height"], train=train, variant=positions
        )

    def close(self) -> None:
        """Ends the decoder's threads, and those that read."""
        self._pipeline.close()
        self._reads.shutdown(cancel_futures=True)

    def _part(self, ids: Ints) -> list[bytes]:
        return [self._bytes(sample_id) for sample_id in ids.tolist()]

    def _bytes(self, sample_id: int) -> bytes:
        try:
            return self.catalogue.read_bytes(sample_id)
        except CorruptSample:
            return b""  # decodes to a neutral image with ok = False


def share(total: int, pieces: int, piece: int) -> range:
    """The `piece`-th of `pieces` nearly equal consecutive parts of range(total); later parts may be empty."""
    return range(piece * total // pieces, (piece + 1) * total // pieces)


class StepLoader:
    """Steps of training data, in order, read ahead by one thread.

    Args:
        config: what and how much.
        seed: seed of order and augmentation.
        reads: what the method's batches hold.
        rank: this rank's place among those that bring different samples (dp).
        world_size: their number.
        device: where images are wanted.
        tp: ranks that bring the same samples and share their reading; None: this one reads them all.

    Attributes:
        queries_per_step, documents_per_step: images of one step over all ranks.
        depth: steps that `steps` reads ahead, the one being decoded among them.
        first_step: the step that stands at position 0 of the order; 0 until it is set.
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
    ) -> None:
        self.config, self.seed, self.reads = config, seed, reads
        self.queries_per_step, self.documents_per_step = reads.samples(
            config.queries_per_step, config.documents_per_step
        )
        self.rank, self.world_size = rank, world_size
        self.catalogue = Catalogue(config.catalogue)
        self.order = ClassOrder.open(config.catalogue, seed)
        self.tokens = TokenStore.open(config.catalogue)
        self.products = ProductQueries(self.catalogue) if reads.kind == "texts" else None
        self.tokenizer = Tokenizer.load(config.catalogue)
        self.first_step = 0
        pieces = world_size * config.micro_batches
        most = -(-self.queries_per_step // pieces) + -(-self.documents_per_step // pieces)
        self.images = ImageReader(self.catalogue, config.preprocess, config.backend, most, config.threads, device, tp)
        # Decoding must not queue behind a training step's kernels, nor those behind the decoding of steps to come.
        self._stream = torch.cuda.Stream(device) if device.type == "cuda" else None
        self.depth = max(1, min(config.read_ahead, config.read_ahead_bytes // max(1, self.step_bytes)))
        # SimpleQueue alone: a Ctrl-C amid the Python code of any other queue, semaphore or event leaves its lock held,
        # and `close` waits for ever.
        self._queue: queue.SimpleQueue[_Decoded | BaseException] = queue.SimpleQueue()
        self._room: queue.SimpleQueue[None] = queue.SimpleQueue()  # an entry for each step that may be decoded
        for _ in range(self.depth):
            self._room.put(None)
        self._closing = False
        self._thread: threading.Thread | None = None

    @property
    def step_bytes(self) -> int:
        """Bytes of the images of one step that this rank decodes, the same in all steps."""
        pieces = self.config.micro_batches * self.world_size
        sizes = self.queries_per_step, self.documents_per_step
        places = range(self.rank, pieces, self.world_size)
        images = sum(len(self.images.own(sum(len(share(size, pieces, piece)) for size in sizes))) for piece in places)
        return images * 3 * self.config.preprocess.image_size**2 * torch.float32.itemsize

    def load(self, step: int) -> StepData:
        """This rank's part of `step`; the same whenever and however often it is asked for; collective over tp.

        Not while `steps` reads ahead: there is one decoder, and it serves one thread.
        """
        return self._whole(self._decode(self._plan(step)))

    def _plan(self, step: int) -> list[_Planned]:
        """Draws the micro-batches of a step and begins to read their samples."""
        planned = []
        for micro in range(self.config.micro_batches):
            piece, pieces = micro * self.world_size + self.rank, self.config.micro_batches * self.world_size
            queries = _positions(step - self.first_step, self.queries_per_step, pieces, piece)
            documents = _positions(step - self.first_step, self.documents_per_step, pieces, piece)
            q, d = self._draw(queries, documents)
            ids = np.concatenate([q.sample_ids, d.sample_ids])
            parameters = self.images.parameters(
                ids, self.seed, np.concatenate([q.epochs, d.epochs]), np.concatenate([queries, documents]), train=True
            )
            planned.append(_Planned(queries, documents, q, d, self.images.request(ids, parameters)))
        return planned

    def _decode(self, planned: list[_Planned]) -> _Decoded:
        """All of a step but what other ranks read of it."""
        batches, pixels, total, bad = [], [], 0, []
        read, seconds, texts = 0, 0.0, TextTokens()
        for micro, (queries, documents, q, d, request) in enumerate(planned):
            started = time.perf_counter()
            own = self.images.decode(request)
            seconds += time.perf_counter() - started
            none = own.images[:0]
            batch = Batch(
                query_images=none,
                query_labels=torch.from_numpy(q.class_ids),
                query_weights=torch.empty(0),
                query_ids=torch.from_numpy(q.sample_ids),
                document_images=none,
                document_tokens=torch.from_numpy(self.tokens.batch(d.sample_ids, self.reads.text_length)),
                document_labels=torch.from_numpy(d.class_ids),
                document_weights=torch.empty(0),
                document_ids=torch.from_numpy(d.sample_ids),
                sizes=self._sizes(micro),
            )
            more: dict[str, Any] = {**self._texts(d), **self._masks(d, batch.document_tokens)}
            batch = replace(batch, **more).with_lengths(self.tokens.special.pad)
            batches.append(batch)
            pixels.append(own)
            found = TextTokens.of(batch.document_lengths, batch.query_lengths)
            texts = TextTokens(*map(sum, zip(texts, found, strict=True)))
            total += _ledger(queries, q.sample_ids, documents, d.sample_ids)
            read += len(request.ids)
            bad += request.ids[~own.ok.numpy()].tolist()
        event = None if self._stream is None else torch.cuda.current_stream().record_event()
        return _Decoded(StepData(batches, total % 2**64, bad, read, seconds, texts), pixels, event)

    def _whole(self, decoded: _Decoded) -> StepData:
        """The step as its method takes it, safe for this thread's stream; collective over tp."""
        if decoded.event is not None:
            stream = torch.cuda.current_stream()
            stream.wait_event(decoded.event)
            for own in decoded.pixels:
                if own.images.is_cuda:  # else the next decoding may have their memory while they are read
                    own.images.record_stream(stream)
        batches = []
        for batch, own in zip(decoded.data.batches, decoded.pixels, strict=True):
            n = len(batch.query_ids) if self.products is None else 0
            images, ok = self.images.gather(own, n + len(batch.document_ids))
            read: dict[str, Any] = {"query_images": images[:n], "document_images": images[n:]}
            if self.products is None:
                read["query_weights"] = ok[:n].float()
            batches.append(replace(batch, **read, document_weights=ok[n:].float()))
        return replace(decoded.data, batches=batches)

    def _sizes(self, micro: int) -> dict[str, list[int]]:
        """Samples of every rank in a micro-batch."""
        places = range(micro * self.world_size, (micro + 1) * self.world_size)
        texts = self.products is not None  # a query for each document
        queries = self.documents_per_step if texts else self.queries_per_step
        per_step = {"query": queries, "document": self.documents_per_step}
        pieces = self.world_size * self.config.micro_batches
        return {side: [len(share(size, pieces, place)) for place in places] for side, size in per_step.items()}

    def ledgers(self, first: int, end: int) -> list[int]:
        """The ledger of each of the steps first .. end - 1 over all ranks, from the order alone: no sample is read."""
        sizes = self.queries_per_step, self.documents_per_step
        at_once = max(1, _POSITIONS_AT_ONCE // max(sizes))
        found = []
        for start in range(first - self.first_step, end - self.first_step, at_once):
            stop = min(end - self.first_step, start + at_once)
            queries, documents = (np.arange(start * size, stop * size, dtype=np.int64) for size in sizes)
            q, d = self._draw(queries, documents)
            columns = zip((queries, q.sample_ids, documents, d.sample_ids), np.repeat(sizes, 2), strict=True)
            found += [
                _ledger(*row) for row in zip(*(a.reshape(stop - start, size) for a, size in columns), strict=True)
            ]
        return found

    def _draw(self, queries: Ints, documents: Ints) -> tuple[Draw, Draw]:
        """Queries and documents at these positions, which are the same in pairs."""
        if self.reads.kind == "pairs":
            q = self.order.draw("query", queries)
            return q, Draw(self.order.paired(q.class_ids, documents, "document"), q.class_ids, q.epochs)
        none = np.empty(0, np.int64)
        q = self.order.draw("query", queries) if self.queries_per_step else Draw(none, none, none)
        return q, self.order.draw("document", documents)

    def _texts(self, documents: Draw) -> dict[str, torch.Tensor]:
        """A text query of each document, with what is known of the document; nothing where the method has no text
        queries.
        """
        if self.products is None:
            return {}
        ids = documents.sample_ids
        texts = self.products.draw(ids, documents.epochs, self.seed, *self.config.query_attributes)
        tokens = TokenStore.encode(self.tokenizer, {"query": texts})
        return {
            "query_tokens": torch.from_numpy(tokens.batch(np.arange(len(ids)), self.reads.query_length, ["query"])),
            "query_labels": torch.from_numpy(documents.class_ids),
            "query_weights": torch.tensor([float(bool(text)) for text in texts]),
            "query_ids": torch.from_numpy(ids),
            "categories": torch.from_numpy(self.products.categories[ids].astype(np.int64)),
            "keywords": torch.from_numpy(self.products.keywords[ids].astype(np.int64)),
            "query_keywords": torch.from_numpy(self.products.keywords_of(texts)),
        }

    def _masks(self, documents: Draw, tokens: torch.Tensor) -> dict[str, torch.Tensor]:
        """Masks of the documents and, where they come alone, titles to be told from their own."""
        if not self.reads.num_patches:
            return {}
        masking, ids, key = self.config.masking, documents.sample_ids, (self.seed, documents.epochs)
        hidden = draw_masks(masking, tokens.numpy(), self.reads.num_patches, self.tokens.special, *key, ids)
        fields = dict(
            zip(
                ("masked_tokens", "masked_words", "masked_patches", "masked_titles"),
                map(torch.from_numpy, hidden),
                strict=True,
            )
        )
        if self.reads.kind == "documents":
            others = other_titles(masking.mismatched, self.order, *key, ids)
            fields["other_tokens"] = torch.from_numpy(self.tokens.batch(others, self.reads.text_length))
        return fields

    def steps(self, first: int, end: int) -> Iterator[StepData]:
        """Steps first .. end - 1 in order, read ahead."""
        self._thread = threading.Thread(target=self._read_ahead, args=(first, end), name="read-ahead", daemon=True)
        self._thread.start()
        for step in range(first, end):
            ready = self._queue.qsize() / min(self.depth, end - step)  # at the end there is less to read ahead
            item = self._queue.get()
            if isinstance(item, BaseException):
                try:
                    raise item
                finally:
                    del item  # its traceback holds this frame: a cycle that would keep the catalogue's files open
            self._room.put(None)
            yield replace(self._whole(item), ready=ready)

    def close(self) -> None:
        """Ends the thread and releases decoder and files."""
        self._closing = True
        self._room.put(None)  # the thread may wait for it
        if self._thread is not None:
            self._thread.join()
        self.images.close()
        self.catalogue.close()

    def _read_ahead(self, first: int, end: int) -> None:
        try:
            with torch.cuda.stream(self._stream):  # of None none
                planned = self._plan(first) if first < end else []
                for step in range(first, end):
                    self._room.get()
                    if self._closing:
                        return
                    current = planned
                    planned = self._plan(step + 1) if step + 1 < end else []  # read while `step` is decoded
                    self._queue.put(self._decode(current))
        except BaseException as error:  # handed to the training thread, which raises it
            self._queue.put(error)


class _Planned(NamedTuple):
    """A micro-batch that is being read: positions and draws of its queries and documents."""

    queries: Ints
    documents: Ints
    q: Draw
    d: Draw
    request: Request


class _Decoded(NamedTuple):
    """A step without pixels and weights, this rank's part of these for each micro-batch, and the event after which they
    are there.
    """

    data: StepData
    pixels: list[Pixels]
    event: torch.cuda.Event | None


def _positions(step: int, per_step: int, pieces: int, piece: int) -> Ints:
    """Positions of one piece of a step, counted from position 0, int64."""
    part = share(per_step, pieces, piece)
    return step * per_step + np.arange(part.start, part.stop, dtype=np.int64)


def _ledger(queries: Ints, query_ids: Ints, documents: Ints, document_ids: Ints) -> int:
    """Ledger of both kinds together, modulo 2**64."""
    both = ledger(queries, query_ids, "query", _LEDGER_KEY) + ledger(documents, document_ids, "document", _LEDGER_KEY)
    return both % 2**64
