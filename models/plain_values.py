"""Configuration classes from untrusted plain values: JSON of an artefact or of imported weights."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import is_dataclass
from types import NoneType
from typing import Any, Literal, TypeVar, get_args, get_origin, get_type_hints

from models.ranges import Range

T = TypeVar("T")
LARGEST = 1 << 31  # any number of a configuration; sizes that cost memory have tighter bounds where they are used


def from_plain(kind: type[T], values: Any, where: str) -> T:
    """An instance of the dataclass `kind`, with fields of bool, int, float, str, the types of models/ranges.py,
    Literal, tuples, other such dataclasses, and one of these or None, which is left out.

    Args:
        kind: the dataclass.
        values: what `asdict` and a trip through JSON made of one; fields that are left out take their default.
        where: its place, for errors: model.vision.

    Raises:
        ValueError: a field that `kind` lacks, or a value of another type, range or choice; the message names it.
    """
    if not isinstance(values, Mapping):
        raise ValueError(f"{where} is {shown(values)}, not an object")
    hints = get_type_hints(kind)
    if unknown := sorted(values.keys() - hints.keys()):
        raise ValueError(f"{where} has {shown(unknown[0])}, which this version does not know")
    return kind(**{name: _value(hints[name], value, f"{where}.{name}") for name, value in values.items()})


def _value(kind: Any, value: Any, where: str) -> Any:
    if NoneType in get_args(kind):
        (kind,) = set(get_args(kind)) - {NoneType}
    if is_dataclass(kind):
        return from_plain(kind, value, where)  # type: ignore[arg-type]
    if get_origin(kind) is tuple:
        if not isinstance(value, list | tuple):
            raise ValueError(f"{where} is {shown(value)}, not a list")
        kinds = get_args(kind)
        if kinds[-1] is ...:
            kinds = kinds[:1] * len(value)
        if len(kinds) != len(value):
            raise ValueError(f"{where} is {shown(value)}, not a list of {len(kinds)} values")
        return tuple(_value(one, each, where) for one, each in zip(kinds, value, strict=True))
    if get_origin(kind) is Literal:
        if value not in get_args(kind):
            raise ValueError(f"{where} is {shown(value)}; it can be {' or '.join(map(str, get_args(kind)))}")
        return value
    if issubclass(kind, Range):
        try:
            value, kind = kind(value), kind.number
        except ValueError as error:
            raise ValueError(f"{where} is {error}") from None
    if type(value) is not kind and not (kind is float and type(value) is int):
        raise ValueError(f"{where} is {shown(value)}, not of type {kind.__name__}")
    if kind in (int, float) and not 0 <= value <= LARGEST:  # nor NaN
        raise ValueError(f"{where} is {shown(value)}, not between 0 and {LARGEST:,}")
    return value


def shown(value: Any) -> str:
    """A value for a message, cut."""
    text = repr(value)
    return text if len(text) <= 40 else f"{text[:39]}…"
