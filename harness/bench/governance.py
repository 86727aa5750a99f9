"""Pairwise precision and recall of the classes that `shelfmark govern` makes of a click log with known truth."""

from __future__ import annotations

import sys
import tempfile
import time
from collections.abc import Callable
from contextlib import redirect_stdout
from dataclasses import dataclass, replace
from io import StringIO
from pathlib import Path
from typing import Any

import networkx as nx  # type: ignore[import-untyped]
import numpy as np
import pyarrow.parquet as pq
from scipy.sparse import coo_matrix  # type: ignore[import-untyped]
from scipy.sparse.csgraph import connected_components  # type: ignore[import-untyped]
from tqdm import tqdm

from harness.bench.click_shops import Shop, real, synthetic
from harness.bench.report import bench_main, finish
from harness.catalogue.synth.clicks import Log, LogShape, draw_log
from harness.commands import govern
from harness.core.errors import UserError
from harness.evaluate.pairwise import pairwise
from models.ranges import ClosedUnitInterval, NonNegativeInt, PositiveInt

MODULE = "harness.bench.governance"
EXAMPLE = f"python -m {MODULE} --classes 2000 --json governance.json"
# The default values of `shelfmark govern` were chosen on the first shop only.
TUNED, OTHER = "tuned on", "not tuned on"


@dataclass(frozen=True, kw_only=True)
class GovernanceConfig:
    """Draws click logs, governs them with default values, and compares the classes with the truth.

    Two shops are synthetic, with embeddings that are random around their class's: the second has other sizes, other
    traffic, longer lists, more clicks on hot items, more copies and weaker embeddings, and no value was chosen on it.
    `--catalogue` adds a real one: its class column is the truth, `--embeddings` those of a trained model.

    Pairs are of samples with a click, a sample without class counts as a class of its own. Beside governance:
    connected components of all clicked pairs, and networkx's Louvain communities and label propagation, both weighted
    by clicks.

    Args:
        classes: true classes of a synthetic shop.
        noise: shares of wrong clicks, without those on hot items.
        seed: of all draws.
        catalogue: a catalogue with a class column.
        embeddings: tables of embeddings of its samples, as `shelfmark govern` takes them.
    """

    classes: PositiveInt = 2000
    noise: tuple[ClosedUnitInterval, ...] = (0.0, 0.1, 0.2, 0.3, 0.4)
    seed: NonNegativeInt = 0
    catalogue: Path | None = None
    embeddings: tuple[Path, ...] = ()

    def __post_init__(self) -> None:
        if not self.noise or max(self.noise) > 0.9:
            raise UserError("--noise must name shares from 0 to 0.9")
        if bool(self.embeddings) != (self.catalogue is not None):
            raise UserError("--catalogue and --embeddings belong together")


def run(config: GovernanceConfig) -> dict[str, Any]:
    """Measures, prints and returns the report (see `harness/bench/report.py`).

    Headline:
        precision_at_20_noise, recall_at_20_noise: with the similarity filter, on the catalogue where one is given, else
            on the first synthetic shop.
        ..._without_embeddings, ..._components, ..._louvain, ..._label_propagation: the same log by other means.
        ..._not_tuned_on: with the similarity filter on the second synthetic shop.
        pairs_of_2_clicks: share of the truly clicked pairs with two clicks at most.
    """
    rows: list[dict[str, Any]] = []
    with tempfile.TemporaryDirectory(prefix="shelfmark-bench-") as name:
        seed, folder = config.seed, Path(name)
        shape = LogShape(seed=seed)
        shops = {
            TUNED: synthetic(folder / "tuned", config.classes, shape),
            OTHER: synthetic(folder / "other", config.classes, _other(seed), queries=12.0, documents=3.0, signal=0.7),
        }
        if config.catalogue is not None:
            shops["catalogue"] = real(folder / "real", config.catalogue, shape, config.embeddings)
        methods = ("governed", "without embeddings", "components", "louvain", "label propagation")
        with tqdm(
            total=len(shops) * len(config.noise) * len(methods), desc="governance", unit=" groupings"
        ) as progress:
            for shop_name, shop in shops.items():
                for noise in config.noise:
                    log = draw_log(shop.truth, replace(shop.shape, noise=noise))
                    for method in methods:
                        row = _measure(shop, log, method)
                        rows.append({"shop": shop_name, "noise": noise, "method": method, **row})
                        progress.update()
    return finish(MODULE, config, _headline(rows, "catalogue" if config.catalogue else TUNED), rows)


def _headline(rows: list[dict[str, Any]], shop: str) -> dict[str, float]:
    found = {(row["shop"], row["method"]): row for row in rows if row["noise"] == 0.2}
    named = {"": (shop, "governed"), "_not_tuned_on": (OTHER, "governed")}
    for method in ("without embeddings", "components", "louvain", "label propagation"):
        named[f"_{method.replace(' ', '_')}"] = (shop, method)
    headline = {}
    for suffix, key in named.items() if found else ():
        for what in ("precision", "recall"):
            headline[f"{what}_at_20_noise{suffix}"] = found[key][what]
    return headline | {"pairs_of_2_clicks": min(row["pairs_of_2_clicks"] for row in rows)}


def _other(seed: int) -> LogShape:
    return LogShape(
        zipf=1.2, sessions=6.0, results=16, rate=0.4, alike=0.8, hot_rate=0.2, copies=0.2, seed=seed + 1_000_003
    )


def _measure(shop: Shop, log: Log, method: str) -> dict[str, Any]:
    """One grouping of the samples with a click, beside the truth."""
    _, row = np.unique(log.query * len(shop.truth.document_class) + log.document, return_index=True)
    row = row[log.clicks[row] > 0]
    query, document, clicks = log.query[row], log.document[row], log.clicks[row]
    first, total = len(shop.truth.query_class), len(shop.truth.query_class) + len(shop.truth.document_class)
    right = log.right[row]
    started = time.perf_counter()
    found = (
        GROUPINGS[method](shop, log) if method in GROUPINGS else PLAIN[method](query, document + first, clicks, total)
    )
    seconds = time.perf_counter() - started
    clicked = np.unique(np.concatenate([query, document + first]))
    truth = np.concatenate([shop.truth.query_class, shop.truth.document_class])
    precision, recall = pairwise(found[clicked], truth[clicked])
    return {
        "precision": precision,
        "recall": recall,
        "reachable_recall": pairwise(
            _components(query[right], document[right] + first, clicks[right], total)[clicked], truth[clicked]
        )[1],
        "groups": len(np.unique(found[found >= 0])),
        "edges": len(row),
        "wrong_clicks": float(clicks[~right].sum() / clicks.sum()),
        "pairs_of_2_clicks": float((clicks[right] <= 2).mean()),
        "seconds": round(seconds, 2),
    }


def _governed(shop: Shop, log: Log, similar: bool) -> np.ndarray:
    """Class of each sample, queries first; -1 without one."""
    config = govern.GovernConfig(
        catalogue=shop.folder, clicks=shop.write_log(log), embeddings=shop.embeddings if similar else ()
    )
    with redirect_stdout(StringIO()):
        govern.run(config)
    members = pq.read_table(shop.folder / "classes" / "members.parquet", columns=["sample_id", "class_id"])
    samples = np.concatenate([shop.queries, shop.documents])
    of_sample = np.full(samples.max() + 1, -1)
    of_sample[members["sample_id"].to_numpy()] = members["class_id"].to_numpy()
    return of_sample[samples]


def _components(query: np.ndarray, document: np.ndarray, clicks: np.ndarray, total: int) -> np.ndarray:
    labels: np.ndarray = connected_components(coo_matrix((clicks, (query, document)), shape=(total, total)), False)[1]
    return labels


def _communities(method: Callable[..., Any]) -> Callable[..., np.ndarray]:
    def group(query: np.ndarray, document: np.ndarray, clicks: np.ndarray, total: int) -> np.ndarray:
        graph = nx.Graph()
        graph.add_weighted_edges_from(zip(query.tolist(), document.tolist(), clicks.tolist(), strict=True))
        found = np.full(total, -1)
        for number, nodes in enumerate(method(graph, weight="weight", seed=0)):
            found[list(nodes)] = number
        return found

    return group


GROUPINGS: dict[str, Callable[[Shop, Log], np.ndarray]] = {
    "governed": lambda shop, log: _governed(shop, log, similar=True),
    "without embeddings": lambda shop, log: _governed(shop, log, similar=False),
}
PLAIN: dict[str, Callable[..., np.ndarray]] = {
    "components": _components,
    "louvain": _communities(nx.community.louvain_communities),
    "label propagation": _communities(nx.community.fast_label_propagation_communities),
}


def main() -> int:
    """Entry point of `python -m harness.bench.governance`."""
    return bench_main(
        MODULE, GovernanceConfig, run, "Precision and recall of classes made of a click log with known truth.", EXAMPLE
    )


if __name__ == "__main__":
    sys.exit(main())
