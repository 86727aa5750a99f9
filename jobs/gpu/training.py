"""Six training steps of every method on the GPU and on a CPU, at the same time; then each resumes the other's
checkpoint.

python jobs/gpu/training.py OUT.json --catalogues FOLDER --work FOLDER

The loop's own Trainer steps: NCCL at world 1, megatron-core's DDP and distributed optimizer with overlap, the Triton
head. Both sides see the same pixels (Pillow), so only arithmetic differs. Each side saves after the fourth step and
goes on; a second trainer goes on from that checkpoint, a third from the other side's. The query encoder of the fp32
runs is exported by one side and opened by the other. With --tiny both sides are CPUs.
"""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
import time
import traceback
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch

from harness.bench.gpu import Program, empty_folder
from harness.core.files import write_whole

SAVED, STEPS = 4, 6  # the checkpoint is of the fourth step
WAIT = 300.0  # seconds for the other side's checkpoint
TOWER = {"num_layers": 2, "hidden_size": 64, "num_attention_heads": 4}
BASE: dict[str, Any] = {
    "seed": 1,
    "model.vision.image_size": 64,
    "model.vision.patch_size": 16,
    "model.text.max_length": 24,
    **{f"model.text.{key}": value for key, value in TOWER.items()},
    "data.backend": "reference",
    "data.preprocess.image_size": 64,
    "data.queries_per_step": 16,
    "data.documents_per_step": 16,
    "data.threads": 2,
    "optimizer.lr": 5e-4,
    "optimizer.warmup_steps": 1,
    "train.steps": STEPS,
    "evaluation.split": "train",
}
VISION = {f"model.vision.{key}": value for key, value in TOWER.items()}
OCLEAR = BASE | VISION | {"model.embedding_dim": 64, "head.scale": 16.0}
MAKE = (
    BASE
    | VISION
    | {
        "method": "make",
        "model.embedding_dim": 64,
        "model.query.max_length": 8,
        **{f"model.{tower}.{key}": value for tower in ("query", "fusion") for key, value in TOWER.items()},
        "model.qic.temperature": 0.2,
        "evaluation.query_attributes": ["category", "colour"],
    }
)
ITEM = BASE | {
    "method": "item",
    "model.aligned": True,
    "evaluation.tasks": ["category"],
    "evaluation.category": "category",
}
EIGHT_BIT = {"head.row_dtype": "bf16", "optimizer.rows.state": "8bit", "optimizer.rows.bf16_rows": "stochastic"}
CASES: dict[str, dict[str, Any]] = {
    "oclear": OCLEAR | {"head.sample_rate": 0.5, "optimizer.rows.weight_decay": 0.01, "data.micro_batches": 2},
    "make, some weights 0": MAKE | dict.fromkeys(("model.weights.qim", "model.weights.mlm", "model.weights.mpm"), 0.0),
    "item, some weights 0": ITEM | {"model.weights.itm": 0.0, "model.global_targets": "all"},
    "oclear, 8 bit, average": OCLEAR | EIGHT_BIT | {"head.sample_rate": 0.5, "train.ema_decay": 0.9},
    "make": MAKE | {"model.memory_bank": 32, "model.memory_after": 16},
    "item": ITEM,
    "oclear, conv stem": OCLEAR
    | {"model.vision.stem_channels": [16, 32, 64, 64], "model.vision.stem_blocks": [0, 1, 1, 0]},
    "oclear, rotary, recompute": OCLEAR
    | {"model.vision.positions": "rotary", "model.vision.qk_norm": True, "model.vision.pooling": "attention"}
    | {"mesh.recompute": "selective"},
}
TINY = ("oclear",)
# Largest relative difference of losses, and of gradient norms. Moments of 8 bits and stochastic rows turn the last bit
# of a sum into another code.
BOUNDS = {"fp32": (1e-3, 5e-3), "bf16": (2e-2, 1e-1)}
EXPORT = 1e-3  # largest difference of an entry of a unit vector
Found = dict[str, Any]


def compare(here: Found, twin: Found, precision: str) -> Found:
    """One row of one case from what both sides found: the largest differences, `ok`, and `why` not.

    Losses and gradient norms of all steps, GPU by CPU; losses after a load from the own and from the other side's
    checkpoint, by those of the run that went on; the exported encoder against the towers.
    """
    row: Found = {}
    for side, found in (("here", here), ("twin", twin)):
        if "error" in found:
            return {"ok": False, "why": f"{side}: {found['error']}"}
    loss, norm = BOUNDS[precision]
    pairs = {
        "losses": (here["losses"], twin["losses"], loss),
        "norms": (here["norms"], twin["norms"], norm),
        "resumed": (here["resumed"], here["losses"][SAVED:], loss),
        "from the CPU's checkpoint": (here["crossed"], twin["losses"][SAVED:], loss),
        "on the CPU from this one's": (twin["crossed"], here["losses"][SAVED:], loss),
    }
    wrong = []
    for name, (ours, theirs, bound) in pairs.items():
        row[name] = max(
            (abs(a - b) / max(abs(b), 1e-12) for a, b in zip(ours, theirs, strict=True)), default=float("inf")
        )
        if not row[name] <= bound:  # also NaN
            wrong.append(f"{name} differ by {row[name]:.2g}, at most {bound:g} is allowed")
    if "export" in twin:
        row["export"] = twin["export"]
        if not row["export"] <= EXPORT:
            wrong.append(f"the exported encoder differs by {row['export']:.2g}, at most {EXPORT:g} is allowed")
    return row | {"ok": not wrong} | ({"why": "; ".join(wrong)} if wrong else {})


def key_of(case: str, precision: str) -> str:
    """Name of a case's folder."""
    return f"{case} {precision}".replace(",", "").replace(" ", "-")


class Side:
    """One of the two processes: steps every case, leaves `<work>/<side>.json`.

    Args:
        name: here or twin.
        cuda: whether it has the GPU.
        work: folder that both share.
        catalogue: training data.
    """

    def __init__(self, name: str, cuda: bool, work: Path, catalogue: Path) -> None:
        self.name, self.cuda, self.work, self.catalogue = name, cuda, work, catalogue
        self.other = {"here": "twin", "twin": "here"}[name]
        self.found: dict[str, Found] = {}
        self.mesh: Any = None

    def trainer(self, recipe: Mapping[str, Any], run: Path) -> Any:
        """The loop's Trainer, which resumes by itself what lies in `run`."""
        from harness.core.mesh import Mesh
        from harness.text.catalogue_facts import prepared
        from harness.train.config import parse
        from harness.train.trainer import Trainer

        values = {**recipe, "data.catalogue": self.catalogue, "run_dir": run}
        flags = [f"--{key}={x if isinstance(x, str | Path) else json.dumps(x)}" for key, x in values.items()]
        config, _ = parse(flags, 1)
        config = replace(config, model=prepared(config.method, config.model, config.data.catalogue))
        if self.mesh is None or self.mesh.config != config.mesh:
            if self.mesh is not None:
                self.mesh.close()
            self.mesh = Mesh(config.mesh)
        if self.mesh.device.type != ("cuda" if self.cuda else "cpu"):
            raise RuntimeError(f"side {self.name} runs on {self.mesh.device}")
        run.mkdir(parents=True, exist_ok=True)
        return Trainer(config, self.mesh)

    def alone(self, recipe: Mapping[str, Any], key: str) -> Found:
        """All steps, a checkpoint on the way and a second trainer from it; fp32: the exported encoder too."""
        run = self.work / self.name / key
        first, losses, norms = self.trainer(recipe, run), [], []
        take_rows_of_a_cpu(first)
        for step in range(STEPS):
            if step == SAVED:
                first.save()
            result = first.train_step(first.loader.load(step))
            losses.append(result.loss.item())
            norms.append(float(result.norm))
        if recipe["train.precision"] == "fp32":
            export(first, run)
        first.loader.close()
        (run / "complete").touch()
        return {"losses": losses, "norms": norms, "resumed": self.go_on(recipe, run)}

    def go_on(self, recipe: Mapping[str, Any], run: Path) -> list[float]:
        """Losses of the steps after the checkpoint in `run`, by a new trainer."""
        trainer = self.trainer(recipe, run)
        if trainer.step != SAVED:
            raise RuntimeError(f"the checkpoint in {run} was not taken: step {trainer.step}")
        losses = [trainer.train_step(trainer.loader.load(step)).loss.item() for step in range(SAVED, STEPS)]
        trainer.loader.close()
        return losses

    def crossed(self, recipe: Mapping[str, Any], key: str) -> Found:
        """Steps after the other side's checkpoint, and the other side's encoder opened on the CPU."""
        theirs, ends = self.work / self.other / key, time.monotonic() + WAIT
        while not (theirs / "complete").exists():
            if time.monotonic() > ends:
                raise RuntimeError(f"the other side left no checkpoint in {WAIT:.0f} s")
            time.sleep(0.2)
        run = self.work / self.name / f"{key}-crossed"
        shutil.copytree(theirs / "checkpoints", run / "checkpoints")
        found: Found = {"crossed": self.go_on(recipe, run)}
        if (theirs / "encoder.pt2").exists():
            vectors = torch.load(theirs / "vectors.pt")
            with torch.no_grad():
                again = torch.export.load(theirs / "encoder.pt2").module()(vectors["queries"])
            found["export"] = (again - vectors["found"]).abs().max().item()
        return found

    def run(self, cases: Mapping[str, dict[str, Any]]) -> None:
        """Both rounds over all cases, whatever fails in one."""
        for part in (self.alone, self.crossed):
            for case, recipe in cases.items():
                for precision in BOUNDS:
                    key, began = key_of(case, precision), time.perf_counter()
                    try:
                        found = part({**recipe, "train.precision": precision}, key)
                    except Exception as error:
                        at = traceback.extract_tb(error.__traceback__)[-1]
                        said = " ".join(str(error).split())[:300]
                        found = {"error": f"{type(error).__name__}: {said} ({Path(at.filename).name}:{at.lineno})"}
                        traceback.print_exc()
                    self.found[key] = {**found, **self.found.get(key, {})}  # an error of the first round stands
                    print(f"{key}: {part.__name__} {time.perf_counter() - began:.1f} s {found}", flush=True)
                    self.write()
        if self.mesh is not None:
            self.mesh.close()

    def write(self) -> None:
        """All that was found so far, for the process that compares."""
        write_whole(self.work / f"{self.name}.json", json.dumps(self.found))


def take_rows_of_a_cpu(trainer: Any) -> None:
    """Gives the class rows, fresh ones, the numbers that a CPU draws; a GPU draws others."""
    head = trainer.method.head
    if head is not None:
        head.rows.copy_(head.draw(torch.empty_like(head.rows, device="cpu")))
        if "master" in (state := trainer.rows.row_state()):
            state["master"].copy_(head.rows)


def export(trainer: Any, run: Path) -> None:
    """Writes the run's query encoder for serving, and the towers' own vectors of the same queries."""
    from harness.core.build import plain_query_encoder

    method, config, mesh = trainer.method, trainer.config, trainer.mesh
    method.towers.eval()
    batch = trainer.loader.load(0).batches[0].to(mesh.device, torch.float32)
    queries = (batch.document_images if config.model.query_text is None else batch.query_tokens).cpu()
    with torch.no_grad():
        found = method.embed_query(replace(batch, query_images=batch.document_images)).cpu()
        encoder = plain_query_encoder(config.method, trainer.model_config, method.towers, mesh)
        sizes = ({0: torch.export.Dim("queries", min=1)},)
        torch.export.save(torch.export.export(encoder, (queries,), dynamic_shapes=sizes), run / "encoder.pt2")
    torch.save({"queries": queries, "found": found}, run / "vectors.pt")


def watch(program: Program, work: Path, sides: Mapping[str, Any], keys: Mapping[str, tuple[str, str]]) -> None:
    """Adds a case's row as soon as both sides are through with it; those that a side never came to fail when it has
    ended.
    """
    left = dict(keys)
    while left:
        running = any(process.poll() is None for process in sides.values())
        found = {
            side: json.loads(file.read_text()) if (file := work / f"{side}.json").exists() else {} for side in sides
        }
        for key, (case, precision) in list(left.items()):
            here, twin = (found[side].get(key, {}) for side in ("here", "twin"))
            through = all("crossed" in one or "error" in one for one in (here, twin))
            if not (through or not running):
                continue
            bounds = "bf16" if "8 bit" in case else precision
            ended = {"error": "ended before this case; see its log"}
            here, twin = (one if "crossed" in one or "error" in one else ended for one in (here, twin))
            program.add(case=case, precision=precision, **compare(here, twin, bounds))
            del left[key]
        if running:
            time.sleep(0.3)


def start(side: str, program: Program, work: Path, catalogue: Path, cases: list[str]) -> subprocess.Popen[bytes]:
    """The process of a side; the twin does not see the GPU, and each takes half of the cores."""
    cuda = side == "here" and not program.tiny
    environment = {**os.environ, "OMP_NUM_THREADS": str(max(1, len(os.sched_getaffinity(0)) // 2))}
    if not cuda:
        environment["CUDA_VISIBLE_DEVICES"] = ""
    words = [__file__, "--side", side, "cuda" if cuda else "cpu", str(work), str(catalogue), *cases]
    with (program.out.parent / f"{program.out.stem}-{side}.log").open("w") as log:
        return subprocess.Popen([sys.executable, "-W", "ignore", *words], env=environment, stdout=log, stderr=log)


def main() -> None:
    """Entry point: of the process that compares, or of a side (--side)."""
    if sys.argv[1:2] == ["--side"]:
        name, place, folder, data, *chosen = sys.argv[2:]
        Side(name, place == "cuda", Path(folder), Path(data)).run({case: CASES[case] for case in chosen})
        return
    flags = {"catalogues": "catalogues", "work": "work", "cases": list[str]()}
    program = Program("gpu training", "Training steps on the GPU against the same on a CPU.", flags)
    work, catalogue = Path(program.given.work), Path(program.given.catalogues) / "drawn"
    empty_folder(work)
    cases = program.given.cases or list(TINY if program.tiny else CASES)
    sides = {side: start(side, program, work, catalogue, cases) for side in ("here", "twin")}
    try:
        watch(program, work, sides, {key_of(case, kind): (case, kind) for case in cases for kind in BOUNDS})
    finally:
        for process in sides.values():
            process.kill()
    shutil.rmtree(work, ignore_errors=True)
    program.exit()


if __name__ == "__main__":
    main()
