"""Stateless random numbers: the permutation is one, the draws are even, and neither ever changes."""

import numpy as np
import pytest

from harness.core.keyed_random import Stream, SynthStream, keyed_hash, keyed_permutation, keyed_uniform


def test_streams_are_distinct_and_keep_their_numbers():
    assert len(set(Stream)) == len(Stream.__members__)
    assert sorted(Stream) == [1, 2, 3, 4, 5, 16, 17, 18, 19, 24, 25, 26, 27, 40, 48]
    assert sorted(SynthStream) == [0, 1, 2, 3]
    draws = [int(keyed_hash(7, stream, 5)) for stream in Stream]
    assert draws == [int(keyed_hash(7, stream.value, 5)) for stream in Stream] and len(set(draws)) == len(Stream)


def test_permutation_is_a_bijection_at_every_small_size():
    for size in range(1, 301):
        for key in (0, 1, 2**64 - 1):
            assert sorted(keyed_permutation(np.arange(size), size, key)) == list(range(size)), (size, key)


@pytest.mark.parametrize("size", [2**20, 2**20 + 1, 1_000_003, 4**10 - 1])
def test_permutation_is_a_bijection_at_large_sizes(size):
    assert np.array_equal(np.sort(keyed_permutation(np.arange(size), size, 7)), np.arange(size))


@pytest.mark.parametrize("size", [10**10, 2**40 + 1, 2**53 + 1, 2**62])
def test_permutation_of_huge_sizes_never_repeats_and_spreads(size):
    runs = [np.arange(100_000), size - 1 - np.arange(100_000), np.arange(0, size, size // 100_000)[1:]]
    index = np.unique(np.concatenate(runs))
    image = keyed_permutation(index, size, 3)
    assert image.min() >= 0 and image.max() < size
    assert len(np.unique(image)) == len(index)
    counts = np.histogram(image.astype(np.float64) / size, bins=16, range=(0, 1))[0]
    assert np.abs(counts / counts.mean() - 1).max() < 0.05


def test_permutation_broadcasts_sizes_and_keys_and_each_answer_stands_alone():
    rng = np.random.default_rng(0)
    sizes = rng.integers(1, 1000, 500)
    index, keys = rng.integers(0, sizes), rng.integers(0, 2**63, 500)
    together = keyed_permutation(index, sizes, keys)
    alone = [int(keyed_permutation(int(i), int(s), int(k))) for i, s, k in zip(index, sizes, keys, strict=True)]
    assert together.tolist() == alone
    assert keyed_permutation(np.zeros((2, 0), np.int64), 5, 1).shape == (2, 0)


@pytest.mark.parametrize("size", [2, 3, 5, 16, 17])
def test_every_place_of_a_small_permutation_is_equally_likely(size):
    keys = np.arange(20_000)
    images = keyed_permutation(np.arange(size)[:, None], size, keys)
    expected = len(keys) / size
    for row in images:
        assert np.abs(np.bincount(row, minlength=size) - expected).max() < 6 * expected**0.5


@pytest.mark.parametrize(("index", "size"), [(0, 0), (5, 5), (-1, 5), (0, 2**62 + 1)])
def test_permutation_refuses_what_is_out_of_range(index, size):
    with pytest.raises(ValueError, match="index"):
        keyed_permutation(index, size, 0)


def test_hash_mixes_every_bit_of_every_word():
    words = np.arange(4000, dtype=np.int64)
    for place in range(3):
        arguments = [np.int64(5), np.int64(6), np.int64(7)]
        arguments[place] = words
        base = keyed_hash(*arguments)
        assert len(np.unique(base)) == len(words)
        for bit in (0, 31, 63):
            flipped = list(arguments)
            flipped[place] = words.view(np.uint64) ^ np.uint64(1 << bit)
            changed = np.unpackbits((base ^ keyed_hash(*flipped)).view(np.uint8)).reshape(len(words), 64).mean(axis=0)
            assert np.abs(changed - 0.5).max() < 0.05


def test_hash_tells_order_and_number_of_words_apart():
    assert (
        len({int(keyed_hash(*words)) for words in [(1, 2, 3), (1, 3, 2), (3, 2, 1), (1, 2), (1, 2, 0), (0, 1, 2)]}) == 6
    )
    assert keyed_hash(-1) == keyed_hash(2**64 - 1) == keyed_hash(np.int64(-1))
    with pytest.raises(TypeError, match="integer"):
        keyed_hash(0, np.array([0.5]))


def test_uniform_fills_the_unit_interval_evenly():
    draws = keyed_uniform(1, np.arange(1000)[:, None], np.arange(100))
    assert draws.shape == (1000, 100) and draws.dtype == np.float64
    assert draws.min() >= 0 and draws.max() < 1
    assert np.abs(np.histogram(draws, bins=20)[0] - 5000).max() < 6 * 5000**0.5
    assert abs(np.corrcoef(draws[:, 0], draws[:, 1])[0, 1]) < 0.1


def test_numbers_never_change():
    """A checkpoint's data position means the same samples in every later version."""
    assert int(keyed_hash(0)) == 0xE220A8397B1DCDAF, "the published first output of splitmix64 from state 0"
    assert int(keyed_hash(1, 2, 3)) == 0xD0734750FDE362B3
    assert keyed_permutation(np.arange(8), 8, 42).tolist() == [3, 2, 6, 0, 4, 5, 1, 7]
    assert keyed_permutation([0, 1, 2], 10**10, 42).tolist() == [600752256, 7648841519, 1400145369]
