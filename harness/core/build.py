"""Building a method on a mesh: tensor-parallel towers, head, and the plain query encoder."""

from __future__ import annotations

import os
import shutil
from dataclasses import replace

import torch
from torch import nn

from harness.core.device import set_precision
from harness.core.errors import UserError
from harness.core.mesh import Mesh
from models.heads.class_parallel import ClassHeadConfig, ClassParallelHead
from models.method import Method, MethodConfig
from models.plain.transformer import PlainBuilder
from models.registry import METHODS
from models.shape import TransformerBuilder
from models.tp_state import merged_state_dict


def build(
    method: str,
    model: MethodConfig,
    head: ClassHeadConfig,
    mesh: Mesh,
    *,
    num_classes: int,
    vocab_size: int,
    seed: int,
    precision: str,
) -> tuple[Method, MethodConfig]:
    """The tensor-parallel method on this mesh, and its configuration with vocabulary filled in.

    Weights depend only on `seed`, not on the layout. `num_classes` 0 builds no head (evaluation).
    """
    spec = METHODS[method]
    model = replace(model, text=replace(model.text, vocab_size=model.text.vocab_size or vocab_size))
    set_precision(precision)
    mesh.seed_streams(seed, -1)
    torch.manual_seed(seed)  # the same on every rank, unlike the streams
    towers = spec.towers(model, builder(mesh))
    towers.to(mesh.device)
    for parameter in towers.parameters():
        if parameter.requires_grad:  # fitted parameters, which are never trained, stay float32
            parameter.data = parameter.data.to(torch.bfloat16 if precision == "bf16" else torch.float32)
    rows = None
    if num_classes and spec.classifies(model):
        settings = replace(head, num_classes=num_classes, embedding_dim=model.embedding_dim)
        rows = ClassParallelHead(settings, mesh.row_group, mesh.dp, mesh.device, copy_group=mesh.tp)
    return spec.assemble(model, towers, rows, mesh.dp), model


def builder(mesh: Mesh) -> TransformerBuilder:
    """Builder of the towers' blocks for training or evaluation on this mesh.

    Compiled blocks that are not tensor-parallel are plain layers: each is one graph, where megatron-core's break. Names
    and weights are the same.

    Raises:
        UserError: compilation is wanted on a CPU without a C++ compiler.
    """
    config = mesh.config
    compiles = config.compile == "always" or (config.compile == "auto" and mesh.device.type == "cuda")
    if compiles and mesh.device.type == "cpu" and not shutil.which(os.environ.get("CXX", "g++")):
        raise UserError("mesh.compile is 'always', but there is no C++ compiler (g++, or what CXX names)")
    backend = "inductor" if compiles else ""
    if compiles and mesh.tp.size() == 1:
        return PlainBuilder(config.recompute, backend)
    from models.transformer import MegatronBuilder

    return MegatronBuilder(
        mesh.groups,
        sequence_parallel=config.sequence_parallel,
        recompute=config.recompute,
        layer_norm=mesh.accelerators.layer_norm,
        backend=backend,
    )


def plain_query_encoder(method: str, model: MethodConfig, towers: nn.Module, mesh: Mesh) -> nn.Module:
    """The method's query encoder in plain torch, fp32 on the CPU, with the weights of tensor-parallel `towers`;
    collective over tp.
    """
    state = {name: value.float().cpu() for name, value in merged_state_dict(towers, mesh.tp).items()}
    plain = METHODS[method].towers(model, PlainBuilder())
    plain.load_state_dict(state)
    return METHODS[method].query_encoder(plain).eval()
