"""Contract between a method and the harness, which knows no method by name: what its file declares (`MethodSpec`), what
its configuration tells (`MethodConfig`), what the method does (`Method`).
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, fields, replace
from typing import Any, ClassVar, Generic, Protocol, TypeVar, runtime_checkable

from torch import Tensor, nn

from models.batch import Batch, Reads
from models.explanation import Explanation
from models.heads.class_parallel import ClassParallelHead
from models.shape import TransformerBuilder


class ImageInput(Protocol):
    """Configuration of what reads images."""

    @property
    def image_size(self) -> int:
        """Side of the square input in pixels; that of data.preprocess."""
        ...

    @property
    def patch_size(self) -> int:
        """Side of a patch: an input's side is a multiple of it."""
        ...


@runtime_checkable
class TextInput(Protocol):
    """Configuration of what reads texts: a frozen dataclass."""

    __dataclass_fields__: ClassVar[dict[str, Any]]

    @property
    def vocab_size(self) -> int:
        """Number of token ids; 0 in a recipe: the catalogue's tokenizer gives it."""
        ...

    @property
    def max_length(self) -> int:
        """Tokens of one text; longer ones are cut."""
        ...

    @property
    def pad_id(self) -> int:
        """The id of padding."""
        ...


class MethodConfig(Protocol):
    """Configuration of a method: a frozen dataclass whose fields are the recipe's keys under `model`.

    Fields that a warm start may change are marked `metadata=TRAINING_ONLY` (models/fields.py).
    """

    __dataclass_fields__: ClassVar[dict[str, Any]]

    @property
    def vision(self) -> ImageInput:
        """Of query photos and documents."""
        ...

    @property
    def text(self) -> TextInput:
        """Of the documents' texts; a field."""
        ...

    @property
    def query_text(self) -> TextInput | None:
        """Of the text queries, one of the fields; None where queries are photos."""
        ...

    @property
    def embedding_dim(self) -> int:
        """Width of the embeddings."""
        ...

    def errors(self, tensor_parallel: int) -> list[str]:
        """Errors for values that do not fit together; each names its key, as model.text.max_length."""
        ...


def text_inputs(config: MethodConfig) -> dict[str, TextInput]:
    """Every field that is the configuration of a text input, by its key under `model`: the documents' first."""
    found = {field.name: getattr(config, field.name) for field in fields(config)}
    return {name: value for name, value in found.items() if isinstance(value, TextInput)}


def query_kind(config: MethodConfig) -> str:
    """Kind of its queries: image or text."""
    return "image" if config.query_text is None else "text"


class CatalogueFacts(Protocol):
    """Facts of the catalogue that a method's `prepare` may ask for; each is read when it is asked for."""

    @property
    def num_keywords(self) -> int:
        """Size of the keyword table that `shelfmark queries` made."""
        ...

    @property
    def keywords_per_product(self) -> int:
        """Keywords of one product at most."""
        ...


@dataclass(frozen=True, kw_only=True)
class Fit:
    """Parameters that are set in closed form by the moments of vectors, by harness/evaluate/calibration.py.

    Args:
        module: has these parameters.
        vectors: batch -> vectors [n, width], one of each sample that takes part.
        width: of these vectors.
        fit: (their count [], their sum [width], the sum of their outer products [width, width]; float64) -> sets the
            parameters.
    """

    module: nn.Module
    vectors: Callable[[Batch], Tensor]
    width: int
    fit: Callable[[Tensor, Tensor, Tensor], None]


@dataclass(frozen=True, kw_only=True)
class Calibration(Fit):
    """Statistics in the towers that are fitted to documents, never trained: before every evaluation and checkpoint.
    Float32.

    Args:
        key: of the configuration that asks for it, for errors: aligned.
        needs: column in which a document must have a text to take part.
    """

    key: str
    needs: str


class Method(ABC):
    """A method as trainer, evaluation and export see it; a method's class derives from it.

    Attributes:
        config: its configuration.
        towers: the parameters that are trained.
        head: the class-parallel head, if an objective of the run has one.
        memory: state of training besides towers and head, the same on every rank: memory banks.
        parts: names of the parts that a document's vector is made of, as `explain_document` gives them; none where it
            cannot be taken apart.
        part_weights: constants that its unit parts are added with, in their order; none where they are no constants.
    """

    config: Any
    towers: nn.Module
    head: ClassParallelHead | None = None
    memory: nn.Module | None = None
    parts: tuple[str, ...] = ()
    part_weights: tuple[float, ...] = ()

    @property
    def trained_head(self) -> ClassParallelHead | None:
        """The head, where the present objective trains it."""
        return self.head

    def change_objective(self, **changes: Any) -> None:
        """Trains from now on with these fields of the configuration, which are TRAINING_ONLY."""
        self.config = replace(self.config, **changes)

    @abstractmethod
    def losses(self, batches: Sequence[Batch]) -> Iterator[tuple[Tensor, dict[str, Tensor]]]:
        """(loss, the same on every rank; metrics as local [sum, weight]) of each micro-batch of a step; they add up to
        the step's.

        Backward is called on each before the next is asked for.
        """

    @abstractmethod
    def embed_query(self, batch: Batch) -> Tensor:
        """Unit embeddings float32 [q, d]."""

    @abstractmethod
    def embed_document(self, batch: Batch, seen: str = "both") -> Tensor:
        """Unit embeddings float32 [n, d]; `seen` is one of the method's `views`."""

    def explain_document(self, batch: Batch) -> Explanation:
        """The vectors of `embed_document` with their parts, in the order of `parts`, and the attention over patches."""
        raise NotImplementedError

    def weigh_parts(self, weights: Sequence[float]) -> None:
        """Sets `part_weights`, not all 0: documents are embedded with them from now on."""
        raise NotImplementedError

    @property
    def calibration(self) -> Calibration | None:
        """Statistics to be fitted to documents; None: there are none."""
        return None

    @property
    def projection(self) -> Fit | None:
        """Layers from the image tower to the embeddings, which may start at the principal directions of its vectors;
        the vectors of a batch are those of its photos, then of its documents' pictures. None: there are none.
        """
        return None


C = TypeVar("C", bound=MethodConfig)


def _as_it_is(config: C, facts: CatalogueFacts) -> C:
    return config


@dataclass(frozen=True, kw_only=True)
class MethodSpec(Generic[C]):
    """Declaration of a method: the METHOD of its file, an entry of models/registry.py.

    Args:
        config: its configuration class.
        towers: builds its towers.
        query_encoder: its query encoder for serving, of plain towers: images [n, 3, S, S], or tokens int64 [n, L] where
            the configuration has a query_text, to unit embeddings float32 [n, d].
        assemble: (configuration, towers, head, data group) -> the method.
        reads: content of its batches.
        classifies: whether its objective has a class-parallel head.
        prepare: the configuration filled in from the catalogue; raises ValueError(what is wrong, what to do) where the
            two do not fit.
        catalogue_sizes: integer fields whose 0 takes the catalogue's number, by `prepare`.
        tasks: evaluation tasks (harness/evaluate/tasks), the usual one first.
        views: modalities that its documents can be reduced to.
        shown_beside: those of them whose figures every evaluation gives beside the usual task's.
    """

    config: type[C]
    towers: Callable[[C, TransformerBuilder], nn.Module]
    query_encoder: Callable[[Any], nn.Module]
    assemble: Callable[..., Method]
    reads: Callable[[C], Reads]
    classifies: Callable[[C], bool] = lambda config: False
    prepare: Callable[[C, CatalogueFacts], C] = _as_it_is
    catalogue_sizes: tuple[str, ...] = ()
    tasks: tuple[str, ...] = ()
    views: tuple[str, ...] = ("both", "title", "image")
    shown_beside: Callable[[C], tuple[str, ...]] = lambda config: ()
