"""Baselines of a run: computed once before its first step, kept in baselines.json of the run folder."""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

from harness.core.errors import UserError
from harness.core.files import read_json, write_json
from harness.core.manifest import at_first
from harness.core.mesh import Mesh
from harness.core.waiting import on_first_rank
from harness.evaluate.baselines import IMPORTED, UNTRAINED, Baselines, Sample, baselines_of, from_json, towers_recall
from harness.evaluate.embed import Embedder
from harness.evaluate.evaluation import Evaluation
from harness.evaluate.signs import warnings
from harness.train.config import RunConfig
from harness.train.imported_weights import init_towers
from models.frozen import Frozen, FrozenConfig
from models.method import Method
from models.weights.convert import read_object

FILE = "baselines.json"


def kept(config: RunConfig, evaluation: Evaluation, mesh: Mesh) -> Baselines | None:
    """The baselines of this evaluation that the run folder has; collective."""
    found = on_first_rank(lambda: _read(config.run_dir / FILE), mesh, "reading the baselines")
    return from_json(found["baselines"]) if found and found["of"] == _made_of(config, evaluation) else None


def keep(config: RunConfig, evaluation: Evaluation, baselines: Baselines) -> None:
    """Writes baselines into the run folder; to be called on rank 0."""
    write_json(config.run_dir / FILE, {"of": _made_of(config, evaluation), "baselines": asdict(baselines)})


def computed(config: RunConfig, evaluation: Evaluation, start: Method | None, mesh: Mesh) -> Baselines:
    """New baselines; collective.

    Args:
        config: of the run.
        evaluation: of any split; it has a sample.
        start: the method with the weights that the run starts from, or None where they are gone: then there is the
            plain one only.
        mesh: the ranks.
    """
    assert evaluation.sample is not None, "the caller looked"
    baselines = baselines_of(evaluation.sample, evaluation.config.split, mesh, config.data.threads)
    if start is None:
        return baselines
    name, embedder = start_of(config.train.init_from, evaluation.sample), evaluation.embedder
    if name == IMPORTED:
        towers: Any = start.towers
        frozen = FrozenConfig(vision=towers.vision.config)
        embedder = Embedder(config.data, frozen, None, evaluation.config.batch_size, mesh)
        start = Frozen(towers)
    recall = {**baselines.recall, name: towers_recall(start, embedder, evaluation.sample)}
    return replace(baselines, recall=recall)


def of_start(config: RunConfig, evaluation: Evaluation, method: Method, mesh: Mesh) -> Baselines:
    """New baselines of a run that is over, with its first weights as far as they can be had; collective.

    Args:
        config: of the run.
        evaluation: of any split; it has a sample.
        method: with the weights that the run's seed gives; imported ones are loaded into it.
        mesh: the ranks.
    """
    folder = config.train.init_from
    if folder is None:
        return computed(config, evaluation, method, mesh)
    if not at_first((folder / "weights.json").is_file, mesh, "looking for imported weights"):
        return computed(config, evaluation, None, mesh)
    try:
        init_towers(method.towers, folder, mesh.tp)
    except UserError:  # other weights lie there now
        return computed(config, evaluation, None, mesh)
    return computed(config, evaluation, method, mesh)


def start_of(init_from: Path | None, sample: Sample) -> str:
    """Name of the weights that a run starts from. An imported image tower is a baseline by itself where photos are
    asked: what the method adds behind it is not trained yet.
    """
    if init_from is None:
        return UNTRAINED
    file = init_from / "weights.json"
    imported = read_object(file).get("model", {}) if file.is_file() else None
    if imported is None or sample.texts:
        return f"start from {init_from.name}"
    return IMPORTED if "vision" in imported else UNTRAINED


def scalars(group: str, signs: Mapping[str, float], baselines: Baselines | None) -> dict[str, float]:
    """Figures beside those of an evaluation in the log, under `group`: those of `harness.evaluate.signs`, and
    Recall@1 of each baseline.
    """
    recall = {} if baselines is None else baselines.recall
    beside = {"recall_at_1_" + re.sub(r"\W+", "_", name): value for name, value in recall.items()}
    return {f"{group}/{name}": value for name, value in {**signs, **beside}.items()}


def judged(config: RunConfig, step: int, signs: Mapping[str, float], baselines: Baselines | None) -> list[str]:
    """Lines for the log of an evaluation with `signs`: the recall beside the baselines', then warnings, once both
    warm-ups are over.
    """
    if not signs:
        return []
    split = config.evaluation.split
    beside = "" if baselines is None else f"; {baselines.shown}"
    line = f"step {step}: {split} recall@1 {signs['sample_recall_at_1']:.3f}{beside}"
    warm_up = max(config.optimizer.warmup_steps, config.train.margin_warmup)
    return [line, *(warnings(signs, baselines, split) if step >= min(warm_up, config.train.steps) else [])]


def _made_of(config: RunConfig, evaluation: Evaluation) -> dict[str, Any]:
    """All that baselines depend on besides the recipe's identity."""
    return {
        "catalogue": str(evaluation.catalogue.path),
        "samples": evaluation.catalogue.num_samples,
        "split": evaluation.config.split,
        "task": evaluation.compared.name if evaluation.compared else None,
        "sample": evaluation.config.baselines,
        "init_from": None if config.train.init_from is None else str(config.train.init_from),
    }


def _read(file: Path) -> dict[str, Any] | None:
    """The content of baselines.json; None where there is none that can be used."""
    try:
        kept = read_json(file) if file.exists() else None
    except UserError:
        return None
    whole = isinstance(kept, dict) and kept.keys() == {"of", "baselines"} and from_json(kept["baselines"])
    return kept if whole else None
