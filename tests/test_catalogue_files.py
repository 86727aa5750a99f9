"""Every file of a catalogue, damaged in every way, is refused by its name before anything is read of it; what is odd in
it too, in one line.
"""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from harness.catalogue import store
from harness.catalogue.catalogue import Catalogue, CorruptSample
from harness.catalogue.pairs import Pairs
from harness.catalogue.wholeness import FOLDERS, require_whole
from harness.commands import pairs, queries, verify
from harness.core.errors import UserError
from harness.core.files import sealed
from harness.core.manifest import write_manifest
from harness.data.order import ClassOrder
from harness.text.product_queries import ProductQueries
from harness.text.tokenizer import Tokenizer, TokenStore
from tests.damages import damages
from tests.pool import layout, ranks
from tests.runs import arguments

# Files of a catalogue besides its images.
FILES = (
    *("catalogue.json", "index.npy", "samples/part-00000.parquet", "quarantine.parquet"),
    *(f"classes/{name}" for name in ("classes.parquet", "quarantine.parquet", "governance.json", "manifest.json")),
    *(f"classes/{k}.{a}.npy" for k in ("query", "document") for a in ("members", "member_offsets", "slot_offsets")),
    *(f"tokenizer/{name}" for name in ("spm.model", "tokenizer.json", "manifest.json")),
    *(f"tokenizer/{field}.{a}.npy" for field in ("title", "description") for a in ("tokens", "offsets")),
    *(f"queries/{name}" for name in ("queries.json", "texts.arrow", "manifest.json")),
    *(f"queries/{a}.npy" for a in ("attributes", "keywords", "categories", "text_offsets", "text_clicks")),
    *(f"pairs/{name}" for name in ("pairs.json", "quarantine.parquet", "manifest.json")),
    *(f"pairs/{a}.npy" for a in ("query", "document", "grade")),
)


@pytest.fixture(scope="module")
def prepared(catalogue: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The shared catalogue with queries and pairs; each test leaves it as it was."""
    folder = tmp_path_factory.mktemp("prepared") / "catalogue"
    shutil.copytree(catalogue, folder)
    queries.run(queries.QueriesConfig(catalogue=folder, min_count=1, category="shape"))
    table = folder.parent / "pairs.tsv"
    table.write_text("query_id\tdocument_id\nq0-1\td1\n")
    pairs.run(pairs.PairsConfig(catalogue=folder, table=table))
    return folder


def opened(catalogue: Path) -> None:
    """The steps of a training run with a catalogue before its first step."""
    found = Catalogue(catalogue)
    require_whole(found, None, tuple(FOLDERS))
    ClassOrder.open(catalogue, 1)
    TokenStore.open(catalogue)
    Tokenizer.load(catalogue)
    ProductQueries(found)
    Pairs.open(catalogue)
    found.close()


@contextmanager
def changed(file: Path, data: bytes | None) -> Iterator[None]:
    """Inside, the file holds `data`, or is not there."""
    before = file.read_bytes()
    if data is None:
        file.unlink()
    else:
        file.write_bytes(data)
    try:
        yield
    finally:
        file.write_bytes(before)


def said(call: Callable[[], Any]) -> str:
    """The one line of a UserError; '' where there is none."""
    try:
        call()
    except UserError as error:
        assert "\n" not in str(error) and len(str(error)) < 1000
        return str(error)
    return ""


def verified(catalogue: Path) -> None:
    verify.run(verify.VerifyConfig(paths=(catalogue,)))


def test_a_whole_one_is_found_whole(prepared: Path, capsys: pytest.CaptureFixture[str]) -> None:
    opened(prepared)
    assert capsys.readouterr().out == ""
    files = {str(file.relative_to(prepared)) for file in prepared.rglob("*") if file.is_file()}
    assert {name for name in files if not name.startswith("shards/")} == set(FILES)
    assert verify.run(verify.VerifyConfig(paths=(prepared, prepared), images=True)) == {"things": 12}
    lines = capsys.readouterr().out.splitlines()
    assert lines[:6] == [
        f"{what}: whole"
        for what in (
            f"catalogue {prepared}",
            *(prepared / name for name in FOLDERS),
            f"images of {prepared}",
        )
    ]
    verified(prepared)
    assert f"images of {prepared}: not read; --images reads them" in capsys.readouterr().out


@pytest.mark.parametrize("name", FILES)
def test_a_damaged_file_is_named(prepared: Path, name: str, capsys: pytest.CaptureFixture[str]) -> None:
    file = prepared / name
    named = "" if file.name == "manifest.json" else file.name
    for data in damages(file.read_bytes(), places=8):
        with changed(file, data):
            start = said(lambda: opened(prepared))
            printed = capsys.readouterr().out
            # A manifest that is damaged names a file that seems to be.
            assert file.parent.name in start and named in start and not printed, (data, start)
            assert "damaged or have no checksums" in said(lambda: verified(prepared))
            lines = [line for line in capsys.readouterr().out.splitlines() if not line.endswith(": whole")]
            assert file.parent.name in lines[0] and named in lines[0], lines


@pytest.mark.parametrize("folder", FOLDERS)
def test_what_no_manifest_lists_is_refused(prepared: Path, folder: str) -> None:
    (prepared / folder / "more.npy").write_bytes(b"")
    try:
        assert f"{folder}: more.npy is not listed" in said(lambda: opened(prepared))
    finally:
        (prepared / folder / "more.npy").unlink()


def test_what_an_append_has_not_finished_is_not_damage(prepared: Path, capsys: pytest.CaptureFixture[str]) -> None:
    index = prepared / "index.npy"
    records = np.load(index)
    with changed(index, index.read_bytes() + bytes(500)):
        opened(prepared)
        np.save(index, np.concatenate([records, records[:5]]))
        (prepared / "samples/part-00001.parquet").write_bytes(b"half")
        opened(prepared)
        (prepared / "samples/part-00001.parquet").unlink()
    assert capsys.readouterr().out == ""


def test_a_damaged_place_of_the_shards_is_named(
    prepared: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(store, "FIRST_PAUSE", 0.0)
    copy = Path(shutil.copytree(prepared, tmp_path / "copy"))
    (copy / "shards").rename(tmp_path / "elsewhere")
    place = copy / "shards.json"
    place.write_text(json.dumps({"url": (tmp_path / "elsewhere").as_uri()}))
    opened(copy)
    odd = [
        b"[]",
        b'{"url": 5}',
        b'{"url": "nowhere://x"}',
        b'{"url": "file:///nowhere"}',
        b"[" * 100_000,
        b'{"url": "\0"}',
    ]
    for data in [*damages(place.read_bytes()), *odd]:
        with changed(place, data):
            found = said(lambda: opened(copy))
            assert any(name in found for name in ("shards", "elsewhere", "nowhere")), (data, found)


def without_manifests(catalogue: Path, folder: Path) -> Path:
    """A copy as an earlier version would have made it: without any checksums but those of the images."""
    copy = Path(shutil.copytree(catalogue, folder / "earlier"))
    meta = json.loads((copy / "catalogue.json").read_text())
    (copy / "catalogue.json").write_text(json.dumps({k: v for k, v in meta.items() if k not in ("files", "checksum")}))
    for name in FOLDERS:
        (copy / name / "manifest.json").unlink()
    return copy


def test_one_of_an_earlier_version_is_accepted_and_its_order_compared(
    prepared: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    copy = without_manifests(prepared, tmp_path)
    opened(copy)
    printed = capsys.readouterr().out.splitlines()
    assert len(printed) == 5 and all("of an earlier version, which wrote no checksums; " in line for line in printed)
    assert "append to it, or ingest again" in printed[0] and f"run `shelfmark govern {copy}` again" in printed[1]
    assert "5 of 5 are damaged or have no checksums" in said(lambda: verified(copy))
    members = copy / "classes/query.members.npy"
    array = np.load(members)
    np.save(members, array.astype(np.float64))
    assert "query.members.npy is damaged (it holds no 1-dimensional array of int64)" in said(lambda: opened(copy))
    array[0] ^= 1
    np.save(members, array)
    assert "classes: its arrays differ from the order_id in governance.json. Run `shelfmark govern" in said(
        lambda: opened(copy)
    )


def test_training_is_refused_before_it_begins(prepared: Path, tmp_path: Path) -> None:
    """One changed bit of members made a document a query, and the run ended as if nothing were wrong."""
    members = prepared / "classes/query.members.npy"
    array = np.load(members)
    array[0] ^= 1
    with changed(members, members.read_bytes()):
        np.save(members, array)
        command = [sys.executable, "-m", "harness", "train", *arguments(prepared, tmp_path / "run")]
        done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 2 and not (tmp_path / "run").exists()
    assert done.stderr.splitlines() == [
        f"error: {prepared}/classes: query.members.npy has another checksum. Run `shelfmark govern {prepared}` again"
    ]


@pytest.mark.full
def test_every_command_that_reads_a_catalogue_refuses_a_damaged_one(prepared: Path, tmp_path: Path) -> None:
    run, other = tmp_path / "run", tmp_path / "other"

    def command(*words: object) -> tuple[int, list[str]]:
        argv = [sys.executable, "-m", "harness", *map(str, words)]
        done = subprocess.run(argv, capture_output=True, text=True, env={**os.environ, "OMP_NUM_THREADS": "1"})
        return done.returncode, [
            line for line in done.stderr.splitlines() if line.startswith("error") or "Trace" in line
        ]

    assert command("train", *arguments(prepared, run, **{"train.steps": 1})) == (0, [])
    shutil.copytree(prepared, other)
    samples = other / "samples/part-00000.parquet"
    data = samples.read_bytes()
    samples.write_bytes(data[:300] + bytes([data[300] ^ 1]) + data[301:])
    damage = (
        f"error: catalogue {other}: samples/part-00000.parquet differs from its checksum. Restore it, or ingest again"
    )
    for words in (
        ["eval", run, "--catalogue", other],
        ["eval", run, "--distractors", other],
        ["export", run, "--catalogue", other, "--out", tmp_path / "artefact"],
        ["govern", other],
        ["tokenizer", other, "--vocab-size", 48],
        ["queries", other],
        ["train", *arguments(other, tmp_path / "second")],
    ):
        assert command(*words) == (2, [damage]), words
    assert command("verify", run, prepared, "--images") == (0, [])
    assert command("verify", prepared, other)[0] == 2


def on_ranks(catalogue: Path) -> str:
    with layout() as mesh:
        return said(lambda: require_whole(Catalogue(catalogue), mesh, tuple(FOLDERS)))


def test_ranks_share_the_work_and_agree(prepared: Path) -> None:
    assert ranks(2).run(on_ranks, prepared) == ["", ""]
    for name in ("index.npy", "samples/part-00000.parquet", "tokenizer/title.tokens.npy"):
        file = prepared / name
        with changed(file, file.read_bytes()[:-1] + b"\xff"):
            first, second = ranks(2).run(on_ranks, prepared)
        assert first == second and file.name in first


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"num_shards": 10**9}, "shard-000001.tar is missing"),
        ({"num_shards": 2.0}, "num_shards is 2.0, not an integer"),
        ({"num_parts": 10**9}, "samples/part-00001.parquet is missing"),
        ({"num_samples": 10**12}, "index.npy has 36 entries"),
        ({"num_samples": -1}, "num_samples is -1, not between 0"),
        ({"num_samples": "36"}, "num_samples is '36', not an integer"),
        ({"attributes": [["colour"]]}, "attributes has ['colour'], not text"),
        ({"attributes": ["colour"]}, "samples/ holds other columns"),
        ({"counts": []}, "counts is [], not an object"),
        ({"counts": {"query": 30, "document": 6, "splits": {"train": None}}}, "train is None, not an integer"),
        ({"shard_names": ["../../../etc/passwd"]}, "../../../etc/passwd is missing"),
        ({"shard_names": ["\x1b[2J.tar"]}, r"\x1b[2J.tar is missing"),
        ({"shard_names": {"a": 1}}, "shard_names is {'a': 1}, not a list"),
        ({"appended": 3}, "appended is 3, not a list"),
        ({"shard_names": []}, "names 0 shards and counts 1"),
        ({"format": "1"}, "format '1', this version reads format 1"),
        ({"files": []}, "files is [], not an object"),
        ({"files": {}}, "catalogue.json is damaged (files)"),
        ({"files": {"index.npy": [[36.5, "0"]]}}, "catalogue.json is damaged (files)"),
        ({"files": {"index.npy": [[36, "0"]]}}, "files does not list all of index.npy and samples/"),
    ],
)
def test_an_odd_catalogue_json_is_refused(prepared: Path, change: dict[str, Any], message: str) -> None:
    file = prepared / "catalogue.json"
    odd = json.dumps(sealed({**json.loads(file.read_text()), **change}))
    with changed(file, odd.encode()):
        assert message in said(lambda: opened(prepared))
        assert said(lambda: verified(prepared))


@pytest.mark.parametrize(
    "name", ["catalogue.json", "classes/governance.json", "tokenizer/tokenizer.json", "queries/queries.json"]
)
@pytest.mark.parametrize("text", ["[]", "[" * 100_000, "{}", '{"format": 1}', "null", "\ud800"])
def test_json_of_something_else_is_refused(
    prepared: Path, name: str, text: str, capsys: pytest.CaptureFixture[str]
) -> None:
    file = prepared / name
    with changed(file, text.encode("utf-8", "surrogatepass")):
        if file.parent != prepared:
            write_manifest(file.parent)
        found = said(lambda: opened(prepared))
    if file.parent != prepared:
        write_manifest(file.parent)
    assert file.parent.name in found, found


@pytest.mark.parametrize(
    ("name", "change", "message"),
    [
        ("classes/governance.json", {"num_classes": 10**18}, "num_classes is 1000000000000000000, not between"),
        ("classes/governance.json", {"num_classes": 10**9}, "arrays do not fit together"),
        ("classes/governance.json", {"order_id": 5}, "order_id is 5, not text"),
        ("tokenizer/tokenizer.json", {"vocab_size": 10**12}, "48 pieces, its tokenizer.json says 1000000000000"),
        ("tokenizer/tokenizer.json", {"pad_id": 48}, "pad_id is not one of 48 ids"),
        ("tokenizer/tokenizer.json", {"fields": ["../../x"]}, "fields are not"),
        ("tokenizer/tokenizer.json", {"kind": "pickle"}, "kind is not known"),
        ("tokenizer/tokenizer.json", {"kind": "tokenizers"}, "tokenizers.json: No such file"),
        ("queries/queries.json", {"keywords": [1]}, "keywords has 1, not text"),
        ("queries/queries.json", {"keywords_per_product": 1 << 60}, "keywords_per_product is"),
        ("queries/queries.json", {"attributes": [{"name": "a", "wordings": [[]]}]}, "wordings are not lists of texts"),
        ("queries/queries.json", {"attributes": [{"name": "a", "wordings": 7}]}, "wordings is 7, not a list"),
    ],
)
def test_odd_values_of_derived_files_are_refused(
    prepared: Path, name: str, change: dict[str, Any], message: str
) -> None:
    """Made by somebody who wrote the manifest too."""
    file = prepared / name
    with changed(file, json.dumps({**json.loads(file.read_text()), **change}).encode()):
        write_manifest(file.parent)
        found = said(lambda: opened(prepared))
    write_manifest(file.parent)
    assert message in found and file.parent.name in found, found


@pytest.mark.parametrize("remote", [False, True])
@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"length": 1 << 62}, "shard-000000.tar ends after"),
        ({"offset": (1 << 64) - 1}, "shard-000000.tar ends after 0 of its"),
        ({"length": (1 << 64) - 1, "offset": 1 << 40}, "shard-000000.tar ends after 0 of its"),
        ({"shard": 4_000_000_000}, "the index names shard 4000000000 of 1"),
    ],
)
def test_a_sample_that_the_index_puts_nowhere_costs_itself_alone(
    prepared: Path, tmp_path: Path, change: dict[str, int], message: str, remote: bool
) -> None:
    """It took the memory that it asked for, five times, and then the run ended."""
    copy = without_manifests(prepared, tmp_path)
    if remote:
        (copy / "shards.json").write_text(json.dumps({"url": (prepared / "shards").as_uri()}))
    index = np.load(copy / "index.npy")
    for name, value in change.items():
        index[name][3] = value
    np.save(copy / "index.npy", index)
    catalogue = Catalogue(copy)
    with pytest.raises(CorruptSample, match=message):
        catalogue.read_bytes(3)
    assert catalogue.read_bytes(4)


def test_verify_reads_images_and_names_those_that_are_damaged(
    prepared: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    shard = prepared / "shards/shard-000000.tar"
    data = bytearray(shard.read_bytes())
    for sample in (5, 20):
        data[int(Catalogue(prepared).index["offset"][sample]) + 9] ^= 1
    with changed(shard, bytes(data)):
        verified(prepared)
        config = verify.VerifyConfig(paths=(prepared,), images=True, threads=2)
        assert "1 of 6 are damaged" in said(lambda: verify.run(config))
        line = next(
            line for line in capsys.readouterr().out.splitlines() if line.startswith("images of") and "2 of 36" in line
        )
        assert "sample 5: shard-000000.tar: checksum of" in line and "sample 20: " in line
    assert "no catalogue, run, checkpoint" in said(lambda: verified(tmp_path))
    assert "no such folder" in said(lambda: verified(tmp_path / "absent"))
    assert "nothing to verify" in said(lambda: verify.run(verify.VerifyConfig()))


def test_verify_needs_no_pytorch() -> None:
    check = "import sys, harness.commands.verify; sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", check]).returncode == 0
