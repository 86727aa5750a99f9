"""Parameter groups of the towers: frozen parts, layer-wise decay, factors by name."""

from __future__ import annotations

import difflib
from collections.abc import Sequence
from fnmatch import fnmatchcase

from torch import nn

from harness.core.errors import UserError


def freeze(towers: nn.Module, patterns: Sequence[str], key: str = "optimizer.frozen") -> None:
    """Freezes every parameter that a pattern names; `key` of the configuration holds the patterns.

    Raises:
        UserError: a pattern names nothing, or nothing is left to train.
    """
    for pattern in patterns:
        for parameter in _named(towers, pattern, key):
            parameter.requires_grad_(False)
    if not any(parameter.requires_grad for parameter in towers.parameters()):
        raise UserError(f"{key} leaves no parameter of the towers to train", "Name fewer parts")


def lr_factors(towers: nn.Module, layer_decay: float, by_name: Sequence[str]) -> dict[nn.Parameter, float]:
    """Factor on the learning rate of every parameter.

    Args:
        towers: the model. A tower in it is a module with layers (`block`) that declares EMBEDDINGS, the names of its
            parts below the first layer.
        layer_decay: factor between neighbouring layers of a tower: layer l of n (from 0) has layer_decay ** (n - l),
            the parts below the first layer_decay ** (n + 1), all others 1. Source: BEiT (Bao et al. 2021), as in
            DINOv2.
        by_name: entries `pattern=factor`, a further factor; of several patterns for a parameter the last counts.

    Raises:
        UserError: a pattern names nothing.
    """
    found = dict.fromkeys(towers.parameters(), 1.0)
    for module in towers.modules():
        if hasattr(module, "EMBEDDINGS"):
            for name, parameter in module.named_parameters():
                found[parameter] = layer_decay ** below_top(name, module)
    named = {}
    for entry in by_name:
        pattern, factor = split_factor(entry)
        named.update(dict.fromkeys(_named(towers, pattern, "optimizer.lr_factors"), factor))
    return {parameter: factor * named.get(parameter, 1.0) for parameter, factor in found.items()}


def split_factor(entry: str) -> tuple[str, float]:
    """Splits `pattern=factor`.

    Raises:
        ValueError: the entry has another form.
    """
    pattern, _, factor = entry.rpartition("=")
    return pattern, float(factor)


def below_top(name: str, tower: nn.Module) -> int:
    """Number of layers from the top of `tower` down to its parameter `name`; 0 above the last layer."""
    depth, parts = len(tower.block.layers), name.split(".")  # type: ignore[arg-type, union-attr]
    if parts[:2] == ["block", "layers"]:
        return depth - int(parts[2])
    return depth + 1 if parts[0] in tower.EMBEDDINGS else 0  # type: ignore[operator]


def _named(towers: nn.Module, pattern: str, key: str) -> list[nn.Parameter]:
    """Parameters whose name, or a beginning of it up to a dot, matches the shell pattern; `key` of the configuration
    holds the pattern.
    """
    names = towers.named_parameters(remove_duplicate=False)  # a module in two places has two names
    found = [p for name, p in names if fnmatchcase(name, pattern) or fnmatchcase(name, f"{pattern}.*")]
    if not found:
        parts = [name.split(".") for name, _ in towers.named_parameters(remove_duplicate=False)]
        known = {".".join(part[:end]) for part in parts for end in range(1, len(part) + 1)}
        near = difflib.get_close_matches(pattern, sorted(known), n=3, cutoff=0.0)
        raise UserError(f"{key}: the towers have no parameter '{pattern}'", f"Did you mean {' or '.join(near)}?")
    return found
