"""`shelfmark export`: Make a run's search artefact: encoder, index, id map; also under torchrun.

artefact.json             format, method and its configuration, run, checkpoint, catalogue, decoders, versions
encoder.safetensors       weights of the query encoder: images [n, 3, S, S] or tokens [n, L] -> unit embeddings [n, d]
encoder.pt2               the same as a program (torch.export) for services with only torch; Shelfmark never loads it
encoder.onnx              the same in ONNX, for services without torch; with --int8 also encoder.int8.onnx
preprocess.json           from a photo to the encoder's input
tokenizer/                the run's tokenizer
documents/part-*.parquet  id map and embeddings: row i of all parts together is document i of the index
golden/                   some queries, their embeddings and best documents, for `shelfmark verify`
index.faiss               inner-product index over the embeddings, exact unless --index.kind is another kind than flat
vectors.npy               the embeddings again, to be read in place; not beside a flat index, which holds them
manifest.json             size and SHA-256 of every other file
"""

from __future__ import annotations

import shutil
import time
from contextlib import ExitStack
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any, Literal, NamedTuple

import numpy as np
import pyarrow.parquet as pq

from harness.artefact.artefact import ARTEFACT_FORMAT, open_record
from harness.artefact.decoder_check import compare_decoders
from harness.artefact.document_chunks import Columns, embed_documents, place_parts
from harness.artefact.documents import PART, parts_of
from harness.artefact.flat_index import import_faiss
from harness.artefact.golden import write_golden
from harness.artefact.index_export import IndexConfig, make_index
from harness.artefact.index_kinds import choose_kind
from harness.artefact.onnx_encoder import require_onnx
from harness.artefact.onnx_proof import write_proven_onnx
from harness.artefact.program import make_program, write_program
from harness.artefact.query_encoder import FILE as ENCODER
from harness.artefact.query_encoder import write_query_encoder
from harness.artefact.removed import FILE as REMOVED
from harness.catalogue.catalogue import Catalogue
from harness.catalogue.wholeness import require_whole
from harness.core.build import plain_query_encoder
from harness.core.errors import UserError
from harness.core.files import read_json, write_json
from harness.core.manifest import MANIFEST, fingerprint, write_manifest
from harness.core.mesh import Device, Mesh, MeshConfig
from harness.core.staged_folder import held, require_free, share_file
from harness.core.versions import versions
from harness.core.waiting import on_first_rank
from harness.data.backends import decoding_threads
from harness.evaluate.embed import Embedder, Side, side_of
from harness.evaluate.view_choice import best_view, recalls_by_view, remark
from harness.text.tokenizer import Tokenizer
from harness.train.config import RunConfig
from harness.train.open_run import choose_part_weights, find_checkpoint, load_method, open_settings
from models.method import Method, MethodConfig, query_kind
from models.ranges import NonNegativeInt, PositiveInt
from models.registry import METHODS

_WHOLE = "Export all documents into another folder, without --append"
EXAMPLE = "python jobs/torchrun.py --nproc-per-node 2 -m harness export runs/grocery --out artefacts/grocery"


@dataclass(frozen=True, kw_only=True)
class ExportConfig:
    """Embeds a catalogue's documents with a run's checkpoint and writes everything that search needs into one folder.

    Finished parts of an export that was interrupted or killed lie in OUT.tmp; the same command goes on from there.

    Args:
        run: the run folder that training wrote.
        out: the artefact folder to create; it appears only when it is complete.
        append: add documents to the artefact that is there: those of the catalogue that it does not have. Its other
            files, made of the same checkpoint, view, split and numbers, stay; its index is not trained again.
        checkpoint: a step folder of the run, or best (train.keep_best); the newest complete one by default.
        catalogue: another catalogue to export; the run's own by default.
        split: documents of this split and of split 'all'; every document by default.
        view: what is seen of documents: both, another view of the method, as image, or best: the view with the highest
            Recall@1 when training evaluated this checkpoint, of all products and of those never trained on alike.
        weigh_parts: choose the weights of the parts of a document's vector, where it is a sum of parts (OCLEAR's
            fusion_kind sum), by Recall@1 on the run's validation split; more than images only where it finds more
            than a standard error; 0 leaves a part out.
        thumbnail: longest side in pixels of the small picture kept of each document, for contact sheets; 0 keeps none.
        vectors: numbers of the embeddings that are kept of the documents.
        index: the index.
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
    append: bool = False
    checkpoint: Path | None = None
    catalogue: Path | None = None
    split: str | None = None
    view: str = "both"
    weigh_parts: bool = False
    thumbnail: NonNegativeInt = 160
    vectors: Literal["float32", "float16"] = "float32"
    index: IndexConfig = field(default_factory=IndexConfig)
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
    if not config.append:
        require_free(config.out)  # on every rank, and before the work
    import_faiss()
    if config.onnx or config.int8:
        require_onnx(config.int8, config.golden)
    settings = open_settings(config.run, config.tensor_parallel)
    if (asked := config.view) not in (views := (*METHODS[settings.method].views, "best")):
        raise UserError(f"--view is {config.view}", f"The views of {settings.method} are {', '.join(views)}")
    if config.weigh_parts and (asked != "both" or config.append):
        other = "--append keeps the weights that are there" if config.append else f"--view is {asked}"
        raise UserError(f"--weigh-parts weighs all parts of all documents, and {other}", "Leave out one of them")
    catalogue = Catalogue(config.catalogue or settings.data.catalogue)
    tokenizer = Tokenizer.load(config.run)
    side, threads = side_of(catalogue, "document", config.split, [], None, 0), decoding_threads(settings.data.threads)
    splits = catalogue.meta["counts"]["splits"]
    if not len(side.ids) or config.split not in (None, *splits):
        which = "" if config.split is None else f" in split '{config.split}'"
        raise UserError(f"{catalogue.path} has no document{which}", f"The splits are {', '.join(splits)} (--split)")
    mesh_config = MeshConfig(tensor_parallel=config.tensor_parallel, device=config.device)
    with Mesh(mesh_config) as mesh, ExitStack() as stack:
        stage, kept = _shared_stage(config, mesh, stack)  # before the work: another process may be at it
        require_whole(catalogue, mesh)
        path = find_checkpoint(config.run, config.checkpoint, mesh)
        figures = on_first_rank(lambda: _evaluated(config.run, path), mesh, "reading the evaluation")
        recalls = recalls_by_view(figures, settings.evaluation, settings.method)
        if asked == "best":
            config = replace(config, view=best_view(recalls, path.name))
        method, model = load_method(settings, path, tokenizer, mesh)
        choice = choose_part_weights(settings, method, tokenizer, path, mesh) if config.weigh_parts else None
        old = _earlier(config, path, side, mesh) if config.append else None
        if old is not None and old.part_weights:
            method.weigh_parts(old.part_weights)
        weights = dict(zip(method.parts, method.part_weights, strict=False)) if config.view == "both" else {}
        wanted = config.index.kind if old is None else old.kind
        kind = choose_kind(wanted, config.index.ram, model.embedding_dim, len(side.ids))
        decoders = compare_decoders(method, settings, catalogue, config.split, tokenizer, mesh)
        embedder = Embedder(settings.data, model, tokenizer, config.batch_size, mesh)
        parts = _parts(config, method, catalogue) if old is None else old.parts  # an older version wrote none
        columns = Columns(config.vectors, config.thumbnail, settings.data.preprocess.background, threads, parts)
        depends = {**_dependencies(config, path, catalogue, mesh), "parts": parts, "weights_of_parts": weights}
        new = side if old is None else side.select(~np.isin(side.sample_ids, old.samples))
        new = embed_documents(method, embedder, new, config.view, columns, kept, depends)
        folders = [kept] if old is None else [config.out / "documents", kept]
        on_first_rank(lambda: place_parts(folders, stage / "documents"), mesh, "placing the documents")
        encoder = plain_query_encoder(settings.method, model, method.towers, mesh)
        first, folder = (0, None) if old is None else (len(old.samples), config.out)
        index = make_index(config.index, kind, stage, method, embedder, side, config.vectors, threads, folder, first)
        count = first + len(new.ids)

        def describe() -> None:
            write_query_encoder(encoder, stage)
            removed = {} if old is None else old.carry(config.out, stage)
            write_program(program := make_program(encoder, model), stage)
            write_json(stage / "preprocess.json", settings.data.preprocess.to_dict())
            shutil.copytree(config.run / "tokenizer", stage / "tokenizer")
            golden = write_golden(stage, encoder, model, settings.data, catalogue, tokenizer, config.golden)
            onnx = write_proven_onnx(program, stage, golden, config.int8) if config.onnx or config.int8 else None
            description = _description(config, settings, path, catalogue, count, model)
            description |= {
                "index": index,
                "golden": len(golden.queries),
                "part_weights": weights,
                "onnx": onnx,
                "decoders": decoders,
                **removed,
            }
            write_json(stage / "artefact.json", description)

        on_first_rank(describe, mesh, "writing the encoder")
        write_manifest(stage, mesh, "sha256")
    seconds = time.perf_counter() - started
    if mesh.rank == 0:
        print(f"{config.out}: {count:,} documents of {catalogue.path} in {seconds:.1f} s")
        print(f"{config.out}/{MANIFEST}: SHA-256 {fingerprint(config.out)}")
        if choice is not None:
            print(choice)
        told = remark(recalls, asked, config.view, settings.evaluation.split)
        for line in [*figures.get("warnings", []), *told]:  # such as a recall below that of the imported weights
            print(line)
    return {"documents": count, "embedding_dim": model.embedding_dim, "seconds": round(seconds, 3)}


def _parts(config: ExportConfig, method: Method, catalogue: Catalogue) -> tuple[str, ...]:
    """Parts of the embeddings whose shares become columns."""
    parts = method.parts if config.view == "both" else ()
    for name in catalogue.attributes:
        if name in [f"{PART}{part}" for part in parts]:
            raise UserError(f"{catalogue.path} has an attribute {name}, which export writes itself", "Rename it")
    return parts


def _evaluated(run: Path, checkpoint: Path) -> dict[str, Any]:
    """The run's evaluation of this checkpoint; empty without one."""
    file = run / f"eval-{checkpoint.name.removeprefix('step-')}.json"
    return read_json(file) if file.exists() else {}


def _shared_stage(config: ExportConfig, mesh: Mesh, stack: ExitStack) -> tuple[Path, Path]:
    """The staging folder of rank 0, which all ranks write into, and the folder of finished parts; the first becomes
    `out` when rank 0 leaves the stack.
    """

    def make() -> tuple[Path, Path]:
        holder = stack.enter_context(held(config.out))
        return stack.enter_context(holder.stage(replace=config.append)), holder.kept

    return on_first_rank(make, mesh, "making the folder of the artefact")


class _Earlier(NamedTuple):
    """The artefact that documents are added to: its index's kind, the sample ids of its rows, the number of those that
    were removed, the parts whose shares it has, and the weights of parts, none of an older version's.
    """

    kind: str
    samples: np.ndarray
    removed: int
    parts: tuple[str, ...]
    part_weights: tuple[float, ...]

    def carry(self, folder: Path, stage: Path) -> dict[str, int]:
        """Takes over what was removed, once the new query encoder is known to be the old one."""
        if (folder / ENCODER).read_bytes() != (stage / ENCODER).read_bytes():
            raise UserError(f"{folder} holds another query encoder than this checkpoint's", _WHOLE)
        if not self.removed:
            return {}
        share_file(folder / REMOVED, stage / REMOVED)
        return {"removed": self.removed}


def _earlier(config: ExportConfig, checkpoint: Path, side: Side, mesh: Mesh) -> _Earlier:
    record = open_record(config.out, mesh)
    same = {
        "run": config.run.resolve().name,
        "checkpoint": checkpoint.name,
        "view": config.view,
        "split": config.split,
        "vectors": config.vectors,
    }
    for name, value in same.items():
        if record.values.get(name) != value:
            raise UserError(f"{config.out} was exported with {name} {record.values.get(name)}, not {value}", _WHOLE)
    kind = str(record.values["index"]["kind"])
    if config.index.kind not in ("auto", kind):
        raise UserError(f"--index.kind is {config.index.kind}, the index of {config.out} is of kind {kind}", _WHOLE)
    parts = sorted((config.out / "documents").glob("part-*.parquet"))
    samples = np.concatenate([pq.read_table(part, columns=["sample_id"]).column(0).to_numpy() for part in parts])
    if np.isin(side.sample_ids, samples).all():
        raise UserError(f"{config.out} has all documents of {side.catalogue.path}", "Nothing was added")
    shares = tuple(parts_of(pq.read_schema(parts[0])))
    weights = tuple(record.values.get("part_weights", {}).values())
    return _Earlier(kind, samples, int(record.values.get("removed", 0)), shares, weights)


def _dependencies(config: ExportConfig, checkpoint: Path, catalogue: Catalogue, mesh: Mesh) -> dict[str, Any]:
    """All that the documents' parts depend on."""
    columns = (config.split, config.view, config.thumbnail, config.vectors, config.batch_size, mesh.device.type)
    weights = fingerprint(checkpoint) if (checkpoint / MANIFEST).exists() else str(checkpoint.resolve())
    return {"columns": columns, "weights": weights, "catalogue": catalogue.meta, "versions": versions()}


def _description(
    config: ExportConfig, settings: RunConfig, checkpoint: Path, catalogue: Catalogue, count: int, model: MethodConfig
) -> dict[str, Any]:
    return {
        "format": ARTEFACT_FORMAT,
        "method": settings.method,
        "model": asdict(model),
        "query": query_kind(model),
        "query_tokens": 0 if model.query_text is None else model.query_text.max_length,
        "similarity": "inner product of unit vectors",
        "embedding_dim": model.embedding_dim,
        "documents": count,
        "vectors": config.vectors,
        "split": config.split,
        "view": config.view,
        "backend": settings.data.backend,
        "precision": settings.train.precision,
        "run": config.run.resolve().name,
        "checkpoint": checkpoint.name,
        "catalogue": catalogue.path.resolve().name,
        "versions": versions(),
    }
