"""Catalogues that grow and catalogues ingested in parts: both are, id by id, what one ingest of all rows gives."""

from __future__ import annotations

import json
import os
import shutil
import signal
import subprocess
import sys
from pathlib import Path
from typing import Any

import pyarrow.parquet as pq
import pytest

from harness.catalogue.catalogue import Catalogue
from harness.catalogue.wholeness import require_whole
from harness.commands import govern, merge, tokenizer
from harness.commands.ingest import IngestConfig, run
from harness.commands.merge import MergeConfig
from harness.core.errors import UserError
from harness.core.staged_folder import held
from harness.data.order import ClassOrder
from harness.text.tokenizer import TokenStore
from tests.catalogues import COLUMNS, draw_rows, write_manifest

ROOT = Path(__file__).parents[1]
Drawn = tuple[Path, list[dict[str, str]]]


@pytest.fixture(scope="module")
def drawn(tmp_path_factory: pytest.TempPathFactory) -> Drawn:
    """Folder of images and its rows, 6 classes x (1 document + 5 queries); two rows are for the quarantine."""
    folder = tmp_path_factory.mktemp("drawn")
    rows = draw_rows(folder, classes=6, queries=5, size=32, seed=0)
    rows[4]["image"], rows[30]["kind"] = "images/absent.jpg", "advert"
    return folder, rows


def ingest(drawn: Drawn, out: Path, rows: slice = slice(None), suffix: str = ".tsv", **options: Any) -> dict[str, Any]:
    manifest = write_manifest(out.with_suffix(suffix), drawn[1][rows], COLUMNS)
    options = {"attribute_columns": "colour,shape", "workers": 2, **options}
    return run(IngestConfig(manifest=manifest, images=drawn[0], out=out, **options))


def snapshot(out: Path) -> dict[str, Any]:
    """All that a reader gets, by id, after its checksums matched; only the places in the shards are left out."""
    catalogue = Catalogue(out)
    require_whole(catalogue)
    try:
        return {
            "rows": catalogue.table().to_pylist(),
            "bytes": [catalogue.read_bytes(sample) for sample in range(catalogue.num_samples)],
            "index": catalogue.index[["length", "xxh3", "width", "height"]].tolist(),
            "counts": catalogue.meta["counts"],
            "attributes": catalogue.attributes,
        }
    finally:
        catalogue.close()


def files(out: Path) -> dict[str, bytes]:
    return {str(path.relative_to(out)): path.read_bytes() for path in out.rglob("*") if path.is_file()}


def test_appends_equal_one_ingest(drawn: Drawn, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    ingest(drawn, tmp_path / "whole")
    out = tmp_path / "grown"
    ingest(drawn, out, slice(0, 14), shard_size=8192, rows_per_part=5)
    before = files(out)
    reader = Catalogue(out)
    first = reader.table().to_pylist()
    ingest(drawn, out, slice(14, 15), append=True)
    capsys.readouterr()
    figures = ingest(drawn, out, slice(15, 36), append=True, shard_size=8192, rows_per_part=4)
    printed = capsys.readouterr().out
    assert f"{out}: +20 samples (18 queries, 2 documents) in " in printed
    assert "1 rows in quarantine-00002.parquet: 1 x unknown kind" in printed
    assert (
        f"now 34 samples; the previous classes/ and tokenizer/ do not fit them. Next: shelfmark govern {out}; "
        in printed
    )
    assert snapshot(out) == snapshot(tmp_path / "whole")
    after = files(out)
    for name, data in before.items():
        if name not in ("catalogue.json", "index.npy"):
            assert after[name] == data, name
    assert (figures["num_samples"], figures["added"], figures["quarantined"]) == (34, 20, 2)
    meta = json.loads(after["catalogue.json"])
    assert meta["num_shards"] == figures["num_shards"] == len(list((out / "shards").iterdir())) > 5
    assert meta["num_parts"] == len(list((out / "samples").iterdir())) == 3 + 1 + 5
    assert [source["manifest"] for source in meta["appended"]] == [str(out.with_suffix(".tsv"))] * 2
    assert [row["row"] for row in pq.read_table(out / "quarantine-00002.parquet").to_pylist()] == [15]
    assert not list(out.glob("append*"))
    # One that was open all the time still reads its own samples.
    assert (reader.num_samples, len(reader.index), reader.table().to_pylist()) == (13, 13, first)
    assert [len(reader.read_bytes(sample)) for sample in range(13)] == reader.index["length"].tolist()
    reader.close()


def test_classes_and_tokens_of_before_are_refused(drawn: Drawn, tmp_path: Path) -> None:
    out = tmp_path / "cat"
    ingest(drawn, out, slice(0, 24))
    govern.run(govern.GovernConfig(catalogue=out))
    tokenizer.run(tokenizer.TokenizerConfig(catalogue=out, vocab_size=40))
    ClassOrder.open(out, seed=0)
    TokenStore.open(out)
    ingest(drawn, out, slice(24, 36), append=True)
    with pytest.raises(UserError, match="has no classes; run: shelfmark govern"):
        ClassOrder.open(out, seed=0)
    with pytest.raises(UserError, match=r"tokens in .* do not fit the catalogue"):
        TokenStore.open(out)
    assert (out / "classes-23/governance.json").is_file()
    assert govern.run(govern.GovernConfig(catalogue=out))["num_classes"] == 5  # the sixth has no document


@pytest.mark.parametrize("point", ["ingest.ShardWriter.close", "growth._grow_index", "growth._replace_meta"])
def test_killed_append_leaves_the_old_catalogue_and_the_next_one_completes(
    drawn: Drawn, tmp_path: Path, point: str
) -> None:
    out = tmp_path / "cat"
    ingest(drawn, out, slice(0, 14))
    before = snapshot(out)
    manifest = write_manifest(tmp_path / "m.tsv", drawn[1][14:])
    code = f"""
import time
from pathlib import Path
from harness.catalogue import append as growth
from harness.commands import ingest
def wait(*arguments):
    print("there", flush=True)
    time.sleep(60)
{point} = wait
ingest.run(ingest.IngestConfig(
    manifest=Path({str(manifest)!r}), images=Path({str(drawn[0])!r}), out=Path({str(out)!r}), append=True, workers=2,
    attribute_columns="colour,shape", shard_size=4096, rows_per_part=3))
"""
    with subprocess.Popen(
        [sys.executable, "-c", code], stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True, cwd=ROOT
    ) as process:
        assert process.stdout is not None
        for line in process.stdout:
            if line == "there\n":
                break
        try:
            during = snapshot(out)
        finally:
            process.kill()
    assert process.returncode == -signal.SIGKILL
    assert during == snapshot(out) == before
    if point != "ingest.ShardWriter.close":
        assert len(list((out / "samples").iterdir())) > 1  # the kill was in the midst of publishing
    # The next append is smaller than the killed one: nothing of that may show.
    ingest(drawn, out, slice(14, 20), append=True)
    ingest(drawn, tmp_path / "whole", slice(0, 20))
    assert snapshot(out) == snapshot(tmp_path / "whole")
    assert not list(out.glob("append*"))
    assert (len(list((out / "shards").iterdir())), len(list((out / "samples").iterdir()))) == (2, 2)
    assert len(Catalogue(out).index) == 19
    assert (out / "index.npy").stat().st_size == (tmp_path / "whole/index.npy").stat().st_size


def test_an_append_that_cannot_be_is_refused(drawn: Drawn, tmp_path: Path) -> None:
    out = tmp_path / "cat"
    with pytest.raises(UserError, match="no such folder"):
        ingest(drawn, out, append=True)
    ingest(drawn, out, slice(0, 14))
    before = files(out)
    with pytest.raises(UserError, match=r"has the attributes colour, shape, not colour\. Give --attribute-columns"):
        ingest(drawn, out, slice(14, 36), append=True, attribute_columns="colour")
    with pytest.raises(UserError, match="none of its 1 rows can be used"):
        ingest(drawn, out, slice(30, 31), append=True)
    with pytest.raises(UserError, match="exclude each other"):
        ingest(drawn, out, append=True, part="1/2")
    with held(out / "append"), pytest.raises(UserError, match="append is in use by `"):
        ingest(drawn, out, slice(14, 36), append=True)
    assert files(out) == before
    (out / "shards.json").write_text("{}")
    with pytest.raises(UserError, match=r"are read from where its shards\.json says"):
        ingest(drawn, out, slice(14, 36), append=True)


def test_an_append_again_adds_nothing(drawn: Drawn, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    out = tmp_path / "cat"
    ingest(drawn, out, slice(0, 14))
    ingest(drawn, out, slice(14, 24), append=True)
    before = files(out)
    capsys.readouterr()
    figures = ingest(drawn, out, slice(14, 24), append=True, workers=1)
    assert f"{out}: these rows are there already" in capsys.readouterr().out
    assert (figures["added"], figures["num_samples"]) == (0, 23) and files(out) == before
    assert ingest(drawn, out, slice(14, 24), append=True, max_pixels=10**6)["added"] == 10  # another request
    assert ingest(drawn, out, slice(14, 25), append=True)["added"] == 11  # other rows
    assert ingest(drawn, out, slice(14, 24), append=True)["added"] == 10  # not the last one


def test_an_append_removes_nothing_but_what_an_append_left(drawn: Drawn, tmp_path: Path) -> None:
    """A file of somebody else's there is neither removed nor counted, wherever its name sorts."""
    out = tmp_path / "cat"
    ingest(drawn, out, slice(0, 14))
    strange = [out / folder / name for folder in ("shards", "samples") for name in ("README", "zz-notes.txt", "a.json")]
    for file in strange:
        file.write_text("precious")
    (out / "append").mkdir()
    left = [out / "shards/shard-000007.tar", out / "samples/part-00003.parquet"]
    for file in left:
        file.write_text("of a killed append")
    ingest(drawn, out, slice(14, 36), append=True)
    assert all(file.read_text() == "precious" for file in strange) and (out / "append").is_dir()
    assert not any(file.exists() for file in left)
    ingest(drawn, tmp_path / "whole")
    assert snapshot(out) == snapshot(tmp_path / "whole")


@pytest.mark.parametrize("name", ["index.npy", "samples/part-00000.parquet"])
def test_an_append_does_not_take_damage_for_what_was_written(drawn: Drawn, tmp_path: Path, name: str) -> None:
    out = tmp_path / "cat"
    ingest(drawn, out, slice(0, 14))
    data = bytearray((out / name).read_bytes())
    data[len(data) // 2] ^= 1
    (out / name).write_bytes(data)
    ingest(drawn, out, slice(14, 36), append=True)
    with pytest.raises(UserError, match=rf"{name}.* differs from its checksum"):
        require_whole(Catalogue(out))


def test_a_catalogue_of_an_earlier_version_grows(
    drawn: Drawn, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out = tmp_path / "cat"
    ingest(drawn, out, slice(0, 14), rows_per_part=5)
    meta = json.loads((out / "catalogue.json").read_text())
    for name in ("num_parts", "files", "checksum"):
        del meta[name]
    (out / "catalogue.json").write_text(json.dumps(meta))
    capsys.readouterr()
    require_whole(Catalogue(out))
    assert "an earlier version, which wrote no checksums; append to it" in capsys.readouterr().out
    ingest(drawn, out, slice(14, 36), append=True)
    ingest(drawn, tmp_path / "whole")
    assert snapshot(out) == snapshot(tmp_path / "whole")
    capsys.readouterr()
    require_whole(Catalogue(out))
    assert capsys.readouterr().out == "", "now it has them"


@pytest.mark.parametrize("suffix", [".csv", ".parquet"])
def test_parts_and_merge_equal_one_ingest(drawn: Drawn, tmp_path: Path, suffix: str) -> None:
    rows = [dict(row) for row in drawn[1]]
    rows[20]["title"] = "a title" + "\n" * 40 + "of many lines"  # a text file's lines are only an estimate of its rows
    drawn = (drawn[0], rows)
    ingest(drawn, tmp_path / "whole", suffix=suffix)
    out = tmp_path / "cat"
    shards = []
    for number in (3, 1, 5, 2, 4):
        figures = ingest(drawn, out, suffix=suffix, part=f"{number}/5", shard_size=8192, rows_per_part=3)
        part = tmp_path / f"cat.parts/part-{number}-of-5"
        assert figures["catalogue"] == str(part)
        shards += [path.stat().st_ino for path in (part / "shards").iterdir()]
    figures = merge.run(MergeConfig(catalogue=out))
    assert snapshot(out) == snapshot(tmp_path / "whole")
    assert (figures["num_samples"], figures["quarantined"], figures["parts"]) == (34, 2, 5)
    quarantines = [pq.read_table(folder / "quarantine.parquet") for folder in (out, tmp_path / "whole")]
    assert quarantines[0].equals(quarantines[1])
    # The shards are the parts' own files, and the parts are gone; the same command again finds everything done.
    assert sorted(shards) == sorted(path.stat().st_ino for path in (out / "shards").iterdir())
    assert not (tmp_path / "cat.parts").exists()
    assert merge.run(MergeConfig(catalogue=out)) == figures
    ingest(drawn, out, slice(0, 6), append=True)
    assert snapshot(out)["bytes"][34:] == snapshot(tmp_path / "whole")["bytes"][:5]


def test_the_last_part_reaches_the_end(drawn: Drawn, tmp_path: Path) -> None:
    manifest = write_manifest(tmp_path / "m.tsv", drawn[1][:4])
    manifest.write_text(manifest.read_text().rstrip("\n"))  # one line end fewer than there are rows
    out = tmp_path / "cat"
    for number in (1, 2):
        run(IngestConfig(manifest=manifest, images=drawn[0], out=out, part=f"{number}/2"))
    assert merge.run(MergeConfig(catalogue=out))["num_samples"] == 4


def test_parts_that_do_not_make_a_whole_are_refused(drawn: Drawn, tmp_path: Path) -> None:
    out, parts = tmp_path / "cat", tmp_path / "cat.parts"

    def refused(message: str) -> None:
        with pytest.raises(UserError, match=message):
            merge.run(MergeConfig(catalogue=out))

    for text in ("0/2", "3/2", "1", "1/0", "a/b"):
        with pytest.raises(UserError, match=f"--part is '{text}'"):
            ingest(drawn, out, part=text)
    refused(f"there are no parts in {parts}")
    ingest(drawn, out, part="2/4")
    with pytest.raises(UserError, match="part-2-of-4 exists already"):
        ingest(drawn, out, part="2/4")
    ingest(drawn, out, part="4/4")
    refused(f"{parts} lacks part-1-of-4, part-3-of-4")
    for number in (1, 3):
        ingest(drawn, out, part=f"{number}/4")
    ingest(drawn, out, part="1/2")
    refused("holds the rows twice: part-1-of-2, part-1-of-4, part-2-of-4, part-3-of-4, part-4-of-4")
    shutil.rmtree(parts / "part-1-of-2")
    for options in ({"attribute_columns": "colour"}, {"rows": slice(0, 30)}, {"title_column": "description"}):
        shutil.rmtree(parts / "part-3-of-4")
        ingest(drawn, out, part="3/4", **options)
        refused("part-3-of-4 and the parts before it are not of one manifest and one request")
    shutil.rmtree(parts / "part-3-of-4")
    ingest(drawn, out, part="3/4")
    out.mkdir()
    before = files(parts)
    refused("exists already")
    assert files(parts) == before  # nothing was moved
    out.rmdir()
    assert merge.run(MergeConfig(catalogue=out))["num_samples"] == 34


def test_a_merge_takes_no_parts_that_the_catalogue_is_not_made_of(drawn: Drawn, tmp_path: Path) -> None:
    """Parts of the same rows, ingested again beside a merged catalogue, are not removed as its own parts."""
    out, parts = tmp_path / "cat", tmp_path / "cat.parts"
    for _ in range(2):
        for number in (1, 2):
            ingest(drawn, out, part=f"{number}/2")
        before = files(parts)
        if not out.exists():
            merge.run(MergeConfig(catalogue=out))
    with pytest.raises(UserError, match="cat exists already"):
        merge.run(MergeConfig(catalogue=out))
    assert files(parts) == before
    (parts / "mine").mkdir()
    shutil.rmtree(out)
    merge.run(MergeConfig(catalogue=out))
    assert [path.name for path in parts.iterdir()] == ["mine"]


def test_a_merge_that_ends_early_leaves_the_parts(
    drawn: Drawn, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    out = tmp_path / "cat"
    rows = slice(30, 32)  # the first part is all quarantine
    for number in (1, 2):
        ingest(drawn, out, rows, part=f"{number}/2")
    before = files(tmp_path / "cat.parts")

    def fail(*_: object) -> None:
        raise OSError("gone")

    with monkeypatch.context() as patch:
        patch.setattr(merge, "write_meta", fail)
        with pytest.raises(OSError, match="gone"):
            merge.run(MergeConfig(catalogue=out))
    assert files(tmp_path / "cat.parts") == before and not out.exists()
    assert merge.run(MergeConfig(catalogue=out))["num_samples"] == 1
    ingest(drawn, tmp_path / "whole", rows)
    assert snapshot(out) == snapshot(tmp_path / "whole")


def test_an_array_job_gives_every_task_its_part(drawn: Drawn, tmp_path: Path) -> None:
    manifest = write_manifest(tmp_path / "m.tsv", drawn[1])
    words = ["--manifest", str(manifest), "--images", str(drawn[0]), "--out", str(tmp_path / "cat")]

    def task(number: int, first: int, last: int, count: int, *more: str) -> subprocess.CompletedProcess[str]:
        array = {"ID": number, "MIN": first, "MAX": last, "COUNT": count}
        environment = {
            **os.environ, "SLURM_JOB_ID": "7", "SLURM_SUBMIT_DIR": str(ROOT), "VENV": sys.prefix,
            **{f"SLURM_ARRAY_TASK_{name}": str(value) for name, value in array.items()},
        }  # fmt: skip
        return subprocess.run(
            ["bash", "jobs/ingest.sh", *words, *more], cwd=ROOT, env=environment, capture_output=True, text=True
        )

    done = task(2, 1, 2, 2)
    assert done.returncode == 0 and f"{tmp_path}/cat.parts/part-2-of-2: 17 samples" in done.stdout, done.stderr
    for numbers in ((0, 0, 1, 2), (1, 1, 1, 1, "--part", "9/2"), (1, 1, 3, 2)):
        refused = task(*numbers)
        assert refused.returncode == 2 and "error: " in refused.stderr
    assert task(1, 1, 1, 1, "--part", "1/2").returncode == 0
    assert merge.run(MergeConfig(catalogue=tmp_path / "cat"))["num_samples"] == 34
