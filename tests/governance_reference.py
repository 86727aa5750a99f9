"""The rules of governance on clicks in plain Python, one edge at a time, by docs/governance.md."""

from __future__ import annotations

import math
from collections import Counter, defaultdict
from collections.abc import Mapping, Sequence

import networkx as nx

from harness.catalogue.governance.config import GovernConfig

Edge = tuple[int, int]


def wilson(clicks: int, impressions: int, deviations: float) -> int:
    rate, square = clicks / impressions, deviations**2
    spread = math.sqrt(rate * (1.0 - rate) / impressions + square / (4.0 * impressions * impressions)) * deviations
    lower = (rate + square / (2.0 * impressions) - spread) / (1.0 + square / impressions)
    return max(0, math.floor(lower * 1e6 + 0.5))


def millionths(share: float) -> int:
    return round(share * 10**6)


def components(links: Mapping[Edge, int], threshold: int, nodes: set[int], most: int, step: int) -> list[set[int]]:
    """Components of the links from a threshold on; the too large ones again, with a higher threshold."""
    graph = nx.Graph()
    graph.add_nodes_from(nodes)
    graph.add_edges_from(e for e, overlap in links.items() if overlap >= threshold and e[0] in nodes)
    found = []
    for part in nx.connected_components(graph):
        if len(part) > most and threshold < 10**6 + step:
            found += components(links, threshold + step, set(part), most, step)
        else:
            found.append(set(part))
    return found


def rules(
    rows: Sequence[tuple[int, int, int, int]],
    config: GovernConfig,
    similarity: Mapping[Edge, int],
    related: Sequence[Edge],
) -> tuple[dict[int, int], dict[int, int], dict[Edge, str]]:
    """Rules on rows (query, document, clicks, impressions), all usable.

    Returns:
        query -> component, document -> component (its lowest document), and edge -> reason of the dropped edges.
    """
    edges = supports(rows, config)
    asked = Counter(query for query, _ in edges)
    bots = {query for query, count in asked.items() if count > config.max_documents_per_query}
    hot = hot_documents({edge: value for edge, value in edges.items() if edge[0] not in bots}, config)
    dropped: dict[Edge, str] = {}
    weight: dict[Edge, int] = {}
    for edge, value in edges.items():
        cosine = similarity.get(edge)
        if edge[0] in bots:
            dropped[edge] = "bot"
        elif value < millionths(config.min_support):
            dropped[edge] = "support"
        elif cosine is not None and cosine < millionths(config.min_similarity):
            dropped[edge] = "similarity"
        elif edge[1] in hot and cosine is None and asked[edge[0]] > 1:
            dropped[edge] = "hot"
        else:
            low = millionths(config.min_similarity)
            weight[edge] = value * (low if cosine is None else cosine) // 10**6 if config.embeddings else value
    best: dict[int, Edge] = {}
    for edge in sorted(weight, key=lambda edge: (-weight[edge], edge[1])):
        best.setdefault(edge[0], edge)
    asked_of = Counter(document for _, document in weight)
    close = {
        edge: weight[edge] * 10**6 >= weight[best[edge[0]]] * millionths(config.min_share)
        for edge in weight
        if edge != best[edge[0]]
    }
    common = Counter(pair(best[edge[0]][1], edge[1]) for edge, near in close.items() if near)
    overlap = {(a, b): math.floor(n / math.sqrt(asked_of[a] * asked_of[b]) * 1e6) for (a, b), n in common.items()}
    links = {
        e: overlap[e]
        for e, n in common.items()
        if n >= config.min_common and overlap[e] >= millionths(config.min_overlap)
    }
    links |= {pair(a, b): 2 * 10**6 for a, b in related}
    documents = {document for _, document in weight} | {end for link in links for end in link}
    parts = components(
        links, millionths(config.min_overlap), documents, config.max_documents, millionths(config.split_step)
    )
    component = {document: min(part) for part in parts for document in part}
    totals: dict[int, Counter[int]] = defaultdict(Counter)
    for (query, document), value in weight.items():
        totals[query][component[document]] += value
    chosen: dict[int, int] = {}
    for query, sums in totals.items():
        first = min(sums, key=lambda c: (-sums[c], c))
        if sums[first] * 10**6 // max(sum(sums.values()), 1) >= millionths(config.min_vote):
            chosen[query] = first
    for edge in weight:
        query, document = edge
        home = best[query][1]
        if chosen.get(query) == component[document]:
            continue
        if query not in chosen or document == home or component[home] != chosen[query]:
            dropped[edge] = "vote"
        elif not close[edge]:
            dropped[edge] = "share"
        elif common[pair(home, document)] < config.min_common:
            dropped[edge] = "common"
        elif overlap[pair(home, document)] < millionths(config.min_overlap):
            dropped[edge] = "overlap"
        else:
            dropped[edge] = "split"
    return chosen, component, dropped


def hot_documents(edges: Mapping[Edge, int], config: GovernConfig) -> set[int]:
    of_query: dict[int, list[Edge]] = defaultdict(list)
    for edge in edges:
        of_query[edge[0]].append(edge)
    queries, rivals = Counter[int](), defaultdict(Counter)
    for own in of_query.values():
        own.sort(key=lambda edge: (-edges[edge], edge[1]))
        for edge in own:
            queries[edge[1]] += 1
            tied = own[1] if len(own) > 1 and edges[own[1]] == edges[edge] else None
            rival = own[0] if edge != own[0] else tied
            if rival is not None:
                rivals[edge[1]][rival[1]] += 1
    return {
        document
        for document, count in queries.items()
        if (beaten := sum(rivals[document].values()))
        and beaten**2 >= config.hot_documents * sum(n * n for n in rivals[document].values())
        and beaten * 10**6 > count * millionths(config.hot_share)
    }


def pair(a: int, b: int) -> Edge:
    return min(a, b), max(a, b)


def supports(rows: Sequence[tuple[int, int, int, int]], config: GovernConfig) -> dict[Edge, int]:
    """Support of each edge in millionths."""
    clicks, seen = Counter[Edge](), Counter[Edge]()
    for query, document, clicked, shown in set(rows):
        clicks[query, document] += clicked
        seen[query, document] += shown
    return {edge: wilson(clicks[edge], seen[edge], config.confidence) for edge in clicks if clicks[edge]}


def facts(
    rows: Sequence[tuple[int, int, int, int]],
    config: GovernConfig,
    found: tuple[dict[int, int], dict[int, int], dict[Edge, str]],
) -> dict[int, tuple[int, int, int]]:
    """component -> edges and clicks inside it, and all clicks of its queries, hot documents that are dropped left out.

    An edge on a hot document that another rule dropped counts as the document's others do.
    """
    chosen, component, dropped = found
    clicks = Counter[Edge]()
    for query, document, clicked, _ in set(rows):
        clicks[query, document] += clicked
    hot = hot_documents({e: n for e, n in supports(rows, config).items() if dropped.get(e) != "bot"}, config)
    beside = Counter(query for (query, _), n in clicks.items() if n)
    counts: dict[int, tuple[int, int, int]] = {}
    for edge, n in clicks.items():
        query, document = edge
        candidate = dropped.get(edge, "kept") in ("kept", "share", "common", "overlap", "split", "vote")
        if not n or query not in chosen or (document in hot and beside[query] > 1 and not candidate):
            continue
        part = chosen[query]
        edges, inside, asked = counts.get(part, (0, 0, 0))
        same = component.get(document, document) == part
        counts[part] = (edges + (edge not in dropped), inside + n * same, asked + n)
    return counts


def classes(
    chosen: Mapping[int, int],
    component: Mapping[int, int],
    config: GovernConfig,
) -> dict[int, tuple[list[int], list[int]]]:
    """component -> its documents and queries, of the components that are classes."""
    members: dict[int, tuple[list[int], list[int]]] = defaultdict(lambda: ([], []))
    for document, part in component.items():
        members[part][0].append(document)
    for query, part in chosen.items():
        members[part][1].append(query)
    return {
        part: (sorted(documents), sorted(queries))
        for part, (documents, queries) in members.items()
        if config.min_documents <= len(documents) <= config.max_documents and len(queries) >= config.min_queries
    }
