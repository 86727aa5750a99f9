"""OCLEAR: a query photo finds documents made of image and text, by classification (Cheng et al., arXiv 2305.03972).

Known: one image encoder shared by query and document, separate transformation networks behind it, concept-aware fusion
of a document's text and image, queries and documents as equivalent samples of a class, data-parallel encoders with a
class-parallel classifier. Ours: everything else (docs/methods.md). The same `OclearTowers` runs on megatron-core
(training) and in plain torch (oracle, serving), by the choice of the builder.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any, Literal

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor, nn
from torch.distributed import ProcessGroup

from models.batch import Batch, Reads, rank_sizes
from models.explanation import Explanation
from models.fields import TRAINING_ONLY
from models.fusion import ConcatFusion, ConceptFusion, Fused, ResidualTransform, SumFusion
from models.heads.cached import cached_losses
from models.heads.class_parallel import ClassParallelHead
from models.heads.contrastive import (
    ContrastiveConfig,
    Related,
    contrastive_loss,
    same_product,
    same_product_or_answer,
)
from models.method import Fit, Method, MethodSpec
from models.ranges import (
    ClosedUnitInterval,
    NonNegativeFloat,
    OpenUnitInterval,
    PositiveFloat,
    Size,
    UnitIntervalBelow1,
)
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
        fusion_kind: of a document's image and text: concept (concept-aware), sum (of unit vectors, see
            fusion_weights), or, for comparison, concat (one linear layer) and image (no text).
        fusion_weights: of a sum's parts: the image, the average of its patches that the text steers, and the text's
            own vector; 0 leaves a part out.
        concept_slots: memory slots of the concept-aware fusion, and of a sum's steering.
        fusion_heads: attention heads of the fusion.
        gate_init: gate of the fusion at the start, in (0, 1): 0 is only the image, 1 only the text's concepts.
        text_dropout: share of documents whose text is left out in training; of a sum only the text's own vector is.
        separate_transforms: a transformation network each for queries and documents; false shares one (ablation).
        transform_dropout: dropout inside the transformation networks.
        objective: classification (class-parallel margin softmax), or contrastive (in-batch InfoNCE, for comparison).
        temperature: of the contrastive objective.
        contrast_weight: of InfoNCE over the step's pairs beside the classes; above 0 each photo brings a document of
            its class (data.documents_per_step has no effect).
        contrast_margin: taken off the cosine of each pair in InfoNCE: above 0 it is AM-softmax.
        wrong_texts: each document's image with another document's text is one more negative in InfoNCE; no effect
            without it.
        image_anchor: weight of a document's image alone as a further document of its class in training, relative to
            the fused one; 0 trains on none.
        fused_stop_gradient: losses of fused documents do not train the image tower; photos and images alone do.
        document_share: of the documents in the class loss, the photos have the rest; 0 counts every sample alike.
    """

    vision: VisionConfig = field(default_factory=VisionConfig)
    text: TextConfig = field(default_factory=TextConfig)
    embedding_dim: Size = 256
    fusion_kind: Literal["concept", "sum", "concat", "image"] = "concept"
    fusion_weights: tuple[NonNegativeFloat, NonNegativeFloat, NonNegativeFloat] = (1.0, 1.0, 0.5)
    concept_slots: Size = 8
    fusion_heads: Size = 4
    gate_init: OpenUnitInterval = field(default=0.5, metadata=TRAINING_ONLY)
    text_dropout: ClosedUnitInterval = field(default=0.0, metadata=TRAINING_ONLY)
    separate_transforms: bool = True
    transform_dropout: ClosedUnitInterval = field(default=0.0, metadata=TRAINING_ONLY)
    objective: Literal["classification", "contrastive"] = field(default="classification", metadata=TRAINING_ONLY)
    temperature: PositiveFloat = field(default=0.07, metadata=TRAINING_ONLY)
    contrast_weight: NonNegativeFloat = field(default=0.0, metadata=TRAINING_ONLY)
    contrast_margin: NonNegativeFloat = field(default=0.0, metadata=TRAINING_ONLY)
    wrong_texts: bool = field(default=False, metadata=TRAINING_ONLY)
    image_anchor: NonNegativeFloat = field(default=0.0, metadata=TRAINING_ONLY)
    fused_stop_gradient: bool = field(default=False, metadata=TRAINING_ONLY)
    document_share: UnitIntervalBelow1 = field(default=0.0, metadata=TRAINING_ONLY)
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
        if not any(self.fusion_weights):
            errors.append("model.fusion_weights are all 0: a document has no vector")
        weightless = self.fusion_kind == "sum" and not any(self.fusion_weights[1:])
        if self.wrong_texts and (self.fusion_kind == "image" or weightless):
            errors.append("model.wrong_texts: the text is no part of a document's vector (model.fusion_kind)")
        return errors


class OclearTowers(nn.Module):
    """Images and texts to embeddings."""

    def __init__(self, config: OclearConfig, build: TransformerBuilder) -> None:
        super().__init__()
        hidden = config.vision.hidden_size
        self.pad_id, self.stop_gradient = config.text.pad_id, config.fused_stop_gradient
        self.vision = vision_tower(config.vision, build)
        self.text = TextTower(config.text, build)
        self.fusion: ConceptFusion | SumFusion | ConcatFusion
        if config.fusion_kind == "concept":
            self.fusion = ConceptFusion(
                hidden,
                config.text.hidden_size,
                config.concept_slots,
                config.fusion_heads,
                config.gate_init,
                config.text_dropout,
            )
        elif config.fusion_kind == "sum":
            self.fusion = SumFusion(
                hidden,
                config.text.hidden_size,
                config.embedding_dim,
                config.concept_slots,
                config.fusion_heads,
                config.fusion_weights,
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
        vectors, fused = self.fused_document(images, tokens, padded)
        return vectors, fused.gate

    def fused_document(self, images: Tensor, tokens: Tensor, padded: bool = True) -> tuple[Tensor, Fused]:
        """As `document`, with all that the fusion gives in the gates' place."""
        patches, pooled = self.vision(images)
        return self._fuse(patches, pooled, tokens, padded)

    def image_document(self, images: Tensor) -> Tensor:
        """Documents by their images alone: [n, 3, S, S] -> [n, d], not normalised."""
        return self.document_transform(self.vision(images)[1])

    def forward(
        self,
        query_images: Tensor,
        images: Tensor,
        tokens: Tensor,
        padded: bool = True,
        alone: bool = False,
        wrong_texts: bool = False,
    ) -> tuple[Tensor, Tensor, Tensor]:
        """Both in one pass of the shared image tower -> (queries [q, d], documents [n, d], gates [n]).

        With `alone` or `wrong_texts`, documents are [n, 2 or 3, d]: fused; by their images alone; fused with the text
        of the document before, all texts whole.
        """
        patches, pooled = self.vision(torch.cat([query_images, images]))
        q = len(query_images)
        documents, fused = self._fuse(patches[q:], pooled[q:], tokens, padded, alone, wrong_texts)
        return self.query_transform(pooled[:q]), documents, fused.gate

    def _fuse(
        self,
        patches: Tensor,
        pooled: Tensor,
        tokens: Tensor,
        padded: bool,
        alone: bool = False,
        wrong_texts: bool = False,
    ) -> tuple[Tensor, Fused]:
        words, hidden = self.text(tokens, padded), words_hidden(tokens, self.pad_id)
        seen = (pooled.detach(), patches.detach()) if self.stop_gradient else (pooled, patches)
        vector, image, fused = self._document(*seen, words, hidden)
        found = [vector]
        if alone:
            found.append(self.document_transform(pooled) if image is None or self.stop_gradient else image)
        if wrong_texts:
            found.append(self._document(*seen, words.roll(1, 0), hidden.roll(1, 0), every_text=True)[0])
        return torch.stack(found, 1) if len(found) > 1 else vector, fused

    def _document(
        self, pooled: Tensor, patches: Tensor, words: Tensor, hidden: Tensor, every_text: bool = False
    ) -> tuple[Tensor, Tensor | None, Fused]:
        """Fused embeddings [n, d], those of the images alone where they come with it, and what the fusion gives."""
        if isinstance(self.fusion, SumFusion):
            fused, image = self.fusion(pooled, patches, words, hidden, self.document_transform, every_text)
            return fused.vector, image, fused
        fused = self.fusion(pooled, patches, words, hidden, every_text)
        return self.document_transform(fused.vector), None, fused


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


SIDES = ("query", "document")
_Factors = tuple[Tensor, Tensor, Tensor]


class Oclear(Method):
    """The method: losses(batches), embed_query(batch), embed_document(batch).

    Args:
        config: the method's configuration.
        towers: OclearTowers, plain or tensor-parallel.
        head: the class-parallel head; None where no objective of the run trains it, or without training.
        data_group: ranks that bring different samples.
    """

    towers: OclearTowers

    def __init__(
        self, config: OclearConfig, towers: OclearTowers, head: ClassParallelHead | None, data_group: ProcessGroup
    ) -> None:
        self.config, self.towers, self.head, self.data_group = config, towers, head, data_group
        self.parts = _parts(config)
        if isinstance(towers.fusion, SumFusion):
            self.part_weights = towers.fusion.part_weights

    @property
    def trained_head(self) -> ClassParallelHead | None:
        """See Method."""
        return self.head if _classifies(self.config) else None

    def losses(self, batches: Sequence[Batch]) -> Iterator[tuple[Tensor, dict[str, Tensor]]]:
        """Loss (the same on every rank) of each micro-batch and metrics as local [sum, weight]: positive_cosine,
        accuracy, gate; those of pairs beside classes are pair_positive_cosine and pair_accuracy.

        They add up to the step's. Call backward on each loss before asking for the next.
        """
        factors = self._side_factors(batches)

        def loss_of(queries: Tensor, documents: Tensor) -> tuple[Tensor, dict[str, Tensor]]:
            if self.trained_head is None:
                return self._pairs(batches, queries, documents)
            loss, metrics = self._classes(batches, queries, documents, factors)
            pairs, of_pairs = self._pairs(batches, queries, documents)
            return loss + self.config.contrast_weight * pairs, metrics | {f"pair_{k}": v for k, v in of_pairs.items()}

        if _pairs_up(self.config):
            parts = cached_losses(self._encode, batches, loss_of)
        else:
            parts = (self._classify(batch, factors) for batch in batches)
        for loss, metrics, gate in parts:
            gates = torch.stack([gate.detach().to(loss.dtype).sum(), loss.new_full((), len(gate))])
            yield loss, {**metrics, "gate": gates}

    def _labels(self, batches: Sequence[Batch]) -> tuple[Tensor, Related]:
        """Labels of the pairs of all micro-batches, and what compares them: also the answers of the queries, where some
        query of the step has any.
        """
        classes = torch.cat([b.query_labels for b in batches])
        if not batches[0].answers.shape[1]:  # the same on every rank
            return classes, same_product
        ids, answers = torch.cat([b.document_ids for b in batches]), torch.cat([b.answers for b in batches])
        return torch.cat([classes[:, None], ids[:, None], answers], 1), same_product_or_answer

    def _encode(self, batch: Batch) -> tuple[tuple[Tensor, Tensor], Tensor]:
        tokens, padded = self._texts(batch)
        config = self.config
        queries, documents, gate = self.towers(
            batch.query_images,
            batch.document_images,
            tokens,
            padded,
            config.image_anchor > 0,
            config.wrong_texts and _pairs_up(config),
        )
        return (queries, documents), gate

    def _kinds(self, documents: Tensor) -> dict[str, Tensor]:
        """Documents as `OclearTowers.forward` gives them, by what they are: each [n, d]."""
        wrong = self.config.wrong_texts and _pairs_up(self.config)
        kinds = ["document", *["alone"] * (self.config.image_anchor > 0), *["wrong"] * wrong]
        return dict(zip(kinds, documents.unbind(1) if len(kinds) > 1 else [documents], strict=True))

    def _texts(self, batch: Batch) -> tuple[Tensor, bool]:
        """The documents' tokens, trimmed, and whether there is padding among them."""
        batch = batch.trimmed(*["document"] * self.config.text.trims)
        return batch.document_tokens, batch.padded("document")

    def _classify(self, batch: Batch, factors: _Factors | None) -> tuple[Tensor, dict[str, Tensor], Tensor]:
        embeddings, gate = self._encode(batch)
        return *self._classes([batch], *embeddings, factors), gate

    def _classes(
        self, batches: Sequence[Batch], queries: Tensor, documents: Tensor, factors: _Factors | None
    ) -> tuple[Tensor, dict[str, Tensor]]:
        """The head's loss of these micro-batches; queries [q, d], documents as `OclearTowers.forward`."""
        kinds = self._kinds(documents)
        kinds.pop("wrong", None)
        weights = [torch.cat([getattr(b, f"{kind}_weights") for b in batches]) for kind in ("query", *kinds)]
        query_labels, labels = (torch.cat([getattr(b, f"{s}_labels") for b in batches]) for s in SIDES)
        if factors is not None:
            weights = [weight.double() * factor for weight, factor in zip(weights, factors, strict=False)]
        assert self.head is not None, "the caller looked"
        return self.head(
            torch.cat([queries, *kinds.values()]),
            torch.cat([query_labels, *[labels] * len(kinds)]),
            torch.cat(weights),
            rank_sizes(batches, "query", *["document"] * len(kinds)),
        )

    def _pairs(self, batches: Sequence[Batch], queries: Tensor, documents: Tensor) -> tuple[Tensor, dict[str, Tensor]]:
        """InfoNCE over the pairs of the whole step; arguments as `_classes`. With images alone, the mean of both
        kinds of documents, weighted; metrics are the fused ones'.
        """
        kinds, (labels, related) = self._kinds(documents), self._labels(batches)
        settings = ContrastiveConfig(temperature=self.config.temperature, margin=self.config.contrast_margin)
        sizes = rank_sizes(batches, "query")

        def loss_of(kind: str, **hard: Any) -> tuple[Tensor, dict[str, Tensor]]:
            weights = torch.cat([b.query_weights * getattr(b, f"{kind}_weights") for b in batches])
            return contrastive_loss(
                queries, kinds[kind], labels, settings, self.data_group,
                weights=weights, related=related, sizes=sizes, **hard,
            )  # fmt: skip

        loss, metrics = loss_of("document", **self._wrong_texts(batches, kinds, labels))
        if "alone" not in kinds:
            return loss, metrics
        anchor = self.config.image_anchor
        return (loss + anchor * loss_of("alone")[0]) / (1 + anchor), metrics

    def _wrong_texts(self, batches: Sequence[Batch], kinds: dict[str, Tensor], labels: Tensor) -> dict[str, Any]:
        """Hard negatives of `contrastive_loss`: each image with the text of the document before it in its micro-batch.

        It has the labels of the text's document, so that it is no negative of photos of that document's class, nor of
        those that name it: it may be right for them, as where the picture shows that product too. It does not count
        where the two texts are equal.
        """
        if "wrong" not in kinds:
            return {}
        of_texts = torch.cat([x.roll(1, 0) for x in labels.split([len(b.query_ids) for b in batches])])
        other = [(b.document_tokens != b.document_tokens.roll(1, 0)).any(1) for b in batches]
        return {
            "negatives": (kinds["wrong"][:, None], of_texts[:, None]),
            "negative_weights": torch.cat(other)[:, None],
        }

    def _side_factors(self, batches: Sequence[Batch]) -> _Factors | None:
        """Factors on the weights of photos, fused documents and images alone in the class loss, so that their sum over
        the step stays what the head divides by; None where every sample counts alike. Collective.
        """
        anchor, share = self.config.image_anchor, self.config.document_share
        if self.trained_head is None or not (anchor or share):
            return None
        sides = []
        for seen, side in zip((*SIDES, "alone"), (*SIDES, "document"), strict=True):
            pieces = [getattr(b, f"{seen}_weights") * (getattr(b, f"{side}_labels") >= 0) for b in batches]
            sides.append(torch.cat(pieces).double().sum())
        sums = torch.stack(sides)
        dist.all_reduce(sums, group=self.data_group)
        total, present, tiny = sums[:2].sum(), (sums > 0).to(sums), torch.finfo(sums.dtype).tiny
        sums = sums.clamp_min(tiny)
        both = 1 + anchor * sums[2] / sums[1]  # a document's weight with its image alone
        photo, document = (1 - share) * present[0], share * present[1]  # without one side the other has all
        whole = (photo + document).clamp_min(tiny)
        photo, document = photo / whole / sums[0], document / whole / sums[1] / both
        if not share:
            photo = document = 1 / (sums[0] + both * sums[1])
        return total * photo, total * document, total * document * anchor

    def embed_query(self, batch: Batch) -> Tensor:
        """Unit embeddings of the batch's queries, float32 [q, d]."""
        return F.normalize(self.towers.query(batch.query_images).float(), dim=-1)

    def embed_document(self, batch: Batch, seen: str = "both") -> Tensor:
        """Unit embeddings of the batch's documents, float32 [d, dim]; `seen` both, or image."""
        images = batch.document_images
        found = (
            self.towers.image_document(images)
            if seen == "image"
            else self.towers.document(images, *self._texts(batch))[0]
        )
        return F.normalize(found.float(), dim=-1)

    def explain_document(self, batch: Batch) -> Explanation:
        """See Method. Of a concept-aware fusion the parts are those before the transformation network, and their
        weights the gate; attention is the concepts' mean.
        """
        vectors, fused = self.towers.fused_document(batch.document_images, *self._texts(batch))
        parts = torch.stack(fused.parts, 1)
        weights = torch.stack([parts.new_ones(len(parts)) * weight for weight in fused.weights], 1)
        attention = fused.attention.mean(1) if {"steered", "concepts"} & {*self.parts} else None
        return Explanation(F.normalize(vectors.float(), dim=-1), parts, weights, attention)

    @property
    def projection(self) -> Fit | None:
        """The transformation networks."""
        towers = self.towers
        networks = [*dict.fromkeys([towers.query_transform, towers.document_transform])]  # may be one

        def vectors(batch: Batch) -> Tensor:
            return towers.vision(torch.cat([batch.query_images, batch.document_images]))[1]

        def fit(*moments: Tensor) -> None:
            for network in networks:
                network.start_at_principal(*moments)

        return Fit(module=nn.ModuleList(networks), vectors=vectors, width=self.config.vision.pooled_size, fit=fit)

    def weigh_parts(self, weights: Sequence[float]) -> None:
        """See Method. Of a sum (`SumFusion`)."""
        assert isinstance(self.towers.fusion, SumFusion) and len(weights) == len(self.parts), "the caller looked"
        self.part_weights = self.towers.fusion.part_weights = (*weights,)


def _parts(config: OclearConfig) -> tuple[str, ...]:
    if config.fusion_kind == "sum":
        names = zip(("image", "steered", "text"), config.fusion_weights, strict=True)
        return tuple(name for name, weight in names if weight or name == "image")
    return ("image", "concepts") if config.fusion_kind == "concept" else ()


def _classifies(config: OclearConfig) -> bool:
    return config.objective == "classification"


def _pairs_up(config: OclearConfig) -> bool:
    return not _classifies(config) or config.contrast_weight > 0


def _reads(config: OclearConfig) -> Reads:
    return Reads(kind="pairs" if _pairs_up(config) else "photos", text_length=config.text.max_length)


def _shown_beside(config: OclearConfig) -> tuple[str, ...]:
    return ("image",) if config.fusion_kind in ("concept", "sum") else ()


METHOD = MethodSpec(
    config=OclearConfig,
    towers=OclearTowers,
    query_encoder=OclearQuery,
    assemble=Oclear,
    reads=_reads,
    classifies=_classifies,
    tasks=("photo", "category"),
    views=("both", "image"),
    shown_beside=_shown_beside,
)
