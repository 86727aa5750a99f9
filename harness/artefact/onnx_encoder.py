"""The query encoder in ONNX: written from the exported program, run by ONNX Runtime without torch or this project.

Input `queries`: float32 [batch, 3, S, S] or int64 [batch, L]. Output `embeddings`: float32 [batch, d], of length 1.
"""

from __future__ import annotations

import importlib
import importlib.util
import logging
import re
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch.export import ExportedProgram

from harness.core.errors import UserError
from harness.core.files import printable

FILE, INT8 = "encoder.onnx", "encoder.int8.onnx"
INSTALL = "Install shelfmark[onnx]"
LARGEST = 2_000_000_000  # bytes of weights in the file itself; protobuf takes 2**31 - 1 in all
LEAST_COSINE = 0.9999  # with the embeddings of our encoder
LEAST_INT8_COSINE = 0.9995  # the lowest of the golden inputs


def require_onnx(int8: bool, golden: int) -> None:
    """Raises UserError, before the work, if a package that writes ONNX is missing, or 8 bits would not be measured."""
    for name in ("onnx", "onnxscript", *(["onnxruntime"] if int8 else [])):
        if importlib.util.find_spec(name) is None:
            raise UserError(f"{name} is not installed", f"{INSTALL}, or leave ONNX out with --onnx false")
    if int8 and not golden:
        raise UserError("--int8 is measured on golden inputs, and --golden is 0", "Give --golden 16")


def write_onnx(program: ExportedProgram, folder: Path) -> None:
    """Writes folder/encoder.onnx; with weights above LARGEST bytes they lie in encoder.onnx.data beside it.

    Equal weights make equal bytes: names, order and metadata do not depend on the machine.
    """
    ir = _import("onnx_ir")
    logger = logging.getLogger("torch.onnx")  # of operators of torchvision, which no encoder has
    level = logger.level
    logger.setLevel(logging.ERROR)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            made: Any = torch.onnx.export(
                program, dynamo=True, input_names=["queries"], output_names=["embeddings"], verbose=False
            )
    finally:
        logger.setLevel(level)
    model = made.model
    _strip(model, ir)
    large = sum(value.const_value.nbytes for value in model.graph.initializers.values()) > LARGEST
    ir.save(model, folder / FILE, external_data=f"{FILE}.data" if large else None)


def _strip(model: Any, ir: Any) -> None:
    """Removes metadata, which holds source paths and lines of this machine, and names the dynamic dimension `batch`:
    torch's own name for it changes with its version.
    """
    own = str(model.graph.inputs[0].shape[0])
    values = [*model.graph.inputs, *model.graph.initializers.values()]
    for node in model.graph.all_nodes():
        node.metadata_props.clear()
        node.doc_string = None
        values += node.outputs
    for value in values:
        value.metadata_props.clear()
        value.doc_string = None
        if value.shape is not None:
            dims = [d if isinstance(d, int) else re.sub(rf"\b{own}\b", "batch", str(d)) for d in value.shape]
            value.shape = ir.Shape(dims)
    model.metadata_props.clear()
    model.graph.metadata_props.clear()


def write_int8(folder: Path) -> None:
    """Writes folder/encoder.int8.onnx: weights of matrix products in 8 bits, activations quantised as they come
    (ONNX Runtime's dynamic quantisation), which needs no calibration.
    """
    quantization = _import("onnxruntime.quantization")
    level = logging.root.level
    logging.root.setLevel(logging.ERROR)  # advice to run a pass that changes nothing here
    try:
        quantization.quantize_dynamic(
            str(folder / FILE),
            str(folder / INT8),
            weight_type=quantization.QuantType.QInt8,
            op_types_to_quantize=["MatMul", "Gemm"],
            use_external_data_format=(folder / f"{FILE}.data").exists(),
        )
    finally:
        logging.root.setLevel(level)


def has_runtime() -> bool:
    """True if ONNX Runtime is installed."""
    return importlib.util.find_spec("onnxruntime") is not None


def open_onnx(file: Path, threads: int = 1) -> Callable[[np.ndarray], np.ndarray]:
    """The encoder of an ONNX file on the CPU: inputs [n, …] to embeddings float32 [n, d].

    The graph holds operators of ONNX, no code; ONNX Runtime parses and runs it in native code.

    Raises:
        UserError: no ONNX Runtime, or it does not open the file.
    """
    runtime = _import("onnxruntime")
    options = runtime.SessionOptions()
    options.intra_op_num_threads, options.log_severity_level = threads, 3
    try:
        session = runtime.InferenceSession(str(file), options, providers=["CPUExecutionProvider"])
    except Exception as error:  # its errors have no common class
        reason = printable(" ".join(str(error).split()))
        raise UserError(f"{file} is not opened by ONNX Runtime ({reason})", "Copy it again, or export again") from error

    def run(inputs: np.ndarray) -> np.ndarray:
        found: np.ndarray = session.run(["embeddings"], {"queries": inputs})[0]
        return found

    return run


def _import(name: str) -> Any:
    try:
        return importlib.import_module(name)
    except ImportError as error:
        raise UserError(f"{name.partition('.')[0]} does not import ({error})", INSTALL) from error
