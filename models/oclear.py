"""OCLEAR: a query photo finds documents made of image and text, by classification (Cheng et al., arXiv 2305.03972).

Known: one image encoder shared by query and document, separate transformation networks behind it, concept-aware fusion
of a document's text and image, queries and documents as equivalent samples of a class, data-parallel encoders with a
class-parallel classifier. Ours: everything else (docs/methods.md). The same `OclearTowers` runs on megatron-core
(training) and in plain torch (oracle, serving), by the choice of the builder.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from typing import Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.distributed import ProcessGroup

from models.batch import Batch, Reads, rank_sizes
from models.fields import TRAINING_ONLY
from models.fusion import ConcatFusion, ConceptFusion, ResidualTransform
from models.heads.cached import cached_losses
from models.heads.class_parallel import ClassParallelHead
from models.heads.contrastive import ContrastiveConfig, contrastive_loss
from models.method import Method, MethodSpec
from models.ranges import ClosedUnitInterval, OpenUnitInterval, PositiveFloat, Size
from models.shape import TransformerBuilder, shape_errors, words_hidden
from models.text import TextConfig, TextTower
from models.vision import VisionConfig
from models.vision_kinds import vision_tower


@dataclass(frozen=True, kw_only=True)
class OclearConfig:
    """OCLEAR's towers and objective.

    Args:
        vision: the image tower, shared by queries and documents.
        text: the text tower of documents.
        embedding_dim: width of the embeddings.
        fusion_kind: of a document's image and text: concept (concept-aware), concat (one linear layer), or image (no
            text): ablations.
        concept_slots: memory slots of the concept-aware fusion.
        fusion_heads: attention heads of the fusion.
        gate_init: gate of the fusion at the start, in (0, 1): 0 is only the image, 1 only the text's concepts.
        text_dropout: share of documents whose text is left out in training.
        separate_transforms: a transformation network each for queries and documents; false shares one (ablation).
        transform_dropout: dropout inside the transformation networks.
        objective: classification (class-parallel margin softmax), or contrastive (in-batch InfoNCE, for comparison).
        temperature: of the contrastive objective.
    """

    vision: VisionConfig = field(default_factory=VisionConfig)
    text: TextConfig = field(default_factory=TextConfig)
    embedding_dim: Size = 256
    fusion_kind: Literal["concept", "concat", "image"] = "concept"
    concept_slots: Size = 8
    fusion_heads: Size = 4
    gate_init: OpenUnitInterval = field(default=0.5, metadata=TRAINING_ONLY)
    text_dropout: ClosedUnitInterval = field(default=0.0, metadata=TRAINING_ONLY)
    separate_transforms: bool = True
    transform_dropout: ClosedUnitInterval = field(default=0.0, metadata=TRAINING_ONLY)
    objective: Literal["classification", "contrastive"] = "classification"
    temperature: PositiveFloat = field(default=0.07, metadata=TRAINING_ONLY)
    query_text = None  # queries are photos

    def errors(self, tensor_parallel: int) -> list[str]:
        """Errors for values that do not fit together; each names its key."""
        errors = self.vision.errors("model.vision") + self.text.errors("model.text")
        if self.vision.projection_dim:
            errors.append(
                f"model.vision.projection_dim is {self.vision.projection_dim}; "
                "OCLEAR's fusion takes the tower's own width: 0"
            )
        errors += shape_errors(self.vision, tensor_parallel, "model.vision")
        errors += shape_errors(self.text, tensor_parallel, "model.text")
        if self.vision.hidden_size % self.fusion_heads:
            errors.append(
                f"model.vision.hidden_size {self.vision.hidden_size} is not a multiple of "
                f"model.fusion_heads {self.fusion_heads}"
            )
        return errors


class OclearTowers(nn.Module):
    """Images and texts to embeddings."""

    def __init__(self, config: OclearConfig, build: TransformerBuilder) -> None:
        super().__init__()
        hidden = config.vision.hidden_size
        self.pad_id = config.text.pad_id
        self.vision = vision_tower(config.vision, build)
        self.text = TextTower(config.text, build)
        self.fusion: ConceptFusion | ConcatFusion
        if config.fusion_kind == "concept":
            self.fusion = ConceptFusion(
                hidden,
                config.text.hidden_size,
                config.concept_slots,
                config.fusion_heads,
                config.gate_init,
                config.text_dropout,
            )
        else:
            self.fusion = ConcatFusion(hidden, config.text.hidden_size if config.fusion_kind == "concat" else 0)
        self.query_transform = ResidualTransform(hidden, config.embedding_dim, config.transform_dropout)
        self.document_transform = (
            ResidualTransform(hidden, config.embedding_dim, config.transform_dropout)
            if config.separate_transforms
            else self.query_transform
        )

    def query(self, images: Tensor) -> Tensor:
        """images [q, 3, S, S] -> [q, d], not normalised."""
        return self.query_transform(self.vision(images)[1])

    def document(self, images: Tensor, tokens: Tensor, padded: bool = True) -> tuple[Tensor, Tensor]:
        """images [n, 3, S, S], tokens [n, L] -> (embeddings [n, d], not normalised; gates [n]); padded as TextTower."""
        patches, pooled = self.vision(images)
        return self._fuse(patches, pooled, tokens, padded)

    def forward(
        self, query_images: Tensor, images: Tensor, tokens: Tensor, padded: bool = True
    ) -> tuple[Tensor, Tensor, Tensor]:
        """Both in one pass of the shared image tower -> (queries [q, d], documents [n, d], gates [n])."""
        patches, pooled = self.vision(torch.cat([query_images, images]))
        q = len(query_images)
        documents, gate = self._fuse(patches[q:], pooled[q:], tokens, padded)
        return self.query_transform(pooled[:q]), documents, gate

    def _fuse(self, patches: Tensor, pooled: Tensor, tokens: Tensor, padded: bool) -> tuple[Tensor, Tensor]:
        fused = self.fusion(pooled, patches, self.text(tokens, padded), words_hidden(tokens, self.pad_id))
        return self.document_transform(fused.vector), fused.gate


class OclearQuery(nn.Module):
    """Query encoder for serving: photos to unit embeddings, without the document side.

    Args:
        towers: plain towers with the trained weights; shared, not copied.
    """

    def __init__(self, towers: OclearTowers) -> None:
        super().__init__()
        self.vision, self.query_transform = towers.vision, towers.query_transform

    def forward(self, images: Tensor) -> Tensor:
        """images [n, 3, S, S] -> unit embeddings float32 [n, d]."""
        return F.normalize(self.query_transform(self.vision(images)[1]).float(), dim=-1)


class Oclear(Method):
    """The method: losses(batches), embed_query(batch), embed_document(batch).

    Args:
        config: the method's configuration.
        towers: OclearTowers, plain or tensor-parallel.
        head: the class-parallel head; None with the contrastive objective, or without training.
        data_group: ranks that bring different samples.
    """

    towers: OclearTowers

    def __init__(
        self, config: OclearConfig, towers: OclearTowers, head: ClassParallelHead | None, data_group: ProcessGroup
    ) -> None:
        self.config, self.towers, self.head, self.data_group = config, towers, head, data_group

    def losses(self, batches: Sequence[Batch]) -> Iterator[tuple[Tensor, dict[str, Tensor]]]:
        """Loss (the same on every rank) of each micro-batch and metrics as local [sum, weight]: positive_cosine,
        accuracy, gate.

        They add up to the step's. Call backward on each loss before asking for the next.
        """
        if self.head is None:
            labels = torch.cat([b.query_labels for b in batches])
            weights = torch.cat([b.query_weights * b.document_weights for b in batches])
            settings = ContrastiveConfig(temperature=self.config.temperature)
            sizes = rank_sizes(batches, "query")

            def loss_of(queries: Tensor, documents: Tensor) -> tuple[Tensor, dict[str, Tensor]]:
                return contrastive_loss(
                    queries, documents, labels, settings, self.data_group, weights=weights, sizes=sizes
                )

            parts: Iterator[tuple[Tensor, dict[str, Tensor], Tensor]] = cached_losses(self._encode, batches, loss_of)
        else:
            parts = map(self._classify, batches)
        for loss, metrics, gate in parts:
            gates = torch.stack([gate.detach().to(loss.dtype).sum(), loss.new_full((), len(gate))])
            yield loss, {**metrics, "gate": gates}

    def _encode(self, batch: Batch) -> tuple[tuple[Tensor, Tensor], Tensor]:
        tokens, padded = self._texts(batch)
        queries, documents, gate = self.towers(batch.query_images, batch.document_images, tokens, padded)
        return (queries, documents), gate

    def _texts(self, batch: Batch) -> tuple[Tensor, bool]:
        """The documents' tokens, trimmed, and whether there is padding among them."""
        batch = batch.trimmed(*["document"] * self.config.text.trims)
        return batch.document_tokens, batch.padded("document")

    def _classify(self, batch: Batch) -> tuple[Tensor, dict[str, Tensor], Tensor]:
        embeddings, gate = self._encode(batch)
        assert self.head is not None, "the caller looked"
        sizes = rank_sizes([batch], "query", "document")
        loss, metrics = self.head(torch.cat(embeddings), batch.labels, batch.weights, sizes)
        return loss, metrics, gate

    def embed_query(self, batch: Batch) -> Tensor:
        """Unit embeddings of the batch's queries, float32 [q, d]."""
        return F.normalize(self.towers.query(batch.query_images).float(), dim=-1)

    def embed_document(self, batch: Batch, seen: str = "both") -> Tensor:
        """Unit embeddings of the batch's documents, float32 [d, dim]; they are always seen as image and text."""
        return F.normalize(self.towers.document(batch.document_images, *self._texts(batch))[0].float(), dim=-1)


def _classifies(config: OclearConfig) -> bool:
    return config.objective == "classification"


def _reads(config: OclearConfig) -> Reads:
    return Reads(kind="photos" if _classifies(config) else "pairs", text_length=config.text.max_length)


METHOD = MethodSpec(
    config=OclearConfig,
    towers=OclearTowers,
    query_encoder=OclearQuery,
    assemble=Oclear,
    reads=_reads,
    classifies=_classifies,
    tasks=("photo", "category"),
    views=("both",),
)
