"""Facts of a catalogue that a method's configuration takes."""

from __future__ import annotations

from functools import cached_property
from pathlib import Path
from typing import Any

from harness.core.errors import UserError
from harness.text.product_queries import read_meta
from models.method import MethodConfig
from models.registry import METHODS


class Facts:
    """models.method.CatalogueFacts of the catalogue at `path`."""

    def __init__(self, path: Path) -> None:
        self.path = path

    @cached_property
    def _queries(self) -> dict[str, Any]:
        return read_meta(self.path)

    @property
    def num_keywords(self) -> int:
        """Size of the keyword table."""
        return len(self._queries["keywords"])

    @property
    def keywords_per_product(self) -> int:
        """Keywords of one product at most."""
        return self._queries["keywords_per_product"]


def prepared(method: str, model: MethodConfig, catalogue: Path) -> MethodConfig:
    """The method's configuration, filled in from the catalogue (`MethodSpec.prepare`).

    Raises:
        UserError: the catalogue lacks what the method asks for, or has other numbers than the configuration.
    """
    try:
        return METHODS[method].prepare(model, Facts(catalogue))
    except ValueError as error:
        what, *fix = error.args
        raise UserError(f"{catalogue}: {what}", *fix) from error
