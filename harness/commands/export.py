"""`shelfmark export`: Make a run's search artefact: encoder, index, id map; also under torchrun.

artefact.json             format, method and its configuration, run, checkpoint, catalogue, decoders, versions
encoder.safetensors       weights of the query encoder: images [n, 3, S, S] or tokens [n, L] -> unit embeddings [n, d]
encoder.pt2               the same as a program (torch.export) for services with only torch; Shelfmark never loads it
encoder.onnx              the same in ONNX, for services without torch; with --int8 also encoder.int8.onnx
preprocess.json           from a photo to the encoder's input
tokenizer/                the run's tokenizer
documents/part-*.parquet  id map and embeddings: row i of all parts together is document i of the index
golden/                   some queries, their embeddings and best documents, for `shelfmark verify`
index.faiss               exact inner-product index over the embeddings
manifest.json             size and SHA-256 of every other file
"""

from __future__ import annotations

import io
import shutil
import time
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
from tqdm import tqdm

from harness.artefact.artefact import ARTEFACT_FORMAT
from harness.artefact.decoder_check import compare_decoders
from harness.artefact.flat_index import import_faiss, write_index
from harness.artefact.golden import write_golden
from harness.artefact.onnx_encoder import require_onnx
from harness.artefact.onnx_proof import write_proven_onnx
from harness.artefact.program import make_program, write_program
from harness.artefact.query_encoder import write_query_encoder
from harness.catalogue.catalogue import Catalogue
from harness.catalogue.pixels import Colour
from harness.catalogue.wholeness import require_whole
from harness.core.build import plain_query_encoder
from harness.core.errors import UserError
from harness.core.files import read_json, write_json
from harness.core.manifest import MANIFEST, fingerprint, write_manifest
from harness.core.mesh import Device, Mesh, MeshConfig
from harness.core.staged_folder import require_free, staged_folder
from harness.core.versions import versions
from harness.core.waiting import in_own_time, on_first_rank
from harness.data.backends import decoding_threads
from harness.evaluate.contact_sheet import picture
from harness.evaluate.embed import Embedder, Side, side_of
from harness.evaluate.ranking import Embedded
from harness.text.tokenizer import FIELDS, Tokenizer
from harness.train.config import RunConfig
from harness.train.open_run import find_checkpoint, load_method, open_settings
from models.comm import share
from models.method import MethodConfig, query_kind
from models.ranges import NonNegativeInt, PositiveInt
from models.registry import METHODS

EXAMPLE = "python jobs/torchrun.py --nproc-per-node 2 -m harness export runs/grocery --out artefacts/grocery"
_ROWS = 4096  # rows written at once


@dataclass(frozen=True, kw_only=True)
class ExportConfig:
    """Embeds a catalogue's documents with a run's checkpoint and writes everything that search needs into one folder.

    Args:
        run: the run folder that training wrote.
        out: the artefact folder to create; it appears only when it is complete.
        checkpoint: a step folder of the run, or best (train.keep_best); the newest complete one by default.
        catalogue: another catalogue to export; the run's own by default.
        split: documents of this split and of split 'all'; every document by default.
        view: what is seen of documents: both, or another view of the method, as image; evaluation measures them.
        thumbnail: longest side in pixels of the small picture kept of each document, for contact sheets; 0 keeps none.
        golden: queries that are kept with their embeddings and best documents, for `shelfmark verify`; photos as they
            came, of at most 1 MiB each; 0 keeps none.
        onnx: write the encoder in ONNX too.
        int8: write it in ONNX with weights of 8 bits too; refused where its embeddings differ too much.
        batch_size: images embedded at once.
        tensor_parallel: ranks that share one copy of the towers.
        device: cuda, cpu, or auto, the GPUs where there are any.
    """

    run: Path = field(kw_only=False)
    out: Path
    checkpoint: Path | None = None
    catalogue: Path | None = None
    split: str | None = None
    view: str = "both"
    thumbnail: NonNegativeInt = 160
    golden: NonNegativeInt = 16
    onnx: bool = True
    int8: bool = False
    batch_size: PositiveInt = 128
    tensor_parallel: PositiveInt = 1
    device: Device = "auto"


def run(config: ExportConfig) -> dict[str, Any]:
    """Exports, prints a line on rank 0 and returns documents, embedding_dim and seconds.

    Raises:
        UserError: no run or checkpoint there, `out` exists, no document, a layout that does not divide, no faiss,
            decoders that differ.
    """
    started = time.perf_counter()
    require_free(config.out)  # on every rank, and before the work
    import_faiss()
    if config.onnx or config.int8:
        require_onnx(config.int8, config.golden)
    settings = open_settings(config.run, config.tensor_parallel)
    if config.view not in (views := METHODS[settings.method].views):
        raise UserError(f"--view is {config.view}", f"The views of {settings.method} are {', '.join(views)}")
    catalogue = Catalogue(config.catalogue or settings.data.catalogue)
    tokenizer = Tokenizer.load(config.run)
    side, threads = side_of(catalogue, "document", config.split, [], None, 0), decoding_threads(settings.data.threads)
    splits = catalogue.meta["counts"]["splits"]
    if not len(side.ids) or config.split not in (None, *splits):
        which = "" if config.split is None else f" in split '{config.split}'"
        raise UserError(f"{catalogue.path} has no document{which}", f"The splits are {', '.join(splits)} (--split)")
    mesh_config = MeshConfig(tensor_parallel=config.tensor_parallel, device=config.device)
    with Mesh(mesh_config) as mesh, ExitStack() as stack:
        stage = _shared_stage(config.out, mesh, stack)  # before the work: another process may be at it
        require_whole(catalogue, mesh)
        path = find_checkpoint(config.run, config.checkpoint, mesh)
        method, model = load_method(settings, path, tokenizer, mesh)
        decoders = compare_decoders(method, settings, catalogue, config.split, tokenizer, mesh)
        embedder = Embedder(settings.data, model, tokenizer, config.batch_size, mesh)
        own = embedder.embed(method, side, config.view)
        side = side.select(~embedder.missing(side))
        encoder = plain_query_encoder(settings.method, model, method.towers, mesh)
        background = settings.data.preprocess.background
        part = stage / "documents" / f"part-{mesh.rank:05d}.parquet"
        in_own_time(
            lambda: write_documents(part, side, _shared_with(own, mesh), config.thumbnail, threads, background),
            mesh,
            "writing the documents",
        )

        def describe() -> None:
            write_index(stage, model.embedding_dim)
            write_query_encoder(encoder, stage)
            write_program(program := make_program(encoder, model), stage)
            write_json(stage / "preprocess.json", settings.data.preprocess.to_dict())
            shutil.copytree(config.run / "tokenizer", stage / "tokenizer")
            golden = write_golden(stage, encoder, model, settings.data, catalogue, tokenizer, config.golden)
            onnx = write_proven_onnx(program, stage, golden, config.int8) if config.onnx or config.int8 else None
            description = _description(config, settings, path, catalogue, side, model)
            description |= {"golden": len(golden.queries), "onnx": onnx}
            write_json(stage / "artefact.json", {**description, "decoders": decoders})

        on_first_rank(describe, mesh, "writing index and encoder")
        write_manifest(stage, mesh, "sha256")
    seconds = time.perf_counter() - started
    if mesh.rank == 0:
        print(f"{config.out}: {len(side.ids):,} documents of {catalogue.path} in {seconds:.1f} s")
        print(f"{config.out}/{MANIFEST}: SHA-256 {fingerprint(config.out)}")
        if better := _better_view(config, settings, path):
            print(better)
    return {"documents": len(side.ids), "embedding_dim": model.embedding_dim, "seconds": round(seconds, 3)}


def _better_view(config: ExportConfig, settings: RunConfig, checkpoint: Path) -> str:
    """A line on another view by which the run's evaluation of this checkpoint found more, of all products or of those
    never trained on; empty without one.
    """
    file = config.run / f"eval-{checkpoint.name.removeprefix('step-')}.json"
    figures = read_json(file) if config.view == "both" and file.exists() else {}
    of_class = [row for row in figures.get("slices", []) if (row["slice"], row["value"]) == ("class", "never trained")]
    new = {row.get("task", ""): row["recall_at_1"] for row in of_class}
    for key in figures:
        task, _, figure = key.rpartition("/")
        if figure != "recall_at_1" or task.count("/") != 1:
            continue
        recalls = {"all products": (figures["recall_at_1"], figures[key])}
        if new.keys() >= {"", task}:
            recalls["products never trained on"] = (new[""], new[task])
        recalls = {name: pair for name, pair in recalls.items() if None not in pair}  # of no query with an answer
        if any(other > both for both, other in recalls.values()):
            view = task.partition("/")[2]
            told = ", ".join(f"{name} {both:.3f} and {other:.3f}" for name, (both, other) in recalls.items())
            split = settings.evaluation.split
            return f"{split} recall@1 of documents seen as both and as {view}: {told}. --view {view} exports the latter"
    return ""


def _shared_stage(out: Path, mesh: Mesh, stack: ExitStack) -> Path:
    """The staging folder of rank 0, which all ranks write into; it becomes `out` when rank 0 leaves the stack."""

    def make() -> Path:
        stage = stack.enter_context(staged_folder(out))
        (stage / "documents").mkdir()
        return stage

    return on_first_rank(make, mesh, "making the folder of the artefact")


def _shared_with(own: Embedded, mesh: Mesh) -> Embedded:
    """This rank's part of what its tensor-parallel ranks hold together: ranks in order have the rows in order."""
    mine = share(len(own.ids), mesh.tp.size(), mesh.tp.rank())
    return Embedded(*(column[mine.start : mine.stop] for column in (own.vectors, own.ids, own.labels)))


def write_documents(file: Path, side: Side, own: Embedded, thumbnail: int, threads: int, background: Colour) -> None:
    """This rank's rows, in the order of the side: consecutive ones, so that the parts follow each other."""
    width, catalogue = own.vectors.shape[1], side.catalogue
    texts = ["class_key", "item", *FIELDS, *catalogue.attributes]
    schema = pa.schema(
        [
            ("sample_id", pa.int64()),
            *((name, pa.string()) for name in texts),
            ("thumbnail", pa.binary()),
            ("embedding", pa.list_(pa.float32(), width)),
        ]
    )
    first = int(side.rows_of(own.ids[:1].cpu().numpy()).sum())  # 0 where there is none
    tables = side.read(texts, range(first, first + len(own.ids)), _ROWS)
    with pq.ParquetWriter(file, schema) as writer, ThreadPoolExecutor(threads) as pool:
        for number, table in enumerate(tqdm(tables, desc="documents", unit=" x 4,096", leave=False, delay=5)):
            start = number * _ROWS
            vectors = own.vectors[start : start + len(table)].float().cpu().numpy()
            small = pool.map(lambda i: _thumbnail(catalogue, i, thumbnail, background), table["sample_id"].to_pylist())
            thumbnails = pa.array([*small], pa.binary())
            flat = pa.FixedSizeListArray.from_arrays(pa.array(vectors.reshape(-1)), width)
            columns = [*table.combine_chunks().columns, thumbnails, flat]
            writer.write_table(pa.Table.from_arrays([*columns], schema=schema))


def _thumbnail(catalogue: Catalogue, sample_id: int, size: int, background: Colour) -> bytes | None:
    if not size:
        return None
    image = picture(catalogue, sample_id, background)
    image.thumbnail((size, size))
    buffer = io.BytesIO()
    image.save(buffer, "JPEG", quality=85)
    return buffer.getvalue()


def _description(
    config: ExportConfig, settings: RunConfig, checkpoint: Path, catalogue: Catalogue, side: Side, model: MethodConfig
) -> dict[str, Any]:
    return {
        "format": ARTEFACT_FORMAT,
        "method": settings.method,
        "model": asdict(model),
        "query": query_kind(model),
        "query_tokens": 0 if model.query_text is None else model.query_text.max_length,
        "similarity": "inner product of unit vectors",
        "embedding_dim": model.embedding_dim,
        "documents": len(side.ids),
        "split": config.split,
        "view": config.view,
        "backend": settings.data.backend,
        "precision": settings.train.precision,
        "run": config.run.resolve().name,
        "checkpoint": checkpoint.name,
        "catalogue": catalogue.path.resolve().name,
        "versions": versions(),
    }
