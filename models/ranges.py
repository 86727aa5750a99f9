"""Ranges of a configuration's numbers as types: `image_size: Pixels = 224`.

What reads a configuration holds the values to them (harness/core/cli.py, models/plain_values.py); a field's value
itself is a plain int or float.
"""

from __future__ import annotations

import math
from typing import TYPE_CHECKING, Any, TypeAlias

MOST_LAYERS = 1000  # building so many takes seconds
MOST_PIXELS = 8192  # of an image's side
MOST = 10**7  # of a model's other sizes: larger than any vocabulary


class Range:
    """Base of the types. `kind(value)` returns `value`, a float type also an int as float.

    Raises:
        ValueError: it is not such a number; the message completes "KEY is ".
    """

    number: type = int
    least: float = -math.inf
    most: float = math.inf
    outside: tuple[float, ...] = ()  # ends that do not belong to the range

    def __new__(cls, value: Any) -> Any:
        """Checks and returns the plain number."""
        number: Any = float(value) if cls.number is float and type(value) is int and abs(value) < 2**63 else value
        right = type(number) is cls.number and number not in (math.inf, -math.inf)
        if right and cls.least <= number <= cls.most and number not in cls.outside:  # NaN is in no range
            return number
        large = type(value) is int and abs(value) > 10**99
        raise ValueError(f"{'far too large' if large else value}. It must be {cls.said()}")

    @classmethod
    def said(cls) -> str:
        """The range in words: an int from 1 to 1,000."""
        if cls.number is float and cls.most < math.inf:
            left, right = ("(" if cls.least in cls.outside else "["), (")" if cls.most in cls.outside else "]")
            return f"a float in {left}{cls.least}, {cls.most}{right}"
        if cls.most < math.inf:
            return f"an int from {cls.least} to {cls.most:,}"
        bound = f"above {cls.least}" if cls.least in cls.outside else f"at least {cls.least}"
        return f"{'a float' if cls.number is float else 'an int'}, {bound}"


def _range(name: str, number: type, least: float, most: float = math.inf, outside: tuple[float, ...] = ()) -> type:
    return type(name, (Range,), {"number": number, "least": least, "most": most, "outside": outside})


if TYPE_CHECKING:  # a field takes plain numbers
    PositiveInt: TypeAlias = int
    NonNegativeInt: TypeAlias = int
    AtLeastTwo: TypeAlias = int
    Layers: TypeAlias = int
    Pixels: TypeAlias = int
    Byte: TypeAlias = int
    Tokens: TypeAlias = int
    Size: TypeAlias = int
    OptionalSize: TypeAlias = int
    PositiveFloat: TypeAlias = float
    NonNegativeFloat: TypeAlias = float
    ClosedUnitInterval: TypeAlias = float
    OpenUnitInterval: TypeAlias = float
    UnitIntervalAbove0: TypeAlias = float
    UnitIntervalBelow1: TypeAlias = float
    HalfTurn: TypeAlias = float
else:
    PositiveInt = _range("PositiveInt", int, 1)
    NonNegativeInt = _range("NonNegativeInt", int, 0)
    AtLeastTwo = _range("AtLeastTwo", int, 2)
    Layers = _range("Layers", int, 1, MOST_LAYERS)
    Pixels = _range("Pixels", int, 1, MOST_PIXELS)
    Byte = _range("Byte", int, 0, 255)
    Tokens = _range("Tokens", int, 0, 1024)  # beside the patches, or of a side of their grid
    Size = _range("Size", int, 1, MOST)
    OptionalSize = _range("OptionalSize", int, 0, MOST)
    PositiveFloat = _range("PositiveFloat", float, 0, outside=(0,))
    NonNegativeFloat = _range("NonNegativeFloat", float, 0)
    ClosedUnitInterval = _range("ClosedUnitInterval", float, 0, 1)
    OpenUnitInterval = _range("OpenUnitInterval", float, 0, 1, (0, 1))
    UnitIntervalAbove0 = _range("UnitIntervalAbove0", float, 0, 1, (0,))
    UnitIntervalBelow1 = _range("UnitIntervalBelow1", float, 0, 1, (1,))
    HalfTurn = _range("HalfTurn", float, 0, 0.5)
