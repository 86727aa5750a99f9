"""Page of classes made of clicks: dropped edges and their reasons, sizes, sample classes, suspected noise.

It asks the files of classes/ by relational queries and shows a bounded number of pictures, whatever the catalogue's
size.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import duckdb

from harness.catalogue.catalogue import Catalogue
from harness.core.files import write_json, write_whole
from harness.core.page import Thumbnail, render, thumbnail
from harness.evaluate.contact_sheet import picture

STRIPS, DOCUMENTS, PHOTOS = 8, 2, 6  # classes of a list, and their documents and photos that are shown
NOISE = 6  # dropped edges of a rule that are shown
LEAST_CLICKS = 5  # of a class that counts among the purest: a single click is always pure
VIEWS = ("classes", "facts", "members", "dropped_edges", "quarantine", "history")

_SIZED = """
create view sized as select c.class_id, c.class_key, c.query_members as photos, c.document_members as documents,
    photos + documents as size, f.edges, f.clicks, f.purity, f.similarity
from classes as c left join facts as f using (class_id)
"""
_SIZES = """
select if(size < 3, size::varchar, ((bound / 2)::bigint + 1) || '-' || bound) as name, count(*) as classes
from (select size, pow(2, ceil(log2(size)))::bigint as bound from sized) group by name order by min(size)
"""
# Spread evenly from the largest weight to the smallest: a wrong photo is seldom among the first.
_MEMBERS = """
with own as (select sample_id, kind, weight, if(kind = 'document', {documents}, {photos}) as shown,
    row_number() over (partition by kind order by weight desc, sample_id) - 1 as place,
    count(*) over (partition by kind) as n from members where class_id = {class_id})
select sample_id, kind, weight from own where place = 0 or place * shown // n > (place - 1) * shown // n
order by kind, weight desc, sample_id
"""
_NOISE = """
with worst as (select * from dropped_edges
    qualify row_number() over (partition by reason, query order by clicks desc, document) = 1)
select * from worst qualify row_number() over (partition by reason order by clicks desc, query) <= {edges}
order by reason, clicks desc, query
"""
RULES = {
    "bot": "the photo clicks too many documents",
    "support": "few clicks for its impressions",
    "similarity": "the pictures differ",
    "hot": "the document is clicked beside all kinds of others",
    "share": "weaker than the photo's best edge",
    "common": "too few photos lead to both documents",
    "overlap": "few of the documents' photos lead to both",
    "split": "the class was too large",
    "vote": "the photo leads to several classes",
}
# Name on the page -> condition, order.
LISTS = {
    "Largest classes": ("true", "size desc, class_id"),
    "Purest classes": (f"clicks >= {LEAST_CLICKS}", "purity desc, clicks desc, class_id"),
    "Most doubtful classes": ("size > 1", "purity, coalesce(similarity, 0), clicks desc, class_id"),
}


def write_report(catalogue: Catalogue, folder: Path, governance: Mapping[str, Any]) -> None:
    """Writes report.html and report.json.

    Args:
        catalogue: has the pictures.
        folder: classes/, or where it is being made, with its tables.
        governance: content of its governance.json.
    """
    base = duckdb.connect()
    try:
        base.execute("set enable_progress_bar = false")
        for name in VIEWS:
            file = str(folder / f"{name}.parquet").replace("'", "''")
            base.execute(f"create view {name} as from read_parquet('{file}')")
        base.execute(_SIZED)
        report = _Report(catalogue, base)
        facts = {**governance, **report.facts()}
        lists = {"Sample classes": report.spread()}
        for name, (condition, order) in LISTS.items():
            lists[name] = report.strips(condition, order)
        noise = report.noise()
    finally:
        base.close()
    for name, strips in lists.items():
        facts[name.lower().replace(" ", "_")] = [_numbers(strip) for strip in strips]
    facts["suspected_noise"] = [_numbers(edge) for edge in noise]
    write_json(folder / "report.json", facts)
    title = f"Classes of {catalogue.meta.get('name', catalogue.path.name)}"
    shown = {"facts": facts, "lists": lists, "noise": noise, "notes": notes(facts), "rules": RULES}
    page = render(PAGE, title=title, path=str(catalogue.path), **shown)
    write_whole(folder / "report.html", page)


def notes(facts: Mapping[str, Any]) -> list[tuple[str, bool]]:
    """Notes to read before training, each with True where it is good news."""
    found, edges = [], facts["edges"]
    dropped = sum(count for name, count in edges.items() if name != "kept")
    if dropped > edges.get("kept", 0):
        found.append(f"{dropped:,} of {dropped + edges.get('kept', 0):,} edges were dropped: most clicks are not used")
    largest = facts["largest_class"]
    members = largest["query_members"] + largest["document_members"]
    if members > max(50, 0.02 * (facts["queries"] + facts["documents"])):
        found.append(
            f"The largest class has {members:,} of {facts['queries'] + facts['documents']:,} samples: look at it"
        )
    if facts["quarantined_samples"] > facts["queries"] + facts["documents"]:
        found.append(f"{facts['quarantined_samples']:,} samples are in no class, more than are in one")
    if facts["impure_classes"]:
        found.append(
            f"{facts['impure_classes']:,} of {facts['num_classes']:,} classes get less than 0.8 of their photos' clicks"
        )
    return [(note, False) for note in found] or [("Nothing stands out.", True)]


class _Report:
    """Answers of the tables, with pictures; each picture is read once.

    Args:
        catalogue: has the pictures.
        base: a connection with VIEWS and `sized`.
    """

    def __init__(self, catalogue: Catalogue, base: duckdb.DuckDBPyConnection) -> None:
        self.catalogue, self.base = catalogue, base
        self._known: dict[int, tuple[Thumbnail, str]] = {}

    def ask(self, query: str) -> list[dict[str, Any]]:
        """Rows of an SQL query."""
        answer = self.base.execute(query)
        names = [column[0] for column in answer.description or ()]
        return [dict(zip(names, row, strict=True)) for row in answer.fetchall()]

    def facts(self) -> dict[str, Any]:
        """Figures that governance.json lacks."""
        reasons = (
            "select reason, count(*) as samples from quarantine group by reason order by samples desc, reason limit 20"
        )
        (counts,) = self.ask("select count_if(purity < 0.8) as impure_classes from sized")
        sizes = {row["name"]: row["classes"] for row in self.ask(_SIZES)}
        quarantined = {row["reason"]: row["samples"] for row in self.ask(reasons)}
        return {**counts, "class_sizes": sizes, "quarantined": quarantined}

    def spread(self) -> list[dict[str, Any]]:
        """Classes spread evenly from the largest to the smallest."""
        (row,) = self.ask("select count(*) as n from sized")
        places = sorted({i * (row["n"] - 1) // max(1, STRIPS - 1) for i in range(STRIPS)})
        chosen = ", ".join(map(str, places))
        order = "size desc, class_id"
        return self.strips(f"true qualify row_number() over (order by {order}) - 1 in ({chosen})", order)

    def strips(self, condition: str, order: str) -> list[dict[str, Any]]:
        """The first classes in an order: figures and pictures, documents first."""
        classes = self.ask(f"select * from sized where {condition} order by {order} limit {STRIPS}")
        for strip in classes:
            members = self.ask(_MEMBERS.format(class_id=strip["class_id"], documents=DOCUMENTS, photos=PHOTOS))
            strip["samples"] = [row["sample_id"] for row in members]
            strip["pictures"] = [self._member(row) for row in members]
        return classes

    def noise(self) -> list[dict[str, Any]]:
        """Dropped edges of most clicks, some of each rule, each of another query."""
        edges = self.ask(_NOISE.format(edges=NOISE))
        for edge in edges:
            edge["pictures"] = [self._picture(edge[kind]) for kind in ("query", "document")]
        return edges

    def _member(self, row: Mapping[str, Any]) -> tuple[Thumbnail, str, bool]:
        image, name = self._picture(row["sample_id"])
        document = row["kind"] == "document"
        return image, name if document else f"{name} · {row['weight']:.2f}", document

    def _picture(self, sample_id: int) -> tuple[Thumbnail, str]:
        if sample_id not in self._known:
            (row,) = self.catalogue.rows([sample_id], ["title", "item"])
            image = thumbnail(picture(self.catalogue, sample_id))
            self._known[sample_id] = (image, row["title"] or row["item"])
        return self._known[sample_id]


def _numbers(row: Mapping[str, Any]) -> dict[str, Any]:
    return {name: value for name, value in row.items() if name != "pictures"}


PAGE = """\
{% extends 'base' %}
{% from 'macros' import figures, bars, picture %}
{% macro two(value) %}{{ '-' if value is none else '%.2f' | format(value) }}{% endmacro %}
{% block content %}
<h1>{{ title }}</h1>
<p class="soft small">{{ path }}. Classes are made of clicks: photos that lead to the same documents are of one
class.</p>

<section>
<h2>Before training</h2>
<ul class="notes">{% for note, good in notes %}<li{% if good %} class="good"{% endif %}>{{ note }}</li>{% endfor %}</ul>
{{ figures([('classes', facts.num_classes), ('photos', facts.queries), ('documents', facts.documents),
  ('classes with few photos', facts.tail_classes), ('samples in no class', facts.quarantined_samples),
  ('mean purity', two(facts.purity))]) }}
<p class="soft small">Purity: share of the clicks of a class's photos that fall into the class.</p>
</section>

<section>
<h2>Class sizes</h2>
<div class="two">{% if facts.before is defined %}<div><h3>Before: everything connected by clicks</h3>
{{ bars(facts.before.sizes) }}
<p class="soft small">The largest has {{ facts.before.largest }} samples.</p></div>{% endif %}
<div><h3>{% if facts.before is defined %}After{% else %}Samples of a class{% endif %}</h3>{{ bars(facts.class_sizes) }}
<p class="soft small">The largest has {{ facts.largest_class.query_members + facts.largest_class.document_members }}
samples.</p></div></div>
</section>

<section>
<h2>Dropped, and why</h2>
<div class="two">{% for name, counts in (('Rows of the log', facts.rows), ('Edges of photo and document', facts.edges),
  ('Samples in no class', facts.quarantined), ('Classes since the previous run', facts.history)) %}
<div><h3>{{ name }}</h3>{% if counts %}{{ bars(counts) }}{% else %}<p>None.</p>{% endif %}</div>{% endfor %}</div>
<p class="soft small">The rules and their parameters: docs/governance.md. <code>dropped_edges.parquet</code>,
<code>rejected_clicks.parquet</code> and <code>quarantine.parquet</code> have every row.</p>
</section>

{% for name, strips in lists.items() %}
<section>
<h2>{{ name }}</h2>
{% if loop.first %}<p class="soft small">From the largest to the smallest. Documents have a dark frame; the number under
a photo is the share of its clicks that fall into the class.</p>{% endif %}
{% for strip in strips %}
<div class="group"><b>{{ strip.class_key }}</b>
<span class="soft small">photos {{ strip.photos }} · documents {{ strip.documents }} · clicks {{ strip.clicks or 0 }} ·
purity {{ two(strip.purity) }}{% if strip.similarity is not none %} · similarity {{ two(strip.similarity) }}{% endif %}
</span>
<div class="strip">{% for uri, caption, document in strip.pictures %}
{{ picture(uri, caption, 'asked' if document else '') }}{% endfor %}</div></div>
{% else %}<p>None.</p>{% endfor %}
</section>
{% endfor %}

<section>
<h2>Suspected noise</h2>
<p class="soft small">Dropped edges with the most clicks, some of each rule: the photo, and the document clicked. Not
all of them are wrong.</p>
{% for rule, edges in noise | groupby('reason') %}
<h3>{{ rule }}{% if rule in rules %}: {{ rules[rule] }}{% endif %}</h3>
<div class="strip">{% for edge in edges %}<div><div class="strip">{% for uri, caption in edge.pictures %}
{{ picture(uri, caption, 'asked' if loop.first else 'wrong') }}{% endfor %}</div>
<p class="soft small">clicks {{ edge.clicks }} of impressions {{ edge.impressions }}
{%- if edge.similarity is not none %}, similarity {{ two(edge.similarity) }}{% endif %}</p></div>{% endfor %}</div>
{% else %}<p>None: every edge was kept.</p>{% endfor %}
</section>
{% endblock %}
"""
