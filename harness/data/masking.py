"""Masks of masked modelling and mismatched titles: functions of (seed, epoch, sample id), like all of the data plane."""

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
        heavy_word_rate: share of the words of a title that is masked heavily; 1: ITEm then sees the image alone, as it
            does a query photo.
        mismatched: share of samples that other_titles gives another title.
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
    """Of n documents: titles with the masked words replaced int64 [n, L], masked words bool [n, L], masked patches bool
    [n, P], and whether the whole title is masked, bool [n].
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
    """Masks of documents `sample_ids` [n] with titles `tokens` [n, L] in their `epochs` ([n] or one for all).

    Raises:
        UserError: words are to be masked, but the vocabulary has no [MASK].
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
    """Masked titles and which words are masked, both [n, L]; `rate` [n] or one for all. Source: Devlin et al. 2019
    (BERT).

    Each ordinary piece is masked with probability `rate`, a special one (padding among them) never. Of the masked ones
    80 % become [MASK], 10 % any ordinary piece, and 10 % stay.

    Raises:
        UserError: a rate above 0, but the vocabulary has no [MASK].
    """
    if special.mask is None:
        if np.any(np.asarray(rate) > 0):
            raise UserError(
                "words are to be masked, but the catalogue's tokenizer has no mask token (as CLIP's and SigLIP's)",
                "Set data.masking.word_rate to 0 and data.masking.one_heavy to false, or take a tokenizer that has one (BERT's, XLM-R's)",
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
    """Masked patches [n, P]: a share of each image drawn evenly between `low` and `high` ([n] or one for all), rounded
    to whole patches.
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
    """For each sample the document whose title stands beside its image: its own, or with probability `mismatched` any
    one's.

    Args:
        mismatched: that probability.
        order: the documents to choose from: those of the sample's epoch, as often as it shows them.
        seed, epochs, sample_ids: the key, as everywhere.

    Returns:
        int64 [n] sample ids. Any document may be the own one or have an equal title; who compares the titles sees that.
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
