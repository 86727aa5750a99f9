"""Places spread evenly over a sequence: which rows a sample, a panel or a check takes."""

from __future__ import annotations

import numpy as np
import numpy.typing as npt


def evenly(count: int, most: int) -> npt.NDArray[np.int64]:
    """At most `most` of the places 0 .. count - 1, int64, rising; the first and the last among them where two or more
    are taken.
    """
    return np.linspace(0, count - 1, min(most, count)).astype(np.int64)
