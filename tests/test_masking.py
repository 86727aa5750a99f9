"""Masks and mismatched titles: functions of (seed, epoch, sample id), with the rates that are asked for."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest

from harness.data.masking import MaskConfig, draw_masks, mask_patches, mask_words, other_titles
from harness.data.order import ClassOrder, _Kind
from harness.text.special_tokens import SpecialTokens

N, LENGTH, PATCHES, VOCAB = 4000, 12, 16, 50
SPECIAL = SpecialTokens(vocab_size=VOCAB, pad=0, unk=1, bos=2, eos=3, mask=4)
IDS = np.random.default_rng(0).permutation(10 * N)[:N].astype(np.int64)
EPOCHS = IDS % 3
TOKENS = np.random.default_rng(1).integers(5, VOCAB, (N, LENGTH))
TOKENS[:, 0] = 2
TOKENS[np.arange(LENGTH) >= 2 + IDS[:, None] % (LENGTH - 1)] = 0  # lengths 2 .. 12
ORDINARY = TOKENS >= 5
# Three classes of documents that an epoch shows one of each: 3, 5, and 8 or 13.
ORDER = ClassOrder(
    {"document": _Kind(np.array([3, 5, 8, 13]), np.array([0, 1, 2, 4]), np.arange(4))}, "id", num_classes=3, seed=7
)


def test_masks_do_not_depend_on_the_batch() -> None:
    for config in (MaskConfig(), MaskConfig(one_heavy=True)):
        whole = draw_masks(config, TOKENS, PATCHES, SPECIAL, 7, EPOCHS, IDS)
        for rows in (slice(0, 1), slice(10, 17), slice(5, 5), slice(None, None, -1)):
            cut = draw_masks(config, TOKENS[rows], PATCHES, SPECIAL, 7, EPOCHS[rows], IDS[rows])
            assert all(np.array_equal(a, b[rows]) for a, b in zip(cut, whole, strict=True))
        for other in (
            draw_masks(config, TOKENS, PATCHES, SPECIAL, 8, EPOCHS, IDS),
            draw_masks(config, TOKENS, PATCHES, SPECIAL, 7, EPOCHS + 1, IDS),
            draw_masks(config, TOKENS, PATCHES, SPECIAL, 7, EPOCHS, IDS + 1),
        ):
            same = [(a == b).reshape(N, -1).all(1).mean() for a, b in zip(whole[:3], other[:3], strict=True)]
            assert max(same) < 0.7, "a seed, an epoch or a sample id does not matter"
    titles = other_titles(0.5, ORDER, 7, EPOCHS, IDS)
    assert np.array_equal(titles[10:17], other_titles(0.5, ORDER, 7, EPOCHS[10:17], IDS[10:17]))


def test_words_are_masked_at_the_rate_and_never_padding() -> None:
    replaced, masked = mask_words(TOKENS, 0.15, SPECIAL, 7, EPOCHS, IDS)
    assert not masked[~ORDINARY].any() and np.array_equal(replaced[~masked], TOKENS[~masked])
    assert masked[ORDINARY].mean() == pytest.approx(0.15, abs=0.01)
    per_place = masked.sum(0)[1:] / ORDINARY.sum(0)[1:]
    assert per_place.min() > 0.1 and per_place.max() < 0.21, "a place is preferred"
    new, old = replaced[masked], TOKENS[masked]
    assert (new == 4).mean() == pytest.approx(0.8, abs=0.03)
    assert ((new != 4) & (new != old)).mean() == pytest.approx(0.1 * 44 / 45, abs=0.02)
    assert set(new.tolist()) == {4, *range(5, VOCAB)}
    assert not mask_words(TOKENS, 0.0, SPECIAL, 7, EPOCHS, IDS)[1].any()
    assert np.array_equal(mask_words(TOKENS, 1.0, SPECIAL, 7, EPOCHS, IDS)[1], ORDINARY)


def test_patches_are_masked_between_the_rates_anywhere() -> None:
    masked = mask_patches(PATCHES, 0.25, 0.75, 7, EPOCHS, IDS)
    counts = np.bincount(masked.sum(1), minlength=PATCHES + 1) / N
    assert counts[:4].sum() == 0 == counts[13:].sum() and counts[5:12] == pytest.approx(1 / 8, abs=0.02)
    assert masked.mean(0) == pytest.approx(0.5, abs=0.03)
    assert abs(np.corrcoef(masked[:, 0], masked[:, 1])[0, 1]) < 0.1
    assert (mask_patches(PATCHES, 0.5, 0.5, 7, EPOCHS, IDS).sum(1) == 8).all()


def test_one_modality_is_hidden_heavily() -> None:
    config = MaskConfig(one_heavy=True, heavy_word_rate=0.6, patch_rates=(0.5, 0.5))
    _, words, patches, titles = draw_masks(config, TOKENS, PATCHES, SPECIAL, 7, EPOCHS, IDS)
    assert not titles.any()
    heavy = ~patches.any(1)
    assert heavy.mean() == pytest.approx(0.5, abs=0.03) and (patches[~heavy].sum(1) == 8).all()
    for rows, rate in ((heavy, 0.6), (~heavy, 0.15)):
        assert words[rows][ORDINARY[rows]].mean() == pytest.approx(rate, abs=0.02)
    whole = draw_masks(replace(config, heavy_word_rate=1.0), TOKENS, PATCHES, SPECIAL, 7, EPOCHS, IDS)
    assert np.array_equal(whole.titles, heavy) and np.array_equal(whole.words[heavy], ORDINARY[heavy])


def test_other_titles_are_those_of_the_documents_of_the_epoch() -> None:
    ids, epochs = np.tile([3, 5, 8, 13], N // 4), np.arange(N)
    titles = other_titles(1.0, ORDER, 7, epochs, ids)
    shares = [(titles == document).mean() for document in (3, 5, 8, 13)]
    assert shares == pytest.approx([1 / 3, 1 / 3, 1 / 6, 1 / 6], abs=0.03)
    shown = ORDER.draw("document", 3 * epochs[:, None] + np.arange(3)).sample_ids
    assert (titles[:, None] == shown).any(1).all()
    assert abs(np.corrcoef(titles, ids)[0, 1]) < 0.05
    # Half of them may be another's; a third of those is the own one again, or for 8 and 13 a sixth.
    half = other_titles(0.5, ORDER, 7, epochs, ids)
    assert (half != ids).mean() == pytest.approx(0.5 * (1 - 1 / 4), abs=0.03)
    assert np.array_equal(half[half != ids], titles[half != ids])
    assert np.array_equal(other_titles(0.0, ORDER, 7, epochs, ids), ids)


def test_configuration_errors_name_the_key() -> None:
    assert not MaskConfig().errors("data.masks")
    assert "data.masks.patch_rates" in MaskConfig(patch_rates=(0.6, 0.4)).errors("data.masks")[0]
