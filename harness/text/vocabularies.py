"""Vocabularies, from text to ids: SentencePiece, plain or as XLM-R and SigLIP use it, and the `tokenizers` library."""

from __future__ import annotations

import re
import string
from collections.abc import Iterator, Sequence
from typing import Literal, Protocol

import sentencepiece

Kind = Literal["sentencepiece", "xlm-roberta", "siglip", "tokenizers"]
# fairseq puts these before SentencePiece's pieces, which move up by one, and <mask> behind them (Conneau et al. 2020,
# XLM-R).
XLMR_IDS = {"<s>": 0, "<pad>": 1, "</s>": 2, "<unk>": 3}
MOST_IDS = 1 << 24
_AT_ONCE = 4096  # the library's result takes a hundred times the memory of the text
_NO_PUNCTUATION = str.maketrans("", "", string.punctuation)


class Pieces(Protocol):
    """A vocabulary at work.

    Attributes:
        vocab_size: all ids lie below.
    """

    vocab_size: int

    def id_of(self, piece: str) -> int | None:
        """The id of a piece, None if the vocabulary lacks it."""
        ...

    def encode(self, texts: Sequence[str]) -> Iterator[list[int]]:
        """The ids of each text, without special tokens at its ends."""
        ...

    def decode(self, ids: list[int]) -> str:
        """The text of ids."""
        ...


def open_pieces(kind: Kind, model: bytes) -> Pieces:
    """Opens the file of a vocabulary.

    Raises:
        ValueError: `model` is not of that kind.
    """
    return {"sentencepiece": SentencePieces, "xlm-roberta": XlmRobertaPieces, "siglip": SiglipPieces}.get(
        kind, LibraryPieces
    )(model)


class SentencePieces:
    """A SentencePiece model with its own ids."""

    def __init__(self, model: bytes) -> None:
        self._processor = sentencepiece.SentencePieceProcessor()
        try:
            self._processor.LoadFromSerializedProto(model)
        except RuntimeError as error:
            raise ValueError("not a SentencePiece model") from error
        self.vocab_size: int = self._processor.get_piece_size()

    def id_of(self, piece: str) -> int | None:
        """See `Pieces`."""
        found: int = self._processor.piece_to_id(piece)  # that of [UNK] where there is none
        return found if self._processor.id_to_piece(found) == piece else None

    def encode(self, texts: Sequence[str]) -> Iterator[list[int]]:
        """See `Pieces`."""
        return iter(self._processor.encode(list(texts)))

    def decode(self, ids: list[int]) -> str:
        """See `Pieces`; control pieces vanish."""
        return self._processor.decode(ids)


class XlmRobertaPieces(SentencePieces):
    """XLM-R's SentencePiece model with the ids of fairseq."""

    def __init__(self, model: bytes) -> None:
        super().__init__(model)
        if [self._processor.id_to_piece(i) for i in range(min(3, self.vocab_size))] != ["<unk>", "<s>", "</s>"]:
            raise ValueError("its first pieces are not <unk>, <s> and </s>, as XLM-R's are")
        self.vocab_size += 2

    def id_of(self, piece: str) -> int | None:
        """See `Pieces`."""
        if piece in XLMR_IDS:
            return XLMR_IDS[piece]
        if piece == "<mask>":
            return self.vocab_size - 1
        found = super().id_of(piece)
        return None if found is None else found + 1

    def encode(self, texts: Sequence[str]) -> Iterator[list[int]]:
        """See `Pieces`."""
        for ids in super().encode(texts):
            yield [token + 1 if token else XLMR_IDS["<unk>"] for token in ids]

    def decode(self, ids: list[int]) -> str:
        """See `Pieces`; special tokens vanish."""
        return super().decode([token - 1 for token in ids if max(XLMR_IDS.values()) < token < self.vocab_size - 1])


class SiglipPieces(SentencePieces):
    """SigLIP's SentencePiece model, which was trained on lower case without punctuation."""

    def encode(self, texts: Sequence[str]) -> Iterator[list[int]]:
        """See `Pieces`."""
        return super().encode([re.sub(r"\s+", " ", t.lower().translate(_NO_PUNCTUATION)).strip() for t in texts])


class LibraryPieces:
    """A tokenizer.json of the `tokenizers` library: WordPiece, byte-level BPE, Unigram."""

    def __init__(self, model: bytes) -> None:
        import tokenizers  # here, so that only who uses such a tokenizer needs it

        try:
            self._tokenizer = tokenizers.Tokenizer.from_str(model.decode())
            # A missing piece for unknown words shows only when a text is encoded.
            self._tokenizer.encode("\U0002a6d6")
        except Exception as error:  # the library raises nothing narrower
            raise ValueError(f"not a tokenizer.json of the tokenizers library ({error})") from error
        self._tokenizer.no_padding()
        self._tokenizer.no_truncation()
        self._tokenizer.encode_special_tokens = True  # the name of a special token in a text is text
        self.vocab_size = 1 + max(self._tokenizer.get_vocab().values(), default=-1)
        if self.vocab_size > MOST_IDS:
            raise ValueError(f"it has the id {self.vocab_size - 1:,}; a vocabulary may have {MOST_IDS:,}")

    def id_of(self, piece: str) -> int | None:
        """See `Pieces`."""
        return self._tokenizer.token_to_id(piece)

    def encode(self, texts: Sequence[str]) -> Iterator[list[int]]:
        """See `Pieces`."""
        for start in range(0, len(texts), _AT_ONCE):
            part = list(texts[start : start + _AT_ONCE])
            yield from (found.ids for found in self._tokenizer.encode_batch_fast(part, add_special_tokens=False))

    def decode(self, ids: list[int]) -> str:
        """See `Pieces`; special tokens vanish."""
        return self._tokenizer.decode(ids, skip_special_tokens=True)

    @property
    def special(self) -> set[int]:
        """The ids that the file calls special."""
        return {i for i, token in self._tokenizer.get_added_tokens_decoder().items() if token.special}

    @property
    def frame(self) -> list[int]:
        """The ids that the library puts around a text."""
        return self._tokenizer.encode("").ids
