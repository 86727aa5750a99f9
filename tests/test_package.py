"""`from shelfmark import Artefact`: what is built of pyproject.toml and installed."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
import zipfile
from pathlib import Path

import pytest
from setuptools.config.pyprojecttoml import read_configuration

import harness.artefact
from harness.artefact import shelfmark

ROOT = Path(__file__).parents[1]
LOOK = """
import shelfmark
from shelfmark import Artefact, Hit, Photo
import harness.artefact
assert Artefact is harness.artefact.Artefact and Hit is harness.artefact.Hit and Photo is harness.artefact.Photo
print(shelfmark.__file__)
"""


def test_the_packages_are_harness_models_kernels_and_shelfmark() -> None:
    found = read_configuration(ROOT / "pyproject.toml")["tool"]["setuptools"]
    packages = found["packages"]
    assert {name.partition(".")[0] for name in packages} == {"harness", "kernels", "models", "shelfmark"}
    assert packages.count("shelfmark") == 1 and "harness.artefact.shelfmark" not in packages
    assert found["package-dir"]["shelfmark"] == "harness/artefact/shelfmark"
    assert {"harness.artefact.stores", "harness.serve", "models.weights"} <= {*packages}
    for name in shelfmark.__all__:
        assert getattr(shelfmark, name) is getattr(harness.artefact, name)
    assert shelfmark.__all__ == harness.artefact.__all__


@pytest.mark.full
def test_a_wheel_has_the_package(tmp_path: Path) -> None:
    source = tmp_path / "source"
    listed = subprocess.run(
        ["git", "ls-files", "-co", "--exclude-standard"], cwd=ROOT, check=True, capture_output=True, text=True
    )
    for name in listed.stdout.splitlines():
        if (ROOT / name).is_file():
            (source / name).parent.mkdir(parents=True, exist_ok=True)
            shutil.copy(ROOT / name, source / name)
    words = ["wheel", ".", "--no-deps", "--no-index", "--no-build-isolation", "-q", "-w", str(tmp_path)]
    subprocess.run([sys.executable, "-m", "pip", *words], cwd=source, check=True)
    (wheel,) = tmp_path.glob("*.whl")
    with zipfile.ZipFile(wheel) as archive:
        archive.extractall(tmp_path / "installed")
    assert not (tmp_path / "installed/harness/artefact/shelfmark").exists()
    environment = {**os.environ, "PYTHONPATH": str(tmp_path / "installed")}
    done = subprocess.run(
        [sys.executable, "-c", LOOK], cwd=tmp_path, env=environment, capture_output=True, text=True, check=False
    )
    assert done.stdout.strip() == str(tmp_path / "installed/shelfmark/__init__.py"), done.stderr
