"""`shelfmark report`: Show a catalogue before training: counts, duplicates, sample pictures, as one HTML page."""

from __future__ import annotations

import tempfile
import time
from collections import defaultdict
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from harness.catalogue.catalogue import Catalogue
from harness.catalogue.images import MOST_BYTES, MOST_PIXELS, Rejected, load_image
from harness.catalogue.paths import find_image
from harness.catalogue.pixels import on_background, open_picture, upright
from harness.catalogue.survey import Survey
from harness.catalogue.wholeness import require_whole
from harness.core.files import require_writable
from harness.core.page import Thumbnail, render, save, thumbnail
from harness.evaluate.contact_sheet import picture
from models.ranges import NonNegativeInt

EXAMPLE = "shelfmark report catalogues/products --out report.html"
GROUPS, MEMBERS = 12, 5  # of duplicates that are shown, and pictures of each
STRIPS, PHOTOS = 10, 6  # products that are shown, and photos of each
REFUSED = 16  # rows of the quarantine that are shown
LEAST_SIDE, TINY_SHARE = 64, 0.05  # pixels of a long side, and share of pictures below it that is worth a note
# Category of ingest's reason -> what it means and what to do.
PLAIN = {
    "missing file": "The file does not exist in the image folder. Check the path, or ingest's --images.",
    "image URL": "The table has a URL. Download the images first.",
    "path leads out of the image folder": "The path leads out of the image folder. Check the path.",
    "not a file": "The path names a folder, or another thing that is not a file.",
    "empty file": "The file has no bytes. Copy it again.",
    "too many bytes": "The file is larger than --max-bytes allows.",
    "too many pixels": "The picture is larger than --max-pixels allows.",
    "cannot be read": "The system refused to read the file. Check its permissions.",
    "truncated or damaged": "The file ends early or is damaged. Copy it again.",
    "not an image of a known format": "The file is not an image.",
    "unsupported pixels": "The pixels have no agreed meaning. Save the picture with 8 bits a channel.",
    "no image path": "The row names no image.",
    "no item id": "The row has no id.",
    "unknown kind": "The kind is neither query nor document.",
    "text too long": "A text is longer than a catalogue takes.",
    "not UTF-8": "A text is not UTF-8. Give ingest's --encoding.",
    "not text": "A cell holds something that is not text.",
}


@dataclass(frozen=True, kw_only=True)
class ReportConfig:
    """Writes a page about a catalogue, before or after `shelfmark govern`: one HTML file, pictures included.

    It counts photos and documents by split and product, and shows image sizes, lengths of texts, sample pictures,
    copies of one picture in several splits or products, and the rows that ingest refused.

    Args:
        catalogue: the catalogue folder.
        out: HTML file to write.
        pictures: pictures that are decoded to find near duplicates; half of them are photos that are not trained on,
            where there are as many. 0 finds exact copies only.
    """

    catalogue: Path = field(kw_only=False)
    out: Path = Path("report.html")
    pictures: NonNegativeInt = 20_000


def run(config: ReportConfig) -> dict[str, Any]:
    """Writes the page; returns its figures.

    Raises:
        UserError: no catalogue there, it is damaged, or the page cannot be written.
    """
    started = time.perf_counter()
    require_writable(config.out, "--out")
    catalogue = Catalogue(config.catalogue)
    require_whole(catalogue)
    with tempfile.TemporaryDirectory(prefix="shelfmark-report-") as folder:
        survey = Survey(catalogue, Path(folder), config.pictures)
        try:
            facts = survey.facts()
            page = _draw(config, survey, facts)
        finally:
            survey.close()
    save(config.out, page, "--out")
    for note, _ in notes(facts, config.catalogue):
        print(f"  {note}")
    return {**facts, "seconds": round(time.perf_counter() - started, 3)}


def notes(facts: dict[str, Any], path: Path) -> list[tuple[str, bool]]:
    """Notes to read before training, the gravest first, each with True where it is good news."""
    products, texts, found = facts["products"], facts["texts"], []
    asked = {row["split"] for row in facts["splits"] if row["photos"]}
    for name, how in (("exact", "Copies"), ("near", "Near copies")):
        copies = facts[f"{name}_duplicates"]
        if copies["leaked_photos"]:
            found.append(
                f"{how} of {_count(copies['leaked_photos'], 'photo')} outside of split {facts['trained_split']} are "
                "trained on: their recall says nothing about new photos"
            )
        if copies["across_products"]:
            found.append(f"{how} of {_count(copies['across_products'], 'picture')} belong to several products each")
    if products["products"] and not products["with_both"]:
        found.append("No product has both a photo and a document: there is nothing to train on")
    if products["without_photo"]:
        found.append(
            f"{products['without_photo']:,} of {_count(products['products'], 'product')} without a photo: a search can "
            "find them, but training leaves them out"
        )
    if products["without_document"]:
        found.append(
            f"{_count(products['without_document'], 'product')} without a document: their photos can find nothing"
        )
    if facts["samples_without_product"]:
        found.append(f"{_count(facts['samples_without_product'], 'sample')} without a product")
    if asked and asked <= {facts["trained_split"], "all"}:
        found.append("No photos are kept for validation or test: give the table a column `split`")
    if facts["documents"] and facts["shared_titles"] > 0.1 * facts["documents"]:
        found.append(
            f"{_count(facts['shared_titles'], 'document')} with the title of another product: titles tell them apart "
            "poorly"
        )
    if facts["documents"] and texts["title"]["empty"]:
        found.append(f"{_count(texts['title']['empty'], 'document')} without a title")
    tiny = sum(count for bar, count in facts["image_sizes"]["long_side"].items() if bar in ("0-31", "32-63"))
    if tiny > TINY_SHARE * facts["samples"]:
        found.append(f"{_count(tiny, 'picture')} with fewer than {LEAST_SIDE} pixels on the long side")
    if facts["quarantined"]:
        found.append(f"{_count(facts['quarantined'], 'row')} of the table refused: see below")
    if facts["near_duplicates"]["unreadable"]:
        found.append(
            f"{_count(facts['near_duplicates']['unreadable'], 'picture')} cannot be read: run "
            f"`shelfmark verify {path} --images`"
        )
    if facts["classes"] is None:
        found.append(f"Classes are missing: run `shelfmark govern {path}` before training")
    return [(note, False) for note in found] or [("Nothing stands out.", True)]


def _draw(config: ReportConfig, survey: Survey, facts: dict[str, Any]) -> str:
    catalogue = survey.catalogue
    titled = {True: "Near duplicates", False: "Exact duplicates"}
    copies = [
        {
            "title": titled[name == "near"],
            "facts": facts[f"{name}_duplicates"],
            "groups": [_group(survey, name, group) for group in survey.worst_groups(name, GROUPS)],
        }
        for name in ("exact", "near")
    ]
    return render(
        PAGE,
        title=f"Catalogue {catalogue.meta['name']}",
        path=str(config.catalogue),
        created=catalogue.meta["created"],
        facts=facts,
        notes=notes(facts, config.catalogue),
        size=_bytes(facts["image_sizes"]["bytes"]),
        copies=copies,
        strips=_strips(survey),
        lonely=_lonely(survey),
        plain=PLAIN,
        refused=_refused(survey),
    )


def _group(survey: Survey, name: str, group: dict[str, Any]) -> dict[str, Any]:
    """A group of duplicates with some of its pictures."""
    members = survey.members(name, group["number"], MEMBERS)
    shown = [
        (
            _thumbnail(survey.catalogue, row["sample_id"]),
            f"{_kind(row)} · {row['split']} · {row['class_key'] or 'no product'}",
        )
        for row in members
    ]
    return {**group, "pictures": shown, "more": group["members"] - len(shown)}


def _kind(row: dict[str, Any]) -> str:
    return "photo" if row["kind"] == "query" else "document"


def _thumbnail(catalogue: Catalogue, sample_id: int) -> Thumbnail:
    return thumbnail(picture(catalogue, sample_id))


def _strips(survey: Survey) -> list[dict[str, Any]]:
    """Products spread evenly from most to fewest photos: their documents, then their photos."""
    both = survey.one("select count(*) as n from products where photos > 0 and documents > 0")["n"]
    places = [*range(both)] if both <= STRIPS else [i * (both - 1) // (STRIPS - 1) for i in range(STRIPS)]
    products = survey.ask(
        "select class_key, photos, documents from products where photos > 0 and documents > 0 "
        "qualify list_contains(?, row_number() over (order by photos desc, first) - 1) order by photos desc, first",
        places,
    )
    strips = []
    for product in products:
        samples = survey.ask(
            "select sample_id, kind, split from samples where class_key = ? "
            "qualify row_number() over (partition by kind order by sample_id) <= if(kind = 'document', 2, ?) "
            "order by kind, sample_id",
            product["class_key"],
            PHOTOS,
        )
        ids = [row["sample_id"] for row in samples]
        titles = {row["sample_id"]: row["title"] for row in survey.catalogue.rows(ids, ["title"])}
        title = next((titles[row["sample_id"]] for row in samples if row["kind"] == "document"), "")
        pictures = [
            (
                _thumbnail(survey.catalogue, row["sample_id"]),
                f"{_kind(row)} · {row['split']}",
                row["kind"] == "document",
            )
            for row in samples
        ]
        strips.append({**product, "title": title, "pictures": pictures})
    return strips


def _lonely(survey: Survey) -> list[tuple[Thumbnail, str]]:
    """Documents of some products without a photo."""
    rows = survey.ask(
        "select first, class_key from products where photos = 0 order by hash(first), first limit ?", REFUSED // 2
    )
    return [(_thumbnail(survey.catalogue, row["first"]), row["class_key"]) for row in rows]


def _refused(survey: Survey) -> list[tuple[Thumbnail | None, str, str]]:
    """Rows that ingest refused, some of each category: picture where it can be read, path, plain reason."""
    shown: dict[str, list[dict[str, Any]]] = defaultdict(list)
    for rows in survey.quarantined():
        for row in rows:
            category = row["reason"].partition(": ")[0]
            if len(shown[category]) < REFUSED // 4 and sum(map(len, shown.values())) < REFUSED:
                shown[category].append(row)
    return [
        (_source_picture(row), row["image"], f"row {row['row']}: {row['reason']}")
        for rows in shown.values()
        for row in rows
    ]


def _source_picture(row: dict[str, Any]) -> Thumbnail | None:
    """The picture of a refused row, where its image folder is still there and the picture is whole."""
    folder = row["source"].get("images")
    if not folder or not row["image"]:
        return None
    root = Path(folder).absolute()
    try:
        data = load_image(root, find_image(root, row["image"]), MOST_BYTES, MOST_PIXELS).data
        with open_picture(data) as opened:
            return thumbnail(on_background(upright(opened), (255, 255, 255)))
    except (Rejected, OSError, ValueError):
        return None


def _count(count: int, what: str) -> str:
    return f"{count:,} {what}{'s' * (count != 1)}"


def _bytes(count: float) -> str:
    """A size in words."""
    for unit in ("bytes", "kB", "MB", "GB", "TB"):
        if count < 1000 or unit == "TB":
            return f"{count:.0f} {unit}" if unit == "bytes" else f"{count:.1f} {unit}"
        count /= 1000
    raise AssertionError


PAGE = """\
{% extends 'base' %}
{% from 'macros' import figures, bars, picture %}
{% block content %}
{% set p = facts.products %}
<h1>{{ title }}</h1>
<p class="soft small">{{ path }}, made {{ created }}. A product is a class of the catalogue; photos are its queries.</p>

<section>
<h2>Before training</h2>
<ul class="notes">{% for note, good in notes %}<li{% if good %} class="good"{% endif %}>{{ note }}</li>{% endfor %}</ul>
</section>

<section>
<h2>Counts</h2>
{{ figures([('samples', facts.samples), ('photos', facts.photos), ('documents', facts.documents),
  ('products', p.products), ('products with photo and document', p.with_both),
  ('products without a photo', p.without_photo), ('products held out from training', p.held_out),
  ('rows refused', facts.quarantined)]) }}
<div class="two"><div>
<h3>Splits</h3>
<div class="wide"><table><tr><th>split</th><th class="n">photos</th><th class="n">documents</th></tr>
{% for row in facts.splits %}
<tr><td>{{ row.split }}</td><td class="n">{{ row.photos }}</td><td class="n">{{ row.documents }}</td></tr>
{% endfor %}</table></div>
<p class="soft small">Split all belongs to every split. Training reads {{ facts.trained_split }}.</p>
</div><div>
<h3>Photos per product</h3>
{{ bars(facts.photos_per_product) }}
<p class="soft small">Median {{ p.median_photos }}, most {{ p.most_photos }}.
{{ p.with_one_trained }} products have one photo to train on.</p>
</div></div>
<h3>Classes for training</h3>
{% if facts.classes %}
<p>{{ facts.classes.num_classes }} classes, {{ facts.classes.tail_classes }} of them with fewer photos than the median.
{{ facts.classes.quarantined_classes }} products are left out of training: they have no photo in the split, no document,
or fewer than <code>govern</code> was asked for. {{ facts.classes.quarantined_samples }} samples name no product.</p>
{% else %}
<p>Missing. <code>shelfmark govern</code> makes them.</p>
{% endif %}
</section>

<section>
<h2>Sample products</h2>
<p class="soft small">{{ strips | length }} products, from most to fewest photos. Documents have a dark frame.</p>
{% for strip in strips %}
<div class="group"><b>{{ strip.title or strip.class_key }}</b>
<span class="soft small">{{ strip.class_key }} · {{ strip.photos }} photos · {{ strip.documents }} documents</span>
<div class="strip">{% for uri, caption, document in strip.pictures %}
{{ picture(uri, caption, 'asked' if document else '') }}{% endfor %}</div></div>
{% else %}<p>No product has both a photo and a document.</p>{% endfor %}
</section>

{% if lonely %}
<section>
<h2>Products without a photo</h2>
<p>{{ p.without_photo }} of {{ p.products }} products have a document only. A search can find them; training leaves them
out. Nothing is damaged.</p>
<div class="strip">{% for uri, caption in lonely %}{{ picture(uri, caption) }}{% endfor %}</div>
</section>
{% endif %}

{% for kind in copies %}
<section>
<h2>{{ kind.title }}</h2>
{% if kind.facts.compared is defined %}
<p class="soft small">{{ kind.facts.compared }} of {{ kind.facts.of }} pictures were compared (--pictures), by a 64-bit
perceptual hash and their colours: it finds pictures that were saved again or resized, and close look-alikes.</p>
{% else %}<p class="soft small">All image files were compared, byte by byte.</p>{% endif %}
{{ figures([('groups of copies', kind.facts.groups), ('pictures in them', kind.facts.samples),
  ('groups in several splits', kind.facts.across_splits), ('groups of several products', kind.facts.across_products),
  ('groups of photo and document', kind.facts.photo_is_document),
  ('photos outside of training that are trained on', kind.facts.leaked_photos)]) }}
{% for group in kind.groups %}
<div class="group">
{% if group.across_splits %}<span class="tag bad">several splits</span>{% endif %}
{% if group.across_products %}<span class="tag bad">several products</span>{% endif %}
{% if group.photo_is_document %}<span class="tag">photo is document</span>{% endif %}
<span class="soft small">{{ group.members }} pictures</span>
<div class="strip">{% for uri, caption in group.pictures %}{{ picture(uri, caption) }}{% endfor %}
{% if group.more %}<span class="soft small">and {{ group.more }} more</span>{% endif %}</div></div>
{% endfor %}
{% if kind.facts.groups > kind.groups | length %}
<p class="soft small">{{ kind.facts.groups - kind.groups | length }} more groups are not shown.</p>{% endif %}
</section>
{% endfor %}

<section>
<h2>Images</h2>
{% set s = facts.image_sizes %}
{{ figures([('smallest side, pixels', s.smallest_side), ('median long side', s.median_long_side),
  ('largest side', s.largest_side), ('in all', size)]) }}
<div class="two"><div><h3>Long side in pixels</h3>{{ bars(s.long_side) }}</div>
<div><h3>Formats, by file name</h3>{{ bars(facts.formats) }}</div></div>
</section>

<section>
<h2>Texts of the documents</h2>
<div class="two">{% for name, text in facts.texts.items() %}
<div><h3>{{ name | capitalize }}, characters</h3>{{ bars(text.lengths) }}
<p class="soft small">Median {{ text.median }}, longest {{ text.longest }}, empty {{ text.empty }}.</p></div>
{% endfor %}</div>
<p>{{ facts.shared_titles }} documents have the same title as a document of another product.</p>
</section>

<section>
<h2>Largest products</h2>
<div class="wide"><table><tr><th>product</th><th class="n">photos</th><th class="n">documents</th></tr>
{% for row in facts.largest_products %}
<tr><td>{{ row.class_key }}</td><td class="n">{{ row.photos }}</td><td class="n">{{ row.documents }}</td></tr>
{% endfor %}</table></div>
</section>

<section>
<h2>Refused rows</h2>
{% if facts.quarantine %}
<div class="wide"><table><tr><th>reason</th><th class="n">rows</th><th>meaning</th></tr>
{% for reason, count in facts.quarantine.items() %}
<tr><td>{{ reason }}</td><td class="n">{{ count }}</td><td>{{ plain.get(reason, '') }}</td></tr>
{% endfor %}</table></div>
<div class="strip">{% for uri, image, reason in refused %}{{ picture(uri, image ~ ' · ' ~ reason) }}{% endfor %}</div>
{% else %}<p>None: every row of the table is in the catalogue.</p>{% endif %}
</section>
{% endblock %}
"""
