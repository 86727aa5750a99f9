"""`shelfmark tokenizer`: Train or take a tokenizer and encode a catalogue's text.

SentencePiece (Kudo and Richardson, 2018, arXiv:1808.06226) with the unigram model by default.
"""

from __future__ import annotations

import io
import re
import string
import time
from collections.abc import Iterator
from contextlib import ExitStack
from dataclasses import dataclass, field, replace
from itertools import islice
from pathlib import Path
from typing import Any, Literal

import numpy as np
import sentencepiece
from tqdm import tqdm

from harness.catalogue.catalogue import Catalogue
from harness.catalogue.wholeness import require_whole
from harness.catalogue.writers import NpyWriter
from harness.core.errors import UserError
from harness.core.files import printable, read_record, write_json
from harness.core.manifest import write_manifest
from harness.core.staged_folder import staged_folder
from harness.text.imported_tokenizer import read_imported
from harness.text.special_tokens import SpecialTokens
from harness.text.tokenizer import (
    FIELDS,
    IMPORTED_FORMAT,
    SPECIAL_IDS,
    SPECIAL_PIECES,
    TOKENIZER_FORMAT,
    Tokenizer,
    checksum,
    kind,
    model_name,
    read_meta,
)
from models.ranges import PositiveInt

EXAMPLE = "shelfmark tokenizer catalogues/products --vocab-size 8000"
LARGEST_VOCABULARY = 10_000_000  # what a model's configuration takes
# SentencePiece skips longer texts in silence, 4,192 bytes by default.
MAX_TEXT_BYTES = 1 << 20
QUIET = 3  # SentencePiece's log level above errors: those come as exceptions


@dataclass(frozen=True, kw_only=True)
class TokenizerConfig:
    """Trains a SentencePiece tokenizer on titles and descriptions, or takes another's; stores every sample's tokens.

    Args:
        catalogue: the catalogue folder; an existing tokenizer/ in it is replaced.
        vocab_size: pieces of the vocabulary, the five special ones included; fewer where the text cannot fill it.
        model_type: SentencePiece's algorithm.
        split: the split whose text is learned from; samples of split 'all' belong to it.
        character_coverage: share of the text's characters that get a piece; the rarest others become [UNK].
        max_texts: texts to learn from at most, taken at even distances; SentencePiece holds them in memory.
        fold_case: read all text in lower case, queries too: shoppers do not type the capitals of titles.
        keep_from: a folder whose tokenizer is taken unchanged. A run or catalogue: a run continues on a grown catalogue
            only with its own pieces. A folder of `shelfmark import` or of the hub: an imported text tower knows only
            its own ids.
    """

    catalogue: Path = field(kw_only=False)
    vocab_size: PositiveInt = 8000
    model_type: Literal["unigram", "bpe"] = "unigram"
    split: str = "train"
    character_coverage: float = 0.99995
    max_texts: PositiveInt = 4_000_000
    fold_case: bool = False
    keep_from: Path | None = None


def run(config: TokenizerConfig) -> dict[str, Any]:
    """Trains, encodes the whole catalogue and prints a summary.

    Returns:
        vocab_size, texts (learned from; 0 of an imported one), tokens (of each field), unknown (share of [UNK] in the
        tokens), seconds.

    Raises:
        UserError: no text in the split but in others, a vocabulary that cannot hold its characters, or no tokenizer to
            keep.
    """
    start = time.perf_counter()
    catalogue = Catalogue(config.catalogue)
    require_whole(catalogue)
    with staged_folder(catalogue.path / "tokenizer", replace=True) as stage:
        model, meta = _trained(catalogue, config) if config.keep_from is None else _kept(config.keep_from)
        tokenizer = Tokenizer(model, SpecialTokens.from_meta(meta), kind(meta))
        (stage / model_name(meta)).write_bytes(model)
        tokens, unknown = _encode_catalogue(catalogue, tokenizer, stage)
        write_json(stage / "tokenizer.json", meta)
        write_manifest(stage)
    share = unknown / max(sum(tokens.values()), 1)
    texts = meta.get("texts", 0)
    source = f"of {printable(str(meta['source']))}" if "source" in meta else f"learned from {texts:,} texts"
    if meta.get("model_type") == "char":
        source = "for single characters, as no sample has a title or a description"
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
        _, meta = read_meta(owner)
        return (folder / model_name(meta)).read_bytes(), meta
    found = read_imported(folder)
    origin = {"kind": found.kind, "source": found.name}
    return found.model, _meta(IMPORTED_FORMAT, found.special, origin, found.model)


def _meta(version: int, special: SpecialTokens, origin: dict[str, Any], model: bytes) -> dict[str, Any]:
    meta = {"format": version, **special.to_meta(), "fields": list(FIELDS), **origin}
    return {**meta, "xxh3": checksum(meta, model)}


def _texts(catalogue: Catalogue, split: str | None) -> Iterator[str]:
    """Titles and descriptions that have a visible character: SentencePiece drops zero-width ones."""
    for batch in catalogue.batches(list(FIELDS), split=split):
        for name in FIELDS:
            yield from filter(_is_visible, batch.column(name).to_pylist())


def _is_visible(text: str) -> bool:
    return any(character.isprintable() and not character.isspace() for character in text)


def _train(catalogue: Catalogue, config: TokenizerConfig) -> tuple[bytes, dict[str, Any]]:
    """The trained model, and the number of texts that it was learned from."""
    if config.vocab_size <= len(SPECIAL_IDS):
        raise UserError(f"--vocab-size is {config.vocab_size}", f"{len(SPECIAL_IDS)} are special pieces already")
    if config.vocab_size > LARGEST_VOCABULARY:
        raise UserError(f"--vocab-size is {config.vocab_size}", f"It must be at most {LARGEST_VOCABULARY:,}")
    if not 0.9 <= config.character_coverage <= 1:
        raise UserError(f"--character-coverage is {config.character_coverage}", "It must be between 0.9 and 1")
    found = sum(1 for _ in _texts(catalogue, config.split))
    if found == 0 and not any(_texts(catalogue, None)):
        return _characters(), {"model_type": "char", "split": config.split, "texts": 0}
    if found == 0:
        splits = ", ".join(catalogue.meta["counts"]["splits"])
        raise UserError(
            f"no sample of split {config.split!r} of {catalogue.path} has a title or a description",
            f"The splits are {splits} (--split); text comes from ingest's --title-column and --description-column",
        )
    stride = -(-found // config.max_texts)
    origin = {"model_type": config.model_type, "split": config.split, "texts": -(-found // stride)}
    return _learn(catalogue, config, stride), origin


def _learn(catalogue: Catalogue, config: TokenizerConfig, stride: int) -> bytes:
    """The model learned from every `stride`-th text, of fewer pieces than asked for where the text has no more."""
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
            **_special_pieces(),
        )
    except RuntimeError as error:
        largest = re.search(r"set it to a value <= (\d+)", str(error))
        if largest is None or int(largest[1]) >= config.vocab_size:
            raise _explain(str(error), config.vocab_size) from error
        print(f"{config.catalogue}: the text fills {int(largest[1]):,} pieces, not --vocab-size {config.vocab_size:,}")
        return _learn(catalogue, replace(config, vocab_size=int(largest[1])), stride)
    return model.getvalue()


def _characters() -> bytes:
    """The model of a catalogue without any text: characters, for what a person may ask later."""
    model = io.BytesIO()
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=iter([" ".join(string.ascii_letters + string.digits)]),
        model_writer=model,
        vocab_size=len(SPECIAL_IDS) + 1 + len(string.ascii_letters + string.digits),
        model_type="char",
        num_threads=1,
        minloglevel=QUIET,
        **_special_pieces(),
    )
    return model.getvalue()


def _special_pieces() -> dict[str, Any]:
    special: dict[str, Any] = {"control_symbols": [SPECIAL_PIECES["mask"]]}
    for name in ("pad", "unk", "bos", "eos"):
        special |= {f"{name}_id": SPECIAL_IDS[name], f"{name}_piece": SPECIAL_PIECES[name]}
    return special


def _explain(message: str, vocab_size: int) -> UserError:
    what = f"--vocab-size {vocab_size}"
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
