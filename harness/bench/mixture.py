"""Synthetic embeddings from a mixture whose parameters are fitted to real ones."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from harness.artefact.flat_index import import_faiss

_PER_CLUSTER = 20  # vectors, on average
_QUERY_NOISE = 1.4  # distance of a query from its centre, in those of documents
_BLOCK = 1 << 16
_ROUNDS = 10


@dataclass(frozen=True)
class Mixture:
    """Parameters of clustered unit vectors of any width.

    Args:
        mean: length of the mean vector.
        between: standard deviations of the cluster centres along their principal components 1, 2, 4, 8, ...
        within: the same of vectors around their centre.
        zipf: exponent of the cluster sizes.
    """

    mean: float
    between: tuple[float, ...]
    within: tuple[float, ...]
    zipf: float

    @classmethod
    def fitted(cls, vectors: np.ndarray) -> Mixture:
        """Parameters of real unit vectors [n, d], from k-means with n / 20 clusters."""
        faiss = import_faiss()
        x = np.asarray(vectors, np.float32)
        count = max(2, len(x) // _PER_CLUSTER)
        limits = {"min_points_per_centroid": 1, "max_points_per_centroid": len(x)}
        kmeans = faiss.Kmeans(x.shape[1], count, niter=_ROUNDS, seed=1, **limits)
        kmeans.train(x)
        own = kmeans.index.search(x, 1)[1][:, 0]
        sizes = np.bincount(own, minlength=count)
        centres = np.zeros_like(kmeans.centroids)
        np.add.at(centres, own, x)
        centres /= np.maximum(sizes, 1)[:, None]
        mean, ordered = x.mean(0), np.sort(sizes[sizes > 0])[::-1]
        zipf = -np.polyfit(np.log(np.arange(1, len(ordered) + 1)), np.log(ordered), 1)[0]
        return cls(
            round(float(np.linalg.norm(mean)), 4),
            _deviations(centres[own] - mean, count // 2),  # so few centres span no more
            _deviations(x - centres[own], x.shape[1]),
            round(float(zipf), 3),
        )

    def vectors(self, rows: int, width: int) -> np.ndarray:
        """Unit vectors float32 [rows, width]."""
        return self.sampler(max(1, rows // _PER_CLUSTER), width)(rows, 1.0)

    def sampler(self, clusters: int, width: int, seed: int = 7) -> Callable[[int, float], np.ndarray]:
        """A function of a count and of a factor on the distance from the centres, which gives the next vectors, float32
        [count, width], in directions that no axis prefers.
        """
        rng = np.random.default_rng(seed)
        between, within = (_curve(knots, width) for knots in (self.between, self.within))
        rotation = np.linalg.qr(rng.standard_normal((width, width)))[0].astype(np.float32)
        centres = rng.standard_normal((clusters, width), dtype=np.float32) * between
        direction = rng.standard_normal(width)
        centres += (self.mean * direction / np.linalg.norm(direction)).astype(np.float32)
        sizes = np.cumsum(np.arange(1, clusters + 1) ** -self.zipf)

        def next_vectors(count: int, noise: float) -> np.ndarray:
            own = np.searchsorted(sizes, rng.random(count) * sizes[-1])
            made = centres[own] + rng.standard_normal((count, width), dtype=np.float32) * (noise * within)
            made /= np.linalg.norm(made, axis=1, keepdims=True)
            turned: np.ndarray = made @ rotation
            return turned

        return next_vectors


def write_synthetic(mixture: Mixture, file: Path, rows: int, width: int, queries: int) -> np.ndarray:
    """Writes `rows` vectors, float32, as a .npy file, block by block, and returns queries float32 [queries, width]."""
    next_vectors = mixture.sampler(max(1, rows // _PER_CLUSTER), width)
    vectors = np.lib.format.open_memmap(file, "w+", np.dtype("<f4"), (rows, width))
    for start in range(0, rows, _BLOCK):
        vectors[start : start + _BLOCK] = next_vectors(min(_BLOCK, rows - start), 1.0)
    vectors.flush()
    return next_vectors(queries, _QUERY_NOISE)


def cosines(vectors: np.ndarray) -> dict[str, float]:
    """Median cosine of a vector and its nearest and 10th nearest other, and of two random ones."""
    faiss, some = import_faiss(), np.random.default_rng(0).permutation(len(vectors))
    x = np.ascontiguousarray(vectors, np.float32)
    asked = x[some[:1000]]
    found = faiss.knn(asked, x, 11, metric=faiss.METRIC_INNER_PRODUCT)[0]
    pairs = (asked * x[some[::-1][: len(asked)]]).sum(1)
    medians = (np.median(values) for values in (found[:, 1], found[:, 10], pairs))
    return dict(zip(("nearest", "10th nearest", "random"), map(float, medians), strict=True))


def _deviations(x: np.ndarray, most: int) -> tuple[float, ...]:
    values = np.linalg.eigvalsh(np.cov(x.T.astype(np.float64)))[::-1][:most]
    places = 2 ** np.arange(int(np.log2(len(values))) + 1) - 1
    return tuple(float(f"{np.sqrt(max(value, 1e-12)):.3g}") for value in values[places])


def _curve(knots: tuple[float, ...], width: int) -> np.ndarray:
    """Deviations of `width` components, float32: a power law from knot to knot, and on beyond the last."""
    places = np.arange(len(knots))
    wanted = np.log2(np.arange(1, width + 1))
    made = np.interp(wanted, places, np.log(knots))
    if len(knots) > 1:
        made += np.maximum(wanted - places[-1], 0) * (np.log(knots[-1]) - np.log(knots[-2]))
    return np.exp(made).astype(np.float32)


# Features of 2,500 fashion photos: the mean of EfficientNet-Lite0's last map (ImageNet), in 256 principal components.
FASHION = Mixture(
    mean=0.0711,
    between=(0.488, 0.235, 0.191, 0.13, 0.0795, 0.0448),
    within=(0.098, 0.09, 0.0861, 0.0781, 0.0663, 0.0542, 0.0399, 0.0271, 0.0135),
    zipf=0.591,
)
