"""Ingest and the catalogue: what is accepted, what is quarantined and why, and that a catalogue is whole or absent."""

from __future__ import annotations

import errno
import io
import json
import os
import signal
import struct
import subprocess
import sys
import tarfile
import threading
import zlib
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import xxhash
from PIL import Image

from harness.catalogue import store
from harness.catalogue.catalogue import Catalogue, CorruptSample
from harness.catalogue.table import Manifest
from harness.catalogue.writers import NpyWriter, ParquetWriter
from harness.commands import ingest
from harness.commands.ingest import IngestConfig, run
from harness.core.errors import UserError
from harness.core.files import sealed
from tests.catalogues import COLUMNS, draw_rows, make_catalogue, write_manifest


@pytest.fixture(scope="module")
def drawn(tmp_path_factory) -> tuple[Path, list[dict[str, str]]]:
    """Folder of images and its rows: 6 classes x (1 document + 5 queries)."""
    folder = tmp_path_factory.mktemp("drawn")
    return folder, draw_rows(folder, classes=6, queries=5, size=32, seed=0)


def ingest_rows(drawn, out: Path, rows=None, suffix=".tsv", columns=COLUMNS, **options) -> Path:
    folder, all_rows = drawn
    out.parent.mkdir(parents=True, exist_ok=True)
    manifest = write_manifest(out.with_suffix(suffix), all_rows if rows is None else rows, columns)
    run(IngestConfig(manifest=manifest, images=folder, out=out, **{"workers": 2, **options}))
    return out


def quarantined(out: Path) -> dict[int, str]:
    return {row["row"]: row["reason"] for row in pq.read_table(out / "quarantine.parquet").to_pylist()}


def contents(out: Path) -> dict[str, bytes]:
    """Every file but catalogue.json, which holds the time and the manifest's name."""
    files = sorted(path for path in out.rglob("*") if path.is_file() and path.name != "catalogue.json")
    return {str(path.relative_to(out)): path.read_bytes() for path in files}


def png_header(width: int, height: int) -> bytes:
    """A PNG that claims a size and holds next to nothing."""

    def chunk(name: bytes, data: bytes) -> bytes:
        return struct.pack(">I", len(data)) + name + data + struct.pack(">I", zlib.crc32(name + data))

    header = struct.pack(">IIBBBBB", width, height, 8, 2, 0, 0, 0)
    return b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", header) + chunk(b"IDAT", zlib.compress(b"\0")) + chunk(b"IEND", b"")


def test_catalogue_holds_every_sample(drawn, tmp_path, capsys):
    folder, rows = drawn
    out = ingest_rows(drawn, tmp_path / "cat", attribute_columns="colour,shape")
    captured = capsys.readouterr()
    assert "36 samples (30 queries, 6 documents) in 1 shard" in captured.out
    assert "36/36" in captured.err and "rows/s" in captured.err
    catalogue = Catalogue(out)
    assert (catalogue.num_samples, catalogue.attributes) == (36, ["colour", "shape"])
    table = catalogue.table().to_pylist()
    for number, (row, sample) in enumerate(zip(rows, table, strict=True)):
        expected = {"sample_id": number, "item": row["id"], "class_key": row["class_id"]}
        assert sample == expected | {
            key: row[key] for key in ("kind", "split", "title", "description", "image", "colour", "shape")
        }
        data = (folder / row["image"]).read_bytes()
        assert catalogue.read_bytes(number) == data
        entry = catalogue.index[number]
        assert (entry["length"], entry["xxh3"]) == (len(data), xxhash.xxh3_64_intdigest(data))
        with Image.open(folder / row["image"]) as image:
            assert (entry["width"], entry["height"]) == image.size
    counts = {"query": 30, "document": 6, "quarantined": 0, "splits": {"all": 6, "test": 6, "train": 18, "val": 6}}
    assert catalogue.meta["counts"] == counts
    assert catalogue.meta["source"]["columns"]["class"] == "class_id"
    assert quarantined(out) == {}
    catalogue.close()


def test_shards_are_plain_tar_files(drawn, tmp_path):
    catalogue = Catalogue(ingest_rows(drawn, tmp_path / "cat", shard_size=20_000, rows_per_part=10))
    assert catalogue.meta["num_shards"] == len(list((tmp_path / "cat/shards").iterdir())) > 2
    found = 0
    for shard in range(catalogue.meta["num_shards"]):
        with tarfile.open(tmp_path / f"cat/shards/shard-{shard:06d}.tar") as tar:
            for member in tar:
                entry = catalogue.index[found]
                image = catalogue.table(["image"])["image"][found].as_py()
                assert member.name == f"{found:012d}{Path(image).suffix}"
                assert (shard, member.offset_data, member.size) == entry[["shard", "offset", "length"]].item()
                assert tar.extractfile(member).read() == catalogue.read_bytes(found)
                found += 1
    assert found == 36
    assert [pq.read_metadata(part).num_rows for part in sorted((tmp_path / "cat/samples").iterdir())] == [10, 10, 10, 6]
    assert catalogue.table(["title"])["sample_id"].to_pylist() == list(range(36))


def test_manifest_formats_give_the_same_bytes(drawn, tmp_path):
    tsv, csv, parquet = (
        contents(ingest_rows(drawn, tmp_path / name, suffix=f".{name}", attribute_columns="colour"))
        for name in ("tsv", "csv", "parquet")
    )
    assert tsv == csv == parquet


def test_worker_count_changes_nothing(drawn, tmp_path):
    rows = [dict(row) for row in drawn[1]]
    rows[4]["image"] = "images/absent.jpg"
    rows[9]["kind"] = "advert"
    out = [ingest_rows(drawn, tmp_path / str(workers), rows, workers=workers) for workers in (1, 2, 7)]
    assert contents(out[0]) == contents(out[1]) == contents(out[2])


def test_bad_rows_are_quarantined_with_a_reason(drawn, tmp_path, capsys):
    folder = tmp_path / "images"
    folder.mkdir()
    jpeg = (drawn[0] / drawn[1][0]["image"]).read_bytes()
    png = (drawn[0] / drawn[1][1]["image"]).read_bytes()
    files = {
        "good.jpg": jpeg,
        "cut.jpg": jpeg[: len(jpeg) // 2],
        "cut.png": png[: len(png) // 2],
        "empty.jpg": b"",
        "page.jpg": b"<!DOCTYPE html><html>Not found</html>",
        "many-pixels.png": png_header(9000, 9000),
        "bomb.png": png_header(60_000, 60_000),
        "many-bytes.jpg": jpeg + bytes(200_000),
    }
    buffer = io.BytesIO()
    Image.new("RGB", (8, 8)).save(buffer, "ICO")
    files["small.ico"] = buffer.getvalue()
    for name, data in files.items():
        (folder / name).write_bytes(data)
    (tmp_path / "outside.jpg").write_bytes(jpeg)
    (folder / "folder.jpg").mkdir()
    os.mkfifo(folder / "pipe.jpg")
    cases = [
        ("a", "query", "good.jpg", None),
        ("b", "query", "cut.jpg", "truncated or damaged: "),
        ("c", "query", "cut.png", "truncated or damaged: "),
        ("d", "query", "empty.jpg", "empty file"),
        ("e", "query", "page.jpg", "not an image of a known format: begins with b'<!DOCTYPE html><'"),
        ("f", "query", "small.ico", "ICO files are not read: save them as JPEG, PNG or WebP"),
        ("g", "query", "many-pixels.png", "too many pixels: 9000 x 9000"),
        ("h", "query", "bomb.png", "too many pixels: 60000 x 60000"),
        ("i", "query", "many-bytes.jpg", "too many bytes: "),
        ("j", "query", "absent.jpg", "missing file"),
        ("k", "query", "good.jpg/x.jpg", "missing file"),
        ("l", "query", "folder.jpg", "not a file"),
        ("m", "query", "pipe.jpg", "not a file"),
        ("n", "query", "../outside.jpg", "path leads out of the image folder"),
        ("o", "query", str(tmp_path / "outside.jpg"), "path leads out of the image folder"),
        ("p", "query", "sub/../../outside.jpg", "path leads out of the image folder"),
        ("q", "query", "nul\0.jpg", "cannot be read: "),
        ("r", "query", "", "no image path"),
        ("", "query", "good.jpg", "no item id"),
        ("s", "advert", "good.jpg", "unknown kind: 'advert'"),
        ("t", "", "good.jpg", "unknown kind: ''"),
        ("u", "doc", "sub/../good.jpg", None),
        ("v", "document", str(folder / "good.jpg"), None),
    ]
    manifest = tmp_path / "m.tsv"
    manifest.write_text("\n".join(["id\tkind\timage", *("\t".join(case[:3]) for case in cases)]), encoding="utf-8")
    summary = run(IngestConfig(manifest=manifest, images=folder, out=tmp_path / "cat", max_bytes=100_000, workers=3))
    reasons = quarantined(tmp_path / "cat")
    for number, (*_, image, reason) in enumerate(cases):
        assert (number in reasons) == (reason is not None), (cases[number], reasons.get(number))
        if reason is not None:
            assert reasons[number].startswith(reason)
            row = pq.read_table(tmp_path / "cat/quarantine.parquet").to_pylist()[list(reasons).index(number)]
            assert row["image"] == image
    catalogue = Catalogue(tmp_path / "cat")
    table = catalogue.table(["item", "kind", "title", "class_key", "split"]).to_pylist()
    assert [row["item"] for row in table] == ["a", "u", "v"]  # ids follow the order of the accepted rows
    # No class column: the item id. No title or description is no fault, and no split is every split.
    assert table[1] == {
        "sample_id": 1, "item": "u", "kind": "document", "title": "", "class_key": "u", "split": "all",
    }  # fmt: skip
    assert (summary["quarantined"], summary["reasons"]["truncated or damaged"]) == (20, 2)
    assert "20 rows in quarantine.parquet: 3 x path leads out of the image folder; " in capsys.readouterr().out


def test_malformed_lines_cost_only_themselves(drawn, tmp_path):
    image = drawn[1][0]["image"]
    lines = [
        "id,kind,image,title",
        f'a,query,{image},"red, 5"" disc\nin two lines"',
        f"b,query,{image}",
        f'c,query,{image},"x"y',
        "",
        f"d,query,{image},Fl\udce9che",
        f"e,query,{image},Flèche",
        f'f,query,{image},"never closed',
    ]
    manifest = tmp_path / "m.csv"
    manifest.write_bytes("\n".join(lines).encode("utf-8-sig", "surrogateescape"))
    run(IngestConfig(manifest=manifest, images=drawn[0], out=tmp_path / "cat"))
    titles = Catalogue(tmp_path / "cat").table(["item", "title"]).to_pylist()
    assert [(row["item"], row["title"]) for row in titles] == [("a", 'red, 5" disc\nin two lines'), ("e", "Flèche")]
    reasons = quarantined(tmp_path / "cat")
    assert list(reasons) == [1, 2, 3, 5]
    assert reasons[1] == "wrong number of cells: 3, the header has 4"
    assert reasons[2].startswith("malformed: ") and reasons[5].startswith("malformed: ")
    assert reasons[3] == "not UTF-8: title"
    tsv = tmp_path / "m.tsv"
    tsv.write_text(f'id\tkind\timage\ttitle\na\tquery\t{image}\t5" "disc\n', encoding="utf-8")
    run(IngestConfig(manifest=tsv, images=drawn[0], out=tmp_path / "tsv"))
    assert Catalogue(tmp_path / "tsv").table(["title"])["title"].to_pylist() == ['5" "disc']  # a TSV has no quoting


def test_parquet_cells_become_text(drawn, tmp_path):
    image = drawn[1][0]["image"]
    table = {
        "id": [7, 8],
        "kind": ["query", None],
        "image": [image, image],
        "title": [None, "x"],
        "class_id": [3, None],
    }
    pq.write_table(pa.table(table), tmp_path / "m.parquet")
    run(IngestConfig(manifest=tmp_path / "m.parquet", images=drawn[0], out=tmp_path / "cat", attribute_columns=""))
    (row,) = Catalogue(tmp_path / "cat").table().to_pylist()
    assert (row["item"], row["class_key"], row["title"]) == ("7", "3", "")
    run(IngestConfig(manifest=tmp_path / "m.parquet", images=drawn[0], out=tmp_path / "q", kind="document"))
    rows = Catalogue(tmp_path / "q").table().to_pylist()
    assert [(row["kind"], row["class_key"]) for row in rows] == [("document", "3"), ("document", None)]
    pq.write_table(pa.table({**table, "title": [["a"], ["b"]]}), tmp_path / "nested.parquet")
    with pytest.raises(UserError, match="'title' is not text"):
        run(IngestConfig(manifest=tmp_path / "nested.parquet", images=drawn[0], out=tmp_path / "n"))


def test_columns_are_mapped_by_flags(drawn, tmp_path):
    names = dict(zip(COLUMNS, ("sku", "role", "fold", "file", "group", "name", "text", "colour", "shape"), strict=True))
    rows = [{names[key]: value for key, value in row.items()} for row in drawn[1]]
    flags = {
        "item_column": "sku", "kind_column": "role", "split_column": "fold", "image_column": "file",
        "class_column": "group", "title_column": "name", "description_column": "text",
    }  # fmt: skip
    mapped = ingest_rows(drawn, tmp_path / "mapped", rows, columns=tuple(names.values()), **flags)
    assert contents(mapped) == contents(ingest_rows(drawn, tmp_path / "plain"))


@pytest.mark.parametrize(
    ("options", "absent", "flag", "nearest"),
    [
        ({"image_column": "imgae"}, "imgae", "--image-column", "image"),
        ({"item_column": "idd"}, "idd", "--item-column", "id"),
        ({"kind_column": "kinds"}, "kinds", "--kind-column", "kind"),
        ({"class_column": "class"}, "class", "--class-column", "class_id"),
        ({"title_column": "Titles"}, "Titles", "--title-column", "title"),
        ({"description_column": "descr"}, "descr", "--description-column", "description"),
        ({"split_column": "splits"}, "splits", "--split-column", "split"),
        ({"attribute_columns": "colour,shap"}, "shap", "--attribute-columns", "shape"),
    ],
)
def test_an_absent_column_is_named(drawn, tmp_path, options, absent, flag, nearest):
    with pytest.raises(UserError) as raised:
        ingest_rows(drawn, tmp_path / "cat", **options)
    message = str(raised.value)
    assert f"{tmp_path}/cat.tsv has no column '{absent}' ({flag})" in message
    assert f"most similar first: {nearest}, " in message
    assert all(column in message for column in COLUMNS)
    assert [path.name for path in tmp_path.iterdir()] == ["cat.tsv"]


def test_optional_columns_may_be_absent_needed_ones_not(drawn, tmp_path):
    out = ingest_rows(drawn, tmp_path / "cat", columns=("id", "kind", "image"))
    assert set(Catalogue(out).table(["split"])["split"].to_pylist()) == {"all"}
    with pytest.raises(UserError, match="no column 'kind' \\(--kind-column\\)"):
        ingest_rows(drawn, tmp_path / "cat2", columns=("id", "image"))
    out = ingest_rows(drawn, tmp_path / "cat3", columns=("id", "image"), kind="query")
    assert Catalogue(out).meta["counts"]["query"] == 36
    with pytest.raises(UserError, match="no column 'class_id' \\(--class-column\\)"):
        ingest_rows(drawn, tmp_path / "cat4", columns=("id", "kind", "image"), class_column="class_id")
    with pytest.raises(UserError, match="2 columns 'id'"):
        ingest_rows(drawn, tmp_path / "cat5", columns=("id", "id", "kind", "image"))
    with pytest.raises(UserError, match="'title' is taken"):
        ingest_rows(drawn, tmp_path / "cat6", attribute_columns="title")


def test_several_images_of_one_item(drawn, tmp_path):
    rows = [{**row, "id": f"item-{row['class_id']}"} for row in drawn[1]]
    catalogue = Catalogue(ingest_rows(drawn, tmp_path / "cat", rows))
    assert catalogue.num_samples == 36
    items = catalogue.table(["item"])["item"].to_pylist()
    assert len(set(items)) == 6 and items.count("item-c0") == 6


def test_size_is_that_of_the_upright_image(tmp_path):
    picture = Image.new("RGB", (40, 20), "red")
    for orientation in (1, 3, 6, 8):
        exif = Image.Exif()
        exif[0x0112] = orientation
        picture.save(tmp_path / f"{orientation}.jpg", exif=exif)
        picture.save(tmp_path / f"{orientation}.tif", exif=exif)
    files = [f"{orientation}.{suffix}" for orientation in (1, 3, 6, 8) for suffix in ("jpg", "tif")]
    (tmp_path / "m.tsv").write_text("id\timage\n" + "".join(f"{name}\t{name}\n" for name in files))
    run(IngestConfig(manifest=tmp_path / "m.tsv", images=tmp_path, out=tmp_path / "cat", kind="query"))
    sizes = Catalogue(tmp_path / "cat").index[["width", "height"]].tolist()
    assert sizes == [(40, 20)] * 4 + [(20, 40)] * 4


def test_table_selects_kind_split_and_columns(drawn, tmp_path):
    catalogue = Catalogue(ingest_rows(drawn, tmp_path / "cat", rows_per_part=7))
    table = catalogue.table(["title"], kind="document", split="val")
    assert table.column_names == ["sample_id", "title"] and table["sample_id"].to_pylist() == list(range(0, 36, 6))
    both = catalogue.table(["split"], split="val")
    assert set(both["split"].to_pylist()) == {"val", "all"} and both.num_rows == 12
    assert both["sample_id"].to_pylist() == sorted(both["sample_id"].to_pylist())
    assert catalogue.table(["sample_id"]).column_names == catalogue.table([]).column_names == ["sample_id"]
    streamed = pa.Table.from_batches(catalogue.batches(["item"], kind="query"))
    assert streamed.equals(catalogue.table(["item"], kind="query"))
    with pytest.raises(UserError, match=r"no column 'titel'\. It has title"):
        catalogue.table(["titel"])


def test_out_is_never_overwritten(drawn, tmp_path):
    out = ingest_rows(drawn, tmp_path / "cat")
    before = contents(out)
    with pytest.raises(UserError, match=f"{out} exists already"):
        ingest_rows(drawn, out)
    assert contents(out) == before


def test_nothing_usable_shows_the_commonest_reasons(drawn, tmp_path):
    rows = [dict(row) for row in drawn[1]]
    for number, row in enumerate(rows):
        row |= {"image": "gone.jpg"} if number < 20 else {"kind": "x"} if number < 30 else {"id": ""}
    rows[35] |= {"image": ""}
    with pytest.raises(UserError) as raised:
        ingest_rows(drawn, tmp_path / "cat", rows)
    assert "none of its 36 rows can be used (20 x missing file; 10 x unknown kind; 5 x no item id)" in str(raised.value)
    with pytest.raises(UserError, match=r"none of its 0 rows can be used \(no rows\)"):
        ingest_rows(drawn, tmp_path / "cat2", [])
    assert not [path for path in tmp_path.iterdir() if path.is_dir()]


def test_mistakes_in_the_request_are_named(drawn, tmp_path):
    folder, _ = drawn
    good = make_catalogue(tmp_path / "x", classes=1, queries=1, size=16, ingest=False)
    for manifest, images, message in (
        (tmp_path / "m.xlsx", folder, "unknown kind of manifest '.xlsx'"),
        (tmp_path / "absent.tsv", folder, "cannot read the manifest .*No such file"),
        (tmp_path / "absent.parquet", folder, "cannot read the manifest"),
        (good, tmp_path / "nowhere", "no image folder"),
    ):
        with pytest.raises(UserError, match=message):
            run(IngestConfig(manifest=manifest, images=images, out=tmp_path / "cat"))
    for name, data, message in (("e.tsv", b"", "has no header"), ("n.parquet", b"PAR1", "cannot read the manifest")):
        (tmp_path / name).write_bytes(data)
        with pytest.raises(UserError, match=message):
            run(IngestConfig(manifest=tmp_path / name, images=folder, out=tmp_path / "cat"))
    with pytest.raises(UserError, match="cannot create"):
        run(IngestConfig(manifest=good, images=tmp_path / "x", out=good / "below-a-file"))


def test_full_disk_is_told_and_leaves_nothing(drawn, tmp_path, monkeypatch):
    add = ingest.ShardWriter.add

    def full(self, name, data):
        if name.startswith("000000000010"):
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        return add(self, name, data)

    monkeypatch.setattr(ingest.ShardWriter, "add", full)
    with pytest.raises(UserError, match=f"no space left on the disk of {tmp_path}/cat"):
        ingest_rows(drawn, tmp_path / "cat")
    assert [path.name for path in tmp_path.iterdir()] == ["cat.tsv"]


def test_killed_run_leaves_nothing_and_the_next_one_cleans_up(drawn, tmp_path, capsys):
    manifest = write_manifest(tmp_path / "m.tsv", drawn[1])
    code = f"""
import time
from pathlib import Path
from harness.commands import ingest
add = ingest.ShardWriter.add
def slow(self, name, data):
    if name.startswith("000000000020"):
        print("half way", flush=True)
        time.sleep(60)
    return add(self, name, data)
ingest.ShardWriter.add = slow
ingest.run(ingest.IngestConfig(manifest=Path({str(manifest)!r}), images=Path({str(drawn[0])!r}),
                               out=Path({str(tmp_path / "cat")!r}), workers=2, shard_size=4096))
"""
    process = subprocess.Popen([sys.executable, "-c", code], stdout=subprocess.PIPE, stderr=subprocess.DEVNULL)
    assert process.stdout.readline() == b"half way\n"
    process.send_signal(signal.SIGKILL)
    process.wait()
    process.stdout.close()
    left = sorted(path.name for path in tmp_path.iterdir() if path.is_dir())
    assert left == ["cat.tmp"]
    with pytest.raises(UserError, match="no such folder"):
        Catalogue(tmp_path / "cat")
    with pytest.raises(UserError, match="unfinished"):
        Catalogue(tmp_path / "cat.tmp/new")
    capsys.readouterr()
    ingest_rows(drawn, tmp_path / "cat", shard_size=4096)
    assert "cleared away leftovers of a killed process in cat.tmp" in capsys.readouterr().out
    assert {path for path in tmp_path.iterdir() if path.is_dir()} == {tmp_path / "cat"}
    assert contents(tmp_path / "cat") == contents(ingest_rows(drawn, tmp_path / "undisturbed", shard_size=4096))


def test_everything_is_synced_before_the_rename(drawn, tmp_path, monkeypatch):
    events = []
    fsync, rename = os.fsync, Path.rename
    monkeypatch.setattr(
        os, "fsync", lambda handle: (events.append(os.readlink(f"/proc/self/fd/{handle}")), fsync(handle))
    )
    monkeypatch.setattr(Path, "rename", lambda self, to: (events.append("rename"), rename(self, to))[1])
    out = ingest_rows(drawn, tmp_path / "cat", shard_size=20_000)
    stage = f"{out}.tmp/new"
    events.remove(f"{out}.tmp/lock")
    before = {event.removeprefix(stage).lstrip("/") for event in events[: events.index("rename")]}
    paths = {str(path.relative_to(out)) for path in out.rglob("*")}
    assert paths | {"", "catalogue.json.tmp"} == before  # written beside, synced and renamed
    assert events[-1] == str(tmp_path)


def test_memory_is_bounded_by_the_window(drawn, tmp_path, monkeypatch):
    read = written = held = 0
    rows, add = Manifest.rows, ingest.ShardWriter.add

    def counted_rows(self, columns):
        nonlocal read
        for row in rows(self, columns):
            read += 1
            yield row

    def counted_add(self, name, data):
        nonlocal written, held
        held = max(held, read - written)
        written += 1
        return add(self, name, data)

    monkeypatch.setattr(Manifest, "rows", counted_rows)
    monkeypatch.setattr(ingest.ShardWriter, "add", counted_add)
    ingest_rows(drawn, tmp_path / "cat", workers=2)
    assert (read, written, held) == (36, 36, 8)


def test_images_are_decoded_in_parallel(drawn, tmp_path, monkeypatch):
    together = threading.Barrier(3, timeout=20)
    load = ingest.load_image

    def meet(*arguments):
        together.wait()  # breaks unless three threads are here at once
        return load(*arguments)

    monkeypatch.setattr(ingest, "load_image", meet)
    assert Catalogue(ingest_rows(drawn, tmp_path / "cat", workers=3)).num_samples == 36


def test_corrupt_bytes_are_found_when_read(drawn, tmp_path, monkeypatch):
    out = ingest_rows(drawn, tmp_path / "cat", shard_size=20_000)
    catalogue = Catalogue(out)
    victim = catalogue.index[3]
    shard = out / f"shards/shard-{victim['shard']:06d}.tar"
    with shard.open("r+b") as file:
        file.seek(int(victim["offset"]) + 50)
        byte = file.read(1)[0]
        file.seek(-1, io.SEEK_CUR)
        file.write(bytes([byte ^ 1]))
    with pytest.raises(CorruptSample, match=r"sample 3: shard-000000\.tar: checksum of the") as raised:
        catalogue.read_bytes(3)
    assert raised.value.sample_id == 3
    assert len(catalogue.read_bytes(2)) == catalogue.index[2]["length"]  # its neighbours are unharmed
    os.truncate(shard, int(victim["offset"]) + 10)
    with pytest.raises(CorruptSample, match=r"sample 3: shard-000000\.tar ends after 10 of its"):
        catalogue.read_bytes(3)
    for sample in (-1, 36):
        with pytest.raises(IndexError):
            catalogue.read_bytes(sample)
    catalogue.close()
    shard.unlink()
    monkeypatch.setattr(store, "FIRST_PAUSE", 0.001)
    with pytest.raises(UserError, match=r"shard-000000\.tar cannot be read: No such file or directory \(5 tries\)"):
        catalogue.read_bytes(3)
    with pytest.raises(UserError, match=r"shard-000000\.tar is missing"):
        Catalogue(out)


def test_threads_share_a_catalogue_with_more_shards_than_handles(drawn, tmp_path):
    catalogue = Catalogue(ingest_rows(drawn, tmp_path / "cat", shard_size=1))
    assert catalogue.meta["num_shards"] == 36
    catalogue._store._most = 5
    expected = [catalogue.read_bytes(sample) for sample in range(36)]
    assert len(catalogue._store._handles) == 5
    with ThreadPoolExecutor(8) as pool:
        order = np.random.default_rng(0).integers(0, 36, 400)
        assert list(pool.map(catalogue.read_bytes, order)) == [expected[sample] for sample in order]
    catalogue.close()
    catalogue.close()
    assert catalogue.read_bytes(0) == expected[0]


def test_a_catalogue_that_is_none_is_refused(drawn, tmp_path):
    with pytest.raises(UserError, match="no such folder"):
        Catalogue(tmp_path / "absent")
    with pytest.raises(UserError, match=r"no catalogue\.json in it"):
        Catalogue(tmp_path)
    out = ingest_rows(drawn, tmp_path / "cat")
    meta = json.loads((out / "catalogue.json").read_text())
    for text, message in (
        (json.dumps(meta | {"format": 2}), "format 2, this version reads format 1"),
        (json.dumps(sealed(meta | {"num_samples": 37})), "has 36 entries"),
        (json.dumps(meta | {"num_samples": 35}), "its values differ from their checksum"),
        ("{", r"catalogue\.json is damaged"),
    ):
        (out / "catalogue.json").write_text(text)
        with pytest.raises(UserError, match=message):
            Catalogue(out)


def test_growing_files_read_as_ordinary_ones(tmp_path):
    with NpyWriter(tmp_path / "a.npy", np.int64) as writer:
        for start in range(0, 30_000, 7000):
            writer.append(np.arange(start, start + 7000))
    np.testing.assert_array_equal(np.load(tmp_path / "a.npy", mmap_mode="r"), np.arange(35_000))
    with NpyWriter(tmp_path / "empty.npy", np.int32):
        pass
    assert np.load(tmp_path / "empty.npy").shape == (0,)
    schema = pa.schema([("n", pa.int64())])
    with ParquetWriter(lambda part: tmp_path / f"{part}.parquet", schema, rows_per_part=9000) as rows:
        for number in range(20_000):
            rows.append((number,))
    parts = [pq.read_table(tmp_path / f"{part}.parquet")["n"].to_pylist() for part in range(3)]
    assert [len(part) for part in parts] == [9000, 9000, 2000]
    assert [number for part in parts for number in part] == list(range(20_000))
