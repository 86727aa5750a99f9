"""The query encoder of an artefact: weights in safetensors, the network built by our code from the method's
configuration. No megatron-core.
"""

from __future__ import annotations

import warnings
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import load_file
from torch import nn

from harness.core.errors import UserError
from harness.core.files import printable
from models.method import MethodConfig
from models.plain.transformer import PlainBuilder
from models.plain_values import from_plain
from models.registry import METHODS
from models.weights.convert import save_tensors

FILE = "encoder.safetensors"
LARGEST_SIDE = 8192  # pixels of the square that an encoder sees


def write_query_encoder(encoder: nn.Module, folder: Path) -> None:
    """Writes the weights into folder/encoder.safetensors."""
    save_tensors(encoder.state_dict(), folder / FILE)


def read_model(method: str, values: Any, where: Path) -> MethodConfig:
    """The configuration of a method from untrusted plain values; `where` is their file.

    Raises:
        UserError: an unknown method, or values that do not describe towers.
    """
    if method not in METHODS:
        raise UserError(f"{where}: method is {printable(method)!r}", f"This version knows {', '.join(METHODS)}")
    try:
        model = from_plain(METHODS[method].config, values, "model")
        errors = model.errors(1)
        side = model.vision.image_size
        errors += [] if side <= LARGEST_SIDE else [f"model.vision.image_size is {side}; at most {LARGEST_SIDE}"]
    except ValueError as error:
        errors = [str(error)]
    except ZeroDivisionError:
        errors = ["a size of the model is 0"]
    if errors:
        raise UserError(f"{where}: {printable(errors[0])}", "Export again")
    return model


def read_query_encoder(method: str, model: MethodConfig, folder: Path) -> nn.Module:
    """The query encoder of folder/encoder.safetensors, float32 on the CPU; names and shapes are checked before memory
    is allocated.

    Raises:
        UserError: the file is missing or damaged, or holds the weights of another encoder.
    """
    file, spec = folder / FILE, METHODS[method]
    try:
        with safe_open(file, "pt") as tensors:
            parts = {name: tensors.get_slice(name) for name in tensors.keys()}
            found = {name: (tuple(part.get_shape()), part.get_dtype()) for name, part in parts.items()}
        with torch.device("meta"), warnings.catch_warnings():
            warnings.simplefilter("ignore")  # of layers without weights, which no file fits
            encoder = spec.query_encoder(spec.towers(model, PlainBuilder())).eval()
        wanted = {name: (tuple(tensor.shape), "F32") for name, tensor in encoder.state_dict().items()}
        wrong = [name for name in sorted(wanted.keys() | found.keys()) if wanted.get(name) != found.get(name)]
        if wrong:
            raise UserError(
                f"{file} does not fit the model that artefact.json describes: {printable(wrong[0])} is "
                f"{found.get(wrong[0], 'missing')}, wanted {wanted.get(wrong[0], 'nothing')}",
                "Export again",
            )
        encoder.load_state_dict(load_file(file), assign=True)
    except (SafetensorError, OSError) as error:
        raise UserError(
            f"{file} cannot be read ({getattr(error, 'strerror', None) or error})", "Export again"
        ) from error
    except (RuntimeError, ValueError, ArithmeticError) as error:  # sizes of which torch makes no layer
        raise UserError(f"{folder}/artefact.json describes no model ({error})", "Export again") from error
    return encoder.requires_grad_(False)
