"""The order of samples: every class fills its slots, every member gets its turn, each position stands alone."""

import json
import time
import tracemalloc
from itertools import pairwise

import numpy as np
import pytest

from harness.catalogue.classes import KINDS
from harness.core.errors import UserError
from harness.data.order import ClassOrder, ledger


def write_classes(catalogue, members, slots):
    """A classes/ folder from the members (lists of sample ids) and slots of each class, the same for both kinds but
    that document ids are 10,000 higher."""
    folder = catalogue / "classes"
    folder.mkdir(parents=True)
    sizes = [len(ids) for ids in members]
    for kind in KINDS:
        flat = np.array([i for ids in members for i in ids], dtype=np.int64)
        np.save(folder / f"{kind}.members.npy", flat + (10_000 if kind == "document" else 0))
        np.save(folder / f"{kind}.member_offsets.npy", np.cumsum([0, *sizes], dtype=np.int64))
        np.save(folder / f"{kind}.slot_offsets.npy", np.cumsum([0, *slots], dtype=np.int64))
    meta = {"format": 1, "num_classes": len(members), "order_id": "0123456789abcdef"}
    (folder / "governance.json").write_text(json.dumps(meta))
    return catalogue


@pytest.fixture
def catalogue(tmp_path):
    rng = np.random.default_rng(0)
    sizes = [1, 2, 3, 5, 8, 13, 1, 40]
    bounds = np.cumsum([0, *sizes])
    ids = rng.permutation(sum(sizes))
    members = [sorted(ids[a:b].tolist()) for a, b in pairwise(bounds)]
    # Slots below, at and above the number of members, and a class that is out of training.
    return write_classes(tmp_path / "catalogue", members, slots=[4, 1, 3, 7, 0, 5, 1, 11]), members


def test_each_class_fills_exactly_its_slots_every_epoch(catalogue):
    path, members = catalogue
    order = ClassOrder.open(path, seed=5)
    assert (order.num_classes, order.order_id) == (8, "0123456789abcdef")
    assert order.slots("query") == order.slots("document") == 32
    for kind in KINDS:
        draw = order.draw(kind, np.arange(32 * 20))
        assert np.array_equal(draw.epochs, np.repeat(np.arange(20), 32))
        for epoch in range(20):
            counts = np.bincount(draw.class_ids[draw.epochs == epoch], minlength=8)
            assert counts.tolist() == [4, 1, 3, 7, 0, 5, 1, 11]
        shift = 10_000 if kind == "document" else 0
        for sample, label in zip(draw.sample_ids, draw.class_ids, strict=True):
            assert sample - shift in members[label]


def test_every_member_gets_its_turn_in_every_lap(catalogue):
    path, members = catalogue
    order = ClassOrder.open(path, seed=5)
    epochs = 400
    draw = order.draw("query", np.arange(32 * epochs))
    for label, ids in enumerate(members):
        visits = draw.sample_ids[draw.class_ids == label]
        counts = np.array([np.count_nonzero(visits == i) for i in ids])
        if len(visits):
            assert counts.max() - counts.min() <= 1, label
    # Within an epoch a class with more members than slots repeats none, unless a lap ends inside the epoch.
    first = draw.sample_ids[(draw.class_ids == 7) & (draw.epochs == 0)]
    assert len(set(first.tolist())) == 11
    # Laps differ: the 40 members of class 7 do not come round in one fixed order.
    laps = [draw.sample_ids[(draw.class_ids == 7) & (draw.epochs == epoch)] for epoch in (0, 40, 80)]
    assert not set(laps[0].tolist()) == set(laps[1].tolist()) == set(laps[2].tolist())


def test_a_position_does_not_depend_on_the_others_asked_for(catalogue):
    path, _ = catalogue
    order, again = ClassOrder.open(path, seed=5), ClassOrder.open(path, seed=5)
    positions = np.random.default_rng(1).integers(0, 10_000, 300)
    together = order.draw("query", positions)
    for row in (0, 17, 299):
        alone = again.draw("query", positions[row : row + 1])
        assert alone.sample_ids[0] == together.sample_ids[row] and alone.class_ids[0] == together.class_ids[row]
    backwards = order.draw("query", positions[::-1])
    assert np.array_equal(backwards.sample_ids[::-1], together.sample_ids)
    empty = order.draw("query", [])
    assert len(empty.sample_ids) == len(empty.class_ids) == len(empty.epochs) == 0


def test_seeds_epochs_and_kinds_are_ordered_differently(catalogue):
    path, _ = catalogue
    order, other = ClassOrder.open(path, seed=5), ClassOrder.open(path, seed=6)
    epochs = order.draw("query", np.arange(64)).class_ids.reshape(2, 32)
    assert not np.array_equal(epochs[0], epochs[1])
    assert not np.array_equal(epochs[0], other.draw("query", np.arange(32)).class_ids)
    assert not np.array_equal(epochs[0], order.draw("document", np.arange(32)).class_ids)


def test_paired_takes_members_of_the_class_evenly(catalogue):
    path, members = catalogue
    order = ClassOrder.open(path, seed=5)
    positions = np.arange(8000)
    ids = order.paired(np.full(8000, 5), positions, "document") - 10_000
    counts = np.array([np.count_nonzero(ids == i) for i in members[5]])
    assert counts.sum() == 8000 and np.abs(counts - 8000 / 13).max() < 6 * (8000 / 13) ** 0.5
    assert order.paired([5], [77], "document")[0] - 10_000 == ids[77]


def test_ten_billion_slots_of_a_million_classes_open_at_once(tmp_path):
    folder = tmp_path / "catalogue" / "classes"
    folder.mkdir(parents=True)
    for kind in KINDS:
        np.save(folder / f"{kind}.members.npy", np.arange(2_000_000))
        np.save(folder / f"{kind}.member_offsets.npy", np.arange(1_000_001) * 2)
        np.save(folder / f"{kind}.slot_offsets.npy", np.arange(1_000_001) * 10_000)
    (folder / "governance.json").write_text(json.dumps({"format": 1, "num_classes": 1_000_000, "order_id": "0" * 16}))
    tracemalloc.start()
    start = time.perf_counter()
    order = ClassOrder.open(tmp_path / "catalogue", seed=0)
    positions = np.concatenate([np.arange(2000), 10**10 * 7 + np.arange(2000)])
    draw = order.draw("query", positions)
    seconds, peak = time.perf_counter() - start, tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert order.slots("query") == 10**10
    assert np.array_equal(draw.sample_ids // 2, draw.class_ids) and len(np.unique(draw.class_ids)) > 3900
    assert seconds < 1 and peak < 4 * 2**20


def test_ledger_ignores_the_order_and_adds_up():
    rng = np.random.default_rng(0)
    positions, ids = np.arange(1000), rng.integers(0, 50, 1000)
    whole = ledger(positions, ids, "query", key=9)
    shuffled = rng.permutation(1000)
    assert ledger(positions[shuffled], ids[shuffled], "query", 9) == whole
    parts = [ledger(positions[rank::3], ids[rank::3], "query", 9) for rank in range(3)]
    assert sum(parts) % 2**64 == whole
    assert ledger([], np.array([], np.int64), "query", 9) == 0
    changed = ids.copy()
    changed[[3, 4]] = ids[3] + 1, ids[4] - 1
    others = [
        ledger(positions, changed, "query", 9),
        ledger(positions, ids, "document", 9),
        ledger(positions, ids, "query", 8),
    ]
    assert len({whole, *others}) == 4


def test_mistakes_say_what_to_do(tmp_path, catalogue):
    (tmp_path / "bare").mkdir()
    with pytest.raises(UserError, match=r"bare has no classes; run: shelfmark govern .*bare"):
        ClassOrder.open(tmp_path / "bare", seed=0)
    path, _ = catalogue
    with pytest.raises(ValueError, match="start at 0"):
        ClassOrder.open(path, seed=0).draw("query", [-1])
    np.save(path / "classes" / "query.slot_offsets.npy", np.arange(5))
    with pytest.raises(UserError, match="the query arrays do not fit together"):
        ClassOrder.open(path, seed=0)
    (path / "classes" / "query.slot_offsets.npy").unlink()
    with pytest.raises(UserError, match=r"query\.slot_offsets\.npy: No such file"):
        ClassOrder.open(path, seed=0)


def test_kinds_and_classes_without_members(tmp_path):
    order = ClassOrder.open(write_classes(tmp_path / "empty", [[], []], [0, 0]), seed=0)
    with pytest.raises(UserError, match="no query slots"):
        order.draw("query", [0])
    order = ClassOrder.open(write_classes(tmp_path / "gap", [[1], []], [1, 1]), seed=0)
    with pytest.raises(UserError, match="class 1 has no document member"):
        order.draw("document", [0, 1])
    with pytest.raises(UserError, match="class 1 has no document member"):
        order.paired([0, 1], [0, 0], "document")
