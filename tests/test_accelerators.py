"""TransformerEngine and apex are used where they are whole; half-installed or foreign packages of those names harm
nothing.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
import textwrap
from pathlib import Path
from typing import Any

import pytest

ROOT = Path(__file__).resolve().parent.parent

PROBE = """
import json, sys, torch
import harness.train.trainer
from models import accelerators
from models.accelerators import choose, use_adam
from models.transformer import LayerNorm
from megatron.core import optimizer
from megatron.core.optimizer import distrib_optimizer

flags = ("HAVE_TE", "HAVE_APEX", "HAVE_APEX_OR_TE", "HAVE_FUSED_LAYER_NORM")
megatron = {name: module for name, module in sys.modules.items() if name.startswith("megatron") and module}
found = {"fooled": [f"{name}.{flag}" for name, module in megatron.items() for flag in flags if vars(module).get(flag)]}
before = set(sys.modules)
cuda, cpu = torch.device("meta"), torch.device("cpu")  # meta: a device other than the CPU that every machine has
found["lines"] = [choose("auto", cuda).line, choose("torch", cuda).line, choose("auto", cpu).line]
for which in ("auto", "torch"):
    chosen = choose(which, cuda)
    use_adam(chosen)
    norm = LayerNorm(None, 4, fused=chosen.layer_norm)
    found[which] = [
        chosen.adam, optimizer.Adam.__name__, distrib_optimizer.Adam.__module__, optimizer.USING_PYTORCH_OPTIMIZER,
        distrib_optimizer.HAVE_APEX_OR_TE, distrib_optimizer.USING_TE_OPTIMIZER, float(norm(torch.ones(4))[0]),
    ]
try:
    import apex
    found["apex"] = str(apex.__file__)
except ImportError:
    found["apex"] = None
print(json.dumps(found))
"""


def probe(folder: Path, files: dict[str, str]) -> dict[str, Any]:
    """megatron-core's and our choice in a new process, with `files` importable."""
    for name, text in files.items():
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_text(textwrap.dedent(text))
    environment = {**os.environ, "PYTHONPATH": f"{folder}{os.pathsep}{ROOT}"}
    done = subprocess.run([sys.executable, "-c", PROBE], cwd=ROOT, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-2000:]
    return json.loads(done.stdout.splitlines()[-1])


def test_a_half_installed_transformer_engine_and_a_foreign_apex_are_passed_over(tmp_path: Path) -> None:
    found = probe(
        tmp_path,
        {
            "transformer_engine/__init__.py": "raise RuntimeError('Found empty meta package')",
            "apex/__init__.py": "",  # PyPI's: another project
            "apex/optimizers.py": "",
        },
    )
    assert found["fooled"] == []
    auto, plain, cpu = found["lines"]
    assert auto == (
        "accelerators (auto): Adam torch, layer norm torch"
        "; transformer_engine.pytorch.optimizers.FusedAdam: RuntimeError Found empty meta package"
        "; apex.optimizers.FusedAdam: AttributeError module 'apex.optimizers' has no attribute 'FusedAdam'"
        "; apex.normalization.fused_layer_norm.fused_layer_norm_affine: "
        "ModuleNotFoundError No module named 'apex.normalization'"
    )
    assert plain == "accelerators (torch): Adam torch, layer norm torch"
    assert cpu == "accelerators (auto): Adam torch, layer norm torch"
    assert found["auto"] == found["torch"] == ["torch", "AdamW", "torch.optim.adamw", True, False, False, 0.0]
    assert found["apex"] == str(tmp_path / "apex/__init__.py"), "other code can still import its apex"


ADAM = """
    class FusedAdam:
        def __init__(self, parameters, lr):
            (self.weight,) = parameters
        def step(self):
            assert self.weight.grad.device == self.weight.device and self.weight.device.type == "meta"
"""


@pytest.mark.parametrize(
    ("adam", "norm", "why"),
    [
        (
            # apex without its CUDA extensions: Adam raises at construction, the norm at its first call
            "class FusedAdam:\n"
            "    def __init__(self, *_, **__):\n"
            "        raise RuntimeError('apex.optimizers.FusedAdam requires cuda extensions')",
            "def fused_layer_norm_affine(*_):\n"
            "    raise ModuleNotFoundError(\"No module named 'fused_layer_norm_cuda'\")",
            "; apex.optimizers.FusedAdam: RuntimeError apex.optimizers.FusedAdam requires cuda extensions"
            "; apex.normalization.fused_layer_norm.fused_layer_norm_affine: "
            "ModuleNotFoundError No module named 'fused_layer_norm_cuda'",
        ),
        (
            # kernels that are built for another architecture: the step and the backward raise
            "class FusedAdam:\n"
            "    def __init__(self, *_, **__): pass\n"
            "    def step(self): raise RuntimeError('no kernel image is available')",
            "def fused_layer_norm_affine(x, *_):\n    x = x + 0\n    x.register_hook(lambda _: 1 / 0)\n    return x",
            "; apex.optimizers.FusedAdam: RuntimeError no kernel image is available"
            "; apex.normalization.fused_layer_norm.fused_layer_norm_affine: ZeroDivisionError division by zero",
        ),
    ],
)
def test_a_package_that_imports_and_fails_when_it_is_called_is_passed_over(
    adam: str, norm: str, why: str, tmp_path: Path
) -> None:
    found = probe(
        tmp_path,
        {
            "apex/__init__.py": "",
            "apex/optimizers.py": adam,
            "apex/normalization/__init__.py": "",
            "apex/normalization/fused_layer_norm.py": norm,
        },
    )
    missing = (
        "; transformer_engine.pytorch.optimizers.FusedAdam: ModuleNotFoundError No module named 'transformer_engine'"
    )
    assert found["lines"][0] == f"accelerators (auto): Adam torch, layer norm torch{missing}{why}"
    assert found["auto"] == found["torch"] == ["torch", "AdamW", "torch.optim.adamw", True, False, False, 0.0]


def test_whole_packages_are_used_unless_the_key_says_otherwise(tmp_path: Path) -> None:
    found = probe(
        tmp_path,
        {
            "transformer_engine/__init__.py": "__version__ = '2.0'",
            "transformer_engine/pytorch/__init__.py": "",
            "transformer_engine/pytorch/optimizers.py": ADAM,
            "apex/__init__.py": "",
            "apex/normalization/__init__.py": "",
            "apex/normalization/fused_layer_norm.py": """
                def fused_layer_norm_affine(x, weight, bias, shape, eps):
                    assert weight.shape == bias.shape == shape and eps == 1e-5
                    return x * weight + bias + 41
            """,
        },
    )
    assert found["fooled"] == []
    assert found["lines"][0] == "accelerators (auto): Adam transformer_engine, layer norm apex"
    adam = ["transformer_engine", "FusedAdam", "transformer_engine.pytorch.optimizers", False, True, True, 42.0]
    assert found["auto"] == adam
    assert found["torch"] == ["torch", "AdamW", "torch.optim.adamw", True, False, False, 0.0]
