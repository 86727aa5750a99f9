"""The towers' optimizer: megatron-core's DistributedOptimizer, with clipping, norm and schedule on our side."""

from __future__ import annotations

import math
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from harness.mesh import Mesh
from models.heads.row_optimizer import RowOptimizerConfig
from models.megatron_cpu import cuda_type_names
from models.shape import TransformerShape
from models.transformer import megatron_config

from megatron.core import optimizer as megatron_optimizer  # isort: skip  (after the CPU proxy)
from megatron.core.distributed import DistributedDataParallel, DistributedDataParallelConfig  # isort: skip
from megatron.core.optimizer import distrib_optimizer  # isort: skip


@dataclass(frozen=True, kw_only=True)
class OptimizerConfig:
    """AdamW for the towers, warm-up and cosine decay, and clipping over towers and class rows together.

    Args:
        lr: peak learning rate of the towers.
        min_lr_factor: the cosine ends at lr x this.
        warmup_steps: steps of linear warm-up from 0.
        weight_decay: decoupled weight decay of matrices; biases and norms have none.
        betas: decay of the first and second moment.
        eps: added to the root of the second moment.
        clip_norm: largest global norm of the gradient; 0 never clips.
        rows: AdamW of the class rows.
    """

    lr: float = 1e-3
    min_lr_factor: float = 0.01
    warmup_steps: int = 100
    weight_decay: float = 0.05
    betas: tuple[float, float] = (0.9, 0.98)
    eps: float = 1e-8
    clip_norm: float = 1.0
    rows: RowOptimizerConfig = field(default_factory=RowOptimizerConfig)


def learning_rate(config: OptimizerConfig, step: int, steps: int) -> float:
    """Learning rate of update `step` (0-based) of `steps`: linear warm-up, then cosine to lr x min_lr_factor."""
    if step < config.warmup_steps:
        return config.lr * (step + 1) / config.warmup_steps
    progress = (step - config.warmup_steps) / max(1, steps - config.warmup_steps)
    cosine = 0.5 * (1 + math.cos(math.pi * min(1.0, progress)))
    return config.lr * (config.min_lr_factor + (1 - config.min_lr_factor) * cosine)


class TowerOptimizer:
    """Gradient buffers, data-parallel reduction (a sum) and sharded AdamW of the towers.

    Args:
        towers: the model; its parameters move into megatron-core's buffers.
        config: hyper-parameters.
        mesh: groups and device.
    """

    def __init__(self, towers: nn.Module, config: OptimizerConfig, mesh: Mesh) -> None:
        self.mesh = mesh
        dtype = next(towers.parameters()).dtype
        any_shape = megatron_config(TransformerShape(num_attention_heads=mesh.tp.size()), mesh.tp.size())
        with cuda_type_names():
            self.ddp = DistributedDataParallel(
                any_shape,  # only its calculate_per_token_loss matters: reduce by sum
                DistributedDataParallelConfig(
                    use_distributed_optimizer=True,
                    grad_reduce_in_fp32=True,
                    overlap_grad_reduce=mesh.device.type == "cuda",
                ),
                towers,
            )
            self.optimizer = megatron_optimizer.get_megatron_optimizer(
                megatron_optimizer.OptimizerConfig(
                    optimizer="adam",
                    lr=config.lr,
                    min_lr=0.0,
                    weight_decay=config.weight_decay,
                    adam_beta1=config.betas[0],
                    adam_beta2=config.betas[1],
                    adam_eps=config.eps,
                    clip_grad=0.0,
                    bf16=dtype == torch.bfloat16,
                    params_dtype=dtype,
                    use_distributed_optimizer=True,
                ),
                [self.ddp],
            )
        self._materialise()

    @property
    def _parts(self) -> list[Any]:
        return getattr(self.optimizer, "chained_optimizers", [self.optimizer])

    def zero_grad(self) -> None:
        """Forgets all gradients."""
        self.ddp.zero_grad_buffer()
        self.optimizer.zero_grad()

    def accumulate(self, last: bool) -> AbstractContextManager[Any]:
        """Context of one micro-batch: only the last may start the reduction."""
        return nullcontext() if last else self.ddp.no_sync()

    def reduce(self) -> None:
        """Sums the gradients over dp and readies this rank's shard."""
        self.ddp.finish_grad_sync()
        with cuda_type_names():
            self.optimizer.prepare_grads()

    def squared_norm(self) -> Tensor:
        """Sum of squares of this rank's shard of the gradients, float64 []; summed over the world it counts every element once."""
        grads = self.optimizer.get_main_grads_for_grad_norm()
        total = torch.zeros((), dtype=torch.float64, device=self.mesh.device)
        for norm in torch._foreach_norm(grads) if grads else []:
            total += norm.double() ** 2
        return total

    def scale(self, factor: Tensor) -> None:
        """Multiplies this rank's shard of the gradients by `factor` []."""
        grads = [p.grad for p in self.optimizer.get_parameters() if p.grad is not None]
        torch._foreach_mul_(grads, factor.to(torch.float32))

    def step(self, lr: float) -> None:
        """One AdamW update at `lr`; every rank then holds all updated parameters."""
        for group in self.optimizer.param_groups:
            group["lr"] = lr * group["lr_mult"]
        with cuda_type_names():
            self.optimizer.step_with_ready_grads()

    def sharded_state_dict(self, model_state: dict[str, Any], metadata: dict[str, Any], loading: bool) -> Any:
        """megatron-core's sharded state of the optimizer for `model_state`, the towers' own sharded state."""
        with cuda_type_names():
            return self.optimizer.sharded_state_dict(model_state, is_loading=loading, metadata=metadata)

    def load_state_dict(self, state: Any) -> None:
        """Takes a state that dist_checkpointing loaded."""
        with cuda_type_names():
            self.optimizer.load_state_dict(state)
        # After a load all parameters share one `step` tensor, and torch's AdamW then counts it up once per parameter.
        for part in self._parts:
            for entry in part.optimizer.state.values():
                if isinstance(entry.get("step"), Tensor):
                    entry["step"] = entry["step"].clone()

    def _materialise(self) -> None:
        """Gives torch's AdamW its state before the first step: a fresh DistributedOptimizer can otherwise be neither saved nor loaded."""
        if distrib_optimizer.HAVE_APEX_OR_TE:
            return
        for part in self._parts:
            for group in part.optimizer.param_groups:
                for p in group["params"]:
                    if not part.optimizer.state[p]:
                        part.optimizer.state[p] = {
                            "step": torch.tensor(0.0),
                            "exp_avg": torch.zeros_like(p),
                            "exp_avg_sq": torch.zeros_like(p),
                        }


def _mend_loading() -> None:
    """Without TransformerEngine or apex, megatron-core's fully reshardable load asks the file for AdamW's `step` (KeyError) and writes in place to
    leaves; the step is set by load_state_dict anyway."""
    original = distrib_optimizer.DistributedOptimizer._set_main_param_and_optimizer_states

    @torch.no_grad()
    def with_step(self: Any, model_param: Tensor, tensors: dict[str, Tensor]) -> None:
        group, order = self.model_param_group_index_map[model_param]
        state = self.optimizer.state[self.optimizer.param_groups[group]["params"][order]]
        original(self, model_param, {**tensors, "step": state["step"].clone()} if "step" in state else tensors)

    distrib_optimizer.DistributedOptimizer._set_main_param_and_optimizer_states = with_step


if not distrib_optimizer.HAVE_APEX_OR_TE:
    _mend_loading()
