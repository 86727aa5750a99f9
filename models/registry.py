"""Registry of the methods: `method` in a recipe selects an entry. A method is a file that declares METHOD, and a line
here.
"""

from __future__ import annotations

from typing import Any

from models import item, make, oclear
from models.method import MethodSpec

METHODS: dict[str, MethodSpec[Any]] = {
    "oclear": oclear.METHOD,
    "make": make.METHOD,
    "item": item.METHOD,
}
