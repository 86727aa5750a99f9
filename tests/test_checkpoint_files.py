"""Files of a checkpoint and of any folder with a manifest: each is listed, and one that is damaged, missing or foreign is named."""

from __future__ import annotations

import json
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from harness.checksums import verify, write_manifest

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
    assert verify(folder) == "a/.b/c is a link or no regular file"
    (folder / "a/.b/c").unlink()
    os.mkfifo(folder / "a/.b/c")
    assert verify(folder) == "a/.b/c is a link or no regular file", "nothing waits for a pipe"
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
