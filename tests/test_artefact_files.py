"""Artefacts from strangers, their manifests genuine: nothing of them is run, no memory taken for what they claim, what
is odd told in a line.
"""

from __future__ import annotations

import io
import json
import os
import pickle
import shutil
import struct
import tracemalloc
import zipfile
import zlib
from collections.abc import Callable
from contextlib import suppress
from dataclasses import asdict
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch
import xxhash
from PIL import Image
from safetensors.torch import load_file, save_file

from harness.artefact.artefact import Artefact
from harness.artefact.flat_index import index_head, write_index
from harness.artefact.query_encoder import write_query_encoder
from harness.commands import search
from harness.core.errors import UserError
from harness.core.manifest import write_manifest
from harness.data.preprocess import PreprocessSpec
from harness.text.tokenizer import copy_tokenizer
from models.make import MakeConfig
from models.method import query_kind
from models.oclear import OclearConfig
from models.plain.transformer import PlainBuilder
from models.registry import METHODS
from models.shape import TransformerShape
from models.text import TextConfig
from models.vision import VisionConfig

TINY: dict[str, Any] = {"num_layers": 1, "hidden_size": 16, "num_attention_heads": 2}
IMAGE = VisionConfig(**TINY, image_size=16, patch_size=8)
ROWS = 5
WIDTH = 8
ODD = [
    None,
    True,
    -1,
    0,
    2**31,
    2**62,
    1e300,
    float("nan"),
    "x",
    "\x1b[2J",
    [],
    [[]],
    [2**62],
    {},
    {"class_path": "os.system"},
]


def jpeg(side: int = 20) -> bytes:
    buffer = io.BytesIO()
    Image.new("RGB", (side, side), (200, 40, 40)).save(buffer, "JPEG")
    return buffer.getvalue()


def bomb() -> bytes:
    """A PNG that says it has 30,000 x 30,000 pixels."""

    def chunk(kind: bytes, data: bytes) -> bytes:
        return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))

    head = chunk(b"IHDR", struct.pack(">IIBBBBB", 30_000, 30_000, 8, 2, 0, 0, 0))
    return b"\x89PNG\r\n\x1a\n" + head + chunk(b"IDAT", zlib.compress(bytes(1 << 20))) + chunk(b"IEND", b"")


def documents(**columns: Any) -> pa.Table:
    """The id map of ROWS documents, with some columns changed or, with None, left out."""
    vectors = np.random.default_rng(0).normal(size=(ROWS, WIDTH)).astype(np.float32)
    vectors /= np.linalg.norm(vectors, axis=1, keepdims=True) * 1.0001
    texts = {
        name: pa.array([f"{name} {i}" for i in range(ROWS)]) for name in ("class_key", "item", "title", "description")
    }
    flat = pa.FixedSizeListArray.from_arrays(pa.array(vectors.reshape(-1)), WIDTH)
    made = {"sample_id": pa.array(range(ROWS)), **texts, "thumbnail": pa.array([jpeg()] * ROWS), "embedding": flat}
    return pa.table({name: column for name, column in (made | columns).items() if column is not None})


def seal(folder: Path) -> Path:
    (folder / "manifest.json").unlink(missing_ok=True)
    write_manifest(folder, algorithm="sha256")
    return folder


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory, catalogue: Path) -> dict[str, Path]:
    """An artefact of photos and one of texts, with random weights."""
    models = {
        "oclear": OclearConfig(vision=IMAGE, text=TextConfig(**TINY, vocab_size=48), embedding_dim=WIDTH),
        "make": MakeConfig(
            vision=IMAGE,
            text=TextConfig(**TINY, vocab_size=48, pooling="class"),
            query=TextConfig(**TINY, pooling="class", max_length=8),
            fusion=TransformerShape(**TINY),
            embedding_dim=WIDTH,
        ),
    }
    folders = {}
    for method, model in models.items():
        folder = folders[method] = tmp_path_factory.mktemp(method) / "artefact"
        (folder / "documents").mkdir(parents=True)
        spec = METHODS[method]
        torch.manual_seed(0)
        write_query_encoder(spec.query_encoder(spec.towers(model, PlainBuilder())), folder)
        (folder / "encoder.pt2").write_bytes(b"a program")
        pq.write_table(documents(), folder / "documents" / "part-00000.parquet")
        write_index(folder, WIDTH)
        copy_tokenizer(catalogue, folder)
        (folder / "preprocess.json").write_text(json.dumps(PreprocessSpec(image_size=16).to_dict()))
        meta = {
            "format": 4,
            "index": {"kind": "flat", "parameters": {}},
            "method": method,
            "model": asdict(model),
            "query": query_kind(model),
            "embedding_dim": WIDTH,
        }
        meta |= {"documents": ROWS, "backend": "reference", "run": "a run"}
        (folder / "artefact.json").write_text(json.dumps(meta))
        assert len(Artefact(seal(folder)).documents) == ROWS
    return folders


@pytest.fixture
def photos(made: dict[str, Path], tmp_path: Path) -> Path:
    """A copy of the artefact of photos."""
    return shutil.copytree(made["oclear"], tmp_path / "photos")


def refused(folder: Path, what: str = "") -> str:
    """The one line that refuses an artefact; `what` is a pattern in it."""
    with pytest.raises(UserError, match=what) as error:
        Artefact(seal(folder))
    text = str(error.value)
    assert text.isprintable() and len(text) < 1000, text
    return text


class Evil:
    """Runs a command where it is unpickled."""

    def __init__(self, command: str) -> None:
        self.command = command

    def __reduce__(self) -> Any:
        return os.system, (self.command,)


def test_opening_runs_nothing_of_its_author(photos: Path, tmp_path: Path) -> None:
    """The program's table says that a weight is a pickle; whoever loads it with torch runs a command of its author."""
    mark = tmp_path / "PWNED"
    program = torch.export.export(torch.nn.Linear(2, 2), (torch.zeros(1, 2),))
    torch.export.save(program, tmp_path / "genuine.pt2")
    with zipfile.ZipFile(tmp_path / "genuine.pt2") as genuine, zipfile.ZipFile(photos / "encoder.pt2", "w") as evil:
        for name in genuine.namelist():
            content = genuine.read(name)
            if name.endswith("model_weights_config.json"):
                content = content.replace(b'"use_pickle": false', b'"use_pickle": true')
            if name.endswith("weight_0"):
                content = pickle.dumps(Evil(f"touch {mark}"), protocol=2)
            evil.writestr(name, content)
    Image.new("RGB", (20, 20)).save(tmp_path / "photo.png")
    found = search.run(search.SearchConfig(artefact=seal(photos), photos=(tmp_path / "photo.png",), top=2))
    assert len(found["queries"][0]["found"]) == 2 and not mark.exists()
    with suppress(Exception):
        torch.export.load(photos / "encoder.pt2")
    assert mark.exists(), "the test would see it"


def places(values: Any, at: tuple[Any, ...] = ()) -> list[tuple[Any, ...]]:
    """The paths of all values in nested objects."""
    if not isinstance(values, dict):
        return [at]
    return [*([at] if at else []), *(path for key, value in values.items() for path in places(value, (*at, key)))]


def changed(values: Any, at: tuple[Any, ...], value: Any) -> Any:
    if not at:
        return value
    return {**values, at[0]: changed(values[at[0]], at[1:], value)}


@pytest.mark.parametrize("name", ["artefact.json", "preprocess.json"])
@pytest.mark.parametrize("method", ["oclear", "make"])
def test_odd_values_are_one_line(made: dict[str, Path], tmp_path: Path, method: str, name: str) -> None:
    """Every value of every file, replaced by every odd one: refused by the file's name, or of no consequence."""
    copy = shutil.copytree(made[method], tmp_path / "copy")
    values = json.loads((copy / name).read_text())
    told = 0
    seen = ("vision", "text", "fusion") if method == "make" else ()  # in the other, or like what is there
    for number, at in enumerate(at for at in places(values) if at[1:2] == () or at[1] not in seen):
        for value in ODD[number % 8 :: 8] if at[0] == "model" else ODD[number % 4 :: 4]:
            (copy / name).write_text(json.dumps(changed(values, at, value)))
            try:
                Artefact(seal(copy))
            except UserError as error:
                known = name, "encoder.safetensors", "preprocess.json", "index.faiss", "format"
                assert any(word in str(error) for word in known), (at, value)
                assert str(error).isprintable() and len(str(error)) < 1000
                told += 1
    assert told > 20


@pytest.mark.parametrize(
    ("at", "value", "what"),
    [
        (("model", "vision", "num_layers"), 10**9, "num_layers is 1000000000. It must be an int from 1 to 1,000"),
        (("model", "vision", "stem_blocks"), [10**9], "stem_blocks"),
        (("model", "vision", "hidden_size"), 10**7, "encoder.safetensors does not fit|describes no model"),
        (("model", "vision", "layernorm_eps"), float("nan"), "layernorm_eps is nan. It must be a float, at least 0"),
        (("model", "embedding_dim"), 9, "embedding_dim is not the model's 9"),
        (("model", "vision", "pooling"), "os", "pooling is 'os'; it can be"),
        (("model", "vision", "more"), 1, "has 'more', which this version does not know"),
        (("documents",), 10**12, "not a flat index of 1,000,000,000,000 vectors"),
        (("backend",), "exec", "backend is not one of"),
        (("method",), "os", "method is 'os'"),
    ],
)
def test_claims_are_compared_before_memory_is_taken(photos: Path, at: tuple[str, ...], value: Any, what: str) -> None:
    values = json.loads((photos / "artefact.json").read_text())
    if at[-1] not in ("more",):
        values = changed(values, at, value)
    else:
        values["model"]["vision"]["more"] = value
    (photos / "artefact.json").write_text(json.dumps(values))
    tracemalloc.start()
    refused(photos, what)
    assert tracemalloc.get_traced_memory()[1] < 1 << 27
    tracemalloc.stop()


GARBAGE = [b"", b"[" * 100_000, b"\xff" * 5000, b"[]"]


@pytest.mark.parametrize("method", ["oclear", "make"])
def test_garbage_is_told_by_its_file(made: dict[str, Path], tmp_path: Path, method: str) -> None:
    copy = shutil.copytree(made[method], tmp_path / "copy")
    for file in sorted(file for file in copy.rglob("*") if file.is_file() and file.name != "manifest.json"):
        # A photo needs no tokenizer, and the program is nobody's.
        used = file.name != "encoder.pt2" and (method == "make" or file.parent.name != "tokenizer")
        content = file.read_bytes()
        for garbage in [*GARBAGE, content[: len(content) // 2], content + b"x" * 99]:
            file.write_bytes(garbage)
            with (
                suppress(UserError)
                if not used or garbage[-9:] == b"x" * 9
                else pytest.raises(UserError, match=file.name)
            ):
                Artefact(seal(copy))
        file.write_bytes(content)


def index_of(count: int, width: int) -> bytes:
    return (
        index_head(WIDTH, 1)[:4]
        + struct.pack("<iq", width, count)
        + index_head(WIDTH, 1)[16:-8]
        + struct.pack("<q", count * width % 2**62)
    )


@pytest.mark.parametrize(
    "content", [index_of(2**60, WIDTH), index_of(ROWS, 2**30), b"IxF2" + bytes(200), b"ivfl" + b"\x7f" * 400]
)
def test_an_index_that_claims_more_than_it_holds_is_not_read(photos: Path, content: bytes) -> None:
    (photos / "index.faiss").write_bytes(content)
    refused(photos, r"index.faiss is not a flat index of 5 vectors of 8 numbers")


def test_vectors_that_are_no_numbers_are_told(photos: Path, tmp_path: Path) -> None:
    (photos / "index.faiss").write_bytes(index_head(WIDTH, ROWS) + b"\xff" * 4 * ROWS * WIDTH)
    opened = Artefact(seal(photos))
    with pytest.raises(UserError, match="gives vectors that are not numbers"):
        opened.search(torch.ones(1, WIDTH), 2)


def cells(value: Any, kind: Any = None) -> pa.Array:
    return pa.array([value] * ROWS, kind)


@pytest.mark.parametrize(
    ("columns", "what"),
    [
        ({"title": None}, "has no column title of type string"),
        ({"title": cells(3)}, "has no column title of type string"),
        ({"item": cells(None, pa.string())}, "has rows without"),
        ({"thumbnail": cells("text")}, "has no column thumbnail of type binary"),
        ({"sample_id": cells(b"\0")}, "has no column sample_id of type int64"),
        (
            {"title": pa.Array.from_buffers(pa.string(), ROWS, cells(b"\xff\xfe").buffers())},
            "part-00000.parquet cannot be read .*UTF",
        ),
        ({"title": cells("a" * (1 << 20))}, "holds far more than its size"),
    ],
    ids=["missing", "numbers", "nulls", "no bytes", "no ids", "no text", "much"],
)  # fmt: skip
def test_odd_tables_are_one_line(photos: Path, columns: dict[str, Any], what: str) -> None:
    pq.write_table(documents(**columns), photos / "documents" / "part-00000.parquet")
    refused(photos, what)


def test_other_tables_than_ours_are_one_line(photos: Path) -> None:
    file = photos / "documents" / "part-00000.parquet"
    pq.write_table(documents(), file, compression="zstd")
    refused(photos, "was not written by `shelfmark export`")
    pq.write_table(documents(), file)
    pq.write_table(documents(), file.with_name("part-00001.parquet"))
    refused(photos, "has 10 rows, not 5")
    pq.write_table(documents(more=cells("x")).slice(0, 0), file.with_name("part-00001.parquet"))
    refused(photos, "part-00001.parquet has other columns than part-00000.parquet")
    shutil.rmtree(file.parent)
    refused(photos, "has 0 rows, not 5")


@pytest.mark.parametrize("picture", [bomb(), b"GIF89a", b"", None, b"\xff\xd8\xff" + bytes(99)])
def test_a_thumbnail_that_is_none_is_grey(photos: Path, tmp_path: Path, picture: bytes | None) -> None:
    pq.write_table(documents(thumbnail=cells(picture, pa.binary())), photos / "documents" / "part-00000.parquet")
    opened = Artefact(seal(photos))
    assert opened.thumbnail(0).getcolors() == [(64 * 64, (127, 127, 127))]
    found = search.run(search.SearchConfig(artefact=photos, item="item 1", sheet=tmp_path / "sheet.png"))
    assert len(found["queries"][0]["found"]) == ROWS - 1 and (tmp_path / "sheet.png").is_file()


@pytest.mark.parametrize(
    ("damage", "what"),
    [
        (lambda state: state.popitem(), "is missing, wanted"),
        (lambda state: state.update(more=torch.ones(1)), "more is .* wanted nothing"),
        (lambda state: state.update({"vision.position": torch.ones(3, 16)}), r"vision.position is \(\(3, 16\)"),
        (lambda state: state.update({"vision.position": torch.ones(4, 16).half()}), "'F16'"),
    ],
)
def test_weights_of_another_encoder_are_told(photos: Path, damage: Callable[[Any], Any], what: str) -> None:
    state = load_file(photos / "encoder.safetensors")
    damage(state)
    save_file(state, photos / "encoder.safetensors")
    refused(photos, what)


def test_a_header_that_claims_more_than_its_file_is_told(photos: Path) -> None:
    claims = {"vision.position": {"dtype": "F32", "shape": [1 << 40, 16], "data_offsets": [0, 1 << 46]}}
    header = json.dumps(claims).encode()
    for content in (struct.pack("<Q", len(header)) + header, struct.pack("<Q", 1 << 62) + header):
        (photos / "encoder.safetensors").write_bytes(content)
        refused(photos, "encoder.safetensors cannot be read")


def test_odd_tokenizers_are_one_line(made: dict[str, Path], tmp_path: Path) -> None:
    copy = shutil.copytree(made["make"], tmp_path / "copy")
    file = copy / "tokenizer" / "tokenizer.json"
    values, told = json.loads(file.read_text()), 0
    for number, key in enumerate(values):
        for value in ODD[number % 4 :: 4]:
            file.write_text(json.dumps({**values, key: value}))
            try:
                Artefact(seal(copy)).embed_texts(["red disc"])
            except UserError as error:
                assert "tokenizer" in str(error) and str(error).isprintable()
                told += 1
    assert told > 15
    model = copy / "tokenizer" / "spm.model"
    content = model.read_bytes()
    for garbage in (b"", b"\xff" * 99, content[: len(content) // 2]):
        model.write_bytes(garbage)
        file.write_text(json.dumps({**values, "xxh3": xxhash.xxh3_64_hexdigest(garbage)}))
        refused(copy, "spm.model: not a SentencePiece model")
    model.write_bytes(content)
    file.write_text(json.dumps({**values, "vocab_size": 47}))
    refused(copy, r"has 48 pieces, its tokenizer\.json says 47")
    file.write_text(json.dumps({**values, "vocab_size": 4800}))
    refused(copy, r"has 48 pieces, its tokenizer\.json says 4800")


def test_what_may_not_be_read_is_one_line(photos: Path) -> None:
    """As root everything may be read, so as nobody."""
    seal(photos)
    root = os.geteuid() == 0
    for folder in [photos, *photos.parents][: -len(Path("/tmp").parts)] if root else []:
        folder.chmod(0o755)
    for path in (photos / "index.faiss", photos / "documents", photos / "artefact.json", photos):
        before = path.stat().st_mode
        path.chmod(0)
        try:
            if root:
                os.seteuid(65534)
            with pytest.raises(UserError, match=r"cannot be read|Permission denied") as error:
                Artefact(photos)
            assert path.name in str(error.value)
        finally:
            if root:
                os.seteuid(0)
            path.chmod(before)
