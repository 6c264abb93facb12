"""How fast exported networks run on onnxruntime's CPU: against torch's own export and the BatchNorm original.

    pip install -e '.[dev]'
    python examples/benchmarks/export.py

Three files a network: the original with its BatchNorms (onnxruntime folds them into the convs), the same network with
plain `torch.nn.GroupNorm` as `torch.onnx.export` writes it by default, and the converted network as `export_onnx`
writes it for target "cpu". A fourth has a random channel order in every norm. Weights and statistics are random: speed
and exactness do not depend on them. The batch, and nothing else, is dynamic in all of them, as in torch's export.

All files of a network run in turn, in an order drawn anew each round, in one process with one pool of threads; the
ratios are of medians. `--only-export` makes the files and stops, so that the machine is left alone while it measures.
Rows are stored as they are measured, so an interrupted run goes on where it stopped.
"""

from __future__ import annotations

import argparse
import copy
import multiprocessing
import random
import statistics
import sys
import tempfile
import time
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import timm
import torch
from _report import RESULTS, Rows, code_version, environment, markdown_table, write
from torch import Tensor, nn

import gnswap

NETWORKS: dict[str, Callable[[], nn.Module]] = {
    "resnet50": lambda: timm.create_model("resnet50"),
    "mobilenetv2_100": lambda: timm.create_model("mobilenetv2_100"),
    "mobilenetv3_large_100": lambda: timm.create_model("mobilenetv3_large_100"),
    "efficientnet_lite0": lambda: timm.create_model("efficientnet_lite0"),
    "regnetx_004": lambda: timm.create_model("regnetx_004"),
    "densenet121": lambda: timm.create_model("densenet121"),
    "convnext_atto, BatchNorm": lambda: timm.create_model("convnext_atto", conv_mlp=True, norm_layer=nn.BatchNorm2d),
}
SIZE = 224
FILES = {1: ("original", "torch", "serial"), 2: ("original", "torch", "parallel", "ordered")}
OURS = {1: "serial", 2: "parallel"}


def randomise(model: nn.Module) -> nn.Module:
    """BatchNorm statistics as a trained network has them, not 0 and 1."""
    generator = torch.Generator().manual_seed(0)
    for module in model.modules():
        if isinstance(module, nn.modules.batchnorm._BatchNorm):
            shape = module.running_mean.shape
            module.running_mean.copy_(torch.randn(shape, generator=generator))
            module.running_var.copy_(torch.exp(torch.rand(shape, generator=generator) * 3 - 1.6))
            module.weight.data.copy_(torch.rand(shape, generator=generator) + 0.3)
            module.bias.data.copy_(torch.randn(shape, generator=generator))
    return model.eval()


def with_plain_norms(model: nn.Module) -> nn.Module:
    """Every FusedGroupNorm as `torch.nn.GroupNorm` and its activation."""
    model = copy.deepcopy(model)
    for name, module in list(model.named_modules()):
        if isinstance(module, gnswap.FusedGroupNorm):
            norm: nn.Module = nn.GroupNorm(module.num_groups, module.num_channels, module.eps + module.softness)
            if isinstance(module.act, nn.Module):
                norm = nn.Sequential(norm, module.act)
            parent, _, last = name.rpartition(".")
            setattr(model.get_submodule(parent), last, norm)
    return model.eval()


def with_orders(model: nn.Module) -> nn.Module:
    """Another channel order in every norm."""
    model, generator = copy.deepcopy(model), torch.Generator().manual_seed(0)
    for module in model.modules():
        if isinstance(module, gnswap.FusedGroupNorm):
            module.channel_order = torch.randperm(module.num_channels, generator=generator)
    return model


def torchs_export(model: nn.Module, path: Path, x: Tensor) -> None:
    dynamic = ({0: torch.export.Dim.DYNAMIC},)
    with warnings.catch_warnings():
        # torch's exporter warns about its own internals
        warnings.simplefilter("ignore", FutureWarning)
        torch.onnx.export(model, (x,), path, dynamo=True, dynamic_shapes=dynamic, external_data=False, verbose=False)


def export(build: Callable[[], nn.Module], folder: Path) -> None:
    """All files of one network that are not there, and its answers in fp64."""
    folder.mkdir(parents=True, exist_ok=True)
    torch.manual_seed(0)
    with torch.no_grad():
        original = randomise(build())
        x = torch.randn(2, 3, SIZE, SIZE, generator=torch.Generator().manual_seed(1))
        converted = gnswap.convert(original).model.eval()
    ordered = with_orders(converted)
    todo: dict[str, Callable[[Path], object]] = {
        "original": lambda path: torchs_export(original, path, x),
        "torch": lambda path: torchs_export(with_plain_norms(converted), path, x),
        "serial": lambda path: gnswap.export_onnx(converted, path, x, target="cpu", threads=1, dynamic_size=False),
        "parallel": lambda path: gnswap.export_onnx(converted, path, x, target="cpu", dynamic_size=False),
        "ordered": lambda path: gnswap.export_onnx(ordered, path, x, target="cpu", dynamic_size=False),
    }
    for name, make in todo.items():
        if not (folder / f"{name}.onnx").exists():
            print(f"  exporting {name}", file=sys.stderr)
            make(folder / f"{name}.onnx")
    if not (folder / "answers.pt").exists():
        with torch.no_grad():
            models = {"parallel": converted, "torch": with_plain_norms(converted), "ordered": ordered}
            answers = {name: copy.deepcopy(model).double()(x.double()) for name, model in models.items()}
        torch.save({"x": x, **answers, "serial": answers["parallel"]}, folder / "answers.pt")


def measure(folder: Path, threads: int, batches: list[int], seconds: float, results: Any) -> None:
    """Run in a process of its own: onnxruntime has one pool of threads for a process."""
    import onnxruntime

    onnxruntime.set_global_thread_pool_sizes(threads, 1)
    options = onnxruntime.SessionOptions()
    options.use_per_session_threads, options.log_severity_level = False, 3
    sessions = {
        name: onnxruntime.InferenceSession(folder / f"{name}.onnx", options, providers=["CPUExecutionProvider"])
        for name in FILES[threads]
    }
    answers, errors = torch.load(folder / "answers.pt"), {}
    for name in FILES[threads][1:]:
        (found,) = sessions[name].run(None, {sessions[name].get_inputs()[0].name: answers["x"].numpy()})
        errors[name] = float((torch.from_numpy(found) - answers[name]).abs().amax() / answers[name].abs().amax())
    for batch in batches:
        x = torch.randn(batch, 3, SIZE, SIZE, generator=torch.Generator().manual_seed(batch)).numpy()
        times = in_turn({name: bound(onnxruntime, session, x) for name, session in sessions.items()}, seconds)
        medians = {name: 1e3 * statistics.median(one) for name, one in times.items()}
        rounds = len(times["original"])
        results.put({"batch": batch, "threads": threads, "ms": medians, "rounds": rounds, "relative_error": errors})


def bound(onnxruntime: Any, session: Any, x: Any) -> Callable[[], Any]:
    """One run with inputs and outputs in place."""
    binding = session.io_binding()
    binding.bind_ortvalue_input(session.get_inputs()[0].name, onnxruntime.OrtValue.ortvalue_from_numpy(x))
    binding.bind_output(session.get_outputs()[0].name, "cpu")
    return lambda: session.run_with_iobinding(binding)


def in_turn(steps: dict[str, Callable[[], Any]], seconds: float) -> dict[str, list[float]]:
    """Seconds of each run: rounds of one run of each, at least 7, after two that do not count."""
    shuffle, names = random.Random(0), list(steps)
    times: dict[str, list[float]] = {name: [] for name in names}
    end = time.perf_counter() + seconds
    while time.perf_counter() < end or len(times[names[0]]) < 9:
        for name in shuffle.sample(names, len(names)):
            start = time.perf_counter()
            steps[name]()
            times[name].append(time.perf_counter() - start)
    return {name: one[2:] for name, one in times.items()}


def as_table(rows: list[dict[str, Any]]) -> str:
    """The rows as markdown."""
    cells = []
    for row in rows:
        ms, ours = row["ms"], OURS[row["threads"]]
        cells.append(
            [
                row["network"],
                str(row["threads"]),
                str(row["batch"]),
                *(f"{ms[name]:.1f}" for name in ("original", "torch", ours)),
                f"{ms['torch'] / ms[ours]:.2f}",
                f"{ms[ours] / ms['original']:.2f}",
                f"{ms['ordered'] / ms[ours]:.2f}" if "ordered" in ms else "–",
                f"{row['relative_error'][ours]:.0e}",
            ]
        )
    times = ["BatchNorm ms", "torch's GroupNorm ms", "gnswap ms"]
    ratios = ["faster than torch's", "time / BatchNorm", "time with orders / without"]
    return markdown_table(["network", "threads", "batch", *times, *ratios, "error"], cells)


def main() -> None:
    """Measure what is missing, and write the table."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--fresh", action="store_true", help="measure every row again")
    parser.add_argument("--only-export", action="store_true", help="make the files and stop")
    parser.add_argument("--seconds", type=float, default=5.0, help="of measuring for a row (%(default)s)")
    parser.add_argument("--networks", nargs="*", default=list(NETWORKS), choices=NETWORKS, metavar="NETWORK")
    arguments = parser.parse_args()
    code = code_version()
    rows = Rows(RESULTS / "export.rows.jsonl", code, fresh=arguments.fresh)
    for name in arguments.networks:
        keys = {(threads, batch): f"{name}: {threads} threads, batch {batch}" for threads in FILES for batch in (1, 8)}
        missing = {pair for pair, key in keys.items() if key not in rows}
        if not missing:
            continue
        print(name, file=sys.stderr)
        folder = Path(tempfile.gettempdir()) / f"gnswap-export-{code}" / name.split(",")[0]
        export(NETWORKS[name], folder)
        if arguments.only_export:
            continue
        for threads in sorted({threads for threads, _ in missing}, reverse=True):
            batches = sorted(batch for count, batch in missing if count == threads)
            context = multiprocessing.get_context("spawn")
            results = context.Queue()
            process = context.Process(target=measure, args=(folder, threads, batches, arguments.seconds, results))
            process.start()
            for _ in batches:
                row = results.get(timeout=600)
                rows.add(keys[threads, row["batch"]], {"network": name, **row})
            process.join()
    if arguments.only_export:
        return
    ordered = [row for name in arguments.networks for row in rows.rows.values() if row["network"] == name]
    data = {**environment(code, "onnx", "onnxruntime-gpu"), "size": SIZE, "rows": ordered}
    title = f"Exported networks on onnxruntime's CPU provider, {SIZE}x{SIZE}, median ms of a run"
    write("export", title, as_table(ordered), data)


if __name__ == "__main__":
    main()
