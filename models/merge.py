"""Tensor-parallel state to one state: what the plain twin loads."""

from __future__ import annotations

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed import ProcessGroup


def merge_shards(shard: Tensor, parameter: nn.Parameter, group: ProcessGroup) -> Tensor:
    """`shard` (a value or gradient of `parameter`) joined over the tensor-parallel `group`; collective. Replicated ones come back as they are."""
    if not getattr(parameter, "tensor_model_parallel", False) or group.size() == 1:
        return shard
    shards = [torch.empty_like(shard) for _ in range(group.size())]
    dist.all_gather(shards, shard.contiguous(), group=group)
    return torch.cat(shards, dim=parameter.partition_dim)  # type: ignore[attr-defined]


def merged_state_dict(towers: nn.Module, group: ProcessGroup) -> dict[str, Tensor]:
    """All parameters of the towers on every rank of `group`, under the plain twin's names; collective. They have no buffers."""
    parameters = towers.named_parameters(remove_duplicate=False)
    return {name: merge_shards(parameter.detach(), parameter, group) for name, parameter in parameters}
