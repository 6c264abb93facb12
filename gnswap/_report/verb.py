"""report: what a conversion kept of a network, measured lever by lever, as a record, a page and figures."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

from torch import nn

from gnswap import _sites
from gnswap._convert import Conversion
from gnswap._errors import ArgumentError, PlanMismatchError
from gnswap._records import Plan
from gnswap._report.levers import stages
from gnswap._report.measure import measure
from gnswap._report.photos import Worst
from gnswap._report.records import FidelityReport, Stage
from gnswap._report.spread import layer_report
from gnswap._report.write import write_report


def report(
    original: nn.Module,
    converted: Conversion | nn.Module,
    photos: Iterable[Any] | None = None,
    *,
    directory: str | Path | None = None,
    held_out: bool | None = None,
    class_names: Sequence[str] | None = None,
    photo_names: Sequence[str] | None = None,
    command: str | None = None,
) -> FidelityReport:
    """Measure what a conversion kept, with one lever after another in force, and write it as a page with pictures.

    The stages are: gamma and beta copied as everybody does it, channels standardised, softness, order and signs from
    photos, corrections, and the network as it is now, where it was refitted, healed or trained further. Every photo
    goes through the network once for each of them, and twice more. Memory does not grow with the number of photos, but
    for a table of 40 bytes for each photo and channel.

    Args:
        original: the network with BatchNorm; left as it is.
        converted: what `gnswap.convert`, `apply`, `heal` or `load` made of it.
        photos: input batches, read once: tensors with the batch in their first dimension, or tuples whose first item
            is one and whose second may be class labels `[N]`. None: nothing is measured, and the report says
            what the weights alone show.
        directory: where to write report.html, report.json and, with matplotlib, PNG figures; it may be one that
            `gnswap.save` wrote. Each file is replaced as a whole. None: nothing is written.
        held_out: whether these photos took no part in choosing the plan; the page warns where they did.
        class_names: of the outputs; for timm networks with ImageNet's classes timm knows them.
        photo_names: of the photos, in their order.
        command: what to call the way in which this came about, for the page.

    Returns:
        All figures, as plain data: its `from_json` reads report.json.

    Raises:
        ArgumentError: `converted` carries no record of a conversion.
        PlanMismatchError: it was made from another architecture than `original`.
        CalibrationError: there are no photos, or one is no tensor or not finite.
        StoreError: the directory cannot be written.

    Example:
        >>> import torch, gnswap
        >>> net = torch.nn.Sequential(torch.nn.Conv2d(3, 8, 3), torch.nn.BatchNorm2d(8), torch.nn.Flatten()).eval()
        >>> found = gnswap.report(net, gnswap.convert(net), [torch.randn(4, 3, 8, 8)], directory="kept")
        >>> [stage.name for stage in found.stages]
        ['naive copy', 'standardised', 'softness']
    """
    network = converted.model if isinstance(converted, Conversion) else converted
    record = _sites.applied(network)
    if record is None:
        raise ArgumentError(
            "this network carries no record of a conversion",
            where="report",
            expected="what gnswap.convert, apply or load returned",
            found=type(network).__qualname__,
        )
    plan = record.plan
    _require_same(original, plan)
    taken_apart = stages(plan)
    worst = Worst(original, class_names, photo_names)
    found: list[Stage] = []
    statistics = None
    if photos is not None:
        trained = _sites.digest(network) != record.digest
        found, statistics = measure(original, network, taken_apart, photos, worst, trained=trained)
    layers = tuple(
        layer_report(original, decision, [(lever, swaps[place]) for lever, swaps in taken_apart], statistics)
        for place, decision in enumerate(plan.swaps)
    )
    fidelity = found[-1].fidelity if found else None
    made = FidelityReport(
        model=_name(original),
        photos=0 if fidelity is None else fidelity.photos,
        held_out=held_out,
        swapped=len(plan.swaps),
        kept=tuple(f"{decision.name}: {decision.reason}" for decision in plan.kept),
        agreement_interval=found[-1].interval if found else None,
        agreement_sure_interval=found[-1].interval_sure if found else None,
        stages=tuple(found),
        layers=layers,
        answers=worst.table(),
        worst=worst.worst(),
        notes=_notes(converted, plan),
        options=plan.options,
        versions=plan.versions,
        command=command,
    )
    if directory is not None:
        write_report(made, Path(directory))
    return made


def _notes(converted: Conversion | nn.Module, plan: Plan) -> tuple[str, ...]:
    """What the conversion had to say, or the plan; without the kept layers, which have a place of their own."""
    if not isinstance(converted, Conversion):
        return plan.notes
    kept = {f"kept {decision.name}: {decision.reason}" for decision in plan.kept}
    return tuple(note for note in converted.report.notes if note not in kept)


def _name(model: nn.Module) -> str:
    """What to call a network: timm's name of its architecture, or its class."""
    config = getattr(model, "pretrained_cfg", None)
    architecture = config.get("architecture") if isinstance(config, Mapping) else None
    return str(architecture or type(model).__qualname__)


def _require_same(original: nn.Module, plan: Plan) -> None:
    found = _sites.fingerprint(original)
    if found != plan.fingerprint:
        raise PlanMismatchError(
            "the networks are of different architectures",
            where="report",
            expected=f"the original, fingerprint {plan.fingerprint[:12]}",
            found=found[:12],
            fix="Pass the network with BatchNorm that was converted.",
        )
