"""Search in an exported artefact: photos or texts in, the best documents out. Needs neither run nor catalogue.

from shelfmark import Artefact

artefact = Artefact("artefacts/products")
hits = artefact.search(artefact.embed(["photo.jpg"]), 5)[0]
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import torch
from PIL import Image
from torch import Tensor

from harness.artefact.documents import parts_of, read_documents
from harness.artefact.index_read import open_index
from harness.artefact.query_encoder import read_model, read_query_encoder
from harness.artefact.removed import read_kept
from harness.catalogue.catalogue import nearest_first
from harness.catalogue.images import MOST_BYTES, MOST_PIXELS, LoadedImage, Rejected, check_image, load_image
from harness.catalogue.pixels import Colour
from harness.core.errors import UserError
from harness.core.files import Record, printable, read_record
from harness.core.manifest import verify
from harness.data.backends import Pipeline, open_pipeline
from harness.data.config import BACKENDS
from harness.data.decode_pillow import decode_rgb
from harness.data.preprocess import WHITE, PreprocessSpec, draw_parameters
from harness.text.tokenizer import Tokenizer, TokenStore
from harness.text.tower_check import require_fit
from models.method import MethodConfig, query_kind
from models.plain_values import from_plain

if TYPE_CHECKING:
    from harness.core.mesh import Mesh

ARTEFACT_FORMAT = 4
_THUMBNAIL_PIXELS = 1 << 24

Box = tuple[int, int, int, int]


@dataclass(frozen=True)
class Photo:
    """A query photo: its bytes, and the window to search for, (x, y, width, height) in upright pixels."""

    data: bytes
    window: Box

    @classmethod
    def open(cls, path: Path | str, box: Sequence[int] = (), max_pixels: int = MOST_PIXELS) -> Photo:
        """Reads and checks a file; without `box` all of it counts. A JPEG of more than `max_pixels` is decoded at half
        its width and height.

        Raises:
            UserError: no such file, not an image, or a box that is empty or outside of it.
        """
        path = Path(path)
        try:
            image = load_image(path.absolute().parent, path.name, MOST_BYTES, max_pixels)
        except Rejected as reason:
            large = str(reason).startswith("too many pixels")
            remedy = "Raise --max-pixels, or name a smaller photo" if large else "Name a JPEG, PNG, WebP, AVIF or GIF"
            raise UserError(f"photo {path}: {reason}", remedy) from None
        return cls._part(image, box, f"photo {path}", "--box")

    @classmethod
    def read(cls, data: bytes, box: Sequence[int] = (), max_pixels: int = MOST_PIXELS) -> Photo:
        """Checks the bytes of a file, as `open` does.

        Raises:
            UserError: they are not an image, or a box that is empty or outside of it.
        """
        try:
            return cls._part(check_image(data, max_pixels), box, "photo", "box")
        except Rejected as reason:
            large = str(reason).startswith("too many pixels")
            remedy = "Send a smaller photo" if large else "Send a JPEG, PNG, WebP, AVIF or GIF"
            raise UserError(f"photo: {reason}", remedy) from None

    @classmethod
    def _part(cls, image: LoadedImage, box: Sequence[int], name: str, flag: str) -> Photo:
        """`box` of a checked image, the whole of it without one; `name` and `flag` are for errors."""
        if not box:
            return cls(image.data, (0, 0, image.width, image.height))
        scale = 2 if image.halved else 1
        full_width, full_height = scale * image.width, scale * image.height
        size = f"the upright {name} has {full_width} x {full_height} pixels"
        if len(box) != 4:
            raise UserError(f"{flag} has {len(box)} numbers", "Give four: x,y,width,height in pixels")
        x, y, width, height = box
        if width < 1 or height < 1:
            raise UserError(
                f"{flag} {','.join(map(str, box))} is empty", f"Width and height must be at least 1; {size}"
            )
        if x < 0 or y < 0 or x + width > full_width or y + height > full_height:
            raise UserError(f"{flag} {','.join(map(str, box))} leaves the photo", size[0].upper() + size[1:])
        return cls(image.data, (x // scale, y // scale, max(1, width // scale), max(1, height // scale)))

    def picture(self, background: Colour = WHITE) -> Image.Image:
        """The window in RGB; `background` shows through transparent pixels."""
        x, y, width, height = self.window
        return decode_rgb(self.data, background).crop((x, y, x + width, y + height))


@dataclass(frozen=True)
class Hit:
    """A document found: its row in the index, its id, title, cosine similarity to the query, and the share of each part
    in its embedding, which add up to 1; empty where the artefact has none.
    """

    row: int
    id: str
    title: str
    score: float
    parts: dict[str, float] = field(default_factory=dict)


class Artefact:
    """An artefact folder.

    Args:
        path: a folder written by `shelfmark export`.
        backend: decoder of the photos, dali or reference; the one that the run was trained and evaluated with by
            default.
        threads: decoding threads.

    Attributes:
        meta: content of artefact.json.
        model: configuration of the method.
        documents: the id map, row i = document i of the index: sample_id, item, title, description, attributes,
            class_key, thumbnail, shares of the embeddings' parts.
        texts: names of their columns of text.
        kept: bool [documents], False for those that `shelfmark remove` took out; None: all are there.

    Raises:
        UserError: no artefact there, one that is damaged or of another format, no faiss, no DALI.

    No code from the folder is run: weights, pictures, tables and vectors are data, whose sizes are checked before
    memory is allocated for them.
    """

    def __init__(self, path: Path | str, backend: str | None = None, threads: int = 1) -> None:
        self.path = path = Path(path)
        self.threads = threads
        try:
            record = open_record(path)
            self.meta = record.values
            self.model, self.spec = _read_settings(record)
            self.backend = backend or _one_of(record, "backend", BACKENDS)
            count = record.number("documents", 1 << 40, 1)
            self._encode = read_query_encoder(self.meta["method"], self.model, path)
            self._tokenizer = self._open_tokenizer()
            self._index = open_index(path, record, self.model.embedding_dim, count)
            self._index.kept = self.kept = read_kept(path, record, count)
            self.documents = read_documents(path, count)
            self.texts = [field.name for field in self.documents.schema if field.type == pa.string()]
            self._parts = parts_of(self.documents.schema)
        except OSError as error:
            raise UserError(
                f"artefact {path}: {error.filename or 'a file'} cannot be read ({error.strerror})"
            ) from error

    def _open_tokenizer(self) -> Tokenizer | None:
        query = self.model.query_text
        if query is None:
            return None
        tokenizer = Tokenizer.load(self.path)
        words = query.vocab_size or self.model.text.vocab_size or 1  # 1: 0 would mean any
        require_fit(tokenizer.special, replace(query, vocab_size=words), "the text tower of queries")
        return tokenizer

    @torch.no_grad()
    def embed(self, photos: Sequence[Photo | Path | str], batch_size: int = 64) -> Tensor:
        """Unit embeddings float32 [n, d] of photos, or of files; `.numpy()` makes an array of them.

        Raises:
            UserError: a file is missing or not an image, or the decoder cannot read one of them.
        """
        opened = [photo if isinstance(photo, Photo) else Photo.open(Path(photo)) for photo in photos]
        size = min(batch_size, len(opened))
        pipeline = self.decoder(size)
        vectors = [torch.empty(0, self.meta["embedding_dim"])]
        for start in range(0, len(opened), size):
            found, ok = self.embed_decoded(opened[start : start + size], pipeline)
            if not bool(ok.all()):
                raise UserError(
                    f"photo {start + int(ok.int().argmin()) + 1} of {len(opened)} cannot be decoded by {self.backend}",
                    "Save it as an ordinary JPEG, or choose --backend reference",
                )
            vectors.append(found)
        pipeline.close()
        return torch.cat(vectors)

    def decoder(self, batch_size: int) -> Pipeline:
        """Decoder of up to `batch_size` photos a call; for one thread at a time."""
        return open_pipeline(self.spec, self.backend, batch_size, self.threads, torch.device("cpu"))

    @torch.no_grad()
    def embed_decoded(self, photos: Sequence[Photo], pipeline: Pipeline) -> tuple[Tensor, Tensor]:
        """Unit embeddings float32 [n, d] of photos by an open `decoder`, and bool [n]: False for a damaged one."""
        windows = np.array([photo.window for photo in photos])
        # A box is searched for as if it were the whole photo: the same centred square within it.
        parameters = draw_parameters(self.spec, 0, 0, np.arange(len(photos)), windows[:, 2], windows[:, 3], train=False)
        parameters["anchor"] += windows[:, :2].astype(np.int32)
        images, ok = pipeline.decode([photo.data for photo in photos], parameters)
        return self._encode(images), ok

    @torch.no_grad()
    def embed_texts(self, texts: Sequence[str]) -> Tensor:
        """Unit embeddings float32 [n, d] of text queries."""
        query = self.model.query_text
        assert self._tokenizer is not None and query is not None, "the artefact takes photos"
        store = TokenStore.encode(self._tokenizer, {"query": list(texts)})
        return self._encode(torch.from_numpy(store.batch(np.arange(len(texts)), query.max_length, ["query"])))

    @torch.no_grad()
    def encode(self, inputs: Tensor) -> Tensor:
        """Unit embeddings float32 [n, d] of the encoder's input: images float32 [n, 3, S, S] or tokens int64 [n, L]."""
        return self._encode(inputs)

    def document(self, item: str) -> int:
        """The row of the first document with that id.

        Raises:
            UserError: there is none.
        """
        found = pc.equal(self.documents.column("item"), item).to_numpy()
        rows = np.flatnonzero(found if self.kept is None else found & self.kept)
        if not len(rows):
            raise UserError(f"{self.path} has no document with the id '{item}'")
        return int(rows[0])

    def vector(self, row: int) -> Tensor:
        """The embedding of a document, float32 [1, d]."""
        return self._index.vectors(np.array([row]))

    def passing(self, where: Mapping[str, Sequence[str]]) -> np.ndarray:
        """bool [documents]: those that have one of the values named for each column. Columns are texts of `documents`,
        as the catalogue's attributes.

        Raises:
            UserError: there is no such column.
        """
        passing = np.ones(len(self.documents), bool)
        for name, values in where.items():
            if name not in self.texts:
                near = ", ".join(printable(other, 40) for other in nearest_first(name, self.texts)[:20])
                raise UserError(f"{self.path} has no column '{printable(name)}' of texts", f"It has {near}")
            found = pc.is_in(self.documents.column(name), value_set=pa.array([*values], pa.string()))
            passing &= found.to_numpy()
        return passing

    def search(self, queries: Tensor, k: int, where: Mapping[str, Sequence[str]] | None = None) -> list[list[Hit]]:
        """The `k` best documents (or all there are) of each query [n, d], best first.

        Order and scores are those of evaluation (harness/evaluate/ranking.py), ties included, unless more than 32
        documents tie with the last one: FAISS finds candidates in fp32, which are then ranked exactly.

        Args:
            queries: unit vectors, float32 [n, d].
            k: documents wanted.
            where: only documents that pass (see `passing`).
        """
        if not len(queries):
            return []
        passing = self.passing(where) if where else None
        try:
            rows, scores = self._index.search(queries, k, passing)
        except UserError as error:
            raise UserError(
                f"{self.path}: the encoder or the index gives vectors that are not numbers of length 1", "Export again"
            ) from error
        return [
            [self._hit(row, score) for row, score in zip(*pair, strict=True)]
            for pair in zip(rows.tolist(), scores.tolist(), strict=True)
        ]

    def _hit(self, row: int, score: float) -> Hit:
        cells = {name: self.documents.column(name)[row].as_py() for name in ("item", "title", *self._parts.values())}
        shares = {part: round(cells[name], 6) for part, name in self._parts.items()}
        return Hit(row, cells["item"], cells["title"], score, shares)

    def thumbnail(self, row: int) -> Image.Image:
        """The thumbnail of a document; grey if none was exported, or it is not a picture."""
        data = self.documents.column("thumbnail")[row].as_py()
        try:
            return decode_rgb(check_image(data or b"", _THUMBNAIL_PIXELS).data, self.spec.background)
        except Rejected:
            return Image.new("RGB", (64, 64), (127, 127, 127))


def open_record(path: Path, mesh: Mesh | None = None) -> Record:
    """artefact.json, once every file is known to be whole; with `mesh` collective.

    Raises:
        UserError: no artefact there, one that is damaged or of another format.
    """
    file = path / "artefact.json"
    if not file.is_file():
        what = "no artefact: it has no artefact.json" if path.is_dir() else "no such folder"
        raise UserError(f"{path}: {what}", "Name a folder that `shelfmark export` wrote")
    if problem := verify(path, mesh):
        raise UserError(f"artefact {path}: {problem}", "Copy it again, or export again")
    record = read_record(file, "Export again")
    if (version := record.get("format", int)) != ARTEFACT_FORMAT:
        raise UserError(
            f"artefact {path} has format {version}, this version reads {ARTEFACT_FORMAT}",
            "Export its run again: shelfmark export RUN --out ARTEFACT",
        )
    return record


def _read_settings(record: Record) -> tuple[MethodConfig, PreprocessSpec]:
    """The method's configuration, and preprocessing that fits it."""
    model = read_model(record.get("method", str), record.get("model", dict), record.file)
    if record.get("query", str) != query_kind(model):
        record.refuse("query is not what the method takes")
    if record.get("embedding_dim", int) != model.embedding_dim:
        record.refuse(f"embedding_dim is not the model's {model.embedding_dim}")
    preprocess = read_record(record.file.with_name("preprocess.json"), "Export again")
    try:
        from_plain(PreprocessSpec, preprocess.values, "preprocess")
        spec = PreprocessSpec.from_dict(preprocess.values)  # no default may stand in
    except (ValueError, UserError) as error:
        preprocess.refuse(printable(str(error)))
    if spec.image_size != model.vision.image_size:
        preprocess.refuse(f"image_size is {spec.image_size}, the model's {model.vision.image_size}")
    return model, spec


def _one_of(record: Record, name: str, choices: Sequence[str]) -> str:
    if (value := record.get(name, str)) not in choices:
        record.refuse(f"{name} is not one of {', '.join(choices)}")
    return value
