"""Files of a checkpoint and of any folder with a manifest: each is listed, and one that is damaged, missing or foreign
is named.
"""

from __future__ import annotations

import io
import json
import math
import os
import pickle
import shutil
import subprocess
import sys
import tempfile
import threading
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any
from unittest import mock

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch
from torch.distributed.checkpoint.filesystem import _StorageInfo
from torch.distributed.checkpoint.metadata import BytesStorageMetadata, MetadataIndex

from harness.commands.verify import VerifyConfig
from harness.commands.verify import run as run_verify
from harness.core.errors import UserError
from harness.core.manifest import verify, write_manifest
from harness.train import checkpoint, checkpoint_files
from harness.train.open_run import find_checkpoint
from tests.runs import arguments, tiny_config, trainer

CONTENT = {".metadata": b"m", "a/.b/c": b"12345", "a/d": b"", "state.json": b"{}"}


def made(folder: Path, algorithm: str = "xxh3-64") -> Path:
    """A folder with a manifest."""
    for name, content in CONTENT.items():
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_bytes(content)
    write_manifest(folder, algorithm=algorithm)
    return folder


def rewrite(folder: Path, change: Callable[[dict[str, Any]], Any]) -> None:
    """Changes the manifest."""
    content = json.loads((folder / "manifest.json").read_text())
    change(content)
    (folder / "manifest.json").write_text(json.dumps(content))


@pytest.mark.parametrize("algorithm", ["xxh3-64", "sha256"])
def test_every_file_is_listed(tmp_path: Path, algorithm: str) -> None:
    folder = made(tmp_path, algorithm)
    content = json.loads((folder / "manifest.json").read_text())
    assert (content["format"], content["algorithm"]) == (2, algorithm)
    assert {name: size for name, (size, _) in content["files"].items()} == {n: len(c) for n, c in CONTENT.items()}
    assert verify(folder) == ""
    for name, right in CONTENT.items():
        file = folder / name
        file.unlink()
        assert verify(folder) == f"{name} is missing or has another size"
        file.write_bytes(right + b"x")
        assert verify(folder) == f"{name} is missing or has another size"
        if right:
            file.write_bytes(bytes([right[0] ^ 1]) + right[1:])
            assert verify(folder) == f"{name} has another checksum"
        file.write_bytes(right)
    assert verify(folder) == ""


def test_what_is_not_listed_is_named(tmp_path: Path) -> None:
    folder = made(tmp_path / "folder")
    for name in ("x", ".x", "a/.b/.x", "a/manifest.json", ".host", "\x1b[2J"):
        (folder / name).touch()
        assert verify(folder) == f"{name.replace(chr(27), chr(92) + 'x1b')} is not listed in manifest.json"
        (folder / name).unlink()
    (tmp_path / "outside").write_bytes(CONTENT["a/.b/c"])
    (folder / "a/.b/c").unlink()
    (folder / "a/.b/c").symlink_to(tmp_path / "outside")
    assert verify(folder) == "a/.b/c is not a regular file"
    (folder / "a/.b/c").unlink()
    os.mkfifo(folder / "a/.b/c")
    assert verify(folder) == "a/.b/c is not a regular file", "nothing waits for a pipe"
    (folder / "a/.b/c").unlink()
    (folder / "a/.b/c").write_bytes(CONTENT["a/.b/c"])
    (folder / "elsewhere").symlink_to(tmp_path)
    assert verify(folder) == "elsewhere is not listed in manifest.json"


@pytest.mark.parametrize(
    "change,message",
    [
        (lambda m: m.update(format=3), "manifest.json is missing or damaged"),
        (lambda m: m.pop("format"), "manifest.json is missing or damaged"),
        (lambda m: m.update(algorithm="md5"), "manifest.json is missing or damaged (algorithm 'md5')"),
        (lambda m: m.update(algorithm=[]), "manifest.json is missing or damaged"),
        (lambda m: m.update(files=[]), "manifest.json is missing or damaged"),
        (lambda m: m["files"].update({"a/d": "x"}), "manifest.json is missing or damaged (files: a/d)"),
        (lambda m: m["files"].update({"a/d": [True, ""]}), "manifest.json is missing or damaged (files: a/d)"),
        (lambda m: m["files"].update({"a/d": [0, "", 1]}), "manifest.json is missing or damaged (files: a/d)"),
        (lambda m: m["files"].update({"a/d": [10**30, ""]}), "a/d is missing or has another size"),
        (lambda m: m["files"].update({"../outside": [1, ""]}), "../outside is missing or has another size"),
        (lambda m: m["files"].update({"a/../state.json": [2, ""]}), "a/../state.json is missing or has another size"),
        (lambda m: m["files"].update({"/dev/zero": [0, ""]}), "/dev/zero is missing or has another size"),
        (lambda m: m["files"].update({"\0\ud800": [0, ""]}), "\\x00\\ud800 is missing or has another size"),
        (lambda m: m["files"].update({"manifest.json": [0, ""]}), "manifest.json is missing or has another size"),
        (lambda m: m["files"].clear(), ".metadata is not listed in manifest.json"),
    ],
)  # fmt: skip
def test_odd_manifests_are_refused(tmp_path: Path, change: Callable[[dict[str, Any]], Any], message: str) -> None:
    (tmp_path / "outside").write_bytes(b"x")
    folder = made(tmp_path / "folder")
    rewrite(folder, change)
    assert verify(folder) == message


@pytest.mark.parametrize("text", ["", "[", "[]", "7", "[" * 100_000, '{"format": 1e999}', '{"format": NaN}', "\x00"])
def test_odd_json_is_no_manifest(tmp_path: Path, text: str) -> None:
    folder = made(tmp_path)
    (folder / "manifest.json").write_text(text)
    assert verify(folder) == "manifest.json is missing or damaged"


def test_a_manifest_of_format_1_leaves_out_two_hidden_files_which_must_be_there(tmp_path: Path) -> None:
    for name in ("towers/.metadata", "towers/data", "state.json"):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_text(name)
    write_manifest(tmp_path)
    rewrite(tmp_path, lambda m: (m.update(format=1), m.pop("algorithm"), m["files"].pop("towers/.metadata")))
    assert verify(tmp_path) == ""
    (tmp_path / "towers/.metadata").rename(tmp_path / "towers/.other")
    assert verify(tmp_path) == "towers/.metadata is missing or has another size"
    (tmp_path / "towers/.other").rename(tmp_path / "towers/.metadata")
    for extra in (".other", "head/.metadata", "towers/.metadata.tmp", "more"):
        (tmp_path / extra).parent.mkdir(exist_ok=True)
        (tmp_path / extra).touch()
        assert verify(tmp_path) == f"{extra} is not listed in manifest.json"
        (tmp_path / extra).unlink()


# --- a checkpoint by somebody else, whose manifest fits ---

Change = Callable[[Path], Any]


@pytest.fixture(scope="module")
def run(catalogue: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run with two checkpoints; its third step is still to be trained. Read only!"""
    folder = tmp_path_factory.mktemp("checkpoints") / "run"
    with trainer(tiny_config(catalogue, folder, **SETTINGS)) as t:
        t.fit()
    return folder


SETTINGS: dict[str, Any] = {"train.steps": 3, "train.stop_at": 2, "train.checkpoint_every": 1, "train.ema_decay": 0.5}


class Runs:
    """A pickle of this writes a file PWNED in the folder where it is read."""

    def __reduce__(self) -> tuple[Any, ...]:
        return os.system, (f"touch {PWNED}",)


PWNED = Path(tempfile.gettempdir()) / f"shelfmark-pwned-{os.getpid()}"


def forge(checkpoint: Path, change: Change) -> None:
    """Changes a checkpoint, and its manifest with it."""
    change(checkpoint)
    (checkpoint / "manifest.json").unlink()
    write_manifest(checkpoint)


def with_metadata(change: Callable[[Any], Any], part: str = "towers") -> Change:
    def changed(checkpoint: Path) -> None:
        file = checkpoint / part / ".metadata"
        metadata = pickle.loads(file.read_bytes())
        file.write_bytes(pickle.dumps(change(metadata) or metadata))

    return changed


def as_bytes(checkpoint: Path, part: str, key: str) -> None:
    """Makes `key` an object instead of a tensor, and its data a pickle that runs a command."""
    data = io.BytesIO()
    torch.save(Runs(), data)
    (checkpoint / part / "__9_0.distcp").write_bytes(data.getvalue())

    def change(metadata: Any) -> None:
        metadata.state_dict_metadata[key] = BytesStorageMetadata()
        metadata.storage_data[MetadataIndex(key)] = _StorageInfo("__9_0.distcp", 0, len(data.getvalue()))

    with_metadata(change, part)(checkpoint)


def replace_tensor(checkpoint: Path) -> None:
    """A pickle that runs a command, where the data of a tensor are."""
    data = io.BytesIO()
    torch.save(Runs(), data)
    (checkpoint / "head/__0_0.distcp").write_bytes(data.getvalue())

    def change(metadata: Any) -> None:
        for place in metadata.storage_data.values():
            place.offset, place.length = 0, len(data.getvalue())

    with_metadata(change, "head")(checkpoint)


def of_one_rank(checkpoint: Path) -> None:
    """The library reads this where .metadata cannot be used."""
    (checkpoint / "head/__0.metadata").write_bytes(pickle.dumps(Runs()))
    file = checkpoint / "head/.metadata"
    file.write_bytes(file.read_bytes().replace(b"torch.strided", b"torch.stridEd"))


HOSTILE: dict[str, Change] = {
    "a metadata of one rank": of_one_rank,
    "towers/.metadata": lambda c: (c / "towers/.metadata").write_bytes(pickle.dumps(Runs())),
    "head/.metadata": lambda c: (c / "head/.metadata").write_bytes(pickle.dumps(Runs())),
    "an attribute of towers/.metadata": with_metadata(lambda m: setattr(m, "planner_data", Runs())),
    "an object for a tensor of the towers": lambda c: as_bytes(c, "towers", "vision.position"),
    "an object for the rows": lambda c: as_bytes(c, "head", "rows"),
    "common.pt": lambda c: torch.save(Runs(), c / "towers/common.pt"),
    "common.pt, an old pickle": lambda c: (c / "towers/common.pt").write_bytes(pickle.dumps(Runs())),
}


def in_all_places(name: str, value: Any) -> Change:
    """Sets a field of every place in storage."""
    return with_metadata(lambda m: [setattr(place, name, value) for place in m.storage_data.values()])


ODD: dict[str, Change] = {
    "another file": in_all_places("relative_path", "/dev/zero"),
    "transforms": in_all_places("transform_descriptors", ["zstd"]),
    "no metadata of a checkpoint": with_metadata(lambda m: torch.Size([1])),
    "a billion entries of a memo": lambda c: (c / "towers/.metadata").write_bytes(b"\x80\x04Nr\xff\xff\xff\x7f."),
    "a layout that torch does not know": lambda c: (c / "head/.metadata").write_bytes(
        (c / "head/.metadata").read_bytes().replace(b"torch.strided", b"torch.stridEd")
    ),
    "a file of no checkpoint": lambda c: (c / "towers/more").touch(),
    "another format": lambda c: (c / "towers/metadata.json").write_text('{"sharded_backend": "zarr"}'),
    "state.json, a list": lambda c: (c / "state.json").write_text("[]"),
    "state.json, deep": lambda c: (c / "state.json").write_text("[" * 100_000),
    "state.json, a step that is a text": lambda c: edit(c, step="2"),
    "state.json, an endless ledger": lambda c: edit(c, step=1 << 40, ledger_before={"step": 0, "ledger": "0" * 16}),
    "state.json, a ledger that is not a number": lambda c: edit(c, ledger="x"),
    "classes.parquet, text": lambda c: (c / "classes.parquet").write_text("class_id"),
    "classes.parquet, other columns": lambda c: pq.write_table(pa.table({"x": [1]}), c / "classes.parquet"),
}  # fmt: skip


def edit(checkpoint: Path, **values: Any) -> None:
    file = checkpoint / "state.json"
    file.write_text(json.dumps({**json.loads(file.read_text()), **values}))


@pytest.fixture
def forged(run: Path, tmp_path: Path) -> Iterator[Path]:
    """A copy of the run, whose newer checkpoint may be changed."""
    PWNED.unlink(missing_ok=True)
    yield Path(shutil.copytree(run, tmp_path / "run"))
    assert not PWNED.exists()


@pytest.mark.parametrize("name", [*HOSTILE, *ODD])
def test_a_forged_checkpoint_is_passed_over_and_runs_nothing(forged: Path, name: str) -> None:
    newer = forged / "checkpoints/step-00000002"
    forge(newer, {**HOSTILE, **ODD}[name])
    assert verify(newer) == ""
    path, passed_over = checkpoint_files.newest(forged / "checkpoints")
    assert path == forged / "checkpoints/step-00000001"
    assert len(passed_over) == 1 and passed_over[0].startswith("step-00000002: ") and "\n" not in passed_over[0]
    with pytest.raises(UserError):
        find_checkpoint(forged, newer)
    with pytest.raises(UserError, match="1 of 1 are damaged"):
        run_verify(VerifyConfig(paths=(newer,)))


def test_data_of_a_tensor_are_read_as_tensors_alone(forged: Path, catalogue: Path) -> None:
    forge(forged / "checkpoints/step-00000002", replace_tensor)
    with (
        pytest.raises(UserError, match=r"step-00000002 does not fit this model .a file that should hold tensors"),
        trainer(tiny_config(catalogue, forged, **SETTINGS)),
    ):
        pass


def test_init_from_runs_nothing(forged: Path, catalogue: Path, tmp_path: Path) -> None:
    newer = forged / "checkpoints/step-00000002"
    forge(newer, HOSTILE["an attribute of towers/.metadata"])
    config = tiny_config(catalogue, tmp_path / "other", **SETTINGS, **{"train.init_from": newer})
    with pytest.raises(UserError, match=r"init_from .*step-00000002: towers/.metadata"), trainer(config):
        pass


def test_class_ids_that_no_row_has_are_refused(forged: Path, catalogue: Path, tmp_path: Path) -> None:
    newer = forged / "checkpoints/step-00000002"
    keys = pq.read_table(newer / "classes.parquet")["class_key"]
    for ids in ([0, 1, 2, 3, 4, 6], [0, 1, 2, 3, 4, -5]):
        forge(
            newer,
            lambda c, ids=ids: pq.write_table(pa.table({"class_id": ids, "class_key": keys}), c / "classes.parquet"),
        )
        config = tiny_config(catalogue, tmp_path / "other", **SETTINGS, **{"train.init_from": newer})
        with pytest.raises(UserError, match=r"classes.parquet is damaged \(class ids\)"), trainer(config):
            pass


# --- damage ---


def damages(file: Path) -> Iterator[bytes | None]:
    """Contents of a damaged `file`; None for none."""
    whole = file.read_bytes()
    for place in {0, len(whole) // 3, len(whole) // 2, len(whole) - 1}:
        yield whole[:place] + bytes([whole[place] ^ 1]) + whole[place + 1 :]
    yield from (whole[: len(whole) // 2], whole[:-9], whole + b"\0", b"", None)


def files_of(folder: Path) -> list[str]:
    return sorted(str(file.relative_to(folder)) for file in folder.rglob("*") if file.is_file())


def test_a_damaged_file_of_any_kind_is_named_and_the_checkpoint_before_it_taken(forged: Path) -> None:
    newer = forged / "checkpoints/step-00000002"
    names = files_of(newer)
    own = {"manifest.json", "state.json", "classes.parquet"}
    assert own | {"towers/.metadata", "head/.metadata", "towers/common.pt"} < set(names)
    for name in names:
        whole = (newer / name).read_bytes()
        for content in damages(newer / name):
            (newer / name).unlink() if content is None else (newer / name).write_bytes(content)
            path, passed_over = checkpoint_files.newest(forged / "checkpoints")
            assert path == forged / "checkpoints/step-00000001", name
            named = "" if name == "manifest.json" else f"{name} "  # which may seem to be what is wrong with another
            assert len(passed_over) == 1 and passed_over[0].startswith(f"step-00000002: {named}"), (passed_over, name)
            (newer / name).write_bytes(whole)
    for name in ("more", ".more", "towers/__5_0.distcp", "towers/.metadata.tmp"):
        (newer / name).touch()
        assert checkpoint_files.newest(forged / "checkpoints")[1] == [
            f"step-00000002: {name} is not listed in manifest.json"
        ]
        (newer / name).unlink()
    assert checkpoint_files.newest(forged / "checkpoints") == (newer, [])


@pytest.mark.full
@pytest.mark.parametrize("command", ["eval", "train"])
def test_commands_pass_over_any_damaged_file(run: Path, catalogue: Path, tmp_path: Path, command: str) -> None:
    for number, name in enumerate(files_of(run / "checkpoints/step-00000002")):
        copy = Path(shutil.copytree(run, tmp_path / str(number)))
        file = copy / "checkpoints/step-00000002" / name
        file.write_bytes(file.read_bytes()[:-9])
        options = arguments(catalogue, copy, **SETTINGS) if command == "train" else [str(copy), "--batch-size", "8"]
        line = [sys.executable, "-m", "harness", command, *options]
        done = subprocess.run(line, capture_output=True, text=True, timeout=120)
        assert done.returncode == 0 and "Traceback" not in done.stderr, done.stderr
        assert f"passed over checkpoint step-00000002: {name}" in done.stdout


# --- retention ---


def kept(run: Path) -> list[str]:
    for thread in threading.enumerate():
        if thread.name == "delete-checkpoints":
            thread.join()
    return sorted(path.name for path in (run / "checkpoints").iterdir())


def flip(file: Path) -> None:
    file.write_bytes(bytes([file.read_bytes()[0] ^ 1]) + file.read_bytes()[1:])


def test_a_damaged_checkpoint_pushes_no_good_one_out(catalogue: Path, tmp_path: Path) -> None:
    settings = {"train.steps": 6, "train.keep_checkpoints": 1, "train.checkpoint_every": 2}
    with trainer(tiny_config(catalogue, tmp_path / "run", **settings)) as t:
        t.fit()
    assert kept(tmp_path / "run") == ["latest", "step-00000006"]
    flip(tmp_path / "run/checkpoints/step-00000006/head/__0_0.distcp")
    for end in (2, 4):
        with trainer(tiny_config(catalogue, tmp_path / "run", **settings, **{"train.stop_at": end})) as t:
            assert t.step == end - 2
            assert any("passed over checkpoint step-00000006: head/__0_0.distcp" in note for note in t.notes)
            t.fit()
        assert kept(tmp_path / "run") == ["latest", f"step-{end:08d}", "step-00000006"]
        assert (tmp_path / "run/checkpoints/latest").read_text() == f"step-{end:08d}"
        assert find_checkpoint(tmp_path / "run", None, head=True).name == f"step-{end:08d}"
        assert find_checkpoint(tmp_path / "run", None).name == "step-00000006", "its towers are whole"
    with trainer(tiny_config(catalogue, tmp_path / "run", **settings)) as t:
        t.fit()
    assert kept(tmp_path / "run") == ["latest", "step-00000006"], "written again"
    assert checkpoint_files.problem(tmp_path / "run/checkpoints/step-00000006") == ""


def test_only_what_is_ours_is_deleted(forged: Path, catalogue: Path) -> None:
    folder = forged / "checkpoints"
    theirs = ["step-00000001.bak", "step-1", "step-best", "step-00000001.tmp.old", ".step-note", "step-0000000a.tmp"]
    ours = ["step-00000007.tmp", ".step-00000001.old", ".step-00000001.replaced"]
    for name in theirs + ours:
        (folder / name).mkdir()
        (folder / name / "photo").touch()
    (folder / "step-00000000").mkdir()  # no manifest: not of ours
    archive = Path(shutil.copytree(folder / "step-00000001", forged / "archive"))
    shutil.rmtree(folder / "step-00000001")
    (folder / "step-00000001").symlink_to(archive)
    settings = {**SETTINGS, "train.stop_at": 3, "train.keep_checkpoints": 1}
    with trainer(tiny_config(catalogue, forged, **settings)) as t:
        t.fit()
    assert kept(forged) == sorted(["latest", "step-00000000", "step-00000001", "step-00000003", *theirs])
    assert checkpoint_files.problem(archive) == ""


# --- weights that are not numbers ---


@pytest.mark.parametrize("value", [math.nan, math.inf, 1e12])
@pytest.mark.parametrize("place", ["towers", "rows", "average"])
def test_weights_that_are_not_finite_are_not_saved(forged: Path, catalogue: Path, value: float, place: str) -> None:
    with trainer(tiny_config(catalogue, forged, **SETTINGS)) as t:
        tensors = {"towers": t.method.towers.state_dict(), "average": t.ema.state, "rows": {"": t.method.head.rows}}
        with torch.no_grad():
            list(tensors[place].values())[-1].view(-1)[-1] = value
        t.step = 3
        with pytest.raises(
            UserError, match=r"step 3: a weight is not finite.*no checkpoint.*the run resumes step-00000002"
        ):
            t.save()
    assert kept(forged) == ["latest", "step-00000001", "step-00000002"]


def test_a_run_goes_on_after_a_learning_rate_that_ruined_it(forged: Path, catalogue: Path) -> None:
    for rate in (1e20, 1e14):
        settings = {**SETTINGS, "train.stop_at": 3, "optimizer.lr": rate}
        with (
            trainer(tiny_config(catalogue, forged, **settings)) as t,
            pytest.raises(UserError, match="resumes step-00000002"),
        ):
            t.fit()
    with trainer(tiny_config(catalogue, forged, **{**SETTINGS, "train.stop_at": 3})) as t:
        assert t.step == 2 and math.isfinite(t.fit()["loss"])


def test_a_checkpoint_with_weights_that_are_not_finite_is_not_taken(forged: Path, catalogue: Path) -> None:
    """As versions before wrote it."""
    with (
        trainer(tiny_config(catalogue, forged, **SETTINGS)) as t,
        mock.patch.object(checkpoint, "_finite", return_value=True),
    ):
        t.train_step(t.loader.load(2))
        with torch.no_grad():
            t.method.head.rows[0, 0] = math.nan
        t.save()
    with pytest.raises(UserError, match=r"step-00000003: a weight is not finite.*move it elsewhere"):
        with trainer(tiny_config(catalogue, forged, **SETTINGS)):
            pass
