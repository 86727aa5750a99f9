"""ONNX files of an artefact in the making, compared with our encoder on the golden inputs before they are kept."""

from __future__ import annotations

from importlib import metadata
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch.export import ExportedProgram

from harness.artefact.golden import TOP, Golden, lowest_cosine
from harness.artefact.onnx_encoder import (
    FILE,
    INT8,
    LEAST_COSINE,
    LEAST_INT8_COSINE,
    has_runtime,
    open_onnx,
    write_int8,
    write_onnx,
)
from harness.artefact.rows import Rows, exact_top
from harness.core.errors import UserError


def write_proven_onnx(program: ExportedProgram, stage: Path, golden: Golden, int8: bool) -> dict[str, Any]:
    """Writes encoder.onnx, and encoder.int8.onnx if `int8`, and compares their embeddings where ONNX Runtime is
    installed.

    Returns:
        runtime (its version; None: not compared), queries and lowest_cosine of encoder.onnx; int8: lowest_cosine,
        mean_cosine, recall_at_10 (share of our encoder's ten best documents that are among its ten best), or None.

    Raises:
        UserError: a cosine is below the bar.
    """
    write_onnx(program, stage)
    runtime = metadata.version("onnxruntime") if has_runtime() else None
    told: dict[str, Any] = {"runtime": runtime, "queries": len(golden.queries), "lowest_cosine": None, "int8": None}
    if runtime and golden.queries:
        told["lowest_cosine"] = _proven(stage, FILE, golden, LEAST_COSINE)[1]
    if int8:
        if not golden.queries:
            raise UserError("--int8 is measured on golden inputs, and the catalogue gives none", "Leave --int8 out")
        write_int8(stage)
        vectors, lowest = _proven(stage, INT8, golden, LEAST_INT8_COSINE)
        norms = np.linalg.norm(vectors, axis=1) * np.linalg.norm(golden.embeddings, axis=1)
        told["int8"] = {
            "lowest_cosine": lowest,
            "mean_cosine": float(((vectors * golden.embeddings).sum(1) / norms).mean()),
            f"recall_at_{TOP}": _overlap(stage, golden, vectors),
        }
    return told


def _proven(stage: Path, name: str, golden: Golden, least: float) -> tuple[np.ndarray, float]:
    vectors = open_onnx(stage / name)(golden.inputs)
    lowest = lowest_cosine(golden.embeddings, vectors)
    if lowest < least:
        remedy = "Leave --int8 out" if name == INT8 else "Leave it out with --onnx false, and report this"
        raise UserError(f"{name} differs: a cosine of {lowest:.6f} with our encoder, below {least}", remedy)
    return vectors, lowest


def _overlap(stage: Path, golden: Golden, vectors: np.ndarray) -> float:
    ours, theirs = (
        exact_top(Rows(stage), torch.from_numpy(found), TOP)[0].tolist() for found in (golden.embeddings, vectors)
    )
    return float(np.mean([len({*a} & {*b}) / len(a) for a, b in zip(ours, theirs, strict=True)]))
