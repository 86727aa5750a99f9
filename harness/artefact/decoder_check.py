"""Decoder check before export: a service decodes on a CPU, while the documents' vectors may have been decoded on a GPU.
`shelfmark export` compares the two.
"""

from __future__ import annotations

from contextlib import closing
from itertools import islice
from typing import Any

import numpy as np
import torch
import torch.distributed as dist
import torch.nn.functional as F

from harness.catalogue.catalogue import Catalogue
from harness.core.errors import UserError
from harness.core.mesh import Mesh
from harness.data.images import ImageReader
from harness.text.tokenizer import FIELDS, Tokenizer, TokenStore
from harness.train.config import RunConfig
from models.batch import Batch
from models.method import Method

SAMPLE = 64  # documents: the first of the split
# Decoders round chroma, the discrete cosine transform and resizing differently, which changes vectors by less than
# this. Another window, orientation or chroma upsampling changes them by more.
LEAST_COSINE = 0.999


@torch.no_grad()
def compare_decoders(
    method: Method, settings: RunConfig, catalogue: Catalogue, split: str | None, tokenizer: Tokenizer, mesh: Mesh
) -> dict[str, Any]:
    """Embeds the images of SAMPLE documents, without their texts, decoded as here and as in a service; collective.

    Args:
        method: in evaluation mode.
        settings: the run's.
        catalogue: the catalogue of the documents.
        split: split of the documents; None: all.
        tokenizer: the run's.
        mesh: the ranks; all embed the same documents.

    Returns:
        decoded_by and served_by (decoders in words), documents, lowest_cosine, largest_difference (of a number of a
        unit vector).

    Raises:
        UserError: the lowest cosine is below LEAST_COSINE.
    """
    batches = catalogue.batches([], kind="document", split=split)
    samples = np.fromiter(islice((i for b in batches for i in b.column(0).to_pylist()), SAMPLE), np.int64)
    texts = TokenStore.encode(tokenizer, dict.fromkeys(FIELDS, [""] * len(samples)))
    tokens = torch.from_numpy(texts.batch(np.arange(len(samples)), settings.model.text.max_length))
    dtype = next(method.towers.parameters()).dtype
    vectors, lines, good = [], [], torch.ones(len(samples), dtype=torch.bool)
    for device in (mesh.device, torch.device("cpu")):
        data = settings.data
        reader = ImageReader(catalogue, data.preprocess, data.backend, len(samples), data.threads, device)
        with closing(reader):
            images, ok = reader.read(samples, reader.parameters(samples))
            ids, weights = torch.from_numpy(samples), ok.float()
            batch = Batch(images, ids, weights, ids, images, tokens, ids, weights, ids)
            found = method.embed_document(batch.to(mesh.device, dtype), seen="image")
            vectors.append(F.normalize(found.double(), dim=-1))
        lines.append(reader.line)
        good &= ok.cpu()
    a, b = (found[good.to(found.device)] for found in vectors)
    worst = [
        F.pad(1 - (a * b).sum(1), (0, 1)).max(),
        F.pad((a - b).abs().flatten(), (0, 1)).max(),
    ]  # 0 where all are damaged
    off = torch.stack(worst)
    dist.all_reduce(off, op=dist.ReduceOp.MAX)  # the same decision on all ranks
    cosine, difference = 1 - off[0].item(), off[1].item()
    if not cosine >= LEAST_COSINE:  # also for NaN
        raise UserError(
            f"{lines[1]}, which serves photos, and {lines[0]}, which decodes the documents, differ: "
            f"vectors of a document have a cosine of {cosine:.5f}, below {LEAST_COSINE}",
            f"Set data.backend to dali_cpu in {settings.run_dir}/config.yaml, so that one decoder does both, "
            "and export again",
        )
    return {
        "decoded_by": lines[0],
        "served_by": lines[1],
        "documents": int(good.sum()),
        "lowest_cosine": cosine,
        "largest_difference": difference,
    }
