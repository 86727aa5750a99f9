"""MAKE: a short text query finds products made of a title and an image (Zheng et al., arXiv 2301.12646, and its
follow-up 2304.04377).

Known: separate encoders for query, title and image; Modal Adaptation, a cross-modal module that gives title and image
weights of the product's own; Keyword Enhancement, also against false negatives; the objectives' names: query-item
classification (QIC) by AM-softmax, query-item matching (QIM), query-image matching, masked language modelling (MLM),
masked patch modelling (MPM) as contrastive; negatives of all devices and of a memory bank. Ours: the form of each of
these. Pre-training and fine-tuning differ only in `model.weights`; with all weights but QIC's at 0, no margin, no bank,
no hidden words and no false-negative mask it is plain in-batch InfoNCE on the same towers.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field, replace
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.distributed import ProcessGroup

from models.batch import Batch, Reads, rank_sizes
from models.comm import gather_shards, gather_with_grad, own_slice, shard_sizes
from models.cross_modal import CrossModal, Match, ModalAdaptation, Modalities
from models.explanation import Explanation
from models.fields import TRAINING_ONLY
from models.heads.contrastive import ContrastiveConfig, contrastive_loss, same_product
from models.heads.mean import averaged, global_mean, weight_errors, weighted_sum
from models.heads.memory_bank import MemoryBank
from models.masked_modelling import WordHead, hide_patches, patch_pixels, word_terms
from models.method import CatalogueFacts, Method, MethodSpec
from models.ranges import NonNegativeFloat, OptionalSize, Size
from models.shape import TransformerBuilder, TransformerShape, shape_errors
from models.text import TextConfig, TextTower
from models.transfer import places
from models.vision import VisionConfig
from models.vision_kinds import vision_tower


@dataclass(frozen=True, kw_only=True)
class MakeWeights:
    """Weight of each term of MAKE's loss; 0 leaves the term out.

    Args:
        qic: query-item classification.
        qim: query-item matching.
        query_image: query-image matching: QIC's loss with only the image vector in the product's place.
        keywords: keywords of the product from the query.
        mlm: masked words of the title.
        mpm: masked patches of the image.
    """

    qic: NonNegativeFloat = 1.0
    qim: NonNegativeFloat = 1.0
    query_image: NonNegativeFloat = 1.0
    keywords: NonNegativeFloat = 1.0
    mlm: NonNegativeFloat = 1.0
    mpm: NonNegativeFloat = 1.0


@dataclass(frozen=True, kw_only=True)
class MakeConfig:
    """MAKE's towers and objectives.

    Args:
        vision: the image tower.
        text: the title tower; its pooling gives the title's vector.
        query: the query tower; vocab_size 0 takes the title's.
        fusion: the transformer over title and patches together.
        embedding_dim: width of the embeddings.
        hide_words: in training a product's title lacks the words that masked modelling hides (data.masking), so that
            the image must supply them.
        modalities: weights of title, image and fused vector: learned (of the product's own), equal, or only title or
            image (ablations).
        num_keywords: size of the keyword table; 0 takes the catalogue's.
        product_keywords: keywords of one product, and of one query, at most.
        related_keywords: a product with so many of the keywords that a query names, or all of them, is not among its
            negatives; 0: keywords do not matter.
        related_category: leave out products of the category of the query's product, too.
        qic: the loss of query-item classification.
        memory_bank: embeddings of earlier steps that are negatives too; 0: none.
        memory_after: embeddings that go into the bank before it takes part. While weights move fast, all new embeddings
            can move away from the bank's together, which lowers the loss and teaches nothing (Wang et al., arXiv
            1912.06798, start their memory late too).
        mpm: the loss of masked patch modelling.
        mpm_patches: masked patches of an image that masked patch modelling compares with those of all other images.
        weights: weights of the terms.
    """

    vision: VisionConfig = field(default_factory=VisionConfig)
    text: TextConfig = field(default_factory=lambda: TextConfig(pooling="class"))
    query: TextConfig = field(default_factory=lambda: TextConfig(pooling="class", max_length=16))
    fusion: TransformerShape = field(default_factory=lambda: TransformerShape(num_layers=2))
    embedding_dim: Size = 256
    hide_words: bool = False
    modalities: Modalities = "learned"
    num_keywords: OptionalSize = 0
    product_keywords: OptionalSize = field(default=8, metadata=TRAINING_ONLY)
    related_keywords: OptionalSize = field(default=4, metadata=TRAINING_ONLY)
    related_category: bool = field(default=True, metadata=TRAINING_ONLY)
    qic: ContrastiveConfig = field(
        default_factory=lambda: ContrastiveConfig(margin=0.1, symmetric=False), metadata=TRAINING_ONLY
    )
    memory_bank: OptionalSize = field(default=0, metadata=TRAINING_ONLY)
    memory_after: OptionalSize = field(default=0, metadata=TRAINING_ONLY)
    mpm: ContrastiveConfig = field(default_factory=lambda: ContrastiveConfig(symmetric=False), metadata=TRAINING_ONLY)
    mpm_patches: Size = field(default=4, metadata=TRAINING_ONLY)
    weights: MakeWeights = field(default_factory=MakeWeights, metadata=TRAINING_ONLY)

    @property
    def query_text(self) -> TextConfig:
        """Queries are texts."""
        return self.query

    def errors(self, tensor_parallel: int) -> list[str]:
        """Errors for values that do not fit together; each names its key."""
        errors = self.vision.errors("model.vision") + weight_errors(self.weights)
        for name in ("vision", "text", "query", "fusion"):
            errors += shape_errors(getattr(self, name), tensor_parallel, f"model.{name}")
        for name in ("text", "query"):
            errors += getattr(self, name).errors(f"model.{name}")
            if getattr(self, name).pooling == "none":
                errors.append(f"model.{name}.pooling is 'none', but MAKE needs a vector of every text")
        if self.mpm_patches > self.vision.num_patches:
            errors.append(
                f"model.mpm_patches is {self.mpm_patches}, but an image has {self.vision.num_patches} patches"
            )
        return errors


class Products(NamedTuple):
    """n products: embedding [n, d], which is the sum of its parts [n, 3, d], and image vector [n, d], not normalised;
    weights [n, 3] of title, image and fused vector; words [n, L, t] of the title tower, patches [n, P, v] of the image
    tower.
    """

    embedding: Tensor
    parts: Tensor
    image: Tensor
    weights: Tensor
    words: Tensor
    patches: Tensor


class MakeTowers(nn.Module):
    """Queries and products to embeddings, and the heads of all objectives."""

    def __init__(self, config: MakeConfig, build: TransformerBuilder) -> None:
        super().__init__()
        self.config = config
        d, text, vision = config.embedding_dim, config.text, config.vision
        query = replace(config.query, vocab_size=config.query.vocab_size or text.vocab_size)
        self.query_text = TextTower(query, build)
        self.query_project = nn.Linear(query.projection_dim or query.hidden_size, d)
        self.text = TextTower(text, build)
        self.text_project = nn.Linear(text.projection_dim or text.hidden_size, d)
        self.vision = vision_tower(vision, build)
        self.image_project = nn.Linear(vision.pooled_size, d)
        self.fusion = CrossModal(config.fusion, text.hidden_size, vision.hidden_size, build)
        self.fused_project = nn.Linear(config.fusion.hidden_size, d)
        self.adaptation = ModalAdaptation(d)
        self.match = Match(d)
        self.keywords = nn.Linear(d, config.num_keywords) if config.num_keywords else None
        self.masked_words = WordHead(config.fusion.hidden_size, text.vocab_size)
        self.masked_patches = nn.Linear(config.fusion.hidden_size, d)
        self.patch_content = nn.Linear(3 * vision.patch_size**2, d)

    def query(self, tokens: Tensor, padded: bool = True) -> Tensor:
        """tokens [q, L] -> [q, d], not normalised; padded: see TextTower."""
        return self.query_project(self.query_text.pool(tokens, self.query_text(tokens, padded)))

    def products(self, images: Tensor, tokens: Tensor, modalities: str, padded: bool = True) -> Products:
        """images [n, 3, S, S], tokens [n, L]; `modalities` as in MakeConfig."""
        patches, pooled = self.vision(images)
        words = self.text(tokens, padded)
        title, image = self.text_project(self.text.pool(tokens, words)), self.image_project(pooled)
        fused = self.fused_project(self.fusion(words, self.padding(tokens, padded), patches)[0])
        parts, weights = self.adaptation(title, image, fused, modalities)
        return Products(parts.sum(1), parts, image, weights, words, patches)

    def padding(self, tokens: Tensor, padded: bool) -> Tensor | None:
        """Mask of the titles' words that the fusion hides: bool [n, L], or None."""
        return tokens == self.text.config.pad_id if padded else None

    def forward(
        self, query_tokens: Tensor, images: Tensor, tokens: Tensor, padded: tuple[bool, bool] = (True, True)
    ) -> tuple[Tensor, Products]:
        """Queries [q, d], not normalised, and products; padded: True if queries, and titles, may have padding."""
        queries = self.query(query_tokens, padded[0])
        return queries, self.products(images, tokens, self.config.modalities, padded[1])


class MakeQuery(nn.Module):
    """Query encoder for serving: text to unit embeddings.

    Args:
        towers: plain towers with the trained weights; shared, not copied.
    """

    def __init__(self, towers: MakeTowers) -> None:
        super().__init__()
        self.query_text, self.query_project = towers.query_text, towers.query_project

    def forward(self, tokens: Tensor) -> Tensor:
        """tokens [n, L] -> unit embeddings float32 [n, d]."""
        vectors = self.query_project(self.query_text.pool(tokens, self.query_text(tokens)))
        return F.normalize(vectors.float(), dim=-1)


class Make(Method):
    """The method. Row i of the batch's queries and documents is a pair: a query and the product that it led to.

    Args:
        config: the method's configuration.
        towers: MakeTowers, plain or tensor-parallel.
        head: None; MAKE has no class-parallel head.
        data_group: ranks that bring different samples.

    Attributes:
        banks: the memory banks, of documents and, with a symmetric loss, of queries.
        memory: the same, for the checkpoint; None without banks.
    """

    towers: MakeTowers
    parts = ("title", "image", "fused")

    def __init__(self, config: MakeConfig, towers: MakeTowers, head: None, data_group: ProcessGroup) -> None:
        self.config, self.towers, self.data_group = config, towers, data_group
        self.banks = nn.ModuleDict()
        if config.memory_bank:
            like = next(towers.parameters())
            kind, labels = torch.promote_types(like.dtype, torch.float32), (2 + 2 * config.product_keywords,)
            for name in ("documents", "queries") if config.qic.symmetric else ("documents",):
                size, d, after = config.memory_bank, config.embedding_dim, config.memory_after
                self.banks[name] = MemoryBank(size, d, labels, like.device, kind, after)
        self.memory = self.banks if config.memory_bank else None

    def losses(self, batches: Sequence[Batch]) -> Iterator[tuple[Tensor, dict[str, Tensor]]]:
        """`loss` of each micro-batch, an equal part of the step's: each has means and in-batch negatives of its own."""
        return averaged(self.loss, batches)

    def loss(self, batch: Batch) -> tuple[Tensor, dict[str, Tensor]]:
        """Loss of one micro-batch (the same on every rank), and metrics as local [sum, weight]: each term, the mean
        weights of title, image and fused vector, and of QIC positive_cosine and accuracy. In training the batch then
        joins the memory bank.
        """
        use, towers, batch = self.config.weights, self.towers, self._trimmed(batch)
        weights = batch.query_weights * batch.document_weights  # a pair counts where both its samples were readable
        known = batch.document_labels[:, None], batch.categories[:, None]
        labels = torch.cat([*known, batch.keywords, batch.query_keywords], 1)
        sizes = rank_sizes([batch], "document")
        titles = batch.masked_tokens if self.config.hide_words else batch.document_tokens
        queries, products = towers(
            batch.query_tokens, batch.document_images, titles, (batch.padded("query"), batch.padded("document"))
        )
        terms: dict[str, Tensor] = {}
        metrics: dict[str, Tensor] = {}
        if use.qic:
            terms["qic"], metrics = self._qic(queries, products.embedding, labels, weights, sizes)
        if use.qim:
            terms["qim"] = self._matching(queries, products.embedding, labels, weights, sizes)
        if use.query_image:
            terms["query_image"], _ = contrastive_loss(
                queries,
                products.image,
                labels,
                self.config.qic,
                self.data_group,
                weights=weights,
                related=self.related,
                sizes=sizes,
            )
        if use.keywords:
            terms["keywords"] = self._keywords(queries, batch.keywords, weights)
        if use.mlm:
            terms["mlm"] = self._mlm(products, batch)
        if use.mpm:
            terms["mpm"] = self._mpm(products, batch)
        total, more = weighted_sum(use, terms)
        metrics |= more
        for i, name in enumerate(self.parts):
            local = torch.stack([products.weights.detach()[:, i].to(weights) @ weights, weights.sum()])
            metrics[f"weight_{name}"] = local.to(total)
        return total, metrics

    def related(self, queries: Tensor, documents: Tensor) -> Tensor:
        """bool [a, b]: True where the document is not a negative of the query. Ours.

        Labels [a or b, 1 product + 1 category + K keywords of the product + K keywords that its query names].
        """
        size = self.config.product_keywords
        found = same_product(queries[:, 0], documents[:, 0])
        if self.config.related_category:
            found = found | same_product(queries[:, 1], documents[:, 1])
        if self.config.related_keywords:
            named, have = queries[:, 2 + size :], documents[:, 2 : 2 + size]
            shared = torch.zeros(found.shape, dtype=torch.int64, device=found.device)
            for word in named.unbind(1):
                shared += same_product(word, have.flatten()).view(*found.shape, have.shape[1]).any(-1)
            needed = (named >= 0).sum(1, keepdim=True).clamp_max(self.config.related_keywords)
            found = found | ((needed > 0) & (shared >= needed))
        return found

    def _qic(
        self, queries: Tensor, documents: Tensor, labels: Tensor, weights: Tensor, sizes: list[int] | None
    ) -> tuple[Tensor, dict[str, Tensor]]:
        banks: dict[str, MemoryBank] = dict(self.banks.items())  # type: ignore[arg-type]
        loss = contrastive_loss(
            queries,
            documents,
            labels,
            self.config.qic,
            self.data_group,
            weights=weights,
            document_bank=banks.get("documents"),
            query_bank=banks.get("queries"),
            related=self.related,
            sizes=sizes,
        )
        if self.towers.training:
            for name, bank in banks.items():
                bank.push({"documents": documents, "queries": queries}[name], labels, self.data_group, weights, sizes)
        return loss

    def _matching(
        self, queries: Tensor, documents: Tensor, labels: Tensor, weights: Tensor, sizes: list[int] | None = None
    ) -> Tensor:
        """QIM: binary cross entropy of each pair and of the query with its hardest negative.

        Ours: that is the product of highest QIC cosine over the batches of all ranks that is not related. Only vectors
        are gathered.
        """
        group = self.data_group
        sizes = sizes or shard_sizes(len(queries), group, queries.device)
        everyone = gather_with_grad(documents, group, sizes)
        hidden = self.related(labels, gather_shards(labels, group, sizes))
        hidden |= gather_shards(weights, group, sizes) == 0
        hidden[:, own_slice(sizes, group.rank())].fill_diagonal_(True)
        kind = torch.promote_types(queries.dtype, torch.float32)
        with torch.no_grad():
            cosine = F.normalize(queries.to(kind), dim=-1) @ F.normalize(everyone.to(kind), dim=-1).T
        negatives = everyone[cosine.masked_fill(hidden, float("-inf")).argmax(1)]
        logits = self.towers.match(queries.repeat(2, 1), torch.cat([documents, negatives])).to(kind)
        truth = torch.cat([torch.ones_like(weights), torch.zeros_like(weights)]).to(logits)
        losses = F.binary_cross_entropy_with_logits(logits, truth, reduction="none")
        return global_mean(losses, torch.cat([weights, weights * ~hidden.all(1)]), group)

    def _keywords(self, queries: Tensor, keywords: Tensor, weights: Tensor) -> Tensor:
        """Keyword Enhancement: softmax over the keyword table against all keywords of the product alike (Mahajan et al.
        2018), from the query vector. A product without keywords does not count.
        """
        assert self.towers.keywords is not None, "the catalogue has no keywords"
        logits = self.towers.keywords(queries)
        logs = F.log_softmax(logits.to(torch.promote_types(logits.dtype, torch.float32)), -1)
        known = keywords >= 0
        count = known.sum(1)
        terms = -(logs.gather(1, keywords.clamp_min(0)) * known).sum(1) / count.clamp_min(1)
        return global_mean(terms, weights * (count > 0), self.data_group)

    def _mlm(self, products: Products, batch: Batch) -> Tensor:
        """Masked words of the title, from the rest of it and the whole image."""
        words = (
            products.words
            if self.config.hide_words
            else self.towers.text(batch.masked_tokens, batch.padded("document"))
        )
        _, states, _ = self.towers.fusion(words, self._padding(batch), products.patches)
        rows, columns = places(batch.host.masked_words, states.device)
        terms = word_terms(self.towers.masked_words(states[rows, columns]), batch.document_tokens[rows, columns])
        return global_mean(terms, batch.document_weights[rows], self.data_group)

    def _mpm(self, products: Products, batch: Batch) -> Tensor:
        """Masked patches of the image, from the rest of it and the title, by a contrast with the patches of all images.

        Ours: the candidates are `mpm_patches` masked patches of every image of all ranks, evenly spaced among its
        masked ones, each a linear map of its normalised pixels without its position. An image with fewer masked patches
        takes no part.
        """
        k, size, group = self.config.mpm_patches, self.config.vision.patch_size, self.data_group
        patches, _ = self.towers.vision(hide_patches(batch.document_images, batch.masked_patches, size))
        _, _, states = self.towers.fusion(products.words, self._padding(batch), patches)
        count = batch.masked_patches.sum(1, keepdim=True)
        order = batch.masked_patches.int().argsort(dim=1, descending=True, stable=True)  # the masked ones first
        chosen = order.gather(1, (2 * torch.arange(k, device=count.device) + 1) * count // (2 * k))[:, :, None]
        found = states.gather(1, chosen.expand(-1, -1, states.shape[2])).flatten(0, 1)
        pixels = patch_pixels(batch.document_images, size)
        wanted = pixels.gather(1, chosen.expand(-1, -1, pixels.shape[2])).flatten(0, 1).to(found.dtype)
        weights = (batch.document_weights * (count[:, 0] >= k)).repeat_interleave(k)
        unknown = torch.full((len(found),), -1, device=found.device)  # of no product: each patch is like no other
        sizes = rank_sizes([batch], "document")
        loss, _ = contrastive_loss(
            self.towers.masked_patches(found),
            self.towers.patch_content(wanted),
            unknown,
            self.config.mpm,
            group,
            weights=weights,
            sizes=sizes and [k * n for n in sizes],
        )
        return loss

    def _padding(self, batch: Batch) -> Tensor | None:
        return self.towers.padding(batch.document_tokens, batch.padded("document"))

    def _trimmed(self, batch: Batch) -> Batch:
        sides = {"document": self.config.text, "query": self.config.query}
        return batch.trimmed(*(name for name, text in sides.items() if text.trims))

    def embed_query(self, batch: Batch) -> Tensor:
        """Unit embeddings of the batch's text queries, float32 [q, d]."""
        batch = self._trimmed(batch)
        return F.normalize(self.towers.query(batch.query_tokens, batch.padded("query")).float(), dim=-1)

    def embed_document(self, batch: Batch, seen: str = "both") -> Tensor:
        """Unit embeddings of the batch's documents, float32 [n, d]; `seen` both, title or image: a modality drop."""
        return F.normalize(self._products(batch, seen).embedding.float(), dim=-1)

    def explain_document(self, batch: Batch) -> Explanation:
        """See Method: title, image and fused vector, with the weights of Modal Adaptation."""
        found = self._products(batch, "both")
        return Explanation(F.normalize(found.embedding.float(), dim=-1), found.parts, found.weights.float())

    def _products(self, batch: Batch, seen: str) -> Products:
        modalities = self.config.modalities if seen == "both" else seen
        batch = self._trimmed(batch)
        padded = batch.padded("document")
        return self.towers.products(batch.document_images, batch.document_tokens, modalities, padded)


def _reads(config: MakeConfig) -> Reads:
    masks = config.hide_words or config.weights.mlm or config.weights.mpm
    return Reads(
        kind="texts",
        text_length=config.text.max_length,
        query_length=config.query.max_length,
        num_patches=config.vision.num_patches if masks else 0,
        keywords=config.product_keywords,
    )


def _prepare(config: MakeConfig, facts: CatalogueFacts) -> MakeConfig:
    """The configuration with the size of the catalogue's keyword table, where it gives none of its own."""
    found, size = facts.num_keywords, config.num_keywords
    if config.weights.keywords and size not in (0, found):
        raise ValueError(
            f"model.num_keywords is {size}, the catalogue has {found} keywords", "Leave the key out, or set it to 0"
        )
    if config.weights.keywords and not found:
        raise ValueError(
            "the catalogue has no keywords to train on",
            "Lower `shelfmark queries --min-count`, or set model.weights.keywords to 0",
        )
    return replace(config, num_keywords=size or found, product_keywords=facts.keywords_per_product)


METHOD = MethodSpec(
    config=MakeConfig,
    towers=MakeTowers,
    query_encoder=MakeQuery,
    assemble=Make,
    reads=_reads,
    prepare=_prepare,
    catalogue_sizes=("num_keywords",),
    tasks=("text", "same_product", "category"),
)
