"""Precision and recall of a grouping, over pairs of samples: one group against one class."""

from __future__ import annotations

import numpy as np


def pairwise(found: np.ndarray, truth: np.ndarray) -> tuple[float, float]:
    """Precision and recall of groups; 1.0 where there is no pair.

    Args:
        found: int64 [n] group of each sample; a negative one is a group of its own.
        truth: int64 [n] class of each sample, not negative.
    """
    found = np.where(found < 0, found.max(initial=0) + 1 + np.arange(len(found)), found)
    groups = np.unique(found, return_inverse=True)[1]
    both = _pairs(groups.astype(np.int64) * (truth.max(initial=0) + 1) + truth)
    precision, recall = (both / pairs if pairs else 1.0 for pairs in (_pairs(groups), _pairs(truth)))
    return precision, recall


def _pairs(values: np.ndarray) -> int:
    """Pairs of samples with equal values."""
    sizes = np.unique(values, return_counts=True)[1]
    return int((sizes * (sizes - 1) // 2).sum())
