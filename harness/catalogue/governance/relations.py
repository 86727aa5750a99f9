"""Relations of documents that a user names: the same product, variants, duplicates."""

from __future__ import annotations

import ibis
from ibis import _

from harness.catalogue.catalogue import ALL_SPLITS
from harness.catalogue.governance.clicks import open_table
from harness.catalogue.governance.config import GovernConfig
from harness.catalogue.governance.engine import Engine


def related(engine: Engine, config: GovernConfig, samples: ibis.Table) -> tuple[ibis.Table, dict[str, int]]:
    """a < b, each once, of the documents that a relation of --relation-kinds joins; and rows by result: used, unknown
    (an item that is not a document of the split), same (both are one), another kind.

    Raises:
        UserError: the table cannot be used.
    """
    if config.relations is None:
        none = samples.filter(ibis.literal(False)).select(a=_.sample_id, b=_.sample_id)
        return none, {}
    copy = engine.spill / "relations-text.parquet"
    table = open_table(config.relations, "--relations", ("item_a", "item_b", "kind"), (), copy)
    texts = {name: _[name].cast("string").strip() for name in ("item_a", "item_b", "kind")}
    rows = engine.read(table.files).select(**texts).mutate(kind=_.kind.fill_null(""))
    own = samples.filter(_.kind == "document", _.split.isin([config.split, ALL_SPLITS]))
    nodes = own.group_by("item").agg(node=_.sample_id.min())
    found = rows.left_join(nodes.select(item_a=_.item, a=_.node), "item_a").drop("item_a_right")
    found = found.left_join(nodes.select(item_b=_.item, b=_.node), "item_b").drop("item_b_right")
    wanted = _.kind.isin(config.relation_kinds) if config.relation_kinds else ibis.literal(True)
    result = ibis.cases(
        (~wanted, "another kind"), (_.a.isnull() | _.b.isnull(), "unknown"), (_.a == _.b, "same"), else_="used"
    )
    judged = engine.keep("relations", found.select("a", "b", result=result))
    counts = judged.group_by("result").agg(n=_.count()).to_pyarrow().to_pylist()
    used = judged.filter(_.result == "used").select(a=ibis.least(_.a, _.b), b=ibis.greatest(_.a, _.b)).distinct()
    return used, {entry["result"]: entry["n"] for entry in sorted(counts, key=lambda entry: entry["result"])}
