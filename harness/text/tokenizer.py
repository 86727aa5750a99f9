"""`shelfmark tokenizer`: learns the vocabulary of a catalogue's text, or takes one that exists, and stores every
sample's tokens.

SentencePiece (Kudo and Richardson, 2018, arXiv:1808.06226) with the unigram model by default.

tokenizer.json      what the tokenizer is: format, special ids, checksum
spm.model           the vocabulary; tokenizers.json where it is one of the `tokenizers` library
<field>.*.npy       the tokens of every sample
"""

from __future__ import annotations

import io
import json
import re
import shutil
import time
from collections.abc import Iterator, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from itertools import islice
from pathlib import Path
from typing import Any, Literal, get_args

import numpy as np
import sentencepiece
import xxhash
from tqdm import tqdm

from harness.catalogue.catalogue import Catalogue, open_array
from harness.catalogue.wholeness import require_whole
from harness.catalogue.writers import NpyWriter
from harness.core.errors import UserError
from harness.core.files import printable, read_record
from harness.core.manifest import write_manifest
from harness.core.staged_folder import staged_folder
from harness.text.imported_tokenizer import read_imported
from harness.text.special_tokens import SpecialTokens
from harness.text.vocabularies import Kind, open_pieces

EXAMPLE = "shelfmark tokenizer catalogues/products --vocab-size 8000"
TOKENIZER_FORMAT = 1
IMPORTED_FORMAT = 2  # kind and special ids are the library's; versions that know format 1 alone refuse it
FIELDS = ("title", "description")
SPECIAL_PIECES = {"pad": "[PAD]", "unk": "[UNK]", "bos": "[CLS]", "eos": "[SEP]", "mask": "[MASK]"}
SPECIAL_IDS = {name: token for token, name in enumerate(SPECIAL_PIECES)}
LARGEST_VOCABULARY = 10_000_000  # what a model's configuration takes
# SentencePiece skips longer texts in silence, 4,192 bytes by default.
MAX_TEXT_BYTES = 1 << 20
AGAIN = "Run `shelfmark tokenizer` again"
QUIET = 3  # SentencePiece's log level above errors: those come as exceptions


@dataclass(frozen=True, kw_only=True)
class TokenizerConfig:
    """Trains a SentencePiece tokenizer on titles and descriptions, or takes another's, then stores the tokens of every
    sample.

    Args:
        catalogue: the catalogue folder; an existing tokenizer/ in it is replaced.
        vocab_size: pieces of the vocabulary, the five special ones included.
        model_type: how the pieces are chosen.
        split: the split whose text is learned from; samples of split 'all' belong to it.
        character_coverage: share of the text's characters that get a piece; the rarest others become [UNK].
        max_texts: texts to learn from at most, taken at even distances; SentencePiece holds them in memory.
        fold_case: read all text in lower case, queries too: shoppers do not type the capitals of titles.
        keep_from: a folder whose tokenizer is taken as it is. A run or catalogue: a run goes on with a grown catalogue
            only with its own pieces. A folder of `shelfmark import` or of the hub: an imported text tower knows its own
            ids alone.
    """

    catalogue: Path
    vocab_size: int = 8000
    model_type: Literal["unigram", "bpe"] = "unigram"
    split: str = "train"
    character_coverage: float = 0.99995
    max_texts: int = 4_000_000
    fold_case: bool = False
    keep_from: Path | None = None


class Tokenizer:
    """A trained tokenizer; `load` opens that of a catalogue.

    Args:
        model: the bytes of its file.
        special: the special tokens; by default those of a model that `run` trained.
        kind: what the file is.
        checksum: of the file, in what `load` read; token ids mean the same only under the same.
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
            UserError: none there, one of another format, or one whose model differs from its checksum.
        """
        folder, meta = _read_meta(catalogue)
        file = folder / _model_name(meta)
        try:
            model = file.read_bytes()
        except OSError as error:
            raise UserError(f"{file}: {error.strerror}", AGAIN) from error
        if _checksum(meta, model) != meta["xxh3"]:
            raise UserError(f"{file} differs from its checksum", AGAIN)
        try:
            tokenizer = cls(model, SpecialTokens.from_meta(meta), _kind(meta), meta["xxh3"])
        except ValueError as error:
            raise UserError(f"{file}: {error}", AGAIN) from error
        if tokenizer._pieces.vocab_size != tokenizer.vocab_size:
            raise UserError(
                f"{file} has {tokenizer._pieces.vocab_size} pieces, its tokenizer.json says {tokenizer.vocab_size}",
                AGAIN,
            )
        return tokenizer

    def encode(self, text: str) -> list[int]:
        """Token ids of `text`, without special tokens; what stands for one in the text is ordinary text."""
        return self.encode_all([text])[0]

    def encode_all(self, texts: Sequence[str]) -> list[list[int]]:
        """`encode` of many texts."""
        return [[token for token in ids if token not in self._never] for ids in self._pieces.encode(texts)]

    def decode(self, token_ids: Sequence[int]) -> str:
        """The text of token ids; special tokens vanish, [UNK] not with every kind."""
        return self._pieces.decode([int(token) for token in token_ids])


class TokenStore:
    """The stored tokens of all samples, memory-mapped; `open` opens that of a catalogue.

    Args:
        tokens: int32 flat token ids of each field.
        offsets: int64 [num_samples + 1] of each field.
        special: the special tokens that `batch` puts in.
        checksum: of the tokenizer that made stored ones.
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
        folder, meta = _read_meta(catalogue)
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

        Every [CLS] and [SEP] is kept: earlier fields take their tokens first, later ones what room is left.

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


def _read_meta(catalogue: Path) -> tuple[Path, dict[str, Any]]:
    folder = Path(catalogue) / "tokenizer"
    file = folder / "tokenizer.json"
    if not file.is_file():
        raise UserError(f"{catalogue} has no tokenizer", f"Run `shelfmark tokenizer {catalogue}`")
    record = read_record(file, AGAIN)
    if (version := record.get("format", int)) not in (TOKENIZER_FORMAT, IMPORTED_FORMAT):
        known = f"{TOKENIZER_FORMAT} and {IMPORTED_FORMAT}"
        raise UserError(f"{folder} has format {version}, this version reads {known}")
    record.get("xxh3", str)
    if _kind(meta := dict(record.values)) not in get_args(Kind):
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


def _kind(meta: dict[str, Any]) -> Kind:
    return meta.get("kind", "sentencepiece")


def _model_name(meta: dict[str, Any]) -> str:
    return "tokenizers.json" if _kind(meta) == "tokenizers" else "spm.model"


def _checksum(meta: dict[str, Any], model: bytes) -> str:
    """Of the model, and in an imported tokenizer of what its ids mean too: the same file may be read with others."""
    if meta["format"] == IMPORTED_FORMAT:
        model += json.dumps([_kind(meta), SpecialTokens.from_meta(meta).to_meta()]).encode()
    return xxhash.xxh3_64_hexdigest(model)


def copy_tokenizer(catalogue: Path, run: Path) -> None:
    """Copies what encodes a text, without the tokens of the samples, into `run`/tokenizer.

    Raises:
        UserError: `catalogue` has no tokenizer.
    """
    folder, meta = _read_meta(catalogue)
    target = run / "tokenizer"
    target.mkdir(exist_ok=True)
    for name in (_model_name(meta), "tokenizer.json"):
        shutil.copyfile(folder / name, target / name)


def run(config: TokenizerConfig) -> dict[str, Any]:
    """Trains, encodes the whole catalogue and prints a summary.

    Returns:
        vocab_size, texts (learned from; 0 of an imported one), tokens (of each field), unknown (share of [UNK] in the
        tokens), seconds.

    Raises:
        UserError: no text in the split, a vocabulary that the text cannot fill or that cannot hold its characters, or
            no tokenizer to keep.
    """
    start = time.perf_counter()
    catalogue = Catalogue(config.catalogue)
    require_whole(catalogue)
    with staged_folder(catalogue.path / "tokenizer", replace=True) as stage:
        model, meta = _trained(catalogue, config) if config.keep_from is None else _kept(config.keep_from)
        tokenizer = Tokenizer(model, SpecialTokens.from_meta(meta), _kind(meta))
        (stage / _model_name(meta)).write_bytes(model)
        tokens, unknown = _encode_catalogue(catalogue, tokenizer, stage)
        (stage / "tokenizer.json").write_text(json.dumps(meta, indent=2) + "\n", encoding="utf-8")
        write_manifest(stage)
    share = unknown / max(sum(tokens.values()), 1)
    texts = meta.get("texts", 0)
    source = f"of {printable(str(meta['source']))}" if "source" in meta else f"learned from {texts:,} texts"
    print(
        f"{config.catalogue}/tokenizer: {tokenizer.vocab_size:,} pieces {source}; "
        f"{sum(tokens.values()):,} tokens stored, {share:.2%} of them unknown"
    )
    seconds = round(time.perf_counter() - start, 3)
    return {"vocab_size": tokenizer.vocab_size, "texts": texts, "tokens": tokens, "unknown": share, "seconds": seconds}


def _trained(catalogue: Catalogue, config: TokenizerConfig) -> tuple[bytes, dict[str, Any]]:
    """A new tokenizer's model and its tokenizer.json."""
    model, origin = _train(catalogue, config)
    return model, _meta(TOKENIZER_FORMAT, Tokenizer(model).special, origin, model)


def _kept(owner: Path) -> tuple[bytes, dict[str, Any]]:
    """The same of a tokenizer that exists: that of a run or catalogue, or one that came with weights."""
    folder = owner / "tokenizer" if (owner / "tokenizer").is_dir() else owner
    file = folder / "tokenizer.json"  # ours is one page; the library's holds the vocabulary
    if folder != owner and file.is_file() and "xxh3" in read_record(file).values:
        Tokenizer.load(owner)  # compares its checksum
        _, meta = _read_meta(owner)
        return (folder / _model_name(meta)).read_bytes(), meta
    found = read_imported(folder)
    origin = {"kind": found.kind, "source": found.name}
    return found.model, _meta(IMPORTED_FORMAT, found.special, origin, found.model)


def _meta(version: int, special: SpecialTokens, origin: dict[str, Any], model: bytes) -> dict[str, Any]:
    meta = {"format": version, **special.to_meta(), "fields": list(FIELDS), **origin}
    return {**meta, "xxh3": _checksum(meta, model)}


def _texts(catalogue: Catalogue, split: str) -> Iterator[str]:
    for batch in catalogue.batches(list(FIELDS), split=split):
        for field in FIELDS:
            yield from filter(str.strip, batch.column(field).to_pylist())


def _train(catalogue: Catalogue, config: TokenizerConfig) -> tuple[bytes, dict[str, Any]]:
    """The trained model, and what it was learned from."""
    if config.vocab_size <= len(SPECIAL_IDS):
        raise UserError(f"--vocab-size is {config.vocab_size}", f"{len(SPECIAL_IDS)} are special pieces already")
    if config.vocab_size > LARGEST_VOCABULARY:
        raise UserError(f"--vocab-size is {config.vocab_size}", f"It must be at most {LARGEST_VOCABULARY:,}")
    if config.max_texts < 1:
        raise UserError(f"--max-texts is {config.max_texts}", "It must be at least 1")
    if not 0.9 <= config.character_coverage <= 1:
        raise UserError(f"--character-coverage is {config.character_coverage}", "It must be between 0.9 and 1")
    found = sum(1 for _ in _texts(catalogue, config.split))
    if found == 0:
        splits = ", ".join(catalogue.meta["counts"]["splits"])
        raise UserError(
            f"no sample of split {config.split!r} of {catalogue.path} has a title or a description",
            f"The splits are {splits} (--split); text comes from ingest's --title-column and --description-column",
        )
    stride = -(-found // config.max_texts)
    special: dict[str, Any] = {}
    for name in ("pad", "unk", "bos", "eos"):
        special |= {f"{name}_id": SPECIAL_IDS[name], f"{name}_piece": SPECIAL_PIECES[name]}
    model = io.BytesIO()
    try:
        sentencepiece.SentencePieceTrainer.train(
            sentence_iterator=islice(_texts(catalogue, config.split), 0, None, stride),
            model_writer=model,
            vocab_size=config.vocab_size,
            hard_vocab_limit=True,
            model_type=config.model_type,
            character_coverage=config.character_coverage,
            normalization_rule_name="nmt_nfkc_cf" if config.fold_case else "nmt_nfkc",
            max_sentence_length=MAX_TEXT_BYTES,
            num_threads=1,  # more would make sums, and so the pieces, depend on the machine
            minloglevel=QUIET,
            control_symbols=[SPECIAL_PIECES["mask"]],
            **special,
        )
    except RuntimeError as error:
        raise _explain(str(error), config.vocab_size) from error
    origin = {"model_type": config.model_type, "split": config.split, "texts": -(-found // stride)}
    return model.getvalue(), origin


def _explain(message: str, vocab_size: int) -> UserError:
    what = f"--vocab-size {vocab_size}"
    if largest := re.search(r"set it to a value <= (\d+)", message):
        return UserError(f"{what} is more than the text can fill", f"The largest possible is --vocab-size {largest[1]}")
    if smallest := re.search(r"smaller than required_chars\. \d+ vs (\d+)", message):
        fix = f"The least is --vocab-size {smallest[1]}, or lower --character-coverage"
        return UserError(f"{what} cannot hold the text's characters", fix)
    return UserError(f"SentencePiece cannot learn with {what}: {message}")


def _encode_catalogue(catalogue: Catalogue, tokenizer: Tokenizer, folder: Path) -> tuple[dict[str, int], int]:
    """Writes the token arrays; returns the number of tokens of each field and that of unknown ones."""
    unknown = 0
    with ExitStack() as stack:
        tokens = {field: stack.enter_context(NpyWriter(folder / f"{field}.tokens.npy", np.int32)) for field in FIELDS}
        offsets = {field: stack.enter_context(NpyWriter(folder / f"{field}.offsets.npy", np.int64)) for field in FIELDS}
        progress = stack.enter_context(tqdm(total=catalogue.num_samples, desc="encode", unit=" rows", mininterval=0.5))
        for writer in offsets.values():
            writer.append([0])
        for batch in catalogue.batches(list(FIELDS)):
            for field in FIELDS:
                encoded = tokenizer.encode_all(batch.column(field).to_pylist())
                start = tokens[field].length
                flat = np.fromiter((token for ids in encoded for token in ids), np.int32)
                tokens[field].append(flat)
                offsets[field].append(start + np.cumsum([len(ids) for ids in encoded]))
                unknown += int(np.count_nonzero(flat == tokenizer.special.unk))
            progress.update(batch.num_rows)
    return {field: writer.length for field, writer in tokens.items()}, unknown
