"""`shelfmark tokenizer`: learns the vocabulary of a catalogue's text and stores every sample's tokens.

SentencePiece (Kudo and Richardson, 2018, arXiv:1808.06226) with the unigram model by default.
"""

from __future__ import annotations

import io
import json
import re
import time
from collections.abc import Iterator, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from itertools import islice
from pathlib import Path
from typing import Any, Literal

import numpy as np
import sentencepiece
import xxhash
from tqdm import tqdm

from harness.data.catalogue import Catalogue
from harness.data.staging import staged_folder
from harness.data.writers import NpyWriter
from harness.errors import UserError

EXAMPLE = "shelfmark tokenizer catalogues/products --vocab-size 8000"
TOKENIZER_FORMAT = 1
FIELDS = ("title", "description")
SPECIAL_PIECES = {"pad": "[PAD]", "unk": "[UNK]", "bos": "[CLS]", "eos": "[SEP]", "mask": "[MASK]"}
SPECIAL_IDS = {name: token for token, name in enumerate(SPECIAL_PIECES)}
# SentencePiece skips longer texts in silence, 4,192 bytes by default.
MAX_TEXT_BYTES = 1 << 20
QUIET = 3  # SentencePiece's log level above errors: those come as exceptions


@dataclass(frozen=True, kw_only=True)
class TokenizerConfig:
    """Trains a SentencePiece tokenizer on titles and descriptions, then stores the tokens of every sample.

    Args:
        catalogue: the catalogue folder; an existing tokenizer/ in it is replaced.
        vocab_size: pieces of the vocabulary, the five special ones included.
        model_type: how the pieces are chosen.
        split: the split whose text is learned from; samples of split 'all' belong to it.
        character_coverage: share of the text's characters that get a piece; the rarest others become [UNK].
        max_texts: texts to learn from at most, taken at even distances; SentencePiece holds them in memory.
        keep_from: a run or catalogue folder whose tokenizer is taken as it is: a run goes on with a grown catalogue only with its own pieces.
    """

    catalogue: Path
    vocab_size: int = 8000
    model_type: Literal["unigram", "bpe"] = "unigram"
    split: str = "train"
    character_coverage: float = 0.99995
    max_texts: int = 4_000_000
    keep_from: Path | None = None


class Tokenizer:
    """A trained tokenizer; `load` opens that of a catalogue.

    Attributes:
        vocab_size: number of pieces.
        pad_id, unk_id, bos_id, eos_id, mask_id: the special tokens; [CLS] is bos and [SEP] is eos.
    """

    def __init__(self, model: bytes) -> None:
        self._processor = sentencepiece.SentencePieceProcessor(model_proto=model)
        self.vocab_size: int = self._processor.get_piece_size()
        self.pad_id, self.unk_id, self.bos_id, self.eos_id, self.mask_id = SPECIAL_IDS.values()

    @classmethod
    def load(cls, catalogue: Path) -> Tokenizer:
        """Opens `catalogue`/tokenizer.

        Raises:
            UserError: none there, one of another format, or one whose model differs from its checksum.
        """
        folder, meta = _read_meta(catalogue)
        model = (folder / "spm.model").read_bytes()
        if xxhash.xxh3_64_hexdigest(model) != meta["xxh3"]:
            raise UserError(f"{folder}/spm.model differs from its checksum", "Run `shelfmark tokenizer` again")
        return cls(model)

    def encode(self, text: str) -> list[int]:
        """Token ids of `text`, without special tokens; what stands for one in the text is ordinary text."""
        return self._processor.encode(text)

    def encode_all(self, texts: Sequence[str]) -> list[list[int]]:
        """`encode` of many texts."""
        return self._processor.encode(list(texts))

    def decode(self, token_ids: Sequence[int]) -> str:
        """The text of token ids; special tokens but [UNK] vanish."""
        return self._processor.decode([int(token) for token in token_ids])


class TokenStore:
    """The stored tokens of all samples, memory-mapped; `open` opens that of a catalogue.

    Args:
        tokens: int32 flat token ids of each field.
        offsets: int64 [num_samples + 1] of each field.
    """

    def __init__(self, tokens: dict[str, np.ndarray], offsets: dict[str, np.ndarray]) -> None:
        self._tokens, self._offsets = tokens, offsets

    @classmethod
    def open(cls, catalogue: Path) -> TokenStore:
        """Maps `catalogue`/tokenizer.

        Raises:
            UserError: no tokenizer there, one of another format, or one of another number of samples.
        """
        folder, meta = _read_meta(catalogue)
        samples = Catalogue(catalogue).num_samples
        tokens = {field: np.load(folder / f"{field}.tokens.npy", mmap_mode="r") for field in meta["fields"]}
        offsets = {field: np.load(folder / f"{field}.offsets.npy", mmap_mode="r") for field in meta["fields"]}
        for field in meta["fields"]:
            if len(offsets[field]) != samples + 1 or offsets[field][-1] != len(tokens[field]):
                raise UserError(
                    f"the {field} tokens in {folder} do not fit the catalogue", "Run `shelfmark tokenizer` again"
                )
        return cls(tokens, offsets)

    @classmethod
    def encode(cls, tokenizer: Tokenizer, texts: dict[str, list[str]]) -> TokenStore:
        """Tokens of `texts` (field -> text of each row) in memory; `batch` then takes row numbers."""
        tokens, offsets = {}, {}
        for field, column in texts.items():
            encoded = tokenizer.encode_all(column)
            tokens[field] = np.fromiter((token for ids in encoded for token in ids), np.int32)
            offsets[field] = np.concatenate([[0], np.cumsum([len(ids) for ids in encoded])]).astype(np.int64)
        return cls(tokens, offsets)

    def batch(self, sample_ids: np.ndarray, max_length: int, fields: Sequence[str] = FIELDS) -> np.ndarray:
        """[CLS] and then each field's tokens with [SEP], cut to `max_length` and padded.

        Every [CLS] and [SEP] is kept: earlier fields take their tokens first, later ones what room is left.

        Args:
            sample_ids: int64 [n].
            max_length: tokens of a row, at least one more than there are fields.
            fields: 'title' and 'description' in the order wanted.

        Returns:
            int64 [n, max_length]; the attention mask is where it differs from the pad id, 0.

        Raises:
            ValueError: `max_length` is too small for the special tokens.
        """
        if max_length < 1 + len(fields):
            raise ValueError(f"max_length {max_length} holds no [CLS] and {len(fields)} [SEP]")
        rows = np.arange(len(sample_ids))
        ids = np.full((len(rows), max_length), SPECIAL_IDS["pad"], np.int64)
        ids[:, 0] = SPECIAL_IDS["bos"]
        column = np.ones(len(rows), np.int64)
        room = np.full(len(rows), max_length - 1 - len(fields), np.int64)
        for field in fields:
            offsets = self._offsets[field]
            first = offsets[sample_ids]
            take = np.minimum(offsets[sample_ids + 1] - first, room)
            row = np.repeat(rows, take)
            within = np.arange(len(row)) - np.repeat(np.cumsum(take) - take, take)
            ids[row, column[row] + within] = self._tokens[field][first[row] + within]
            column += take
            ids[rows, column] = SPECIAL_IDS["eos"]
            column += 1
            room -= take
        return ids


def _read_meta(catalogue: Path) -> tuple[Path, dict[str, Any]]:
    folder = Path(catalogue) / "tokenizer"
    file = folder / "tokenizer.json"
    if not file.is_file():
        raise UserError(f"{catalogue} has no tokenizer", f"Run `shelfmark tokenizer {catalogue}`")
    meta = json.loads(file.read_text(encoding="utf-8"))
    if meta["format"] != TOKENIZER_FORMAT:
        raise UserError(f"{folder} has format {meta['format']}, this version reads {TOKENIZER_FORMAT}")
    return folder, meta


def run(config: TokenizerConfig) -> dict[str, Any]:
    """Trains, encodes the whole catalogue and prints a summary.

    Returns:
        vocab_size, texts (learned from), tokens (of each field), unknown (share of [UNK] in the tokens), seconds.

    Raises:
        UserError: no text in the split, or a vocabulary that the text cannot fill or that cannot hold its characters.
    """
    start = time.perf_counter()
    catalogue = Catalogue(config.catalogue)
    with staged_folder(catalogue.path / "tokenizer", replace=True) as stage:
        model, origin = _train(catalogue, config) if config.keep_from is None else _kept(config.keep_from)
        (stage / "spm.model").write_bytes(model)
        tokenizer = Tokenizer(model)
        tokens, unknown = _encode_catalogue(catalogue, tokenizer, stage)
        meta = {
            "format": TOKENIZER_FORMAT,
            "vocab_size": tokenizer.vocab_size,
            **{f"{name}_id": token for name, token in SPECIAL_IDS.items()},
            "fields": list(FIELDS),
            **origin,
            "xxh3": xxhash.xxh3_64_hexdigest(model),
        }
        (stage / "tokenizer.json").write_text(json.dumps(meta, indent=2) + "\n", encoding="utf-8")
    share = unknown / max(sum(tokens.values()), 1)
    texts = origin["texts"]
    print(
        f"{config.catalogue}/tokenizer: {tokenizer.vocab_size:,} pieces learned from {texts:,} texts; "
        f"{sum(tokens.values()):,} tokens stored, {share:.2%} of them unknown"
    )
    seconds = round(time.perf_counter() - start, 3)
    return {"vocab_size": tokenizer.vocab_size, "texts": texts, "tokens": tokens, "unknown": share, "seconds": seconds}


def _kept(owner: Path) -> tuple[bytes, dict[str, Any]]:
    """The model of a run's or catalogue's tokenizer, and what it was learned from."""
    Tokenizer.load(owner)  # compares its checksum
    folder, meta = _read_meta(owner)
    return (folder / "spm.model").read_bytes(), {name: meta[name] for name in ("model_type", "split", "texts")}


def _texts(catalogue: Catalogue, split: str) -> Iterator[str]:
    for batch in catalogue.batches(list(FIELDS), split=split):
        for field in FIELDS:
            yield from filter(str.strip, batch.column(field).to_pylist())


def _train(catalogue: Catalogue, config: TokenizerConfig) -> tuple[bytes, dict[str, Any]]:
    """The trained model, and what it was learned from."""
    if config.vocab_size <= len(SPECIAL_IDS):
        raise UserError(f"--vocab-size is {config.vocab_size}", f"{len(SPECIAL_IDS)} are special pieces already")
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
                unknown += int(np.count_nonzero(flat == tokenizer.unk_id))
            progress.update(batch.num_rows)
    return {field: writer.length for field, writer in tokens.items()}, unknown
