"""A prepared catalogue and a small run on it, for any test that trains or evaluates."""

from __future__ import annotations

import json
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from harness.train.config import RunConfig, parse
from tests.catalogues import make_catalogue

UNUSED = Path(tempfile.gettempdir()) / "shelfmark-unused-run"  # the run folder where a test looks at nothing of it
# fp32, 4 heads for tensor parallelism up to 4, dropout 0: what layout comparisons need.
RECIPE: dict[str, Any] = {
    "seed": 1,
    "model.vision.image_size": 32,
    "model.vision.patch_size": 8,
    "model.vision.num_layers": 1,
    "model.vision.hidden_size": 32,
    "model.vision.num_attention_heads": 4,
    "model.text.num_layers": 1,
    "model.text.hidden_size": 32,
    "model.text.num_attention_heads": 4,
    "model.text.max_length": 16,
    "model.embedding_dim": 16,
    "model.concept_slots": 4,
    "head.scale": 16.0,
    "head.margin": [1.0, 0.0, 0.1],
    "data.queries_per_step": 8,
    "data.documents_per_step": 4,
    "data.threads": 1,
    "data.read_ahead": 2,
    "data.preprocess.image_size": 32,
    "optimizer.lr": 1e-3,
    "optimizer.warmup_steps": 2,
    "train.steps": 4,
    "train.log_every": 1,
    "evaluation.batch_size": 8,
    "evaluation.panel": 3,
    "evaluation.baselines": 0,
}


def prepared_catalogue(
    folder: Path, classes: int = 6, queries: int = 5, size: int = 48, seed: int = 0, vocab_size: int = 48
) -> Path:
    """tests.catalogues.make_catalogue, then govern and tokenizer: ready to train on. Returns folder/catalogue."""
    from harness.commands import govern, tokenizer

    catalogue = make_catalogue(folder, classes=classes, queries=queries, size=size, seed=seed)
    govern.run(govern.GovernConfig(catalogue=catalogue))
    tokenizer.run(tokenizer.TokenizerConfig(catalogue=catalogue, vocab_size=vocab_size))
    return catalogue


def arguments(catalogue: Path, run: Path, /, **overrides: Any) -> list[str]:
    """The command line of a tiny run; dotted keys as in `**{"train.steps": 3}`."""
    values = {**RECIPE, "data.catalogue": catalogue, "run_dir": run, **overrides}
    return [f"--{key}={value if isinstance(value, str | Path) else json.dumps(value)}" for key, value in values.items()]


def tiny_config(catalogue: Path, run: Path, /, **overrides: Any) -> RunConfig:
    """The checked configuration of a tiny run; dotted keys as in `**{"train.steps": 3}`.

    mesh.tensor_parallel is checked against the ranks of this process: inside a pool, choose it with tests.pool.layout.
    """
    return parse(arguments(catalogue, run, **overrides))[0]


@contextmanager
def trainer(config: RunConfig, tensor_parallel: int = 1, ready: bool = True) -> Iterator[Any]:
    """A Trainer on a Mesh over all ranks of this process's world (tests.pool, or only this process).

    With `ready` the run folder explains itself already, as after harness.train.run.
    """
    from harness.train.run import prepare_run_folder
    from harness.train.trainer import Trainer
    from tests.pool import layout

    with layout(tensor_parallel) as mesh:
        made = Trainer(config, mesh)
        try:
            if ready and mesh.rank == 0:
                prepare_run_folder(config, {})
            mesh.barrier()
            yield made
        finally:
            made.loader.close()
