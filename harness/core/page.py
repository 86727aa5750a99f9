"""HTML pages in one file: one style, escaped texts, pictures as data URIs; no script and nothing from another host."""

from __future__ import annotations

import base64
import io
from pathlib import Path
from typing import Any

from jinja2 import DictLoader, Environment, StrictUndefined
from markupsafe import Markup
from PIL import Image

from harness.core.files import printable, write_whole, writing

EDGE = 128  # pixels of a thumbnail's longer side at most

BASE = """\
<!doctype html>
<html lang="en">
<head>
<meta charset="utf-8">
<meta name="viewport" content="width=device-width, initial-scale=1">
<meta http-equiv="Content-Security-Policy" content="default-src 'none'; img-src data:; style-src 'unsafe-inline'">
<title>{{ title }}</title>
<style>
:root { --ink: #1d2430; --soft: #667080; --line: #dfe3ea; --fill: #3f6fb5; --right: #28a03c; --wrong: #b4b9c2 }
* { box-sizing: border-box }
body { margin: 0; background: #f4f5f8; color: var(--ink); font: 15px/1.5 system-ui, "Segoe UI", Roboto, sans-serif }
main { max-width: 1080px; margin: 0 auto; padding: 24px 16px 64px }
h1 { font-size: 26px; line-height: 1.25; margin: 8px 0; overflow-wrap: anywhere }
h2 { font-size: 19px; margin: 0 0 8px } h3 { font-size: 15px; margin: 20px 0 6px }
section { background: #fff; border: 1px solid var(--line); border-radius: 8px; padding: 18px; margin: 16px 0 }
p { margin: 6px 0 } .soft { color: var(--soft) } .small { font-size: 13px } p, li, td, th { overflow-wrap: anywhere }
ul.notes { margin: 0; padding: 0; list-style: none } ul.notes li { padding: 7px 0 7px 12px; margin: 6px 0 }
ul.notes li { border-left: 4px solid #d99a1c; background: #fdf8ec } ul.notes li.good { border-color: var(--right) }
ul.notes li.good { background: #f0f9f1 } code { background: #eef0f4; border-radius: 3px; padding: 0 4px }
.figures { display: grid; grid-template-columns: repeat(auto-fill, minmax(128px, 1fr)); gap: 10px 16px; margin: 8px 0 }
.figures b { display: block; font-size: 21px; line-height: 1.3; font-variant-numeric: tabular-nums }
.figures span { color: var(--soft); font-size: 13px }
.two { display: grid; grid-template-columns: repeat(auto-fit, minmax(min(100%, 340px), 1fr)); gap: 0 32px }
.bars { display: grid; grid-template-columns: minmax(40px, max-content) 1fr max-content; gap: 3px 10px }
.bars { font-size: 13px }
.bars > * { align-self: center; min-width: 0; overflow-wrap: anywhere } .bars .n { font-variant-numeric: tabular-nums }
.bars i { display: block; height: 13px; background: var(--fill); border-radius: 2px }
.stack { display: flex; height: 7px; margin-top: 3px; border-radius: 2px; overflow: hidden } .stack i { display: block }
.sample { display: grid; grid-template-columns: repeat(auto-fit, minmax(min(100%, 260px), 1fr)); gap: 0 24px }
.sample .bars { align-content: center }
.wide { overflow-x: auto } table { border-collapse: collapse; font-size: 13px; width: 100% }
td, th { text-align: left; padding: 4px 14px 4px 0; border-bottom: 1px solid var(--line); vertical-align: top }
th { color: var(--soft); font-weight: 600 } td:first-child, th:first-child { min-width: 72px }
.n { text-align: right; font-variant-numeric: tabular-nums; white-space: nowrap }
.strip { display: flex; flex-wrap: wrap; gap: 10px; margin: 6px 0 }
.group { border-top: 1px solid var(--line); padding: 10px 0 4px } .group:first-of-type { border: 0 }
figure { margin: 0; width: 112px }
figcaption { font-size: 11.5px; line-height: 1.3; margin-top: 3px; color: var(--soft); overflow-wrap: anywhere }
figcaption { display: -webkit-box; -webkit-box-orient: vertical; -webkit-line-clamp: 3; overflow: hidden }
figure .box { height: 112px; display: flex; align-items: center; justify-content: center; background: #fff }
figure .box { border: 3px solid var(--line); border-radius: 5px; overflow: hidden; font-size: 12px; text-align: center }
figure .box { color: var(--soft) } figure img { max-width: 100%; max-height: 100% }
figure.right .box { border-color: var(--right) } figure.wrong .box { border-color: var(--wrong) }
figure.asked .box { border-color: var(--ink) }
.tag { display: inline-block; font-size: 12px; background: #eef0f4; border-radius: 10px; padding: 0 8px }
.tag { margin-right: 4px } .tag.bad { background: #fdeed0 } svg { display: block; width: 100%; height: auto }
.key::before { content: ""; display: inline-block; width: 11px; height: 11px; margin: 0 5px 0 12px }
.key.right::before { background: var(--right) } .key.wrong::before { background: var(--wrong) }
@media (max-width: 480px) { main { padding: 12px 8px 40px } section { padding: 14px 12px } figure { width: 96px }
figure .box { height: 96px } .strip { gap: 8px } h1 { font-size: 22px } }
</style>
</head>
<body>
<main>
{% block content %}{% endblock %}
</main>
</body>
</html>
"""

MACROS = """\
{% macro figures(rows) %}
<div class="figures">{% for name, value in rows %}<div><b>{{ value }}</b><span>{{ name }}</span></div>{% endfor %}</div>
{% endmacro %}

{% macro bars(counts) %}
{% set most = (counts.values() | max) or 1 %}
<div class="bars">{% for name, count in counts.items() %}
<span>{{ name }}</span><span><i style="width: {{ (100 * count / most) | round(1) }}%"></i></span>
<span class="n">{{ count }}</span>{% endfor %}
</div>
{% endmacro %}

{% macro picture(uri, caption, frame='', missing='no picture') %}
<figure class="{{ frame }}"><div class="box">
{%- if uri %}<img src="{{ uri }}" alt="" title="{{ caption }}" loading="lazy">{% else %}{{ missing }}{% endif -%}
</div><figcaption>{{ caption }}</figcaption></figure>
{% endmacro %}
"""


class Thumbnail(str):
    """A data: URI, which is no text of strangers and may be long."""


def thumbnail(image: Image.Image) -> Thumbnail:
    """A picture, at most EDGE pixels wide and high, as a data: URI of a JPEG."""
    small, file = image.copy(), io.BytesIO()
    small.thumbnail((EDGE, EDGE))
    small.convert("RGB").save(file, "JPEG", quality=80)
    return Thumbnail(f"data:image/jpeg;base64,{base64.b64encode(file.getvalue()).decode()}")


def _shown(value: Any) -> Any:
    """A value as the page shows it, before it is escaped: short, without control characters; integers in thousands."""
    if isinstance(value, str):
        return value if isinstance(value, Markup | Thumbnail) else printable(value)
    return f"{value:,}" if isinstance(value, int) and not isinstance(value, bool) else value


def render(template: str, **values: Any) -> str:
    """A page of a jinja2 template that extends 'base' and may import 'macros'; every value is escaped."""
    sources = {"base": BASE, "macros": MACROS, "page": template}
    pages = Environment(
        loader=DictLoader(sources),
        autoescape=True,
        undefined=StrictUndefined,
        finalize=_shown,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    return pages.get_template("page").render(**values)


def save(file: Path, page: str, flag: str) -> None:
    """Writes a page that `render` gave.

    Raises:
        UserError: the file cannot be written.
    """
    with writing(f"{flag} {file}"):
        write_whole(file, page)
    print(f"report: {file}")
