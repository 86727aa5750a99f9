"""Every command as a user types it, in this process: help, and one clear line for each mistake."""

from __future__ import annotations

import dataclasses
import errno
import importlib
import json
import re
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple, get_type_hints

import pytest
import yaml

from harness import __main__ as cli
from harness.commands import doctor
from harness.core import manifest as checksums
from harness.core.cli import run_command
from harness.core.errors import UserError
from harness.train import checkpoint_files
from harness.train.config import parse
from harness.train.run import train
from tests.catalogues import make_catalogue
from tests.runs import arguments


class Answer(NamedTuple):
    """Result of a command: exit code, standard output, standard error."""

    code: int
    out: str
    err: str


Shelfmark = Callable[..., Answer]
ROOT = Path(__file__).parents[1]


@pytest.fixture
def shelfmark(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> Shelfmark:
    """shelfmark(*arguments) -> Answer."""

    def run(*argv: Any) -> Answer:
        monkeypatch.setattr(sys, "argv", ["shelfmark", *map(str, argv)])
        capsys.readouterr()
        try:
            code = cli.main()
        except SystemExit as end:  # --help
            code = int(end.code or 0)
        return Answer(code, *capsys.readouterr())

    return run


def refused(answer: Answer, *pieces: str) -> None:
    """Exit code 2, and on stderr, below what progress there was, one line that begins with `error: ` and holds
    `pieces`.
    """
    assert answer.code == 2
    assert "Traceback" not in answer.err
    lines = [line for line in re.split(r"[\r\n]", answer.err) if line.startswith("error")]
    assert len(lines) == 1 and answer.err.endswith(f"{lines[0]}\n"), answer.err
    assert lines[0].startswith("error: ")
    for piece in pieces:
        assert piece in lines[0]


@pytest.fixture(scope="module")
def manifest(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A manifest whose images lie beside it."""
    return make_catalogue(tmp_path_factory.mktemp("raw"), classes=2, queries=2, ingest=False)


@pytest.fixture(scope="module")
def run(catalogue: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run of 2 of its 4 steps. Read only!"""
    folder = tmp_path_factory.mktemp("trained") / "run"
    train(arguments(catalogue, folder, **{"train.stop_at": 2}))
    return folder


# --- help ---


def test_help_names_every_command(shelfmark: Shelfmark) -> None:
    for argv in (["--help"], ["-h"]):
        answer = shelfmark(*argv)
        assert answer.code == 0 and answer.err == ""
        assert all(f"\n  {name} " in answer.out for name in cli.COMMANDS)
    assert shelfmark().code == 2
    refused(shelfmark("trian"), "unknown command 'trian'", "Did you mean 'train'?")


def test_version(shelfmark: Shelfmark) -> None:
    answer = shelfmark("--version")
    assert answer.code == 0 and re.fullmatch(r"shelfmark \d+\.\d+\.\d+\n", answer.out) and answer.err == ""


def test_help_imports_no_command() -> None:
    """Their sentences are read, so that the overview is there at once."""
    code = "import sys, harness.__main__ as cli; cli.usage(); print(*sys.modules)"
    loaded = subprocess.run(
        [sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=True
    ).stdout.split()
    assert "harness.commands" in loaded and not {"torch", "pyarrow", *cli.COMMANDS.values()} & set(loaded)
    assert all(cli.sentence(name).endswith(".") or "…" in cli.sentence(name) for name in cli.COMMANDS)


def test_a_mistake_in_a_recipe_is_told_before_megatron_core_is_imported(tmp_path: Path) -> None:
    (tmp_path / "recipe.yaml").write_text("train: {stpes: 3}")
    code = (
        "import sys; from harness.train.run import main; code = main(['--config', sys.argv[1]]); "
        "heavy = {'megatron', 'pandas', 'tensorboard', 'ibis'}\n"
        "print(code, *sorted({name.split('.')[0] for name in sys.modules} & heavy))"
    )
    answer = subprocess.run(
        [sys.executable, "-c", code, tmp_path / "recipe.yaml"], cwd=ROOT, capture_output=True, text=True
    )
    assert "unknown key 'train.stpes'. Did you mean 'train.steps'?" in answer.stderr and answer.stdout == "2\n"


@pytest.mark.parametrize("command", cli.COMMANDS)
def test_help_has_defaults_and_an_example(shelfmark: Shelfmark, command: str) -> None:
    answer = shelfmark(command, "--help")
    assert answer.code == 0 and answer.err == ""
    text = " ".join(answer.out.split())
    defaults = 5
    run = getattr(importlib.import_module(cli.COMMANDS[command]), "run", None)
    if run is not None:
        fields = dataclasses.fields(get_type_hints(run)["config"])
        defaults = 1 + sum(field.default is not dataclasses.MISSING for field in fields)
    assert text.count("default: ") >= defaults and "--json" in text
    example = text.split("example: ")[1]
    assert example.startswith(("shelfmark", "python jobs/torchrun.py --nproc-per-node 2 -m harness"))
    # The example names no option that does not exist; those of torchrun are not ours.
    flags = [flag for flag in re.findall(r"--[\w.-]+", example) if flag != "--nproc-per-node"]
    assert flags or defaults == 1  # merge has no option but --json
    assert all(f"{flag} " in text.split("example: ")[0] for flag in flags)


def test_help_of_many_keys_names_their_sections_first(shelfmark: Shelfmark) -> None:
    short, whole = shelfmark("train", "--help"), shelfmark("train", "--help-all")
    assert short.code == whole.code == 0 and len(short.out.splitlines()) < 50
    assert short.out.startswith("usage: shelfmark train [options]\n\n")
    assert "--ranks RANKS" in short.out and "--data.catalogue CATALOGUE" in short.out, "its own, and the example's"
    for section, count in re.findall(r"^  --(\w+)\.… +(\d+) keys", short.out, re.MULTILINE):
        assert len(set(re.findall(rf"^  --({section}\.\S+)", whole.out, re.MULTILINE))) == int(count)
    assert "--train.steps" in whole.out and "--train.steps STEPS" not in short.out
    assert shelfmark("export", "--help").out.startswith("usage: shelfmark export --out OUT run [options]\n\n")


# --- doctor ---


def test_doctor_says_whether_a_training_could_start(shelfmark: Shelfmark, tmp_path: Path) -> None:
    answer = shelfmark("doctor", "--run-dir", tmp_path / "not" / "yet", "--json", tmp_path / "found.json")
    assert answer.code == 0 and answer.out.endswith("a training can start here\n") and "MISSING" not in answer.out
    found = json.loads((tmp_path / "found.json").read_text())
    assert f"{tmp_path}: " in found["run folder"] and "megatron-core 0.16.1" in found["packages"]
    assert not (tmp_path / "not").exists()
    answer = shelfmark("doctor", "--device", "cuda", "--run-dir", tmp_path / "found.json")
    refused(answer, "a training cannot start here: gpus, decoder, trainer, run folder")
    assert answer.out.count("MISSING: ") == 4 and "hides all GPUs. Unset it" in answer.out
    assert "found.json: Not a directory. Choose another --run-dir" in answer.out


def test_doctor_compares_versions_with_what_is_asked_for() -> None:
    asked = ["numpy>=1", "numpy<1", "no-such-package>=2", "pillow>=999; extra == 'cu13'"]
    there, lacking = doctor.unmet(asked)
    assert [name.split()[0] for name in there] == ["numpy", "numpy"] and lacking == ["numpy<1", "no-such-package>=2"]


# --- ingest, govern, tokenizer ---


def test_ingest_refuses_with_one_line(shelfmark: Shelfmark, manifest: Path, catalogue: Path, tmp_path: Path) -> None:
    def ingest(
        *more: Any, manifest: Path = manifest, images: Path = manifest.parent, out: Path = tmp_path / "out"
    ) -> Answer:
        return shelfmark("ingest", "--manifest", manifest, "--images", images, "--out", out, *more)

    refused(ingest(manifest=tmp_path / "none.tsv"), "none.tsv", "No such file")
    refused(ingest(images=tmp_path / "none"), "no image folder", "--images")
    refused(ingest(images=catalogue), "none of its 6 rows can be used", "6 x missing file", "--images")
    refused(ingest("--title-column", "titel"), "no column 'titel'", "--title-column", "most similar first: title,")
    refused(ingest("--attribute-columns", "colour,shap"), "no column 'shap'", "most similar first: shape,")
    refused(ingest(out=catalogue), "exists already")
    refused(ingest("--shard-siz", "3"), "unknown key 'shard_siz'", "Did you mean 'shard_size'")
    refused(ingest("--shard-size", "big"), "shard_size", "int", "big")
    refused(ingest("--kind", "photo"), "kind is photo", "query or document")
    refused(ingest("--workers", "0"), "workers is 0")
    refused(shelfmark("ingest", "--images", manifest.parent), "required", "manifest")
    assert not (tmp_path / "out").exists()


def test_govern_refuses_with_one_line(shelfmark: Shelfmark, catalogue: Path, tmp_path: Path) -> None:
    before = sorted((f, f.stat().st_mtime_ns) for f in catalogue.rglob("*"))
    refused(shelfmark("govern"), "required", "catalogue")
    refused(shelfmark("govern", tmp_path / "none"), "no such folder", "shelfmark ingest")
    refused(shelfmark("govern", tmp_path), "no catalogue.json")
    refused(shelfmark("govern", catalogue, "--split", "trian"), "'trian'", "The splits are train (18)")
    refused(shelfmark("govern", catalogue, "--min-queries", "4"), "none of 6 classes", "--min-queries", "most are 3")
    refused(shelfmark("govern", catalogue, "--query-power", "2"), "query_power is 2", "[0, 1]")
    refused(shelfmark("govern", catalogue, catalogue), "unrecognized arguments")
    assert sorted((f, f.stat().st_mtime_ns) for f in catalogue.rglob("*")) == before


def test_tokenizer_refuses_with_one_line(shelfmark: Shelfmark, catalogue: Path, tmp_path: Path) -> None:
    before = sorted((f, f.stat().st_mtime_ns) for f in catalogue.rglob("*"))
    refused(shelfmark("tokenizer", catalogue, "--vocab-size", "9"), "cannot hold", "The least is --vocab-size")
    refused(shelfmark("tokenizer", catalogue, "--model-type", "words"), "model_type", "unigram", "words")
    refused(shelfmark("tokenizer", tmp_path), "no catalogue.json")
    assert sorted((f, f.stat().st_mtime_ns) for f in catalogue.rglob("*")) == before


def test_json_into_a_folder_that_is_not_there_is_refused_before_the_work(
    shelfmark: Shelfmark, catalogue: Path, run: Path, manifest: Path, tmp_path: Path
) -> None:
    json_file = tmp_path / "none" / "figures.json"
    out = tmp_path / "out"
    made = shelfmark("ingest", "--manifest", manifest, "--images", manifest.parent, "--out", out, "--json", json_file)
    refused(made, f"--json {json_file}", "a folder that exists")
    refused(shelfmark("train", *arguments(catalogue, out), "--json", json_file), f"--json {json_file}")
    refused(shelfmark("eval", run, "--json", json_file), f"--json {json_file}")
    assert not out.exists()


def test_json_writes_the_figures(shelfmark: Shelfmark, run: Path, tmp_path: Path) -> None:
    answer = shelfmark("eval", run, "--split", "val", "--slices", "colour,shape", "--json", tmp_path / "e.json")
    assert answer.code == 0 and "step-00000002: split val" in answer.out and "colour = red" in answer.out
    figures = json.loads((tmp_path / "e.json").read_text())
    assert figures["queries"] == 6 and {row["slice"] for row in figures["slices"]} == {"colour", "shape", "class"}


# --- recipes and overrides ---

RECIPES = {
    "no file": (None, ("No such file", "jobs/recipes")),
    "broken YAML": ("train: {steps: [}", ("is not YAML", "line 1")),
    "no YAML at all": (b"\xff\xfe\x00", ("is not YAML",)),
    "a list": ("[1, 2]", ("must be a YAML mapping",)),
    "empty": ("", ("must be a YAML mapping",)),
    "unknown key": ("train: {stepz: 4}", ("unknown key 'train.stepz'", "Did you mean 'train.steps'")),
    "unknown section": ("optimiser: {lr: 1}", ("unknown key 'optimiser.lr'", "Did you mean 'optimizer.lr'")),
    "unknown method": ("method: clap", ("method is 'clap'", "oclear")),
    "method of a wrong type": ("method: [oclear]", ("method is",)),
    "wrong type": ("train: {steps: many}", ("train.steps", "int", "many")),
    "wrong type, deep": ("data: {preprocess: {image_size: big}}", ("data.preprocess.image_size", "int", "big")),
    "a number for a list": ("model: {vision: {stem_channels: 3}}", ("model.vision.stem_channels", "3")),
    "a value for a section": ("model: 5", ("'model' must be a mapping",)),
    "a section without keys": ("train:", ("'train' must be a mapping",)),
    "a key without value": ("seed:", ("'seed' has no value",)),
    "a value out of range": ("data: {preprocess: {flip: 3}}", ("data.preprocess.flip is 3", "[0, 1]")),
    "a key that stands twice": ("train: {steps: 3, steps: 4}", ("is not YAML", "'steps' stands twice")),
}


@pytest.mark.parametrize(("text", "pieces"), RECIPES.values(), ids=RECIPES.keys())
def test_a_wrong_recipe_is_refused(
    shelfmark: Shelfmark, tmp_path: Path, text: str | bytes | None, pieces: tuple[str, ...]
) -> None:
    recipe = tmp_path / "recipe.yaml"
    if text is not None:
        recipe.write_bytes(text if isinstance(text, bytes) else text.encode())
    refused(shelfmark("train", "--config", recipe), *pieces)


OVERRIDES = {
    "unknown key": ({"train.stepz": 4}, ("unknown key 'train.stepz'", "Did you mean 'train.steps'")),
    "wrong type": ({"train.steps": "many"}, ("train.steps", "int", "many")),
    "half a step": ({"train.steps": 1.5}, ("train.steps", "int", "1.5")),
    "too few numbers": ({"head.margin": [1, 2]}, ("head.margin", "3 elements")),
    "precision": ({"train.precision": "fp8"}, ("train.precision is fp8", "fp32, tf32 or bf16")),
    "resume": ({"train.resume": "always"}, ("train.resume is always", "auto or never")),
    "backend": ({"data.backend": "opencv"}, ("data.backend is opencv", "dali, dali_cpu or reference")),
    "two image sizes": (
        {"data.preprocess.image_size": 64},
        ("data.preprocess.image_size 64", "model.vision.image_size 32"),
    ),
    "no patches": ({"model.vision.patch_size": 0}, ("model.vision.patch_size is 0",)),
    "no steps": ({"train.steps": 0}, ("train.steps",)),
    "no batch": ({"evaluation.batch_size": 0}, ("evaluation.batch_size",)),
    "more ranks than heads": (
        {"mesh.tensor_parallel": 3},
        ("model.vision.num_attention_heads 4", "mesh.tensor_parallel 3"),
    ),
    "more ranks than there are": ({"mesh.tensor_parallel": 2}, ("mesh.tensor_parallel is 2", "1 rank(s)", "torchrun")),
}


@pytest.mark.parametrize(("settings", "pieces"), OVERRIDES.values(), ids=OVERRIDES.keys())
def test_a_wrong_override_is_refused(
    shelfmark: Shelfmark, catalogue: Path, tmp_path: Path, settings: dict[str, Any], pieces: tuple[str, ...]
) -> None:
    refused(shelfmark("train", *arguments(catalogue, tmp_path / "run", **settings)), *pieces)
    assert not (tmp_path / "run").exists()


def test_tensor_parallel_must_divide_the_world(
    shelfmark: Shelfmark, catalogue: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("WORLD_SIZE", "3")  # nothing starts: the layout is checked before any process group
    refused(
        shelfmark("train", *arguments(catalogue, tmp_path / "run", **{"mesh.tensor_parallel": 2})),
        "mesh.tensor_parallel is 2",
        "3 rank(s)",
    )


def test_overrides_win_over_the_recipe_and_lists_need_no_brackets(catalogue: Path, tmp_path: Path) -> None:
    from harness.train.config import parse

    recipe = tmp_path / "recipe.yaml"
    recipe.write_text("seed: 7\ntrain: {steps: 9}\nevaluation: {slices: [colour]}\noptimizer: {lr: 1.0e-4}\n")
    more = ["--train.steps", "5", "--evaluation.slices", "shape,colour", "--head.margin=1,0,0.2"]
    config, _ = parse(["--config", str(recipe), "--data.catalogue", str(catalogue), *more])
    assert (config.seed, config.train.steps, config.optimizer.lr) == (7, 5, 1e-4)
    assert config.evaluation.slices == ("shape", "colour") and config.head.margin == (1.0, 0.0, 0.2)
    assert parse(["--config", str(recipe)])[0].evaluation.slices == ("colour",)


def test_any_seed_below_2_to_the_63_is_taken(catalogue: Path, tmp_path: Path) -> None:
    assert parse([*arguments(catalogue, tmp_path), "--seed", str(2**63 - 1)])[0].seed == 2**63 - 1
    with pytest.raises(UserError, match="seed is 9223372036854775808"):
        parse([*arguments(catalogue, tmp_path), "--seed", str(2**63)])


# --- train and eval ---


def test_ranks_are_started_for_a_recipe_that_fits_and_by_nobody_twice(
    shelfmark: Shelfmark, catalogue: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def start(ranks: str, **settings: Any) -> Answer:
        return shelfmark("train", "--ranks", ranks, *arguments(catalogue, tmp_path / "run", **settings))

    for wrong in ("0", "two", "-1"):
        refused(start(wrong), f"--ranks is '{wrong}'", "auto")
    refused(start("2", **{"train.stepz": 4}), "unknown key 'train.stepz'")
    refused(start("3", **{"mesh.tensor_parallel": 2}), "mesh.tensor_parallel is 2", "3 rank(s)")
    monkeypatch.setenv("WORLD_SIZE", "4")
    refused(start("2"), "--ranks is 2", "a launcher has started 4")
    refused(start("auto", **{"mesh.tensor_parallel": 3}), "mesh.tensor_parallel 3")
    assert not (tmp_path / "run").exists()


def test_a_mistake_that_the_ranks_find_is_one_line(tmp_path: Path) -> None:
    command = [
        sys.executable,
        "-m",
        "harness",
        "train",
        "--ranks",
        "2",
        *arguments(tmp_path / "none", tmp_path / "run"),
    ]
    answer = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    refused(Answer(answer.returncode, answer.stdout, answer.stderr), "none: no such folder", "shelfmark ingest")
    assert answer.stderr.count("\n") == 1 and answer.stdout == ""


@pytest.mark.full
def test_train_starts_its_own_ranks(catalogue: Path, tmp_path: Path) -> None:
    command = [sys.executable, "-m", "harness", "train", "--ranks", "2", *arguments(catalogue, tmp_path / "run")]
    answer = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    assert answer.returncode == 0, answer.stderr
    assert answer.stdout.count("steps 4") == 1
    state = json.loads((tmp_path / "run" / "checkpoints" / "step-00000004" / "state.json").read_text())
    assert state["world_size"] == 2


def test_train_refuses_a_catalogue_that_is_not_ready(shelfmark: Shelfmark, catalogue: Path, tmp_path: Path) -> None:
    def start(folder: Path, **settings: Any) -> Answer:
        return shelfmark("train", *arguments(folder, tmp_path / "run", **settings))

    folder = tmp_path / "catalogue"
    refused(start(tmp_path / "none"), "no such folder", "shelfmark ingest")
    refused(start(tmp_path), "no catalogue.json")
    shutil.copytree(catalogue, folder)
    refused(start(folder, **{"evaluation.split": "valid"}), "split 'valid'", "has no query", "all, test, train, val")
    shutil.rmtree(folder / "tokenizer")
    refused(start(folder), "has no tokenizer", f"shelfmark tokenizer {folder}")
    shutil.rmtree(folder / "classes")
    refused(start(folder), "has no classes", f"shelfmark govern {folder}")
    assert not (tmp_path / "run").exists()


def test_train_refuses_a_run_folder_that_it_cannot_have(shelfmark: Shelfmark, catalogue: Path, manifest: Path) -> None:
    refused(shelfmark("train", *arguments(catalogue, manifest)), f"run folder {manifest}", "Choose another folder")


@pytest.mark.parametrize(
    ("key", "value"),
    [("seed", 2), ("head.margin", [1.0, 0.0, 0.2]), ("data.queries_per_step", 6), ("data.preprocess.flip", 0.25)],
)
def test_resuming_another_run_is_refused(
    shelfmark: Shelfmark, catalogue: Path, run: Path, key: str, value: Any
) -> None:
    before = (run / "config.yaml").read_bytes()
    refused(
        shelfmark("train", *arguments(catalogue, run, **{key: value})), f"with {key} = ", f"not {value}", "--run-dir"
    )
    assert (run / "config.yaml").read_bytes() == before


def test_resuming_on_another_order_or_never_is_refused(
    shelfmark: Shelfmark, catalogue: Path, run: Path, tmp_path: Path
) -> None:
    refused(shelfmark("train", *arguments(catalogue, run, **{"train.resume": "never"})), "'never'", "--run-dir")
    other = tmp_path / "catalogue"
    shutil.copytree(catalogue, other)
    assert shelfmark("govern", other, "--query-power", "1", "--document-ratio", "2").code == 0
    refused(shelfmark("train", *arguments(other, run)), "order", "governed again")


def test_a_resume_says_what_changed(shelfmark: Shelfmark, catalogue: Path, run: Path, tmp_path: Path) -> None:
    copy = tmp_path / "run"
    shutil.copytree(run, copy)
    (copy / "checkpoints" / "step-00000009.tmp").mkdir()
    answer = shelfmark("train", *arguments(catalogue, copy, **{"optimizer.lr": 2e-3}))
    assert answer.code == 0
    assert "resumed step-00000002 (saved by 1 ranks, now 1)" in answer.out
    assert "changed since: optimizer.lr 0.001 -> 0.002" in answer.out
    assert "passed over checkpoint step-00000009.tmp: never finished" in answer.out
    assert yaml.safe_load((copy / "config.yaml").read_text())["optimizer"]["lr"] == 2e-3


def test_eval_refuses_with_one_line(shelfmark: Shelfmark, run: Path, tmp_path: Path) -> None:
    refused(shelfmark("eval"), "required", "run")
    refused(shelfmark("eval", tmp_path), "is not a run folder", "config.yaml")
    refused(shelfmark("eval", run, "--split", "tset"), "split 'tset'", "all, test, train, val")
    refused(shelfmark("eval", run, "--slices", "color"), "'color'", "colour, shape")
    refused(shelfmark("eval", run, "--distractors", tmp_path), str(tmp_path), "no catalogue.json")
    refused(shelfmark("eval", run, "--catalogue", tmp_path / "none"), "no such folder")
    refused(shelfmark("eval", run, "--checkpoint", run / "checkpoints" / "step-00000009"), "manifest.json is missing")
    refused(shelfmark("eval", run, "--batch-size", "0"), "batch_size is 0")
    refused(shelfmark("eval", run, "--tensor-parallel", "3"), "model.vision.num_attention_heads 4")
    refused(shelfmark("eval", run, "--tensor-parallel", "2"), "1 rank(s)")


def test_eval_refuses_a_damaged_run(shelfmark: Shelfmark, run: Path, tmp_path: Path) -> None:
    copy = tmp_path / "run"
    shutil.copytree(run, copy)
    with (copy / "checkpoints" / "step-00000002" / "classes.parquet").open("ab") as file:
        file.write(b"\0")
    refused(shelfmark("eval", copy), "no complete checkpoint", "step-00000002: classes.parquet")
    for text, piece in (("a: [", "is not YAML"), ("", "must be a YAML mapping"), ("method: oclear\nsede: 3", "'sede'")):
        (copy / "config.yaml").write_text(text)
        refused(shelfmark("eval", copy), piece, "config.yaml")


# --- a full disk ---


def test_a_full_disk_ends_the_run_and_leaves_earlier_checkpoints(
    shelfmark: Shelfmark, catalogue: Path, small_disk: Callable[[int], Path]
) -> None:
    run = small_disk(2048) / "run"  # large enough for one checkpoint of the tiny run and not for two
    settings = {"train.checkpoint_every": 1, "train.keep_checkpoints": 9}
    refused(
        shelfmark("train", *arguments(catalogue, run, **settings)),
        "step-00000002.tmp was not written: the disk is full",
        "Earlier checkpoints are untouched",
    )
    path, passed_over = checkpoint_files.newest(run / "checkpoints")
    assert path is not None and path.name == "step-00000001" and checksums.verify(path) == ""
    assert passed_over == [], "the half-written one still holds the space"
    assert (run / "checkpoints" / "latest").read_text() == "step-00000001"


def test_what_the_system_refuses_is_one_line_and_other_errors_keep_their_traceback(
    capsys: pytest.CaptureFixture[str],
) -> None:
    def fail(*arguments: Any) -> None:
        raise OSError(*arguments)

    for number in (errno.ENOSPC, errno.EIO, errno.EACCES, errno.EROFS):
        assert run_command(lambda number=number: fail(number, "what the system says", "log.jsonl")) == 2  # type: ignore[misc]
        assert capsys.readouterr().err.startswith("error: log.jsonl: what the system says")
    assert run_command(lambda: fail(errno.ENOSPC, "no space", "old", None, "new")) == 2
    assert capsys.readouterr().err == "error: old: no space. Free space there, then start again\n"
    with pytest.raises(OSError, match="no file is named"):
        run_command(lambda: fail(errno.EBADF, "no file is named"))


def test_one_rank_of_a_node_speaks_for_all(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    def said(rank: int, message: str) -> str:
        def fail() -> None:
            raise UserError(message)

        for name, value in (("RANK", rank), ("TORCHELASTIC_ERROR_FILE", f"{tmp_path}/{rank % 4}/error.json")):
            monkeypatch.setenv(name, str(value))
        assert run_command(fail) == 2
        return capsys.readouterr().err

    assert said(0, "step 7: see rank-0") == "error: step 7: see rank-0\n"
    assert said(1, "step 7: see rank-1") == ""
    assert said(2, "no catalogue") == "error: rank 2: no catalogue\n", "another error than the first rank's"
    monkeypatch.undo()
    assert said(1, "no catalogue") == ""
    tmp_path = tmp_path / "another node"
    tmp_path.mkdir()
    assert said(4, "no catalogue") == "error: rank 4: no catalogue\n"


def test_a_switch_needs_no_value(catalogue: Path, tmp_path: Path) -> None:
    for words in (["--train.new-phase"], ["--train.new-phase", "true"], ["--train.new-phase=true"]):
        assert parse([*arguments(catalogue, tmp_path), *words])[0].train.new_phase
        assert parse([*words, *arguments(catalogue, tmp_path)])[0].train.new_phase
    assert not parse([*arguments(catalogue, tmp_path), "--train.new-phase", "false"])[0].train.new_phase
