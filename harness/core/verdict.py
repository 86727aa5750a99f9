"""Verdict on the nodes of a cluster by what was measured on them: slow ones, odd ones, and those to leave out."""

from __future__ import annotations

import statistics
from collections import Counter
from collections.abc import Iterable, Mapping


def slow(figures: Mapping[str, Mapping[str, float]], share: float) -> dict[str, list[str]]:
    """Place -> its figures below `share` of their median over all places, in words.

    Args:
        figures: place -> name -> a rate or size; more is better. A place may lack some.
        share: in (0, 1].
    """
    found: dict[str, list[str]] = {}
    for name in dict.fromkeys(name for row in figures.values() for name in row):
        median = statistics.median(row[name] for row in figures.values() if name in row)
        for place, row in figures.items():
            if row.get(name, median) < share * median:
                found.setdefault(place, []).append(f"{name} {row[name]:.3g}, the median is {median:.3g}")
    return found


def odd(versions: Mapping[str, Mapping[str, str]]) -> dict[str, list[str]]:
    """Place -> its values that most places do not have, in words; of two that are equally common the first counts.

    Args:
        versions: place -> name -> value.
    """
    found: dict[str, list[str]] = {}
    for name in dict.fromkeys(name for row in versions.values() for name in row):
        (usual, _), *_ = Counter(row.get(name, "absent") for row in versions.values()).most_common()
        for place, row in versions.items():
            if row.get(name, "absent") != usual:
                found.setdefault(place, []).append(f"{name} {row.get(name, 'absent')}, elsewhere {usual}")
    return found


def leave_out(bad: Iterable[str], pairs: Iterable[tuple[str, str]]) -> list[str]:
    """Places without which neither a bad place nor a bad pair is left: of pairs those first that are in most of them,
    and of two that are in equally many the later one.
    """
    left = list(dict.fromkeys(bad))
    open_pairs = [pair for pair in pairs if not set(pair) & set(left)]
    while open_pairs:
        counts = Counter(place for pair in open_pairs for place in reversed(pair))
        left.append(counts.most_common(1)[0][0])
        open_pairs = [pair for pair in open_pairs if left[-1] not in pair]
    return left
