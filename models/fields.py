"""Metadata of configuration fields."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import fields, is_dataclass
from typing import Any

# Of a field that shapes neither the towers nor what they compute in evaluation, with all that lies under it: a run that
# starts from another one's weights may have another value.
TRAINING_ONLY = {"training_only": True}


def training_only(config: Any, key: Sequence[str]) -> bool:
    """True where a field on the way to `key`, as ("text", "dropout") under the dataclass `config`, is TRAINING_ONLY."""
    for name in key:
        found = {field.name: field for field in fields(config)} if is_dataclass(config) else {}
        if name not in found:
            return False
        if found[name].metadata.get("training_only"):
            return True
        config = getattr(config, name)
    return False
