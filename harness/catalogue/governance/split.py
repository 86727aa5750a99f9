"""Split of over-large components: the threshold of their links rises inside them until no part is too large."""

from __future__ import annotations

import ibis
from ibis import _

from harness.catalogue.governance.components import components
from harness.catalogue.governance.engine import Engine, row
from harness.catalogue.governance.rules import MILLION, ppm


def bounded(
    engine: Engine, links: ibis.Table, num_nodes: int, most: int, least: float, step: float
) -> tuple[ibis.Table, dict[str, int]]:
    """document, component of every end of `links`, in components of at most `most` documents.

    A component that relations hold together stays as large as it is.

    Args:
        engine: runs it.
        links: a, b and overlap in millionths.
        num_nodes: bound of the nodes.
        most: documents of a component.
        least: overlap from which the links count; step: by which it rises.

    Returns:
        The table, and figures: components (of two documents or more), largest, split (components that were too large).
    """
    label = components(engine, "components", links, num_nodes)
    sizes = label.group_by("component").agg(n=_.count())
    found = row(sizes.agg(components=_.count(), largest=_.n.max(), split=_.count(where=_.n > most)))
    figures = {name: int(value or 0) for name, value in found.items()}
    done: list[ibis.Table] = []
    threshold, too_large = ppm(least), figures["split"]
    while too_large and threshold < MILLION + ppm(step):
        threshold += ppm(step)
        name = f"split-{threshold}"
        large = engine.keep(f"{name}-large", label.group_by("component").agg(n=_.count()).filter(_.n > most))
        done.append(label.anti_join(large, "component"))
        inner = engine.keep(f"{name}-inner", label.semi_join(large, "component").select("document"))
        inside = links.filter(_.overlap >= threshold).semi_join(inner, [("a", "document")])
        parts = components(engine, name, inside, num_nodes).rename(node="document")
        label = inner.left_join(parts, [("document", "node")])
        label = label.select("document", component=ibis.coalesce(_.component, _.document))
        label = engine.keep(f"{name}-label", label)
        sizes = label.group_by("component").agg(n=_.count())
        too_large = row(sizes.agg(n=_.count(where=_.n > most)))["n"]
    return engine.keep("labels", ibis.union(*done, label) if done else label), figures
