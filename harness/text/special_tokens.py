"""Special ids of a vocabulary, which stand for no text."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

NAMES = ("pad", "unk", "bos", "eos", "mask")


@dataclass(frozen=True, kw_only=True)
class SpecialTokens:
    """The special ids of a vocabulary.

    Args:
        vocab_size: all ids lie below.
        pad: fills up the end of a row.
        unk: a piece that the vocabulary lacks.
        eos: ends every field ([SEP], </s>).
        bos: begins every row ([CLS], <s>); None: no token does (SigLIP).
        mask: stands for a masked word; None: the vocabulary has none (CLIP).
        more: any others.
    """

    vocab_size: int
    pad: int
    unk: int
    eos: int
    bos: int | None
    mask: int | None
    more: tuple[int, ...] = ()

    @property
    def ids(self) -> tuple[int, ...]:
        """All special ids, rising; two of them may be one (CLIP pads with its eos)."""
        named = (getattr(self, name) for name in NAMES)
        return tuple(sorted({*self.more, *(token for token in named if token is not None)}))

    @classmethod
    def from_meta(cls, meta: Mapping[str, Any]) -> SpecialTokens:
        """Special tokens from what `to_meta` wrote.

        Raises:
            ValueError: an id is missing, or is not an integer below vocab_size; it is named.
        """
        named: dict[str, Any] = {name: meta.get(f"{name}_id") for name in NAMES}
        size, more = meta.get("vocab_size"), meta.get("more_special_ids", [])
        if type(size) is not int or not isinstance(more, list):
            raise ValueError("vocab_size is not an integer, or more_special_ids not a list")
        for name, token in [*named.items(), *(("more_special", token) for token in more)]:
            optional = name in ("bos", "mask") and token is None
            if not optional and (type(token) is not int or not 0 <= token < size):
                raise ValueError(f"{name}_id is not one of {size:,} ids")
        return cls(vocab_size=size, more=tuple(more), **named)

    def to_meta(self) -> dict[str, Any]:
        """As plain values, for a tokenizer's tokenizer.json."""
        more = {"more_special_ids": list(self.more)} if self.more else {}
        return {"vocab_size": self.vocab_size, **{f"{name}_id": getattr(self, name) for name in NAMES}, **more}
