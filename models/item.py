"""ITEm: product embeddings from title and image without labels, for same-product search and category prediction (Liao
et al., arXiv 2311.02084).

Known: one single-stream transformer, no regions of interest; five objectives: image-text matching (ITM), masked
language modelling (MLM), masked image modelling (MIM), and GMLM and GMIM, in which only the global representation
predicts the masked words and builds the masked patches. Ours: the form of each of these, and the choice of the hidden
modality (one_heavy in harness/data/masking.py). Ours too, and not part of ITEm: `aligned` embeddings, and `contrast`,
the baseline on the same towers.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from typing import Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.distributed import ProcessGroup

from models.alignment import Alignment
from models.batch import Batch, Reads, rank_sizes
from models.explanation import Explanation
from models.fields import TRAINING_ONLY
from models.heads.contrastive import ContrastiveConfig, contrastive_loss
from models.heads.mean import averaged, global_mean, weight_errors, weighted_sum
from models.masked_modelling import WordHead, hide_patches, patch_pixels, word_terms
from models.method import Calibration, Method, MethodSpec
from models.ranges import NonNegativeFloat, OptionalSize, Pixels, Size
from models.shape import TransformerBuilder, TransformerShape, padded_vocab, shape_errors
from models.stem import conv_stem, patch_stem
from models.transfer import places
from models.vision import VisionConfig


@dataclass(frozen=True, kw_only=True)
class ItemWeights:
    """Weight of each term of ITEm's loss; 0 leaves the term out.

    Args:
        itm: image-text matching.
        mlm: masked words, each from its own final state.
        mim: masked patches, each from its own final state.
        gmlm: masked words from the global vector and their position.
        gmim: masked patches from the global vector and their position.
        contrast: InfoNCE between the product seen as title only and as image only; not part of ITEm: the baseline on
            the same towers.
    """

    itm: NonNegativeFloat = 1.0
    mlm: NonNegativeFloat = 1.0
    mim: NonNegativeFloat = 1.0
    gmlm: NonNegativeFloat = 1.0
    gmim: NonNegativeFloat = 1.0
    contrast: NonNegativeFloat = 0.0


@dataclass(frozen=True, kw_only=True)
class PatchConfig:
    """Configuration of the patch stem.

    Args:
        image_size: side of the square input in pixels.
        patch_size: side of the square that becomes one token; with a convolutional stem, 2 ** number of stages.
        stem_channels: channels of the convolutional stem, a stage each; empty: one linear patch embedding.
        stem_blocks: residual blocks in each stage of the stem.
    """

    image_size: Pixels = 224
    patch_size: Pixels = 16
    stem_channels: tuple[Size, ...] = ()
    stem_blocks: tuple[OptionalSize, ...] = ()

    @property
    def num_patches(self) -> int:
        """Patch tokens of one image."""
        return (self.image_size // self.patch_size) ** 2


@dataclass(frozen=True, kw_only=True)
class StreamConfig(TransformerShape):
    """The single-stream transformer and its titles.

    Args:
        vocab_size: number of word pieces; 0 takes the catalogue's tokenizer.
        max_length: tokens of one title; longer ones are cut.
        pad_id: the id of padding.
        frame_ids: ids that begin a text and end its fields: a product whose text has no others has no title.
    """

    vocab_size: OptionalSize = field(default=0, metadata=TRAINING_ONLY)
    max_length: Size = 64
    pad_id: OptionalSize = 0
    frame_ids: tuple[OptionalSize, ...] = (2, 3)


@dataclass(frozen=True, kw_only=True)
class ItemConfig:
    """ITEm's transformer and objectives.

    Args:
        vision: patches of the image.
        text: the transformer over title and patches.
        weights: weights of the terms.
        aligned: embedding of a product: false, the global vector of title and image together; true, the global vectors
            of only its image and only its title, brought into one space (models/alignment.py).
        global_targets: targets of the global vector: masked (the masked words and patches, as published) or all (every
            word and patch; ours: so that the global vector of a whole product, where nothing is masked, holds its
            content).
        contrast: the loss of the baseline.
    """

    vision: PatchConfig = field(default_factory=PatchConfig)
    text: StreamConfig = field(default_factory=StreamConfig)
    aligned: bool = False
    global_targets: Literal["masked", "all"] = "masked"
    weights: ItemWeights = field(default_factory=ItemWeights, metadata=TRAINING_ONLY)
    contrast: ContrastiveConfig = field(default_factory=ContrastiveConfig, metadata=TRAINING_ONLY)
    query_text = None  # queries are photos

    @property
    def embedding_dim(self) -> int:
        """Width of the embeddings: that of the global vector."""
        return self.text.hidden_size

    @property
    def framed(self) -> tuple[int, ...] | None:
        """Ids that are no words, where an embedding depends on whether there is a word."""
        return self.text.frame_ids if self.aligned else None

    def errors(self, tensor_parallel: int) -> list[str]:
        """Errors for values that do not fit together; each names its key."""
        errors = VisionConfig(**vars(self.vision)).errors("model.vision")
        errors += shape_errors(self.text, tensor_parallel, "model.text")
        return errors + weight_errors(self.weights)


class ItemTowers(nn.Module):
    """Title and image to final states, and the heads of all objectives. One sequence: a global token, the title's
    tokens, the patches.
    """

    EMBEDDINGS = ("words", "stem", "first", "word_position", "patch_position", "modality", "norm")

    def __init__(self, config: ItemConfig, build: TransformerBuilder) -> None:
        super().__init__()
        self.config = config
        text, vision, h = config.text, config.vision, config.text.hidden_size
        self.words = build.embedding(padded_vocab(text.vocab_size), h)
        self.stem = (
            conv_stem(vision.stem_channels, vision.stem_blocks, h)
            if vision.stem_channels
            else patch_stem(vision.patch_size, h)
        )
        self.first = nn.Parameter(torch.randn(1, h) * 0.02)
        self.word_position = nn.Parameter(torch.randn(text.max_length, h) * 0.02)
        self.patch_position = nn.Parameter(torch.randn(vision.num_patches, h) * 0.02)
        self.modality = nn.Parameter(torch.randn(2, h) * 0.02)
        self.norm = nn.LayerNorm(h, eps=text.layernorm_eps)
        self.dropout = nn.Dropout(text.dropout)
        self.block = build.block(text)
        pixels = 3 * vision.patch_size**2
        self.itm = nn.Linear(h, 1)
        self.mlm = WordHead(h, text.vocab_size)
        self.mim = nn.Sequential(nn.Linear(h, h), nn.GELU(), nn.LayerNorm(h), nn.Linear(h, pixels))
        self.gmlm = GlobalHead(h, text.max_length, text.vocab_size)
        self.gmim = GlobalHead(h, vision.num_patches, pixels)
        self.alignment = Alignment(h) if config.aligned else None

    def forward(
        self,
        images: Tensor,
        tokens: Tensor,
        seen: str = "both",
        untitled: Tensor | None = None,
        padded: bool = True,
    ) -> Tensor:
        """images [b, 3, S, S], tokens [b, L] -> final states [b, 1 + L + P, h], the global vector first.

        Without L or P where `seen` is image or title. Padding and the titles of `untitled`, bool [b], are hidden from
        attention, and meaningless in the states. padded: whether there may be any of that; without, attention needs no
        mask and has faster kernels.
        """
        parts = [self.first.expand(images.shape[0], 1, -1)]
        hidden = [torch.zeros(images.shape[0], 1, dtype=torch.bool, device=tokens.device)]
        padded = padded and seen != "image"
        if seen != "image":
            parts.append(self.words(tokens) + self.word_position[: tokens.shape[1]] + self.modality[0])
            no_words = tokens == self.config.text.pad_id
            hidden.append(no_words if untitled is None else no_words | untitled[:, None])
        if seen != "title":
            patches = self.stem(images).flatten(2).transpose(1, 2)
            parts.append(patches + self.patch_position + self.modality[1])
            hidden.append(torch.zeros(patches.shape[:2], dtype=torch.bool, device=tokens.device))
        x = self.dropout(self.norm(torch.cat(parts, 1))).transpose(0, 1).contiguous()
        return self.block(x, torch.cat(hidden, 1)[:, None, None, :] if padded else None).transpose(0, 1)

    def embed(self, images: Tensor, tokens: Tensor, seen: str = "both", padded: bool = True) -> Tensor:
        """The global vector [b, h], not normalised."""
        return self(images, tokens, seen, padded=padded)[:, 0]

    def embedding(self, images: Tensor, tokens: Tensor, seen: str = "both", padded: bool = True) -> Tensor:
        """Vectors that a search compares: unit vectors float32 [b, h]."""
        if self.alignment is None:
            return self.view(images, tokens, seen, padded)
        return F.normalize(self.aligned_parts(images, tokens, seen, padded).sum(1).float(), dim=-1)

    def aligned_parts(self, images: Tensor, tokens: Tensor, seen: str = "both", padded: bool = True) -> Tensor:
        """Part of each view in the embedding before it is normalised: [b, views, h]. With `alignment` only."""
        assert self.alignment is not None, "the caller looked"
        image, title = (
            self.view(images, tokens, name, padded) if seen in (name, "both") else None for name in ("image", "title")
        )
        words = tokens != self.config.text.pad_id
        for token in self.config.text.frame_ids:
            words &= tokens != token
        return self.alignment.parts(image, title, words.any(1))

    def view(self, images: Tensor, tokens: Tensor, seen: str, padded: bool = True) -> Tensor:
        """The global vector as a unit vector, float32 [b, h]."""
        return F.normalize(self.embed(images, tokens, seen, padded).float(), dim=-1)


class GlobalHead(nn.Module):
    """Predicts the content of a position from only the global vector and that position; its two layers are ours."""

    def __init__(self, hidden_size: int, positions: int, outputs: int) -> None:
        super().__init__()
        self.position = nn.Parameter(torch.randn(positions, 2 * hidden_size) * 0.02)
        self.widen = nn.Linear(hidden_size, 2 * hidden_size)
        self.body = nn.Sequential(
            nn.GELU(), nn.Linear(2 * hidden_size, hidden_size), nn.GELU(), nn.LayerNorm(hidden_size)
        )
        self.out = nn.Linear(hidden_size, outputs)

    def forward(self, vectors: Tensor, positions: Tensor) -> Tensor:
        """vectors [m, h], positions int64 [m] -> [m, outputs]."""
        return self.out(self.body(self.widen(vectors) + self.position[positions]))


class ItemQuery(nn.Module):
    """Query encoder for serving: the photo of a product, without its title, to a unit embedding.

    Args:
        towers: plain towers with the trained weights; shared, not copied.
    """

    def __init__(self, towers: ItemTowers) -> None:
        super().__init__()
        self.towers = towers

    def forward(self, images: Tensor) -> Tensor:
        """images [n, 3, S, S] -> unit embeddings float32 [n, h]."""
        # .shape, not len(): torch.export would take that for a constant
        tokens = torch.full((images.shape[0], 1), self.towers.config.text.pad_id, device=images.device)
        return self.towers.embedding(images, tokens, "image")


class Item(Method):
    """The method. It is trained only on documents; queries are products too.

    Args:
        config: the method's configuration.
        towers: ItemTowers, plain or tensor-parallel.
        head: None; ITEm has no class-parallel head.
        data_group: ranks that bring different samples.
    """

    towers: ItemTowers

    def __init__(self, config: ItemConfig, towers: ItemTowers, head: None, data_group: ProcessGroup) -> None:
        self.config, self.towers, self.data_group = config, towers, data_group
        self.parts = ("image", "title") if config.aligned else ()

    def losses(self, batches: Sequence[Batch]) -> Iterator[tuple[Tensor, dict[str, Tensor]]]:
        """`loss` of each micro-batch, an equal part of the step's: each has means of its own."""
        return averaged(self.loss, batches)

    def loss(self, batch: Batch) -> tuple[Tensor, dict[str, Tensor]]:
        """Loss of one micro-batch (the same on every rank), and metrics as local [sum, weight]: each term, and
        itm_accuracy.
        """
        batch = batch.trimmed("document")
        use, images = self.config.weights, batch.document_images
        terms: dict[str, Tensor] = {}
        metrics: dict[str, Tensor] = {}
        if use.mlm or use.mim or use.gmlm or use.gmim:
            visible = hide_patches(images, batch.masked_patches, self.config.vision.patch_size)
            padded = batch.padded("masked")
            states = self.towers(visible, batch.masked_tokens, untitled=batch.masked_titles, padded=padded)
            terms |= self.masked_terms(states, batch)
        if use.itm:
            terms["itm"], metrics["itm_accuracy"] = self._itm(batch)
        if use.contrast:
            padded = batch.padded("document")
            title, image = (
                self.towers.embed(images, batch.document_tokens, seen, padded) for seen in ("title", "image")
            )
            terms["contrast"], more = contrastive_loss(
                title,
                image,
                batch.document_labels,
                self.config.contrast,
                self.data_group,
                weights=batch.document_weights,
                sizes=rank_sizes([batch], "document"),
            )
            metrics |= more
        total, more = weighted_sum(use, terms)
        return total, metrics | more

    def masked_terms(self, states: Tensor, batch: Batch) -> dict[str, Tensor]:
        """MLM, MIM, GMLM and GMIM, those of them that have a weight, of the final states [n, 1 + L + P, h] of the
        masked batch.

        Means over masked words: cross entropy; over masked patches: squared error of the normalised pixels (He et al.
        2022).
        """
        use, heads, group, host, device = self.config.weights, self.towers, self.data_group, batch.host, states.device
        length = batch.masked_words.shape[1]
        whole, words, patches = states[:, 0], states[:, 1 : 1 + length], states[:, 1 + length :]
        everything = self.config.global_targets == "all"
        terms = {}
        if use.mlm:
            untold = host.masked_titles[:, None]  # a title that is not seen has no states
            rows, columns = places(host.masked_words & ~untold, device)
            losses = word_terms(heads.mlm(words[rows, columns]), batch.document_tokens[rows, columns])
            terms["mlm"] = global_mean(losses, batch.document_weights[rows], group)
        if use.gmlm:
            told = host.document_tokens != self.config.text.pad_id if everything else host.masked_words
            rows, columns = places(told, device)
            losses = word_terms(heads.gmlm(whole[rows], columns), batch.document_tokens[rows, columns])
            terms["gmlm"] = global_mean(losses, batch.document_weights[rows], group)
        if use.mim or use.gmim:
            pixels = patch_pixels(batch.document_images, self.config.vision.patch_size)
        if use.mim:
            rows, columns = places(host.masked_patches, device)
            losses = (heads.mim(patches[rows, columns]).to(pixels.dtype) - pixels[rows, columns]).square().mean(1)
            terms["mim"] = global_mean(losses, batch.document_weights[rows], group)
        if use.gmim:
            told = torch.ones_like(host.masked_patches) if everything else host.masked_patches
            rows, columns = places(told, device)
            losses = (heads.gmim(whole[rows], columns).to(pixels.dtype) - pixels[rows, columns]).square().mean(1)
            terms["gmim"] = global_mean(losses, batch.document_weights[rows], group)
        return terms

    def _itm(self, batch: Batch) -> tuple[Tensor, Tensor]:
        """Binary cross entropy of whether the image's title is its own, from the global vector, nothing masked. Equal
        titles match.
        """
        matches = (batch.other_tokens == batch.document_tokens).all(1)
        logits = self.towers.itm(
            self.towers.embed(batch.document_images, batch.other_tokens, padded=batch.padded("other"))
        )[:, 0]
        logits = logits.to(torch.promote_types(logits.dtype, torch.float32))
        losses = F.binary_cross_entropy_with_logits(logits, matches.to(logits), reduction="none")
        weights = batch.document_weights.to(logits)
        right = ((logits.detach() > 0) == matches).to(logits)
        loss = global_mean(losses, weights, self.data_group)
        return loss, torch.stack([right @ weights, weights.sum()])

    def embed_query(self, batch: Batch) -> Tensor:
        """Unit embeddings of the batch's query photos, float32 [q, h]."""
        return ItemQuery(self.towers)(batch.query_images)

    def embed_document(self, batch: Batch, seen: str = "both") -> Tensor:
        """Unit embeddings of the batch's documents, float32 [n, h]; `seen` both, title or image: a modality drop."""
        batch = batch.trimmed("document")
        padded = batch.padded("document")
        return self.towers.embedding(batch.document_images, batch.document_tokens, seen, padded)

    def explain_document(self, batch: Batch) -> Explanation:
        """See Method: image and title, with model.aligned; the global vector of both together has no parts."""
        batch = batch.trimmed("document")
        parts = self.towers.aligned_parts(batch.document_images, batch.document_tokens, padded=batch.padded("document"))
        return Explanation(F.normalize(parts.sum(1).float(), dim=-1), parts, torch.ones_like(parts[:, :, 0]))

    @property
    def calibration(self) -> Calibration | None:
        """The alignment of image and title; None without model.aligned."""
        alignment = self.towers.alignment
        if alignment is None:
            return None
        return Calibration(
            key="aligned",
            needs="title",
            module=alignment,
            vectors=self.both_views,
            width=2 * self.config.embedding_dim,
            fit=alignment.fit,
        )

    def both_views(self, batch: Batch) -> Tensor:
        """Views of each document, only its image and only its title: [n, 2 h] float32."""
        batch = batch.trimmed("document")
        padded = batch.padded("document")
        views = (
            self.towers.view(batch.document_images, batch.document_tokens, seen, padded) for seen in ("image", "title")
        )
        return torch.cat(list(views), 1)


def _reads(config: ItemConfig) -> Reads:
    return Reads(kind="documents", text_length=config.text.max_length, num_patches=config.vision.num_patches)


METHOD = MethodSpec(
    config=ItemConfig,
    towers=ItemTowers,
    query_encoder=ItemQuery,
    assemble=Item,
    reads=_reads,
    tasks=("same_product", "category", "photo"),
)
