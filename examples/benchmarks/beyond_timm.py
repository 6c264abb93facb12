"""Networks of other packages than timm: what of them is swapped, how near it is without data, and whether it exports.

    python examples/benchmarks/beyond_timm.py

Small configurations with random weights, since none can be had offline; their norms get the statistics of their inputs,
as in a trained network. The errors say which swap is nearer, not what a trained network would lose. Rows are stored as
they come, so an interrupted run goes on where it stopped.
"""

from __future__ import annotations

import argparse
import importlib.util
import sys
import tempfile
import warnings
from collections import Counter
from pathlib import Path
from typing import Any

import onnxruntime
import torch
from _report import RESULTS, Rows, code_version, environment, markdown_table, write
from rich.progress import track
from torch import nn

import gnswap

sys.path.insert(0, str(Path(__file__).parents[2] / "tests" / "beyond"))
from _networks import NETWORKS, Network  # the same networks as in the tests
from _whole_way import leaves, whole_way

PACKAGES = {"segmentation_models_pytorch": "segmentation-models-pytorch"}


def examine(network: Network) -> dict[str, Any]:
    """One row; a network that fails does not end the run."""
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # of third-party constructors
            model = network.made()
        inventory = gnswap.inspect(model)
        row: dict[str, Any] = {
            "types": Counter(site.norm_type.rpartition(".")[2] for site in inventory.sites),
            "left_alone": len(inventory.left_alone),
        }
        if not inventory.sites:
            return row
        way = whole_way(model, network.run)
        row |= {
            "swapped": way.conversion.report.swapped,
            "kept": Counter(decision.reason.partition(":")[0] for decision in way.conversion.plan.kept),
            "error": way.error,
            "naive_error": way.naive_error,
            "layer_error": way.layer_error,
            "naive_layer_error": way.naive_layer_error,
            "reverted": way.reverted,
            "loaded": way.loaded,
        }
        if network.export:
            row["onnx"] = exported(model, way.conversion.model, network)
        return row
    except Exception as error:
        return {"failed": f"{type(error).__name__}: {' '.join(str(error).split())[:300]}"}


def exported(model: nn.Module, converted: nn.Module, network: Network) -> float | str:
    """The largest error of onnxruntime, relative to the output's largest; or why there is no file."""
    x = network.inputs()
    with tempfile.TemporaryDirectory() as folder:
        try:
            report = gnswap.export_onnx(converted, Path(folder) / "net.onnx", x, dynamic_size=False)
        except gnswap.ExportError as error:
            try:
                torch.onnx.export(model, (x,), str(Path(folder) / "original.onnx"), dynamo=True, verbose=False)
            except Exception:
                return "neither does the original"
            return f"fails: {error}"
        session = onnxruntime.InferenceSession(report.path, providers=["CPUExecutionProvider"])
        found = session.run(None, {session.get_inputs()[0].name: x.numpy()})
    with torch.no_grad():
        expected = leaves(converted(x))
    return max(
        float((torch.from_numpy(one) - other).abs().max() / other.abs().max())
        for one, other in zip(found, expected, strict=True)
    )


def cells(network: Network, row: dict[str, Any]) -> list[str]:
    """A row of the table."""
    name = [network.package.replace("segmentation_models_pytorch", "smp"), network.name]
    if "failed" in row:
        return [*name, f"failed: {row['failed']}", *[""] * 6]
    if "swapped" not in row:
        return [*name, "none", f"nothing; {row['left_alone']} others left alone", *["–"] * 5]
    kept = "; ".join(f"{count} kept ({reason})" for reason, count in row["kept"].items())
    onnx = row.get("onnx", "not tried")
    return [
        *name,
        ", ".join(f"{count} {kind}" for kind, count in row["types"].items()),
        f"{row['swapped']}" + (f"; {kept}" if kept else ""),
        f"{row['error']:.3f} / {row['naive_error']:.3f}",
        f"{row['layer_error']:.3f} / {row['naive_layer_error']:.3f}",
        "yes" if row["reverted"] else "NO",
        "yes" if row["loaded"] else "NO",
        onnx if isinstance(onnx, str) else f"{onnx:.0e}",
    ]


def main() -> None:
    """Examine what is missing, and write the table."""
    argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0]).parse_args()
    code = code_version()
    here = [network for network in NETWORKS if importlib.util.find_spec(network.package)]
    rows = Rows(RESULTS / "beyond_timm.rows.jsonl", code)
    for network in track([one for one in here if str(one) not in rows], "networks"):
        rows.add(str(network), examine(network))
    table = markdown_table(
        [
            "package",
            "network",
            "norms",
            "swapped",
            "error of the answers, gnswap / naive",
            "of a layer (median), gnswap / naive",
            "reverted, same bits",
            "loaded, same bits",
            "ONNX, relative error",
        ],
        [cells(network, rows.rows[str(network)]) for network in here],
    )
    packages = sorted({PACKAGES.get(network.package, network.package) for network in here})
    found = {str(network): rows.rows[str(network)] for network in here}
    write("beyond_timm", "Beyond timm", table, {**environment(code, *packages, "onnxruntime-gpu"), "networks": found})


if __name__ == "__main__":
    main()
