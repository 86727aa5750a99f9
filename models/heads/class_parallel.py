"""The class-parallel margin-softmax head: one row of weights per class, the rows spread over all ranks.

    row group   dp x tp: every rank owns a contiguous range of class ids (uneven, also empty).
    data group  dp: every rank brings its own samples; tensor-parallel ranks bring the same ones.

Query and document embeddings are equivalent samples of a class (OCLEAR). The loss is sum(w l) / sum(w) over the global
batch of the whole optimizer step, and the gradient a rank gets is d(global loss) / d(its embeddings): towers sum over
dp and never average.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any, Literal

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor, nn
from torch.distributed import ProcessGroup

from kernels import cosine_lse as twin
from kernels.cosine_lse import NO_TARGET, TILE
from kernels.keyed import fill_normal
from models.comm import gather_shards, own_slice, scatter_sum, shard_sizes
from models.heads.margin import Margin, margin_cosine, scaled_margin
from models.heads.sampling import ID_BLOCK, sampled_classes
from models.ranges import NonNegativeFloat, NonNegativeInt, PositiveFloat, PositiveInt, UnitIntervalAbove0
from models.transfer import send

IGNORED = -1
ROW_DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16}


@dataclass(frozen=True, kw_only=True)
class ClassHeadConfig:
    """The class-parallel classifier.

    Args:
        num_classes: number of classes; 0 takes the catalogue's.
        embedding_dim: width of the embeddings; 0 takes the model's.
        margin: (m1, m2, m3): the target's logit is cos(m1 theta + m2) - m3. (1, 0, m) is CosFace, (1, m, 0) ArcFace.
        scale: factor on the cosines; auto is AdaCos' fixed one, sqrt(2) log(classes - 1): 7.5 for 204, 19.5 for a
            million.
        sample_rate: share of the classes that serve as negatives in a step; positives always do.
        gradient: exact, or straight_through (the margin counts as a constant, as in Partial FC).
        filter_above: negatives whose cosine exceeds it are left out, against label noise; 1.0 leaves out none.
        row_dtype: type of the rows: fp32 or bf16.
        tile: rows whose logits are held at a time on a CPU.
        init_std: standard deviation of a new row's entries.
        seed: seed of new rows and of sampling.
    """

    num_classes: NonNegativeInt = 0
    embedding_dim: NonNegativeInt = 0
    margin: Margin = (1.0, 0.0, 0.4)
    scale: PositiveFloat | Literal["auto"] = 64.0
    sample_rate: UnitIntervalAbove0 = 1.0
    gradient: Literal["exact", "straight_through"] = "exact"
    filter_above: NonNegativeFloat = 1.0
    row_dtype: Literal["fp32", "bf16"] = "fp32"
    tile: PositiveInt = TILE
    init_std: NonNegativeFloat = 0.05
    seed: NonNegativeInt = 0


def fixed_scale(num_classes: int) -> float:
    """The scale that `auto` stands for (Zhang et al., AdaCos, arXiv 1905.00292, equation 15); at least 1: ours, for
    fewer than four classes.
    """
    return max(1.0, math.sqrt(2) * math.log(max(2, num_classes) - 1))


def rows_per_rank(num_classes: int, ranks: int) -> int:
    """Rows of every rank but the last that has any: those of torch.chunk, so that a checkpoint can describe them as a
    DTensor.
    """
    return -(-num_classes // ranks)


def class_range(num_classes: int, rank: int, ranks: int) -> tuple[int, int]:
    """Class ids [start, stop) of a rank."""
    per_rank = rows_per_rank(num_classes, ranks)
    start = min(rank * per_rank, num_classes)
    return start, min(start + per_rank, num_classes)


@dataclass
class _Step:
    """State of one optimizer step: active rows, margin, and the weight that its loss is divided by."""

    active: Tensor  # int64 [a], local row indices, ascending
    weight: Tensor  # [], sum of sample weights over the global batch
    margin: Margin
    grad: Tensor | None = None  # [a, d], gradient of the active rows, summed over micro-batches


class ClassParallelHead(nn.Module):
    """See the module docstring. `rows` is not a parameter: only models.heads.row_optimizer updates it.

    Args:
        config: num_classes and embedding_dim must be set.
        row_group: ranks that share the rows.
        data_group: ranks that bring different samples.
        device: where the rows live.
        dtype: type of the rows, in place of the configuration's (float64 for tests).
        copy_group: ranks that bring the same samples, tensor-parallel ones; None without any.

    Raises:
        ValueError: the row group is not made of the two others.
    """

    def __init__(
        self,
        config: ClassHeadConfig,
        row_group: ProcessGroup,
        data_group: ProcessGroup,
        device: torch.device | str = "cpu",
        dtype: torch.dtype | None = None,
        copy_group: ProcessGroup | None = None,
    ) -> None:
        super().__init__()
        self.config, self.row_group, self.data_group = config, row_group, data_group
        self.scale = fixed_scale(config.num_classes) if config.scale == "auto" else config.scale
        copies = 1 if copy_group is None else copy_group.size()
        self.copy_group = copy_group if copies > 1 else None
        if data_group.size() * copies != row_group.size():
            raise ValueError(
                f"{row_group.size()} ranks share the rows, but {data_group.size()} x {copies} bring samples"
            )
        self.start, self.stop = class_range(config.num_classes, row_group.rank(), row_group.size())
        size = (self.stop - self.start, config.embedding_dim)
        self.rows = self.draw(torch.empty(size, dtype=dtype or ROW_DTYPES[config.row_dtype], device=device))
        # Without sampling every step has the same active rows: one list for all of them.
        self._every_row = torch.arange(len(self.rows) if config.sample_rate == 1.0 else 0, device=device)
        self._step: _Step | None = None

    def draw(self, rows: Tensor) -> Tensor:
        """Fills `rows` [n, d] with the initial values of this rank's rows, and returns them.

        They are keyed by class ids, on a CPU by blocks of them, so that they do not depend on the number of ranks; a
        GPU draws other numbers.
        """
        config = self.config
        if rows.device.type != "cpu":
            fill_normal(rows, config.init_std, self.start, config.seed)
            return rows
        for block in range(self.start // ID_BLOCK, -(-self.stop // ID_BLOCK) if len(rows) else 0):
            generator = torch.Generator().manual_seed((config.seed * 1_000_003 + block) % 2**64)
            drawn = config.init_std * torch.randn(ID_BLOCK, config.embedding_dim, generator=generator)
            first, last = max(self.start, block * ID_BLOCK), min(self.stop, (block + 1) * ID_BLOCK)
            rows[first - self.start : last - self.start] = drawn[first - block * ID_BLOCK : last - block * ID_BLOCK]
        return rows

    def begin_step(
        self,
        labels: Tensor,
        weights: Tensor | None = None,
        step: int = 0,
        margin_part: float = 1.0,
        sizes: list[int] | None = None,
    ) -> Tensor:
        """Fixes the active rows and the global weight from this rank's samples of the whole step, before the calls with
        its micro-batches.

        Waits for the device once each: for sampled classes (the number of active rows), without `sizes`, and for labels
        on the device.

        Args:
            labels: int64 [n], class ids of all micro-batches of this rank, best on the host; IGNORED (-1) counts
                nothing.
            weights: [n], default 1.
            step: global step; keys the sampling of negatives.
            margin_part: share of the margin in [0, 1], for its warm-up.
            sizes: n of every rank of the data group, where the caller knows them.

        Returns:
            int64 [a]: the active local rows, ascending.

        Raises:
            ValueError: a label outside [-1, num_classes).
        """
        if len(labels) and not bool(((labels >= IGNORED) & (labels < self.config.num_classes)).all()):
            raise ValueError(f"labels must lie in [-1, {self.config.num_classes}), got {labels.min()}..{labels.max()}")
        labels = send(labels, self.rows.device)
        total = self._weights(labels, None if weights is None else send(weights, labels.device)).sum()
        dist.all_reduce(total, group=self.data_group)
        if self.config.sample_rate < 1.0:
            everyone = gather_shards(labels, self.data_group, sizes)
            active = self._sampled_rows(everyone, step)
        else:
            active = self._every_row
        self._step = _Step(active, total, scaled_margin(self.config.margin, margin_part))
        return active

    def _sampled_rows(self, labels: Tensor, step: int) -> Tensor:
        """Local rows int64 [a], ascending, of the classes that are drawn and of all ranks' `labels`."""
        drawn = sampled_classes(self.start, self.stop, self.config.sample_rate, self.config.seed, step, labels.device)
        classes = torch.cat([drawn, labels])
        mine = (classes >= self.start) & (classes < self.stop)
        # Ids of other ranks go to one row past the end: a selection would wait for the device to count them.
        chosen = torch.zeros(len(self.rows) + 1, dtype=torch.bool, device=labels.device)
        chosen.index_fill_(0, torch.where(mine, classes - self.start, len(self.rows)), True)
        return chosen[:-1].nonzero()[:, 0]

    def forward(
        self, embeddings: Tensor, labels: Tensor, weights: Tensor | None = None, sizes: list[int] | None = None
    ) -> tuple[Tensor, dict[str, Tensor]]:
        """Loss of one micro-batch of local samples.

        Args:
            embeddings: [n, d], any length, any n per rank (also 0); tensor-parallel ranks pass the same.
            labels: int64 [n], class ids, IGNORED (-1) to leave a sample out.
            weights: [n], default 1.
            sizes: n of every rank of the data group, where the caller knows them; else the device is waited for.

        Returns:
            (loss: the micro-batch's part sum(w l) / W of the step's loss, the same on every rank; metrics
            positive_cosine and accuracy as local [weighted sum, weight], which add up over micro-batches and ranks).
            Without begin_step the call is a step of its own; the rows' gradients wait in `row_grad`.
        """
        if self._step is None:
            self.begin_step(labels, weights, sizes=sizes)
        assert self._step is not None
        sizes = sizes or shard_sizes(len(labels), self.data_group, labels.device)
        unit = F.normalize(embeddings.to(self._accumulate), dim=-1)
        weights = self._weights(labels, weights)
        everyone = self._everyone(unit.detach(), embeddings.detach(), sizes)
        loss, cosine, right = _MarginSoftmax.apply(unit, everyone, labels, weights, self, self._step, sizes)
        total = weights.sum()
        metrics = {"positive_cosine": cosine @ weights, "accuracy": right @ weights}
        return loss, {name: torch.stack([value, total]) for name, value in metrics.items()}

    @property
    def row_grad(self) -> tuple[Tensor, Tensor]:
        """(active local rows int64 [a], their gradient [a, d]) of the open step."""
        step = self._step
        assert step is not None, "no step is open"
        if step.grad is None:
            step.grad = self.rows.new_zeros(len(step.active), self.config.embedding_dim, dtype=self._accumulate)
        return step.active, step.grad

    def end_step(self) -> None:
        """Forgets the open step and its gradients."""
        self._step = None

    def full_weight(self) -> Tensor:
        """All rows in class-id order [num_classes, embedding_dim], on every rank."""
        weight = gather_shards(self.rows, self.row_group)
        return weight.clone() if weight is self.rows else weight

    def load_full_weight(self, weight: Tensor) -> None:
        """Takes this rank's rows out of `weight` [num_classes, embedding_dim]; before their optimizer is made, which
        may keep a copy.
        """
        if tuple(weight.shape) != (self.config.num_classes, self.config.embedding_dim):
            raise ValueError(
                f"expected [{self.config.num_classes}, {self.config.embedding_dim}], got {list(weight.shape)}"
            )
        self.rows.copy_(weight[self.start : self.stop])

    def _everyone(self, unit: Tensor, embeddings: Tensor, sizes: list[int]) -> Tensor:
        """`unit` of all ranks: where the embeddings are of a narrower type, they are what travels, and are normalised
        again.
        """
        if self.data_group.size() == 1 or embeddings.dtype.itemsize >= unit.dtype.itemsize:
            return gather_shards(unit, self.data_group, sizes)
        return F.normalize(gather_shards(embeddings, self.data_group, sizes).to(unit.dtype), dim=-1)

    @property
    def _accumulate(self) -> torch.dtype:
        return torch.promote_types(self.rows.dtype, torch.float32)

    def _weights(self, labels: Tensor, weights: Tensor | None) -> Tensor:
        """Sample weights [n] in the accumulation type, 0 where the label is IGNORED."""
        if weights is None:
            weights = torch.ones(len(labels), device=labels.device)
        return weights.to(self._accumulate) * (labels != IGNORED)


class _MarginSoftmax(torch.autograd.Function):
    """Loss over sharded rows. Backward fills step.grad and returns the exact gradient of the local unit embeddings."""

    @staticmethod
    def forward(
        ctx: Any,
        unit: Tensor,
        everyone: Tensor,
        labels: Tensor,
        weights: Tensor,
        head: ClassParallelHead,
        step: _Step,
        sizes: list[int],
    ) -> tuple[Tensor, Tensor, Tensor]:
        config = head.config
        label = gather_shards(labels, head.data_group, sizes)
        weight = gather_shards(weights, head.data_group, sizes) / step.weight.clamp_min(torch.finfo(weights.dtype).tiny)

        index = None if len(step.active) == len(head.rows) else step.active
        target = _row_of(label, head, step.active)
        part = _kernel(head.rows).cosine_lse(
            everyone, head.rows, index, target, head.scale, config.filter_above, config.tile
        )
        lse, cosine, largest = _combine(part, head.row_group)

        value, slope = margin_cosine(cosine, step.margin, config.gradient == "straight_through")
        # -log softmax of the target = log(1 + exp(lse - logit)): exact at both ends, no clamp
        sample_loss = torch.logaddexp(torch.zeros_like(lse), lse - head.scale * value)
        ctx.save_for_backward(everyone, target, lse, weight, slope, head.scale * value)
        ctx.head, ctx.step, ctx.sizes, ctx.index = head, step, sizes, index
        loss = torch.where(weight > 0, sample_loss, 0.0) @ weight
        mine = own_slice(sizes, head.data_group.rank())
        own_cosine, own_right = cosine[mine].clone(), (cosine > largest)[mine].to(weight.dtype)
        ctx.mark_non_differentiable(own_cosine, own_right)
        return loss, own_cosine, own_right

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        everyone, target, lse, weight, slope, logit = ctx.saved_tensors
        head: ClassParallelHead = ctx.head
        config = head.config
        wrong = grads[0] * weight * torch.sigmoid(lse - logit)  # d loss / d lse; the target's logit gets the opposite
        grad, grad_rows = _kernel(head.rows).cosine_lse_backward(
            everyone,
            head.rows,
            ctx.index,
            target,
            head.scale,
            lse,
            wrong,
            -head.scale * slope * wrong,
            config.filter_above,
            config.tile,
        )
        ctx.step.grad = grad_rows if ctx.step.grad is None else ctx.step.grad.add_(grad_rows)
        grad = scatter_sum(grad, head.data_group, ctx.sizes)
        if head.copy_group is not None:
            dist.all_reduce(grad, group=head.copy_group)
        return grad, None, None, None, None, None, None


def _kernel(rows: Tensor) -> Any:
    """The module with cosine_lse and its backward for these rows: Triton's on a GPU, which has no float64, else the
    torch twin.
    """
    if rows.is_cuda and rows.dtype != torch.float64:
        from kernels import cosine_lse_triton  # torch for CUDA brings triton; elsewhere it may be missing

        return cosine_lse_triton
    return twin


def _row_of(label: Tensor, head: ClassParallelHead, active: Tensor) -> Tensor:
    """Index in `active` of each label's row, NO_TARGET where this rank does not own the class."""
    mine = (label >= head.start) & (label < head.stop)
    if not len(active):
        return torch.full_like(label, NO_TARGET)
    return torch.where(mine, torch.searchsorted(active, label - head.start).clamp_max(len(active) - 1), NO_TARGET)


def _combine(part: Any, group: ProcessGroup) -> tuple[Tensor, Tensor, Tensor]:
    """Log-sum-exp, target cosine and largest negative cosine over all shards, from each shard's own."""
    if group.size() == 1:
        return part.lse, part.target_cosine, part.max_cosine
    peaks = torch.stack([part.lse, part.max_cosine])
    dist.all_reduce(peaks, dist.ReduceOp.MAX, group=group)
    peak = torch.where(peaks[0].isfinite(), peaks[0], 0.0)
    sums = torch.stack([torch.exp(part.lse - peak), part.target_cosine])
    dist.all_reduce(sums, group=group)
    return peak + sums[0].log(), sums[1], peaks[1]
