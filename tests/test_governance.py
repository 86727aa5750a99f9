"""Governance on clicks: its rules against plain Python, components against other libraries, what bad input gets."""

from __future__ import annotations

import json
import random
from pathlib import Path
from typing import Any

import networkx as nx
import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from hypothesis import HealthCheck, Phase, example, given, settings
from hypothesis import strategies as st
from scipy.sparse import coo_array
from scipy.sparse.csgraph import connected_components

from harness.catalogue.governance.clicks import checked, open_log
from harness.catalogue.governance.components import contracted, lowest
from harness.catalogue.governance.config import GovernConfig
from harness.catalogue.governance.engine import Engine
from harness.commands.govern import run
from harness.core.errors import UserError
from harness.evaluate.coded import Coded
from harness.evaluate.embed import ClassKeys
from harness.evaluate.tasks.photo import KINDS, head_and_tail
from tests import governance_reference as reference
from tests.click_logs import LOG, bare_catalogue, write_log

DOCUMENTS, QUERIES = 24, 60
TIMED = pa.schema([*LOG, ("time", pa.int64())])


def shop(folder: Path) -> Path:
    """Documents d0 … are samples 0 …, query photos q0 … those behind them; then samples of other splits."""
    samples = [(f"d{i}", "document", "all", f"c{i // 2}") for i in range(DOCUMENTS)]
    samples += [(f"q{i}", "query", "train", f"c{i % (DOCUMENTS // 2)}") for i in range(QUERIES)]
    return bare_catalogue(folder, [*samples, ("q-val", "query", "val", "c0"), ("d-test", "document", "test", "c0")])


def read(catalogue: Path, name: str) -> list[dict[str, Any]]:
    return pq.read_table(catalogue / f"classes/{name}.parquet").to_pylist()


def draw_rows(seed: int, noise: float, hot: int) -> list[tuple[str, str, int, int]]:
    """Rows of a log: query q<i> shows product i % 12, whose documents are 2p and 2p + 1."""
    rng = random.Random(seed)
    rows = []
    for query in range(QUERIES):
        product = query % (DOCUMENTS // 2)
        shown = {2 * product, 2 * product + 1, *rng.sample(range(DOCUMENTS), 3), *range(hot)}
        if rng.random() < 0.05:
            shown = set(range(DOCUMENTS))  # a bot
        for document in shown:
            impressions = rng.randint(1, 9)
            right = document // 2 == product
            rate = rng.choice([0.3, 0.6]) if right else noise
            clicks = sum(rng.random() < rate for _ in range(impressions))
            rows += [(f"q{query}", f"d{document}", clicks, impressions)] * (1 + (rng.random() < 0.1))
    return rows


@given(
    seed=st.integers(0, 2**32),
    noise=st.sampled_from([0.05, 0.2]),
    embedded=st.booleans(),
    options=st.fixed_dictionaries(
        {
            "min_support": st.sampled_from([0.0, 0.1, 0.2]),
            "min_share": st.sampled_from([0.0, 0.4, 1.0]),
            "min_common": st.integers(1, 2),
            "min_overlap": st.sampled_from([0.0, 0.2, 0.35]),
            "max_documents": st.integers(1, 4),
            "split_step": st.sampled_from([0.05, 0.3]),
            "min_vote": st.sampled_from([0.0, 0.6]),
            "max_documents_per_query": st.sampled_from([6, 15]),
            "hot_documents": st.sampled_from([2, 50]),
            "confidence": st.sampled_from([0.5, 1.64]),
        }
    ),
)
@example(  # hot documents that cosines clear, and a split whose steps matter
    seed=3241,
    noise=0.2,
    embedded=True,
    options={
        "min_support": 0.1, "min_share": 0.4, "min_common": 1, "min_overlap": 0.0, "max_documents": 4,
        "split_step": 0.05, "min_vote": 0.4, "max_documents_per_query": 15, "hot_documents": 2, "confidence": 0.5,
    },
)  # fmt: skip
@settings(
    max_examples=2,
    deadline=None,
    derandomize=True,
    phases=[Phase.explicit, Phase.generate],
    suppress_health_check=list(HealthCheck),
)
def test_the_rules_are_those_of_a_plain_account(tmp_path_factory, seed, noise, embedded, options):
    folder = tmp_path_factory.mktemp("rules")
    rows = draw_rows(seed, noise, hot=2)
    related = [("d0", "d9"), ("d4", "d5"), ("d9", "d0"), *[("d1", "d1")] * 2, ("d1", "no such item")]
    relations = folder / "relations.tsv"
    relations.write_text("item_a\titem_b\tkind\n" + "".join(f"{a}\t{b}\tsame\n" for a, b in related))
    similarity: dict[tuple[int, int], int] = {}
    if embedded:
        vectors = np.random.default_rng(seed % 1000).standard_normal((DOCUMENTS + QUERIES, 8)).astype(np.float32)
        known = [i for i in range(len(vectors)) if i % 7]
        lists = pa.FixedSizeListArray.from_arrays(pa.array(vectors[known].ravel()), 8)
        pq.write_table(pa.table({"sample_id": known, "embedding": lists}), folder / "vectors.parquet")
        unit = vectors.astype(np.float64) / np.linalg.norm(vectors.astype(np.float64), axis=1, keepdims=True)
        cosines = np.rint(
            unit.astype(np.float32).astype(np.float64) @ unit.astype(np.float32).astype(np.float64).T * 1e6
        )
        similarity = {(q, d): int(cosines[q, d]) for q in known for d in known if d < DOCUMENTS <= q}
        options = {**options, "embeddings": (folder / "vectors.parquet",), "min_similarity": 0.1}
    catalogue = shop(folder / "cat")
    config = GovernConfig(
        catalogue=catalogue,
        clicks=write_log(folder / "log.parquet", rows),
        relations=relations,
        min_purity=0.0,
        **options,
    )
    plain = [(int(q[1:]) + DOCUMENTS, int(d[1:]), clicks, shown) for q, d, clicks, shown in rows]
    chosen, component, dropped = reference.rules(plain, config, similarity, [(0, 9), (4, 5)])
    wanted = reference.classes(chosen, component, config)
    facts = reference.facts(plain, config, (chosen, component, dropped))
    summary = run(config)
    found: dict[str, tuple[list[int], list[int]]] = {}
    for row in read(catalogue, "members"):
        found.setdefault(row["class_key"], ([], []))[row["kind"] == "query"].append(row["sample_id"])
    assert sorted(found.values()) == sorted(wanted.values())
    for row in read(catalogue, "facts"):
        edges, inside, asked = facts[min(found[row["class_key"]][0])]
        assert (row["edges"], row["clicks"], row["purity"]) == (edges, inside, inside * 10**6 // asked / 1e6)
    reasons = {(row["query"], row["document"]): row["reason"] for row in read(catalogue, "dropped_edges")}
    assert reasons == dropped
    supports = reference.supports(plain, config)
    for row in read(catalogue, "dropped_edges"):
        edge = row["query"], row["document"]
        assert row["support"] == supports[edge] / 1e6
        if row["reason"] not in ("bot", "support"):
            assert row["similarity"] == (similarity[edge] / 1e6 if edge in similarity else None)
    assert summary["rows"] == {"used": len(set(rows)), "repeated": len(rows) - len(set(rows))}
    assert summary["relations"] == {"same": 2, "unknown": 1, "used": 3}
    counts = {reason: list(dropped.values()).count(reason) for reason in dropped.values()}
    assert {name: n for name, n in summary["edges"].items() if name != "kept"} == counts
    for kind in ("query", "document"):
        flat = [
            sample for documents, queries in found.values() for sample in (queries if kind == "query" else documents)
        ]
        assert np.load(catalogue / f"classes/{kind}.members.npy").tolist() == flat
    named = [row["sample_id"] for row in (*read(catalogue, "members"), *read(catalogue, "quarantine"))]
    assert sorted(named) == list(range(DOCUMENTS + QUERIES))


def test_order_and_repetition_change_nothing(tmp_path):
    rows = draw_rows(3, 0.1, hot=2)
    kept = {}
    for number in range(2):
        catalogue = shop(tmp_path / f"cat{number}")
        random.Random(number).shuffle(rows)
        (tmp_path / f"log{number}").mkdir()
        for part in range(2):
            write_log(tmp_path / f"log{number}/part-{part}.parquet", rows[part::2])
        run(GovernConfig(catalogue=catalogue, clicks=tmp_path / f"log{number}", hold_out_classes=0.3))
        files = {path.name: path.read_bytes() for path in (catalogue / "classes").iterdir()}
        for name in ("manifest.json", "report.html", "report.json"):  # they name the folders
            del files[name]
        said = json.loads(files.pop("governance.json"))
        del said["options"]["clicks"]
        kept[number] = files, said
    assert kept[0] == kept[1]
    assert kept[0][1]["held_out"]["classes"] > 0


def test_chunks_of_edges_give_the_components_of_scipy():
    rng = np.random.default_rng(0)
    u, v = rng.integers(0, 3000, (2, 2500))
    label, seen = lowest(((u[i : i + 100], v[i : i + 100]) for i in range(0, len(u), 100)), 4000)
    _, whole = connected_components(coo_array((np.ones(len(u)), (u, v)), (4000, 4000)), directed=False)
    assert label.tolist() == [np.flatnonzero(whole == part)[0] for part in whole]
    assert np.flatnonzero(seen).tolist() == sorted({*u.tolist(), *v.tolist()})


def test_a_chain_of_a_million_nodes_is_one_component():
    order = np.random.default_rng(1).permutation(1_000_000)
    chain = zip(np.array_split(order[:-1], 5), np.array_split(order[1:], 5), strict=True)
    label, seen = lowest(chain, 1_000_000)
    assert seen.all() and (label == 0).all()


def test_contraction_in_sql_finds_the_components_in_few_rounds(tmp_path):
    rng = np.random.default_rng(2)
    chain = 10 + np.arange(300)  # in the order of the ids a lowest label would take a round for each node
    pairs = [*zip(chain[:-1].tolist(), chain[1:].tolist(), strict=True), *rng.integers(1000, 1400, (300, 2)).tolist()]
    pairs += [(5, 5), (7, 8), (8, 7)]
    pq.write_table(pa.table(dict(zip("ab", zip(*pairs, strict=True), strict=True))), tmp_path / "links.parquet")
    engine = Engine(tmp_path)
    found = contracted(engine, "parts", engine.read([tmp_path / "links.parquet"])).to_pyarrow().to_pylist()
    engine.close()
    graph = nx.Graph((a, b) for a, b in pairs if a != b)
    wanted = {node: min(part) for part in nx.connected_components(graph) for node in part}
    assert {row["document"]: row["component"] for row in found} == wanted and len(found) == len(wanted)
    rounds = len(list(tmp_path.glob("parts-taken-*")))
    assert rounds < 25, rounds


def test_keys_persist_over_growth_merge_and_split(tmp_path):
    catalogue = shop(tmp_path / "cat")
    log = tmp_path / "log.parquet"

    def govern(groups: dict[int, list[int]], linked: list[tuple[int, int]]) -> dict[int, str]:
        """Documents and the queries that click them; pairs of documents that all queries of the first click too."""
        rows = [(f"q{q}", f"d{d}", 9, 10) for d, queries in groups.items() for q in queries]
        rows += [(f"q{q}", f"d{b}", 8, 10) for a, b in linked for q in groups[a]]
        run(GovernConfig(catalogue=catalogue, clicks=write_log(log, rows)))
        return {row["sample_id"]: row["class_key"] for row in read(catalogue, "members") if row["kind"] == "document"}

    def history() -> set[tuple[str | None, str | None, str]]:
        return {(row["previous_key"], row["class_key"], row["event"]) for row in read(catalogue, "history")}

    groups = {2: [0, 1, 2], 4: [3, 4, 5], 6: [6, 7], 8: [8, 9, 10, 11]}
    first = govern(groups, [(8, 9)])
    assert first == {2: "click-0", 4: "click-1", 6: "click-2", 8: "click-3", 9: "click-3"}
    assert history() == {(None, f"click-{n}", "new") for n in range(4)}
    grown = govern({0: [20, 21], **groups, 4: [3, 4, 5, 12, 13]}, [(8, 9)])
    assert grown == {**first, 0: "click-4"}
    assert {event for *_, event in history()} == {"kept", "new"}
    assert [row["class_key"] for row in read(catalogue, "classes")] == ["click-4", *(f"click-{n}" for n in range(4))]
    # d2 and d4 become one, d8 and d9 two, d6 loses its queries.
    changed = govern({0: [20, 21], 2: [0, 1, 2], 4: [3, 4, 5, 12, 13], 8: [8, 9, 10], 9: [11]}, [(4, 2)])
    assert changed == {0: "click-4", 2: "click-1", 4: "click-1", 8: "click-3", 9: "click-5"}
    assert history() == {
        ("click-0", "click-1", "merged"), ("click-1", "click-1", "kept"), ("click-3", "click-3", "kept"),
        ("click-3", "click-5", "split"), ("click-4", "click-4", "kept"), ("click-2", None, "ended"),
    }  # fmt: skip
    # A key is never given twice, also where its class has ended; an append puts the classes aside.
    (catalogue / "classes").rename(catalogue / "classes-80")
    again = govern({**groups, 4: [3, 4, 5, 12, 13], 10: [30, 31]}, [(8, 9)])
    assert again[4] == "click-1" and again[8] == "click-3"
    assert {again[2], again[6], again[10]} == {"click-6", "click-7", "click-8"}


BAD_ROWS: list[tuple[Any, ...]] = [
    (None, "d0", 1, 1, 5), ("q0", None, 1, 1, 5), ("q0", "d0", None, 1, 5), ("q0", "d0", 1, None, 5),
    ("q0", "d0", -1, 1, 5), ("q0", "d0", 1, -1, 5), ("q0", "d0", 3, 2, 5), ("q0", "d0", 1, 1, -5),
    ("q0", "d0", 1, 10**10, 5), ("q0", "zz", 1, 1, 5), ("zz", "d0", 1, 1, 5), ("q-val", "d0", 1, 1, 5),
    ("q0", "d-test", 1, 1, 5), ("q0", "d0", 1, 1, None), ("q0", "d0", 1, 1, 99), ("q9", "d1", 1, 1, 100),
]  # fmt: skip
BAD = {
    "no query": 1, "no document": 1, "no clicks": 1, "no impressions": 1, "negative clicks": 1,
    "negative impressions": 1, "more clicks than impressions": 1, "time before 1970": 1,
    "more than 1,000,000,000 impressions": 1, "unknown query": 1, "unknown document": 1, "query of another split": 1,
    "document of another split": 1, "no time": 1, "after --until": 2,
}  # fmt: skip


def test_bad_rows_are_counted_and_listed(tmp_path, capsys):
    catalogue = shop(tmp_path / "cat")
    good = [(f"q{q}", "d0", 3, 4, 40 - q) for q in range(3)]
    log = write_log(tmp_path / "log.parquet", [*good, *BAD_ROWS], TIMED)
    summary = run(GovernConfig(catalogue=catalogue, clicks=log, until="60"))
    assert summary["rows"] == {"used": 3, "repeated": 0, **BAD}
    listed = read(catalogue, "rejected_clicks")
    assert sum(row["rows"] for row in listed) == len(BAD_ROWS) and {row["reason"] for row in listed} == set(BAD)
    # q9 has late clicks only; q0 has earlier ones too.
    assert read(catalogue, "held_out") == [
        {"sample_id": DOCUMENTS + 9, "kind": "query", "class_key": None, "reason": "time"}
    ]
    assert "are older than the row above them" in capsys.readouterr().out
    assert summary["rows_backwards"] == 4
    said = json.loads((catalogue / "classes/governance.json").read_text())
    assert said["options"]["until"] == "60" and "rows_backwards" not in said and said["rows"] == summary["rows"]


@pytest.mark.parametrize(
    "kind,values,used",
    [
        ("float", [3.0, 1.5, float("nan"), None, 1e300], 1),
        ("text", ["3", "1.5", " 2 ", "", "x"], 2),
        ("csv", ["3", "1.5", " 2 ", "", "x"], 2),
        ("unsigned", [3, 2**64 - 1, 2, 1, 1], 4),
    ],
)
def test_numbers_of_any_type_are_taken(tmp_path, kind, values, used):
    types = {"float": pa.float64(), "unsigned": pa.uint64()}
    table = {
        "query": pa.array([f"q{i}" for i in range(5)]), "document": ["d0"] * 5,
        "clicks": pa.array(values, types.get(kind, pa.string())), "impressions": pa.array([9] * 5, pa.int32()),
    }  # fmt: skip
    log = tmp_path / ("log.csv" if kind == "csv" else "log.parquet")
    if kind == "csv":
        log.write_text(
            "query,document,clicks,impressions\n" + "".join(f"q{i},d0,{n},9\n" for i, n in enumerate(values))
        )
    else:
        pq.write_table(pa.table(table), log)
    with pytest.raises(UserError) as raised:
        run(GovernConfig(catalogue=shop(tmp_path / "cat"), clicks=log, min_support=1.0))
    assert "\n" not in str(raised.value) and f"support {used}" in str(raised.value)


def test_times_of_any_type_are_seconds(tmp_path):
    catalogue, engine = shop(tmp_path / "cat"), Engine(tmp_path)
    samples = engine.read([catalogue / "samples/part-00000.parquet"])
    whole = {"query": ["q0"] * 2, "document": ["d0"] * 2, "clicks": [1] * 2, "impressions": [2] * 2}
    for kind, value, seconds in (
        (pa.timestamp("ns", "Europe/Berlin"), 1_700_000_000_700_000_000, 1_700_000_000),
        (pa.timestamp("us", "UTC"), 1_700_000_000_600_000, 1_700_000_000),
        (pa.timestamp("ms"), 1_700_000_000_500, 1_700_000_000),
        (pa.date32(), 19_675, 19_675 * 86_400),
        (pa.int32(), 1_700_000_000, 1_700_000_000),
    ):
        pq.write_table(pa.table({**whole, "time": pa.array([value, None], kind)}), tmp_path / "log.parquet")
        log = open_log(tmp_path / "log.parquet", tmp_path / "copy.parquet")
        rows = checked(engine.read(log.files), samples, log, "train", None).select("time", "reason").to_pyarrow()
        assert {(row["time"], row["reason"]) for row in rows.to_pylist()} == {(seconds, ""), (None, "")}, kind
    engine.close()


def refusal(tmp_path: Path, **options: Any) -> str:
    catalogue = tmp_path / "cat"
    if not catalogue.exists():
        shop(catalogue)
    with pytest.raises(UserError) as raised:
        run(GovernConfig(catalogue=catalogue, **options))
    assert "\n" not in str(raised.value)
    assert not (catalogue / "classes").exists() and not list(catalogue.glob("classes.tmp/new"))
    return str(raised.value)


def test_what_cannot_be_used_is_refused_in_one_line(tmp_path):
    log = write_log(tmp_path / "log.parquet", [("q0", "d0", 1, 2)])
    assert "has no rows" in refusal(tmp_path, clicks=write_log(tmp_path / "none.parquet", []))
    assert "no such file" in refusal(tmp_path, clicks=tmp_path / "absent.parquet")
    (tmp_path / "text.parquet").write_text("query,document\n")
    assert "text.parquet" in refusal(tmp_path, clicks=tmp_path / "text.parquet")
    whole = write_log(tmp_path / "cut.parquet", draw_rows(0, 0.1, 1) * 30).read_bytes()
    (tmp_path / "cut.parquet").write_bytes(whole[:40] + bytes(400) + whole[440:])
    assert "cannot be governed" in refusal(tmp_path, clicks=tmp_path / "cut.parquet")
    (tmp_path / "log.csv").write_text("query,document,impressions\nq0,d0,3\n")
    assert "'clicks' (--clicks)" in refusal(tmp_path, clicks=tmp_path / "log.csv")
    strange = write_log(tmp_path / "strange.parquet", [("x", "d0", 1, 1), (None, "d1", 1, 1)])
    assert "none of the 2 rows" in (said := refusal(tmp_path, clicks=strange)) and "unknown query 1" in said
    assert "no row has a click" in refusal(tmp_path, clicks=write_log(tmp_path / "shown.parquet", [("q0", "d0", 0, 2)]))
    assert "no column time" in refusal(tmp_path, clicks=log, until="2026-01-01")
    assert "--until is 'soon'" in refusal(tmp_path, clicks=log, until="soon")
    assert "--engine" not in refusal(tmp_path, clicks=log, relations=tmp_path / "absent.tsv")
    assert "no use for --relations" in refusal(tmp_path, relations=log)
    assert "lacks an integer column sample_id" in refusal(tmp_path, clicks=log, embeddings=(log,))
    lists = pa.array([[0.0], [1.0]], pa.list_(pa.float32()))
    pq.write_table(pa.table({"sample_id": [10**6, -1], "embedding": lists}), tmp_path / "other.parquet")
    assert "no row has the sample_id" in refusal(tmp_path, clicks=log, embeddings=(tmp_path / "other.parquet",))
    assert "is a class" in refusal(tmp_path, clicks=log, min_queries=2)
    pq.write_table(pa.table({"query": [[1]], "document": ["d0"], "clicks": [1], "impressions": [1]}), log)
    assert "'query'" in refusal(tmp_path, clicks=log)


def test_hold_out_by_class_leaves_no_sample_in_training(tmp_path):
    catalogue = shop(tmp_path / "cat")
    rows = [(f"q{q}", f"d{q % 12 * 2}", 4, 5) for q in range(QUERIES)]
    log = write_log(tmp_path / "log.parquet", rows)
    keys = {f"click-{number}" for number in range(12)}
    held = run(GovernConfig(catalogue=catalogue, clicks=log, hold_out_classes=0.4))
    out = read(catalogue, "held_out")
    left = {row["class_key"] for row in read(catalogue, "classes")}
    assert 0 < held["held_out"]["classes"] < 12
    assert {row["class_key"] for row in out} == keys - left and held["num_classes"] == len(left)
    assert len(out) == 6 * held["held_out"]["classes"]
    trained = {s for kind in ("query", "document") for s in np.load(catalogue / f"classes/{kind}.members.npy").tolist()}
    assert not trained & {row["sample_id"] for row in out}
    assert not trained & {row["sample_id"] for row in read(catalogue, "quarantine")}


def test_trained_products_are_those_of_the_documents_in_the_classes(tmp_path):
    """A key of the catalogue is trained where a class made of clicks has a document of it, whatever the class's key."""
    columns = {"class_key": ["click-0", "click-1", "click-2"], "tail": [True, False, True]}
    classes = pa.table({**columns, "catalogue_keys": pa.array([["a", "b"], ["b"], None], pa.list_(pa.string()))})
    pq.write_table(classes, tmp_path / "classes.parquet")
    keys = ClassKeys()
    keys.numbers(Coded.of_list(["a", "b", "c", "click-1"]))
    assert [KINDS[kind] for kind in head_and_tail(tmp_path / "classes.parquet", keys)] == [
        "tail", "head", "never trained", "never trained", "never trained",
    ]  # fmt: skip
