"""Governance: classes, slots and quarantine against a plain Python account of the same samples."""

from __future__ import annotations

import json
import shutil
import statistics
from collections import defaultdict
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import xxhash

from harness.catalogue.catalogue import Catalogue
from harness.commands.govern import GovernConfig, run
from harness.commands.ingest import IngestConfig
from harness.commands.ingest import run as ingest
from harness.core.errors import UserError
from tests.catalogues import make_catalogue

KINDS = ("query", "document")


@pytest.fixture(scope="module")
def skewed(tmp_path_factory) -> Path:
    """A catalogue whose class c<n> has n * n train queries and 1 document for n = 1 .. 5, with odd ones between."""
    folder = tmp_path_factory.mktemp("skewed")
    make_catalogue(folder, classes=1, queries=1, size=16, ingest=False)
    rows: list[tuple[str, str, str]] = []
    for number in (3, 1, 5, 4, 2):  # class ids follow the first sample, not the name
        rows += [("document", "all", f"c{number}")] if number % 2 else []
        rows += [("query", "train", f"c{number}")] * number**2
        rows += [("document", "all", f"c{number}")] if not number % 2 else []
        rows += [("query", "val", f"c{number}")] * 2
    rows += [("query", "train", "no-document"), ("document", "train", "no-query"), ("document", "all", "no-query")]
    rows += [("query", "val", "val-only"), ("query", "train", ""), ("document", "all", ""), ("query", "test", "")]
    lines = [f"{i}\t{kind}\t{split}\t{key}\timages/000-00.jpg" for i, (kind, split, key) in enumerate(rows)]
    (folder / "m.tsv").write_text("id\tkind\tsplit\tclass_id\timage\n" + "\n".join(lines) + "\n")
    # Several Parquet parts, so that nothing leans on one file's order.
    ingest(IngestConfig(manifest=folder / "m.tsv", images=folder, out=folder / "cat", workers=1, rows_per_part=17))
    return folder / "cat"


def govern(catalogue: Path, **options) -> tuple[dict, pa.Table, dict[str, np.ndarray]]:
    summary = run(GovernConfig(catalogue=catalogue, **options))
    arrays = {path.name.removesuffix(".npy"): np.load(path) for path in (catalogue / "classes").glob("*.npy")}
    return summary, pq.read_table(catalogue / "classes/classes.parquet"), arrays


def account(catalogue: Path, split: str) -> dict[str, dict[str, list[int]]]:
    members: dict[str, dict[str, list[int]]] = defaultdict(lambda: {kind: [] for kind in KINDS})
    for row in Catalogue(catalogue).table(["kind", "class_key"], split=split).to_pylist():
        if row["class_key"] is not None:
            members[row["class_key"]][row["kind"]].append(row["sample_id"])
    return members


@pytest.mark.parametrize(
    "options",
    [
        {},
        {"query_power": 1.0},
        {"query_power": 0.0, "document_ratio": 0.25},
        {"split": "val", "min_queries": 2},
        {"min_queries": 0, "min_documents": 0, "document_ratio": 3.0},
        {"min_queries": 5},
        {"hold_out_classes": 0.5, "query_power": 1.0},
    ],
)
def test_classes_match_a_plain_account(skewed, options):
    config = GovernConfig(catalogue=skewed, **options)
    summary, classes, arrays = govern(skewed, **options)
    kept = {
        key: members
        for key, members in account(skewed, config.split).items()
        if len(members["query"]) >= config.min_queries and len(members["document"]) >= config.min_documents
        if xxhash.xxh3_64_intdigest(key.encode()) >= config.hold_out_classes * 2**64
    }
    keys = sorted(kept, key=lambda key: min(kept[key]["query"] + kept[key]["document"]))
    assert classes["class_key"].to_pylist() == keys
    assert classes["class_id"].to_pylist() == list(range(len(keys)))
    sizes = [len(kept[key]["query"]) for key in keys]
    mean, median = statistics.mean(sizes), statistics.median(sizes)
    query_slots = [max(1, round(mean * (size / mean) ** config.query_power)) if size else 0 for size in sizes]
    slots = {
        "query": query_slots,
        "document": [
            max(1, int(slot * config.document_ratio + 0.5)) if kept[key]["document"] else 0
            for key, slot in zip(keys, query_slots, strict=True)
        ],
    }
    for kind in KINDS:
        members = [kept[key][kind] for key in keys]
        assert classes[f"{kind}_members"].to_pylist() == [len(ids) for ids in members]
        assert classes[f"{kind}_slots"].to_pylist() == slots[kind]
        assert arrays[f"{kind}.members"].tolist() == [sample for ids in members for sample in sorted(ids)]
        assert arrays[f"{kind}.member_offsets"].tolist() == [0, *np.cumsum([len(ids) for ids in members]).tolist()]
        assert arrays[f"{kind}.slot_offsets"].tolist() == [0, *np.cumsum(slots[kind]).tolist()]
    assert classes["tail"].to_pylist() == [size < median for size in sizes]
    assert all(array.dtype == np.int64 for array in arrays.values()) and len(arrays) == 6
    assert all(classes.schema.field(name).type == pa.int64() for name in classes.column_names[2:-1])
    assert summary["num_classes"] == len(keys)
    assert summary["queries"] == sum(sizes) and summary["documents"] == len(arrays["document.members"])
    assert (summary["query_slots"], summary["document_slots"]) == (sum(slots["query"]), sum(slots["document"]))
    assert summary["tail_classes"] == sum(size < median for size in sizes)


def test_slots_against_skew(skewed):
    _, classes, _ = govern(skewed, query_power=1.0)
    assert classes["query_slots"].to_pylist() == classes["query_members"].to_pylist() == [9, 1, 25, 16, 4]
    _, classes, _ = govern(skewed, query_power=0.0)
    assert classes["query_slots"].to_pylist() == [11] * 5  # the mean of 1, 4, 9, 16, 25
    _, classes, _ = govern(skewed)
    # sqrt(11 * members): between the two, and no class below 1
    assert classes["query_slots"].to_pylist() == classes["document_slots"].to_pylist() == [10, 3, 17, 13, 7]
    assert classes["tail"].to_pylist() == [False, True, False, False, True]


def test_quarantine_says_why(skewed, capsys):
    summary, _, _ = govern(skewed, min_queries=4, min_documents=1)
    rows = pq.read_table(skewed / "classes/quarantine.parquet").to_pylist()
    table = Catalogue(skewed).table(["class_key", "split"]).to_pylist()
    classless = [r["sample_id"] for r in table if r["class_key"] is None and r["split"] in ("train", "all")]
    assert len(classless) == 2
    assert {(row["sample_id"], row["class_key"]): row["reason"] for row in rows} == {
        (-1, "c1"): "1 queries, --min-queries is 4",
        (-1, "no-document"): "1 queries, --min-queries is 4; 0 documents, --min-documents is 1",
        (-1, "no-query"): "0 queries, --min-queries is 4",
        **{(sample, None): "no class" for sample in classless},
    }
    assert (summary["quarantined_classes"], summary["quarantined_samples"]) == (3, 2)
    govern(skewed, min_documents=2, min_queries=0)
    reasons = {
        row["class_key"]: row["reason"] for row in pq.read_table(skewed / "classes/quarantine.parquet").to_pylist()
    }
    assert reasons["c5"] == "1 documents, --min-documents is 2"
    printed = capsys.readouterr().out
    assert "not trained: 3 classes with too few queries or documents, 2 samples without a class" in printed


def test_summary_and_governance_json(skewed, capsys):
    summary, _, arrays = govern(skewed, min_queries=2, query_power=0.25)
    digest = xxhash.xxh3_64()
    for kind in KINDS:
        for name in ("members", "member_offsets", "slot_offsets"):
            digest.update(arrays[f"{kind}.{name}"].tobytes())
    meta = json.loads((skewed / "classes/governance.json").read_text())
    assert meta["order_id"] == summary["order_id"] == digest.hexdigest() and len(meta["order_id"]) == 16
    assert meta["format"] == 1 and meta["num_classes"] == summary["num_classes"] == 4
    assert meta["options"] == {
        "split": "train", "min_queries": 2, "min_documents": 1, "query_power": 0.25, "document_ratio": 1.0,
        "hold_out_classes": 0.0,
    }  # fmt: skip
    largest = {"class_id": 1, "class_key": "c5", "query_members": 25, "document_members": 1}
    assert meta["largest_class"] == summary["largest_class"] == largest
    printed = capsys.readouterr().out
    assert "4 classes of 54 queries and 4 documents; 2 (tail) have fewer queries than the median" in printed


def test_running_again_replaces_and_repeats(skewed):
    first, _, _ = govern(skewed)
    (skewed / "classes/left-over").touch()
    other, _, _ = govern(skewed, query_power=1.0)
    again, _, _ = govern(skewed)
    assert first == again and first["order_id"] != other["order_id"]
    assert {path.name for path in (skewed / "classes").iterdir()} == {
        "classes.parquet", "quarantine.parquet", "governance.json", "manifest.json",
        *(f"{kind}.{name}.npy" for kind in KINDS for name in ("members", "member_offsets", "slot_offsets")),
    }  # fmt: skip
    assert not list(skewed.glob("classes.tmp*"))


def test_a_failed_run_keeps_the_old_classes(skewed):
    before, _, _ = govern(skewed)
    with pytest.raises(UserError, match="none of 7 classes"):
        govern(skewed, min_queries=1000)
    assert json.loads((skewed / "classes/governance.json").read_text())["order_id"] == before["order_id"]
    assert not list(skewed.glob("classes.tmp*"))


def test_hold_out_of_the_class_column(skewed, capsys):
    summary, classes, arrays = govern(skewed, hold_out_classes=0.5)
    held = pq.read_table(skewed / "classes/held_out.parquet").to_pylist()
    everything = account(skewed, "train")
    keys = {row["class_key"] for row in held}
    assert keys and classes.num_rows and not keys & set(classes["class_key"].to_pylist())
    assert {row["sample_id"] for row in held} == {s for key in keys for kind in KINDS for s in everything[key][kind]}
    assert not {row["sample_id"] for row in held} & {s for kind in KINDS for s in arrays[f"{kind}.members"].tolist()}
    quarantined = pq.read_table(skewed / "classes/quarantine.parquet")
    assert not keys & set(quarantined["class_key"].to_pylist())
    assert summary["held_out"] == {"classes": len(keys), "samples": len(held)}
    assert f"held out: {len(keys)} classes, {len(held)} samples" in capsys.readouterr().out
    with pytest.raises(UserError, match="--hold-out-classes leaves no class"):
        govern(skewed, hold_out_classes=0.999999)
    with pytest.raises(UserError, match="at least 1000 queries"):
        govern(skewed, hold_out_classes=0.5, min_queries=1000)


def test_options_for_clicks_are_refused_without(skewed):
    with pytest.raises(UserError, match="no use for --min-similarity, --engine"):
        govern(skewed, engine="spark", min_similarity=0.5)


def test_unknown_split_and_no_class_list_the_splits(skewed):
    with pytest.raises(UserError) as raised:
        govern(skewed, split="trian")
    message = str(raised.value)
    assert "is in split 'trian' (--split)" in message and "The splits are train (58), " in message
    assert all(f"{name} (" in message for name in ("all", "train", "val", "test"))
    with pytest.raises(UserError) as raised:
        govern(skewed, min_queries=26)
    message = str(raised.value)
    assert "none of 7 classes in split 'train'" in message and "26 queries (--min-queries)" in message
    assert "the most are 25 and 2" in message and "val (11)" in message
    with pytest.raises(UserError, match="none of 6 classes in split 'test'"):  # only the documents of split 'all'
        govern(skewed, split="test")


def test_a_catalogue_without_splits_is_all_of_every_split(skewed, tmp_path):
    folder = skewed.parent
    (tmp_path / "m.tsv").write_text("id\tkind\tclass_id\timage\n" + "x\tquery\ta\timages/000-00.jpg\n" * 3)
    ingest(IngestConfig(manifest=tmp_path / "m.tsv", images=folder, out=tmp_path / "cat", workers=1))
    summary, _, arrays = govern(tmp_path / "cat", min_documents=0)
    assert (summary["queries"], summary["documents"], summary["document_slots"]) == (3, 0, 0)
    assert arrays["document.members"].tolist() == [] and arrays["document.member_offsets"].tolist() == [0, 0]


def test_a_path_with_odd_characters(skewed, tmp_path):
    place = tmp_path / "it's [v2] *"
    shutil.copytree(skewed, place)
    assert govern(place)[0] == govern(skewed)[0]
