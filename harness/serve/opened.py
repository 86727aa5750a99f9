"""An artefact as the service holds it: open, warm, with what the page asks about it."""

from __future__ import annotations

import io
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import pyarrow.compute as pc
import torch
from torch import Tensor

from harness.artefact.artefact import Artefact, Hit, Photo
from harness.core.errors import UserError
from harness.core.manifest import fingerprint

FIXED = {"item", "title", "description", "class_key"}  # columns of text that are not attributes
MOST_VALUES, LONGEST_VALUE = 40, 80  # of an attribute, as filters to choose from
BATCH_PIXELS = 64_000_000  # decoded at once

Where = tuple[tuple[str, tuple[str, ...]], ...]  # values allowed, by attribute


@dataclass(frozen=True)
class Query:
    """One request: a photo, or a text; `k` documents wanted, 0 for the embedding only."""

    photo: Photo | None = None
    text: str = ""
    k: int = 0
    where: Where = ()


@dataclass(frozen=True)
class Answer:
    """The embedding float32 [d] and the documents that one artefact gave."""

    opened: Opened
    vector: Tensor
    hits: list[Hit]


class Opened:
    """An artefact and its decoder. `answer` is for one thread at a time, the rest for any.

    Args:
        path: the artefact folder.
        backend: decoder of the photos; the artefact's own by default.
        threads: decoding threads.
        batch: queries at once.

    Attributes:
        id: first 12 digits of the SHA-256 of the manifest, which covers the whole folder.
        filters: attribute -> its most frequent values.

    Raises:
        UserError: as `Artefact`, or the artefact gives a first answer that is not good.
    """

    def __init__(self, path: Path, backend: str | None, threads: int, batch: int) -> None:
        self.artefact = Artefact(path, backend, threads)
        self.id = fingerprint(path)[:12]
        self.takes: str = self.artefact.meta["query"]
        self.columns = [name for name in self.artefact.texts if name not in FIXED]
        self.filters = {name: self._values(name) for name in self.columns}
        self._pipeline = self.artefact.decoder(batch) if self.takes == "image" else None
        self._batch = batch
        self._warm()

    def close(self) -> None:
        """Ends the decoder; on the thread of `answer`."""
        if self._pipeline is not None:
            self._pipeline.close()

    def _values(self, column: str) -> list[str]:
        counts = pc.value_counts(self.artefact.documents.column(column)).to_pylist()
        counts.sort(key=lambda row: (-row["counts"], str(row["values"])))
        values = [row["values"] for row in counts if row["values"]]
        return [value for value in values if len(value) <= LONGEST_VALUE][:MOST_VALUES]

    def _warm(self) -> None:
        """Computes a first answer, which takes longest, before anybody waits for one."""
        query = Query(text="a", k=1)
        if self.takes == "image":
            file = io.BytesIO()
            self.artefact.thumbnail(0).convert("RGB").save(file, "JPEG")
            query = Query(photo=Photo.read(file.getvalue()), k=1)
        (answer,) = self.answer([query])
        if isinstance(answer, Exception):
            raise answer

    def answer(self, queries: Sequence[Query]) -> list[Answer | Exception]:
        """Answers in order; a query that cannot be answered costs itself only."""
        vectors = self._vectors(queries)
        answers: list[Answer | Exception] = [v if isinstance(v, Exception) else Answer(self, v, []) for v in vectors]
        searched: dict[Where, list[int]] = {}
        for row, query in enumerate(queries):
            if query.k and isinstance(answers[row], Answer):
                searched.setdefault(query.where, []).append(row)
        for where, rows in searched.items():
            asked = torch.stack([vector for row in rows if isinstance(vector := vectors[row], Tensor)])
            most = max(queries[row].k for row in rows)
            try:
                found = self.artefact.search(asked, most, dict(where))
            except UserError as error:  # a filter that an artefact had until it was replaced
                answers = [error if row in rows else answer for row, answer in enumerate(answers)]
                continue
            for row, vector, hits in zip(rows, asked, found, strict=True):
                answers[row] = Answer(self, vector, hits[: queries[row].k])
        return answers

    def _vectors(self, queries: Sequence[Query]) -> list[Tensor | Exception]:
        """Unit embeddings [d], or why there is none."""
        vectors: dict[int, Tensor | Exception] = {}
        if self._pipeline is None:
            rows = [row for row, query in enumerate(queries) if query.photo is None]
            if rows:
                vectors.update(zip(rows, self.artefact.embed_texts([queries[row].text for row in rows]), strict=True))
        else:
            photos = {row: query.photo for row, query in enumerate(queries) if query.photo is not None}
            for part in _parts(photos, self._batch):
                found, good = self.artefact.embed_decoded([photos[row] for row in part], self._pipeline)
                damaged = UserError("photo: cannot be decoded", "Save it as an ordinary JPEG")
                vectors.update((row, v if ok else damaged) for row, v, ok in zip(part, found, good, strict=True))
        other = UserError(f"the service now answers {self.takes} queries", "Load the page again")
        return [vectors.get(row, other) for row in range(len(queries))]


def _parts(photos: Mapping[int, Photo], most: int) -> Iterator[list[int]]:
    """Rows in groups of at most `most` photos and BATCH_PIXELS pixels, or one photo of more."""
    part: list[int] = []
    pixels = 0
    for row, photo in photos.items():
        size = photo.window[2] * photo.window[3]
        if part and (len(part) == most or pixels + size > BATCH_PIXELS):
            yield part
            part, pixels = [], 0
        part.append(row)
        pixels += size
    if part:
        yield part
