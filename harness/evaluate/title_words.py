"""BM25 over titles by the bm25s library (k1 1.5, b 0.75): words in lower case and without plural s."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np

from harness.evaluate.embed import Side
from harness.text.product_queries import words_of

_AT_ONCE = 8192  # rows


def titles(side: Side) -> list[str]:
    """Titles of a side, after its `retitle`; empty where there are none."""
    if "title" in side.columns:
        plain = side.columns["title"].tolist()
    else:
        rows = range(len(side.ids))
        plain = [title for table in side.read(["title"], rows, _AT_ONCE) for title in table["title"].to_pylist()]
    named = [title or "" for title in plain]
    return named if side.retitle is None else [side.retitle(title) for title in named]


def title_scorer(documents: Side) -> Callable[[str], np.ndarray]:
    """Returns a function from a text to the BM25 [n] of the titles of `documents`, which are n."""
    import bm25s  # here: most evaluations have no texts

    engine, nothing = bm25s.BM25(), np.zeros(len(documents.ids))
    words = [words_of(title) for title in titles(documents)]
    if not any(words):
        return lambda text: nothing
    engine.index(words, show_progress=False)

    def score(text: str) -> np.ndarray:
        asked = words_of(text)
        return engine.get_scores(asked) if asked else nothing

    return score
