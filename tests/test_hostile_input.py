"""Input that nobody means well with: it costs its own row or one line, and neither minutes, nor memory, nor a
traceback.
"""

from __future__ import annotations

import csv
import errno
import io
import json
import os
import re
import struct
import subprocess
import sys
import tarfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from PIL import Image, ImageFont
from tensorboard import plugin_util  # type: ignore[import-untyped]

from harness.artefact.artefact import Photo
from harness.catalogue.catalogue import Catalogue
from harness.catalogue.cells import MOST_TEXT
from harness.catalogue.images import Rejected, check_image
from harness.catalogue.table import Manifest
from harness.catalogue.text_table import MOST_LINE
from harness.commands import index as webdataset
from harness.commands import ingest
from harness.commands.index import IndexConfig
from harness.commands.ingest import IngestConfig
from harness.core.cli import Parser, read_recipe, run_command, tell
from harness.core.errors import UserError
from harness.core.files import printable
from harness.data.preprocess import PreprocessSpec
from harness.evaluate import evaluation as evaluate
from harness.evaluate.contact_sheet import CELL, LONGEST, draw_panel, text_picture
from harness.train import config, panels
from harness.train import tensorboard as board

ESCAPES = "\x1b]0;owned\x07\x1b[2J\r\n  1.  0.9999  forged\x9b"
RED = Image.new("RGB", (16, 12), "red")


def encoded(image: Image.Image = RED, kind: str = "JPEG", **options: Any) -> bytes:
    file = io.BytesIO()
    image.save(file, kind, **options)
    return file.getvalue()


def write_tar(path: Path, members: dict[str, bytes]) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    with tarfile.open(path, "w") as tar:
        for name, data in members.items():
            member = tarfile.TarInfo(name)
            member.size = len(data)
            tar.addfile(member, io.BytesIO(data))


@pytest.fixture
def photos(tmp_path: Path) -> Path:
    folder = tmp_path / "photos"
    folder.mkdir()
    (folder / "a.jpg").write_bytes(encoded())
    return folder


def taken(manifest: Path, photos: Path) -> tuple[dict[str, str], list[str], int]:
    """Titles of the accepted items, reasons of the quarantined rows, and the rows that were read."""
    out = manifest.with_name("catalogue")
    figures = ingest.run(IngestConfig(manifest=manifest, images=photos, out=out, kind="document", workers=2))
    rows = Catalogue(out).table(["item", "title"]).to_pylist()
    reasons = pq.read_table(out / "quarantine.parquet")["reason"].to_pylist()
    assert len(rows) == figures["num_samples"] and len(reasons) == figures["quarantined"]
    return {row["item"]: row["title"] for row in rows}, reasons, len(rows) + len(reasons)


def says(cells: list[bytes], kind: str) -> pa.Array:
    """An array of that kind whatever the bytes are: what some writers leave in a file that says it holds UTF-8."""
    data = pa.array(cells, pa.large_binary() if kind == "large_string" else pa.binary())
    return pa.Array.from_buffers(getattr(pa, kind)(), len(data), data.buffers())


def write_parquet(path: Path, titles: pa.Array, **options: Any) -> Path:
    count = len(titles)
    columns = {"id": [f"i{n}" for n in range(count)], "image": ["a.jpg"] * count, "title": titles}
    pq.write_table(pa.table(columns), path, **options)
    return path


# --- captions ---


def test_a_long_word_is_measured_a_few_times(monkeypatch: pytest.MonkeyPatch) -> None:
    """Measuring takes time in proportion to the text: characters measured in all are bounded, whatever the text has."""
    measured, measure = 0, ImageFont.FreeTypeFont.getlength

    def counted(self: ImageFont.FreeTypeFont, text: str, *more: Any) -> float:
        nonlocal measured
        measured += len(text)
        assert measured < 100 * LONGEST, "minutes of measuring"
        return measure(self, text, *more)

    monkeypatch.setattr(ImageFont.FreeTypeFont, "getlength", counted)
    texts = [
        "x" * 16_000,
        "日本語の商品名" * 1000,
        "a b " * 5000,
        " ".join(["y" * 300] * 300),
        "short",
        "",
        "\n" * 9000,
    ]
    for text in texts:
        measured = 0
        draw_panel([(RED, [(RED, text, None)])])
        text_picture(text)
        assert measured or not text.split()


def test_captions_stay_in_their_cell() -> None:
    from harness.evaluate.contact_sheet import _wrap

    font = ImageFont.load_default(size=11)
    for text in ("x" * 999, "a long title of many words that does not fit at all into two short lines", "日本語" * 99):
        lines = _wrap(text, font)
        assert len(lines) <= 2 and all(font.getlength(line) <= CELL for line in lines) and lines[-1].endswith("…")
        assert font.getlength(lines[-1]) > CELL / 2, "what fits is shown"
    assert _wrap("in one line", font) == ["in one line"]
    edge = np.asarray(text_picture("word " * 400))[[0, -1]]
    assert (edge == 255).all(), "a text leaves its picture"


# --- one gate for the texts of every reader ---

BAD = b"caf\xe9"
TITLES = [b"first", BAD, "Flèche".encode(), b"x" * (MOST_TEXT + 1), b"", b"y" * 150_000, b"last"]


def good_titles() -> dict[str, str]:
    return {f"i{n}": TITLES[n].decode() for n in (0, 2, 4, 5, 6)}


@pytest.mark.parametrize("kind", ["tsv", "csv", "string", "large_string", "binary", "dictionary", "plain"])
def test_a_text_that_is_none_costs_its_own_row(kind: str, photos: Path, tmp_path: Path) -> None:
    if kind in ("tsv", "csv"):
        separator = {"tsv": b"\t", "csv": b","}[kind]
        manifest = tmp_path / f"m.{kind}"
        lines = [b"id", b"image", b"title"], *([f"i{n}".encode(), b"a.jpg", title] for n, title in enumerate(TITLES))
        manifest.write_bytes(b"\n".join(separator.join(line) for line in lines))
    elif kind in ("string", "large_string", "binary"):
        manifest = write_parquet(tmp_path / "m.parquet", says(TITLES, kind))
    else:  # as pages of their own, of one row and of many; a dictionary longer than any text is not unpacked
        long = [*TITLES[:3], b"x" * (5 * MOST_TEXT), *TITLES[4:]]
        manifest = write_parquet(
            tmp_path / "m.parquet", says(long, "string"), use_dictionary=kind == "dictionary", row_group_size=4
        )
    titles, reasons, read = taken(manifest, photos)
    assert titles == good_titles() and read == len(TITLES)
    long_reason = "malformed: line 5" if kind in ("tsv", "csv") else "text too long: "
    assert reasons[0] == "not UTF-8: title" and reasons[1].startswith(long_reason)


def test_a_null_and_a_number_are_text_as_before(photos: Path, tmp_path: Path) -> None:
    for titles, expected in (([None, "b", "b"], ["", "b", "b"]), ([1, None, 3], ["1", "", "3"])):
        for coded in (False, True):
            path = write_parquet(tmp_path / "m.parquet", pa.array(titles), use_dictionary=coded)
            assert [row.cells[0] for row in Manifest(path).rows(["title"])] == expected


@pytest.mark.parametrize(
    ("column", "value"), [("id", "i" * 1025), ("class_id", "c" * 1025), ("split", "s" * 1025), ("image", "p" * 4097)]
)
def test_ids_are_bounded(column: str, value: str, photos: Path, tmp_path: Path) -> None:
    columns = ["id", "image", "class_id", "split", "title"]
    rows = [[f"i{n}", "a.jpg", "c", "all", f"t{n}"] for n in range(3)]
    rows[1][columns.index(column)] = value
    manifest = tmp_path / "m.tsv"
    manifest.write_text("\n".join("\t".join(row) for row in [columns, *rows]))
    titles, reasons, read = taken(manifest, photos)
    assert titles == {"i0": "t0", "i2": "t2"} and read == 3 and reasons[0].startswith("text too long: ")


TARS: dict[str, dict[str, bytes]] = {
    "a lone surrogate": {"b.jpg": encoded(), "b.json": b'{"title": "\\ud800"}'},
    "a lone surrogate as the key of a class": {"b.jpg": encoded(), "b.json": b'{"class_id": "\\udcff"}'},
    "nested JSON": {"b.jpg": encoded(), "b.json": b"[" * 100_000},
    "nested JSON in a field": {"b.jpg": encoded(), "b.json": b'{"title": ' + b"[" * 900 + b"]" * 900 + b"}"},
    "a number of 5,000 digits": {"b.jpg": encoded(), "b.json": b'{"title": ' + b"1" * 5000 + b"}"},
    "Latin-1 text": {"b.jpg": encoded(), "b.txt": BAD},
    "Latin-1 member name": {"caf\udce9.jpg": encoded()},
    "a long title": {"b.jpg": encoded(), "b.txt": b"x" * (MOST_TEXT + 1)},
    "a long id": {"b.jpg": encoded(), "b.json": json.dumps({"id": "i" * 1025}).encode()},
    "large fields": {"b.jpg": encoded(), "b.json": b" " * (webdataset.MOST_FIELDS + 1)},
    "a large image": {"b.jpg": encoded() + bytes(200_000)},
    "escapes": {"b.\x1b[2J": b"", "b.\udce9": b""},
}


@pytest.mark.parametrize("members", TARS.values(), ids=TARS.keys())
def test_a_sample_of_a_tar_costs_itself(
    members: dict[str, bytes], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    good = {"a.jpg": encoded(), "a.json": b'{"title": "before"}', "z.jpg": encoded(), "z.txt": "daná".encode()}
    write_tar(tmp_path / "tars" / "t.tar", dict(list(good.items())[:2]) | members | dict(list(good.items())[2:]))
    settings = IndexConfig(tars=tmp_path / "tars", out=tmp_path / "c", kind="document", workers=1, max_bytes=100_000)
    figures = webdataset.run(settings)
    rows = Catalogue(tmp_path / "c").table(["item", "title"]).to_pylist()
    expected = {"a": "before", "z": "daná"}
    if members is TARS["nested JSON in a field"] and len(rows) == 3:  # as deep as this Python reads
        rows.pop(1)
        assert figures["quarantined"] == 0
    else:
        assert figures["quarantined"] == 1
    assert {row["item"]: row["title"] for row in rows} == expected
    assert "\x1b" not in capsys.readouterr().out
    assert pq.read_table(tmp_path / "c" / "quarantine.parquet").num_rows == figures["quarantined"]


# --- CSV and TSV ---

LINES = ["id,image,title", *(f'i{n},a.jpg,"Title, {n}"' for n in range(6))]


@pytest.mark.parametrize("where", range(1, 7))
@pytest.mark.parametrize("cell", ['"open', '"open, "" still', '5" wide"', '"a"b', '"'])
def test_a_quote_that_is_not_closed_costs_its_own_line(where: int, cell: str, photos: Path, tmp_path: Path) -> None:
    lines = list(LINES)
    lines[where] = f"bad,a.jpg,{cell}"
    manifest = tmp_path / "m.csv"
    manifest.write_text("\n".join(lines) + "\n")
    titles, reasons, read = taken(manifest, photos)
    assert {item: title for item, title in titles.items() if item != "bad"} == {
        f"i{n}": f"Title, {n}" for n in range(6) if n + 1 != where
    }
    assert read == 6
    if cell.startswith('"'):
        assert reasons == [reasons[0]] and f"line {where + 1}: " in reasons[0]


def test_cells_of_several_lines_are_one_row(photos: Path, tmp_path: Path) -> None:
    manifest = tmp_path / "m.csv"
    manifest.write_text('id,image,title\na,a.jpg,"one\ntwo\n\nthree"\nb,a.jpg,"x\ny",one too many\nc,a.jpg,plain\n')
    titles, reasons, read = taken(manifest, photos)
    assert titles == {"a": "one\ntwo\n\nthree", "c": "plain"}
    assert len(reasons) == 2 and read == 4, "an invalid record of several lines is counted line by line"


def test_an_open_quote_before_many_rows_loses_none_of_them(tmp_path: Path) -> None:
    """More text follows than a cell may have: the limit, where reading once went on after the swallowed text."""
    manifest = tmp_path / "m.csv"
    with manifest.open("w", newline="") as file:
        writer = csv.writer(file)
        writer.writerow(["id", "title"])
        file.write('bad,"never closed\n')
        writer.writerows([f"i{n}", "a title of some forty characters, or so " * 3] for n in range(12_000))
    rows = list(Manifest(manifest).rows(["id"]))
    assert manifest.stat().st_size > MOST_TEXT
    assert [row.cells[0] for row in rows if not row.problem] == [f"i{n}" for n in range(12_000)]
    assert [row.problem for row in rows if row.problem] == ["malformed: line 2: a quote that is not closed"]


def test_a_header_that_cannot_be_read_is_not_passed_over(photos: Path, tmp_path: Path) -> None:
    manifest = tmp_path / "m.tsv"
    manifest.write_text(f"id\timage\t{'c' * (MOST_TEXT + 1)}\na\ta.jpg\tx\n")
    with pytest.raises(UserError, match=r"m\.tsv has no header that can be read: malformed: line 1: field larger"):
        Manifest(manifest)
    manifest.write_text(f"id\timage\t{'c' * 200_000}\na\ta.jpg\tx\n")
    assert taken(manifest, photos)[0] == {"a": ""}


def test_a_line_of_any_length_is_one_row(tmp_path: Path) -> None:
    manifest = tmp_path / "m.tsv"
    with manifest.open("w") as file:
        file.write("id\ttitle\nlong\t")
        for _ in range(MOST_LINE // (1 << 20) * 2 + 1):
            file.write("\t".join("z" * 1023 for _ in range(1024)))
        file.write("\nnext\tx\n")
    rows = list(Manifest(manifest).rows(["id"]))
    assert len(rows) == 2 and "more than 16,777,216 characters" in rows[0].problem
    assert rows[1].cells == ["next"] and not rows[1].problem


def test_any_bytes_make_rows(tmp_path: Path) -> None:
    """Random bytes of the kind that matter: never an exception, never a cell that is not in the file."""
    rng = np.random.default_rng(0)
    alphabet = np.frombuffer(b'a",\t\n\r"\x00\xe9\xc3\xa9\x1b ', dtype=np.uint8)
    for case in range(200):
        body = rng.choice(alphabet, rng.integers(0, 400)).tobytes()
        for suffix, header in (("csv", b"a,b\n"), ("tsv", b"a\tb\n")):
            manifest = tmp_path / f"m.{suffix}"
            manifest.write_bytes(header + body)
            rows = list(Manifest(manifest).rows(["a", "b"]))
            assert all(len(row.cells) == 2 for row in rows), case
            lines = [line for line in body.replace(b"\r\n", b"\n").replace(b"\r", b"\n").split(b"\n") if line]
            assert len(rows) <= len(lines) and (suffix == "csv" or len(rows) == len(lines)), case


# --- Parquet ---


def test_a_broken_page_is_one_line(photos: Path, tmp_path: Path) -> None:
    titles = pa.array([f"title {n} {n * 7919 % 10007}" for n in range(20_000)])
    whole = write_parquet(tmp_path / "m.parquet", titles, row_group_size=5000, use_dictionary=False)
    data = bytearray(whole.read_bytes())
    place = pq.ParquetFile(whole).metadata.row_group(2).column(2).data_page_offset
    data[place : place + 40] = b"\xff" * 40
    (tmp_path / "cut.parquet").write_bytes(data)
    with pytest.raises(UserError, match=r"cut\.parquet is damaged after row 10,000 "):
        for _ in Manifest(tmp_path / "cut.parquet").rows(["id", "title"]):
            pass
    (tmp_path / "cut.parquet").write_bytes(data[:5000])
    with pytest.raises(UserError, match=r"cannot read the manifest .*cut\.parquet"):
        Manifest(tmp_path / "cut.parquet")


def peak(body: str, *argv: Any) -> int:
    """MiB that a process of its own held at most while it ran `body`, which must succeed."""
    # Not getrusage, which counts what the process that started it held.
    end = "\nprint('peak', next(int(line.split()[1]) >> 10 for line in open('/proc/self/status') if 'VmHWM' in line))"
    process = subprocess.run([sys.executable, "-c", body + end, *map(str, argv)], capture_output=True, text=True)
    assert process.returncode == 0, process.stderr
    return int(process.stdout.rpartition("peak ")[2])


READ = """
import sys
from pathlib import Path
from harness.catalogue.table import Manifest
assert sum(len(row.cells[0]) == 200_000 for row in Manifest(Path(sys.argv[1])).rows(["title"])) == 8000
"""
COMMAND = "from harness.__main__ import main; assert main() == 0"


def test_a_text_that_many_rows_share_is_not_unpacked_for_all_at_once(tmp_path: Path) -> None:
    """A few kB that stand for 1.6 GB."""
    shared = pa.DictionaryArray.from_arrays(pa.array([0] * 8000, pa.int32()), pa.array(["y" * 200_000]))
    # Without Arrow's schema, which would have it read as the dictionary that it is.
    manifest = write_parquet(tmp_path / "m.parquet", shared, compression="zstd", store_schema=False)
    assert manifest.stat().st_size < 200_000
    assert peak(READ, manifest) < 600


READ_IMAGES = """
import sys
from pathlib import Path
from harness.catalogue.table import Manifest
rows = Manifest(Path(sys.argv[1])).rows(["image"])
assert sum(len(row.cells[0]) + len(row.data or b"") for row in rows) >= 8000 * 200_000
"""


@pytest.mark.parametrize("child", ["path", "bytes"])
def test_an_image_that_many_rows_share_is_not_unpacked_for_all_at_once(child: str, tmp_path: Path) -> None:
    """As above, in the parts of an image struct."""
    long = pa.DictionaryArray.from_arrays(pa.array([0] * 8000, pa.int32()), pa.array([b"y" * 200_000]))
    parts = {"path": pa.array(["a.jpg"] * 8000), "bytes": pa.array([None] * 8000, pa.binary()), child: long}
    images = pa.StructArray.from_arrays(list(parts.values()), list(parts))
    pq.write_table(pa.table({"image": images}), tmp_path / "m.parquet", compression="zstd", store_schema=False)
    assert (tmp_path / "m.parquet").stat().st_size < 200_000
    assert peak(READ_IMAGES, tmp_path / "m.parquet") < 600


# --- tars ---


def test_holes_of_a_sparse_tar_are_not_read(tmp_path: Path) -> None:
    """A tar of 20 kB whose member has 3 GB."""
    hole, folder = tmp_path / "0001.jpg", tmp_path / "tars"
    folder.mkdir()
    with hole.open("wb") as file:
        file.truncate(3 << 30)
    (tmp_path / "0002.jpg").write_bytes(encoded())
    command = ["tar", "-S", "-C", str(tmp_path), "-cf", str(folder / "s.tar"), "0001.jpg", "0002.jpg"]
    subprocess.run(command, check=True)
    assert (folder / "s.tar").stat().st_size < 50_000
    assert peak(COMMAND, "index", folder, "--out", tmp_path / "c", "--kind", "document", "--max-bytes", 4 << 30) < 1000
    assert Catalogue(tmp_path / "c").table(["item"])["item"].to_pylist() == ["0002"]
    reasons = pq.read_table(tmp_path / "c" / "quarantine.parquet")["reason"].to_pylist()
    assert reasons == ["sparse tar member"]


# --- images ---


def test_a_jpeg_that_claims_more_than_it_holds_is_damaged(tmp_path: Path) -> None:
    data = bytearray(encoded())
    place = data.index(b"\xff\xc0")
    data[place + 5 : place + 9] = struct.pack(">HH", 7999, 7999)
    with pytest.raises(Rejected, match=r"truncated or damaged: \d+ bytes cannot hold 7999 x 7999 pixels"):
        check_image(bytes(data), 64_000_000)
    (tmp_path / "a.jpg").write_bytes(data)
    with pytest.raises(UserError, match="cannot hold 7999 x 7999"):
        Photo.open(tmp_path / "a.jpg")
    white = Image.new("L", (3000, 2000), 255)  # as small as encoders make them
    smallest = encoded(white, quality=1, progressive=True, optimize=True)
    assert (check_image(smallest, 64_000_000).width, len(smallest) * 200 < 3000 * 2000) == (3000, True)


# --- the terminal ---


def test_nothing_that_controls_a_terminal_is_printed() -> None:
    shown = printable(f"shoe{ESCAPES}")
    assert shown.isprintable() and shown.startswith("shoe\\x1b]0;owned\\x07") and "\n" not in shown
    assert printable("靴\u3000白い x\u202ey") == "靴\u3000白い x\\u202ey"
    assert len(printable("x" * 10_000)) == 200 and len(printable("\x1b" * 10_000, 40)) == 40


def test_what_no_command_has_escaped_is_escaped_on_its_way_out() -> None:
    body = "import sys; from harness.core.cli import run_command; run_command(lambda: print(sys.argv[1], end='\\t\\n'))"
    answer = subprocess.run([sys.executable, "-c", body, f"靴 é{ESCAPES}"], capture_output=True)
    assert (
        answer.stdout.decode() == "靴 é\\x1b]0;owned\\x07\\x1b[2J\r\n  1.  0.9999  forged\\x9b\t\n"
        and not answer.stderr
    )


def test_an_error_is_one_line(capsys: pytest.CaptureFixture[str]) -> None:
    assert tell(UserError(f"no column {ESCAPES} in caf\udce9", "x" * 100_000)) == 2
    text = capsys.readouterr().err
    assert text.endswith("\n") and text[:-1].isprintable() and len(text) < 2100 and "\\udce9" in text


def test_slices_of_an_evaluation_are_printable() -> None:
    line = evaluate._line(f"brand = {ESCAPES}", {"queries": 3, "map": 0.5}, ["map"], 8)
    assert line.isprintable() and line.endswith("0.5000")


def test_quarantined_kinds_are_printable(photos: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    manifest = tmp_path / "m.tsv"
    kind = ESCAPES.replace("\r\n", "")
    manifest.write_text(f"id\timage\tkind\na\ta.jpg\tquery\nb\ta.jpg\t{kind}\n")
    ingest.run(IngestConfig(manifest=manifest, images=photos, out=tmp_path / "c"))
    assert "\x1b" not in capsys.readouterr().out
    with pytest.raises(UserError) as error:
        ingest.run(IngestConfig(manifest=manifest, images=photos, out=tmp_path / "d", title_column="title"))
    assert "no column 'title'" in str(error.value)


def test_markup_in_a_recipe_is_no_markup_in_tensorboard() -> None:
    evil = "<script>alert(1)</script><img src=x onerror=alert(1)> | more"
    shown = plugin_util.markdown_to_safe_html(board._markdown({"Start": {"note": evil}}, {"run_dir": evil}))
    assert "<script" not in shown and "onerror=alert(1)>" not in shown.replace("&gt;", "") and "<table" in shown
    named = {f"{evil} ![x](http://x/y) [here](http://x) \x1b[2J `a`": 3, "plain_name-1, 50%": 4}
    shown = plugin_util.markdown_to_safe_html(board._markdown({"Catalogue": {"in splits": named}}, {}))
    assert not re.search("<img|<a ", shown)
    assert "\x1b" not in shown and "plain_name-1, 50%" in shown and "&#60;script&#62;" in shown


def test_markup_in_a_title_is_no_markup_in_the_projector(tmp_path: Path, catalogue: Path) -> None:
    evil = "<img src=x onerror=alert(1)>\tmore\n\x1b[2J"

    class Evil(Catalogue):
        def rows(self, *_: Any) -> list[dict[str, Any]]:
            return [dict.fromkeys(["title", "class_key", "item", *self.attributes], evil) | {"sample_id": 0}]

    (tmp_path / "projector").mkdir()
    panels.Projector(tmp_path, Evil(catalogue), 1, (255, 255, 255))._draw([0])
    head, row = (tmp_path / "projector/metadata.tsv").read_text().splitlines()
    assert head.count("\t") == row.count("\t") and not set(row) & set("<>\x1b")


# --- what the system refuses ---


def without_rights(body: Callable[[], Any]) -> None:
    """Runs `body` as a user who owns nothing here; root may read everything."""
    if os.geteuid():
        return body()
    os.seteuid(65534)
    try:
        return body()
    finally:
        os.seteuid(0)


def test_files_that_cannot_be_opened_are_one_line(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    table, closed, loop = tmp_path / "t.parquet", tmp_path / "closed", tmp_path / "loop"
    pq.write_table(pa.table({"a": [1]}), table)
    closed.write_text("x")
    loop.symlink_to("loop")
    for file in (table, closed):
        file.chmod(0)
    bodies: dict[str, Callable[[], Any]] = {
        f"{closed}: Permission denied": lambda: without_rights(lambda: closed.read_text()),
        f"{table}: Permission denied": lambda: without_rights(lambda: pq.read_table(table)),
        f"{tmp_path}: Is a directory": lambda: tmp_path.read_text(),
        f"{closed / 'x'}: Not a directory": lambda: (closed / "x").read_text(),
        f"{loop}: Too many levels of symbolic links": lambda: loop.read_text(),
        f"{tmp_path / ('n' * 300)}: File name too long": lambda: (tmp_path / ("n" * 300)).read_text(),
        f"{tmp_path / 'none'}: No such file or directory": lambda: pq.read_table(tmp_path / "none"),
    }
    for message, body in bodies.items():
        assert run_command(body) == 2
        assert capsys.readouterr().err == f"error: {message}\n"
    assert run_command(lambda: os.fstat(open_too_many())) == 2
    assert capsys.readouterr().err.endswith("Too many open files. Allow more open files (ulimit -n)\n")


def open_too_many() -> int:
    raise OSError(errno.EMFILE, os.strerror(errno.EMFILE))


PRINTS = """
import json, sys
from pathlib import Path
from harness.core.cli import run_command

def body():
    for line in range(100_000):
        print("hit", line)
    Path(sys.argv[1]).write_text("figures")

sys.exit(run_command(body))
"""


def test_a_reader_that_goes_away_ends_nothing(tmp_path: Path) -> None:
    script = f"{sys.executable} -c '{PRINTS}' {tmp_path}/json | head -1; exit ${{PIPESTATUS[0]}}"
    answer = subprocess.run(["bash", "-c", script], capture_output=True, text=True)
    assert (answer.returncode, answer.stdout, answer.stderr) == (0, "hit 0\n", "")
    assert (tmp_path / "json").read_text() == "figures"


@pytest.mark.parametrize(
    ("end", "code", "said"),
    [
        (">/dev/full", 2, "error: standard output: No space left on device. Free space there, then start again\n"),
        (">&-", 0, ""),
        ("| true", 0, ""),
        ("2>/dev/full >/dev/full", 2, ""),
    ],
)
def test_help_goes_wherever_it_is_sent(end: str, code: int, said: str) -> None:
    script = f"{sys.executable} -m harness --help {end}; exit ${{PIPESTATUS[0]}}"
    answer = subprocess.run(["bash", "-c", script], capture_output=True, text=True)
    assert (answer.returncode, answer.stdout, answer.stderr) == (code, "", said)


# --- recipes and numbers ---

BOMB = "a0: &a0 [x]\n" + "".join(f"a{n}: &a{n} [{', '.join([f'*a{n - 1}'] * 9)}]\n" for n in range(1, 20))
RECIPES = {
    "brackets": ("[" * 20_000, "is not YAML"),
    "braces": ("{a: " * 20_000, "is not YAML"),
    "aliases": (BOMB, "an alias .* is not taken"),
    "a number of 5,000 digits": ("seed: " + "9" * 5000, "is not YAML"),
    "too long": ("# " + "x" * (1 << 20), "more than 1,048,576 bytes"),
}


@pytest.mark.parametrize(("text", "message"), RECIPES.values(), ids=RECIPES.keys())
def test_a_recipe_that_is_none_is_one_line(text: str, message: str, tmp_path: Path) -> None:
    (tmp_path / "r.yaml").write_text(text)
    with pytest.raises(UserError, match=message) as error:
        read_recipe(tmp_path / "r.yaml")
    assert "\n" not in str(error.value)
    if text is BOMB:
        with pytest.raises(UserError, match=r"/dev/zero has more than"):
            read_recipe(Path("/dev/zero"))


@pytest.mark.parametrize("key", ["model.vision.num_layers", "model.text.num_layers", "model.text.hidden_size"])
def test_a_model_that_no_machine_holds_is_refused(key: str) -> None:
    with pytest.raises(UserError, match=rf"^{key} is 1000000000\. It must be an int from 1 to 1(0,000,000|,000)"):
        config.parse([f"--{key}=1000000000"])


def test_a_run_folder_with_such_a_model_is_refused(catalogue: Path, tmp_path: Path) -> None:
    text = "method: oclear\nmodel: {text: {num_layers: 1000000000}}\n"
    (tmp_path / "config.yaml").write_text(text)
    with pytest.raises(UserError, match=r"model\.text\.num_layers is 1000000000"):
        config.load(tmp_path)


def test_an_input_size_that_no_machine_holds_is_refused() -> None:
    values = PreprocessSpec().to_dict()
    for size in (10**12, 8193, 0, 3.5, "224", None, [1]):
        with pytest.raises(UserError, match=r"preprocess\.image_size is .* It must be an int from 1 to 8,192"):
            PreprocessSpec.from_dict({**values, "image_size": size})
    for name, value in (("mean", [float("nan"), 0, 0]), ("mean", "abc"), ("crop_scale", [1]), ("flip", "x")):
        with pytest.raises(UserError, match=r"^preprocess\."):
            PreprocessSpec.from_dict({**values, name: value})


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["--share", "1e999"], "share is inf. It must be a finite number"),
        (["--share", ".nan"], "share is nan. It must be a finite number"),
        (["--shares", "[.inf, 1.0]"], "shares is inf"),
        (["--number", "9" * 30], "It must be at most 2\\*\\*63 - 1"),
        (["--number", "0x" + "f" * 5000], "number is far too large"),
        (["--number", "9" * 5000], "number: "),
        (["--shares", "[" * 20_000], "shares"),
    ],
)
def test_a_number_that_is_none_is_refused(words: list[str], message: str) -> None:
    parser = Parser("shelfmark test")
    parser.add_argument("--share", type=float, default=0.5)
    parser.add_argument("--shares", type=tuple[float, ...], default=())
    parser.add_argument("--number", type=int, default=1)
    with pytest.raises(UserError, match=message):
        parser.parse(words)
