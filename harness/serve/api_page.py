"""Page of the service's routes, made of its OpenAPI description: one file, no script, nothing from another host."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from fastapi.responses import HTMLResponse

from harness.core.page import render

_TEMPLATE = """\
{% extends "base" %}
{% block content %}
<h1>{{ title }}</h1>
<p class="soft">The same as <a href="openapi.json">openapi.json</a>. A refusal is {"error": "…"} with a status of 4xx
or 503. <a href="./">Search page</a></p>
{% for route in routes %}
<section>
<h2><code>{{ route.method }} {{ route.path }}</code></h2>
<p>{{ route.text }}</p>
{% if route.bodies %}<p class="small soft">Body: {% for kind in route.bodies %}<code>{{ kind }}</code> {% endfor %}</p>
{% endif %}
{% if route.parameters %}
<div class="wide"><table><tr><th>in the URL</th><th>default</th><th>meaning</th></tr>
{% for name, default, text in route.parameters %}
<tr><td><code>{{ name }}</code></td><td>{{ default }}</td><td>{{ text }}</td></tr>
{% endfor %}
</table></div>
{% endif %}
</section>
{% endfor %}
{% endblock %}
"""


def api_page(description: Mapping[str, Any]) -> HTMLResponse:
    """The page of an OpenAPI description."""
    routes = []
    for path, methods in description["paths"].items():
        for method, route in methods.items():
            parameters = [
                (row["name"], str(row["schema"].get("default", "")), row.get("description", ""))
                for row in route.get("parameters", [])
            ]
            bodies = [*route.get("requestBody", {}).get("content", {})]
            found = {"path": path, "method": method.upper(), "text": route.get("description", "")}
            routes.append({**found, "parameters": parameters, "bodies": bodies})
    return HTMLResponse(render(_TEMPLATE, title="Shelfmark: routes", routes=routes))
