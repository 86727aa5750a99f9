"""An image tower as it comes, without training: a photo and a document's picture are its pooled vectors. The baseline
that imported weights set; no method of training.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch.nn.functional as F
from torch import Tensor, nn

from models.batch import Batch
from models.method import Method
from models.shape import TransformerBuilder, shape_errors
from models.vision import VisionConfig
from models.vision_kinds import vision_tower


@dataclass(frozen=True, kw_only=True)
class NoText:
    """Texts that are not read."""

    vocab_size: int = 0
    max_length: int = 0
    pad_id: int = 0


@dataclass(frozen=True, kw_only=True)
class FrozenConfig:
    """models.method.MethodConfig of an image tower only."""

    vision: VisionConfig = field(default_factory=VisionConfig)
    text: NoText = field(default_factory=NoText)
    query_text = None

    @property
    def embedding_dim(self) -> int:
        """Width of the pooled vector."""
        return self.vision.pooled_size

    def errors(self, tensor_parallel: int) -> list[str]:
        """Errors for values that do not fit together; each names its key."""
        return self.vision.errors("model.vision") + shape_errors(self.vision, tensor_parallel, "model.vision")


class FrozenTowers(nn.Module):
    """The image tower."""

    def __init__(self, config: FrozenConfig, build: TransformerBuilder) -> None:
        super().__init__()
        self.vision = vision_tower(config.vision, build)


class Frozen(Method):
    """Embeds by the image tower of any method's towers.

    Args:
        towers: with a part `vision`, images [n, 3, S, S] -> (patches, pooled vectors [n, d]).
    """

    towers: Any

    def __init__(self, towers: nn.Module) -> None:
        self.towers = towers

    def losses(self, batches: Sequence[Batch]) -> Iterator[tuple[Tensor, dict[str, Tensor]]]:
        """See Method; there are none."""
        raise NotImplementedError

    def embed_query(self, batch: Batch) -> Tensor:
        """Unit vectors float32 [q, d]."""
        return self._embed(batch.query_images)

    def embed_document(self, batch: Batch, seen: str = "both") -> Tensor:
        """Unit vectors float32 [n, d] of the pictures; texts are not read."""
        return self._embed(batch.document_images)

    def _embed(self, images: Tensor) -> Tensor:
        return F.normalize(self.towers.vision(images)[1].float(), dim=-1)
