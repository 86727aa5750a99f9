"""From an HTTP request to a query. Nothing that a request names is opened or fetched."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence

from fastapi import HTTPException, Request
from pydantic import BaseModel, Field
from starlette.datastructures import UploadFile
from starlette.formparsers import MultiPartException, MultiPartParser

from harness.core.files import printable
from harness.serve.limits import Limits, body_parts
from harness.serve.opened import Where

MOST_K = 100
MOST_TEXT = 1000  # characters of a query
MOST_JSON = 64 << 10  # bytes
_WAYS = "Send an image as the body (Content-Type: image/jpeg), or as the file 'image' of multipart/form-data"

# Bodies of /search and /embed, for OpenAPI.
BODY = {
    "requestBody": {
        "required": True,
        "content": {
            "image/*": {"schema": {"type": "string", "format": "binary"}},
            "multipart/form-data": {
                "schema": {
                    "type": "object",
                    "required": ["image"],
                    "properties": {"image": {"type": "string", "format": "binary"}},
                }
            },
            "application/json": {
                "schema": {
                    "type": "object",
                    "required": ["text"],
                    "properties": {"text": {"type": "string", "maxLength": MOST_TEXT}},
                }
            },
        },
    }
}


class PartOfPhoto(BaseModel, extra="forbid"):
    """Query string of /embed."""

    box: str = Field(
        "",
        max_length=80,
        description="Part of the photo: x,y,width,height in pixels of the upright photo. All of it without.",
        examples=["40,10,200,300"],
    )


class SearchParameters(PartOfPhoto):
    """Query string of /search."""

    k: int = Field(10, ge=1, le=MOST_K, description="Documents to find.")
    filter: list[str] = Field(
        [],
        max_length=256,
        description="ATTRIBUTE=VALUE, any number of times. Of several values of one attribute any will do.",
        examples=[["colour=red"]],
    )


class ExplainParameters(PartOfPhoto):
    """Query string of /explain."""

    row: int = Field(ge=0, description="Row of the document, as /search gives it.")
    artefact: str = Field("", max_length=64, description="The artefact that gave the row; refused if it was replaced.")


def boxed(text: str) -> tuple[int, ...]:
    """x,y,width,height; empty without a box.

    Raises:
        HTTPException: 422, not four whole numbers.
    """
    if not text:
        return ()
    numbers = text.split(",")
    if len(numbers) != 4 or not all(number.isdecimal() and len(number) <= 9 for number in numbers):
        raise HTTPException(422, f"box is {printable(text, 80)!r}: give four whole numbers, x,y,width,height")
    return tuple(map(int, numbers))


def filtered(filters: Sequence[str], columns: Sequence[str]) -> Where:
    """Values allowed, by attribute.

    Raises:
        HTTPException: 422, not ATTRIBUTE=VALUE, or none of the artefact's attributes.
    """
    where: dict[str, set[str]] = {}
    for given in filters:
        name, equals, value = given.partition("=")
        if not equals:
            raise HTTPException(422, f"filter is {printable(given, 80)!r}: write ATTRIBUTE=VALUE, as in colour=red")
        if name not in columns:
            there = ", ".join(printable(column, 40) for column in columns) or "none"
            raise HTTPException(422, f"unknown filter {printable(name, 80)!r}. The attributes are: {there}")
        where.setdefault(name, set()).add(value)
    return tuple(sorted((name, tuple(sorted(values))) for name, values in where.items()))


async def photo_bytes(request: Request, limits: Limits) -> bytes:
    """The image file in a request's body.

    Raises:
        HTTPException: 413 too large, 415 another kind of body, 422 no image in it, 400 damaged multipart.
    """
    kind = request.headers.get("content-type", "").partition(";")[0].strip().lower()
    if kind.startswith("image/"):
        data = b"".join([part async for part in body_parts(request, limits.max_bytes)])
    elif kind == "multipart/form-data":
        data = await _uploaded(request, limits)
    else:
        raise HTTPException(415, f"Content-Type is {printable(kind, 80)!r}. {_WAYS}")
    if not data:
        raise HTTPException(422, f"the image has 0 bytes. {_WAYS}")
    return data


async def _uploaded(request: Request, limits: Limits) -> bytes:
    parser = MultiPartParser(
        request.headers,
        body_parts(request, limits.max_bytes),
        max_files=1,
        max_fields=1,
        max_part_size=1024,
    )
    parser.spool_max_size = limits.max_bytes + 1  # in memory, never in a temporary file
    try:
        form = await parser.parse()
    except MultiPartException as error:
        raise HTTPException(400, f"multipart/form-data: {error.message} {_WAYS}") from None
    names = [name for name, _ in form.multi_items()]
    image = form.get("image")
    if names != ["image"] or not isinstance(image, UploadFile):
        there = ", ".join(repr(printable(name, 40)) for name in names) or "nothing"
        raise HTTPException(
            422, f"multipart/form-data has {there}. It takes one file named 'image'; k, box and filter go into the URL"
        )
    return await image.read()  # from memory


async def query_text(request: Request) -> str:
    """The text of a JSON body {"text": "…"}.

    Raises:
        HTTPException: 413 too large, 415 another kind of body, 400 not JSON, 422 no text in it.
    """
    kind = request.headers.get("content-type", "").partition(";")[0].strip().lower()
    if kind != "application/json":
        raise HTTPException(415, f'Content-Type is {printable(kind, 80)!r}. Send application/json: {{"text": "…"}}')
    data = b"".join([part async for part in body_parts(request, MOST_JSON)])
    try:
        body = json.loads(data)
    except (ValueError, RecursionError):
        raise HTTPException(400, 'the body is not JSON. Send {"text": "…"}') from None
    text = body.get("text") if isinstance(body, Mapping) and len(body) == 1 else None
    if not isinstance(text, str):
        raise HTTPException(422, 'the JSON is not an object with one text: {"text": "…"}')
    if not text.strip() or len(text) > MOST_TEXT:
        raise HTTPException(422, f"text has {len(text):,} characters: write 1 to {MOST_TEXT:,}, not only spaces")
    if any("\ud800" <= letter <= "\udfff" for letter in text):
        raise HTTPException(422, "text holds half of a surrogate pair, which is not a character")
    return text
