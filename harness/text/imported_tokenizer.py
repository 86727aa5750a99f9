"""Tokenizers of imported weights: choice of the file, special ids."""

from __future__ import annotations

from pathlib import Path
from typing import Any, NamedTuple

from harness.core.errors import UserError
from harness.core.files import printable, read_record
from harness.text.special_tokens import SpecialTokens
from harness.text.vocabularies import Kind, LibraryPieces, Pieces, XlmRobertaPieces, open_pieces
from models.weights.convert import own_file
from models.weights.rules import WeightsError

# In order of preference. SentencePiece's kinds differ in their file names, as in transformers.
FILES: dict[str, Kind] = {
    "tokenizer.json": "tokenizers",
    "sentencepiece.bpe.model": "xlm-roberta",
    "spiece.model": "sentencepiece",
    "tokenizer.model": "sentencepiece",
}
# Keys of special_tokens_map.json and tokenizer_config.json. Some models (bert-base-uncased, roberta-base) have neither
# file, but the usual names.
KEYS = {
    "pad": ["pad_token"],
    "unk": ["unk_token"],
    "bos": ["cls_token", "bos_token"],
    "eos": ["sep_token", "eos_token"],
    "mask": ["mask_token"],
}
USUAL = {
    "pad": ["[PAD]", "<pad>"],
    "unk": ["[UNK]", "<unk>"],
    "bos": ["[CLS]", "<s>", "<|startoftext|>"],
    "eos": ["[SEP]", "</s>", "<|endoftext|>"],
    "mask": ["[MASK]", "<mask>"],
}


class Imported(NamedTuple):
    """Stored tokenizer: its kind, the bytes of its file, its special tokens and the file's name."""

    kind: Kind
    model: bytes
    special: SpecialTokens
    name: str


def read_imported(folder: Path) -> Imported:
    """Reads the tokenizer of a hub folder, or of the tokenizer/ of a folder that `shelfmark import` made.

    Raises:
        UserError: no such file, one that does not open, or a special token that cannot be found.
    """
    names = [name for name in FILES if (folder / name).is_file()]
    if not names:
        others = [name for name in ("vocab.txt", "vocab.json") if (folder / name).is_file()]
        has = f"{others[0]}, but no tokenizer.json" if others else "no tokenizer"
        raise UserError(
            f"{folder} has {has}",
            f"It can be a run, a catalogue, a folder of `shelfmark import`, or one with {', '.join(FILES)}; "
            "transformers writes tokenizer.json: AutoTokenizer.from_pretrained(FOLDER).save_pretrained(FOLDER)",
        )
    file, kind = folder / names[0], FILES[names[0]]
    config = _said(folder / "tokenizer_config.json")
    if kind == "sentencepiece" and config.get("tokenizer_class") == "SiglipTokenizer":
        kind = "siglip"
    try:
        model = own_file(folder, file.name).read_bytes()
    except OSError as error:
        raise UserError(f"{file}: {error.strerror}") from error
    except WeightsError as error:
        raise UserError(str(error), "Replace the link by the file, if you trust it") from error
    try:
        pieces = open_pieces(kind, model)
    except ValueError as error:
        raise UserError(f"{file}: {printable(str(error))}") from error
    special = _special(pieces, {**config, **_said(folder / "special_tokens_map.json")}, file)
    return Imported(kind, model, special, names[0])


def _special(pieces: Pieces, config: dict[str, Any], file: Path) -> SpecialTokens:
    ids: dict[str, int | None] = {}
    for name, keys in KEYS.items():
        said = [value for key in keys if (value := config.get(key))]
        # A plain SentencePiece model has a first token only if its files name one: SigLIP has none, though <s> may be
        # a piece.
        sure = name == "bos" and not isinstance(pieces, LibraryPieces | XlmRobertaPieces)
        usual = [] if sure else USUAL[name]
        found = [token for piece in said or usual if (token := pieces.id_of(piece)) is not None]
        ids[name] = found[0] if found else None
    frame, more = (pieces.frame, pieces.special) if isinstance(pieces, LibraryPieces) else ([], set())
    first, siglip = ids["bos"], str(config.get("tokenizer_class")).startswith("Siglip")
    if first is not None and not (first in frame if frame else config.get("add_bos_token", not siglip)):
        ids["bos"], more = None, more | {first}  # a piece that the tower has never seen at the start of a text
    if missing := [name for name in ("pad", "unk", "eos") if ids[name] is None]:
        wanted = ", ".join(key for name in missing for key in KEYS[name])
        raise UserError(
            f"{file} does not say which of its tokens is {' or '.join(missing)}",
            f"Name it in a special_tokens_map.json beside it ({wanted})",
        )
    return SpecialTokens.from_meta(
        {
            "vocab_size": pieces.vocab_size,
            **{f"{name}_id": token for name, token in ids.items()},
            "more_special_ids": sorted(more.difference(ids.values())),
        }
    )


def _said(file: Path) -> dict[str, Any]:
    """Special tokens of a file, under the known keys, each as its piece; empty without a file."""
    if not file.is_file():
        return {}
    record = read_record(file)
    found = {}
    for key in (*(key for keys in KEYS.values() for key in keys), "tokenizer_class", "add_bos_token"):
        value = record.values.get(key)
        # A token is given by its piece, or by an object with the piece as its content.
        if isinstance(value, dict):
            value = value.get("content")
        if value is not None and not isinstance(value, bool if key == "add_bos_token" else str):
            record.refuse(f"{key} is {printable(repr(value), 40)}")
        if key in record.values:
            found[key] = value
    return found
