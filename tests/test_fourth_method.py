"""A method and an evaluation task written here, registered by a line each, through every command: no generic code knows
one by name.
"""

from __future__ import annotations

import ast
import json
import subprocess
import sys
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.distributed import ProcessGroup

from harness.artefact.artefact import Artefact
from harness.commands import evaluate, export, search
from harness.commands.estimate import main as estimate
from harness.core.errors import UserError
from harness.evaluate.tasks.registry import TASKS
from harness.evaluate.tasks.task import Found, Gallery, Task, TaskInputs
from harness.text.catalogue_facts import prepared
from harness.train import run as train
from harness.train.config import RunConfig, parse
from models.batch import Batch, Reads, rank_sizes
from models.fields import TRAINING_ONLY
from models.heads.contrastive import ContrastiveConfig, contrastive_loss
from models.heads.mean import averaged
from models.method import Calibration, CatalogueFacts, Method, MethodSpec
from models.registry import METHODS
from models.shape import TransformerBuilder, shape_errors
from models.text import TextConfig, TextTower
from models.vision import VisionConfig, VisionTower
from tests.pool import ranks
from tests.runs import trainer
from tests.test_loop import log_lines


@dataclass(frozen=True, kw_only=True)
class ClipConfig:
    """Photos and texts in one space.

    Args:
        vision: tower of query photos.
        text: tower of documents.
        embedding_dim: width of the embeddings.
        sharpness: reciprocal of the temperature.
        prepared: 1 once `prepare` has been asked.
    """

    vision: VisionConfig = field(default_factory=VisionConfig)
    text: TextConfig = field(default_factory=lambda: TextConfig(pooling="mean"))
    embedding_dim: int = 8
    sharpness: float = field(default=10.0, metadata=TRAINING_ONLY)
    prepared: int = 0
    query_text = None

    def errors(self, tensor_parallel: int) -> list[str]:
        return [
            *shape_errors(self.vision, tensor_parallel, "model.vision"),
            *shape_errors(self.text, tensor_parallel, "model.text"),
        ]


class Centre(nn.Module):
    """Mean of the documents' vectors, fitted."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.mean = nn.Parameter(torch.zeros(width), requires_grad=False)

    def fit(self, count: Tensor, total: Tensor, products: Tensor) -> None:
        self.mean.data.copy_(total / count)


class ClipTowers(nn.Module):
    def __init__(self, config: ClipConfig, build: TransformerBuilder) -> None:
        super().__init__()
        self.photo, self.words = VisionTower(config.vision, build), TextTower(config.text, build)
        self.photo_project = nn.Linear(config.vision.hidden_size, config.embedding_dim)
        self.words_project = nn.Linear(config.text.hidden_size, config.embedding_dim)
        self.centre = Centre(config.embedding_dim)

    def query(self, images: Tensor) -> Tensor:
        return self.photo_project(self.photo(images)[1])

    def document(self, tokens: Tensor) -> Tensor:
        return self.words_project(self.words.pool(tokens, self.words(tokens)))


class ClipQuery(nn.Module):
    def __init__(self, towers: ClipTowers) -> None:
        super().__init__()
        self.photo, self.project = towers.photo, towers.photo_project

    def forward(self, images: Tensor) -> Tensor:
        return F.normalize(self.project(self.photo(images)[1]).float(), dim=-1)


class Clip(Method):
    towers: ClipTowers

    def __init__(self, config: ClipConfig, towers: ClipTowers, head: None, data_group: ProcessGroup) -> None:
        assert config.prepared, "nobody asked `prepare`"
        self.towers, self.group = towers, data_group
        self.infonce = ContrastiveConfig(temperature=1 / config.sharpness)

    def losses(self, batches: Sequence[Batch]) -> Iterator[tuple[Tensor, dict[str, Tensor]]]:
        return averaged(self.loss, batches)

    def loss(self, batch: Batch) -> tuple[Tensor, dict[str, Tensor]]:
        queries, documents = self.towers.query(batch.query_images), self.towers.document(batch.document_tokens)
        weights, sizes = batch.query_weights * batch.document_weights, rank_sizes([batch], "query")
        return contrastive_loss(
            queries, documents, batch.query_labels, self.infonce, self.group, weights=weights, sizes=sizes
        )

    def embed_query(self, batch: Batch) -> Tensor:
        return F.normalize(self.towers.query(batch.query_images).float(), dim=-1)

    def embed_document(self, batch: Batch, seen: str = "both") -> Tensor:
        return F.normalize(self.vectors(batch) - self.towers.centre.mean, dim=-1)

    def vectors(self, batch: Batch) -> Tensor:
        return self.towers.document(batch.document_tokens).float()

    @property
    def calibration(self) -> Calibration:
        centre = self.towers.centre
        width = len(centre.mean)
        return Calibration(
            key="centre", needs="title", module=centre, vectors=self.vectors, width=width, fit=centre.fit
        )


def reads(config: ClipConfig) -> Reads:
    return Reads(kind="pairs", text_length=config.text.max_length)


def prepare(config: ClipConfig, facts: CatalogueFacts) -> ClipConfig:
    return replace(config, prepared=1)


class SpreadTask(Task):
    """Norm of the mean of the documents' vectors: 1 where all are equal."""

    name = "spread"

    def __init__(self, inputs: TaskInputs) -> None:
        self.count = len(inputs.documents.ids)

    def run(self, method: Method, gallery: Gallery, seen: str) -> Found:
        return Found({"queries": self.count, "cone": float(gallery.own(seen).vectors.mean(0).norm())})


METHODS["clip"] = MethodSpec(
    config=ClipConfig,
    towers=ClipTowers,
    query_encoder=ClipQuery,
    assemble=Clip,
    reads=reads,
    prepare=prepare,
    catalogue_sizes=("prepared",),
    tasks=("photo", "spread"),
    views=("both",),
)
TASKS["spread"] = SpreadTask

STEPS = 6
TOWER = {"num_layers": 1, "hidden_size": 16, "num_attention_heads": 2}
RECIPE: dict[str, Any] = {
    "method": "clip",
    "seed": 1,
    **{f"model.{name}.{key}": value for name in ("vision", "text") for key, value in TOWER.items()},
    "model.vision.image_size": 16,
    "model.vision.patch_size": 8,
    "model.text.max_length": 12,
    "data.queries_per_step": 6,
    "data.threads": 1,
    "data.preprocess.image_size": 16,
    "optimizer.lr": 1e-2,
    "optimizer.warmup_steps": 1,
    "train.steps": STEPS,
    "train.log_every": 1,
    "evaluation.final_tasks": ["spread"],
}


def arguments(catalogue: Path, run: Path, **more: Any) -> list[str]:
    values = {**RECIPE, "data.catalogue": catalogue, "run_dir": run, **more}
    return [f"--{key}={value if isinstance(value, str | Path) else json.dumps(value)}" for key, value in values.items()]


def config_of(catalogue: Path, run: Path, **more: Any) -> RunConfig:
    config, _ = parse(arguments(catalogue, run, **more))
    return replace(config, model=prepared(config.method, config.model, catalogue))


def lines(run: Path) -> list[dict[str, Any]]:
    return [line for line in log_lines(run) if "train/loss" in line]


@pytest.fixture(scope="module")
def run(catalogue: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run of 6 steps that was stopped after 3 of them, on a device whose peak is known."""
    folder = tmp_path_factory.mktemp("clip")
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("harness.train.flops.peak_flops", lambda *_: 1e9)
        assert train.main(arguments(catalogue, folder / "run", **{"train.stop_at": 3})) == 0
        assert train.main(arguments(catalogue, folder / "run")) == 0
    return folder / "run"


def test_it_trains_resumes_and_logs_its_utilisation(run: Path, catalogue: Path, tmp_path: Path) -> None:
    assert train.main(arguments(catalogue, tmp_path / "run")) == 0
    wanted, found = lines(tmp_path / "run"), lines(run)
    assert [line["step"] for line in found] == [1, 2, 3, 4, 5, 6]
    assert [line["train/loss"] for line in found] == [line["train/loss"] for line in wanted]
    assert found[-1]["train/loss"] < found[0]["train/loss"] and "train/accuracy" in found[0]
    assert all(line["speed/model_flops_utilisation"] > 0 for line in found)
    final = json.loads((run / f"eval-{STEPS:08d}.json").read_text())
    assert final["queries"] == 6 and 0 < final["spread/cone"] < 1


def test_it_is_evaluated_exported_and_searched(
    run: Path, catalogue: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    report = evaluate.run(evaluate.EvalConfig(run=run, split="test", tasks=("spread", "photo")))
    final = json.loads((run / f"eval-{STEPS:08d}.json").read_text())
    assert report["cone"] == pytest.approx(final["spread/cone"], rel=1e-5) and 0 < report["photo/map"] <= 1
    assert any("spread" in line and "cone" in line for line in capsys.readouterr().out.splitlines())
    out = tmp_path / "artefact"
    export.run(export.ExportConfig(run=run, out=out, onnx=False))
    assert Artefact(out).meta["query"] == "image"
    photos = sorted((catalogue.parent / "images").glob("*"))[:2]
    found = search.run(search.SearchConfig(artefact=out, photos=tuple(photos), top=3))
    assert [len(answer["found"]) for answer in found["queries"]] == [3, 3]
    text = search.SearchConfig(artefact=out, text="red disc")
    with pytest.raises(UserError, match="answers photos, not texts"):
        search.run(text)


def test_it_is_estimated(catalogue: Path, tmp_path: Path) -> None:
    """Parameters as they are, FLOPs by part of its own towers, and no head."""
    words = [word for word in arguments(catalogue, tmp_path) if "data.catalogue" not in word]
    figures = estimate([*words, "--vocab-size=48", "--world=8", "--tensor-parallel=2"])
    with trainer(config_of(catalogue, tmp_path)) as t:
        assert t.tokenizer.vocab_size == 48
        count = sum(p.numel() for p in t.method.towers.parameters())
    assert figures["parameters_towers"] == count and figures["num_classes"] == 0
    assert set(figures["flops_per_step"]) == {"photo", "words", "photo_project", "words_project", "losses"}
    assert figures["peak_memory_per_rank"] > 0 and figures["sent_per_step_and_rank"]["head"] > 0


def test_another_run_starts_from_it_with_frozen_parts(run: Path, catalogue: Path, tmp_path: Path) -> None:
    """Its own field may change as it says, its others not."""
    start = {"train.init_from": run, "model.sharpness": 5.0, "optimizer.frozen": ["photo"]}
    start |= {"optimizer.layer_decay": 0.5}
    with trainer(config_of(catalogue, tmp_path / "run", **start)) as t:
        assert any(note.startswith("started from") for note in t.notes)
        assert t.method.towers.centre.mean.abs().min() > 0, "the checkpoint holds no fit"
        before = {name: value.clone() for name, value in t.method.towers.state_dict().items() if "words.words" in name}
        t.train_step(t.loader.load(0))
        assert not any(p.requires_grad for p in t.method.towers.photo.parameters())
        assert before and all(
            not torch.equal(value, t.method.towers.state_dict()[name]) for name, value in before.items()
        )
    start["model.embedding_dim"] = 4
    with pytest.raises(UserError, match=r"was trained with model\.embedding_dim = 8, not 4"):
        trainer(config_of(catalogue, tmp_path / "other", **start)).__enter__()


def trained(config: RunConfig, tensor_parallel: int) -> list[float]:
    """In a pool."""
    with trainer(config, tensor_parallel) as t:
        losses = [t.train_step(data).loss.item() for data in t.loader.steps(0, 3)]
        t.save()
        return losses


@pytest.mark.full
def test_two_ranks_train_it(run: Path, catalogue: Path, tmp_path: Path) -> None:
    config = config_of(catalogue, tmp_path / "run")
    one, other = ranks(2).run(trained, config, 2)
    assert one == other == pytest.approx([line["train/loss"] for line in lines(run)[:3]], rel=1e-4)


KEYS = """
from dataclasses import dataclass
from harness.evaluate.tasks import registry
from harness.evaluate.tasks.task import CommonConfig, Task

@dataclass(frozen=True, kw_only=True)
class Keys(CommonConfig):
    depth: int = 3

class Deep(Task):
    name, config = "deep", Keys

registry.TASKS["deep"] = Deep

from harness.train.config import parse
print(parse(["--evaluation.depth=7", "--data.catalogue=."])[0].evaluation.depth)
"""


def test_a_task_brings_keys_of_its_own() -> None:
    done = subprocess.run([sys.executable, "-c", KEYS], capture_output=True, text=True)
    assert done.stdout.split() == ["7"], done.stderr
    with pytest.raises(UserError, match="depth"):
        parse(["--evaluation.depth=7"])


def test_every_task_of_a_method_is_registered_and_an_unknown_one_refused(catalogue: Path, tmp_path: Path) -> None:
    for name, spec in METHODS.items():
        assert set(spec.tasks) <= set(TASKS), name
    assert all(name == task.name for name, task in TASKS.items())
    with pytest.raises(UserError, match=r"evaluation\.tasks has 'sprad'; clip knows photo, spread"):
        parse(arguments(catalogue, tmp_path, **{"evaluation.tasks": ["sprad"]}))


def test_generic_code_compares_with_no_name_and_imports_no_method() -> None:
    """`item` is the name of a column too: therefore only comparisons and keys of METHODS count."""
    names, wrong, told = {*METHODS} - {"clip"}, [], set[Any]()
    for file in sorted(Path("harness").rglob("*.py")):
        if file.parts[1] == "bench" or "synth" in file.parts:
            continue
        for node in ast.walk(ast.parse(file.read_text(encoding="utf-8"))):
            if isinstance(node, ast.Compare):
                operands = [inner for operand in (node.left, *node.comparators) for inner in ast.walk(operand)]
                told = {inner.value for inner in operands if isinstance(inner, ast.Constant)} & names
            elif isinstance(node, ast.Subscript) and isinstance(node.slice, ast.Constant):
                told = {node.slice.value} & names if ast.unparse(node.value).endswith("METHODS") else set()
            elif isinstance(node, ast.ImportFrom):
                told = {f"{node.module}.{alias.name}".split(".")[1] for alias in node.names} & names
                told = told if str(node.module).startswith("models") else set()
            else:
                continue
            wrong += [f"{file}:{node.lineno} names {name!r}" for name in told]
    assert not wrong
