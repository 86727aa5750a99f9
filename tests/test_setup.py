"""Installation on a fresh machine: pyproject.toml, constraints.txt, requirements.lock and the Makefile agree, and name
no registry.
"""

import fnmatch
import os
import re
import shutil
import subprocess
import tomllib
from pathlib import Path

import pytest
from packaging.requirements import Requirement
from packaging.specifiers import SpecifierSet
from packaging.utils import canonicalize_name

ROOT = Path(__file__).parents[1]
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
EXTRAS = PROJECT["optional-dependencies"]
# What `make` installs. The extras cu12, faiss-gpu and spark are for machines that have what they need.
GROUPS = [PROJECT["dependencies"], *(EXTRAS[name] for name in ("dev", "serve", "onnx", "publish"))]
INSTALLED = [Requirement(line) for lines in GROUPS for line in lines]


def pins():
    lines = (ROOT / "constraints.txt").read_text().splitlines()
    pairs = [line.split("==") for line in lines if line and not line.startswith("#")]
    return {canonicalize_name(name): version for name, version in pairs}


def locked():
    """name -> (version, checksums) of requirements.lock."""
    text = re.sub(r"^#.*$", "", (ROOT / "requirements.lock").read_text(), flags=re.M).replace("\\\n", " ")
    lines = [line.split() for line in text.splitlines() if line.strip()]
    return {canonicalize_name(line[0].split("==")[0]): (line[0].split("==")[1], line[1:]) for line in lines}


def requirement(name):
    (found,) = [item for item in map(Requirement, PROJECT["dependencies"]) if item.name == name]
    return found


@pytest.mark.parametrize("needed", INSTALLED, ids=str)
def test_every_dependency_has_an_exact_pin_that_it_allows(needed):
    version = pins()[canonicalize_name(needed.name)]
    assert re.fullmatch(r"\d+(\.\d+)+", version), "neither a range nor one machine's local build"
    assert needed.specifier.contains(version)


def test_every_pin_has_checksums_that_the_installer_compares():
    found, wanted = locked(), pins()
    assert {name: version for name, (version, _) in found.items()} == {
        **{name: version for name, version in wanted.items() if name != "torch"},
        "pip": found["pip"][0],
    }
    assert all(sums and all(re.fullmatch(r"--hash=sha256:[0-9a-f]{64}", s) for s in sums) for _, sums in found.values())
    makefile = (ROOT / "Makefile").read_text()
    assert "--require-hashes --only-binary :all: --no-deps -r requirements.lock" in makefile
    # What builds the package is pinned too: it comes from the lock, not from an environment that pip makes.
    assert "--no-build-isolation --no-deps -e ." in makefile and "setuptools" in found


def test_megatron_is_pinned_alike():
    # models/megatron_cpu.py reaches into this very version.
    assert str(requirement("megatron-core").specifier) == f"=={pins()['megatron-core']}"


def test_the_range_of_torch():
    assert requirement("torch").specifier == SpecifierSet(">=2.11,<2.14")
    assert f" torch=={pins()['torch']}\n" in (ROOT / "Makefile").read_text()


def test_dali_comes_with_make_and_elsewhere_as_one_of_two_extras():
    assert not [line for line in PROJECT["dependencies"] if "dali" in line]
    (newer,), (older,) = EXTRAS["cu13"], EXTRAS["cu12"]
    assert newer in EXTRAS["dev"] and older == newer.replace("cuda130", "cuda120") != newer


def test_python_of_pyproject_and_makefile():
    assert SpecifierSet(PROJECT["requires-python"]) == SpecifierSet(">=3.11,<3.13")
    assert "(3, 11) <= sys.version_info[:2] <= (3, 12)" in (ROOT / "Makefile").read_text()


def files_of_the_repository():
    ignored = [".git", *(line.strip("/") for line in (ROOT / ".gitignore").read_text().splitlines() if line)]
    for folder, folders, files in os.walk(ROOT):
        folders[:] = [name for name in folders if not any(fnmatch.fnmatch(name, pattern) for pattern in ignored)]
        yield from (Path(folder) / name for name in files if not any(fnmatch.fnmatch(name, each) for each in ignored))


# In pieces, so that this file does not name them either.
REGISTRY = re.compile(
    "|".join((r"\bpypi\.[a-z]", r"python" + r"hosted", r"download\.py" + r"torch", r"--(extra-)?index" + "-url"))
)


def test_no_file_names_a_package_registry():
    files = [path for path in files_of_the_repository() if path.is_file()]
    assert {ROOT / "Makefile", ROOT / ".ci" / "run", Path(__file__)} <= set(files)
    assert all(map(REGISTRY.search, ("https://" + "pypi" + ".org/simple", "pip install --index" + "-url x")))
    assert not [str(path) for path in files if REGISTRY.search(path.read_text(errors="ignore"))]


def make(folder, *arguments):
    """Calls make in `folder`, which must fail there, and returns what it says."""
    for name in ("Makefile", "pyproject.toml", "constraints.txt", "requirements.lock"):
        (folder / name).write_bytes((ROOT / name).read_bytes())
    # These tests run under make too, whose variables must not reach the one under test.
    clean = {name: value for name, value in os.environ.items() if not name.startswith(("MAKE", "MFLAGS", "PYTHON"))}
    made = subprocess.run(["make", *arguments], cwd=folder, env=clean, capture_output=True, text=True)
    assert made.returncode != 0 and not (folder / ".venv").exists()
    return made.stderr


def test_a_python_without_venv_is_told_what_to_install(tmp_path):
    python = tmp_path / "python"
    python.write_text('#!/bin/sh\ncase "$*" in *venv*) mkdir -p .venv/bin; exit 1;; esac\n')
    python.chmod(0o755)
    assert "python3-venv" in make(tmp_path, "lint", f"PYTHON={python}")


def test_another_python_is_refused(tmp_path):
    assert "make PYTHON=python3.12 test" in make(tmp_path, "test", "PYTHON=false")


def test_ci_is_a_correct_script():
    script = ROOT / ".ci" / "run"
    assert os.access(script, os.X_OK)
    subprocess.run(["bash", "-n", str(script)], check=True)
    assert "\nset -euo pipefail\n" in script.read_text() and "make test" in script.read_text()


def test_ci_goes_on_without_what_cannot_be_installed(tmp_path):
    for name in ("bash", "env", "dirname", "basename", "mktemp", "tee", "grep", "tail", "rm"):
        (tmp_path / name).symlink_to(shutil.which(name))
    stubs = {"python3": "", "git": "", "make": "echo 3 passed in 1.2s", "sudo": 'exec "$@"'}
    for name, line in {**stubs, "apt-get": "echo apt says no >&2; exit 100"}.items():
        (tmp_path / name).write_text(f"#!{shutil.which('bash')}\n{line}\n")
        (tmp_path / name).chmod(0o755)
    run = subprocess.run([ROOT / ".ci" / "run"], env={"PATH": str(tmp_path)}, capture_output=True, text=True)
    assert run.returncode == 0, run.stderr
    lines = run.stdout.splitlines()
    assert lines[-1] == "3 passed in 1.2s"
    skipped = [line.split()[0] for line in lines if "cannot be installed; tests that need it will be skipped" in line]
    # munge lies in /usr/sbin, where it is looked for too.
    assert {"shellcheck", "slurm-wlm", "chromium"} <= set(skipped) and "git" not in skipped
    assert all(line.endswith("apt says no") for line in lines if "cannot" in line)
