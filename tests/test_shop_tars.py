"""Tars as other tools write them: webdataset's names, sidecars that stay with their image, and samples that cost
themselves.
"""

from __future__ import annotations

import io
import json
import tarfile
from pathlib import Path
from typing import Any

import pyarrow.parquet as pq
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from PIL import Image

from harness.catalogue.catalogue import Catalogue
from harness.commands.index import IndexConfig, run
from harness.core.errors import UserError

Members = list[tuple[str, bytes]]


def picture(kind: str = "JPEG") -> bytes:
    file = io.BytesIO()
    Image.new("RGB", (8, 6), (200, 90, 90)).save(file, kind)
    return file.getvalue()


JPEG = picture()


def indexed(folder: Path, members: Members, **options: Any) -> tuple[dict[str, dict[str, Any]], dict[str, str]]:
    """Samples by item, and reasons of the quarantine by image, of a tar with these members."""
    (folder / "tars").mkdir(parents=True)
    with tarfile.open(folder / "tars" / "t.tar", "w") as tar:
        for name, data in members:
            member = tarfile.TarInfo(name)
            member.size = len(data)
            tar.addfile(member, io.BytesIO(data))
    run(IndexConfig(**{"tars": folder / "tars", "out": folder / "c", "kind": "document", "workers": 1, **options}))
    quarantine = pq.read_table(folder / "c" / "quarantine.parquet").to_pylist()
    rows = Catalogue(folder / "c").table().to_pylist()
    reasons = {row["image"].removeprefix("t.tar/"): row["reason"] for row in quarantine}
    assert len({row["item"] for row in rows}) == len(rows) and len(reasons) == len(quarantine)
    return {row["item"]: row for row in rows}, reasons


def sidecar(number: int) -> bytes:
    return json.dumps({"class_id": f"c{number}", "title": f"Title {number}"}).encode()


@pytest.mark.parametrize("last_dot", [False, True])
def test_what_a_mac_adds_is_passed_over(last_dot: bool, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    members: Members = [("./README", b"x"), ("./.DS_Store", b"x")]
    for number in range(3):
        for suffix, data in (("jpg", JPEG), ("json", sidecar(number))):
            members += [(f"./._{number:04d}.{suffix}", b"\0\5\x16\7" + bytes(40)), (f"./{number:04d}.{suffix}", data)]
    rows, reasons = indexed(tmp_path, members, last_dot=last_dot)
    assert not reasons
    assert {item: (row["class_key"], row["title"]) for item, row in rows.items()} == {
        f"{n:04d}": (f"c{n}", f"Title {n}") for n in range(3)
    }
    said = capsys.readouterr().out
    assert "not read: 6 x ._*; 1 x names without a dot; 1 x .*" in said


def test_sidecars_that_do_not_follow_their_image_are_told(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """A tar with all images first: none may pass under a class made up from its name."""
    good: Members = [("good.jpg", JPEG), ("good.json", sidecar(9))]
    members = [*((f"{n}.jpg", JPEG) for n in range(2)), *good, *((f"{n}.json", sidecar(n)) for n in range(3))]
    rows, reasons = indexed(tmp_path, members)
    assert list(rows) == ["good"]
    apart = "members apart: another run of them has this name"
    no_image = {"2.json": "no image: its members are json"}
    assert reasons == dict.fromkeys(("0.jpg", "1.jpg", "0.json", "1.json"), apart) | no_image
    assert "tar --sort=name" in capsys.readouterr().out


def test_the_same_name_twice_with_an_image_each_is_two_samples(tmp_path: Path) -> None:
    (tmp_path / "a").mkdir()
    members: Members = [("x/0.jpg", JPEG), ("x/1.jpg", JPEG), ("x/1.jpg", JPEG), ("y/0.jpg", JPEG)]
    rows, reasons = indexed(tmp_path / "a", members[:2])
    assert list(rows) == ["0", "1"] and not reasons
    _, reasons = indexed(tmp_path / "b", members[:3])
    assert reasons == {"x/1.jpg": "members twice: jpg"}


def test_dots_in_names(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    dates: Members = []
    for number in range(6):
        dates += [(f"photo_2024.05.{number:02d}.jpg", JPEG), (f"photo_2024.05.{number:02d}.json", sidecar(number))]
    good: Members = [("good.jpg", JPEG), ("good.json", sidecar(9))]
    rows, reasons = indexed(tmp_path / "a", [*dates, *good])
    assert list(rows) == ["good"] and len(reasons) == 6
    expected = ", ".join(f"05.{n:02d}.jpg" for n in range(5))
    assert set(reasons.values()) == {f"several images of one name: {expected}, …"}
    advice = "A name ends at its first dot, as in webdataset; --last-dot true ends it at the last"
    assert advice in capsys.readouterr().out
    with pytest.raises(UserError, match=r"6 x several images of one name\)\. A name ends at its first dot.*--last-dot"):
        indexed(tmp_path / "b", dates)
    rows, reasons = indexed(tmp_path / "c", [*dates, *good], last_dot=True)
    assert not reasons and rows["photo_2024.05.03"]["class_key"] == "c3" and rows["good"]["title"] == "Title 9"


def test_extensions_of_several_parts(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """webdataset reads a member by the last part of its extension."""
    members: Members = []
    for number in range(2):
        members += [(f"s{number}.input.jpg", JPEG), (f"s{number}.outputs.txt", b"a lamp\n")]
        members += [(f"s{number}.meta.json", sidecar(number).replace(b"title", b"x")), (f"s{number}.cls", b"1")]
    two = [("t.input.jpg", JPEG), ("t.a.txt", b"a"), ("t.b.txt", b"b")]
    plain = [("u.jpg", JPEG), ("u.seg.json", b"{"), ("u.png", b""), ("u.ocr.txt", b"x")]
    rows, reasons = indexed(tmp_path, [*members, *two, *plain])
    assert {item: (row["class_key"], row["title"]) for item, row in rows.items()} == {
        "s0": ("c0", "a lamp"), "s1": ("c1", "a lamp"), "u": ("u", ""),
    }  # fmt: skip
    assert reasons == {"t.input.jpg": "several members of one kind: a.txt, b.txt"}
    assert "not read: 2 x .cls; 1 x .json; 1 x .png" in capsys.readouterr().out


def test_images_of_every_suffix(tmp_path: Path) -> None:
    kinds = {"JPG": "JPEG", "jpeg": "JPEG", "jpe": "JPEG", "jfif": "JPEG", "png": "PNG", "webp": "WEBP", "bmp": "BMP"}
    kinds |= {"tif": "TIFF", "jp2": "JPEG2000", "ppm": "PPM"}
    members = [(f"{suffix}.{suffix}", picture(kind)) for suffix, kind in kinds.items()]
    rows, reasons = indexed(
        tmp_path, [*members, ("svg.svg", b"<svg/>"), ("heic.heic", b"\0\0\0\x18ftypheic" + bytes(99))]
    )
    assert list(rows) == list(kinds)
    assert reasons["svg.svg"] == "no image: its members are svg" and not reasons["heic.heic"].startswith("no image")


FIELDS: dict[str, tuple[bytes, str]] = {
    "a lone surrogate": (b'{"title": "\\ud800"}', "not UTF-8: title"),
    "a list": (b'{"title": ["a"]}', "not text: a list in 'title'"),
    "an object": (b'{"class_id": {"a": 1}}', "not text: an object in 'class_id'"),
    "an infinity": (b'{"class_id": 1e999}', "not text: an infinity in 'class_id'"),
    "no item": (b'{"id": null}', "no item id"),
    "a blank item": (b'{"id": " "}', "no item id"),
    "no object": (b"[1]", "damaged text: no object"),
}


@pytest.mark.parametrize("case", FIELDS)
def test_a_sidecar_costs_its_own_sample(case: str, tmp_path: Path) -> None:
    data, reason = FIELDS[case]
    members: Members = [("a.jpg", JPEG), ("bad.jpg", JPEG), ("bad.json", data), ("z.jpg", JPEG), ("z.json", sidecar(1))]
    rows, reasons = indexed(tmp_path, members)
    assert list(rows) == ["a", "z"] and rows["z"]["title"] == "Title 1" and reasons == {"bad.jpg": reason}


def test_fields_are_read_as_cells_are(tmp_path: Path) -> None:
    fields = {
        "a": {"id": 7, "class_id": None, "title": None, "size": 40.0, "split": " val "},
        "b": {"id": "b ", "class_id": float("nan"), "title": " as it is ", "size": True},
        "c": {"class_id": 12.0},
    }
    members: Members = []
    for name, values in fields.items():
        members += [(f"{name}.jpg", JPEG), (f"{name}.json", json.dumps(values).encode()), (f"{name}.txt", b"text\n")]
    rows, _ = indexed(tmp_path, members, attribute_fields="size")
    assert [(row["item"], row["class_key"], row["title"], row["split"], row["size"]) for row in rows.values()] == [
        ("7", None, "text", "val", "40"), ("b", None, " as it is ", "all", "true"), ("c", "12", "text", "all", ""),
    ]  # fmt: skip


def test_attribute_fields_are_checked(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="--attribute-fields: 'title' is taken"):
        indexed(tmp_path, [("a.jpg", JPEG)], attribute_fields="title")


JSON = st.recursive(
    st.none() | st.booleans() | st.floats() | st.integers() | st.text(max_size=5) | st.just("\ud800"),
    lambda inner: st.lists(inner, max_size=2) | st.dictionaries(st.text(max_size=3), inner, max_size=2),
    max_leaves=4,
)
NAMES = st.sampled_from(["", "x", "x.y", ".", "._x", "1", "1.json", "\udce9", "good0", "é"])
ENDS = st.sampled_from(["jpg", "json", "txt", "JPG", "a.jpg", "a.json", "cls", "", "png"])
DATA = st.sampled_from([JPEG, JPEG[:50], b"", b"{}", b"\xff"]) | st.dictionaries(
    st.sampled_from(["id", "class_id", "title", "split", "brand"]), JSON, max_size=3
).map(lambda value: json.dumps(value).encode())
MEMBERS = st.lists(st.tuples(NAMES, ENDS, DATA), max_size=6)


def run_fuzz(count: int, tmp_path_factory: pytest.TempPathFactory) -> None:
    @settings(
        max_examples=count, deadline=None, database=None, derandomize=True, suppress_health_check=list(HealthCheck)
    )
    @given(MEMBERS, st.booleans())
    def tars(members: list[tuple[str, str, bytes]], last_dot: bool) -> None:
        """Good samples before and after keep all that they have; every image is accepted or quarantined."""
        good: Members = []
        for n in range(4):
            good += [(f"k{n}.jpg", JPEG), (f"k{n}.json", sidecar(n))]
        some = [(f"{name}.{end}", data) for name, end, data in members]
        folder = tmp_path_factory.mktemp("tar")
        (folder / "tars").mkdir()
        with tarfile.open(folder / "tars" / "t.tar", "w") as tar:
            for name, data in [*good[:4], *some, *good[4:]]:
                member = tarfile.TarInfo(name)
                member.size = len(data)
                tar.addfile(member, io.BytesIO(data))
        figures = run(
            IndexConfig(
                tars=folder / "tars", out=folder / "c", kind="document", workers=1, last_dot=last_dot,
                attribute_fields="brand",
            )
        )  # fmt: skip
        rows = Catalogue(folder / "c").table().to_pylist()
        kept = [(row["class_key"], row["title"]) for row in rows if row["image"][:1] == "k"]
        assert kept == [(f"c{n}", f"Title {n}") for n in range(4)]
        reasons = pq.read_table(folder / "c" / "quarantine.parquet")["row"].to_pylist()
        assert (len(rows), len(reasons)) == (figures["num_samples"], figures["quarantined"])

    tars()


def test_any_tar_gives_its_samples(tmp_path_factory: pytest.TempPathFactory) -> None:
    run_fuzz(30, tmp_path_factory)


@pytest.mark.full
def test_many_tars_give_their_samples(tmp_path_factory: pytest.TempPathFactory) -> None:
    run_fuzz(600, tmp_path_factory)
