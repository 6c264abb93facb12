"""The public surface is what `gnswap/__init__.py` lists; it is documented, and importing it is light."""

from __future__ import annotations

import importlib.metadata
import inspect
import subprocess
import sys
import types

import pytest

import gnswap

HEAVY = ("onnx", "onnxruntime", "onnxscript", "triton", "matplotlib", "torchvision", "timm", "typer", "accelerate")


def test_all_is_sorted_and_complete() -> None:
    public = {
        name
        for name, value in vars(gnswap).items()
        if not name.startswith("_") and (not isinstance(value, types.ModuleType) or name == "ops")
    }
    assert set(gnswap.__all__) == public, "gnswap/__init__.py and its __all__ differ"
    assert list(gnswap.__all__) == sorted(gnswap.__all__)


@pytest.mark.parametrize("name", gnswap.__all__)
def test_every_public_name_is_documented(name: str) -> None:
    assert inspect.getdoc(getattr(gnswap, name)), f"gnswap.{name} has no docstring"


@pytest.mark.parametrize(
    "verb",
    [
        "calibrate", "inspect", "plan", "apply", "convert", "refit", "heal", "revert", "save", "load", "compare",
        "export_onnx", "validate_onnx", "benchmark_onnx", "register_norm", "report", "explain", "grad_sample_module",
    ],
)  # fmt: skip
def test_verbs_document_arguments_errors_and_an_example(verb: str) -> None:
    text = inspect.getdoc(getattr(gnswap, verb)) or ""
    for section in ("Args:", "Raises:", "Example:"):
        assert section in text, f"gnswap.{verb}: the docstring has no {section}"


def test_names_of_the_design() -> None:
    """The parameters that shared names fix; a rename here breaks users."""
    options = ["groups", "group_size", "softness", "max_softness", "fidelity", "order", "calibration"]
    for verb in (gnswap.plan, gnswap.convert):
        parameters = list(inspect.signature(verb).parameters)
        assert parameters[0] == "model"
        assert set(options) | {"include", "exclude", "overrides"} <= set(parameters)
    assert list(inspect.signature(gnswap.apply).parameters) == ["model", "plan", "inplace"]
    assert list(inspect.signature(gnswap.ops.group_norm).parameters) == [
        "x", "num_groups", "weight", "bias", "eps", "act", "residual",
        "channel_scale", "channel_shift", "channel_order",
    ]  # fmt: skip


def loaded_by(code: str) -> set[str]:
    script = f"{code}\nimport sys\nprint('\\n'.join(sys.modules))"
    out = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=True)
    return set(out.stdout.split())


def test_import_is_lean() -> None:
    """No optional package, no CUDA, nothing heavy is loaded by `import gnswap`.

    torch itself may load some of them in future; only what gnswap adds counts.
    """
    before, after = loaded_by("import torch"), loaded_by("import gnswap")
    assert not {name for name in HEAVY if name in after - before}


def test_the_lean_check_can_fail() -> None:
    assert "typer" in loaded_by("import gnswap._cli")


def test_import_touches_no_cuda() -> None:
    script = "import gnswap, torch; print(torch.cuda.is_initialized())"
    out = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=True)
    assert out.stdout.strip() == "False"


def test_one_version() -> None:
    assert importlib.metadata.version("gnswap") == gnswap.__version__
