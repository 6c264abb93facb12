"""One converted network as an ONNX file on onnxruntime's CPU provider, against itself in torch.

Beside `_zoo_checks.py` and not in it: an export takes many times as long as all checks there, and wants other packages.
"""

from __future__ import annotations

import copy
import tempfile
import time
import traceback
import warnings
from collections.abc import Iterable
from pathlib import Path

import torch
from _zoo_cases import SIZES, make_case, run
from _zoo_checks import Row, relative_error
from torch import Tensor, nn

import gnswap
from gnswap._running import flat

LARGEST_ERROR = 1e-4
"""Of what is allowed: the largest difference to torch in fp64, relative to the largest output."""


def examine(name: str, x: Tensor, sizes: Iterable[int] = SIZES) -> Row:
    """Export for every runtime, run at another batch size, compare.

    Where that fails, the BatchNorm original is exported by torch, to tell whose failure it is.

    Args:
        name: of timm.
        x: what `_zoo_cases.photos` returns.
        sizes: see `_zoo_cases.SIZES`.

    Returns:
        the relative error and the error of torch in fp32; "failed", with "original_fails" where that fails as well.
    """
    start = time.perf_counter()
    row: Row = {"failed": {}}
    case = make_case(name, x, sizes)
    row["size"] = list(case.x.shape[1:])
    try:
        with tempfile.TemporaryDirectory() as folder:
            path = Path(folder) / "network.onnx"
            report = exported(case.converted, path, case.x)
            found = onnxruntime_output(path, case.x)
        row["axes"] = list(report.dynamic_axes)
        row["opset"], row["notes"] = report.opset, list(report.notes)
        row["lowerings"] = sorted({norm.lowering for norm in report.norms})
        exact = run(copy.deepcopy(case.converted).double(), case.x.double())
        row["error"] = relative_error(found, exact)
        row["torch_error"] = relative_error(case.converted_answers, exact)
        if not row["error"] < LARGEST_ERROR:
            row["failed"]["parity"] = f"relative error {row['error']:.2g}, torch's own in fp32 {row['torch_error']:.2g}"
    except Exception:  # whatever the exporter or the runtime raises is a row of the table
        row["failed"]["export"] = traceback.format_exc()
    if row["failed"]:
        try:
            row["original_error"] = original_error(case.original, case.x)
            if not row["original_error"] < LARGEST_ERROR:
                row["original_fails"] = f"relative error {row['original_error']:.2g}"
        except Exception:
            row["original_fails"] = traceback.format_exc()
    row["seconds"] = round(time.perf_counter() - start, 2)
    return row


def exported(model: nn.Module, path: Path, x: Tensor) -> gnswap.ExportReport:
    """Traced at another batch size than it runs at; with a fixed batch where it must, as for the original."""
    try:
        return gnswap.export_onnx(model, path, x[:2], dynamic_size=False)
    except gnswap.ExportError:
        return gnswap.export_onnx(model, path, x, dynamic_batch=False, dynamic_size=False)


def onnxruntime_output(path: Path, x: Tensor) -> list[Tensor]:
    """The outputs of a file on the CPU provider."""
    import onnxruntime

    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = options.inter_op_num_threads = 1
    session = onnxruntime.InferenceSession(path, options, providers=["CPUExecutionProvider"])
    return [torch.from_numpy(value) for value in session.run(None, {session.get_inputs()[0].name: x.numpy()})]


def original_error(model: nn.Module, x: Tensor) -> float:
    """The same error of the BatchNorm network, exported by torch alone; with a fixed batch where it must."""
    exact = flat(run(copy.deepcopy(model).double(), x.double()))
    with tempfile.TemporaryDirectory() as folder, warnings.catch_warnings():
        warnings.simplefilter("ignore")  # torch's exporter warns about its own internals
        path = Path(folder) / "original.onnx"
        for dynamic in (({0: torch.export.Dim.DYNAMIC},), None):
            try:
                torch.onnx.export(model, (x,), path, dynamo=True, dynamic_shapes=dynamic, verbose=False)
                break
            except Exception:
                if dynamic is None:
                    raise
        return relative_error(onnxruntime_output(path, x), exact)
