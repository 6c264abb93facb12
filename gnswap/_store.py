"""Save a converted network to a directory and load it again, bit for bit.

    DIR/model.safetensors   every tensor: the network's own, its hidden buffers, and the statistics that revert needs
    DIR/plan.json           the plan, the state that is no tensor, where the architecture comes from

Why two files: the plan stays readable, and the weights stay a file that any safetensors reader opens. Each holds the
checksum of the other, so that two halves of different conversions never pass for a whole. Nothing is pickled.
"""

from __future__ import annotations

import dataclasses
import hashlib
import json
import tempfile
from pathlib import Path
from typing import Protocol, cast

from torch import Tensor, nn

from gnswap import _sites, _weights
from gnswap._apply import apply
from gnswap._carry import origin
from gnswap._directory import readable, refuse_foreign, replaced
from gnswap._errors import PlanError, PlanMismatchError, RevertError, StoreError
from gnswap._layer import FusedGroupNorm
from gnswap._record import on_few_lines
from gnswap._records import Plan
from gnswap._report.records import FidelityReport
from gnswap._report.write import FILES as REPORT_FILES
from gnswap._report.write import write_report
from gnswap._revert import revert
from gnswap._saved import STORE_SCHEMA_VERSION, LayerState, ModelSource, Saved
from gnswap._source import discover, mismatch, rebuild

PLAN_FILE, WEIGHTS_FILE = "plan.json", "model.safetensors"


class HasModel(Protocol):
    """What `gnswap.convert` returns, as far as saving is concerned."""

    @property
    def model(self) -> nn.Module:
        """The converted network."""


def save(
    conversion_or_model: HasModel | nn.Module,
    directory: str | Path,
    *,
    source: ModelSource | None = None,
    report: FidelityReport | None = None,
) -> None:
    """Write a converted network to a directory, trained or not.

    The directory appears as a whole: after a kill at any moment, `load` finds what was there before or what is
    there now. Hooks are not saved, and neither are attributes that are no tensors, other than those of the swapped
    layers: they come from the architecture.

    Args:
        conversion_or_model: what `gnswap.convert` or `gnswap.apply` returned.
        directory: new, empty, or one that `save` wrote and that holds nothing else; parents are made.
        source: how the architecture was built; by default found out for timm models, and proven by building it.
        report: what `gnswap.report` found, to be written beside it: report.html, report.json, PNG figures. A report
            that was there before is of the network that was there, and goes with it.

    Raises:
        StoreError: the model was not converted; `directory` holds something else; a tensor cannot be stored;
            `source` does not build this network; the disk is full. What was there before is then unchanged.
        WrappedModelError: the model is wrapped (DDP, FSDP, compiled).

    Example:
        >>> import torch, gnswap
        >>> net = torch.nn.Sequential(torch.nn.Conv2d(3, 32, 1), torch.nn.BatchNorm2d(32)).eval()
        >>> converted = gnswap.convert(net, groups=4)
        >>> gnswap.save(converted, "saved")
        >>> x = torch.randn(1, 3, 8, 8)
        >>> torch.equal(gnswap.load("saved", net)(x), converted.model(x))
        True
    """
    held = conversion_or_model if isinstance(conversion_or_model, nn.Module) else conversion_or_model.model
    _sites.require_plain(held)
    record = _sites.applied(held)
    if record is None:
        raise StoreError(
            "this model was not converted by gnswap",
            found=type(held).__qualname__,
            expected="what gnswap.convert or gnswap.apply returned",
            fix="Use safetensors.torch.save_model for an ordinary model.",
        )
    tensors, aliases = _weights.first_names(held)
    original = _reverted(held)
    source, unknown = _proven(original, source)
    layers = _swapped_layers(held, record.plan)
    layouts = _weights.strides(tensors)
    tensors |= {name: _weights.storable(name, tensor) for name, tensor in _origin_tensors(layers).items()}
    with replaced(Path(directory), _foreign) as fresh:
        facts = {"plan_sha256": _plan_checksum(record.plan), "digest": record.digest}
        _weights.write(fresh / WEIGHTS_FILE, tensors, {"gnswap": json.dumps(facts)})
        saved = Saved(
            plan=record.plan.to_dict(),
            architecture=_sites.fingerprint(original),
            source=source,
            source_unknown=unknown,
            weights_sha256=_file_checksum(fresh / WEIGHTS_FILE),
            layers={path: _layer_state(layer) for path, layer in layers.items()},
            aliases=aliases,
            strides=layouts,
            training=held.training,
            other_mode=tuple(path for path, module in _sites.walk(held) if module.training != held.training),
            frozen=tuple(name for name, p in held.named_parameters(remove_duplicate=False) if not p.requires_grad),
        )
        (fresh / PLAN_FILE).write_text(on_few_lines(saved.to_json()) + "\n", encoding="utf-8")
        (fresh / WEIGHTS_FILE).chmod((fresh / PLAN_FILE).stat().st_mode)  # safetensors makes it private
        if report is not None:
            write_report(report, fresh)


def load(directory: str | Path, model: nn.Module | None = None) -> nn.Module:
    """Read a converted network that `save` wrote.

    Args:
        directory: where it was saved.
        model: a network of the original architecture (with its BatchNorms, any weights), which is left untouched
            and says on which device the result is; not needed for timm models, which are built on the CPU.

    Returns:
        The converted network with the same outputs bit for bit: weights, dtypes, memory layouts, softness,
        requires_grad, and the training mode that it was saved in. `gnswap.revert` works on it as it did before.

    Raises:
        StoreError: nothing there, a file missing or cut off, files that do not belong together, an unknown schema
            version, or the architecture is not known and `model` was not given.
        PlanMismatchError: `model` is of another architecture.

    Example:
        >>> import torch, gnswap
        >>> net = torch.nn.Sequential(torch.nn.Conv2d(3, 32, 1), torch.nn.BatchNorm2d(32))
        >>> gnswap.save(gnswap.convert(net, groups=4), "loaded")
        >>> gnswap.load("loaded", net)[1].num_groups
        4
    """
    directory = Path(directory)
    folder = readable(directory)
    saved, plan = _read_plan(directory, folder)
    tensors, digest = _read_weights(folder, saved, plan)
    if model is None:
        original = _rebuilt(directory, saved)
    else:
        _sites.require_plain(model)
        original = model
    if (found := _sites.fingerprint(original)) != saved.architecture:
        raise PlanMismatchError(
            "this network is of another architecture than the saved one",
            where=str(directory),
            expected=f"{plan.model}, fingerprint {saved.architecture[:12]}",
            found=f"{type(original).__qualname__}, fingerprint {found[:12]}",
            fix="Hand over the original network, with its BatchNorms, built as it was when it was saved.",
        )
    converted = apply(original, dataclasses.replace(plan, fingerprint=found), inplace=model is None)
    _restore(converted, saved, plan, tensors)
    converted.__dict__["_gnswap"] = _sites.Applied(plan, digest)
    return converted


def require_free(directory: str | Path) -> None:
    """Refuse early what `save` would refuse, since what is to be saved there may take hours.

    Raises:
        StoreError: it is a file, holds other files than a saved conversion, or cannot be made.
    """
    wanted = Path(directory).resolve()
    refuse_foreign(wanted, _foreign)
    there = next(folder for folder in wanted.parents if folder.exists())
    try:
        tempfile.TemporaryDirectory(prefix=".gnswap-", dir=there).cleanup()
    except OSError as error:
        raise StoreError(
            "the directory cannot be made",
            where=str(wanted),
            expected=f"a folder that can be written: {there}",
            found=f"{type(error).__name__}: {error.strerror}",
            fix="Choose another directory.",
        ) from error


def saved_source(directory: str | Path) -> ModelSource | None:
    """Where the architecture of a saved conversion comes from, without loading it.

    Raises:
        StoreError: nothing there, or plan.json cannot be read.
    """
    return _read_plan(Path(directory), readable(Path(directory)))[0].source


def _proven(original: nn.Module, source: ModelSource | None) -> tuple[ModelSource | None, str]:
    if source is None:
        return discover(original)
    if source.kind == "timm" and (difference := mismatch(original, source)) is not None:
        raise StoreError("the source does not build this network", where=str(source), found=difference)
    return source, ""


def _rebuilt(directory: Path, saved: Saved) -> nn.Module:
    if saved.source is None or saved.source.kind != "timm":
        raise StoreError(
            "the architecture is not known",
            where=str(directory),
            found=saved.source_unknown or f"it was built by {saved.source}, which is not called from a file alone",
            fix="Build the original network and hand it over: gnswap.load(directory, model).",
        )
    return rebuild(saved.source)


def _reverted(model: nn.Module) -> nn.Module:
    """The network with its norms back in place, without data."""
    try:
        return revert(_sites.skeleton(model), force=True)
    except RevertError as error:
        raise StoreError(
            "only a network with all its converted layers can be saved",
            where=error.where,
            found=error.problem,
            fix="Convert after such changes, or save with safetensors.torch.save_model.",
        ) from error


def _swapped_layers(model: nn.Module, plan: Plan) -> dict[str, FusedGroupNorm]:
    """The layers that the plan put in, by first path."""
    return {decision.paths[0]: cast(FusedGroupNorm, _sites.get(model, decision.paths[0])) for decision in plan.swaps}


def _origin_tensors(layers: dict[str, FusedGroupNorm]) -> dict[str, Tensor]:
    """What the replaced norms knew and the new layers do not hold: running statistics, counters."""
    return {
        f"{_weights.ORIGIN}{path}.{key}": buffer
        for path, layer in layers.items()
        for key, buffer in _buffers(origin(layer)).items()
    }


def _buffers(module: nn.Module | None) -> dict[str, Tensor]:
    return {} if module is None else {key: buffer for key, buffer in module._buffers.items() if buffer is not None}


def _layer_state(layer: FusedGroupNorm) -> LayerState:
    plain = {
        key: value
        for key, value in vars(origin(layer) or layer).items()
        if not key.startswith("_") and isinstance(value, str | int | float | bool | None)
    }
    return LayerState(layer.num_groups, layer.softness, layer.eps, plain)


def _restore(model: nn.Module, saved: Saved, plan: Plan, tensors: dict[str, Tensor]) -> None:
    origin_tensors = {name: tensors.pop(name) for name in list(tensors) if name.startswith(_weights.ORIGIN)}
    layers = _swapped_layers(model, plan)
    if layers.keys() != saved.layers.keys():
        different = sorted(layers.keys() ^ saved.layers.keys())
        raise StoreError("plan.json contradicts itself", where=PLAN_FILE, found=f"layers {different[:5]}")
    if origin_tensors.keys() != _origin_tensors(layers).keys():
        different = sorted(origin_tensors.keys() ^ _origin_tensors(layers).keys())
        raise StoreError("the saved statistics do not fit the model", where=WEIGHTS_FILE, found=f"{different[:5]}")
    _weights.restore(model, tensors, saved.aliases, saved.strides)
    for path, state in saved.layers.items():
        layer = layers[path]
        layer.num_groups, layer.eps = state.num_groups, state.eps
        layer._softness = state.softness  # not the property: the saved gain is right already
        shell = origin(layer)
        assert shell is not None  # apply has just made it
        for key, value in state.origin.items():
            vars(shell)[key] = value
        for key, buffer in _buffers(shell).items():
            value = origin_tensors[f"{_weights.ORIGIN}{path}.{key}"]
            shell._buffers[key] = value.to(buffer.device if not buffer.is_meta else "cpu", copy=True)
    opposite = set(saved.other_mode)
    for path, module in _sites.walk(model):
        module.training = saved.training is not (path in opposite)
    frozen = set(saved.frozen)
    for name, parameter in model.named_parameters(remove_duplicate=False):
        parameter.requires_grad_(name not in frozen)


def _read_plan(directory: Path, folder: Path) -> tuple[Saved, Plan]:
    path = folder / PLAN_FILE
    for place, kind in ((folder, "directory"), (path, "file"), (folder / WEIGHTS_FILE, "file")):
        if not (place.is_dir() if kind == "directory" else place.is_file()):
            raise StoreError(
                "no saved conversion here",
                where=str(directory),
                expected=f"the {kind} {place.name}",
                found=("a file" if place.is_file() else "nothing") if kind == "directory" else f"no {place.name}",
                fix="Give the directory that gnswap.save wrote.",
            )
    try:
        data = json.loads(path.read_text(encoding="utf-8"))
        version = data.get("schema_version") if isinstance(data, dict) else None
        if version != STORE_SCHEMA_VERSION or "weights_sha256" not in data:
            raise StoreError(
                "unknown schema version",
                where=str(path),
                expected=f"schema_version {STORE_SCHEMA_VERSION} of a saved conversion",
                found=repr(version),
                fix="Install the version of gnswap that wrote it, or save again.",
            )
        saved = Saved.from_dict(data)
        return saved, Plan.from_dict(saved.plan)
    except (OSError, ValueError, PlanError) as error:
        raise StoreError(
            "the plan cannot be read",
            where=str(path),
            expected="a whole plan.json that gnswap.save wrote",
            found=f"{type(error).__name__}: {error}",
            fix="It is cut off, edited or of another kind: save or copy it again.",
        ) from error


def _read_weights(folder: Path, saved: Saved, plan: Plan) -> tuple[dict[str, Tensor], dict[str, str]]:
    path = folder / WEIGHTS_FILE
    tensors, metadata = _weights.read(path)
    facts = json.loads(metadata.get("gnswap", "{}"))
    if _file_checksum(path) != saved.weights_sha256:
        problem, found = "the weights and the plan do not belong together", "other weights than plan.json names"
    elif facts.get("plan_sha256") != _plan_checksum(plan):
        problem, found = "the plan was changed after it was saved", "another plan than the weights name"
    else:
        return tensors, dict(facts["digest"])
    raise StoreError(
        problem,
        where=str(path.parent),
        found=found,
        fix="Save again; to change a conversion, edit the plan, apply it to the original, and save that.",
    )


def _foreign(directory: Path) -> str | None:
    """Why a directory must not be replaced by a saved conversion."""
    names = {entry.name for entry in directory.iterdir()}
    if others := sorted(names - {PLAN_FILE, WEIGHTS_FILE, *REPORT_FILES}):
        return f"it also holds {', '.join(others[:3])}"
    if names:
        try:
            data = json.loads((directory / PLAN_FILE).read_text(encoding="utf-8"))
        except (OSError, ValueError):
            data = None
        if not isinstance(data, dict) or not {"plan", "weights_sha256"} <= data.keys():
            return "its plan.json was not written by gnswap.save"
    return None


def _plan_checksum(plan: Plan) -> str:
    return hashlib.sha256(plan.to_json(indent=None).encode()).hexdigest()


def _file_checksum(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()
