"""Masks of masked modelling, and mismatched titles: functions of (seed, epoch, sample id)."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, NamedTuple

import numpy as np
import numpy.typing as npt

from harness.core.errors import UserError
from harness.core.keyed_random import Stream, keyed_hash, keyed_uniform
from harness.data.order import ClassOrder
from harness.text.special_tokens import SpecialTokens
from models.ranges import ClosedUnitInterval

Ints = npt.NDArray[np.int64]
Bools = npt.NDArray[np.bool_]


@dataclass(frozen=True, kw_only=True)
class MaskConfig:
    """Configuration of masked modelling.

    Args:
        word_rate: share of a title's words that are masked (BERT's 0.15).
        patch_rates: share of an image's patches that are masked, least and most.
        one_heavy: mask one modality of each sample heavily (ITEm): a sample hides either `heavy_word_rate` of its words
            and no patch, or `word_rate` of its words and `patch_rates` of its patches. False masks every sample the
            second way.
        heavy_word_rate: share of the words of a title that is masked heavily; at 1 ITEm sees the image only, as for a
            query photo.
        mismatched: share of samples that get the title of another document (`other_titles`).
    """

    word_rate: ClosedUnitInterval = 0.15
    patch_rates: tuple[ClosedUnitInterval, ClosedUnitInterval] = (0.4, 0.6)
    one_heavy: bool = False
    heavy_word_rate: ClosedUnitInterval = 0.5
    mismatched: ClosedUnitInterval = 0.5

    def errors(self, where: str) -> list[str]:
        """Errors for values that do not fit together; each names its key under `where`."""
        low, high = self.patch_rates
        return (
            []
            if low <= high
            else [f"{where}.patch_rates is {self.patch_rates}; the first must not be above the second"]
        )


class Masks(NamedTuple):
    """Masks of n documents.

    Args:
        tokens: titles with the masked words replaced, int64 [n, L].
        words: masked words, bool [n, L].
        patches: masked patches, bool [n, P].
        titles: True for a title that is masked as a whole, bool [n].
    """

    tokens: Ints
    words: Bools
    patches: Bools
    titles: Bools


def draw_masks(
    config: MaskConfig,
    tokens: Ints,
    num_patches: int,
    special: SpecialTokens,
    seed: int,
    epochs: Ints | int,
    sample_ids: Ints,
) -> Masks:
    """Draws masks of documents `sample_ids` [n] with titles `tokens` [n, L] in their `epochs` ([n] or one for all).

    Raises:
        UserError: words are to be masked, but the vocabulary has no mask token.
    """
    heavy = np.zeros(len(sample_ids), np.bool_)
    if config.one_heavy:
        heavy = keyed_uniform(seed, Stream.HEAVY_MASK, epochs, sample_ids) < 0.5
    word_rates = np.where(heavy, config.heavy_word_rate, config.word_rate)
    replaced, words = mask_words(tokens, word_rates, special, seed, epochs, sample_ids)
    low, high = (np.where(heavy, 0.0, rate) for rate in config.patch_rates)
    patches = mask_patches(num_patches, low, high, seed, epochs, sample_ids)
    return Masks(replaced, words, patches, heavy & (config.heavy_word_rate == 1))


def mask_words(
    tokens: Ints, rate: npt.ArrayLike, special: SpecialTokens, seed: int, epochs: Ints | int, sample_ids: Ints
) -> tuple[Ints, Bools]:
    """Masks words of titles as BERT does (Devlin et al. 2019).

    Each ordinary token is masked with probability `rate` ([n] or one for all), a special one, padding included, never.
    Of the masked tokens 80 % become the mask token, 10 % any ordinary token, and 10 % stay.

    Returns:
        The titles after masking, int64 [n, L], and the masked words, bool [n, L].

    Raises:
        UserError: a rate is above 0, but the vocabulary has no mask token.
    """
    if special.mask is None:
        if np.any(np.asarray(rate) > 0):
            raise UserError(
                "words are to be masked, but the catalogue's tokenizer has no mask token (as CLIP's and SigLIP's)",
                "Set data.masking.word_rate to 0 and data.masking.one_heavy to false, or take a tokenizer that has one "
                "(BERT's, XLM-R's)",
            )
        return tokens, np.zeros(tokens.shape, np.bool_)
    uniform = _draws(seed, Stream.MASKED_WORDS, epochs, sample_ids, tokens.shape[1], 3)
    ids = np.array(special.ids)
    masked = (uniform[0] < np.asarray(rate).reshape(-1, 1)) & ~np.isin(tokens, ids)
    number = (uniform[2] * (special.vocab_size - len(ids))).astype(np.int64)
    any_piece = number + np.searchsorted(ids - np.arange(len(ids)), number, side="right")  # passes over the special ids
    instead = np.where(uniform[1] < 0.8, special.mask, np.where(uniform[1] < 0.9, any_piece, tokens))
    return np.where(masked, instead, tokens), masked


def mask_patches(
    num_patches: int, low: npt.ArrayLike, high: npt.ArrayLike, seed: int, epochs: Ints | int, sample_ids: Ints
) -> Bools:
    """Draws masked patches, bool [n, P]: a share of each image, uniform between `low` and `high` ([n] or one for all),
    rounded to whole patches.
    """
    if not len(sample_ids):
        return np.zeros((0, num_patches), np.bool_)
    share = keyed_uniform(seed, Stream.MASKED_PATCHES, epochs, sample_ids)
    count = np.rint(num_patches * (low + share * (np.asarray(high) - low))).astype(np.int64)
    order = _draws(seed, Stream.MASKED_PATCHES, epochs, sample_ids, num_patches, 1)[0].argsort(axis=1, kind="stable")
    masked = np.zeros(order.shape, np.bool_)
    np.put_along_axis(masked, order, np.arange(num_patches) < count[:, None], axis=1)
    return masked


def other_titles(mismatched: float, order: ClassOrder, seed: int, epochs: Ints | int, sample_ids: Ints) -> Ints:
    """Draws the document whose title stands beside each sample's image.

    Args:
        mismatched: probability of any document instead of the sample itself.
        order: documents to choose from: those of the sample's epoch, as often as it shows them.
        seed, epochs, sample_ids: key of the draws.

    Returns:
        int64 [n] sample ids. "Any document" may be the sample itself or have an equal title: compare the titles.
    """
    chance = keyed_uniform(seed, Stream.OTHER_TITLE, epochs, sample_ids, 0)
    place = keyed_hash(seed, Stream.OTHER_TITLE, epochs, sample_ids, 1) % np.uint64(order.slots("document"))
    positions = np.asarray(epochs) * order.slots("document") + place.astype(np.int64)
    return np.where(chance < mismatched, order.draw("document", positions).sample_ids, sample_ids)


def _draws(
    seed: int, stream: Stream, epochs: Ints | int, sample_ids: Ints, places: int, kinds: int
) -> npt.NDArray[Any]:
    """Uniform numbers [kinds, n, places]."""
    epoch = np.asarray(epochs).reshape(-1, 1)
    return keyed_uniform(
        seed, stream, epoch, sample_ids[:, None], np.arange(places), np.arange(1, kinds + 1)[:, None, None]
    )
