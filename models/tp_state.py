"""Tensor-parallel state to the merged state of the plain twin, and back."""

from __future__ import annotations

from collections.abc import Mapping

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed import ProcessGroup


def merge_shards(shard: Tensor, parameter: nn.Parameter, group: ProcessGroup) -> Tensor:
    """`shard` (a value or gradient of `parameter`) joined over the tensor-parallel `group`; collective. Replicated ones
    come back as they are.
    """
    if not getattr(parameter, "tensor_model_parallel", False) or group.size() == 1:
        return shard
    shards = [torch.empty_like(shard) for _ in range(group.size())]
    dist.all_gather(shards, shard.contiguous(), group=group)
    return torch.cat(shards, dim=parameter.partition_dim)  # type: ignore[attr-defined]


def merged_state_dict(towers: nn.Module, group: ProcessGroup) -> dict[str, Tensor]:
    """All parameters of the towers on every rank of `group`, under the plain twin's names; collective. The towers have
    no persistent buffers.
    """
    parameters = towers.named_parameters(remove_duplicate=False)
    return {name: merge_shards(parameter.detach(), parameter, group) for name, parameter in parameters}


def cut_shard(whole: Tensor, parameter: nn.Parameter, group: ProcessGroup) -> Tensor:
    """This rank's share of `whole` for `parameter`: the inverse of merge_shards. A replicated one takes all of it."""
    if not getattr(parameter, "tensor_model_parallel", False) or group.size() == 1:
        return whole
    return whole.chunk(group.size(), dim=parameter.partition_dim)[group.rank()]  # type: ignore[attr-defined]


def load_merged(towers: nn.Module, state: Mapping[str, Tensor], group: ProcessGroup) -> None:
    """Copies the tensors of `state`, under the plain twin's names, into the parameters of that name; the others stay as
    they are.

    Raises:
        ValueError: a shape that differs.
    """
    with torch.no_grad():
        for name, parameter in towers.named_parameters(remove_duplicate=False):
            if name in state:
                shard = cut_shard(state[name], parameter, group)
                if shard.shape != parameter.shape:
                    raise ValueError(f"{name} has the shape {tuple(shard.shape)}, not {tuple(parameter.shape)}")
                parameter.copy_(shard)
