"""Connected components of a graph of documents, in few rounds also on long chains, on either engine.

DuckDB: scipy in chunks of edges; memory grows with the nodes and one chunk. Spark: contraction by a random order in SQL
(Bögeholz, Brand and Todor, "In-database connected component analysis", ICDE 2020). Both name a component by its lowest
node, so that neither order nor engine matters.
"""

from __future__ import annotations

from collections.abc import Iterable

import ibis
import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
from ibis import _
from scipy.sparse import coo_array  # type: ignore[import-untyped]
from scipy.sparse.csgraph import connected_components  # type: ignore[import-untyped]

from harness.catalogue.governance.engine import Engine, SparkEngine, row

CHUNK = 10_000_000  # edges
_PRIME = 2**31 - 1


def components(engine: Engine, name: str, links: ibis.Table, num_nodes: int) -> ibis.Table:
    """document, component of every end of `links`: the lowest node that it is joined with.

    Args:
        engine: runs it.
        name: of the result in the engine.
        links: a, b, int64 nodes from 0 to num_nodes - 1.
        num_nodes: bound of the nodes.
    """
    if isinstance(engine, SparkEngine):
        return contracted(engine, name, links)
    engine.keep(f"{name}-links", links.select("a", "b"))
    batches = engine.batches(f"{name}-links", ["a", "b"], CHUNK)
    label, seen = lowest(((batch["a"].to_numpy(), batch["b"].to_numpy()) for batch in batches), num_nodes)
    file = engine.spill / f"{name}.parquet"
    schema = pa.schema([("document", pa.int64()), ("component", pa.int64())])
    with pq.ParquetWriter(file, schema) as writer:
        for start in range(0, len(seen), CHUNK):
            document = start + np.flatnonzero(seen[start : start + CHUNK])
            writer.write_table(
                pa.table([pa.array(document), pa.array(label[document].astype(np.int64))], schema=schema)
            )
    return engine.read([file])


def lowest(edges: Iterable[tuple[np.ndarray, np.ndarray]], num_nodes: int) -> tuple[np.ndarray, np.ndarray]:
    """Lowest node of each node's component, int [num_nodes], and whether it has an edge, bool [num_nodes].

    Args:
        edges: chunks of two int64 arrays [n] of nodes.
        num_nodes: nodes are 0 to num_nodes - 1.
    """
    label = np.arange(num_nodes, dtype=np.int32 if num_nodes < 2**31 else np.int64)
    seen = np.zeros(num_nodes, bool)
    count = num_nodes
    for u, v in edges:
        seen[u] = seen[v] = True
        graph = coo_array((np.ones(len(u), bool), (label[u], label[v])), (count, count))
        count, joined = connected_components(graph.tocsr(), directed=False)
        label = joined[label]
    first = np.empty(count, label.dtype)
    first[label[::-1]] = np.arange(num_nodes - 1, -1, -1, dtype=label.dtype)  # the last one written is the lowest
    return first[label], seen


def contracted(engine: Engine, name: str, links: ibis.Table) -> ibis.Table:
    """As `components`, in SQL. In each round a node takes that of itself and its neighbours which comes first in a
    random order; the number of nodes falls by a constant factor in expectation.
    """
    rng, rounds = np.random.default_rng(0), 0
    edges = engine.keep(f"{name}-0", _distinct(links))
    while row(edges.agg(n=_.count()))["n"]:
        factor, shift = (int(rng.integers(1, _PRIME)) for _ in range(2))
        both = edges.union(edges.select(a=_.b, b=_.a))
        both = both.union(edges.select(a=_.a, b=_.a)).union(edges.select(a=_.b, b=_.b))
        key = (_.b % _PRIME * factor + shift) % _PRIME
        taken = engine.keep(f"{name}-taken-{rounds}", both.group_by(node=_.a).agg(of=_.b.argmin(key)))
        left, right = taken.select(a=_.node, p=_.of), taken.select(b=_.node, q=_.of)
        joined = edges.inner_join(left, "a").inner_join(right, "b").select(a=_.p, b=_.q)
        rounds += 1
        edges = engine.keep(f"{name}-{rounds}", _distinct(joined))
    if not rounds:
        return edges.select(document=_.a, component=_.b)
    label = engine.read(engine.parts(f"{name}-taken-{rounds - 1}"))
    for number in reversed(range(rounds - 1)):
        taken = engine.read(engine.parts(f"{name}-taken-{number}"))
        further = label.select(of=_.node, last=_.of)
        label = taken.left_join(further, "of").select(node=_.node, of=ibis.coalesce(_.last, _.of))
        label = engine.keep(f"{name}-back-{number}", label)
    named = label.group_by("of").agg(component=_.node.min())
    return engine.keep(name, label.inner_join(named, "of").select(document=_.node, component=_.component))


def _distinct(links: ibis.Table) -> ibis.Table:
    """The edges between different nodes, each once, its lower node first."""
    apart = links.filter(_.a != _.b)
    return apart.select(a=ibis.least(_.a, _.b), b=ibis.greatest(_.a, _.b)).distinct()
