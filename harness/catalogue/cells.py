"""The one conversion from a cell of a table or a value of a JSON sidecar to text."""

from __future__ import annotations

import math
from typing import Any

import pyarrow as pa
import pyarrow.compute as pc

from harness.catalogue.images import Rejected

MOST_TEXT = 1 << 20  # characters of a cell; a longer one costs its row
MOST_BYTES = 4 * MOST_TEXT  # of its UTF-8


def is_text(kind: pa.DataType) -> bool:
    """True for Arrow's types of text and of bytes, whose cells are taken as they stand."""
    text = pa.types.is_string(kind) or pa.types.is_large_string(kind)
    return text or pa.types.is_binary(kind) or pa.types.is_large_binary(kind)


def texts(column: pa.Array) -> list[str | Rejected]:
    """The cells of an Arrow array as text, or the reason why one is none.

    Null and NaN are the empty text, whole floating-point numbers are written as integers. Bytes that are not UTF-8
    stand there as lone surrogates, which do not encode.

    Raises:
        pa.ArrowException: the type has no text, as that of lists.
    """
    if pa.types.is_dictionary(column.type):
        values = [*texts(column.dictionary), ""]  # place -1 for null
        return [values[place] for place in column.indices.fill_null(-1).to_pylist()]
    if pa.types.is_floating(column.type):
        shown = column.cast(pa.string()).to_pylist()
        return [_number(*pair) for pair in zip(column.to_pylist(), shown, strict=True)]
    if not is_text(column.type):
        column = column.cast(pa.string())
    data = column.cast(pa.large_binary())
    fits = pc.fill_null(pc.less_equal(pc.binary_length(data), MOST_BYTES), True)
    cells = iter(data.filter(fits).to_pylist())
    long = Rejected(f"text too long: more than {MOST_TEXT:,} characters")
    return [(next(cells) or b"").decode("utf-8", "surrogateescape") if fit else long for fit in fits.to_pylist()]


def text_of(value: Any) -> str:
    """A JSON value as the text that the same value in a table has.

    Raises:
        Rejected: a list, an object or an infinity.
    """
    if isinstance(value, str):
        return value
    if isinstance(value, list | dict):
        raise Rejected(f"not text: {'a list' if isinstance(value, list) else 'an object'}")
    if isinstance(value, int) and not isinstance(value, bool):  # of any size, unlike Arrow's
        return str(value)
    (cell,) = texts(pa.array([value]))
    if isinstance(cell, Rejected):
        raise cell
    return cell


def _number(value: float | None, shown: str) -> str | Rejected:
    if value is None or math.isnan(value):
        return ""
    if math.isinf(value):
        return Rejected("not text: an infinity")
    return str(int(value)) if value == int(value) else shown
