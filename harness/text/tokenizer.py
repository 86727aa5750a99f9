"""Tokenizer and stored tokens of a catalogue (`shelfmark tokenizer`): a folder tokenizer/.

tokenizer.json      description of the tokenizer: format, special ids, checksum
spm.model           the vocabulary; tokenizers.json where it is one of the `tokenizers` library
<field>.*.npy       the tokens of every sample
"""

from __future__ import annotations

import json
import shutil
from collections.abc import Sequence
from pathlib import Path
from typing import Any, get_args

import numpy as np
import xxhash

from harness.catalogue.catalogue import Catalogue, open_array
from harness.core.errors import UserError
from harness.core.files import read_record
from harness.text.special_tokens import SpecialTokens
from harness.text.vocabularies import Kind, open_pieces

TOKENIZER_FORMAT = 1
IMPORTED_FORMAT = 2  # kind and special ids are the library's; versions that know only format 1 refuse it
FIELDS = ("title", "description")
SPECIAL_PIECES = {"pad": "[PAD]", "unk": "[UNK]", "bos": "[CLS]", "eos": "[SEP]", "mask": "[MASK]"}
SPECIAL_IDS = {name: token for token, name in enumerate(SPECIAL_PIECES)}
AGAIN = "Run `shelfmark tokenizer` again"


class Tokenizer:
    """A trained tokenizer; `load` opens that of a catalogue.

    Args:
        model: the bytes of its file.
        special: the special tokens; by default those of a model trained by `shelfmark tokenizer`.
        kind: kind of the file.
        checksum: of the file, if `load` read it; token ids are comparable only under the same checksum.
    """

    def __init__(
        self, model: bytes, special: SpecialTokens | None = None, kind: Kind = "sentencepiece", checksum: str = ""
    ) -> None:
        self.checksum = checksum
        self._pieces = open_pieces(kind, model)
        self.special = special or _own_special(self._pieces.vocab_size)
        self._never = set(self.special.ids) - {self.special.unk} | {self.special.pad, self.special.eos}

    @property
    def vocab_size(self) -> int:
        """All ids lie below."""
        return self.special.vocab_size

    @classmethod
    def load(cls, catalogue: Path) -> Tokenizer:
        """Opens `catalogue`/tokenizer.

        Raises:
            UserError: no tokenizer there, one of another format, or one whose model differs from its checksum.
        """
        folder, meta = read_meta(catalogue)
        file = folder / model_name(meta)
        try:
            model = file.read_bytes()
        except OSError as error:
            raise UserError(f"{file}: {error.strerror}", AGAIN) from error
        if checksum(meta, model) != meta["xxh3"]:
            raise UserError(f"{file} differs from its checksum", AGAIN)
        try:
            tokenizer = cls(model, SpecialTokens.from_meta(meta), kind(meta), meta["xxh3"])
        except ValueError as error:
            raise UserError(f"{file}: {error}", AGAIN) from error
        if tokenizer._pieces.vocab_size != tokenizer.vocab_size:
            raise UserError(
                f"{file} has {tokenizer._pieces.vocab_size} pieces, its tokenizer.json says {tokenizer.vocab_size}",
                AGAIN,
            )
        return tokenizer

    def encode(self, text: str) -> list[int]:
        """Token ids of `text`, without special tokens; the name of one in the text is ordinary text."""
        return self.encode_all([text])[0]

    def encode_all(self, texts: Sequence[str]) -> list[list[int]]:
        """`encode` of many texts."""
        found = []
        for ids in self._pieces.encode(texts):
            found.append([token for token in ids if token not in self._never])
        return found

    def decode(self, token_ids: Sequence[int]) -> str:
        """The text of token ids, without special tokens; some kinds keep [UNK]."""
        return self._pieces.decode([int(token) for token in token_ids])


class TokenStore:
    """The stored tokens of all samples, memory-mapped; `open` opens that of a catalogue.

    Args:
        tokens: int32 flat token ids of each field.
        offsets: int64 [num_samples + 1] of each field.
        special: the special tokens that `batch` inserts.
        checksum: of the tokenizer that made the stored tokens.
    """

    def __init__(
        self, tokens: dict[str, np.ndarray], offsets: dict[str, np.ndarray], special: SpecialTokens, checksum: str = ""
    ) -> None:
        self._tokens, self._offsets, self.special, self.checksum = tokens, offsets, special, checksum

    @classmethod
    def open(cls, catalogue: Path) -> TokenStore:
        """Maps `catalogue`/tokenizer.

        Raises:
            UserError: no tokenizer there, one of another format, or one of another number of samples.
        """
        folder, meta = read_meta(catalogue)
        samples = Catalogue(catalogue).num_samples
        tokens = {field: open_array(folder / f"{field}.tokens.npy", np.int32, AGAIN) for field in meta["fields"]}
        offsets = {field: open_array(folder / f"{field}.offsets.npy", np.int64, AGAIN) for field in meta["fields"]}
        for field in meta["fields"]:
            if len(offsets[field]) != samples + 1 or offsets[field][-1] != len(tokens[field]):
                raise UserError(f"the {field} tokens in {folder} do not fit the catalogue", AGAIN)
        return cls(tokens, offsets, SpecialTokens.from_meta(meta), meta["xxh3"])

    @classmethod
    def encode(cls, tokenizer: Tokenizer, texts: dict[str, list[str]]) -> TokenStore:
        """Tokens of `texts` (field -> text of each row) in memory; `batch` then takes row numbers."""
        tokens, offsets = {}, {}
        for field, column in texts.items():
            encoded = tokenizer.encode_all(column)
            tokens[field] = np.fromiter((token for ids in encoded for token in ids), np.int32)
            offsets[field] = np.concatenate([[0], np.cumsum([len(ids) for ids in encoded])]).astype(np.int64)
        return cls(tokens, offsets, tokenizer.special)

    def batch(self, sample_ids: np.ndarray, max_length: int, fields: Sequence[str] = FIELDS) -> np.ndarray:
        """[CLS], where the vocabulary has a first token, and then each field's tokens with [SEP], cut to `max_length`
        and padded.

        Every [CLS] and [SEP] is kept: earlier fields take their tokens first, later ones the remaining room.

        Args:
            sample_ids: int64 [n].
            max_length: tokens of a row, at least one more than there are fields.
            fields: 'title' and 'description' in the order wanted.

        Returns:
            int64 [n, max_length]; the attention mask is where it differs from special.pad.

        Raises:
            ValueError: `max_length` is too small for the special tokens.
        """
        start = int(self.special.bos is not None)
        if max_length < start + len(fields):
            raise ValueError(f"max_length {max_length} holds no {'[CLS] and ' * start}{len(fields)} [SEP]")
        rows = np.arange(len(sample_ids))
        ids = np.full((len(rows), max_length), self.special.pad, np.int64)
        if self.special.bos is not None:
            ids[:, 0] = self.special.bos
        column = np.full(len(rows), start, np.int64)
        room = np.full(len(rows), max_length - start - len(fields), np.int64)
        for field in fields:
            offsets = self._offsets[field]
            first = offsets[sample_ids]
            take = np.minimum(offsets[sample_ids + 1] - first, room)
            row = np.repeat(rows, take)
            within = np.arange(len(row)) - np.repeat(np.cumsum(take) - take, take)
            ids[row, column[row] + within] = self._tokens[field][first[row] + within]
            column += take
            ids[rows, column] = self.special.eos
            column += 1
            room -= take
        return ids


def read_meta(catalogue: Path) -> tuple[Path, dict[str, Any]]:
    """The folder `catalogue`/tokenizer and the content of its tokenizer.json.

    Raises:
        UserError: it is missing, damaged or of another format.
    """
    folder = Path(catalogue) / "tokenizer"
    file = folder / "tokenizer.json"
    if not file.is_file():
        raise UserError(f"{catalogue} has no tokenizer", f"Run `shelfmark tokenizer {catalogue}`")
    record = read_record(file, AGAIN)
    if (version := record.get("format", int)) not in (TOKENIZER_FORMAT, IMPORTED_FORMAT):
        known = f"{TOKENIZER_FORMAT} and {IMPORTED_FORMAT}"
        raise UserError(f"{folder} has format {version}, this version reads {known}")
    record.get("xxh3", str)
    if kind(meta := dict(record.values)) not in get_args(Kind):
        record.refuse("kind is not known")
    if set(map(str, record.get("fields", list))) != set(FIELDS):
        record.refuse("fields are not known")
    try:
        SpecialTokens.from_meta(meta)
    except ValueError as error:
        record.refuse(str(error))
    return folder, meta


def _own_special(vocab_size: int) -> SpecialTokens:
    return SpecialTokens.from_meta(
        {"vocab_size": vocab_size, **{f"{name}_id": token for name, token in SPECIAL_IDS.items()}}
    )


def kind(meta: dict[str, Any]) -> Kind:
    """Kind of a tokenizer's vocabulary."""
    return meta.get("kind", "sentencepiece")


def model_name(meta: dict[str, Any]) -> str:
    """File name of a tokenizer's vocabulary."""
    return "tokenizers.json" if kind(meta) == "tokenizers" else "spm.model"


def checksum(meta: dict[str, Any], model: bytes) -> str:
    """Checksum of the model; of an imported tokenizer also of its special ids, which its file does not fix."""
    if meta["format"] == IMPORTED_FORMAT:
        model += json.dumps([kind(meta), SpecialTokens.from_meta(meta).to_meta()]).encode()
    return xxhash.xxh3_64_hexdigest(model)


def copy_tokenizer(catalogue: Path, run: Path) -> None:
    """Copies the tokenizer, without the samples' tokens, into `run`/tokenizer.

    Raises:
        UserError: `catalogue` has no tokenizer.
    """
    folder, meta = read_meta(catalogue)
    target = run / "tokenizer"
    target.mkdir(exist_ok=True)
    for name in (model_name(meta), "tokenizer.json"):
        shutil.copyfile(folder / name, target / name)
