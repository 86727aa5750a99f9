"""Rules on the edges between queries and documents, as relational queries. Every number is an int64: shares, supports
and cosines are millionths, so that sums have no order and both engines agree.

A query votes for its best documents; it also links its best document with the others that it clicks almost as strongly.
Components of well supported links are classes of documents, and a query joins the class that most of its weight falls
into. One wrong click then joins no two classes. The rules are ours; support as a lower confidence bound of clicks by
exposure: Wilson, "Probable inference", JASA 1927.
"""

from __future__ import annotations

from typing import Any

import ibis
from ibis import _

from harness.catalogue.governance.config import GovernConfig

MILLION = 10**6
TRUSTED = 2 * MILLION  # overlap of a relation: above any threshold
# Rules that drop an edge, in the order in which they are tried; an edge has the place of its rule, 0 for none.
RULES = ("", "bot", "support", "similarity", "hot", "share", "common", "overlap", "split", "vote")
BOT, SUPPORT, SIMILARITY, HOT, SHARE, COMMON, OVERLAP, SPLIT, VOTE = range(1, len(RULES))


def ppm(share: float) -> int:
    """A share in millionths."""
    return round(share * MILLION)


def total(column: Any, where: Any = None) -> Any:
    """Sum as int64. DuckDB's own type of a sum becomes a float in Parquet; Ibis leaves out a cast to int64 only."""
    return column.sum(where=where).cast("decimal(38, 0)").cast("int64")


def pairs(rows: ibis.Table) -> ibis.Table:
    """query, document, clicks, impressions, rows of the rows without a reason; rows that are equal in all are one."""
    names = ["query", "document", "clicks", "impressions", "time", "position"]
    distinct = rows.filter(_.reason == "").select(names).distinct()
    return distinct.group_by("query", "document").agg(
        clicks=total(_.clicks), impressions=total(_.impressions), rows=_.count()
    )


def support(clicks: Any, impressions: Any, deviations: float) -> Any:
    """Wilson's lower bound of clicks / impressions in millionths; impressions > 0."""
    n, square = impressions.cast("float64"), deviations**2
    rate = clicks.cast("float64") / n
    spread = (rate * (1.0 - rate) / n + square / (4.0 * n * n)).sqrt() * deviations
    lower = (rate + square / (2.0 * n) - spread) / (1.0 + square / n)
    return ibis.greatest(0, (lower * 1e6 + 0.5).floor().cast("int64"))


def edges(pairs: ibis.Table, config: GovernConfig) -> ibis.Table:
    """query, document, clicks, impressions, support, documents (of the query), bot of the clicked pairs."""
    clicked = pairs.filter(_.clicks > 0)
    names = ("query", "document", "clicks", "impressions")
    found = clicked.select(
        *names,
        support=support(_.clicks, _.impressions, config.confidence),
        documents=_.document.count().over(ibis.window(group_by="query")),
    )
    return found.mutate(bot=_.documents > config.max_documents_per_query)


def hot(edges: ibis.Table, config: GovernConfig) -> ibis.Table:
    """The documents that too many queries click beside all kinds of others.

    A query's rival of a document is the best other one, where it has no less support. A document is hot where more than
    --hot-share of its queries have a rival, and these are at least --hot-documents in effect: n rivals count as many as
    n that are equally frequent would (inverse Simpson index), so that the few other documents of its own product are
    few however often they are clicked.
    """
    window = ibis.window(group_by="query", order_by=[_.support.desc(), _.document])
    ranked = edges.filter(~_.bot).select(
        "document",
        "support",
        first=_.document.first().over(window),
        next=_.document.lead(1).over(window),
        next_support=_.support.lead(1).over(window),
    )
    tied = ibis.ifelse(_.next_support == _.support, _.next, ibis.null("int64"))
    ranked = ranked.select("document", rival=ibis.ifelse(_.first == _.document, tied, _.first))
    counts = ranked.group_by("document", "rival").agg(n=_.count())
    beaten = ibis.ifelse(_.rival.isnull(), 0, _.n)
    sums = counts.group_by("document").agg(queries=total(_.n), beaten=total(beaten), squares=total(beaten * beaten))
    many = (_.beaten > 0) & (_.beaten * _.beaten >= config.hot_documents * _.squares)
    return sums.filter(many, _.beaten * MILLION > _.queries * ppm(config.hot_share)).select("document")


def judged(edges: ibis.Table, hot: ibis.Table, config: GovernConfig) -> ibis.Table:
    """The edges, whether they are hot, and the first rule of bot and support that drops them.

    An edge is hot where its document is and its query clicks another document too.
    """
    found = edges.left_join(hot.select(hot_document=_.document), [("document", "hot_document")])
    rule = ibis.cases((_.bot, BOT), (_.support < ppm(config.min_support), SUPPORT), else_=0)
    names = ("query", "document", "clicks", "impressions", "support")
    return found.select(*names, hot=_.hot_document.notnull() & (_.documents > 1), rule=rule.cast("int64"))


def alike(passing: ibis.Table, config: GovernConfig) -> ibis.Table:
    """The edges with the first rule of similarity and hot that drops them: pictures that are alike clear a hot one."""
    unlike = _.similarity < ppm(config.min_similarity)
    rule = ibis.cases((unlike, SIMILARITY), (_.hot & _.similarity.isnull(), HOT), else_=0)
    return passing.mutate(rule=rule.cast("int64"))


def candidates(passing: ibis.Table, config: GovernConfig) -> ibis.Table:
    """The edges that no rule has dropped, with their weight, and their query's best document, its weight top, and rank.

    The weight is the support, times the cosine where there are embeddings; an edge whose ends have none counts with the
    lowest cosine that passes.

    Args:
        passing: from `alike`.
        config: the thresholds.
    """
    kept = passing.filter(_.rule == 0).drop("rule")
    weight = _.support
    if config.embeddings:
        weight = (_.support * _.similarity.fill_null(ppm(config.min_similarity))) // MILLION
    window = ibis.window(group_by="query", order_by=[_.weight.desc(), _.document])
    return kept.mutate(weight=weight.cast("int64")).mutate(
        best=_.document.first().over(window),
        top=_.weight.first().over(window),
        rank=ibis.row_number().over(window).cast("int64"),
    )


def close(config: GovernConfig) -> Any:
    """True for an edge that is almost as heavy as its query's best: it links the two documents."""
    return (_.rank > 0) & (_.weight * MILLION >= _.top * ppm(config.min_share))


def links(candidates: ibis.Table, config: GovernConfig) -> ibis.Table:
    """a < b, common, overlap: documents that queries link, how many queries, and their share of the queries of the
    document that has fewer.
    """
    asked = candidates.group_by("document").agg(n=_.count())
    linked = candidates.filter(close(config)).select(
        a=ibis.least(_.best, _.document), b=ibis.greatest(_.best, _.document)
    )
    linked = linked.group_by("a", "b").agg(common=_.count())
    linked = linked.inner_join(asked.select(a=_.document, of_a=_.n), "a")
    linked = linked.inner_join(asked.select(b=_.document, of_b=_.n), "b")
    middle = (_.of_a.cast("float64") * _.of_b.cast("float64")).sqrt()
    overlap = (_.common.cast("float64") / middle * 1e6).floor().cast("int64")
    return linked.select("a", "b", "common", overlap=overlap)


def strong(links: ibis.Table, related: ibis.Table, config: GovernConfig) -> ibis.Table:
    """a, b, overlap of the links with enough queries, and of the relations."""
    enough = links.filter(_.common >= config.min_common, _.overlap >= ppm(config.min_overlap))
    return enough.select("a", "b", "overlap").union(related.select("a", "b", overlap=ibis.literal(TRUSTED, "int64")))


def placed(candidates: ibis.Table, labels: ibis.Table) -> ibis.Table:
    """The candidates with the component of their document; one that nothing links is its own."""
    labels = labels.select(labelled=_.document, component=_.component)
    found = candidates.left_join(labels, [("document", "labelled")])
    return found.mutate(component=ibis.coalesce(_.component, _.document)).drop("labelled")


def votes(placed: ibis.Table, config: GovernConfig) -> ibis.Table:
    """query, chosen (the component that most of its weight falls into), vote (that share), valid (it is enough)."""
    sums = placed.group_by("query", "component").agg(weight=total(_.weight))
    by_query = ibis.window(group_by="query")
    ordered = ibis.window(group_by="query", order_by=[_.weight.desc(), _.component])
    sums = sums.mutate(all=_.weight.sum().over(by_query), place=ibis.row_number().over(ordered))
    vote = (_.weight * MILLION // ibis.greatest(_["all"], 1)).cast("int64")
    best = sums.filter(_.place == 0).select("query", chosen=_.component, vote=vote)
    return best.mutate(valid=_.vote >= ppm(config.min_vote))


def outside(placed: ibis.Table, votes: ibis.Table, links: ibis.Table, config: GovernConfig) -> ibis.Table:
    """The candidates that lie in no class, with the rule that kept them out."""
    best = placed.filter(_.rank == 0).select(voter=_["query"], home=_.component)
    found = placed.inner_join(votes, "query").filter(~_.valid | (_.component != _.chosen))
    found = found.inner_join(best, [("query", "voter")])
    found = found.mutate(a=ibis.least(_.best, _.document), b=ibis.greatest(_.best, _.document))
    found = found.left_join(links, ["a", "b"])
    rule = ibis.cases(
        (~_.valid | (_.rank == 0) | (_.home != _.chosen), VOTE),
        (_.weight * MILLION < _.top * ppm(config.min_share), SHARE),
        (_.common < config.min_common, COMMON),
        (_.overlap < ppm(config.min_overlap), OVERLAP),
        else_=SPLIT,
    )
    return found.select(*DROPPED[:-1], rule=rule.cast("int64"))


DROPPED = ("query", "document", "clicks", "impressions", "support", "similarity", "rule")


def dropped(judged: ibis.Table, passing: ibis.Table, outside: ibis.Table) -> ibis.Table:
    """Every edge that lies in no class, in the columns DROPPED."""
    early = judged.filter(_.rule != 0).mutate(similarity=ibis.null("int64")).select(*DROPPED)
    return early.union(passing.filter(_.rule != 0).select(*DROPPED)).union(outside)


def facts(judged: ibis.Table, placed: ibis.Table, votes: ibis.Table, labels: ibis.Table) -> ibis.Table:
    """component, edges, clicks, asked, similarity of each component that queries chose.

    edges and clicks lie inside it; asked are all clicks of its queries but those on hot documents that no cosine has
    cleared; similarity is the mean cosine of its edges.
    """
    chosen = votes.filter(_.valid).select("query", "chosen")
    labels = labels.select(labelled=_.document, component=_.component)
    names = ("query", "document", "clicks")
    counted = judged.filter(~_.hot, _.rule != BOT).select(*names).union(placed.filter(_.hot).select(*names))
    counted = counted.inner_join(chosen, "query")
    counted = counted.left_join(labels, [("document", "labelled")])
    inside = ibis.coalesce(_.component, _.document) == _.chosen
    clicks = counted.group_by(component=_.chosen).agg(clicks=total(_.clicks, inside), asked=total(_.clicks))
    edges = placed.inner_join(chosen, "query").filter(_.component == _.chosen)
    edges = edges.group_by(of=_.chosen).agg(edges=_.count(), known=_.similarity.count(), cosine=total(_.similarity))
    both = clicks.inner_join(edges, [("component", "of")])
    similarity = ibis.ifelse(_.known > 0, (_.cosine // ibis.greatest(_.known, 1)).cast("int64"), ibis.null("int64"))
    return both.select("component", "edges", "clicks", "asked", similarity=similarity)


def placements(placed: ibis.Table, votes: ibis.Table, labels: ibis.Table) -> ibis.Table:
    """kind, node, component, weight (millionths) of the queries and documents that have a component."""
    own = placed.select("document", "component").union(labels.select("document", "component")).distinct()
    documents = own.select(kind=ibis.literal("document"), node=_.document, component=_.component).mutate(
        weight=ibis.literal(MILLION, "int64")
    )
    queries = votes.filter(_.valid).select(
        kind=ibis.literal("query"), node=_["query"], component=_.chosen, weight=_.vote
    )
    return documents.union(queries)


def lost(dropped: ibis.Table) -> ibis.Table:
    """kind, node, rule of each node with an edge in `dropped`: the rule of the edge that came furthest."""
    ends = [
        dropped.select(kind=ibis.literal(kind), node=dropped[kind], rule=dropped.rule) for kind in ("query", "document")
    ]
    return ends[0].union(ends[1]).group_by("kind", "node").agg(rule=_.rule.max())
