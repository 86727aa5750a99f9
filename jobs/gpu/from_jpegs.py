"""Images per second of training steps from JPEGs on disk (read, decode, towers, optimizer), and of the same steps with
a batch in memory.

python jobs/gpu/from_jpegs.py OUT.json --catalogues FOLDER --work FOLDER

OCLEAR with ViT-B/16 in bf16, a text tower of one narrow layer and 512 classes, so that only the image tower counts.
"""

from __future__ import annotations

import json
import shutil
from pathlib import Path

from harness.bench.gpu import Program, empty_folder
from harness.core.mesh import Mesh
from harness.train.config import parse
from harness.train.trainer import Trainer

BAR = 2119.0


def main() -> None:
    """Entry point."""
    program = Program(
        "gpu from jpegs", "Training steps from JPEGs.", {"catalogues": "catalogues", "work": "work", "batch": 256}
    )
    work = Path(program.given.work)
    empty_folder(work)
    batch, steps, threads = (8, 2, [1]) if program.tiny else (program.given.batch, 24, [4, 8, 16])
    recipe = {
        "data.catalogue": str(Path(program.given.catalogues) / "photos"),
        "data.queries_per_step": batch // 2,
        "data.documents_per_step": batch // 2,
        "model.vision.preset": "vit_b16",
        **{
            f"model.text.{key}": value
            for key, value in (("hidden_size", 64), ("num_attention_heads", 1), ("num_layers", 1), ("max_length", 16))
        },
        "data.preprocess.image_size": 224,
        "train.precision": "fp32" if program.tiny else "bf16",
        "train.steps": 1000,
        "evaluation.split": "train",
    }
    if program.tiny:
        recipe |= {"model.vision.num_layers": 1, "model.vision.image_size": 32, "data.preprocess.image_size": 32}
    best, mesh = 0.0, None
    for number in threads:
        run = work / f"threads-{number}"
        flags = [f"--{key}={value if isinstance(value, str) else json.dumps(value)}" for key, value in recipe.items()]
        config, _ = parse([*flags, f"--data.threads={number}", f"--run-dir={run}"], 1)
        mesh = mesh or Mesh(config.mesh)
        run.mkdir(parents=True, exist_ok=True)
        trainer = Trainer(config, mesh)
        warm = 1 if program.tiny else 6
        row: dict[str, float] = {}
        seconds = reading = 0.0
        for place, data in enumerate(trainer.loader.steps(0, warm + steps)):
            if place == warm:
                began = program.synchronize()
            trainer.train_step(data)
            if place >= warm:
                reading += data.read_seconds
        seconds = program.synchronize() - began
        row["images_per_s"], row["reading_and_decoding_images_per_s"] = batch * steps / seconds, batch * steps / reading
        program.add(threads=number, batch=batch, **row)
        best = max(best, row["images_per_s"])
        if number == threads[-1]:
            for place in range(warm + steps):
                if place == warm:
                    began = program.synchronize()
                trainer.train_step(data)
            program.add(
                what="the same batch again", batch=batch, images_per_s=batch * steps / (program.synchronize() - began)
            )
        trainer.loader.close()
        del trainer
    program.bar("vit_b16_from_jpegs_images_per_s", best, BAR)
    if mesh is not None:
        mesh.close()
    shutil.rmtree(work, ignore_errors=True)
    program.exit()


if __name__ == "__main__":
    main()
