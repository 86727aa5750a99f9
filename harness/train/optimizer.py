"""Optimizer of the towers: megatron-core's DistributedOptimizer, with our own gradient norm, clipping and schedule."""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor, nn

from harness.core.mesh import Mesh
from harness.train.overlap import OverlappedReduction
from harness.train.param_groups import freeze, lr_factors
from harness.train.schedule import OptimizerConfig
from kernels.keyed import LARGE
from models.accelerators import use_adam
from models.megatron_cpu import cuda_type_names
from models.sequence import sum_partial_gradients
from models.shape import TransformerShape
from models.transformer import megatron_config

from megatron.core import optimizer as megatron_optimizer  # isort: skip  (after the CPU proxy)
from megatron.core.distributed import DistributedDataParallel, DistributedDataParallelConfig  # isort: skip
from megatron.core.optimizer import distrib_optimizer  # isort: skip
from megatron.core.optimizer.optimizer_config import ParamKey, ParamWithNamePredicate  # isort: skip


def sum_of_squares(x: Tensor) -> Tensor:
    """Sum of squares of a large float32 [n, d], in float64 []."""
    # In pieces: a copy in float64 would be the peak of memory.
    total = torch.zeros((), dtype=torch.float64, device=x.device)
    for piece in x.split(1 << 13 if x.device.type == "cpu" else max(1, LARGE // x.shape[1])):
        total += piece.double().square_().sum()
    return total


class TowerOptimizer:
    """Gradient buffers, data-parallel reduction (a sum) and sharded AdamW of the towers.

    Args:
        towers: the model; those of its parameters that are trained move into megatron-core's buffers.
        config: hyper-parameters.
        mesh: groups and device.

    Raises:
        UserError: no parameter has a name given in config.frozen or config.lr_factors.
    """

    def __init__(self, towers: nn.Module, config: OptimizerConfig, mesh: Mesh) -> None:
        self.mesh, self.config = mesh, config
        freeze(towers, config.frozen)  # before gradient buffers are made
        self._trained = [p for p in towers.parameters() if p.requires_grad]
        self._held: set[Tensor] = set()  # what the inner optimizers have of the parameters in `hold`
        dtype = next(towers.parameters()).dtype
        overlap = config.overlap == "always" or (config.overlap == "auto" and mesh.device.type == "cuda")
        any_shape = megatron_config(TransformerShape(num_attention_heads=mesh.tp.size()), mesh.tp.size())
        with cuda_type_names():
            self.ddp = DistributedDataParallel(
                any_shape,  # only its calculate_per_token_loss matters: reduce by sum
                DistributedDataParallelConfig(
                    use_distributed_optimizer=True,
                    grad_reduce_in_fp32=True,
                    overlap_grad_reduce=overlap,
                ),
                towers,
            )
            settings = megatron_optimizer.OptimizerConfig(
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
            )
            factors = lr_factors(towers, config.layer_decay, config.lr_factors)
            use_adam(mesh.accelerators)
            self.optimizer = megatron_optimizer.get_megatron_optimizer(
                settings, [self.ddp], _overrides(settings, factors)
            )
        names = {parameter: name for name, parameter in towers.named_parameters()}
        self._overlapped = OverlappedReduction(self.ddp.bucket_groups, names) if overlap else None
        for group in self.optimizer.param_groups:
            group["weight_decay"] *= group["wd_mult"]  # only megatron-core's own scheduler would do it
        self._materialise()

    @property
    def _parts(self) -> list[Any]:
        return getattr(self.optimizer, "chained_optimizers", [self.optimizer])

    @property
    def notes(self) -> list[str]:
        """Notes for the log, on frozen parameters and unequal learning rates."""
        parameters = list(self.ddp.module.parameters())
        frozen = sum(not parameter.requires_grad for parameter in parameters)
        rates = sorted({group["lr_mult"] for group in self.optimizer.param_groups})
        notes = [f"frozen: {frozen} of the towers' {len(parameters)} tensors"] if self.config.frozen else []
        if rates != [1.0]:
            notes.append(f"learning rates of the towers' parts: {rates[0]:.3g} to {rates[-1]:.3g} x optimizer.lr")
        return notes

    def hold(self, patterns: Sequence[str], key: str) -> None:
        """Trains all parameters but those that a pattern names, until the next call; `key` of the configuration holds
        the patterns.

        What is held gets no gradient, and AdamW leaves it as it is where its moments are 0 (`forget`). It keeps its
        memory, and its zeros are reduced with the other gradients.

        Raises:
            UserError: a pattern names nothing, or nothing is left to train.
        """
        for parameter in self._trained:
            parameter.requires_grad_(True)
        freeze(self.ddp.module, patterns, key)
        self._held = set()
        for part in self._parts:
            for parameter, (group, place) in part.model_param_group_index_map.items():
                if not parameter.requires_grad:
                    self._held.add(part.optimizer.param_groups[group]["params"][place])
        if self._overlapped is not None:
            self._overlapped.restart()

    def forget(self) -> None:
        """Begins AdamW's moments and its number of steps again."""
        for part in self._parts:
            for state in part.optimizer.state.values():
                for name in state.keys() & {"step", "exp_avg", "exp_avg_sq"}:
                    state[name].zero_()
            for group in part.optimizer.param_groups:
                if "step" in group:  # of a fused AdamW
                    group["step"] = 0

    def zero_grad(self) -> None:
        """Sets all gradients to 0."""
        self.ddp.zero_grad_buffer()
        if self._overlapped is not None:
            self._overlapped.begin()
        self.optimizer.zero_grad()

    def accumulate(self, last: bool) -> AbstractContextManager[Any]:
        """Context of the backward pass of a micro-batch: only the last one starts the reduction."""
        return nullcontext() if last else self.ddp.no_sync()

    def reduce(self) -> None:
        """Sums the gradients over dp, those of sequence-parallel parameters also over tp, into this rank's shard."""
        if self._overlapped is not None:
            self._overlapped.finish()
        self.ddp.finish_grad_sync()
        sum_partial_gradients(self.ddp, self.mesh.tp)
        with cuda_type_names():
            self.optimizer.prepare_grads()

    def squared_norm(self) -> Tensor:
        """Sum of squares of this rank's shard of the gradients, float64 []; summed over the world it counts every
        element once.
        """
        grads = self.optimizer.get_main_grads_for_grad_norm()
        total = torch.zeros((), dtype=torch.float64, device=self.mesh.device)
        for norm in torch._foreach_norm(grads) if grads else []:
            total += norm.double() ** 2
        return total

    def part_norms(self) -> dict[str, float]:
        """Norm of this rank's shard of the gradients by part of the towers, the first word of a parameter's name."""
        squares: dict[str, float] = {}
        names = {parameter: name for name, parameter in self.ddp.module.named_parameters()}
        for optimizer in self._parts:
            for parameter, (group, order) in optimizer.model_param_group_index_map.items():
                grad, part = optimizer.optimizer.param_groups[group]["params"][order].grad, names[parameter]
                part = part.partition(".")[0]
                squares[part] = squares.get(part, 0.0) + (0.0 if grad is None else float(grad.double().norm()) ** 2)
        return {part: math.sqrt(square) for part, square in squares.items()}

    def scale(self, factor: Tensor) -> None:
        """Multiplies this rank's shard of the gradients by `factor` []."""
        grads = [p.grad for p in self.optimizer.get_parameters() if p.grad is not None]
        if grads:
            torch._foreach_mul_(grads, factor.to(torch.float32))

    def step(self, lr: float) -> None:
        """One AdamW update at `lr`; every rank then holds all updated parameters."""
        for group in self.optimizer.param_groups:
            group["lr"] = lr * group["lr_mult"]
        with cuda_type_names(), self._halved():
            self.optimizer.step_with_ready_grads()

    @contextmanager
    def _halved(self) -> Iterator[None]:
        """Inside the block what is held has groups of its own, without learning rate and weight decay."""
        # Not groups of megatron-core's: those of equal factors are one to its load_state_dict.
        inner = [part.optimizer for part in self._parts] if self._held else []
        whole = [optimizer.param_groups for optimizer in inner]
        halves = [[_halves(group, self._held) for group in groups] for groups in whole]
        for optimizer, split in zip(inner, halves, strict=True):
            optimizer.param_groups = [half for pair in split for half in pair if half["params"]]
        yield
        for optimizer, groups, split in zip(inner, whole, halves, strict=True):
            optimizer.param_groups = groups
            for group, pair in zip(groups, split, strict=True):
                if steps := [half["step"] for half in pair if "step" in half]:  # of a fused AdamW
                    group["step"] = max(steps)

    def sharded_state_dict(self, model_state: dict[str, Any], loading: bool) -> dict[str, Any]:
        """State of the optimizer for `model_state`, the towers' own as ShardedTensors: this rank's share of it, without
        a copy.

        megatron-core's own would first gather all of it on one rank. Its share of a parameter is a range of the flat
        one, which lies in the checkpoint's tensor as a few blocks.
        """
        (part,) = self._parts
        with cuda_type_names():
            if loading:
                part.load_state_dict(part.state_dict())  # makes what is not there before the first step
            state: dict[str, Any] = part.state_dict()
        places = {id(sharded.data): sharded for sharded in model_state.values()}
        moments: dict[str, Any] = {}
        for parameter, flat in _ranges(part):
            sharded, tensors = places[id(parameter)], part._get_main_param_and_optimizer_states(parameter)
            for kind in ("param", "exp_avg", "exp_avg_sq"):
                key, before = f"optimizer.state.{kind}.{sharded.key}", 0
                for offsets, sizes in blocks(parameter.shape, flat.start, flat.end):
                    numbers = tensors[kind].detach()[before : before + math.prod(sizes)].view(sizes)
                    before += numbers.numel()
                    moments[f"{kind}.{sharded.key}.{before}"] = replace(
                        sharded,
                        key=key,
                        data=numbers,
                        dtype=numbers.dtype,
                        local_shape=sizes,
                        global_offset=tuple(map(sum, zip(sharded.global_offset, offsets, strict=True))),
                        axis_fragmentations=None,
                        replica_id=(0, sharded.replica_id[1], 0),
                    )
        return {**state, "param_state": moments, "param_state_sharding_type": "fully_reshardable"}

    def load_state_dict(self, state: Any) -> None:
        """Takes the number of steps that dist_checkpointing loaded, and keeps the present hyper-parameters; moments and
        float32 weights were loaded in place.
        """
        saved = state["optimizer"]["param_groups"][0]
        count = {"step": saved["step"]} if "step" in saved else {}
        own = ({key: value for key, value in group.items() if key != "params"} for group in self.optimizer.param_groups)
        state["optimizer"]["param_groups"] = [{**group, **count} for group in own]
        with cuda_type_names():
            self.optimizer.load_state_dict({key: x for key, x in state.items() if key != "param_state"})
        # After a load all parameters share one `step` tensor, and torch's AdamW then counts it up once per parameter.
        for part in self._parts:
            for entry in part.optimizer.state.values():
                if isinstance(entry.get("step"), Tensor):
                    entry["step"] = entry["step"].clone()

    def _materialise(self) -> None:
        """Makes the state of torch's AdamW before the first step. A fresh DistributedOptimizer can otherwise be neither
        saved nor loaded.
        """
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
            # Where little is trained, a rank may have no share of it; megatron-core reads its step all the same.
            if not part.optimizer.state:
                part.optimizer.state["no share"] = {"step": torch.tensor(0.0)}


def _halves(group: dict[str, Any], held: set[Tensor]) -> tuple[dict[str, Any], dict[str, Any]]:
    """A parameter group in two: what is trained, and what is held."""
    trained, still = ([p for p in group["params"] if (p in held) is side] for side in (False, True))
    return {**group, "params": trained}, {**group, "params": still, "lr": 0.0, "weight_decay": 0.0}


def _ranges(part: Any) -> Iterator[tuple[nn.Parameter, Any]]:
    """(parameter, range of its flat form) of this rank's share of a DistributedOptimizer."""
    for buffer in part.gbuf_ranges:
        for buckets in buffer.values():
            for bucket in buckets:
                for parameter, ranges in bucket["param_map"].items():
                    yield parameter, ranges["param"]


def blocks(shape: Sequence[int], start: int, stop: int) -> Iterator[tuple[tuple[int, ...], tuple[int, ...]]]:
    """(offsets, sizes) of the blocks that elements start:stop of a tensor of that shape, row by row, make up, in their
    order; at most 2 x dimensions - 1.
    """
    if len(shape) < 2:
        yield ((start,), (stop - start,)) if shape else ((), ())
        return
    row = math.prod(shape[1:])
    while start < stop:
        index, inside = divmod(start, row)
        rows = 0 if inside else (stop - start) // row
        end = start + rows * row if rows else min(stop, (index + 1) * row)
        if rows:
            yield (index, *[0] * (len(shape) - 1)), (rows, *shape[1:])
        else:
            for offsets, sizes in blocks(shape[1:], inside, end - index * row):
                yield (index, *offsets), (1, *sizes)
        start = end


def _overrides(settings: Any, factors: dict[nn.Parameter, float]) -> dict[Any, Any]:
    """megatron-core's parameter groups (biases and norms without weight decay), split once more by the factor on the
    learning rate.
    """
    overrides = dict(megatron_optimizer.get_standard_config_overrides(settings))
    for factor in sorted(set(factors.values()) - {1.0}):
        has_factor = ParamWithNamePredicate(name=f"lr x {factor}", fn=lambda p, _, factor=factor: factors[p] == factor)
        overrides[ParamKey(with_name_predicate=has_factor)] = {"lr_mult": factor}
    return overrides
