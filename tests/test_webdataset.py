"""Webdataset tars become a catalogue where they lie: nothing is copied, and what is read is what the tars hold."""

from __future__ import annotations

import io
import json
import tarfile
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow.parquet as pq
import pytest
from PIL import Image

from harness.catalogue.catalogue import Catalogue
from harness.commands.index import IndexConfig, run
from harness.commands.ingest import IngestConfig
from harness.commands.ingest import run as ingest
from harness.core.errors import UserError


def jpeg(number: int, **options: Any) -> bytes:
    pixels = np.random.default_rng(number).integers(0, 256, (30, 40 + number, 3), dtype=np.uint8)
    file = io.BytesIO()
    Image.fromarray(pixels).save(file, "JPEG", **options)
    return file.getvalue()


def write_tar(path: Path, members: dict[str, bytes]) -> None:
    with tarfile.open(path, "w") as tar:
        for name, data in members.items():
            member = tarfile.TarInfo(name)
            member.size = len(data)
            tar.addfile(member, io.BytesIO(data))


@pytest.fixture
def tars(tmp_path: Path) -> Path:
    """Two tars: three good samples each, and in the second five that cannot be used."""
    folder = tmp_path / "tars"
    folder.mkdir()
    exif = Image.Exif()
    exif[0x0112] = 6
    for part in range(2):
        members: dict[str, bytes] = {}
        for number in range(3):
            key = f"sub/{part}{number:03d}"
            fields = {"id": f"p{part}{number}", "class_id": f"c{number}", "title": f"Title {number}", "brand": "B"}
            if number == 2:
                fields = {"split": "test"}
                members[f"{key}.txt"] = b"From the text\n"
            members[f"{key}.json"] = json.dumps(fields).encode()
            members[f"{key}.jpg"] = jpeg(10 * part + number, **({"exif": exif} if number == 1 else {}))
        if part:
            members |= {
                "x1.json": b"{}",
                "x2.jpg": jpeg(1)[:300],
                "x3.jpg": b"<html>",
                "x4.json": b"[1]",
                "x4.jpg": jpeg(2),
            }
            members |= {"x5.json": b'{"kind": "advert"}', "x5.jpg": jpeg(3)}
        write_tar(folder / f"data-{part}.tar", members)
    return folder


def test_samples_are_read_where_they_lie(tars: Path, tmp_path: Path) -> None:
    before = {path.name: path.read_bytes() for path in tars.iterdir()}
    figures = run(IndexConfig(tars=tars, out=tmp_path / "c", kind="document", attribute_fields="brand"))
    assert {path.name: path.read_bytes() for path in tars.iterdir()} == before
    assert (figures["num_samples"], figures["quarantined"]) == (7, 4), "with --kind an unknown kind does not matter"
    catalogue = Catalogue(tmp_path / "c")
    assert not (tmp_path / "c" / "shards").exists()
    rows = catalogue.table().to_pylist()
    assert [row["item"] for row in rows] == ["p00", "p01", "0002", "p10", "p11", "1002", "x5"]
    assert [row["class_key"] for row in rows] == ["c0", "c1", "0002", "c0", "c1", "1002", "x5"]
    assert [row["split"] for row in rows] == ["all", "all", "test"] * 2 + ["all"]
    assert rows[2]["title"] == "From the text" and rows[0]["title"] == "Title 0" and rows[0]["brand"] == "B"
    assert {row["kind"] for row in rows} == {"document"}
    for sample, seed in enumerate((0, 1, 2, 10, 11, 12)):
        data = catalogue.read_bytes(sample)
        with tarfile.open(tars / f"data-{seed // 10}.tar") as tar:
            file = tar.extractfile(rows[sample]["image"])
            assert file is not None and file.read() == data
        upright = (30, 40 + seed) if seed % 10 == 1 else (40 + seed, 30)
        assert tuple(catalogue.index[sample][["width", "height"]].item()) == upright
    reasons = pq.read_table(tmp_path / "c" / "quarantine.parquet").to_pydict()
    assert [image.rpartition("/")[2] for image in reasons["image"]] == ["x1.json", "x2.jpg", "x3.jpg", "x4.jpg"]
    for reason, expected in zip(
        reasons["reason"], ("no image", "truncated", "not an image", "damaged text"), strict=True
    ):
        assert expected in reason


def test_kinds_may_come_from_the_fields(tars: Path, tmp_path: Path) -> None:
    write_tar(tars / "data-2.tar", {"a.jpg": jpeg(5), "a.json": b'{"kind": "Query"}'})
    run(IndexConfig(tars=tars, out=tmp_path / "c"))
    assert Catalogue(tmp_path / "c").table(["kind"])["kind"].to_pylist() == ["query"]


def test_mistakes_are_told(tars: Path, tmp_path: Path) -> None:
    def refused(message: str, **values: Any) -> None:
        with pytest.raises(UserError, match=message):
            run(IndexConfig(**{"tars": tars, "out": tmp_path / "c", "kind": "document", **values}))
        assert not (tmp_path / "c").exists()

    refused(r"no \.tar file", tars=tmp_path)
    refused("no sample of .* can be used", kind=None)
    (tars / "cut.tar").write_bytes((tars / "data-0.tar").read_bytes()[:3000])
    refused(r"cut\.tar cannot be read as an uncompressed tar")
    (tars / "cut.tar").write_bytes(b"\x1f\x8b" + bytes(2000))
    refused(r"cut\.tar cannot be read as an uncompressed tar")


def test_a_catalogue_of_tars_does_not_grow(tars: Path, tmp_path: Path) -> None:
    run(IndexConfig(tars=tars, out=tmp_path / "c", kind="document"))
    (tmp_path / "a.jpg").write_bytes(jpeg(1))
    (tmp_path / "m.tsv").write_text("image\tid\tkind\na.jpg\ta\tquery\n")
    with pytest.raises(UserError, match="are read from where its"):
        ingest(IngestConfig(manifest=tmp_path / "m.tsv", images=tmp_path, out=tmp_path / "c", append=True))
