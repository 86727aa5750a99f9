"""Page of an evaluation: worst queries with what they found, reasons, products most confused, recall by slice."""

from __future__ import annotations

import itertools
from typing import Any

from harness.core.page import Thumbnail, render, thumbnail
from harness.evaluate.contact_sheet import picture
from harness.evaluate.evaluation import COUNTS, Evaluation, Report
from harness.evaluate.explain import COLOURS, Why, attention_picture
from harness.evaluate.failures import Failures, Miss
from harness.evaluate.slice_rows import largest
from harness.evaluate.tasks.task import Found

WORST = 24  # queries that are shown
SLICES = 20  # values of a slice that are shown
SHOWN = ("recall_at_1", "recall_at_5", "recall_at_10", "map", "ndcg_at_10", "mrr", "accuracy", "macro_f1")


def draw_report(report: Report, evaluation: Evaluation, title: str) -> str:
    """The page of a report with failures; on the first rank, which reads the pictures."""
    pages = _Pictures(evaluation)
    tasks = [_task(name, found, evaluation, pages, report.why) for name, found in report.found.items()]
    samples = [
        _sample(query, best[0], report.why, pages)
        for query, best, _ in report.panel
        if best[:1] and best[0] in report.why
    ]
    return render(PAGE, title=title, catalogue=str(evaluation.catalogue.path), tasks=tasks, samples=samples)


class _Pictures:
    """Thumbnails and texts of samples by their ids in the evaluation, distractors included."""

    def __init__(self, evaluation: Evaluation) -> None:
        self._evaluation = evaluation
        self._known: dict[int, tuple[Thumbnail, str, str]] = {}

    def __call__(self, number: int) -> tuple[Thumbnail, str, str]:
        """Thumbnail, title or id, and product of a sample."""
        if number not in self._known:
            catalogue, sample = self._evaluation.catalogue, number
            for side in self._evaluation.documents[1:]:
                first = int(side.ids[0] - side.sample_ids[0]) if len(side.ids) else 0
                if first <= number < first + side.catalogue.num_samples:
                    catalogue, sample = side.catalogue, number - first
            (row,) = catalogue.rows([sample], ["title", "item", "class_key"])
            image = picture(catalogue, sample, self._evaluation.embedder.data.preprocess.background)
            self._known[number] = (thumbnail(image), row["title"] or row["item"], row["class_key"] or "no product")
        return self._known[number]

    def because(self, number: int, why: Why) -> dict[str, Any]:
        """Explanation of one of the catalogue's own documents: its picture by attention, if there is any, the parts as
        (name, share, weight, width of a bar in 0 to 100, colour), and a caption.
        """
        spec = self._evaluation.embedder.data.preprocess
        shown, title, _ = self(number)
        if why.attention is not None:
            image = picture(self._evaluation.catalogue, number, spec.background)
            shown = thumbnail(attention_picture(image, why.attention, spec))
        positive = sum(max(0.0, share) for share in why.shares.values()) or 1.0
        parts = [
            (name, f"{share:.0%}", f"{why.weights[name]:.2f}", round(100 * max(0.0, share) / positive, 1), colour)
            for (name, share), colour in zip(why.shares.items(), itertools.cycle(COLOURS), strict=False)
        ]
        return {"picture": shown, "looks": why.attention is not None, "parts": parts, "caption": f"{why} · {title}"}


def _sample(query: int | str, document: int, why: dict[int, Why], pages: _Pictures) -> dict[str, Any]:
    """A query of the panel, its first document and the explanation of that."""
    asked = (None, query) if isinstance(query, str) else pages(query)[:2]
    return {"asked": asked, "found": pages(document), **pages.because(document, why[document])}


def _task(name: str, found: Found, evaluation: Evaluation, pages: _Pictures, why: dict[int, Why]) -> dict[str, Any]:
    """Parts of a task that the template shows."""
    figures = [
        (metric.replace("_", " "), f"{found.figures[metric]:.3f}") for metric in SHOWN if metric in found.figures
    ]
    counts = [(metric.replace("_", " "), int(found.figures[metric])) for metric in COUNTS if metric in found.figures]
    rows = [row for row in found.rows if "recall_at_1" in row]
    return {
        "name": name,
        "figures": [*figures, *counts],
        "slices": largest(rows, SLICES),
        "failures": found.failures,
        "bars": [] if found.failures is None else _bars(found.failures),
        "worst": []
        if found.failures is None
        else [_miss(miss, name, evaluation, pages, why) for miss in found.failures.worst],
        "confused": [] if found.failures is None else _confused(found.failures, pages),
    }


def _bars(failures: Failures) -> list[dict[str, Any]]:
    """Bars of the two histograms, heights 0 to 100."""
    most = max(1, *failures.right_scores, *failures.wrong_scores)
    pairs = zip(failures.edges, failures.right_scores, failures.wrong_scores, strict=False)
    return [
        {
            "from": f"{edge:.3f}",
            "right": round(100 * right / most, 1),
            "wrong": round(100 * wrong / most, 1),
            "n": (right, wrong),
        }
        for edge, right, wrong in pairs
    ]


def _miss(miss: Miss, name: str, evaluation: Evaluation, pages: _Pictures, why: dict[int, Why]) -> dict[str, Any]:
    """A query, the document that it should find, those that it found, and explanations of all these documents."""
    tasks = {task.name: task for task in (*evaluation.tasks, *evaluation.final_tasks)}
    texts = getattr(getattr(tasks[name], "queries", None), "texts", None)
    found = []
    for number, score, right in miss.best:
        uri, title, product = pages(number)
        found.append((uri, f"{score:.3f} {title} · {product}", "right" if right else "wrong"))
    asked = (None, texts[miss.query]) if texts is not None else pages(miss.query)[::2]
    answer = None if miss.answer is None else pages(miss.answer)
    documents = [] if miss.answer is None else [miss.answer]
    documents += [number for number, _, _ in miss.best]
    return {
        "asked": asked,
        "place": miss.rank + 1,
        "answer": answer,
        "found": found,
        "because": [pages.because(number, why[number]) for number in documents if number in why],
    }


def _confused(failures: Failures, pages: _Pictures) -> list[dict[str, Any]]:
    return [
        {"asked": pages(pair.query), "found": pages(pair.document), "queries": pair.queries, "of": pair.of}
        for pair in failures.confused
    ]


PAGE = """\
{% extends 'base' %}
{% from 'macros' import figures, picture %}
{% macro explained(because) %}
<figure><div class="box"><img src="{{ because.picture }}" alt="" title="{{ because.caption }}"></div>
<div class="stack">{% for _, _, _, width, colour in because.parts %}
<i style="width: {{ width }}%; background: {{ colour }}"></i>{% endfor %}</div>
<figcaption>{{ because.caption }}</figcaption></figure>
{% endmacro %}
{% block content %}
<h1>{{ title }}</h1>
<p class="soft small">Catalogue {{ catalogue }}</p>
{% for task in tasks %}
<section>
<h2>{{ task.name }}</h2>
{{ figures(task.figures) }}
{% for slice, rows, left_out in task.slices %}
<h3>Recall by {{ slice }}</h3>
<div class="wide"><table><tr><th>{{ slice }}</th><th class="n">queries</th><th class="n">recall@1</th>
<th class="n">recall@5</th><th class="n">recall@10</th></tr>
{% for row in rows %}
<tr><td>{{ row.value }}</td><td class="n">{{ row.queries }}</td>{% for k in (1, 5, 10) %}
<td class="n">{{ '%.3f' | format(row['recall_at_' ~ k]) }}</td>
{% endfor %}</tr>
{% endfor %}</table></div>
{% if left_out %}<p class="soft small">The {{ rows | length }} largest; {{ left_out }} smaller ones are not shown.</p>
{% endif %}
{% endfor %}
</section>
{% if loop.first and samples %}
<section>
<h2>Why documents are found</h2>
<p class="soft small">Shares of the parts in a document's vector add up to 100 %; behind them the weights that the parts
were added with.{% if samples[0].looks %} Third picture: the document as the model sees it; the darker a patch, the less
its text looked at it.{% endif %}</p>
{% for sample in samples %}
<div class="group sample"><div class="strip">
{{ picture(sample.asked[0], 'query · ' ~ sample.asked[1], 'asked', sample.asked[1]) }}
{{ picture(sample.found[0], 'first · ' ~ sample.found[1]) }}
{% if sample.looks %}{{ picture(sample.picture, 'patches its text looked at') }}{% endif %}
</div><div class="bars">{% for name, share, weight, width, colour in sample.parts %}
<span>{{ name }}</span><span><i style="width: {{ width }}%; background: {{ colour }}"></i></span>
<span class="n">{{ share }} <span class="soft">({{ weight }})</span></span>{% endfor %}</div></div>
{% endfor %}
</section>
{% endif %}
{% if task.failures %}
{% set f = task.failures %}
<section>
<h2>Score of the first document</h2>
<p class="small">{{ f.answered }} queries<span class="key right">right first</span>
<span class="key wrong">wrong first ({{ f.wrong }})</span></p>
<svg viewBox="0 0 {{ task.bars | length * 20 }} 104" preserveAspectRatio="none" style="height: 150px" role="img"
 aria-label="Scores of right and wrong first documents">
{% for bar in task.bars %}
<rect x="{{ loop.index0 * 20 + 1 }}" y="{{ 102 - bar.right }}" width="9" height="{{ bar.right }}" fill="#28a03c">
<title>from {{ bar.from }}: {{ bar.n[0] }} right</title></rect>
<rect x="{{ loop.index0 * 20 + 10 }}" y="{{ 102 - bar.wrong }}" width="9" height="{{ bar.wrong }}" fill="#b4b9c2">
<title>from {{ bar.from }}: {{ bar.n[1] }} wrong</title></rect>
{% endfor %}
<rect x="0" y="102" width="{{ task.bars | length * 20 }}" height="1" fill="#dfe3ea"/>
</svg>
<p class="soft small" style="display: flex; justify-content: space-between">
<span>{{ '%.2f' | format(f.edges[0]) }}</span><span>cosine</span><span>{{ '%.2f' | format(f.edges[-1]) }}</span></p>
</section>

{% if task.confused %}
<section>
<h2>Products most confused</h2>
<div class="two">
{% for pair in task.confused %}
<div class="group"><b>{{ pair.asked[2] }}</b> finds <b>{{ pair.found[2] }}</b>
<span class="soft small">{{ pair.queries }} of {{ pair.of }} queries</span>
<div class="strip">{{ picture(pair.asked[0], 'query · ' ~ pair.asked[2], 'asked') }}
{{ picture(pair.found[0], pair.found[1] ~ ' · ' ~ pair.found[2], 'wrong') }}</div></div>
{% endfor %}
</div>
</section>
{% endif %}

<section>
<h2>Worst queries</h2>
{% if task.worst %}
<p class="soft small">{{ task.worst | length }} of {{ f.wrong }} queries whose first document is wrong, the worst first.
Dark frame: the query; then a right document; then what was found.</p>
{% for miss in task.worst %}
<div class="group"><span class="soft small">first right document at place {{ miss.place }}</span>
<div class="strip">
{{ picture(miss.asked[0], 'query · ' ~ miss.asked[1], 'asked', miss.asked[1]) }}
{% if miss.answer %}
{{ picture(miss.answer[0], 'right · ' ~ miss.answer[1] ~ ' · ' ~ miss.answer[2], 'right') }}{% endif %}
{% for uri, caption, frame in miss.found %}{{ picture(uri, caption, frame) }}{% endfor %}
</div>
{% if miss.because %}<details class="small"><summary>Why these documents</summary>
<div class="strip">{% for because in miss.because %}{{ explained(because) }}{% endfor %}</div></details>{% endif %}
</div>
{% endfor %}
{% else %}<p>None: every query finds a right document first.</p>{% endif %}
</section>
{% endif %}
{% endfor %}
{% endblock %}
"""
