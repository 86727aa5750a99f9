"""Check of text towers against the tokenizer's special ids."""

from __future__ import annotations

from collections.abc import Sequence

from harness.core.errors import UserError
from harness.text.special_tokens import SpecialTokens
from models.method import MethodConfig, TextInput, text_inputs
from models.text import TextConfig


def require_texts_fit(special: SpecialTokens, model: MethodConfig) -> None:
    """`require_fit` for every text tower of a method's configuration, and of its ids that are no words, where it
    has to know them (`framed`).
    """
    for name, text in text_inputs(model).items():
        require_fit(special, text, f"model.{name}")
    known: Sequence[int] | None = getattr(model, "framed", None)
    frame = [token for token in (special.bos, special.eos) if token is not None]
    if known is not None and {*known} != {*frame}:
        raise UserError(
            f"the catalogue's tokenizer frames texts with {frame}, model.text.frame_ids is {list(known)}",
            f"Give the tower these values: --model.text.frame_ids {frame}",
        )


def require_fit(special: SpecialTokens, text: TextInput, where: str) -> None:
    """Refuses a text tower whose special ids differ from the tokenizer's; `where` is its key, e.g. model.text.

    Raises:
        UserError: another id of padding, another end of text for pooling eos, or more ids than the tower has rows.
    """
    wrong = []
    if special.pad != text.pad_id:
        wrong.append(f"the tokenizer pads with {special.pad}, {where}.pad_id is {text.pad_id}")
    if isinstance(text, TextConfig) and text.pooling == "eos" and special.eos != text.eos_id:
        wrong.append(f"the tokenizer ends texts with {special.eos}, {where}.eos_id is {text.eos_id}")
    if 0 < text.vocab_size < special.vocab_size:
        wrong.append(f"the tokenizer has {special.vocab_size:,} ids, {where}.vocab_size is {text.vocab_size:,}")
    if wrong:
        raise UserError(
            f"the catalogue's tokenizer does not fit {where}: {'; '.join(wrong)}",
            "Give the tower these values, or the catalogue the tokenizer of the tower's weights: "
            "shelfmark tokenizer CATALOGUE --keep-from FOLDER-OF-IMPORT",
        )
