"""Tables as shops have them: what spreadsheets, pandas, Spark and the hub write becomes the same text, row by row."""

from __future__ import annotations

import csv
import io
import json
import tarfile
import unicodedata
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from PIL import Image

from harness.catalogue.catalogue import Catalogue
from harness.catalogue.table import Manifest
from harness.commands import index, ingest
from harness.commands.index import IndexConfig
from harness.commands.ingest import IngestConfig
from harness.core.errors import UserError

COLUMNS = ("id", "kind", "split", "image", "class_id", "title", "description")


def jpeg(width: int = 8) -> bytes:
    file = io.BytesIO()
    Image.new("RGB", (width, 6), (200, 90, 90)).save(file, "JPEG")
    return file.getvalue()


@pytest.fixture(scope="module")
def photos(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("photos")
    (folder / "sub").mkdir()
    for name in ("a.jpg", "sub/in.jpg", "with space.jpg", "percent%20name.jpg", unicodedata.normalize("NFD", "é.jpg")):
        (folder / name).write_bytes(jpeg())
    return folder


def products(count: int = 6) -> list[dict[str, str]]:
    """Rows with everything that a delimiter, a quote or an encoding may break."""
    odd = ['Lampe 12" "Luna"', "grün; 5,5 cm | neu", "two\nlines", "", "Käse € 4", "tab\there"]
    return [
        {"id": f"p{n}", "kind": "document", "split": "all", "image": "a.jpg", "class_id": str(40 + n)}
        | {"title": odd[n % len(odd)], "description": f"Text {n}"}
        for n in range(count)
    ]


def written(path: Path, rows: list[dict[str, str]], encoding: str = "utf-8", **options: Any) -> Path:
    with path.open("w", encoding=encoding, newline="") as file:
        writer = csv.writer(file, **options)
        writer.writerow(COLUMNS)
        writer.writerows([row[name] for name in COLUMNS] for row in rows)
    return path


def taken(manifest: Path, photos: Path, out: Path, **options: Any) -> tuple[list[dict[str, Any]], list[str]]:
    """Samples and reasons of the quarantine of one ingest; what was read adds up to both."""
    figures = ingest.run(IngestConfig(manifest=manifest, images=photos, out=out, **{"workers": 1, **options}))
    rows = Catalogue(out).table().to_pylist()
    reasons = pq.read_table(out / "quarantine.parquet")["reason"].to_pylist()
    assert len(rows) == figures["num_samples"] and len(reasons) == figures["quarantined"]
    return rows, reasons


# --- one catalogue by every way in ---


def ways(folder: Path, rows: list[dict[str, str]]) -> dict[str, tuple[Path, dict[str, Any]]]:
    """The same rows in every kind of file, with the flags that it needs."""
    columns = {name: [row[name] for row in rows] for name in COLUMNS}
    numbers = {**columns, "class_id": [float(value) for value in columns["class_id"]]}
    images = [{"bytes": None, "path": path} for path in columns["image"]]
    for kind in ("spark.parquet", "csv-parts"):
        (folder / kind).mkdir()
    for part, some in enumerate((rows[:2], rows[2:])):
        table = pa.Table.from_pylist([{name: row[name] for name in COLUMNS} for row in some])
        pq.write_table(table, folder / "spark.parquet" / f"part-0000{part}-x.snappy.parquet")
        written(folder / "csv-parts" / f"part-{part}.csv", some)
    (folder / "spark.parquet" / "_SUCCESS").touch()
    pq.write_table(pa.table(columns), folder / "text.parquet")
    pq.write_table(pa.table(numbers), folder / "double.parquet")
    pq.write_table(pa.table({**columns, "image": images}), folder / "hub.parquet")
    latin = {"lineterminator": "\n", "quoting": csv.QUOTE_ALL}
    return {
        "csv": (written(folder / "m.csv", rows), {}),
        "semicolons": (written(folder / "semi.csv", rows, "utf-8-sig", delimiter=";"), {}),
        "commas in a tsv": (written(folder / "commas.tsv", rows), {}),
        "quoted tsv": (written(folder / "quoted.tsv", rows, delimiter="\t", quoting=csv.QUOTE_ALL), {}),
        "pandas tsv": (written(folder / "pandas.tsv", rows, delimiter="\t"), {"quoting": "csv"}),
        "utf-16": (written(folder / "u16.csv", rows, "utf-16", delimiter="\t"), {}),
        "utf-16 without a mark": (written(folder / "u16be.csv", rows, "utf-16-be"), {}),
        "cp1252": (written(folder / "latin.csv", rows, "cp1252", **latin), {"encoding": "cp1252"}),
        "a delimiter by flag": (written(folder / "hash.csv", rows, delimiter="#"), {"delimiter": "#"}),
        "parquet": (folder / "text.parquet", {}),
        "doubles": (folder / "double.parquet", {}),
        "hub": (folder / "hub.parquet", {}),
        "a folder": (folder / "spark.parquet", {}),
        "a folder of csv": (folder / "csv-parts", {}),
    }


def test_every_way_in_gives_one_catalogue(photos: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    rows = products()
    expected = [
        {"sample_id": n, **{name.replace("id", "item") if name == "id" else name: row[name] for name in COLUMNS}}
        for n, row in enumerate(rows)
    ]
    for sample in expected:
        sample["class_key"] = sample.pop("class_id")
    said = {}
    for number, (way, (manifest, options)) in enumerate(ways(tmp_path, rows).items()):
        found, reasons = taken(manifest, photos, tmp_path / f"c{number}", **options)
        assert (found, reasons) == (expected, []), way
        said[way] = capsys.readouterr().out
    assert "separated by a semicolon" in said["semicolons"] and "separated by a comma" in said["commas in a tsv"]
    assert "encoding is utf-16" in said["utf-16"] and "encoding is utf-16-be" in said["utf-16 without a mark"]
    assert "cells are quoted" in said["quoted tsv"] and "separated" not in said["csv"]

    (tmp_path / "tars").mkdir()
    with tarfile.open(tmp_path / "tars" / "t.tar", "w") as tar:
        for n, row in enumerate(rows):
            fields = {**row, "class_id": float(row["class_id"])}  # as json.dumps of a data frame gives it
            for name, data in ((f"{n}.jpg", jpeg()), (f"{n}.json", json.dumps(fields).encode())):
                member = tarfile.TarInfo(name)
                member.size = len(data)
                tar.addfile(member, io.BytesIO(data))
    index.run(IndexConfig(tars=tmp_path / "tars", out=tmp_path / "t", workers=1))
    found = Catalogue(tmp_path / "t").table().to_pylist()
    names = [row.pop("image") for row in found]
    assert names == [f"{n}.jpg" for n in range(len(rows))]
    assert found == [{name: value for name, value in row.items() if name != "image"} for row in expected]


def test_numbers_and_nothing_become_one_text(photos: Path, tmp_path: Path) -> None:
    """By table and by sidecar; whole doubles as integers, NaN and null as nothing, an infinity refused by name."""
    values = [40.0, 1e15, -0.0, 0.1, float("nan"), None, True, 2**60, float("inf"), "40.0", "nan"]
    texts = ["40", "1000000000000000", "0", "0.1", "", "", "true", str(2**60), None, "40.0", "nan"]
    (tmp_path / "tars").mkdir()
    with tarfile.open(tmp_path / "tars" / "t.tar", "w") as tar:
        for n, (value, text) in enumerate(zip(values, texts, strict=True)):
            pq.write_table(pa.table({"title": pa.array([value])}), tmp_path / "m.parquet")
            (row,) = Manifest(tmp_path / "m.parquet").rows(["title"])
            assert row.cells[0] == (text or "") and ("infinity" in row.problem) == (text is None), value
            for name, data in ((f"{n}.jpg", jpeg()), (f"{n}.json", json.dumps({"title": value}).encode())):
                member = tarfile.TarInfo(name)
                member.size = len(data)
                tar.addfile(member, io.BytesIO(data))
    index.run(IndexConfig(tars=tmp_path / "tars", out=tmp_path / "t", kind="document", workers=1))
    titles = Catalogue(tmp_path / "t").table(["title"])["title"].to_pylist()
    assert titles == [text for text in texts if text is not None]
    assert pq.read_table(tmp_path / "t" / "quarantine.parquet")["reason"].to_pylist() == [
        "not text: an infinity in 'title'"
    ]


def test_a_class_that_is_nan_is_no_class(photos: Path, tmp_path: Path) -> None:
    table = {"id": ["a", "b"], "kind": ["query"] * 2, "image": ["a.jpg"] * 2, "class_id": [7.0, float("nan")]}
    pq.write_table(pa.table(table), tmp_path / "m.parquet")
    rows, _ = taken(tmp_path / "m.parquet", photos, tmp_path / "c")
    assert [row["class_key"] for row in rows] == ["7", None]


def test_float32_keeps_its_digits(tmp_path: Path) -> None:
    pq.write_table(pa.table({"size": pa.array([0.1, 40, None], pa.float32())}), tmp_path / "m.parquet")
    assert [row.cells[0] for row in Manifest(tmp_path / "m.parquet").rows(["size"])] == ["0.1", "40", ""]


def test_lists_and_objects_are_refused_by_name(photos: Path, tmp_path: Path) -> None:
    for value in (["a"], {"a": 1}):
        pq.write_table(pa.table({"id": ["a"], "image": ["a.jpg"], "title": [value]}), tmp_path / "m.parquet")
        with pytest.raises(UserError, match=r"column 'title' is not text \((list|struct)<"):
            taken(tmp_path / "m.parquet", photos, tmp_path / "c", kind="query")


def test_images_in_the_table_itself(photos: Path, tmp_path: Path) -> None:
    """As `datasets` pushes them to the hub: bytes with a name, without one, and a path alone."""
    images = [
        {"bytes": jpeg(900), "path": "not there.jpg"},
        {"bytes": jpeg(90), "path": None},
        {"bytes": None, "path": "a.jpg"},
        {"bytes": b"<html>", "path": "page.jpg"},
        {"bytes": None, "path": None},
        None,
    ]
    pq.write_table(pa.table({"id": [f"i{n}" for n in range(6)], "image": images}), tmp_path / "m.parquet")
    rows, reasons = taken(tmp_path / "m.parquet", photos, tmp_path / "c", kind="document")
    assert [row["image"] for row in rows] == ["not there.jpg", "m.parquet#1", "a.jpg"]
    catalogue = Catalogue(tmp_path / "c")
    assert [catalogue.read_bytes(n) for n in range(3)] == [jpeg(900), jpeg(90), jpeg()]
    assert [reason.partition(":")[0] for reason in reasons] == ["not an image of a known format"] + [
        "no image path"
    ] * 2
    small = len(jpeg(90))
    _, reasons = taken(tmp_path / "m.parquet", photos, tmp_path / "d", kind="document", max_bytes=small)
    assert small < len(jpeg(900)) and reasons[0] == f"too many bytes: {len(jpeg(900)):,}"


# --- what cannot be recognised is said, with its flag ---


def test_what_was_not_recognised_names_its_flag(
    photos: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    rows = products()
    _, reasons = taken(written(tmp_path / "latin.csv", rows, "cp1252"), photos, tmp_path / "a")
    assert set(reasons) == {"not UTF-8: title"} and "(--encoding)" in capsys.readouterr().out
    found, _ = taken(written(tmp_path / "p.tsv", rows[:1], delimiter="\t"), photos, tmp_path / "b")
    assert found[0]["title"] == '"Lampe 12"" ""Luna"""', "a TSV keeps its quotes"
    assert "1 rows have cells in quotes, which are kept (--quoting csv" in capsys.readouterr().out
    (tmp_path / "mixed.csv").write_text("id;kind;image;price, EUR\n")
    with pytest.raises(UserError, match=r"no column 'image' .* separated by a semicolon there is one \(--delimiter\)"):
        taken(tmp_path / "mixed.csv", photos, tmp_path / "c")
    for options, message in (({"encoding": "utf8-sg"}, "--encoding: unknown"), ({"delimiter": "::"}, "--delimiter is")):
        with pytest.raises(UserError, match=message):
            taken(tmp_path / "mixed.csv", photos, tmp_path / "c", **options)


def test_bad_text_of_another_encoding_costs_its_row(photos: Path, tmp_path: Path) -> None:
    text = "id,kind,image,title\r\na,query,a.jpg,x\r\nb,query,a.jpg,?\r\nc,query,a.jpg,z\r\n".encode("utf-16")
    (tmp_path / "m.csv").write_bytes(text.replace("?".encode("utf-16-le"), b"\x00\xd8") + b"\x00")
    rows, reasons = taken(tmp_path / "m.csv", photos, tmp_path / "c")
    assert [row["item"] for row in rows] == ["a", "c"] and reasons[0] == "not UTF-8: title"


def test_spaces_after_delimiters_belong_to_no_cell(photos: Path, tmp_path: Path) -> None:
    (tmp_path / "m.csv").write_text('id, kind, image, title\np, document, a.jpg, "A, lamp"\n')
    rows, _ = taken(tmp_path / "m.csv", photos, tmp_path / "c")
    assert (rows[0]["item"], rows[0]["title"]) == ("p", "A, lamp")


def test_a_folder_that_is_no_manifest_is_refused(photos: Path, tmp_path: Path) -> None:
    folder = tmp_path / "m"
    folder.mkdir()
    with pytest.raises(UserError, match="a folder without parts of one kind"):
        Manifest(folder)
    written(folder / "1.csv", products(1))
    (folder / "2.csv").write_text("id,kind,picture\n")
    with pytest.raises(
        UserError, match=r"2\.csv and .*1\.csv have different columns: class_id, .* in one of them only"
    ):
        Manifest(folder)
    (folder / "colour=red").mkdir()
    with pytest.raises(UserError, match="holds the folder colour=red"):
        Manifest(folder)


# --- rows cost themselves ---


@pytest.mark.parametrize("quoting", [csv.QUOTE_MINIMAL, csv.QUOTE_ALL])
@pytest.mark.parametrize("where", range(1, 7))
def test_a_lost_quote_costs_its_line(where: int, quoting: Any, photos: Path, tmp_path: Path) -> None:
    rows = [{**row, "title": f"Lamp {n}", "description": f"Oak, {n} cm"} for n, row in enumerate(products())]
    lines = written(tmp_path / "m.csv", rows, lineterminator="\n", quoting=quoting).read_text().splitlines()
    lines[where] = lines[where].rpartition('"')[0]
    (tmp_path / "m.csv").write_text("\n".join(lines) + "\n")
    found, reasons = taken(tmp_path / "m.csv", photos, tmp_path / "c")
    assert [row["item"] for row in found] == [row["id"] for n, row in enumerate(rows) if n + 1 != where]
    assert reasons == [f"malformed: line {where + 1}: a quote that is not closed"]


def test_rows_of_several_lines_are_counted(photos: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Nothing tells a cell of several lines from an open quote that another one closes: how many there are is said."""
    (tmp_path / "m.csv").write_text('id,kind,image,title\na,query,a.jpg,"5 inch\nb,query,a.jpg,7"\nc,query,a.jpg,x\n')
    rows, _ = taken(tmp_path / "m.csv", photos, tmp_path / "c")
    assert len(rows) == 2 and "1 rows go over several lines, 2 lines in all" in capsys.readouterr().out


def test_long_texts_are_taken(photos: Path, tmp_path: Path) -> None:
    rows = [{**row, "title": "soft " * 30_000} for row in products(2)]
    for suffix, delimiter in (("csv", ","), ("tsv", "\t")):
        found, reasons = taken(written(tmp_path / f"m.{suffix}", rows, delimiter=delimiter), photos, tmp_path / suffix)
        assert [len(row["title"]) for row in found] == [150_000] * 2 and not reasons


# --- paths ---


def test_a_path_finds_its_file_however_it_is_spelt(
    photos: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    good = [
        *("a.jpg", "./a.jpg", "a.jpg ", " a.jpg", "a.jpg\u00a0", "\u200ba.jpg", "sub\\in.jpg", ".\\sub\\in.jpg"),
        *("with%20space.jpg", "percent%20name.jpg", unicodedata.normalize("NFC", "é.jpg"), "sub/../a.jpg"),
    ]
    bad = {
        "https://shop.example/a.jpg": "image URL",
        " s3://bucket/a.jpg": "image URL",
        "..\\outside.jpg": "path leads out of the image folder",
        "%2e%2e/outside.jpg": "path leads out of the image folder",
        "gone.jpg": "missing file",
        "C:\\photos\\a.jpg": "missing file",
    }
    (photos.parent / "outside.jpg").write_bytes(jpeg())
    lines = [f"i{n}\t{path}" for n, path in enumerate([*good, *bad])]
    (tmp_path / "m.tsv").write_text("\n".join(["id\timage", *lines]) + "\n", encoding="utf-8")
    rows, reasons = taken(tmp_path / "m.tsv", photos, tmp_path / "c", kind="document")
    assert [row["image"] for row in rows] == good, "the table's own spelling stays"
    assert reasons == list(bad.values())
    said = capsys.readouterr().out
    assert f"The first files that are missing: {photos}/gone.jpg, {photos}/C:\\photos" in said
    assert "Image URLs are not fetched" in said
    (tmp_path / "n.tsv").write_text("id\timage\na\tgone.jpg\n")
    with pytest.raises(UserError, match=rf"1 x missing file\)\. The first files that are missing: {photos}/gone\.jpg"):
        taken(tmp_path / "n.tsv", photos, tmp_path / "d", kind="document")


# --- any table ---

CELLS = st.text(st.sampled_from('a1 ,;"\t\n\\é\u00a0\u200b\x00'), max_size=8) | st.sampled_from(
    ["a.jpg", "query", "document", "nan", "", '"', '""', '"open', "x" * 2000, "https://a/b.jpg", "..", "\udce9"]
)


def some_lines(rows: list[list[str]], delimiter: str) -> bytes:
    return "".join(delimiter.join(row) + "\n" for row in rows).encode("utf-8", "surrogateescape")


def any_text_table(rows: list[list[str]], suffix: str, where: int, photos: Path, folder: Path) -> None:
    """Random cells, joined as they are, among good rows: those before and after are untouched, and all are counted."""
    delimiter = {"csv": ",", "tsv": "\t"}[suffix]
    good = [[f"good{n}", "document", "all", "a.jpg", "c", f"title {n}", "text"] for n in range(6)]
    before, after = good[:where], good[where:]
    manifest = folder / f"m.{suffix}"
    header = delimiter.join(COLUMNS) + "\n"
    manifest.write_bytes(header.encode() + b"".join(some_lines(part, delimiter) for part in (before, rows, after)))
    found, reasons = taken(manifest, photos, folder / "c")
    kept = [row for row in found if row["item"].startswith("good")]
    assert [row["title"] for row in kept[:where]] == [row[5] for row in before]
    read = list(Manifest(manifest).rows(["id"]))
    assert len(read) == len(found) + len(reasons)
    if suffix == "tsv" or not any('"' in cell for row in rows for cell in row):  # where no quote joins lines
        assert [row["title"] for row in kept] == [row[5] for row in good]
        lines = [line for line in some_lines(rows, delimiter).replace(b"\r", b"\n").split(b"\n") if line]
        assert len(read) == len(lines) + 6


def any_parquet(columns: dict[str, list[Any]], photos: Path, folder: Path) -> None:
    """Random values of random types: each row is accepted or quarantined, those of good values always accepted."""
    pq.write_table(pa.table(columns), folder / "m.parquet")
    found, reasons = taken(folder / "m.parquet", photos, folder / "c", kind="document")
    assert len(found) + len(reasons) == len(columns["id"])
    good = {n for n, name in enumerate(columns["id"]) if name == f"good{n}"}
    spoilt = {n for n in good for name in ("title", "class_id") if not is_text(columns[name][n])}
    assert {int(row["item"][4:]) for row in found if row["item"].startswith("good")} == good - spoilt


def is_text(value: Any) -> bool:
    if isinstance(value, bytes):
        return value.decode("utf-8", "replace").encode() == value
    return not isinstance(value, float) or value - value == 0 or value != value


TYPED = [
    st.floats(width=32),
    st.floats(),
    st.integers(-(2**63), 2**63 - 1),
    st.booleans(),
    st.text(st.characters(codec="utf-8"), max_size=9),
    st.binary(max_size=9),
    st.dates(),
    st.decimals(places=2, min_value=-999, max_value=999),
]
TABLE = st.lists(st.lists(CELLS, min_size=5, max_size=8), min_size=1, max_size=4)
COLUMN = st.sampled_from(TYPED).flatmap(lambda kind: st.lists(st.none() | kind, min_size=5, max_size=5))


def fuzz(count: int) -> settings:
    """Without a data base of failures and without a clock."""
    return settings(
        max_examples=count, deadline=None, database=None, derandomize=True, suppress_health_check=list(HealthCheck)
    )


def run_text_tables(count: int, photos: Path, tmp_path_factory: pytest.TempPathFactory) -> None:
    @fuzz(count)
    @given(TABLE, st.sampled_from(["csv", "tsv"]), st.integers(0, 6))
    def text_tables(rows: list[list[str]], suffix: str, where: int) -> None:
        any_text_table(rows, suffix, where, photos, tmp_path_factory.mktemp("t"))

    text_tables()


def run_parquet_tables(count: int, photos: Path, tmp_path_factory: pytest.TempPathFactory) -> None:
    @fuzz(count)
    @given(COLUMN, COLUMN)
    def parquet_tables(titles: list[Any], classes: list[Any]) -> None:
        columns = {"id": [f"good{n}" for n in range(4)] + ["x"], "image": ["a.jpg"] * 5}
        any_parquet({**columns, "title": titles, "class_id": classes}, photos, tmp_path_factory.mktemp("p"))

    parquet_tables()


@pytest.mark.parametrize("kind", [run_text_tables, run_parquet_tables])
def test_any_table_gives_its_rows(kind: Any, photos: Path, tmp_path_factory: pytest.TempPathFactory) -> None:
    kind(20, photos, tmp_path_factory)


@pytest.mark.full
@pytest.mark.parametrize("kind", [run_text_tables, run_parquet_tables])
def test_many_tables_give_their_rows(kind: Any, photos: Path, tmp_path_factory: pytest.TempPathFactory) -> None:
    kind(700, photos, tmp_path_factory)
