"""This rank's part of every step: positions -> samples -> bytes -> pixels and tokens, read ahead by one thread.

Nothing here has a state: what step k holds is a function of (order, k), and how it is cut over ranks and micro-batches a function of their numbers.
"""

from __future__ import annotations

import contextlib
import queue
import threading
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Protocol

import numpy as np
import numpy.typing as npt
import torch

from harness.data.catalogue import Catalogue, CorruptSample
from harness.data.order import ClassOrder, ledger
from harness.data.preprocess import Parameters, PreprocessSpec, draw_parameters
from harness.data.reference import ReferencePipeline
from harness.data.tokenizer import TokenStore
from harness.errors import UserError
from models.batch import Batch

Ints = npt.NDArray[np.int64]
_LEDGER_KEY = 0x5348_4C46


@dataclass(frozen=True, kw_only=True)
class DataConfig:
    """What a run reads, and how.

    Args:
        catalogue: folder made by `shelfmark ingest`, with classes (`govern`) and a tokenizer (`tokenizer`).
        queries_per_step: query photos in one optimizer step, over all ranks.
        documents_per_step: documents in one optimizer step, over all ranks.
        micro_batches: pieces into which a rank cuts its part of the step, to save memory.
        backend: dali (decodes on the GPU where there is one), or reference (Pillow and numpy, where DALI has no wheel).
        threads: decoding threads of each rank.
        read_ahead: steps that wait ready.
        preprocess: from an image to the model's input.
    """

    catalogue: Path = Path("catalogue")
    queries_per_step: int = 64
    documents_per_step: int = 64
    micro_batches: int = 1
    backend: str = "dali"
    threads: int = 2
    read_ahead: int = 3
    preprocess: PreprocessSpec = field(default_factory=PreprocessSpec)

    def errors(self) -> list[str]:
        """What is out of range, as sentences that name the key."""
        errors = []
        if self.backend not in ("dali", "reference"):
            errors.append(f"data.backend is '{self.backend}'; it can be 'dali' or 'reference'")
        for name in ("queries_per_step", "documents_per_step", "micro_batches", "threads", "read_ahead"):
            if getattr(self, name) < 1:
                errors.append(f"data.{name} must be at least 1")
        return errors


@dataclass(frozen=True)
class StepData:
    """One rank's part of a step: its micro-batches, the ledger of its (position, id) pairs, and the ids that could not be decoded."""

    batches: list[Batch]
    ledger: int
    bad_ids: list[int]


class Pipeline(Protocol):
    """Encoded images to the model's input: DALI's and Pillow's, told apart by nothing but speed."""

    def decode(self, encoded: list[bytes], params: Parameters) -> tuple[torch.Tensor, torch.Tensor]:
        """Images float32 [n, 3, S, S], zeros where unreadable, and ok bool [n]."""
        ...

    def close(self) -> None:
        """Ends its threads."""
        ...


def open_pipeline(spec: PreprocessSpec, backend: str, batch_size: int, threads: int, device: torch.device) -> Pipeline:
    """The decoder that `backend` names; see `ImageReader`.

    Raises:
        UserError: DALI is asked for and does not import.
    """
    if backend == "reference":
        return ReferencePipeline(spec, batch_size, threads)
    try:
        from harness.data.pipeline import ImagePipeline  # here, so that `reference` runs where DALI has no wheel
    except ImportError as error:
        raise UserError(
            f"DALI does not import ({error})", "Install nvidia-dali, or choose the backend 'reference'"
        ) from error
    return ImagePipeline(spec, batch_size, threads, "mixed" if device.type == "cuda" else "cpu", device.index or 0)


class ImageReader:
    """Reads and decodes samples of one catalogue; a sample whose bytes are damaged costs itself alone.

    Args:
        catalogue: where the bytes lie.
        spec: preprocessing.
        backend: 'dali' or 'reference'.
        batch_size: the most images per call.
        threads: decoding threads.
        device: where the pixels are wanted; DALI decodes there too.
    """

    def __init__(
        self,
        catalogue: Catalogue,
        spec: PreprocessSpec,
        backend: str,
        batch_size: int,
        threads: int,
        device: torch.device,
    ) -> None:
        self.catalogue, self.spec = catalogue, spec
        self._pipeline = open_pipeline(spec, backend, batch_size, threads, device)

    def read(self, ids: Ints, parameters: Parameters) -> tuple[torch.Tensor, torch.Tensor]:
        """Images [n, 3, S, S] and ok bool [n] of samples `ids`."""
        return self._pipeline.decode([self._bytes(int(i)) for i in ids], parameters)

    def parameters(
        self, ids: Ints, seed: int = 0, epochs: Ints | int = 0, positions: Ints | int = 0, train: bool = False
    ) -> Parameters:
        """Crop windows, flips and colours of samples `ids`; evaluation's unless `train`."""
        entries = self.catalogue.index[ids]
        return draw_parameters(
            self.spec, seed, epochs, ids, entries["width"], entries["height"], train=train, variant=positions
        )

    def close(self) -> None:
        """Ends the decoder's threads."""
        self._pipeline.close()

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
        text_length: tokens per document.
        rank: this rank's place among those that bring different samples (dp).
        world_size: their number.
        device: where images are wanted.
        paired: documents of the queries' own classes (contrastive training) instead of their own slots.
    """

    def __init__(
        self,
        config: DataConfig,
        seed: int,
        text_length: int,
        rank: int,
        world_size: int,
        device: torch.device,
        paired: bool = False,
    ) -> None:
        self.config, self.seed, self.paired = config, seed, paired
        self.rank, self.world_size, self.text_length = rank, world_size, text_length
        self.catalogue = Catalogue(config.catalogue)
        self.order = ClassOrder.open(config.catalogue, seed)
        self.tokens = TokenStore.open(config.catalogue)
        pieces = world_size * config.micro_batches
        most = -(-config.queries_per_step // pieces) + -(-(self.documents_per_step) // pieces)
        self.images = ImageReader(self.catalogue, config.preprocess, config.backend, most, config.threads, device)
        self._stop = threading.Event()
        self._queue: queue.Queue[StepData | BaseException] = queue.Queue(config.read_ahead)
        self._thread: threading.Thread | None = None

    @property
    def documents_per_step(self) -> int:
        """Documents of one step over all ranks; as many as queries where they are paired."""
        return self.config.queries_per_step if self.paired else self.config.documents_per_step

    def load(self, step: int) -> StepData:
        """This rank's part of `step`; the same whenever and however often it is asked for.

        Not while `steps` reads ahead: there is one decoder, and it serves one thread.
        """
        batches, total, bad = [], 0, []
        for micro in range(self.config.micro_batches):
            piece, pieces = micro * self.world_size + self.rank, self.config.micro_batches * self.world_size
            queries = _positions(step, self.config.queries_per_step, pieces, piece)
            documents = _positions(step, self.documents_per_step, pieces, piece)
            q = self.order.draw("query", queries)
            if self.paired:
                d_ids, d_classes = self.order.paired(q.class_ids, queries, "document"), q.class_ids
                d_epochs = q.epochs
            else:
                d = self.order.draw("document", documents)
                d_ids, d_classes, d_epochs = d.sample_ids, d.class_ids, d.epochs
            ids = np.concatenate([q.sample_ids, d_ids])
            parameters = self.images.parameters(
                ids, self.seed, np.concatenate([q.epochs, d_epochs]), np.concatenate([queries, documents]), train=True
            )
            images, ok = self.images.read(ids, parameters)
            n = len(queries)
            batches.append(
                Batch(
                    query_images=images[:n],
                    query_labels=torch.from_numpy(q.class_ids),
                    query_weights=ok[:n].float(),
                    query_ids=torch.from_numpy(q.sample_ids),
                    document_images=images[n:],
                    document_tokens=torch.from_numpy(self.tokens.batch(d_ids, self.text_length)),
                    document_labels=torch.from_numpy(d_classes),
                    document_weights=ok[n:].float(),
                    document_ids=torch.from_numpy(d_ids),
                )
            )
            total += ledger(queries, q.sample_ids, "query", _LEDGER_KEY) + ledger(
                documents, d_ids, "document", _LEDGER_KEY
            )
            bad += ids[~ok.numpy()].tolist()
        return StepData(batches, total % 2**64, bad)

    def steps(self, first: int, end: int) -> Iterator[StepData]:
        """Steps first .. end - 1 in order, read ahead."""
        self._thread = threading.Thread(target=self._read_ahead, args=(first, end), name="read-ahead", daemon=True)
        self._thread.start()
        for _ in range(first, end):
            item = self._queue.get()
            if isinstance(item, BaseException):
                raise item
            yield item

    def close(self) -> None:
        """Ends the thread and releases decoder and files."""
        self._stop.set()
        if self._thread is not None:
            while self._thread.is_alive():  # it may wait for room in the queue
                with contextlib.suppress(queue.Empty):
                    self._queue.get_nowait()
                self._thread.join(0.05)
        self.images.close()
        self.catalogue.close()

    def _read_ahead(self, first: int, end: int) -> None:
        try:
            for step in range(first, end):
                if self._stop.is_set():
                    return
                self._queue.put(self.load(step))
        except BaseException as error:  # handed to the training thread, which raises it
            self._queue.put(error)


def _positions(step: int, per_step: int, pieces: int, piece: int) -> Ints:
    """Positions of one piece of a step, int64."""
    part = share(per_step, pieces, piece)
    return step * per_step + np.arange(part.start, part.stop, dtype=np.int64)
