"""Click log of the demo: documents shown and clicked for each training photo, wrong clicks included."""

from __future__ import annotations

import itertools
from collections.abc import Sequence

import numpy as np
import pyarrow as pa

from harness.catalogue.synth.products import Product
from harness.core.keyed_random import SynthStream

SCHEMA = pa.schema(
    [
        ("query", pa.string()),
        ("document", pa.string()),
        ("position", pa.int32()),
        ("impressions", pa.int32()),
        ("clicks", pa.int32()),
    ]
)
RESULTS = 10  # documents in a result list
WRONG_SHARE = 0.125  # of all clicks
ZIPF = 0.8  # exponent of the products' traffic


def click_log(
    photos: Sequence[tuple[str, Product]], documents: Sequence[tuple[str, Product]], seed: int
) -> tuple[pa.Table, int]:
    """Draws a click log.

    Each photo has one result list: its own product near the top, others with a probability that grows with likeness.
    Impressions follow the product's traffic (Zipf) and fall with the position.

    Args:
        photos: id and product of the training photos.
        documents: id and product of the documents that may be listed.
        seed: seed of every draw.

    Returns:
        Rows of SCHEMA, one for each (photo, document) that was seen, and the number of wrong clicks.
    """
    rng = np.random.default_rng([seed, SynthStream.CLICKS])
    place = {product.number: index for index, (_, product) in enumerate(documents)}
    traffic = 30.0 / (1 + rng.permutation(len(documents))) ** ZIPF
    pairs = itertools.product([product for _, product in documents], repeat=2)
    alike = np.array(list(itertools.starmap(_likeness, pairs))).reshape(len(documents), -1)
    rows: list[tuple[int, int, int, int, bool]] = []
    for photo, (_, product) in enumerate(photos):
        own = place[product.number]
        # Gumbel noise on the logarithm of the weights draws without replacement.
        order = np.argsort(-(np.log(alike[own]) + rng.gumbel(size=len(documents))))
        listed = [int(index) for index in order if index != own][: RESULTS - 1]
        listed.insert(min(int(rng.geometric(0.4)) - 1, len(listed)), own)
        rate = (1 + traffic[own]) / np.arange(1, len(listed) + 1) ** 0.7
        for position, (index, seen) in enumerate(zip(listed, rng.poisson(rate), strict=True), 1):
            if seen:
                rows.append((photo, index, position, int(seen), index == own))
    photo_of, document_of, position_of, impressions, right = (np.array(column) for column in zip(*rows, strict=True))
    clicks = np.where(right, rng.binomial(impressions, 0.5), 0)
    # Exactly the stated share of wrong clicks, each on one impression of a wrong document.
    shown = np.repeat(np.flatnonzero(~right), impressions[~right])
    wrong = min(round(int(clicks.sum()) * WRONG_SHARE / (1 - WRONG_SHARE)), len(shown))
    weight = alike[[place[photos[photo][1].number] for photo in photo_of[shown]], document_of[shown]]
    np.add.at(clicks, rng.choice(shown, wrong, replace=False, p=weight / weight.sum()), 1)
    photo_ids = [photos[photo][0] for photo in photo_of]
    document_ids = [documents[document][0] for document in document_of]
    columns = (photo_ids, document_ids, position_of, impressions, clicks)
    return pa.table([pa.array(c, f.type) for c, f in zip(columns, SCHEMA, strict=True)], schema=SCHEMA), wrong


def _likeness(a: Product, b: Product) -> float:
    """Weight of `b` in the result list, and for wrong clicks, of a photo of `a`."""
    alike = 8 * (a.category == b.category) + 8 * (a.kind == b.kind) + 2 * (a.colour == b.colour)
    return float(1 + alike + 30 * (a.twin == b.number))
