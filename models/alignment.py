"""Alignment of two separately embedded views of a product: probabilistic canonical correlation analysis (Bach & Jordan
2005), in closed form.

One latent vector y ~ N(0, I) explains both views: in whitened coordinates along the canonical directions a view is
sqrt(rho) y plus noise of variance 1 - rho, rho being the direction's canonical correlation. An embedding is the
expectation of y given the views that exist: only a photo, only a title, or both. No labels are needed. Ours; not part
of ITEm.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn

RIDGE = 1e-3  # of `Alignment.fit`


class Alignment(nn.Module):
    """Vectors of the two views to the latent's expectation. Before `fit` a view is returned unchanged, and two are
    averaged.

    Its parameters are fitted, never trained, and stay float32.

    Args:
        width: of the vectors of either view.
    """

    def __init__(self, width: int) -> None:
        super().__init__()
        self.mean = nn.Parameter(torch.zeros(2, width), requires_grad=False)
        self.map = nn.Parameter(torch.eye(width).repeat(2, 1, 1), requires_grad=False)
        self.correlation = nn.Parameter(torch.ones(width), requires_grad=False)

    def forward(self, image: Tensor | None, title: Tensor | None, titled: Tensor | None = None) -> Tensor:
        """Vectors [n, width] of one view or both -> [n, width].

        With both, the title of a product with `titled` false (bool [n]) does not count.
        """
        return self.parts(image, title, titled).sum(1)

    def parts(self, image: Tensor | None, title: Tensor | None, titled: Tensor | None = None) -> Tensor:
        """Arguments as `forward` -> what each view adds to its vector, [n, views, width]."""
        views = [
            (vectors.to(self.mean) - self.mean[view]) @ self.map[view]
            for view, vectors in enumerate((image, title))
            if vectors is not None
        ]
        expected = torch.stack(views, 1)
        if len(views) == 2:
            both = expected / (1 + self.correlation)
            if titled is not None:
                only = torch.stack([views[0], torch.zeros_like(views[1])], 1)
                both = torch.where(titled[:, None, None], both, only)
            expected = both
        return self.correlation.sqrt() * expected

    @torch.no_grad()
    def fit(self, count: Tensor, total: Tensor, products: Tensor, ridge: float = RIDGE) -> None:
        """Fits to the moments of n products' vectors v = [image, title], of 2 width.

        Args:
            count: n [], float64 like all of them.
            total: sum of v [2 width].
            products: sum of v v^T [2 width, 2 width].
            ridge: added to each direction's variance, as a part of the view's mean variance; n may be smaller than 2
                width.
        """
        width = len(self.correlation)
        mean = total / count
        covariance = products / count - mean[:, None] * mean
        own = [covariance[:width, :width], covariance[width:, width:]]
        whiten = [_inverse_root(c + ridge * c.diagonal().mean() * torch.eye(width).to(c)) for c in own]
        left, correlation, right = torch.linalg.svd(whiten[0] @ covariance[:width, width:] @ whiten[1])
        # A direction's sign is free; its largest part is made positive, so that it does not depend on the machine.
        sign = left.gather(0, left.abs().argmax(0, keepdim=True)).sign()
        self.mean.copy_(mean.view(2, width))
        self.map.copy_(torch.stack([whiten[0] @ left * sign, whiten[1] @ right.T * sign]))
        self.correlation.copy_(correlation.clamp(0, 1))


def _inverse_root(matrix: Tensor) -> Tensor:
    """Of a positive definite matrix."""
    values, vectors = torch.linalg.eigh(matrix)
    return vectors * values.clamp_min(1e-30).rsqrt() @ vectors.T  # 0 where all vectors are equal
