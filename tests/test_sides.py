"""Memory of a rank for the samples of an evaluation: numbers of all of them, texts of its own share, and those only for
a moment.
"""

from __future__ import annotations

import shutil
from dataclasses import replace
from pathlib import Path
from typing import Any
from unittest.mock import patch

import faiss
import numpy as np
import pyarrow as pa
import pytest
import torch

from harness.artefact.flat_index import index_head
from harness.catalogue.catalogue import Catalogue
from harness.commands import tokenizer
from harness.evaluate.attribute_queries import _as_one
from harness.evaluate.coded import Coded, encoded
from harness.evaluate.embed import ClassKeys, side_of
from harness.evaluate.tasks.category import chosen
from harness.text.tokenizer import TokenStore
from tests.pool import ranks
from tests.runs import UNUSED, tiny_config, trainer
from tests.test_tasks import side

TEXTS = ["b", None, "a", "", "c", "b", "None", "é", "z", "Z"]


def test_numbers_stand_for_texts_and_sort_as_they_do() -> None:
    column = Coded.of([encoded(pa.array(TEXTS[:4])), encoded(pa.array(TEXTS[4:])), encoded(pa.array([], pa.string()))])
    assert column.tolist() == TEXTS and column.codes.dtype == np.int32
    assert column.values.to_pylist() == sorted({text for text in TEXTS if text is not None})
    assert column.filled().tolist() == [bool(text) for text in TEXTS]
    assert column.used() == sorted({text for text in TEXTS if text})
    assert column.take(np.array([0, 2])).used() == ["a", "b"]
    assert column.in_list(["z", "b"]).tolist() == [{"z": 0, "b": 1}.get(text or "", -1) for text in TEXTS]
    for none in ("None", "", "nothing", "zz"):
        named = column.with_null(none)
        assert named.tolist() == [none if text is None else text for text in TEXTS]
        assert named.values.to_pylist() == sorted(named.values.to_pylist())
    assert Coded.of([]).tolist() == Coded.of_list([]).used() == [] and Coded.of_list([None, None]).tolist() == [
        None,
        None,
    ]


def test_equal_keys_have_one_number_over_all_sides() -> None:
    keys = ClassKeys()
    first, second = Coded.of_list(["k", None, "a", "k"]), Coded.of_list(["b", "k", None, "a", "c"])
    numbers = [*keys.numbers(first), *keys.numbers(second)]
    known = keys.keys.to_pylist()
    assert [None if n < 0 else known[n] for n in numbers] == ["k", None, "a", "k", "b", "k", None, "a", "c"]
    assert sorted(known) == ["a", "b", "c", "k"]


@pytest.mark.parametrize("largest", [3, 2**20])
def test_rows_as_one_number(largest: int) -> None:
    """Also where their product is beyond 64 bits."""
    rows = np.random.default_rng(0).integers(0, largest, (300, 5))
    rows[200:] = rows[:100]
    numbers = _as_one(rows)
    _, expected = np.unique(rows, axis=0, return_inverse=True)
    assert (np.unique(numbers, return_inverse=True)[1] == expected.ravel()).all()


@pytest.mark.parametrize("at_once", [1, 4, 100])
def test_a_side_reads_its_rows_alone(catalogue: Path, at_once: int) -> None:
    opened = Catalogue(catalogue)
    whole = side_of(opened, "query", "train", ["colour"], ClassKeys(), 0)
    for part in (whole, whole.select(np.arange(len(whole.ids)) % 3 != 1)):
        table = opened.table(["item", "colour"]).take(part.sample_ids)
        assert part.columns["colour"].tolist() == table["colour"].to_pylist()
        for rows in (range(len(part.ids)), range(2, 9), range(5, 5), range(len(part.ids) - 1, len(part.ids))):
            found = [*part.read(["item"], rows, at_once)]
            assert [len(piece) for piece in found[:-1]] == [at_once] * len(found[:-1])
            items = [item for piece in found for item in piece["item"].to_pylist()]
            assert items == table["item"].to_pylist()[rows.start : rows.stop]
    assert opened.rows([30, 2], ["item"]) == [
        {"sample_id": i, "item": opened.table(["item"])["item"][i].as_py()} for i in (2, 30)
    ]
    documents = side_of(opened, "document", None, ["item"], None, 100)
    assert documents.filled("title").all() and not whole.filled("title").any()
    assert documents.rows_of(np.array([[100, 101], [106, 5]])).tolist() == [[0, -1], [1, -1]]


def texts_encoded(catalogue: Path, other: Path) -> tuple[list[int], list[Any]]:
    """In a pool: texts that this rank encoded for its own catalogue, changed titles and another's tokens; and all token
    rows.
    """
    config = tiny_config(catalogue, UNUSED, **{"evaluation.batch_size": 2, "evaluation.split": "test"})
    counts, rows = [], []
    with trainer(config, ready=False) as t:
        embedder, (documents,) = t.validation.evaluation.embedder, t.validation.evaluation.documents
        for asked in (documents, replace(documents, retitle=str), replace(documents, catalogue=Catalogue(other))):
            with patch.object(TokenStore, "encode", wraps=TokenStore.encode) as encode:
                found = [*embedder._tokens(asked, embedder._own(len(asked.ids)))]
            counts.append(sum(len(call.args[1]["title"]) for call in encode.call_args_list))
            rows.append(torch.cat([torch.empty(0, 16, dtype=torch.int64), *found]).tolist())
    return counts, rows


def test_each_rank_encodes_its_own_texts_or_none(catalogue: Path, tmp_path: Path) -> None:
    """6 documents in blocks of 2. What lies on the disk is taken where the run's tokenizer made it, and is what
    encoding would give.
    """
    other = shutil.copytree(catalogue, tmp_path / "other")
    tokenizer.run(tokenizer.TokenizerConfig(catalogue=other, vocab_size=40))
    for world, shares in ((1, [6]), (2, [2, 4]), (3, [2, 2, 2])):
        found = ranks(world).run(texts_encoded, catalogue, other)
        assert [counts for counts, _ in found] == [[0, share, share] for share in shares]
        stored, changed, foreign = ([row for _, rows in found for row in rows[n]] for n in range(3))
        assert stored == changed == foreign and len(stored) == 6


def test_the_probe_looks_at_a_choice_by_ids() -> None:
    shapes = ["a", None, "b", ""] * 50
    whole, later = side({"shape": shapes}), side({"shape": shapes[:120]})
    assert len(chosen(whole, "shape", 100)) == 100 and (chosen(whole, "shape", 200) == np.arange(0, 200, 2)).all()
    some = chosen(whole, "shape", 10)
    assert len(some) == 10 and (np.diff(some) > 0).all() and (some % 2 == 0).all()
    early = {*some[some < 120].tolist()}
    assert early and len(early) < 10, "from everywhere"
    assert early <= {*chosen(later, "shape", 10).tolist()}, "a smaller catalogue loses none of those that it has"


@pytest.mark.parametrize("count", [0, 1, 5])
def test_a_streamed_index_is_faiss_own(count: int) -> None:
    vectors = np.random.default_rng(0).standard_normal((count, 6)).astype(np.float32)
    index = faiss.IndexFlatIP(6)
    index.add(vectors)
    assert index_head(6, count) + vectors.tobytes() == faiss.serialize_index(index).tobytes()
