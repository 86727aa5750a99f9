"""Click log whose true classes are known, to measure governance: skewed exposure, wrong clicks, copies, hot items.

All of it is our own model of a shop's log. Arrays only, without a loop over rows.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import pyarrow as pa

from harness.catalogue.synth.products import Product
from harness.core.keyed_random import SynthStream

OWN, HOT = 3, 1  # places of a result list for items of the query's class at most, and for hot items
DEMO_NOISE = 0.125
DAYS, FIRST_DAY = 60, 1_767_225_600  # of the log; seconds since 1970 of its first day


@dataclass(frozen=True)
class Truth:
    """True classes of a shop's samples.

    query_class: int64 [queries]; document_class: int64 [documents], ascending, each class has one at least;
    group_of: int64 [classes] numbers the groups of classes that look alike.
    """

    query_class: np.ndarray
    document_class: np.ndarray
    group_of: np.ndarray


@dataclass(frozen=True, kw_only=True)
class LogShape:
    """Numbers of a click log.

    Args:
        noise: share of wrong clicks in all clicks, without those on hot items.
        zipf: exponent of the queries' traffic.
        sessions: mean of a query's result lists, the least of which is 1.
        results: items in a result list.
        rate: clicks for each impression of a right item.
        alike: share of the wrong items in a list that come from the group of the query's class.
        hot: share of the documents that are hot: each list has one of them.
        hot_rate: clicks for each impression of a hot item, whatever the query shows, besides the wrong clicks.
        copies: share of the rows that the log holds twice.
        seed: of all draws.
    """

    noise: float = 0.2
    zipf: float = 1.1
    sessions: float = 8.0
    results: int = 10
    rate: float = 0.5
    alike: float = 0.5
    hot: float = 0.05
    hot_rate: float = 0.1
    copies: float = 0.05
    seed: int = 0


@dataclass(frozen=True)
class Log:
    """n rows of a log, each of a (query, document) that was seen, in no order.

    query, document: int64 [n] places in the truth; clicks, impressions: int64 [n]; time: int64 [n] seconds since 1970;
    right: bool [n].
    """

    query: np.ndarray
    document: np.ndarray
    clicks: np.ndarray
    impressions: np.ndarray
    time: np.ndarray
    right: np.ndarray

    def table(self, queries: pa.Array, documents: pa.Array) -> pa.Table:
        """The log as `shelfmark govern --clicks` reads it.

        Args:
            queries: the id of each query.
            documents: the id of each document.
        """
        return pa.table(
            {
                "query": queries.take(pa.array(self.query)),
                "document": documents.take(pa.array(self.document)),
                "clicks": self.clicks,
                "impressions": self.impressions,
                "time": self.time,
            }
        )


def make_truth(classes: int, queries: float, documents: float, group: int, seed: int) -> Truth:
    """Classes of geometric sizes.

    Args:
        classes: their number.
        queries: mean queries of a class, one at least.
        documents: mean documents of a class, one at least.
        group: classes that look alike.
        seed: of the sizes.
    """
    rng = np.random.default_rng([seed, SynthStream.CLICKS, 0])
    sizes = [np.minimum(rng.geometric(1 / mean, classes), 64) for mean in (queries, documents)]
    query_class, document_class = (np.repeat(np.arange(classes), size) for size in sizes)
    return Truth(query_class, document_class, np.arange(classes) // group)


def click_log(
    photos: Sequence[tuple[str, Product]], documents: Sequence[tuple[str, Product]], seed: int
) -> tuple[pa.Table, int]:
    """The log of the synthetic catalogue, in which products of one kind look alike.

    Args:
        photos: id and product of the training photos.
        documents: id and product of the documents that may be listed; each photo's product has one.
        seed: of all draws.

    Returns:
        Rows of `Log.table`, and the number of wrong clicks.
    """
    place = {product.number: index for index, (_, product) in enumerate(documents)}
    kinds = {product.kind: number for number, (_, product) in enumerate(documents)}
    group_of = np.array([kinds[product.kind] for _, product in documents])
    truth = Truth(np.array([place[product.number] for _, product in photos]), np.arange(len(documents)), group_of)
    log = draw_log(truth, LogShape(noise=DEMO_NOISE, seed=seed))
    queries, items = (pa.array([name for name, _ in side]) for side in (photos, documents))
    return log.table(queries, items), int(log.clicks[~log.right].sum())


def draw_log(truth: Truth, shape: LogShape) -> Log:
    """Draws a log in which every query has a right click.

    A list shows up to OWN items of the query's class near the top, HOT hot items and other items. Impressions fall with
    the place. Wrong clicks are uniform over the wrong impressions.
    """
    rng = np.random.default_rng([shape.seed, SynthStream.CLICKS, 1])
    shown, right = _lists(truth, shape, rng)
    queries = len(shown)
    # Traffic goes by rank, so that the mean holds and most queries have one list.
    traffic = (1.0 + np.arange(queries)) ** -shape.zipf
    sessions = 1 + rng.poisson(rng.permutation(traffic * (shape.sessions - 1) * queries / traffic.sum()))
    places = np.argsort(rng.random(shown.shape) - 0.5 * right, axis=1).argsort(axis=1)
    impressions = rng.binomial(sessions[:, None], (1.0 + places) ** -0.5)
    impressions[:, 0] = np.maximum(impressions[:, 0], 1)  # the first right item
    impressions[shown < 0] = 0
    clicks = np.where(right, rng.binomial(impressions, shape.rate), 0)
    clicks[:, 0] += clicks.sum(1) == 0
    wrong = int(clicks.sum()) * shape.noise / (1 - shape.noise)
    clicks += rng.binomial(np.where(right, 0, impressions), min(1.0, wrong / max(1, impressions[~right].sum())))
    hot = slice(OWN, OWN + HOT)
    left = np.where(right, 0, impressions - clicks)[:, hot]
    clicks[:, hot] += rng.binomial(left, shape.hot_rate)

    rows = np.flatnonzero(impressions)
    rows = np.concatenate([rows, rng.choice(rows, round(shape.copies * len(rows)), replace=False)])
    rng.shuffle(rows)
    time = FIRST_DAY + rng.integers(0, DAYS * 86_400, shown.size)
    columns = (shown, clicks, impressions, time, right)
    document, clicks, impressions, time, right = (column.reshape(-1)[rows] for column in columns)
    return Log(rows // shape.results, document, clicks, impressions, time, right)


def _lists(truth: Truth, shape: LogShape, rng: np.random.Generator) -> tuple[np.ndarray, np.ndarray]:
    """int64 [queries, results] documents that each query shows, -1 for none, and whether they are of its class."""
    queries, documents = len(truth.query_class), len(truth.document_class)
    first = np.searchsorted(truth.document_class, np.arange(len(truth.group_of) + 1))
    sizes = np.diff(first)
    own, places = sizes[truth.query_class], np.arange(OWN)
    start = rng.integers(0, own)[:, None]
    right = first[truth.query_class][:, None] + (start + places) % own[:, None]
    right[places >= own[:, None]] = -1

    hot = rng.choice(rng.permutation(documents)[: max(1, round(shape.hot * documents))], (queries, HOT))
    others = (queries, shape.results - OWN - HOT)
    group = truth.group_of[truth.query_class]
    grouped = np.argsort(truth.group_of, kind="stable")
    bounds = np.searchsorted(truth.group_of[grouped], np.arange(truth.group_of.max() + 2))
    near = grouped[rng.integers(bounds[group][:, None], bounds[group + 1][:, None], others)]
    near = first[near] + rng.integers(0, sizes[near])
    wrong = np.where(rng.random(others) < shape.alike, near, rng.integers(0, documents, others))
    wrong = np.concatenate([hot, wrong], axis=1)
    # An item that is listed twice, or that is right after all, keeps one place.
    wrong[truth.document_class[wrong] == truth.query_class[:, None]] = -1
    order = np.argsort(wrong, axis=1, kind="stable")
    ordered = np.take_along_axis(wrong, order, axis=1)
    ordered[:, 1:][ordered[:, 1:] == ordered[:, :-1]] = -1
    np.put_along_axis(wrong, order, ordered, axis=1)
    return np.concatenate([right, wrong], axis=1), np.arange(shape.results) < np.repeat(OWN, queries)[:, None]
