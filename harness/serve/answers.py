"""Answers of the service as JSON."""

from __future__ import annotations

from pydantic import BaseModel, Field

from harness.artefact.artefact import Hit
from harness.serve.opened import Answer, Opened

LONGEST_DESCRIPTION = 600  # characters of one that an answer holds


class Found(BaseModel):
    """A document found."""

    row: int = Field(description="Row of the document in the artefact.")
    id: str
    title: str
    description: str
    attributes: dict[str, str]
    score: float = Field(description="Cosine similarity to the query.")
    parts: dict[str, float] = Field(description="Share of each part in the document's embedding; they add up to 1.")
    thumbnail: str = Field(description="Relative URL of a small picture.")


class Documents(BaseModel):
    """Answer of /search."""

    artefact: str = Field(description="First 12 digits of the SHA-256 of the artefact's manifest.")
    found: list[Found] = Field(description="The best first.")


class Embedding(BaseModel):
    """Answer of /embed."""

    artefact: str = Field(description="First 12 digits of the SHA-256 of the artefact's manifest.")
    embedding: list[float] = Field(description="Unit vector.")


class Explanation(BaseModel):
    """Answer of /explain."""

    artefact: str = Field(description="First 12 digits of the SHA-256 of the artefact's manifest.")
    columns: int = Field(description="The photo, or its part, in as many columns as rows of equal cells.")
    similarity: list[float] = Field(description="Of each cell, row by row: mean cosine of the windows that cover it.")


class About(BaseModel):
    """Answer of /artefact."""

    artefact: str = Field(description="First 12 digits of the SHA-256 of the artefact's manifest.")
    takes: str = Field(description="image or text: the queries that it answers.")
    method: str
    run: str
    checkpoint: str
    documents: int
    embedding_dim: int
    filters: dict[str, list[str]] = Field(description="Attributes and their most frequent values.")
    max_bytes: int = Field(description="Most bytes of a photo.")


def documents(answer: Answer) -> Documents:
    """Documents found, by the artefact that found it."""
    return Documents(artefact=answer.opened.id, found=[_found(answer.opened, hit) for hit in answer.hits])


def _found(opened: Opened, hit: Hit) -> Found:
    table = opened.artefact.documents
    values = {name: table.column(name)[hit.row].as_py() for name in (*opened.columns, "description")}
    description = values.pop("description")
    if len(description) > LONGEST_DESCRIPTION:
        description = f"{description[: LONGEST_DESCRIPTION - 1]}…"
    return Found(
        row=hit.row,
        id=hit.id,
        title=hit.title,
        description=description,
        attributes={name: str(value) for name, value in values.items() if value},
        score=round(hit.score, 6),
        parts=hit.parts,
        thumbnail=f"documents/{hit.row}/thumbnail?artefact={opened.id}",
    )


def about(opened: Opened, max_bytes: int) -> About:
    """The artefact in use."""
    meta = opened.artefact.meta
    return About(
        artefact=opened.id,
        takes=opened.takes,
        documents=len(opened.artefact.documents),
        filters=opened.filters,
        max_bytes=max_bytes,
        **{name: meta[name] for name in ("method", "run", "checkpoint", "embedding_dim")},
    )
