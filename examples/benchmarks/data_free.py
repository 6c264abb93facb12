"""What is left of a pretrained network after the swap, without any data: naive, fresh, Opacus, gnswap.

    pip install -e '.[dev]' && pip install --no-deps opacus==1.6.0
    python examples/benchmarks/data_free.py

Networks: EfficientNet-Lite0 and Lite1 with their ImageNet weights. Photos: 251 from a Debian package (`photos.py`) and
28 from pip packages, 20 of them with their ImageNet class. Every photo goes through timm's preprocessing of the
network. Rows are stored as they are measured, so an interrupted run goes on where it stopped.

State is looked at on a copy of the network in bfloat16, eval mode, with frozen gamma and its own eps of 1e-3: a swap
that makes new layers with torch's defaults loses just these. (Beta is left to train: Opacus passes over a norm that
is frozen whole, and calls the network valid.)
"""

from __future__ import annotations

import argparse
import copy
import importlib.util
import sys
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from _report import RESULTS, Rows, code_version, environment, markdown_table, write
from photos import CACHE, photos
from rich.progress import track
from timm.layers import BatchNormAct2d
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm

import gnswap
from gnswap import _baselines, _samples
from gnswap._photos import PhotoBatches

MODELS = {"tf_efficientnet_lite0": _samples.lite0, "tf_efficientnet_lite1": _samples.lite1}
STATE = ("dtype", "eps", "train flag", "requires_grad", "gamma", "beta")


def by_gnswap(**options: Any) -> Callable[[nn.Module], nn.Module]:
    def swap(model: nn.Module) -> nn.Module:
        with warnings.catch_warnings():
            # narrow layers cannot have 32 groups: that is a row of the table, not news
            warnings.filterwarnings("ignore", ".*another number of groups than was asked for", UserWarning)
            return gnswap.convert(model, **options).model

    return swap


def by_opacus(model: nn.Module) -> nn.Module:
    from opacus.validators import ModuleValidator

    fixed: nn.Module = ModuleValidator.fix(model)
    return fixed


def by_opacus_unfused(model: nn.Module) -> nn.Module:
    """Opacus knows torch's own BatchNorm2d only: take timm's fused norm + activation apart for it."""
    model = copy.deepcopy(model)
    for name, module in list(model.named_modules()):
        if type(module) is BatchNormAct2d:
            norm = nn.BatchNorm2d(module.num_features, module.eps)
            norm.__dict__.update({key: module.__dict__[key] for key in norm.__dict__})
            norm._modules = {}
            parent, _, last = name.rpartition(".")
            setattr(model.get_submodule(parent), last, nn.Sequential(norm, module.drop, module.act))
    return by_opacus(model)


SWAPS: dict[str, Callable[[nn.Module], nn.Module]] = {
    "naive: gamma, beta into GroupNorm(32)": _baselines.naive_group_norm,
    "fresh GroupNorm(32)": _baselines.fresh_group_norm,
    "opacus ModuleValidator.fix": by_opacus,
    "opacus, timm's BatchNormAct2d taken apart first": by_opacus_unfused,
    "gnswap, groups=32, softness=0": by_gnswap(groups=32, softness=0.0),
    "gnswap, groups=8, softness=0": by_gnswap(groups=8, softness=0.0),
    "gnswap, groups=32": by_gnswap(groups=32),
    "gnswap, groups=8": by_gnswap(groups=8),
    "gnswap, default": by_gnswap(),
}


class Recorded(nn.Module):
    """The original's answers, computed once and given again for every conversion."""

    def __init__(self, model: nn.Module, batches: list[Tensor]) -> None:
        super().__init__()
        with torch.no_grad():
            self.answers = {batch.data_ptr(): model(batch) for batch in track(batches, "original", transient=True)}

    def forward(self, x: Tensor) -> Tensor:
        return self.answers[x.data_ptr()]


def state_kept(model: nn.Module, swap: Callable[[nn.Module], nn.Module]) -> dict[str, float | None]:
    """Share of the swapped layers that keep each piece of state; None where no layer is swapped."""
    probe = copy.deepcopy(model).to(torch.bfloat16).eval()
    norms = {name: module for name, module in probe.named_modules() if isinstance(module, _BatchNorm)}
    for norm in norms.values():
        norm.weight.requires_grad_(False)
    modules = dict(swap(probe).named_modules())
    kept, swapped = dict.fromkeys(STATE, 0), 0
    for name, old in norms.items():
        # where Opacus was given the norm and its activation apart, the norm is the first of the two
        new = modules.get(f"{name}.0", modules[name])
        if isinstance(new, _BatchNorm):
            continue
        swapped += 1
        kept["dtype"] += new.weight.dtype == old.weight.dtype
        kept["eps"] += new.eps == old.eps
        kept["train flag"] += new.training == old.training
        kept["requires_grad"] += new.weight.requires_grad == old.weight.requires_grad
        kept["gamma"] += torch.equal(new.weight.to(old.weight.dtype), old.weight)
        kept["beta"] += torch.equal(new.bias.to(old.bias.dtype), old.bias)
    return {key: value / swapped if swapped else None for key, value in kept.items()}


def measure(
    model: nn.Module, answers: Recorded, batches: list[tuple[Tensor, Tensor]], swap: Callable[[nn.Module], nn.Module]
) -> dict[str, Any]:
    """One row of the table."""
    converted = swap(model)
    left = sum(isinstance(module, _BatchNorm) for module in converted.modules())
    all_norms = sum(isinstance(module, _BatchNorm) for module in model.modules())
    shown = track(batches, "converted", transient=True)
    return {
        "layers_converted": all_norms - left,
        "layers_left": left,
        "state_kept": state_kept(model, swap),
        "fidelity": gnswap.compare(answers, converted, shown, layers=False).to_dict(),
    }


def load_photos(model: nn.Module, files: list[Path]) -> list[tuple[Tensor, Tensor]]:
    """All photos for one network, with the ImageNet class or -1."""
    samples = _samples.sample_photos()
    labels = [-1 if photo.label is None else photo.label for photo in samples] + [-1] * len(files)
    batches = PhotoBatches([*(photo.image for photo in samples), *files], model, batch_size=16)
    return list(zip(track(batches, "photos", transient=True), torch.tensor(labels).split(16), strict=True))


def as_table(rows: list[dict[str, Any]]) -> str:
    """The rows as markdown."""
    cells = []
    for row in rows:
        fidelity, state = row["fidelity"], row["state_kept"]
        lost = [key for key, share in state.items() if share is not None and share < 1]
        kept = "–" if not row["layers_converted"] else "all" if not lost else "not " + ", ".join(lost)
        accuracies = (
            f"{fidelity['accuracy_converted']:.2f} of {fidelity['accuracy_original']:.2f}"
            if row["layers_converted"]
            else "–"
        )
        shares = [f"{fidelity[key]:.3f}" if row["layers_converted"] else "–" for key in ("agreement", "agreement_sure")]
        counts = [str(row["layers_converted"]), str(row["layers_left"])]
        cells.append([row["model"], row["swap"], *counts, kept, *shares, accuracies])
    header = ["network", "swap", "converted", "left", "state kept", "agreement", "where sure", "accuracy (20 labels)"]
    return markdown_table(header, cells)


def main() -> None:
    """Measure what is missing, and write the table."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--fresh", action="store_true", help="measure every row again")
    parser.add_argument("--cache", type=Path, default=CACHE, help="where the photos are kept (%(default)s)")
    arguments = parser.parse_args()
    code = code_version()
    if importlib.util.find_spec("opacus") is None:
        sys.exit("Opacus is compared with here: pip install --no-deps opacus==1.6.0")
    files = photos(arguments.cache)
    rows = Rows(RESULTS / "data_free.rows.jsonl", code, fresh=arguments.fresh)
    for name, build in MODELS.items():
        missing = {swap: function for swap, function in SWAPS.items() if f"{name}: {swap}" not in rows}
        if not missing:
            continue
        model = build()
        batches = load_photos(model, files)
        answers = Recorded(model, [batch for batch, _ in batches])
        for swap, function in missing.items():
            print(f"{name}: {swap}", file=sys.stderr)
            rows.add(f"{name}: {swap}", {"model": name, "swap": swap, **measure(model, answers, batches, function)})
    ordered = [rows.rows[f"{name}: {swap}"] for name in MODELS for swap in SWAPS]
    data = {**environment(code, "opacus", "foolbox"), "rows": ordered}
    first = ordered[0]["fidelity"]
    title = f"What is left after the swap, without any data ({first['photos']} photos)"
    write("data_free", title, as_table(ordered), data)


if __name__ == "__main__":
    main()
