"""Random numbers without state: every draw is a function of a key and of the words that name it.

The same words give the same number on every rank, in any order and in any batch, so that the data order and the
augmentation can be recomputed from one position. All functions are vectorised and need memory for their arguments only.
"""

from __future__ import annotations

from enum import IntEnum, unique
from typing import Any

import numpy as np
import numpy.typing as npt

Words = npt.ArrayLike  # integers of any width; negative ones count as their two's complement
Hashes = npt.NDArray[np.uint64]

_MASK = (1 << 64) - 1
_GOLDEN = np.uint64(0x9E3779B97F4A7C15)
# Luby and Rackoff need 4 rounds; tiny domains (a class of 3 members) need some more to reach most orders.
_ROUNDS = 6
_POWERS_OF_FOUR = np.array([4**half for half in range(32)], dtype=np.uint64)


@unique
class Stream(IntEnum):
    """First word of every draw under a run's seed, which keeps the uses of the seed apart.

    A number never changes: it would change the order and the augmentation of every run.
    """

    SLOT = 1  # harness/data/order.py
    MEMBER = 2
    PAIR = 3
    AUGMENT = 4  # harness/data/preprocess.py
    MOSAIC = 5  # harness/data/mosaic.py
    MASKED_WORDS = 16  # harness/data/masking.py
    MASKED_PATCHES = 17
    HEAVY_MASK = 18
    OTHER_TITLE = 19
    ATTRIBUTE_COUNT = 24  # harness/text/product_queries.py
    ATTRIBUTE_ORDER = 25
    WORDING = 26
    CLICKED_TEXT = 27
    PROBE_SAMPLE = 40  # harness/evaluate/tasks/category.py
    SPLIT = 48  # harness/catalogue/splits.py


@unique
class SynthStream(IntEnum):
    """Second word of numpy's seeds [seed, stream, ...] in drawing a catalogue (`shelfmark synth`)."""

    PRODUCTS = 0  # harness/catalogue/synth/products.py
    CLICKS = 1  # harness/catalogue/synth/clicks.py
    PHOTOS = 2  # harness/commands/synth.py
    LIFESTYLE = 3


def keyed_hash(key: Words, *words: Words) -> Hashes:
    """Hash integers to uint64, well mixed in every bit, broadcasting over the arguments.

    Args:
        key: integer or integer array.
        words: integers or integer arrays; their order and number matter.

    Returns:
        uint64 array of the broadcast shape. Each word enters by one step of splitmix64 (Steele, Lea and Flood, OOPSLA
        2014): for given other words distinct values never collide.
    """
    with np.errstate(over="ignore"):
        state = _mix(_word(key) + _GOLDEN)
        for word in words:
            state = _mix((state ^ _word(word)) + _GOLDEN)
    return np.asarray(state)


def keyed_uniform(key: Words, *words: Words) -> npt.NDArray[np.float64]:
    """Uniform float64 in [0, 1) from the 53 high bits of `keyed_hash(key, *words)`; same shape."""
    return (keyed_hash(key, *words) >> np.uint64(11)).astype(np.float64) * 2.0**-53


def keyed_permutation(index: Words, size: Words, key: Words) -> npt.NDArray[np.int64]:
    """Send each index through a keyed bijection of [0, size), in O(1) memory per index whatever the size.

    A Feistel network permutes the next power of four; indices that fall outside [0, size) walk on along their cycle
    until they return inside (Black and Rogaway, CT-RSA 2002), on average in at most four steps.

    Args:
        index: integers in [0, size).
        size: integer or array, 1 to 2**62.
        key: integer or array; another key is another bijection.

    Returns:
        int64 array of the broadcast shape.

    Raises:
        ValueError: a size or an index outside its range.
    """
    start, sizes, keys = np.broadcast_arrays(*(np.asarray(_word(value)) for value in (index, size, key)))
    if start.size == 0:
        return np.zeros(start.shape, dtype=np.int64)
    if sizes.min() < 1 or sizes.max() > _POWERS_OF_FOUR[-1] or (start >= sizes).any():
        raise ValueError("keyed_permutation needs 0 <= index < size <= 2**62")
    shape = start.shape
    start, sizes = start.ravel(), sizes.ravel()
    half = np.searchsorted(_POWERS_OF_FOUR, sizes).astype(np.uint64)
    round_keys = keyed_hash(keys.ravel(), np.arange(_ROUNDS)[:, None])
    value = _feistel(start, half, round_keys)
    while (outside := np.flatnonzero(value >= sizes)).size:
        value[outside] = _feistel(value[outside], half[outside], round_keys[:, outside])
    return value.astype(np.int64).reshape(shape)


def _feistel(value: Hashes, half: Hashes, round_keys: Hashes) -> Hashes:
    """Permutation of [0, 4**half): the two halves of `half` bits swap and mix once a round."""
    mask = (np.uint64(1) << half) - np.uint64(1)
    left, right = value >> half, value & mask
    for round_key in round_keys:
        left, right = right, left ^ (_mix(right ^ round_key) & mask)
    return left << half | right


def _mix(state: Any) -> Any:
    """The finaliser of splitmix64: a bijection of uint64."""
    state = (state ^ (state >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    state = (state ^ (state >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    return state ^ (state >> np.uint64(31))


def _word(value: Words) -> Any:
    if isinstance(value, int):
        return np.uint64(value & _MASK)
    array = np.asarray(value)
    if array.size and array.dtype.kind not in "iub":  # an empty list has no type to complain of
        raise TypeError(f"a word is an integer, not {array.dtype}")
    return array.astype(np.uint64)
