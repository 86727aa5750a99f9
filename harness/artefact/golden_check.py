"""Check of an artefact against its golden inputs: each part does what it did at export."""

from __future__ import annotations

from collections.abc import Iterator
from typing import NamedTuple

import numpy as np
import pyarrow as pa
import torch

from harness.artefact.artefact import Artefact
from harness.artefact.decoder_check import LEAST_COSINE as LEAST_DECODER_COSINE
from harness.artefact.golden import TOP, Golden, lowest_cosine, read_golden
from harness.artefact.onnx_encoder import FILE, INT8, LEAST_COSINE, LEAST_INT8_COSINE, has_runtime, open_onnx
from harness.core.errors import UserError

SLACK = 0.1  # recall of so few queries is this much below that of many, at the most


class Check(NamedTuple):
    """A comparison with its figure; the problem ('' = none); a reason where it was left out."""

    what: str
    problem: str = ""
    left_out: str = ""


def check_golden(artefact: Artefact) -> Iterator[Check]:
    """Embeds the golden queries again from photos or texts, and their inputs by each encoder; searches the index."""
    golden = read_golden(artefact.path, artefact.model.embedding_dim)
    if not golden.queries:
        yield Check("golden inputs", left_out="exported with --golden 0")
        return
    yield _compared("preprocessing and encoder", golden, _again(artefact, golden), LEAST_DECODER_COSINE)
    yield _compared("encoder", golden, artefact.encode(torch.from_numpy(golden.inputs)).numpy(), LEAST_COSINE)
    yield _index(artefact, golden)
    for name, least in ((FILE, LEAST_COSINE), (INT8, LEAST_INT8_COSINE)):
        if not (file := artefact.path / name).exists():
            continue
        if not has_runtime():
            yield Check(name, left_out="onnxruntime is not installed")
            continue
        try:
            yield _compared(name, golden, open_onnx(file)(golden.inputs), least)
        except UserError as error:
            yield Check(name, str(error))


def _again(artefact: Artefact, golden: Golden) -> np.ndarray:
    photos = [query.photo for query in golden.queries if query.photo is not None]
    found = artefact.embed(photos) if photos else artefact.embed_texts([query.text for query in golden.queries])
    vectors: np.ndarray = found.numpy()
    return vectors


def _compared(what: str, golden: Golden, vectors: np.ndarray, least: float) -> Check:
    lowest = lowest_cosine(golden.embeddings, vectors)
    figure = f"lowest cosine {lowest:.7f} of {len(vectors)} golden inputs"
    return Check(f"{what}, {figure}", "" if lowest >= least else f"below {least}")


def _index(artefact: Artefact, golden: Golden) -> Check:
    index = artefact.meta.get("index")
    told = index.get("recall_at_10") if isinstance(index, dict) else None
    wanted = (told if isinstance(told, float) else 1.0) - SLACK
    samples = artefact.documents.column("sample_id")
    gone = set() if artefact.kept is None else set(samples.filter(pa.array(~artefact.kept)).to_pylist())
    top = min(TOP, -(-(len(samples) - len(gone)) // 2))  # of fewer documents any index finds all
    found = artefact.search(torch.from_numpy(golden.embeddings), top)
    shares = []
    for query, hits in zip(golden.queries, found, strict=True):
        left = [sample for sample in query.found if sample not in gone][:top]
        right = {samples[hit.row].as_py() for hit in hits} & set(left)
        shares.append(len(right) / len(left) if left else 1.0)
    recall = float(np.mean(shares))
    problem = "" if recall >= wanted else f"below {wanted:.2f} of exact search"
    return Check(f"index, recall@{top} {recall:.3f} of {len(found)} golden inputs", problem)
