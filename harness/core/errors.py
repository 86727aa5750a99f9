"""The exception for mistakes that a user can correct."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any


class UserError(Exception):
    """A mistake in the input or the request: shown as one line, without a traceback, exit code 2.

    Args:
        what: the mistake and its place (path, row, key).
        fix: what to do about it.
        figures: of a command that was done and refuses what it found; they are written to --json all the same.
    """

    def __init__(self, what: str, fix: str = "", figures: Mapping[str, Any] | None = None) -> None:
        super().__init__(f"{what}. {fix}" if fix else what)
        self.figures = figures
