"""Rules between our tensors and another project's: a rule for each group of tensors, with a function in each direction.
Both only move numbers.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

Tensors = list[Tensor]


class WeightsError(ValueError):
    """Weights that do not fit; names the tensors and the reason."""


@dataclass(frozen=True)
class Rule:
    """The tensors `ours` hold the numbers of the tensors `theirs`; `load` and `save` are each other's inverse."""

    ours: tuple[str, ...]
    theirs: tuple[str, ...]
    load: Callable[[Tensors], Tensors] = list
    save: Callable[[Tensors], Tensors] = list


def transposed(ours: str, theirs: str) -> Rule:
    """One matrix, transposed."""
    return Rule((ours,), (theirs,), lambda t: [t[0].T], lambda t: [t[0].T])


def rows(ours: tuple[str, ...], theirs: str, dims: int) -> Rule:
    """Rows [n, h] of ours, or two of ours ([1, h] and the rest), in one table of theirs with `dims` dimensions: ones in
    front, or n = 1 left out.
    """

    def load(t: Tensors) -> Tensors:
        table = t[0].reshape(-1, t[0].shape[-1])
        return [table] if len(ours) == 1 else [table[:1], table[1:]]

    def save(t: Tensors) -> Tensors:
        table = torch.cat(t)
        return [table.reshape(*(1,) * (dims - 2), *table.shape) if dims >= 2 else table.flatten()]

    return Rule(ours, (theirs,), load, save)


def padded_rows(ours: str, theirs: str, rows: int, padded: int) -> Rule:
    """A table whose `rows` rows we fill up with zeros to `padded`."""

    def load(t: Tensors) -> Tensors:
        if len(t[0]) != rows:
            raise WeightsError(f"{theirs} has {len(t[0])} rows, but the description says {rows}")
        return [F.pad(t[0], (0, 0, 0, padded - rows))]

    return Rule((ours,), (theirs,), load, lambda t: [t[0][:rows]])


def interleaved(ours: str, theirs: tuple[str, ...], parts: int, groups: int) -> Rule:
    """`parts` tensors of theirs, or one that holds them one after the other; ours take turns, `groups` times.

    Queries, keys and values go head by head (3 parts), gate and up projection row by row (2 parts).
    """

    def load(t: Tensors) -> Tensors:
        found = t if len(t) == parts else t[0].chunk(parts)
        return [torch.stack([part.unflatten(0, (groups, -1)) for part in found], 1).flatten(0, 2)]

    def save(t: Tensors) -> Tensors:
        found = [part.flatten(0, 1) for part in t[0].unflatten(0, (groups, parts, -1)).unbind(1)]
        return found if len(theirs) == parts else [torch.cat(found)]

    return Rule((ours,), theirs, load, save)


def keyless_bias(ours: str, query: str, value: str, heads: int) -> Rule:
    """The bias of queries, keys and values where theirs has none for keys: ours is zero there, and must still be when
    it goes back.
    """
    whole = interleaved(ours, (query, "", value), 3, heads)

    def save(t: Tensors) -> Tensors:
        q, k, v = whole.save(t)
        if k.any():
            raise WeightsError(f"{ours} has a bias for keys, which {query} and {value} have no place for")
        return [q, v]

    return Rule((ours,), (query, value), lambda t: whole.load([t[0], torch.zeros_like(t[0]), t[1]]), save)


def concatenated(ours: str, theirs: tuple[str, ...], sizes: tuple[int, ...]) -> Rule:
    """One tensor of ours from several of theirs, one after the other; `sizes` are their shares of its rows."""

    def save(t: Tensors) -> Tensors:
        unit = len(t[0]) // sum(sizes)
        return list(t[0].split([unit * size for size in sizes]))

    return Rule((ours,), theirs, lambda t: [torch.cat(t)], save)


def flat_patches(ours: str, theirs: str, patch_size: int) -> Rule:
    """A patch embedding that theirs applies to pixels in the order (row, column, channel) as a matrix."""

    def load(t: Tensors) -> Tensors:
        return [t[0].unflatten(1, (patch_size, patch_size, 3)).permute(0, 3, 1, 2)]

    return Rule((ours,), (theirs,), load, lambda t: [t[0].permute(0, 2, 3, 1).flatten(1)])


def load_all(rules: Iterable[Rule], theirs: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Our tensors from theirs, float32.

    Raises:
        WeightsError: some of theirs are missing, all are named; or one cannot be taken apart as the description says.
    """
    rules = list(rules)
    if missing := [name for rule in rules for name in rule.theirs if name not in theirs]:
        raise WeightsError(f"{len(missing)} tensor(s) are missing: {listed(missing)}")
    ours: dict[str, Tensor] = {}
    for rule in rules:
        try:
            found = rule.load([theirs[name].float() for name in rule.theirs])
        except WeightsError:
            raise
        except (RuntimeError, IndexError, ValueError) as error:
            raise WeightsError(f"{', '.join(rule.theirs)} does not fit the description: {error}") from error
        ours.update(zip(rule.ours, (t.contiguous() for t in found), strict=True))
    return ours


def save_all(rules: Iterable[Rule], ours: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Their tensors from ours."""
    theirs: dict[str, Tensor] = {}
    for rule in rules:
        made = rule.save([ours[name] for name in rule.ours])
        theirs.update(zip(rule.theirs, (t.contiguous() for t in made), strict=True))
    return theirs


def unused(names: Iterable[str], rules: Iterable[Rule], known: Iterable[str]) -> tuple[list[str], list[str]]:
    """Tensors that no rule takes: (those that match `known`, which are not part of the tower; the others)."""
    taken = {name for rule in rules for name in rule.theirs}
    rest = sorted(name for name in names if name not in taken)
    pattern = re.compile("|".join(map("(?:{})".format, known)))
    matching = [name for name in rest if pattern.fullmatch(name)]
    return matching, [name for name in rest if name not in matching]


def listed(names: list[str], at_most: int = 12) -> str:
    """Names for a message."""
    return ", ".join(names[:at_most]) + (f" and {len(names) - at_most} more" if len(names) > at_most else "")
