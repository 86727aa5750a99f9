"""The query encoder as a program of torch.export, for services with only torch; ONNX is made from the same program."""

from __future__ import annotations

import io
from pathlib import Path

import torch
from torch import nn
from torch.export import ExportedProgram

from models.method import MethodConfig

FILE = "encoder.pt2"


def make_program(encoder: nn.Module, model: MethodConfig) -> ExportedProgram:
    """The encoder for any number of queries at once, without the source paths of this machine."""
    if (query := model.query_text) is not None:
        example = torch.ones(2, query.max_length, dtype=torch.int64)
    else:
        example = torch.zeros(2, 3, model.vision.image_size, model.vision.image_size)
    with torch.no_grad():
        program = torch.export.export(encoder, (example,), dynamic_shapes=({0: torch.export.Dim("queries", min=1)},))
    for node in program.graph.nodes:
        node.meta.pop("stack_trace", None)
    return program


def write_program(program: ExportedProgram, folder: Path) -> None:
    """Writes folder/encoder.pt2."""
    buffer = io.BytesIO()  # torch's own file writer aborts the process on a full disk
    torch.export.save(program, buffer)
    (folder / FILE).write_bytes(buffer.getbuffer())
