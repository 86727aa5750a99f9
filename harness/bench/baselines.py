"""Baselines of the class-parallel head in plain PyTorch: full softmax and the scheme of Partial FC.

Written from the published descriptions (An et al., arXiv 2010.05222 and 2203.15565) and from the observed behaviour of
version 2 of InsightFace's code. At sample rate 1.0 the scheme is the full class-sharded softmax. It keeps fewer copies
of the logits than InsightFace's, and leaves out its factor of the world size on the embeddings' gradient, which undoes
the mean of DistributedDataParallel.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor, nn
from torch.distributed import ProcessGroup

from models.heads.margin import Margin, margin_cosine


class PartialFC(nn.Module):
    """Margin softmax over classes spread over the ranks; each rank samples its own negative classes.

    Holds the logits of the whole batch against all sampled rows, treats the margin as a constant in the gradient, and
    clamps probabilities at 1e-30. The rows get a dense gradient, so that an optimizer updates every row in every step.

    Args:
        rows: [n, d], this rank's rows; becomes a parameter without a copy.
        start: class id of the first row.
        margin: (m1, m2, m3): the target's logit is cos(m1 theta + m2) - m3.
        scale: factor on the cosines.
        sample_rate: share of this rank's rows in a step, its positives among them; 1.0 takes all.
        group: ranks that share the rows; each brings equally many samples of its own.
    """

    def __init__(
        self, rows: Tensor, start: int, margin: Margin, scale: float, sample_rate: float, group: ProcessGroup
    ) -> None:
        super().__init__()
        self.weight = nn.Parameter(rows)
        self.start, self.margin, self.scale, self.group = start, margin, scale, group
        self.sample_rate, self.samples = sample_rate, int(sample_rate * len(rows))

    def forward(self, embeddings: Tensor, labels: Tensor, active: Tensor | None = None) -> Tensor:
        """Returns the mean loss over the global batch.

        Args:
            embeddings: [n, d], this rank's; their gradient is d(loss) / d(embeddings).
            labels: int64 [n], class ids.
            active: int64 [a], ascending local rows that hold this rank's positives, instead of sampled rows.

        Returns:
            [], the same on every rank.
        """
        everyone = _Gather.apply(embeddings, self.group)
        parts = [torch.empty_like(labels) for _ in range(self.group.size())]
        dist.all_gather(parts, labels, group=self.group)
        label = torch.cat(parts) - self.start
        mine = torch.nonzero((label >= 0) & (label < len(self.weight)))[:, 0]
        target = label[mine]

        rows: Tensor = self.weight
        if self.sample_rate < 1.0 or active is not None:
            active = self._sample(target) if active is None else active
            rows, target = self.weight[active], torch.searchsorted(active, target)
        logits = F.linear(F.normalize(everyone), F.normalize(rows)).clamp(-1, 1)
        with torch.no_grad():
            cosine = logits[mine, target]
            logits[mine, target] = margin_cosine(cosine, self.margin, straight_through=True)[0]
        return _SoftmaxLoss.apply(logits.mul_(self.scale), mine, target, self.group)

    def _sample(self, positive: Tensor) -> Tensor:
        """Samples positives and random other rows, int64, ascending: `samples` in all, more only if there are more
        positives.
        """
        positive = positive.unique()
        if len(positive) > self.samples:
            return positive
        score = torch.rand(len(self.weight), device=positive.device)
        score[positive] = 2.0
        return score.topk(self.samples).indices.sort().values


class _Gather(torch.autograd.Function):
    """Gathers the rows of all ranks; backward reduces each rank's gradient to it, one collective per rank."""

    @staticmethod
    def forward(ctx: Any, mine: Tensor, group: ProcessGroup) -> Tensor:
        ctx.group = group
        parts = [torch.empty_like(mine) for _ in range(group.size())]
        dist.all_gather(parts, mine.detach().contiguous(), group=group)
        return torch.cat(parts)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, None]:
        group: ProcessGroup = ctx.group
        parts = [part.contiguous() for part in grads[0].chunk(group.size())]
        works = [
            dist.reduce(part, dist.get_global_rank(group, rank), group=group, async_op=True)
            for rank, part in enumerate(parts)
        ]
        for work in works:
            work.wait()
        return parts[group.rank()], None


class _SoftmaxLoss(torch.autograd.Function):
    """Mean of -log(softmax at the target) with columns spread over the ranks; overwrites the logits with
    probabilities.
    """

    @staticmethod
    def forward(ctx: Any, logits: Tensor, mine: Tensor, target: Tensor, group: ProcessGroup) -> Tensor:
        peak = logits.amax(1, keepdim=True)
        dist.all_reduce(peak, dist.ReduceOp.MAX, group=group)
        probability = logits.sub_(peak).exp_()
        total = probability.sum(1, keepdim=True)
        dist.all_reduce(total, group=group)
        probability.div_(total)
        right = logits.new_zeros(len(logits))
        right[mine] = probability[mine, target]
        dist.all_reduce(right, group=group)
        ctx.save_for_backward(probability, mine, target)
        return -right.clamp_min(1e-30).log().mean()

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, None, None, None]:
        probability, mine, target = ctx.saved_tensors
        probability[mine, target] -= 1
        return probability.mul_(grads[0] / len(probability)), None, None, None
