"""The best view of a run's documents, by the figures of its evaluation."""

from __future__ import annotations

from typing import Any

import pytest

from harness.core.errors import UserError
from harness.evaluate.evaluation import EvaluationConfig
from harness.evaluate.view_choice import best_view, recalls_by_view, remark

ALL, NEW = "all products", "products never trained on"


def slice_row(recall: float, **task: str) -> dict[str, Any]:
    return {"slice": "class", "value": "never trained", "recall_at_1": recall, **task}


def test_the_mean_of_both_kinds_of_products_decides() -> None:
    figures = {"recall_at_1": 0.5, "map": 0.6, "photo/image/recall_at_1": 0.4, "photo/image/map": 0.9}
    known = recalls_by_view(figures, EvaluationConfig(), "oclear")
    assert known == {"both": {ALL: 0.5}, "image": {ALL: 0.4}} and best_view(known, "step") == "both"
    slices = [slice_row(0.2), slice_row(0.7, task="photo/image"), {**slice_row(0.9), "value": "head"}]
    both = recalls_by_view({**figures, "slices": slices}, EvaluationConfig(), "oclear")
    assert both["image"] == {ALL: 0.4, NEW: 0.7} and best_view(both, "step") == "image"
    # A kind that one view lacks is compared for none.
    assert recalls_by_view({**figures, "slices": slices[:1]}, EvaluationConfig(), "oclear") == known
    only = recalls_by_view({"recall_at_1": 0.5}, EvaluationConfig(), "oclear")
    assert best_view(only, "step") == "both" and remark(only, "both", "both", "val") == []
    for figures in ({}, {"recall_at_1": None, "photo/image/recall_at_1": 0.5}):
        with pytest.raises(UserError, match="training did not evaluate step-3"):
            best_view(recalls_by_view(figures, EvaluationConfig(), "oclear"), "step-3")


def test_views_of_other_tasks_do_not_count() -> None:
    """As by make_fashion.yaml with more views: its search by text is compared, not its search for the same product."""
    config = EvaluationConfig(tasks=("text",), final_tasks=("same_product",), views=("both", "title", "image"))
    figures = {"recall_at_1": 0.5, "text/title/recall_at_1": 0.45, "text/image/recall_at_1": 0.4}
    others = {
        "same_product/recall_at_1": 0.6,
        "same_product/title/recall_at_1": 0.1,
        "same_product/image/recall_at_1": 1,
    }
    figures |= others
    found = recalls_by_view(figures, config, "make")
    assert found == {"both": {ALL: 0.5}, "title": {ALL: 0.45}, "image": {ALL: 0.4}}
    assert best_view(found, "step") == "both" and remark(found, "both", "both", "val") == []
    del figures["text/title/recall_at_1"]  # a view that only the other task was asked for
    assert recalls_by_view(figures, config, "make") == {"both": {ALL: 0.5}, "image": {ALL: 0.4}}


def test_the_plain_figures_are_those_of_the_first_view() -> None:
    config = EvaluationConfig(views=("image", "both"))
    found = recalls_by_view({"recall_at_1": 0.7, "photo/both/recall_at_1": 0.5}, config, "oclear")
    assert found == {"image": {ALL: 0.7}, "both": {ALL: 0.5}} and best_view(found, "step") == "image"
    told = (
        "val recall@1 of documents seen as image and as both: all products 0.700 and 0.500. --view image exports that"
    )
    assert remark(found, "both", "both", "val") == [told]
    assert remark(found, "best", "image", "val") == [told.replace("--view image exports that", "exported as image")]
    alone = recalls_by_view({"recall_at_1": 0.7}, EvaluationConfig(views=("image",)), "oclear")
    assert best_view(alone, "step") == "image" and remark(alone, "both", "both", "val") == []
