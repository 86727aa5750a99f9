"""manifest.json: size and xxh3-64 of every file of a folder, by which a checkpoint and an artefact prove that they are whole."""

from __future__ import annotations

import json
import os
from pathlib import Path

import xxhash

_CHUNK = 1 << 24


def write_manifest(folder: Path) -> None:
    """Flushes every file under `folder` to disk and lists it in folder/manifest.json; hidden files do not belong to it."""
    files = {}
    for file in sorted(p for p in folder.rglob("*") if p.is_file() and not p.name.startswith(".")):
        with file.open("rb") as handle:
            os.fsync(handle.fileno())
        files[str(file.relative_to(folder))] = (file.stat().st_size, _checksum(file))
    write_whole(folder / "manifest.json", json.dumps({"format": 1, "files": files}, indent=1))


def verify(folder: Path) -> str:
    """What is wrong with a folder that has a manifest; empty if every file is there with its checksum."""
    try:
        manifest = json.loads((folder / "manifest.json").read_text())
    except (OSError, ValueError):
        return "manifest.json is missing or damaged"
    for name, (size, checksum) in manifest["files"].items():
        file = folder / name
        if not file.is_file() or file.stat().st_size != size:
            return f"{name} is missing or has another size"
        if _checksum(file) != checksum:
            return f"{name} has another checksum"
    return ""


def write_whole(file: Path, text: str) -> None:
    """Writes `file` whole or not at all."""
    temporary = file.with_suffix(".tmp")
    with temporary.open("w") as handle:
        handle.write(text)
        handle.flush()
        os.fsync(handle.fileno())
    temporary.replace(file)


def _checksum(file: Path) -> str:
    digest = xxhash.xxh3_64()
    with file.open("rb") as handle:
        while chunk := handle.read(_CHUNK):
            digest.update(chunk)
    return digest.hexdigest()
