"""Tensors of a checkpoint: names, and the place of each rank's share in the whole.

Every tensor has one writer: class rows and their state the rank that holds them, moments and float32 weights of the
towers the data-parallel rank that updates them, the towers' weights and averages, which all ranks hold, one rank each.
No rank gathers what others hold.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.tensor import DTensor, Shard

from harness.core.mesh import Mesh
from harness.train.ema import Ema
from harness.train.optimizer import TowerOptimizer
from models.heads.class_parallel import ClassParallelHead
from models.heads.row_optimizer import RowAdamW

from megatron.core.transformer.utils import make_sharded_tensors_for_checkpoint  # isort: skip  (after the CPU proxy)

AVERAGE = "average."  # key of a parameter's average: this and the parameter's own
MEMORY = "memory."  # before the keys of memory banks


@dataclass
class Trainable:
    """Content of a checkpoint besides its state.json. Optimizers are None where only the weights are wanted."""

    towers: nn.Module
    head: ClassParallelHead | None
    tower_optimizer: TowerOptimizer | None
    row_optimizer: RowAdamW | None
    ema: Ema | None = None
    memory: nn.Module | None = None


def model_state(towers: nn.Module, mesh: Mesh) -> dict[str, Any]:
    """The towers' parameters as megatron-core ShardedTensors; keys are the state names of the plain twin."""
    state = towers.state_dict(keep_vars=True)
    # megatron-core's linear layers have an `_extra_state`, which is empty and which plain ones lack.
    return _sharded({k: v for k, v in state.items() if not k.endswith("_extra_state")}, "", towers, mesh)


def average_state(parts: Trainable, mesh: Mesh) -> dict[str, Any]:
    """The entry for parts.ema; empty where that is None."""
    return {} if parts.ema is None else {"average": _sharded(parts.ema.state, AVERAGE, parts.towers, mesh)}


def memory_state(parts: Trainable, mesh: Mesh) -> dict[str, Any]:
    """The entry for parts.memory, which is the same on every rank; empty where that is None."""
    if parts.memory is None:
        return {}
    return {"memory": _sharded(parts.memory.state_dict(), MEMORY, parts.memory, mesh)}


def _sharded(tensors: Mapping[str, torch.Tensor], prefix: str, towers: nn.Module, mesh: Mesh) -> dict[str, Any]:
    """`tensors`, sharded like the parameters of `towers` with the same names, as ShardedTensors with keys prefix +
    name.
    """
    axes = {
        name: parameter.partition_dim  # type: ignore[attr-defined]
        for name, parameter in towers.named_parameters()
        if getattr(parameter, "tensor_model_parallel", False)
    }
    groups = {"tp_group": mesh.tp, "dp_cp_group": mesh.groups.dp_cp}
    state: dict[str, Any] = make_sharded_tensors_for_checkpoint(tensors, prefix, axes, **groups)
    # The library lets the first rank write all that several hold; here each writes a part of the bytes.
    dp, tp, before, total = mesh.dp, mesh.tp, 0, sum(x.numel() for x in tensors.values())
    for name, sharded in zip(tensors, state.values(), strict=True):
        turn = before * dp.size() * tp.size() // max(total, 1)
        other_tp = 0 if name in axes else (tp.rank() - turn % tp.size()) % tp.size()
        sharded.replica_id = (0, other_tp, (dp.rank() - turn // tp.size()) % dp.size())
        before += sharded.data.numel()
    return state


def row_tensors(head: ClassParallelHead, optimizer: RowAdamW | None) -> dict[str, torch.Tensor]:
    """Tensors with an entry for each local row: name in a checkpoint -> tensor."""
    return {"rows": head.rows, **({} if optimizer is None else optimizer.row_state())}


def logical(local: torch.Tensor, num_classes: int, mesh: Mesh) -> DTensor:
    """One logical [num_classes, ...] tensor of shards, also empty ones, in torch.chunk's ranges over the row group."""
    shape = torch.Size((num_classes, *local.shape[1:]))
    return DTensor.from_local(
        local,
        DeviceMesh.from_group(mesh.row_group, mesh.device.type),
        [Shard(0)],
        run_check=False,
        shape=shape,
        stride=torch.empty(shape, device="meta").stride(),
    )


def head_state(head: ClassParallelHead, optimizer: RowAdamW | None, mesh: Mesh) -> dict[str, Any]:
    """The head's rows and their optimizer's state, for torch.distributed.checkpoint."""
    tensors = row_tensors(head, optimizer)
    state: dict[str, Any] = {name: logical(local, head.config.num_classes, mesh) for name, local in tensors.items()}
    if optimizer is not None:
        state["log_decay"] = torch.tensor(optimizer.log_decay, dtype=torch.float64)
    return state
